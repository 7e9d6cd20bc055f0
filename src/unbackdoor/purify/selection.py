"""How many filters a pruning method removes: one rule for all, from clean images, beside each paper's own.

Scores say in which order filters go; this says how far. With the same rule, the same held-out images and
the same guard for every method, a comparison compares scores and not tuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.groups import FilterMap
from unbackdoor.filters.mask import FilterMask, PruneMode
from unbackdoor.filters.select import Exposed, Guard, Step, guarded_walk, order
from unbackdoor.types import LabelledImages, Progress, silent


@dataclass(frozen=True)
class Selection:
    """How many of the ranked filters are removed.

    Args:
        amount: ``guarded`` walks down the order and skips what clean images need (the same rule for all
            methods); ``own`` is the rule of the method's paper; ``count`` and ``fraction`` take a number.
        count: For ``count``.
        fraction: For ``fraction``, of the ranked filters, in [0, 1].
        guard: For ``guarded``.
    """

    amount: Literal["guarded", "own", "count", "fraction"] = "guarded"
    count: int = 30
    fraction: float = 0.02
    guard: Guard = field(default_factory=lambda: Guard(benefit=0.0))

    def __post_init__(self) -> None:
        if self.amount not in ("guarded", "own", "count", "fraction"):
            raise InvalidInputError(
                f"amount must be 'guarded', 'own', 'count' or 'fraction', got {self.amount!r}."
            )
        if self.count < 0 or not 0 <= self.fraction <= 1:
            raise InvalidInputError(
                f"count must be at least 0 and fraction lie in [0, 1], got {self.count} and {self.fraction}."
            )


@dataclass(frozen=True, eq=False)
class Selected:
    """The filters that go, and why.

    Args:
        mask: Which filters are kept.
        steps: The guarded walk, or nothing.
    """

    mask: FilterMask
    steps: tuple[Step, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Return JSON values for ``Purified.diagnostics``."""
        return {"walk": [step.describe() for step in self.steps]}


def select(
    model: nn.Module,
    clean: LabelledImages,
    filter_map: FilterMap,
    scores: Mapping[str, Tensor],
    selection: Selection,
    *,
    own: Sequence[tuple[str, int]],
    exposed: Exposed | None = None,
    prune_mode: PruneMode = "silence",
    progress: Progress = silent,
) -> Selected:
    """Choose the filters to remove.

    Args:
        model: The network; left untouched.
        clean: Clean images on which the guard measures the cost.
        filter_map: From ``find_filters``.
        scores: Layer name to ``(filters,)``; lower goes first. Layers that are absent lose nothing.
        selection: The rule.
        own: What the rule of the method's paper removes, as (layer, filter).
        exposed: Where removals should lower the loss, if the method knows such a place and the guard asks.
        prune_mode: What removing means.
        progress: Called after each candidate of the walk.
    """
    full = FilterMask.full(filter_map)
    if selection.amount == "own":
        return Selected(full.without(own))
    ranked = order(scores)
    if selection.amount == "count":
        return Selected(full.without(ranked[: selection.count]))
    if selection.amount == "fraction":
        return Selected(full.without(ranked[: round(selection.fraction * len(ranked))]))
    candidates = ranked[: max(1, round(selection.guard.candidates * len(ranked)))]
    mask, steps = guarded_walk(
        model,
        clean,
        filter_map,
        candidates,
        selection.guard,
        exposed=exposed,
        prune_mode=prune_mode,
        progress=progress,
    )
    return Selected(mask, tuple(steps))
