"""The checks of ``unbackdoor.testing`` catch methods that break the contract."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from unbackdoor.attacks import BadNets
from unbackdoor.testing import (
    ATTACK_CHECKS,
    DETECTOR_CHECKS,
    PURIFIER_CHECKS,
    check_attack,
    check_detector,
    check_purifier,
)
from unbackdoor.train import Recipe
from unbackdoor.types import Detection, Infected, LabelledImages, ModelFn, Progress, Purified, silent

Work = Callable[[nn.Module, LabelledImages, torch.Generator], nn.Module]


def copied(model: nn.Module, clean: LabelledImages, generator: torch.Generator) -> nn.Module:
    return copy.deepcopy(model)


def same(model: nn.Module, clean: LabelledImages, generator: torch.Generator) -> nn.Module:
    return model


def put_to_eval(model: nn.Module, clean: LabelledImages, generator: torch.Generator) -> nn.Module:
    return copy.deepcopy(model.eval())


def returned_in_eval(model: nn.Module, clean: LabelledImages, generator: torch.Generator) -> nn.Module:
    return copy.deepcopy(model).eval()


def shrunk_input(model: nn.Module, clean: LabelledImages, generator: torch.Generator) -> nn.Module:
    with torch.no_grad():
        next(model.parameters()).mul_(0.5)
    return copy.deepcopy(model)


def doubled(model: nn.Module, clean: LabelledImages, generator: torch.Generator) -> nn.Module:
    return copy.deepcopy(model).double()


def unseeded(model: nn.Module, clean: LabelledImages, generator: torch.Generator) -> nn.Module:
    out = copy.deepcopy(model)
    with torch.no_grad():
        next(out.parameters()).add_(torch.rand(()))
    return out


def mode_dependent(model: nn.Module, clean: LabelledImages, generator: torch.Generator) -> nn.Module:
    out = copy.deepcopy(model)
    with torch.no_grad():
        next(out.parameters()).mul_(0.5 if model.training else 1.0)
    return out


def careless(model: nn.Module, clean: LabelledImages, generator: torch.Generator) -> nn.Module:
    model(clean.floats())[0, int(clean.labels.max())].item()
    return copy.deepcopy(model)


@dataclass(frozen=True)
class Odd:
    """A purifier that does what it is told.

    Args:
        work: What it does.
    """

    name: ClassVar[str] = "odd"
    work: Work = copied

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        return Purified(self.work(model, clean, generator), None, {}, {})


@pytest.mark.parametrize(
    ("work", "check", "sentence"),
    [
        (same, "returns_new_module", "the input model itself was returned"),
        (put_to_eval, "leaves_input_untouched", "training flags changed"),
        (shrunk_input, "leaves_input_untouched", "state dict changed"),
        (returned_in_eval, "keeps_modes", "train/eval modes"),
        (doubled, "keeps_device_and_dtype", "dtype of"),
        (unseeded, "leaves_global_randomness_untouched", "torch's global random state changed"),
        (unseeded, "same_seed_gives_same_result", "equal seeds gave other weights"),
        (mode_dependent, "works_in_train_mode", "depends on the mode"),
        (copied, "refuses_bad_input", "an empty set of clean images was accepted"),
        (careless, "refuses_bad_input", "ended in RuntimeError|ended in IndexError"),
    ],
)
def test_purifier_checks_catch(work: Work, check: str, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        PURIFIER_CHECKS[check](Odd(work))
    with pytest.raises(AssertionError):
        check_purifier(Odd(work))


def test_a_function_in_a_field_does_not_round_trip() -> None:
    with pytest.raises(AssertionError, match="is no expression"):
        PURIFIER_CHECKS["repr_round_trips"](Odd())


class NoDataclass:
    name = "No Snake"

    def score(self, model: nn.Module, clean: LabelledImages, **options: object) -> Detection:
        return Detection(float("nan"), 0.5, "")


@dataclass
class Mutable:
    """Says nothing about its field."""

    needed: int
    name: ClassVar[str] = "mutable"


@pytest.mark.parametrize(
    ("method", "check", "sentence"),
    [
        (NoDataclass(), "is_frozen_dataclass", "is no dataclass"),
        (NoDataclass(), "has_name", "snake_case"),
        (NoDataclass(), "says_what_it_means", "nothing says why"),
        (NoDataclass(), "refuses_bad_input", "was accepted"),
        (Mutable(3), "is_frozen_dataclass", "can be changed"),
        (Mutable(3), "is_default_constructible", r"Mutable\(\) fails"),
        (Mutable(3), "documents_fields", r"does not describe \['needed'\]"),
    ],
)
def test_detector_checks_catch(method: object, check: str, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        DETECTOR_CHECKS[check](method)
    with pytest.raises(AssertionError):
        check_detector(method)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Spoiling(BadNets):
    """BadNets that does something wrong.

    Args:
        recipe: Training schedule.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=1, batch_size=16))

    def run(self, train: LabelledImages, model_fn: ModelFn, **options: Any) -> Infected:  # noqa: ANN401
        train.labels[:1] = 3
        infected = super().run(train, model_fn, **options)
        return replace(infected, model=infected.model.train(), trigger=lambda images: images * 2)


@pytest.mark.parametrize(
    ("check", "sentence"),
    [
        ("leaves_data_untouched", "labels were changed"),
        ("model_is_ready", "train mode"),
        ("trigger_is_pure", "leave \\[0, 1\\]"),
        ("documents_fields", "does not describe"),
    ],
)
def test_attack_checks_catch(check: str, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        ATTACK_CHECKS[check](Spoiling())
    with pytest.raises(AssertionError):
        check_attack(Spoiling())
