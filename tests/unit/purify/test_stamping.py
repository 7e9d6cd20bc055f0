from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unbackdoor.inversion import InvertedTrigger
from unbackdoor.purify.stamping import joined, largest_success, stamped
from unbackdoor.types import LabelledImages

CLEAN = LabelledImages(torch.zeros(6, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2]))


def painted(target: int, value: float) -> InvertedTrigger:
    mask, pattern = torch.ones(1, 2, 2), torch.full((3, 2, 2), value)
    return InvertedTrigger(target, mask, pattern, 4.0, 1.0, reached=True, steps=1)


def test_triggers_of_a_class_share_its_images() -> None:
    shown = stamped(CLEAN, [painted(1, 0.5), painted(0, 0.25), painted(1, 1.0)])
    colours = shown.images[:, 0, 0, 0].tolist()
    assert colours == 4 * [0.25] + 2 * [0.5] + 2 * [1.0]
    assert shown.labels.tolist() == [1, 2, 1, 2, 0, 0, 2, 2]


def test_stored_and_stamped_images_are_joined_as_floats() -> None:
    stored = LabelledImages(torch.full((2, 3, 2, 2), 255, dtype=torch.uint8), torch.tensor([0, 1]))
    both = joined(stored, CLEAN)
    assert both.images[:, 0, 0, 0].tolist() == [1.0, 1.0] + 6 * [0.0]
    assert both.labels.tolist() == [0, 1, 0, 1, 2, 0, 1, 2]


class White(nn.Module):
    """White images are of class 1, all others of class 0."""

    def forward(self, x: Tensor) -> Tensor:
        white = (x.mean((1, 2, 3)) > 0.9).float()
        return torch.stack([1 - white, white], 1)


@pytest.mark.parametrize(("values", "rate"), [([0.5, 1.0], 1.0), ([0.5], 0.0), ([], None)])
def test_the_success_is_that_of_the_trigger_that_works_best(values: list[float], rate: float | None) -> None:
    assert largest_success(White(), CLEAN, [painted(1, value) for value in values]) == rate
