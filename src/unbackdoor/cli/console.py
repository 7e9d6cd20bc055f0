"""What the commands print: progress and notes to stderr, results to stdout."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from unbackdoor.cli.pipes import echo, silence
from unbackdoor.types import Progress as ProgressCall
from unbackdoor.types import silent


class Patient(Console):
    """A console that goes on in silence when its reader leaves: rich would leave with 1, "backdoored"."""

    def on_broken_pipe(self) -> None:
        """Print nothing from now on."""
        self.quiet = True
        silence(self.file)


notes = Patient(stderr=True, highlight=False, soft_wrap=True, emoji=False)
results = Patient(highlight=False, soft_wrap=True, emoji=False)

UNBOUNDED = 100_000
"""Characters a line where there is no terminal, whose width would cut nothing off."""

QUIET_SECONDS = 30.0
"""Where there is no terminal, progress is said no more often than this; short work says nothing."""


def printable(text: str) -> str:
    """Return text of strangers without what would steer a terminal, such as escape codes and line breaks."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def note(text: str) -> None:
    """Print a line that is not a result."""
    notes.print(text, markup=False)


def warn(text: str) -> None:
    """Print a warning."""
    notes.print("warning:", text, style="yellow", markup=False)


@contextmanager
def progress_bar(*, hidden: bool) -> Iterator[ProgressCall]:
    """Show one bar a stage while the block runs, on a terminal; elsewhere a line now and then."""
    if hidden or not notes.is_terminal:
        yield silent if hidden else progress_lines()
        return
    columns = (
        TextColumn("{task.description:<20}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=notes, transient=True) as bars:
        tasks: dict[str, object] = {}

        def show(stage: str, done: int, total: int) -> None:
            task = (
                tasks.setdefault(stage, bars.add_task(stage, total=total))
                if stage not in tasks
                else tasks[stage]
            )
            bars.update(task, completed=done, total=total)  # type: ignore[arg-type]

        yield show


def progress_lines(clock: Callable[[], float] = time.monotonic) -> ProgressCall:
    """Return what says in a line how far work is, but only if for ``QUIET_SECONDS`` it has said nothing."""
    said = clock()

    def show(stage: str, done: int, total: int) -> None:
        nonlocal said
        now = clock()
        if now - said >= QUIET_SECONDS:
            said = now
            note(f"{stage}: {done} of {total}")

    return show


def print_table(table: Table, *, whole: bool = False) -> None:
    """Print a table: wrapped in a terminal, but for its first column, and not wrapped elsewhere.

    Args:
        table: Its first column holds names, which cannot be typed again if they are cut off.
        whole: Do not wrap in a terminal either.
    """
    for column in table.columns[:1]:
        column.no_wrap, column.overflow = True, "fold"
    width = results.width if results.is_terminal else UNBOUNDED
    Patient(highlight=False, width=max(width, 240) if whole else width, emoji=False).print(table)


def fits(table: Table) -> bool:
    """Say whether a table is printed without wrapping a cell or cutting one off."""
    if not results.is_terminal:
        return True
    options = results.options.update(max_width=UNBOUNDED)
    return results.measure(table, options=options).maximum <= results.width


def print_text(text: str) -> None:
    """Print a JSON document, or another text, as it is."""
    echo(text)
