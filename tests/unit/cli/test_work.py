from __future__ import annotations

from typing import Any

import pytest

from unbackdoor.cli.work import price, refused_relearning, remaining_triggers, weak_evidence
from unbackdoor.rates import Rate

STEP = {"exposure": "inversion", "taken": True, "accuracy_of_the_suspect": 0.9, "accuracy": 0.8}


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (STEP | {"taken": False}, "fell from 90.0% to 80.0%; the trigger that was found may still work"),
        ({"exposure": "inversion", "taken": False, "problem": "it diverged."}, "it diverged; the trigger"),
    ],
)
def test_what_was_not_relearnt_is_said(step: dict[str, Any], said: str) -> None:
    (sentence,) = refused_relearning([STEP, step])
    assert said in sentence
    assert sentence.startswith("The relearning after inversion was not taken")


def test_nothing_is_said_where_nothing_was_refused() -> None:
    assert refused_relearning([]) == refused_relearning([STEP]) == []
    # The first try cost too much, a gentler one did not.
    assert refused_relearning([STEP | {"taken": False, "tried_again": True}, STEP]) == []


def test_triggers_that_the_last_round_left_are_named() -> None:
    first, last = STEP | {"left": [0, 2]}, STEP | {"left": [2]}
    (sentence,) = remaining_triggers([first, last], ["cat", "dog", "ship"].__getitem__)
    assert "still leads to class ship;" in sentence
    (sentence,) = remaining_triggers([first], str)
    assert "still leads to class 0 and class 2;" in sentence
    assert remaining_triggers([first, STEP | {"left": []}], str) == remaining_triggers([STEP], str) == []


def test_filters_that_tell_too_little_are_named_and_kept() -> None:
    found = {"filters": 17, "largest_benefit": 0.112, "taken": False}
    (sentence,) = weak_evidence(found)
    assert "exposed 17 filters" in sentence
    assert "none gives back more than 11% of what it broke" in sentence
    assert weak_evidence(found | {"taken": True}) == weak_evidence({}) == []


def test_a_purification_that_is_dear_is_warned_of() -> None:
    assert price(Rate(90, 100), Rate(88, 100), 500) == []
    assert price(Rate(0, 0), Rate(0, 0), 500) == []
    (warning,) = price(Rate(711, 1000), Rate(478, 1000), 9)
    assert warning.startswith(
        "It cost 23.3 points of accuracy on 1000 images that the method did not see; give more"
    )
