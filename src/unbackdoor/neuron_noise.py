"""Masks and noise on the scales and shifts of filters, as Adversarial Neuron Pruning defines them.

Source: Wu, Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021, arXiv
2110.14430: filter j has a mask m and noise delta, xi; its norm's scale becomes ``(m + delta) gamma`` and its
shift ``(1 + xi) beta``, and the noise climbs a loss by signed steps. Purifiers and detectors share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unbackdoor.errors import UnsupportedModelError
from unbackdoor.filters.groups import FilterMap


@dataclass(frozen=True)
class Target:
    """What the mask and the noise of one layer's filters multiply.

    Args:
        name: The layer.
        filters: Number of filters.
        scales: Tensors that take the mask and noise of their own, ``(filters, ...)``.
        shifts: Tensors that take noise of their own only, ``(filters,)``.
        on_norm: Whether they belong to norms, not to the layer itself.
    """

    name: str
    filters: int
    scales: tuple[str, ...]
    shifts: tuple[str, ...]
    on_norm: bool


def targets_of(filter_map: FilterMap) -> tuple[Target, ...]:
    """Return the norms behind the removable layers, or, where no layer has one, the layers themselves.

    Raises:
        UnsupportedModelError: If there is no removable layer.
    """
    normed = tuple(
        Target(
            group.name,
            group.filters,
            tuple(norm.weight for norm in group.norms if norm.weight),
            tuple(norm.bias for norm in group.norms if norm.weight and norm.bias),
            on_norm=True,
        )
        for group in filter_map.prunable
        if any(norm.weight for norm in group.norms)
    )
    if normed:
        return normed
    bare = tuple(
        Target(g.name, g.filters, (g.weight,), (g.bias,) if g.bias else (), on_norm=False)
        for g in filter_map.prunable
    )
    if not bare:
        raise UnsupportedModelError(
            "this network has no layer but its head that filters could be removed from, so there is nothing "
            "to mask or to perturb; choose another method, such as one that fine-tunes."
        )
    return bare


def perturbed_tensors(
    tensors: Mapping[str, Tensor],
    targets: Sequence[Target],
    masks: Mapping[str, Tensor],
    noise: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """Return ``(m + delta) gamma`` and ``(1 + xi) beta`` for every target; differentiable.

    Args:
        tensors: The parameters of the network by name.
        targets: From ``targets_of``.
        masks: Layer name to ``(filters,)``.
        noise: Tensor name to ``(filters,)``; None for none.

    Returns:
        Replacements for ``torch.func.functional_call``.
    """
    replaced = {}
    for target in targets:
        for name in target.scales:
            factor = masks[target.name] if noise is None else masks[target.name] + noise[name]
            replaced[name] = tensors[name] * factor.view(-1, *[1] * (tensors[name].ndim - 1))
        if noise is not None:
            for name in target.shifts:
                replaced[name] = tensors[name] * (1 + noise[name])
    return replaced


def random_noise(
    targets: Sequence[Target], eps: float, *, generator: torch.Generator, device: torch.device
) -> dict[str, Tensor]:
    """Draw where the ascent starts: uniform in [-eps, eps], by tensor name, each ``(filters,)``.

    Args:
        targets: From ``targets_of``.
        eps: Budget.
        generator: The draws follow it; on the CPU.
        device: Where the noise goes.
    """
    return {
        name: ((2 * torch.rand(target.filters, generator=generator) - 1) * eps).to(device)
        for target in targets
        for name in (*target.scales, *target.shifts)
    }


def ascended(
    noise: Mapping[str, Tensor], gradients: Sequence[Tensor], eps: float, steps: int, *, project: bool
) -> dict[str, Tensor]:
    """Return ``noise`` after one signed step of size ``eps / steps``, clipped to the budget if asked for.

    Args:
        noise: Tensor name to ``(filters,)``.
        gradients: Those of the loss, in the order of ``noise``.
        eps: Budget.
        steps: Number of steps in which the budget is walked.
        project: Whether to clip to [-eps, eps].
    """
    moved = {
        name: each.detach() + eps / steps * gradient.sign()
        for (name, each), gradient in zip(noise.items(), gradients, strict=True)
    }
    return {name: each.clamp(-eps, eps) if project else each for name, each in moved.items()}
