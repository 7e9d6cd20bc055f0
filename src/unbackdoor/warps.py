"""Smooth warps of images: a few control vectors bend the grid on which an image is sampled."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def smooth_field(field: Tensor, height: int, width: int) -> Tensor:
    """Return a control field enlarged to an image, ``(2, height, width)``, by bicubic interpolation.

    Args:
        field: Float ``(2, k, k)``: shifts along the columns, then along the rows.
        height: Rows of the image.
        width: Its columns.
    """
    return F.interpolate(field[None].float(), size=(height, width), mode="bicubic", align_corners=True)[0]


def warp_grid(field: Tensor, strength: float, height: int, width: int) -> Tensor:
    """Return the sampling grid of a warp, float32 ``(1, height, width, 2)`` with (column, row) last.

    Each axis is divided by its own length, so that shifts are equal in pixels on oblong images too.
    """
    size = field.new_tensor([width, height])
    rows = torch.linspace(-1, 1, height, device=field.device)
    columns = torch.linspace(-1, 1, width, device=field.device)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    identity = torch.stack([x, y], dim=-1)[None]
    shifts = smooth_field(field, height, width).permute(1, 2, 0)[None]
    return (identity + strength * shifts / size).clamp(-1, 1)


def resample(images: Tensor, grid: Tensor) -> Tensor:
    """Sample ``images`` bilinearly at ``grid``, ``(N, H, W, 2)`` in [-1, 1]."""
    if not len(images):
        return images.clone()
    return F.grid_sample(images, grid, mode="bilinear", align_corners=True).clamp(0.0, 1.0)
