"""From a result to a document: what a reader is told, without running a scan."""

from __future__ import annotations

import math

import pytest
from torch import nn

from unbackdoor.cli.scanning import scan_document
from unbackdoor.detect.evidence import Evidence
from unbackdoor.detect.plausibility import Plausibility
from unbackdoor.detect.scan import Scan, ScanResult
from unbackdoor.detect.verdict import Ground
from unbackdoor.rates import Rate
from unbackdoor.report.documents import DataInfo, ModelInfo, ScanDocument
from unbackdoor.report.page import render
from unbackdoor.testing.subjects import small_data
from unbackdoor.types import Detection, silent

MODEL = ModelInfo(
    path="m.safetensors",
    sha256="0",
    format="f",
    architecture="a",
    parameters=1,
    num_classes=4,
    normalisation="",
)
DATA = DataInfo(source="d", split="", images=8, num_classes=4, image_shape=[3, 12, 12], smallest_class=2)


def document_of(result: ScanResult, monkeypatch: pytest.MonkeyPatch) -> ScanDocument:
    monkeypatch.setattr(Scan, "run", lambda *_, **__: result)
    return scan_document(
        nn.Identity(), small_data(8), scan=Scan(), info=MODEL, data=DATA, seed=0, progress=silent
    )


@pytest.mark.parametrize(
    ("ground", "advice"),
    [
        ("close", "scan it again with --seed 1, --seed 2 and other clean images"),
        ("incomplete", "mend what is named above"),
        ("too few classes", "nothing was found, but with so few classes"),
        (None, "mend what is named above"),
    ],
)
def test_only_what_can_be_mended_is_to_be_mended(
    ground: Ground | None, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = ScanResult("inconclusive", "r", Plausibility(Rate(1, 1)), ground=ground)
    assert advice in document_of(result, monkeypatch).advice


def test_an_abstention_is_explained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    detection = Detection(math.nan, 0.6, "a guess", undetermined="too few places to go")
    evidence = Evidence("k", "collapse", "Collapse", "us", detection, decides=True, seconds=1.0)
    result = ScanResult("inconclusive", "r", Plausibility(Rate(1, 1)), evidence=(evidence,))
    document = document_of(result, monkeypatch)
    assert document.detectors[0].summary == "Not determined: too few places to go."
    assert render([document], title="t").count("too few places to go") == 1


def test_an_accuracy_that_was_not_measured_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    document = document_of(ScanResult("inconclusive", "r", Plausibility(Rate(0, 0), "damaged")), monkeypatch)
    assert (document.clean_accuracy.value, document.clean_accuracy.n) == (None, 0)
    assert "0.0%" not in render([document], title="t")
