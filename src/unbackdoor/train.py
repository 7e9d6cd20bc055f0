"""The one training loop: attacks, clean twins and fine-tuning differ only in their loss step.

Data that fit stay in memory as uint8 on the device; augmentation is batched; training runs
channels-last, in bf16 where the hardware is faster with it. Nothing here reads global random state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.compute import (
    Precision,
    arrange,
    autocast,
    check_fits,
    device_of,
    memory_format_for,
    mode,
    uses_bf16,
)
from unbackdoor.data.augment import random_crop, random_flip
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.types import LabelledImages, Progress, as_float, silent


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. The defaults are those of the MNP paper, section 5.1.

    The paper does not state its augmentation: crops of 4 pixels and flips are the usual for CIFAR-10.

    Args:
        epochs: Passes over the data.
        batch_size: Images a step, at least 2: batch norm cannot train on one.
        learning_rate: Peak rate of SGD.
        momentum: Momentum of SGD.
        weight_decay: L2 coefficient of SGD, on all parameters.
        nesterov: Look ahead with the momentum, which short schedules gain from.
        schedule: ``cosine`` (from the peak to 0), ``one_cycle`` (linear up for ``warmup_fraction``, then
            linear to 0) or ``constant``.
        warmup_fraction: Share of the steps in which ``one_cycle`` rises, in (0, 1).
        crop_padding: Zero padding of random crops in pixels; 0 for none.
        flip: Mirror at random.
        precision: ``auto`` takes bf16 where the hardware is faster with it.
    """

    epochs: int = 200
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "one_cycle", "constant"] = "cosine"
    warmup_fraction: float = 0.25
    crop_padding: int = 4
    flip: bool = True
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or not self.learning_rate > 0:
            raise InvalidInputError(
                "epochs and learning rate must be positive and the batch size at least 2, got "
                f"{self.epochs}, {self.learning_rate} and {self.batch_size}."
            )
        if not (0 <= self.momentum < 1 and 0 < self.warmup_fraction < 1):
            raise InvalidInputError(
                "momentum must lie in [0, 1) and warmup_fraction in (0, 1), got "
                f"{self.momentum} and {self.warmup_fraction}."
            )
        if self.nesterov and not self.momentum:
            raise InvalidInputError("nesterov needs a momentum above 0; set one, or nesterov=false.")
        if not 0 <= self.weight_decay < math.inf or self.crop_padding < 0 or self.learning_rate == math.inf:
            raise InvalidInputError(
                "weight_decay and crop_padding must be at least 0, and all rates finite, got "
                f"{self.weight_decay}, {self.crop_padding} and {self.learning_rate}."
            )
        if self.schedule not in ("cosine", "one_cycle", "constant"):
            raise InvalidInputError(
                f"schedule must be 'cosine', 'one_cycle' or 'constant', got {self.schedule!r}."
            )

    @staticmethod
    def short(epochs: int = 15) -> Recipe:
        """Return a one-cycle schedule that reaches most of the accuracy in a fraction of the time."""
        return Recipe(epochs=epochs, schedule="one_cycle")

    def rate_at(self, step: int, steps: int) -> float:
        """Return the learning rate of 0-based ``step`` out of ``steps``."""
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        peak = max(1.0, self.warmup_fraction * steps)
        rise, fall = (step + 1) / peak, (steps - step) / max(1.0, steps - peak)
        return self.learning_rate * min(rise, fall, 1.0)


@dataclass(frozen=True, eq=False)
class Batch:
    """What a loss step sees: float images in [0, 1], their labels, and their places in the data set."""

    images: Tensor
    labels: Tensor
    indices: Tensor


LossStep = Callable[[nn.Module, Batch], Tensor]
"""``(model, batch) -> scalar loss``; runs under autocast with the model in train mode.

It runs inside ``rng.isolated``: torch's global generators follow the generator of the training, so a
step may draw from them.
"""


@runtime_checkable
class JointStep(Protocol):
    """A loss step that trains networks of its own beside the model, such as trigger generators.

    Their gradients are zeroed before each backward pass and their optimisers step together with the
    model's; both are kept in the training state, so that an interrupted run goes on exactly.
    """

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The networks, by a name without dots."""
        ...

    @property
    def optimisers(self) -> Mapping[str, torch.optim.Optimizer]:
        """What steps them; a step that calls its optimiser itself still lists it in ``own_optimisers``."""
        ...

    @property
    def own_optimisers(self) -> Mapping[str, torch.optim.Optimizer]:
        """Optimisers that the step itself zeroes and steps; kept in the training state only."""
        ...

    def before_epoch(self, model: nn.Module, epoch: int) -> None:
        """Prepare the 0-based ``epoch``; randomness follows torch's global generators here too."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss whose gradients reach the model and the networks in ``optimisers``."""
        ...


@dataclass(frozen=True)
class TrainingRecord:
    """What a training run did."""

    recipe: Recipe
    losses: tuple[float, ...]
    seconds: float
    precision: str
    resumed_at_epoch: int = 0

    def describe(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def cross_entropy_step(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of the batch: ordinary supervised training."""
    logits: Tensor = model(batch.images)
    return F.cross_entropy(logits.float(), batch.labels)


def batches(
    data: LabelledImages,
    batch_size: int,
    generator: torch.Generator,
    *,
    crop_padding: int = 0,
    flip: bool = False,
    layout: torch.memory_format = torch.contiguous_format,
) -> Iterator[Batch]:
    """Yield one shuffled, augmented pass over ``data``; the last batch may be smaller.

    A last batch of a single image is left out: batch norm cannot train on it.
    """
    order = torch.randperm(len(data), generator=generator).to(data.images.device)
    for indices in order.split(batch_size):
        if len(indices) == 1 < len(data):
            continue
        images = data.images[indices]
        if crop_padding:
            images = random_crop(images, crop_padding, generator)
        if flip:
            images = random_flip(images, generator)
        images = as_float(images).contiguous(memory_format=layout)
        yield Batch(images, data.labels[indices], indices)


def train(
    model: nn.Module,
    data: LabelledImages,
    recipe: Recipe,
    *,
    generator: torch.Generator,
    loss_step: LossStep = cross_entropy_step,
    resume_from: Path | None = None,
    progress: Progress = silent,
) -> TrainingRecord:
    """Train ``model`` in place with SGD.

    Args:
        model: Takes float images in [0, 1]; left in eval mode on its device.
        data: The training set; moved to the model's device once.
        recipe: Schedule and augmentation.
        generator: Order, augmentation and dropout follow it; on the CPU.
        loss_step: What is minimised.
        resume_from: Where the state is kept after each epoch. If it exists, training goes on from
            there and ends with the same weights as if it had never been interrupted.
        progress: Called after each epoch.

    Returns:
        Mean loss of each epoch, seconds, precision.

    Raises:
        InvalidInputError: If ``data`` is empty, or a label has no output of the model.
        UnsupportedModelError: If the loss stops being finite.
    """
    check_fits(model, data, purpose="training")
    device = device_of(model)
    data = data.to(device)
    arrange(model)
    optimiser = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )
    joint = loss_step if isinstance(loss_step, JointStep) else None
    state = TrainingState(model, optimiser, generator, resume_from, joint)
    losses = state.restore()
    first_epoch = len(losses)
    steps_per_epoch = _count_batches(len(data), recipe.batch_size)
    started = time.perf_counter()
    progress("train", first_epoch, recipe.epochs)
    for epoch in range(first_epoch, recipe.epochs):
        with mode(model, training=True), rng.isolated(generator):
            if joint is not None:
                joint.before_epoch(model, epoch)
            losses.append(
                _train_epoch(model, data, recipe, optimiser, loss_step, generator, epoch * steps_per_epoch)
            )
        state.save(losses)
        progress("train", epoch + 1, recipe.epochs)
    model.eval()
    return TrainingRecord(
        recipe=recipe,
        losses=tuple(losses),
        seconds=time.perf_counter() - started,
        precision="bf16" if uses_bf16(recipe.precision, device) else "fp32",
        resumed_at_epoch=first_epoch,
    )


def _count_batches(samples: int, batch_size: int) -> int:
    full, rest = divmod(samples, batch_size)
    return full + (rest > 1 or (rest == 1 and full == 0))


def _train_epoch(
    model: nn.Module,
    data: LabelledImages,
    recipe: Recipe,
    optimiser: torch.optim.Optimizer,
    loss_step: LossStep,
    generator: torch.Generator,
    first_step: int,
) -> float:
    device = data.images.device
    steps = recipe.epochs * _count_batches(len(data), recipe.batch_size)
    total = torch.zeros((), device=device)
    count = 0
    partners = list(loss_step.optimisers.values()) if isinstance(loss_step, JointStep) else []
    for batch in batches(
        data,
        recipe.batch_size,
        generator,
        crop_padding=recipe.crop_padding,
        flip=recipe.flip,
        layout=memory_format_for(model),
    ):
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate_at(first_step + count, steps)
        with autocast(recipe.precision, device):
            loss = loss_step(model, batch)
        for each in (optimiser, *partners):
            each.zero_grad(set_to_none=True)
        loss.backward()
        for each in (optimiser, *partners):
            each.step()
        total += loss.detach()
        count += 1
    mean = float(total / count)
    if not math.isfinite(mean):
        raise UnsupportedModelError(
            f"training diverged: the mean loss is {mean} with learning rate {recipe.learning_rate}; lower it."
        )
    return mean


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Everything that decides how training goes on, kept in one safetensors file."""

    model: nn.Module
    optimiser: torch.optim.SGD
    generator: torch.Generator
    path: Path | None
    joint: JointStep | None = None

    def save(self, losses: list[float]) -> None:
        """Write the state atomically: a kill leaves either the old or the new file."""
        if self.path is None:
            return
        from unbackdoor.models.checkpoint import write_tensors

        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, parameter in enumerate(self._parameters()):
            momentum = self.optimiser.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{index}"] = momentum
        if self.joint is not None:
            tensors |= _joint_tensors(self.joint)
        tensors["generator"] = self.generator.get_state()
        tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
        write_tensors(tensors, self.path)

    def restore(self) -> list[float]:
        """Load the state if there is one; return the losses of the epochs done so far."""
        if self.path is None or not self.path.exists():
            return []
        from unbackdoor.models.checkpoint import read_tensors

        tensors = read_tensors(self.path)
        self.model.load_state_dict(
            {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        )
        for index, parameter in enumerate(self._parameters()):
            if f"momentum.{index}" in tensors:
                momentum = torch.empty_like(parameter).copy_(tensors[f"momentum.{index}"])
                self.optimiser.state[parameter]["momentum_buffer"] = momentum
        if self.joint is not None:
            _restore_joint(self.joint, tensors)
        self.generator.set_state(tensors["generator"])
        return [float(loss) for loss in tensors["losses"]]

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimiser.param_groups for parameter in group["params"]]


def _joint_tensors(joint: JointStep) -> dict[str, Tensor]:
    tensors = {
        f"module.{name}.{key}": tensor
        for name, module in joint.modules.items()
        for key, tensor in module.state_dict().items()
    }
    for name, optimiser in _all_optimisers(joint).items():
        for index, values in optimiser.state_dict()["state"].items():
            for key, value in values.items():
                if value is not None:
                    tensors[f"optimiser.{name}.{index}.{key}"] = torch.as_tensor(value)
    return tensors


def _restore_joint(joint: JointStep, tensors: Mapping[str, Tensor]) -> None:
    for name, module in joint.modules.items():
        front = f"module.{name}."
        module.load_state_dict({k.removeprefix(front): t for k, t in tensors.items() if k.startswith(front)})
    for name, optimiser in _all_optimisers(joint).items():
        state: dict[int, dict[str, Tensor]] = {}
        front = f"optimiser.{name}."
        for key, tensor in tensors.items():
            if key.startswith(front):
                index, field = key.removeprefix(front).split(".", 1)
                state.setdefault(int(index), {})[field] = tensor
        optimiser.load_state_dict(optimiser.state_dict() | {"state": state})


def _all_optimisers(joint: JointStep) -> dict[str, torch.optim.Optimizer]:
    return {**joint.optimisers, **joint.own_optimisers}
