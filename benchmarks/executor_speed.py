"""How much two worker processes do in the time of one: equal tasks of plain training steps.

    python benchmarks/executor_speed.py --slots 2 --tasks 8

Each task is the same number of steps of a width-16 ResNet-18 on made-up images, in one thread. Both pools run
in turns on the same machine; it should do nothing else meanwhile. Starting the processes counts. The same
tasks in processes without a pool tell what the machine itself gives.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbackdoor.bench.executors import Pool
from unbackdoor.bench.executors.pool import ENVIRONMENT
from unbackdoor.bench.runner import drive
from unbackdoor.bench.store import Store


@dataclass(frozen=True)
class Steps:
    """A task."""

    number: int
    count: int

    @property
    def key(self) -> str:
        """Its number."""
        return str(self.number)

    @property
    def label(self) -> str:
        """For people."""
        return f"task {self.number}"

    @property
    def group(self) -> str:
        """All take the same time."""
        return "steps"


def work(task: Steps) -> dict[str, Any]:
    """Take training steps."""
    import torch
    from torch.nn import functional as F

    from unbackdoor import rng
    from unbackdoor.compute import arrange, autocast
    from unbackdoor.models import build

    torch.set_num_threads(1)
    generator = rng.generator(task.number)
    with rng.isolated(generator):
        model = arrange(build("resnet18", width=16))
    images = torch.rand(128, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (128,), generator=generator)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(task.count):
        with autocast("auto", torch.device("cpu")):
            loss = F.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {"key": task.key, "status": "ok"}


def seconds(slots: int, tasks: int, steps: int) -> float:
    """Return how long a pool takes for all tasks."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        todo = [Steps(number, steps) for number in range(tasks)]
        drive(todo, work, Store(Path(folder) / "records.jsonl"), Pool(slots, threads=1))
        return time.perf_counter() - started


def bare(slots: int, tasks: int, steps: int) -> float:
    """Return how long as many processes take for all tasks without a pool or a store."""
    start = multiprocessing.get_context("spawn").Process
    shares = [range(first, tasks, slots) for first in range(slots)]
    started = time.perf_counter()
    processes = [start(target=work_through, args=(share, steps)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a process failed, so its time says nothing; see the traceback above.")
    return time.perf_counter() - started


def work_through(numbers: range, steps: int) -> None:
    """Do tasks one after the other."""
    for number in numbers:
        work(Steps(number, steps))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    # What a pool gives its workers, for all alike.
    os.environ.update(ENVIRONMENT)
    for _ in range(options.rounds):
        for name, measure in (("pool", seconds), ("bare processes", bare)):
            one, many = (measure(slots, options.tasks, options.steps) for slots in (1, options.slots))
            print(f"{name}: 1 takes {one:.1f} s, {options.slots} take {many:.1f} s: ratio {one / many:.2f}")


if __name__ == "__main__":
    main()
