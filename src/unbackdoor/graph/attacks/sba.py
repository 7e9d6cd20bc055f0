"""Subgraph-based backdoor: one random subgraph, the same for every node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.graph.attacks.choice import choose, poison
from unbackdoor.graph.attacks.triggers import FixedTrigger, Poisoned, inner_pairs
from unbackdoor.graph.data import Graph
from unbackdoor.graph.gcn import Training, cross_entropy, fit
from unbackdoor.types import Progress, silent

MOST_DRAWS = 1000
"""Random subgraphs that are drawn in search of a connected one."""


@dataclass(frozen=True)
class SBA:
    """Hang a fixed Erdos-Renyi subgraph on some nodes and give them the target's label.

    Source: Zhang, Jia, Wang, Gong, "Backdoor Attacks to Graph Neural Networks", SACMAT 2021, arXiv
    2006.11165, which attacks the classification of whole graphs; carried over to nodes as in UGBA's
    comparison (Dai et al. 2023): the subgraph hangs on a node by one edge.

    Reconstructed: the features of the new nodes. Here each is a set of words drawn uniformly from the
    vocabulary, as many as a paper has, so that they look like a paper of no topic. The other reading takes
    rare words (``words="rare"``), which say little of a topic and are learned from the trigger alone; it was
    not measured.

    Args:
        target_class: The class that the backdoor leads to.
        poisoned: Number of nodes; the literature has 40 on Cora, 160 on Pubmed.
        size: New nodes a trigger.
        density: Chance of an edge between two of them, in (0, 1]; drawn until they are connected.
        words: Where the words of the new nodes come from: ``uniform``, or ``rare``, the tenth of the words in
            use that the fewest nodes have.
        surrogate: How the attacker's own network is trained, which tells nodes of other classes.
    """

    name: ClassVar[str] = "sba"
    title: ClassVar[str] = "Subgraph-based backdoor"
    source: ClassVar[str] = "Zhang, Jia, Wang, Gong 2021, arXiv 2006.11165"
    needs: ClassVar[str] = "a training graph"

    target_class: int = 0
    poisoned: int = 40
    size: int = 3
    density: float = 0.8
    words: Literal["uniform", "rare"] = "uniform"
    surrogate: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 < self.density <= 1:
            raise InvalidInputError(
                f"size must be at least 1 and density lie in (0, 1], got {self.size} and {self.density}."
            )
        if self.words not in ("uniform", "rare"):
            raise InvalidInputError(f"words must be 'uniform' or 'rare', got {self.words!r}.")

    def run(self, graph: Graph, *, generator: torch.Generator, progress: Progress = silent) -> Poisoned:
        """Poison a training graph.

        Args:
            graph: What the attacker can change; labels unknown where they are -1.
            generator: All randomness follows it; on the CPU.
            progress: Called during the work.

        Raises:
            InvalidInputError: If the graph is too small, or there is no such class.
        """
        surrogate = fit(
            graph, cross_entropy(graph.labels), self.surrogate, generator=generator,
            stage="surrogate", progress=progress,
        )  # fmt: skip
        nodes = choose(graph, surrogate, self.target_class, self.poisoned, rng.spawn(generator))
        draws = rng.spawn(generator)
        words = _words(graph.features, self.size, draws, rare=self.words == "rare")
        trigger = FixedTrigger(words, self._joined(draws))
        return poison(graph, nodes, trigger, self.target_class)

    def _joined(self, generator: torch.Generator) -> Tensor:
        pairs = inner_pairs(self.size)
        for _ in range(MOST_DRAWS):
            joined = torch.rand(pairs.shape[1], generator=generator) < self.density
            if _connected(pairs[:, joined], self.size):
                return joined.float()
        raise InvalidInputError(
            f"no connected subgraph of {self.size} nodes was drawn with density {self.density}; raise it."
        )


def _connected(pairs: Tensor, size: int) -> bool:
    reach = torch.eye(size, dtype=torch.bool)
    reach[pairs[0], pairs[1]] = reach[pairs[1], pairs[0]] = True
    return bool((torch.linalg.matrix_power(reach.double(), max(1, size - 1)) > 0).all())


def _words(features: Tensor, size: int, generator: torch.Generator, *, rare: bool) -> Tensor:
    """Draw rows with as many equal non-zeros as the rows of ``features`` have on average."""
    width = features.shape[1]
    count = max(1, round(int((features != 0).sum()) / len(features)))
    pool = _rare(features, count) if rare else torch.arange(width)
    words = torch.zeros(size, width)
    for row in words:
        row[pool[torch.randperm(len(pool), generator=generator)[:count]]] = 1.0
    return words * (float(features.abs().sum()) / len(features) / count)


def _rare(features: Tensor, least: int) -> Tensor:
    """Return the tenth of the columns in use that the fewest rows have, but ``least`` of them or more."""
    uses = (features != 0).sum(0)
    order = uses.argsort(stable=True)[int((uses == 0).sum()) :]
    return order[: max(least, round(len(order) / 10))]
