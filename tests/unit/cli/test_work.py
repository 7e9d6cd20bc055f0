from __future__ import annotations

from typing import Any

import pytest

from unbackdoor import rng
from unbackdoor.cli.work import _doubts, price, relearning_cut_short, remaining_triggers, weak_evidence
from unbackdoor.detect import plausibility
from unbackdoor.rates import Rate
from unbackdoor.testing import planted_backdoor

STEP = {"exposure": "inversion", "taken": True, "accuracy_of_the_suspect": 0.9, "accuracy": 0.8}


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (STEP | {"taken": False}, "fell from 90.0% to 80.0%; the trigger that was found may still work"),
        ({"exposure": "inversion", "taken": False, "problem": "it diverged."}, "it diverged; the trigger"),
    ],
)
def test_what_was_not_relearnt_is_said(step: dict[str, Any], said: str) -> None:
    (sentence,) = relearning_cut_short([STEP, step])
    assert said in sentence
    assert sentence.startswith("The relearning after inversion was not taken")


def test_how_far_relearning_was_taken_is_said() -> None:
    (sentence,) = relearning_cut_short([STEP | {"taken": False, "share": 0.4, "accuracy_kept": 0.89}])
    assert "was taken 40% of the way, where clean accuracy goes from 90.0% to 89.0%, since all" in sentence
    assert "would leave 80.0%" in sentence


def test_of_several_rounds_the_last_one_is_spoken_of() -> None:
    partly = STEP | {"taken": False, "share": 0.4, "accuracy_kept": 0.89}
    assert relearning_cut_short([partly, STEP]) == []
    assert len(relearning_cut_short([partly, partly, STEP | {"exposure": "warp"}])) == 1


def test_nothing_is_said_where_nothing_was_refused() -> None:
    assert relearning_cut_short([]) == relearning_cut_short([STEP]) == []
    # The first try cost too much, a gentler one did not.
    assert relearning_cut_short([STEP | {"taken": False, "tried_again": True}, STEP]) == []


def test_triggers_that_the_last_round_left_are_named() -> None:
    first, last = STEP | {"left": [0, 2]}, STEP | {"left": [2]}
    (sentence,) = remaining_triggers([first, last], ["cat", "dog", "ship"].__getitem__)
    assert "still leads to class ship;" in sentence
    (sentence,) = remaining_triggers([first], str)
    assert "still leads to class 0 and class 2;" in sentence
    assert remaining_triggers([first, STEP | {"left": []}], str) == remaining_triggers([STEP], str) == []


def test_filters_that_tell_too_little_are_named_and_kept() -> None:
    found = {"filters": 17, "largest_benefit": 0.112, "benefit": 0.44, "taken": False}
    (sentence,) = weak_evidence(found)
    assert "exposed 17 filters" in sentence
    assert "together they give back no more than 44% of what it broke" in sentence
    assert weak_evidence(found | {"taken": True}) == weak_evidence({}) == []


def test_a_purification_that_is_dear_is_warned_of() -> None:
    assert price(Rate(90, 100), Rate(88, 100), 500) == []
    assert price(Rate(0, 0), Rate(0, 0), 500) == []
    (warning,) = price(Rate(711, 1000), Rate(478, 1000), 9)
    assert warning.startswith(
        "It cost 23.3 points of accuracy on 1000 images that the method did not see; give more"
    )


def test_an_evaluation_does_not_warn_of_statistics_that_pruning_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planted = planted_backdoor(infected=False)
    test = planted.clean_data(64, rng.generator(0))
    assert _doubts(planted.model, test, 1.0, 1.0) == []
    # With any shift at all counted, the scan's check warns, an evaluation does not.
    monkeypatch.setattr(plausibility, "MOST_SHIFTED", -1.0)
    assert plausibility.check_plausible(planted.model, test).warnings[0].startswith(plausibility.SHIFTED)
    assert _doubts(planted.model, test, 1.0, 1.0) == []
    (warning,) = _doubts(planted.model, test, 0.13, 0.86)
    assert "right on 13.0% of these images, where the card of the attack claims 86.0%" in warning
