"""The graph convolutional network, and its training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.graph.data import UNKNOWN, Graph
from unbackdoor.graph.pyg import geometric
from unbackdoor.types import Progress, silent

Features = Tensor | tuple[Tensor, ...]
"""Rows of features, dense or sparse, in one tensor or in blocks that follow one another."""

Objective = Callable[[Tensor], Tensor]
"""Takes the logits ``(N, C)`` of all nodes and returns a loss."""

SPARSE_BELOW = 0.2
"""Features with a smaller share of non-zeros are multiplied as sparse matrices."""


class GCN(nn.Module):
    """Two graph convolutions with symmetric normalisation and a ReLU between them.

    Source: Kipf and Welling, "Semi-Supervised Classification with Graph Convolutional Networks", ICLR 2017,
    arXiv 1609.02907. Normalisation and message passing are PyTorch Geometric's; they stand apart from the
    weights, so that the first weights can multiply sparse features.

    Args:
        features: Size of a node's features F.
        classes: Number of outputs C.
        hidden: Width between the layers.
        dropout: Share of the hidden values dropped in training, in [0, 1).
        self_loops: Whether a node hears itself. RIGBD detects without, because a node's own features dampen
            the effect of losing a neighbour.
    """

    def __init__(
        self, features: int, classes: int, *, hidden: int = 64, dropout: float = 0.5, self_loops: bool = True
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(features, hidden, bias=False)
        self.classify = nn.Linear(hidden, classes, bias=False)
        self.shift = nn.Parameter(torch.zeros(hidden))
        self.offset = nn.Parameter(torch.zeros(classes))
        self.dropout, self.self_loops = dropout, self_loops
        for layer in (self.embed, self.classify):
            nn.init.xavier_uniform_(layer.weight)
        self.propagate = geometric("nn").SimpleConv(aggr="sum")
        self.normalise = geometric("nn.conv.gcn_conv").gcn_norm

    def forward(self, features: Features, edges: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the logits ``(N, C)`` of all nodes.

        Args:
            features: float32 ``(N, F)``, or blocks of rows.
            edges: int64 ``(2, E)``, each edge once.
            weights: float32 ``(E,)``; 1 if left out.
        """
        blocks = features if isinstance(features, tuple) else (features,)
        embedded = torch.cat([block @ self.embed.weight.t() for block in blocks])
        both = torch.cat([edges, edges.flip(0)], dim=1)
        doubled = None if weights is None else torch.cat([weights, weights])
        both, normed = self.normalise(both, doubled, len(embedded), add_self_loops=self.self_loops)
        hidden = (self.propagate(embedded, both, normed) + self.shift).relu()
        hidden = F.dropout(hidden, self.dropout, self.training)
        logits: Tensor = self.propagate(self.classify(hidden), both, normed) + self.offset
        return logits


@dataclass(frozen=True)
class Training:
    """How a graph network is trained: full batches with Adam.

    Args:
        epochs: Steps, each on all labelled nodes.
        hidden: Width of the network.
        dropout: Share of its hidden values dropped, in [0, 1).
        learning_rate: Step of Adam.
        weight_decay: L2 coefficient.
    """

    epochs: int = 200
    hidden: int = 64
    dropout: float = 0.5
    learning_rate: float = 0.01
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.hidden < 1 or not 0 <= self.dropout < 1 or not self.learning_rate > 0:
            raise InvalidInputError(
                f"epochs and hidden must be at least 1, dropout lie in [0, 1) and learning_rate be positive, "
                f"got {self.epochs}, {self.hidden}, {self.dropout} and {self.learning_rate}."
            )

    def network(self, graph: Graph, *, self_loops: bool = True) -> GCN:
        """Return a fresh network for ``graph``; its weights follow torch's global generator."""
        return GCN(
            graph.features.shape[1],
            graph.num_classes,
            hidden=self.hidden,
            dropout=self.dropout,
            self_loops=self_loops,
        )

    def optimiser(self, network: nn.Module) -> torch.optim.Optimizer:
        """Return Adam over the weights of ``network``."""
        return torch.optim.Adam(network.parameters(), self.learning_rate, weight_decay=self.weight_decay)


def fit(
    graph: Graph,
    objective: Objective,
    training: Training,
    *,
    generator: torch.Generator,
    self_loops: bool = True,
    thin: Callable[[torch.Generator], Tensor] | None = None,
    stage: str = "training",
    progress: Progress = silent,
) -> GCN:
    """Train a fresh network on a graph and return it in eval mode.

    Args:
        graph: Features and edges; its labels are read by ``objective`` alone.
        objective: What is minimised.
        training: How.
        generator: Source of randomness, on the CPU; advanced by two draws.
        self_loops: Whether a node hears itself.
        thin: Draws the edges of each step; all of them if left out.
        stage: How the work is called in ``progress``.
        progress: Called after each step.
    """
    check_trainable(graph)
    features, edges, draws = compact(graph.features), graph.edges, rng.spawn(generator)
    with rng.isolated(generator):
        network = training.network(graph, self_loops=self_loops).train()
        optimiser = training.optimiser(network)
        for epoch in range(training.epochs):
            if thin is not None:
                edges = thin(draws)
            loss = objective(network(features, edges))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            progress(stage, epoch + 1, training.epochs)
    return network.eval()


def cross_entropy(labels: Tensor) -> Objective:
    """Return the mean cross-entropy over the nodes whose label is known."""
    return lambda logits: F.cross_entropy(logits, labels, ignore_index=UNKNOWN)


@torch.no_grad()
def probabilities(network: nn.Module, graph: Graph, edges: Tensor | None = None) -> Tensor:
    """Return the class probabilities ``(N, C)`` of all nodes.

    Args:
        network: In eval mode.
        graph: The nodes.
        edges: Other edges than the graph's.
    """
    outputs: Tensor = network(compact(graph.features), graph.edges if edges is None else edges)
    return outputs.softmax(1)


def compact(features: Tensor) -> Tensor:
    """Return the same matrix, sparse where most of it is zero."""
    if features.layout != torch.strided or int((features != 0).sum()) > SPARSE_BELOW * features.numel():
        return features
    with warnings.catch_warnings():
        # Torch calls compressed rows a beta feature; products with them are checked by our tests.
        warnings.filterwarnings("ignore", message=".*Sparse CSR", category=UserWarning)
        return features.to_sparse_csr()


def check_trainable(graph: Graph) -> None:
    """Check that a network can be trained on a graph.

    Raises:
        InvalidInputError: If it has fewer than two labelled nodes, fewer than two classes, or no edges.
    """
    known = len(graph.labelled)
    classes = len(graph.labels[graph.labelled].unique())
    if known < 2 or classes < 2 or not graph.edges.shape[1]:
        raise InvalidInputError(
            f"a graph network needs labelled nodes of two classes and edges, got {known} labelled node(s) of "
            f"{classes} class(es) and {graph.edges.shape[1]} edges; give a larger graph."
        )
