"""Which filters are kept: an immutable mask, its algebra, and what removing a filter does to a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.groups import FilterGroup, FilterMap, Norm

PruneMode = Literal["silence", "weight", "norm_scale", "norm"]
"""What removing a filter sets to zero.

``silence``: weight and bias of the filter, and scale and shift of its norm: its output is exactly 0.
``weight``: weight and bias only, MNP's formula read literally; the norm still yields a constant.
``norm_scale``: the norm's scale only (ANP, RNP); its shift stays.
``norm``: the norm's scale and shift (CLP).
Filters without a norm are cleared at weight and bias in every mode.
"""


@dataclass(frozen=True, eq=False)
class FilterMask:
    """Per layer, which filters are kept: True survives.

    Args:
        keep: Layer name to bool ``(filters,)`` on the CPU. Layers that are absent are kept whole.
    """

    keep: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for name, kept in self.keep.items():
            if kept.dtype != torch.bool or kept.ndim != 1:
                raise InvalidInputError(
                    f"the mask of layer {name!r} must be bool (filters,), got {kept.dtype} of shape "
                    f"{tuple(kept.shape)}."
                )

    @staticmethod
    def full(filter_map: FilterMap) -> FilterMask:
        """Return the mask that keeps every prunable filter."""
        return FilterMask({g.name: torch.ones(g.filters, dtype=torch.bool) for g in filter_map.prunable})

    @property
    def n_filters(self) -> int:
        """Number of filters that the mask speaks of."""
        return sum(len(kept) for kept in self.keep.values())

    @property
    def n_removed(self) -> int:
        """Number of filters removed."""
        return sum(int((~kept).sum()) for kept in self.keep.values())

    def removed(self) -> list[tuple[str, int]]:
        """Return (layer, filter) of everything removed, in layer order."""
        return [(name, int(j)) for name, kept in self.keep.items() for j in (~kept).nonzero().flatten()]

    def without(self, filters: Iterable[tuple[str, int]]) -> FilterMask:
        """Return a mask that also removes ``filters``, given as (layer, filter).

        Raises:
            InvalidInputError: If one of them does not exist.
        """
        keep = {name: kept.clone() for name, kept in self.keep.items()}
        for layer, index in filters:
            if layer not in keep or not 0 <= index < len(keep[layer]):
                raise InvalidInputError(f"there is no filter {index} in layer {layer!r} of this mask.")
            keep[layer][index] = False
        return FilterMask(keep)

    def __and__(self, other: FilterMask) -> FilterMask:
        """Keep what both keep; a layer unknown to one side counts as kept there."""
        return self._combine(other, torch.logical_and)

    def __or__(self, other: FilterMask) -> FilterMask:
        """Keep what either keeps; a layer unknown to one side counts as kept there."""
        return self._combine(other, torch.logical_or)

    def equals(self, other: FilterMask) -> bool:
        """Say whether both remove the same filters."""
        return set(self.removed()) == set(other.removed())

    def _combine(self, other: FilterMask, operation: object) -> FilterMask:
        assert callable(operation)
        names = list(dict.fromkeys((*self.keep, *other.keep)))
        for name in names:
            if name in self.keep and name in other.keep and len(self.keep[name]) != len(other.keep[name]):
                raise InvalidInputError(
                    f"layer {name!r} has {len(self.keep[name])} filters in one mask and "
                    f"{len(other.keep[name])} in the other; they belong to different models."
                )
        return FilterMask({n: operation(_or_ones(self, other, n), _or_ones(other, self, n)) for n in names})

    def apply(
        self, model: nn.Module, filter_map: FilterMap, *, prune_mode: PruneMode = "silence"
    ) -> nn.Module:
        """Return a copy of ``model`` without the removed filters.

        Args:
            model: The network that ``filter_map`` was found in; left untouched.
            filter_map: From ``find_filters``.
            prune_mode: What is set to zero; see ``PruneMode``.

        Raises:
            InvalidInputError: If the mask does not fit the filters.
            UnsupportedModelError: If it names a layer that the model lacks.
        """
        pruned = copy.deepcopy(model)
        self.clear(pruned, filter_map, prune_mode=prune_mode)
        return pruned

    @torch.no_grad()
    def clear(self, model: nn.Module, filter_map: FilterMap, *, prune_mode: PruneMode = "silence") -> None:
        """Remove the filters from ``model`` itself; see ``apply``."""
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, kept in self.keep.items():
            group = filter_map.group(name)
            if len(kept) != group.filters:
                raise InvalidInputError(
                    f"the mask has {len(kept)} filters for layer {name!r}, the model {group.filters}; "
                    "they belong to different models."
                )
            for tensor_name in cleared_tensors(group, prune_mode):
                tensor = tensors[tensor_name]
                tensor[(~kept).to(tensor.device)] = 0


def _or_ones(mask: FilterMask, other: FilterMask, name: str) -> Tensor:
    return mask.keep[name] if name in mask.keep else torch.ones_like(other.keep[name])


def cleared_tensors(group: FilterGroup, prune_mode: PruneMode) -> list[str]:
    """Return the names of the tensors whose entries a removed filter of ``group`` sets to zero."""
    own = [name for name in (group.weight, group.bias) if name]
    if prune_mode == "weight" or not group.norms:
        return own
    scales = [norm.weight for norm in group.norms if norm.weight]
    shifts = [name for norm in group.norms for name in _shift(norm) if name]
    if prune_mode == "norm_scale":
        return scales or own
    return ([] if prune_mode == "norm" and scales else own) + scales + shifts


def _shift(norm: Norm) -> tuple[str | None, ...]:
    # A batch norm without scale and shift maps 0 to -mean/std: clearing the mean makes that 0.
    return (norm.bias,) if norm.weight else (norm.running_mean,)


def masked_tensors(
    tensors: Mapping[str, Tensor],
    filter_map: FilterMap,
    masks: Mapping[str, Tensor],
    *,
    fold: bool = True,
) -> dict[str, Tensor]:
    """Return the tensors that change when each filter's weight is multiplied by its mask; differentiable.

    With ``fold``, where a batch norm reads the filter directly, the product goes into its scale and shift:
    the gradient of the mask then needs no gradient of the weights, which halves the cost of a backward
    pass. That is exact for norms in eval mode only.

    Args:
        tensors: All parameters and buffers of the model by name.
        filter_map: From ``find_filters``.
        masks: Layer name to float ``(filters,)``.
        fold: Use the batch norms, which must be in eval mode.

    Returns:
        Replacements for ``torch.func.functional_call``.
    """
    replaced: dict[str, Tensor] = {}
    for name, mask in masks.items():
        group = filter_map.group(name)
        norm = group.norms[0] if group.norms else None
        if norm is None or not norm.foldable or not fold:
            weight = tensors[group.weight]
            replaced[group.weight] = weight * mask.view(-1, *[1] * (weight.ndim - 1))
            continue
        assert norm.weight
        assert norm.bias
        assert norm.running_mean
        assert norm.running_var
        bias = tensors[group.bias] if group.bias else 0.0
        scale = tensors[norm.weight] / (tensors[norm.running_var] + norm.eps).sqrt()
        # scale (m z + b - mean) + shift with z = W x, written with z + b as the norm's input.
        replaced[norm.weight] = mask * tensors[norm.weight]
        replaced[norm.bias] = tensors[norm.bias] + scale * (1 - mask) * (bias - tensors[norm.running_mean])
    return replaced
