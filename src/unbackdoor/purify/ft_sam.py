"""Fine-tuning with sharpness-aware minimisation: gradients are taken where the loss is locally worst."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from unbackdoor.compute import check_fits
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.groups import find_filters
from unbackdoor.purify.copies import fine_tuned
from unbackdoor.purify.ft import training_summary
from unbackdoor.train import Batch, Recipe
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent


@dataclass(frozen=True)
class FTSAM:
    """Fine-tune with adaptive sharpness-aware minimisation.

    Source: Zhu, Wei, Shen, Fan, Wu, "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware
    Minimization", ICCV 2023, arXiv 2304.11823. Minimises ``max CE(theta + eps)`` over
    ``||eps / |theta| || <= rho``, to first order: ``eps = rho theta^2 g / || |theta| g ||`` with the gradient
    g at theta over all weights, norms and biases included; the step at theta follows the gradient at
    ``theta + eps``. Weights at zero stay unperturbed.

    Deviations: 20 epochs of batch 64 on 500 images, for 100 of 256 on 2500. The cosine ends with the last
    epoch; in BackdoorBench it runs in steps over a period of 100 and rises again. Adaptivity is on unless
    ``adaptive`` is False; there, asking for it turns it off. Running statistics follow theta alone, as there.

    Args:
        rho: Radius of the neighbourhood, positive; 8 in BackdoorBench for GTSRB and Tiny ImageNet.
        adaptive: Measure eps relative to each weight's size; False is plain SAM, whose rho is far smaller.
        label_smoothing: Of the cross-entropy, in [0, 1); 0 in BackdoorBench for other data than CIFAR.
        recipe: Schedule.
    """

    name: ClassVar[str] = "ft_sam"
    title: ClassVar[str] = "Fine-tuning with sharpness-aware minimisation"
    source: ClassVar[str] = "Zhu, Wei, Shen, Fan, Wu 2023, arXiv 2304.11823"
    needs: ClassVar[str] = "clean images with labels"

    rho: float = 2.0
    adaptive: bool = True
    label_smoothing: float = 0.1
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=20, batch_size=64, learning_rate=0.01))

    def __post_init__(self) -> None:
        if not 0 < self.rho < math.inf:
            raise InvalidInputError(f"rho must be positive and finite, got {self.rho}.")
        if not 0 <= self.label_smoothing < 1:
            raise InvalidInputError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}.")

    @staticmethod
    def paper() -> FTSAM:
        """Return BackdoorBench's settings for CIFAR-10: 100 epochs of batch 256, for 5 % of the data."""
        return FTSAM(recipe=Recipe(epochs=100, batch_size=256, learning_rate=0.01))

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a fine-tuned copy of ``model``.

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
        tuned, record = fine_tuned(
            model,
            clean,
            self.recipe,
            generator=generator,
            loss_step=self.loss,
            stage="sharpness-aware fine-tuning",
            progress=progress,
        )
        return Purified(tuned, None, {}, {"options": asdict(self), "fine_tuning": training_summary(record)})

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss at ``theta + eps``, whose gradient with respect to theta is that at the shift."""
        weights = learnable(model)
        logits: Tensor = model(batch.images)
        first = F.cross_entropy(logits.float(), batch.labels, label_smoothing=self.label_smoothing)
        gradients = gradients_of(first, weights)
        return shifted_loss(
            model, batch, self._shifts(weights, gradients), label_smoothing=self.label_smoothing
        )

    @torch.no_grad()
    def _shifts(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scales = {name: w.abs() if self.adaptive else torch.ones_like(w) for name, w in weights.items()}
        scaled = {name: scales[name] * g for name, g in gradients.items()}
        norm = torch.stack([values.norm() for values in scaled.values()]).norm().clamp_min(1e-12)
        return {name: self.rho * scales[name] * values / norm for name, values in scaled.items()}


def learnable(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that learn, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients_of(loss: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of ``loss`` by each of ``weights``; those without a part in it are left out."""
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {name: g for name, g in zip(weights, gradients, strict=True) if g is not None}


def shifted_loss(
    model: nn.Module, batch: Batch, shifts: Mapping[str, Tensor], *, label_smoothing: float = 0.0
) -> Tensor:
    """Return the cross-entropy with ``shifts`` added to the weights; its gradients reach the weights.

    Args:
        model: Its weights and its running statistics stay as they are.
        batch: The images.
        shifts: Name of a parameter to what is added, of its shape; constants.
        label_smoothing: Of the cross-entropy.
    """
    weights = dict(model.named_parameters())
    shifted = {name: weights[name] + shift for name, shift in shifts.items()}
    # The second pass must not move the statistics: they belong to the weights, not to their shift.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    logits: Tensor = functional_call(model, {**shifted, **buffers}, (batch.images,))
    return F.cross_entropy(logits.float(), batch.labels, label_smoothing=label_smoothing)
