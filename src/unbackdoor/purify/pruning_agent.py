"""An agent that learns which filters to prune: Gymnasium's environment, maskable PPO, a graph network.

Imported only where the extra ``rl`` is there; ``onp`` asks for it.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from unbackdoor.purify.filter_graph import FilterGraph
from unbackdoor.purify.pruning_search import Search

Flags = np.ndarray[Any, np.dtype[Any]]


class PruningEnv(gymnasium.Env):
    """Remove one node after the other; the last action stops.

    An observation is float32 ``(U,)``: 1 for nodes that were removed. Rewards add up to the worth of the set.

    Args:
        search: Measures, and remembers the best set.
    """

    def __init__(self, search: Search) -> None:
        self.search = search
        self.stop = len(search.nodes)
        self.removed: frozenset[int] = frozenset()
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (self.stop,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(self.stop + 1)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Flags, dict[str, Any]]:
        """Put all nodes back."""
        super().reset(seed=seed)
        self.removed = frozenset()
        return self._observation(), {}

    def step(self, action: int) -> tuple[Flags, float, bool, bool, dict[str, Any]]:
        """Remove a node, or stop."""
        if int(action) == self.stop:
            self.search.pause()
            return self._observation(), 0.0, True, False, {}
        reward, allowed = self.search.step(self.removed, int(action))
        self.removed |= {int(action)}
        ended = not allowed or len(self.removed) >= self.search.horizon
        return self._observation(), reward, ended, False, {}

    def action_masks(self) -> Flags:
        """Return bool ``(U + 1,)``: the candidates that are still there, and to stop."""
        free = np.append(self.search.candidates.numpy(), True)
        free[list(self.removed)] = False
        return free

    def _observation(self) -> Flags:
        flags = np.zeros(self.stop, dtype=np.float32)
        flags[list(self.removed)] = 1.0
        return flags


class GraphEmbedding(BaseFeaturesExtractor):
    """Message passing over the graph of filters.

    Its output ``(B, U + 1 + H)`` holds a logit for each node, one to stop, and the mean embedding.

    Args:
        observation_space: Of the environment.
        graph: Nodes, features and edges.
        hidden: Size H of an embedding.
        rounds: Of message passing.
    """

    features: Tensor
    edges: Tensor
    weights: Tensor

    def __init__(
        self, observation_space: gymnasium.spaces.Box, graph: FilterGraph, hidden: int, rounds: int
    ) -> None:
        super().__init__(observation_space, len(graph) + 1 + hidden)
        self.register_buffer("features", graph.features)
        self.register_buffer("edges", graph.edges)
        self.register_buffer("weights", graph.weights)
        self.enter = nn.Linear(graph.features.shape[1] + 1, hidden)
        self.own = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(rounds))
        self.heard = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(rounds))
        self.logit, self.stop = nn.Linear(hidden, 1), nn.Linear(hidden, 1)
        with torch.no_grad():
            # The first policy is close to chance.
            for layer in (self.logit, self.stop):
                layer.weight.mul_(0.01)
                layer.bias.zero_()

    def forward(self, removed: Tensor) -> Tensor:
        """Embed the nodes, given which were removed, ``(B, U)``."""
        static = self.features.expand(len(removed), -1, -1)
        nodes = self.enter(torch.cat([static, removed.unsqueeze(2)], dim=2)).relu()
        source, target = self.edges
        for own, heard in zip(self.own, self.heard, strict=True):
            messages = nodes[:, source] * self.weights.unsqueeze(1)
            summed = torch.zeros_like(nodes).index_add_(1, target, messages)
            nodes = (own(nodes) + heard(summed)).relu()
        pooled = nodes.mean(1)
        return torch.cat([self.logit(nodes).squeeze(2), self.stop(pooled), pooled], dim=1)


class _Part(nn.Module):
    """Takes some columns."""

    def __init__(self, start: int, end: int | None) -> None:
        super().__init__()
        self.columns = slice(start, end)

    def forward(self, values: Tensor) -> Tensor:
        return values[:, self.columns]


class GraphPolicy(MaskableActorCriticPolicy):
    """The logits are those of the graph network itself, so that all nodes share its weights."""

    def _build(self, lr_schedule: Any) -> None:  # noqa: ANN401 - a schedule of stable-baselines3
        super()._build(lr_schedule)
        actions = int(self.action_space.n)
        self.action_net = _Part(0, actions)
        self.value_net = nn.Sequential(_Part(actions, None), nn.Linear(self.features_dim - actions, 1))
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


class _Budget(BaseCallback):
    """Stops learning when the search has just enough steps left to use what was learnt; counts updates."""

    def __init__(self, search: Search) -> None:
        super().__init__()
        self.search = search
        self.reserve = min(search.horizon, search.steps // 4)
        self.updates = 0

    @property
    def longest(self) -> int:
        """Most steps of a rollout that ends before this stops, and so is learnt from."""
        return self.search.steps - self.reserve - 1

    def _on_rollout_end(self) -> None:
        self.updates += 1  # not called after a rollout that was stopped

    def _on_step(self) -> bool:
        return not self.search.exhausted(reserve=self.reserve)


def learn(
    graph: FilterGraph,
    search: Search,
    *,
    seed: int,
    hidden: int,
    rounds: int,
    rollout: int,
    passes: int,
    learning_rate: float,
    entropy: float,
) -> int:
    """Learn a policy within the budget of ``search``, then follow it once; the best set is kept there.

    Args:
        graph: What the policy sees.
        search: Environment, budget and memory.
        seed: Of everything; the global generators are seeded, and are to be fenced by the caller.
        hidden: Size of an embedding.
        rounds: Of message passing.
        rollout: Steps between updates, at least 2; fewer where the budget has room for no such update.
        passes: Over the steps in each update.
        learning_rate: Step of Adam.
        entropy: Weight of the policy's entropy.

    Returns:
        How many updates there were; none only where the time was up before.
    """
    environment, budget = PruningEnv(search), _Budget(search)
    rollout = min(rollout, budget.longest)
    agent = MaskablePPO(
        GraphPolicy,
        environment,
        n_steps=rollout,
        batch_size=rollout,
        n_epochs=passes,
        gamma=1.0,
        learning_rate=learning_rate,
        ent_coef=entropy,
        seed=seed,
        device="cpu",
        policy_kwargs={
            "net_arch": [],
            "ortho_init": False,
            "features_extractor_class": GraphEmbedding,
            "features_extractor_kwargs": {"graph": graph, "hidden": hidden, "rounds": rounds},
        },
    )
    agent.learn(search.steps, callback=budget, log_interval=None)
    observation, ended = environment.reset()[0], False
    while not ended and not search.exhausted():
        action, _ = agent.predict(observation, deterministic=True, action_masks=environment.action_masks())
        observation, _, ended, _, _ = environment.step(int(action))
    return budget.updates
