from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from suspect_sets import SuspectSet, pixel_set, planted_set
from unbackdoor import rng
from unbackdoor.detect import ActivationClustering
from unbackdoor.detect.ac import (
    ClassClusters,
    class_medians,
    class_statistic,
    principal_components,
    strays,
)
from unbackdoor.detect.training_set import Suspects
from unbackdoor.errors import InvalidInputError
from unbackdoor.types import Detection


def score(detector: ActivationClustering, given: SuspectSet) -> Tensor:
    return detector.score(
        given.model, given.samples, given.clean, labels=given.labels, generator=rng.generator(0)
    )


def judge(detector: ActivationClustering, given: SuspectSet) -> Detection:
    return detector.judge(
        given.model, given.samples, given.clean, labels=given.labels, generator=rng.generator(0)
    )


def test_the_planted_samples_and_class_are_found() -> None:
    given = planted_set()
    scores = score(ActivationClustering(), given)
    assert torch.equal(scores[given.labels == 2] > 0, given.poisoned[given.labels == 2])
    found = judge(ActivationClustering(), given)
    assert (found.is_backdoored, found.target_class) == (True, 2)


def test_every_rule_finds_a_cloud_beside_a_class_and_most_leave_the_others_alone() -> None:
    given = pixel_set(poisoned=20)
    for rule in ("silhouette", "relative_size", "smaller"):
        removed = score(ActivationClustering(rule), given) > 0
        assert bool(removed[given.poisoned].all())
        assert not removed[(given.labels == 1) & ~given.poisoned].any()
    # The literal reading of "smaller" removes a part of every class.
    removed = score(ActivationClustering("smaller"), given) > 0
    assert all(bool(removed[given.labels == label].any()) for label in range(6))
    assert score(ActivationClustering(), given).max() == score(ActivationClustering(), given)[-20:].max()


def test_a_set_of_plain_clouds_keeps_all_samples() -> None:
    given = pixel_set(poisoned=0)
    assert float(score(ActivationClustering(silhouette=0.3), given).max()) < 0
    strict = ActivationClustering()
    verdict = replace(strict.verdict, threshold=0.3)
    assert judge(replace(strict, verdict=verdict), given).is_backdoored is False


def test_the_larger_cluster_is_the_suspect_where_most_are_triggered() -> None:
    given = pixel_set(poisoned=200)
    removed = score(ActivationClustering("larger"), given) > 0
    assert bool(removed[given.poisoned].all())
    assert not removed[(given.labels == 1) & ~given.poisoned].any()
    # The rule of the paper takes the clean part away instead.
    removed = score(ActivationClustering(), given) > 0
    assert not removed[given.poisoned].any()


def test_the_distance_rule_takes_the_cluster_that_belongs_elsewhere() -> None:
    given = pixel_set(poisoned=0)
    # 20 samples of class 4 with the label 1.
    moved = torch.nonzero(given.labels == 4).squeeze(1)[:20]
    labels = given.labels.clone()
    labels[moved] = 1
    removed = score(ActivationClustering("distance"), replace(given, labels=labels)) > 0
    assert torch.equal(torch.nonzero(removed).squeeze(1), moved)


def test_strays_by_hand() -> None:
    features = torch.tensor([[0.0], [0.0], [0.0], [8.0], [10.0], [10.0]], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 2, 2])
    medians = class_medians(Suspects(features, groups, 3, "head"))
    assert medians[:, 0].nan_to_num(-1.0).tolist() == [0.0, -1.0, 10.0]
    assert strays(features[3:4], 0, medians)
    assert not strays(features[:3], 0, medians)
    assert not strays(features[:4], 0, medians[:1])
    # An even number of samples has the mean of the middle two.
    assert float(class_medians(Suspects(features[2:4], groups[2:4], 1, "head"))) == 4.0


def test_the_statistic_is_the_silhouette_of_small_clusters() -> None:
    def clusters(share: float) -> ClassClusters:
        return ClassClusters(torch.zeros(1, dtype=torch.bool), torch.zeros(1), share, silhouette=0.4)

    assert class_statistic(clusters(0.34)) == 0.4
    assert class_statistic(clusters(0.35)) == 0.0
    assert class_statistic(clusters(0.4), size=0.5) == 0.4


def test_principal_components_keep_distances_or_whiten_them() -> None:
    rows = torch.randn(40, 5, dtype=torch.float64, generator=rng.generator(0)) * torch.arange(1.0, 6.0)
    assert torch.allclose(torch.pdist(principal_components(rows, 5)), torch.pdist(rows))
    assert principal_components(rows, 2).shape == (40, 2)
    assert torch.allclose(principal_components(rows, 3, whiten=True).var(0), torch.ones(3).double())
    flat = torch.cat([rows[:, :1], rows[:, :1]], dim=1)
    assert bool((principal_components(flat, 2, whiten=True)[:, 1] == 0).all())


def test_two_means_cannot_tell_whitened_components_from_independent_ones() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition", exc_type=ImportError)
    rows = torch.rand(300, 4, dtype=torch.float64, generator=rng.generator(0))
    rows = rows @ torch.randn(4, 4, dtype=torch.float64, generator=rng.generator(1))
    ica: Any = decomposition.FastICA(3, whiten="unit-variance", random_state=0, max_iter=2000)
    independent = torch.from_numpy(ica.fit_transform(rows.numpy()))
    ratio = torch.pdist(principal_components(rows, 3, whiten=True)) / torch.pdist(independent)
    assert torch.allclose(ratio, ratio.mean(), rtol=1e-4)


def test_classes_with_few_or_constant_samples_are_not_judged() -> None:
    given = pixel_set(poisoned=20)
    few = torch.tensor([0, 1, -1])
    part = replace(given, samples=given.samples[few], labels=given.labels[few])
    assert score(ActivationClustering(), part).tolist() == [-1.0, -1.0, -1.0]
    assert "0 classes" in judge(ActivationClustering(), part).undetermined
    same = replace(given, samples=torch.full_like(given.samples, 0.5))
    assert score(ActivationClustering("smaller"), same).unique().tolist() == [-1.0]
    assert judge(ActivationClustering(), same).score == 0.0
    one = replace(given, samples=given.samples[:1], labels=given.labels[:1])
    assert score(ActivationClustering(fewest=1), one).tolist() == [-1.0]


def test_two_classes_are_enough() -> None:
    given = pixel_set(poisoned=20, classes=2)
    assert judge(ActivationClustering(), given).target_class == 1


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="dimensions and restarts"):
        ActivationClustering(restarts=0)
