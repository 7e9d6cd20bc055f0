"""Train a graph network on a suspect graph: RIGBD's robust training, and what it is compared with.

Each method sees the graph as it came and nothing else. ``Defended`` is a network together with what it does
to the edges of any graph that it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.graph.data import UNKNOWN, Graph
from unbackdoor.graph.detect import RIGBD, NodeScan
from unbackdoor.graph.edges import similarities, thinned
from unbackdoor.graph.gcn import GCN, Training, cross_entropy, fit, probabilities
from unbackdoor.types import Progress, silent


@dataclass(frozen=True, eq=False)
class Defended:
    """A network that was trained on a suspect graph.

    Args:
        network: In eval mode.
        least_similarity: Edges whose ends are not more alike than this are cut from each graph it is shown;
            minus infinity for none.
        scan: What was found on the way, for methods that look for poisoned nodes.
        diagnostics: JSON values: what was measured on the way.
    """

    network: GCN
    least_similarity: float = -math.inf
    scan: NodeScan | None = None
    diagnostics: Mapping[str, Any] = field(default_factory=dict)

    def seen(self, graph: Graph) -> Graph:
        """Return the graph as the network sees it."""
        if self.least_similarity == -math.inf:
            return graph
        return replace(graph, edges=graph.edges[:, similarities(graph) > self.least_similarity])

    def predictions(self, graph: Graph) -> Tensor:
        """Return the predicted class of each node, int64 ``(N,)``."""
        return probabilities(self.network, self.seen(graph)).argmax(1)


class GraphPurifier(Protocol):
    """Trains a network on a graph that may be poisoned."""

    @property
    def name(self) -> str:
        """A short name, in snake_case."""
        ...

    def purify(self, graph: Graph, *, generator: torch.Generator, progress: Progress = silent) -> Defended:
        """Return a network; ``graph`` is left untouched."""
        ...


@dataclass(frozen=True)
class Plain:
    """Train on the graph as it came: no defence.

    Args:
        training: How the network is trained.
    """

    name: ClassVar[str] = "plain"
    title: ClassVar[str] = "No defence"
    source: ClassVar[str] = "Kipf, Welling 2017, arXiv 1609.02907"
    needs: ClassVar[str] = "the training graph with its labels"

    training: Training = field(default_factory=Training)

    def purify(self, graph: Graph, *, generator: torch.Generator, progress: Progress = silent) -> Defended:
        """Train on ``graph``.

        Raises:
            InvalidInputError: If there is too little to learn from.
        """
        network = fit(
            graph, cross_entropy(graph.labels), self.training, generator=generator, progress=progress
        )
        return Defended(network, diagnostics={"options": asdict(self)})


@dataclass(frozen=True)
class EdgeDropping:
    """Drop other edges at random in each step of training; nothing is dropped afterwards.

    Source: Rong, Huang, Xu, Huang, "DropEdge: Towards Deep Graph Convolutional Networks on Node
    Classification", ICLR 2020, arXiv 1907.10903. A comparison: it shows what edge dropping does by itself.

    Args:
        rate: Chance of each edge to be dropped, in (0, 1).
        training: How the network is trained.
    """

    name: ClassVar[str] = "drop_edge"
    title: ClassVar[str] = "Plain edge dropping"
    source: ClassVar[str] = "Rong, Huang, Xu, Huang 2020, arXiv 1907.10903"
    needs: ClassVar[str] = "the training graph with its labels"

    rate: float = 0.5
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise InvalidInputError(f"rate must lie in (0, 1), got {self.rate}.")

    def purify(self, graph: Graph, *, generator: torch.Generator, progress: Progress = silent) -> Defended:
        """Train on ``graph``.

        Raises:
            InvalidInputError: If there is too little to learn from.
        """
        network = fit(
            graph, cross_entropy(graph.labels), self.training, generator=generator, progress=progress,
            thin=lambda draws: thinned(graph.edges, len(graph), self.rate, draws, rescue=False),
        )  # fmt: skip
        return Defended(network, diagnostics={"options": asdict(self)})


@dataclass(frozen=True)
class Pruning:
    """Cut the edges whose ends are least alike, in training and afterwards.

    Source: the defence "Prune" of Dai, Lin, Zhang, Wang 2023 (UGBA, arXiv 2303.01263), which cuts the edges
    between nodes of low cosine similarity. The threshold is the similarity below which ``fraction`` of the
    edges of the training graph lie.

    Args:
        fraction: Share of the edges that is cut, in (0, 1).
        training: How the network is trained.
    """

    name: ClassVar[str] = "prune"
    title: ClassVar[str] = "Pruning of dissimilar edges"
    source: ClassVar[str] = "Dai, Lin, Zhang, Wang 2023, arXiv 2303.01263"
    needs: ClassVar[str] = "the training graph with its labels"

    fraction: float = 0.1
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise InvalidInputError(f"fraction must lie in (0, 1), got {self.fraction}.")

    def purify(self, graph: Graph, *, generator: torch.Generator, progress: Progress = silent) -> Defended:
        """Train on what is left of ``graph``.

        Raises:
            InvalidInputError: If there is too little to learn from.
        """
        alike = similarities(graph)
        # Many edges may be equally unlike, most often not alike at all: then more than the share goes.
        threshold = float(alike.quantile(self.fraction)) if len(alike) else 0.0
        left = replace(graph, edges=graph.edges[:, alike > threshold])
        network = fit(
            left, cross_entropy(graph.labels), self.training, generator=generator, progress=progress
        )
        cut = graph.edges.shape[1] - left.edges.shape[1]
        return Defended(
            network,
            threshold,
            diagnostics={"options": asdict(self), "edges_cut": cut, "threshold": threshold},
        )


@dataclass(frozen=True)
class RobustTraining:
    """Find poisoned nodes, take them out of the clean loss, and unlearn the target class on them.

    Source: RIGBD, Zhang, Lin, Xu, Wu, Dai, Wang 2025, arXiv 2406.09836. A fresh network, with self-loops,
    minimises the cross-entropy over the labelled nodes that were not flagged plus the mean probability of the
    target class over those that were: their triggers stay in the graph, so the network learns not to follow
    them, even on poisoned nodes that were missed. Without a finding it is plain training.

    Deviations: flagged nodes leave the first term, as the paper has it; in the authors' code the difference
    of two sets of tensors removes nothing, so that both terms pull at the same nodes. 200 steps of training
    instead of 400 (``paper`` takes theirs).

    Args:
        detection: How poisoned nodes are found.
        weight: Of the second term.
        training: How the robust network is trained.
    """

    name: ClassVar[str] = "rigbd"
    title: ClassVar[str] = "Robustness-inspired graph backdoor defence"
    source: ClassVar[str] = "Zhang, Lin, Xu, Wu, Dai, Wang 2025, arXiv 2406.09836"
    needs: ClassVar[str] = "the training graph with its labels"

    detection: RIGBD = field(default_factory=RIGBD)
    weight: float = 1.0
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise InvalidInputError(f"weight must be at least 0, got {self.weight}.")

    @staticmethod
    def paper() -> RobustTraining:
        """Return the settings of the authors' code: 1000 steps for detection, 400 for robust training."""
        return RobustTraining(RIGBD.paper(), training=Training(epochs=400))

    def purify(self, graph: Graph, *, generator: torch.Generator, progress: Progress = silent) -> Defended:
        """Detect, then train.

        Raises:
            InvalidInputError: If there is too little to learn from.
        """
        scan = self.detection.score(graph, generator=rng.spawn(generator), progress=progress)
        labels, flagged, target = graph.labels.clone(), scan.flagged, scan.target_class
        labels[flagged] = UNKNOWN
        clean = cross_entropy(labels)

        def objective(logits: Tensor) -> Tensor:
            loss = clean(logits)
            if target is not None:
                loss = loss + self.weight * logits[flagged].softmax(1)[:, target].mean()
            return loss

        network = fit(
            graph, objective, self.training, generator=generator, stage="robust training", progress=progress
        )
        found = {"flagged": len(flagged), "target_class": target, "p_value": scan.p_value}
        return Defended(network, scan=scan, diagnostics={"options": asdict(self), **found})


CLASSES: tuple[type[Any], ...] = (RobustTraining, Plain, EdgeDropping, Pruning)

PURIFIERS: dict[str, type[Any]] = {cls.name: cls for cls in CLASSES}
"""Every graph purifier by its snake_case name."""
