"""Read old data sets that are pickles of arrays, without trusting them.

A file is first walked by ``check_pickle``. It is then unpickled into inert stand-ins: not even numpy's own
constructors are called by the file, and values are taken from the bytes that it stored.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unbackdoor.errors import InvalidInputError
from unbackdoor.models.pickle_guard import DATA_OPCODES, check_pickle


class StoredArray:
    """What a pickle says about an array, unbuilt."""

    def __init__(self, *arguments: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def values(self, kind: str, *, dimensions: int) -> np.ndarray[Any, Any] | None:
        """Build the array, in memory of its own; None if it is not of this kind or is inconsistent.

        Args:
            kind: Type as in ``numpy.dtype.str`` without byte order, such as ``"u1"``, ``"i4"`` or ``"f4"``;
                more than one byte is read as little-endian.
            dimensions: Number of axes.
        """
        try:
            _, shape, stored, fortran, raw = self.state
            sound = (
                isinstance(stored, StoredType)
                and text(stored.arguments[0]) == kind
                and stored.little_endian
                and len(shape) == dimensions
                and all(type(length) is int and length >= 0 for length in shape)
                and isinstance(raw, bytes)
                and len(raw) == math.prod(shape) * int(kind[1:])
            )
        except (TypeError, ValueError, IndexError):
            sound = False
        if not sound:
            return None
        flat = np.frombuffer(raw, dtype=np.dtype(f"<{kind}"))
        return flat.reshape(shape, order="F" if fortran else "C").copy()


class StoredType:
    """What a pickle says about a dtype, unbuilt."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.little_endian = True

    def __setstate__(self, state: object) -> None:
        """Take the byte order, and ignore fields: only plain numbers are read."""
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "<"
        self.little_endian = text(order) in ("<", "|", "=")


def _encode(content: str, encoding: str | bytes) -> bytes:
    """Stand in for ``_codecs.encode``, by which Python 3 writes bytes in protocol 2."""
    if text(encoding) != "latin1":
        raise ValueError(f"unexpected encoding {encoding!r}")
    return content.encode("latin1")


ARRAY_STAND_INS: Mapping[str, Any] = {
    "numpy.core.multiarray._reconstruct": StoredArray,
    "numpy._core.multiarray._reconstruct": StoredArray,
    "numpy.ndarray": StoredArray,
    "numpy.dtype": StoredType,
    "_codecs.encode": _encode,
}
"""All that pickled arrays import, and what is called in its place."""


def text(value: object) -> str:
    """Return what Python 2 stored as bytes, and anything else, as text."""
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def unpickle(
    path: Path,
    stand_ins: Mapping[str, Any],
    *,
    most_bytes: int,
    part: str,
    remedy: str,
    opcodes: frozenset[str] = DATA_OPCODES,
) -> object:
    """Unpickle a file of which every import is replaced.

    Args:
        path: The file.
        stand_ins: The only imports allowed, and what is called in their place.
        most_bytes: Larger files are refused unread.
        part: What the file is, for messages.
        remedy: A sentence that says what to do.
        opcodes: Allowed pickle instructions.

    Raises:
        InvalidInputError: If the file is too large or damaged.
        UnsafeFileError: If it is a pickle that does more than hold data.
    """
    size = path.stat().st_size
    if size > most_bytes:
        raise InvalidInputError(
            f"{path} has {size} bytes, more than the {most_bytes} of any official file; restore that one."
        )
    stream = path.read_bytes()
    check_pickle(
        stream,
        source=str(path),
        allowed_imports=frozenset(stand_ins),
        allowed_opcodes=opcodes,
        part=part,
        remedy=remedy,
    )
    try:
        return _Unpickler(io.BytesIO(stream), stand_ins).load()
    except Exception as error:  # damaged pickles raise many unrelated types
        raise InvalidInputError(f"{path} cannot be read ({error}); restore the official file.") from error


class _Unpickler(pickle.Unpickler):
    """Resolves no import outside its stand-ins; used after ``check_pickle`` only."""

    def __init__(self, file: io.BytesIO, stand_ins: Mapping[str, Any]) -> None:
        super().__init__(file, encoding="bytes")
        self.stand_ins = stand_ins

    def find_class(self, module: str, name: str) -> object:
        try:
            return self.stand_ins[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"it imports {module}.{name}") from None
