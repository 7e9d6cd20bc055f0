"""Every purifier on every model of a zoo, over seeds; killed and started again, it goes on where it was.

    python benchmarks/defences.py --data DIR_WITH_TRAIN_AND_TEST_PARQUET --out runs/defences.jsonl --jobs 2
    python benchmarks/defences.py --out runs/defences.jsonl --tables

All get the same clean images for a seed, and nothing else; how many filters a method prunes is decided from
them by the same rule (`--paper` takes each paper's own). A method with options of its own is written as
`mnp:score=sum,suppression.mu=0`.

MNP's defaults were chosen with the models of `TUNING` in sight; `--half report` leaves these out.
"""

from __future__ import annotations

import argparse
import fnmatch
from pathlib import Path

from unbackdoor.bench import zoo
from unbackdoor.bench.cell import Cell
from unbackdoor.bench.defend import Lines, cell_of
from unbackdoor.bench.executors import Inline, Pool
from unbackdoor.bench.laboratory import Laboratory
from unbackdoor.bench.runner import drive
from unbackdoor.bench.store import Store
from unbackdoor.bench.tables import model_table, summary_table
from unbackdoor.purify.registry import PURIFIERS

TUNING = ("badnets", "badnets-1pct", "blend", "blend-2pct", "cl", "clean", "dfst", "iab", "wanet")
"""Models that were in sight while MNP's defaults were chosen; claims rest on the others."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data")
    parser.add_argument("--zoo", type=Path, default=Path("zoo"))
    parser.add_argument("--methods", nargs="+", default=list(PURIFIERS))
    parser.add_argument("--models", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--half", choices=("tuning", "report", "both"), default="both")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--test-images", type=int, default=0)
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--reactivate", action="store_true")
    parser.add_argument(
        "--oracle", action="store_true", help="record CA and ASR over pruned filters; uses the trigger"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--tables", action="store_true", help="compute nothing, print the tables")
    options = parser.parse_args()
    store = Store(options.out)
    if options.tables:
        records = sorted(store.records().values(), key=lambda r: (r["cell"]["model"], r["cell"]["seed"]))
        records = [record for record in records if wanted(record["cell"]["model"], options)]
        print(summary_table(records), model_table(records), sep="\n\n")
        return
    if options.data is None:
        parser.error("--data is needed to compute anything")
    executor = Inline() if options.jobs == 1 else Pool(options.jobs)
    laboratory = Laboratory(options.data, (options.zoo,))
    drive(cells(options), laboratory, store, executor, watcher=Lines(lambda line: print(line, flush=True)))


def cells(options: argparse.Namespace) -> list[Cell]:
    """Return the questions, seed by seed, so that a run that is stopped early is balanced."""
    return [
        cell_of(
            entry,
            method.partition(":")[0],
            data="cifar10",
            paper=options.paper,
            options=dict(part.split("=", 1) for part in method.partition(":")[2].split(",") if part),
            clean_images=options.images,
            seed=seed,
            test_images=options.test_images,
            reactivate=options.reactivate,
            oracle=options.oracle,
        )
        for seed in options.seeds
        for method in options.methods
        for entry in zoo.entries(options.zoo)
        if wanted(entry.name, options)
    ]


def wanted(model: str, options: argparse.Namespace) -> bool:
    """Whether a model is among those asked for."""
    half = options.half == "both" or (model in TUNING) == (options.half == "tuning")
    return half and any(fnmatch.fnmatch(model, pattern) for pattern in options.models)


if __name__ == "__main__":
    main()
