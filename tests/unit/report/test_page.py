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
from unbackdoor.report.page import LEFT_OUT, Deciding, deciding, render

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


def test_a_scan_that_measured_nothing_has_no_section_of_evidence(scan: ScanDocument) -> None:
    nothing = without_plots(scan, verdict="inconclusive", detectors=())
    page = render([nothing], title="Report")
    _, text = read(page)
    assert 'id="evidence"' not in page
    assert 'href="#evidence"' not in page
    assert "Deciding detectors" not in text
    assert "Deciding detectors" in read(render([without_plots(scan)], title="Report"))[1]


def test_of_two_scans_the_one_that_measured_nothing_says_why(scan: ScanDocument) -> None:
    nothing = without_plots(scan, detectors=(), reason="The images are of another kind.")
    _, text = read(render([nothing, without_plots(scan)], title="Report"))
    assert "Not measured, because: The images are of another kind." in text
    assert text.count("Not measured") == 1
    assert "Not measured" not in read(render([nothing, nothing], title="Report"))[1]


def test_a_detector_that_was_left_out_is_counted_and_named(scan: ScanDocument) -> None:
    options = {"scan": {"deciding": ["collapse", "trigger_search"], "fast": True}}
    row = scan.detectors[0].model_copy(update={"name": "collapse"})
    fast = without_plots(scan, detectors=(row,), settings=options)
    assert deciding(fast) == Deciding(1, 2, ("trigger inversion",))
    assert (
        "Deciding detectors that fired 1 of 2 trigger inversion left out"
        in read(render([fast], title="R"))[1]
    )
    other = row.model_copy(update={"name": "trigger_search", "verdict": "clean"})
    whole = without_plots(scan, detectors=(row, other), settings=options)
    assert deciding(whole) == Deciding(1, 2)
    assert "left out" not in read(render([whole], title="R"))[1]


@pytest.mark.parametrize(
    "options", [{}, {"scan": 1}, {"scan": {"deciding": "all"}}, {"scan": {"deciding": [1]}}]
)
def test_without_options_the_detectors_of_the_document_are_counted(
    scan: ScanDocument, options: dict[str, object]
) -> None:
    assert deciding(without_plots(scan, settings=options)) == Deciding(2, 4)


def test_what_can_be_left_out_is_called_as_elsewhere() -> None:
    from unbackdoor.detect.evidence import KINDS

    assert {name: KINDS[name] for name in LEFT_OUT} == LEFT_OUT


def test_nested_values_are_shown_without_json(scan: ScanDocument, purify: PurifyDocument) -> None:
    pytest.importorskip("matplotlib", exc_type=ImportError)
    evidence = {
        "standardised": {"norm": [0.5] * 10, "bias": [2.12345] + [0] * 9},
        "refined": [{"target_class": 3, "l1_pixels": 1.8394}, {"target_class": 0, "l1_pixels": 26.3}],
        "filters": {"of": {"which": [1, 2]}},
    }
    row = scan.detectors[0].model_copy(update={"evidence": evidence})
    settings = {"scan": {"suppression": {"mu": 0.001, "unit": "epoch"}, "fast": False}, "seed": 0}
    document = without_plots(scan, detectors=(row,), settings=settings)
    passes = {"kinds": {"forward fp32": 742, "forward fp32 replayed": 8070}}
    page = render([document, purify.model_copy(update={"passes": passes})], title="Report")
    _, text = read(page)
    for expected in (
        "class norm bias 0 (airplane) 0.5 2.12 1 (automobile) 0.5 0",
        "target class l1 pixels 3 (cat) 1.84 0 (airplane) 26.3",
        "filters of which 1, 2",
        "scan suppression mu 0.001 unit epoch fast no seed 0",
        "kinds forward fp32 742 forward fp32 replayed 8,070",
    ):
        assert expected in text
    assert "{" not in text
    assert "[" not in text


def test_a_method_is_introduced_with_its_source(purify: PurifyDocument) -> None:
    bare = purify.model_copy(update={"walk": (), "layers": (), "removed": ()})
    named = {"method_title": "Magnitude-based Neuron Pruning", "method_source": "arXiv 2405.17750"}
    _, text = read(render([bare.model_copy(update=named)], title="Report"))
    assert "Method Magnitude-based Neuron Pruning mnp ; arXiv 2405.17750" in text
    assert "Source of the method arXiv 2405.17750" in text
    _, text = read(render([bare], title="Report"))
    assert "Method mnp Clean accuracy before" in text
    assert "Source of the method" not in text


def test_the_walk_names_all_limits_and_what_kept_each_filter(purify: PurifyDocument) -> None:
    pytest.importorskip("matplotlib", exc_type=ImportError)
    _, text = read(render([purify], title="Report"))
    assert "if the loss on clean images rises too much" not in text
    assert "or lower the accuracy by more than a share, or if it is of too little benefit" in text
    assert "Kept because of" not in text
    guard = {"per_filter": 0.02, "total": 10.0, "accuracy": 0.01, "benefit": 0.01}
    _, text = read(render([purify.model_copy(update={"options": {"guard": guard}})], title="Report"))
    assert "Kept because of" in text
    assert "kept loss by this filter" in text


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
