from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.detect.ban import BAN, disturbed
from unbackdoor.detect.calibration import Calibration
from unbackdoor.detect.decoupling import Split
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters import find_filters
from unbackdoor.neuron_noise import random_noise, targets_of
from unbackdoor.testing import planted_backdoor
from unbackdoor.types import LabelledImages

DETECTOR = BAN(precision="fp32")
CLEAN = planted_backdoor().clean_data(64, rng.generator(0))


def normed_network() -> nn.Sequential:
    with rng.isolated(rng.generator(0)):
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, 8),
        )  # fmt: skip
        nn.init.uniform_(model[1].weight, 0.5, 2.0)  # type: ignore[arg-type]
        nn.init.uniform_(model[1].bias, -0.5, 0.5)  # type: ignore[arg-type]
    return model.eval()


def bare_network() -> nn.Sequential:
    with rng.isolated(rng.generator(0)):
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)
        ).eval()


def disturb(model: nn.Module, detector: BAN, clean: LabelledImages = CLEAN, seed: int = 3) -> nn.Module:
    targets = targets_of(find_filters(model, clean.floats()[:1]))
    return disturbed(model, targets, clean, detector, generator=rng.generator(seed))


def by_hand(state: dict[str, Tensor], images: Tensor, scale: Tensor, shift: Tensor, mode: str) -> Tensor:
    z = F.conv2d(images, state["0.weight"], state["0.bias"])
    if mode == "train":
        mean, variance = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)
    else:
        mean, variance = state["1.running_mean"], state["1.running_var"]
    z = (z - mean.view(1, -1, 1, 1)) / (variance.view(1, -1, 1, 1) + 1e-5).sqrt()
    y = z * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    return y.relu().mean((2, 3)) @ state["5.weight"].T + state["5.bias"]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_noise_is_that_of_the_written_out_network(mode: str) -> None:
    model = normed_network()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options: dict[str, Any] = {"norm_mode": mode, "steps": 2, "batch_size": 64}
    noisy = disturb(model, replace(DETECTOR, **options)).state_dict()
    targets = targets_of(find_filters(model, CLEAN.floats()[:1]))
    start = random_noise(targets, 0.3, generator=rng.generator(3), device=torch.device("cpu"))
    delta, xi = start["1.weight"], start["1.bias"]
    for _ in range(2):
        delta.requires_grad_()
        xi.requires_grad_()
        scale, shift = (1 + delta) * state["1.weight"], (1 + xi) * state["1.bias"]
        loss = F.cross_entropy(by_hand(state, CLEAN.floats(), scale, shift, mode), CLEAN.labels)
        delta, xi = (
            tensor.detach() + 0.15 * slope.sign()
            for tensor, slope in zip((delta, xi), torch.autograd.grad(loss, (delta, xi)), strict=True)
        )
    torch.testing.assert_close(noisy["1.weight"], (1 + delta) * state["1.weight"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(noisy["1.bias"], (1 + xi) * state["1.bias"], rtol=1e-5, atol=1e-6)
    # Batch statistics flow into the running ones of the copy; nothing else changes, and the model not at all.
    changed = {name for name in state if not torch.equal(noisy[name], state[name])}
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"} if mode == "train" else set()
    assert changed == {"1.weight", "1.bias"} | statistics
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_small_batches_climb_the_same_loss() -> None:
    model, detector = normed_network(), replace(DETECTOR, norm_mode="eval", steps=3)
    whole, parts = (disturb(model, replace(detector, batch_size=n)).state_dict() for n in (64, 16))
    torch.testing.assert_close(whole["1.weight"], parts["1.weight"])


def test_noise_reaches_twice_its_budget_unless_projected() -> None:
    model, detector = normed_network(), replace(DETECTOR, eps=0.3, steps=4)
    before = model.state_dict()["1.weight"]
    free, held = (
        (disturb(model, replace(detector, project_noise=p)).state_dict()["1.weight"] / before - 1).abs().max()
        for p in (False, True)
    )
    assert 0.4 < float(free) <= 0.6 + 1e-5
    assert float(held) <= 0.3 + 1e-5


def test_without_budget_nothing_changes() -> None:
    noisy, model = disturb(normed_network(), replace(DETECTOR, eps=0.0)), normed_network()
    assert all(torch.equal(noisy.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_networks_without_norms_have_noise_on_weight_and_bias() -> None:
    model = bare_network()
    noisy, before = disturb(model, DETECTOR).state_dict(), model.state_dict()
    ratio = noisy["0.weight"] / before["0.weight"]
    # One factor a filter.
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio), rtol=1e-4, atol=1e-5)
    assert not torch.equal(noisy["0.bias"], before["0.bias"])
    assert torch.equal(noisy["4.weight"], before["4.weight"])
    found = DETECTOR.score(model, CLEAN, generator=rng.generator(0))
    assert found.undetermined == ""
    assert found.score == pytest.approx(max(found.evidence["shift"]))
    # Most answers move to one class, which few images had before.
    assert found.score > 0.3
    assert found.evidence["class_share"][found.target_class] > 0.9


def test_a_network_of_a_head_alone_is_refused() -> None:
    with rng.isolated(rng.generator(0)):
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 8)).eval()
    with pytest.raises(UnsupportedModelError, match="nothing to mask or to perturb"):
        DETECTOR.score(model, CLEAN, generator=rng.generator(0))


# Four classes, one image each; feature k pushes class k and feature 4 pushes class 2.
SPLIT = Split(
    "head",
    torch.cat([4 * torch.eye(4), torch.tensor([[0.0], [0.0], [3.0], [0.0]])], 1),
    torch.zeros(4),
    torch.cat([torch.eye(4), torch.zeros(4, 1)], 1),
    torch.arange(4),
)
BENIGN = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])


def under_noise(*extra: float) -> Tensor:
    return torch.cat([torch.eye(4), torch.tensor(extra).view(4, 1)], 1)


def test_the_shift_by_hand() -> None:
    # Two of the three images of other classes excite feature 4; it is weaker than their own.
    found = DETECTOR.judge(SPLIT, under_noise(1.0, 1.0, 1.0, 0.0), BENIGN)
    assert found.score == pytest.approx(2 / 3)
    assert (found.target_class, found.is_backdoored) == (2, True)
    assert found.evidence["shift"] == pytest.approx([0, 0, 2 / 3, 0])
    assert found.evidence["class_share_of_all_features"] == [0, 0, 0, 0]
    assert (found.evidence["accuracy"], found.evidence["accuracy_under_noise"]) == (1.0, 1.0)
    assert found.evidence["answered"] == 0.75
    whole = replace(DETECTOR, reading="whole").judge(SPLIT, under_noise(1.0, 2.0, 1.0, 0.0), BENIGN)
    assert whole.score == pytest.approx(1 / 3)
    assert (whole.target_class, whole.is_backdoored) == (2, False)


def test_what_the_network_answers_anyway_is_no_shift() -> None:
    # Without noise one image of another class is given to class 2 already.
    usual = replace(SPLIT, features=under_noise(2.0, 0.0, 0.0, 0.0))
    found = DETECTOR.judge(usual, under_noise(1.0, 1.0, 1.0, 1.0), BENIGN)
    assert found.score == pytest.approx(1 - 1 / 3)
    assert found.evidence["class_share"] == pytest.approx([0, 0, 1, 0])


def test_silence_and_infinities_get_no_opinion() -> None:
    silent = DETECTOR.judge(SPLIT, under_noise(0.0, 0.0, 0.0, 0.0), BENIGN)
    broken = DETECTOR.judge(SPLIT, under_noise(math.inf, 0.0, 0.0, 0.0), BENIGN)
    assert "too few to read" in silent.undetermined
    assert "lower eps" in broken.undetermined
    for found in (silent, broken):
        assert math.isnan(found.score)
        assert (found.target_class, found.p_value, found.is_backdoored) == (None, None, None)


def test_a_calibration_replaces_the_threshold() -> None:
    calibration = Calibration(tuple(i / 40 for i in range(19)), "nineteen clean models")
    detector = replace(DETECTOR, calibration=calibration)
    found = detector.judge(SPLIT, under_noise(1.0, 1.0, 1.0, 0.0), BENIGN)
    assert found.threshold_source == "nineteen clean models"
    assert (found.p_value, found.is_backdoored) == (0.05, True)


def test_the_planted_target_is_named_and_the_clean_twin_not_flagged() -> None:
    # Only weak noise excites the planted filters on some images, so that the default majority is not reached.
    detector = replace(DETECTOR, threshold=0.2)
    for seed in (0, 1):
        infected, twin = (planted_backdoor(target_class=3, infected=i, seed=seed) for i in (True, False))
        data = infected.clean_data(64, rng.generator(seed))
        found = detector.score(infected.model, data, generator=rng.generator(0))
        assert (found.is_backdoored, found.target_class) == (True, 3)
        assert float(torch.tensor(found.evidence["shift"]).sort().values[-2]) < 0.05
        assert not detector.score(twin.model, data, generator=rng.generator(0)).is_backdoored


def test_few_images_and_classes_get_no_opinion() -> None:
    planted = planted_backdoor()
    for data in (CLEAN.subset(torch.tensor([0])), CLEAN.subset(CLEAN.labels < 3)):
        found = DETECTOR.score(planted.model, data, generator=rng.generator(0))
        assert "4 are needed" in found.undetermined


def test_options_are_checked() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"eps": -0.1}, "eps must be at least 0"),
        ({"eps": math.nan}, "eps must be at least 0"),
        ({"steps": 0}, "steps at least 1"),
        ({"batch_size": 1}, "batch_size at least 2"),
        ({"norm_mode": "both"}, "norm_mode must be"),
        ({"reading": "mask"}, "reading"),
        ({"fewest_classes": 2}, "fewest_classes"),
    ]
    for options, message in cases:
        with pytest.raises(InvalidInputError, match=message):
            replace(DETECTOR, **options)
