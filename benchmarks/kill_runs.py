"""Kill a benchmark at random moments, start it again until it ends, and compare with an undisturbed run.

    python benchmarks/kill_runs.py --kills 20

Both are runs of `unbackdoor bench` as a user starts them, each with a pool of worker processes and models
of its own to train. The second is killed with SIGKILL: in turns all of its processes at once, and the command
alone, so that its workers are left behind. At the end both must hold the same answers to the same questions,
to the last digit; no question may have been answered twice. Times and folders are not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from unbackdoor.bench.store import Store

OTHERWISE = frozenset({"seconds", "created", "cost", "log", "git", "command"})
"""What two equal runs say differently: times, and the folder."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", default="smoke", help="needs no data of yours")
    parser.add_argument("--jobs", type=int, default=2, help="workers of each run")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--soonest", type=float, default=2.0, help="seconds after a start")
    parser.add_argument("--latest", type=float, default=12.0, help="seconds after a start, at first")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        calm, stormy = Path(folder) / "calm", Path(folder) / "stormy"
        subprocess.run(command(options, calm), check=True, stdout=subprocess.DEVNULL)  # noqa: S603
        kills = storm(options, stormy)
        report(calm, stormy, kills)


def command(options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command of a run that keeps everything in ``folder``."""
    bench = [sys.executable, "-m", "unbackdoor", "bench", options.suite, "--jobs", str(options.jobs)]
    return [*bench, "--out", str(folder / "run"), "--models", str(folder / "models")]


def storm(options: argparse.Namespace, folder: Path) -> int:
    """Start the run again and again until it ends by itself; return how often it was killed."""
    chance, kills = random.Random(options.seed), 0
    while True:
        run = subprocess.Popen(  # noqa: S603
            command(options, folder), stdout=subprocess.DEVNULL, start_new_session=True
        )
        # Longer with every kill, so that a slow machine gets on, too.
        patience = chance.uniform(options.soonest, options.latest + 0.5 * kills)
        try:
            status = run.wait(timeout=patience if kills < options.kills else None)
        except subprocess.TimeoutExpired:
            (os.kill if kills % 2 else os.killpg)(run.pid, signal.SIGKILL)
            run.wait()
            kills += 1
            continue
        if status:
            sys.exit(f"the run ended with status {status}")
        return kills


def report(calm: Path, stormy: Path, kills: int) -> None:
    """Say what is the same; end with an error if anything is not."""
    wanted, found = (answers(folder) for folder in (calm, stormy))
    lines = (stormy / "run" / "records.jsonl").read_text().splitlines()
    times = Counter(key_of(line) for line in lines)
    cut, twice = times.pop(None, 0), [key for key, count in times.items() if count > 1]
    differing = [key for key in wanted.keys() & found.keys() if wanted[key] != found[key]]
    print(f"{kills} kills; {len(found)} answers, {len(wanted)} without kills; {cut} lines cut off")
    print(f"answered twice: {len(twice)}; missing: {len(wanted.keys() - found.keys())}; ", end="")
    print(f"of other questions: {len(found.keys() - wanted.keys())}; differing: {len(differing)}")
    for key in differing:
        print(json.dumps({"undisturbed": wanted[key], "killed": found[key]}))
    if twice or differing or wanted.keys() != found.keys():
        sys.exit("the runs differ")


def answers(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the records by key, without times and folders."""
    records = Store(folder / "run" / "records.jsonl").records()
    return {
        key: {name: value for name, value in record.items() if name not in OTHERWISE}
        for key, record in records.items()
    }


def key_of(line: str) -> str | None:
    """Return whose answer a line is; None if a kill cut it off."""
    try:
        return str(json.loads(line)["key"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


if __name__ == "__main__":
    main()
