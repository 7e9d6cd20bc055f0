"""How many filters a pruning method removes: one rule for all, from clean images, beside each paper's own.

Scores say in which order filters go; this says how far. With the same rule, the same guard and, for equal
seeds, the same held-out images for every method, a comparison compares scores and not tuning. One
difference is left: MNP's own guard also asks each removal for a benefit where the backdoor was exposed, and
the other methods have no such place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.data.splits import split
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
        held_out_fraction: Share of the clean images kept from the learning and used by the guard alone,
            in [0, 1); 0 lets the guard use the images that the scores come from.
    """

    amount: Literal["guarded", "own", "count", "fraction"] = "guarded"
    count: int = 30
    fraction: float = 0.02
    guard: Guard = field(default_factory=lambda: Guard(benefit=0.0))
    held_out_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.amount not in ("guarded", "own", "count", "fraction"):
            raise InvalidInputError(
                f"amount must be 'guarded', 'own', 'count' or 'fraction', got {self.amount!r}."
            )
        if self.count < 0 or not 0 <= self.fraction <= 1:
            raise InvalidInputError(
                f"count must be at least 0 and fraction lie in [0, 1], got {self.count} and {self.fraction}."
            )
        if not 0 <= self.held_out_fraction < 1:
            raise InvalidInputError(f"held_out_fraction must lie in [0, 1), got {self.held_out_fraction}.")
        if self.held_out_fraction and self.amount != "guarded":
            raise InvalidInputError(
                f"held-out images serve the guard alone, and amount is {self.amount!r}; use amount = "
                "'guarded' or held_out_fraction = 0."
            )
        if self.guard.benefit > 0:
            raise InvalidInputError(
                f"the guard asks for a benefit of {self.guard.benefit} where the backdoor was exposed, and "
                "this method exposes none; set guard.benefit to 0."
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


def divide(
    clean: LabelledImages, held_out_fraction: float, generator: torch.Generator
) -> tuple[LabelledImages, LabelledImages]:
    """Return the images to learn from, and those on which the guard measures: all for both at 0.

    Methods call this before they draw anything else, so that equal seeds hold out the same images.

    Args:
        clean: Clean images with labels.
        held_out_fraction: Share of the second part, in [0, 1).
        generator: Source of randomness; untouched at 0.

    Raises:
        InvalidInputError: If either part would be empty.
    """
    if held_out_fraction == 0:
        return clean, clean
    return split(clean, held_out_fraction, rng.spawn(generator))


def guarded_units(
    measure: Callable[[Sequence[int]], tuple[float, float]],
    layer: str,
    candidates: Sequence[int],
    guard: Guard,
    *,
    progress: Progress = silent,
) -> tuple[list[int], list[Step]]:
    """Apply ``filters.select.guarded_walk``'s rule to units that are cheap to measure: inputs of the head.

    Args:
        measure: Mean clean cross-entropy and accuracy without the units given.
        layer: What the steps call the units' layer.
        candidates: Units, most suspicious first.
        guard: The allowed cost.
        progress: Called after each candidate.

    Returns:
        The units that go, and one step a candidate that was tried.
    """
    removed, steps = list[int](), list[Step]()
    start, start_accuracy = now, now_accuracy = measure([])
    in_vain = 0
    for done, unit in enumerate(candidates):
        if guard.patience and in_vain >= guard.patience:
            progress("pruning", len(candidates), len(candidates))
            break
        loss, accuracy = measure([*removed, unit])
        change = loss - now
        accepted = (
            change <= guard.per_filter
            and loss - start <= guard.total
            and start_accuracy - accuracy <= guard.accuracy + 1e-9
        )
        if accepted:
            now, now_accuracy = loss, accuracy
            removed.append(unit)
        in_vain = 0 if accepted else in_vain + 1
        steps.append(Step(layer, unit, change, math.nan, accepted, now_accuracy))
        progress("pruning", done + 1, len(candidates))
    return removed, steps


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
