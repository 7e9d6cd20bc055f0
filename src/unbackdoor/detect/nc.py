"""Neural Cleanse as a detector: does one class need a far smaller trigger than the others?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from unbackdoor.compute import check_fits
from unbackdoor.detect.calibration import Calibration, threshold_from
from unbackdoor.detect.floor import too_little
from unbackdoor.errors import InvalidInputError
from unbackdoor.forms import NORMS
from unbackdoor.inversion import Inversion, InvertedTrigger, anomaly_indices, invert_all, norms_of
from unbackdoor.suppression import confusion_of
from unbackdoor.types import Detection, LabelledImages, Progress, silent

Statistic = Literal["index", "log_index", "ratio"]

_SMALLEST_NORM = 1e-6
"""Pixels; keeps logarithm and ratio finite for a class that needs no trigger."""


@dataclass(frozen=True)
class TriggerSize:
    """Invert a trigger for each class and measure how far the smallest lies below the others.

    Source: Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks",
    IEEE S&P 2019: anomaly index ``(median - l1) / (1.4826 MAD)`` over the classes, flagged above 2 on the
    small side.

    The 2 is no 5 % test: of ten independent norms that differ by chance alone the smallest often lies beyond
    it, most of all if they are Gaussian (``benchmarks/null_rates.py``): take a calibration. ``log_index``
    flags log-normal norms as often as ``index`` Gaussian ones, whatever their spread; ``ratio`` asks for an
    effect size and ignores how much the others vary.
    Triggers that are large (blends), warp or differ from image to image are missed, and so are several
    targets at once, since they move the median.

    Deviations: a class whose trigger does not reach the asked-for success has no norm and is left out,
    instead of entering the median with a meaningless one; with MAD 0 the mean deviation takes its place.

    Args:
        inversion: How triggers are inverted.
        statistic: The score: ``index``, the paper's anomaly index of the smallest norm; ``log_index``, the
            same on the norms' logarithms; ``ratio``, the median norm divided by the smallest.
        threshold: Used without a calibration; the paper's 2 belongs to ``index``.
        fewest_classes: Abstain with fewer valid norms, at least 3.
        calibration: Scores of clean models, or None.
        alpha: False-positive rate of a calibrated threshold.
    """

    name: ClassVar[str] = "nc"
    title: ClassVar[str] = "Size of inverted triggers (Neural Cleanse)"
    source: ClassVar[str] = "Wang et al. 2019, IEEE S&P"
    needs: ClassVar[str] = "clean images with labels"

    inversion: Inversion = field(default_factory=Inversion)
    statistic: Statistic = "index"
    threshold: float = 2.0
    fewest_classes: int = 5
    calibration: Calibration | None = None
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if self.statistic not in ("index", "log_index", "ratio"):
            raise InvalidInputError(
                f"statistic must be 'index', 'log_index' or 'ratio', got {self.statistic!r}."
            )
        if self.fewest_classes < 3:
            raise InvalidInputError(f"fewest_classes must be at least 3, got {self.fewest_classes}.")

    @staticmethod
    def paper() -> TriggerSize:
        """Return the detector with the authors' inversion budget."""
        return TriggerSize(inversion=Inversion.paper())

    def score(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Detection:
        """Invert a trigger for each class of ``model``, which is left untouched, and compare their sizes.

        Args:
            model: Takes float images in [0, 1].
            clean: Clean images with labels; a few hundred.
            generator: All randomness follows it; on the CPU.
            progress: Called after each round of inversion.

        Raises:
            InvalidInputError: If there are fewer than two images, or a label has no output of the model.
            UnsupportedModelError: If the model cannot be run on the images.
        """
        check_fits(model, clean, purpose="trigger inversion", at_least=2)
        if problem := too_little(confusion_of(model, clean)):
            return Detection(math.nan, *self._threshold(), undetermined=problem)
        return self.judge(invert_all(model, clean, self.inversion, generator=generator, progress=progress))

    def judge(self, triggers: Sequence[InvertedTrigger]) -> Detection:
        """Score the triggers of all classes, inverted with this detector's options."""
        norms = norms_of(triggers)
        valid = [norm for norm in norms if not math.isnan(norm)]
        indices = anomaly_indices(norms, fewest=self.fewest_classes)
        threshold, source = self._threshold()
        evidence = {
            "triggers": [trigger.describe() for trigger in triggers],
            "anomaly_indices": [None if math.isnan(index) else index for index in indices],
        }
        if len(valid) < self.fewest_classes:
            reason = (
                f"triggers were found for {len(valid)} of {len(norms)} classes, and a median needs "
                f"{self.fewest_classes}; if classes are missing, raise inversion.steps"
            )
            return Detection(math.nan, threshold, source, undetermined=reason, evidence=evidence)
        suspect = min(triggers, key=lambda trigger: trigger.norm if trigger.reached else math.inf)
        score = smallness(valid, self.statistic)
        return Detection(
            score=score,
            threshold=threshold,
            threshold_source=source,
            p_value=None if self.calibration is None else self.calibration.p_value(score),
            target_class=suspect.target_class,
            evidence={**evidence, NORMS[suspect.form]: suspect.norm, "success": suspect.success},
        )

    def _threshold(self) -> tuple[float, str]:
        source = "a fixed value (the paper's is 2), uncalibrated"
        return threshold_from(self.calibration, self.alpha, fixed=self.threshold, source=source)


def smallness(norms: Sequence[float], statistic: Statistic = "index") -> float:
    """Return how far the smallest of some norms lies below the others.

    Args:
        norms: One a class, at least one, none NaN.
        statistic: See ``TriggerSize``.

    Returns:
        At least 0 for both indices, at least 1 for ``ratio``.
    """
    if statistic == "index":
        return max(anomaly_indices(norms, fewest=1))
    values = torch.tensor(list(norms), dtype=torch.float64).clamp_min(_SMALLEST_NORM)
    if statistic == "log_index":
        return max(anomaly_indices(values.log().tolist(), fewest=1))
    return float(values.quantile(0.5) / values.min())
