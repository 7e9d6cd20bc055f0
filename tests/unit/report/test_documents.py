from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from unbackdoor.errors import InvalidInputError
from unbackdoor.report import documents
from unbackdoor.report.documents import (
    Document,
    EvaluateDocument,
    PurifyDocument,
    Rate,
    ScanDocument,
    Scatter,
    class_words,
    parse_document,
    png_text,
    read_document,
    utc_now,
    write_document,
)


def changed(document: Document, **changes: object) -> str:
    return json.dumps(json.loads(document.model_dump_json()) | changes)


def test_documents_survive_a_round_trip(
    scan: ScanDocument, purify: PurifyDocument, before: EvaluateDocument, tmp_path: Path
) -> None:
    for document in (scan, purify, before):
        path = tmp_path / f"{document.kind}.json"
        write_document(document, path)
        assert read_document(path) == document
        assert json.loads(path.read_text(encoding="utf-8"))["schema_version"] == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "evaluate.json",
        "purify.json",
        "scan.json",
    ]


def test_writing_replaces_and_leaves_nothing_behind(scan: ScanDocument, tmp_path: Path) -> None:
    path = tmp_path / "scan.json"
    path.write_text("old", encoding="utf-8")
    write_document(scan, path)
    assert read_document(path) == scan
    assert [entry.name for entry in tmp_path.iterdir()] == ["scan.json"]


@pytest.mark.parametrize("name", ["missing/scan.json", "file/scan.json"])
def test_an_unwritable_path_is_named(scan: ScanDocument, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InvalidInputError, match=r"cannot write .*scan\.json: .*; check the folder"):
        write_document(scan, tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 5000, "not valid JSON"),
        ('{"kind": "\\ud800"}', "not valid JSON"),
        ("[]", "kind is one of scan, purify, evaluate, got None"),
        ('{"kind": "zip", "schema_version": 1}', "got 'zip'"),
        ('{"kind": ["scan"], "schema_version": 1}', r"got \['scan'\]"),
        ('{"kind": "scan"}', "must have schema_version 1, got None"),
        ('{"kind": "scan", "schema_version": 2}', "must have schema_version 1, got 2"),
        ('{"kind": "scan", "schema_version": true}', "must have schema_version 1, got True"),
        ('{"kind": "scan", "schema_version": 1}', "no scan document: tool_version: Field required"),
    ],
)
def test_what_is_no_document_is_refused_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "input.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInputError, match=message) as caught:
        read_document(path)
    assert "\n" not in str(caught.value)
    assert "input.json" in str(caught.value)


def test_binary_content_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\x80\x04\x95\xff\x00")
    with pytest.raises(InvalidInputError, match="not valid JSON"):
        read_document(tmp_path / "binary")
    with pytest.raises(InvalidInputError, match=r"cannot read .*check the path"):
        read_document(tmp_path / "missing")
    with pytest.raises(InvalidInputError, match="cannot read"):
        read_document(tmp_path)


def test_large_files_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_FILE_BYTES", 2**20)
    (tmp_path / "large.json").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(InvalidInputError, match="more than the 1 MiB allowed"):
        read_document(tmp_path / "large.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"verdict": "safe"}, "verdict"),
        ({"seconds": -1}, "seconds"),
        ({"created": "yesterday"}, "created"),
        ({"created": "2026-01-31T12:00:00+02:00"}, "created: .*UTC"),
        ({"created": "2026-01-31T12:00:00"}, "created: .*UTC"),
        ({"target_class": -3}, "target_class"),
        ({"target_class": 10**30}, "target_class"),
        ({"settings": {"seed": 10**30}}, "settings: .*2\\^53"),
        ({"settings": [1]}, "settings"),
        ({"limits": "one"}, "limits"),
        ({"kind": "purify"}, "no purify document"),
    ],
)
def test_wrong_values_are_refused_with_their_place(
    scan: ScanDocument, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        parse_document(changed(scan, **changes))


def test_images_must_be_png(before: EvaluateDocument) -> None:
    example = before.examples[0]
    for text in ('"><script>', "data", "R0lGODlhAQABAAAAACw=", ""):
        with pytest.raises(InvalidInputError, match="clean_png"):
            parse_document(changed(before, examples=[example.model_dump() | {"clean_png": text}]))
    assert png_text(example.clean_png) == example.clean_png


def test_rates_are_consistent() -> None:
    assert Rate(value=math.nan, low=0, high=1, successes=0, n=0).value is None
    for wrong in (
        {"value": 0.5, "low": 0.4, "high": 0.6, "successes": 11, "n": 10},
        {"value": 0.5, "low": 0.6, "high": 0.4, "successes": 5, "n": 10},
        {"value": None, "low": 0.0, "high": 1.0, "successes": 5, "n": 10},
        {"value": 1.5, "low": 0.0, "high": 1.0, "successes": 5, "n": 10},
    ):
        with pytest.raises(ValidationError):
            Rate.model_validate(wrong)


def test_scatters_are_consistent(scan: ScanDocument) -> None:
    assert scan.scatter is not None
    content = scan.scatter.model_dump()
    with pytest.raises(ValidationError, match="one entry per filter"):
        Scatter.model_validate(content | {"saliency": [1.0]})
    with pytest.raises(ValidationError, match="point into the 1 layers"):
        Scatter.model_validate(content | {"layers": ["conv1"]})


def test_values_that_json_lacks_are_mended(scan: ScanDocument) -> None:
    class Scalar:
        def tolist(self) -> list[float]:
            return [1.0, math.inf]

    evidence = {"nan": math.nan, "pair": (1, 2), 3: Scalar(), "path": Path("a")}
    row = scan.detectors[0].model_copy(update={}).model_dump() | {"score": math.nan, "evidence": evidence}
    mended = ScanDocument.model_validate(scan.model_dump() | {"detectors": [row]})
    assert mended.detectors[0].score is None
    assert mended.detectors[0].evidence == {"nan": None, "pair": [1, 2], "3": [1.0, None], "path": "a"}
    assert parse_document(mended.model_dump_json()) == mended


def test_undecodable_file_names_do_not_break_writing(scan: ScanDocument, tmp_path: Path) -> None:
    model = type(scan.model).model_validate(scan.model.model_dump() | {"path": Path("a\udcff.pth")})
    assert model.path == "a?.pth"
    write_document(scan.model_copy(update={"model": model}), tmp_path / "scan.json")


def test_documents_do_not_change(scan: ScanDocument) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        scan.verdict = "clean"
    assert isinstance(scan.limits, tuple)


def test_now_is_a_time_in_utc(scan: ScanDocument) -> None:
    assert utc_now().endswith("+00:00")
    assert scan.created.endswith("+00:00")


@pytest.mark.parametrize(
    ("name", "words"), [("5", "class 5"), ("", "class 5"), (None, "class 5"), ("dog", "class 5 (dog)")]
)
def test_a_class_is_named_once(name: str | None, words: str) -> None:
    assert class_words(5, name) == words
