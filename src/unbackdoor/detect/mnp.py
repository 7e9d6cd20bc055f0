"""MNP's detector: does suppression weaken the correlation of filter magnitude and saliency?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from unbackdoor.detect.calibration import Calibration, threshold_from
from unbackdoor.detect.exposure import Exposure, Statistic, expose
from unbackdoor.suppression import Suppression
from unbackdoor.types import Detection, LabelledImages, Progress, silent


@dataclass(frozen=True)
class CorrelationRatio:
    """Flag a model whose magnitude-saliency correlation drops under clean suppression.

    Source: MNP (Li, Jiang, Yi 2024, arXiv 2405.17750), sections 4.3 and A.3, Eqs. 8-13: backdoored if
    rho(theta_s) / rho(theta) <= delta. The algorithm's last line prints the opposite sign; text and Eq. 8
    agree with each other and are followed.

    Deviations: the score is 1 - ratio, so that higher is more suspicious. Where rho(theta) is too small
    for a ratio the detector abstains. A calibration on clean models replaces the paper's delta of 0.2.

    Args:
        suppression: Clean suppression, Eq. 6.
        statistic: The readings of magnitude and saliency.
        delta: The paper's threshold on the ratio; used without a calibration.
        comparison: ``ratio`` (Eq. 8) or ``difference``, rho(theta) - rho(theta_s), which needs no
            division; its threshold is then 1 - delta times rho(theta).
        smallest_correlation: Abstain if rho(theta) is below this.
        calibration: Scores of clean models, or None.
        alpha: False-positive rate of a calibrated threshold.
    """

    name: ClassVar[str] = "mnp"
    title: ClassVar[str] = "Magnitude-saliency correlation"
    source: ClassVar[str] = "MNP, arXiv 2405.17750, Eq. 8"
    needs: ClassVar[str] = "clean images with labels"

    suppression: Suppression = field(default_factory=Suppression)
    statistic: Statistic = field(default_factory=Statistic)
    delta: float = 0.2
    comparison: Literal["ratio", "difference"] = "ratio"
    smallest_correlation: float = 0.1
    calibration: Calibration | None = None
    alpha: float = 0.05

    def score(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Detection:
        """Suppress a copy of ``model`` and compare the correlations; ``model`` is left untouched."""
        return self.judge(
            expose(model, clean, self.suppression, self.statistic, generator=generator, progress=progress)
        )

    def judge(self, exposure: Exposure) -> Detection:
        """Score an exposure that was made with this detector's suppression and statistic."""
        before, after = exposure.before.correlation, exposure.after.correlation
        undetermined = ""
        if not math.isfinite(before) or not math.isfinite(after):
            undetermined = "magnitude or saliency is constant over all filters"
        elif before < self.smallest_correlation:
            undetermined = (
                f"the correlation of the model itself is only {before:.3f}, too small to see it weaken"
            )
        if self.comparison == "ratio":
            score, threshold = (1 - after / before if before else math.nan), 1 - self.delta
        else:
            score, threshold = before - after, (1 - self.delta) * before
        paper = f"the paper's delta = {self.delta:g}, uncalibrated"
        threshold, source = threshold_from(self.calibration, self.alpha, fixed=threshold, source=paper)
        return Detection(
            score=score,
            threshold=threshold,
            threshold_source=source,
            p_value=None if self.calibration is None or undetermined else self.calibration.p_value(score),
            undetermined=undetermined,
            evidence={
                "correlation": before,
                "correlation_suppressed": after,
                "ratio": after / before if before else None,
            },
        )
