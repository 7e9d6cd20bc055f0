"""Labels and class names: checks on what files claim, and the order that the model expects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unbackdoor.errors import InvalidInputError
from unbackdoor.types import LabelledImages

MAX_CLASSES = 100_000
"""Labels at or above this are refused: counting classes takes memory in proportion to the largest."""


def label_tensor(values: Sequence[int], *, source: str, class_names: Sequence[str] = ()) -> Tensor:
    """Check labels that come from a file.

    Args:
        values: One integer per image.
        source: How error messages call the data set.
        class_names: The names of the classes where they are known.

    Returns:
        int64 ``(N,)``.

    Raises:
        InvalidInputError: If a label is negative, has no name among known names, or is absurdly large.
    """
    bound = len(class_names) or MAX_CLASSES
    if values and not (min(values) >= 0 and max(values) < bound):
        raise InvalidInputError(
            f"{source} has labels from {min(values)} to {max(values)}, outside 0 to {bound - 1}; "
            "recode them, and remove unlabelled images."
        )
    return torch.tensor(values, dtype=torch.int64)


def in_order(data: LabelledImages, class_names: Sequence[str]) -> LabelledImages:
    """Number the classes in the order that the user gave.

    Data with class names is renumbered by name; for data without, the names are taken as those of
    class 0, 1, ...

    Args:
        data: The images as read.
        class_names: All names, entry ``i`` for class ``i``.

    Raises:
        InvalidInputError: If names occur twice, or the data has other classes than those.
    """
    names = tuple(class_names)
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InvalidInputError(f"the class names {_listed(twice)} are given twice; name each class once.")
    if not data.class_names:
        if data.num_classes > len(names):
            raise InvalidInputError(
                f"the data has labels up to {data.num_classes - 1}, but {len(names)} class names were given; "
                "name every class."
            )
        return LabelledImages(data.images, data.labels, names)
    if len(set(data.class_names)) != len(data.class_names):
        twice = sorted({name for name in data.class_names if data.class_names.count(name) > 1})
        raise InvalidInputError(
            f"the data has several classes called {_listed(twice)}, so names cannot order them; leave "
            "the class names out."
        )
    _check_same_names(data.class_names, names)
    new_label = torch.tensor([names.index(name) for name in data.class_names], dtype=torch.int64)
    return LabelledImages(data.images, new_label[data.labels], names)


def _check_same_names(found: Sequence[str], given: Sequence[str]) -> None:
    missing = sorted(set(given) - set(found))
    extra = sorted(set(found) - set(given))
    if missing or extra:
        differ = [f"missing in the data {_listed(missing)}"] if missing else []
        differ += [f"not among the names {_listed(extra)}"] if extra else []
        raise InvalidInputError(
            f"the classes of the data differ from the class names given: {', '.join(differ)}; correct the "
            "names or the folders."
        )


def _listed(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return (shown or "none") + (f" and {len(names) - most} more" if len(names) > most else "")
