from __future__ import annotations

import json
from typing import Literal

import pytest

from unbackdoor.report.documents import Confidence, RecoveredTrigger, ScanDocument
from unbackdoor.report.page import render
from unbackdoor.report.sarif import sarif, sarif_text

from .conftest import data, model, rate

Verdict = Literal["backdoored", "clean", "inconclusive"]


def document(verdict: Verdict, path: str = "models/a b.pth") -> ScanDocument:
    return ScanDocument(
        tool_version="1.2",
        created="2026-01-31T12:00:00+00:00",
        seconds=1.0,
        model=model(path),
        data=data(),
        clean_accuracy=rate(9, 10),
        verdict=verdict,
        reason="For a reason.",
        advice="Do something.",
        target_class=3,
        target_name="cat",
        confidence=Confidence(
            p_value=0.05, alpha=0.05, models=19, origin="models", description="d", smallest_rate=0.05,
            guarantee="Of clean models, at most 5 %.",
        ),
        trigger=RecoveredTrigger(
            target_class=3, target_name="cat", l1_pixels=9.0, image_fraction=0.01, success=rate(9, 10)
        ),
        limits=["a limit"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("verdict", "rule", "level"), [("backdoored", "UB001", "error"), ("inconclusive", "UB002", "warning")]
)
def test_what_needs_somebody_is_one_result(verdict: Verdict, rule: str, level: str) -> None:
    log = sarif(document(verdict))
    assert (log["version"], len(log["runs"])) == ("2.1.0", 1)
    run = log["runs"][0]
    (result,) = run["results"]
    # Section 3.27.10: a level goes with the kind "fail" alone.
    assert (result["ruleId"], result["kind"], result["level"]) == (rule, "fail", level)
    assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == rule
    assert result["message"]["text"] == "For a reason. Suspected target: cat. Of clean models, at most 5 %."


def test_a_clean_model_raises_no_alert_and_its_verdict_can_be_read() -> None:
    (run,) = sarif(document("clean"))["runs"]
    assert run["results"] == []
    assert (run["properties"]["verdict"], run["properties"]["reason"]) == ("clean", "For a reason.")
    assert run["artifacts"][0]["hashes"]["sha-256"] == document("clean").model.sha256


def test_a_rate_is_promised_only_where_there_are_models_enough_for_it() -> None:
    confidence = document("clean").confidence
    assert confidence is not None
    assert confidence.rate_holds
    promise = "are called backdoored<"
    assert promise in render([document("clean")], title="t")
    for rate_of in (0.25, None):
        few = confidence.model_copy(update={"smallest_rate": rate_of})
        page = render([document("inconclusive").model_copy(update={"confidence": few})], title="t")
        assert promise not in page


def test_names_are_neither_links_nor_placeholders() -> None:
    named = document("backdoored").model_copy(update={"target_name": "[click](https://evil) {0}"})
    (result,) = sarif(named)["runs"][0]["results"]
    assert r"Suspected target: \[click\](https://evil) {{0}}." in result["message"]["text"]


def test_the_log_says_which_file_and_holds_the_numbers() -> None:
    run = json.loads(sarif_text(document("backdoored")))["runs"][0]
    (result,), (artifact,) = run["results"], run["artifacts"]
    place = result["locations"][0]["physicalLocation"]["artifactLocation"]
    assert place == {"uri": "models/a%20b.pth", "index": 0}
    assert artifact["location"]["uri"] == place["uri"]
    assert artifact["hashes"]["sha-256"] == document("clean").model.sha256
    assert run["invocations"][0]["endTimeUtc"] == "2026-01-31T12:00:00Z"
    assert run["properties"]["trigger"]["l1_pixels"] == 9.0
    assert run["properties"]["confidence"]["models"] == 19
    assert run["properties"]["limits"] == ["a limit"]


def test_absolute_paths_become_file_uris() -> None:
    log = sarif(document("clean", path="/models/é.pth"))
    assert log["runs"][0]["artifacts"][0]["location"]["uri"] == "file:///models/%C3%A9.pth"
