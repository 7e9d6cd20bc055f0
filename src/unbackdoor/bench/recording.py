"""What goes into a record beside the measurements: circumstances, a log, and the courses of a method."""

from __future__ import annotations

import math
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

import unbackdoor
from unbackdoor.inversion import anomaly_indices
from unbackdoor.types import Progress

NAMES = ("filter", "step")
"""Numbers in the steps of a method that only say which one it was."""

FEW = 5
"""Longer lists of names or classes are no notes."""

LONGEST_SERIES = 200
"""Longer courses are thinned out before they are recorded."""


class Log:
    """Passes progress on, and remembers how long each stage took."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._started = time.perf_counter()
        self._stages: dict[str, list[float]] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note of a step; see ``types.Progress``."""
        now = time.perf_counter() - self._started
        first = self._stages.setdefault(stage, [now, now, done, total])
        first[1:] = [now, done, total]
        self._progress(stage, done, total)

    def lines(self) -> list[str]:
        """Return a line a stage: when its last step ended, and how many steps it had."""
        return [
            f"{last:8.1f} s  {stage}: {done:g} of {total:g}"
            for stage, (_, last, done, total) in self._stages.items()
        ]


def notes(diagnostics: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what tells one decision of a method from another, and leave its long lists out.

    Args:
        diagnostics: JSON values; what a part of it says in short is noted by its path, and so is a list of a
            single step, which is no course.
    """
    short = (str, int, float, bool, type(None))
    found = {name: value for name, value in diagnostics.items() if name != "options"}
    for name, value in list(found.items()):
        parts = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
        if isinstance(parts, Mapping):
            found |= {f"{name}.{inner}": _few(each) for inner, each in parts.items()}
    return {
        name: value if not isinstance(value, float) or math.isfinite(value) else None
        for name, value in found.items()
        if isinstance(value, short)
    }


def _few(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Return a short list of names or classes as a text, anything else as it is."""
    if not isinstance(value, (list, tuple)) or len(value) > FEW:
        return value
    if not all(isinstance(each, (str, int)) for each in value):
        return value
    return ", ".join(map(str, value)) or "none"


def series(diagnostics: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Return the courses that a method noted down, such as a loss after each epoch, by their path.

    Args:
        diagnostics: JSON values; lists of numbers, and lists of steps with numbers, at any depth.
    """
    return dict(_series("", {key: value for key, value in diagnostics.items() if key != "options"}))


def _series(path: str, value: Any) -> Iterator[tuple[str, list[float | None]]]:  # noqa: ANN401
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _series(f"{path}.{name}" if path else str(name), inner)
    elif isinstance(value, (list, tuple)) and len(value) > 1:
        if all(isinstance(each, Mapping) for each in value):
            for name in value[0]:
                # The first may be unknown where later ones are not.
                known = next((each[name] for each in value if each.get(name) is not None), None)
                if isinstance(known, int | float) and name not in NAMES:
                    yield from _series(f"{path}.{name}", [each.get(name) for each in value])
        elif all(isinstance(each, int | float) or each is None for each in value):
            yield path, _thinned(value)


def _thinned(values: Sequence[float | None]) -> list[float | None]:
    step = -(-len(values) // LONGEST_SERIES)
    chosen = [*values[:: step or 1]]
    return [float(f"{value:.4g}") if value is not None and math.isfinite(value) else None for value in chosen]


def circumstances(device: torch.device) -> dict[str, Any]:
    """Return under which a record came about: versions, state of the code, device, time."""
    return versions() | {"device": _device(device), "created": now()}


def versions() -> dict[str, Any]:
    """Return what this process runs: versions, and the state of the code."""
    return {
        "unbackdoor": unbackdoor.__version__,
        "git": git_state(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def now() -> str:
    """Return the time, in UTC, as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{_processor()}, {torch.get_num_threads()} threads"


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@cache
def git_state(package: Path = Path(unbackdoor.__file__).parent) -> str | None:
    """Return the commit that this code is of, with ``+`` if it was changed since; None outside a checkout.

    Args:
        package: Folder of the code; changes elsewhere in the checkout do not count.
    """
    try:
        head, changed = (
            subprocess.run(  # noqa: S603
                ["git", "-C", str(package), *arguments],  # noqa: S607
                capture_output=True, text=True, check=True, timeout=10,
            ).stdout.strip()
            for arguments in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", "."))
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


SIZES = {"inversion": "l1_pixels", "perturbation": "l2"}
"""By way of exposing filters, what the size of its triggers is recorded as; warps go by their share alone."""


def stood_out(record: Mapping[str, Any], way: str) -> dict[int, tuple[float, float]]:
    """Return how far the triggers lay below the others that an answer of MNP acted on.

    Args:
        record: The answer.
        way: A key of ``SIZES``.

    Returns:
        By class: the norm as a share of the median, and its anomaly index by the norms' logarithms, which is
        NaN where too few triggers worked.
    """
    series = record.get("series", {})
    noted = str(record.get("notes", {}).get(f"{way}.acted_on", "none"))
    acted = series.get(f"{way}.acted_on", [part for part in noted.split(", ") if part not in ("", "none")])
    if not acted:
        return {}
    norms, reached = (series[f"{way}.triggers.{each}"] for each in (SIZES[way], "reached"))
    known = [max(norm, 1e-6) if ok else math.nan for norm, ok in zip(norms, reached, strict=True)]
    middle = float(torch.tensor(known, dtype=torch.float64).nanquantile(0.5))
    indices = anomaly_indices([math.log(norm) for norm in known])
    return {int(k): (known[int(k)] / middle, indices[int(k)]) for k in acted}
