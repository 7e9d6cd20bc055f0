from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binomtest

from unbackdoor.rates import Rate


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (1, 3), (437, 500), (0, 1), (9999, 10000)])
def test_the_interval_is_wilsons(k: int, n: int) -> None:
    reference = binomtest(k, n).proportion_ci(0.95, method="wilson")
    low, high = Rate(k, n).interval
    assert low == pytest.approx(reference.low, abs=1e-9)
    assert high == pytest.approx(reference.high, abs=1e-9)
    assert 0 <= low <= Rate(k, n).value <= high <= 1


def test_without_trials_nothing_is_known() -> None:
    rate = Rate.of(torch.zeros(0, dtype=torch.bool))
    assert rate == Rate(0, 0)
    assert math.isnan(rate.value)
    assert rate.interval == (0.0, 1.0)
    assert rate.describe() == {"value": None, "low": 0.0, "high": 1.0, "successes": 0, "n": 0}


def test_hits_are_counted() -> None:
    rate = Rate.of(torch.tensor([[True, False], [True, True]]))
    assert rate == Rate(3, 4)
    assert rate.value == 0.75
    assert rate.describe()["successes"] == 3
