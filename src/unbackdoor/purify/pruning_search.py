"""Search for filters to prune: what a set is worth on clean images, and searches that do not learn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor.filters.groups import FilterMap
from unbackdoor.filters.mask import FilterMask, PruneMode, cleared_tensors
from unbackdoor.filters.replay import Replay
from unbackdoor.types import LabelledImages, Progress

Place = tuple[str, int]


@dataclass(frozen=True)
class Limits:
    """What pruning may cost on clean images, all removals together.

    Args:
        loss: Largest rise of the mean clean cross-entropy, in nats.
        accuracy: Largest loss of clean accuracy, as a fraction.
    """

    loss: float = 0.025
    accuracy: float = 0.01


@dataclass(frozen=True)
class Worth:
    """What it is worth to remove a set of filters.

    Args:
        value: The higher, the better; 0 for the empty set.
        allowed: Whether the limits are kept.
    """

    value: float
    allowed: bool


@dataclass(eq=False)
class Objective:
    """The worth of sets of filters, from clean images alone.

    The value is the fall of the loss of a suppressed copy, as a share of what it was, less ``clean_weight``
    times the rise of the model's own loss in nats, less ``price`` times the number of filters. A backdoor's
    filters are what keeps a suppressed copy from its clean task; filters of the clean task cost the model.

    Args:
        model: The network; left untouched.
        copy: A suppressed copy of it.
        clean: Clean images with labels.
        filter_map: Of both.
        prune_mode: What removing means.
        limits: What it may cost.
        clean_weight: Weight of the model's own loss.
        price: Of each filter.
    """

    model: nn.Module
    copy: nn.Module
    clean: LabelledImages
    filter_map: FilterMap
    prune_mode: PruneMode
    limits: Limits
    clean_weight: float
    price: float

    def __post_init__(self) -> None:
        full = FilterMask.full(self.filter_map)
        self._networks = [
            _Network.of(full.apply(network, self.filter_map), self.clean)
            for network in (self.model, self.copy)
        ]
        self._start = [network.measure() for network in self._networks]

    def worth(self, places: Iterable[Place]) -> Worth:
        """Return what it is worth to remove the filters at ``places``, given as (layer, filter)."""
        removed = list(places)
        cleared = [
            (name, index)
            for layer, index in removed
            for name in cleared_tensors(self.filter_map.group(layer), self.prune_mode)
        ]
        (loss, accuracy), (copy_loss, _) = (network.without(cleared) for network in self._networks)
        (loss_0, accuracy_0), (copy_loss_0, _) = self._start
        allowed = loss - loss_0 <= self.limits.loss and accuracy_0 - accuracy <= self.limits.accuracy + 1e-9
        benefit = (copy_loss_0 - copy_loss) / max(copy_loss_0, 1e-12)
        value = benefit - self.clean_weight * max(0.0, loss - loss_0) - self.price * len(removed)
        return Worth(value if math.isfinite(value) else -math.inf, allowed and math.isfinite(value))


@dataclass(eq=False)
class _Network:
    """A copy of a network from which sets of filters are taken on trial."""

    replay: Replay
    labels: Tensor
    tensors: Mapping[str, Tensor]
    saved: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(network: nn.Module, data: LabelledImages) -> _Network:
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        return _Network(Replay(network, data.images), data.labels, tensors)

    def measure(self) -> tuple[float, float]:
        return self._measured(self.replay.record())

    def without(self, cleared: list[tuple[str, int]]) -> tuple[float, float]:
        """Clear the tensors' entries, measure loss and accuracy, and take it back exactly."""
        if not cleared:
            return self._measured(self.replay.logits_after([]))
        for name, index in cleared:
            tensor = self.tensors[name].detach()
            self.saved.setdefault(name, tensor.clone())
            tensor[index] = 0.0
        try:
            return self._measured(self.replay.logits_after(list(self.saved)))
        finally:
            for name, value in self.saved.items():
                self.tensors[name].detach().copy_(value)
            self.saved.clear()

    def _measured(self, logits: Tensor) -> tuple[float, float]:
        labels = self.labels.to(logits.device)
        return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


@dataclass(eq=False)
class Search:
    """A search with a budget: what was tried, and the best set of nodes so far.

    Args:
        nodes: What is pruned together.
        worth: What removing some filters is worth.
        candidates: bool ``(U,)``: the nodes that may be removed.
        horizon: Most nodes in a set.
        penalty: Reward for going over the limits.
        steps: Most steps, each the removal of one node.
        seconds: Most wall time.
        progress: Called after each step.
    """

    nodes: tuple[tuple[Place, ...], ...]
    worth: Callable[[Iterable[Place]], Worth]
    candidates: Tensor
    horizon: int
    penalty: float
    steps: int
    seconds: float
    progress: Progress

    def __post_init__(self) -> None:
        self.taken = 0
        self.best: frozenset[int] = frozenset()
        self.best_value = 0.0
        self.course: list[float] = []
        self.known: dict[frozenset[int], Worth] = {frozenset(): Worth(0.0, True)}
        self._gains = torch.zeros(len(self.nodes))
        self._counts = torch.zeros(len(self.nodes))
        self._started = time.monotonic()

    def exhausted(self, *, reserve: int = 0) -> bool:
        """Say whether fewer than ``reserve`` + 1 steps, or no time, are left."""
        return self.taken + reserve >= self.steps or time.monotonic() - self._started >= self.seconds

    def step(self, removed: frozenset[int], node: int) -> tuple[float, bool]:
        """Remove one more node; return the reward, and whether the limits are kept.

        Args:
            removed: Nodes removed before.
            node: One more.
        """
        now = removed | {node}
        if now not in self.known:
            self.known[now] = self.worth([place for index in sorted(now) for place in self.nodes[index]])
        worth = self.known[now]
        reward = worth.value - self.known[removed].value if worth.allowed else -self.penalty
        self._gains[node] += reward
        self._counts[node] += 1
        if worth.allowed and worth.value > self.best_value:
            self.best, self.best_value = now, worth.value
        self.pause()
        return reward, worth.allowed

    def pause(self) -> None:
        """Count a step; one in which nothing is removed costs the budget as well."""
        self.taken += 1
        self.course.append(self.best_value)
        self.progress("searching", self.taken, self.steps)

    def mean_gains(self) -> Tensor:
        """Return the mean reward of removing each node, float32 ``(U,)``; 0 where it was never tried."""
        return self._gains / self._counts.clamp(min=1)

    def describe(self) -> dict[str, Any]:
        """Return JSON values."""
        every = max(1, len(self.course) // 50)
        return {
            "steps": self.taken,
            "sets_measured": len(self.known) - 1,
            "best_value": self.best_value,
            "nodes": len(self.nodes),
            "candidates": int(self.candidates.sum()),
            "nodes_removed": len(self.best),
            "best_value_by_step": self.course[::every],
        }


def by_chance(search: Search, generator: torch.Generator) -> None:
    """Remove candidates in random order, set after set, each until the limits or the horizon are reached."""
    candidates = search.candidates.nonzero().flatten()
    while not search.exhausted() and len(candidates):
        removed: frozenset[int] = frozenset()
        order = candidates[torch.randperm(len(candidates), generator=generator)]
        for node in order[: search.horizon].tolist():
            if search.exhausted():
                return
            _, allowed = search.step(removed, node)
            if not allowed:
                break
            removed |= {node}


def by_greed(search: Search, estimates: Tensor) -> None:
    """Go down the candidates by a first-order estimate and keep each removal that pays, until none does.

    Args:
        search: What to search in.
        estimates: float ``(U,)``: expected reward of each node.
    """
    candidates = search.candidates.nonzero().flatten()
    order = candidates[torch.argsort(estimates[candidates], descending=True, stable=True)].tolist()
    removed: frozenset[int] = frozenset()
    improved = True
    while improved and len(removed) < search.horizon:
        improved = False
        for node in order:
            if search.exhausted() or len(removed) == search.horizon:
                return
            if node not in removed:
                reward, allowed = search.step(removed, node)
                if allowed and reward > 0:
                    removed |= {node}
                    improved = True
