"""Feature-shift tuning: start the head anew and push it away from the old one, so that features move."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor.compute import check_fits
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.groups import FilterGroup, FilterMap, find_filters
from unbackdoor.purify.copies import fine_tuned
from unbackdoor.purify.ft import training_summary
from unbackdoor.train import Batch, Recipe
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent


@dataclass(frozen=True)
class FST:
    """Fine-tune with a new head that must not resemble the old one.

    Source: Min, Qin, Shen, Cheng, "Towards Stable Backdoor Purification through Feature Shift Tuning",
    NeurIPS 2023, arXiv 2310.01875. Minimises ``CE(F(x; theta), y) + alpha <W, W_orig>`` subject to
    ``||W||_F = ||W_orig||_F`` over all weights, where W is the weight of the head, drawn anew at the start.

    Deviations: the norm is held from before the first step on, not after it; batch 64 for 128, so that 500
    images give the 80 steps that the paper's 1000 do. The bias of the head is drawn anew with the weight.
    A head is any layer that yields the logits, a convolution too; several that are summed are all treated.

    Args:
        alpha: Weight of the inner product, at least 0; less, or 0, for hundreds of classes.
        recipe: Schedule.
    """

    name: ClassVar[str] = "fst"
    title: ClassVar[str] = "Feature-shift tuning"
    source: ClassVar[str] = "Min, Qin, Shen, Cheng 2023, arXiv 2310.01875"
    needs: ClassVar[str] = "clean images with labels; a linear head"

    alpha: float = 0.1
    recipe: Recipe = field(
        default_factory=lambda: Recipe(epochs=10, batch_size=64, learning_rate=0.01, weight_decay=0.0)
    )

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise InvalidInputError(f"alpha must be at least 0 and finite, got {self.alpha}.")

    @staticmethod
    def paper() -> FST:
        """Return the settings of the official code: alpha 0.1 as its guide says, batch 128."""
        return FST(recipe=Recipe(epochs=10, batch_size=128, learning_rate=0.01, weight_decay=0.0))

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a copy of ``model`` with a new head and moved features.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels; a few hundred.
            generator: All randomness follows it; on the CPU.
            progress: Called after each epoch.

        Raises:
            InvalidInputError: If there are too few images, or a label has no output of the model.
            UnsupportedModelError: If no layer yields the logits directly, or training diverges.
        """
        check_fits(model, clean, purpose="purification", at_least=2)
        heads = _heads_of(find_filters(model, as_float(clean.images[:1])))
        step = ShiftStep(
            {h.weight: model.get_parameter(h.weight).detach().float().clone() for h in heads}, self.alpha
        )
        anew = copy.deepcopy(model)
        for head in heads:
            _draw(anew, head, generator)
        tuned, record = fine_tuned(
            anew, clean, self.recipe, generator=generator, loss_step=step, progress=progress
        )
        step.project(tuned)
        similarity = {name: _cosine(tuned.get_parameter(name), old) for name, old in step.originals.items()}
        return Purified(
            model=tuned,
            mask=None,
            scores={},
            diagnostics={
                "options": asdict(self),
                "fine_tuning": training_summary(record),
                "head_cosine_similarity": similarity,
            },
        )


@dataclass(frozen=True, eq=False)
class ShiftStep:
    """The loss of feature-shift tuning; projects the head before it is used.

    Args:
        originals: Name of each head's weight to what it was, float32.
        alpha: Weight of the inner product.
    """

    originals: dict[str, Tensor]
    alpha: float

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return ``CE + alpha <W, W_orig>`` of the batch."""
        self.project(model)
        logits: Tensor = model(batch.images)
        products = [(model.get_parameter(name) * old).sum() for name, old in self.originals.items()]
        return F.cross_entropy(logits.float(), batch.labels) + self.alpha * torch.stack(products).sum()

    @torch.no_grad()
    def project(self, model: nn.Module) -> None:
        """Give each head, in place, the norm that it had."""
        for name, old in self.originals.items():
            weight = model.get_parameter(name)
            weight.mul_(old.norm() / weight.norm().clamp_min(1e-12))


def _heads_of(filter_map: FilterMap) -> list[FilterGroup]:
    heads = [group for group in filter_map.groups if group.is_head]
    if not heads:
        raise UnsupportedModelError(
            "no layer of this network yields the logits directly, so there is no head to draw anew; use "
            "plain fine-tuning."
        )
    return heads


@torch.no_grad()
def _draw(model: nn.Module, head: FilterGroup, generator: torch.Generator) -> None:
    """Draw weight and bias of ``head``, in place, uniformly within ``1 / sqrt(inputs)``."""
    weight = model.get_parameter(head.weight)
    bound = 1 / math.sqrt(weight[0].numel())
    for name in (head.weight, head.bias):
        if name is not None:
            parameter = model.get_parameter(name)
            # Drawn on the CPU, so that every device gets the same numbers.
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(F.cosine_similarity(one.detach().float().flatten(), other.flatten(), dim=0))
