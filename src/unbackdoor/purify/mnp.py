"""Magnitude-based Neuron Pruning: expose the filters that carry a backdoor, and prune them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.compute import check_fits
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.groups import FilterMap, find_filters
from unbackdoor.filters.magnitude import layer_normalised, magnitudes
from unbackdoor.filters.mask import FilterMask, PruneMode
from unbackdoor.filters.select import Guard, Step, below, guarded_walk, order
from unbackdoor.masks import LearntMasks, MaskTraining, learn_masks
from unbackdoor.suppression import Suppressed, Suppression, suppress
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent

Stage = Literal["suppress", "penalise", "preserve"]


@dataclass(frozen=True)
class MNP:
    """Prune the filters that a suppressed copy of the model wants gone and the model itself can spare.

    Source: Li, Jiang, Yi, "Magnitude-based Neuron Pruning for Backdoor Defense", 2024, arXiv 2405.17750,
    Algorithm 1. Clean suppression (Eq. 6) yields theta_s; weight penalty (Eq. 5) learns M1 in [0, 1] on
    theta_s; clean preserving (Eq. 7) learns M2 in [1, 2] on theta; filters of theta with the smallest
    M1 + M2 are pruned.

    Deviations of the default from the paper, each an option; ``MNP.paper()`` is the literal reading:
    suppression stops by accuracy; masks train with norms in eval mode, since in train mode batch norm makes
    the loss independent of them; the order is M1 alone; the number of filters comes from a guarded walk on
    clean images instead of a fixed 30; removing a filter also clears its norm.

    Args:
        suppression: Clean suppression, Eq. 6.
        masks: How M1 and M2 are learnt.
        stages: Which of the three objectives are used; leaving one out is the paper's ablation.
        lambda1: Weight of the norm penalty on M1, lambda in Eq. 5.
        lambda2: Weight of the norm reward on M2, lambda in Eq. 7.
        norm_source: Whose filter norms w weigh the masks: ``matching`` takes theta_s for M1 and theta for
            M2, ``original`` theta and ``suppressed`` theta_s for both. The paper is silent.
        norm_scaling: Raw norms, or divided by their layer's l2 norm (as Eq. 12).
        norm_folded: Multiply norms by the scale of the following batch norm.
        reward_weights: Whether M2's reward is weighed by the norms (Eq. 7) or the same for all filters.
        layers: Which layers may lose filters: ``all`` but the head, ``conv`` only, or ``normed``, those that
            a norm follows.
        tie_break: Among equal scores the lower M1 and then the larger norm goes first, or layer and index
            decide.
        score: ``m1``, ``sum`` (M1 + M2, the paper's), or ``rank_sum`` (of their ranks).
        literal_line12: Clip M2 from M1 as Algorithm 1 line 12 prints; M2 is then 1 for ever.
        amount: How many filters go: ``guarded``, ``count``, ``fraction`` or ``threshold``.
        count: For ``count``; the paper's 30 is 0.6 % of a ResNet-18 of width 64.
        fraction: For ``fraction``, of the prunable filters, in [0, 1].
        threshold: For ``threshold``: prune scores at or below it.
        guard: For ``guarded``.
        held_out_fraction: Share of the clean images kept from the learning and used by the guard alone,
            in [0, 1); 0 lets the guard use the images that the masks were learnt on.
        prune_mode: What removing a filter clears.
    """

    name: ClassVar[str] = "mnp"
    title: ClassVar[str] = "Magnitude-based Neuron Pruning"
    source: ClassVar[str] = "Li, Jiang, Yi 2024, arXiv 2405.17750"
    needs: ClassVar[str] = "clean images with labels"

    suppression: Suppression = field(default_factory=Suppression)
    masks: MaskTraining = field(default_factory=MaskTraining)
    stages: tuple[Stage, ...] = ("suppress", "penalise", "preserve")
    lambda1: float = 5e-4
    lambda2: float = 5e-4
    norm_source: Literal["matching", "original", "suppressed"] = "matching"
    norm_scaling: Literal["none", "layer"] = "none"
    norm_folded: bool = False
    reward_weights: Literal["norm", "uniform"] = "norm"
    layers: Literal["all", "conv", "normed"] = "all"
    tie_break: Literal["magnitude", "index"] = "magnitude"
    score: Literal["m1", "sum", "rank_sum"] = "m1"
    literal_line12: bool = False
    amount: Literal["guarded", "count", "fraction", "threshold"] = "guarded"
    count: int = 30
    fraction: float = 0.02
    threshold: float = 1.0
    guard: Guard = field(default_factory=Guard)
    held_out_fraction: float = 0.0
    prune_mode: PruneMode = "silence"

    def __post_init__(self) -> None:
        unknown = set(self.stages) - {"suppress", "penalise", "preserve"}
        if unknown or not set(self.stages) & {"penalise", "preserve"}:
            raise InvalidInputError(
                f"stages must name 'penalise' or 'preserve' or both, and may name 'suppress'; "
                f"got {self.stages}."
            )
        if not 0 <= self.held_out_fraction < 1:
            raise InvalidInputError(f"held_out_fraction must lie in [0, 1), got {self.held_out_fraction}.")
        if self.count < 0:
            raise InvalidInputError(f"count must be at least 0, got {self.count}.")
        if not 0 <= self.fraction <= 1:
            raise InvalidInputError(f"fraction must lie in [0, 1], got {self.fraction}.")

    @staticmethod
    def paper(count: int = 30) -> MNP:
        """Return the literal reading of the paper, as far as it can run.

        Section 5.1: mu 0.001, eta_1 0.01, 20 suppression epochs run blind, lambda 5e-4, eta_2 0.1, 30
        filters by M1 + M2, only the filter's weights set to zero, plain gradient steps without momentum, as
        Algorithm 1 prints them. Where the paper is silent: batch 128, 20 mask epochs; norms in train mode
        while suppressing (RNP's code) and in eval mode for the masks, because in train mode the objective of
        both does not depend on them.
        """
        return MNP(
            suppression=Suppression(budget=20, unit="epoch", stop_accuracy=0.0, momentum=0.0),
            masks=MaskTraining(momentum=0.0),
            score="sum",
            amount="count",
            count=count,
            prune_mode="weight",
        )

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a copy of ``model`` without the exposed filters.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels; a few hundred.
            generator: All randomness follows it; on the CPU.
            progress: Called during each stage.

        Raises:
            InvalidInputError: If there are too few images, or a label has no output of the model.
            UnsupportedModelError: If the network's filters cannot be found.
        """
        check_fits(model, clean, purpose="purification", at_least=2)
        filter_map = find_filters(model, as_float(clean.images[:1]))
        learning, guarding = self._split(clean, generator)
        suppressed = self._suppress(model, learning, generator, progress)
        exposed = suppressed.model if suppressed else model
        m1, m2 = self._learn(model, exposed, learning, filter_map, generator, progress)
        norms = self._norms(exposed, filter_map)
        scores = _combine(m1, m2, self.score)
        allowed = self._allowed(filter_map)
        scores = {name: values for name, values in scores.items() if name in allowed}
        ranked = order(scores, *self._tie_breaks(m1, norms))
        copy = suppressed.model if suppressed else None
        mask, steps = self._choose(model, copy, guarding, filter_map, scores, ranked, progress)
        return Purified(
            model=mask.apply(model, filter_map, prune_mode=self.prune_mode),
            mask=mask,
            scores={name: values.cpu() for name, values in scores.items()},
            diagnostics=_diagnostics(self, suppressed, m1, m2, steps, filter_map, learning),
        )

    def _allowed(self, filter_map: FilterMap) -> set[str]:
        chosen = {
            group.name
            for group in filter_map.prunable
            if self.layers == "all" or (group.kind == "conv" if self.layers == "conv" else group.norms)
        }
        if not chosen:
            raise UnsupportedModelError(
                f"no layer of this network is left with layers = {self.layers!r}; use layers = 'all'."
            )
        return chosen

    def _tie_breaks(self, m1: LearntMasks | None, norms: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        if self.tie_break == "index":
            return []
        lower_first = [m1.masks] if m1 else []
        return [*lower_first, {name: -values for name, values in norms.items()}]

    def _split(
        self, clean: LabelledImages, generator: torch.Generator
    ) -> tuple[LabelledImages, LabelledImages]:
        from unbackdoor.data.splits import split

        if self.held_out_fraction == 0:
            return clean, clean
        return split(clean, self.held_out_fraction, rng.spawn(generator))

    def _suppress(
        self, model: nn.Module, clean: LabelledImages, generator: torch.Generator, progress: Progress
    ) -> Suppressed | None:
        if "suppress" not in self.stages:
            return None
        return suppress(model, clean, self.suppression, generator=rng.spawn(generator), progress=progress)

    def _learn(
        self,
        model: nn.Module,
        exposed: nn.Module,
        clean: LabelledImages,
        filter_map: FilterMap,
        generator: torch.Generator,
        progress: Progress,
    ) -> tuple[LearntMasks | None, LearntMasks | None]:
        generators = rng.spawn(generator), rng.spawn(generator)
        m1 = m2 = None
        if "penalise" in self.stages:
            source = model if self.norm_source == "original" else exposed
            penalty = {n: self.lambda1 * w for n, w in self._norms(source, filter_map).items()}
            m1 = learn_masks(
                exposed, clean, filter_map, self.masks, penalty=penalty, bounds=(0.0, 1.0),
                generator=generators[0], stage="weight penalty", progress=progress,
            )  # fmt: skip
        if "preserve" in self.stages and (self.score != "m1" or m1 is None):
            source = exposed if self.norm_source == "suppressed" else model
            weights = self._norms(source, filter_map)
            if self.reward_weights == "uniform":
                weights = {name: torch.ones_like(w) for name, w in weights.items()}
            reward = {name: -self.lambda2 * w for name, w in weights.items()}
            m2 = learn_masks(
                model, clean, filter_map, self.masks, penalty=reward, bounds=(1.0, 2.0),
                generator=generators[1], stage="clean preserving", progress=progress,
            )  # fmt: skip
            if self.literal_line12:
                m2 = replace(m2, masks={name: torch.ones_like(values) for name, values in m2.masks.items()})
        return m1, m2

    def _norms(self, model: nn.Module, filter_map: FilterMap) -> dict[str, Tensor]:
        norms = magnitudes(model, filter_map, folded=self.norm_folded)
        return layer_normalised(norms) if self.norm_scaling == "layer" else norms

    def _choose(
        self,
        model: nn.Module,
        exposed: nn.Module | None,
        clean: LabelledImages,
        filter_map: FilterMap,
        scores: Mapping[str, Tensor],
        ranked: list[tuple[str, int]],
        progress: Progress,
    ) -> tuple[FilterMask, list[Step]]:
        full = FilterMask.full(filter_map)
        if self.amount == "count":
            return full.without(ranked[: self.count]), []
        if self.amount == "fraction":
            return full.without(ranked[: round(self.fraction * len(ranked))]), []
        if self.amount == "threshold":
            return full.without(below(scores, self.threshold)), []
        candidates = ranked[: max(1, round(self.guard.candidates * len(ranked)))]
        return guarded_walk(
            model,
            clean,
            filter_map,
            candidates,
            self.guard,
            exposed=exposed,
            prune_mode=self.prune_mode,
            progress=progress,
        )


def _combine(m1: LearntMasks | None, m2: LearntMasks | None, score: str) -> dict[str, Tensor]:
    present = [learnt.masks for learnt in (m1, m2) if learnt is not None]
    if len(present) == 1:
        return dict(present[0])
    if score == "rank_sum":
        present = [_ranks(masks) for masks in present]
    return {name: present[0][name] + present[1][name] for name in present[0]}


def _ranks(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    flat = torch.cat([values.flatten() for values in masks.values()])
    ranks = flat.argsort(stable=True).argsort(stable=True).float()
    sizes = [len(values) for values in masks.values()]
    return dict(zip(masks, ranks.split(sizes), strict=True))


def _diagnostics(
    method: MNP,
    suppressed: Suppressed | None,
    m1: LearntMasks | None,
    m2: LearntMasks | None,
    steps: list[Step],
    filter_map: FilterMap,
    learning: LabelledImages,
) -> dict[str, Any]:
    learnt = {"weight_penalty": m1, "clean_preserving": m2}
    return {
        "options": asdict(method),
        "learning_images": len(learning),
        "suppression": None
        if suppressed is None
        else {
            "accuracy": list(suppressed.accuracies),
            "stop_reason": suppressed.stop_reason,
            "steps": suppressed.checks[-1].step,
            "class_share": suppressed.class_share.tolist(),
        },
        "masks": {
            name: {"losses": list(masks.losses), "clipped_fraction": masks.clipped, "steps": masks.steps}
            for name, masks in learnt.items()
            if masks is not None
        },
        "walk": [asdict(step) for step in steps],
        "untreated": [asdict(item) for item in filter_map.untreated],
    }
