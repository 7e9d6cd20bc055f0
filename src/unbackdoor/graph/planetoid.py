"""Read Cora, Citeseer and Pubmed in the files of Planetoid, which are pickles, without trusting them.

Nothing is unpickled into what the files ask for: see ``data/stored_arrays.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unbackdoor.data.stored_arrays import ARRAY_STAND_INS, StoredArray, text, unpickle
from unbackdoor.errors import InvalidInputError
from unbackdoor.graph.data import Graph, undirected
from unbackdoor.graph.generate import normalised
from unbackdoor.models.pickle_guard import OBJECT_OPCODES

MAX_FILE_BYTES = 64 * 2**20
"""Larger files are refused; the largest official one, Pubmed's ``allx``, has some 12 million bytes."""
MAX_ELEMENTS = 2**28
"""Most entries of the matrix of features, which is held in full."""

_REMEDY = "Get the data set from its authors' page."


class _StoredMatrix:
    """What a pickle says about a sparse matrix, unbuilt."""

    def __init__(self) -> None:
        self.state: Mapping[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.state = {text(key): value for key, value in state.items()} if isinstance(state, dict) else {}


class _StoredLists(dict[Any, Any]):
    """Stands in for a dictionary of lists; what it is made of is ignored."""

    def __init__(self, *arguments: object) -> None:
        super().__init__()


_MATRIX_STAND_INS = {
    **ARRAY_STAND_INS,
    "scipy.sparse.csr.csr_matrix": _StoredMatrix,
    "scipy.sparse._csr.csr_matrix": _StoredMatrix,
}
_GRAPH_STAND_INS = {
    "collections.defaultdict": _StoredLists,
    "__builtin__.list": _StoredLists,
    "builtins.list": _StoredLists,
}


def planetoid_names(folder: Path) -> list[str]:
    """Return the data sets whose files lie in ``folder``, such as ``["citeseer", "cora"]``."""
    return sorted(path.name.split(".")[1] for path in folder.glob("ind.*.graph"))


def read_planetoid(folder: Path, name: str) -> Graph:
    """Read one data set: ``ind.NAME.{allx,ally,tx,ty,graph,test.index}``.

    Source: Yang, Cohen, Salakhutdinov, "Revisiting Semi-Supervised Learning with Graph Embeddings", ICML
    2016, arXiv 1603.08861; its fixed split (``x``, ``y``) is not used. Rows of features are divided by their
    sum. Nodes that have neither features nor a class (15 in Citeseer) are left out.

    Args:
        folder: Where the files are.
        name: ``cora``, ``citeseer`` or ``pubmed``.

    Raises:
        InvalidInputError: If a file is missing or holds something else.
        UnsafeFileError: If a file is a pickle that does more than hold data.
    """
    files = {
        part: folder / f"ind.{name}.{part}" for part in ("allx", "ally", "tx", "ty", "graph", "test.index")
    }
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        known = ", ".join(planetoid_names(folder)) or "none"
        raise InvalidInputError(
            f"{folder} lacks {', '.join(missing)}; found there: {known}. Put all files of one there."
        )
    places = _test_places(files["test.index"])
    features = _joined([_matrix(files["allx"]), _matrix(files["tx"])], places, files["tx"])
    classes = _joined([_one_hot(files["ally"]), _one_hot(files["ty"])], places, files["ty"])
    if len(features) != len(classes):
        raise InvalidInputError(
            f"{folder} has {len(features)} rows of features and {len(classes)} of classes for {name}; "
            "restore the official files."
        )
    labels = torch.where(classes.any(1), classes.argmax(1), -1)
    graph = Graph(normalised(features), _edges(files["graph"], len(features)), labels)
    return graph.induced(graph.labelled)


def _joined(parts: list[Tensor], places: Tensor, path: Path) -> Tensor:
    """Put the rows of the test part where the index says, those of the other part before them."""
    first, second = parts
    if len(second) != len(places) or first.shape[1] != second.shape[1] or int(places.min()) < len(first):
        raise InvalidInputError(
            f"{path} has {len(second)} rows of {second.shape[1]} columns for {len(places)} test nodes from "
            f"{int(places.min())} on, beside {len(first)} rows of {first.shape[1]}; restore the files."
        )
    rows = int(places.max()) + 1
    if rows > 2 * (len(first) + len(second)) or rows * first.shape[1] > MAX_ELEMENTS:
        raise InvalidInputError(f"{path} speaks of {rows} nodes, too many for its rows; restore it.")
    whole = torch.zeros(rows, first.shape[1])
    whole[: len(first)] = first
    whole[places] = second
    return whole


def _test_places(path: Path) -> Tensor:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InvalidInputError(f"{path} is larger than any official file; restore that one.")
    words = path.read_bytes().split()
    if not words or not all(word.isdigit() and len(word) < 10 for word in words):
        raise InvalidInputError(f"{path} must hold one number a line; restore the official file.")
    places = torch.tensor([int(word) for word in words])
    if len(places.unique()) != len(places):
        raise InvalidInputError(f"{path} names a node twice; restore the official file.")
    return places


def _matrix(path: Path) -> Tensor:
    stored = unpickle(
        path, _MATRIX_STAND_INS, most_bytes=MAX_FILE_BYTES, part="the matrix", remedy=_REMEDY,
        opcodes=OBJECT_OPCODES,
    )  # fmt: skip
    state = stored.state if isinstance(stored, _StoredMatrix) else {}
    values = _array(state.get("data"), ("f4", "f8"))
    columns, ends = (_array(state.get(key), ("i4", "i8")) for key in ("indices", "indptr"))
    shape = state.get("_shape")
    if values is None or columns is None or ends is None or not _is_shape(shape):
        raise InvalidInputError(
            f"{path} does not hold a sparse matrix of numbers; restore the official file."
        )
    rows, width = shape  # type: ignore[misc]
    counts = np.diff(ends)
    sound = (
        len(ends) == rows + 1 and len(values) == len(columns) == ends[-1] and ends[0] == 0
        and bool((counts >= 0).all()) and bool(((columns >= 0) & (columns < width)).all())
        and bool(np.isfinite(values).all())
    )  # fmt: skip
    if not sound:
        raise InvalidInputError(f"the parts of the matrix in {path} do not fit together; restore the file.")
    dense = torch.zeros(rows, width)
    owners = np.repeat(np.arange(rows), counts)
    dense[torch.from_numpy(owners), torch.from_numpy(columns.astype(np.int64))] = torch.from_numpy(
        values.astype(np.float32)
    )
    return dense


def _is_shape(shape: object) -> bool:
    whole = isinstance(shape, tuple) and len(shape) == 2 and all(type(n) is int and n >= 1 for n in shape)
    return whole and shape[0] * shape[1] <= MAX_ELEMENTS  # type: ignore[index]


def _array(stored: object, kinds: tuple[str, ...]) -> np.ndarray[Any, Any] | None:
    if not isinstance(stored, StoredArray):
        return None
    return next((a for kind in kinds if (a := stored.values(kind, dimensions=1)) is not None), None)


def _one_hot(path: Path) -> Tensor:
    stored = unpickle(path, ARRAY_STAND_INS, most_bytes=MAX_FILE_BYTES, part="the labels", remedy=_REMEDY)
    if isinstance(stored, StoredArray):
        for kind in ("i4", "i8"):
            found = stored.values(kind, dimensions=2)
            if found is not None and bool(((found == 0) | (found == 1)).all()) and found.shape[1]:
                return torch.from_numpy(found.astype(np.float32))
    raise InvalidInputError(f"{path} does not hold one row of 0 and 1 a node; restore the official file.")


MOST_EDGES = 1_000_000
"""Pubmed, the largest of these graphs, has 88,676 entries."""


def _edges(path: Path, nodes: int) -> Tensor:
    stored = unpickle(path, _GRAPH_STAND_INS, most_bytes=MAX_FILE_BYTES, part="the graph", remedy=_REMEDY)
    lists = list(stored.items()) if isinstance(stored, _StoredLists) else []
    # A pickle can name one list any number of times: a small file then holds no end of edges.
    if sum(len(each) for _, each in lists if isinstance(each, list)) > MOST_EDGES:
        raise InvalidInputError(f"{path} holds more than {MOST_EDGES} edges; restore the official file.")
    pairs = [
        (node, neighbour)
        for node, neighbours in lists
        for neighbour in (neighbours if isinstance(neighbours, list) else [None])
    ]
    if not pairs or not all(type(n) is int and 0 <= n < nodes for pair in pairs for n in pair):
        raise InvalidInputError(
            f"{path} does not hold a dictionary of lists of nodes from 0 to {nodes - 1}; restore the "
            "official file."
        )
    return undirected(torch.tensor(pairs).t())
