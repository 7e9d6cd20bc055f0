"""A workload of no weight for the runner and the executors: picklable, with a life of its own on disk."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Number:
    """A task."""

    value: int
    group: str = "numbers"

    @property
    def key(self) -> str:
        return f"n{self.value}"

    @property
    def label(self) -> str:
        return f"number {self.value}"


@dataclass(frozen=True)
class Square:
    """Squares a number, and leaves a mark in a folder each time that it begins."""

    folder: Path
    seconds: float = 0.0
    deadly: tuple[int, ...] = ()
    once: tuple[int, ...] = ()
    broken: tuple[int, ...] = ()

    def __call__(self, task: Number) -> dict[str, Any]:
        mark = self.folder / f"{task.value}-{os.getpid()}-{time.monotonic_ns()}"
        mark.touch()
        tries = len(list(self.folder.glob(f"{task.value}-*")))
        if task.value in self.deadly or (task.value in self.once and tries == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if task.value in self.broken:
            raise KeyError(f"broken at {task.value}")
        time.sleep(self.seconds)
        status = "refused" if task.value % 7 == 6 else "failed" if task.value % 7 == 5 else "ok"
        return {
            "key": task.key,
            "status": status,
            "square": task.value**2,
            "threads": os.environ.get("OMP_NUM_THREADS"),
        }


def begun(folder: Path, value: int) -> int:
    """Return how often a number was begun."""
    return len(list(folder.glob(f"{value}-*")))
