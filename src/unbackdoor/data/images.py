"""Decode and resize images into tensors, with limits: image files come from strangers too."""

from __future__ import annotations

import io
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from unbackdoor.errors import InvalidInputError
from unbackdoor.extras import require
from unbackdoor.types import quantise

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 4096 * 4096
"""Larger images are refused: classifiers never need them, decompression bombs do."""

MAX_FILE_BYTES = 64 * 2**20
"""Larger image files are refused."""

MAX_TOTAL_BYTES = 8 * 2**30
"""Larger data sets are refused: they are held in memory."""

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""The formats that are decoded. A closed list: Pillow's parsers of rare formats see little review."""

_RESIZE_CHUNK = 1024


def decode(encoded: bytes, *, name: str, size: int | None = None) -> Tensor:
    """Decode one image file to uint8 ``(3, H, W)``, or ``(1, H, W)`` where it is stored as grey.

    Args:
        encoded: The file's bytes, in one of ``FORMATS``.
        name: How error messages call it.
        size: Resize the image to ``size`` x ``size`` pixels (bilinear), or None to keep its size.

    Raises:
        InvalidInputError: If it is not an image, or has more than ``MAX_PIXELS`` pixels.
    """
    # Pillow hands out read-only memory, which torch does not accept without a copy.
    return torch.from_numpy(_pixels(encoded, name, size).copy())


def decode_all(
    encoded: Iterable[tuple[str, bytes]], count: int, *, source: str, size: int | None = None
) -> Tensor:
    """Decode image files into one tensor; grey images become RGB where both occur.

    Args:
        encoded: ``count`` pairs of a name for error messages and the file's bytes.
        count: Number of images.
        source: How error messages call the data set.
        size: Resize the images to ``size`` x ``size`` pixels, or None to keep their size.

    Returns:
        uint8 ``(count, C, H, W)``, C being 1 or 3.

    Raises:
        InvalidInputError: If there are none, their sizes differ, they are too large to be held in
            memory, or one of them cannot be decoded.
    """
    images: npt.NDArray[np.uint8] | None = None
    for row, (name, content) in enumerate(encoded):
        image = _pixels(content, name, size)
        if images is None:
            images = _room_for(count, image, source)
        if image.shape[1:] != images.shape[2:]:
            raise InvalidInputError(
                f"{source} holds images of different sizes, such as {_size(images)} and {_size(image)} "
                "(height x width); give one size with --image-size."
            )
        if len(image) > images.shape[1]:
            check_total(count, (len(image), *image.shape[1:]), source=source)
            images = np.repeat(images, 3, axis=1)
        images[row] = image
    if images is None:
        raise InvalidInputError(f"{source} holds no images; point to a data set with at least one.")
    return torch.from_numpy(images)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images to ``size`` x ``size`` pixels: bilinear, averaging where that shrinks them.

    Args:
        images: ``(N, C, H, W)``, uint8 or float32 in [0, 1].
        size: Pixels a side, positive.

    Returns:
        ``(N, C, size, size)`` of the same dtype.
    """
    if images.shape[2:] == (size, size):
        return images
    return torch.cat([_resize_chunk(chunk, size) for chunk in images.split(_RESIZE_CHUNK)])


def check_total(count: int, shape: tuple[int, ...], *, source: str, itemsize: int = 1) -> None:
    """Refuse a data set of ``count`` images of ``shape`` (C, H, W) that would not fit into memory.

    Raises:
        InvalidInputError: If it takes more than ``MAX_TOTAL_BYTES`` bytes.
    """
    total = count * int(np.prod(shape, dtype=object)) * itemsize
    if total > MAX_TOTAL_BYTES:
        raise InvalidInputError(
            f"{source} takes {total / 2**30:.1f} GiB as {count} images of shape {shape}, more than the "
            f"{MAX_TOTAL_BYTES / 2**30:g} GiB allowed; read fewer with --limit or smaller ones with "
            "--image-size."
        )


def _resize_chunk(chunk: Tensor, size: int) -> Tensor:
    floats = chunk.float().div(255.0) if chunk.dtype == torch.uint8 else chunk
    # Bilinear weights are convex, but their sum may pass 1 by a rounding error.
    scaled = F.interpolate(floats, size=(size, size), mode="bilinear", antialias=True).clamp(0.0, 1.0)
    return quantise(scaled) if chunk.dtype == torch.uint8 else scaled


def _room_for(count: int, image: npt.NDArray[np.uint8], source: str) -> npt.NDArray[np.uint8]:
    check_total(count, image.shape, source=source)
    return np.empty((count, *image.shape), dtype=np.uint8)


def _size(image: npt.NDArray[np.uint8]) -> str:
    return f"{image.shape[-2]} x {image.shape[-1]}"


def _pixels(encoded: bytes, name: str, size: int | None) -> npt.NDArray[np.uint8]:
    """Return uint8 ``(C, H, W)``, possibly a read-only view."""
    pil = require("PIL.Image", extra="data")
    if len(encoded) > MAX_FILE_BYTES:
        raise InvalidInputError(
            f"{name} is larger than the {MAX_FILE_BYTES} bytes allowed for an image file; shrink it first."
        )
    try:
        image = pil.open(io.BytesIO(encoded), formats=FORMATS)
        _check_header(image, name)
        image = _eight_bit(image, pil)
        if size is not None and image.size != (size, size):
            image = image.resize((size, size), pil.Resampling.BILINEAR)
        pixels: npt.NDArray[np.uint8] = np.asarray(image)
    except InvalidInputError:
        raise
    except Exception as error:  # Pillow raises many unrelated types on damaged files
        problem = "unknown or damaged format" if isinstance(error, pil.UnidentifiedImageError) else error
        raise InvalidInputError(f"{name} cannot be decoded as an image ({problem}); remove it.") from error
    return pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _check_header(image: Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise InvalidInputError(
            f"{name} has {image.width} x {image.height} pixels, more than the {MAX_PIXELS} allowed; "
            "shrink it first."
        )
    if image.mode in ("I", "F"):
        raise InvalidInputError(
            f"{name} holds 32-bit pixels (mode {image.mode!r}), whose range is unknown; save it with 8 bits."
        )


def _eight_bit(image: Image, pil: ModuleType) -> Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of scaling.
        scaled: Image = pil.fromarray((np.asarray(image) // 257).astype(np.uint8))
        return scaled
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    return image if image.mode == mode else image.convert(mode)
