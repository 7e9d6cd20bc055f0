"""LIRA: faint noise for every image, learned against the classifier that learns to see it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.attacks.mixing import POISON, RoleSheet, check_shares
from unbackdoor.attacks.poisoning import check_choice, label_rule_for
from unbackdoor.compute import arrange, check_fits, device_of, memory_format_for, mode
from unbackdoor.data.splits import some_of
from unbackdoor.errors import InvalidInputError
from unbackdoor.train import Batch, Recipe
from unbackdoor.train import train as train_network
from unbackdoor.triggers.learned_noise import LearnedNoiseTrigger, add_noise, noise_of
from unbackdoor.triggers.networks import TriggerNetwork, fix, in_chunks, stages_for
from unbackdoor.types import Infected, LabelledImages, LabelRule, ModelFn, Progress, silent


@dataclass(frozen=True)
class LIRA:
    """Train a network that makes faint noise for each image, and the classifier that obeys it.

    Source: Doan et al., "LIRA: Learnable, Imperceptible and Robust Backdoor Attacks", ICCV 2021, section 3.
    In stage 1 a noise network U' is updated against the classifier, and the classifier learns clean images
    and images triggered by U, a copy that is brought up to date after each epoch. In stage 2 U is frozen
    and the classifier goes on with the final eps. Both stages share one recipe.

    eps is in units of pixels in [0, 1]. The paper's is in units of normalised pixels: its 0.1 and 0.01 are
    about 0.025 and 0.0025 here, and the latter is less than one 8-bit level. Training therefore rounds
    triggered images to 8 bits and passes gradients straight through (``eight_bit``).

    Deviations: the rounding; clean and triggered images go through the classifier as one batch, so that batch
    norm sees the same mixture as its running statistics; U' sees the classifier in eval mode, and a
    part of each batch; the losses are weighted per sample, which is the paper's mean of two means at
    ``poison_fraction`` 1; the classifier is not started anew for stage 2; networks are smaller.

    Args:
        poison_fraction: Share of the samples that are also seen triggered, in (0, 1]; 1 in the paper.
        target_class: Target of the all-to-one rule; unused by the all-to-all rule.
        rule: ``all_to_one``, or ``all_to_all`` with label y sent to y + 1 modulo the number of classes.
        first_eps: Bound of the noise in stage 1, in pixels of [0, 1].
        eps: Bound in stage 2 and of the final trigger.
        first_share: Share of the epochs that stage 1 takes, in (0, 1); each gets one if there are two.
        clean_weight: Weight of a clean sample (alpha); a triggered one weighs 1 - alpha; in (0, 1).
        network: ``unet``, as the authors take for CIFAR-10, or ``autoencoder`` without its short cuts.
        width: Channels of the network's first stage, 1 to 64.
        generator_images: Images per batch that U' is updated on; 0 for all.
        generator_learning_rate: Of Adam for U'.
        eight_bit: Round triggered images to 8 bits in training.
        redraw: Choose new samples for each epoch; the plan is that of the first epoch.
        recipe: Schedule of the classifier over both stages.
    """

    name: ClassVar[str] = "lira"
    title: ClassVar[str] = "Learnable, imperceptible, robust attack"
    source: ClassVar[str] = "Doan, Lao, Zhao, Li 2021, ICCV"
    needs: ClassVar[str] = "control of the training"

    poison_fraction: float = 0.5
    target_class: int = 0
    rule: Literal["all_to_one", "all_to_all"] = "all_to_one"
    first_eps: float = 0.05
    eps: float = 0.03
    first_share: float = 0.6
    clean_weight: float = 0.5
    network: Literal["unet", "autoencoder"] = "unet"
    width: int = 8
    generator_images: int = 32
    generator_learning_rate: float = 1e-3
    eight_bit: bool = True
    redraw: bool = True
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        check_shares((self.poison_fraction,))
        check_choice("network", self.network, ("unet", "autoencoder"))
        TriggerNetwork(1, 1, self.width, 1)
        if not 0 < self.eps <= 1 or not 0 < self.first_eps <= 1:
            raise InvalidInputError(
                f"first_eps and eps must lie in (0, 1], got {self.first_eps} and {self.eps}; they are in "
                "units of pixels in [0, 1]."
            )
        if not 0 < self.first_share < 1 or not 0 < self.clean_weight < 1:
            raise InvalidInputError(
                f"first_share and clean_weight must lie in (0, 1), got {self.first_share} and "
                f"{self.clean_weight}."
            )
        if self.generator_images < 0 or not self.generator_learning_rate > 0:
            raise InvalidInputError(
                "generator_images must be at least 0 and its learning rate positive, got "
                f"{self.generator_images} and {self.generator_learning_rate}."
            )

    @staticmethod
    def paper() -> LIRA:
        """Return the authors' settings for CIFAR-10, eps in units of pixels.

        The recipe is that of the MNP paper; the authors train for 50 and 500 epochs.
        """
        return LIRA(
            poison_fraction=1.0,
            first_eps=0.025,
            eps=0.0025,
            first_share=0.1,
            width=64,
            generator_images=0,
            generator_learning_rate=1e-4,
            eight_bit=False,
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
        """Train the noise network and ``model_fn()`` on ``train``.

        Raises:
            InvalidInputError: If the target is no class of ``train``, or the rate selects no image.
        """
        rule = label_rule_for(self.rule, self.target_class, train.num_classes)
        sheet = RoleSheet.draw(
            len(train), (self.poison_fraction,), redraw=self.redraw, generator=rng.spawn(generator)
        )
        plan = sheet.plan(train.labels, rule)
        with rng.isolated(generator):
            model = model_fn()
        check_fits(model, train, purpose="training")
        step = self._step(train, sheet, rule, device_of(model), rng.spawn(generator))
        record = train_network(
            model,
            train,
            self.recipe,
            generator=rng.spawn(generator),
            loss_step=step,
            resume_from=resume_from,
            progress=progress,
        )
        if step.first_epochs >= self.recipe.epochs:
            step.bring_up_to_date()
        trigger = LearnedNoiseTrigger(fix(step.used), self.eps)
        noise = noise_statistics(trigger, some_of(train, 256).floats())
        return Infected(model, trigger, plan, rule, {"training": record.describe(), "noise": noise})

    def _step(
        self,
        data: LabelledImages,
        sheet: RoleSheet,
        rule: LabelRule,
        device: torch.device,
        generator: torch.Generator,
    ) -> NoiseStep:
        channels, height, width = data.images.shape[1:]
        with rng.isolated(generator):
            updated = TriggerNetwork(
                channels, channels, self.width, stages_for(height, width), skips=self.network == "unet"
            ).to(device)
        arrange(updated)
        used = copy.deepcopy(updated).eval().requires_grad_(requires_grad=False)
        optimiser = torch.optim.Adam(updated.parameters(), lr=self.generator_learning_rate)
        return NoiseStep(
            options=self,
            sheet=sheet,
            rule=rule,
            used=used,
            updated=updated,
            optimiser=optimiser,
            modules={"used": used, "updated": updated},
            own_optimisers={"updated": optimiser},
        )


@dataclass(eq=False)
class NoiseStep:
    """One step of LIRA: the noise network first, then the classifier's loss.

    Args:
        options: The attack.
        sheet: Which samples are also seen triggered.
        rule: Their labels.
        used: U, which makes the classifier's triggered images; frozen within an epoch.
        updated: U', which is trained in stage 1.
        optimiser: Of U'; stepped here, before the classifier's loss is taken.
        modules: U and U', for the training state.
        own_optimisers: The optimiser, for the training state.
        optimisers: None.
        epoch: The current epoch, from 0; decides the stage.
    """

    options: LIRA
    sheet: RoleSheet
    rule: LabelRule
    used: TriggerNetwork
    updated: TriggerNetwork
    optimiser: torch.optim.Optimizer
    modules: Mapping[str, nn.Module]
    own_optimisers: Mapping[str, torch.optim.Optimizer]
    optimisers: Mapping[str, torch.optim.Optimizer] = field(default_factory=dict)
    epoch: int = 0

    @property
    def first_epochs(self) -> int:
        """Epochs of stage 1."""
        epochs = self.options.recipe.epochs
        return max(1, min(round(self.options.first_share * epochs), epochs - 1))

    @property
    def in_first_stage(self) -> bool:
        """Whether the noise network is still trained."""
        return self.epoch < self.first_epochs

    @property
    def eps(self) -> float:
        """Bound of the noise in the current stage."""
        return self.options.first_eps if self.in_first_stage else self.options.eps

    def before_epoch(self, model: nn.Module, epoch: int) -> None:
        """Choose the stage of the 0-based ``epoch`` and, up to the start of stage 2, copy U' into U."""
        self.epoch = epoch
        self.sheet.before_epoch(epoch)
        if 0 < epoch <= self.first_epochs:
            self.bring_up_to_date()
        self.updated.train()

    def bring_up_to_date(self) -> None:
        """Copy U' into U, running statistics included."""
        self.used.load_state_dict(self.updated.state_dict())
        self.used.eval()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Update U' in stage 1; return the loss on the clean images and the triggered ones of U."""
        if self.in_first_stage:
            self._update_noise(model, batch)
        chosen = self.sheet.of(batch) == POISON
        plain = batch.images[chosen]
        labels = torch.cat([batch.labels, self.rule(batch.labels[chosen])])
        images = batch.images
        if len(plain):
            with torch.no_grad():
                images = torch.cat([images, self._triggered(self.used, plain)])
        logits: Tensor = model(images.contiguous(memory_format=memory_format_for(model)))
        weights = torch.full_like(labels, 1 - self.options.clean_weight, dtype=torch.float32)
        weights[: len(batch.labels)] = self.options.clean_weight
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        return (losses * weights).sum() / weights.sum()

    def _update_noise(self, model: nn.Module, batch: Batch) -> None:
        part = slice(self.options.generator_images or None)
        triggered = self._triggered(self.updated, batch.images[part])
        with mode(model, training=False):
            logits = model(triggered.contiguous(memory_format=memory_format_for(model)))
        loss = F.cross_entropy(logits.float(), self.rule(batch.labels[part]))
        parameters = list(self.updated.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def _triggered(self, network: TriggerNetwork, images: Tensor) -> Tensor:
        images = images.contiguous()
        triggered = add_noise(images, noise_of(network, images), self.eps)
        return straight_through(triggered) if self.options.eight_bit else triggered


def straight_through(images: Tensor) -> Tensor:
    """Round ``images`` in [0, 1] to 8-bit levels; gradients pass as if nothing had been rounded."""
    return images + ((images * 255).round() / 255 - images).detach()


def noise_statistics(trigger: LearnedNoiseTrigger, images: Tensor) -> dict[str, Any]:
    """Measure whether the noise depends on the image or has collapsed to one pattern for all.

    Args:
        trigger: The trigger.
        images: float32 ``(N, C, H, W)`` in [0, 1].

    Returns:
        ``between_image_share``, the part of the mean square of tanh(U(x)) that is its variance between
        images: 0 for one universal pattern; and ``mean_square``.
    """
    noise = in_chunks(trigger.network, images, lambda x: noise_of(trigger.network, x))
    square = float(noise.square().mean())
    between = float(noise.var(0, correction=0).mean())
    return {"between_image_share": between / square if square else 0.0, "mean_square": square}
