from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.detect.calibration import Calibration
from unbackdoor.detect.head_weights import HeadWeights, row_statistics, standardised
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.testing import planted_backdoor
from unbackdoor.testing.subjects import awkward_model, small_data


def head(classes: int = 10, features: int = 64, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(classes, features, generator=rng.generator(seed))


def test_the_statistics_by_hand() -> None:
    weight = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 3.0]])
    # Less the mean row (1, 1): (2, -1), (-1, -1), (-1, 2); standard deviation of all six sqrt(2).
    found = row_statistics(weight, torch.tensor([0.5, 1.0, -1.0]))
    assert found["norm"].tolist() == pytest.approx([math.sqrt(5), math.sqrt(2), math.sqrt(5)])
    assert found["mean"].tolist() == pytest.approx([0.5, -1.0, 0.5])
    assert found["large"].tolist() == [0.5, 0.0, 0.5]
    assert found["bias"].tolist() == [0.5, 1.0, -1.0]
    assert row_statistics(weight, None, large=1.5)["large"].tolist() == [0, 0, 0]
    assert "bias" not in row_statistics(weight, None)


def test_values_are_standardised_by_hand() -> None:
    # Median 3, deviations 2, 1, 0, 1, 7: MAD 1.
    z = standardised(torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0]).double())
    assert z is not None
    assert z.tolist() == pytest.approx([-2 / 1.4826, -1 / 1.4826, 0, 1 / 1.4826, 7 / 1.4826])
    assert standardised(torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0]).double()) is None
    assert standardised(torch.tensor([0.1, 0.2, 0.3, math.nan]).double()) is None


def test_a_shift_of_all_rows_changes_nothing() -> None:
    weight, bias = head(), head()[:, 0]
    shifted = HeadWeights().judge(weight + 10 * torch.randn(64, generator=rng.generator(1)), bias + 3)
    assert shifted.score == pytest.approx(HeadWeights().judge(weight, bias).score, rel=1e-4)


@pytest.mark.parametrize("statistic", ["norm", "mean", "large", "bias"])
def test_the_largest_outlier_decides(statistic: str) -> None:
    weight, bias = head(), 0.1 * head()[:, 0]
    if statistic == "bias":
        bias[7] += 5
    elif statistic == "norm":
        weight[7, :2] += torch.tensor([60.0, -60.0])
    else:
        weight[7] += 3 if statistic == "mean" else 1.5
    found = HeadWeights(statistics=(statistic,)).judge(weight, bias)  # type: ignore[arg-type]
    assert (found.is_backdoored, found.target_class) == (True, 7)
    assert found.evidence["decided_by"] == statistic
    assert found.score == pytest.approx(found.evidence["standardised"][statistic][7])
    assert HeadWeights().judge(weight, bias).target_class == 7


def test_low_rows_count_only_on_both_sides() -> None:
    weight, bias = head(), 0.1 * head()[:, 0]
    bias[4] -= 9
    high, both = (HeadWeights(side=side).judge(weight, bias) for side in ("high", "both"))
    assert high.is_backdoored is False
    assert (both.is_backdoored, both.target_class) == (True, 4)


def test_a_bias_of_zeros_is_left_out() -> None:
    found = HeadWeights().judge(head(), torch.zeros(10))
    assert "bias" not in found.evidence["standardised"]
    assert found.score == HeadWeights().judge(head(), None).score


def test_few_classes_and_equal_rows_get_no_opinion() -> None:
    for classes in (2, 3):
        model, data = awkward_model(classes=classes), small_data(classes=classes)
        found = HeadWeights(fewest_classes=4).score(model, data, generator=rng.generator(0))
        assert math.isnan(found.score)
        assert f"{classes} classes" in found.undetermined
    assert "equal" in HeadWeights().judge(torch.ones(10, 8), torch.ones(10)).undetermined
    assert HeadWeights().judge(torch.full((10, 8), math.nan), None).is_backdoored is None


def test_a_calibration_replaces_the_threshold() -> None:
    calibration = Calibration(tuple(float(i) for i in range(19)), "nineteen clean models")
    found = HeadWeights(calibration=calibration).judge(head(), None)
    assert found.threshold_source == "nineteen clean models"
    assert found.p_value == (1 + sum(clean >= found.score for clean in range(19))) / 20


def test_the_planted_target_stands_out() -> None:
    for seed in range(3):
        infected, twin = (planted_backdoor(target_class=5, infected=i, seed=seed) for i in (True, False))
        data = infected.clean_data(1, rng.generator(0))
        found = HeadWeights().score(infected.model, data, generator=rng.generator(0))
        assert (found.is_backdoored, found.target_class) == (True, 5)
        assert HeadWeights().score(twin.model, data, generator=rng.generator(0)).is_backdoored is False


def test_a_head_that_is_not_linear_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UnsupportedModelError, match="linear head"):
        HeadWeights().score(model, small_data(), generator=rng.generator(0))


def test_options_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="some of norm, mean, large, bias"):
        HeadWeights(statistics=("median",))  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="'high' or 'both'"):
        HeadWeights(side="low")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="fewest_classes must be at least 4"):
        HeadWeights(fewest_classes=3)
