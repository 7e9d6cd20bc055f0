"""What results look like in a terminal, wide and narrow."""

from __future__ import annotations

from pathlib import Path

import pytest

from unbackdoor.cli import console, show
from unbackdoor.report import documents as doc

RATE = doc.Rate(value=0.9, low=0.8, high=0.95, successes=9, n=10)
MODEL = doc.ModelInfo(
    path="m.safetensors",
    sha256="0",
    format="f",
    architecture="a",
    parameters=1,
    num_classes=4,
    normalisation="",
)
DATA = doc.DataInfo(source="d", split="", images=8, num_classes=4, image_shape=[3, 12, 12], smallest_class=2)


def row(name: str, kind: str, verdict: str, *, decides: bool = True) -> doc.DetectorRow:
    return doc.DetectorRow.model_validate({
        "name": name, "title": name, "source": "", "kind": kind, "decides": decides, "score": 0.1234,
        "threshold": 0.5, "threshold_source": "", "p_value": 0.25, "verdict": verdict, "target_class": 3,
        "seconds": 42.0, "summary": f"What {name} found.",
    })  # fmt: skip


def scan(verdict: str = "inconclusive") -> doc.ScanDocument:
    return doc.ScanDocument.model_validate({
        "tool_version": "0", "seconds": 1.0, "model": MODEL, "data": DATA, "clean_accuracy": RATE,
        "verdict": verdict, "reason": "A reason.", "advice": "Scan again.",
        "detectors": [
            row("collapse", "unlearning exposure", "clean"),
            row("trigger_search", "trigger inversion", "backdoored"),
            row("head_weights", "weights of the head", "undetermined", decides=False),
        ],
    })  # fmt: skip


def shown(
    width: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verdict: str
) -> list[str]:
    if width is not None:
        terminal = console.Patient(
            highlight=False, soft_wrap=True, force_terminal=True, width=width, color_system=None
        )
        monkeypatch.setattr(console, "results", terminal)
    show.finish(scan(verdict), as_json=False, report=None)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", [30, 60, 69, 70, 80, 90, 100, None])
def test_nothing_that_matters_is_cut_off(
    width: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(width, monkeypatch, capsys, "inconclusive")
    text = "\n".join(lines)
    assert "…" not in text
    for words in ("collapse", "no evidence", "trigger-search", "backdoored", "(undetermined)"):
        assert words in text
    for words in ("0.123", "0.500", "0.250"):
        assert text.count(words) == 3


def test_a_narrow_terminal_gets_lines_and_a_usual_one_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = shown(60, monkeypatch, capsys, "inconclusive")
    at = narrow.index("head-weights, weights of the head: (undetermined)")
    assert narrow[at + 1] == "  score 0.123, threshold 0.500, p 0.250, target 3, 42 s"
    usual = shown(80, monkeypatch, capsys, "inconclusive")
    assert any(
        line.split() == ["detector", *["score", "threshold", "p", "says", "target", "s"]] for line in usual
    )
    assert not any("unlearning exposure" in line for line in usual)
    wide = shown(100, monkeypatch, capsys, "inconclusive")
    assert any("looks at" in line and line.rstrip().endswith(" s") for line in wide)


@pytest.mark.parametrize("verdict", ["inconclusive", "backdoored"])
def test_no_detector_calls_a_model_clean(
    verdict: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for width in (60, 100):
        below = shown(width, monkeypatch, capsys, verdict)
        assert not any("clean" in line for line in below if "clean accuracy" not in line)


def purification(**changes: object) -> doc.PurifyDocument:
    return doc.PurifyDocument.model_validate({
        "tool_version": "0", "seconds": 1.0, "model": MODEL, "data": DATA, "method": "ft-sam",
        "output": "n.safetensors", "output_sha256": "1", "clean_accuracy_before": RATE,
        "clean_accuracy_after": RATE, "filters_total": 0, "filters_removed": 0, **changes,
    })  # fmt: skip


def test_a_purification_is_told_the_title_and_source_of_its_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    show.finish(purification(), as_json=True, report=page)
    told = doc.parse_document(capsys.readouterr().out)
    assert isinstance(told, doc.PurifyDocument)
    assert told.method_title == "Fine-tuning with sharpness-aware minimisation"
    assert told.method_source.endswith("arXiv 2304.11823")
    assert told.method_source in page.read_text()
    # Documents that were written before, and methods that nobody knows.
    show.write_page([purification(), purification(method="own")], page, title="t", quiet=True)
    assert page.read_text().count(told.method_title) == 2
