"""How much a filter contributes to the clean loss: Taylor estimate and exact value.

Both are taken in eval mode: in train mode batch norm makes the loss invariant to a filter's scale, so the
first-order term vanishes identically and what is left is rounding noise.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor.compute import EVALUATION_BATCH, device_of, logits_of, memory_format_for, mode
from unbackdoor.filters.ablation import ablate
from unbackdoor.filters.groups import FilterMap
from unbackdoor.filters.mask import PruneMode
from unbackdoor.types import LabelledImages, as_float


def taylor_saliency(
    model: nn.Module,
    clean: LabelledImages,
    filter_map: FilterMap,
    *,
    head: bool = False,
    batch_size: int = EVALUATION_BATCH,
) -> dict[str, Tensor]:
    """Return the first-order estimate of the clean loss change, ``CLC~ = -<dL/dtheta, theta>``.

    Source: MNP (arXiv 2405.17750), Eq. 11, with the mean cross-entropy over ``clean`` as L.

    Args:
        model: The network; left untouched, evaluated in eval mode and fp32.
        clean: Images and labels.
        filter_map: From ``find_filters``.
        head: Include the head's rows.
        batch_size: Images per pass; the gradients of all passes are summed, so it changes nothing.

    Returns:
        Layer name to signed float32 ``(filters,)`` on the model's device.
    """
    groups = filter_map.groups if head else filter_map.require_prunable()
    parameters = dict(model.named_parameters())
    weights = [parameters[group.weight] for group in groups]
    required = [weight.requires_grad for weight in weights]
    totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    device = device_of(model)
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with mode(model, training=False), torch.enable_grad():
            for start in range(0, len(clean), batch_size):
                part = slice(start, start + batch_size)
                images = as_float(clean.images[part].to(device))
                loss = F.cross_entropy(
                    model(images.contiguous(memory_format=memory_format_for(model))),
                    clean.labels[part].to(device),
                    reduction="sum",
                )
                for total, gradient in zip(totals, torch.autograd.grad(loss, weights), strict=True):
                    total.add_(gradient)
    finally:
        for weight, was_required in zip(weights, required, strict=True):
            weight.requires_grad_(was_required)
    return {
        group.name: -(total * weight.detach()).flatten(1).sum(1) / len(clean)
        for group, total, weight in zip(groups, totals, weights, strict=True)
    }


def clean_loss(model: nn.Module, clean: LabelledImages) -> float:
    """Return the mean cross-entropy of ``model`` on ``clean``, in eval mode and fp32."""
    logits = logits_of(model, clean.images)
    return float(F.cross_entropy(logits, clean.labels.to(logits.device)))


def exact_saliency(
    model: nn.Module,
    clean: LabelledImages,
    filter_map: FilterMap,
    filters: Iterable[tuple[str, int]],
    *,
    prune_mode: PruneMode = "silence",
) -> list[float]:
    """Return the change of the clean loss when each filter alone is removed (MNP, Eq. 2).

    Args:
        model: The network; left untouched.
        clean: Images and labels.
        filter_map: From ``find_filters``.
        filters: (layer, filter) pairs.
        prune_mode: What removing means.
    """
    places = list(filters)
    changes = ablate(model, clean, filter_map, places, prune_mode=prune_mode).changes()
    return [float(changes[layer][index]) for layer, index in places]


def spearman(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation, with average ranks for ties; NaN if either is constant.

    Args:
        a: ``(N,)``.
        b: ``(N,)``.
    """
    ranks = torch.stack([_average_ranks(a.flatten()), _average_ranks(b.flatten())])
    centred = ranks - ranks.mean(1, keepdim=True)
    norms = centred.norm(dim=1)
    if bool((norms == 0).any()):
        return float("nan")
    return float((centred[0] @ centred[1]) / (norms[0] * norms[1]))


def _average_ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values.double(), sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts.double() - 1) / 2)[inverse]
    return ranks
