"""Do everything in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from unbackdoor.bench.executors.base import Job, Outcome, Take


@dataclass(frozen=True)
class Inline:
    """This process; see ``base.Executor``."""

    slots: int = 1

    def run(self, job: Job, take: Take) -> Iterator[Outcome]:
        """Yield each task with its record."""
        while (task := take()) is not None:
            yield task, job(task)
