"""Find splits and classes in the names of files, for folders and archives alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from unbackdoor.errors import InvalidInputError

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)
"""File names that count as images, in lower case."""

DEFAULT_SPLIT = "train"
"""What is read unless the caller says otherwise; sources without splits accept it."""

_CANONICAL = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
_EXPECTED = "one sub-folder per class with its images inside (cat/1.png, dog/2.png, ...)"


@dataclass(frozen=True)
class Layout:
    """Which image files to read, and what they show.

    Args:
        paths: Relative paths of the images, sorted by class and name.
        labels: One class number per path.
        class_names: The names of the class folders, sorted.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]


def canonical_split(name: str) -> str | None:
    """Return ``"train"``, ``"validation"`` or ``"test"`` where ``name`` is a word for it, else None."""
    return _CANONICAL.get(name.lower())


def choose_splits(available: Sequence[str], wanted: str | None, *, source: str) -> tuple[str, ...]:
    """Return which of the ``available`` splits to read.

    Args:
        available: The splits of the source, in order; empty for a source without splits.
        wanted: The split asked for; None for all there are. ``"val"`` also finds ``"validation"``.
        source: How error messages call the data set.

    Raises:
        InvalidInputError: If the source lacks the split; the message lists those that exist. A source
            without splits accepts None and the default, ``"train"``.
    """
    if not available and wanted in (None, DEFAULT_SPLIT):
        return ()
    if wanted is None:
        return tuple(available)
    exact = [name for name in available if name == wanted]
    similar = [name for name in available if canonical_split(name) == (canonical_split(wanted) or "")]
    if not exact and not similar:
        what = (
            f"it has the splits {', '.join(available)}; choose one of what it has"
            if available
            else f"it has no splits; ask for all of it with --split {DEFAULT_SPLIT}, or sort its images into "
            "folders train and test"
        )
        raise InvalidInputError(f"{source} has no split {wanted!r}, {what}.")
    return tuple((exact or similar)[:1])


def find_layout(files: Sequence[str], folders: Sequence[str], *, split: str | None, source: str) -> Layout:
    """Find splits and classes in the paths of an image folder.

    Class folders are numbered by their sorted names, as elsewhere in the PyTorch world (so "10" comes
    before "2"). An empty folder counts as a class, which keeps the numbers of the others. Images may
    lie deeper inside a class folder; those beside the class folders are ignored.

    Args:
        files: Relative paths with ``/``, of all files.
        folders: Relative paths of all folders, empty ones among them.
        split: The split asked for, or None for all.
        source: How error messages call the data set.

    Raises:
        InvalidInputError: If the files are not laid out in that way, or the split is absent.
    """
    files, folders = _visible(files), _visible(folders)
    images = [path for path in files if is_image(path)]
    if not any("/" in path for path in images):
        raise InvalidInputError(
            f"{source} holds {len(images)} images and none in a class folder; it needs {_EXPECTED}."
        )
    splits = _splits(images, source)
    chosen = choose_splits(splits, split, source=source)
    if not chosen:
        return _layout_of(_nested(images), "", _classes(files, folders, source))
    names = _common_classes(files, folders, splits, chosen, source)
    parts = [_layout_of(_nested(_inside(images, name)), f"{name}/", names) for name in chosen]
    paths, labels = (
        [value for part in parts for value in getattr(part, field)] for field in ("paths", "labels")
    )
    return Layout(tuple(paths), tuple(labels), names)


def is_image(path: str) -> bool:
    """Say whether the file name is that of an image."""
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def _layout_of(paths: Sequence[str], prefix: str, names: tuple[str, ...]) -> Layout:
    number = {name: index for index, name in enumerate(names)}
    return Layout(tuple(prefix + path for path in paths), tuple(number[_top(path)] for path in paths), names)


def _visible(paths: Sequence[str]) -> list[str]:
    return sorted(
        path
        for path in paths
        if not any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))
    )


def _top(path: str) -> str:
    return path.split("/", 1)[0]


def _nested(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if "/" in path]


def _inside(paths: Sequence[str], folder: str) -> list[str]:
    return [path.removeprefix(f"{folder}/") for path in paths if path.startswith(f"{folder}/")]


def _splits(images: Sequence[str], source: str) -> tuple[str, ...]:
    tops = sorted({_top(path) for path in _nested(images)})
    named = [top for top in tops if canonical_split(top)]
    deep = {_top(path) for path in images if path.count("/") > 1}
    if len(named) == len(tops):
        order = ("train", "validation", "test")
        return tuple(sorted(named, key=lambda name: order.index(canonical_split(name) or "")))
    if deep.intersection(named):
        others = [top for top in tops if top not in named]
        raise InvalidInputError(
            f"{source} mixes split folders ({', '.join(named)}) with others ({', '.join(others[:5])}); "
            "point to one of them, or move the others away."
        )
    return ()


def _classes(files: Sequence[str], folders: Sequence[str], source: str) -> tuple[str, ...]:
    filled = {_top(path) for path in _nested(files)}
    with_images = {_top(path) for path in _nested(files) if is_image(path)}
    if not with_images:
        raise InvalidInputError(f"{source} holds no images in class folders; it needs {_EXPECTED}.")
    if filled - with_images:
        raise InvalidInputError(
            f"{source} has folders with files but no images ({', '.join(sorted(filled - with_images)[:5])}), "
            "so its classes are unclear; move those folders away."
        )
    return tuple(sorted(with_images | {_top(folder) for folder in folders}))


def _common_classes(
    files: Sequence[str], folders: Sequence[str], splits: Sequence[str], chosen: Sequence[str], source: str
) -> tuple[str, ...]:
    """Return the classes of the training split, or of all splits where there is none."""
    by_split = {
        name: _classes(_inside(files, name), _inside(folders, name), f"{source}/{name}") for name in splits
    }
    reference = next((name for name in splits if canonical_split(name) == "train"), None)
    names = by_split[reference] if reference else tuple(sorted(set().union(*by_split.values())))
    for name in chosen:
        extra = sorted(set(by_split[name]) - set(names))
        if extra:
            raise InvalidInputError(
                f"{source}/{name} has class folders that the training split lacks ({', '.join(extra[:5])}), "
                "so labels would not agree; give both splits the same folders."
            )
    return names
