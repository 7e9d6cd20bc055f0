from __future__ import annotations

import json
from typing import Literal

import pytest

from unbackdoor.report.documents import Confidence, RecoveredTrigger, ScanDocument
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
    ("verdict", "rule", "kind", "level"),
    [
        ("backdoored", "UB001", "fail", "error"),
        ("inconclusive", "UB002", "fail", "warning"),
        ("clean", "UB001", "pass", "none"),
    ],
)
def test_each_verdict_is_one_result(verdict: Verdict, rule: str, kind: str, level: str) -> None:
    log = sarif(document(verdict))
    assert (log["version"], len(log["runs"])) == ("2.1.0", 1)
    run = log["runs"][0]
    (result,) = run["results"]
    assert (result["ruleId"], result["kind"], result["level"]) == (rule, kind, level)
    # Section 3.27.10: another kind than "fail" goes with the level "none" alone.
    assert (kind == "fail") != (level == "none")
    assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == rule
    assert result["message"]["text"] == "For a reason. Suspected target: cat. Of clean models, at most 5 %."


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
    assert result["properties"]["trigger"]["l1_pixels"] == 9.0
    assert result["properties"]["confidence"]["models"] == 19
    assert result["properties"]["limits"] == ["a limit"]


def test_absolute_paths_become_file_uris() -> None:
    log = sarif(document("clean", path="/models/é.pth"))
    assert log["runs"][0]["artifacts"][0]["location"]["uri"] == "file:///models/%C3%A9.pth"
