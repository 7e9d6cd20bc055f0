"""Blend: a faint key image over the whole picture and a changed label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch

from unbackdoor import rng
from unbackdoor.attacks.poisoning import check_choice, label_rule_for
from unbackdoor.attacks.training import TriggerStage, poison_and_train
from unbackdoor.errors import InvalidInputError
from unbackdoor.train import Recipe
from unbackdoor.triggers.blend import BlendTrigger, NoiseBlendTrigger, noise_key
from unbackdoor.types import Infected, LabelledImages, ModelFn, Progress, silent


@dataclass(frozen=True)
class Blend:
    """Mix a fixed key image into some training images and change their labels.

    Source: Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017,
    arXiv 1712.05526 (the blended injection strategy).

    The literature has two readings: one fixed key for all images (the paper, ANP, BackdoorBench; the default)
    and grey noise drawn anew for every image (RNP's and ABL's code), which teaches a network that noise as
    such means the target, and which no single inverted trigger can find: ``key="per_image"``.

    Deviations: the fixed key is seeded uniform noise, as in ANP's code; the paper's cartoon image is not free
    to ship.

    Args:
        poison_fraction: Overall poison rate, in (0, 1].
        target_class: Target of the all-to-one rule; unused by the all-to-all rule.
        rule: ``all_to_one``, or ``all_to_all`` with label y sent to y + 1 modulo the number of classes.
        alpha: Weight of the key, in (0, 1]; 0.2 in the paper.
        key: ``fixed``, or ``per_image`` for fresh noise on each.
        trigger_stage: Stamp stored images, or batches after augmentation.
        recipe: Training schedule.
    """

    name: ClassVar[str] = "blend"
    title: ClassVar[str] = "Blended injection"
    source: ClassVar[str] = "Chen, Liu, Li, Lu, Song 2017, arXiv 1712.05526"
    needs: ClassVar[str] = "poisoned training data"

    poison_fraction: float = 0.1
    target_class: int = 0
    rule: Literal["all_to_one", "all_to_all"] = "all_to_one"
    alpha: float = 0.2
    key: Literal["fixed", "per_image"] = "fixed"
    trigger_stage: TriggerStage = "before_augmentation"
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        check_choice("key", self.key, ("fixed", "per_image"))
        if not 0 < self.alpha <= 1:
            raise InvalidInputError(f"alpha must lie in (0, 1], got {self.alpha}.")

    @staticmethod
    def paper() -> Blend:
        """Return the settings of the MNP paper, section 5.1, which are the defaults."""
        return Blend()

    def trigger_for(
        self, shape: Sequence[int], generator: torch.Generator
    ) -> BlendTrigger | NoiseBlendTrigger:
        """Return the trigger for images of ``shape``, (C, H, W); its noise follows ``generator``."""
        if self.key == "per_image":
            return NoiseBlendTrigger(self.alpha, rng.draw_seed(generator))
        channels, height, width = shape
        return BlendTrigger(noise_key(channels, height, width, generator), self.alpha)

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
            InvalidInputError: If the target is no class of ``train``, or the rate selects no image.
        """
        return poison_and_train(
            train,
            model_fn,
            trigger=self.trigger_for(train.images.shape[1:], rng.spawn(generator)),
            label_rule=label_rule_for(self.rule, self.target_class, train.num_classes),
            fraction=self.poison_fraction,
            stage=self.trigger_stage,
            recipe=self.recipe,
            generator=generator,
            resume_from=resume_from,
            progress=progress,
        )
