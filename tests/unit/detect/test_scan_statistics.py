from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from suspect_sets import SuspectSet, pixel_set, planted_set
from unbackdoor import rng
from unbackdoor.detect import SCAn
from unbackdoor.detect.scan_statistics import (
    Decomposition,
    decompose,
    likelihood_ratio,
    shrinkage_weight,
)
from unbackdoor.errors import InvalidInputError
from unbackdoor.types import Detection


def score(detector: SCAn, given: SuspectSet) -> Tensor:
    return detector.score(
        given.model, given.samples, given.clean, labels=given.labels, generator=rng.generator(0)
    )


def judge(detector: SCAn, given: SuspectSet) -> Detection:
    return detector.judge(
        given.model, given.samples, given.clean, labels=given.labels, generator=rng.generator(0)
    )


def draw(counts: list[int]) -> tuple[Tensor, Tensor]:
    generator = rng.generator(0)
    groups = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    means = 2 * torch.randn(len(counts), 2, dtype=torch.float64, generator=generator)
    mix = torch.tensor([[1.0, 0.0], [0.6, 0.5]], dtype=torch.float64)
    noise = torch.randn(len(groups), 2, dtype=torch.float64, generator=generator) @ mix
    return means[groups] + noise, groups


def likelihood(parts: Decomposition, rows: Tensor, groups: Tensor) -> float:
    """The log-likelihood of all samples of a class together, without any trick."""
    total = 0.0
    for label in groups.unique():
        inside = rows[groups == label] - parts.mean
        size = len(inside)
        covariance = torch.kron(torch.eye(size).double(), parts.within) + torch.kron(
            torch.ones(size, size).double(), parts.between
        )
        normal = MultivariateNormal(torch.zeros(2 * size).double(), covariance)
        total += float(normal.log_prob(inside.flatten()))
    return total


def test_em_ends_at_the_closed_form_of_equal_classes() -> None:
    rows, groups = draw([5] * 8)
    found = decompose(rows, groups, shrinkage=0.0, iterations=500, tolerance=1e-9)
    means = torch.stack([rows[groups == label].mean(0) for label in range(8)])
    residuals = rows - means[groups]
    within = residuals.T @ residuals / (8 * 4)
    centred = means - rows.mean(0)
    between = centred.T @ centred / 8 - within / 5
    assert torch.allclose(found.within, within, rtol=1e-4)
    assert torch.allclose(found.between, between, rtol=1e-4)


def test_em_never_lowers_the_likelihood() -> None:
    rows, groups = draw([2, 5, 1, 9, 3])
    values = [
        likelihood(decompose(rows, groups, shrinkage=0.0, iterations=n, tolerance=0.0), rows, groups)
        for n in (1, 2, 3, 5, 10, 40)
    ]
    # What keeps S_eps invertible costs a little.
    assert all(later > earlier - 1e-6 for earlier, later in pairwise(values))
    assert values[-1] > values[0]


def test_the_statistic_is_the_distance_between_both_means_by_hand() -> None:
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0], [9.0, 9.0]], dtype=torch.float64)
    members = torch.tensor([False, False, False, True])
    # One mean: distances to it, less those to the components' means, over the samples.
    one = points.mean(0)
    own = torch.where(members.unsqueeze(1), points[3], points[:3].mean(0))
    expected = float(((points - one).square().sum(1) - (points - own).square().sum(1)).mean())
    assert likelihood_ratio(points, members, one) == pytest.approx(expected)
    # The same as n_1 n_2 / N^2 times the squared distance of the means.
    apart = float((points[3] - points[:3].mean(0)).square().sum())
    assert expected == pytest.approx(3 / 16 * apart)
    assert likelihood_ratio(points, torch.zeros(4, dtype=torch.bool), one) == pytest.approx(0.0)


def test_whitened_distances_are_those_of_mahalanobis() -> None:
    rows, groups = draw([6] * 4)
    parts = decompose(rows, groups)
    found = parts.whiten(rows)
    apart = rows[0] - rows[1]
    expected = apart @ torch.linalg.inv(parts.within) @ apart
    assert float((found[0] - found[1]).square().sum()) == pytest.approx(float(expected))


def test_shrinkage_by_hand() -> None:
    # Diagonal 3, 1: tr(S^2) 10, tr(S)^2 16; (0 * 10 + 16) / ((n + 0) * (10 - 8)).
    covariance = torch.diag(torch.tensor([3.0, 1.0]))
    assert shrinkage_weight(covariance, 100) == pytest.approx(16 / 200)
    assert shrinkage_weight(covariance, 2) == 1.0
    assert shrinkage_weight(torch.eye(3), 10) == 1.0


def test_few_clean_images_leave_an_invertible_covariance() -> None:
    rows, groups = draw([2, 2])
    wide = torch.cat([rows, rows, torch.zeros(4, 20)], dim=1)
    for shrinkage in (None, 0.0):
        parts = decompose(wide, groups, shrinkage=shrinkage)
        assert bool(torch.isfinite(parts.whiten(wide)).all())


def test_the_planted_samples_and_class_are_found() -> None:
    given = planted_set()
    assert torch.equal(score(SCAn(), given) > 0, given.poisoned)
    found = judge(SCAn(), given)
    assert (found.is_backdoored, found.target_class) == (True, 2)


@pytest.mark.parametrize("poisoned", [6, 20, 100])
def test_a_second_cloud_is_found_even_if_it_is_the_larger(poisoned: int) -> None:
    given = pixel_set(poisoned=poisoned)
    assert torch.equal(score(SCAn(), given) > 0, given.poisoned)
    assert judge(SCAn(), given).target_class == 1


def test_the_smaller_cloud_is_suspected_without_clean_images_of_the_class() -> None:
    given = pixel_set(poisoned=20)
    bare = replace(given, clean=given.clean.subset(given.clean.labels != 1))
    assert torch.equal(score(SCAn(), bare) > 0, given.poisoned)


def test_a_set_of_plain_clouds_keeps_all_samples() -> None:
    given = pixel_set(poisoned=0)
    assert float(score(SCAn(), given).max()) < 0
    assert judge(SCAn(), given).is_backdoored is False


def test_the_authors_mean_is_that_of_their_formula() -> None:
    given = pixel_set(poisoned=20)
    plain, theirs = (judge(SCAn(one_mean=kind), given) for kind in ("class", "authors"))
    rows = torch.cat([given.samples, given.clean.images]).flatten(1).double()
    groups = torch.cat([given.labels, given.clean.labels])
    known = given.clean.images.flatten(1).double()
    parts = decompose(known, given.clean.labels)
    precision = torch.linalg.inv(parts.within)
    centre = rows.mean(0)
    for label in range(6):
        inside = rows[groups == label] - centre
        size = len(inside)
        one = parts.within @ torch.linalg.inv(size * parts.between + parts.within) @ inside.sum(0)
        gap = inside.mean(0) - one
        expected = plain.evidence["class_statistics"][label] + float(gap @ precision @ gap)
        assert theirs.evidence["class_statistics"][label] == pytest.approx(expected)


def test_with_few_classes_samples_are_ranked_but_none_is_removed() -> None:
    given = pixel_set(poisoned=20, classes=2)
    scores = score(SCAn(), given)
    assert float(scores.max()) < 0
    assert replace(given, poisoned=given.poisoned[given.labels == 1]).auroc(scores[given.labels == 1]) == 1.0
    found = judge(SCAn(), given)
    assert math.isnan(found.score)
    assert "2 classes" in found.undetermined


def test_small_sets_and_constant_features_are_no_obstacle() -> None:
    given = pixel_set(poisoned=20)
    one = replace(given, samples=given.samples[:1], labels=given.labels[:1])
    assert score(SCAn(), one).tolist() == [-1.0]
    assert "0 classes" in judge(SCAn(), one).undetermined
    assert score(SCAn(fewest=1), one).shape == (1,)
    constant = replace(
        given,
        samples=torch.full_like(given.samples, 0.5),
        clean=replace(given.clean, images=torch.full_like(given.clean.images, 0.5)),
    )
    assert float(score(SCAn(), constant).max()) < 0


def test_clean_images_without_a_pair_are_refused() -> None:
    given = pixel_set(poisoned=20)
    bare = replace(given, clean=given.clean.subset(torch.arange(6)))
    with pytest.raises(InvalidInputError, match="two or more clean images of some class, got 6 of 6"):
        score(SCAn(), bare)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="shrinkage"):
        SCAn(shrinkage=1.5)
    with pytest.raises(InvalidInputError, match="restarts and iterations"):
        SCAn(restarts=0)
