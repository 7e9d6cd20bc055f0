"""Adversarial Neuron Pruning: remove the filters that small changes of the network turn against it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
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
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.groups import find_filters
from unbackdoor.filters.mask import PruneMode
from unbackdoor.filters.select import below
from unbackdoor.neuron_noise import Target, ascended, perturbed_tensors, random_noise, targets_of
from unbackdoor.purify.selection import Selection, divide, exposed_copy, purified, select
from unbackdoor.train import Batch, batches
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent


@dataclass(frozen=True)
class ANP:
    """Prune the filters that adversarial changes of scale and shift make harmful.

    Source: Wu, Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021, arXiv
    2110.14430. Filter j has a mask m in [0, 1] and noise delta, xi: its norm's scale becomes
    ``(m + delta) gamma`` and its shift ``(1 + xi) beta``. For each batch the noise starts at random in
    [-eps, eps] and climbs the clean loss by signed steps of eps / steps; then the masks descend on
    ``alpha CE(m) + (1 - alpha) CE(m, delta, xi)``. Filters with small masks go.

    Deviations: batches are drawn in shuffled passes, not with replacement; only masks and noise receive
    gradients (the authors' code computes those of all weights too); norms on residual sums, which belong to
    no single filter, have neither mask nor noise. Masks keep full precision, where the authors round to
    four decimals. As in the authors' code noise is not projected by default, so that it reaches up to twice
    eps. Other public code picks the threshold by the attack success rate on triggered test images, and
    learns masks on test images; nothing here can.

    Norms are in train mode meanwhile, on a scratch copy: the running statistics of the result are the
    input's. Where some layers are followed by a norm with a scale, of whatever kind, those layers alone are
    treated. A network without any is treated at each filter's weight and bias, as the authors advise.

    Args:
        eps: Size of the noise, relative to scale and shift.
        alpha: Weight of the loss without noise, in [0, 1].
        steps: Signed ascent steps a batch.
        project_noise: Clip the noise to [-eps, eps] after each step.
        iterations: Mask updates; the paper's 2000 cost three forward and backward passes each.
        learning_rate: Of SGD on the masks. Some public code takes 0.01, whose masks barely move.
        momentum: Of SGD on the masks.
        batch_size: Images an iteration.
        augment: Crop and flip at random, as in training.
        precision: Of the forward and backward passes; masks and noise are float32. How far bf16, which
            ``auto`` takes where it is faster, changes which filters go was not measured.
        threshold: The paper's rule removes masks at or below it.
        selection: How many filters go.
        prune_mode: What removing a filter clears; the authors clear the norm's scale.
    """

    name: ClassVar[str] = "anp"
    title: ClassVar[str] = "Adversarial Neuron Pruning"
    source: ClassVar[str] = "Wu, Wang 2021, arXiv 2110.14430"
    needs: ClassVar[str] = "clean images with labels; without norm scales it treats weights and biases"

    eps: float = 0.4
    alpha: float = 0.2
    steps: int = 1
    project_noise: bool = False
    iterations: int = 400
    learning_rate: float = 0.2
    momentum: float = 0.9
    batch_size: int = 128
    augment: bool = False
    precision: Precision = "auto"
    threshold: float = 0.2
    selection: Selection = field(default_factory=Selection)
    prune_mode: PruneMode = "norm_scale"

    def __post_init__(self) -> None:
        if not self.eps >= 0 or not 0 <= self.alpha <= 1 or not 0 <= self.threshold <= 1:
            raise InvalidInputError(
                "eps must be at least 0, alpha and threshold must lie in [0, 1], got "
                f"{self.eps}, {self.alpha} and {self.threshold}."
            )
        if not 0 <= self.momentum < 1:
            raise InvalidInputError(f"momentum must lie in [0, 1), got {self.momentum}.")
        if self.steps < 1 or self.iterations < 1 or self.batch_size < 2 or not self.learning_rate > 0:
            raise InvalidInputError(
                "steps and iterations must be at least 1, batch_size at least 2 and learning_rate positive, "
                f"got {self.steps}, {self.iterations}, {self.batch_size} and {self.learning_rate}."
            )

    @staticmethod
    def paper() -> ANP:
        """Return the settings of the paper: 2000 iterations on augmented images, masks up to 0.2 go."""
        return ANP(iterations=2000, augment=True, selection=Selection(amount="own"))

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a copy of ``model`` without the filters whose masks fell.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels; a few hundred.
            generator: All randomness follows it; on the CPU.
            progress: Called during each stage.

        Raises:
            InvalidInputError: If there are too few images, or a label has no output of the model.
            UnsupportedModelError: If the network has no filters that may be removed.
        """
        check_fits(model, clean, purpose="purification", at_least=2)
        filter_map = find_filters(model, as_float(clean.images[:1]))
        learning, guarding = divide(clean, self.selection.held_out_fraction, generator)
        targets = targets_of(filter_map)
        masks, losses = self._learn(model, learning, targets, rng.spawn(generator), progress)
        scores = {name: mask.detach().float().cpu() for name, mask in masks.items()}
        exposed = exposed_copy(
            model, learning, guarding, self.selection, generator=generator, progress=progress
        )
        selected = select(
            model, guarding, filter_map, scores, self.selection,
            own=below(scores, self.threshold), exposed=exposed, prune_mode=self.prune_mode, progress=progress,
        )  # fmt: skip
        found = {
            "masks_on": "norms" if targets[0].on_norm else "weights",
            **_described(scores, losses),
        }
        return purified(self, model, filter_map, scores, selected, self.prune_mode, found)

    def _learn(
        self,
        model: nn.Module,
        clean: LabelledImages,
        targets: Sequence[Target],
        generator: torch.Generator,
        progress: Progress,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the masks, and the two losses of each iteration, ``(iterations, 2)``."""
        device = device_of(model)
        frozen = arrange(copy.deepcopy(model).requires_grad_(False))
        masks = {t.name: torch.ones(t.filters, device=device, requires_grad=True) for t in targets}
        optimiser = torch.optim.SGD(masks.values(), lr=self.learning_rate, momentum=self.momentum)
        losses: list[Tensor] = []
        clean = clean.to(device)
        with mode(frozen, training=True), rng.isolated(generator):
            for batch in self._batches(clean, frozen, generator):
                noise = self._noise(frozen, targets, masks, batch, generator)
                plain = _loss(frozen, targets, masks, None, batch, self.precision)
                noisy = _loss(frozen, targets, masks, noise, batch, self.precision)
                optimiser.zero_grad(set_to_none=True)
                (self.alpha * plain + (1 - self.alpha) * noisy).backward()
                optimiser.step()
                with torch.no_grad():
                    for mask in masks.values():
                        mask.clamp_(0.0, 1.0)
                losses.append(torch.stack([plain.detach(), noisy.detach()]))
                progress("adversarial masks", len(losses), self.iterations)
        return masks, torch.stack(losses).cpu()

    def _batches(
        self, clean: LabelledImages, model: nn.Module, generator: torch.Generator
    ) -> Iterator[Batch]:
        done, layout = 0, memory_format_for(model)
        while True:
            for batch in batches(
                clean,
                self.batch_size,
                generator,
                crop_padding=4 if self.augment else 0,
                flip=self.augment,
                layout=layout,
            ):
                yield batch
                done += 1
                if done == self.iterations:
                    return

    def _noise(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        masks: Mapping[str, Tensor],
        batch: Batch,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Return adversarial noise by tensor name, each ``(filters,)`` without gradient."""
        fixed = {name: mask.detach() for name, mask in masks.items()}
        noise = random_noise(targets, self.eps, generator=generator, device=batch.images.device)
        if self.eps == 0:
            return noise
        for _ in range(self.steps):
            for each in noise.values():
                each.requires_grad_(True)
            loss = _loss(model, targets, fixed, noise, batch, self.precision)
            gradients = torch.autograd.grad(loss, list(noise.values()))
            noise = ascended(noise, gradients, self.eps, self.steps, project=self.project_noise)
        return noise


def _loss(
    model: nn.Module,
    targets: Sequence[Target],
    masks: Mapping[str, Tensor],
    noise: Mapping[str, Tensor] | None,
    batch: Batch,
    precision: Precision,
) -> Tensor:
    replaced = perturbed_tensors(dict(model.named_parameters()), targets, masks, noise)
    with autocast(precision, batch.images.device):
        logits: Tensor = functional_call(model, replaced, (batch.images,))
    return F.cross_entropy(logits.float(), batch.labels)


def _described(scores: Mapping[str, Tensor], losses: Tensor) -> dict[str, Any]:
    flat = torch.cat(list(scores.values()))
    tenths = [part.mean(0).tolist() for part in losses.tensor_split(min(10, len(losses)))]
    return {
        "iterations": len(losses),
        "loss_without_noise": [plain for plain, _ in tenths],
        "loss_with_noise": [noisy for _, noisy in tenths],
        "clipped_fraction": float(((flat <= 0) | (flat >= 1)).float().mean()),
    }
