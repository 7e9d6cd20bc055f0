"""Is one class's row of the final layer unlike the others? A baseline that runs no image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from unbackdoor.compute import check_fits
from unbackdoor.detect.calibration import Calibration, threshold_from
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.head import linear_head
from unbackdoor.inversion import anomaly_indices
from unbackdoor.types import Detection, LabelledImages, Progress, silent

RowStatistic = Literal["norm", "mean", "large", "bias"]
_STATISTICS: tuple[RowStatistic, ...] = ("norm", "mean", "large", "bias")

_SAME = 1e-9
"""Relative difference below which two statistics are equal on paper."""


@dataclass(frozen=True)
class HeadWeights:
    """Standardise a few statistics of the head's rows over the classes; the largest outlier is the score.

    Source: in the spirit of weight-statistics scanners (TrojAI entries; DFBScanner, arXiv 2605.18907, whose
    abstract tells of anomaly indicators on the final layer's parameters, the largest of which decides).
    The features that a trigger excites push the target's logit, and training leaves that in its row.

    The statistics and their combination are ours: DFBScanner's are not public in its abstract. Rows are
    centred over the classes first, since the same vector added to each changes no answer. Values are
    standardised by median and median absolute deviation; a statistic that is equal for half of the classes
    (a bias of zeros, say) is left out. The scores of large ``K`` and small ``K`` are not comparable: of
    heads of independent Gaussian weights the default threshold flags more, the fewer classes there are
    (``benchmarks/null_rates.py``).

    Args:
        statistics: Which are taken: ``norm``, l2; ``mean``; ``large``, the share of weights above
            ``large``; ``bias``.
        large: In standard deviations of all centred weights.
        side: Whether rows are suspicious on the ``high`` side alone, as a target's should be, or on ``both``.
        threshold: Used without a calibration.
        fewest_classes: Abstain with fewer classes, at least 4.
        calibration: Scores of clean models, or None.
        alpha: False-positive rate of a calibrated threshold.
    """

    name: ClassVar[str] = "head_weights"
    title: ClassVar[str] = "Outlying rows of the final layer"
    source: ClassVar[str] = "after DFBScanner, arXiv 2605.18907 (baseline of ours)"
    needs: ClassVar[str] = "one image, for its shape; a linear head"

    statistics: tuple[RowStatistic, ...] = _STATISTICS
    large: float = 1.0
    side: Literal["high", "both"] = "high"
    threshold: float = 6.0
    fewest_classes: int = 5
    calibration: Calibration | None = None
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if not self.statistics or not set(self.statistics) <= set(_STATISTICS):
            raise InvalidInputError(
                f"statistics must be some of {', '.join(_STATISTICS)}, got {self.statistics!r}."
            )
        if self.side not in ("high", "both"):
            raise InvalidInputError(f"side must be 'high' or 'both', got {self.side!r}.")
        if self.fewest_classes < 4 or not math.isfinite(self.large):
            raise InvalidInputError(
                "fewest_classes must be at least 4 and large finite, got "
                f"{self.fewest_classes} and {self.large}."
            )

    def score(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Detection:
        """Compare the rows of the head of ``model``, which is left untouched.

        Args:
            model: Takes float images in [0, 1]; its last layer is linear.
            clean: At least one image, on which the head is found; its values do not matter.
            generator: Not used.
            progress: Called once.

        Raises:
            InvalidInputError: If there are no images, or a label has no output of the model.
            UnsupportedModelError: If the last layer is not linear, or has not one row a class.
        """
        outputs = check_fits(model, clean, purpose="comparing the rows of the head")
        layer = model.get_submodule(linear_head(model, clean.images))
        assert isinstance(layer, nn.Linear)
        if len(layer.weight) != outputs:
            raise UnsupportedModelError(
                f"the head has {len(layer.weight)} rows and the model {outputs} outputs, so that rows are no "
                "classes; choose another method."
            )
        progress("rows of the head", 1, 1)
        return self.judge(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())

    def judge(self, weight: Tensor, bias: Tensor | None) -> Detection:
        """Score a head.

        Args:
            weight: float ``(K, F)``.
            bias: float ``(K,)`` or None.
        """
        threshold, source = threshold_from(self.calibration, self.alpha, fixed=self.threshold)
        found = row_statistics(weight, bias, large=self.large)
        values = {name: found[name] for name in self.statistics if name in found}
        outliers = {name: z for name, row in values.items() if (z := standardised(row)) is not None}
        problem = ""
        if len(weight) < self.fewest_classes:
            problem = (
                f"{len(weight)} classes are too few to tell an outlier; {self.fewest_classes} are needed"
            )
        elif not outliers:
            problem = "each statistic is equal for half of the classes, or not finite: nothing can stand out"
        if problem:
            return Detection(math.nan, threshold, source, undetermined=problem)
        table = torch.stack(list(outliers.values()))
        suspicion = table if self.side == "high" else table.abs()
        score, (which, target) = float(suspicion.max()), divmod(int(suspicion.argmax()), len(weight))
        return Detection(
            score=score,
            threshold=threshold,
            threshold_source=source,
            p_value=None if self.calibration is None else self.calibration.p_value(score),
            target_class=target,
            evidence={
                "decided_by": list(outliers)[which],
                "statistics": {name: row.tolist() for name, row in values.items()},
                "standardised": {name: z.tolist() for name, z in outliers.items()},
            },
        )


def row_statistics(weight: Tensor, bias: Tensor | None, *, large: float = 1.0) -> dict[str, Tensor]:
    """Return float64 ``(K,)`` for each statistic, on the CPU; see ``HeadWeights``.

    Args:
        weight: float ``(K, F)``.
        bias: float ``(K,)``, or None, which leaves ``bias`` out.
        large: In standard deviations of all centred weights.
    """
    rows = weight.double().cpu()
    rows = rows - rows.mean(0)
    found = {
        "norm": rows.norm(dim=1),
        "mean": rows.mean(1),
        "large": (rows > large * rows.std(correction=0)).double().mean(1),
    }
    return found if bias is None else {**found, "bias": bias.double().cpu()}


def standardised(values: Tensor) -> Tensor | None:
    """Return how many robust standard deviations each value lies above the median.

    Args:
        values: float64 ``(K,)``.

    Returns:
        ``(K,)``, or None if half of the values are equal or one is not finite.
    """
    deviations = (values - values.quantile(0.5)).abs()
    if not bool(values.isfinite().all()) or bool(deviations.quantile(0.5) <= _SAME * values.abs().max()):
        return None
    return -torch.tensor(anomaly_indices(values.tolist(), fewest=1), dtype=torch.float64)
