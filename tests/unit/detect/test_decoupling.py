from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.detect.decoupling import (
    Decoupling,
    Split,
    answers_from,
    counts_of,
    foreign_shares,
    learn_masks,
    masked_sums,
    split_at_head,
)
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.types import LabelledImages


def random_split(seed: int = 0) -> Split:
    generator = rng.generator(seed)
    weight, bias, features = (torch.randn(*size, generator=generator) for size in ((4, 6), (4,), (20, 6)))
    labels = torch.arange(20) % 4
    return Split("head", weight, bias, features + weight[labels], labels)


def linear_model(classes: int = 3, bias: bool = True) -> nn.Sequential:
    with rng.isolated(rng.generator(0)):
        return nn.Sequential(nn.Flatten(), nn.Linear(4, classes, bias=bias)).eval()


def images(n: int = 5) -> LabelledImages:
    return LabelledImages(torch.rand(n, 1, 2, 2, generator=rng.generator(0)), torch.arange(n) % 3)


def test_shares_by_hand() -> None:
    # Class 0: two of four images go to 1, one to 2. Class 1 (one image): to 2. Class 2: no images.
    counts = torch.tensor([[1, 2, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    assert foreign_shares(counts).tolist() == [0.0, 0.5, (0.25 + 1) / 2]
    # No answer is no class, but the image counts.
    assert foreign_shares(torch.tensor([[0, 1, 3], [0, 0, 5]])).tolist() == [0.0, 0.25]
    assert foreign_shares(torch.tensor([[3, 1, 0], [0, 0, 0]])).tolist() == [0.0, 0.25]


def test_counts_of_several_masks_are_summed() -> None:
    answers, labels = torch.tensor([[0, 1, 2], [0, 0, 2]]), torch.tensor([0, 1, 1])
    assert counts_of(answers, labels, 2).tolist() == [[2, 0, 0], [1, 1, 2]]


def test_masking_weights_is_masking_features() -> None:
    split, masks = random_split(), torch.rand(3, 6, generator=rng.generator(1))
    expected = torch.stack([(mask * split.features) @ split.weight.T for mask in masks])
    torch.testing.assert_close(masked_sums(split.weight, split.features, masks), expected)


def objective(split: Split, mask: Tensor) -> Tensor:
    kept = F.linear(mask * split.features, split.weight, split.bias)
    left = F.linear((1 - mask) * split.features, split.weight, split.bias)
    return F.cross_entropy(kept, split.labels) - F.cross_entropy(left, split.labels)


@pytest.mark.parametrize("penalty", [0.0, 0.75])
def test_the_masks_are_those_of_the_written_out_objective(penalty: float) -> None:
    split, options = random_split(), Decoupling(steps=7, learning_rate=0.05, penalty=penalty, starts=2)
    learnt = learn_masks(split, options, generator=rng.generator(3))
    for start, found in zip(torch.rand(2, 6, generator=rng.generator(3)), learnt, strict=True):
        mask = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([mask], lr=0.05)
        for _ in range(7):
            size = mask.sum()
            loss = objective(split, mask) + penalty * size / size.item()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            mask.data.clamp_(0, 1)
        torch.testing.assert_close(found, mask.detach(), rtol=1e-3, atol=1e-4)


def test_learning_lowers_the_objective_and_a_penalty_the_masks() -> None:
    split = random_split()
    start = learn_masks(split, Decoupling(steps=1, learning_rate=1e-9), generator=rng.generator(0))
    end = learn_masks(split, Decoupling(steps=100), generator=rng.generator(0))
    shrunk = learn_masks(split, Decoupling(steps=400, penalty=100.0), generator=rng.generator(0))
    assert all(objective(split, b) < objective(split, a) for a, b in zip(start, end, strict=True))
    assert float(shrunk.sum()) < 0.1 * float(end.sum())
    assert float(end.min()) >= 0
    assert float(end.max()) <= 1


def test_silent_features_give_no_answer() -> None:
    # Two classes, three features; the masks leave the last one, which is silent on the second image.
    split = Split(
        "head",
        torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 2.0]]),
        torch.zeros(2),
        torch.tensor([[3.0, 0.0, 1.0], [3.0, 0.0, 0.0], [0.0, 3.0, 1.0]]),
        torch.tensor([0, 0, 1]),
    )
    found = answers_from(split, split.features, torch.tensor([[0.0, 0.0, 1.0]]))
    assert found.shares.tolist() == [0.0, 0.5]
    assert found.answered == pytest.approx(2 / 3)
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.problem == ""
    nothing = answers_from(split, split.features, torch.zeros(1, 3))
    assert (nothing.answered, nothing.accuracy) == (0.0, 0.0)
    assert "only 0% of the clean images" in nothing.problem
    # Where the bias decides, masked features have no answer, and the network itself has.
    biased = replace(split, bias=torch.tensor([9.0, -9.0]))
    assert answers_from(biased, split.features, torch.ones(1, 3)).answered == pytest.approx(2 / 3)
    assert answers_from(biased, split.features, None).shares.tolist() == [1.0, 0.0]
    # Silence is measured by what the untouched features do.
    assert answers_from(split, 1e-3 * split.features, None).answered == 0.0


def test_features_that_are_not_finite_are_a_problem() -> None:
    split = random_split()
    broken = split.features.clone()
    broken[0, 0] = math.inf
    assert "not finite" in answers_from(split, broken, torch.ones(1, 6)).problem
    assert "not finite" in replace(split, features=broken).problem(4)
    assert "4 classes" in split.problem(5)
    assert split.problem(4) == ""


@pytest.mark.parametrize("bias", [True, False])
def test_the_split_reproduces_the_model(bias: bool) -> None:
    model, clean = linear_model(bias=bias), images()
    split = split_at_head(model, clean, purpose="a test")
    torch.testing.assert_close(F.linear(split.features, split.weight, split.bias), model(clean.images))
    assert (split.name, split.classes) == ("1", 3)


def test_log_probabilities_are_answers_of_the_head_and_temperatures_are_not() -> None:
    class Cooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear_model()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(x)
            return logits / 0.05

    split_at_head(nn.Sequential(linear_model(), nn.LogSoftmax(1)).eval(), images(), purpose="a test")
    with pytest.raises(UnsupportedModelError, match="does not answer with what"):
        split_at_head(Cooled(), images(), purpose="a test")


def test_options_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="steps and starts"):
        Decoupling(starts=0)
    with pytest.raises(InvalidInputError, match="penalty >= 0"):
        Decoupling(penalty=-1.0)
    with pytest.raises(InvalidInputError, match="learning_rate > 0"):
        Decoupling(learning_rate=math.nan)
