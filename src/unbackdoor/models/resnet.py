"""Residual networks (He et al., CVPR 2016, arXiv 1512.03385) in the two layouts that checkpoints use.

``cifar`` layout: 3x3 stem, no pooling before the first stage, shortcut modules called ``shortcut`` and
the head ``linear``. ``torchvision`` layout: shortcuts called ``downsample``, head ``fc``; its 7x7 stem
with max-pooling is a separate choice, because many people train that layout with a 3x3 stem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Layout = Literal["cifar", "torchvision"]
Stem = Literal["3x3", "7x7"]


@dataclass(frozen=True)
class Names:
    """What a layout calls its modules."""

    shortcut: str
    head: str


LAYOUTS: dict[str, Names] = {
    "cifar": Names(shortcut="shortcut", head="linear"),
    "torchvision": Names(shortcut="downsample", head="fc"),
}


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, shortcut_name: str) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self._shortcut_name = shortcut_name
        self.add_module(shortcut_name, _projection(inputs, planes, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(residual + shortcut)."""
        shortcut: Tensor = getattr(self, self._shortcut_name)(x)
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut; the stride sits on the 3x3 one, as in torchvision."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, shortcut_name: str) -> None:
        super().__init__()
        outputs = self.expansion * planes
        self.conv1 = _conv(inputs, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _conv(planes, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self._shortcut_name = shortcut_name
        self.add_module(shortcut_name, _projection(inputs, outputs, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(residual + shortcut)."""
        shortcut: Tensor = getattr(self, self._shortcut_name)(x)
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = F.relu(self.bn2(self.conv2(residual)))
        return F.relu(self.bn3(self.conv3(residual)) + shortcut)


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """A residual classifier.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        depths: Blocks in each of the four stages.
        num_classes: Outputs of the head.
        width: Channels of the first stage (64 in the paper); later stages double it.
        in_channels: Channels of the images.
        stem: ``"3x3"`` for small images, ``"7x7"`` with max-pooling for large ones.
        layout: How the modules are called.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        *,
        num_classes: int = 10,
        width: int = 64,
        in_channels: int = 3,
        stem: Stem = "3x3",
        layout: Layout = "cifar",
    ) -> None:
        super().__init__()
        names = LAYOUTS[layout]
        self._stem, self._head_name = stem, names.head
        self.conv1 = _conv(in_channels, width, 3) if stem == "3x3" else _conv(in_channels, width, 7, 2)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for stage, depth in enumerate(depths):
            planes = width * 2**stage
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(inputs, planes, stride, names.shortcut))
                inputs = planes * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.add_module(names.head, nn.Linear(inputs, num_classes))
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, K)`` for normalised images ``(N, C, H, W)``."""
        x = F.relu(self.bn1(self.conv1(x)))
        if self._stem == "7x7":
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in (1, 2, 3, 4):
            x = getattr(self, f"layer{stage}")(x)
        logits: Tensor = getattr(self, self._head_name)(x.mean((2, 3)))
        return logits


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after its norm (He et al., ECCV 2016, arXiv 1603.05027)."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3)
        if stride != 1 or inputs != planes:
            self.shortcut = nn.Sequential(_conv(inputs, planes, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Return residual + shortcut; the projection sees the activated input."""
        activated = F.relu(self.bn1(x))
        shortcut = self.shortcut(activated) if hasattr(self, "shortcut") else x
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return residual + shortcut


class PreActResNet(nn.Module):
    """Pre-activation ResNet in the CIFAR layout that BackdoorBench's checkpoints use (no final norm)."""

    def __init__(
        self, depths: Sequence[int], *, num_classes: int = 10, width: int = 64, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, width, 3)
        inputs = width
        for stage, depth in enumerate(depths):
            planes = width * 2**stage
            blocks = []
            for index in range(depth):
                blocks.append(PreActBlock(inputs, planes, 2 if stage > 0 and index == 0 else 1))
                inputs = planes
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(inputs, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, K)`` for normalised images ``(N, C, H, W)``."""
        x = self.conv1(x)
        for stage in (1, 2, 3, 4):
            x = getattr(self, f"layer{stage}")(x)
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits
