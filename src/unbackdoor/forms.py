"""What an inverted trigger can be: a patch, a small change of all pixels, or a warp."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from unbackdoor.warps import resample, smooth_field, warp_grid

Form = Literal["patch", "additive", "warp"]

NORMS: Mapping[Form, str] = {"patch": "l1_pixels", "additive": "l2", "warp": "rms_shift_pixels"}
"""What the norm of each form is called in JSON."""

_GRID_PER_PIXEL = 2.0
"""Sampling grids run from -1 to 1."""

_LARGEST_SHIFT = 1 / 8
"""Of the longer side; a round number, past what clean models need where a warp leads to a class at all."""


def applied(form: Form, mask: Tensor, pattern: Tensor, images: Tensor) -> Tensor:
    """Return ``images`` with a trigger on them.

    Args:
        form: What the trigger is.
        mask: ``(1, H, W)`` in [0, 1], the share of each pixel that a patch replaces; else not used.
        pattern: ``(C, H, W)``, what a patch shows or what is added; of a warp the control field
            ``(2, k, k)``, in pixels.
        images: Float ``(N, C, H, W)`` in [0, 1].
    """
    if form == "patch":
        return (1 - mask) * images + mask * pattern
    if form == "additive":
        return (images + pattern).clamp(0, 1)
    grid = warp_grid(pattern, _GRID_PER_PIXEL, *images.shape[2:])
    return resample(images, grid.expand(len(images), -1, -1, -1))


def norm_of(form: Form, mask: Tensor, pattern: Tensor) -> Tensor:
    """Return how large a trigger is.

    Of a patch the sum of its mask, the pixels that it replaces; of a change its l2 norm; of a warp the
    root mean square over the pixels of how far they move, in pixels. Arguments as for ``applied``.
    """
    if form == "patch":
        return mask.sum()
    if form == "additive":
        change: Tensor = torch.linalg.vector_norm(pattern)
        return change
    shifts: Tensor = torch.linalg.vector_norm(smooth_field(pattern, *mask.shape[1:]))
    return shifts / math.sqrt(mask.numel())


def largest_norm(form: Form, channels: int, height: int, width: int) -> float:
    """Return the norm that a class counts as for which no trigger works.

    The whole image for a patch, a change of every value by 1, or a shift of an eighth of the longer side.
    """
    if form == "patch":
        return float(height * width)
    if form == "additive":
        return math.sqrt(channels * height * width)
    return _LARGEST_SHIFT * max(height, width)
