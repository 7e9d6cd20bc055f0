"""Clean suppression: make a copy of a model forget its clean task, and watch what remains.

Source: MNP (arXiv 2405.17750), Eq. 6 and Algorithm 1 lines 3-5: gradient ascent on
``CE(F(x; theta_s), y) - mu ||theta_s||^2`` over the clean images; in spirit the unlearning of RNP (Li et
al., ICML 2023, arXiv 2305.14876). Both the purifier and the detector start from it.

Beyond the paper: the run stops once the accuracy on the clean images is gone (the loss is unbounded, and
a model pushed further keeps no structure), and it records which classes the copy falls back to.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

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
    logits_of,
    memory_format_for,
    mode,
)
from unbackdoor.errors import InvalidInputError
from unbackdoor.train import Batch, batches
from unbackdoor.types import LabelledImages, Progress, silent


@dataclass(frozen=True)
class Suppression:
    """How the clean task is suppressed. Symbols and values are those of the MNP paper, section 5.1.

    Args:
        mu: Weight of the norm penalty ``mu ||theta||^2`` (equal to torch's weight_decay = 2 mu).
        learning_rate: Step of the ascent, eta_1.
        momentum: Not stated by the paper; 0 is its literal reading, 0.9 is RNP's.
        budget: Most ascent steps or passes, T. The paper's is 20, which its algorithm calls iterations and
            section 5.1 epochs; ours is larger because the run ends with the accuracy anyway.
        unit: Whether ``budget`` counts single steps (``iteration``) or passes over the images (``epoch``).
        batch_size: Not stated by the paper; RNP's 128.
        norm_mode: ``train`` lets batch norms use, and update, the batch's statistics, ``eval`` freezes
            them. The paper does not say; in eval mode the copy collapses to an arbitrary class.
        decay_convention: ``literal`` descends on ``mu ||theta||^2``, whose gradient is 2 mu theta; ``torch``
            reads mu as torch's weight_decay, whose gradient is mu theta.
        decay: What the penalty covers: ``weights`` of conv and linear layers, or ``all`` parameters.
        stop_accuracy: Stop at or below this accuracy on the clean images; 0 never stops early.
        checks_per_epoch: How often that accuracy is measured.
        clip_norm: Largest gradient norm, or 0 for no clipping (the paper clips nothing).
        augment: Crop and flip at random, as in training.
        precision: Of the forward and backward passes.
    """

    mu: float = 0.001
    learning_rate: float = 0.01
    momentum: float = 0.9
    budget: int = 300
    unit: Literal["epoch", "iteration"] = "iteration"
    batch_size: int = 128
    norm_mode: Literal["train", "eval"] = "train"
    decay: Literal["weights", "all"] = "weights"
    decay_convention: Literal["literal", "torch"] = "literal"
    stop_accuracy: float = 0.2
    checks_per_epoch: int = 2
    clip_norm: float = 0.0
    augment: bool = False
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if self.budget < 1 or not 0 < self.learning_rate < math.inf or self.batch_size < 2:
            raise InvalidInputError(
                "suppression needs budget >= 1, learning_rate > 0 and batch_size >= 2, got "
                f"{self.budget}, {self.learning_rate} and {self.batch_size}."
            )
        if not (0 <= self.momentum < 1 and 0 <= self.mu < math.inf and self.clip_norm >= 0):
            raise InvalidInputError(
                "suppression needs momentum in [0, 1), and mu and clip_norm of at least 0, got "
                f"{self.momentum}, {self.mu} and {self.clip_norm}."
            )
        if self.checks_per_epoch < 1:
            raise InvalidInputError(f"checks_per_epoch must be at least 1, got {self.checks_per_epoch}.")

    @staticmethod
    def rnp(stop_accuracy: float = 0.2) -> Suppression:
        """Return the unlearning of RNP: weight decay 5e-4 on all parameters, until CA_min.

        Args:
            stop_accuracy: CA_min.
        """
        return Suppression(mu=5e-4, decay="all", decay_convention="torch", stop_accuracy=stop_accuracy)


@dataclass(frozen=True, eq=False)
class Check:
    """What the copy did with the clean images at one moment.

    Args:
        step: Ascent steps taken so far.
        confusion: int64 ``(K, K)``: rows true class, columns prediction, in eval mode.
    """

    step: int
    confusion: Tensor

    @property
    def accuracy(self) -> float:
        """Share of the images still classified correctly."""
        return float(self.confusion.diagonal().sum() / self.confusion.sum().clamp_min(1))


@dataclass(frozen=True, eq=False)
class Suppressed:
    """The suppressed copy and what was seen on the way.

    Args:
        model: The copy, in eval mode.
        checks: The first is before the run, the last describes ``model``.
        stop_reason: ``accuracy`` (reached ``stop_accuracy``), ``budget`` (ran out) or ``not finite`` (the
            last sound state is returned).
    """

    model: nn.Module
    checks: tuple[Check, ...]
    stop_reason: Literal["accuracy", "budget", "not finite"]

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Accuracy on the clean images at each check."""
        return tuple(check.accuracy for check in self.checks)

    @property
    def confusion(self) -> Tensor:
        """The last confusion matrix, int64 ``(K, K)``."""
        return self.checks[-1].confusion

    @property
    def class_share(self) -> Tensor:
        """Share of the clean images that the copy puts into each class, float ``(K,)``."""
        return self.confusion.sum(0) / self.confusion.sum().clamp_min(1)


def suppress(
    model: nn.Module,
    clean: LabelledImages,
    options: Suppression,
    *,
    generator: torch.Generator,
    progress: Progress = silent,
) -> Suppressed:
    """Suppress the clean task in a copy of ``model``.

    Args:
        model: The suspect network; left untouched.
        clean: Clean images with labels.
        options: See ``Suppression``.
        generator: Order of the images and dropout follow it; on the CPU.
        progress: Called at each check.

    Raises:
        InvalidInputError: If ``clean`` holds fewer than two images, or a label has no output of the model.
    """
    check_fits(model, clean, purpose="clean suppression", at_least=2)
    copied = arrange(copy.deepcopy(model))
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    device = device_of(model)
    clean = clean.to(device)
    optimiser = _optimiser(copied, options)
    run = _Run(copied, clean, options, optimiser, rng.spawn(generator))
    return run.until_stopped(progress)


def confusion_of(model: nn.Module, data: LabelledImages) -> Tensor:
    """Return counts ``(K, K)``, rows true class and columns prediction, int64 on the CPU."""
    return confusion_from(logits_of(model, data.images), data.labels)


def confusion_from(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the same counts from logits ``(N, K)`` and labels ``(N,)``."""
    classes = logits.shape[1]
    flat = labels.cpu() * classes + logits.argmax(1).cpu()
    return torch.bincount(flat, minlength=classes**2).view(classes, classes)


def _optimiser(model: nn.Module, options: Suppression) -> torch.optim.SGD:
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if options.decay == "all" or p.ndim >= 2]
    rest = [p for p in parameters if options.decay != "all" and p.ndim < 2]
    factor = 2 if options.decay_convention == "literal" else 1
    groups = [
        # d(mu ||theta||^2)/dtheta = 2 mu theta, and torch's weight_decay w adds w theta.
        {"params": decayed, "weight_decay": factor * options.mu},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=options.learning_rate, momentum=options.momentum)


@dataclass(frozen=True, eq=False)
class _Run:
    model: nn.Module
    clean: LabelledImages
    options: Suppression
    optimiser: torch.optim.SGD
    generator: torch.Generator

    def until_stopped(self, progress: Progress) -> Suppressed:
        options = self.options
        full, rest = divmod(len(self.clean), options.batch_size)
        per_epoch = max(1, full + (rest > 1))  # ``batches`` leaves a single image out
        budget = options.budget * (per_epoch if options.unit == "epoch" else 1)
        every = max(1, per_epoch // options.checks_per_epoch)
        checks = [Check(0, confusion_of(self.model, self.clean))]
        saved = copy.deepcopy(self.model.state_dict())
        reason: Literal["accuracy", "budget", "not finite"] = "budget"
        stream = self._batches()
        while (done := checks[-1].step) < budget and reason == "budget":
            count = min(every, budget - done)
            check = self._check(done + count) if self._ascend(stream, count) else None
            if check is None:
                self.model.load_state_dict(saved)
                reason = "not finite"
                break
            saved = copy.deepcopy(self.model.state_dict())
            checks.append(check)
            progress("clean suppression", done + count, budget)
            if options.stop_accuracy > 0 and checks[-1].accuracy <= options.stop_accuracy:
                reason = "accuracy"
        progress("clean suppression", budget, budget)
        return Suppressed(self.model.eval(), tuple(checks), reason)

    def _check(self, step: int) -> Check | None:
        """Return what the copy does now, or None if its tensors or logits are not finite."""
        # Weights can be finite, yet so large that the norms' statistics or the logits overflow.
        logits = logits_of(self.model, self.clean.images)
        tensors = (logits, *self.model.parameters(), *self.model.buffers())
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            return None
        return Check(step, confusion_from(logits, self.clean.labels))

    def _ascend(self, stream: Iterator[Batch], count: int) -> bool:
        """Take ``count`` ascent steps; return whether the losses stayed finite."""
        options = self.options
        with mode(self.model, training=options.norm_mode == "train"), rng.isolated(self.generator):
            for batch in islice(stream, count):
                with autocast(options.precision, batch.images.device):
                    logits = self.model(batch.images)
                loss = F.cross_entropy(logits.float(), batch.labels)
                self.optimiser.zero_grad(set_to_none=True)
                (-loss).backward()
                if options.clip_norm > 0:
                    nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_norm)
                self.optimiser.step()
                if not math.isfinite(float(loss.detach())):
                    return False
        return True

    def _batches(self) -> Iterator[Batch]:
        """Yield pass after pass without end: checks in between do not start a pass anew."""
        augment = self.options.augment
        while True:
            yield from batches(
                self.clean,
                self.options.batch_size,
                self.generator,
                crop_padding=4 if augment else 0,
                flip=augment,
                layout=memory_format_for(self.model),
            )
