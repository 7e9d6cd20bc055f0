"""Adap-Blend and Adap-Patch: weak partial triggers in training, cover samples, the full trigger at test."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.attacks.poisoning import check_choice, label_rule_for, plan_poison, replaced
from unbackdoor.attacks.training import TriggerStage
from unbackdoor.errors import InvalidInputError
from unbackdoor.train import Batch, LossStep, Recipe, cross_entropy_step, train
from unbackdoor.triggers.blend import BlendTrigger
from unbackdoor.triggers.masked import MaskedBlendTrigger
from unbackdoor.types import (
    Infected,
    LabelledImages,
    LabelRule,
    ModelFn,
    PoisonPlan,
    Progress,
    Trigger,
    as_float,
    quantise,
    silent,
)


@dataclass(frozen=True)
class AdapBlend:
    """Blend only random tiles of a key in training, with covers that keep their label; all of it at test.

    Source: Qi et al., "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR 2023,
    section 4 (no arXiv id known to us; settings from the authors' code). Each poison and each cover sample
    gets ``(1 - a m) x + a m k`` with a mask m of its own over the tiles, so the network must learn every
    part of the key, and the covers keep it from tying the key to the target too firmly.

    Deviations: the key is seeded colour noise, because the paper's is not free to ship. By default the
    rates are higher than the paper's 0.003 and keys are blended in after augmentation, because short
    schedules learn neither low rates nor shifted keys.

    Args:
        poison_fraction: Share of samples with partial key and changed label, in (0, 1].
        cover_fraction: Share of samples with partial key and their own label, in [0, 1).
        target_class: Target of the all-to-one rule; unused by the all-to-all rule.
        rule: ``all_to_one``, or ``all_to_all`` with label y sent to y + 1 modulo the number of classes.
        alpha_train: Weight of the key in training, in (0, 1].
        alpha_test: Weight of the key at test, in (0, 1].
        key_cells: Coloured squares a side of the key. Few make a coarse key, which survives the shifts of
            random crops; as many as pixels make the pixel noise of ``Blend``.
        tiles: Tiles a side; at most the side of the image.
        tile_fraction: Share of the tiles blended in training, in (0, 1].
        trigger_stage: Stamp stored images, as the paper does, or batches after augmentation.
        recipe: Training schedule.
    """

    name: ClassVar[str] = "adap_blend"
    title: ClassVar[str] = "Adaptive blend"
    source: ClassVar[str] = "Qi, Xie, Li, Mahloujifar, Mittal 2023, ICLR"
    needs: ClassVar[str] = "poisoned training data"

    poison_fraction: float = 0.1
    cover_fraction: float = 0.05
    target_class: int = 0
    rule: Literal["all_to_one", "all_to_all"] = "all_to_one"
    alpha_train: float = 0.15
    alpha_test: float = 0.2
    key_cells: int = 8
    tiles: int = 4
    tile_fraction: float = 0.5
    trigger_stage: TriggerStage = "after_augmentation"
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        for name in ("alpha_train", "alpha_test", "tile_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise InvalidInputError(f"{name} must lie in (0, 1], got {getattr(self, name)}.")
        if self.tiles < 1 or self.key_cells < 1:
            raise InvalidInputError(
                f"the key needs at least 1 tile and 1 cell a side, got {self.tiles} and {self.key_cells}."
            )
        _check_rates(self.poison_fraction, self.cover_fraction)
        check_choice("trigger_stage", self.trigger_stage, get_args(TriggerStage))

    @staticmethod
    def paper() -> AdapBlend:
        """Return the authors' settings: stored images, 0.3 % poisons and as many covers."""
        return AdapBlend(poison_fraction=0.003, cover_fraction=0.003, trigger_stage="before_augmentation")

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
            InvalidInputError: If the target is no class of ``train``, rates select no image or too many, or
                the images are smaller than the tiles.
        """
        channels, height, width = train.images.shape[1:]
        if min(height, width) < self.tiles:
            raise InvalidInputError(
                f"{self.tiles} tiles a side do not fit into {height}x{width} images; use fewer tiles."
            )
        cells = torch.rand(1, channels, self.key_cells, self.key_cells, generator=rng.spawn(generator))
        key = F.interpolate(cells, size=(height, width), mode="nearest").squeeze(0)
        rule = label_rule_for(self.rule, self.target_class, train.num_classes)
        plan, covers = plan_covers(
            train.labels, self.poison_fraction, self.cover_fraction, rule, rng.spawn(generator)
        )
        count = len(plan.indices) + len(covers)
        masks = tile_masks(count, self.tiles, self.tile_fraction, rng.spawn(generator))
        parts = Parts(key, self.alpha_train * masks)
        poisoned = Poisoned(train, plan, covers, parts, torch.arange(count))
        trigger = BlendTrigger(key, self.alpha_test)
        return poisoned.train(
            model_fn, trigger, rule, self.trigger_stage, self.recipe, generator, resume_from, progress
        )


@dataclass(frozen=True)
class PatchOpacities:
    """Opacity of each training patch, in (0, 1]; patches sit in the four corners, row by row.

    Args:
        first: Of the upper left patch.
        second: Of the upper right patch.
        third: Of the lower left patch.
        fourth: Of the lower right patch.
    """

    first: float = 0.5
    second: float = 0.2
    third: float = 0.5
    fourth: float = 0.3

    def __post_init__(self) -> None:
        if not all(0 < opacity <= 1 for opacity in self.values()):
            raise InvalidInputError(f"opacities must lie in (0, 1], got {self.values()}.")

    def values(self) -> tuple[float, ...]:
        """Return the four opacities in order."""
        return (self.first, self.second, self.third, self.fourth)


@dataclass(frozen=True)
class AdapPatch:
    """Stamp one of four faint patches in training, with covers that keep their label; two in full at test.

    Source: Qi et al., "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR 2023,
    section 4 (no arXiv id known to us; settings from the authors' code).

    Deviations: the patches are seeded colour noise in the four corners, because the paper's pictures are
    not free to ship. By default the rates are higher than the paper's and patches are stamped after
    augmentation, because short schedules learn neither low rates nor shifted patches. At test
    the first and the third patch are stamped, the most opaque ones of the paper.

    Args:
        poison_fraction: Share of samples with a patch and changed label, in (0, 1].
        cover_fraction: Share of samples with a patch and their own label, in [0, 1).
        target_class: Target of the all-to-one rule; unused by the all-to-all rule.
        rule: ``all_to_one``, or ``all_to_all`` with label y sent to y + 1 modulo the number of classes.
        patch_size: Side in pixels; 0 for round(8 H / 32), at least 2.
        margin: Distance from the corners in pixels.
        opacities: Of the patches in training.
        test_opacity: Of the two patches at test, in (0, 1].
        trigger_stage: Stamp stored images, as the paper does, or batches after augmentation.
        recipe: Training schedule.
    """

    name: ClassVar[str] = "adap_patch"
    title: ClassVar[str] = "Adaptive patch"
    source: ClassVar[str] = "Qi, Xie, Li, Mahloujifar, Mittal 2023, ICLR"
    needs: ClassVar[str] = "poisoned training data"

    poison_fraction: float = 0.1
    cover_fraction: float = 0.025
    target_class: int = 0
    rule: Literal["all_to_one", "all_to_all"] = "all_to_one"
    patch_size: int = 0
    margin: int = 0
    opacities: PatchOpacities = field(default_factory=PatchOpacities)
    test_opacity: float = 1.0
    trigger_stage: TriggerStage = "after_augmentation"
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        if not 0 < self.test_opacity <= 1:
            raise InvalidInputError(f"test_opacity must lie in (0, 1], got {self.test_opacity}.")
        if self.patch_size < 0 or self.margin < 0:
            raise InvalidInputError(
                f"patch_size and margin must be at least 0, got {self.patch_size} and {self.margin}."
            )
        _check_rates(self.poison_fraction, self.cover_fraction)
        check_choice("trigger_stage", self.trigger_stage, get_args(TriggerStage))

    @staticmethod
    def paper() -> AdapPatch:
        """Return the authors' settings: stored images, 0.3 % poisons and 0.6 % covers."""
        return AdapPatch(poison_fraction=0.003, cover_fraction=0.006, trigger_stage="before_augmentation")

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
            InvalidInputError: If the target is no class of ``train``, rates select no image or too many, or
                the patches do not fit.
        """
        channels, height, width = train.images.shape[1:]
        side = self.patch_size or max(2, round(8 * height / 32))
        areas = corner_masks(height, width, side, self.margin)
        key = torch.rand(channels, height, width, generator=rng.spawn(generator))
        rule = label_rule_for(self.rule, self.target_class, train.num_classes)
        plan, covers = plan_covers(
            train.labels, self.poison_fraction, self.cover_fraction, rule, rng.spawn(generator)
        )
        parts = Parts(key, areas * torch.tensor(self.opacities.values()).view(4, 1, 1))
        count = len(plan.indices) + len(covers)
        variants = torch.randint(4, (count,), generator=rng.spawn(generator))
        poisoned = Poisoned(train, plan, covers, parts, variants)
        trigger = MaskedBlendTrigger(key, self.test_opacity * (areas[0] + areas[2]).unsqueeze(0))
        return poisoned.train(
            model_fn, trigger, rule, self.trigger_stage, self.recipe, generator, resume_from, progress
        )


def _check_rates(poison_fraction: float, cover_fraction: float) -> None:
    if not 0 < poison_fraction <= 1 or not cover_fraction >= 0 or poison_fraction + cover_fraction > 1:
        raise InvalidInputError(
            "poison_fraction must lie in (0, 1] and make at most 1 with cover_fraction, got "
            f"{poison_fraction} and {cover_fraction}; lower one of them."
        )


def plan_covers(
    labels: Tensor, poison_fraction: float, cover_fraction: float, rule: LabelRule, generator: torch.Generator
) -> tuple[PoisonPlan, Tensor]:
    """Choose the poisons and, among the other samples, the covers.

    Args:
        labels: int64 ``(N,)``.
        poison_fraction: Share of poisons.
        cover_fraction: Share of covers.
        rule: Labels of the poisons.
        generator: Source of randomness, on the CPU.

    Returns:
        The plan, which does not know of the covers, and their indices, int64 ``(Q,)``.

    Raises:
        InvalidInputError: If no poison is selected.
    """
    plan = plan_poison(labels, poison_fraction, rule, generator)
    free = torch.ones(len(labels), dtype=torch.bool)
    free[plan.indices] = False
    rest = free.nonzero().flatten()
    count = min(len(rest), round(cover_fraction * len(labels)))
    return plan, rest[torch.randperm(len(rest), generator=generator)[:count]].sort().values


def tile_masks(count: int, tiles: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Choose ``round(fraction * tiles^2)`` tiles, at least one, for each of ``count`` images.

    Returns:
        float32 ``(count, tiles, tiles)`` of zeros and ones.
    """
    chosen = max(1, round(fraction * tiles**2))
    order = torch.rand(count, tiles**2, generator=generator).argsort(1)
    return (order.argsort(1) < chosen).float().view(count, tiles, tiles)


def corner_masks(height: int, width: int, side: int, margin: int) -> Tensor:
    """Return the areas of a square patch in the four corners, float32 ``(4, height, width)``.

    Raises:
        InvalidInputError: If the patches do not fit beside one another.
    """
    if 2 * (side + margin) > min(height, width):
        raise InvalidInputError(
            f"four {side}x{side} patches with margin {margin} do not fit into {height}x{width} images; "
            "choose smaller patches or a smaller margin."
        )
    masks = torch.zeros(4, height, width)
    for index, mask in enumerate(masks):
        row = margin if index < 2 else height - margin - side
        column = margin if index % 2 == 0 else width - margin - side
        mask[row : row + side, column : column + side] = 1
    return masks


@dataclass(frozen=True, eq=False)
class Parts:
    """Several weak variants of one trigger: ``(1 - m_v) x + m_v k``.

    Args:
        key: The key k, float32 ``(C, H, W)``.
        weights: The masks m_v, float32 ``(V, h, w)``; enlarged by repeating if smaller than the key.
    """

    key: Tensor
    weights: Tensor

    def __call__(self, images: Tensor, variants: Tensor) -> Tensor:
        """Return ``images``, float32 ``(N, C, H, W)``, with variant ``variants[i]`` on image i."""
        chosen = self.weights.to(images.device)[variants.to(images.device)].unsqueeze(1)
        if not len(images):  # which F.interpolate refuses
            return images.clone()
        chosen = F.interpolate(chosen, size=self.key.shape[-2:], mode="nearest")
        return (1 - chosen) * images + chosen * self.key.to(images)


@dataclass(frozen=True, eq=False)
class StampParts:
    """A loss step that stamps poisons and covers of each batch after crop and flip.

    Args:
        parts: The weak variants.
        variants: int64 ``(N,)``: the variant of each training sample, -1 for none.
    """

    parts: Parts
    variants: Tensor

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the stamped batch; labels are the poisoned ones already."""
        variants = self.variants.to(batch.indices.device)[batch.indices]
        stamped = variants >= 0
        images = batch.images.clone()
        images[stamped] = self.parts(batch.images[stamped], variants[stamped])
        return cross_entropy_step(model, Batch(images, batch.labels, batch.indices))


@dataclass(frozen=True, eq=False)
class Poisoned:
    """A training set with its poisons and covers.

    Args:
        data: The clean set.
        plan: The poisons.
        covers: Indices of the covers, int64 ``(Q,)``.
        parts: How both may look.
        variants: int64 ``(P + Q,)``: which variant each poison, then each cover, carries.
    """

    data: LabelledImages
    plan: PoisonPlan
    covers: Tensor
    parts: Parts
    variants: Tensor

    def prepared(self, stage: TriggerStage) -> tuple[LabelledImages, LossStep]:
        """Return what is trained on and with which loss step."""
        own = self.data.labels.cpu()[self.covers]
        stamped = PoisonPlan(
            torch.cat([self.plan.indices, self.covers]), torch.cat([self.plan.new_labels, own])
        )
        if stage == "before_augmentation":
            chunks = zip(stamped.indices.split(1024), self.variants.split(1024), strict=True)
            images = [
                quantise(self.parts(as_float(self.data.images[part.to(self.data.images.device)]), variants))
                for part, variants in chunks
            ]
            return replaced(self.data, stamped, torch.cat(images)), cross_entropy_step
        labels = self.data.labels.clone()
        labels[stamped.indices.to(labels.device)] = stamped.new_labels.to(labels.device)
        variants = torch.full((len(self.data),), -1)
        variants[stamped.indices] = self.variants
        data = LabelledImages(self.data.images, labels, self.data.class_names)
        return data, StampParts(self.parts, variants)

    def train(
        self,
        model_fn: ModelFn,
        trigger: Trigger,
        rule: LabelRule,
        stage: TriggerStage,
        recipe: Recipe,
        generator: torch.Generator,
        resume_from: Path | None,
        progress: Progress,
    ) -> Infected:
        """Train a new network and return it with the full ``trigger``."""
        with rng.isolated(generator):
            model = model_fn()
        data, loss_step = self.prepared(stage)
        record = train(
            model,
            data,
            recipe,
            generator=rng.spawn(generator),
            loss_step=loss_step,
            resume_from=resume_from,
            progress=progress,
        )
        counts = {"poison_count": len(self.plan.indices), "cover_count": len(self.covers)}
        return Infected(model, trigger, self.plan, rule, {"training": record.describe(), **counts})
