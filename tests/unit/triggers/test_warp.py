from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from unbackdoor.errors import InvalidInputError
from unbackdoor.rng import generator
from unbackdoor.triggers import NoiseWarpTrigger, WarpTrigger, load_trigger, save_trigger
from unbackdoor.triggers.warp import noisy_warp, warp_field
from unbackdoor.warps import resample, warp_grid


def images(n: int = 2, channels: int = 3, height: int = 8, width: int = 8) -> Tensor:
    return torch.rand(n, channels, height, width, generator=generator(0))


def constant_field(columns: float, rows: float) -> Tensor:
    return torch.tensor([columns, rows]).view(2, 1, 1).expand(2, 4, 4).clone()


def test_the_field_has_mean_magnitude_one_and_follows_its_generator() -> None:
    one, again, other = (warp_field(4, generator(seed)) for seed in (1, 1, 2))
    assert one.shape == (2, 4, 4)
    assert abs(float(one.abs().mean()) - 1) < 1e-6
    assert float(one.min()) < 0 < float(one.max())
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_identity_grid_puts_columns_first() -> None:
    grid = warp_grid(torch.zeros(2, 4, 4), 1.0, 3, 5)
    assert grid.shape == (1, 3, 5, 2)
    assert grid[0, 0, :, 0].tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert grid[0, :, 0, 1].tolist() == [-1.0, 0.0, 1.0]
    before = images(height=3, width=5)
    torch.testing.assert_close(resample(before, grid.expand(2, -1, -1, -1)), before)


def test_a_constant_field_shifts_columns_by_hand_worked_amounts() -> None:
    # width 5: grid spacing is 2/4, so a shift of strength / 5 = 0.5 is one whole column
    ramp = torch.arange(5.0).div(4).expand(1, 1, 3, 5)
    shifted = WarpTrigger(constant_field(1.0, 0.0), 2.5)(ramp)
    torch.testing.assert_close(shifted[0, 0, 1], torch.tensor([0.25, 0.5, 0.75, 1.0, 1.0]))
    half = WarpTrigger(constant_field(-1.0, 0.0), 1.25)(ramp)
    torch.testing.assert_close(half[0, 0, 0], torch.tensor([0.0, 0.125, 0.375, 0.625, 0.875]))


def test_the_second_component_shifts_rows() -> None:
    ramp = torch.arange(5.0).div(4).view(1, 1, 5, 1).expand(1, 1, 5, 5)
    shifted = WarpTrigger(constant_field(0.0, 1.0), 2.5)(ramp)
    torch.testing.assert_close(shifted[0, 0, :, 2], torch.tensor([0.25, 0.5, 0.75, 1.0, 1.0]))


def test_the_grid_is_clamped_to_the_image() -> None:
    grid = warp_grid(warp_field(4, generator(0)), 100.0, 8, 8)
    assert float(grid.abs().max()) == 1.0


def test_the_shift_in_pixels_does_not_depend_on_the_size() -> None:
    field = warp_field(4, generator(3))
    for size in (33, 129):
        flat = warp_grid(torch.zeros(2, 4, 4), 1.0, size, size)
        inside = (warp_grid(field, 1.0, size, size) - flat)[:, size // 4 : -size // 4, size // 4 : -size // 4]
        pixels = float(inside.abs().mean()) * (size - 1) / 2
        assert 0.2 < pixels < 0.8, "strength 1 moves about half a pixel"


def test_a_warp_is_pure_bounded_and_changes_the_image() -> None:
    trigger = WarpTrigger(warp_field(4, generator(0)), 1.0)
    before = images()
    kept = before.clone()
    warped = trigger(before)
    assert torch.equal(before, kept)
    assert torch.equal(warped, trigger(before))
    assert torch.equal(warped[1:], trigger(before[1:]))
    assert not torch.equal(warped, before)
    assert 0 <= float(warped.min()) <= float(warped.max()) <= 1
    assert trigger(before[:0]).shape == (0, 3, 8, 8)
    assert trigger(images(channels=1, height=5, width=9)).shape == (2, 1, 5, 9)


def test_noise_is_pure_differs_from_the_trigger_and_between_images() -> None:
    field = warp_field(4, generator(0))
    noise, trigger = NoiseWarpTrigger(field, 1.0, 7), WarpTrigger(field, 1.0)
    same = images(1).expand(2, -1, -1, -1)
    warped = noise(same)
    assert torch.equal(warped, noise(same))
    assert not torch.equal(warped[0], warped[1])
    assert not torch.equal(warped, trigger(same))
    assert torch.equal(warped[:1], noise(same[:1]))
    assert not torch.equal(warped, NoiseWarpTrigger(field, 1.0, 8)(same))
    assert noise(same[:0]).shape == (0, 3, 8, 8)


def test_noise_moves_at_most_half_a_pixel_from_the_warp() -> None:
    ramp = torch.arange(9.0).div(8).expand(1, 1, 9, 9).contiguous()
    still = torch.zeros(2, 2, 2)
    moved = (noisy_warp(ramp, still, 1.0, generator(0)) - ramp).abs() * 8
    assert 0.3 < float(moved.max()) <= 0.5


def test_files_keep_warps_exactly(tmp_path: Path) -> None:
    field = warp_field(4, generator(0))
    for trigger in (WarpTrigger(field, 0.75), NoiseWarpTrigger(field, 0.75, 2**61 + 1)):
        save_trigger(trigger, tmp_path / "t.safetensors")
        loaded = load_trigger(tmp_path / "t.safetensors")
        assert type(loaded) is type(trigger)
        assert torch.equal(loaded(images()), trigger(images()))


@pytest.mark.parametrize(
    "field", [torch.zeros(2, 3, 4), torch.zeros(3, 4, 4), torch.zeros(2, 0, 0), torch.zeros(4, 4)]
)
def test_a_field_of_another_shape_is_refused(field: Tensor) -> None:
    with pytest.raises(InvalidInputError, match=r"control field \(2, k, k\), got shape"):
        WarpTrigger(field, 1.0)


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan"), float("inf"), "1", True])
def test_other_strengths_are_refused(strength: float) -> None:
    with pytest.raises(InvalidInputError, match="strength of a warp"):
        WarpTrigger(torch.zeros(2, 4, 4), strength)


def test_odd_values_of_a_strangers_file_are_refused() -> None:
    for value in (float("nan"), float("inf"), 1e38):
        with pytest.raises(InvalidInputError, match="finite floats of at most 1000"):
            WarpTrigger(torch.full((2, 4, 4), value), 1.0)
    for seed in (-1, 2**63, 1.5, True):
        with pytest.raises(InvalidInputError, match="seed of the noise"):
            NoiseWarpTrigger(torch.zeros(2, 4, 4), 1.0, seed)  # type: ignore[arg-type]
