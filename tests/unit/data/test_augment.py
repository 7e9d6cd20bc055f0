from __future__ import annotations

import torch

from unbackdoor.data.augment import random_crop, random_flip
from unbackdoor.rng import generator


def sample(count: int = 64) -> torch.Tensor:
    return torch.randint(1, 256, (count, 3, 6, 5), dtype=torch.uint8, generator=generator(9))


def windows(image: torch.Tensor, padding: int) -> list[torch.Tensor]:
    height, width = image.shape[1:]
    padded = torch.zeros(3, height + 2 * padding, width + 2 * padding, dtype=image.dtype)
    padded[:, padding : padding + height, padding : padding + width] = image
    places = [(row, column) for row in range(2 * padding + 1) for column in range(2 * padding + 1)]
    return [padded[:, row : row + height, column : column + width] for row, column in places]


def test_each_crop_is_a_window_of_its_padded_image() -> None:
    images = sample()
    cropped = random_crop(images, 2, generator(0))
    assert cropped.shape == images.shape
    assert cropped.dtype == images.dtype
    used = set()
    for image, crop in zip(images, cropped, strict=True):
        places = [place for place, window in enumerate(windows(image, 2)) if torch.equal(window, crop)]
        assert len(places) == 1
        used.update(places)
    # 64 draws from 25 places: fewer than 15 different ones is next to impossible, and the seed is fixed.
    assert len(used) >= 15


def test_no_padding_returns_the_input() -> None:
    images = sample()
    assert random_crop(images, 0, generator(0)) is images


def test_each_image_is_mirrored_or_kept() -> None:
    images = sample()
    flipped = random_flip(images, generator(0))
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 16 <= int(mirrored.sum()) <= 48


def test_augmentation_follows_the_generator_and_spares_its_input() -> None:
    images = sample()
    before = images.clone()
    for augment in (lambda g: random_crop(images, 1, g), lambda g: random_flip(images, g)):
        first, again, other = (augment(generator(seed)) for seed in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert torch.equal(images, before)
