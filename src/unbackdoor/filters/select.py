"""From scores to a mask: how many filters go, and which of them are worth what they cost.

Lower scores go first. Fixed counts, fractions and thresholds are the literature's ways; the guarded walk
is ours: it goes down the same order, removes one filter after the other, and skips each one that the
clean task needs, measured exactly on clean images. Nothing here can see a trigger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor.compute import logits_of
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.groups import FilterMap
from unbackdoor.filters.mask import FilterMask, PruneMode, cleared_tensors
from unbackdoor.types import LabelledImages, Progress, silent


def order(scores: Mapping[str, Tensor], *tie_breaks: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """Return all filters as (layer, filter), lowest score first.

    Args:
        scores: Layer name to ``(filters,)``.
        tie_breaks: Further scores that decide among equal ones, in turn; after them layer order and
            filter index do, so the result is always the same.
    """
    places = [(name, j) for name, values in scores.items() for j in range(len(values))]
    index = torch.arange(len(places))
    for values in reversed((scores, *tie_breaks)):
        flat = torch.cat([values[name].detach().double().cpu().flatten() for name in scores])
        index = index[torch.argsort(flat[index], stable=True)]
    return [places[i] for i in index.tolist()]


def below(scores: Mapping[str, Tensor], threshold: float) -> list[tuple[str, int]]:
    """Return the filters whose score is at or below ``threshold`` (MNP, Algorithm 1 line 14)."""
    return [
        (name, j) for name, values in scores.items() for j, v in enumerate(values.tolist()) if v <= threshold
    ]


@dataclass(frozen=True)
class Guard:
    """What removing filters may cost, on clean images alone.

    Args:
        candidates: Share of the prunable filters that are looked at, from the lowest score, in (0, 1].
        per_filter: Largest rise of the mean clean cross-entropy (nats) by one more removal.
        total: Largest rise of it by all removals together.
        accuracy: Largest loss of clean accuracy by all removals together, as a fraction.
    """

    candidates: float = 0.05
    per_filter: float = 0.01
    total: float = 0.025
    accuracy: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.candidates <= 1:
            raise InvalidInputError(f"the guard's candidates must lie in (0, 1], got {self.candidates}.")


@dataclass(frozen=True)
class Step:
    """One candidate of the walk and what was decided.

    Args:
        layer: Its layer.
        filter: Its index in the layer.
        loss_change: Rise of the clean loss by removing it, on top of what was removed before (nats).
        removed: Whether it was removed.
        accuracy: Clean accuracy after the decision.
    """

    layer: str
    filter: int
    loss_change: float
    removed: bool
    accuracy: float


def guarded_walk(
    model: nn.Module,
    clean: LabelledImages,
    filter_map: FilterMap,
    candidates: Sequence[tuple[str, int]],
    guard: Guard,
    *,
    prune_mode: PruneMode = "silence",
    progress: Progress = silent,
) -> tuple[FilterMask, list[Step]]:
    """Remove the candidates in turn, skipping each whose removal costs more than ``guard`` allows.

    Args:
        model: The network; left untouched.
        clean: Clean images on which the cost is measured.
        filter_map: From ``find_filters``.
        candidates: (layer, filter), most suspicious first.
        guard: The allowed cost.
        prune_mode: What removing means.
        progress: Called after each candidate.

    Returns:
        The mask and one step a candidate.
    """
    full = FilterMask.full(filter_map)
    trial = full.apply(model, filter_map, prune_mode=prune_mode)
    tensors = {**dict(trial.named_parameters()), **dict(trial.named_buffers())}
    first_loss, first_accuracy = _loss_and_accuracy(trial, clean)
    loss, accuracy = first_loss, first_accuracy
    removed: list[tuple[str, int]] = []
    steps: list[Step] = []
    for done, (layer, index) in enumerate(candidates):
        names = cleared_tensors(filter_map.group(layer), prune_mode)
        saved = {name: tensors[name].detach()[index].clone() for name in names}
        _write(tensors, index, dict.fromkeys(names, 0.0))
        new_loss, new_accuracy = _loss_and_accuracy(trial, clean)
        accepted = (
            new_loss - loss <= guard.per_filter
            and new_loss - first_loss <= guard.total
            and first_accuracy - new_accuracy <= guard.accuracy + 1e-9
        )
        change = new_loss - loss
        if accepted:
            removed.append((layer, index))
            loss, accuracy = new_loss, new_accuracy
        else:
            _write(tensors, index, saved)
        steps.append(Step(layer, index, change, accepted, accuracy))
        progress("guarded walk", done + 1, len(candidates))
    return full.without(removed), steps


@torch.no_grad()
def _write(tensors: Mapping[str, Tensor], index: int, values: Mapping[str, Tensor | float]) -> None:
    for name, value in values.items():
        tensors[name].detach()[index] = value


def _loss_and_accuracy(model: nn.Module, clean: LabelledImages) -> tuple[float, float]:
    logits = logits_of(model, clean.images)
    labels = clean.labels.to(logits.device)
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())
