"""Relearn: answer images that carry a recovered trigger as the suspect answers them without it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from unbackdoor.compute import mode
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
    1503.02531), so that a few hundred images are not fitted anew. Images are cropped and mirrored before the
    suspect is asked and before the trigger is stamped on them, so that no trigger moves.

    What is unlearnt so can be woken: after few and small steps, five poisoned images bring it back whole. The
    schedule is therefore longer than the clean task needs, and with ``path_radius`` the gradient is taken a
    step back on the way to the suspect, so that the survivors ignore the triggers there, too.
    Source: path-aware minimisation (Min, Qin, Zhang, Shen, Cheng, "Uncovering, Explaining, and Mitigating the
    Superficial Safety of Backdoor Defense", NeurIPS 2024, arXiv 2410.09838): ``d = theta_suspect - theta``,
    gradient at ``theta + rho d / |d|``, step at ``theta``. Deviations: distillation in place of labels, and
    inverted triggers in place of those of a trained generator.

    Args:
        recipe: Schedule; its epochs are passes over the clean images.
        stamped_fraction: Share of each batch that carries a trigger, in (0, 1].
        path_radius: rho, how far back towards the suspect the gradient is taken, in the l2 norm over all
            parameters; 0 for where the survivors are. The paper's code has 0.5.
    """

    recipe: Recipe = field(
        default_factory=lambda: Recipe(
            epochs=15, batch_size=128, learning_rate=0.01, schedule="cosine", crop_padding=4, flip=True
        )
    )
    stamped_fraction: float = 0.5
    path_radius: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.stamped_fraction <= 1:
            raise InvalidInputError(f"stamped_fraction must lie in (0, 1], got {self.stamped_fraction}.")
        if not 0 <= self.path_radius < math.inf:
            raise InvalidInputError(f"path_radius must be at least 0 and finite, got {self.path_radius}.")


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
    relearnt, record = fine_tuned(
        model,
        clean,
        options.recipe,
        generator=generator,
        loss_step=_step(teacher, triggers, options, restrain),
        stage="relearning",
        progress=progress,
    )
    with torch.no_grad():
        restrain(relearnt)
    return relearnt, record


@torch.no_grad()
def between(model: nn.Module, other: nn.Module, share: float) -> nn.Module:
    """Return a network whose weights and statistics lie ``share`` of the way from ``model`` to ``other``.

    Args:
        model: Left untouched.
        other: A network of the same layers; left untouched.
        share: In [0, 1].
    """
    network = copy.deepcopy(model)
    # By parameter and buffer: a state dict names tied weights twice, and leaves some buffers out.
    for mine, others in (
        (network.named_parameters(), dict(other.named_parameters())),
        (network.named_buffers(), dict(other.named_buffers())),
    ):
        for name, tensor in mine:
            if tensor.is_floating_point():
                tensor.lerp_(others[name].to(tensor), share)
    return network


def _step(
    teacher: nn.Module,
    triggers: Sequence[InvertedTrigger],
    options: Relearning,
    restrain: Callable[[nn.Module], None],
) -> LossStep:
    suspect = {name: parameter.detach() for name, parameter in teacher.named_parameters()}

    def step(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad(), mode(teacher, training=False):
            restrain(model)
            answers = teacher(batch.images).float().softmax(1)
        images = batch.images.clone()
        if triggers:
            # The training loop has fenced torch's global generator off.
            stamped = torch.randperm(len(images))[: max(1, int(options.stamped_fraction * len(images)))]
            which = torch.randint(len(triggers), (len(stamped),))
            for index, trigger in enumerate(triggers):
                places = stamped[which == index].to(images.device)
                images[places] = trigger(images[places])
        back = _way_back(model, suspect, options.path_radius) if options.path_radius else {}
        # The gradient there is that of the parameters here: what is added does not depend on them.
        there = {name: p + back[name] for name, p in model.named_parameters() if name in back}
        logits: Tensor = functional_call(model, there, (images,)) if there else model(images)
        return F.kl_div(logits.float().log_softmax(1), answers, reduction="batchmean")

    return step


@torch.no_grad()
def _way_back(model: nn.Module, suspect: Mapping[str, Tensor], radius: float) -> dict[str, Tensor]:
    """Return what leads ``radius`` back to the suspect, by parameter; nothing where that is ``model``."""
    way = {
        name: suspect[name].to(parameter.device) - parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
    }
    length = float(torch.sqrt(sum((step.square().sum() for step in way.values()), torch.zeros(()))))
    return {name: radius / length * step for name, step in way.items()} if length > 0 else {}
