from __future__ import annotations

import csv
import io
import math
from dataclasses import replace

import pytest

from unbackdoor.report.tables import Column, Entry, Table, comma_separated, latex, markdown

TABLE = Table(
    name="t",
    title="100 % of A_B & C",
    columns=(Column("attack"), Column("FP", ("CA", "ASR")), Column("n", ("n",), digits=0)),
    rows=(
        (Entry(text="a|b_1"), Entry((91.094, 0.5), best=True), Entry((7.0,))),
        (Entry(text="c"), Entry(text="refused"), Entry((math.nan,))),
        (Entry(text="d"), Entry((50.0, math.nan)), Entry()),
    ),
    notes=("A note.",),
    command="unbackdoor bench x",
)


def test_markdown_keeps_the_layout_and_marks_the_best() -> None:
    lines = markdown(TABLE).splitlines()
    assert lines[0] == "### 100 % of A_B & C"
    assert lines[2] == "| attack | FP CA / ASR | n |"
    assert lines[4] == r"| a\|b_1 | **91.09 / 0.50** | 7 |"
    assert lines[5] == "| c | refused | - |"
    assert lines[6] == "| d | 50.00 / - | - |"
    assert lines[-3:] == ["A note.", "", "    unbackdoor bench x"]


def test_names_of_tables_are_names_of_files_and_headings_break_no_row() -> None:
    table = Table("../../escaped/t", "t", (Column("a|b", ("CA",)),), ((Entry((1.0,)),),))
    assert table.name == "escaped-t"
    assert Table("..", "t", (), ()).name == "table"
    assert markdown(table).splitlines()[2] == r"| a\|b |"


def test_latex_escapes_what_means_something() -> None:
    text = latex(TABLE)
    assert r"\caption{100 \% of A\_B \& C}" in text
    assert r"\begin{tabular}{lrr}" in text
    assert r"a|b\_1 & \textbf{91.09 / 0.50} & 7 \\" in text
    assert text.count(r"\\") == 4


def test_latex_says_in_a_comment_what_makes_the_records_again() -> None:
    assert "Again" not in latex(replace(TABLE, command=""))
    assert (
        latex(replace(TABLE, command="unbackdoor bench \\\n x")).count("\n% Again: unbackdoor bench \\ x\n")
        == 1
    )


def test_csv_has_a_column_for_each_number_and_rounds_nothing_away() -> None:
    rows = list(csv.reader(io.StringIO(comma_separated(TABLE))))
    assert rows[0] == ["attack", "FP CA", "FP ASR", "n n"]
    assert rows[1] == ["a|b_1", "91.094", "0.5", "7"]
    assert rows[2] == ["c", "refused", "refused", ""]
    assert rows[3][:3] == ["d", "50", ""]


def test_a_row_of_another_length_is_a_bug() -> None:
    with pytest.raises(ValueError, match="has 1 entries for 2 columns"):
        Table("t", "t", (Column("a"), Column("b")), ((Entry(),),))
