"""Graphs with labelled nodes, and how one is divided between attacker, defender and laboratory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbackdoor.errors import InvalidInputError

UNKNOWN = -1
"""The label of a node whose class nobody was told."""


@dataclass(frozen=True, eq=False)
class Graph:
    """An undirected graph whose nodes have features and, some of them, labels.

    Args:
        features: float32 ``(N, F)``, finite; one row a node.
        edges: int64 ``(2, E)``: each edge once, the smaller node first; no loops, no repetitions.
        labels: int64 ``(N,)``: the class of each node, or -1 where it is unknown.
        class_names: Optional names; entry ``i`` names class ``i``.

    Raises:
        InvalidInputError: If shapes, types or values differ from the above.
    """

    features: Tensor
    edges: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.features.dtype != torch.float32:
            raise InvalidInputError(
                f"features must be float32 (N, F), got {self.features.dtype} of shape "
                f"{tuple(self.features.shape)}; give one row a node."
            )
        if not bool(torch.isfinite(self.features).all()):
            raise InvalidInputError("the features have values that are not finite; repair the data.")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.features.shape[:1]:
            raise InvalidInputError(
                f"labels must be int64 of shape ({len(self.features)},), got {self.labels.dtype} of shape "
                f"{tuple(self.labels.shape)}; give one label a node, -1 where it is unknown."
            )
        if len(self.labels) and int(self.labels.min()) < UNKNOWN:
            raise InvalidInputError(f"labels must be at least -1, got {int(self.labels.min())}; recode them.")
        self._check_edges()

    def _check_edges(self) -> None:
        edges = self.edges
        if edges.dtype != torch.int64 or edges.ndim != 2 or len(edges) != 2:
            raise InvalidInputError(
                f"edges must be int64 (2, E), got {edges.dtype} of shape {tuple(edges.shape)}."
            )
        if not edges.shape[1]:
            return
        if int(edges.min()) < 0 or int(edges.max()) >= len(self.labels):
            raise InvalidInputError(
                f"edges must join nodes from 0 to {len(self.labels) - 1}, got {int(edges.min())} to "
                f"{int(edges.max())}; give the nodes that they belong to."
            )
        if not torch.equal(undirected(edges), edges[:, _order(edges)]):
            raise InvalidInputError(
                "edges must hold each pair once, the smaller node first, without loops; pass them through "
                "undirected()."
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes: the length of ``class_names`` or the largest label plus one."""
        largest = int(self.labels.max()) + 1 if len(self) else 0
        return max(len(self.class_names), largest)

    @property
    def labelled(self) -> Tensor:
        """The nodes whose label is known, int64 ``(L,)``."""
        return (self.labels != UNKNOWN).nonzero().flatten()

    def name_of(self, label: int) -> str:
        """Return the name of class ``label``, or its number."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else str(label)

    def relabelled(self, nodes: Tensor, labels: Tensor | int) -> Graph:
        """Return the graph with other labels at ``nodes`` (int64 ``(M,)``)."""
        new = self.labels.clone()
        new[nodes] = labels
        return replace(self, labels=new)

    def told(self, nodes: Tensor) -> Graph:
        """Return the graph with the labels of all but ``nodes`` unknown."""
        labels = torch.full_like(self.labels, UNKNOWN)
        labels[nodes] = self.labels[nodes]
        return replace(self, labels=labels, class_names=self._names())

    def induced(self, nodes: Tensor) -> Graph:
        """Return the part that ``nodes`` (int64 ``(M,)``, distinct) span, numbered in their order."""
        position = torch.full((len(self),), -1)
        position[nodes] = torch.arange(len(nodes))
        edges = position[self.edges]
        return Graph(
            self.features[nodes],
            undirected(edges[:, (edges >= 0).all(0)]),
            self.labels[nodes],
            self._names(),
        )

    def _names(self) -> tuple[str, ...]:
        # A part may lack the last class: the names then keep the number of classes.
        return self.class_names or tuple(f"class {label}" for label in range(self.num_classes))


def undirected(pairs: Tensor) -> Tensor:
    """Return each pair once, the smaller node first, in order, without loops.

    Args:
        pairs: int64 ``(2, M)`` in any order and direction.
    """
    low, high = pairs.min(0).values, pairs.max(0).values
    edges: Tensor = torch.unique(torch.stack([low, high])[:, low != high], dim=1)
    return edges


def _order(edges: Tensor) -> Tensor:
    return torch.argsort(edges[0] * (int(edges.max()) + 1) + edges[1], stable=True)


@dataclass(frozen=True, eq=False)
class Division:
    """Who gets what of a graph; the test nodes are unseen in training, as in UGBA and RIGBD.

    Args:
        training: The part without the test nodes; labels known for the labelled share alone.
        whole: All nodes with all labels, those of ``training`` first and in the same order.
        test: Nodes of ``whole`` on which clean accuracy is measured.
        victims: Nodes of ``whole`` that get a trigger when attack success is measured.
    """

    training: Graph
    whole: Graph
    test: Tensor
    victims: Tensor


def divide(
    graph: Graph, generator: torch.Generator, *, labelled: float = 0.2, unseen: float = 0.2
) -> Division:
    """Divide a graph at random, as RIGBD does: 20 % labelled, 20 % unseen, the rest without a label.

    Half of the unseen nodes are test nodes, half victims. RIGBD's 10 % of validation nodes are not set apart:
    nothing here is chosen by them.

    Args:
        graph: Labelled nodes take part; others stay in the training part, without a label.
        generator: Draws the nodes; on the CPU.
        labelled: Share of the labelled nodes whose label the defender knows, in (0, 1).
        unseen: Share that is kept for measuring, in (0, 1).

    Raises:
        InvalidInputError: If the shares leave a part empty.
    """
    known = graph.labelled[torch.randperm(len(graph.labelled), generator=generator)]
    told, kept = round(labelled * len(known)), round(unseen * len(known))
    if told < 2 or kept < 2 or told + kept > len(known):
        raise InvalidInputError(
            f"{len(known)} labelled nodes cannot be divided into shares of {labelled} and {unseen}; both "
            "must be positive, their sum at most 1, and the graph large enough for two nodes each."
        )
    apart = known[told : told + kept]
    inside = torch.ones(len(graph), dtype=torch.bool)
    inside[apart] = False
    order = torch.cat([inside.nonzero().flatten(), apart])
    whole = graph.induced(order)
    place = torch.empty(len(graph), dtype=torch.int64)
    place[order] = torch.arange(len(order))
    training = whole.induced(torch.arange(int(inside.sum()))).told(place[known[:told]])
    places = place[apart]
    return Division(training, whole, places[: kept // 2], places[kept // 2 :])
