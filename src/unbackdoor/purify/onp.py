"""Optimized Neuron Pruning: an agent with a graph network learns which filters to prune."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.compute import check_fits
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.extras import require
from unbackdoor.filters.groups import FilterMap, find_filters
from unbackdoor.filters.mask import FilterMask, PruneMode
from unbackdoor.filters.saliency import clean_loss, taylor_saliency
from unbackdoor.purify.filter_graph import FilterGraph, Residual, filter_graph
from unbackdoor.purify.pruning_search import Limits, Objective, Place, Search, by_chance, by_greed
from unbackdoor.suppression import Suppressed, Suppression, suppress
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent


@dataclass(frozen=True)
class Agent:
    """A graph network that learns by proximal policy optimisation.

    Source: Schulman, Wolski, Dhariwal, Radford, Klimov, "Proximal Policy Optimization Algorithms", 2017,
    arXiv 1707.06347, with actions that are not possible masked (sb3-contrib).

    Args:
        hidden: Size of a node's embedding.
        rounds: Rounds of message passing.
        rollout: Steps between updates, at least 2; fewer where the budget has room for no such update.
        passes: Passes over these steps in each update.
        learning_rate: Step of Adam.
        entropy: Weight of the policy's entropy, which keeps it from settling early.
    """

    hidden: int = 32
    rounds: int = 2
    rollout: int = 16
    passes: int = 4
    learning_rate: float = 0.003
    entropy: float = 0.01

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.rounds < 0 or self.rollout < 2 or self.passes < 1:
            raise InvalidInputError(
                f"hidden and passes must be at least 1, rounds 0 and rollout 2, got {self.hidden}, "
                f"{self.passes}, {self.rounds} and {self.rollout}."
            )


@dataclass(frozen=True)
class ONP:
    """Search for the filters to prune with an agent that sees the network as a graph.

    Source: Li, Yu, Yi, "Rethinking Pruning for Backdoor Mitigation: An Optimization Perspective", 2024, arXiv
    2405.17746. Known of it: filters are the nodes of a graph whose edges follow the strength of connections;
    agents with a graph network prune by reinforcement learning; filters tied by residual sums are pruned as
    groups; a small set of clean images is all that is needed.

    Reconstructed: nearly everything else, as neither the full text nor code was at hand. Ours are the reward
    (clean images alone: the fall of the loss of a suppressed copy, less the rise of the model's own loss; see
    ``clean_weight``), the limits, the node features (magnitude and first-order saliency in the model and in
    the copy, layer statistics), the edges (strongest inputs by l1 norm between layers that feed each other,
    where the paper compares connection patterns within a layer), the network and PPO. So this is a learned
    pruning policy in the spirit of the paper, and its results are not those of the paper.

    The same reward can be searched without learning: by chance, or greedily down a first-order estimate. What
    the agent adds shows in the comparison. Equal seeds give equal results unless ``seconds`` run out.

    Args:
        search: ``policy`` learns; ``random`` and ``greedy`` search the same sets with the same budget.
        steps: Budget: removals that are tried, each a pass of all images through model and copy where that
            set was not tried before. At least 3 for ``policy``.
        seconds: Budget: wall time of the search.
        horizon: Most nodes in a set.
        candidates: Share of the nodes that may be removed, those with the best first-order estimate, in
            (0, 1].
        clean_weight: Weight of the rise of the clean loss (nats) against the fall of the copy's loss (share).
        price: Of each removed filter, in the same unit.
        penalty: Negative reward for going over the limits, which ends a set.
        limits: What pruning may cost on the clean images.
        residual: ``group`` prunes filters that a residual sum ties together; ``single`` one by one.
        neighbours: Strongest inputs of each filter that are edges of the graph.
        agent: How the agent learns.
        suppression: How the copy is made.
        prune_mode: What removing a filter clears.
    """

    name: ClassVar[str] = "onp"
    title: ClassVar[str] = "Optimized Neuron Pruning"
    source: ClassVar[str] = "Li, Yu, Yi 2024, arXiv 2405.17746"
    needs: ClassVar[str] = "clean images with labels; the extra rl, unless search is random or greedy"
    version: ClassVar[int] = 2

    search: Literal["policy", "random", "greedy"] = "policy"
    steps: int = 512
    seconds: float = 900.0
    horizon: int = 30
    candidates: float = 0.25
    clean_weight: float = 1.0
    price: float = 0.001
    penalty: float = 0.05
    limits: Limits = field(default_factory=Limits)
    residual: Residual = "group"
    neighbours: int = 8
    agent: Agent = field(default_factory=Agent)
    suppression: Suppression = field(default_factory=Suppression)
    prune_mode: PruneMode = "silence"

    def __post_init__(self) -> None:
        if self.search not in ("policy", "random", "greedy") or self.residual not in ("group", "single"):
            raise InvalidInputError(
                f"search must be 'policy', 'random' or 'greedy' and residual 'group' or 'single', got "
                f"{self.search!r} and {self.residual!r}."
            )
        if min(self.steps, self.horizon, self.neighbours) < 1 or not self.seconds > 0:
            raise InvalidInputError(
                f"steps, horizon and neighbours must be at least 1 and seconds positive, got {self.steps}, "
                f"{self.horizon}, {self.neighbours} and {self.seconds}."
            )
        if self.search == "policy" and self.steps < 3:
            raise InvalidInputError(
                f"a policy learns nothing from {self.steps} steps; allow at least 3, or choose another."
            )
        if not 0 < self.candidates <= 1:
            raise InvalidInputError(f"candidates must lie in (0, 1], got {self.candidates}.")

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a copy of ``model`` without the filters of the best set found.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels; a few hundred.
            generator: All randomness follows it; on the CPU.
            progress: Called during suppression, and after each step of the search.

        Raises:
            InvalidInputError: If there are too few images, or a label has no output of the model.
            UnsupportedModelError: If the network has no filters to prune.
            MissingDependencyError: If the extra ``rl`` is absent and ``search`` is ``policy``.
        """
        if self.search == "policy":
            for module in ("gymnasium", "sb3_contrib"):
                require(module, extra="rl")
        check_fits(model, clean, purpose="purification", at_least=2)
        filter_map = find_filters(model, as_float(clean.images[:1]))
        if not filter_map.prunable:
            raise UnsupportedModelError("this network has no filters that could be pruned.")
        copy = suppress(model, clean, self.suppression, generator=rng.spawn(generator), progress=progress)
        graph, estimates = self._graph(model, copy.model, clean, filter_map)
        objective = Objective(
            model, copy.model, clean, filter_map, self.prune_mode, self.limits, self.clean_weight, self.price
        )
        search = Search(
            graph.nodes, objective.worth, _best(estimates, self.candidates), self.horizon,
            self.penalty, self.steps, self.seconds, progress,
        )  # fmt: skip
        learnt = self._run(graph, search, estimates, generator)
        removed = [place for node in sorted(search.best) for place in graph.nodes[node]]
        mask = FilterMask.full(filter_map).without(removed)
        return Purified(
            model=mask.apply(model, filter_map, prune_mode=self.prune_mode),
            mask=mask,
            scores=_scores(graph, search.mean_gains(), filter_map),
            diagnostics={"options": asdict(self), **_suppressed(copy), **search.describe(), **learnt},
        )

    def _graph(
        self, model: nn.Module, copy: nn.Module, clean: LabelledImages, filter_map: FilterMap
    ) -> tuple[FilterGraph, Tensor]:
        """Return the graph, and the first-order estimate of the reward of each node."""
        own = taylor_saliency(model, clean, filter_map)
        copied = taylor_saliency(copy, clean, filter_map)
        graph = filter_graph(
            model, copy, filter_map, own, copied, residual=self.residual, neighbours=self.neighbours
        )
        return graph, torch.tensor(self.estimates(graph.nodes, own, copied, clean_loss(copy, clean)))

    def estimates(
        self,
        nodes: Iterable[Sequence[Place]],
        own: Mapping[str, Tensor],
        copied: Mapping[str, Tensor],
        copy_loss: float,
    ) -> list[float]:
        """Return the reward of removing each node, to first order and in its unit (``Objective``).

        Args:
            nodes: What is pruned together.
            own: By layer, the rise of the model's loss without each filter, nats.
            copied: The same of the copy's.
            copy_loss: The copy's loss with all filters.
        """
        return [
            sum(
                float(-copied[n][i]) / max(copy_loss, 1e-12)
                - self.clean_weight * float(own[n][i].clamp(min=0))
                - self.price
                for n, i in node
            )
            for node in nodes
        ]

    def _run(
        self, graph: FilterGraph, search: Search, estimates: Tensor, generator: torch.Generator
    ) -> dict[str, Any]:
        """Search; return what there is to say of the learning."""
        if self.search == "random":
            by_chance(search, rng.spawn(generator))
        elif self.search == "greedy":
            by_greed(search, estimates)
        else:
            from unbackdoor.purify.pruning_agent import learn

            with rng.fenced(generator) as seed:
                return {"updates": learn(graph, search, seed=seed, **asdict(self.agent))}
        return {}


def _best(estimates: Tensor, share: float) -> Tensor:
    """Return bool ``(U,)``: the share of the nodes with the highest estimates, at least one."""
    count = max(1, round(share * len(estimates)))
    chosen = torch.zeros(len(estimates), dtype=torch.bool)
    chosen[torch.argsort(estimates, descending=True, stable=True)[:count]] = True
    return chosen


def _scores(graph: FilterGraph, gains: Tensor, filter_map: FilterMap) -> dict[str, Tensor]:
    """Return minus the mean reward of each filter's node: lower goes first; 0 where it was never tried."""
    scores = {group.name: torch.zeros(group.filters) for group in filter_map.prunable}
    for node, gain in zip(graph.nodes, gains.tolist(), strict=True):
        for layer, index in node:
            scores[layer][index] = -gain
    return scores


def _suppressed(copy: Suppressed) -> dict[str, Any]:
    return {
        "suppression": {
            "accuracy": list(copy.accuracies),
            "stop_reason": copy.stop_reason,
            "steps": copy.checks[-1].step,
            "class_share": copy.class_share.tolist(),
        }
    }
