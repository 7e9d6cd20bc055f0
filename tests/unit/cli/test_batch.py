"""Scans of several files: a line and a document each, none twice, and a bad one stops nothing."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from unbackdoor.cli import batch, inputs
from unbackdoor.detect import scan as scanner

from .conftest import ARCH, Files, Result, Run

Scan = Callable[..., Result]
Found = tuple[batch.FileScan, Mapping[str, Any]]


@pytest.fixture
def scan(run: Run, files: Files, tmp_path: Path) -> Scan:
    def call(*paths: Path, more: tuple[object, ...] = ()) -> Result:
        return run(
            "scan", *paths, "--arch", ARCH, "--clean", files.clean, "--calibration", files.strict, "--fast",
            "--set", "suppression.budget=60", "--out", tmp_path / "out", *more,
        )  # fmt: skip

    return call


def records(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "out" / batch.RECORDS).read_text().splitlines()]


def test_a_bad_file_is_a_line_and_the_others_go_on(scan: Scan, files: Files, tmp_path: Path) -> None:
    hostile, absent = tmp_path / "evil [red].pt", tmp_path / "absent.safetensors"
    hostile.write_bytes(pickle.dumps(print))
    result = scan(hostile, files.infected, absent, files.twin)
    assert result.code == 2
    lines = result.out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"{hostile}: refused: ")
    # Without scores for these options both models are inconclusive; the target is named all the same.
    assert lines[1].startswith(f"{files.infected}: inconclusive, suspected target class 3")
    assert lines[2].startswith(f"{absent}: refused: ")
    assert lines[3].startswith(f"{files.twin}: inconclusive")
    # What both were warned of is said once, about no file.
    lacking = (
        "warning: The calibration was made with other options of collapse and recovery than this scan uses"
    )
    assert result.err.count(lacking) == 1
    documents = sorted((tmp_path / "out").glob("*.json"))
    assert [path.name.rpartition("-")[0] for path in documents] == ["infected", "twin"]
    assert all(path.with_suffix(".html").exists() for path in documents)
    assert json.loads(documents[0].read_text())["target_class"] == 3


def test_no_file_is_scanned_twice_in_the_same_way(scan: Scan, files: Files, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / files.twin.name
    moved.parent.mkdir()
    shutil.copy(files.twin, moved)
    first = scan(files.twin, more=("--json",))
    assert first.code == 3
    (entry,) = json.loads(first.out)
    assert (entry["status"], entry["verdict"], entry["file"]) == ("ok", "inconclusive", str(files.twin))
    assert (tmp_path / "out" / entry["document"]).exists()
    # The same content under the same name, elsewhere; then other content; then another option.
    again = scan(moved, more=("--json",))
    assert json.loads(again.out)[0]["document"] == entry["document"]
    assert len(records(tmp_path)) == 1
    shutil.copy(files.infected, moved)
    changed = scan(moved, more=("--json",))
    assert json.loads(changed.out)[0]["target_class"] == 3
    assert len(records(tmp_path)) == 2
    scan(moved, more=("--seed", 1))
    assert len({record["key"] for record in records(tmp_path)}) == 3


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [(["clean"], 0), (["clean", "inconclusive"], 3), (["inconclusive", None], 2), ([None, "backdoored"], 1)],
)
def test_the_exit_code_is_the_worst(
    run: Run,
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verdicts: list[str | None],
    code: int,
) -> None:
    def outcome(verdict: str | None) -> dict[str, object]:
        if verdict is None:
            return {"status": "failed", "problem": "lost"}
        return {"status": "ok", "verdict": verdict, "target_class": None, "p_value": 0.5, "reason": "r"}

    def made(scanner: object, paths: object, place: object) -> object:
        tasks = (batch.FileScan(Path(f"{i}.pt"), "", "") for i in range(9))
        return [(task, outcome(verdict)) for task, verdict in zip(tasks, verdicts, strict=False)]

    monkeypatch.setattr(batch, "scan_files", made)
    result = run(
        "scan", files.twin, files.infected, "--arch", ARCH, "--clean", files.clean, "--out", tmp_path / "out"
    )
    assert result.code == code
    assert len(result.out.splitlines()) == len(verdicts)


def test_workers_scan_as_this_process_does(scan: Scan, files: Files, tmp_path: Path) -> None:
    result = scan(files.infected, files.twin, more=("--jobs", 2, "--json"))
    assert result.code == 3
    assert json.loads(result.out)[0]["target_class"] == 3
    by_file = {record["file"]: record for record in records(tmp_path)}
    assert by_file[str(files.infected)]["status"] == "ok"


def test_a_folder_that_an_attack_wrote_stands_for_its_model(scan: Scan, files: Files, tmp_path: Path) -> None:
    folder = tmp_path / "badnets-0"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(files.infected.read_bytes())
    assert scan(folder, files.twin).code == 3
    (found,) = [record for record in records(tmp_path) if record["file"] == str(folder)]
    assert (found["status"], found["target_class"]) == ("ok", 3)


def test_one_page_is_for_one_file(scan: Scan, files: Files, tmp_path: Path) -> None:
    result = scan(files.twin, files.infected, more=("--report", tmp_path / "r.html"))
    assert result.code == 2
    assert "--report and --sarif are for one file" in result.err


def test_a_warning_about_some_files_names_them() -> None:
    def found(name: str, *warnings: str) -> Found:
        return batch.FileScan(Path(name), "", ""), {"verdict": "clean", "warnings": list(warnings)}

    refused: Found = (batch.FileScan(Path("bad.pt"), "", ""), {"status": "refused", "problem": "p"})
    old: Found = (batch.FileScan(Path("old.pt"), "", ""), {"verdict": "clean"})
    both = [found("a.pt", "All.", "Some."), found("b.pt", "All."), refused]
    assert batch.warnings_of(both) == ["All.", "a.pt: Some."]
    assert batch.warnings_of([*both, old]) == ["a.pt, b.pt: All.", "a.pt: Some."]
    many = [found(f"{i}.pt", "W.") for i in range(5)]
    assert batch.warnings_of([*many, old]) == ["0.pt, 1.pt, 2.pt and 2 more: W."]


def test_options_of_further_detectors_are_part_of_what_a_scan_is_known_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[dict[str, Any]] = []

    def note(about: dict[str, Any]) -> str:
        known.append(about)
        return ""

    monkeypatch.setattr(batch, "key_of", note)
    how = inputs.ModelOptions(tmp_path / "m", ARCH)
    images = inputs.DataOptions(str(tmp_path), "train", 100)
    chosen: tuple[tuple[str, ...], ...] = ((), ("nc.fewest_classes=4",))
    for options in chosen:
        method = scanner.Scan(others=("nc",), other_options=options)
        batch.FileScanner(how, images, method, 0, tmp_path)._options()
    # Scans without such options were known before there were any.
    assert ["other_options" in about["scan"] for about in known] == [False, True]
