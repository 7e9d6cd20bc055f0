"""Check a data set against the model that it is for, and against what the methods need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unbackdoor.data.splits import draw_balanced
from unbackdoor.errors import InvalidInputError
from unbackdoor.types import LabelledImages

FEW_PER_CLASS = 5
"""Classes with fewer images get a warning."""

MAX_IMBALANCE = 10.0
"""Sets whose largest class has more than this many times the images of the smallest get a warning."""


@dataclass(frozen=True, eq=False)
class CleanDraw:
    """Clean images drawn for a defence.

    Args:
        data: The images.
        warnings: Sentences on what is weak about them, for the user.
    """

    data: LabelledImages
    warnings: tuple[str, ...]


def check_against_model(data: LabelledImages, num_classes: int) -> tuple[str, ...]:
    """Compare the classes of a data set with the outputs of a model.

    Args:
        data: The images.
        num_classes: Number of outputs of the model.

    Returns:
        Sentences on what is weak about the data: classes without or with few images, imbalance.

    Raises:
        InvalidInputError: If there are no images, or more classes than outputs.
    """
    if not len(data):
        raise InvalidInputError("the data has no images; give at least a few of each class.")
    if data.num_classes > num_classes:
        raise InvalidInputError(
            f"the data has {data.num_classes} classes, the model's head {num_classes} outputs; give the data "
            "that the model was trained for, or the number of classes it was trained with."
        )
    counts = torch.bincount(data.labels.cpu(), minlength=num_classes).tolist()
    return (*_absent(data, counts), *_few(data, counts), *_unbalanced(data, counts))


def clean_draw(data: LabelledImages, count: int, generator: torch.Generator) -> CleanDraw:
    """Draw clean images for a defence, as balanced over classes as possible.

    Args:
        data: The images to draw from.
        count: How many to draw; all are taken if there are fewer, with a warning.
        generator: Source of randomness, on the CPU.

    Raises:
        InvalidInputError: If ``count`` is not positive or ``data`` is empty.
    """
    drawn = draw_balanced(data, count, generator)
    if len(drawn) == count:
        return CleanDraw(drawn, ())
    return CleanDraw(drawn, (f"Only {len(drawn)} clean images exist where {count} were asked for.",))


def _absent(data: LabelledImages, counts: Sequence[int]) -> list[str]:
    absent = [label for label, count in enumerate(counts) if count == 0]
    if not absent:
        return []
    return [
        f"{len(absent)} of the model's {len(counts)} classes have no image ({_names(data, absent)}); "
        "what is found for them is unreliable."
    ]


def _few(data: LabelledImages, counts: Sequence[int]) -> list[str]:
    few = [label for label, count in enumerate(counts) if 0 < count < FEW_PER_CLASS]
    if not few:
        return []
    return [
        f"{len(few)} classes have fewer than {FEW_PER_CLASS} images ({_names(data, few)}); "
        "give more of them for reliable results."
    ]


def _unbalanced(data: LabelledImages, counts: Sequence[int]) -> list[str]:
    present = [label for label, count in enumerate(counts) if count]
    largest = max(present, key=lambda label: counts[label])
    smallest = min(present, key=lambda label: counts[label])
    if counts[largest] <= MAX_IMBALANCE * counts[smallest]:
        return []
    return [
        f"The classes are very unbalanced, from {counts[smallest]} images ({data.name_of(smallest)}) to "
        f"{counts[largest]} ({data.name_of(largest)}); draw a similar number of each."
    ]


def _names(data: LabelledImages, labels: Sequence[int], most: int = 5) -> str:
    shown = ", ".join(data.name_of(label) for label in labels[:most])
    return shown + (f" and {len(labels) - most} more" if len(labels) > most else "")
