"""Shared Adversarial Unlearning: forget the adversarial examples that the suspect and its copy share."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

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
)
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.groups import find_filters
from unbackdoor.purify.copies import handed_back, working_copy
from unbackdoor.train import Batch, batches
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent


@dataclass(frozen=True)
class SAU:
    """Make the copy h part ways with the suspect h0 on examples x' = x + delta that fool both alike.

    Source: Wei et al., "Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared Adversarial
    Examples", NeurIPS 2023, arXiv 2307.10562. Inner: maximise ``beta1 (CE(h(x'), y) + CE(h0(x'), y)) / 2 -
    beta2 JS(h(x'), h0(x'))`` by sign steps within ``|delta| <= radius``. Outer: minimise ``lambda1 CE(h(x),
    y) + lambda2 CE(h(x'), y) + lambda3 mean(-log(1 - h(x')[y0]))``, the last over images whose ``y0 =
    argmax h0(x')`` is wrong. Works with any norm: statistics stay frozen unless ``norm_mode`` says else.

    Deviations: x' is clipped to [0, 1], and delta starts at random within the radius; batch size, rate and
    length suit 500 images. ``--paper``, in Python ``SAU.paper()``, undoes these. Of the authors' code we do
    not have: leaving images out of the inner terms once a network is fooled (fooling) or both are alike
    (sharing), and ending the ascent when all are; leaving images out of the last term that h0 errs on in the
    same way without delta; bounds on the probabilities in its logarithm, below which nothing is unlearnt.

    Args:
        epochs: Passes over the clean images, T.
        batch_size: Images a step.
        learning_rate: Step of Adam.
        amsgrad: Use Adam's variant with a monotone second moment.
        radius: Largest change of a pixel, rho, in [0, 1]-images.
        adversarial_steps: Sign steps of the inner problem.
        adversarial_rate: Length of each.
        start: Whether delta starts at ``random`` within the radius, or everywhere at ``radius``.
        clip: Keep x' in [0, 1].
        beta1: Weight of fooling.
        beta2: Weight of sharing.
        lambda1: Weight of the clean loss.
        lambda2: Weight of the ordinary adversarial loss.
        lambda3: Weight of parting ways.
        norm_mode: Mode of the copy in outer steps; ``train`` updates its statistics.
        precision: Of all passes; losses are float32.
    """

    name: ClassVar[str] = "sau"
    title: ClassVar[str] = "Shared Adversarial Unlearning"
    source: ClassVar[str] = "Wei et al. 2023, arXiv 2307.10562"
    needs: ClassVar[str] = "clean images with labels"

    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 4e-4
    amsgrad: bool = True
    radius: float = 0.2
    adversarial_steps: int = 5
    adversarial_rate: float = 0.2
    start: Literal["random", "radius"] = "random"
    clip: bool = True
    beta1: float = 0.01
    beta2: float = 1.0
    lambda1: float = 1.0
    lambda2: float = 0.0
    lambda3: float = 1.0
    norm_mode: Literal["eval", "train"] = "eval"
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.adversarial_steps < 0:
            raise InvalidInputError(
                "SAU needs epochs >= 1, batch_size >= 2 and adversarial_steps >= 0, got "
                f"{self.epochs}, {self.batch_size} and {self.adversarial_steps}."
            )
        positive = (self.learning_rate, self.radius, self.adversarial_rate)
        if not all(0 < value < math.inf for value in positive):
            raise InvalidInputError(
                "learning_rate, radius and adversarial_rate must be positive, got "
                f"{', '.join(map(str, positive))}."
            )
        weights = (self.beta1, self.beta2, self.lambda1, self.lambda2, self.lambda3)
        if not all(0 <= weight < math.inf for weight in weights):
            raise InvalidInputError(
                f"betas and lambdas must be at least 0, got {', '.join(map(str, weights))}."
            )
        if self.start not in ("random", "radius") or self.norm_mode not in ("eval", "train"):
            raise InvalidInputError(
                "start must be 'random' or 'radius' and norm_mode 'eval' or 'train', got "
                f"{self.start!r} and {self.norm_mode!r}."
            )

    @staticmethod
    def paper() -> SAU:
        """Return the settings of the authors' code, for 2,500 images: 100 passes, unclipped, from +radius.

        What the code does beyond its settings stands under the deviations.
        """
        return SAU(
            epochs=100, batch_size=256, learning_rate=1e-4, start="radius", clip=False, precision="fp32"
        )

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a copy of ``model`` that shares no adversarial examples with it.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels; a few hundred.
            generator: All randomness follows it; on the CPU.
            progress: Called after each epoch.

        Raises:
            InvalidInputError: If there are too few images, or a label has no output of the model.
            UnsupportedModelError: If the model has no layers, or training diverges.
        """
        check_fits(model, clean, purpose="purification", at_least=2)
        find_filters(model, as_float(clean.images[:1]))
        clean = clean.to(device_of(model))
        work = arrange(working_copy(model))
        suspect = arrange(working_copy(model)).requires_grad_(False)
        optimiser = torch.optim.Adam(
            [p for p in work.parameters() if p.requires_grad], lr=self.learning_rate, amsgrad=self.amsgrad
        )
        draws = rng.spawn(generator)
        epochs: list[dict[str, float]] = []
        with rng.isolated(draws):
            for done in range(self.epochs):
                epochs.append(self._epoch(work, suspect, clean, optimiser, draws))
                progress("shared adversarial unlearning", done + 1, self.epochs)
        return Purified(handed_back(work, model), None, {}, {"options": asdict(self), "epochs": epochs})

    def _epoch(
        self,
        work: nn.Module,
        suspect: nn.Module,
        clean: LabelledImages,
        optimiser: torch.optim.Adam,
        draws: torch.Generator,
    ) -> dict[str, float]:
        rows = []
        for batch in batches(clean, self.batch_size, draws, layout=memory_format_for(work)):
            examples = self._examples(work, suspect, batch, draws)
            with torch.no_grad(), autocast(self.precision, examples.device):
                fooled = suspect(examples).argmax(1)
            optimiser.zero_grad(set_to_none=True)
            training = self.norm_mode == "train"
            with mode(work, training=training), autocast(self.precision, examples.device):
                logits = work(torch.cat([batch.images, examples]))
            plain, attacked = logits.float().chunk(2)
            loss = self._outer(plain, attacked, fooled, batch.labels)
            loss.backward()
            optimiser.step()
            shared = (attacked.argmax(1) == fooled) & (fooled != batch.labels)
            shares = [(fooled != batch.labels).float().mean(), shared.float().mean()]
            rows.append(torch.stack([loss.detach(), *shares]))
        loss_mean, wrong, agreed = torch.stack(rows).mean(0).tolist()
        if not math.isfinite(loss_mean):
            raise UnsupportedModelError(
                f"shared adversarial unlearning diverged with learning_rate {self.learning_rate}; lower it."
            )
        return {"loss": loss_mean, "suspect_fooled": wrong, "both_fooled_alike": agreed}

    def _outer(self, plain: Tensor, attacked: Tensor, fooled: Tensor, labels: Tensor) -> Tensor:
        loss = self.lambda1 * F.cross_entropy(plain, labels)
        if self.lambda2:
            loss = loss + self.lambda2 * F.cross_entropy(attacked, labels)
        return loss + self.lambda3 * parting_loss(attacked, fooled, labels)

    def _examples(self, work: nn.Module, suspect: nn.Module, batch: Batch, draws: torch.Generator) -> Tensor:
        images = batch.images
        if self.start == "radius":
            delta = torch.full_like(images, self.radius)
        else:
            uniform = torch.rand(images.shape, generator=draws).to(images)
            delta = (2 * uniform - 1) * self.radius
        for _ in range(self.adversarial_steps):
            examples = self._moved(images, delta).requires_grad_()
            with autocast(self.precision, images.device):
                mine, theirs = work(examples), suspect(examples)
            gain = self._inner(mine.float(), theirs.float(), batch.labels)
            (gradient,) = torch.autograd.grad(gain, examples)
            delta = (self._moved(images, delta) - images) + self.adversarial_rate * gradient.sign()
            delta = delta.clamp(-self.radius, self.radius)
        return self._moved(images, delta)

    def _moved(self, images: Tensor, delta: Tensor) -> Tensor:
        moved = images + delta
        return (moved.clamp(0.0, 1.0) if self.clip else moved).detach()

    def _inner(self, mine: Tensor, theirs: Tensor, labels: Tensor) -> Tensor:
        fooling = (F.cross_entropy(mine, labels) + F.cross_entropy(theirs, labels)) / 2
        return self.beta1 * fooling - self.beta2 * jensen_shannon(mine, theirs)


def jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean Jensen-Shannon divergence, in nats, of the softmax of two sets of logits ``(N, K)``."""
    logs = F.log_softmax(one, 1), F.log_softmax(other, 1)
    middle = torch.logaddexp(*logs) - math.log(2)
    parts: list[Any] = [F.kl_div(middle, log, reduction="batchmean", log_target=True) for log in logs]
    half: Tensor = (parts[0] + parts[1]) / 2
    return half


def parting_loss(attacked: Tensor, fooled: Tensor, labels: Tensor) -> Tensor:
    """Return ``-log(1 - p)`` of the suspect's wrong classes, averaged over the batch.

    Args:
        attacked: Logits ``(N, K)`` of the copy on the examples.
        fooled: int64 ``(N,)``, the suspect's classes on them.
        labels: int64 ``(N,)``, true classes; where the suspect is right the loss is 0.
    """
    logs = F.log_softmax(attacked, 1)
    own = F.one_hot(fooled, attacked.shape[1]).bool()
    # log(1 - p) as the sum of the other classes: 1 - p itself is 0 in float32 once p is close to 1.
    rest = logs.masked_fill(own, -math.inf).logsumexp(1)
    return -(rest * (fooled != labels)).mean()
