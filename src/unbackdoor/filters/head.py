"""The linear head of a network, and the features that it reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unbackdoor.compute import EVALUATION_BATCH, logits_of
from unbackdoor.errors import UnsupportedModelError
from unbackdoor.filters.groups import find_filters
from unbackdoor.types import as_float


def linear_head(model: nn.Module, images: Tensor) -> str:
    """Return the name of the linear layer that yields the logits.

    Args:
        model: Takes float images in [0, 1]; left untouched.
        images: ``(N, C, H, W)``, uint8 or float32 in [0, 1], at least one; the first is used.

    Raises:
        UnsupportedModelError: If the last layer is not linear.
    """
    head = find_filters(model, as_float(images[:1])).head
    if head is None or not isinstance(dict(model.named_modules()).get(head.name), nn.Linear):
        raise UnsupportedModelError(
            "this method reads features before a linear head, which this network's last layer is not; choose "
            "another method."
        )
    return head.name


def head_features(
    model: nn.Module, head: str, images: Tensor, *, batch_size: int = EVALUATION_BATCH
) -> Tensor:
    """Return what the head reads, float32 ``(N, F)`` on the model's device, in eval mode.

    Args:
        model: Takes float images in [0, 1]; left untouched.
        head: From ``linear_head``.
        images: ``(N, C, H, W)``, uint8 or float32 in [0, 1].
        batch_size: Images a pass.

    Raises:
        UnsupportedModelError: If the head does not read flat features once an image.
    """
    parts: list[Tensor] = []
    handle = model.get_submodule(head).register_forward_pre_hook(
        lambda _, inputs: parts.append(inputs[0].detach())
    )
    try:
        logits_of(model, images, batch_size=batch_size)
    finally:
        handle.remove()
    if any(part.ndim != 2 for part in parts) or sum(len(part) for part in parts) != len(images):
        raise UnsupportedModelError(
            "this method needs a linear head that reads flat features once an image, and this network's does "
            "not; choose another method."
        )
    return torch.cat(parts).float()
