"""Write docs/reference/fairness.md: what every purifier is given, spends and leaves out, so that tables compare.

    python docs/generate_ledger.py

From the docstrings, docs/ledger.toml, and, where they are committed, the records of the suite ``runtime``. A
test compares the committed page with what this makes.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from unbackdoor import catalogue
from unbackdoor.bench.defend import is_older
from unbackdoor.bench.store import Record, Store
from unbackdoor.purify.registry import PURIFIERS

HERE = Path(__file__).parent
PAGE = HERE / "reference" / "fairness.md"
FACTS = HERE / "ledger.toml"
RECORDS = HERE.parent / "results" / "runtime-cpu" / "records.jsonl"

HEAD = """# Fairness ledger

Made by `python docs/generate_ledger.py`; change the docstrings or docs/ledger.toml.

What a comparison of defences rests on. All purifiers get the same model, the same clean images (500 by default, drawn
balanced over the classes by the seed) and a seed, and nothing else; none sees a trigger, a poisoned image, a test image
or the attack success rate, which `make lint` checks by the imports. **By default all methods that prune share one
rule for how much**, so that a table compares rankings; `--paper` takes each paper's own. Two differences are left. The guard
of MNP also asks each removal for a benefit where MNP exposed the backdoor, and by default the other methods have no such
place; `selection.expose=unlearnt` with `selection.guard.benefit` gives them one, RNP's unlearnt copy; where MNP found triggers it also tunes what pruning left. TSBD clears weights of
many filters at once and fine-tunes, so it walks over shares, not filters: it keeps a fifth of the images, takes the largest
share whose whole defence costs no more accuracy on these than the guard allows, and of the guard knows that limit alone; the
others measure on the images that they learn from. How our defaults were chosen stands in RESULTS.md.

Image passes and seconds come from the records of `unbackdoor bench runtime` (one BadNets model, 500 clean images,
one thread beside another run); passes compare across machines, seconds do not. A pass in which the layers before the changed one
answered from memory, as in the guarded walk, counts as the share of its multiply-adds that it did again.
"""

UNMEASURED = "The records of that suite are not in the project yet, so the columns on cost are left out.\n"

COSTS = ("images", "passes, thousands", "seconds")
"""Columns that need records."""

_SECTIONS = (
    "Deviations", "Reconstructed", "Choices of ours", "Not reproduced", "Beyond the paper", "The paper does this",
)  # fmt: skip


def page() -> str:
    """Return the whole page."""
    facts = tomllib.loads(FACTS.read_text())
    costs = measured()
    columns = ["method", "gets", *(COSTS if costs else ()), "how much, by default", "in the paper"]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    rows += [_row(cls, facts[name], costs.get(name), costs=bool(costs)) for name, cls in PURIFIERS.items()]
    sections = [_section(cls, facts[name]) for name, cls in PURIFIERS.items()]
    note = "" if costs else f"\n{UNMEASURED}"
    return "\n".join([HEAD + note, *rows, "", *sections])


def measured() -> dict[str, Record]:
    """Return a record of each method with today's default options, by name."""
    found: dict[str, Record] = {}
    for record in Store(RECORDS).records().values():
        cell = record.get("cell")  # a training has none
        usual = cell and not cell.get("paper") and not cell.get("options") and not is_older(cell)
        if usual and record["status"] == "ok":
            found[cell["method"]] = record
    return found


def _row(cls: type[Any], facts: dict[str, Any], record: Record | None, *, costs: bool) -> str:
    entry = catalogue.entry("purifier", cls)
    cost = [""] * len(COSTS) if costs else []
    if record is not None:
        spent = record["cost"]
        passes = (
            f"{spent['forward_images'] / 1000:.1f} forward, {spent['backward_images'] / 1000:.1f} backward"
        )
        cost = [str(record["cell"]["clean_images"]), passes, f"{spent['seconds']:.1f}"]
    link = f"[{entry.name}](#{entry.name})"
    return f"| {' | '.join([link, entry.needs, *cost, facts['ours'], facts['theirs']])} |"


def _section(cls: type[Any], facts: dict[str, Any]) -> str:
    entry = catalogue.entry("purifier", cls)
    paragraphs = catalogue.description(cls).split("\n\n")
    ours = [_markdown(p) for p in paragraphs if p.startswith(_SECTIONS)]
    if not ours:
        raise ValueError(
            f"the docstring of {cls.__name__} has no paragraph that starts with one of {', '.join(_SECTIONS)}; "
            "say there what differs from the paper, or that nothing does ('Deviations: none.')."
        )
    lines = [f"## {entry.name}", "", f"*{entry.title}. {entry.source}.*", ""]
    for paragraph in ours:
        lines += [paragraph, ""]
    if facts["bugs"]:
        lines += ["Not repeated from elsewhere:", "", *(f"- {bug}" for bug in facts["bugs"]), ""]
    return "\n".join(lines)


def _markdown(text: str) -> str:
    return re.sub(r"``([^`]+)``", r"`\1`", text)


if __name__ == "__main__":
    PAGE.write_text(page())
