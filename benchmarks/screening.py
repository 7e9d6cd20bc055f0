"""What `unbackdoor screen` catches of the paper's ten attacks, and what it takes for triggered.

    python benchmarks/screening.py --data CIFAR10_PARQUET_FOLDER --out runs/screening.jsonl

Of each model's test images 500 are the defender's, 500 others carry the trigger, and 500 others are clean
inputs. Each detector is asked once; its p-values are read alone, two together (the default) and all three
together. Goes on where it was stopped; the table is printed in the end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbackdoor import rng
from unbackdoor.bench import zoo
from unbackdoor.bench.cell import key_of
from unbackdoor.bench.recording import now, versions
from unbackdoor.bench.saliency import triggered
from unbackdoor.bench.store import Store
from unbackdoor.data import load_images
from unbackdoor.data.splits import balanced_order
from unbackdoor.detect.screening import Part, Screening, at_most, p_values, together
from unbackdoor.rates import Rate
from unbackdoor.types import LabelledImages, as_float

MODELS = ("badnets", "trojan", "blend", "cl", "sig", "iab", "wanet", "fc", "dfst", "lira")
WAYS: dict[str, tuple[Part, ...]] = {
    "strip": ("strip",),
    "ibd_psc": ("ibd_psc",),
    "rnp_sample": ("rnp_sample",),
    "two": ("strip", "ibd_psc"),
    "three": ("strip", "ibd_psc", "rnp_sample"),
}
RATES = (0.01, 0.05)
COUNT = 500


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--zoo", type=Path, default=Path("zoo"))
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kept", type=float, default=Screening().kept)
    options = parser.parse_args()
    test, store = load_images(options.data, split="test"), Store(options.out)
    for name in options.models:
        entry = zoo.entry_named(options.zoo, name)
        asked = {
            "model": name,
            "sha256": entry.card["sha256"],
            "seed": options.seed,
            "kept": options.kept,
        }
        if key_of(asked) in store.records():
            continue
        start = time.perf_counter()
        found = screened(entry, test, options.seed, options.kept)
        spent = round(time.perf_counter() - start, 1)
        store.add(
            {"key": key_of(asked), "asked": asked, "status": "ok", **found, "seconds": spent}
            | {**versions(), "created": now()}
        )
        print(f"{name}: {spent} s", flush=True)
    print(table(list(store.records().values()), options.models))


def screened(entry: zoo.Entry, test: LabelledImages, seed: int, kept: float) -> dict[str, Any]:
    """Return what each way catches of triggered and of clean inputs at each rate."""
    infected = zoo.load_infected(entry)
    order = balanced_order(test.labels, rng.generator(seed))
    clean, rest = test.subset(order[:COUNT]), test.subset(order[COUNT:])
    bad_rows = torch.nonzero(infected.label_rule.counts(rest.labels)).flatten()[:COUNT]
    others = torch.ones(len(rest), dtype=torch.bool)
    others[bad_rows] = False
    good = rest.subset(torch.nonzero(others).flatten()[-COUNT:])
    bad = triggered(rest.subset(bad_rows), infected)
    inputs = torch.cat([as_float(bad.images), as_float(good.images)])
    asked = Screening(WAYS["three"], kept=kept).asked
    p = p_values(asked, infected.model, inputs, clean, kept=kept, generator=rng.generator(seed))
    return {way: caught({name: p[name] for name in names}, len(bad)) for way, names in WAYS.items()}


def caught(p: Mapping[str, Tensor], triggered_first: int) -> dict[str, Any]:
    """Return the share of the triggered and of the clean inputs that is flagged, by rate."""
    parts = together(p).tensor_split([triggered_first])
    return {
        f"{rate:g}": {
            kind: Rate.of(at_most(part, rate)).describe()
            for kind, part in zip(("triggered", "clean"), parts, strict=True)
        }
        for rate in RATES
    }


def table(records: Sequence[Mapping[str, Any]], models: Sequence[str]) -> str:
    """Return a Markdown table: triggered / clean inputs flagged at the first rate, in per cent."""
    by_model = {record["asked"]["model"]: record for record in records}
    lines = [f"| model | {' | '.join(WAYS)} |", "|" + " --- |" * (len(WAYS) + 1)]
    for name in models:
        cells = [_shares(by_model[name][way][f"{RATES[0]:g}"]) for way in WAYS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    means = [
        " / ".join(
            f"{100 * sum(by_model[m][way][f'{RATES[0]:g}'][kind]['value'] for m in models) / len(models):.1f}"
            for kind in ("triggered", "clean")
        )
        for way in WAYS
    ]
    return "\n".join([*lines, f"| mean | {' | '.join(means)} |"])


def _shares(found: Mapping[str, Any]) -> str:
    return " / ".join(f"{100 * found[kind]['value']:.1f}" for kind in ("triggered", "clean"))


if __name__ == "__main__":
    main()
