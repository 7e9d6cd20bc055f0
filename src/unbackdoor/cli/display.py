"""How far a run is: done, failed, running, and when it will end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from unbackdoor.bench.executors.base import Record, Task
from unbackdoor.bench.runner import Tally, Watcher
from unbackdoor.cli import console

MOST_SHOWN = 8
"""Running tasks beyond are counted only."""


class Display(Watcher):
    """Shows a run on a terminal while it goes on, and a line for each record on any other output.

    Args:
        title: What the tasks are.
        line: Says in a line what came of a task.
    """

    def __init__(self, title: str, line: Callable[[Task, Record], str]) -> None:
        self.title, self.line = title, line
        self.tally = Tally(0)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if console.notes.is_terminal:
            self._live = Live(get_renderable=self._drawn, console=console.notes, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def began(self, tally: Tally) -> None:
        """Show how much was done before."""
        self.tally = tally
        if tally.found:
            console.note(f"{tally.found} of {tally.total} {self.title} were there already")

    def ended(self, task: Task, record: Record, tally: Tally) -> None:
        """Say what came of a task."""
        left = None if self._live is not None else tally.seconds_left()
        rest = f", {_time(left)} left" if left is not None and tally.ended < tally.total else ""
        console.note(f"[{tally.ended}/{tally.total}{rest}] {self.line(task, record)}")

    def left(self, tasks: Sequence[Task]) -> None:
        """Say what is left to others."""
        console.warn(f"{len(tasks)} {self.title} are being worked on by another runner: {_names(tasks)}")

    def waits(self, tasks: Sequence[Task]) -> None:
        """Say what is waited for."""
        console.note(f"waiting for {len(tasks)} {self.title} of another runner: {_names(tasks)}")

    def _drawn(self) -> Group:
        tally = self.tally
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self.title),
            ProgressBar(total=max(1, tally.total), completed=tally.ended, width=30),
            Text(summary(tally)),
        )
        running = [
            Text(f"  {task.label}, {_time(tally.clock() - started)}", style="dim")
            for task, started in list(tally.running.values())[:MOST_SHOWN]
        ]
        return Group(head, *running)


def summary(tally: Tally) -> str:
    """Return the state of a run in a line."""
    parts = [f"{tally.ended} of {tally.total} done"]
    parts += [f"{tally.states[state]} {state}" for state in ("refused", "failed") if tally.states.get(state)]
    parts.append(f"{len(tally.running)} running")
    left = tally.seconds_left()
    if left is not None and tally.ended < tally.total:
        end = time.strftime("%H:%M", time.localtime(time.time() + left))
        parts.append(f"{_time(left)} left, until about {end}")
    return ", ".join(parts)


def _names(tasks: Sequence[Task]) -> str:
    return ", ".join(task.label for task in tasks[:3]) + (", ..." if len(tasks) > 3 else "")


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
