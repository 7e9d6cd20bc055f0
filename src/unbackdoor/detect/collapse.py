"""Where does a model fall when its clean task is taken away? An infected one falls into its target."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from unbackdoor.concentration import concentration_of, unreadable
from unbackdoor.detect.calibration import Calibration, threshold_from
from unbackdoor.detect.floor import too_little_at_first
from unbackdoor.suppression import Suppressed, Suppression, suppress
from unbackdoor.types import Detection, LabelledImages, Progress, silent


@dataclass(frozen=True)
class Collapse:
    """Measure how the errors of a model concentrate while its clean task is suppressed.

    Source: the class-collapse reading of unlearning in RNP (Li et al., ICML 2023, arXiv 2305.14876, backdoor
    label detection) and of MNP's clean suppression (arXiv 2405.17750, Eq. 6).

    Ours: the concentration is not read at the end, where clean models collapse too, but interpolated at
    the moment when half of the accuracy is gone; and it is taken over errors. For class t it is the share
    of t among the wrong answers on images of other classes (all-to-one backdoors); for a shift s it is the
    share of wrong answers that equal the true class plus s (all-to-all backdoors). The score is the larger
    of both, the second one weighed by ``shift_weight`` because its clean values are smaller.

    Args:
        suppression: Clean suppression, Eq. 6 of MNP.
        at: Where the trajectory is read, as a fraction of the model's own clean accuracy, in (0, 1).
        shift_weight: Factor on the concentration of shifts.
        threshold: Used without a calibration.
        calibration: Scores of clean models, or None.
        alpha: False-positive rate of a calibrated threshold.
    """

    name: ClassVar[str] = "collapse"
    title: ClassVar[str] = "Class collapse under clean suppression"
    source: ClassVar[str] = "after RNP, arXiv 2305.14876, and MNP, Eq. 6"
    needs: ClassVar[str] = "clean images with labels"

    suppression: Suppression = field(default_factory=Suppression)
    at: float = 0.5
    shift_weight: float = 1.5
    threshold: float = 0.6
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
        """Suppress a copy of ``model`` and read its errors; ``model`` is left untouched."""
        return self.judge(suppress(model, clean, self.suppression, generator=generator, progress=progress))

    def judge(self, suppressed: Suppressed) -> Detection:
        """Score a suppression run that was made with this detector's options."""
        threshold, source = threshold_from(self.calibration, self.alpha, fixed=self.threshold)
        problem = too_little_at_first(suppressed) or unreadable(suppressed, at=self.at)
        if problem:
            return Detection(math.nan, threshold, source, undetermined=problem)
        found = concentration_of(suppressed, at=self.at, shift_weight=self.shift_weight)
        shift = int(found.shifts.argmax()) + 1
        return Detection(
            score=found.score,
            threshold=threshold,
            threshold_source=source,
            p_value=None if self.calibration is None else self.calibration.p_value(found.score),
            target_class=None if found.is_shift else int(found.targets.argmax()),
            evidence={
                "read_at_accuracy": found.accuracy,
                "target_concentration": found.targets.tolist(),
                "shift_concentration": found.shifts.tolist(),
                "pattern": f"all-to-all, class + {shift}" if found.is_shift else "all-to-one",
            },
        )
