"""LF: one smooth perturbation for all images, and a changed label."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.attacks.poisoning import label_rule_for, poison_count
from unbackdoor.attacks.training import TriggerStage, poison_and_train, train_surrogate
from unbackdoor.compute import device_of, memory_format_for, mode, predictions_of
from unbackdoor.errors import InvalidInputError
from unbackdoor.train import Recipe
from unbackdoor.triggers.additive import AdditiveTrigger
from unbackdoor.types import Infected, LabelledImages, ModelFn, Progress, as_float, silent

CRAFTING_IMAGES = 512
"""Training images that the perturbation is optimised on."""


@dataclass(frozen=True)
class LF:
    """Add one universal perturbation without high frequencies to some training images and change labels.

    Source: Zeng et al., "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021,
    arXiv 2104.03413, section 5: a perturbation that flips a clean network's answers on most images, held
    smooth on the way.

    Deviations: the paper collects least perturbations image by image (as DeepFool does) and filters their
    sum with a Gaussian; here the perturbation is a sum of the lowest cosines, ``coefficients`` an axis, so
    that it is smooth by construction, and gradient ascent on the network's loss finds the weights. The
    largest change of a pixel is bounded, which the paper leaves open.

    Args:
        poison_fraction: Overall poison rate, in (0, 1].
        target_class: Target of the all-to-one rule; unused by the all-to-all rule.
        rule: ``all_to_one``, or ``all_to_all`` with label y sent to y + 1 modulo the number of classes.
        eps: Largest change of a pixel in grey levels, in (0, 255].
        coefficients: Cosines per axis and channel, the constant one included.
        steps: Steps of Adam on their weights.
        step_size: Its learning rate, in units of ``eps``.
        trigger_stage: Stamp stored images, or batches after augmentation.
        surrogate: Schedule of the clean network.
        recipe: Training schedule.
    """

    name: ClassVar[str] = "lf"
    title: ClassVar[str] = "Smooth (low-frequency) trigger"
    source: ClassVar[str] = "Zeng, Park, Mao, Jia 2021, arXiv 2104.03413"
    needs: ClassVar[str] = "poisoned training data"

    poison_fraction: float = 0.1
    target_class: int = 0
    rule: Literal["all_to_one", "all_to_all"] = "all_to_one"
    eps: float = 20.0
    coefficients: int = 4
    steps: int = 100
    step_size: float = 0.05
    trigger_stage: TriggerStage = "before_augmentation"
    surrogate: Recipe = field(default_factory=lambda: Recipe.short(8))
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        if not 0 < self.eps <= 255 or not self.step_size > 0:
            raise InvalidInputError(
                f"eps must lie in (0, 255] grey levels and step_size be positive, got {self.eps} and "
                f"{self.step_size}."
            )
        if self.coefficients < 1 or self.steps < 1:
            raise InvalidInputError(
                f"coefficients and steps must be at least 1, got {self.coefficients} and {self.steps}."
            )

    @staticmethod
    def paper() -> LF:
        """Return the defaults: the published triggers are stored arrays without stated settings."""
        return LF()

    def run(
        self,
        train: LabelledImages,
        model_fn: ModelFn,
        *,
        generator: torch.Generator,
        resume_from: Path | None = None,
        progress: Progress = silent,
    ) -> Infected:
        """Craft the perturbation on a clean network, poison ``train`` and train ``model_fn()`` on it.

        Raises:
            InvalidInputError: If the target is no class of ``train``, the rate selects no image, or there
                are more coefficients than pixels.
        """
        label_rule = label_rule_for(self.rule, self.target_class, train.num_classes)
        poison_count(len(train), self.poison_fraction)  # fail before the clean network is trained
        if self.coefficients > min(train.images.shape[2:]):
            raise InvalidInputError(
                f"coefficients {self.coefficients} exceed the side of {train.images.shape[2]}x"
                f"{train.images.shape[3]} images; give fewer."
            )
        clean = train_surrogate(
            train,
            model_fn,
            self.surrogate,
            generator=rng.spawn(generator),
            resume_from=resume_from,
            progress=progress,
        )
        trigger, record = self.craft(clean, train, rng.spawn(generator), progress)
        infected = poison_and_train(
            train,
            model_fn,
            trigger=trigger,
            label_rule=label_rule,
            fraction=self.poison_fraction,
            stage=self.trigger_stage,
            recipe=self.recipe,
            generator=generator,
            resume_from=resume_from,
            progress=progress,
        )
        return replace(infected, record={**record, **infected.record})

    def craft(
        self,
        clean: nn.Module,
        data: LabelledImages,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> tuple[AdditiveTrigger, dict[str, Any]]:
        """Optimise the perturbation so that ``clean``, with frozen parameters, errs on triggered images.

        Returns:
            The trigger, and the share of the crafting images that it flips.
        """
        channels, height, width = data.images.shape[1:]
        device = device_of(clean)
        chosen = torch.randperm(len(data), generator=generator)[:CRAFTING_IMAGES].to(data.images.device)
        images, labels = as_float(data.images[chosen]).to(device), data.labels[chosen].to(device)
        shape = (channels, self.coefficients, self.coefficients)
        weights = torch.randn(shape, generator=generator).mul_(0.1).to(device).requires_grad_()
        bases = tuple(cosines(self.coefficients, side).to(device) for side in (height, width))
        optimiser = torch.optim.Adam([weights], lr=self.step_size)
        for step in range(self.steps):
            part = torch.randperm(len(images), generator=generator)[:128].to(device)
            delta = smooth(weights, *bases) * (self.eps / 255)
            triggered = (images[part] + delta).clamp(0, 1).contiguous(memory_format=memory_format_for(clean))
            with mode(clean, training=False):
                loss = -F.cross_entropy(clean(triggered).float(), labels[part])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            progress("trigger", step + 1, self.steps)
        trigger = AdditiveTrigger((smooth(weights.detach(), *bases) * (self.eps / 255)).cpu())
        flipped = predictions_of(clean, trigger(images)) != predictions_of(clean, images)
        return trigger, {"flipped_share": float(flipped.float().mean())}


def cosines(count: int, side: int) -> Tensor:
    """Return the lowest ``count`` functions of the discrete cosine transform (DCT-II) on ``side`` pixels.

    Returns:
        float32 ``(count, side)`` in [-1, 1]: row u is ``cos(pi u (2 i + 1) / (2 side))``.
    """
    orders = torch.arange(count, dtype=torch.float64).unsqueeze(1)
    places = 2 * torch.arange(side, dtype=torch.float64) + 1
    return torch.cos(math.pi * orders * places / (2 * side)).float()


def smooth(weights: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the sum of cosines, scaled down to at most 1 in size: clipping would make it rough.

    Args:
        weights: ``(C, k, k)``, one a pair of cosines.
        rows: ``(k, H)``.
        columns: ``(k, W)``.

    Returns:
        ``(C, H, W)`` in [-1, 1].
    """
    field = torch.einsum("cuv,uh,vw->chw", weights, rows, columns)
    return field / field.abs().max().clamp_min(1.0)
