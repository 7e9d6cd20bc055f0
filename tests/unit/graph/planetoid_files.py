"""Write the files of Planetoid as Python 2 wrote them, byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def text(value: bytes) -> bytes:
    if len(value) < 256:
        return b"U" + bytes([len(value)]) + value
    return b"T" + struct.pack("<i", len(value)) + value


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def array(values: np.ndarray) -> bytes:
    shape = b"(" + b"".join(number(length) for length in values.shape) + b"t"
    blank = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    name = values.dtype.str[1:].encode()
    state = b"(K\x03" + text(b"<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    kind = b"cnumpy\ndtype\n" + text(name) + b"K\x00K\x01\x87R" + state
    return blank + b"(K\x01" + shape + kind + b"\x89" + text(values.tobytes()) + b"tb"


def matrix(dense: np.ndarray, **changed: bytes) -> bytes:
    """Pickle a scipy.sparse.csr_matrix; ``changed`` replaces attributes by other pickled values."""
    rows, columns = dense.nonzero()
    ends = np.concatenate([[0], np.cumsum((dense != 0).sum(1))])
    parts = {
        "format": text(b"csr"),
        "_shape": number(dense.shape[0]) + number(dense.shape[1]) + b"\x86",
        "indptr": array(ends.astype("<i4")),
        "indices": array(columns.astype("<i4")),
        "data": array(dense[rows, columns].astype("<f4")),
        "maxprint": number(50),
    } | changed
    items = b"".join(text(key.encode()) + value for key, value in parts.items())
    return b"\x80\x02cscipy.sparse.csr\ncsr_matrix\n)\x81}(" + items + b"ub."


def lists(graph: Mapping[int, Sequence[int]]) -> bytes:
    """Pickle a ``defaultdict(list)``."""
    items = b"".join(
        number(node) + b"](" + b"".join(number(n) for n in neighbours) + b"e"
        for node, neighbours in graph.items()
    )
    return b"\x80\x02ccollections\ndefaultdict\nc__builtin__\nlist\n\x85R(" + items + b"u."


def one_hot(labels: Sequence[int], classes: int = 3) -> bytes:
    rows = np.zeros((len(labels), classes), dtype="<i4")
    for row, label in enumerate(labels):
        if label >= 0:
            rows[row, label] = 1
    return b"\x80\x02" + array(rows) + b"."


def write(folder: Path, data: str = "cora", changed: Mapping[str, bytes] | None = None) -> Path:
    """Write a data set of six nodes, of which 4 is in neither part and has no features."""
    words = np.array([[1, 0, 0], [0, 1, 1], [0, 1, 0]], dtype="<f4")
    tests = np.array([[0, 0, 1], [1, 1, 0]], dtype="<f4")
    files = {
        "allx": matrix(words),
        "ally": one_hot([0, 1, 2]),
        "tx": matrix(tests),
        "ty": one_hot([2, 0]),
        "graph": lists({0: [1, 3], 1: [0, 2, 2], 2: [1], 3: [0, 3], 4: [], 5: [2]}),
        "test.index": b"5\n3\n",
    } | {key.replace("_", "."): value for key, value in (changed or {}).items()}
    folder.mkdir(exist_ok=True)
    for part, content in files.items():
        (folder / f"ind.{data}.{part}").write_bytes(content)
    return folder
