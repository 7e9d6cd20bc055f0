"""Where does a model fall when its clean task is taken away? An infected one falls into its target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from unbackdoor.detect.calibration import Calibration, threshold_from
from unbackdoor.detect.floor import too_little_at_first
from unbackdoor.suppression import Check, Suppressed, Suppression, suppress
from unbackdoor.types import Detection, LabelledImages, Progress, silent

SMALLEST_CLASS_COUNT = 4
"""With images of two or three classes errors have too few places to go for their concentration to mean
anything."""


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
        checks = suppressed.checks
        wanted = self.at * checks[0].accuracy
        threshold, source = threshold_from(self.calibration, self.alpha, fixed=self.threshold)
        problem = _problem(suppressed, wanted)
        if problem:
            return Detection(math.nan, threshold, source, undetermined=problem)
        targets = interpolate(checks, wanted, target_concentration)
        shifts = interpolate(checks, wanted, shift_concentration)
        by_target, by_shift = float(targets.max()), self.shift_weight * float(shifts.max())
        score = max(by_target, by_shift)
        is_shift = by_shift > by_target
        return Detection(
            score=score,
            threshold=threshold,
            threshold_source=source,
            p_value=None if self.calibration is None else self.calibration.p_value(score),
            target_class=None if is_shift else int(targets.argmax()),
            evidence={
                "read_at_accuracy": wanted,
                "target_concentration": targets.tolist(),
                "shift_concentration": shifts.tolist(),
                "pattern": f"all-to-all, class + {int(shifts.argmax()) + 1}" if is_shift else "all-to-one",
            },
        )


def _problem(suppressed: Suppressed, wanted: float) -> str:
    """Say why a run cannot be read at the accuracy ``wanted``; nothing if it can."""
    first, last = suppressed.checks[0], suppressed.checks[-1]
    if problem := too_little_at_first(suppressed):
        return problem
    classes = int((first.confusion.sum(1) > 0).sum())
    if classes < SMALLEST_CLASS_COUNT:
        return (
            f"images of {classes} classes leave errors too few places to go; at least "
            f"{SMALLEST_CLASS_COUNT} are needed"
        )
    if last.accuracy > wanted:
        return (
            f"suppression took the accuracy only from {first.accuracy:.2f} to {last.accuracy:.2f}, not to "
            f"{wanted:.2f}, where the errors are read"
        )
    return ""


def target_concentration(confusion: Tensor) -> Tensor:
    """Return, for each class t, the share of t among the errors on images of other classes, ``(K,)``."""
    errors = confusion.double().clone()
    errors.fill_diagonal_(0)
    # Row sums are the errors per true class; those of class t itself cannot go to t.
    possible = errors.sum() - errors.sum(1)
    return errors.sum(0) / possible.clamp_min(1)


def shift_concentration(confusion: Tensor) -> Tensor:
    """Return, for s = 1 .. K-1, the share of errors that equal the true class plus s, ``(K-1,)``."""
    classes = len(confusion)
    rows = torch.arange(classes)
    errors = (confusion.sum() - confusion.diagonal().sum()).double()
    counts = [confusion[rows, (rows + shift) % classes].sum() for shift in range(1, classes)]
    return torch.stack(counts).double() / errors.clamp_min(1)


def interpolate(checks: Sequence[Check], accuracy: float, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``statistic`` of the confusion matrix at the moment when the accuracy crossed ``accuracy``.

    Confusion matrices, not statistics, are interpolated: both ends may hold few errors.
    """
    for earlier, later in pairwise(checks):
        if later.accuracy <= accuracy < earlier.accuracy:
            weight = (earlier.accuracy - accuracy) / (earlier.accuracy - later.accuracy)
            return statistic((1 - weight) * earlier.confusion.double() + weight * later.confusion.double())
    return statistic(checks[-1].confusion.double())
