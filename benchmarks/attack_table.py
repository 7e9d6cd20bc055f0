"""Print the table of a zoo in Markdown: what each infected model does, beside the MNP paper's row.

python benchmarks/attack_table.py zoo
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unbackdoor.bench.zoo import Entry, entries

# CA and ASR of the infected models in the MNP paper (arXiv 2405.17750), in per cent.
PAPER = {
    "cifar10": {
        "badnets": (92.43, 100.0),
        "trojan": (92.68, 100.0),
        "blend": (92.15, 99.99),
        "cl": (91.55, 98.93),
        "sig": (93.52, 99.14),
        "iab": (94.60, 99.66),
        "wanet": (92.12, 98.81),
        "fc": (93.61, 100.0),
        "dfst": (95.50, 100.0),
        "lira": (91.20, 97.78),
    },
    "imagenet12": {
        "badnets": (91.89, 100.0),
        "trojan": (91.50, 99.87),
        "blend": (89.24, 100.0),
        "cl": (88.91, 90.32),
        "wanet": (88.69, 95.48),
        "fc": (87.58, 94.36),
    },
}
LOW_RATE = 0.05
COLUMNS = (
    "model", "attack", "poisoned", "CA", "ASR", "RA", "floor", "decoys", "PSNR", "SSIM", "max",
    "CPU s", "valid", "paper CA / ASR",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--paper", choices=sorted(PAPER), default="cifar10")
    options = parser.parse_args()
    print(table(entries(options.zoo), PAPER[options.paper]))


def table(zoo: list[Entry], paper: Mapping[str, tuple[float, float]]) -> str:
    """Return the table, attacks of the paper first, clean models last, and what it has no column for."""
    order = {name: place for place, name in enumerate(paper)}
    zoo = sorted(zoo, key=lambda e: (e.is_clean, order.get(e.card["attack"] or "", len(order)), e.name))
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(_row(entry, paper) for entry in zoo)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    unrounded = [
        f"{entry.name} {_percent(entry.rate('attack_success_float'))}"
        for entry in zoo
        if entry.rate("attack_success_float") is not None
    ]
    if unrounded:
        lines += ["", f"ASR on triggered images that are not rounded to 8 bits: {', '.join(unrounded)}."]
    return "\n".join(lines)


def _row(entry: Entry, paper: Mapping[str, tuple[float, float]]) -> tuple[str, ...]:
    card = entry.card
    validity: dict[str, Any] = card.get("validity", {})
    stealth: dict[str, Any] = validity.get("stealth", {})
    differs = card.get("differs_from_paper", {})
    # The paper's rows are all-to-one at high rates; beside others they would mislead.
    other = "rule" in differs or float(differs.get("poison_fraction", {}).get("here", 1)) < LOW_RATE
    printed = None if other else paper.get(card["attack"] or "")
    decoys = [
        f"{name} {100 * rate['value']:.1f}" for name, rate in validity.get("decoy_accuracy", {}).items()
    ]
    psnr = stealth.get("psnr_db")
    return (
        entry.name,
        card["attack"] or "-",
        str(card.get("poisoned", "-")),
        *(_percent(entry.rate(name)) for name in ("clean_accuracy", "attack_success", "robust_accuracy")),
        _percent(entry.rate("natural_floor")),
        ", ".join(decoys) or "-",
        f"{psnr:.1f}" if psnr else "-",
        f"{stealth['ssim']:.3f}" if stealth else "-",
        f"{255 * stealth['max_change']:.0f}" if stealth else "-",
        f"{card['cpu_seconds']:.0f}" if "cpu_seconds" in card else "-",
        {True: "yes", False: "no", None: "-"}[validity.get("valid")],
        f"{printed[0]:.2f} / {printed[1]:.2f}" if printed and card.get("poisoned") else "-",
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


if __name__ == "__main__":
    main()
