"""Trigger subgraphs: a few new nodes with features and edges, hung on a node by one edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unbackdoor.errors import InvalidInputError
from unbackdoor.graph.data import UNKNOWN, Graph


@dataclass(frozen=True, eq=False)
class Subgraphs:
    """One small graph for each of P nodes.

    Args:
        features: float32 ``(P, s, F)`` of the s new nodes.
        joined: float32 ``(P, s (s - 1) / 2)``: the weight, 0 or 1, of the edge between each two of them, in
            the order of ``inner_pairs``.
    """

    features: Tensor
    joined: Tensor


class SubgraphTrigger(Protocol):
    """Makes the subgraphs that set a backdoor off."""

    def subgraphs(self, features: Tensor) -> Subgraphs:
        """Return one subgraph for each node, given the nodes' own features ``(P, F)``."""
        ...


@dataclass(frozen=True, eq=False)
class FixedTrigger:
    """The same subgraph for every node.

    Args:
        features: float32 ``(s, F)``.
        joined: float32 ``(s (s - 1) / 2,)``.
    """

    features: Tensor
    joined: Tensor

    def subgraphs(self, features: Tensor) -> Subgraphs:
        """Return the subgraph ``P`` times."""
        count = len(features)
        return Subgraphs(self.features.expand(count, -1, -1), self.joined.expand(count, -1))


class GeneratedTrigger(nn.Module):
    """A small network that makes a subgraph of its own for each node.

    Args:
        features: Size of a node's features F.
        size: New nodes s a trigger.
        hidden: Width of its hidden layer.
    """

    def __init__(self, features: int, size: int, *, hidden: int = 64) -> None:
        super().__init__()
        self.size, self.hidden = size, hidden
        self.body = nn.Sequential(
            nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.words = nn.Linear(hidden, size * features)
        self.pairs = nn.Linear(hidden, size * (size - 1) // 2)

    def forward(self, features: Tensor) -> Subgraphs:
        """Return the subgraphs of nodes with these features ``(P, F)``; differentiable, edges too.

        Edges are rounded to 0 or 1, and get the gradient of what was rounded (straight-through).
        """
        body = self.body(features)
        soft = self.pairs(body).sigmoid()
        hard = (soft > 0.5).float()
        return Subgraphs(self.words(body).view(len(features), self.size, -1), hard + soft - soft.detach())

    @torch.no_grad()
    def subgraphs(self, features: Tensor) -> Subgraphs:
        """Return the same without gradients."""
        made = self(features)
        return Subgraphs(made.features, made.joined.round())


def inner_pairs(size: int) -> Tensor:
    """Return the pairs among ``size`` nodes, int64 ``(2, size (size - 1) / 2)``."""
    return torch.triu_indices(size, size, offset=1)


def attachment(before: int, nodes: Tensor, size: int) -> Tensor:
    """Return all edges that triggers may have: per node, the one that hangs it on, then the inner ones.

    Args:
        before: Number of nodes before the new ones are added.
        nodes: int64 ``(P,)`` that get a trigger.
        size: New nodes s a trigger.

    Returns:
        int64 ``(2, P (1 + s (s - 1) / 2))``, grouped by node.
    """
    first = before + size * torch.arange(len(nodes))
    hung = torch.stack([nodes, first]).unsqueeze(2)
    inner = first.view(1, -1, 1) + inner_pairs(size).unsqueeze(1)
    return torch.cat([hung, inner], dim=2).flatten(1)


def attach(graph: Graph, nodes: Tensor, trigger: SubgraphTrigger) -> Graph:
    """Return the graph with a trigger on each of ``nodes``; the new nodes come last and have no label.

    Raises:
        InvalidInputError: If the trigger was made for features of another size.
    """
    made = trigger.subgraphs(graph.features[nodes])
    count, size, width = made.features.shape
    if width != graph.features.shape[1]:
        raise InvalidInputError(
            f"the trigger has {width} features a node, the graph {graph.features.shape[1]}; they belong to "
            "different data."
        )
    present = torch.cat([torch.ones(count, 1), made.joined], dim=1).flatten() > 0
    edges = attachment(len(graph), nodes, size)[:, present]
    return Graph(
        torch.cat([graph.features, made.features.reshape(count * size, width)]),
        torch.cat([graph.edges, edges], dim=1),
        torch.cat([graph.labels, torch.full((count * size,), UNKNOWN)]),
        graph.class_names,
    )


@dataclass(frozen=True, eq=False)
class Poisoned:
    """What an attack leaves behind: a graph, and all that is needed to set its backdoor off.

    Args:
        graph: What the defender gets.
        nodes: int64 ``(P,)``: the nodes with a trigger and the target's label.
        trigger: What sets the backdoor off.
        target_class: Where it leads.
        record: JSON values: how it was made.
    """

    graph: Graph
    nodes: Tensor
    trigger: SubgraphTrigger
    target_class: int
    record: Mapping[str, Any] = field(default_factory=dict)
