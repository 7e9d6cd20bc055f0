"""Densely connected networks (Huang et al., CVPR 2017, arXiv 1608.06993) for small images: DenseNet-BC.

Norm and activation come before each convolution, which reads the outputs of all layers before it: a filter's
norm is never its own. Methods that need a norm after each filter have to say what they do here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DenseLayer(nn.Module):
    """1x1 convolution to four times the growth, then a 3x3 one to the growth, each after its norm."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with the new channels behind it."""
        new = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat([x, new], 1)


class Transition(nn.Module):
    """Norm, 1x1 convolution to half of the channels, and average pooling."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, inputs // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return maps of half the size."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """A densely connected classifier.

    Args:
        depths: Layers in each of the blocks.
        num_classes: Outputs of the head.
        width: Channels of the stem, twice the growth rate k; even.
        in_channels: Channels of the images.
    """

    def __init__(
        self, depths: Sequence[int], *, num_classes: int = 10, width: int = 24, in_channels: int = 3
    ) -> None:
        super().__init__()
        growth = max(1, width // 2)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        channels = width
        stages: list[nn.Module] = []
        for block, depth in enumerate(depths):
            for _ in range(depth):
                stages.append(DenseLayer(channels, growth))
                channels += growth
            if block < len(depths) - 1:
                stages.append(Transition(channels))
                channels //= 2
        self.layers = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, K)`` for normalised images ``(N, C, H, W)``."""
        x = F.relu(self.bn(self.layers(self.conv1(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits
