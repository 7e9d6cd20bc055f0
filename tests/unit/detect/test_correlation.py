from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from unbackdoor.detect import CorrelationRatio
from unbackdoor.detect.exposure import Deviation, Exposure
from unbackdoor.filters.groups import FilterMap
from unbackdoor.suppression import Check, Suppressed

UP = torch.arange(1.0, 6.0)


def exposure(before: Tensor, after: Tensor) -> Exposure:
    suppressed = Suppressed(nn.Identity(), (Check(0, torch.eye(4, dtype=torch.int64)),), "budget")
    return Exposure(
        suppressed,
        Deviation({"a": UP}, {"a": before}),
        Deviation({"a": UP}, {"a": after}),
        FilterMap(()),
    )


# Swapping the two outer ranks of five gives 1 - 6 * 32 / 120 = -0.6; neighbours 1 - 6 * 2 / 120 = 0.9.
OUTER = torch.tensor([5.0, 2.0, 3.0, 4.0, 1.0])
NEIGHBOURS = torch.tensor([2.0, 1.0, 3.0, 4.0, 5.0])


def test_the_ratio_of_equation_8_by_hand() -> None:
    found = CorrelationRatio().judge(exposure(UP, NEIGHBOURS))
    assert found.score == pytest.approx(0.1)
    assert found.threshold == pytest.approx(0.8)
    assert found.evidence["ratio"] == pytest.approx(0.9)
    assert found.is_backdoored is False
    assert CorrelationRatio().judge(exposure(UP, OUTER)).is_backdoored is True


def test_the_difference_agrees_with_the_ratio_on_the_verdict() -> None:
    for before in (UP, NEIGHBOURS):
        for after in (UP, NEIGHBOURS, OUTER):
            verdicts = {
                CorrelationRatio(comparison=how).judge(exposure(before, after)).is_backdoored
                for how in ("ratio", "difference")
            }
            assert len(verdicts) == 1


def test_weak_and_constant_correlations_abstain() -> None:
    weak = CorrelationRatio().judge(exposure(OUTER, UP))
    assert "only -0.600, too small" in weak.undetermined
    assert weak.is_backdoored is None
    constant = CorrelationRatio().judge(exposure(torch.ones(5), UP))
    assert "constant over all filters" in constant.undetermined
    assert math.isnan(constant.score)
