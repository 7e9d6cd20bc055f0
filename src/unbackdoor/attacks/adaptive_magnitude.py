"""BadNets trained by an attacker who knows that filters will be judged by their magnitude."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.attacks.badnets import BadNets
from unbackdoor.attacks.poisoning import check_choice, label_rule_for, plan_poison, stamp
from unbackdoor.attacks.training import StampAfterAugmentation, TriggerStage
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters import FilterMap, find_filters
from unbackdoor.filters.magnitude import magnitudes
from unbackdoor.filters.mask import cleared_tensors
from unbackdoor.train import Batch, LossStep, Recipe, cross_entropy_step
from unbackdoor.train import train as fit
from unbackdoor.types import Infected, LabelledImages, ModelFn, Progress, as_float, silent


@dataclass(frozen=True)
class AdaptiveMagnitude:
    """BadNets whose filters all have alike norms and which spreads the backdoor over many of them.

    Source: this package; aimed at MNP (arXiv 2405.17750), which removes filters whose weight norm deviates
    from what their saliency predicts. The attacker controls the training and adds two terms to its loss:

    ``norm_weight * mean over layers of Var_j ||w_j|| / (mean_j ||w_j||)^2``, so that the norm of a filter
    says nothing; and ``spread_weight * CE`` of the same batch, clean and triggered samples alike, with a
    fresh random share of the filters of every layer silenced, so that no few filters carry the backdoor.

    Deviations: none, as there is no paper. A norm layer after a filter undoes the filter's scale, so equal
    norms cost no accuracy. The silenced pass uses batch statistics, but leaves the running ones alone: they
    must describe the network as it is used.

    Args:
        poison_fraction: Overall poison rate, in (0, 1].
        target_class: Target of the all-to-one rule; unused by the all-to-all rule.
        rule: ``all_to_one``, or ``all_to_all`` with label y sent to y + 1 modulo the number of classes.
        pattern: ``checkerboard`` or ``white``, as in ``BadNets``.
        patch_size: Side in pixels; 0 for round(3 H / 32), at least 2.
        corner: Where the patch sits.
        margin: Distance from the edges of that corner in pixels.
        trigger_stage: Stamp stored images, or batches after augmentation.
        norm_weight: Weight of the spread of norms, at least 0; 0 leaves the term out.
        spread_weight: Weight of the pass with silenced filters, at least 0; 0 leaves it out, and its cost.
        dropout_fraction: Chance of each filter to be silenced in that pass, in (0, 1).
        recipe: Training schedule.
    """

    name: ClassVar[str] = "adaptive_magnitude"
    title: ClassVar[str] = "Adaptive attack on magnitude-based pruning"
    source: ClassVar[str] = "this package, against arXiv 2405.17750"
    needs: ClassVar[str] = "control of the training"

    poison_fraction: float = 0.1
    target_class: int = 0
    rule: Literal["all_to_one", "all_to_all"] = "all_to_one"
    pattern: Literal["checkerboard", "white"] = "checkerboard"
    patch_size: int = 0
    corner: Literal["lower_right", "lower_left", "upper_right", "upper_left"] = "lower_right"
    margin: int = 0
    trigger_stage: TriggerStage = "before_augmentation"
    norm_weight: float = 20.0
    spread_weight: float = 0.5
    dropout_fraction: float = 0.1
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        check_choice("trigger_stage", self.trigger_stage, get_args(TriggerStage))
        if not self.norm_weight >= 0 or not self.spread_weight >= 0:
            raise InvalidInputError(
                "norm_weight and spread_weight must be at least 0, got "
                f"{self.norm_weight} and {self.spread_weight}."
            )
        if not 0 < self.dropout_fraction < 1:
            raise InvalidInputError(f"dropout_fraction must lie in (0, 1), got {self.dropout_fraction}.")

    @staticmethod
    def paper() -> AdaptiveMagnitude:
        """Return the defaults: there is no paper."""
        return AdaptiveMagnitude()

    def run(
        self,
        train: LabelledImages,
        model_fn: ModelFn,
        *,
        generator: torch.Generator,
        resume_from: Path | None = None,
        progress: Progress = silent,
    ) -> Infected:
        """Poison ``train`` and train ``model_fn()`` on it.

        Raises:
            InvalidInputError: If the target is no class of ``train``, or rate or patch do not fit.
            UnsupportedModelError: If the filters of the network cannot be found.
        """
        trigger = BadNets(
            pattern=self.pattern, patch_size=self.patch_size, corner=self.corner, margin=self.margin
        ).trigger_for(train.images.shape[2])
        trigger(torch.zeros(1, *train.images.shape[1:]))  # fail on a patch that does not fit before training
        rule = label_rule_for(self.rule, self.target_class, train.num_classes)
        plan = plan_poison(train.labels, self.poison_fraction, rule, rng.spawn(generator))
        with rng.isolated(generator):
            model = model_fn()
        filter_map = find_filters(model, as_float(train.images[:1]))
        hide: LossStep = HidingStep(filter_map, self.norm_weight, self.spread_weight, self.dropout_fraction)
        poisoned = stamp(train, plan, trigger)
        if self.trigger_stage == "after_augmentation":
            poisoned = LabelledImages(train.images, poisoned.labels, train.class_names)
            chosen = torch.zeros(len(train), dtype=torch.bool)
            chosen[plan.indices] = True
            hide = StampAfterAugmentation(trigger, chosen, inner=hide)
        at_start = norm_spreads(model, filter_map)
        record = fit(
            model,
            poisoned,
            self.recipe,
            generator=rng.spawn(generator),
            loss_step=hide,
            resume_from=resume_from,
            progress=progress,
        )
        spreads = {"norm_spread_at_start": at_start, "norm_spread": norm_spreads(model, filter_map)}
        return Infected(model, trigger, plan, rule, {"training": record.describe(), **spreads})


def norm_spreads(model: nn.Module, filter_map: FilterMap) -> dict[str, float]:
    """Return, for each prunable layer, the standard deviation of its filters' norms over their mean."""
    norms = magnitudes(model, filter_map)
    return {name: float(relative_variance(values).sqrt()) for name, values in norms.items()}


def relative_variance(norms: Tensor) -> Tensor:
    """Return the population variance of ``norms`` ``(filters,)`` over their squared mean; a scalar."""
    return norms.var(correction=0) / norms.mean().square().clamp_min(torch.finfo(norms.dtype).tiny)


@dataclass(frozen=True, eq=False)
class HidingStep:
    """Cross-entropy, the spread of the filters' norms, and cross-entropy with silenced filters.

    Args:
        filter_map: The filters of the network that is trained.
        norm_weight: Weight of the second term.
        spread_weight: Weight of the third term.
        dropout_fraction: Chance of each filter to be silenced.
    """

    filter_map: FilterMap
    norm_weight: float
    spread_weight: float
    dropout_fraction: float

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the weighted sum."""
        loss = cross_entropy_step(model, batch)
        if self.norm_weight:
            loss = loss + self.norm_weight * self.norm_term(model)
        if self.spread_weight:
            loss = loss + self.spread_weight * self.silenced_term(model, batch)
        return loss

    def norm_term(self, model: nn.Module) -> Tensor:
        """Return the relative variance of the filters' norms, averaged over the prunable layers."""
        parameters = dict(model.named_parameters())
        layers = [parameters[group.weight].float().flatten(1) for group in self.filter_map.prunable]
        if not layers:
            return torch.zeros(())
        return torch.stack([relative_variance(weight.norm(dim=1)) for weight in layers]).mean()

    def silenced_term(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of the batch with random filters of every layer silenced."""
        # Copies of the buffers, so that the running statistics do not learn of the silenced filters.
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **buffers}
        for group in self.filter_map.prunable:
            drawn = torch.rand(group.filters, device=batch.images.device)
            keep = (drawn >= self.dropout_fraction).float()
            for name in cleared_tensors(group, "norm"):
                tensors[name] = tensors[name] * keep.view(-1, *[1] * (tensors[name].ndim - 1))
        logits: Tensor = functional_call(model, tensors, (batch.images,), tie_weights=True)
        return F.cross_entropy(logits.float(), batch.labels)
