"""Tables as values, and their Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

MISSING = "-"
AVERAGE = "Average"
"""What the rows begin with that sum the others up."""

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        title: Its heading.
        parts: What its numbers are, such as ``("CA", "ASR")``; empty for text.
        digits: Decimals.
    """

    title: str
    parts: tuple[str, ...] = ()
    digits: int = 2


@dataclass(frozen=True)
class Entry:
    """What stands in one place.

    Args:
        values: Numbers, one for each part of the column; NaN where there is none.
        text: Text, for a column without parts or instead of numbers, such as ``refused``.
        best: Whether it is the best of its row.
        keys: Of the records behind it.
        done: How many results the numbers are the mean of, where that is known.
        asked: How many there should be.
        mark: What else a reader has to know of the numbers, such as ``did not take``.
    """

    values: tuple[float, ...] = ()
    text: str = ""
    best: bool = False
    keys: tuple[str, ...] = ()
    done: int = 0
    asked: int = 0
    mark: str = ""

    @property
    def remark(self) -> str:
        """What stands in brackets behind the numbers: that some results are missing, and the mark."""
        missing = f"{self.done} of {self.asked}" if self.done < self.asked else ""
        return "; ".join(filter(None, (missing, self.mark)))


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        name: For file names and anchors.
        title: Caption.
        columns: Its columns.
        rows: Its rows, as long as there are columns.
        notes: What a reader has to know, in sentences.
        command: What makes its records again.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[str, ...] = ()
    command: str = ""

    def __post_init__(self) -> None:
        # It becomes the name of files, and comes from the plan of a run, perhaps a stranger's.
        object.__setattr__(self, "name", re.sub(r"[^\w.=-]+", "-", self.name).strip("-.") or "table")
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"a row of {self.name} has {len(row)} entries for {len(self.columns)} columns."
                )


def shown(entry: Entry, column: Column) -> str:
    """Return an entry as text, ``91.09 / 0.54``."""
    if entry.text or not column.parts:
        return entry.text or MISSING
    if not entry.values or all(math.isnan(value) for value in entry.values):
        return MISSING
    numbers = " / ".join(MISSING if math.isnan(v) else f"{v:.{column.digits}f}" for v in entry.values)
    return f"{numbers} ({entry.remark})" if entry.remark else numbers


def markdown(table: Table) -> str:
    """Return a table in Markdown, with its title, notes and command."""
    head = [_piped(_titled(column)) for column in table.columns]
    lines = [f"### {table.title}", "", _line(head), _line(["---"] * len(head))]
    for row in table.rows:
        texts = [_piped(shown(entry, column)) for entry, column in zip(row, table.columns, strict=True)]
        lines.append(_line([f"**{t}**" if e.best else t for t, e in zip(texts, row, strict=True)]))
    lines += ["", *table.notes] if table.notes else []
    lines += ["", f"    {table.command}"] if table.command else []
    return "\n".join(lines) + "\n"


def latex(table: Table) -> str:
    """Return a table in LaTeX, for the package ``booktabs``."""
    kinds = "".join("r" if column.parts else "l" for column in table.columns)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escaped(table.title)}}}",
        rf"\begin{{tabular}}{{{kinds}}}",
        r"\toprule",
        " & ".join(_escaped(_titled(column)) for column in table.columns) + r" \\",
        r"\midrule",
    ]
    for row in table.rows:
        texts = [_escaped(shown(entry, column)) for entry, column in zip(row, table.columns, strict=True)]
        texts = [rf"\textbf{{{t}}}" if e.best else t for t, e in zip(texts, row, strict=True)]
        lines.append(" & ".join(texts) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\footnotesize {_escaped(note)}" for note in table.notes]
    lines += [f"% Again: {' '.join(table.command.split())}"] if table.command else []
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def comma_separated(table: Table) -> str:
    """Return a table in CSV: one column for each number, to six digits; and one for remarks, if any."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    remarks = [_remarks(row, table.columns) for row in table.rows]
    last = ["remarks"] if any(remarks) else []
    writer.writerow([*(name for column in table.columns for name in _names(column)), *last])
    for row, remark in zip(table.rows, remarks, strict=True):
        cells: list[str] = []
        for entry, column in zip(row, table.columns, strict=True):
            cells += _numbers(entry, column) if column.parts else [entry.text]
        writer.writerow([*cells, *([remark] if last else [])])
    return output.getvalue()


def _remarks(row: Sequence[Entry], columns: Sequence[Column]) -> str:
    pairs = zip(row, columns, strict=True)
    return ", ".join(f"{column.title}: {entry.remark}" for entry, column in pairs if entry.remark)


def _names(column: Column) -> list[str]:
    return [f"{column.title} {part}".strip() for part in column.parts] or [column.title]


def _numbers(entry: Entry, column: Column) -> list[str]:
    if entry.text or not entry.values:
        return [entry.text] * len(column.parts)
    return ["" if math.isnan(value) else f"{value:.6g}" for value in entry.values]


def _titled(column: Column) -> str:
    return f"{column.title} {' / '.join(column.parts)}".strip() if len(column.parts) > 1 else column.title


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _piped(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)
