from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.detect.plausibility import check_plausible
from unbackdoor.models import NormalisedModel
from unbackdoor.rates import Rate
from unbackdoor.testing import planted_backdoor
from unbackdoor.types import LabelledImages

PLANTED = planted_backdoor(infected=False)
CLEAN = PLANTED.clean_data(160, rng.generator(0))


class Wanting(nn.Module):
    """The planted network behind a layer that undoes a normalisation: it wants normalised images."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.network, self.mean, self.std = PLANTED.model, mean, std

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images * self.std + self.mean)
        return logits


class Permuted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = PLANTED.model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits.roll(3, dims=1)


class Broken(Permuted):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * float("nan")


def test_a_model_that_fits_is_plausible() -> None:
    found = check_plausible(PLANTED.model, CLEAN)
    assert (found.problem, found.warnings, found.accuracy) == ("", (), Rate(160, 160))


def test_a_missing_normalisation_is_named() -> None:
    # A mean and deviation that only "half" comes near.
    found = check_plausible(Wanting(0.5, 0.5), CLEAN)
    assert found.accuracy.value < 0.3
    assert "the model probably expects normalised images" in found.problem
    assert "with --normalize" in found.problem


def test_a_model_with_a_normalisation_is_told_of_all_causes() -> None:
    wrong = NormalisedModel(PLANTED.model, (3.0,), (0.1,))
    found = check_plausible(wrong, CLEAN)
    assert "with --normalize" not in found.problem
    assert "probably the normalisation (--normalize or --mean and --std), the label order" in found.problem


def test_a_permuted_label_order_is_recognised() -> None:
    found = check_plausible(Permuted(), CLEAN)
    assert found.accuracy.value == 0.0
    assert "100.0% would be right if the classes were ordered otherwise" in found.problem
    assert "--class-names" in found.problem


def test_outputs_that_are_no_numbers_are_a_problem() -> None:
    found = check_plausible(Broken(), CLEAN)
    assert found.problem == "the model's outputs are not finite numbers; the checkpoint is damaged"


def test_a_mediocre_accuracy_is_a_warning_alone() -> None:
    labels = CLEAN.labels.clone()
    labels[: len(labels) // 2] = torch.randint(0, 8, (len(labels) // 2,), generator=rng.generator(1))
    found = check_plausible(PLANTED.model, LabelledImages(CLEAN.images, labels))
    assert found.problem == ""
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith("The model is right on only")


@pytest.mark.parametrize("classes", [4, 8])
def test_a_constant_model_is_no_plausible_model(classes: int) -> None:
    constant = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, classes))
    with torch.no_grad():
        for parameter in constant.parameters():
            parameter.zero_()
    data = planted_backdoor(classes=classes).clean_data(80, rng.generator(0))
    assert check_plausible(constant, data).problem
