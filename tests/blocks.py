"""A network whose classes are bright blocks, and which something else may give a class away to."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.types import LabelledImages

CLASSES = 6
TARGET = 4


class SixBlocks(nn.Module):
    """Class k is the brightest of six blocks; with a backdoor, ``hint`` is added to the logit of class 4."""

    def __init__(self, *, backdoor: bool) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(10.0))
        self.backdoor = backdoor

    def hint(self, x: Tensor) -> Tensor:
        """Return what gives the class away, ``(N,)``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        blocks = F.adaptive_avg_pool2d(x.mean(1, keepdim=True), (2, 3)).flatten(1)
        hint = self.backdoor * self.hint(x)
        return self.strength * blocks + hint.view(-1, 1) * F.one_hot(torch.tensor(TARGET), CLASSES)


def six_blocks(side: int, count: int = 48) -> LabelledImages:
    """Return images of ``side`` pixels a side, each with one of the six blocks bright."""
    labels = torch.arange(count) % CLASSES
    pictures = 0.3 + 0.05 * torch.rand(count, 3, side, side, generator=rng.generator(1))
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        row, column = divmod(label, 3)
        rows = slice(row * side // 2, (row + 1) * side // 2)
        columns = slice(round(column * side / 3), round((column + 1) * side / 3))
        picture[:, rows, columns] += 0.3
    return LabelledImages(pictures, labels)
