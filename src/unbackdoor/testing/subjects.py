"""What methods are tried on: a small network with awkward flags, small data, and memories of both."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from unbackdoor import rng
from unbackdoor.types import LabelledImages

CLASSES = 4
COUNT = 33
"""Images in most checks: leaves one over in batches of 8, 16 and 32."""


def small_network(channels: int = 3, classes: int = CLASSES) -> nn.Sequential:
    """Return two convolutions with batch norms, dropout and a linear head, freshly initialised."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, classes),
    )  # fmt: skip


class FunctionalNetwork(nn.Module):
    """A convolution whose kernel is no ``weight`` of a module, a batch norm and a linear head."""

    def __init__(self, channels: int = 3, classes: int = CLASSES) -> None:
        super().__init__()
        self.kernel = nn.Parameter(0.2 * torch.randn(16, channels, 3, 3))
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, classes)``."""
        features = functional.relu(self.norm(functional.conv2d(x, self.kernel)))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


def functional_model() -> FunctionalNetwork:
    """Return a ``FunctionalNetwork`` in eval mode."""
    with rng.isolated(rng.generator(0)):
        return FunctionalNetwork().eval()


def linear_model() -> nn.Sequential:
    """Return a network in eval mode that has nothing before its head."""
    with rng.isolated(rng.generator(0)):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, CLASSES)).eval()


def certain_model() -> tuple[nn.Sequential, LabelledImages]:
    """Return a network whose logits are so large that its loss on the data, all of it right, is exactly 0."""
    model, data = awkward_model(), small_data()
    head = model[-1]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.mul_(1e7)
        head.bias.zero_()
        logits = copy.deepcopy(model).eval()(data.floats())
        # So that it does not answer one class alone.
        head.bias.sub_(logits.mean(0))
        answers = (logits + head.bias).argmax(1)
    return model, LabelledImages(data.images, answers)


def awkward_model(channels: int = 3, classes: int = CLASSES) -> nn.Sequential:
    """Return a ``small_network`` in eval mode but for one layer, with one frozen parameter."""
    with rng.isolated(rng.generator(0)):
        model = small_network(channels, classes).eval()
    model[1].train()
    first = model[0]
    assert isinstance(first, nn.Conv2d)
    first.weight.requires_grad_(False)
    return model


def small_data(
    count: int = COUNT, *, channels: int = 3, classes: int = CLASSES, as_floats: bool = False
) -> LabelledImages:
    """Return random images of 12 pixels a side, with every class among the labels."""
    generator = rng.generator(count)
    images = torch.randint(0, 256, (count, channels, 12, 12), generator=generator, dtype=torch.uint8)
    data = LabelledImages(images, torch.arange(count) % classes)
    return LabelledImages(data.floats(), data.labels) if as_floats else data


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All of a model that a method could change."""

    tensors: dict[str, Tensor]
    training: dict[str, bool]
    requires_grad: dict[str, bool]
    has_gradient: dict[str, bool]

    @staticmethod
    def of(model: nn.Module) -> Snapshot:
        """Remember ``model``."""
        return Snapshot(
            {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
            modes_of(model),
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            {name: parameter.grad is not None for name, parameter in model.named_parameters()},
        )

    def check(self, model: nn.Module) -> None:
        """Raise AssertionError if ``model`` is not as it was."""
        now = Snapshot.of(model)
        check_same_tensors(self.tensors, now.tensors, "the input model's state dict changed")
        for what in ("training", "requires_grad", "has_gradient"):
            old, new = getattr(self, what), getattr(now, what)
            changed = sorted(name for name in old if old[name] != new.get(name))
            assert not changed, f"the input model's {what} flags changed at {changed}; work on a copy."


def modes_of(model: nn.Module) -> dict[str, bool]:
    """Return the train/eval flag of every submodule."""
    return {name: module.training for name, module in model.named_modules()}


def check_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor], complaint: str) -> None:
    """Raise AssertionError with ``complaint`` unless both hold the same names and bits."""
    assert set(one) == set(other), f"{complaint}: names differ in {sorted(set(one) ^ set(other))}."
    changed = sorted(name for name in one if not same_bits(one[name], other[name]))
    assert not changed, f"{complaint}: {changed}."


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors agree in type, shape and every value, NaN equal to NaN."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(torch.equal(one.nan_to_num(), other.nan_to_num()) and torch.equal(one != one, other != other))  # noqa: PLR0124 - finds NaN


@contextmanager
def global_randomness_untouched() -> Iterator[None]:
    """Raise AssertionError if the block moves the global state of torch, numpy or ``random``."""
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002 - read only
    yield
    after = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002 - read only
    hint = "draw from the generator, and put what cannot into rng.isolated(generator)."
    assert torch.equal(before[0], after[0]), f"torch's global random state changed; {hint}"
    assert before[1] == after[1], f"numpy's global random state changed; {hint}"
    assert before[2] == after[2], f"the global state of Python's random changed; {hint}"
