from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError, UnbackdoorError
from unbackdoor.graph import read_planetoid
from unbackdoor.graph.laboratory import open_graph

from .planetoid_files import array, lists, matrix, number, one_hot, write


def test_files_are_read_rows_put_in_place_and_nodes_without_a_class_left_out(tmp_path: Path) -> None:
    graph = read_planetoid(write(tmp_path), "cora")
    # Node 4 is neither in the first part nor in the test index.
    assert graph.labels.tolist() == [0, 1, 2, 0, 2]
    assert graph.edges.tolist() == [[0, 0, 1, 2], [1, 3, 2, 4]]
    expected = [[1, 0, 0], [0, 0.5, 0.5], [0, 1, 0], [0.5, 0.5, 0], [0, 0, 1]]
    assert torch.allclose(graph.features, torch.tensor(expected))


def test_graphs_are_found_by_folder_and_name(tmp_path: Path) -> None:
    write(tmp_path)
    assert len(open_graph(str(tmp_path), rng.generator(0))) == 5
    write(tmp_path, "citeseer")
    assert len(open_graph(str(tmp_path / "citeseer"), rng.generator(0))) == 5
    with pytest.raises(InvalidInputError, match="citeseer, cora"):
        open_graph(str(tmp_path), rng.generator(0))
    with pytest.raises(InvalidInputError, match="there is no graph"):
        open_graph(str(tmp_path / "pubmed"), rng.generator(0))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"test_index": b"3\n3\n"}, "twice"),
        ({"test_index": b"3 x"}, "one number a line"),
        ({"test_index": b""}, "one number a line"),
        ({"test_index": b"1\n3\n"}, "test nodes from 1"),
        ({"test_index": b"3\n999999999\n"}, "too many"),
        ({"tx": matrix(np.ones((2, 4)))}, "4 columns"),
        ({"tx": matrix(np.ones((3, 3)))}, "3 rows"),
        ({"ty": one_hot([1])}, "1 rows"),
        ({"ally": one_hot([0, 1, 2], 4)}, "columns"),
        ({"ally": b"\x80\x02" + array(np.full((3, 3), 2, dtype="<i4")) + b"."}, "0 and 1"),
        ({"graph": lists({0: [6]})}, "from 0 to 5"),
        ({"graph": lists({0: [-1]})}, "from 0 to 5"),
        ({"graph": lists({})}, "dictionary of lists"),
        ({"graph": b"\x80\x02}."}, "dictionary of lists"),
        ({"allx": b"\x80\x02}."}, "sparse matrix"),
        ({"allx": matrix(np.ones((3, 3)), indices=array(np.full(9, 3, dtype="<i4")))}, "fit together"),
        ({"allx": matrix(np.ones((3, 3)), indices=array(np.full(9, -1, dtype="<i4")))}, "fit together"),
        ({"allx": matrix(np.ones((3, 3)), indptr=array(np.array([0, 9, 3, 9], dtype="<i4")))}, "fit"),
        ({"allx": matrix(np.ones((3, 3)), data=array(np.full(9, np.inf, dtype="<f4")))}, "fit together"),
        ({"allx": matrix(np.ones((3, 3)), _shape=number(3) + number(2**30) + b"\x86")}, "sparse matrix"),
        ({"allx": matrix(np.ones((3, 3)), data=number(1))}, "sparse matrix"),
        ({"allx": matrix(np.ones((3, 3)))[:-30]}, "damaged"),
    ],
)  # fmt: skip
def test_unsound_files_are_refused_in_words(
    tmp_path: Path, changed: dict[str, bytes], complaint: str
) -> None:
    write(tmp_path, changed=changed)
    with pytest.raises(UnbackdoorError, match=complaint):
        read_planetoid(tmp_path, "cora")


def test_missing_files_are_named(tmp_path: Path) -> None:
    (write(tmp_path) / "ind.cora.tx").unlink()
    with pytest.raises(InvalidInputError, match=r"lacks ind\.cora\.tx"):
        read_planetoid(tmp_path, "cora")
    with pytest.raises(InvalidInputError, match="found there: cora"):
        read_planetoid(tmp_path, "pubmed")
