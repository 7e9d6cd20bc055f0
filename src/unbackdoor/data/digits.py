"""The embedded data set: scikit-learn's handwritten digits, for demonstrations without a download."""

from __future__ import annotations

import numpy as np
import torch

from unbackdoor import rng
from unbackdoor.data.images import resize
from unbackdoor.data.layout import choose_splits
from unbackdoor.data.splits import split as split_data
from unbackdoor.data.splits import spread
from unbackdoor.extras import require
from unbackdoor.types import LabelledImages

NAME = "digits"
"""What ``load_images`` accepts in place of a path."""

SIZE = 16
"""Pixels a side unless another size is asked for: the usual networks shrink 8 pixels to nothing."""

TEST_COUNT = 500
"""Size of the test split; the other 1297 images are the training split."""

_LEVELS = 16  # the data set counts dark pixels in 4x4 blocks of the scans


def read_digits(
    *, split: str | None, image_size: int | None = None, limit: int | None = None
) -> LabelledImages:
    """Return grey images of handwritten digits, split in a fixed way with each class in proportion.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998, as
    distributed with scikit-learn: 1797 images of 8x8 pixels, here enlarged bilinearly.

    Args:
        split: ``"train"`` (1297 images), ``"test"`` (500) or None for both.
        image_size: Pixels a side, ``SIZE`` if None.
        limit: Keep only that many images, each class in proportion.

    Raises:
        InvalidInputError: If there is no such split.
        MissingDependencyError: If scikit-learn is absent.
    """
    bundle = require("sklearn.datasets", extra="detect").load_digits()
    pixels = np.rint(bundle.images * (255 / _LEVELS)).astype(np.uint8)
    labels = torch.from_numpy(bundle.target.astype(np.int64))
    data = LabelledImages(torch.from_numpy(pixels).unsqueeze(1), labels, tuple("0123456789"))
    rest, held_out = split_data(data, TEST_COUNT / len(data), rng.generator(0))
    parts = {"train": rest, "test": held_out}
    chosen = [parts[name] for name in choose_splits(list(parts), split, source=repr(NAME))]
    images, labels = (torch.cat([getattr(part, field) for part in chosen]) for field in ("images", "labels"))
    rows = spread(labels, limit)
    return LabelledImages(resize(images[rows], image_size or SIZE), labels[rows], data.class_names)
