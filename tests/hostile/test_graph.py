"""Graphs from strangers: Planetoid files are pickles, and nothing in them may run."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from unbackdoor.errors import InvalidInputError, UnbackdoorError, UnsafeFileError
from unbackdoor.graph import planetoid
from unbackdoor.graph.files import load_graph, load_network, load_trigger
from unbackdoor.graph.planetoid import read_planetoid
from unbackdoor.models.checkpoint import write_tensors

from .build import EvalPayload, Payload

PARTS = ("allx", "ally", "tx", "ty", "graph")


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < 5


def folder_with(folder: Path, part: str, content: bytes) -> Path:
    for name in (*PARTS, "test.index"):
        (folder / f"ind.cora.{name}").write_bytes(b"\x80\x02}." if name != "test.index" else b"0\n")
    (folder / f"ind.cora.{part}").write_bytes(content)
    return folder


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("payload", [Payload, EvalPayload])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_payloads_do_not_run(tmp_path: Path, part: str, payload: type[Payload], protocol: int) -> None:
    marker = tmp_path / "ran"
    content = pickle.dumps(payload(marker), protocol=protocol)
    with pytest.raises(UnbackdoorError):
        read_planetoid(folder_with(tmp_path, part, content), "cora")
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        # An object of an allowed class with arguments, and of something that is no class.
        b"\x80\x02cscipy.sparse.csr\ncsr_matrix\nK\x01\x85\x81.",
        b"\x80\x02}(U\x01aK\x01u)\x81.",
        # Of a class that is not allowed.
        b"\x80\x02csubprocess\nPopen\n)\x81.",
        # By protocol 4, whose imports take computed names.
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.",
    ],
)
def test_objects_are_made_of_allowed_classes_alone(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UnsafeFileError, match="Nothing in the file was executed"):
        read_planetoid(folder_with(tmp_path, "allx", content), "cora")


@pytest.mark.parametrize("part", ["ally", "graph"])
def test_objects_are_made_where_matrices_are_expected_alone(tmp_path: Path, part: str) -> None:
    content = b"\x80\x02cscipy.sparse.csr\ncsr_matrix\n)\x81."
    with pytest.raises(UnbackdoorError):
        read_planetoid(folder_with(tmp_path, part, content), "cora")


def test_a_dictionary_in_a_dictionary_of_lists_is_no_graph(tmp_path: Path) -> None:
    content = b"\x80\x02ccollections\ndefaultdict\nc__builtin__\nlist\n\x85R(K\x00}u."
    with pytest.raises(UnbackdoorError):
        read_planetoid(folder_with(tmp_path, "graph", content), "cora")


def graph_file(path: Path, **changed: torch.Tensor) -> Path:
    tensors = {
        "words": torch.tensor([[0, 1], [1, 0]], dtype=torch.int32),
        "values": torch.ones(2),
        "shape": torch.tensor([2, 2, 2]),
        "edges": torch.tensor([[0], [1]], dtype=torch.int32),
        "labels": torch.tensor([0, -1], dtype=torch.int32),
    } | changed
    write_tensors(tensors, path)
    return path


def test_a_sound_graph_is_read(tmp_path: Path) -> None:
    graph = load_graph(graph_file(tmp_path / "graph.safetensors"))
    assert graph.features.tolist() == [[0, 1], [1, 0]]
    assert graph.num_classes == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": torch.tensor([2**40, 2**20, 2])},
        {"shape": torch.tensor([-2, -2, 2])},
        {"shape": torch.tensor([2, 2])},
        {"shape": torch.tensor([2, 2, 2**40])},
        {"words": torch.tensor([[0, 9], [1, 0]])},
        {"words": torch.tensor([[0, -1], [1, 0]])},
        {"words": torch.zeros(3, 2)},
        {"values": torch.ones(5)},
        {"values": torch.tensor([1.0, torch.nan])},
        {"edges": torch.tensor([[0], [7]])},
        {"edges": torch.tensor([[1], [0]])},
        {"edges": torch.zeros(3, 1)},
        {"labels": torch.tensor([0, 5])},
        {"labels": torch.tensor([0, -7])},
        {"labels": torch.tensor([0])},
    ],
)
def test_unsound_graphs_are_refused(tmp_path: Path, changed: dict[str, torch.Tensor]) -> None:
    with pytest.raises(InvalidInputError):
        load_graph(graph_file(tmp_path / "graph.safetensors", **changed))


def test_a_list_that_all_nodes_share(tmp_path: Path) -> None:
    # One list of 2,000 nodes, named by 2,000 nodes: four million edges in a file of some kilobytes.
    numbers = b"".join(b"M" + node.to_bytes(2, "little") for node in range(2000))
    items = (
        b"K\x00]("
        + numbers
        + b"eq\x01"
        + b"".join(b"M" + node.to_bytes(2, "little") + b"h\x01" for node in range(1, 2000))
    )
    content = b"\x80\x02ccollections\ndefaultdict\nc__builtin__\nlist\n\x85R(" + items + b"u."
    with pytest.raises(InvalidInputError, match="more than 1000000 edges"):
        planetoid._edges(folder_with(tmp_path, "graph", content) / "ind.cora.graph", 2708)


def test_a_trigger_that_claims_a_huge_layer(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors({"body.0.weight": torch.zeros(50_000, 1), "words.weight": torch.zeros(3, 1)}, path)
    with pytest.raises(InvalidInputError, match="no trigger"):
        load_trigger(path)


def test_graphs_are_no_networks_and_no_triggers(tmp_path: Path) -> None:
    path = graph_file(tmp_path / "graph.safetensors")
    with pytest.raises(InvalidInputError, match="no graph network"):
        load_network(path)
    with pytest.raises(InvalidInputError, match="no trigger"):
        load_trigger(path)
