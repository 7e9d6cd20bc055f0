"""Normalisation as the first layer of a model, so that every method works on images in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unbackdoor.errors import InvalidInputError

PRESETS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mnist": ((0.1307,), (0.3081,)),
    "half": ((0.5,), (0.5,)),
}
"""Channel means and standard deviations of images in [0, 1]; ``half`` maps [0, 1] to [-1, 1]."""


class Normalise(nn.Module):
    """Subtract a mean and divide by a standard deviation, per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise InvalidInputError(
                f"mean {tuple(mean)} and std {tuple(std)} must have one value a channel each, std positive."
            )
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise float images in [0, 1], ``(N, C, H, W)``."""
        return (images - self.mean) / self.std


class NormalisedModel(nn.Module):
    """A network with its normalisation in front: takes images in [0, 1].

    Its tensors are named ``normalise.mean``, ``normalise.std`` and ``network.*``, so that a checkpoint
    says by itself which normalisation it was trained with.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalise = Normalise(mean, std)
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, K)``."""
        logits: Tensor = self.network(self.normalise(images))
        return logits
