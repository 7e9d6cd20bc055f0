"""IAB: a generated trigger for every image that fails on every other image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.attacks.mixing import DECOY, POISON, RoleSheet, check_shares
from unbackdoor.attacks.poisoning import label_rule_for
from unbackdoor.attacks.training import stage_file
from unbackdoor.compute import arrange, autocast, check_fits, device_of
from unbackdoor.data.splits import some_of
from unbackdoor.errors import InvalidInputError
from unbackdoor.models.checkpoint import read_tensors, write_tensors
from unbackdoor.train import Batch, Recipe, batches, cross_entropy_step
from unbackdoor.train import train as train_network
from unbackdoor.triggers.input_aware import CrossTrigger, InputAwareTrigger, mask_of, paste, pattern_of
from unbackdoor.triggers.networks import TriggerNetwork, fix, stages_for
from unbackdoor.types import Infected, LabelledImages, LabelRule, ModelFn, Progress, silent

IMAGE_SCALE = 4.0
"""One over the usual standard deviation of pixels: the source measures distances on normalised images."""
SMALLEST_GENERATED = 16
"""Images per batch that the pattern network sees at least: batch norm needs some at low rates."""


@dataclass(frozen=True)
class IAB:
    """Train a trigger generator with the model, such that each image has a trigger of its own.

    Source: Nguyen & Tran, "Input-Aware Dynamic Backdoor Attack", 2020, arXiv 2010.08138. A mask network
    is trained first, for masks that are small and differ between images, and frozen; then the classifier and
    the pattern network are trained together, on samples with their own trigger (target label), samples
    with another image's trigger (own label) and clean ones, plus a loss that keeps patterns diverse.

    Deviations: gradients of the generator are zeroed before each step (the authors' code lets them pile
    up); triggers are applied to pixels, which is the same as to normalised images; another image means
    the one before it in the shuffled batch instead of one from a second loader; networks and schedules
    are smaller; the generator's learning rate stays as it is; the pattern network sees at least 16 images
    of a batch, so that it also learns at low rates.

    Args:
        poison_fraction: Share of the samples that carry their own trigger and are relabelled, in (0, 1].
        cross_fraction: Share of the samples with another image's trigger; 0 gives up input-awareness.
        target_class: Target of the all-to-one rule; unused by the all-to-all rule.
        rule: ``all_to_one``, or ``all_to_all`` with label y sent to y + 1 modulo the number of classes.
        density: Mean of the mask that is not punished, in (0, 1).
        density_weight: Weight of the mask's excess over ``density`` in the mask stage.
        diversity_weight: Weight of the diversity loss in both stages.
        width: Channels of the first stage of either network, 1 to 64; 12 makes 0.25 million weights.
        mask_epochs: Passes of the mask stage.
        mask_images: Images that it uses, chosen at random; 0 for all.
        mask_learning_rate: Of Adam in the mask stage, a tenth after 2/5 and again after 4/5 of it.
        generator_learning_rate: Of Adam for the pattern network.
        redraw: Choose new samples for each epoch, as the authors do; the plan is that of the first epoch.
        recipe: Schedule of the classifier, and of the augmentation in both stages.
    """

    name: ClassVar[str] = "iab"
    title: ClassVar[str] = "Input-aware dynamic attack"
    source: ClassVar[str] = "Nguyen, Tran 2020, arXiv 2010.08138"
    needs: ClassVar[str] = "control of the training"

    poison_fraction: float = 0.1
    cross_fraction: float = 0.1
    target_class: int = 0
    rule: Literal["all_to_one", "all_to_all"] = "all_to_one"
    density: float = 0.032
    density_weight: float = 100.0
    diversity_weight: float = 1.0
    width: int = 12
    mask_epochs: int = 16
    mask_images: int = 5000
    mask_learning_rate: float = 0.01
    generator_learning_rate: float = 1e-3
    redraw: bool = True
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        check_shares((self.poison_fraction, self.cross_fraction))
        TriggerNetwork(1, 1, self.width, 1)
        if not 0 < self.density < 1 or not self.density_weight >= 0 or not self.diversity_weight >= 0:
            raise InvalidInputError(
                "density must lie in (0, 1) and the loss weights be at least 0, got "
                f"{self.density}, {self.density_weight} and {self.diversity_weight}."
            )
        if self.mask_epochs < 1 or self.mask_images < 0:
            raise InvalidInputError(
                f"mask_epochs must be at least 1 and mask_images at least 0, got {self.mask_epochs} and "
                f"{self.mask_images}."
            )
        if not self.mask_learning_rate > 0 or not self.generator_learning_rate > 0:
            raise InvalidInputError(
                f"learning rates must be positive, got {self.mask_learning_rate} and "
                f"{self.generator_learning_rate}."
            )

    @staticmethod
    def paper() -> IAB:
        """Return the authors' settings for CIFAR-10; the classifier's recipe is that of the MNP paper."""
        return IAB(width=32, mask_epochs=25, mask_images=0, generator_learning_rate=0.01)

    def run(
        self,
        train: LabelledImages,
        model_fn: ModelFn,
        *,
        generator: torch.Generator,
        resume_from: Path | None = None,
        progress: Progress = silent,
    ) -> Infected:
        """Train masks, then patterns and ``model_fn()`` together, on ``train``.

        Raises:
            InvalidInputError: If the target is no class of ``train``, or the rate selects no image.
        """
        rule = label_rule_for(self.rule, self.target_class, train.num_classes)
        sheet = RoleSheet.draw(
            len(train),
            (self.poison_fraction, self.cross_fraction),
            redraw=self.redraw,
            generator=rng.spawn(generator),
        )
        plan = sheet.plan(train.labels, rule)
        with rng.isolated(generator):
            model = model_fn()
        check_fits(model, train, purpose="training")
        pattern, masker = self._networks(train, device_of(model), rng.spawn(generator))
        mask_record = self._train_masks(masker, train, rng.spawn(generator), resume_from, progress)
        optimiser = torch.optim.Adam(pattern.parameters(), lr=self.generator_learning_rate, betas=(0.5, 0.9))
        step = InputAwareStep(
            sheet, rule, pattern, masker, self.diversity_weight, {"pattern": pattern}, {"pattern": optimiser}
        )
        record = train_network(
            model,
            train,
            self.recipe,
            generator=rng.spawn(generator),
            loss_step=step,
            resume_from=resume_from,
            progress=progress,
        )
        fix(pattern)
        return Infected(
            model,
            InputAwareTrigger(pattern, masker),
            plan,
            rule,
            {"training": record.describe(), "mask": mask_record},
            # Without cross samples in training the network never learned to tell them apart.
            {"cross": CrossTrigger(pattern, masker)} if self.cross_fraction else {},
        )

    def _networks(
        self, data: LabelledImages, device: torch.device, generator: torch.Generator
    ) -> tuple[TriggerNetwork, TriggerNetwork]:
        channels, height, width = data.images.shape[1:]
        stages = stages_for(height, width)
        with rng.isolated(generator):
            pattern = TriggerNetwork(channels, channels, self.width, stages).to(device)
            masker = TriggerNetwork(channels, 1, self.width, stages).to(device)
        arrange(pattern)
        arrange(masker)
        return pattern, masker

    def _train_masks(
        self,
        masker: TriggerNetwork,
        data: LabelledImages,
        generator: torch.Generator,
        resume_from: Path | None,
        progress: Progress,
    ) -> dict[str, Any]:
        """Train ``masker`` in place and freeze it, or read it where an earlier run has done so."""
        file = stage_file(resume_from, "mask")
        if file is not None and file.exists():
            tensors = read_tensors(file)
            losses = [float(loss) for loss in tensors.pop("losses")]
            masker.load_state_dict(tensors)
        else:
            losses = self._fit_masks(masker, data, generator, progress)
            if file is not None:
                write_tensors(masker.state_dict() | {"losses": torch.tensor(losses)}, file)
        fix(masker)
        with torch.no_grad():
            sample = some_of(data, 256).to(device_of(masker)).floats()
            masks = mask_of(masker, sample)
        return {"losses": losses, "density": float(masks.mean()), "spread": float(masks.var(0).mean())}

    def _fit_masks(
        self, masker: TriggerNetwork, data: LabelledImages, generator: torch.Generator, progress: Progress
    ) -> list[float]:
        device = device_of(masker)
        count = min(self.mask_images or len(data), len(data))
        chosen = torch.randperm(len(data), generator=generator)[:count].to(data.images.device)
        part = data.subset(chosen).to(device)
        optimiser = torch.optim.Adam(masker.parameters(), lr=self.mask_learning_rate, betas=(0.5, 0.9))
        masker.train()
        means = []
        for epoch in range(self.mask_epochs):
            drops = (epoch >= 0.4 * self.mask_epochs) + (epoch >= 0.8 * self.mask_epochs)
            optimiser.param_groups[0]["lr"] = self.mask_learning_rate * 0.1**drops
            losses = []
            for batch in batches(
                part,
                self.recipe.batch_size,
                generator,
                crop_padding=self.recipe.crop_padding,
                flip=self.recipe.flip,
            ):
                with autocast(self.recipe.precision, device):
                    masks = mask_of(masker, batch.images)
                loss = self.density_weight * (masks - self.density).relu().mean()
                loss = loss + self.diversity_weight * IMAGE_SCALE * diversity_loss(batch.images, masks)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                losses.append(loss.detach())
            means.append(float(torch.stack(losses).mean()))
            progress("mask", epoch + 1, self.mask_epochs)
        return means


def diversity_loss(images: Tensor, made: Tensor) -> Tensor:
    """Return how alike the results for different images are: the mean of ``|x - x'| / |g(x) - g(x')|``.

    Distances are root mean squares over an image; x' is the image before x in the batch.

    Args:
        images: float32 ``(N, C, H, W)``.
        made: What was made of them, float32 ``(N, D, H, W)``.

    Returns:
        A scalar; 0 for fewer than two images, which differ from nothing.
    """
    if len(images) < 2:
        return made.sum() * 0
    apart = (images - images.roll(1, 0)).square().mean((1, 2, 3)).sqrt()
    # Under the root, so that its slope stays finite where two results agree.
    between = ((made - made.roll(1, 0)).square().mean((1, 2, 3)) + 1e-7).sqrt()
    return (apart / between).mean()


@dataclass(frozen=True, eq=False)
class InputAwareStep:
    """One step of classifier and pattern network together.

    Args:
        sheet: Who plays which role.
        rule: Labels of the triggered samples.
        pattern: Trained along.
        masker: Frozen.
        diversity_weight: Weight of the diversity loss.
        modules: The pattern network, for the training state.
        optimisers: Its optimiser.
        own_optimisers: None.
    """

    sheet: RoleSheet
    rule: LabelRule
    pattern: TriggerNetwork
    masker: TriggerNetwork
    diversity_weight: float
    modules: Mapping[str, nn.Module]
    optimisers: Mapping[str, torch.optim.Optimizer]
    own_optimisers: Mapping[str, torch.optim.Optimizer] = field(default_factory=dict)

    def before_epoch(self, model: nn.Module, epoch: int) -> None:
        """Draw the roles of the 0-based ``epoch``."""
        self.sheet.before_epoch(epoch)
        self.pattern.train()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of the mixed batch plus the diversity loss."""
        mixed, seen, patterns = self.mixed(batch)
        loss = cross_entropy_step(model, mixed)
        return loss + self.diversity_weight * diversity_loss(seen, patterns)

    def mixed(self, batch: Batch) -> tuple[Batch, Tensor, Tensor]:
        """Return the batch with its triggers, the images that patterns were made for, and the patterns."""
        roles = self.sheet.of(batch)
        poisoned = (roles == POISON).nonzero().flatten()
        crossed = (roles == DECOY).nonzero().flatten()
        lenders = (crossed - 1) % len(roles)
        order = _needed_first(torch.cat([poisoned, lenders]), len(roles))
        seen = batch.images[order].contiguous()
        patterns = pattern_of(self.pattern, seen)
        with torch.no_grad():
            masks = mask_of(self.masker, seen)
        place = torch.zeros_like(roles)
        place[order] = torch.arange(len(order), device=roles.device)
        takers, givers = torch.cat([poisoned, crossed]), place[torch.cat([poisoned, lenders])]
        images, labels = batch.images.clone(), batch.labels.clone()
        images[takers] = paste(batch.images[takers], patterns[givers], masks[givers])
        labels[poisoned] = self.rule(batch.labels[poisoned])
        return Batch(images, labels, batch.indices), seen, patterns


def _needed_first(needed: Tensor, count: int) -> Tensor:
    """Return the distinct ``needed`` positions, filled up from the others to a batch that norms can use."""
    rank = torch.ones(count, dtype=torch.int64, device=needed.device)
    rank[needed] = 0
    size = max(int((rank == 0).sum()), min(SMALLEST_GENERATED, count))
    return rank.argsort(stable=True)[:size]
