"""Which nodes are poisoned, the same way for every graph attack."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unbackdoor.errors import InvalidInputError
from unbackdoor.graph.attacks.triggers import Poisoned, SubgraphTrigger, attach
from unbackdoor.graph.data import UNKNOWN, Graph
from unbackdoor.graph.gcn import probabilities


def choose(
    graph: Graph, surrogate: nn.Module, target_class: int, count: int, generator: torch.Generator
) -> Tensor:
    """Draw nodes without a label that a clean network does not take for the target class already.

    UGBA looks for representative nodes by clustering instead; a random draw keeps the attacks comparable.

    Args:
        graph: The training graph.
        surrogate: Trained on it by the attacker.
        target_class: Where the backdoor is to lead.
        count: How many.
        generator: On the CPU.

    Returns:
        int64 ``(count,)``.

    Raises:
        InvalidInputError: If there are fewer such nodes, or no such class.
    """
    if not 0 <= target_class < graph.num_classes:
        raise InvalidInputError(
            f"target_class must lie in [0, {graph.num_classes - 1}], got {target_class}; choose a class."
        )
    others = probabilities(surrogate, graph).argmax(1) != target_class
    candidates = (others & (graph.labels == UNKNOWN)).nonzero().flatten()
    if not 0 < count <= len(candidates):
        raise InvalidInputError(
            f"{count} nodes cannot be poisoned: {len(candidates)} have no label and another class than the "
            "target; set poisoned to fewer, and at least 1."
        )
    return candidates[torch.randperm(len(candidates), generator=generator)[:count]].sort().values


def poison(graph: Graph, nodes: Tensor, trigger: SubgraphTrigger, target_class: int) -> Poisoned:
    """Hang the trigger on ``nodes`` and give them the target's label."""
    return Poisoned(
        attach(graph.relabelled(nodes, target_class), nodes, trigger),
        nodes,
        trigger,
        target_class,
        {"poisoned": len(nodes), "target_class": target_class},
    )
