from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from suspect_sets import SuspectSet, pixel_set, planted_set
from unbackdoor import rng
from unbackdoor.detect import SpectralSignatures
from unbackdoor.detect.spectral import LARGEST_RATIO, bimodality, ranks, signatures, singular_ratio
from unbackdoor.types import Detection

# Singular values sqrt(8) along the first axis and sqrt(2) along the second.
CROSS = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)


def score(detector: SpectralSignatures, given: SuspectSet) -> Tensor:
    return detector.score(
        given.model, given.samples, given.clean, labels=given.labels, generator=rng.generator(0)
    )


def judge(detector: SpectralSignatures, given: SuspectSet) -> Detection:
    return detector.judge(
        given.model, given.samples, given.clean, labels=given.labels, generator=rng.generator(0)
    )


def test_signatures_by_hand() -> None:
    moved = CROSS + torch.tensor([3.0, 7.0])
    assert signatures(moved, moved.mean(0)).tolist() == pytest.approx([0, 4, 4, 0, 0])
    # Without centring, the rows that lie farther out along the same axis score more.
    assert signatures(moved, torch.zeros(2).double()).tolist() == pytest.approx([9, 25, 1, 9, 9])


def test_statistics_of_a_class_by_hand() -> None:
    assert singular_ratio(CROSS) == pytest.approx(2.0)
    assert singular_ratio(torch.zeros(3, 2)) == 1.0
    assert singular_ratio(CROSS[:1]) == 1.0
    assert singular_ratio(CROSS[1:3]) == pytest.approx(LARGEST_RATIO)
    assert bimodality(CROSS[[1, 2, 1, 2]]) == pytest.approx(1.0)
    # Projections 0, 2, -2, 0, 0: moments 8/5, 0 and 32/5.
    assert bimodality(CROSS) == pytest.approx((8 / 5) ** 2 / (32 / 5))
    assert bimodality(torch.zeros(3, 2)) == pytest.approx(1 / 3)


def test_ranks_by_hand() -> None:
    assert ranks(torch.tensor([0.3, 9.0, 0.1, 0.5])).tolist() == pytest.approx([3 / 8, 7 / 8, 1 / 8, 5 / 8])
    assert ranks(torch.tensor([4.0])).tolist() == [0.5]


@pytest.mark.parametrize(
    "given", [planted_set(poisoned=10), pixel_set(poisoned=10)], ids=["planted", "pixels"]
)
def test_poisoned_samples_have_the_largest_signatures(given: SuspectSet) -> None:
    inside = given.labels == int(given.labels[-1])
    scores = score(SpectralSignatures(), given)
    assert float(scores[given.poisoned].min()) > float(scores[inside & ~given.poisoned].max())


def test_ranks_remove_the_same_share_of_every_class() -> None:
    given = pixel_set(poisoned=10)
    top = score(SpectralSignatures(compare="rank"), given) > 0.85
    shares = [float(top[given.labels == label].float().mean()) for label in range(6)]
    assert shares == pytest.approx([0.15] * 6, abs=0.02)
    assert bool(top[given.poisoned].all())


def test_a_clean_centre_helps_where_most_of_the_class_is_poisoned() -> None:
    given = pixel_set(poisoned=60)
    inside = replace(given, poisoned=given.poisoned[given.labels == 1])
    of_class, of_clean = (
        inside.auroc(score(SpectralSignatures(centre), given)[given.labels == 1])
        for centre in ("class", "clean")
    )
    assert of_class < 0.8
    assert of_clean > 0.999
    # Without clean images of a class, the mean of the class takes their place.
    bare = replace(given, clean=given.clean.subset(given.clean.labels != 1))
    expected = score(SpectralSignatures(), given)[given.labels == 1]
    assert torch.equal(score(SpectralSignatures("clean"), bare)[given.labels == 1], expected)


@pytest.mark.parametrize("statistic", ["singular_ratio", "bimodality"])
def test_the_class_with_a_second_cloud_speaks_for_the_model(statistic: str) -> None:
    detector = SpectralSignatures(statistic=statistic)  # type: ignore[arg-type]
    found = judge(detector, pixel_set(poisoned=20))
    assert (found.is_backdoored, found.target_class) == (True, 1)
    assert judge(detector, pixel_set(poisoned=0)).is_backdoored is False


def test_small_sets_and_constant_features_are_no_obstacle() -> None:
    given = pixel_set(poisoned=20)
    one = replace(given, samples=given.samples[:1], labels=given.labels[:1])
    assert score(SpectralSignatures(), one).tolist() == [0.0]
    found = judge(SpectralSignatures(), one)
    assert math.isnan(found.score)
    assert "0 classes" in found.undetermined
    same = replace(given, samples=torch.full_like(given.samples, 0.5))
    assert score(SpectralSignatures(), same).unique().tolist() == [0.0]
    assert judge(SpectralSignatures(), same).score == 0.0
    assert "2 classes" in judge(SpectralSignatures(), pixel_set(poisoned=5, classes=2)).undetermined
