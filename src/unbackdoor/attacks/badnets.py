"""BadNets: a visible patch and a changed label."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch

from unbackdoor.attacks.poisoning import check_choice, label_rule_for
from unbackdoor.attacks.training import TriggerStage, poison_and_train
from unbackdoor.errors import InvalidInputError
from unbackdoor.train import Recipe
from unbackdoor.triggers.patch import PatchTrigger, checkerboard, white_square
from unbackdoor.types import Infected, LabelledImages, ModelFn, Progress, silent


@dataclass(frozen=True)
class BadNets:
    """Paste a patch into some training images and change their labels.

    Source: Gu et al., "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
    2017, arXiv 1708.06733. Rate, target and pattern are those of the MNP paper's section 5.1 and of
    RNP's and ANP's code.

    Deviations: none known. The patch grows with the image (3 of 32 pixels) unless its size is given.

    Args:
        poison_fraction: Overall poison rate, in (0, 1].
        target_class: Target of the all-to-one rule; unused by the all-to-all rule.
        rule: ``all_to_one``, or ``all_to_all`` with label y sent to y + 1 modulo the number of classes.
        pattern: ``checkerboard`` (RNP, ANP) or ``white`` (BackdoorBench).
        patch_size: Side in pixels; 0 for round(3 H / 32), at least 2.
        corner: Where the patch sits.
        margin: Distance from the edges of that corner in pixels.
        trigger_stage: Stamp stored images, or batches after augmentation.
        recipe: Training schedule.
    """

    name: ClassVar[str] = "badnets"
    title: ClassVar[str] = "BadNets"
    source: ClassVar[str] = "Gu, Dolan-Gavitt, Garg 2017, arXiv 1708.06733"
    needs: ClassVar[str] = "poisoned training data"

    poison_fraction: float = 0.1
    target_class: int = 0
    rule: Literal["all_to_one", "all_to_all"] = "all_to_one"
    pattern: Literal["checkerboard", "white"] = "checkerboard"
    patch_size: int = 0
    corner: Literal["lower_right", "lower_left", "upper_right", "upper_left"] = "lower_right"
    margin: int = 0
    trigger_stage: TriggerStage = "before_augmentation"
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        check_choice("pattern", self.pattern, ("checkerboard", "white"))
        corners = ("lower_right", "lower_left", "upper_right", "upper_left")
        check_choice("corner", self.corner, corners)
        if self.patch_size < 0 or self.margin < 0:
            raise InvalidInputError(
                f"patch_size and margin must be at least 0, got {self.patch_size} and {self.margin}."
            )

    @staticmethod
    def paper() -> BadNets:
        """Return the settings of the MNP paper, section 5.1, which are the defaults."""
        return BadNets()

    def trigger_for(self, height: int) -> PatchTrigger:
        """Return the trigger for images of ``height`` pixels."""
        side = self.patch_size or max(2, round(3 * height / 32))
        pattern = checkerboard(side) if self.pattern == "checkerboard" else white_square(side)
        vertical, horizontal = self.corner.split("_")
        far = -(side + self.margin)
        return PatchTrigger(
            pattern,
            row=far if vertical == "lower" else self.margin,
            column=far if horizontal == "right" else self.margin,
        )

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
        """
        trigger = self.trigger_for(train.images.shape[2])
        trigger(torch.zeros(1, *train.images.shape[1:]))  # fail on a patch that does not fit before training
        return poison_and_train(
            train,
            model_fn,
            trigger=trigger,
            label_rule=label_rule_for(self.rule, self.target_class, train.num_classes),
            fraction=self.poison_fraction,
            stage=self.trigger_stage,
            recipe=self.recipe,
            generator=generator,
            resume_from=resume_from,
            progress=progress,
        )
