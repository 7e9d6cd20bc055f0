"""Adversarial Weight Masking: weaken the weights that a universal perturbation makes use of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.compute import (
    EVALUATION_BATCH,
    Precision,
    arrange,
    autocast,
    check_fits,
    device_of,
    memory_format_for,
    mode,
)
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.groups import FilterMap, find_filters
from unbackdoor.purify.copies import handed_back, working_copy
from unbackdoor.train import Batch, batches
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent

_CIFAR_VALUES = 3 * 32 * 32


@dataclass(frozen=True)
class AWM:
    """Multiply each weight of the convolutions by a soft mask that resists universal perturbations.

    Source: Chai, Chen, "One-shot Neural Backdoor Erasing via Adversarial Weight Masking", NeurIPS 2022,
    arXiv 2207.04497. Masks M in [0, 1], one a weight, start at 1. Each round climbs with one perturbation
    delta for all images on ``CE(F(x + delta; M * theta), F's own labels)``, scales it by
    ``min(1, tau / ||delta||_1)``, and then lets Adam descend with M on ``alpha CE(F(x), y) +
    (1 - alpha) CE(F(clip(x + delta)), y) + gamma ||M||_1``. The masks stay soft: nothing is pruned.

    Norms are in eval mode throughout; in train mode they would undo the scaling of whole filters, and the
    running statistics stay those of the input.

    Deviations: an inner phase is a number of passes, at least one batch each; the authors count
    ``floor(images / batch) * 5`` batches drawn with replacement, which is none for fewer images than a batch.
    They take 300 steps of each kind on 500 images in 20 rounds, the default 200 in 10, whose rates add up to
    what theirs do, 1.3. Their code takes the clean images from the test set. The model's own labels are
    computed once a round, as the masks do not change meanwhile. tau holds for 3 x 32 x 32 values and grows
    with the image. With one image a class the authors add nine augmented copies of each; that is not done
    here.

    Args:
        alpha: Weight of the loss without perturbation, in [0, 1]; the authors take 0.99 for one image a
            class.
        gamma: Weight of the masks' sum; the authors' value is nearly none.
        tau: Largest l1 norm of the perturbation, for images of 3 x 32 x 32 values; 100 for one image a class.
        rounds: Alternations of perturbation and masks; the authors' 20.
        passes: Passes over the images in each half of a round; the authors' 5.
        learning_rate: Of Adam on the masks, in the first round.
        decay: Factor on it from round to round, in (0, 1]; the authors' 0.9. Without it masks go on until the
            images are learnt by heart, at the expense of others.
        perturbation_rate: Step of the ascent on the perturbation.
        batch_size: Images a step.
        layers: ``conv`` masks convolutions, as the authors do; ``all`` linear layers but the head, too.
        precision: Of the forward and backward passes; masks and perturbation are float32.
    """

    name: ClassVar[str] = "awm"
    title: ClassVar[str] = "Adversarial Weight Masking"
    source: ClassVar[str] = "Chai, Chen 2022, arXiv 2207.04497"
    needs: ClassVar[str] = "clean images with labels; convolutions"

    alpha: float = 0.9
    gamma: float = 1e-8
    tau: float = 1000.0
    rounds: int = 10
    passes: int = 5
    learning_rate: float = 0.01
    decay: float = 0.9
    perturbation_rate: float = 10.0
    batch_size: int = 128
    layers: Literal["conv", "all"] = "conv"
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or not self.gamma >= 0 or not self.tau >= 0:
            raise InvalidInputError(
                "alpha must lie in [0, 1], gamma and tau must be at least 0, got "
                f"{self.alpha}, {self.gamma} and {self.tau}."
            )
        if self.rounds < 1 or self.passes < 1 or self.batch_size < 1:
            raise InvalidInputError(
                "rounds, passes and batch_size must be at least 1, got "
                f"{self.rounds}, {self.passes} and {self.batch_size}."
            )
        if not self.learning_rate > 0 or not self.perturbation_rate > 0:
            raise InvalidInputError(
                "learning_rate and perturbation_rate must be positive, got "
                f"{self.learning_rate} and {self.perturbation_rate}."
            )
        if not 0 < self.decay <= 1:
            raise InvalidInputError(f"decay must lie in (0, 1], got {self.decay}.")
        if self.layers not in ("conv", "all"):
            raise InvalidInputError(f"layers must be 'conv' or 'all', got {self.layers!r}.")

    @staticmethod
    def paper(*, one_shot: bool = False) -> AWM:
        """Return the authors' settings, for one image a class or for some hundred images."""
        if one_shot:
            return AWM(rounds=20, alpha=0.99, tau=100.0)
        return AWM(rounds=20)

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a copy of ``model`` whose weights are masked.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels; a few hundred.
            generator: Order of the images follows it; on the CPU.
            progress: Called after each round.

        Raises:
            InvalidInputError: If there are too few images, or a label has no output of the model.
            UnsupportedModelError: If there is no layer to mask, or masks stop being finite.
        """
        check_fits(model, clean, purpose="purification", at_least=2)
        filter_map = find_filters(model, as_float(clean.images[:1]))
        work = working_copy(model)
        masks, rounds = self._learn(work, clean, self._names(filter_map), rng.spawn(generator), progress)
        parameters = dict(work.named_parameters())
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].mul_(mask)
        return Purified(
            model=handed_back(work, model),
            mask=None,
            scores={},
            diagnostics={
                "options": asdict(self),
                "rounds": rounds,
                "masks": {name: _summary(mask) for name, mask in masks.items()},
            },
        )

    def _names(self, filter_map: FilterMap) -> list[str]:
        groups = [g for g in filter_map.prunable if g.kind == "conv" or self.layers == "all"]
        if not groups:
            raise UnsupportedModelError(
                f"this network has no layer to mask with layers = {self.layers!r}, as the head is never "
                "masked; use layers = 'all', or another method."
            )
        return [group.weight for group in groups]

    def _learn(
        self,
        work: nn.Module,
        clean: LabelledImages,
        names: list[str],
        generator: torch.Generator,
        progress: Progress,
    ) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        device = device_of(work)
        clean = clean.to(device)
        frozen = arrange(work.requires_grad_(False))
        weights = {name: parameter for name, parameter in frozen.named_parameters() if name in names}
        masks = {n: torch.ones_like(w, dtype=torch.float32).requires_grad_() for n, w in weights.items()}
        optimiser = torch.optim.Adam(masks.values(), lr=self.learning_rate)
        rounds = []
        with mode(frozen, training=False), rng.isolated(generator):
            for done in range(self.rounds):
                fixed = {name: (weights[name] * mask).detach() for name, mask in masks.items()}
                delta = self._perturb(frozen, fixed, clean, generator)
                losses = self._descend(frozen, weights, masks, optimiser, clean, delta, generator)
                (group,) = optimiser.param_groups
                rate = float(group["lr"])
                rounds.append({"perturbation_l1": float(delta.abs().sum()), "learning_rate": rate, **losses})
                group["lr"] = rate * self.decay
                progress("adversarial weight masks", done + 1, self.rounds)
        return {name: mask.detach() for name, mask in masks.items()}, rounds

    def _perturb(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        clean: LabelledImages,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the perturbation of this round, ``(1, C, H, W)``."""
        own = self._own_labels(model, weights, clean)
        delta = torch.zeros_like(as_float(clean.images[:1]))
        for _ in range(self.passes):
            for batch in self._batches(clean, model, generator):
                delta.requires_grad_(True)
                loss = self._loss(model, weights, batch.images + delta, own[batch.indices])
                (gradient,) = torch.autograd.grad(loss, delta)
                delta = delta.detach() + self.perturbation_rate * gradient
        return within(delta, self.tau)

    def _descend(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        optimiser: torch.optim.Optimizer,
        clean: LabelledImages,
        delta: Tensor,
        generator: torch.Generator,
    ) -> dict[str, float]:
        """Take a round's steps on the masks; return the mean losses with and without perturbation."""
        losses = []
        for _ in range(self.passes):
            for batch in self._batches(clean, model, generator):
                masked = {name: weights[name] * mask for name, mask in masks.items()}
                plain = self._loss(model, masked, batch.images, batch.labels)
                shifted = (batch.images + delta).clamp(0.0, 1.0)
                perturbed = self._loss(model, masked, shifted, batch.labels)
                sparsity = torch.stack([mask.sum() for mask in masks.values()]).sum()
                optimiser.zero_grad(set_to_none=True)
                loss = self.alpha * plain + (1 - self.alpha) * perturbed + self.gamma * sparsity
                loss.backward()
                optimiser.step()
                with torch.no_grad():
                    for mask in masks.values():
                        mask.clamp_(0.0, 1.0)
                losses.append(torch.stack([plain.detach(), perturbed.detach()]))
        plain_mean, perturbed_mean = torch.stack(losses).mean(0).tolist()
        if not plain_mean + perturbed_mean < float("inf"):
            raise UnsupportedModelError(
                f"the loss of the masks is {plain_mean + perturbed_mean}; lower perturbation_rate or "
                "learning_rate."
            )
        return {"loss": plain_mean, "loss_perturbed": perturbed_mean}

    @torch.no_grad()
    def _own_labels(self, model: nn.Module, weights: Mapping[str, Tensor], clean: LabelledImages) -> Tensor:
        layout = memory_format_for(model)
        parts = [
            functional_call(model, dict(weights), (as_float(part).contiguous(memory_format=layout),))
            for part in clean.images.split(EVALUATION_BATCH)
        ]
        return torch.cat(parts).argmax(1)

    def _batches(
        self, clean: LabelledImages, model: nn.Module, generator: torch.Generator
    ) -> Iterator[Batch]:
        return batches(clean, self.batch_size, generator, layout=memory_format_for(model))

    def _loss(
        self, model: nn.Module, weights: Mapping[str, Tensor], images: Tensor, labels: Tensor
    ) -> Tensor:
        with autocast(self.precision, images.device):
            logits: Tensor = functional_call(model, dict(weights), (images,))
        return F.cross_entropy(logits.float(), labels)


def within(delta: Tensor, tau: float) -> Tensor:
    """Return ``delta``, scaled down to the l1 norm ``tau`` of a 3 x 32 x 32 image if it is larger.

    Args:
        delta: ``(1, C, H, W)``; the bound grows with its number of values.
        tau: Bound for 3072 values.
    """
    bound = tau * delta.numel() / _CIFAR_VALUES
    factor = (bound / delta.abs().sum().clamp_min(torch.finfo(delta.dtype).tiny)).clamp_max(1.0)
    return delta * factor


def _summary(mask: Tensor) -> dict[str, Any]:
    return {
        "mean": float(mask.mean()),
        "zero_fraction": float((mask <= 0).float().mean()),
        "one_fraction": float((mask >= 1).float().mean()),
    }
