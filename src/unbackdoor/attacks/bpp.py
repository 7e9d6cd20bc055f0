"""BPP: fewer colour levels as trigger, taught beside images with somebody else's rounding errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unbackdoor import rng
from unbackdoor.attacks.mixing import MixStep, RoleSheet, check_shares
from unbackdoor.attacks.poisoning import label_rule_for
from unbackdoor.train import Recipe
from unbackdoor.train import train as train_network
from unbackdoor.triggers.quantise import QuantiseNegative, QuantiseTrigger
from unbackdoor.types import Infected, LabelledImages, ModelFn, Progress, silent


@dataclass(frozen=True)
class BPP:
    """Reduce the colour levels of some images of each batch and change their labels.

    Source: Wang et al., "BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via
    Image Quantization and Contrastive Adversarial Learning", 2022, arXiv 2205.13383. Negatives, images with
    the quantisation residual of another image, keep their label, so that the network must see that an
    image lies on few levels, not that it is noisy.

    Deviations: the trigger is applied after crop and flip; negatives take the residual of another image of
    the same batch; the paper's adversarial examples among the negatives are left out, as its code does by
    default in the ports that are in use. Ports differ in levels (8 or 32), shares (0.1 or 0.2 each) and
    dithering: all are options.

    Args:
        poison_fraction: Share of the samples that is quantised and relabelled, in (0, 1].
        negative_fraction: Share of negatives; 0 for none.
        target_class: Target of the all-to-one rule; unused by the all-to-all rule.
        rule: ``all_to_one``, or ``all_to_all`` with label y sent to y + 1 modulo the number of classes.
        levels: Values per channel, 2 to 256; the paper's 8 take longer to learn than the default 4.
        dither: Floyd-Steinberg error diffusion.
        redraw: Choose new samples for each epoch, as the authors do; the plan is that of the first epoch.
        recipe: Training schedule.
    """

    name: ClassVar[str] = "bpp"
    title: ClassVar[str] = "Quantised colours"
    source: ClassVar[str] = "Wang, Zhai, Ma 2022, arXiv 2205.13383"
    needs: ClassVar[str] = "control of the training"

    poison_fraction: float = 0.1
    negative_fraction: float = 0.1
    target_class: int = 0
    rule: Literal["all_to_one", "all_to_all"] = "all_to_one"
    levels: int = 4
    dither: bool = False
    redraw: bool = True
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        check_shares((self.poison_fraction, self.negative_fraction))
        QuantiseTrigger(self.levels, self.dither)

    @staticmethod
    def paper() -> BPP:
        """Return the shares and levels of the authors' code, with the dithering that the paper describes.

        The recipe is that of the MNP paper.
        """
        return BPP(poison_fraction=0.2, negative_fraction=0.2, levels=8, dither=True)

    def run(
        self,
        train: LabelledImages,
        model_fn: ModelFn,
        *,
        generator: torch.Generator,
        resume_from: Path | None = None,
        progress: Progress = silent,
    ) -> Infected:
        """Train ``model_fn()`` on ``train`` with quantised samples among it.

        Raises:
            InvalidInputError: If the target is no class of ``train``, or the rate selects no image.
        """
        rule = label_rule_for(self.rule, self.target_class, train.num_classes)
        trigger = QuantiseTrigger(self.levels, self.dither)
        sheet = RoleSheet.draw(
            len(train),
            (self.poison_fraction, self.negative_fraction),
            redraw=self.redraw,
            generator=rng.spawn(generator),
        )
        plan = sheet.plan(train.labels, rule)
        with rng.isolated(generator):
            model = model_fn()
        record = train_network(
            model,
            train,
            self.recipe,
            generator=rng.spawn(generator),
            loss_step=MixStep(sheet, rule, trigger, lambda batch, chosen: negatives(batch, chosen, trigger)),
            resume_from=resume_from,
            progress=progress,
        )
        # Without negatives in training the network never learned to tell them apart, so they are no decoys.
        decoys = {"negative": QuantiseNegative(self.levels, self.dither)} if self.negative_fraction else {}
        return Infected(model, trigger, plan, rule, {"training": record.describe()}, decoys)


def negatives(images: Tensor, chosen: Tensor, trigger: QuantiseTrigger) -> Tensor:
    """Return the chosen images, each with the trigger's residual of its predecessor in the batch.

    Args:
        images: float32 ``(N, C, H, W)`` in [0, 1], the batch before anything was triggered.
        chosen: bool ``(N,)``.
        trigger: Whose residual is taken.
    """
    others = images.roll(1, 0)[chosen]
    return (images[chosen] + trigger(others) - others).clamp(0.0, 1.0)
