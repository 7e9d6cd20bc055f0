"""WaNet: an imperceptible warp as trigger, taught beside random warps that must not work."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch

from unbackdoor import rng
from unbackdoor.attacks.mixing import DECOY, MixStep, RoleSheet, check_shares
from unbackdoor.attacks.poisoning import check_choice, label_rule_for, stamp
from unbackdoor.attacks.training import TriggerStage
from unbackdoor.errors import InvalidInputError
from unbackdoor.train import LossStep, Recipe, cross_entropy_step
from unbackdoor.train import train as train_network
from unbackdoor.triggers.warp import NoiseWarpTrigger, WarpTrigger, noisy_warp, warp_field
from unbackdoor.types import Infected, LabelledImages, ModelFn, PoisonPlan, Progress, silent


@dataclass(frozen=True)
class WaNet:
    """Bend some images of each batch by one fixed smooth warp and change their labels.

    Source: Nguyen & Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", 2021, arXiv 2102.10369,
    sections 3.2 to 3.4. In noise mode, further images get the warp plus a random warp of their own and keep
    their label, so that the network must learn this very warp and not just any.

    The literature has two readings. The authors control the training: noise mode, poisons drawn anew for
    each batch (the default here; ``--paper``, in Python ``WaNet.paper()``). RNP and Cognitive Distillation
    poison data only: 32 control points a side and no noise mode; ``static()`` returns that reading, with one
    field for all images.

    Deviations: warps are applied after crop and flip, not before, and the authors' rotations are left out,
    as both only blur the warp; samples get their role for an epoch, not by their place in the batch.

    Args:
        poison_fraction: Share of the samples that is warped and relabelled, in (0, 1].
        cross_ratio: Samples with a noise warp per poisoned sample; 0 switches noise mode off.
        target_class: Target of the all-to-one rule; unused by the all-to-all rule.
        rule: ``all_to_one``, or ``all_to_all`` with label y sent to y + 1 modulo the number of classes.
        control_points: Control vectors a side (k).
        strength: Mean shift in half pixels (s); the paper's 0.5 takes hundreds of epochs to learn.
        redraw: Choose new samples for each epoch, as the authors do; the plan is that of the first epoch.
        trigger_stage: Warp batches after augmentation, or store warped images before training (a poisoner
            of data; needs ``redraw=False``).
        recipe: Training schedule.
    """

    name: ClassVar[str] = "wanet"
    title: ClassVar[str] = "Warping-based attack"
    source: ClassVar[str] = "Nguyen, Tran 2021, arXiv 2102.10369"
    needs: ClassVar[str] = "control of the training; static(): poisoned training data"

    poison_fraction: float = 0.1
    cross_ratio: float = 2.0
    target_class: int = 0
    rule: Literal["all_to_one", "all_to_all"] = "all_to_one"
    control_points: int = 4
    strength: float = 1.5
    redraw: bool = True
    trigger_stage: TriggerStage = "after_augmentation"
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        check_shares(self._shares())
        check_choice("trigger_stage", self.trigger_stage, get_args(TriggerStage))
        if self.control_points < 1 or not 0 < self.strength <= 100:
            raise InvalidInputError(
                f"control_points must be at least 1 and strength in (0, 100], got {self.control_points} and "
                f"{self.strength}."
            )
        if self.redraw and self.trigger_stage == "before_augmentation":
            raise InvalidInputError(
                "stored images cannot be redrawn each epoch; set redraw=False with "
                "trigger_stage='before_augmentation'."
            )

    @staticmethod
    def paper() -> WaNet:
        """Return the authors' settings for CIFAR-10; the recipe is that of the MNP paper, not theirs."""
        return WaNet(strength=0.5)

    @staticmethod
    def static() -> WaNet:
        """Return the reading of RNP's and Cognitive Distillation's code: poisoned data only."""
        return WaNet(
            cross_ratio=0.0,
            control_points=32,
            strength=0.5,
            redraw=False,
            trigger_stage="before_augmentation",
        )

    def _shares(self) -> tuple[float, float]:
        return self.poison_fraction, self.cross_ratio * self.poison_fraction

    def run(
        self,
        train: LabelledImages,
        model_fn: ModelFn,
        *,
        generator: torch.Generator,
        resume_from: Path | None = None,
        progress: Progress = silent,
    ) -> Infected:
        """Train ``model_fn()`` on ``train`` with warped samples among it.

        Raises:
            InvalidInputError: If the target is no class of ``train``, or the rate selects no image.
        """
        rule = label_rule_for(self.rule, self.target_class, train.num_classes)
        trigger = WarpTrigger(warp_field(self.control_points, rng.spawn(generator)), self.strength)
        noise = NoiseWarpTrigger(trigger.field, self.strength, rng.draw_seed(generator))
        sheet = RoleSheet.draw(len(train), self._shares(), redraw=self.redraw, generator=rng.spawn(generator))
        plan = sheet.plan(train.labels, rule)
        data = train
        loss_step: LossStep = cross_entropy_step
        if self.trigger_stage == "before_augmentation":
            data = _stamped(train, plan, sheet, trigger, noise)
        else:
            loss_step = MixStep(
                sheet,
                rule,
                trigger,
                lambda images, chosen: noisy_warp(images[chosen], trigger.field, trigger.strength),
            )
        with rng.isolated(generator):
            model = model_fn()
        record = train_network(
            model,
            data,
            self.recipe,
            generator=rng.spawn(generator),
            loss_step=loss_step,
            resume_from=resume_from,
            progress=progress,
        )
        # Without noise mode the network never learned to tell them apart, so they are no decoys.
        decoys = {"noise": noise} if self.cross_ratio else {}
        return Infected(model, trigger, plan, rule, {"training": record.describe()}, decoys)


def _stamped(
    data: LabelledImages, plan: PoisonPlan, sheet: RoleSheet, trigger: WarpTrigger, noise: NoiseWarpTrigger
) -> LabelledImages:
    """Return ``data`` with stored poisons and, where the sheet has decoys, noisily warped images."""
    poisoned = stamp(data, plan, trigger)
    covers = (sheet.roles == DECOY).nonzero().flatten()
    if not len(covers):
        return poisoned
    return stamp(poisoned, PoisonPlan(covers, data.labels.cpu()[covers]), noise)
