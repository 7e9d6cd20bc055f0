"""The one door to data: find out what a path holds, and read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from unbackdoor.data.cifar_batches import has_batches, read_cifar_batches
from unbackdoor.data.digits import NAME as DIGITS
from unbackdoor.data.digits import read_digits
from unbackdoor.data.folders import read_folder, read_loose, read_zip
from unbackdoor.data.images import MAX_PIXELS
from unbackdoor.data.labels import in_order
from unbackdoor.data.layout import DEFAULT_SPLIT, choose_splits, is_image
from unbackdoor.data.npz import is_npz, read_npz
from unbackdoor.data.parquet import find_parquet, read_parquet, read_parquet_folder
from unbackdoor.errors import InvalidInputError
from unbackdoor.types import LabelledImages

_KINDS = (
    "an image folder (one sub-folder per class) or a zip file of one, parquet files with images, an .npz "
    "file with images and labels, or CIFAR batches"
)


def load_images(
    path: Path | str,
    *,
    split: str | None = DEFAULT_SPLIT,
    image_size: int | None = None,
    limit: int | None = None,
    class_names: Sequence[str] | None = None,
) -> LabelledImages:
    """Read labelled images into memory from whatever ``path`` holds.

    What it is is found out from its content: an image folder, with or without folders for splits
    (``layout.find_layout``); a zip file of one; parquet files as on the Hugging Face hub, one or a folder
    (``parquet.read_parquet_folder``); an ``.npz`` file (``npz.read_npz``); CIFAR-10 or CIFAR-100 batches
    (``cifar_batches.read_cifar_batches``). Nothing in it is executed or extracted.

    Args:
        path: The file or folder, or ``"digits"`` for the embedded handwritten digits.
        split: Which split to read; None reads all. Sources without splits are read whole by None and by
            the default.
        image_size: Resize to this many pixels a side; needed where sizes differ.
        limit: Read only that many images, each class in proportion; the others are not decoded.
        class_names: The classes in the order of the model's outputs, where the data orders them
            differently or does not name them.

    Returns:
        The images, uint8 (or float32 from an ``.npz`` file of floats), with class names where known.

    Raises:
        InvalidInputError: If the path holds nothing readable, the split is absent (the message lists
            those that exist), or the classes are not ``class_names``.
        UnsafeFileError: If a file is unsafe to read.
        MissingDependencyError: If the format needs an absent optional package.

    Example:
        >>> load_images("digits", split="test", limit=100).images.shape
        torch.Size([100, 1, 16, 16])
    """
    if limit is not None and limit < 1:
        raise InvalidInputError(f"limit must be at least 1, got {limit}; leave it out to read all images.")
    _check_size(image_size)
    if path == DIGITS or (path == Path(DIGITS) and not Path(path).exists()):
        data = read_digits(split=split, image_size=image_size, limit=limit)
    else:
        data = _read(Path(path), split, image_size, limit)
    return data if class_names is None else in_order(data, class_names)


def load_samples(
    path: Path | str, *, split: str | None = None, image_size: int | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Read images whose labels are not needed, and what to call each.

    Args:
        path: An image file; a folder, of which all image files in it and its sub-folders are read; or
            whatever else ``load_images`` reads.
        split: Which split to read, where the data come in splits; of a folder of images its sub-folder.
            None reads all.
        image_size: Resize to this many pixels a side; needed where sizes differ.

    Returns:
        Images ``(N, C, H, W)``, uint8 (or float32 from an ``.npz`` file of floats); and a name each: the
        path of its file below the folder, or its row, from 0.

    Raises:
        InvalidInputError: If the path holds nothing readable, or the split is absent.
        UnsafeFileError: If a file is unsafe to read.
        MissingDependencyError: If the format needs an absent optional package.
    """
    place = Path(path)
    loose = place.is_dir() and not has_batches(place) and not find_parquet(place)
    if loose or (place.is_file() and is_image(place.name)):
        _check_size(image_size)
        return read_loose(_part_of(place, split), image_size=image_size)
    data = load_images(path, split=split, image_size=image_size)
    return data.images, tuple(f"row {row}" for row in range(len(data)))


def _part_of(place: Path, split: str | None) -> Path:
    if split is None or (place / split).is_dir():
        return place if split is None else place / split
    raise InvalidInputError(
        f"{place} has no sub-folder {split!r}; name the folder of the images, without a split."
    )


def _check_size(image_size: int | None) -> None:
    if image_size is not None and not 1 <= image_size <= int(MAX_PIXELS**0.5):
        raise InvalidInputError(
            f"image_size must be from 1 to {int(MAX_PIXELS**0.5)} pixels, got {image_size}; "
            "choose the model's."
        )


def _read(path: Path, split: str | None, image_size: int | None, limit: int | None) -> LabelledImages:
    if path.is_dir():
        return _read_folder(path, split, image_size, limit)
    if not path.is_file():
        raise InvalidInputError(
            f"{path} does not exist or is no file or folder; give {_KINDS}, or {DIGITS!r}."
        )
    kind = _kind_of(path)
    if kind == "parquet":
        choose_splits((), split, source=f"{path}, a single file,")
        return read_parquet(path, image_size=image_size, limit=limit)
    if kind == "npz":
        return read_npz(path, split=split, image_size=image_size, limit=limit)
    if kind == "zip":
        return read_zip(path, split=split, image_size=image_size, limit=limit)
    raise InvalidInputError(f"{path} is a file of an unknown kind; give {_KINDS}.")


def _read_folder(path: Path, split: str | None, image_size: int | None, limit: int | None) -> LabelledImages:
    if has_batches(path):
        return read_cifar_batches(path, split=split, image_size=image_size, limit=limit)
    if find_parquet(path):
        return read_parquet_folder(path, split=split, image_size=image_size, limit=limit)
    return read_folder(path, split=split, image_size=image_size, limit=limit)


def _kind_of(path: Path) -> str:
    """Return ``"parquet"``, ``"npz"``, ``"zip"`` or an empty text, by content and then by name."""
    with path.open("rb") as file:
        start = file.read(4)
    # A damaged file has no magic bytes; its name still tells which reader should complain.
    if start == b"PAR1" or path.suffix == ".parquet":
        return "parquet"
    if start[:2] == b"PK" or path.suffix in (".zip", ".npz"):
        return "npz" if path.suffix == ".npz" or is_npz(path) else "zip"
    return ""
