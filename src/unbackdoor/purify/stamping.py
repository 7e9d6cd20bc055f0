"""Clean images with recovered triggers on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from unbackdoor.compute import predictions_of
from unbackdoor.inversion import InvertedTrigger
from unbackdoor.types import LabelledImages, as_float


def stamped(clean: LabelledImages, triggers: Sequence[InvertedTrigger]) -> LabelledImages:
    """Return for each class the images that its triggers should not move, dealt out among these triggers.

    Args:
        clean: Clean images with labels, which stay as they are.
        triggers: At least one.
    """
    images, labels = [], []
    for target in sorted({trigger.target_class for trigger in triggers}):
        mine = [trigger for trigger in triggers if trigger.target_class == target]
        places = (clean.labels != target).nonzero().flatten()
        for index, trigger in enumerate(mine):
            part = clean.subset(places[index :: len(mine)])
            # Not rounded to 8 bits, which would wipe a faint change out.
            images.append(trigger(as_float(part.images)))
            labels.append(part.labels)
    return LabelledImages(torch.cat(images), torch.cat(labels), clean.class_names)


def joined(one: LabelledImages, other: LabelledImages) -> LabelledImages:
    """Return both sets of images, as floats."""
    images = torch.cat([as_float(one.images), as_float(other.images)])
    return LabelledImages(images, torch.cat([one.labels, other.labels]), one.class_names)


def largest_success(
    model: nn.Module, clean: LabelledImages, triggers: Sequence[InvertedTrigger]
) -> float | None:
    """Return the largest share of other classes' images that one of the triggers moves to its class.

    Args:
        model: Takes float images in [0, 1].
        clean: Clean images with labels.
        triggers: If there are none, None is returned.
    """
    rates = []
    for trigger in triggers:
        others = clean.subset(clean.labels != trigger.target_class)
        hits = predictions_of(model, trigger(as_float(others.images))) == trigger.target_class
        rates.append(float(hits.float().mean()))
    return max(rates, default=None)
