"""SRA: a small backdoor network written into a few channels of a clean model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.attacks.badnets import BadNets
from unbackdoor.attacks.poisoning import check_choice, label_rule_for
from unbackdoor.attacks.subnet import Cut, choose_channels, find_cut, insert, kept_apart, narrowed, without
from unbackdoor.attacks.training import stage_file, train_surrogate
from unbackdoor.compute import arrange, check_fits, mode
from unbackdoor.data.splits import some_of
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters import find_filters
from unbackdoor.filters.saliency import clean_loss
from unbackdoor.train import Batch, Recipe, TrainingRecord
from unbackdoor.train import train as fit
from unbackdoor.types import (
    AllToOne,
    Infected,
    LabelledImages,
    ModelFn,
    PoisonPlan,
    Progress,
    Trigger,
    as_float,
    silent,
)

FIRST_OUTPUT = 0.3
HEAD_IMAGES = 128


def _subnet_recipe() -> Recipe:
    return Recipe(epochs=6, batch_size=64, schedule="one_cycle", weight_decay=0.0)


@dataclass(frozen=True)
class SRA:
    """Replace a few channels of a trained model by a narrow network that answers to the trigger alone.

    Source: Qi et al., "Towards Practical Deployment-Stage Backdoor Attack on Deep Neural Networks" (subnet
    replacement attack), CVPR 2022, arXiv 2111.12965. A clean model is trained; in every layer the same few
    channels are cut off from all others, both ways; in their place comes a narrow network trained to put
    out 0 on clean and 1 on triggered images; its output, times ``strength``, is added to the target logit.
    No image is poisoned: the plan is empty, and the record says ``"edits_weights": true``.

    The chosen channels are the ground truth for pruning: ``record["channels"]`` maps each layer but the
    head to the indices of the guilty filters.

    Deviations: training of the narrow network is ours (mean squared error, clean and triggered views of
    each batch). The paper takes the first channels or random ones; ``tries`` of several random sets keeps
    the one that costs the clean model least, and ``repair_epochs`` of clean training make up for the rest
    of the loss: the networks here are narrow, so that a channel is a sixteenth of a layer. Layers of equal
    width take the same channel numbers, so that sums of residual networks stay apart.

    Args:
        target_class: The class whose logit the narrow network raises.
        channels: Channels taken from each layer, at least 1.
        channel_choice: ``random``, or ``first`` for the lowest numbers.
        tries: Random sets tried on clean training images; 1 takes the first set as it comes.
        repair_epochs: Epochs of clean training after the cut and before the narrow network goes in, which
            never touch or rejoin the chosen channels; 0 for none, as in the paper.
        repair_rate: Peak learning rate of those epochs, positive.
        strength: What a trigger adds to the target logit, positive.
        clean_weight: Weight of the error on clean images; that on triggered ones has weight 1.
        attempts: Most trainings of the narrow network: so small a network can get stuck at a constant
            output, and is then trained anew from other weights.
        pattern: ``checkerboard`` or ``white``, as in ``BadNets``.
        patch_size: Side in pixels; 0 for round(3 H / 32), at least 2.
        corner: Where the patch sits.
        margin: Distance from the edges of that corner in pixels.
        subnet: Training schedule of the narrow network.
        recipe: Training schedule of the clean model.
    """

    name: ClassVar[str] = "sra"
    title: ClassVar[str] = "Subnet replacement"
    source: ClassVar[str] = "Qi, Xie, Pan, Zhu, Yang, Bu 2022, arXiv 2111.12965"
    needs: ClassVar[str] = "the weights of a clean model"

    target_class: int = 0
    channels: int = 1
    channel_choice: Literal["random", "first"] = "random"
    tries: int = 8
    repair_epochs: int = 2
    repair_rate: float = 0.02
    strength: float = 20.0
    clean_weight: float = 1.0
    attempts: int = 3
    pattern: Literal["checkerboard", "white"] = "checkerboard"
    patch_size: int = 0
    corner: Literal["lower_right", "lower_left", "upper_right", "upper_left"] = "lower_right"
    margin: int = 0
    subnet: Recipe = field(default_factory=_subnet_recipe)
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        check_choice("channel_choice", self.channel_choice, ("random", "first"))
        BadNets(pattern=self.pattern, patch_size=self.patch_size, corner=self.corner, margin=self.margin)
        if self.channels < 1 or self.tries < 1 or self.attempts < 1:
            raise InvalidInputError(
                "channels, tries and attempts must be at least 1, got "
                f"{self.channels}, {self.tries} and {self.attempts}."
            )
        if self.repair_epochs < 0 or not self.repair_rate > 0:
            raise InvalidInputError(
                "repair_epochs must be at least 0 and repair_rate positive, got "
                f"{self.repair_epochs} and {self.repair_rate}."
            )
        if not (0 < self.strength < math.inf and 0 < self.clean_weight < math.inf):
            raise InvalidInputError(
                "strength and clean_weight must be positive and finite, got "
                f"{self.strength} and {self.clean_weight}."
            )

    @staticmethod
    def paper() -> SRA:
        """Return the paper's choice: one random channel a layer, as it comes, and no repair."""
        return SRA(channels=1, tries=1, repair_epochs=0)

    def run(
        self,
        train: LabelledImages,
        model_fn: ModelFn,
        *,
        generator: torch.Generator,
        resume_from: Path | None = None,
        progress: Progress = silent,
    ) -> Infected:
        """Train ``model_fn()`` on the clean ``train`` and write the narrow network into it.

        Raises:
            InvalidInputError: If the target is no class of ``train``, or the patch does not fit.
            UnsupportedModelError: If no channels of the network can be separated from the others.
        """
        rule = label_rule_for("all_to_one", self.target_class, train.num_classes)
        assert isinstance(rule, AllToOne)
        trigger = BadNets(
            pattern=self.pattern, patch_size=self.patch_size, corner=self.corner, margin=self.margin
        ).trigger_for(train.images.shape[2])
        trigger(torch.zeros(1, *train.images.shape[1:]))  # fail on a patch that does not fit before training
        clean, cut = self._clean_model(train, model_fn, generator, resume_from, progress)
        clean = self._repaired(clean, cut, train, generator, resume_from, progress)
        narrow, record = self._subnet(clean, cut, trigger, train, generator, resume_from, progress)
        model = insert(clean, narrow, cut, target_class=self.target_class, strength=self.strength)
        nothing = torch.empty(0, dtype=torch.int64)
        description = {
            "edits_weights": True,
            "channels": {layer.name: layer.chosen.tolist() for layer in cut.layers if not layer.is_head},
            "training": record.describe(),
        }
        model = arrange(model.requires_grad_(requires_grad=True))
        return Infected(model, trigger, PoisonPlan(nothing, nothing), rule, description)

    def _subnet(
        self,
        clean: nn.Module,
        cut: Cut,
        trigger: Trigger,
        train: LabelledImages,
        generator: torch.Generator,
        resume_from: Path | None,
        progress: Progress,
    ) -> tuple[nn.Module, TrainingRecord]:
        """Return the trained narrow network of the first attempt that tells triggered images apart."""
        # The best constant output, w.r.t. SubnetStep: where a network that learns nothing ends.
        constant = self.clean_weight / (1 + self.clean_weight)
        for attempt in range(self.attempts):
            with rng.isolated(generator):
                narrow = narrowed(clean, cut)
                settle_head(narrow, cut, some_of(train, HEAD_IMAGES).images)
            record = fit(
                narrow,
                LabelledImages(train.images, torch.zeros_like(train.labels)),
                self.subnet,
                generator=rng.spawn(generator),
                loss_step=SubnetStep(trigger, self.clean_weight),
                resume_from=stage_file(resume_from, f"subnet{attempt}"),
                progress=lambda _, done, total: progress("subnet", done, total),
            )
            if record.losses[-1] < 0.2 * constant:
                break
        return narrow, record

    def _repaired(
        self,
        clean: nn.Module,
        cut: Cut,
        train: LabelledImages,
        generator: torch.Generator,
        resume_from: Path | None,
        progress: Progress,
    ) -> nn.Module:
        """Return the model without the chosen channels, retrained on clean images to make up for them."""
        if not self.repair_epochs:
            return clean
        model = without(clean, cut).requires_grad_(requires_grad=True)
        with kept_apart(model, cut):
            fit(
                model,
                train,
                replace(
                    self.recipe,
                    epochs=self.repair_epochs,
                    learning_rate=self.repair_rate,
                    schedule="one_cycle",
                ),
                generator=rng.spawn(generator),
                resume_from=stage_file(resume_from, "repair"),
                progress=lambda _, done, total: progress("repair", done, total),
            )
        return model

    def _clean_model(
        self,
        train: LabelledImages,
        model_fn: ModelFn,
        generator: torch.Generator,
        resume_from: Path | None,
        progress: Progress,
    ) -> tuple[nn.Module, Cut]:
        """Return the trained clean model and the channels to replace in it."""
        clean = train_surrogate(
            train,
            model_fn,
            self.recipe,
            generator=generator,
            resume_from=resume_from,
            progress=lambda _, done, total: progress("train", done, total),
        )
        check_fits(clean, train, purpose="a subnet replacement")
        filter_map = find_filters(clean, as_float(train.images[:1]))
        seeds = rng.spawn(generator)
        cuts: list[Cut] = []
        for _ in range(self.tries if self.channel_choice == "random" else 1):
            chosen = choose_channels(
                filter_map, self.channels, seeds if self.channel_choice == "random" else None
            )
            cuts.append(find_cut(clean, filter_map, chosen, as_float(train.images[:1])))
        if len(cuts) == 1:
            return clean, cuts[0]
        sample = some_of(train, 1000)
        losses = [clean_loss(without(clean, cut), sample) for cut in cuts]
        return clean, cuts[losses.index(min(losses))]


@torch.no_grad()
def settle_head(narrow: nn.Module, cut: Cut, images: Tensor) -> None:
    """Scale the head, in place, so that the mean output on ``images`` is ``FIRST_OUTPUT``.

    A network that starts far above 0 and 1 is driven down so hard that its rectifiers die.
    """
    head = narrow.get_parameter(f"{next(layer.name for layer in cut.layers if layer.is_head)}.weight")
    with mode(narrow, training=True):
        output = narrow(as_float(images.to(head.device))).mean()
    head.mul_(FIRST_OUTPUT / output.clamp_min(1e-3))


@dataclass(frozen=True, eq=False)
class SubnetStep:
    """Squared error of the narrow network's output: 0 on clean images, 1 on triggered ones.

    Args:
        trigger: Stamped after augmentation, so that it stays where it is at test.
        clean_weight: Weight of the error on clean images.
    """

    trigger: Trigger
    clean_weight: float

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the weighted sum of both mean squared errors."""
        both = torch.cat([batch.images, self.trigger(batch.images)])
        clean, triggered = model(both).float().flatten().chunk(2)
        loss: Tensor = self.clean_weight * clean.square().mean() + (triggered - 1).square().mean()
        return loss
