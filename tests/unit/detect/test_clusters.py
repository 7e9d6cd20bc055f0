from __future__ import annotations

import pytest
import torch

from unbackdoor import rng
from unbackdoor.detect.clusters import is_constant, sides, silhouette, two_means


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def test_the_smaller_of_two_clusters_is_marked() -> None:
    points = column(0.0, 5.0, 0.1, 5.1, 0.2)
    assert two_means(points, generator=rng.generator(0)).tolist() == [False, True, False, True, False]


def test_of_two_equal_clusters_the_one_without_the_first_point_is_marked() -> None:
    for seed in range(5):
        members = two_means(column(0.0, 0.1, 5.0, 5.1), generator=rng.generator(seed))
        assert members.tolist() == [False, False, True, True]


def test_the_best_of_all_splits_is_found() -> None:
    points = torch.rand(10, 2, dtype=torch.float64, generator=rng.generator(1))

    def within(members: torch.Tensor) -> float:
        parts = (points[side] for side in (members, ~members))
        return float(sum((part - part.mean(0)).square().sum() for part in parts))

    every = [torch.tensor([bool(code >> i & 1) for i in range(10)]) for code in range(1, 512)]
    found = two_means(points, generator=rng.generator(0), restarts=30)
    assert within(found) == pytest.approx(min(within(split) for split in every))


@pytest.mark.parametrize("points", [column(3.0), column(3.0, 3.0, 3.0), torch.zeros(4, 2), torch.zeros(0, 2)])
def test_points_that_cannot_be_split_are_not(points: torch.Tensor) -> None:
    assert not two_means(points, generator=rng.generator(0)).any()
    assert is_constant(points)


def test_rounding_is_no_difference() -> None:
    assert is_constant(column(1.0, 1.0 + 1e-7))
    assert not is_constant(column(1.0, 1.0 + 1e-5))


def test_two_points_are_split() -> None:
    assert two_means(column(1.0, 2.0), generator=rng.generator(0)).tolist() == [False, True]


def test_sides_by_hand() -> None:
    # Centres 1 and 10: from 0 they are 1 and 10 away, from 2 they are 1 and 8 away.
    found = sides(column(0.0, 2.0, 10.0), torch.tensor([False, False, True]))
    assert found.tolist() == pytest.approx([-9 / 10, -7 / 8, 1.0])
    assert sides(column(0.0, 1.0), torch.tensor([False, False])).tolist() == [0.0, 0.0]


def test_silhouette_by_hand_and_as_scikit_learn_has_it() -> None:
    # 0: a 1, b 10; 1: a 1, b 9; 10 is alone.
    found = silhouette(column(0.0, 1.0, 10.0), torch.tensor([False, False, True]))
    assert found == pytest.approx((9 / 10 + 8 / 9) / 3)
    assert silhouette(column(0.0, 1.0), torch.tensor([True, True])) == 0.0
    metrics = pytest.importorskip("sklearn.metrics", exc_type=ImportError)
    points = torch.randn(1500, 3, dtype=torch.float64, generator=rng.generator(0))
    members = points[:, 0] > 0.8
    expected = metrics.silhouette_score(points.numpy(), members.numpy())
    assert silhouette(points, members) == pytest.approx(expected, abs=1e-9)
