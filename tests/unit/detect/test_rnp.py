from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.detect import UnlearntLabel, UnlearntSample, UnlearntTrigger
from unbackdoor.detect.calibration import Calibration
from unbackdoor.detect.rnp import _log_odds
from unbackdoor.suppression import Check, Suppressed, Suppression
from unbackdoor.testing import planted_backdoor
from unbackdoor.types import as_float


def run(matrix: Tensor) -> Suppressed:
    right = 10 * torch.eye(len(matrix), dtype=torch.int64)
    return Suppressed(nn.Identity(), (Check(0, right), Check(1, matrix)), "accuracy")


def test_the_score_is_the_spread_of_the_class_shares_by_hand() -> None:
    # Shares 0.5, 0.3, 0.2: K sum c^2 = 3 * 0.38 = 1.14, so (1.14 - 1) / 2 = 0.07.
    matrix = torch.tensor([[0, 2, 2], [2, 0, 0], [3, 1, 0]])
    found = UnlearntLabel().judge(run(matrix))
    assert found.score == pytest.approx(0.07)
    assert found.target_class == 0
    collapsed = torch.zeros(4, 4, dtype=torch.int64)
    collapsed[1:, 0] = 5
    assert UnlearntLabel().judge(run(collapsed)).score == pytest.approx(1.0)


@pytest.mark.parametrize(("largest", "flagged"), [(59, False), (61, True)])
def test_the_threshold_at_ten_classes_is_the_variance_of_the_source(largest: int, flagged: bool) -> None:
    # One class with 60 of 150 images and nine with 10 have the variance (0.3^2 + 9 / 30^2) / 10 = 0.0100.
    matrix = torch.zeros(10, 10, dtype=torch.int64)
    matrix[0] = torch.tensor([10] * 9 + [largest])
    found = UnlearntLabel().judge(run(matrix))
    assert found.is_backdoored is flagged
    assert found.threshold == pytest.approx(100 * 0.01 / 9)


def test_a_collapse_can_be_flagged_however_many_classes_there_are() -> None:
    for classes in (2, 99, 200):
        matrix = torch.zeros(classes, classes, dtype=torch.int64)
        matrix[1:, 0] = 1
        found = UnlearntLabel().judge(run(matrix))
        assert found.score == pytest.approx(1.0)
        assert found.threshold == pytest.approx(0.111, abs=1e-3)
        assert found.is_backdoored


def test_an_accuracy_that_did_not_fall_is_said() -> None:
    found = UnlearntLabel().judge(run(10 * torch.eye(5, dtype=torch.int64)))
    assert math.isnan(found.score)
    assert "raise unlearning.budget" in found.undetermined


def test_few_classes_are_not_told_to_unlearn_longer() -> None:
    # All in one class of three: no budget takes the accuracy below a third.
    matrix = torch.zeros(3, 3, dtype=torch.int64)
    matrix[:, 0] = 10
    found = UnlearntLabel().judge(run(matrix))
    assert "no more than what 3 classes leave to chance; raise unlearning.stop_accuracy" in found.undetermined
    assert "budget" not in found.undetermined


def test_little_to_read_from_is_said() -> None:
    even = 1 - torch.eye(5, dtype=torch.int64)
    few = Suppressed(nn.Identity(), (Check(0, torch.eye(5, dtype=torch.int64)), Check(1, even)), "accuracy")
    assert "5 images are too few" in UnlearntLabel().judge(few).undetermined
    guessing = Suppressed(nn.Identity(), (Check(0, 0 * even + 2), Check(1, even)), "accuracy")
    assert "no better than chance on images of 5 classes" in UnlearntLabel().judge(guessing).undetermined


def test_a_calibration_replaces_the_fixed_thresholds() -> None:
    calibration = Calibration(tuple(i / 100 for i in range(20)), "twenty clean models")
    even = 1 - torch.eye(5, dtype=torch.int64)
    found = UnlearntLabel(calibration=calibration).judge(run(even))
    assert found.threshold_source == "twenty clean models"
    assert found.p_value == pytest.approx(21 / 21)


def test_a_copy_that_has_collapsed_leaves_nothing_to_invert() -> None:
    planted = planted_backdoor()
    clean = planted.clean_data(256, rng.generator(0))
    rough = replace(Suppression.rnp(stop_accuracy=0.2), learning_rate=0.1)
    found = UnlearntTrigger(rough).score(planted.model, clean, generator=rng.generator(0))
    assert "a trigger has nothing to do" in found.undetermined


def test_the_planted_label_trigger_and_samples_are_found() -> None:
    planted = planted_backdoor(target_class=3)
    clean, test = (planted.clean_data(n, rng.generator(n)) for n in (256, 200))
    label = UnlearntLabel().score(planted.model, clean, generator=rng.generator(0))
    assert (label.is_backdoored, label.target_class) == (True, 3)
    slow = replace(Suppression.rnp(stop_accuracy=0.8), learning_rate=1e-3, checks_per_epoch=4)
    trigger = UnlearntTrigger(slow)
    found = trigger.score(planted.model, clean, generator=rng.generator(0))
    assert found.target_class == 3
    success, l1 = found.evidence["success_on_the_model"], found.evidence["l1_pixels"]
    assert found.score == pytest.approx(success * (1 - l1 / 16**2))
    mixed = torch.cat([as_float(test.images), planted.trigger(as_float(test.images))])
    scores = UnlearntSample(slow).score(planted.model, mixed, clean, generator=rng.generator(0))
    assert scores.shape == (400,)
    eligible = torch.cat([test.labels, test.labels]) != 3
    clean_scores, triggered = scores[:200][eligible[:200]], scores[200:][eligible[200:]]
    assert float((triggered.unsqueeze(1) > clean_scores).float().mean()) > 0.95


def test_log_odds_by_hand_where_probabilities_are_one() -> None:
    logits = torch.tensor([[math.log(3), 0.0, 0.0], [100.0, 0.0, 0.0], [0.0, 200.0, 0.0]])
    assert _log_odds(logits, 0).tolist() == pytest.approx([math.log(1.5), 100 - math.log(2), -200])
