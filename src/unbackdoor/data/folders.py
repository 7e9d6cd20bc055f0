"""Read image folders, and zip files of image folders, without extracting them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from unbackdoor.data.archives import open_archive, read_member
from unbackdoor.data.images import MAX_FILE_BYTES, decode_all
from unbackdoor.data.labels import label_tensor
from unbackdoor.data.layout import Layout, canonical_split, find_layout, is_image
from unbackdoor.data.splits import spread
from unbackdoor.errors import InvalidInputError, UnsafeFileError
from unbackdoor.types import LabelledImages


def read_folder(
    path: Path, *, split: str | None, image_size: int | None = None, limit: int | None = None
) -> LabelledImages:
    """Read a folder with one sub-folder per class, possibly inside folders for splits.

    Args:
        path: The folder.
        split: Split to read where there are folders for splits; None reads all.
        image_size: Resize to this many pixels a side.
        limit: Read only that many images, each class in proportion.

    Raises:
        InvalidInputError: If the folder is laid out differently, or an image cannot be read.
    """
    files, folders = _walk(path)
    layout = find_layout(files, folders, split=split, source=str(path))
    return _read(layout, lambda name: _content(path / name), path, image_size, limit)


def read_loose(path: Path, *, image_size: int | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """Read an image file, or all image files in a folder and its sub-folders, without labels.

    Args:
        path: The file or folder.
        image_size: Resize to this many pixels a side.

    Returns:
        The images as ``decode_all`` returns them, and their paths below the folder, sorted.

    Raises:
        InvalidInputError: If there are none, or an image cannot be read.
    """
    alone = path.is_file()
    names = [path.name] if alone else sorted(name for name in _walk(path)[0] if _is_shown(name))
    folder = path.parent if alone else path
    images = decode_all(
        ((name, _content(folder / name)) for name in names), len(names), source=str(path), size=image_size
    )
    return images, tuple(name.encode("utf-8", "replace").decode() for name in names)


def read_zip(
    path: Path, *, split: str | None, image_size: int | None = None, limit: int | None = None
) -> LabelledImages:
    """Read a zip file of what ``read_folder`` reads; one folder around everything is tolerated.

    Args:
        path: The zip file; nothing is extracted to disk.
        split: As for ``read_folder``.
        image_size: As for ``read_folder``.
        limit: As for ``read_folder``.

    Raises:
        InvalidInputError: If it is laid out differently, or an image cannot be read.
        UnsafeFileError: If the archive has unsafe names or sizes.
    """
    with open_archive(path) as archive:
        _check_image_sizes(archive, path)
        names = [info.filename for info in archive.infolist()]
        files = [name for name in names if not name.endswith("/")]
        folders = [name.rstrip("/") for name in names if name.endswith("/")]
        around = _folder_around(files)
        layout = find_layout(
            _without(files, around), _without(folders, around), split=split, source=str(path)
        )
        return _read(
            layout,
            lambda name: read_member(archive, around + name, source=str(path)),
            path,
            image_size,
            limit,
        )


def _read(
    layout: Layout, read: Callable[[str], bytes], path: Path, image_size: int | None, limit: int | None
) -> LabelledImages:
    labels = label_tensor(layout.labels, source=str(path), class_names=layout.class_names)
    rows = spread(labels, limit)
    chosen = [layout.paths[row] for row in rows.tolist()]
    images = decode_all(
        ((f"{path.name}/{name}", read(name)) for name in chosen),
        len(chosen),
        source=str(path),
        size=image_size,
    )
    # Names that are no valid Unicode exist on disk, and no report can hold them.
    names = tuple(name.encode("utf-8", "replace").decode() for name in layout.class_names)
    return LabelledImages(images, labels[rows], names)


def _is_shown(name: str) -> bool:
    """Say whether a path is that of an image that is not hidden."""
    return is_image(name) and not Path(name).name.startswith(".")


MOST_LEVELS = 8
"""Folders in folders: links to folders beside each other could make exponentially many."""


def _walk(root: Path) -> tuple[list[str], list[str]]:
    """Return the relative paths of all files and of all folders below ``root``, links followed."""
    files: list[str] = []
    folders: list[str] = []
    for parent, inner, names in _walk_once(root):
        relative = parent.relative_to(root)
        files += [(relative / name).as_posix() for name in names]
        folders += [(relative / name).as_posix() for name in inner]
    return files, folders


def _walk_once(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    for parent, inner, names in os.walk(root, followlinks=True):
        # A link to a folder above would otherwise be followed for ever.
        above = {os.path.realpath(each) for each in Path(parent).parents if root in (each, *each.parents)}
        if os.path.realpath(parent) in above:
            inner.clear()
            continue
        if len(Path(parent).relative_to(root).parts) > MOST_LEVELS:
            raise InvalidInputError(
                f"{parent} lies more than {MOST_LEVELS} folders deep; flatten the folders, or remove "
                "links among them."
            )
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield Path(parent), inner, names


def _content(path: Path) -> bytes:
    try:
        # Opening a named pipe would block for ever.
        if not path.is_file():
            raise InvalidInputError(f"{path} is not a regular file; remove it.")
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read ({error}); check its permissions.") from error


def _check_image_sizes(archive: zipfile.ZipFile, path: Path) -> None:
    for info in archive.infolist():
        if info.file_size > MAX_FILE_BYTES and is_image(info.filename):
            raise UnsafeFileError(
                f"{path}: {info.filename!r} unpacks to {info.file_size} bytes, more than the "
                f"{MAX_FILE_BYTES} allowed for an image file; shrink the image."
            )


def _folder_around(files: list[str]) -> str:
    """Return the one folder that holds all class or split folders, with a slash, or an empty text."""
    images = [name for name in files if is_image(name) and not name.startswith(("__MACOSX/", "."))]
    tops = {name.split("/", 1)[0] for name in images}
    # With classes on top, images would lie one level below it: that folder is a class, not a wrapper.
    if len(tops) != 1 or any(name.count("/") < 2 for name in images):
        return ""
    top = tops.pop()
    return "" if canonical_split(top) else f"{top}/"


def _without(names: list[str], around: str) -> list[str]:
    return [name.removeprefix(around) for name in names if name.startswith(around) and name != around]
