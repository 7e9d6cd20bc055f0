"""What every record of a benchmark holds: the question, the circumstances, and how it ended."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

import unbackdoor
from unbackdoor.bench.store import Record
from unbackdoor.errors import UnbackdoorError


class Question(Protocol):
    """What can be asked: an image ``Cell`` or a ``GraphCell``."""

    @property
    def key(self) -> str:
        """Equal for equal questions."""
        ...

    @property
    def model(self) -> str:
        """What is defended."""
        ...

    @property
    def method(self) -> str:
        """By what."""
        ...

    @property
    def paper(self) -> bool:
        """Whether with the settings of the method's paper."""
        ...

    @property
    def seed(self) -> int:
        """Of all random choices."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return JSON values."""
        ...


def answered(cell: Question, measure: Callable[[], dict[str, Any]]) -> Record:
    """Return the record of ``cell``; what the method refuses or fails at is a record too.

    Args:
        cell: The question.
        measure: Does the work and returns JSON values.
    """
    record: Record = {"key": cell.key, "cell": cell.describe(), **circumstances(), "created": now()}
    try:
        return record | {"status": "ok"} | measure()
    except UnbackdoorError as error:
        return record | {"status": "refused", "problem": str(error)}
    except (RuntimeError, ValueError, ArithmeticError) as error:  # one method must not end a grid
        return record | {"status": "failed", "problem": f"{type(error).__name__}: {error}"}


def now() -> str:
    """Return the current time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def circumstances() -> dict[str, Any]:
    """Return the versions, commit and device that a measurement is made with, as JSON values."""
    return {
        "unbackdoor": unbackdoor.__version__,
        "git": _git_state(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _git_state() -> str | None:
    """Return the commit that this code is of, with ``+`` if it was changed since; None outside a checkout."""
    try:
        head, changed = (
            subprocess.run(  # noqa: S603
                ["git", "-C", str(Path(__file__).parent), *arguments],  # noqa: S607
                capture_output=True, text=True, check=True, timeout=10,
            ).stdout.strip()
            for arguments in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", "src"))
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")
