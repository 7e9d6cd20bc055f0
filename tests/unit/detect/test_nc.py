from __future__ import annotations

import json
import math

import pytest
import torch

from unbackdoor import rng
from unbackdoor.detect.calibration import Calibration
from unbackdoor.detect.nc import Statistic, TriggerSize, smallness
from unbackdoor.errors import InvalidInputError
from unbackdoor.inversion import Inversion, InvertedTrigger, invert_all
from unbackdoor.testing import planted_backdoor
from unbackdoor.testing.subjects import awkward_model, small_data
from unbackdoor.types import LabelledImages


def trigger(target_class: int, l1: float, *, reached: bool = True) -> InvertedTrigger:
    return InvertedTrigger(target_class, torch.zeros(1, 4, 4), torch.zeros(3, 4, 4), l1, 1.0, reached, 10)


def triggers(*norms: float) -> list[InvertedTrigger]:
    return [trigger(k, norm) for k, norm in enumerate(norms)]


@pytest.mark.parametrize(
    ("statistic", "expected"),
    [
        # Median 32, deviations 22, 2, 0, 2, 4: MAD 2.
        ("index", 22 / (1.4826 * 2)),
        # Logarithms: median log 32, deviations log 3.2, log 32/30, 0, log 34/32, log 36/32: MAD log 32/30.
        ("log_index", math.log(3.2) / (1.4826 * math.log(32 / 30))),
        ("ratio", 3.2),
    ],
)
def test_the_score_by_hand(statistic: Statistic, expected: float) -> None:
    found = TriggerSize(statistic=statistic).judge(triggers(30, 10, 32, 34, 36))
    assert found.score == pytest.approx(expected)
    assert (found.target_class, found.evidence["l1_pixels"]) == (1, 10)
    assert found.is_backdoored
    assert found.evidence["anomaly_indices"][3] == pytest.approx(-2 / (1.4826 * 2))


def test_large_triggers_are_no_outliers() -> None:
    found = TriggerSize().judge(triggers(30, 31, 32, 34, 500))
    assert found.score == pytest.approx(2 / (1.4826 * 2))
    assert found.is_backdoored is False


@pytest.mark.parametrize(("statistic", "expected"), [("index", 0.0), ("log_index", 0.0), ("ratio", 1.0)])
def test_equal_triggers_are_no_evidence(statistic: Statistic, expected: float) -> None:
    assert smallness([7.0] * 6, statistic) == expected


def test_a_class_that_needs_no_trigger_keeps_the_score_finite() -> None:
    for statistic in ("index", "log_index", "ratio"):
        assert math.isfinite(smallness([0.0, 30, 32, 34, 36], statistic))


def test_triggers_that_do_not_work_are_left_out() -> None:
    failed = [*triggers(30, 10, 32, 34, 36), trigger(5, 0.1, reached=False)]
    found = TriggerSize().judge(failed)
    assert found.score == pytest.approx(22 / (1.4826 * 2))
    assert found.target_class == 1
    assert found.evidence["anomaly_indices"][5] is None
    few = TriggerSize().judge([*triggers(30, 10, 32, 34), trigger(4, 0.1, reached=False)])
    assert math.isnan(few.score)
    assert few.target_class is None
    assert "for 4 of 5 classes" in few.undetermined
    json.dumps(dict(few.evidence), allow_nan=False)


def test_two_classes_get_no_opinion() -> None:
    detector = TriggerSize(Inversion(steps=2, round_steps=1, success=0.01), fewest_classes=3)
    found = detector.score(awkward_model(classes=2), small_data(classes=2), generator=rng.generator(0))
    assert found.is_backdoored is None


def test_few_images_and_a_model_that_guesses_get_no_opinion() -> None:
    detector = TriggerSize(Inversion(steps=2, round_steps=1, success=0.01), fewest_classes=3)
    planted = planted_backdoor()
    few = planted.clean_data(7, rng.generator(0))
    found = detector.score(planted.model, few, generator=rng.generator(0))
    assert "7 images are too few" in found.undetermined
    assert found.threshold == 2
    clean = planted.clean_data(64, rng.generator(0))
    wrong = LabelledImages(clean.images, (clean.labels + 1) % 8)
    found = detector.score(planted.model, wrong, generator=rng.generator(0))
    assert "no better than chance on images of 8 classes" in found.undetermined


def test_a_calibration_replaces_the_threshold() -> None:
    calibration = Calibration(tuple(float(i) for i in range(19)), "nineteen clean models")
    found = TriggerSize(calibration=calibration).judge(triggers(30, 10, 32, 34, 36))
    assert found.threshold_source == "nineteen clean models"
    assert found.p_value == pytest.approx((1 + 11) / 20)  # 8 to 18 are not below 7.42
    assert found.is_backdoored is False


def test_the_planted_target_needs_half_the_pixels_of_the_others() -> None:
    inversion = Inversion(steps=100, batch_size=8, success=0.9, learning_rate=0.3, precision="fp32")
    scores = {}
    for infected in (True, False):
        planted = planted_backdoor(target_class=3, infected=infected)
        clean = planted.clean_data(64, rng.generator(0))
        found = invert_all(planted.model, clean, inversion, generator=rng.generator(0))
        for statistic in ("index", "ratio"):
            scores[statistic, infected] = TriggerSize(inversion, statistic).judge(found)
    assert scores["ratio", True].target_class == 3
    assert scores["ratio", True].score > 1.7 > 1.3 > scores["ratio", False].score
    assert scores["index", True].is_backdoored


def test_options_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="statistic must be"):
        TriggerSize(statistic="norm")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="fewest_classes must be at least 3, got 2"):
        TriggerSize(fewest_classes=2)
    assert TriggerSize.paper().inversion.steps == 31_000
