"""Draw balanced subsets and stratified splits, reproducibly."""

from __future__ import annotations

import torch
from torch import Tensor

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.types import LabelledImages


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return all indices, shuffled, such that every prefix is as balanced over classes as possible.

    Args:
        labels: int64 ``(N,)``.
        generator: Source of randomness, on the CPU.

    Returns:
        int64 ``(N,)``, a permutation: one sample of each class, then the next of each, and so on.
    """
    by_class, place = _places(labels.cpu(), generator)
    return by_class[torch.argsort(place)]


def proportional_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return all indices, shuffled, such that every prefix has each class in proportion.

    Args:
        labels: int64 ``(N,)``.
        generator: Source of randomness, on the CPU.

    Returns:
        int64 ``(N,)``, a permutation.
    """
    labels = labels.cpu()
    by_class, place = _places(labels, generator)
    return by_class[torch.argsort(place.double() / torch.bincount(labels)[labels[by_class]])]


def draw_balanced(data: LabelledImages, count: int, generator: torch.Generator) -> LabelledImages:
    """Draw ``count`` images (all, if there are fewer), as balanced over classes as possible.

    Raises:
        InvalidInputError: If ``count`` is not positive or ``data`` is empty.
    """
    if count < 1 or not len(data):
        raise InvalidInputError(
            f"cannot draw {count} images out of {len(data)}; ask for at least one, from a non-empty set."
        )
    return data.subset(balanced_order(data.labels, generator)[:count])


def some_of(data: LabelledImages, count: int) -> LabelledImages:
    """Return ``count`` images (all, if there are fewer), balanced over classes, always the same ones.

    Data sets are often sorted by class, so that their first images are of one.
    """
    return draw_balanced(data, count, rng.generator(0))


def split(
    data: LabelledImages, held_out_fraction: float, generator: torch.Generator
) -> tuple[LabelledImages, LabelledImages]:
    """Split into (rest, held out), each class in proportion.

    Args:
        data: The images to split.
        held_out_fraction: Share of the second part, in (0, 1).
        generator: Source of randomness, on the CPU.

    Raises:
        InvalidInputError: If either part would be empty.
    """
    held_out_count = round(held_out_fraction * len(data))
    if not 0 < held_out_count < len(data):
        raise InvalidInputError(
            f"cannot hold out a fraction of {held_out_fraction} of {len(data)} images; both parts need some."
        )
    order = proportional_order(data.labels, generator)
    return data.subset(order[held_out_count:]), data.subset(order[:held_out_count])


def spread(labels: Tensor, limit: int | None) -> Tensor:
    """Choose at most ``limit`` samples without randomness, each class in proportion.

    Args:
        labels: int64 ``(N,)``.
        limit: How many, positive; None for all.

    Returns:
        int64 ``(min(N, limit),)``, ascending.
    """
    count = len(labels)
    if limit is None or limit >= count:
        return torch.arange(count)
    # Even steps through the file itself could meet one class only, where classes alternate regularly.
    by_class = torch.argsort(labels, stable=True)
    return by_class[torch.arange(limit) * count // limit].sort().values


def _places(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the shuffled indices sorted by class, and for each its place in the queue of its class."""
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    rank_in_class = torch.cat([torch.arange(int(count)) for count in torch.bincount(labels)])
    # Classes are visited in a random order within each round, so a cut inside a round favours none.
    tie_break = torch.rand(len(labels), generator=generator)
    return by_class, rank_in_class + 0.999 * tie_break
