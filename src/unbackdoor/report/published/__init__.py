"""What papers print, to be set beside what is measured here."""

from __future__ import annotations

import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

Values = tuple[float, ...]
"""What stands in one place of a table, such as clean accuracy and attack success, in per cent."""


@dataclass(frozen=True)
class Published:
    """A table of a paper.

    Args:
        title: What it shows.
        columns: Names of its columns.
        rows: By name, one entry a column.
        average: The averages over the rows that the paper prints, one a column; empty if it prints none.
        row_averages: The averages over the columns that the paper prints, by row.
    """

    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[Values, ...]]
    average: tuple[Values, ...] = ()
    row_averages: Mapping[str, Values] = field(default_factory=dict)

    def at(self, row: str, column: str) -> Values | None:
        """Return what is printed in one place, or None if there is no such place."""
        if row not in self.rows or column not in self.columns:
            return None
        return self.rows[row][self.columns.index(column)]

    def printed_average(self, column: str) -> Values | None:
        """Return the printed average over the rows, or None."""
        if not self.average or column not in self.columns:
            return None
        return self.average[self.columns.index(column)]

    def computed_average(self, column: str) -> Values | None:
        """Return the average over the rows, computed from what is printed in them, or None."""
        if column not in self.columns:
            return None
        return mean([row[self.columns.index(column)] for row in self.rows.values()])


def mean(values: Sequence[Values]) -> Values:
    """Return the mean of each part."""
    return tuple(statistics.mean(part) for part in zip(*values, strict=True))


@cache
def paper(table: str) -> Published | None:
    """Return a table of the MNP paper (arXiv 2405.17750) by its name, such as ``table1``, or None."""
    text = (resources.files("unbackdoor.report.published") / "mnp.toml").read_text(encoding="utf-8")
    content = tomllib.loads(text).get(table)
    if content is None:
        return None
    return Published(
        title=content["title"],
        columns=tuple(content["columns"]),
        rows={name: tuple(map(_values, row)) for name, row in content["rows"].items()},
        average=tuple(map(_values, content.get("average", ()))),
        row_averages={name: _values(text) for name, text in content.get("row_averages", {}).items()},
    )


def _values(text: str) -> Values:
    return tuple(float(part) for part in text.split("/"))
