from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.detect.bti_dbf import BTIDBF
from unbackdoor.detect.calibration import Calibration
from unbackdoor.detect.decoupling import Decoupling
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.testing import planted_backdoor
from unbackdoor.types import Detection, LabelledImages

CLASSES, TARGET = 6, 4


def data(n: int = 60, seed: int = 0) -> LabelledImages:
    """Pixels are features: one a class, one stray a class that lights up for another class, one constant."""
    generator = rng.generator(seed)
    labels = torch.arange(n) % CLASSES
    own = torch.zeros(n, CLASSES)
    own[torch.arange(n), labels] = 0.6 + 0.4 * torch.rand(n, generator=generator)
    stray = torch.zeros(n, CLASSES)
    shift = torch.randint(1, CLASSES, (n,), generator=generator)
    stray[torch.arange(n), (labels + shift) % CLASSES] = 0.2
    constant = 0.15 + 0.1 * torch.rand(n, 1, generator=generator)
    return LabelledImages(torch.cat([own, stray, constant], 1).view(n, 1, 1, -1), labels)


def model(*, infected: bool) -> nn.Sequential:
    """A head that reads the pixels; infected, the constant one pushes the target."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(2 * CLASSES + 1, CLASSES))
    head = network[1]
    assert isinstance(head, nn.Linear)
    weight = torch.cat([10 * torch.eye(CLASSES), 2 * torch.eye(CLASSES), torch.zeros(CLASSES, 1)], 1)
    weight[TARGET, -1] = 8.0 if infected else 0.0
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.zero_()
    return network.eval()


def score(network: nn.Module, clean: LabelledImages, detector: BTIDBF | None = None) -> Detection:
    return (detector or BTIDBF()).score(network, clean, generator=rng.generator(0))


def test_what_is_left_of_an_infected_head_answers_with_the_target() -> None:
    found = score(model(infected=True), data())
    # 8 * 0.15 outweighs every stray feature, 2 * 0.2: all images are answered with the target.
    assert found.score == 1.0
    assert (found.target_class, found.is_backdoored) == (TARGET, True)
    assert found.evidence["accuracy_of_the_complement"] == pytest.approx(1 / CLASSES)
    assert found.p_value is None


def test_what_is_left_of_a_clean_head_errs_in_many_directions() -> None:
    clean = data()
    found = score(model(infected=False), clean)
    assert found.is_backdoored is False
    # The stray features are left; each image is answered with its own.
    answers = clean.images.flatten(1)[:, CLASSES : 2 * CLASSES].argmax(1)
    expected = [
        sum(float((answers[clean.labels == y] == t).float().mean()) for y in range(CLASSES) if y != t)
        / (CLASSES - 1)
        for t in range(CLASSES)
    ]
    assert found.evidence["class_share"] == pytest.approx(expected)
    assert found.score == pytest.approx(max(expected))


def test_the_mix_of_the_clean_images_does_not_matter() -> None:
    clean = data(240)
    few = clean.subset((clean.labels != 1) | (torch.arange(240) < 20))
    assert score(model(infected=True), few).score == 1.0
    assert score(model(infected=False), few).is_backdoored is False


def test_a_mask_that_keeps_all_leaves_nothing_to_read() -> None:
    clean = data()
    pixels = clean.images.clone()
    pixels[..., CLASSES:] = 0
    found = score(model(infected=True), LabelledImages(pixels, clean.labels))
    assert math.isnan(found.score)
    assert "too few to read anything from" in found.undetermined
    assert (found.target_class, found.p_value, found.is_backdoored) == (None, None, None)
    # The planted backdoor is silent on clean images: no false alarm, no false comfort.
    for infected in (True, False):
        planted = planted_backdoor(infected=infected)
        assert score(planted.model, planted.clean_data(48, rng.generator(0))).undetermined


def constant(n: int) -> Tensor:
    return torch.full((n, 1, 1, 2 * CLASSES + 1), 0.5)


def test_few_classes_and_constant_features() -> None:
    clean = data()
    one = score(model(infected=True), clean.subset(torch.tensor([0])))
    assert "of 1 classes" in one.undetermined
    three = score(model(infected=True), clean.subset(clean.labels < 3))
    assert "of 3 classes" in three.undetermined
    allowed = BTIDBF(fewest_classes=3)
    assert score(model(infected=True), clean.subset(clean.labels < 3), allowed).target_class == TARGET
    same = score(model(infected=False), LabelledImages(constant(12), torch.arange(12) % CLASSES))
    # Equal images are answered alike from each of the four masks, so that shares go by quarters.
    shares = same.evidence["class_share"]
    assert same.undetermined == ""
    assert [4 * share % 1 for share in shares] == [0] * CLASSES
    assert (sum(shares), same.score) == (1.0, max(shares))


def test_a_calibration_replaces_the_threshold() -> None:
    calibration = Calibration(tuple(i / 20 for i in range(19)), "nineteen clean models")
    found = score(model(infected=True), data(), BTIDBF(calibration=calibration))
    assert found.threshold_source == "nineteen clean models"
    assert (found.p_value, found.is_backdoored) == (0.05, True)


def test_starts_are_averaged() -> None:
    quick = Decoupling(steps=3)
    scores = [score(model(infected=False), data(), BTIDBF(replace(quick, starts=n))) for n in (1, 8)]
    assert all(len(found.evidence["class_share"]) == CLASSES for found in scores)
    assert scores[0].score != scores[1].score


def test_networks_without_a_linear_head_are_refused() -> None:
    network = nn.Sequential(nn.Conv2d(1, CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(UnsupportedModelError, match="linear head"):
        score(network, data())


def test_options_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="fewest_classes"):
        BTIDBF(fewest_classes=2)
