"""What the data-poisoning attacks share: choosing samples, stamping them, training on the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.train import Batch, LossStep, Recipe, cross_entropy_step, train
from unbackdoor.types import (
    AllToAll,
    AllToOne,
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

TriggerStage = Literal["before_augmentation", "after_augmentation"]


def label_rule_for(rule: str, target_class: int, num_classes: int) -> LabelRule:
    """Return ``AllToAll`` or ``AllToOne`` by name.

    Raises:
        InvalidInputError: If ``target_class`` is not in [0, num_classes).
    """
    if rule == "all_to_all":
        return AllToAll(num_classes)
    if not 0 <= target_class < num_classes:
        raise InvalidInputError(
            f"target_class {target_class} is not a class of a data set with {num_classes} classes; "
            f"choose one from 0 to {num_classes - 1}."
        )
    return AllToOne(target_class)


def plan_poison(
    labels: Tensor, fraction: float, label_rule: LabelRule, generator: torch.Generator
) -> PoisonPlan:
    """Choose ``round(fraction * N)`` samples out of all classes, as RNP, BackdoorBench and others do.

    With an all-to-one rule some chosen samples have the target label already; they are stamped and
    counted all the same.

    Args:
        labels: int64 ``(N,)``.
        fraction: Overall poison rate, in (0, 1].
        label_rule: Their new labels.
        generator: Source of randomness, on the CPU.

    Raises:
        InvalidInputError: If the fraction is outside (0, 1] or selects no sample.
    """
    if not 0 < fraction <= 1:
        raise InvalidInputError(f"poison_fraction must lie in (0, 1], got {fraction}.")
    count = round(fraction * len(labels))
    if count < 1:
        raise InvalidInputError(
            f"poison_fraction {fraction} of {len(labels)} images selects none; raise it to at least "
            f"{1 / max(1, len(labels)):.2g}."
        )
    indices = torch.randperm(len(labels), generator=generator)[:count].sort().values
    return PoisonPlan(indices, label_rule(labels.cpu()[indices]))


def stamp(data: LabelledImages, plan: PoisonPlan, trigger: Trigger) -> LabelledImages:
    """Return a copy of ``data`` in which the planned samples carry the trigger and their new labels.

    Images are stored as 8-bit levels again, as a real poisoner has to.
    """
    images, labels = data.images.clone(), data.labels.clone()
    indices = plan.indices.to(images.device)
    for part in indices.split(1024):
        triggered = quantise(trigger(as_float(images[part])))
        images[part] = triggered if images.dtype == torch.uint8 else as_float(triggered)
    labels[indices] = plan.new_labels.to(labels.device)
    return LabelledImages(images, labels, data.class_names)


@dataclass(frozen=True, eq=False)
class StampAfterAugmentation:
    """A loss step that stamps the poisoned samples of each batch after crop and flip."""

    trigger: Trigger
    poisoned: Tensor
    inner: LossStep = cross_entropy_step

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the inner loss on the stamped batch; labels are the poisoned ones already."""
        poisoned = self.poisoned.to(batch.indices.device)
        chosen = poisoned[batch.indices].view(-1, 1, 1, 1)
        images = torch.where(chosen, self.trigger(batch.images), batch.images)
        return self.inner(model, Batch(images, batch.labels, batch.indices))


def poison_and_train(
    data: LabelledImages,
    model_fn: ModelFn,
    *,
    trigger: Trigger,
    label_rule: LabelRule,
    fraction: float,
    stage: TriggerStage,
    recipe: Recipe,
    generator: torch.Generator,
    resume_from: Path | None = None,
    progress: Progress = silent,
) -> Infected:
    """Run a static dirty-label attack from plan to trained model.

    Args:
        data: Clean training set.
        model_fn: Builds the network; its weights follow ``generator``.
        trigger: How poisoned samples look.
        label_rule: How they are labelled.
        fraction: Overall poison rate.
        stage: Stamp the stored images (as a poisoner of data does; crops then move the trigger), or
            every batch after augmentation (quicker to learn, needs control of the training).
        recipe: Training schedule.
        generator: Source of all randomness.
        resume_from: File that keeps the training state.
        progress: Called after each epoch.
    """
    plan = plan_poison(data.labels, fraction, label_rule, rng.spawn(generator))
    with rng.isolated(generator):
        model = model_fn()
    if stage == "before_augmentation":
        poisoned, loss_step = stamp(data, plan, trigger), cross_entropy_step
    else:
        labels = data.labels.clone()
        labels[plan.indices] = plan.new_labels.to(labels)
        poisoned = LabelledImages(data.images, labels, data.class_names)
        chosen = torch.zeros(len(data), dtype=torch.bool)
        chosen[plan.indices] = True
        loss_step = StampAfterAugmentation(trigger, chosen)
    record = train(
        model,
        poisoned,
        recipe,
        generator=rng.spawn(generator),
        loss_step=loss_step,
        resume_from=resume_from,
        progress=progress,
    )
    return Infected(model, trigger, plan, label_rule, {"training": record.describe()})
