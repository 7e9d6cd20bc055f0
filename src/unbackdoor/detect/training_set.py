"""What detectors of poisoned training sets share: features by class, and a verdict on the model from them.

A training-set detector ranks samples. MNP (arXiv 2405.17750, Table 4) lists detection rates of *models* for
such methods and does not say how one follows from the other. The reading here, ours: each class gets one
statistic, and the model's score is the most suspicious one. The threshold is a fixed one of each method
unless a ``Calibration`` is given in Python, from clean models with *their* training sets; no command makes
one, so that the false-positive rate of such a verdict is not known. The number of samples that a method
removes is never the statistic: most remove a fixed share of any set, clean or not. Such a verdict needs the
suspect training set, which a scan of a downloaded model does not have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from unbackdoor.detect.calibration import Calibration, threshold_from
from unbackdoor.detect.samples import check_samples
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.head import head_features, linear_head
from unbackdoor.inversion import anomaly_indices
from unbackdoor.types import Detection, LabelledImages

FEWEST_CLASSES = 5
"""With fewer values than this a median says nothing."""

E_SQUARED = 7.3891
"""SCAn's threshold on an index, e^2, to the digits that options are shown with."""


@dataclass(frozen=True, eq=False)
class Suspects:
    """The features of a suspect training set, and the class that each sample is in.

    Args:
        features: What the linear head reads, float64 ``(N, F)`` on the CPU.
        groups: int64 ``(N,)``: the labels, or the model's answers.
        classes: Outputs K of the model.
        head: Name of the linear head.
    """

    features: Tensor
    groups: Tensor
    classes: int
    head: str


def read_suspects(
    model: nn.Module, samples: Tensor, clean: LabelledImages, labels: Tensor | None
) -> Suspects:
    """Check the inputs of a sample detector and return the samples' features by class.

    Args:
        model: Takes float images in [0, 1]; left untouched.
        samples: uint8 or float32 ``(N, C, H, W)`` in [0, 1].
        clean: Clean images with labels.
        labels: int64 ``(N,)``; None groups by the model's answers.

    Raises:
        InvalidInputError: If there are no samples, too few clean images, or labels do not fit.
        UnsupportedModelError: If the model has no linear head, or its features are not finite.
    """
    classes = check_samples(model, samples, clean, labels)
    head = linear_head(model, samples)
    features = head_features(model, head, samples)
    if labels is None:
        with torch.no_grad():
            # The head on its features gives the answers without another pass.
            labels = model.get_submodule(head)(features).argmax(1)
    return Suspects(_finite(features), labels.cpu(), classes, head)


def features_of(model: nn.Module, head: str, images: Tensor) -> Tensor:
    """Return what the linear head reads, float64 ``(N, F)`` on the CPU.

    Args:
        model: Takes float images in [0, 1]; left untouched.
        head: From ``linear_head``.
        images: uint8 or float32 ``(N, C, H, W)`` in [0, 1].

    Raises:
        UnsupportedModelError: If the features are not finite.
    """
    return _finite(head_features(model, head, images))


def gated(sides: Tensor, *, flagged: bool, strength: float) -> Tensor:
    """Return sample scores that keep a method's decision and rank all samples.

    In a flagged class they are ``sides``, elsewhere ``strength * sides - 1``. So a score is positive if and
    only if the method removes the sample; below that, samples of the more suspicious classes come first.

    Args:
        sides: ``(N,)`` in [-1, 1]; positive in the suspect cluster of this class.
        flagged: Whether the method calls the class poisoned.
        strength: How near to that it is, in [0, 1]; clipped.
    """
    return sides if flagged else min(max(strength, 0.0), 1.0) * sides - 1.0


def excess_indices(statistics: Sequence[float]) -> list[float]:
    """Return how far above the median each class's statistic lies, in robust standard deviations.

    ``(statistic - median) / (1.4826 MAD)``, negative below the median; NaN where the statistic is NaN, and
    everywhere for fewer than five classes. See ``inversion.anomaly_indices``, whose sign is the opposite.

    Args:
        statistics: One a class; NaN for classes that have none.
    """
    return [-index for index in anomaly_indices(statistics, fewest=FEWEST_CLASSES)]


@dataclass(frozen=True)
class ClassVerdict:
    """Turn one statistic a class into a statement on the model; the reading is ours.

    Args:
        score: ``largest`` is the largest statistic of a class; ``index`` is how far it lies above the median
            class in robust standard deviations, for statistics without a scale of their own.
        threshold: Used without a calibration.
        calibration: Scores of clean models with their training sets, or None.
        alpha: False-positive rate of a calibrated threshold.
    """

    score: Literal["largest", "index"]
    threshold: float
    calibration: Calibration | None = None
    alpha: float = 0.05

    def judge(self, statistics: Sequence[float]) -> Detection:
        """Return the statement on the model.

        Args:
            statistics: One a class, higher for a more suspicious class; NaN for classes that have none.

        Returns:
            The class with the largest statistic is its ``target_class``. Undetermined if no class has a
            statistic, or, for ``index``, fewer than five have.

        Raises:
            InvalidInputError: If there are no classes, or a statistic is infinite.
        """
        if not statistics or any(math.isinf(value) for value in statistics):
            raise InvalidInputError(
                f"a verdict needs one finite statistic (or NaN) a class, got {list(statistics)!r}; leave out "
                "classes with too few samples by NaN."
            )
        scores = excess_indices(statistics) if self.score == "index" else list(statistics)
        threshold, source = threshold_from(self.calibration, self.alpha, fixed=self.threshold)
        known = [label for label, value in enumerate(scores) if not math.isnan(value)]
        if not known:
            present = sum(not math.isnan(value) for value in statistics)
            needed = FEWEST_CLASSES if self.score == "index" else 1
            problem = (
                f"{present} classes have enough samples for a statistic, and at least {needed} are needed; "
                "give more of the training set"
            )
            return Detection(math.nan, threshold, source, undetermined=problem)
        target = max(known, key=lambda label: scores[label])
        return Detection(
            score=scores[target],
            threshold=threshold,
            threshold_source=source,
            p_value=None if self.calibration is None else self.calibration.p_value(scores[target]),
            target_class=target,
            evidence={
                "class_statistics": [None if math.isnan(value) else value for value in statistics],
                "class_scores": [None if math.isnan(value) else value for value in scores],
            },
        )


def _finite(features: Tensor) -> Tensor:
    if not bool(torch.isfinite(features).all()):
        raise UnsupportedModelError(
            "the model's features are not all finite for these samples; check its weights and the images."
        )
    return features.double().cpu()
