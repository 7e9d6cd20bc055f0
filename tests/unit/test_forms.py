from __future__ import annotations

import math

import pytest
import torch

from unbackdoor import rng
from unbackdoor.forms import NORMS, Form, applied, largest_norm, norm_of
from unbackdoor.warps import smooth_field

IMAGES = torch.rand(2, 3, 8, 12, generator=rng.generator(0))
MASK = torch.ones(1, 8, 12)


def test_a_patch_replaces_and_is_as_large_as_its_mask() -> None:
    mask = torch.zeros(1, 8, 12)
    mask[:, :2, :3] = 0.5
    white = torch.ones(3, 8, 12)
    torch.testing.assert_close(applied("patch", mask, white, IMAGES), IMAGES + mask * (1 - IMAGES))
    assert float(norm_of("patch", mask, white)) == pytest.approx(3.0)


def test_a_change_is_added_and_clipped() -> None:
    change = torch.full((3, 8, 12), 0.25)
    torch.testing.assert_close(applied("additive", MASK, change, IMAGES), (IMAGES + 0.25).clamp(0, 1))
    assert float(norm_of("additive", MASK, change)) == pytest.approx(0.25 * math.sqrt(3 * 8 * 12))


def test_a_warp_moves_pixels_by_what_its_field_says() -> None:
    # One pixel along the columns is (12 - 1) / 12 of the field's unit: each axis is divided by its length.
    field = torch.zeros(2, 4, 4)
    field[0] = 12 / 11
    moved = applied("warp", MASK, field, IMAGES)
    torch.testing.assert_close(moved[..., :-1], IMAGES[..., 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[..., -1], IMAGES[..., -1], atol=1e-5, rtol=0)
    assert float(norm_of("warp", MASK, field)) == pytest.approx(12 / 11)
    assert torch.equal(applied("warp", MASK, torch.zeros(2, 4, 4), IMAGES[:0]), IMAGES[:0])


def test_the_norm_of_a_warp_is_a_root_mean_square() -> None:
    field = torch.randn(2, 4, 4, generator=rng.generator(1))
    shifts = smooth_field(field, 8, 12)
    expected = shifts.pow(2).sum(0).mean().sqrt()
    assert float(norm_of("warp", MASK, field)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("form", "largest"), [("patch", 96.0), ("additive", math.sqrt(288)), ("warp", 1.5)])
def test_the_largest_norm_is_that_of_the_whole_image(form: Form, largest: float) -> None:
    assert largest_norm(form, 3, 8, 12) == pytest.approx(largest)
    assert form in NORMS
