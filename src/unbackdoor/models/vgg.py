"""VGG networks (Simonyan & Zisserman, ICLR 2015, arXiv 1409.1556) for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_STAGES: dict[int, tuple[int, ...]] = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}


class VGG(nn.Module):
    """Stacked 3x3 convolutions and one linear head, in the layout common for CIFAR.

    Args:
        depth: 11, 13 or 16.
        num_classes: Outputs of the head.
        width: Channels of the first stage (64 in the paper); they double up to 8 times that.
        in_channels: Channels of the images.
        norm: Follow each convolution by a batch norm.
    """

    def __init__(
        self, depth: int, *, num_classes: int = 10, width: int = 64, in_channels: int = 3, norm: bool = True
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = in_channels
        for stage, convs in enumerate(_STAGES[depth]):
            outputs = width * min(2**stage, 8)
            for _ in range(convs):
                layers.append(nn.Conv2d(inputs, outputs, 3, padding=1))
                layers += [nn.BatchNorm2d(outputs)] if norm else []
                layers.append(nn.ReLU(inplace=True))
                inputs = outputs
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, K)`` for normalised images ``(N, C, H, W)``."""
        features = self.features(x).mean((2, 3))
        logits: Tensor = self.classifier(torch.flatten(features, 1))
        return logits
