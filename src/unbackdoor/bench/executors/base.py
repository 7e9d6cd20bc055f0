"""The interface between what is to be done and where it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

Record = dict[str, Any]

TRIES = 3
"""A task whose worker was lost is given out again until it was tried so often."""


class Task(Protocol):
    """Something to be done: picklable, and known by its key."""

    @property
    def key(self) -> str:
        """Equal tasks have equal keys."""
        ...

    @property
    def label(self) -> str:
        """A few words for people."""
        ...

    @property
    def group(self) -> str:
        """Tasks of a group take about the same time."""
        ...


@dataclass(frozen=True)
class Lost:
    """What came of a task whose workers all ended without an answer.

    Args:
        reason: In words, such as the signal that ended the last one.
    """

    reason: str


Job = Callable[[Any], Record]
"""Does one task and returns its record; picklable, and raises nothing but what is a bug."""

Take = Callable[[], "Task | None"]
"""Gives the next task, or None if there is none just now; asked again after each outcome."""

Outcome = tuple[Task, "Record | Lost"]


class Executor(Protocol):
    """A place where tasks are done, one or several at a time."""

    @property
    def slots(self) -> int:
        """How many tasks are done side by side."""
        ...

    def run(self, job: Job, take: Take) -> Iterator[Outcome]:
        """Do tasks until none is left and none is under way.

        Args:
            job: Does a task.
            take: Called whenever there is room for one more.

        Yields:
            Each task with its record, in the order in which they end.
        """
        ...
