from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from suspect_sets import pixel_model, planted_set
from unbackdoor.compute import predictions_of
from unbackdoor.detect.calibration import Calibration
from unbackdoor.detect.training_set import ClassVerdict, excess_indices, gated, read_suspects
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.types import LabelledImages


def test_samples_are_grouped_by_labels_or_else_by_the_answers() -> None:
    given = planted_set()
    by_label = read_suspects(given.model, given.samples, given.clean, given.labels)
    by_answer = read_suspects(given.model, given.samples, given.clean, None)
    assert torch.equal(by_label.groups, given.labels)
    assert torch.equal(by_answer.groups, predictions_of(given.model, given.samples))
    assert by_label.features.shape == (420, 48)
    assert by_label.features.dtype == torch.float64


def test_features_that_are_not_finite_are_refused() -> None:
    images = torch.zeros(3, 1, 1, 4)
    first = nn.Conv2d(1, 1, 1)
    nn.init.constant_(first.weight, math.inf)
    model = nn.Sequential(first, pixel_model(4, 2))
    with pytest.raises(UnsupportedModelError, match="not all finite"):
        read_suspects(model, images, LabelledImages(images, torch.zeros(3, dtype=torch.int64)), None)


def test_a_score_is_positive_only_in_the_suspect_part_of_a_flagged_class() -> None:
    sides = torch.tensor([0.5, -1.0])
    assert gated(sides, flagged=True, strength=0.0).tolist() == [0.5, -1.0]
    assert gated(sides, flagged=False, strength=0.5).tolist() == [-0.75, -1.5]
    assert gated(sides, flagged=False, strength=7.0).tolist() == [-0.5, -2.0]
    assert gated(sides, flagged=False, strength=-7.0).tolist() == [-1.0, -1.0]


def test_the_index_by_hand() -> None:
    # Median 3, deviations 2, 1, 0, 1, 7: MAD 1.
    found = excess_indices([1.0, 2.0, math.nan, 3.0, 4.0, 10.0])
    assert math.isnan(found.pop(2))
    assert found == pytest.approx([-2 / 1.4826, -1 / 1.4826, 0.0, 1 / 1.4826, 7 / 1.4826])


def test_the_largest_statistic_speaks_for_the_model() -> None:
    found = ClassVerdict("largest", threshold=0.1).judge([0.0, math.nan, 0.3, 0.05])
    assert (found.score, found.target_class, found.is_backdoored) == (0.3, 2, True)
    assert found.evidence["class_statistics"] == [0.0, None, 0.3, 0.05]
    assert ClassVerdict("largest", threshold=0.1).judge([0.0, 0.0]).is_backdoored is False


def test_the_index_of_the_most_unusual_class_speaks_for_the_model() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 10.0]
    found = ClassVerdict("index", threshold=math.exp(2)).judge(values)
    assert found.score == pytest.approx(7 / 1.4826)
    assert (found.target_class, found.is_backdoored) == (4, False)
    # An unusually low value is no evidence.
    low = ClassVerdict("index", threshold=math.exp(1)).judge([-90.0, *values[:4]])
    assert low.is_backdoored is False


def test_too_few_classes_leave_it_open() -> None:
    found = ClassVerdict("index", threshold=1.0).judge([1.0, 2.0, 3.0, 40.0, math.nan])
    assert math.isnan(found.score)
    assert "4 classes have enough samples" in found.undetermined
    assert "0 classes" in ClassVerdict("largest", threshold=1.0).judge([math.nan] * 3).undetermined


def test_equal_statistics_are_no_evidence() -> None:
    assert ClassVerdict("index", threshold=1.0).judge([0.7] * 6).score == 0.0


def test_a_calibration_replaces_the_threshold() -> None:
    calibration = Calibration(tuple(i / 100 for i in range(19)), "nineteen clean models")
    verdict = ClassVerdict("largest", threshold=9.0, calibration=calibration)
    found = verdict.judge([0.0, 0.19])
    assert (found.is_backdoored, found.threshold_source) == (True, "nineteen clean models")
    assert found.p_value == pytest.approx(1 / 20)


@pytest.mark.parametrize("statistics", [[], [1.0, math.inf]])
def test_a_verdict_on_nothing_is_refused(statistics: list[float]) -> None:
    with pytest.raises(InvalidInputError, match="one finite statistic"):
        ClassVerdict("largest", threshold=1.0).judge(statistics)
