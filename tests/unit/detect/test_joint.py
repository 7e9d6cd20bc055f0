from __future__ import annotations

import math

import pytest

from unbackdoor.detect.joint import combine
from unbackdoor.errors import InvalidInputError

CLEAN = [{"a": float(i), "b": 10.0 * i} for i in (1, 2, 3, 4)]


def test_one_detector_is_the_conformal_p_value() -> None:
    for score, p_value in ((0.5, 1.0), (2.5, 0.6), (4.0, 0.4), (9.0, 0.2)):
        joint = combine([{"a": row["a"]} for row in CLEAN], {"a": score}, 0.2)
        assert joint.p_value == pytest.approx(p_value)
        assert joint.p_values == {"a": joint.p_value}
        assert (joint.n, joint.smallest_p) == (4, 0.2)
        assert (score >= joint.thresholds["a"]) == (p_value <= 0.2)


def test_two_detectors_by_hand() -> None:
    # Pool a: 1 2 3 4 3, median 3, deviations 2 1 0 1 0: MAD 1. Pool b: 10 .. 40 and 90, median 30, MAD 10.
    joint = combine(CLEAN, {"a": 3.0, "b": 90.0}, 0.2)
    assert joint.scaled["a"] == 0.0
    assert joint.scaled["b"] == pytest.approx(6 / 1.4826)
    assert joint.p_values["b"] == joint.p_value == 0.2
    # Clean models' largest scaled scores: -1.3, -0.7, 0, 0.7: two reach 0.
    assert joint.p_values["a"] == pytest.approx(0.6)
    assert joint.thresholds["a"] == pytest.approx(4.0)
    assert joint.thresholds["b"] == pytest.approx(40.0)


def test_detectors_that_agree_on_clean_models_cost_nothing() -> None:
    # Bonferroni would double the p-value.
    assert combine(CLEAN, {"a": 9.0, "b": 0.0}, 0.2).p_value == 0.2


def test_different_clean_models_at_the_top_cost_power() -> None:
    clean = [{"a": 5.0, "b": 0.0}, {"a": 0.0, "b": 5.0}, {"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 2.0}]
    joint = combine(clean, {"a": 4.5, "b": 1.5}, 0.2)
    assert joint.p_value > 0.2 + 1e-9


def test_units_do_not_matter() -> None:
    scaled = [{"a": 100 * row["a"] - 7, "b": row["b"]} for row in CLEAN]
    one, other = combine(CLEAN, {"a": 3.5, "b": 20.0}, 0.4), combine(scaled, {"a": 343.0, "b": 20.0}, 0.4)
    assert one.p_values == other.p_values
    assert other.thresholds["a"] == pytest.approx(100 * one.thresholds["a"] - 7)


def test_equal_scores_are_no_evidence() -> None:
    joint = combine([{"a": 1.0}] * 4, {"a": 1.0}, 0.2)
    assert joint.p_value == 1.0
    assert joint.thresholds["a"] > 1.0
    # More than half of the models tie: the mean deviation takes the place of the median one.
    assert combine([{"a": 1.0}] * 4, {"a": 2.0}, 0.2).p_value == 0.2


def test_too_few_models_have_no_threshold() -> None:
    joint = combine(CLEAN, {"a": 99.0}, 0.05)
    assert joint.thresholds == {"a": math.inf}
    assert joint.p_value == 0.2


def test_an_abstention_is_the_lowest_score_and_leaves_the_number_of_models() -> None:
    mute = {"a": 2.5, "b": -math.inf}
    # The suspect: all of b is lower than any clean b, and its a is as it was, beside all four models.
    joint = combine(CLEAN, mute, 0.2)
    assert (joint.n, joint.p_values["b"]) == (4, 1.0)
    assert joint.p_values["a"] == joint.p_value < 1.0
    # A clean model: it competes by its other score, and the frame is that of the finite scores.
    clean = [*CLEAN[:3], {"a": 9.0, "b": -math.inf}]
    joint = combine(clean, {"a": 3.0, "b": 90.0}, 0.2)
    assert joint.n == 4
    assert joint.scaled["b"] == pytest.approx((90 - 25) / (1.4826 * 10))
    assert joint.p_value == 0.2
    # All abstain: no evidence.
    assert combine([{"a": -math.inf}] * 4, {"a": -math.inf}, 0.2).p_value == 1.0


@pytest.mark.parametrize(
    ("clean", "suspect"),
    [(CLEAN, {}), ([{"b": 1.0}], {"a": 1.0}), (CLEAN, {"a": math.nan}), ([{"a": math.inf}], {"a": 1.0})],
)
def test_scores_that_cannot_be_combined(clean: list[dict[str, float]], suspect: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match="scores can only be combined"):
        combine(clean, suspect, 0.05)
