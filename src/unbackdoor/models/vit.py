"""A small vision transformer (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929) for small images.

In the plain form of Beyer et al. (arXiv 2205.01580): fixed sine-cosine positions and the mean over all tokens
instead of learnt positions and a class token, so that any image size works that the patches divide.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, each after its norm, each with a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens ``(N, T, D)`` for tokens of the same shape."""
        x = x + self.out(self._attend(self.qkv(self.norm1(x))))
        tokens: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return tokens

    def _attend(self, qkv: Tensor) -> Tensor:
        images, tokens, wide = qkv.shape
        query, key, value = qkv.view(images, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).reshape(images, tokens, wide // 3)


class ViT(nn.Module):
    """A transformer over patches.

    Args:
        depth: Blocks.
        patch: Pixels a side of a patch.
        num_classes: Outputs of the head.
        width: Channels of a token; a multiple of 4. There is an attention head for each 32 of them, or fewer
            where that number does not divide the width.
        in_channels: Channels of the images.
    """

    def __init__(
        self, depth: int, patch: int, *, num_classes: int = 10, width: int = 192, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.blocks = nn.Sequential(*(Block(width, heads_of(width)) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, K)`` for normalised images ``(N, C, H, W)``."""
        x = self.conv1(x)
        tokens = x.flatten(2).transpose(1, 2) + positions(x.shape[2], x.shape[3], x.shape[1], like=x)
        logits: Tensor = self.linear(self.norm(self.blocks(tokens)).mean(1))
        return logits


def heads_of(width: int) -> int:
    """Return how many attention heads a width has: as many as divide it, up to one for 32 channels."""
    return next((heads for heads in range(width // 32, 0, -1) if width % heads == 0), 1)


def positions(rows: int, columns: int, width: int, *, like: Tensor) -> Tensor:
    """Return sine-cosine positions ``(rows * columns, width)`` of a grid.

    Args:
        rows: Height of the grid.
        columns: Width of the grid.
        width: Channels, a multiple of 4: sine and cosine of each axis at width / 4 frequencies.
        like: A tensor of the wanted type and device.
    """
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=like.dtype, device=like.device) / (width // 4))
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=like.dtype, device=like.device),
        torch.arange(columns, dtype=like.dtype, device=like.device),
        indexing="ij",
    )
    angles = [axis.flatten()[:, None] * frequencies for axis in (y, x)]
    return torch.cat([function(angle) for angle in angles for function in (torch.sin, torch.cos)], 1)
