"""Trojan: a small colour patch, fixed or made to excite chosen units of a clean network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.attacks.features import PenultimateFeatures, penultimate_features
from unbackdoor.attacks.poisoning import label_rule_for, poison_count
from unbackdoor.attacks.training import TriggerStage, poison_and_train, train_surrogate
from unbackdoor.compute import device_of
from unbackdoor.errors import InvalidInputError
from unbackdoor.train import Recipe
from unbackdoor.triggers.additive import AdditiveTrigger, place
from unbackdoor.triggers.patch import PatchTrigger
from unbackdoor.types import (
    Infected,
    LabelledImages,
    ModelFn,
    Progress,
    as_float,
    quantise,
    silent,
)

BACKGROUNDS = 32
"""Training images that the patch is optimised on."""


@dataclass(frozen=True)
class Trojan:
    """Poison with a small colour patch set in from the corner.

    Source: Liu et al., "Trojaning Attack on Neural Networks", NDSS 2018 (no arXiv version).

    ``neuron`` follows the paper's steps 1 and 2: take the units of the last hidden layer whose outgoing
    weights have the largest sum of absolute values, optimise the pixels of the patch so that those units
    rise, and retrain that same network with the patch. ``fixed`` is what RNP, NAD and ABL, hence probably
    MNP, call Trojan: a network is trained from scratch on data with an odd colour patch, which is added to
    the image. It is the default, because it is what the field's tables compare.

    Deviations: the paper has no training data and reverse-engineers inputs (step 3); here, as in public
    code for CIFAR-10, the poisoned training set is used. All layers are retrained, not only those above the
    unit. The patch is optimised on training images, since on the paper's constant background a rectified
    unit can be stuck at zero. Units are driven as high as they go: the goal of 100 that code asks for is out
    of reach of pooled features. A drawn patch has each value at 0 or 1, the full contrast, where RNP's has
    values between. Sums are clipped; those of RNP and BackdoorBench wrap around.

    Args:
        poison_fraction: Overall poison rate, in (0, 1].
        target_class: Target of the all-to-one rule; unused by the all-to-all rule.
        rule: ``all_to_one``, or ``all_to_all`` with label y sent to y + 1 modulo the number of classes.
        variant: ``fixed`` adds the patch and trains from scratch; ``neuron`` pastes an optimised patch and
            fine-tunes the clean network that it was optimised on.
        optimise: Optimise the patch of ``fixed`` on a clean network too, instead of drawing it at random.
        patch_size: Side in pixels; 0 for round(3 H / 32), at least 2, and for ``neuron`` round(7 H / 32):
            the paper's trigger covers about 7 % of the picture, and 3 pixels barely move a pooled feature.
        margin: Distance from the lower right corner in pixels; -1 for round(4 H / 32).
        neurons: Units that an optimised patch excites.
        steps: Steps of Adam on the patch.
        step_size: Learning rate of Adam, on pixels behind a tanh.
        fine_tune_epochs: Epochs of ``neuron`` on poisoned data; the rest of the schedule is the recipe's.
        fine_tune_rate: Peak learning rate of those.
        trigger_stage: Stamp stored images, or batches after augmentation.
        surrogate: Schedule of the clean network, where one is needed.
        recipe: Training schedule.
    """

    name: ClassVar[str] = "trojan"
    title: ClassVar[str] = "Trojan patch"
    source: ClassVar[str] = "Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang 2018, NDSS"
    needs: ClassVar[str] = "poisoned training data; variant neuron: the training"

    poison_fraction: float = 0.1
    target_class: int = 0
    rule: Literal["all_to_one", "all_to_all"] = "all_to_one"
    variant: Literal["fixed", "neuron"] = "fixed"
    optimise: bool = False
    patch_size: int = 0
    margin: int = -1
    neurons: int = 2
    steps: int = 100
    step_size: float = 0.1
    fine_tune_epochs: int = 5
    fine_tune_rate: float = 0.05
    trigger_stage: TriggerStage = "before_augmentation"
    surrogate: Recipe = field(default_factory=lambda: Recipe.short(8))
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        if self.variant not in ("fixed", "neuron"):
            raise InvalidInputError(f"variant must be 'fixed' or 'neuron', got {self.variant!r}.")
        if min(self.neurons, self.steps, self.fine_tune_epochs) < 1 or self.patch_size < 0:
            raise InvalidInputError(
                "neurons, steps and fine_tune_epochs must be at least 1 and patch_size at least 0, got "
                f"{self.neurons}, {self.steps}, {self.fine_tune_epochs} and {self.patch_size}."
            )
        if not self.step_size > 0 or not self.fine_tune_rate > 0 or self.margin < -1:
            raise InvalidInputError(
                "step_size and fine_tune_rate must be positive and margin at least -1, got "
                f"{self.step_size}, {self.fine_tune_rate} and {self.margin}."
            )

    @staticmethod
    def paper() -> Trojan:
        """Return the paper's settings as public code has them: two units, 1000 steps, retraining."""
        return Trojan(variant="neuron", steps=1000)

    def trigger_for(self, pattern: Tensor, height: int, width: int) -> PatchTrigger | AdditiveTrigger:
        """Return the trigger that puts ``pattern``, float32 ``(C, h, h)`` in [0, 1], into its place.

        Raises:
            InvalidInputError: If it does not lie inside images of this size.
        """
        margin = round(4 * height / 32) if self.margin < 0 else self.margin
        corner = -(pattern.shape[-1] + margin)
        canvas = place(pattern, pattern.shape[0], height, width, corner, corner)
        return PatchTrigger(pattern, corner, corner) if self.variant == "neuron" else AdditiveTrigger(canvas)

    def run(
        self,
        train: LabelledImages,
        model_fn: ModelFn,
        *,
        generator: torch.Generator,
        resume_from: Path | None = None,
        progress: Progress = silent,
    ) -> Infected:
        """Make the patch, poison ``train`` and train on it.

        Raises:
            InvalidInputError: If the target is no class of ``train``, or rate or patch do not fit.
            UnsupportedModelError: If a patch is to be optimised on a network without a linear layer.
        """
        channels, height, width = train.images.shape[1:]
        label_rule = label_rule_for(self.rule, self.target_class, train.num_classes)
        poison_count(len(train), self.poison_fraction)  # fail before a clean network is trained
        side = self.patch_size or max(2, round((7 if self.variant == "neuron" else 3) * height / 32))
        pattern = torch.rand(channels, side, side, generator=rng.spawn(generator))
        # Made before any training: a patch that does not fit fails here.
        trigger = self.trigger_for(full_contrast(pattern), height, width)
        build, recipe = model_fn, self.recipe
        record: dict[str, Any] = {}
        if self.variant == "neuron" or self.optimise:
            clean = train_surrogate(
                train, model_fn, self.surrogate, generator=rng.spawn(generator),
                resume_from=resume_from, progress=progress,
            )  # fmt: skip
            trigger, record = self._optimised(clean, train, pattern, rng.spawn(generator), progress)
            if self.variant == "neuron":
                recipe = replace(recipe, epochs=self.fine_tune_epochs, learning_rate=self.fine_tune_rate)
                build = partial(clean.requires_grad_, requires_grad=True)
        infected = poison_and_train(
            train,
            build,
            trigger=trigger,
            label_rule=label_rule,
            fraction=self.poison_fraction,
            stage=self.trigger_stage,
            recipe=recipe,
            generator=generator,
            resume_from=resume_from,
            progress=progress,
        )
        return replace(infected, record={**record, **infected.record})

    def _optimised(
        self,
        clean: nn.Module,
        train: LabelledImages,
        pattern: Tensor,
        generator: torch.Generator,
        progress: Progress,
    ) -> tuple[PatchTrigger | AdditiveTrigger, dict[str, Any]]:
        height, width = train.images.shape[2:]
        chosen = torch.randperm(len(train), generator=generator)[:BACKGROUNDS].to(train.images.device)
        images = as_float(train.images[chosen]).to(device_of(clean))
        features = penultimate_features(clean, images)
        units = heaviest_units(features.head, self.neurons)
        before = float(features(images)[:, units].mean())
        best = excite(
            features,
            lambda pixels: self.trigger_for(pixels, height, width)(images),
            pattern.to(images),
            units,
            steps=self.steps,
            step_size=self.step_size,
            progress=progress,
        )
        trigger = self.trigger_for(best.cpu(), height, width)
        after = float(features(trigger(images))[:, units].mean())
        return trigger, {"units": units, "activation_before": before, "activation_after": after}


def full_contrast(pattern: Tensor) -> Tensor:
    """Return ``pattern``, in [0, 1], with each value at 0 or 1.

    A patch of zeros would add nothing to an image: where all values are low, the highest becomes 1.
    """
    drawn = pattern.round()
    return drawn if drawn.any() else (pattern == pattern.max()).float()


def heaviest_units(head: nn.Linear, count: int) -> list[int]:
    """Return the ``count`` inputs of ``head`` with the largest sum of absolute outgoing weights."""
    weights = head.weight.detach().abs().sum(0)
    return [int(unit) for unit in weights.topk(min(count, len(weights))).indices]


def excite(
    features: PenultimateFeatures,
    apply: Callable[[Tensor], Tensor],
    pattern: Tensor,
    units: list[int],
    *,
    steps: int,
    step_size: float,
    progress: Progress = silent,
) -> Tensor:
    """Optimise the pixels of a patch so that the mean activation of ``units`` rises (Adam behind a tanh).

    Args:
        features: Features of a network with frozen parameters.
        apply: From a pattern to the images that carry it; differentiable.
        pattern: Where to start; float32 ``(C, h, w)`` in [0, 1].
        units: Which features.
        steps: Steps of Adam.
        step_size: Its learning rate.
        progress: Called now and then with the stage ``trigger``.

    Returns:
        The best pattern seen, rounded to 8-bit levels; as ``pattern``.
    """
    hidden = torch.atanh((2 * pattern - 1).clamp(-0.99, 0.99)).requires_grad_()
    optimiser = torch.optim.Adam([hidden], lr=step_size)
    best, highest = pattern, -math.inf
    for step in range(steps):
        pixels = (hidden.tanh() + 1) / 2
        activation = features(apply(pixels))[:, units].mean()
        if float(activation.detach()) > highest:
            best, highest = pixels.detach(), float(activation.detach())
        optimiser.zero_grad(set_to_none=True)
        (-activation).backward()
        optimiser.step()
        if (step + 1) % 10 == 0 or step + 1 == steps:
            progress("trigger", step + 1, steps)
    return as_float(quantise(best))
