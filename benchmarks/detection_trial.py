"""Do detectors tell infected models from clean ones? Train models, score each with each detector, tables.

    python benchmarks/detection_trial.py --data cifar10=DIR imagenet12=DIR --out runs/trial --jobs 2
    python benchmarks/detection_trial.py --out runs/trial --tables

Killed and started again, it goes on where it was; several may share one folder. `--sets`, `--models` and
`--detectors` choose a part; a detector with options of its own is written as `nc:statistic=ratio`. Clean
images come from the test split, which no model was trained on. Thresholds come from one half of the clean
models of a data set, figures from the other half and all infected models; those whose attack did not take
are left out and counted. The models are described in detection_trial.toml and trained by build_zoo.py.

`--zoo DIR` scores models that are there, such as those of the zoo, instead of training any, and
`--calibration FILE` takes the thresholds from a file of `unbackdoor calibrate`, so that all clean models are
tested but those that it was made from; what it does not hold for is left out and counted:

    python benchmarks/detection_trial.py --zoo zoo --sets cifar10 --data cifar10=DIR --out runs/zoo-trial
    python benchmarks/detection_trial.py --out runs/zoo-trial --tables --by-model --calibration FILE
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from unbackdoor.bench import trial, zoo
from unbackdoor.bench.store import Store
from unbackdoor.bench.trial_tables import (
    attack_table,
    columns,
    comparable,
    model_table,
    ratio_table,
    scored,
    summary_table,
)
from unbackdoor.data import load_images
from unbackdoor.detect.calibration import read_calibration
from unbackdoor.detect.registry import MODEL_DETECTORS
from unbackdoor.errors import UnbackdoorError

SPEC = Path(__file__).with_suffix(".toml")
IN_THE_SCAN = ("collapse", "recovery", "mnp", "trigger_search", "head_weights")
DETECTORS = (trial.SCAN, *(name for name in MODEL_DETECTORS if name not in IN_THE_SCAN))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--spec", type=Path, default=SPEC)
    parser.add_argument("--data", nargs="*", default=[], metavar="SET=PATH")
    parser.add_argument("--sets", nargs="+", help="data sets; all by default")
    parser.add_argument("--models", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--detectors", nargs="+", default=DETECTORS)
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, of one thread each")
    parser.add_argument("--no-training", action="store_true", help="score the models that are there")
    parser.add_argument("--zoo", type=Path, help="score the models of this folder, train none")
    parser.add_argument("--calibration", type=Path, help="a file that the thresholds come from")
    parser.add_argument("--tables", action="store_true", help="compute nothing, print the tables")
    parser.add_argument("--by-model", action="store_true", help="with --tables: a row for each model, too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    store = Store(options.out / "scores.jsonl")
    if not options.tables:
        sets = tomllib.loads(options.spec.read_text())["sets"]
        paths = dict(pair.split("=", 1) for pair in options.data)
        for name in options.sets or sets:
            data = paths.get(name) or sets[name].get("data")
            if data is None:
                parser.error(f"--data {name}=PATH is needed, or leave {name} out with --sets")
            if not (options.no_training or options.zoo):
                _train(options, name, sets[name], data)
            _score(options, name, sets[name], data, store)
    if not options.worker:
        _print_tables(options, store)


def _train(options: argparse.Namespace, name: str, described: dict[str, Any], data: str) -> None:
    root = options.out / name
    root.mkdir(parents=True, exist_ok=True)
    spec = root / "models.toml"
    spec.write_text(
        trial.specification(described["defaults"], trial.expand(described["grids"], described.get("vary")))
    )
    command = [sys.executable, str(Path(__file__).with_name("build_zoo.py"))]
    command += ["--spec", str(spec), "--data", data, "--out", str(root), "--jobs", str(options.jobs)]
    # Attacks that did not take end it with an error; they are counted in the tables.
    subprocess.run([*command, "--models", *options.models], check=False)  # noqa: S603


def _score(
    options: argparse.Namespace, name: str, described: dict[str, Any], data: str, store: Store
) -> None:
    if options.jobs > 1:
        # Every process is told what this one was, and the store keeps them from doing a question twice.
        command = [sys.executable, __file__, *sys.argv[1:], "--jobs", "1", "--no-training", "--sets", name]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        workers = [
            subprocess.Popen([*command, "--worker"], env=environment)  # noqa: S603
            for _ in range(options.jobs)
        ]
        for worker in workers:
            worker.wait()
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    pool = load_images(data, split="test")
    asked = trial.Trial(options.zoo or options.out / name, pool)
    trial.run(asked, questions(options, name, described), store, said=_say)


def questions(options: argparse.Namespace, name: str, described: dict[str, Any]) -> Iterator[trial.Question]:
    """Yield the questions, detector by detector, so that a run that is stopped early has whole columns."""
    try:
        entries = zoo.entries(options.zoo or options.out / name)
    except UnbackdoorError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return
    chosen = [e for e in entries if any(fnmatch.fnmatch(e.name, pattern) for pattern in options.models)]
    for text in options.detectors:
        detector, _, given = text.partition(":")
        for entry in chosen:
            yield trial.question(
                entry,
                name,
                detector,
                [part for part in given.split(",") if part],
                clean_images=described.get("images", 500),
            )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_tables(options: argparse.Namespace, store: Store) -> None:
    records = list(store.records().values())
    calibration = read_calibration(options.calibration) if options.calibration else None
    if calibration is not None:
        records, left_out = comparable(records, calibration)
        for reason, count in left_out.items():
            _say(f"left out, as {options.calibration} does not hold for them: {count} models {reason}.")
    models = scored(records)
    invalid = {(r["cell"]["data"], r["cell"]["model"]) for r in records if not r.get("valid", True)}
    found = columns(models, options.alpha, calibration)
    clean = sum(model.is_clean for model in models)
    print(
        f"{clean} clean and {len(models) - clean} infected models; {len(invalid)} whose attack did not take"
    )
    print("are left out. The adaptive attack has a row in the tables of attacks and no part in this one.\n")
    print(summary_table(found), end="\n\n")
    for data in dict.fromkeys(column.data for column in found):
        print(attack_table(found, data), end="\n\n")
    print(ratio_table(models))
    if options.by_model:
        for data in dict.fromkeys(column.data for column in found):
            print("", model_table(models, found, data), sep="\n")


if __name__ == "__main__":
    main()
