"""A smooth warp of the whole image (Nguyen & Tran, "WaNet", 2021, arXiv 2102.10369)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.warps import resample, warp_grid

LARGEST = 1000.0
"""Far above any control vector of ``warp_field``; sums of larger ones overflow to NaN."""


@dataclass(frozen=True, eq=False)
class WarpTrigger:
    """Resample the image on a grid that a few control vectors bend (WaNet, section 3.2).

    With the control field P enlarged to the image by bicubic interpolation, a pixel at v, in coordinates
    from -1 to 1, takes the value at ``clip(v + strength P(v) / size)``: a shift of about strength |P| / 2
    pixels, whatever the size of the image.

    Args:
        field: float32 ``(2, k, k)``: shifts along the columns, then along the rows; see ``warp_field``.
        strength: Factor of the field; 0.5 in the paper.
    """

    field: Tensor
    strength: float

    def __post_init__(self) -> None:
        _check(self.field, self.strength)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the warped ``images``, float32 ``(N, C, H, W)`` in [0, 1]."""
        grid = warp_grid(self.field.to(images), self.strength, images.shape[2], images.shape[3])
        return resample(images, grid.expand(len(images), -1, -1, -1))


@dataclass(frozen=True, eq=False)
class NoiseWarpTrigger:
    """A decoy: the backdoor's warp with another warp of up to half a pixel on top (WaNet's noise mode).

    The noise depends on the seed and on the position of an image in its batch, so that equal batches
    give equal results.

    Args:
        field: Control field of the backdoor, float32 ``(2, k, k)``.
        strength: Its factor.
        seed: What the noise is drawn from, in [0, 2^63).
    """

    field: Tensor
    strength: float
    seed: int

    def __post_init__(self) -> None:
        _check(self.field, self.strength)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise InvalidInputError(f"the seed of the noise must be in [0, 2^63), got {self.seed!r}.")

    def __call__(self, images: Tensor) -> Tensor:
        """Return the noisily warped ``images``, float32 ``(N, C, H, W)`` in [0, 1]."""
        return noisy_warp(images, self.field, self.strength, rng.generator(self.seed))


def _check(field: Tensor, strength: float) -> None:
    if field.ndim != 3 or field.shape[0] != 2 or field.shape[1] != field.shape[2] or not field.shape[1]:
        raise InvalidInputError(
            f"a warp needs a control field (2, k, k), got shape {tuple(field.shape)}; see warp_field."
        )
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 100:
        raise InvalidInputError(f"the strength of a warp must lie in (0, 100], got {strength!r}.")
    # NaN fails every comparison.
    if not field.is_floating_point() or not bool((field.abs() <= LARGEST).all()):
        raise InvalidInputError(
            f"the control field of a warp must hold finite floats of at most {LARGEST:g} in size."
        )


def warp_field(size: int, generator: torch.Generator) -> Tensor:
    """Draw a control field, uniform in [-1, 1] and then scaled to a mean magnitude of 1.

    Args:
        size: Control vectors a side, at least 1.
        generator: Source of randomness, on the CPU.

    Returns:
        float32 ``(2, size, size)``.
    """
    field = torch.rand(2, size, size, generator=generator) * 2 - 1
    return field / field.abs().mean()


def noisy_warp(
    images: Tensor, field: Tensor, strength: float, generator: torch.Generator | None = None
) -> Tensor:
    """Warp each image by the field and by noise of its own, uniform within half a pixel per axis.

    Args:
        images: float32 ``(N, C, H, W)`` in [0, 1].
        field: Control field of the backdoor, float32 ``(2, k, k)``.
        strength: Its factor.
        generator: Source of the noise on the CPU, or None for torch's global generator.
    """
    count, _, height, width = images.shape
    grid = warp_grid(field.to(images), strength, height, width)
    noise = torch.rand(count, height, width, 2, generator=generator).to(images) * 2 - 1
    return resample(images, (grid + noise / grid.new_tensor([width, height])).clamp(-1, 1))
