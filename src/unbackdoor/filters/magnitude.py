"""How large a filter is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from unbackdoor.filters.groups import FilterGroup, FilterMap


@torch.no_grad()
def magnitudes(
    model: nn.Module, filter_map: FilterMap, *, p: float = 2.0, folded: bool = False, head: bool = False
) -> dict[str, Tensor]:
    """Return the l_p norm of every filter's weight (MNP, section 3.2: ``||theta^(i,j)||_p``).

    Args:
        model: The network.
        filter_map: From ``find_filters``.
        p: Order of the norm, positive.
        folded: Multiply by the scale of a directly following batch norm in eval mode, |gamma| / sigma.
            This is the norm of the filter that the network effectively applies.
        head: Include the head's rows.

    Returns:
        Layer name to float32 ``(filters,)`` on the model's device.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    groups = filter_map.groups if head else filter_map.prunable
    return {group.name: _norm_of(group, tensors, p, folded) for group in groups}


def _norm_of(group: FilterGroup, tensors: Mapping[str, Tensor], p: float, folded: bool) -> Tensor:
    norm: Tensor = tensors[group.weight].detach().float().flatten(1).norm(p=p, dim=1)
    following = group.norms[0] if group.norms else None
    if folded and following is not None and following.foldable:
        assert following.weight
        assert following.running_var
        sigma = (tensors[following.running_var] + following.eps).sqrt()
        norm = norm * tensors[following.weight].detach().abs() / sigma
    return norm


def layer_normalised(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divide each layer's values by their l2 norm (MNP, Eqs. 12 and 13, with the sum over filters j).

    The paper prints a sum over layers i in Eq. 12; its text and Eq. 13 mean the filters of one layer.
    A layer of zeros stays zero.
    """
    return {name: v / v.norm().clamp_min(torch.finfo(v.dtype).tiny) for name, v in values.items()}
