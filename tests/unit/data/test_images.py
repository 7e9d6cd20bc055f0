from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from unbackdoor.data import images as module
from unbackdoor.data.images import decode, decode_all, resize
from unbackdoor.errors import InvalidInputError


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def rgb(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_rgb_is_decoded_channels_first() -> None:
    pixels = rgb(4, 5)
    image = decode(encoded(pixels), name="x")
    assert image.dtype == torch.uint8
    assert image.shape == (3, 4, 5)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_grey_stays_one_channel() -> None:
    pixels = rgb(4, 5)[:, :, 0]
    image = decode(encoded(pixels), name="x")
    assert image.shape == (1, 4, 5)
    assert np.array_equal(image[0].numpy(), pixels)


def test_alpha_and_palettes_become_rgb() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 2, 4), 200, dtype=np.uint8)).save(buffer, "PNG")
    assert decode(buffer.getvalue(), name="x").tolist() == [[[200] * 2] * 2] * 3
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 2, 3), 70, dtype=np.uint8)).convert("P").save(buffer, "PNG")
    assert decode(buffer.getvalue(), name="x").shape == (3, 2, 2)


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    pixels = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    assert decode(encoded(pixels), name="x").tolist() == [[[0, 100, 255]]]


def test_32_bit_pixels_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"x holds 32-bit pixels \(mode 'F'\)"):
        decode(encoded(np.ones((2, 2), dtype=np.float32), "TIFF"), name="x")


def test_size_resizes_while_decoding() -> None:
    assert decode(encoded(rgb(4, 6)), name="x", size=3).shape == (3, 3, 3)


def test_garbage_is_refused_by_name() -> None:
    with pytest.raises(InvalidInputError, match="the file cannot be decoded as an image"):
        decode(b"no image", name="the file")


def test_decode_all_keeps_order_and_mixes_grey_with_rgb() -> None:
    grey, colour = rgb(3, 3)[:, :, 0], rgb(3, 3, seed=1)
    files = [("a", encoded(grey)), ("b", encoded(colour)), ("c", encoded(grey))]
    images = decode_all(files, 3, source="set")
    assert images.shape == (3, 3, 3, 3)
    assert np.array_equal(images[1].permute(1, 2, 0).numpy(), colour)
    for row in (0, 2):
        for channel in range(3):
            assert np.array_equal(images[row, channel].numpy(), grey)


def test_decode_all_names_both_sizes_and_the_remedy() -> None:
    files = [("a", encoded(rgb(3, 4))), ("b", encoded(rgb(5, 6)))]
    with pytest.raises(InvalidInputError, match=r"such as 3 x 4 and 5 x 6 .*--image-size"):
        decode_all(files, 2, source="set")
    assert decode_all(files, 2, source="set", size=4).shape == (2, 3, 4, 4)


def test_decode_all_of_nothing() -> None:
    with pytest.raises(InvalidInputError, match="set holds no images"):
        decode_all([], 0, source="set")


def test_decode_all_refuses_what_memory_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TOTAL_BYTES", 3 * 4 * 4 * 2)
    files = [("a", encoded(rgb(4, 4)))] * 3
    assert len(decode_all(files[:2], 2, source="set")) == 2
    with pytest.raises(InvalidInputError, match="--limit"):
        decode_all(files, 3, source="set")


def test_resize_keeps_constants_types_and_range() -> None:
    flat = torch.full((2, 1, 4, 4), 201, dtype=torch.uint8)
    assert torch.equal(resize(flat, 7), torch.full((2, 1, 7, 7), 201, dtype=torch.uint8))
    floats = torch.rand(3, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    scaled = resize(floats, 9)
    assert scaled.dtype == torch.float32
    assert 0 <= float(scaled.min()) <= float(scaled.max()) <= 1
    assert resize(floats, 5) is floats


def test_resize_averages_when_it_shrinks() -> None:
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(16, 8).view(1, 1, 16, 16)
    inner = resize(stripes, 4)[0, 0, :, 1:3]
    assert 100 < int(inner.min()) <= int(inner.max()) < 155
