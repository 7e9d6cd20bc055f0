"""Batched augmentation on tensors: no worker processes, a few per cent of a training step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Zero-pad each image and crop a window of the original size at a random place.

    Args:
        images: ``(N, C, H, W)``, any dtype.
        padding: Pixels added on each side, at least 0; 0 returns the input.
        generator: Source of randomness, on the CPU.

    Returns:
        Same shape and dtype as ``images``.
    """
    if padding == 0:
        return images
    n, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    offsets = torch.randint(2 * padding + 1, (2, n), generator=generator).to(images.device)
    rows = offsets[0, :, None] + torch.arange(height, device=images.device)
    columns = offsets[1, :, None] + torch.arange(width, device=images.device)
    # One flat gather on (row, column) pairs is shared by all channels.
    flat = rows[:, :, None] * padded.shape[-1] + columns[:, None, :]
    index = flat.view(n, 1, height * width).expand(n, channels, -1)
    return padded.flatten(2).gather(2, index).view(n, channels, height, width)


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    chosen = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)
