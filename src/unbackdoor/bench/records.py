"""What can be asked in a benchmark, and the record of how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from unbackdoor.bench.artefact import finite
from unbackdoor.bench.executors.base import Task
from unbackdoor.bench.recording import Log, circumstances
from unbackdoor.bench.store import Record
from unbackdoor.errors import UnbackdoorError
from unbackdoor.types import Progress


class Question(Task, Protocol):
    """What can be asked: an image ``Cell`` or a ``GraphCell``."""

    def describe(self) -> dict[str, Any]:
        """Return JSON values."""
        ...


def answered(
    cell: Question,
    measure: Callable[[Progress], dict[str, Any]],
    *,
    progress: Progress,
    device: torch.device | None = None,
) -> Record:
    """Return the record of ``cell``; what the method refuses or fails at is a record too.

    Args:
        cell: The question.
        measure: Does the work and returns JSON values; it is given what to call meanwhile.
        progress: Called during the work.
        device: Where networks run; None for the CPU.
    """
    about = {"key": cell.key, "cell": cell.describe()}
    return recorded(about, measure, progress=progress, device=device)


def recorded(
    about: Record,
    measure: Callable[[Progress], dict[str, Any]],
    *,
    progress: Progress,
    device: torch.device | None = None,
) -> Record:
    """Do some work, and return what it was about, how it ended, under which circumstances, and its log.

    Args:
        about: JSON values that say what is done.
        measure: As in ``answered``; may give a ``status`` of its own. Of its numbers, those that are not
            finite become None: JSON does not know them, and one must not cost the whole run.
        progress: Called during the work.
        device: Where networks run; None for the CPU.
    """
    log, started = Log(progress), time.perf_counter()
    where = torch.device("cpu") if device is None else device
    try:
        result: Record = {"status": "ok", **finite(measure(log))}
    except UnbackdoorError as error:
        result = {"status": "refused", "problem": str(error)}
    except Exception as error:  # noqa: BLE001 - one question must not end a grid; the record says what broke
        result = {"status": "failed", "problem": f"{type(error).__name__}: {error}"}
    seconds = round(time.perf_counter() - started, 2)
    return about | circumstances(where) | result | {"log": log.lines(), "seconds": seconds}
