"""Spectral signatures: poisoned samples stand out along the direction in which their class varies most."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from unbackdoor.detect.clusters import is_constant
from unbackdoor.detect.training_set import E_SQUARED, ClassVerdict, Suspects, features_of, read_suspects
from unbackdoor.types import Detection, LabelledImages, Progress, silent

LARGEST_RATIO = 1e6
"""Where a class varies along one direction only."""


@dataclass(frozen=True)
class SpectralSignatures:
    """Score a sample by its squared projection on the leading singular vector of its class's features.

    Source: Tran, Li, Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018, arXiv 1811.00636,
    Algorithm 1. MNP (arXiv 2405.17750) calls it SC, others SS.

    Deviations: none in the score by default. The share that is removed is left to the user, since the paper's
    1.5 times the poison rate needs the poison rate; public code removes 15 % of each class, half of it, or
    1.5 times the true rate.

    Verdict on the model, which the method does not have (ours): ``statistic`` says how two-fold a class is;
    the score is how far the most two-fold one lies above the median class, in robust standard deviations.
    The threshold, that of SCAn, is uncalibrated.

    Known to fail: where about half of a class is poisoned its mean lies between both kinds, which then
    score alike.

    Args:
        centre: What is subtracted before the projection; the vector is always that of the rows less their
            mean. ``class``: the mean of the class, as in the paper. ``origin``: nothing, as in the authors'
            code and others'. ``clean``: the mean of the class's clean images (ours), or of the class
            where there are none.
        compare: ``raw`` are squared projections, as in the paper; ``rank`` their ranks within the class in
            (0, 1), so that the samples above 0.85 are the top 15 % of every class.
        statistic: What a class contributes to the verdict: ``singular_ratio`` is the largest singular
            value over the second; ``bimodality`` is Sarle's coefficient of the projections.
        fewest: Classes with fewer samples than this contribute nothing.
        verdict: How a training set speaks for its model.
    """

    name: ClassVar[str] = "sc"
    title: ClassVar[str] = "Spectral signatures"
    source: ClassVar[str] = "Tran, Li and Madry, NeurIPS 2018, arXiv 1811.00636"
    needs: ClassVar[str] = "the suspect training set; its labels if there are any"
    version: ClassVar[int] = 2
    ranks_only: ClassVar[bool] = True

    centre: Literal["class", "origin", "clean"] = "class"
    compare: Literal["raw", "rank"] = "raw"
    statistic: Literal["singular_ratio", "bimodality"] = "singular_ratio"
    fewest: int = 10
    verdict: ClassVerdict = field(default_factory=lambda: ClassVerdict("index", threshold=E_SQUARED))

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
        """Return float32 ``(N,)``, at least 0, higher for more suspicious samples; see ``SampleDetector``.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            samples: uint8 or float ``(N, C, H, W)`` in [0, 1]: the suspect training set.
            clean: Used by ``centre="clean"`` alone.
            labels: int64 ``(N,)``, the labels that came with the samples; None groups by the model's answers.
            generator: Not used: nothing is random.
            progress: Called once a class.

        Raises:
            InvalidInputError: If there are no samples, too few clean images, or a label has no output.
            UnsupportedModelError: If the network has no linear head.
        """
        suspects = read_suspects(model, samples, clean, labels)
        known = features_of(model, suspects.head, clean.images) if self.centre == "clean" else None
        scores = torch.zeros(len(samples), dtype=torch.float64)
        for label in suspects.groups.unique().tolist():
            inside = suspects.groups == label
            rows = suspects.features[inside]
            centre = rows.mean(0)
            if self.centre == "origin":
                centre = torch.zeros_like(centre)
            elif known is not None and bool((clean.labels == label).any()):
                centre = known[(clean.labels == label).cpu()].mean(0)
            values = signatures(rows, centre)
            scores[inside] = ranks(values) if self.compare == "rank" else values
            progress("spectral signatures", label + 1, suspects.classes)
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
        progress("spectral signatures", suspects.classes, suspects.classes)
        return self.verdict.judge(self.statistics(suspects))

    def statistics(self, suspects: Suspects) -> list[float]:
        """Return the statistic of each class; NaN for classes with fewer than ``fewest`` samples."""
        compute = singular_ratio if self.statistic == "singular_ratio" else bimodality
        groups = [suspects.features[suspects.groups == label] for label in range(suspects.classes)]
        return [math.nan if len(rows) < max(1, self.fewest) else compute(rows) for rows in groups]


def signatures(rows: Tensor, centre: Tensor) -> Tensor:
    """Return the squared projections of ``rows - centre`` on their leading singular vector, ``(N,)``.

    Args:
        rows: float ``(N, F)``, at least one: the features of a class.
        centre: ``(F,)``. The vector is that of the rows less their mean, whatever this is.
    """
    return ((rows - centre) @ _leading(rows)).square()


def ranks(values: Tensor) -> Tensor:
    """Return the rank of each value less one half, over their number: ``(N,)`` in (0, 1)."""
    order = values.argsort(stable=True)
    places = torch.empty_like(values)
    places[order] = torch.arange(len(values), dtype=values.dtype) + 0.5
    return places / len(values)


def singular_ratio(rows: Tensor) -> float:
    """Return the largest over the second singular value of the rows less their mean.

    Args:
        rows: float ``(N, F)``.

    Returns:
        In [1, 1e6]; 1 where nothing varies.
    """
    values = torch.linalg.svdvals(rows - rows.mean(0))
    if is_constant(rows):
        return 1.0
    second = float(values[1]) if len(values) > 1 else 0.0
    return float(values[0]) / max(second, float(values[0]) / LARGEST_RATIO)


def bimodality(rows: Tensor) -> float:
    """Return Sarle's bimodality coefficient of the projections on the leading singular vector.

    ``(skewness^2 + 1) / kurtosis``, of population moments: 1 for two points, 5/9 for a uniform and 1/3 for a
    normal distribution.

    Args:
        rows: float ``(N, F)``.

    Returns:
        In (0, 1]; 1/3 where nothing varies.
    """
    if is_constant(rows):
        return 1 / 3
    projections = (rows - rows.mean(0)) @ _leading(rows)
    second, third, fourth = (float(projections.pow(power).mean()) for power in (2, 3, 4))
    return (third**2 / second**3 + 1) * second**2 / fourth


def _leading(rows: Tensor) -> Tensor:
    """Return the leading right singular vector of the rows less their mean, ``(F,)``; zeros if constant."""
    if is_constant(rows):
        return torch.zeros_like(rows[0])
    leading: Tensor = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[0]
    return leading
