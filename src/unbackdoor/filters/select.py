"""From scores to a mask: how many filters go, and which of them are worth what they cost.

Lower scores go first. Fixed counts, fractions and thresholds are the literature's ways; the guarded walk
is ours: it goes down the same order, removes one filter after the other, and skips each one that the
clean task needs, measured exactly on clean images. Nothing here can see a trigger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.groups import FilterMap
from unbackdoor.filters.mask import FilterMask, PruneMode, cleared_tensors
from unbackdoor.filters.replay import Replay
from unbackdoor.filters.saliency import taylor_saliency
from unbackdoor.types import LabelledImages, Progress, silent

_SCREENING_IMAGES = 256
"""How many images the first-order estimates are made on: they only say what is worth a trial."""


def order(scores: Mapping[str, Tensor], *tie_breaks: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """Return all filters as (layer, filter), lowest score first.

    Args:
        scores: Layer name to ``(filters,)``.
        tie_breaks: Further scores that decide among equal ones, in turn; after them layer order and
            filter index do, so the result is always the same.

    Raises:
        UnsupportedModelError: If there is no filter.
    """
    places = [(name, j) for name, values in scores.items() for j in range(len(values))]
    if not places:
        raise UnsupportedModelError(
            "there is no filter to put in order: the network has no layer before its head whose filters "
            "could be removed, or none of them has a score; give a network with hidden layers."
        )
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
        accuracy: Largest loss of clean accuracy by all removals together, as a fraction in [0, 1].
        benefit: Smallest fall of the loss where the backdoor was exposed by one more removal, as a share of
            what it was at the start, in [0, 1). A backdoor's filters are what keeps a suppressed copy from
            its clean task, or stamped images from their class; others cost a little clean accuracy each and
            give nothing back. 0 asks for no benefit.
        screen: Candidates whose first-order estimate of the benefit (``taylor_saliency``, where the backdoor
            was exposed) is below this share of ``benefit`` are passed over without a trial; 0 tries all.
        patience: The walk ends when so many candidates in a row were tried and stayed; 0 tries all.
    """

    candidates: float = 0.15
    per_filter: float = 0.01
    total: float = 0.025
    accuracy: float = 0.01
    benefit: float = 0.01
    screen: float = 0.5
    patience: int = 60

    def __post_init__(self) -> None:
        if not 0 < self.candidates <= 1:
            raise InvalidInputError(f"the guard's candidates must lie in (0, 1], got {self.candidates}.")
        bounds = (self.per_filter, self.total)
        if any(map(math.isnan, bounds)) or not 0 <= self.benefit < 1:
            raise InvalidInputError(
                "the guard's per_filter and total must be numbers and its benefit lie in [0, 1), "
                f"got {', '.join(map(str, bounds))} and {self.benefit}."
            )
        if not 0 <= self.accuracy <= 1:
            raise InvalidInputError(
                "the guard's accuracy is the largest loss of clean accuracy as a fraction and must lie in "
                f"[0, 1], got {self.accuracy}; 0.02 allows 2 points of 100."
            )
        if not self.screen >= 0 or self.patience < 0:
            raise InvalidInputError(
                f"the guard's screen and patience must be at least 0, got {self.screen} and {self.patience}."
            )


@dataclass(frozen=True)
class Step:
    """One candidate of the walk and what was decided.

    Args:
        layer: Its layer.
        filter: Its index in the layer.
        loss_change: Rise of the clean loss by removing it, on top of what was removed before (nats); NaN
            where it was passed over without a trial.
        benefit: Fall of the loss where the backdoor was exposed, as a share of its start; NaN where it was
            not asked.
        removed: Whether it was removed.
        accuracy: Clean accuracy after the decision.
    """

    layer: str
    filter: int
    loss_change: float
    benefit: float
    removed: bool
    accuracy: float

    def describe(self) -> dict[str, Any]:
        """Return JSON values, which know no NaN: None takes its place."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True, eq=False)
class Exposed:
    """Where a backdoor shows: a model and images on which its filters do harm.

    Args:
        model: Has the filters of the model under treatment: a suppressed copy of it, or that very model.
        data: Images with the labels that they should get: clean ones, or ones with an inverted trigger.
    """

    model: nn.Module
    data: LabelledImages


def guarded_walk(
    model: nn.Module,
    clean: LabelledImages,
    filter_map: FilterMap,
    candidates: Sequence[tuple[str, int]],
    guard: Guard,
    *,
    exposed: Exposed | None = None,
    reference: nn.Module | None = None,
    prune_mode: PruneMode = "silence",
    progress: Progress = silent,
) -> tuple[FilterMask, list[Step]]:
    """Remove the candidates in turn, skipping each whose removal costs more than ``guard`` allows.

    Args:
        model: The network; left untouched.
        clean: Clean images on which the cost is measured.
        filter_map: From ``find_filters``.
        candidates: (layer, filter), most suspicious first.
        guard: The allowed cost, and the benefit asked for.
        exposed: Where benefits are measured; None asks for none.
        reference: What the total costs are counted from, if ``model`` has lost filters before; else it is.
        prune_mode: What removing means.
        progress: Called after each candidate.

    Returns:
        The mask and one step a candidate.
    """
    full = FilterMask.full(filter_map)
    trial = _Trial.of(full.apply(model, filter_map, prune_mode=prune_mode), clean)
    copy = None if exposed is None else _Trial.of(full.apply(exposed.model, filter_map), exposed.data)
    now = trial.measure()
    start = now if reference is None else _Trial.of(full.apply(reference, filter_map), clean).measure()
    copy_start = copy_now = copy.measure().loss if copy else math.nan
    least = guard.screen * guard.benefit * copy_start if copy else 0.0
    promise = _promise(copy, filter_map) if copy and least else None
    removed: list[tuple[str, int]] = []
    steps: list[Step] = []
    in_vain = 0
    for done, (layer, index) in enumerate(candidates):
        if guard.patience and in_vain >= guard.patience:
            break
        progress("guarded walk", done + 1, len(candidates))
        if promise and promise[layer][index] < least:
            steps.append(Step(layer, index, math.nan, math.nan, False, now.accuracy))
            continue
        names = cleared_tensors(filter_map.group(layer), prune_mode)
        new = trial.without(names, index)
        accepted = (
            new.loss - now.loss <= guard.per_filter
            and new.loss - start.loss <= guard.total
            and start.accuracy - new.accuracy <= guard.accuracy + 1e-9
        )
        benefit, copy_new = math.nan, copy_now
        # The copy is asked only about filters that the model can spare: that is half of the passes.
        if copy is not None and accepted:
            copy_new = copy.without(names, index).loss
            # A copy that suppression could not move (logits so large that the loss is 0) gives nothing back.
            benefit = (copy_now - copy_new) / copy_start if copy_start > 0 else 0.0
            accepted = benefit >= guard.benefit or guard.benefit == 0
            copy.settle(keep=accepted)
        trial.settle(keep=accepted)
        steps.append(
            Step(layer, index, new.loss - now.loss, benefit, accepted, (new if accepted else now).accuracy)
        )
        in_vain = 0 if accepted else in_vain + 1
        if accepted:
            removed.append((layer, index))
            now, copy_now = new, copy_new
            promise = _promise(copy, filter_map) if copy and promise else None
    if len(steps) < len(candidates):
        progress("guarded walk", len(candidates), len(candidates))
    return full.without(removed), steps


def removal_losses(
    model: nn.Module,
    data: LabelledImages,
    filter_map: FilterMap,
    places: Sequence[tuple[str, int]],
    *,
    prune_mode: PruneMode = "silence",
    progress: Progress = silent,
) -> tuple[float, list[float]]:
    """Return the mean cross-entropy (nats), and what it is without each of some filters, one at a time.

    Args:
        model: Takes float images in [0, 1]; left untouched.
        data: Images with labels.
        filter_map: From ``find_filters``.
        places: (layer, filter).
        prune_mode: What removing means.
        progress: Called after each filter.
    """
    trial = _Trial.of(FilterMask.full(filter_map).apply(model, filter_map), data)
    whole, losses = trial.measure().loss, []
    for done, (layer, index) in enumerate(places):
        losses.append(trial.without(cleared_tensors(filter_map.group(layer), prune_mode), index).loss)
        trial.settle(keep=False)
        progress("single filters", done + 1, len(places))
    return whole, losses


def _promise(copy: _Trial, filter_map: FilterMap) -> Mapping[str, Sequence[float]]:
    """Return by how much the loss would fall to first order if each filter were removed."""
    images = copy.replay.images
    some = torch.linspace(0, len(images) - 1, min(len(images), _SCREENING_IMAGES)).long()
    rises = taylor_saliency(
        copy.replay.model, LabelledImages(images[some], copy.labels[some.to(copy.labels.device)]), filter_map
    )
    return {name: (-values).tolist() for name, values in rises.items()}


@dataclass(frozen=True)
class _Measured:
    loss: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class _Trial:
    """A copy of a model from which filters are taken on trial."""

    replay: Replay
    labels: Tensor
    tensors: Mapping[str, Tensor]
    undo: dict[str, tuple[int, Tensor]]

    @staticmethod
    def of(model: nn.Module, data: LabelledImages) -> _Trial:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return _Trial(Replay(model, data.images), data.labels, tensors, {})

    def measure(self) -> _Measured:
        """Measure in full, and remember the pass for the trials to come."""
        return self._measured(self.replay.record())

    def without(self, names: Sequence[str], index: int) -> _Measured:
        """Clear one filter and measure; ``settle`` decides whether that stays."""
        for name in names:
            self.undo[name] = (index, self.tensors[name].detach()[index].clone())
            self.tensors[name].detach()[index] = 0.0
        return self._measured(self.replay.logits_after(names))

    def settle(self, *, keep: bool) -> None:
        """Keep the last removal, or take it back exactly."""
        if keep:
            self.replay.keep(tuple(self.undo))
        else:
            for name, (index, value) in self.undo.items():
                self.tensors[name].detach()[index] = value
        self.undo.clear()

    def _measured(self, logits: Tensor) -> _Measured:
        labels = self.labels.to(logits.device)
        return _Measured(
            float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())
        )
