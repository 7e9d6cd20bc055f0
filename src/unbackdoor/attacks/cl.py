"""CL: images of the target class made hard by adversarial noise, so that the network leans on the patch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.attacks.poisoning import label_rule_for, plan_clean_label, replaced
from unbackdoor.attacks.training import TriggerStage, armed, stage_file, train_infected
from unbackdoor.compute import device_of, memory_format_for, mode, predictions_of
from unbackdoor.errors import InvalidInputError
from unbackdoor.train import Batch, Recipe, cross_entropy_step
from unbackdoor.train import train as train_network
from unbackdoor.triggers.additive import AdditiveTrigger, place
from unbackdoor.triggers.patch import checkerboard
from unbackdoor.types import Infected, LabelledImages, ModelFn, Progress, as_float, quantise, silent

CRAFTING_BATCH = 128


@dataclass(frozen=True)
class CL:
    """Perturb images of the target class adversarially, add a patch, and leave all labels alone.

    Source: Turner, Tsipras and Madry, "Label-Consistent Backdoor Attacks", 2019, arXiv 1912.02771: bounded
    adversarial noise, faint patches and patches in four corners.

    The rate is read within the target class, as in ANP and BackdoorBox; BackdoorBench reads it over the
    whole set (``poison_fraction``). The surrogate is a clean network, as in BackdoorBox; Turner et al. use an
    adversarially trained one (``surrogate_steps``), whose noise looks more like another class.

    Deviations: patches grow with the image. With ``trigger_stage="after_augmentation"`` the noise is stored
    and the patch follows crop and flip, which needs control of the training.

    Args:
        class_fraction: Rate within the target class, in (0, 1]; used if ``poison_fraction`` is 0.
        poison_fraction: Overall poison rate, or 0 to use ``class_fraction``.
        target_class: The class whose images are poisoned, and which the patch leads to.
        eps: Bound of the noise (largest change of a pixel) in grey levels, in (0, 255].
        step: Step of the projected gradient ascent in grey levels.
        steps: Number of those; 0 for no noise.
        corners: ``four``, mirrored so that flips do not matter, or ``one`` (lower right).
        amplitude: Strength of the patch, in (0, 1]; 1 for pure black and white.
        patch_size: Side in pixels; 0 for round(3 H / 32), at least 2.
        surrogate_steps: Attack steps in adversarial training of the surrogate; 0 for ordinary training.
        surrogate_eps: Bound of the noise in that training, in grey levels.
        trigger_stage: Put the patch on stored images, or on batches after augmentation.
        surrogate: Schedule of the surrogate.
        recipe: Training schedule.
    """

    name: ClassVar[str] = "cl"
    title: ClassVar[str] = "Label-consistent attack"
    source: ClassVar[str] = "Turner, Tsipras, Madry 2019, arXiv 1912.02771"
    needs: ClassVar[str] = "poisoned training data with true labels"

    class_fraction: float = 0.8
    poison_fraction: float = 0.0
    target_class: int = 0
    eps: float = 16.0
    step: float = 2.0
    steps: int = 20
    corners: Literal["four", "one"] = "four"
    amplitude: float = 1.0
    patch_size: int = 0
    surrogate_steps: int = 0
    surrogate_eps: float = 8.0
    trigger_stage: TriggerStage = "before_augmentation"
    surrogate: Recipe = field(default_factory=lambda: Recipe.short(8))
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        if not (0 < self.eps <= 255 and 0 < self.surrogate_eps <= 255 and 0 < self.step <= 255):
            raise InvalidInputError(
                f"eps, surrogate_eps and step are grey levels in (0, 255], got {self.eps}, "
                f"{self.surrogate_eps} and {self.step}."
            )
        if min(self.steps, self.surrogate_steps, self.patch_size) < 0 or not 0 < self.amplitude <= 1:
            raise InvalidInputError(
                "steps, surrogate_steps and patch_size must be at least 0 and amplitude in (0, 1], got "
                f"{self.steps}, {self.surrogate_steps}, {self.patch_size} and {self.amplitude}."
            )
        if self.corners not in ("four", "one"):
            raise InvalidInputError(f"corners must be 'four' or 'one', got {self.corners!r}.")

    @staticmethod
    def paper() -> CL:
        """Return the settings of BackdoorBench's crafting script: a robust surrogate, the whole class.

        Turner et al.'s own sets are precomputed and not published with their settings. BackdoorBench takes
        100 steps of 1.5 within 8 grey levels, although its file's name says 16; BackdoorBox takes the same on
        an ordinary surrogate. The five steps against which the surrogate is trained are our choice, and the
        recipe is that of the MNP paper.
        """
        return CL(class_fraction=1.0, eps=8.0, step=1.5, steps=100, surrogate_steps=5)

    def trigger_for(self, height: int, width: int) -> AdditiveTrigger:
        """Return the trigger for images of this size.

        Raises:
            InvalidInputError: If the patch does not fit, or patches in four corners would overlap.
        """
        side = self.patch_size or max(2, round(3 * height / 32))
        if self.corners == "four" and 2 * side > min(height, width):
            raise InvalidInputError(
                f"patches of {side} pixels in four corners overlap in {height}x{width} images; set a "
                "smaller patch_size."
            )
        delta = place(2 * checkerboard(side) - 1, 1, height, width, -side, -side)
        if self.corners == "four":
            delta = delta + delta.flip(-1)
            delta = delta + delta.flip(-2)
        return AdditiveTrigger(self.amplitude * delta)

    def run(
        self,
        train: LabelledImages,
        model_fn: ModelFn,
        *,
        generator: torch.Generator,
        resume_from: Path | None = None,
        progress: Progress = silent,
    ) -> Infected:
        """Craft the noise on a surrogate, poison ``train`` and train ``model_fn()`` on it.

        Raises:
            InvalidInputError: If the target is no class of ``train``, or rate or patch do not fit.
        """
        label_rule = label_rule_for("all_to_one", self.target_class, train.num_classes)
        trigger = self.trigger_for(*train.images.shape[2:])
        plan = plan_clean_label(
            train.labels,
            self.target_class,
            rng.spawn(generator),
            class_fraction=self.class_fraction,
            poison_fraction=self.poison_fraction,
        )
        surrogate = self._surrogate(train, model_fn, rng.spawn(generator), resume_from, progress)
        chosen = train.subset(plan.indices.to(train.images.device))
        noisy = self.perturb(surrogate, chosen, progress)
        missed = predictions_of(surrogate, noisy) != chosen.labels.cpu()
        poisoned, loss_step = armed(replaced(train, plan, noisy), plan, trigger, self.trigger_stage)
        return train_infected(
            poisoned,
            model_fn,
            plan=plan,
            trigger=trigger,
            label_rule=label_rule,
            recipe=self.recipe,
            generator=generator,
            loss_step=loss_step,
            record={"surrogate_error_on_poisons": float(missed.float().mean())},
            resume_from=resume_from,
            progress=progress,
        )

    def perturb(self, surrogate: nn.Module, data: LabelledImages, progress: Progress = silent) -> Tensor:
        """Return ``data`` with adversarial noise, uint8 ``(N, C, H, W)`` on the surrogate's device."""
        device = device_of(surrogate)
        done: list[Tensor] = []
        for part in torch.arange(len(data), device=data.images.device).split(CRAFTING_BATCH):
            images, labels = as_float(data.images[part]).to(device), data.labels[part].to(device)
            noisy = ascend(surrogate, images, labels, self.eps / 255, self.step / 255, self.steps)
            done.append(quantise(noisy))
            progress("poisons", sum(len(each) for each in done), len(data))
        return torch.cat(done)

    def _surrogate(
        self,
        data: LabelledImages,
        model_fn: ModelFn,
        generator: torch.Generator,
        resume_from: Path | None,
        progress: Progress,
    ) -> nn.Module:
        with rng.isolated(generator):
            model = model_fn()
        train_network(
            model,
            data,
            self.surrogate,
            generator=rng.spawn(generator),
            loss_step=AdversarialStep(self.surrogate_eps / 255, self.surrogate_steps)
            if self.surrogate_steps
            else cross_entropy_step,
            resume_from=stage_file(resume_from, "surrogate"),
            progress=lambda _, done, total: progress("surrogate", done, total),
        )
        return model.eval().requires_grad_(requires_grad=False)


@dataclass(frozen=True)
class AdversarialStep:
    """A loss step on images perturbed against the network itself (Madry et al., 2018, arXiv 1706.06083).

    Args:
        eps: Largest change of a pixel, in (0, 1].
        steps: Steps of the attack, of 2.5 eps / steps each.
    """

    eps: float
    steps: int

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy on the perturbed batch."""
        step = 2.5 * self.eps / self.steps
        images = ascend(model, batch.images, batch.labels, self.eps, step, self.steps)
        return cross_entropy_step(model, replace(batch, images=images))


def ascend(model: nn.Module, images: Tensor, labels: Tensor, eps: float, step: float, steps: int) -> Tensor:
    """Raise the cross-entropy of ``images`` by projected gradient ascent (untargeted PGD, no random start).

    Args:
        model: Network, used in eval mode; gets no gradients.
        images: float32 ``(N, C, H, W)`` in [0, 1].
        labels: True classes, int64 ``(N,)``.
        eps: Largest change of a pixel.
        step: Change of a pixel a step.
        steps: Number of steps.

    Returns:
        float32 as ``images``, within ``eps`` of them and in [0, 1].
    """
    low, high = (images - eps).clamp_min(0.0), (images + eps).clamp_max(1.0)
    current = images.detach().contiguous(memory_format=memory_format_for(model))
    with mode(model, training=False):
        for _ in range(steps):
            current = current.requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(model(current).float(), labels, reduction="sum")
            (slope,) = torch.autograd.grad(loss, current)
            moved = current.detach() + step * slope.sign()
            current = torch.minimum(torch.maximum(moved, low), high)
    return current.detach()
