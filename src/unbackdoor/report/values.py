"""Values of documents in the form in which a page shows them: short numbers, small tables, nested lists.

Nothing here is markup; all of it passes through the autoescape of the templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unbackdoor.report.documents import Document, Rate, class_words, png_text

MAX_CHARACTERS = 1500
"""Longer texts are cut; the JSON document has them in full."""

MAX_LISTED = 200
"""Longer tables and lists inside a value are cut; the JSON document has them in full."""

MAX_DEPTH = 6
"""What is nested deeper, which no document of ours is, is shown as JSON."""

NARROW_SPACE = "\N{NARROW NO-BREAK SPACE}"
MISSING = "\N{EN DASH}"
NOTHING = "none"

PER_CLASS = frozenset({
    "anomaly_indices", "class_share", "class_share_of_all_features", "l1_pixels", "l2", "margins",
    "rms_shift_pixels", "shift", "standardised", "statistics", "target_concentration",
})  # fmt: skip
"""What detectors measure once a class; so do all whose name ends in ``_per_class``."""

SHIFTS = "shift_concentration"
"""Entry ``i`` is about the images that are sent to their true class plus ``i + 1``."""

CLASSES = ("target_class", "class_at_the_top")
"""Numbers that are classes."""


@dataclass(frozen=True)
class Classes:
    """The classes of a model.

    Args:
        count: How many it has.
        names: Optional names; entry ``i`` names class ``i``.
    """

    count: int
    names: Sequence[str] = ()

    def words(self, index: int) -> str:
        """Return a class as ``3 (cat)``, or as its number alone."""
        name = self.names[index] if 0 <= index < len(self.names) else None
        return class_words(index, name).removeprefix("class ")


@dataclass(frozen=True)
class Grid:
    """A small table.

    Args:
        head: Headings of its columns.
        rows: Its rows, as many as are shown.
        whole: How many rows there are.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    whole: int


@dataclass(frozen=True)
class Shown:
    """A value with its name: as text, or as exactly one of the others.

    Args:
        name: What it is called.
        text: For a single value, or some in a row.
        image: The base64 text of a PNG image.
        grid: For lists with one entry a class, and lists of alike things.
        parts: For what has named parts of its own.
        whole: How many parts there are; more than are shown where they were cut.
    """

    name: str
    text: str = ""
    image: str = ""
    grid: Grid | None = None
    parts: tuple[Shown, ...] = ()
    whole: int = 0


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as a percentage, such as ``94.1 %``."""
    return MISSING if value is None else f"{100 * value:.{digits}f}{NARROW_SPACE}%"


def interval(rate: Rate) -> str:
    """Return the 95 % interval of ``rate`` in percent and the number of images behind it."""
    return f"{100 * rate.low:.1f}{MISSING}{100 * rate.high:.1f}{NARROW_SPACE}%, n = {rate.n:,}"


def number(value: float | None) -> str:
    """Return ``value`` to three significant digits; integers up to a million in full."""
    if value is None:
        return MISSING
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}", 1 if value < 0 else 0)


def chance(value: float | None) -> str:
    """Return a p-value in words of three digits at most."""
    if value is None:
        return "not calibrated"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Return a time in the largest two units that matter."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def entries(values: Mapping[str, Any], document: Document) -> tuple[Shown, ...]:
    """Return JSON values of a document as a page shows them, such as a detector's evidence or options.

    Args:
        values: By name; those of names that end in ``_png`` are images.
        document: Knows the classes.
    """
    classes = Classes(document.model.num_classes, document.data.class_names)
    return _parts(values, classes, depth=0)


def _parts(values: Mapping[str, Any], classes: Classes, depth: int) -> tuple[Shown, ...]:
    return tuple(_shown(key, value, classes, depth) for key, value in values.items())


def _shown(key: str, value: object, classes: Classes, depth: int) -> Shown:
    name = key.replace("_", " ").strip()
    if key.endswith("_png") and _is_png(value):
        assert isinstance(value, str)
        return Shown(name.removesuffix(" png"), image=value)
    if (text := _in_a_line(key, value, classes)) is not None:
        return Shown(name, text=text)
    if depth == MAX_DEPTH:
        return Shown(name, text=_json_text(value))
    if grid := _by_class(key, value, classes) or _of_alike(value, classes):
        return Shown(name, grid=grid)
    parts = value if isinstance(value, Mapping) else _numbered(value)
    first = dict(list(parts.items())[:MAX_LISTED])
    return Shown(name, parts=_parts(first, classes, depth + 1), whole=len(parts))


def _in_a_line(key: str, value: object, classes: Classes) -> str | None:
    """Return what takes no more than a line, or None: scalars, rates, and lists of scalars."""
    if _is_scalar(value):
        return _text(key, value, classes)
    if isinstance(value, Mapping):
        return _rate_text(value) if value else NOTHING
    if isinstance(value, list | tuple) and all(map(_is_scalar, value)):
        if not value:
            return NOTHING
        return None if _by_class(key, value, classes) else _cut(", ".join(map(_scalar_text, value)))
    return None


def _text(key: str, value: object, classes: Classes) -> str:
    if key in CLASSES and isinstance(value, int) and not isinstance(value, bool):
        return classes.words(value)
    return _scalar_text(value)


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _scalar_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, int | float):
        return number(value)
    return _cut(str(value))


def _rate_text(value: Mapping[str, Any]) -> str | None:
    """Return a rate with its interval, or None for what is no rate."""
    if set(value) != set(Rate.model_fields):
        return None
    try:
        rate = Rate.model_validate(dict(value))
    except ValueError:
        return None
    return f"{percent(rate.value)} ({interval(rate)})"


def _by_class(key: str, value: object, classes: Classes) -> Grid | None:
    """Return lists with one entry a class, or a shift, as a table, or None for what is no such list."""
    name = key.replace("_", " ")
    if key == SHIFTS and _is_row(value, classes.count - 1):
        return _table("classes further", [f"+{step}" for step in range(1, classes.count)], {name: value})
    if key not in PER_CLASS and not key.endswith("_per_class"):
        return None
    columns = value if isinstance(value, Mapping) else {name: value}
    if not all(_is_row(column, classes.count) for column in columns.values()):
        return None
    return _table("class", [classes.words(index) for index in range(classes.count)], columns)


def _is_row(value: object, length: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == length > 0 and all(map(_is_scalar, value))


def _table(title: str, labels: Sequence[str], columns: Mapping[str, Any]) -> Grid:
    head = (title, *(str(name).replace("_", " ") for name in columns))
    rows = zip(labels, *(map(_scalar_text, column) for column in columns.values()), strict=True)
    return Grid(head, tuple(rows)[:MAX_LISTED], len(labels))


def _of_alike(value: object, classes: Classes) -> Grid | None:
    """Return a list of mappings with plain values as a table, a row each, or None for what is none."""
    if not isinstance(value, list | tuple) or not all(isinstance(row, Mapping) and row for row in value):
        return None
    keys = list(dict.fromkeys(key for row in value for key in row))
    cells = [
        [_in_a_line(key, row[key], classes) if key in row else "" for key in keys]
        for row in value[:MAX_LISTED]
    ]
    if len(keys) > MAX_LISTED or any(cell is None for row in cells for cell in row):
        return None
    head = tuple(key.replace("_", " ") for key in keys)
    return Grid(head, tuple(tuple(cell or "" for cell in row) for row in cells), len(value))


def _numbered(value: object) -> dict[str, Any]:
    """Return a list as a mapping, counted from 1."""
    assert isinstance(value, list | tuple)
    return {str(position): each for position, each in enumerate(value, start=1)}


def _is_png(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(png_text(value))
    except ValueError:
        return False


def _json_text(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=list)
    # Three digits are enough for people, and seventeen are unreadable.
    return _cut(re.sub(r"-?\d+\.\d{4,}(?:e-?\d+)?", lambda match: f"{float(match[0]):.3g}", text))


def _cut(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]}… ({len(text):,} characters in all)"
