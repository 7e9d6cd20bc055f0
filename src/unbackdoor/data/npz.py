"""Read images and labels from ``.npz`` files, without unpickling and within limits known beforehand."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unbackdoor.data.archives import open_archive
from unbackdoor.data.images import MAX_TOTAL_BYTES, resize
from unbackdoor.data.labels import label_tensor
from unbackdoor.data.layout import canonical_split, choose_splits
from unbackdoor.data.splits import spread
from unbackdoor.errors import InvalidInputError, UnsafeFileError
from unbackdoor.types import LabelledImages

ROLES = {
    "images": "images",
    "image": "images",
    "x": "images",
    "data": "images",
    "labels": "labels",
    "label": "labels",
    "y": "labels",
    "targets": "labels",
}
"""Accepted array names (in any case), alone or joined to a split: ``x``, ``x_train``, ``test_images``."""

_EXPECTED = "it needs two, such as 'images' and 'labels', or 'x_train' and 'y_train'"


def is_npz(path: Path) -> bool:
    """Say whether a zip file is an ``.npz`` file: it holds arrays and nothing else."""
    with open_archive(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_npz(
    path: Path, *, split: str | None, image_size: int | None = None, limit: int | None = None
) -> LabelledImages:
    """Read an ``.npz`` file with an array of images and one of labels, or such a pair for each split.

    Images are ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)`` with 1 or 3 channels. Integers are
    taken as levels in 0 to 255; floats as they are in [0, 1], or as levels where all are whole numbers
    up to 255. Labels are whole numbers of shape ``(N,)`` or ``(N, 1)``.

    Args:
        path: The file; for the names of its arrays see ``ROLES``.
        split: Split to read where there are several; None reads all.
        image_size: Resize to this many pixels a side.
        limit: Keep only that many images, each class in proportion.

    Raises:
        InvalidInputError: If arrays are missing, or differ from the above.
        UnsafeFileError: If an array holds Python objects, or its size contradicts the file's.
    """
    members = _members(path)
    chosen = choose_splits([name for name in members if name], split, source=str(path)) or ("",)
    keys = [members[name] for name in chosen]
    with open_archive(path) as archive:
        _check_arrays(archive, [key for pair in keys for key in pair.values()], path)
    parts = [_read_pair(path, pair["images"], pair["labels"]) for pair in keys]
    if len({(images.shape[1:], images.dtype) for images, _ in parts}) > 1:
        raise InvalidInputError(f"{path} has splits of different image shapes or types; read one split.")
    images, labels = (torch.cat([part[place] for part in parts]) for place in (0, 1))
    rows = spread(labels, limit)
    return LabelledImages(
        images[rows] if image_size is None else resize(images[rows], image_size), labels[rows]
    )


def _members(path: Path) -> dict[str, dict[str, str]]:
    """Return for each split (the empty name where there is none) the array names by role."""
    with open_archive(path) as archive:
        keys = [name.removesuffix(".npy") for name in archive.namelist()]
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        split, role = _meaning(key)
        if role is not None and found.setdefault(split, {}).setdefault(role, key) != key:
            raise InvalidInputError(
                f"{path} has several arrays of {role} (such as {key!r}); leave one of them."
            )
    complete = {split: pair for split, pair in sorted(found.items()) if len(pair) == 2}
    if not complete or len(complete) < len(found):
        raise InvalidInputError(
            f"{path} has the arrays {', '.join(sorted(keys)[:12]) or 'none'}; {_EXPECTED}."
        )
    if "" in complete and len(complete) > 1:
        raise InvalidInputError(f"{path} has arrays with and without a split in their names; leave one kind.")
    order = ("train", "validation", "test", "")
    return {split: complete[split] for split in order if split in complete}


def _meaning(key: str) -> tuple[str, str | None]:
    parts = key.lower().split("_")
    roles = [ROLES[part] for part in parts if part in ROLES]
    splits = [split for part in parts if (split := canonical_split(part))]
    if len(roles) != 1 or len(roles) + len(splits) != len(parts) or len(splits) > 1:
        return "", None
    return "".join(splits), roles[0]


def _check_arrays(archive: zipfile.ZipFile, keys: list[str], path: Path) -> None:
    """Refuse arrays by their headers, before numpy makes room for what they claim."""
    infos = [archive.getinfo(f"{key}.npy") for key in keys]
    total = sum(info.file_size for info in infos)
    if total > MAX_TOTAL_BYTES:
        raise InvalidInputError(
            f"{path} unpacks to {total} bytes, more than the {MAX_TOTAL_BYTES} allowed; split the file."
        )
    for info in infos:
        shape, dtype, header_bytes = _header(archive, info, path)
        if dtype.hasobject:
            raise UnsafeFileError(
                f"{path}: {info.filename!r} holds Python objects, which could run code; save plain numbers."
            )
        claimed = math.prod(shape) * dtype.itemsize + header_bytes
        if min(shape, default=0) < 0 or claimed != info.file_size:
            raise UnsafeFileError(
                f"{path}: {info.filename!r} claims the shape {shape} in {info.file_size} bytes; "
                "get a sound copy."
            )


def _header(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path
) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            shape, _, dtype = readers[version](member)
            return shape, dtype, member.tell()
    except Exception as error:  # damaged archives and headers raise many unrelated types
        raise InvalidInputError(
            f"{path}: {info.filename!r} is no sound array ({error}); save it again."
        ) from error


def _read_pair(path: Path, images_key: str, labels_key: str) -> tuple[Tensor, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as bundle:
            images, labels = bundle[images_key], bundle[labels_key]
    except Exception as error:  # damaged archives raise many unrelated types
        raise InvalidInputError(f"{path} cannot be read ({error}); check the download.") from error
    if images.ndim == 0:
        raise InvalidInputError(f"{path}: {images_key!r} is a single value, not images; save it again.")
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or len(labels) != len(images) or labels.dtype.kind not in "iu":
        raise InvalidInputError(
            f"{path}: {labels_key!r} is {labels.dtype} of shape {labels.shape}, expected one integer for "
            f"each of the {len(images)} entries of {images_key!r}; recode it."
        )
    source = f"{path}: {images_key!r}"
    return _levels(_channels_first(images, source), source), label_tensor(labels.tolist(), source=str(path))


def _channels_first(images: npt.NDArray[Any], source: str) -> npt.NDArray[Any]:
    if images.ndim == 3:
        return images[:, np.newaxis]
    if images.ndim == 4:
        first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
        if first and not last:
            return images
        if last and not first:
            return images.transpose(0, 3, 1, 2)
    raise InvalidInputError(
        f"{source} has shape {images.shape}, from which the axis of 1 or 3 channels is unclear; "
        "save it as (N, H, W), (N, H, W, C) or (N, C, H, W)."
    )


def _levels(images: npt.NDArray[Any], source: str) -> Tensor:
    """Return uint8, or float32 in [0, 1] where the values are such."""
    if images.dtype.kind not in "iuf":
        raise InvalidInputError(f"{source} has the type {images.dtype}; save integers or floats.")
    if not images.size:
        raise InvalidInputError(f"{source} is empty; save at least one image.")
    low, high = images.min(), images.max()
    fraction = images.dtype.kind == "f"
    # NaN fails every comparison, hence the negated form.
    if not (low >= 0 and high <= 255) or (
        fraction and high > 1 and not np.array_equal(images, np.floor(images))
    ):
        raise InvalidInputError(
            f"{source} has {images.dtype} values from {low:g} to {high:g}; give whole numbers from 0 to 255, "
            "or floats in [0, 1] (normalisation belongs into the model, see --mean and --std)."
        )
    kind = np.float32 if fraction and high <= 1 else np.uint8
    return torch.from_numpy(np.ascontiguousarray(images, dtype=kind))
