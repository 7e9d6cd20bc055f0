"""When there is too little to read a model's behaviour from: few images, or a model that guesses."""

from __future__ import annotations

from torch import Tensor

from unbackdoor.suppression import Suppressed

FEWEST_IMAGES = 8
"""On fewer images errors and triggers are accidents."""


def mean_recall(confusion: Tensor) -> float:
    """Return the accuracy with each class that there are images of weighing the same; NaN without images.

    A model that always answers with the most frequent class has a high accuracy, and the recall of chance.

    Args:
        confusion: Counts ``(K, K)``, rows true class and columns prediction.
    """
    counts = confusion.sum(1)
    present = counts > 0
    return float((confusion.diagonal()[present].double() / counts[present]).mean())


def too_little(confusion: Tensor) -> str:
    """Say why nothing can be read from a model that answers like this before anything is done to it.

    Args:
        confusion: Counts ``(K, K)``, rows true class and columns prediction.

    Returns:
        A sentence without a full stop, or nothing if there is enough.
    """
    images, present = int(confusion.sum()), int((confusion.sum(1) > 0).sum())
    if images < FEWEST_IMAGES:
        return f"{images} images are too few to read a model from; give at least {FEWEST_IMAGES}"
    if not mean_recall(confusion) > 1 / present:
        return (
            f"the model is no better than chance on images of {present} classes (mean recall "
            f"{mean_recall(confusion):.1%}), so that there is nothing to read from it"
        )
    return ""


def too_little_at_first(suppressed: Suppressed) -> str:
    """Say the same of the model that a suppression run began with."""
    return too_little(suppressed.checks[0].confusion)
