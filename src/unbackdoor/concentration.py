"""How errors gather while a model's clean task is suppressed: in one class, or in one shift of classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from unbackdoor.suppression import Check, Suppressed

SMALLEST_CLASS_COUNT = 4
"""With images of two or three classes errors have too few places to go for their concentration to mean
anything."""


@dataclass(frozen=True, eq=False)
class Concentration:
    """How errors gather at one moment of a suppression.

    Args:
        accuracy: When they are read.
        targets: For each class t, its share of the errors on images of other classes, float64 ``(K,)``.
        shifts: For s = 1 .. K-1, the share of errors that equal the true class plus s, float64 ``(K-1,)``.
        shift_weight: Factor on ``shifts``, whose values in clean models are smaller.
    """

    accuracy: float
    targets: Tensor
    shifts: Tensor
    shift_weight: float

    @property
    def is_shift(self) -> bool:
        """Whether a shift, weighed, stands out more than any class."""
        return self.shift_weight * float(self.shifts.max()) > float(self.targets.max())

    @property
    def score(self) -> float:
        """The largest share of a class, or, weighed, of a shift."""
        return max(float(self.targets.max()), self.shift_weight * float(self.shifts.max()))


def concentration_of(suppressed: Suppressed, *, at: float = 0.5, shift_weight: float = 1.5) -> Concentration:
    """Read how the errors gathered when the accuracy had fallen to ``at`` of what it was.

    At the end of a suppression clean models collapse as well.

    Args:
        suppressed: Should not be ``unreadable``.
        at: As a fraction of the model's own clean accuracy, in (0, 1).
        shift_weight: See ``Concentration``.
    """
    wanted = at * suppressed.checks[0].accuracy
    targets = interpolate(suppressed.checks, wanted, target_concentration)
    shifts = interpolate(suppressed.checks, wanted, shift_concentration)
    return Concentration(wanted, targets, shifts, shift_weight)


def unreadable(suppressed: Suppressed, *, at: float = 0.5) -> str:
    """Say why the errors at ``at`` of the accuracy say nothing, without a full stop; nothing if they do."""
    first, last = suppressed.checks[0], suppressed.checks[-1]
    classes = int((first.confusion.sum(1) > 0).sum())
    if classes < SMALLEST_CLASS_COUNT:
        return (
            f"images of {classes} classes leave errors too few places to go; at least "
            f"{SMALLEST_CLASS_COUNT} are needed"
        )
    if last.accuracy > at * first.accuracy:
        return (
            f"suppression took the accuracy only from {first.accuracy:.2f} to {last.accuracy:.2f}, not to "
            f"{at * first.accuracy:.2f}, where the errors are read"
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
