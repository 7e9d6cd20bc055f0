"""Train the models of zoo/zoo.toml; killed and started again, each goes on where it was.

    python benchmarks/build_zoo.py --data DIR_WITH_TRAIN_AND_TEST_PARQUET --out zoo --jobs 2

Several jobs share one folder, on one machine, without doing a model twice; each has one thread, so that they
do not slow each other down. A model whose attack did not take is kept and named at the end. When all are
there, `--measure` measures them once more, now that the clean twin is known, and completes their cards.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from unbackdoor.bench import training, zoo
from unbackdoor.bench.spec import jobs, read_spec
from unbackdoor.data import load_images
from unbackdoor.errors import UnbackdoorError

SPEC = Path(__file__).parent.parent / "zoo" / "zoo.toml"
# Without these, glibc gives every activation back to the kernel and gets it again, page by page.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--spec", type=Path, default=SPEC)
    parser.add_argument("--models", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--jobs", type=int, default=1, help="models trained side by side")
    parser.add_argument("--measure", action="store_true", help="train nothing, complete the cards")
    options = parser.parse_args()
    if options.measure:
        _measure(options)
        return
    if options.jobs > 1:
        sys.exit(_side_by_side(options))
    torch.set_num_threads(1)
    failed = [
        name
        for name, job in jobs(read_spec(options.spec), options.data, options.out).items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in options.models) and not _build(name, job)
    ]
    if failed:
        sys.exit(f"not valid: {', '.join(failed)}")


def _side_by_side(options: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--data", options.data, "--out", str(options.out)]
    command += ["--spec", str(options.spec), "--models", *options.models]
    environment = os.environ | KEEP_MEMORY | {"OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen(command, env=environment) for _ in range(options.jobs)]  # noqa: S603
    # One that was killed has a negative code.
    codes = [worker.wait() for worker in workers]
    return int(any(codes))


def _build(name: str, job: training.Job) -> bool:
    """Train one model unless another process does; return False if it failed, or its attack did."""
    if (job.out / "card.json").exists():
        return True
    try:
        card = training.run_alone(
            job.ready(), lambda stage, done, total: _say(name, f"{stage} {done}/{total}")
        )
    except UnbackdoorError as error:
        _say(name, f"error: {error}")
        return False
    if card is None:
        return True
    _say(name, json.dumps({key: rate["value"] for key, rate in card["metrics"].items()}))
    problems: list[str] = card.get("validity", {}).get("problems", [])
    for problem in problems:
        _say(name, f"not valid: {problem}")
    return not problems


def _measure(options: argparse.Namespace) -> None:
    test = load_images(Path(options.data), split="test")
    for entry in zoo.entries(options.out):
        if any(fnmatch.fnmatch(entry.name, pattern) for pattern in options.models):
            measured = zoo.measure(entry, test, twin=zoo.twin_of(entry, options.out))
            zoo.update_card(entry, measured)
            _say(entry.name, "; ".join(measured.get("validity", {}).get("problems", [])) or "measured")


def _say(name: str, text: str) -> None:
    print(f"{name}: {text}", flush=True)


if __name__ == "__main__":
    main()
