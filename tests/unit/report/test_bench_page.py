from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from unbackdoor.report import bench_page
from unbackdoor.report.bench_page import render, write_run
from unbackdoor.report.layouts.suites import figures_of, tables_of
from unbackdoor.report.run import read_run

from .runs import cell, make_run, purified, rate, write

pytest.importorskip("matplotlib", reason="the extra plots is not installed")


def test_everything_is_written_and_can_be_read(tmp_path: Path) -> None:
    make_run(tmp_path)
    written = write_run(read_run(tmp_path), tmp_path / "out")
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in written.files)
    assert names == [
        "figures/trade-off.png", "figures/trade-off.svg",
        *(f"tables/{name}.{suffix}" for name in ("ours", "summary") for suffix in ("csv", "md", "tex")),
    ]  # fmt: skip
    assert (tmp_path / "out" / "figures" / "trade-off.png").read_bytes().startswith(b"\x89PNG")
    ET.fromstring((tmp_path / "out" / "figures" / "trade-off.svg").read_text())
    page = written.page.read_text()
    outside = re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page)
    assert outside == []
    assert 'http-equiv="Content-Security-Policy"' in page


def test_the_oracle_curve_is_drawn_and_called_one(tmp_path: Path) -> None:
    steps = [
        {"removed": count, "clean_accuracy": rate(0.86), "attack_success": rate(asr)}
        for count, asr in ((0, 1.0), (1, 0.25))
    ]
    curved = purified(cell("badnets", "mnp"), ca=0.8, asr=0.1, oracle_curve=steps)
    write(tmp_path, "table1", [("ours", curved), ("ours", purified(cell("badnets", "ft"), ca=0.8, asr=0.1))])
    run = read_run(tmp_path)
    page = render(run, tables_of(run), figures_of(run))
    data = re.search(r'<script type="application/json" id="details">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    details = json.loads(data[1])
    assert details["k0"]["oracle"] == {
        "CA (%) without 0, 1 filters": [86.0, 86.0],
        "ASR (%) without 0, 1 filters": [100.0, 25.0],
    }
    assert details["k1"]["oracle"] == {}
    assert "oracle (uses the trigger)" in page


def test_nested_notes_are_shown_as_names_and_values(tmp_path: Path) -> None:
    notes = {"action": "pruned", "search": {"steps": 3, "betas": [0.5, 0.9], "of": {"a": None}}}
    write(tmp_path, "table1", [("ours", purified(cell("badnets", "ft"), ca=0.8, asr=0.1, notes=notes))])
    run = read_run(tmp_path)
    page = render(run, tables_of(run), [])
    data = re.search(r'<script type="application/json" id="details">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    detail = json.loads(data[1])["k0"]
    assert detail["notes"] == {
        "action": "pruned",
        "search: steps": 3,
        "search: betas": "0.5, 0.9",
        "search: of: a": None,
    }
    assert detail["trained"]["label_rule: target_class"] == 0


def test_entries_lead_to_their_records_and_averages_stay_below(tmp_path: Path) -> None:
    make_run(tmp_path)
    run = read_run(tmp_path)
    page = render(run, tables_of(run), [])
    assert 'data-keys="k0">85.00 / 1.50</button>' in page
    assert 'data-keys="k7">refused</button>' in page
    grid = page.split('id="table-ours"')[1].split("</table>")[0]
    body, foot = grid.split("<tfoot>")
    assert "Average" not in body
    assert foot.count('<th scope="row">Average</th>') == 3
    assert page.count("<tfoot>") == 1


def test_what_records_say_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!--"
    refused = {"cell": cell("badnets", "mnp"), "status": "refused", "problem": evil}
    named = purified(cell(evil, "ft", options={"a": evil}), ca=0.8, asr=0.1, log=[evil])
    write(tmp_path, "table1", [(evil, refused), ("ours", named)], title=evil, text=evil, size_text=evil)
    run = read_run(tmp_path)
    page = render(run, tables_of(run), figures_of(run))
    assert "<script>alert" not in page
    assert page.count("</script>") == 2
    data = re.search(r'<script type="application/json" id="details">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    details = json.loads(data[1])
    assert details["k0"]["problem"] == evil
    assert details["k1"]["log"] == [evil]
    written = write_run(run, tmp_path / "out")
    assert all(path.parent.parent == tmp_path / "out" for path in written.files)


def test_columns_are_sorted_by_the_attack_success() -> None:
    nan = float("nan")
    assert bench_page._sort_value((80.0, 3.0, 70.0), ("CA", "ASR", "RA")) == "3"
    assert bench_page._sort_value((1.0, 90.0), ("ASR", "retuned")) == "1"
    # A clean model has no ASR.
    assert bench_page._sort_value((80.0, nan), ("CA", "ASR")) == "80"
    assert bench_page._sort_value((2.0, 5.0), ("forward", "backward")) == "5"
    assert bench_page._sort_value((), ("CA", "ASR")) == bench_page._sort_value((nan,), ("s",)) == ""
