"""Runs of clean suppression made of the confusion matrices that were seen."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from unbackdoor.suppression import Check, Suppressed


def right(classes: int, each: int) -> Tensor:
    return each * torch.eye(classes, dtype=torch.int64)


def run(*matrices: Tensor, reason: Literal["accuracy", "budget", "not finite"] = "accuracy") -> Suppressed:
    return Suppressed(nn.Identity(), tuple(Check(i, m) for i, m in enumerate(matrices)), reason)
