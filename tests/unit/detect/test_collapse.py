from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from suppressions import right, run
from unbackdoor.detect.calibration import Calibration
from unbackdoor.detect.collapse import Collapse
from unbackdoor.suppression import Suppressed


def collapsed_to(target: int) -> Tensor:
    matrix = torch.zeros(5, 5, dtype=torch.int64)
    matrix[:, target] = 10
    return matrix


def shifted() -> Tensor:
    return torch.roll(right(5, 10), 2, dims=1)


def test_a_target_is_named() -> None:
    found = Collapse().judge(run(right(5, 10), collapsed_to(3)))
    assert (found.score, found.target_class, found.is_backdoored) == (1.0, 3, True)
    assert found.evidence["pattern"] == "all-to-one"
    assert found.p_value is None
    assert "uncalibrated" in found.threshold_source


def test_a_shift_is_named() -> None:
    found = Collapse().judge(run(right(5, 10), shifted()))
    assert (found.score, found.target_class) == (1.5, None)
    assert found.evidence["pattern"] == "all-to-all, class + 2"


def test_spread_errors_are_clean() -> None:
    spread = torch.full((5, 5), 2, dtype=torch.int64)
    found = Collapse().judge(run(right(5, 10), spread))
    assert found.score == pytest.approx(1.5 * 0.25)
    assert found.is_backdoored is False


def test_a_calibrated_threshold_flags_only_what_exceeds_it() -> None:
    detector = Collapse(calibration=Calibration((1.0, *[0.2] * 18), "made up"), alpha=0.05)
    found = detector.judge(run(right(5, 10), collapsed_to(3)))
    assert found.p_value == pytest.approx(0.1)
    assert found.is_backdoored is False  # exactly the largest clean score
    assert found.threshold_source == "made up"
    other = Collapse(calibration=Calibration((0.9, *[0.2] * 18), "made up"), alpha=0.05)
    assert other.judge(run(right(5, 10), collapsed_to(3))).is_backdoored is True


@pytest.mark.parametrize(
    ("suppressed", "sentence"),
    [
        (run(right(3, 10), torch.ones(3, 3, dtype=torch.int64)), "3 classes leave errors too few places"),
        (run(right(5, 10), right(5, 10), reason="budget"), "only from 1.00 to 1.00, not to 0.50"),
        (run(right(5, 10)), "only from 1.00 to 1.00"),
        # Ten outputs, and images of two classes.
        (run(right(10, 10) * (torch.arange(10) < 2), collapsed_to(3)), "images of 2 classes leave errors"),
        (run(right(5, 1), collapsed_to(3)), "5 images are too few to read a model from; give at least 8"),
        # Right on 82 % of unbalanced images by one answer alone.
        (
            run(torch.tensor([[82, 0], [18, 0]]), torch.tensor([[0, 82], [0, 18]])),
            "no better than chance on images of 2 classes (mean recall 50.0%)",
        ),
    ],
)
def test_it_abstains_with_a_reason(suppressed: Suppressed, sentence: str) -> None:
    found = Collapse().judge(suppressed)
    assert math.isnan(found.score)
    assert found.is_backdoored is None
    assert sentence in found.undetermined
