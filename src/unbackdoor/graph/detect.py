"""RIGBD's detection: poisoned nodes change their prediction when edges are dropped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.graph.cuts import Cut, Top, find_top
from unbackdoor.graph.data import UNKNOWN, Graph
from unbackdoor.graph.edges import thinned
from unbackdoor.graph.gcn import Training, cross_entropy, fit, probabilities
from unbackdoor.rates import Rate
from unbackdoor.types import Progress, silent

FEWEST = 20
"""Labelled nodes below which no ranking says anything."""


@dataclass(frozen=True, eq=False)
class NodeScan:
    """The opinion of a detector on a graph.

    Args:
        scores: float32 ``(N,)``: higher is more suspicious; NaN for nodes without a label.
        flagged: int64 ``(M,)``: the nodes taken for poisoned, most suspicious first; none if no backdoor was
            found.
        target_class: The class that stands out, or None.
        p_value: Chance of such a ranking if labels had nothing to do with it.
        is_backdoored: The verdict; None when ``undetermined`` says why.
        undetermined: Empty, or the reason why the scores must not be believed.
        evidence: JSON values.
    """

    scores: Tensor
    flagged: Tensor
    target_class: int | None
    p_value: float
    is_backdoored: bool | None
    undetermined: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RIGBD:
    """Rank labelled nodes by how much their prediction changes when edges are dropped at random.

    Source: Zhang, Lin, Xu, Wu, Dai, Wang, "Robustness Inspired Graph Backdoor Defense", ICLR 2025, arXiv
    2406.09836. A graph network without self-loops learns the graph as it came. Each of K times every edge is
    dropped with probability beta, nodes that lost all edges get them back, and the prediction p_k of each
    labelled node is compared with that on the whole graph, p_0. Its score is the mean over the classes of
    ``sum_k p_0 (log p_0 - log p_k)``. A node whose label hangs on one trigger edge changes most. Poisoned
    nodes share the target's label: going down the ranking, they end where two nodes in a row have another.

    Reconstructed: the full text was not at hand. Scores, cut and numbers follow what is known of the authors'
    code; how the target class is inferred is ours, as that code is told it: the class with the longest top of
    the ranking. So is the verdict: the authors' rule flags nodes in any graph, here a permutation test of the
    labels in the ranking has to be significant as well.

    Deviations: both directions of an edge are dropped together; nodes above the cut that have another label
    than the target are not flagged; 200 steps of training instead of 1000 (``paper`` takes theirs).

    Args:
        runs: How often edges are dropped, K.
        rate: Chance of each edge to be dropped, beta, in (0, 1).
        training: How the network is trained.
        self_loops: Whether a node hears itself.
        cut: ``consecutive`` is RIGBD's; ``likelihood`` splits the ranking where two constant shares of the
            class explain it best, which single clean nodes at the top disturb less.
        patience: Nodes in a row with another label that end the top, for ``consecutive``.
        alpha: Largest chance of flagging a graph whose labels have nothing to do with the ranking.
        permutations: Random rankings for that test.
    """

    name: ClassVar[str] = "rigbd"
    title: ClassVar[str] = "Prediction variance under edge dropping"
    source: ClassVar[str] = "Zhang, Lin, Xu, Wu, Dai, Wang 2025, arXiv 2406.09836"
    needs: ClassVar[str] = "the training graph with its labels"

    runs: int = 20
    rate: float = 0.5
    training: Training = field(default_factory=Training)
    self_loops: bool = False
    cut: Cut = "consecutive"
    patience: int = 2
    alpha: float = 0.01
    permutations: int = 999

    def __post_init__(self) -> None:
        if self.runs < 1 or not 0 < self.rate < 1 or self.patience < 1:
            raise InvalidInputError(
                f"runs and patience must be at least 1 and rate lie in (0, 1), got {self.runs}, "
                f"{self.patience} and {self.rate}."
            )
        if not 0 < self.alpha < 1 or (1 + self.permutations) * self.alpha < 1:
            raise InvalidInputError(
                f"alpha must lie in (0, 1) and permutations be at least 1 / alpha - 1, got {self.alpha} and "
                f"{self.permutations}."
            )
        if self.cut not in ("consecutive", "likelihood"):
            raise InvalidInputError(f"cut must be 'consecutive' or 'likelihood', got {self.cut!r}.")

    @staticmethod
    def paper() -> RIGBD:
        """Return the settings of the authors' code: 1000 steps of training."""
        return RIGBD(training=Training(epochs=1000))

    def score(self, graph: Graph, *, generator: torch.Generator, progress: Progress = silent) -> NodeScan:
        """Score the labelled nodes of a training graph.

        Args:
            graph: Left untouched; labels unknown where they are -1.
            generator: All randomness follows it; on the CPU.
            progress: Called during the work.

        Raises:
            InvalidInputError: If the graph has too few labelled nodes, classes or edges to learn from.
        """
        network = fit(
            graph, cross_entropy(graph.labels), self.training, generator=generator,
            self_loops=self.self_loops, stage="detection network", progress=progress,
        )  # fmt: skip
        before = probabilities(network, graph)
        variance, draws = torch.zeros(len(graph)), rng.spawn(generator)
        for run in range(self.runs):
            edges = thinned(graph.edges, len(graph), self.rate, draws)
            variance += divergence(before, probabilities(network, graph, edges))
            progress("edge dropping", run + 1, self.runs)
        known = graph.labelled
        ranked = known[torch.argsort(variance[known], descending=True, stable=True)]
        top = find_top(
            graph.labels[ranked], graph.num_classes, self.cut,
            patience=self.patience, permutations=self.permutations, generator=rng.spawn(generator),
        )  # fmt: skip
        correct = before.argmax(1)[known] == graph.labels[known]
        return self._judged(graph, variance, ranked, top, Rate.of(correct))

    def _judged(self, graph: Graph, variance: Tensor, ranked: Tensor, top: Top, accuracy: Rate) -> NodeScan:
        problem = _problem(graph, accuracy)
        found = None if problem else top.p_value <= self.alpha
        above = ranked[: top.length]
        flagged = above[graph.labels[above] == top.target_class] if found else above[:0]
        return NodeScan(
            scores=torch.where(graph.labels == UNKNOWN, math.nan, variance),
            flagged=flagged,
            target_class=top.target_class if found else None,
            p_value=top.p_value,
            is_backdoored=found,
            undetermined=problem,
            evidence={
                "options": asdict(self),
                "class_at_the_top": top.target_class,
                "nodes_above_the_cut": top.length,
                "strength": top.strength,
                "labels_of_the_first_twenty": graph.labels[ranked[:20]].tolist(),
                "accuracy_on_labelled_nodes": accuracy.value,
            },
        )


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """Return ``1 / C sum_c p_0 (log p_0 - log(p_k + 1e-8))`` for each node, float32 ``(N,)``.

    Args:
        before: Class probabilities p_0 ``(N, C)``.
        after: Class probabilities p_k ``(N, C)``.
    """
    gains: Tensor = torch.special.xlogy(before, before) - before * (after + 1e-8).log()
    return gains.mean(1)


def _problem(graph: Graph, accuracy: Rate) -> str:
    known = graph.labels[graph.labelled]
    if len(known) < FEWEST:
        return f"only {len(known)} nodes have a label, at least {FEWEST} are needed"
    largest = int(known.bincount().max())
    if accuracy.successes <= largest:
        return (
            f"the network learnt nothing: it is right on {accuracy.successes} of {accuracy.n} nodes that it "
            f"learnt from, and the largest class has {largest} of them"
        )
    return ""
