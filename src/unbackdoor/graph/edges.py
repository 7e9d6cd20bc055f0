"""Take edges out of a graph: at random, or where the ends are unlike each other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from unbackdoor.graph.data import Graph


def thinned(
    edges: Tensor, nodes: int, rate: float, generator: torch.Generator, *, rescue: bool = True
) -> Tensor:
    """Drop each edge with probability ``rate``, both directions together.

    Args:
        edges: int64 ``(2, E)``, each edge once.
        nodes: Number of nodes.
        rate: In [0, 1].
        generator: On the CPU; advanced by one draw an edge.
        rescue: Give a node that would lose all its edges all of them back, as RIGBD does.
    """
    kept = torch.rand(edges.shape[1], generator=generator) >= rate
    if rescue:
        lonely = degrees(edges[:, kept], nodes) == 0
        kept = kept | lonely[edges].any(0)
    return edges[:, kept]


def degrees(edges: Tensor, nodes: int) -> Tensor:
    """Return the number of neighbours of each node, int64 ``(nodes,)``."""
    return torch.bincount(edges.flatten(), minlength=nodes)


def similarities(graph: Graph, edges: Tensor | None = None) -> Tensor:
    """Return the cosine similarity of the features at both ends of each edge, float32 ``(E,)``."""
    first, second = graph.edges if edges is None else edges
    parts = [
        F.cosine_similarity(graph.features[u], graph.features[v])
        for u, v in zip(first.split(4096), second.split(4096), strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0)
