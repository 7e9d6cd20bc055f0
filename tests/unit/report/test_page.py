from __future__ import annotations

import base64
import hashlib
import importlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from types import ModuleType

import pytest

from unbackdoor.errors import InvalidInputError, MissingDependencyError
from unbackdoor.report.documents import EvaluateDocument, PurifyDocument, ScanDocument
from unbackdoor.report.page import chance, duration, evidence_rows, interval, number, percent, render

VOID = {"meta", "link", "img", "input", "br"}


class Reader(HTMLParser):
    """Collects text, ids and attributes, and checks that elements nest."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            self.attributes.append((tag, key, value or ""))
            if key == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def read(page: str) -> tuple[Reader, str]:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader, " ".join(" ".join(reader.text).split())


def without_plots(scan: ScanDocument, **changes: object) -> ScanDocument:
    return scan.model_copy(update={"scatter": None, "suppression": None, **changes})


def test_the_whole_page(
    scan: ScanDocument, purify: PurifyDocument, before: EvaluateDocument, after: EvaluateDocument
) -> None:
    pytest.importorskip("matplotlib", exc_type=ImportError)
    page = render([scan, purify, before, after], title="Report on a model")
    reader, text = read(page)
    assert len(page.encode()) < 1_000_000
    assert len(reader.ids) == len(set(reader.ids))
    assert page.count('class="plot"') == 7
    for expected in (
        "Backdoor found",
        "Suspected target: class 3 ( cat )",
        scan.reason,
        scan.advice,
        scan.warnings[0],
        "95 % quantile of 24 clean ResNet-18 models",
        "two of ten classes gave no finite margin",
        "not calibrated",
        "39 of 4,800 filters removed",
        "94.1 %",
        "−98.1 points",
        "All removed filters (39)",
        "the classifier has one output a class",
        scan.model.sha256,
        purify.output_sha256,
        *scan.limits,
        *purify.limits,
    ):
        assert " ".join(expected.split()) in text, expected


def test_nothing_is_loaded_from_elsewhere(
    scan: ScanDocument, purify: PurifyDocument, before: EvaluateDocument
) -> None:
    pytest.importorskip("matplotlib", exc_type=ImportError)
    page = render([scan, purify, before], title="Report")
    reader, _ = read(page)
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert "url(//" not in page
    for tag, key, value in reader.attributes:
        if key in ("src", "href", "data", "action", "srcset", "poster"):
            assert value.startswith(("#", "data:")), (tag, key, value[:50])
        assert not key.startswith("on"), (tag, key)
    policy = next(
        value for tag, key, value in reader.attributes if tag == "meta" and value.startswith("default-src")
    )
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}';" in policy


@pytest.mark.parametrize("verdict", ["backdoored", "clean", "inconclusive"])
def test_verdicts_are_words_and_never_safe(scan: ScanDocument, verdict: str) -> None:
    page = render([without_plots(scan, verdict=verdict, detectors=())], title="Report")
    _, text = read(page)
    words = {
        "backdoored": "Backdoor found",
        "clean": "No evidence of a backdoor",
        "inconclusive": "Inconclusive",
    }
    for name, phrase in words.items():
        assert (phrase in text) is (name == verdict)
    assert not re.search(r"\bsafe(ly|ty)?\b", text, re.IGNORECASE)
    assert f'class="card verdict {verdict}"' in page
    assert ("absence of evidence is no proof" in text) is (verdict == "clean")
    assert "The attack success rate was not measured" in text


def test_text_from_documents_is_escaped(
    scan: ScanDocument, purify: PurifyDocument, before: EvaluateDocument
) -> None:
    pytest.importorskip("matplotlib", exc_type=ImportError)
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    data = scan.data.model_copy(update={"class_names": (evil,) * 10, "source": evil, "split": evil})
    model = scan.model.model_copy(update={"path": evil, "sha256": evil, "architecture": evil})
    texts = {"data": data, "model": model, "tool_version": evil, "limits": (evil,), "warnings": (evil,)}
    rows = tuple(
        row.model_copy(
            update={
                "title": evil,
                "summary": evil,
                "evidence": {evil: evil, "x_png": evil, "d": {evil: [evil]}},
            }
        )
        for row in scan.detectors
    )
    page = render(
        [
            scan.model_copy(
                update=texts
                | {"reason": evil, "target_name": evil, "detectors": rows, "settings": {evil: evil}}
            ),
            purify.model_copy(
                update=texts
                | {
                    "method": evil,
                    "output": evil,
                    "layers": tuple(row.model_copy(update={"name": evil}) for row in purify.layers),
                    "walk": tuple(row.model_copy(update={"layer": evil}) for row in purify.walk),
                    "removed": tuple(row.model_copy(update={"layer": evil}) for row in purify.removed),
                }
            ),
            before.model_copy(
                update={
                    "label": evil,
                    "attack": evil,
                    "examples": tuple(
                        row.model_copy(update={"true_label": evil, "predicted_label": evil})
                        for row in before.examples
                    ),
                }
            ),
        ],
        title=evil,
    )
    reader, text = read(page)
    assert reader.tags.count("script") == 1
    assert not [key for _, key, _ in reader.attributes if key.startswith("on")]
    assert all(
        value.startswith("data:image/png;base64,") for _, key, value in reader.attributes if key == "src"
    )
    assert "<script>alert(1)</script>" in text
    assert "{{ 7 * 7 }}" in text


def test_two_scans_have_two_verdicts_and_distinct_ids(scan: ScanDocument) -> None:
    pytest.importorskip("matplotlib", exc_type=ImportError)
    small = scan.model_copy(update={"scatter": None})
    page = render([small, small.model_copy(update={"verdict": "clean"})], title="Report")
    reader, text = read(page)
    assert len(reader.ids) == len(set(reader.ids))
    assert "Backdoor found" in text
    assert "No evidence of a backdoor" in text


def test_a_purification_alone_shows_its_cost(purify: PurifyDocument) -> None:
    bare = purify.model_copy(update={"walk": (), "layers": (), "removed": (), "untreated": ()})
    _, text = read(render([bare], title="Report"))
    assert "Clean accuracy before" in text
    assert "94.2 %" in text.replace("\u202f", " ")
    assert "The attack success rate was not measured" in text


def test_an_evaluation_without_trigger_says_so(before: EvaluateDocument) -> None:
    clean = {"clean_accuracy": before.metrics["clean_accuracy"]}
    page = render([before.model_copy(update={"metrics": clean, "examples": ()})], title="Report")
    assert page.count("not measured") == 2


def test_changes_are_shown_for_equal_attacks_only(before: EvaluateDocument, after: EvaluateDocument) -> None:
    other = after.model_copy(update={"attack": "wanet"})
    assert "−98.1 points" in render([before, after], title="Report")
    assert "points" not in render([before, other], title="Report").split("</style>")[1]


def test_nothing_to_report_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="at least one document, got 0"):
        render([], title="Report")


def test_without_matplotlib_the_extra_is_named(scan: ScanDocument, monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def absent(name: str, package: str | None = None) -> ModuleType:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return original(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingDependencyError, match=r"'matplotlib'.*\[plots\]"):
        render([scan], title="Report")
    assert "Backdoor found" in render([without_plots(scan)], title="Report")


def test_the_report_needs_no_torch() -> None:
    code = "import sys, unbackdoor.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_numbers_are_short() -> None:
    assert percent(0.94118) == "94.1\u202f%"
    assert percent(None) == "–"
    assert [number(value) for value in (None, 0, 2.0, 4800, -0.4567, 1.23e-7, 1e300)] == [
        "–",
        "0",
        "2",
        "4,800",
        "−0.457",
        "1.23e-07",
        "1e+300",
    ]
    assert [chance(value) for value in (None, 0.0, 0.0421, 1.0)] == [
        "not calibrated",
        "< 0.001",
        "0.042",
        "1.000",
    ]
    assert [duration(value) for value in (0.04, 9.94, 59.4, 200.2, 7260)] == [
        "0.0 s",
        "9.9 s",
        "59 s",
        "3 min 20 s",
        "2 h 1 min",
    ]


def test_intervals_name_their_images(scan: ScanDocument) -> None:
    assert interval(scan.clean_accuracy) == "91.8–95.9\u202f%, n = 500"


def test_evidence_becomes_text_or_images(before: EvaluateDocument) -> None:
    image = before.examples[0].clean_png
    rows = evidence_rows(
        {
            "mask_png": image,
            "fake_png": "not an image",
            "top_classes": [1, 0.123456, "cat", None],
            "nested": {"a": [0.1234567]},
            "long": "x" * 5000,
            "converged": True,
            "empty": [],
        }
    )
    assert (rows[0].name, rows[0].image, rows[0].text) == ("mask", image, "")
    assert [row.text for row in rows[1:4]] == ["not an image", "1, 0.123, cat, –", '{"a": [0.123]}']
    assert rows[4].text.endswith("… (5,000 characters in all)")
    assert [row.text for row in rows[5:]] == ["yes", "none"]


def test_extreme_documents_can_be_shown(scan: ScanDocument, purify: PurifyDocument) -> None:
    pytest.importorskip("matplotlib", exc_type=ImportError)
    assert scan.scatter is not None
    assert scan.suppression is not None
    columns = ("magnitude", "saliency", "magnitude_after", "saliency_after", "layer_of", "layers")
    for share, loss, largest in (((), 1e308, 2**53), ((0.0,), 5e-324, 0), ((1.0, 0.0), -1e29, 1)):
        extreme = scan.model_copy(
            update={
                "seconds": 1e308,
                "target_class": largest,
                "data": scan.data.model_copy(update={"image_shape": (), "class_names": ()}),
                "scatter": scan.scatter.model_copy(update=dict.fromkeys(columns, ())),
                "suppression": scan.suppression.model_copy(
                    update={"accuracy": share, "class_share": share, "shift_share": share}
                ),
            }
        )
        step = purify.walk[0].model_copy(update={"rank": largest, "loss_change": loss})
        layer = purify.layers[0].model_copy(update={"removed": largest, "filters": 0})
        cut = purify.model_copy(update={"walk": (step,), "layers": (layer,), "filters_removed": largest})
        _, text = read(render([extreme, cut], title=""))
        assert f"class {largest}" in text


def test_long_tables_are_cut_and_say_so(purify: PurifyDocument, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", exc_type=ImportError)
    assert "Only the first" not in render([purify], title="Report")
    monkeypatch.setattr("unbackdoor.report.page.MAX_ROWS", 50)
    assert "Only the first 50 are shown" in render([purify], title="Report")
