"""Learn one factor a filter by gradient descent on clean images: the soft masks of MNP, ANP and RNP."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.compute import Precision, arrange, autocast, device_of, memory_format_for, mode
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.groups import FilterGroup, FilterMap
from unbackdoor.filters.mask import masked_tensors
from unbackdoor.train import batches
from unbackdoor.types import LabelledImages, Progress, silent


@dataclass(frozen=True)
class MaskTraining:
    """How masks are learnt.

    Args:
        learning_rate: Step of SGD on the masks; eta_2 of MNP.
        momentum: Not stated by MNP; 0.9 in ANP's and RNP's code.
        epochs: Most passes over the clean images; MNP says "until converged" and names no number.
        tolerance: Stop once no mask has moved by more than this within an epoch.
        batch_size: Images a step; not stated by MNP, 128 in RNP's code.
        target: ``filter`` multiplies the layer's weights, as MNP writes; ``norm_scale`` multiplies the
            scale of the following batch norm, as ANP and RNP do.
        norm_mode: Mode of the norms meanwhile. With ``filter`` and ``train`` the loss does not depend on
            the masks at all (batch norm undoes any scaling), which is the paper's text read naively.
        augment: Crop and flip at random, as in training.
        precision: Of the forward and backward passes; the masks themselves are float32. How far bf16, which
            ``auto`` takes where it is faster, changes which filters go was not measured.
    """

    learning_rate: float = 0.1
    momentum: float = 0.9
    epochs: int = 20
    tolerance: float = 1e-3
    batch_size: int = 128
    target: Literal["filter", "norm_scale"] = "filter"
    norm_mode: Literal["train", "eval"] = "eval"
    augment: bool = False
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if self.epochs < 1 or not self.learning_rate > 0 or self.batch_size < 2:
            raise InvalidInputError(
                "mask training needs epochs >= 1, learning_rate > 0 and batch_size >= 2, got "
                f"{self.epochs}, {self.learning_rate} and {self.batch_size}."
            )
        if not 0 <= self.momentum < 1:
            raise InvalidInputError(f"momentum of mask training must lie in [0, 1), got {self.momentum}.")


@dataclass(frozen=True, eq=False)
class LearntMasks:
    """The masks and what it took.

    Args:
        masks: Layer name to float32 ``(filters,)``.
        losses: Mean cross-entropy of each epoch, without the penalty.
        clipped: Share of the masks that lie on a bound at the end.
        steps: Gradient steps done.
    """

    masks: Mapping[str, Tensor]
    losses: tuple[float, ...]
    clipped: float
    steps: int


def learn_masks(
    model: nn.Module,
    clean: LabelledImages,
    filter_map: FilterMap,
    options: MaskTraining,
    *,
    penalty: Mapping[str, Tensor],
    bounds: tuple[float, float],
    generator: torch.Generator,
    stage: str = "masks",
    progress: Progress = silent,
) -> LearntMasks:
    """Minimise ``CE(F(x; m * theta), y) + sum(penalty * m)`` over masks m that start at 1.

    Args:
        model: Its weights stay as they are; left untouched.
        clean: Clean images with labels.
        filter_map: From ``find_filters``; the masks cover its prunable groups.
        options: See ``MaskTraining``.
        penalty: Layer name to ``(filters,)``: the coefficient of each mask; negative ones reward.
        bounds: Masks are clipped into this interval after each step; it must contain 1.
        generator: Order of the images follows it; on the CPU.
        stage: How the work is called in ``progress``.
        progress: Called after each epoch.

    Raises:
        UnsupportedModelError: If ``norm_scale`` is asked for and no prunable layer has a batch norm.
    """
    low, high = bounds
    device = device_of(model)
    clean = clean.to(device)
    layout = memory_format_for(model)
    frozen = arrange(copy.deepcopy(model).requires_grad_(False))
    groups = _masked_groups(filter_map, options.target)
    masks = {g.name: torch.ones(g.filters, device=device, requires_grad=True) for g in groups}
    optimiser = torch.optim.SGD(masks.values(), lr=options.learning_rate, momentum=options.momentum)
    coefficients = {name: penalty[name].to(device) for name in masks}
    losses: list[float] = []
    steps = 0
    for epoch in range(options.epochs):
        before = torch.cat([mask.detach().clone() for mask in masks.values()])
        total, count = torch.zeros((), device=device), 0
        with mode(frozen, training=options.norm_mode == "train"), rng.isolated(generator):
            for batch in batches(
                clean,
                options.batch_size,
                generator,
                crop_padding=4 if options.augment else 0,
                flip=options.augment,
                layout=layout,
            ):
                loss = _masked_loss(frozen, filter_map, masks, batch.images, batch.labels, options)
                extra = torch.stack([(coefficients[n] * m).sum() for n, m in masks.items()]).sum()
                optimiser.zero_grad(set_to_none=True)
                (loss + extra).backward()
                optimiser.step()
                with torch.no_grad():
                    for mask in masks.values():
                        mask.clamp_(low, high)
                total += loss.detach()
                count += 1
        steps += count
        losses.append(float(total / count))
        after = torch.cat([mask.detach() for mask in masks.values()])
        progress(stage, epoch + 1, options.epochs)
        if float((after - before).abs().max()) < options.tolerance:
            progress(stage, options.epochs, options.epochs)
            break
    flat = torch.cat([mask.detach() for mask in masks.values()])
    on_bound = (flat <= low) | (flat >= high)
    return LearntMasks(
        masks={g.name: _final(masks, g, device) for g in filter_map.prunable},
        losses=tuple(losses),
        clipped=float(on_bound.float().mean()),
        steps=steps,
    )


def _masked_groups(filter_map: FilterMap, target: str) -> tuple[FilterGroup, ...]:
    if target == "filter":
        return filter_map.require_prunable()
    groups = tuple(g for g in filter_map.prunable if any(n.kind == "batch" and n.weight for n in g.norms))
    if not groups:
        raise UnsupportedModelError(
            "no layer of this network is followed by a batch norm with a scale, so masks on norm scales have "
            "nothing to act on; use masks on filters."
        )
    return groups


def _final(masks: Mapping[str, Tensor], group: FilterGroup, device: torch.device) -> Tensor:
    if group.name in masks:
        return masks[group.name].detach()
    return torch.ones(group.filters, device=device)


def _masked_loss(
    model: nn.Module,
    filter_map: FilterMap,
    masks: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    options: MaskTraining,
) -> Tensor:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if options.target == "filter":
        fold = options.norm_mode == "eval"
        replaced = masked_tensors(tensors, filter_map, masks, fold=fold)
    else:
        replaced = {
            norm.weight: tensors[norm.weight] * mask
            for name, mask in masks.items()
            for norm in filter_map.group(name).norms
            if norm.weight
        }
    with autocast(options.precision, images.device):
        logits: Tensor = functional_call(model, replaced, (images,))
    return F.cross_entropy(logits.float(), labels)
