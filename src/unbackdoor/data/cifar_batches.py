"""Read the "python version" of CIFAR-10 and CIFAR-100, which are pickles, without trusting them.

Every file is read by ``stored_arrays``: walked before it is opened, and unpickled into inert stand-ins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbackdoor.data.images import resize
from unbackdoor.data.labels import label_tensor
from unbackdoor.data.layout import choose_splits
from unbackdoor.data.splits import spread
from unbackdoor.data.stored_arrays import ARRAY_STAND_INS, StoredArray, text, unpickle
from unbackdoor.errors import InvalidInputError
from unbackdoor.types import LabelledImages

SHAPE = (3, 32, 32)
"""Colour planes, rows and columns of every image."""

MAX_BATCH_BYTES = 256 * 2**20
"""Larger files are refused; the largest official one, CIFAR-100's ``train``, has 155 million bytes."""

_REMEDY = "Get the data set from its authors' page, or convert it to parquet or to an image folder."
_ROW = math.prod(SHAPE)


@dataclass(frozen=True)
class _Edition:
    folder: str
    splits: Mapping[str, tuple[str, ...]]
    meta: str
    label_key: str
    names_key: str


_EDITIONS = (
    _Edition(
        "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
        "batches.meta",
        "labels",
        "label_names",
    ),
    _Edition(
        "cifar-100-python",
        {"train": ("train",), "test": ("test",)},
        "meta",
        "fine_labels",
        "fine_label_names",
    ),
)


def has_batches(path: Path) -> bool:
    """Say whether a folder holds CIFAR batches, in itself or in the folder of the official archives."""
    return _find(path) is not None


def read_cifar_batches(
    path: Path, *, split: str | None, image_size: int | None = None, limit: int | None = None
) -> LabelledImages:
    """Read CIFAR-10 or CIFAR-100 (fine labels) as distributed by its authors.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.

    Args:
        path: The folder with the batches, or the one around it.
        split: ``"train"``, ``"test"`` or None for both.
        image_size: Resize to this many pixels a side.
        limit: Read only that many images, each class in proportion.

    Raises:
        InvalidInputError: If a file is missing or holds something else than 32x32 images with labels.
        UnsafeFileError: If a file is a pickle that does more than hold arrays, numbers and texts.
    """
    found = _find(path)
    if found is None:
        raise InvalidInputError(f"{path} holds no CIFAR batches; point to the unpacked official archive.")
    folder, edition = found
    available = [
        name for name, files in edition.splits.items() if any((folder / file).exists() for file in files)
    ]
    chosen = choose_splits(available, split, source=str(path))
    files = [folder / file for name in chosen for file in edition.splits[name]]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InvalidInputError(f"{folder} lacks {', '.join(missing)}; unpack the whole official archive.")
    names = _class_names(folder / edition.meta, edition.names_key)
    parts = [_read_batch(file, edition.label_key, names) for file in files]
    labels = torch.cat([part[1] for part in parts])
    rows = spread(labels, limit)
    images = torch.cat([part[0] for part in parts])[rows]
    return LabelledImages(images if image_size is None else resize(images, image_size), labels[rows], names)


def _find(path: Path) -> tuple[Path, _Edition] | None:
    for edition in _EDITIONS:
        for folder in (path, path / edition.folder):
            batches = [file for files in edition.splits.values() for file in files]
            # The names of CIFAR-100 are plain words, hence the second condition.
            known = edition.meta != "meta" or (folder / edition.meta).is_file()
            if known and any((folder / file).is_file() for file in batches):
                return folder, edition
    return None


def _class_names(path: Path, key: str) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    names = _unpickle(path).get(key)
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise InvalidInputError(f"{path} has no list of names called {key!r}; restore the official file.")
    return tuple(text(name) for name in names)


def _read_batch(path: Path, label_key: str, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    content = _unpickle(path)
    data, labels = content.get("data"), content.get(label_key)
    if not isinstance(data, StoredArray) or not isinstance(labels, list):
        raise InvalidInputError(
            f"{path} lacks an array 'data' or a list {label_key!r}; point to an official batch file."
        )
    if not all(type(label) is int for label in labels):
        raise InvalidInputError(f"{path} has labels that are no integers; restore the official file.")
    images = _images(data, path)
    if len(images) != len(labels):
        raise InvalidInputError(
            f"{path} has {len(images)} images but {len(labels)} labels; restore the official file."
        )
    return images, label_tensor(labels, source=str(path), class_names=names)


def _images(stored: StoredArray, path: Path) -> Tensor:
    pixels = stored.values("u1", dimensions=2)
    if pixels is None or pixels.shape[1] != _ROW:
        raise InvalidInputError(
            f"{path} does not hold a uint8 array of shape (N, {_ROW}); point to an official batch file."
        )
    return torch.from_numpy(pixels).view(-1, *SHAPE)


def _unpickle(path: Path) -> dict[str, Any]:
    content = unpickle(path, ARRAY_STAND_INS, most_bytes=MAX_BATCH_BYTES, part="the batch", remedy=_REMEDY)
    if not isinstance(content, dict):
        raise InvalidInputError(f"{path} holds no dictionary; point to an official batch file.")
    return {text(key): value for key, value in content.items()}
