"""Training sets with a known poisoned part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.testing import planted_backdoor
from unbackdoor.types import LabelledImages, as_float


@dataclass(frozen=True, eq=False)
class SuspectSet:
    """A model, the set that it could have been trained on, and the truth about it."""

    model: nn.Module
    samples: Tensor
    labels: Tensor
    clean: LabelledImages
    poisoned: Tensor

    def auroc(self, scores: Tensor) -> float:
        wins = scores[self.poisoned].unsqueeze(1) - scores[~self.poisoned]
        return float((wins > 0).float().mean() + (wins == 0).float().mean() / 2)


def planted_set(*, poisoned: int = 20, target_class: int = 2) -> SuspectSet:
    """Return the planted network with 50 clean samples a class and some with the trigger."""
    planted = planted_backdoor(target_class=target_class)
    data, clean = (planted.clean_data(n, rng.generator(n)) for n in (400, 160))
    stamped = planted.clean_data(500, rng.generator(2))
    stamped = stamped.subset(stamped.labels != target_class).subset(torch.arange(poisoned))
    return SuspectSet(
        planted.model,
        torch.cat([data.floats(), planted.trigger(as_float(stamped.images))]),
        torch.cat([data.labels, torch.full((poisoned,), target_class)]),
        clean,
        torch.arange(400 + poisoned) >= 400,
    )


def pixel_model(features: int, classes: int) -> nn.Module:
    """Return a network whose features are the pixels; it answers with the brightest of the first ones."""
    head = nn.Linear(features, classes, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(classes, features))
    return nn.Sequential(nn.Flatten(), head)


def pixel_set(*, poisoned: int, shift: float = 0.3, classes: int = 6, features: int = 12) -> SuspectSet:
    """Return ``pixel_model`` and normal clouds of 60 samples, that of class 1 with a second one beside it.

    Args:
        poisoned: Samples in the second cloud.
        shift: Its distance along the last two features, in units of ten standard deviations.
        classes: Clouds.
        features: Pixels of an image, one row.
    """
    generator = rng.generator(7)
    per_class = 60

    def cloud(labels: Tensor) -> Tensor:
        rows = 0.4 + 0.03 * torch.randn(len(labels), features, generator=generator)
        rows[torch.arange(len(labels)), labels] += 0.3
        return rows

    labels = torch.arange(classes * per_class) % classes
    bad = torch.full((poisoned,), 1)
    beside = cloud(bad)
    beside[:, -2:] += shift
    known = torch.arange(classes * 20) % classes
    rows = torch.cat([cloud(labels), beside, cloud(known)]).clamp(0, 1).view(-1, 1, 1, features)
    count = len(labels) + poisoned
    return SuspectSet(
        pixel_model(features, classes),
        rows[:count],
        torch.cat([labels, bad]),
        LabelledImages(rows[count:], known),
        torch.arange(count) >= len(labels),
    )
