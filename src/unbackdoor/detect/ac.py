"""Activation clustering: the samples of a poisoned class fall into two clusters, the smaller one poisoned."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.detect.clusters import sides, silhouette, two_means
from unbackdoor.detect.training_set import ClassVerdict, Suspects, gated, read_suspects
from unbackdoor.errors import InvalidInputError
from unbackdoor.types import Detection, LabelledImages, Progress, silent

_FEWEST_TO_SPLIT = 2


@dataclass(frozen=True, eq=False)
class ClassClusters:
    """The two clusters of one class.

    Args:
        members: bool ``(N_t,)``, True in the smaller cluster; all False where the class cannot be split.
        sides: ``(N_t,)`` in [-1, 1], positive nearer to the centre of the smaller cluster.
        share: Size of the smaller cluster as a share of the class, in [0, 0.5].
        silhouette: Mean silhouette of the clusters, in [-1, 1].
    """

    members: Tensor
    sides: Tensor
    share: float
    silhouette: float


@dataclass(frozen=True)
class ActivationClustering:
    """Split the features of each class into two clusters and suspect one of them by a rule.

    Source: Chen, Carvalho, Baracaldo, Ludwig, Edwards, Lee, Molloy, Srivastava, "Detecting Backdoor Attacks
    on Deep Neural Networks by Activation Clustering", SafeAI at AAAI 2019, arXiv 1811.03728.

    Deviations: PCA where the paper has ICA (``whiten`` makes up for it: FastICA is a rotation of the whitened
    principal components, and 2-means does not see rotations). A score a sample instead of a flag: how much
    nearer it is to the suspect cluster's centre than to the other, less 1 in classes that the rule does not
    call poisoned (and there weighed by the silhouette), so that positive scores are what the rule removes.
    Public code disagrees on the rule, hence the option; the paper's exclusionary reclassification, which
    trains a new network for each class, is left out.

    Verdict on the model (ours): the statistic of a class is its silhouette if the share of its smaller
    cluster is below ``size``, else 0. The largest of a class is the score; its threshold is uncalibrated.

    Known to fail: clean classes of two kinds of images are flagged; where poisoned samples outnumber the
    clean ones of the class, the clean ones are; below some per cent of the class there is no second cluster.

    Args:
        rule: ``silhouette``: the smaller cluster, if its share is below ``size`` and the silhouette above
            ``silhouette``. ``relative_size``: the same without the silhouette. ``smaller``: always the
            smaller cluster, so every class has suspects. ``larger``: the larger cluster if the share of the
            smaller is below ``size``, for queries grouped by the model's answers, most of a class
            triggered. ``distance``: the cluster whose median is nearer to another class's median than to
            that of its own class, if the other cluster's is not.
        dimensions: Principal components that are clustered.
        whiten: Scale them to unit variance first.
        size: Largest share of a suspect cluster, in (0, 0.5].
        silhouette: Silhouette above which two clusters are believed.
        restarts: Starts of 2-means for each class.
        iterations: Most iterations of each.
        fewest: Classes with fewer samples than this are not judged.
        verdict: How a training set speaks for its model.
    """

    name: ClassVar[str] = "ac"
    title: ClassVar[str] = "Activation clustering"
    source: ClassVar[str] = "Chen et al., SafeAI 2019, arXiv 1811.03728"
    needs: ClassVar[str] = "the suspect training set; its labels if there are any; no use of the clean images"
    version: ClassVar[int] = 2

    rule: Literal["silhouette", "relative_size", "smaller", "larger", "distance"] = "silhouette"
    dimensions: int = 10
    whiten: bool = False
    size: float = 0.35
    silhouette: float = 0.1
    restarts: int = 10
    iterations: int = 100
    fewest: int = 10
    verdict: ClassVerdict = field(default_factory=lambda: ClassVerdict("largest", threshold=0.1))

    def __post_init__(self) -> None:
        if self.dimensions < 1 or self.restarts < 1:
            raise InvalidInputError(
                f"dimensions and restarts must be at least 1, got {self.dimensions} and {self.restarts}."
            )

    def score(
        self,
        model: nn.Module,
        samples: Tensor,
        clean: LabelledImages,
        *,
        labels: Tensor | None = None,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Tensor:
        """Return float32 ``(N,)`` in [-2, 1]; positive scores are what the rule removes.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            samples: uint8 or float ``(N, C, H, W)`` in [0, 1]: the suspect training set.
            clean: Not used.
            labels: int64 ``(N,)``, the labels that came with the samples; None groups by the model's answers.
            generator: Draws the starts of 2-means; on the CPU.
            progress: Called once a class.

        Raises:
            InvalidInputError: If there are no samples, too few clean images, or a label has no output.
            UnsupportedModelError: If the network has no linear head.
        """
        suspects = read_suspects(model, samples, clean, labels)
        clusters = self.clusters(suspects, generator=generator, progress=progress)
        medians = class_medians(suspects) if self.rule == "distance" else None
        scores = torch.full((len(samples),), -1.0, dtype=torch.float64)
        for label, found in enumerate(clusters):
            if found is None:
                continue
            inside = suspects.groups == label
            flagged, smaller = self._decide(found, suspects.features[inside], label, medians)
            signed = found.sides if smaller else -found.sides
            scores[inside] = gated(signed, flagged=flagged, strength=found.silhouette)
        return scores.float()

    def judge(
        self,
        model: nn.Module,
        samples: Tensor,
        clean: LabelledImages,
        *,
        labels: Tensor | None = None,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Detection:
        """Return what the training set says of its model; arguments and errors are those of ``score``."""
        suspects = read_suspects(model, samples, clean, labels)
        clusters = self.clusters(suspects, generator=generator, progress=progress)
        return self.verdict.judge(
            [math.nan if found is None else class_statistic(found, self.size) for found in clusters]
        )

    def clusters(
        self, suspects: Suspects, *, generator: torch.Generator, progress: Progress = silent
    ) -> list[ClassClusters | None]:
        """Return the clusters of each class; None for classes with fewer than ``fewest`` samples.

        Args:
            suspects: Features by class.
            generator: Draws the starts of 2-means; on the CPU.
            progress: Called once a class.
        """
        found: list[ClassClusters | None] = []
        for label in range(suspects.classes):
            draws = rng.spawn(generator)
            rows = suspects.features[suspects.groups == label]
            if len(rows) < max(self.fewest, _FEWEST_TO_SPLIT):
                found.append(None)
            else:
                points = principal_components(rows, self.dimensions, whiten=self.whiten)
                members = two_means(
                    points, generator=draws, restarts=self.restarts, iterations=self.iterations
                )
                found.append(
                    ClassClusters(
                        members,
                        sides(points, members),
                        float(members.double().mean()),
                        silhouette(points, members),
                    )
                )
            progress("clustering", label + 1, suspects.classes)
        return found

    def _decide(
        self, found: ClassClusters, features: Tensor, label: int, medians: Tensor | None
    ) -> tuple[bool, bool]:
        """Return whether the rule flags the class, and whether the smaller cluster is the suspect one."""
        if found.share == 0:
            return False, True
        if medians is not None:
            small, large = (strays(features[m], label, medians) for m in (found.members, ~found.members))
            return small != large, small or not large
        flagged = self.rule == "smaller" or found.share < self.size
        if self.rule == "silhouette":
            flagged = flagged and found.silhouette > self.silhouette
        return flagged, self.rule != "larger"


def principal_components(rows: Tensor, dimensions: int, *, whiten: bool = False) -> Tensor:
    """Return the scores of the leading principal components, ``(N, min(dimensions, N, F))``.

    Args:
        rows: float ``(N, F)``.
        dimensions: How many components.
        whiten: Scale each to unit variance; components without variance stay 0.
    """
    left, values, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    scales = values[:dimensions]
    if whiten:
        varies = scales > 1e-9 * scales[:1].clamp_min(1e-300)
        scales = varies * max(1, len(rows) - 1) ** 0.5
    components: Tensor = left[:, :dimensions] * scales
    return components


def class_statistic(clusters: ClassClusters, size: float = 0.35) -> float:
    """Return the silhouette of a class whose smaller cluster has a share below ``size``, else 0.

    Args:
        clusters: Of one class.
        size: Largest share of a suspect cluster.
    """
    return clusters.silhouette if clusters.share < size else 0.0


def class_medians(suspects: Suspects) -> Tensor:
    """Return the median of each feature over each class, ``(K, F)``; NaN for classes without samples."""
    medians = suspects.features.new_full((suspects.classes, suspects.features.shape[1]), math.nan)
    for label in suspects.groups.unique().tolist():
        medians[label] = _median(suspects.features[suspects.groups == label])
    return medians


def strays(features: Tensor, label: int, medians: Tensor) -> bool:
    """Say whether the median of some samples is nearer to another class's median than to that of ``label``.

    Args:
        features: float ``(N, F)``, at least one row: a cluster.
        label: The class that it belongs to.
        medians: From ``class_medians``.
    """
    distances = torch.linalg.vector_norm(medians - _median(features), dim=1)
    others = distances.clone()
    others[label] = math.nan
    others = others[~others.isnan()]
    return bool(len(others)) and bool(others.min() < distances[label])


def _median(rows: Tensor) -> Tensor:
    # torch.quantile refuses more than 2^24 elements.
    ordered = rows.sort(dim=0).values
    return (ordered[(len(rows) - 1) // 2] + ordered[len(rows) // 2]) / 2
