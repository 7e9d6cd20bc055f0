"""How many filters a pruning method removes: one rule for all, from clean images, beside each paper's own.

Scores say in which order filters go; this says how far. With the same rule, the same guard and, for equal
seeds, the same held-out images for every method, a comparison compares scores and not tuning. Two
differences are left: MNP's own guard also asks each removal for a benefit where the backdoor was exposed, and
by default the other methods have no such place; ``Selection.expose`` gives them one (and MNP tunes what
is left where it found triggers). And TSBD, which clears
weights of many filters and fine-tunes, chooses a share of the filters by the accuracy of its whole defence on
images of its own split, which it does not learn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.data.splits import split
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.groups import FilterMap
from unbackdoor.filters.mask import FilterMask, PruneMode
from unbackdoor.filters.select import Exposed, Guard, Step, guarded_walk, order
from unbackdoor.suppression import Suppression, suppress
from unbackdoor.types import LabelledImages, Progress, Purified, silent

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


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
        expose: With ``unlearnt`` the guard also asks each removal for ``guard.benefit`` in a copy that has
            unlearnt the clean task, whose backdoor's filters keep it from recovering: RNP's first use, which
            tells other methods what to prune (Li et al., ICML 2023, arXiv 2305.14876). ``none``: no copy.
    """

    amount: Literal["guarded", "own", "count", "fraction"] = "guarded"
    count: int = 30
    fraction: float = 0.02
    guard: Guard = field(default_factory=lambda: Guard(benefit=0.0))
    held_out_fraction: float = 0.0
    expose: Literal["none", "unlearnt"] = "none"

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
        if self.expose not in ("none", "unlearnt"):
            raise InvalidInputError(f"expose must be 'none' or 'unlearnt', got {self.expose!r}.")
        if (self.held_out_fraction or self.expose != "none") and self.amount != "guarded":
            raise InvalidInputError(
                "held-out images and an exposed copy serve the guard alone, and amount is "
                f"{self.amount!r}; use amount = 'guarded', or held_out_fraction = 0 and expose = 'none'."
            )
        if self.expose == "none" and self.guard.benefit > 0:
            raise InvalidInputError(
                f"the guard asks for a benefit of {self.guard.benefit} where the backdoor was exposed, and "
                "nothing exposes it; set guard.benefit to 0, or expose to 'unlearnt'."
            )
        if self.expose != "none" and self.guard.benefit == 0:
            raise InvalidInputError(
                "an unlearnt copy says which filters go by the benefit that the guard asks for, which is 0; "
                "set guard.benefit too, for example to 0.01, or expose to 'none'."
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


def exposed_copy(
    model: nn.Module,
    learning: LabelledImages,
    guarding: LabelledImages,
    selection: Selection,
    *,
    generator: torch.Generator,
    progress: Progress = silent,
) -> Exposed | None:
    """Return a copy of ``model`` that has unlearnt the clean task, as RNP does it, if the rule asks for one.

    Args:
        model: The network; left untouched.
        learning: Clean images that are unlearnt.
        guarding: Clean images on which benefits are measured.
        selection: The rule.
        generator: Order of the images; untouched if no copy is asked for.
        progress: Called during the unlearning.
    """
    if selection.expose == "none":
        return None
    unlearnt = suppress(model, learning, Suppression.rnp(), generator=rng.spawn(generator), progress=progress)
    return Exposed(unlearnt.model, guarding)


def guarded_units(
    measure: Callable[[Sequence[int]], tuple[float, float]],
    layer: str,
    candidates: Sequence[int],
    guard: Guard,
    *,
    exposed: Callable[[Sequence[int]], float] | None = None,
    progress: Progress = silent,
) -> tuple[list[int], list[Step]]:
    """Apply ``filters.select.guarded_walk``'s rule to units that are cheap to measure: inputs of the head.

    Args:
        measure: Mean clean cross-entropy and accuracy without the units given.
        layer: What the steps call the units' layer.
        candidates: Units, most suspicious first.
        guard: The allowed cost, and the benefit asked for; cheap trials need no screen, which has no part.
        exposed: The loss of an exposed copy without the units given, or None.
        progress: Called after each candidate.

    Returns:
        The units that go, and one step a candidate that was tried.
    """
    removed, steps = list[int](), list[Step]()
    start, start_accuracy = now, now_accuracy = measure([])
    copy_start = copy_now = exposed([]) if exposed else math.nan
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
        benefit, copy_loss = math.nan, copy_now
        if exposed and accepted:
            copy_loss = exposed([*removed, unit])
            benefit = (copy_now - copy_loss) / copy_start if copy_start > 0 else 0.0
            accepted = benefit >= guard.benefit
        if accepted:
            now, now_accuracy, copy_now = loss, accuracy, copy_loss
            removed.append(unit)
        in_vain = 0 if accepted else in_vain + 1
        steps.append(Step(layer, unit, change, benefit, accepted, now_accuracy))
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
        exposed: Where removals should lower the loss, from ``exposed_copy`` or the method's own.
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


def purified(
    method: DataclassInstance,
    model: nn.Module,
    filter_map: FilterMap,
    scores: Mapping[str, Tensor],
    selected: Selected,
    prune_mode: PruneMode,
    found: Mapping[str, Any],
) -> Purified:
    """Remove the selected filters, and say what was done.

    Args:
        method: Its options go into the diagnostics.
        model: The network; left untouched.
        filter_map: From ``find_filters``.
        scores: What the filters were ranked by.
        selected: From ``select``.
        prune_mode: What removing means.
        found: JSON values: what the method measured on the way.
    """
    return Purified(
        model=selected.mask.apply(model, filter_map, prune_mode=prune_mode),
        mask=selected.mask,
        scores=scores,
        diagnostics={
            "options": asdict(method),
            **found,
            "skipped_layers": [group.name for group in filter_map.prunable if group.name not in scores],
            **selected.describe(),
        },
    )
