"""Unnoticeable graph backdoor: a network that makes a trigger of its own for each node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.graph.attacks.choice import choose, poison
from unbackdoor.graph.attacks.triggers import GeneratedTrigger, Poisoned, Subgraphs, attachment
from unbackdoor.graph.data import Graph
from unbackdoor.graph.gcn import GCN, Training, compact, cross_entropy, fit
from unbackdoor.types import Progress, silent


@dataclass(frozen=True)
class UGBA:
    """Learn a generator of triggers against a surrogate network that learns on the poisoned graph.

    Source: Dai, Lin, Zhang, Wang, "Unnoticeable Backdoor Attacks on Graph Neural Networks", WWW 2023, arXiv
    2303.01263. The generator maps a node's features to the features of the new nodes and to the edges among
    them, which are rounded with a straight-through gradient. Two problems alternate, one step each: the
    surrogate learns the poisoned graph; the generator learns to send any node to the target class, and keeps
    the ends of the trigger's edges alike (cosine similarity of at least ``similarity``), so that pruning
    unlike edges does not find it. Without that term (``similarity_weight=0``) it is the generator of GTA: Xi,
    Pang, Ji, Wang, "Graph Backdoor", USENIX Security 2021, arXiv 2006.11890.

    Deviations: nodes are drawn at random instead of chosen by clustering; one step of each problem a round;
    200 rounds instead of 400, and a weight of 1 instead of about 100 on that similarity, so that triggers may
    be easier to prune than theirs (``paper`` takes both).
    Reconstructed: the number of nodes on which the generator learns in each round.

    Args:
        target_class: The class that the backdoor leads to.
        poisoned: Number of nodes; the literature has 40 on Cora, 160 on Pubmed.
        size: New nodes a trigger.
        steps: Rounds; 400 in the authors' code.
        learning_rate: Step of Adam on the generator.
        similarity: Cosine similarity that the ends of the trigger's edges should have, in [-1, 1].
        similarity_weight: Weight of that wish; about 100 in the authors' code, 0 for GTA.
        sample: Nodes on which the generator learns in each round, besides the poisoned ones.
        surrogate: How the attacker's networks are trained; its epochs are those of the one that tells nodes
            of other classes.
    """

    name: ClassVar[str] = "ugba"
    title: ClassVar[str] = "Unnoticeable graph backdoor"
    source: ClassVar[str] = "Dai, Lin, Zhang, Wang 2023, arXiv 2303.01263"
    needs: ClassVar[str] = "a training graph"

    target_class: int = 0
    poisoned: int = 40
    size: int = 3
    steps: int = 200
    learning_rate: float = 0.01
    similarity: float = 0.8
    similarity_weight: float = 1.0
    sample: int = 128
    surrogate: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        if self.size < 1 or self.steps < 1 or self.sample < 0 or self.similarity_weight < 0:
            raise InvalidInputError(
                f"size and steps must be at least 1, sample and similarity_weight at least 0, got "
                f"{self.size}, {self.steps}, {self.sample} and {self.similarity_weight}."
            )

    @staticmethod
    def paper() -> UGBA:
        """Return the settings of the authors' code: 400 rounds, and a weight of 100 on similarity."""
        return UGBA(steps=400, similarity_weight=100.0)

    def run(self, graph: Graph, *, generator: torch.Generator, progress: Progress = silent) -> Poisoned:
        """Poison a training graph.

        Args:
            graph: What the attacker can change; labels unknown where they are -1.
            generator: All randomness follows it; on the CPU.
            progress: Called during the work.

        Raises:
            InvalidInputError: If the graph is too small, or there is no such class.
        """
        clean = fit(
            graph, cross_entropy(graph.labels), self.surrogate, generator=generator,
            stage="surrogate", progress=progress,
        )  # fmt: skip
        nodes = choose(graph, clean, self.target_class, self.poisoned, rng.spawn(generator))
        draws = rng.spawn(generator)
        with rng.isolated(generator):
            trigger = self._learn(graph, nodes, draws, progress)
        return poison(graph, nodes, trigger, self.target_class)

    def _learn(
        self, graph: Graph, nodes: Tensor, draws: torch.Generator, progress: Progress
    ) -> GeneratedTrigger:
        trigger = GeneratedTrigger(graph.features.shape[1], self.size)
        surrogate = self.surrogate.network(graph)
        learners = (
            self.surrogate.optimiser(surrogate),
            torch.optim.Adam(
                trigger.parameters(), self.learning_rate, weight_decay=self.surrogate.weight_decay
            ),
        )
        fixed = compact(graph.features)
        known = graph.relabelled(nodes, self.target_class).labels
        for step in range(self.steps):
            logits, _ = self._triggered(surrogate.train(), trigger, graph, fixed, nodes, learn=False)
            _minimise(learners[0], F.cross_entropy(logits[: len(graph)], known, ignore_index=-1))
            chosen = torch.randperm(len(graph), generator=draws)[: self.sample]
            chosen = torch.cat([nodes, chosen]).unique()
            logits, made = self._triggered(surrogate.eval(), trigger, graph, fixed, chosen, learn=True)
            wanted = torch.full_like(chosen, self.target_class)
            loss = F.cross_entropy(logits[chosen], wanted)
            if self.similarity_weight:
                loss = loss + self.similarity_weight * self._unlike(graph.features[chosen], made)
            _minimise(learners[1], loss)
            progress("trigger generator", step + 1, self.steps)
        return trigger.eval()

    def _triggered(
        self,
        surrogate: GCN,
        trigger: GeneratedTrigger,
        graph: Graph,
        fixed: Tensor,
        nodes: Tensor,
        *,
        learn: bool,
    ) -> tuple[Tensor, Subgraphs]:
        """Return the logits of the graph with triggers on ``nodes``, and the triggers."""
        features = graph.features[nodes]
        made = trigger(features) if learn else trigger.subgraphs(features)
        edges = torch.cat([graph.edges, attachment(len(graph), nodes, self.size)], dim=1)
        own = torch.cat([torch.ones(len(nodes), 1), made.joined], dim=1).flatten()
        weights = torch.cat([torch.ones(graph.edges.shape[1]), own])
        return surrogate((fixed, made.features.flatten(0, 1)), edges, weights), made

    def _unlike(self, features: Tensor, made: Subgraphs) -> Tensor:
        """Return by how much, on average, the ends of the triggers' edges are too unlike each other."""
        pairs = torch.triu_indices(self.size, self.size, offset=1)
        hung = F.cosine_similarity(features, made.features[:, 0], dim=1).unsqueeze(1)
        inner = F.cosine_similarity(made.features[:, pairs[0]], made.features[:, pairs[1]], dim=2)
        weights = torch.cat([torch.ones_like(hung), made.joined], dim=1)
        lacking = (self.similarity - torch.cat([hung, inner], dim=1)).relu()
        return (weights * lacking).sum() / weights.sum()


def _minimise(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    weights = [weight for group in optimiser.param_groups for weight in group["params"]]
    optimiser.zero_grad()
    # The other network's weights lie on the way and need no gradient.
    loss.backward(inputs=weights)
    optimiser.step()
