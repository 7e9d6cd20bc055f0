"""Graphs, triggers and divisions in safetensors files; whatever is read is checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from unbackdoor.errors import InvalidInputError
from unbackdoor.graph.attacks.triggers import FixedTrigger, GeneratedTrigger, SubgraphTrigger
from unbackdoor.graph.data import Division, Graph
from unbackdoor.graph.gcn import GCN, Training
from unbackdoor.graph.purify import Defended
from unbackdoor.models.checkpoint import read_tensors, write_tensors

MAX_ELEMENTS = 2**28
"""Most entries of a matrix of features, which is held in full."""

_GRAPH_PARTS = ("words", "values", "shape", "edges", "labels")


def save_graph(graph: Graph, path: Path) -> None:
    """Write a graph; features are stored by their non-zeros.

    Raises:
        InvalidInputError: If the file cannot be written.
    """
    write_tensors(_packed(graph), path)


def load_graph(path: Path) -> Graph:
    """Read a graph that ``save_graph`` wrote; the file is untrusted.

    Raises:
        InvalidInputError: If the file is missing or holds no sound graph.
        UnsafeFileError: If it is no sound safetensors file.
    """
    return _unpacked(read_tensors(path), path)


def save_division(division: Division, path: Path) -> None:
    """Write the whole graph with the test and victim nodes; ``graph.safetensors`` has the training part."""
    known = division.training.labelled
    write_tensors(
        {**_packed(division.whole), "told": known, "test": division.test, "victims": division.victims}, path
    )


def load_division(path: Path) -> Division:
    """Read what ``save_division`` wrote.

    Raises:
        InvalidInputError: If the file is missing or unsound.
        UnsafeFileError: If it is no sound safetensors file.
    """
    tensors = read_tensors(path)
    whole = _unpacked(tensors, path)
    told, test, victims = (_nodes(tensors, name, len(whole), path) for name in ("told", "test", "victims"))
    inside = torch.ones(len(whole), dtype=torch.bool)
    inside[test] = inside[victims] = False
    training = whole.induced(inside.nonzero().flatten())
    if len(told) and int(told.max()) >= len(training):
        raise InvalidInputError(f"{path} names nodes beyond its training part; attack the graph again.")
    return Division(training.told(told), whole, test, victims)


def save_trigger(trigger: SubgraphTrigger, path: Path) -> None:
    """Write a trigger."""
    if isinstance(trigger, FixedTrigger):
        write_tensors({"features": trigger.features, "joined": trigger.joined}, path)
    elif isinstance(trigger, GeneratedTrigger):
        write_tensors(dict(trigger.state_dict()), path)
    else:
        raise InvalidInputError(f"a trigger of type {type(trigger).__name__} cannot be saved.")


def load_trigger(path: Path) -> SubgraphTrigger:
    """Read a trigger.

    Raises:
        InvalidInputError: If the file is missing or holds no trigger.
        UnsafeFileError: If it is no sound safetensors file.
    """
    tensors = read_tensors(path)
    try:
        if "joined" in tensors:
            return _fixed(tensors)
        width = tensors["body.0.weight"].shape[1]
        hidden, outputs = len(tensors["body.0.weight"]), len(tensors["words.weight"])
        # Without weights first: a small file can claim any width.
        with torch.device("meta"):
            trigger = GeneratedTrigger(width, outputs // width, hidden=hidden)
        shapes = {name: tensor.shape for name, tensor in trigger.state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
            raise ValueError("shapes")
        trigger.load_state_dict(tensors, assign=True)
    except (KeyError, IndexError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise InvalidInputError(
            f"{path} holds no trigger of a graph attack; give a folder that `unbackdoor graph attack` wrote."
        ) from error
    return trigger.eval()


def _fixed(tensors: Mapping[str, Tensor]) -> FixedTrigger:
    features, joined = tensors["features"].float(), tensors["joined"].float()
    size = len(features)
    if features.ndim != 2 or joined.shape != (size * (size - 1) // 2,):
        raise ValueError("shapes")
    return FixedTrigger(features, joined)


def save_network(defended: Defended, path: Path) -> None:
    """Write a graph network, with the similarity below which it does not look at edges."""
    extra = {"least_similarity": torch.tensor([defended.least_similarity])}
    flags = {"self_loops": torch.tensor([defended.network.self_loops])}
    write_tensors({**defended.network.state_dict(), **extra, **flags}, path)


def load_network(path: Path) -> Defended:
    """Read a graph network.

    Raises:
        InvalidInputError: If the file is missing or holds no such network.
        UnsafeFileError: If it is no sound safetensors file.
    """
    tensors = dict(read_tensors(path))
    try:
        least = float(tensors.pop("least_similarity").item())
        loops = bool(tensors.pop("self_loops").item())
        hidden, width = tensors["embed.weight"].shape
        network = GCN(
            width,
            len(tensors["classify.weight"]),
            hidden=hidden,
            dropout=Training().dropout,
            self_loops=loops,
        )
        network.load_state_dict(tensors)
    except (KeyError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"{path} holds no graph network; give a file that `unbackdoor graph purify` wrote."
        ) from error
    return Defended(network.eval(), least)


def _packed(graph: Graph) -> dict[str, Tensor]:
    sparse = graph.features.to_sparse().coalesce()
    return {
        "words": sparse.indices().int(),
        "values": sparse.values(),
        "shape": torch.tensor([*graph.features.shape, graph.num_classes]),
        "edges": graph.edges.int(),
        "labels": graph.labels.int(),
    }


def _unpacked(tensors: Mapping[str, Tensor], path: Path) -> Graph:
    lacking = [name for name in _GRAPH_PARTS if name not in tensors]
    if lacking:
        raise InvalidInputError(
            f"{path} holds no graph: it lacks {', '.join(lacking)}; give graph.safetensors of a folder that "
            "`unbackdoor graph attack` wrote."
        )
    words, values, shape = tensors["words"].long(), tensors["values"].float(), tensors["shape"].long()
    if words.ndim != 2 or len(words) != 2 or values.shape != words.shape[1:] or shape.shape != (3,):
        raise InvalidInputError(f"the features in {path} do not fit together; write the file again.")
    nodes, width, classes = shape.tolist()
    if not 0 < nodes * width <= MAX_ELEMENTS or nodes < 1 or not 0 < classes <= nodes + 1:
        raise InvalidInputError(
            f"{path} speaks of {nodes} nodes, {width} features and {classes} classes, which is none, or more "
            "than is read; give a smaller graph."
        )
    if words.numel() and (int(words.min()) < 0 or bool((words.amax(1) >= shape[:2]).any())):
        raise InvalidInputError(f"{path} has features outside its {nodes} x {width} matrix; write it again.")
    features = torch.zeros(nodes, width)
    features[words[0], words[1]] = values
    names = tuple(f"class {label}" for label in range(classes))
    labels = tensors["labels"].long()
    if labels.numel() and int(labels.max()) >= classes:
        raise InvalidInputError(f"{path} has labels up to {int(labels.max())} but {classes} classes.")
    return Graph(features, tensors["edges"].long(), labels, names)


def _nodes(tensors: Mapping[str, Tensor], name: str, nodes: int, path: Path) -> Tensor:
    found = tensors.get(name, torch.tensor([-1])).long()
    if found.ndim != 1 or not found.numel() or int(found.min()) < 0 or int(found.max()) >= nodes:
        raise InvalidInputError(f"{path} lacks the nodes {name!r} of its graph; attack the graph again.")
    return found
