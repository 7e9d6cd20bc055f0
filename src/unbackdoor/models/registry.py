"""The architectures that can be named on the command line and in benchmark cells."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from unbackdoor.errors import InvalidInputError
from unbackdoor.models.densenet import DenseNet
from unbackdoor.models.resnet import BasicBlock, Bottleneck, PreActResNet, ResNet
from unbackdoor.models.vgg import VGG
from unbackdoor.models.vit import ViT

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "resnet10": lambda **options: ResNet(BasicBlock, (1, 1, 1, 1), **options),
    "resnet18": lambda **options: ResNet(BasicBlock, (2, 2, 2, 2), **options),
    "resnet34": lambda **options: ResNet(BasicBlock, (3, 4, 6, 3), **options),
    "resnet50": lambda **options: ResNet(Bottleneck, (3, 4, 6, 3), **options),
    "preactresnet18": lambda **options: PreActResNet((2, 2, 2, 2), **options),
    "preactresnet34": lambda **options: PreActResNet((3, 4, 6, 3), **options),
    "vgg11": lambda **options: VGG(11, norm=False, **options),
    "vgg11_bn": lambda **options: VGG(11, **options),
    "vgg16": lambda **options: VGG(16, norm=False, **options),
    "vgg16_bn": lambda **options: VGG(16, **options),
    "densenet40": lambda **options: DenseNet((6, 6, 6), **options),
    "vit_small": lambda **options: ViT(6, 4, **options),
}
"""Name to constructor; all take ``num_classes``, ``width`` and ``in_channels``."""


def build(name: str, **options: Any) -> nn.Module:
    """Build an architecture of ours with fresh weights (from torch's global generator).

    Args:
        name: A key of ``ARCHITECTURES``.
        options: ``num_classes``, ``width``, ``in_channels``; for ResNets also ``stem`` and ``layout``.

    Raises:
        InvalidInputError: If the name is unknown; the message suggests near misses.
    """
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InvalidInputError(
            f"unknown architecture {name!r}: {hint}known are {', '.join(ARCHITECTURES)}; for a network of "
            "your own give package.module:function or path/to/file.py:function."
        )
    try:
        return ARCHITECTURES[name](**options)
    except TypeError as error:
        raise InvalidInputError(f"architecture {name!r} cannot be built with {options}: {error}.") from error
