"""SCAn: a poisoned class is better explained by two means than the other classes are.

Not to be confused with ``detect.scan``, this package's scan of a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.detect.clusters import sides, two_means
from unbackdoor.detect.training_set import (
    E_SQUARED,
    ClassVerdict,
    Suspects,
    excess_indices,
    features_of,
    gated,
    read_suspects,
)
from unbackdoor.errors import InvalidInputError
from unbackdoor.types import Detection, LabelledImages, Progress, silent

_FLOOR = 1e-6
"""Least variance in any direction, relative to the mean variance."""


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Features as a mean of their class plus a deviation, both normal: ``r = mu + eps``.

    Args:
        mean: ``(F,)``, the mean of all features.
        between: S_mu, the covariance of the class means, ``(F, F)``.
        within: S_eps, the covariance inside a class, ``(F, F)``, positive definite.
    """

    mean: Tensor
    between: Tensor
    within: Tensor

    def whiten(self, rows: Tensor) -> Tensor:
        """Return the rows less ``mean`` in coordinates in which S_eps is the identity."""
        factor = torch.linalg.cholesky(self.within)
        whitened: Tensor = torch.linalg.solve_triangular(factor, (rows - self.mean).T, upper=False)
        return whitened.T


@dataclass(frozen=True, eq=False)
class Untangled:
    """One class split in two, and how much better two means explain it than one.

    Args:
        statistic: J_t, the mean log-likelihood ratio times two.
        sides: Of the suspect samples, ``(N_t,)`` in [-1, 1], positive in the suspect component.
    """

    statistic: float
    sides: Tensor


@dataclass(frozen=True)
class SCAn:
    """Test, for each class, whether two means explain its features better than one; suspect the second.

    Source: Tang, Wang, Tang, Zhang, "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor
    Contamination Detection", USENIX Security 2021. Clean features give the covariances S_mu and S_eps by EM;
    each class of suspects and clean images is split in two under S_eps; its statistic J_t is the likelihood
    ratio of two means against one; a class is contaminated if J_t lies more than e^2 robust standard
    deviations from the median class, and its component with fewer clean images is the poisoned one.

    Deviations: (1) EM is the exact one for class means that are random; the authors' code leaves the
    uncertainty of the means out. (2) S_eps is shrunk towards a multiple of the identity, since a few
    hundred clean images leave it singular. (3) The split, with hard assignments 2-means in whitened
    coordinates, has several k-means++ starts in place of one random one. (4) The index is one-sided: a
    class that is more homogeneous than others is no suspect. (5) One mean is the mean of the class, as the
    paper's likelihood ratio has it; in the authors' code a factor is missing that would make it the
    posterior mean, and their J_t also grows with the distance between the class and the mean of all
    (``one_mean="authors"``). (6) A score a sample: on which side of the split it is and how far, less 1 in
    classes that are not contaminated (and there weighed by the index over e^2), so that positive scores are
    what the method removes.

    Verdict on the model: the score is the index of the class with the largest J_t, how far that lies above
    the median class in robust standard deviations. The threshold is uncalibrated.

    Known to fail: small classes have large J_t by chance, more than F / N_t, so sets with very uneven classes
    flag the smallest; with fewer than five classes no class is flagged.

    Args:
        threshold: Index above which a class is contaminated: e^2 in BackdoorBench, e in other code.
        shrinkage: Weight of the identity in S_eps, in [0, 1]; None takes the oracle approximating
            shrinkage of Chen, Wiesel, Eldar, Hero (IEEE TSP 2010).
        iterations: Most iterations of EM, and of each split.
        tolerance: EM ends when both covariances change by less than this, relative to their norms.
        restarts: Starts of each split.
        one_mean: ``class`` or ``authors``, see above.
        fewest: Classes with fewer samples than this are not judged.
        verdict: How a training set speaks for its model.
    """

    name: ClassVar[str] = "sc_an"
    title: ClassVar[str] = "SCAn"
    source: ClassVar[str] = "Tang et al., USENIX Security 2021"
    needs: ClassVar[str] = "the suspect training set, its labels if there are any; clean images with labels"
    version: ClassVar[int] = 2

    threshold: float = E_SQUARED
    shrinkage: float | None = None
    iterations: int = 100
    tolerance: float = 1e-5
    restarts: int = 10
    one_mean: Literal["class", "authors"] = "class"
    fewest: int = 10
    verdict: ClassVerdict = field(default_factory=lambda: ClassVerdict("index", threshold=E_SQUARED))

    def __post_init__(self) -> None:
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            raise InvalidInputError(f"shrinkage must lie in [0, 1] or be None, got {self.shrinkage}.")
        if self.restarts < 1 or self.iterations < 1:
            raise InvalidInputError(
                f"restarts and iterations must be at least 1, got {self.restarts} and {self.iterations}."
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
        """Return float32 ``(N,)`` in [-2, 1]; positive scores are what the method removes.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            samples: uint8 or float ``(N, C, H, W)`` in [0, 1]: the suspect training set.
            clean: Clean images with labels, at least two of some class; a few hundred.
            labels: int64 ``(N,)``, the labels that came with the samples; None groups by the model's answers.
            generator: Draws the starts of the splits; on the CPU.
            progress: Called once a class.

        Raises:
            InvalidInputError: If there are no samples, too few clean images, or a label has no output.
            UnsupportedModelError: If the network has no linear head.
        """
        suspects = read_suspects(model, samples, clean, labels)
        found = self._untangle(model, suspects, clean, generator=generator, progress=progress)
        indices = excess_indices([math.nan if one is None else one.statistic for one in found])
        scores = torch.full((len(samples),), -1.0, dtype=torch.float64)
        for label, (one, index) in enumerate(zip(found, indices, strict=True)):
            if one is not None:
                # Without an index, for too few classes, all are equally strong.
                strength = 1.0 if math.isnan(index) else index / self.threshold
                scores[suspects.groups == label] = gated(
                    one.sides, flagged=index > self.threshold, strength=strength
                )
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
        found = self._untangle(model, suspects, clean, generator=generator, progress=progress)
        return self.verdict.judge([math.nan if one is None else one.statistic for one in found])

    def _untangle(
        self,
        model: nn.Module,
        suspects: Suspects,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> list[Untangled | None]:
        known = features_of(model, suspects.head, clean.images)
        known_groups = clean.labels.cpu()
        parts = decompose(
            known,
            known_groups,
            shrinkage=self.shrinkage,
            iterations=self.iterations,
            tolerance=self.tolerance,
        )
        if self.one_mean == "authors":
            # There alone the origin matters; it is the mean of suspects and clean images.
            parts = Decomposition(torch.cat([suspects.features, known]).mean(0), parts.between, parts.within)
        found: list[Untangled | None] = []
        for label in range(suspects.classes):
            draws = rng.spawn(generator)
            theirs = suspects.features[suspects.groups == label]
            if len(theirs) < max(1, self.fewest):
                found.append(None)
            else:
                rows = torch.cat([theirs, known[known_groups == label]])
                found.append(self._split(parts, rows, len(theirs), draws))
            progress("untangling", label + 1, suspects.classes)
        return found

    def _split(self, parts: Decomposition, rows: Tensor, suspects: int, draws: torch.Generator) -> Untangled:
        """Split the rows of one class, of which the first ``suspects`` are not known to be clean."""
        points = parts.whiten(rows)
        members = two_means(points, generator=draws, restarts=self.restarts, iterations=self.iterations)
        one_mean = points.mean(0)
        if self.one_mean == "authors":
            one_mean = parts.whiten((parts.mean + _authors_mean(parts, rows)).unsqueeze(0))[0]
        statistic = likelihood_ratio(points, members, one_mean)
        clean_inside = int(members[suspects:].sum())
        # Of equal counts, as without clean images, the smaller component is the suspect.
        if 2 * clean_inside > len(rows) - suspects:
            members = ~members
        return Untangled(statistic, sides(points, members)[:suspects])


def decompose(
    features: Tensor,
    groups: Tensor,
    *,
    shrinkage: float | None = None,
    iterations: int = 100,
    tolerance: float = 1e-5,
) -> Decomposition:
    """Estimate S_mu and S_eps from clean features by EM.

    With n_k samples of class k, whose mean is x_k, the class mean mu_k has the posterior covariance
    ``C_k = (S_mu^-1 + n_k S_eps^-1)^-1`` and mean ``m_k = C_k n_k S_eps^-1 x_k``. Then S_mu is the mean of
    ``m_k m_k' + C_k`` over the classes, and S_eps that of ``(r - m_k)(r - m_k)' + C_k`` over the samples,
    shrunk. Inverses are taken in coordinates where S_eps is the identity and S_mu diagonal, for all classes
    at once.

    Args:
        features: float64 ``(N, F)``.
        groups: int64 ``(N,)``.
        shrinkage: Weight of the identity in S_eps; None computes it.
        iterations: Most iterations.
        tolerance: Relative change of both covariances at which to stop.

    Raises:
        InvalidInputError: If no class has two samples.
    """
    labels, places, counts = groups.unique(return_inverse=True, return_counts=True)
    if int(counts.max()) < 2:
        raise InvalidInputError(
            f"SCAn needs two or more clean images of some class, got {len(groups)} of {len(labels)} classes; "
            "give more."
        )
    mean = features.mean(0)
    rows = features - mean
    means = rows.new_zeros(len(labels), rows.shape[1]).index_add_(0, places, rows) / counts.unsqueeze(1)
    residuals = rows - means[places]
    scatter = residuals.T @ residuals
    freedom = len(rows) - len(labels)
    between = means.T @ means / len(labels)
    within = _shrunk(scatter / len(rows), shrinkage, freedom)
    for _ in range(iterations):
        factor = torch.linalg.cholesky(within)
        half = torch.linalg.solve_triangular(factor, between, upper=False)
        inner = torch.linalg.solve_triangular(factor, half.T, upper=False)
        ratios, axes = torch.linalg.eigh((inner + inner.T) / 2)
        ratios, basis = ratios.clamp_min(0), factor @ axes
        # Coordinates y with x = basis y: S_eps is the identity and S_mu diag(ratios).
        own = torch.linalg.solve(basis, means.T).T
        weights = counts.unsqueeze(1) * ratios / (counts.unsqueeze(1) * ratios + 1)
        spread = ratios / (counts.unsqueeze(1) * ratios + 1)
        posterior, gap = weights * own, (1 - weights) * own
        new_between = posterior.T @ posterior + torch.diag(spread.sum(0))
        new_between = basis @ new_between @ basis.T / len(labels)
        shift = (counts.unsqueeze(1) * gap).T @ gap + torch.diag((counts.unsqueeze(1) * spread).sum(0))
        new_within = _shrunk((scatter + basis @ shift @ basis.T) / len(rows), shrinkage, freedom)
        change = max(_change(between, new_between), _change(within, new_within))
        between, within = new_between, new_within
        if change < tolerance:
            break
    return Decomposition(mean, between, within)


def likelihood_ratio(points: Tensor, members: Tensor, one_mean: Tensor) -> float:
    """Return J_t: how much nearer the points are to the means of two components than to one mean.

    ``J = (1 / N) sum |z - one_mean|^2 - |z - mean of its component|^2``, for whitened points z.

    Args:
        points: float ``(N, F)``, whitened.
        members: bool ``(N,)``, the second component; may be empty.
        one_mean: ``(F,)``.
    """
    # Both sums of squares share those within components, which would cancel.
    total = 0.0
    for side in (members, ~members):
        if bool(side.any()):
            total += float(side.sum() * (points[side].mean(0) - one_mean).square().sum())
    return total / len(points)


def shrinkage_weight(covariance: Tensor, freedom: int) -> float:
    """Return the oracle approximating shrinkage of a sample covariance, in [0, 1].

    Source: Chen, Wiesel, Eldar, Hero, "Shrinkage Algorithms for MMSE Covariance Estimation", IEEE TSP 2010,
    Eq. 23.

    Args:
        covariance: ``(F, F)``.
        freedom: Degrees of freedom n that it was estimated with, at least 1.
    """
    size = len(covariance)
    squares, trace = float(covariance.square().sum()), float(covariance.trace())
    above = (1 - 2 / size) * squares + trace**2
    below = (freedom + 1 - 2 / size) * (squares - trace**2 / size)
    return 1.0 if below <= 0 else min(1.0, above / below)


def _shrunk(covariance: Tensor, weight: float | None, freedom: int) -> Tensor:
    size = len(covariance)
    level = float(covariance.trace()) / size
    if weight is None:
        weight = shrinkage_weight(covariance, freedom)
    # Features that never vary must not make the matrix singular.
    floor = max(_FLOOR * level, torch.finfo(covariance.dtype).tiny ** 0.5)
    shrunk: Tensor = (1 - weight) * covariance
    shrunk.diagonal().add_(weight * level + floor)
    return shrunk


def _change(old: Tensor, new: Tensor) -> float:
    return float((new - old).norm() / old.norm().clamp_min(1e-300))


def _authors_mean(parts: Decomposition, rows: Tensor) -> Tensor:
    """Return what the authors' code subtracts as the one mean of a class, less the mean of all."""
    centred = (rows - parts.mean).sum(0)
    mean: Tensor = parts.within @ torch.linalg.solve(len(rows) * parts.between + parts.within, centred)
    return mean
