from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.detect import plausibility
from unbackdoor.detect.plausibility import check_plausible, statistics_shift
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


def test_normalisations_are_tried_where_the_network_is() -> None:
    # On the meta device nothing is computed; a deviation elsewhere would be refused like one beside a GPU.
    probed = LabelledImages(CLEAN.images[:2].to("meta"), CLEAN.labels[:2])
    network, tried = nn.Conv2d(3, 4, 3, device="meta"), list[set[str]]()

    def note(model: nn.Module, *_: Tensor) -> float:
        tried.append({buffer.device.type for buffer in model.buffers()})
        return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plausibility, "_tried", note)
        list(plausibility._normalisations(network, probed))
    assert tried
    assert all(devices == {"meta"} for devices in tried)


def test_a_model_with_a_normalisation_is_told_of_all_causes() -> None:
    anything = torch.randint(0, 8, (len(CLEAN),), generator=rng.generator(2))
    wrong = LabelledImages(CLEAN.images, anything)
    found = check_plausible(NormalisedModel(PLANTED.model, (0.0,), (1.0,)), wrong)
    assert "with --normalize" not in found.problem
    assert "probably the normalisation (--normalize or --mean and --std), the label order" in found.problem


def test_a_normalisation_too_many_is_named() -> None:
    found = check_plausible(NormalisedModel(PLANTED.model, (3.0,), (0.1,)), CLEAN)
    assert "leave --normalize, --mean and --std out" in found.problem


def test_another_image_size_is_named() -> None:
    class Tiled(nn.Module):
        """Knows images of 28 pixels alone."""

        def forward(self, images: Tensor) -> Tensor:
            images = images if images.shape[-1] == 28 else torch.zeros_like(images)
            logits: Tensor = PLANTED.model(F.interpolate(images, size=(16, 16), mode="area"))
            return logits

    found = check_plausible(Tiled(), CLEAN)
    assert "with --image-size 28 it would be right on" in found.problem


def test_networks_that_assert_their_size_are_no_obstacle() -> None:
    class Strict(nn.Module):
        def __init__(self, error: type[Exception]) -> None:
            super().__init__()
            self.error = error

        def forward(self, images: Tensor) -> Tensor:
            if images.shape[-1] != 16:
                raise self.error("wrong size")
            logits: Tensor = PLANTED.model(images * 0)
            return logits

    for error in (AssertionError, ValueError, TypeError, IndexError, KeyError):
        assert "for every image" in check_plausible(Strict(error), CLEAN).problem


def test_reversed_channels_are_named() -> None:
    class Reversed(nn.Module):
        """Answers from the red channel, in images whose blue one comes first."""

        def forward(self, images: Tensor) -> Tensor:
            return F.one_hot((images[:, 2].mean((1, 2)) * 8).long(), 8).float()

    labels = torch.arange(160) % 8
    images = torch.rand(160, 3, 16, 16, generator=rng.generator(0))
    images[:, 0] = ((labels + 0.5) / 8).view(-1, 1, 1)
    found = check_plausible(Reversed(), LabelledImages(images, labels))
    assert "with the channels in reverse (BGR) it would be right on 100.0%" in found.problem


def test_causes_are_tried_where_the_statistics_have_moved() -> None:
    class Wants(nn.Module):
        """Trained on images around 0; of others it answers every fifth wrongly."""

        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(3)))

        def forward(self, images: Tensor) -> Tensor:
            self.norms(images)
            if bool((images < 0).any()):
                logits: Tensor = PLANTED.model(images * 0.5 + 0.5)
                return logits
            logits = PLANTED.model(images)
            logits[::5] = logits[::5].roll(1, dims=1)
            return logits

    found = check_plausible(Wants().eval(), CLEAN)
    assert found.accuracy.value == 0.8
    # Those that serve as well are named, too: the true one is not first in the alphabet.
    assert (
        "with --normalize cifar10 or cifar100 or imagenet or half it would be right on 100.0%"
        in found.problem
    )


def test_without_batch_norms_causes_are_tried_where_much_could_be_gained() -> None:
    class Wants(nn.Module):
        """Right on all images around 0; of others it answers every fourth wrongly."""

        def forward(self, images: Tensor) -> Tensor:
            if bool((images < 0).any()):
                logits: Tensor = PLANTED.model(images * 0.5 + 0.5)
                return logits
            logits = PLANTED.model(images)
            logits[::4] = logits[::4].roll(1, dims=1)
            return logits

    model = Wants().eval()
    assert math.isnan(statistics_shift(model, CLEAN.images))
    found = check_plausible(model, CLEAN)
    assert found.accuracy.value == 0.75
    assert "or half it would be right on 100.0%" in found.problem


def test_a_confirmed_cause_is_a_problem_whatever_the_accuracy() -> None:
    # Half of the images are right by their label alone.
    class Half(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = PLANTED.model(images * 0.5 + 0.5)
            logits[::2] = PLANTED.model(images)[::2]
            return logits

    found = check_plausible(Half(), CLEAN)
    assert 0.5 <= found.accuracy.value < 0.6
    assert "with --normalize" in found.problem


@pytest.mark.parametrize(("share", "plausible"), [(0.95, True), (0.6, False)])
def test_two_classes_need_less_than_perfection(share: float, plausible: bool) -> None:
    head = nn.Linear(1, 2)
    first = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        head.bias.copy_(torch.tensor([0.5, -0.5]))
    labels = torch.arange(100) % 2
    shown = labels.clone()
    shown[: round(100 * (1 - share))] ^= 1
    data = LabelledImages(shown.float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous(), labels)
    assert (not check_plausible(first, data).problem) is plausible


def test_weights_that_are_no_numbers_are_named() -> None:
    model = planted_backdoor().model
    with torch.no_grad():
        model.get_parameter("head.bias")[0] = float("inf")
    found = check_plausible(model, CLEAN)
    assert "'head.bias' first" in found.problem
    assert found.accuracy == Rate(0, 0)


def test_images_that_are_unlike_those_of_the_training_get_a_warning() -> None:
    darker = LabelledImages(CLEAN.floats() * 0.5, CLEAN.labels)
    assert statistics_shift(PLANTED.model, CLEAN.images) < 0.1
    assert statistics_shift(PLANTED.model, darker.images) > 0.1
    # Norms with a running mean of 0, where the images have one half.
    trained_otherwise = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(3)), PLANTED.model).eval()
    found = check_plausible(trained_otherwise, CLEAN)
    assert (found.accuracy.value, found.problem) == (1.0, "")
    assert "look unlike those that it was trained on" in " ".join(found.warnings)
    assert math.isnan(statistics_shift(nn.Sequential(nn.Flatten(), nn.Linear(768, 8)), CLEAN.images))


def test_a_permuted_label_order_is_recognised() -> None:
    found = check_plausible(Permuted(), CLEAN)
    assert found.accuracy.value == 0.0
    assert "100.0% would be right if the classes were ordered otherwise" in found.problem
    assert "--class-names" in found.problem


class Answers(nn.Module):
    """Answers image i, whose pixels are i / 255, with ``answers[i]``."""

    def __init__(self, answers: Tensor, classes: int) -> None:
        super().__init__()
        self.answers, self.classes = answers, classes

    def forward(self, images: Tensor) -> Tensor:
        index = (images[:, 0, 0, 0] * 255).round().long().clamp(0, len(self.answers) - 1)
        return F.one_hot(self.answers[index], self.classes).float()


def numbered(labels: Tensor) -> LabelledImages:
    pixels = (torch.arange(len(labels)).float() / 255).view(-1, 1, 1, 1)
    return LabelledImages(pixels.expand(-1, 1, 8, 8).contiguous(), labels)


def test_one_image_a_class_says_nothing_on_the_order_of_the_labels() -> None:
    labels = torch.arange(10)
    found = check_plausible(Answers((labels * 3 + 1) % 10, 10), numbered(labels))
    assert found.problem
    assert "ordered otherwise" not in found.problem
    found = check_plausible(Answers((labels.repeat(2) * 3 + 1) % 10, 10), numbered(labels.repeat(2)))
    assert "ordered otherwise" in found.problem


def test_a_frequent_class_does_not_make_a_model_plausible() -> None:
    # 91 images of class 0 and one of each other; all but one are answered with 0.
    labels = torch.cat([torch.zeros(91, dtype=torch.int64), torch.arange(1, 10)])
    for answers in (0 * labels, 0 * labels + (labels == 9) * 9):
        found = check_plausible(Answers(answers, 10), numbered(labels))
        assert found.accuracy.value > 0.9
        assert "with each class weighing the same" in found.problem


def test_outputs_that_are_no_numbers_are_a_problem() -> None:
    found = check_plausible(Broken(), CLEAN)
    assert found.problem == "the model's outputs are not finite numbers; the checkpoint is damaged"
    # Nothing was counted, which is not an accuracy of 0.
    assert found.accuracy == Rate(0, 0)


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


def test_classes_whose_names_were_exchanged_are_named() -> None:
    exchanged = CLEAN.labels.clone()
    exchanged[CLEAN.labels == 2], exchanged[CLEAN.labels == 5] = 5, 2
    names = tuple("abcdefgh")
    found = check_plausible(PLANTED.model, LabelledImages(CLEAN.images, exchanged, names))
    assert found.problem == ""
    (warning,) = found.warnings
    assert warning.startswith("Images of 2 classes are answered as one another's ('c' as 'f', 'f' as 'c')")
    # One class that goes to another which keeps its own is another matter: a weak class, or a backdoor.
    one_way = CLEAN.labels.clone()
    one_way[CLEAN.labels == 2] = 5
    assert not any(
        "one another's" in w
        for w in check_plausible(PLANTED.model, LabelledImages(CLEAN.images, one_way)).warnings
    )
