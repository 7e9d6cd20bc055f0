"""The script that takes answers over from before options, where these could not have acted."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from unbackdoor.bench.cell import Cell
from unbackdoor.bench.defend import settings_of
from unbackdoor.purify import MNP

SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "carry_over.py"))


def asked(**rest: Any) -> Cell:  # noqa: ANN401
    return Cell(model="badnets", model_sha256="0" * 64, data="cifar10", method="mnp", **rest)


def answer(seed: int, *taken: float, **notes: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return a record of before the options whose tries of relearning were taken or not."""
    settings = settings_of(MNP(partway=False, evidence=0.15, collapsed=2.0, settled_index=0.0))
    assert not {"partway", "collapsed", "settled_index"} & set(settings)
    settings["warp.learning_rate"] = "0.05"
    cell = asked(seed=seed, settings=settings)
    tried = {"relearning.taken": bool(taken[0])} if len(taken) == 1 else {}
    series = {"relearning.taken": list(taken)} if len(taken) > 1 else {}
    found = {f"evidence.{name}": value for name, value in notes.items()}
    return {
        "key": cell.key,
        "cell": cell.describe(),
        "status": "ok",
        "notes": tried | found,
        "series": series,
    }


@pytest.mark.parametrize(
    ("taken", "refused"),
    [
        ((), False),
        ((1.0,), False),
        ((0.0,), True),
        ((0.0, 0.0, 1.0), False),
        ((0.0, 0.0, 0.0), True),
        # Of two rounds the first was refused for good, or the second.
        ((0.0, 0.0, 0.0, 1.0), True),
        ((1.0, 0.0, 0.0, 0.0), True),
        ((0.0, 1.0, 0.0, 1.0), False),
    ],
)
def test_a_refusal_is_one_of_all_tries_in_a_row(taken: tuple[float, ...], refused: bool) -> None:
    record = answer(0, *taken)
    assert SCRIPT["was_refused"](record) == refused
    record["cell"]["settings"]["partway"] = "true"
    assert not SCRIPT["was_refused"](record), "what was gone towards is as it would be"


@pytest.mark.parametrize(
    ("taken", "filters", "benefit", "otherwise"),
    [
        (True, 5, 0.9, False),
        (False, 5, 0.3, False),
        (False, 5, 0.7, True),
        (True, 5, 0.5, True),
        (True, 0, 0.0, False),
    ],
)
def test_evidence_that_is_judged_otherwise_today_must_be_asked_again(
    taken: bool, filters: int, benefit: float, otherwise: bool
) -> None:
    record = answer(0, taken=taken, filters=filters, benefit=benefit)
    assert SCRIPT["was_judged_otherwise"](record) == otherwise
    assert not SCRIPT["was_judged_otherwise"](answer(0))


def test_filters_that_stayed_may_go_today() -> None:
    assert SCRIPT["was_kept"](answer(0, taken=False, filters=5, benefit=0.3))
    assert not SCRIPT["was_kept"](answer(0, taken=True, filters=5, benefit=0.9))
    assert not SCRIPT["was_kept"](answer(0))
    today = answer(0, taken=False, filters=5, benefit=0.3)
    today["cell"]["settings"]["collapsed"] = "0.6"
    assert not SCRIPT["was_kept"](today)


def test_warps_of_another_step_are_asked_for_again() -> None:
    record = answer(0)
    assert not SCRIPT["was_bent"](record)
    record["notes"]["warp.flagged"] = "none"
    assert SCRIPT["was_bent"](record)
    record["cell"]["settings"]["warp.learning_rate"] = "0.1"
    assert not SCRIPT["was_bent"](record)


@pytest.mark.parametrize(
    ("smallest", "reached", "acted", "little"),
    [
        (10.0, 1.0, "0", False),
        (60.0, 1.0, "0", True),
        (60.0, 1.0, "none", False),
        # The class that was acted on has no trigger to compare.
        (10.0, 0.0, "0", True),
    ],
)
def test_what_a_small_lead_settled_is_asked_for_again(
    smallest: float, reached: float, acted: str, little: bool
) -> None:
    record = answer(0)
    record["notes"]["inversion.acted_on"] = acted
    record["series"] = {
        "inversion.triggers.l1_pixels": [smallest, 80.0, 90.0, 100.0, 110.0, 120.0],
        "inversion.triggers.reached": [reached, 1.0, 1.0, 1.0, 1.0, 1.0],
    }
    assert SCRIPT["was_settled_by_little"](record) == little
    record["cell"]["settings"]["settled_index"] = "3"
    assert not SCRIPT["was_settled_by_little"](record)


def test_one_class_that_stands_out_settles_a_matter() -> None:
    record = answer(0)
    record["notes"]["inversion.acted_on"] = "0, 1"
    record["series"] = {
        "inversion.triggers.l1_pixels": [5.0, 66.0, 90.0, 100.0, 110.0, 120.0],
        "inversion.triggers.reached": [1.0] * 6,
    }
    assert not SCRIPT["was_settled_by_little"](record)
    record["series"]["inversion.triggers.l1_pixels"][0] = 60.0
    assert SCRIPT["was_settled_by_little"](record)
    # The paper's settings ask for nothing.
    assert not SCRIPT["was_settled_by_little"](record | {"cell": record["cell"] | {"paper": True}})


def test_answers_with_the_papers_settings_are_concerned_too() -> None:
    record, paper = answer(0), settings_of(MNP.paper())
    cell = record["cell"] | {"paper": True, "settings": paper | {"warp.learning_rate": "0.05"}}
    assert SCRIPT["concerns"](record | {"cell": cell})
    assert SCRIPT["carried_over"](record | {"cell": cell})["cell"]["settings"] == paper


def test_other_questions_are_left_alone() -> None:
    record = answer(0, 1.0)
    assert SCRIPT["concerns"](record)
    for change in ({"paper": True}, {"options": {"partway": "false"}}, {"method": "rnp"}):
        assert not SCRIPT["concerns"](record | {"cell": record["cell"] | change})
    older = record["cell"]["settings"] | {"rounds": "1"}
    assert not SCRIPT["concerns"](record | {"cell": record["cell"] | {"settings": older}})
    assert not SCRIPT["concerns"](record | {"cell": record["cell"] | {"settings": settings_of(MNP())}})
    assert not SCRIPT["concerns"](record | {"status": "failed"})


def test_answers_in_which_nothing_acted_answer_todays_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    rows = [answer(0, 1.0), answer(1, 0.0, 0.0, 0.0)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["carry_over.py", "--records", str(source), "--out", str(out)])
    for _ in range(2):
        SCRIPT["main"]()
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert record["key"] == asked(settings=settings_of(MNP())).key
    assert record["carried_from"] == rows[0]["key"]
    said = capsys.readouterr().out
    assert "partway could act: badnets seed 1" in said
    assert "1 answers taken over" in said
