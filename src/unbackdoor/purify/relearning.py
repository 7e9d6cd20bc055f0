"""Relearn: answer images that carry a recovered trigger as the suspect answers them without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor.compute import device_of, logits_of
from unbackdoor.errors import InvalidInputError
from unbackdoor.inversion import InvertedTrigger
from unbackdoor.purify.copies import fine_tuned
from unbackdoor.train import Batch, LossStep, Recipe, TrainingRecord
from unbackdoor.types import LabelledImages, Progress, silent


@dataclass(frozen=True)
class Relearning:
    """How a recovered trigger is unlearnt without losing what the model knows.

    Source: the unlearning of Neural Cleanse (Wang et al., IEEE S&P 2019, section VI) fine-tunes on images
    with the inverted trigger under their true labels. Ours: the targets are not labels but the answers that
    the suspect gives to the same images without the trigger (distillation: Hinton, Vinyals, Dean 2015, arXiv
    1503.02531), so that a few hundred images are not fitted anew; there is no augmentation, which would
    move the trigger and ask for answers that nobody gave.

    Args:
        recipe: Schedule; its epochs are passes over the clean images.
        stamped_fraction: Share of each batch that carries a trigger, in (0, 1].
    """

    recipe: Recipe = field(
        default_factory=lambda: Recipe(
            epochs=5, batch_size=64, learning_rate=0.003, schedule="constant", crop_padding=0, flip=False
        )
    )
    stamped_fraction: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.stamped_fraction <= 1:
            raise InvalidInputError(f"stamped_fraction must lie in (0, 1], got {self.stamped_fraction}.")
        if self.recipe.crop_padding or self.recipe.flip:
            raise InvalidInputError(
                "relearning takes the suspect's answers to the images as they are; set recipe.crop_padding "
                "to 0 and recipe.flip to false."
            )


def relearn(
    model: nn.Module,
    teacher: nn.Module,
    clean: LabelledImages,
    triggers: Sequence[InvertedTrigger],
    options: Relearning,
    *,
    restrain: Callable[[nn.Module], None] = lambda model: None,
    generator: torch.Generator,
    progress: Progress = silent,
) -> tuple[nn.Module, TrainingRecord]:
    """Return a copy of ``model`` for which the triggers mean nothing.

    Args:
        model: Takes float images in [0, 1]; left untouched.
        teacher: The suspect, whose answers to clean images are kept; may be ``model``.
        clean: Clean images; their labels are not used.
        triggers: Each stamped image gets one of them at random; without any, answers alone are learnt.
        options: See ``Relearning``.
        restrain: Called with the copy before each step, in place: to keep removed filters removed.
        generator: Order of the images and choice of the triggers; on the CPU.
        progress: Called after each epoch.

    Raises:
        UnsupportedModelError: If training diverges.
    """
    answers = logits_of(teacher, clean.images).float().softmax(1).to(device_of(model))
    relearnt, record = fine_tuned(
        model,
        clean,
        options.recipe,
        generator=generator,
        loss_step=_step(answers, triggers, options.stamped_fraction, restrain),
        stage="relearning",
        progress=progress,
    )
    with torch.no_grad():
        restrain(relearnt)
    return relearnt, record


def _step(
    answers: Tensor,
    triggers: Sequence[InvertedTrigger],
    fraction: float,
    restrain: Callable[[nn.Module], None],
) -> LossStep:
    def step(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            restrain(model)
        images = batch.images.clone()
        if triggers:
            # The training loop has fenced torch's global generator off.
            stamped = torch.randperm(len(images))[: max(1, int(fraction * len(images)))]
            which = torch.randint(len(triggers), (len(stamped),))
            for index, trigger in enumerate(triggers):
                places = stamped[which == index].to(images.device)
                images[places] = trigger(images[places])
        logits = model(images)
        return F.kl_div(logits.float().log_softmax(1), answers[batch.indices], reduction="batchmean")

    return step
