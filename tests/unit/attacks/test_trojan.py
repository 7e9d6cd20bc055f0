from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.attacks import Trojan
from unbackdoor.attacks.features import penultimate_features
from unbackdoor.attacks.trojan import excite, full_contrast, heaviest_units
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.models.registry import build
from unbackdoor.testing.subjects import awkward_model, small_data, small_network
from unbackdoor.train import Recipe
from unbackdoor.triggers import AdditiveTrigger, PatchTrigger
from unbackdoor.types import Infected

RECIPE = Recipe(epochs=1, batch_size=16, learning_rate=0.01, crop_padding=1)


def run(seed: int = 0, resume_from: Path | None = None, **options: Any) -> Infected:  # noqa: ANN401
    settings: dict[str, Any] = {"recipe": RECIPE, "surrogate": RECIPE, "steps": 3, "fine_tune_epochs": 1}
    attack = Trojan(**{**settings, **options})
    return attack.run(small_data(), small_network, generator=rng.generator(seed), resume_from=resume_from)


def test_the_patch_is_inset_as_in_the_literature() -> None:
    trigger = Trojan().trigger_for(torch.ones(3, 3, 3), 32, 32)
    assert isinstance(trigger, AdditiveTrigger)
    rows = trigger.delta[0].nonzero()[:, 0].unique().tolist()
    assert rows == [25, 26, 27]
    assert float(trigger.delta.sum()) == 27
    pasted = Trojan(variant="neuron", margin=0).trigger_for(torch.ones(3, 3, 3), 32, 32)
    assert isinstance(pasted, PatchTrigger)
    assert (pasted.row, pasted.column) == (-3, -3)


def test_a_drawn_patch_is_never_invisible() -> None:
    assert full_contrast(torch.tensor([[[0.1, 0.4], [0.2, 0.3]]])).tolist() == [[[0.0, 1.0], [0.0, 0.0]]]
    assert full_contrast(torch.tensor([[[0.1, 0.9], [0.2, 0.7]]])).tolist() == [[[0.0, 1.0], [0.0, 1.0]]]
    dark = next(
        seed
        for seed in range(1000)
        if not torch.rand(1, 2, 2, generator=rng.spawn(rng.generator(seed))).round().any()
    )
    data = small_data(channels=1)
    infected = Trojan(recipe=RECIPE).run(data, lambda: small_network(1), generator=rng.generator(dark))
    assert not torch.equal(infected.trigger(data.floats()), data.floats())


def test_a_fixed_patch_needs_no_clean_network() -> None:
    built: list[nn.Module] = []

    def model_fn() -> nn.Module:
        built.append(small_network())
        return built[-1]

    Trojan(recipe=RECIPE).run(small_data(), model_fn, generator=rng.generator(0))
    assert len(built) == 1


def test_neuron_fine_tunes_the_very_network_that_it_was_optimised_on() -> None:
    built: list[nn.Module] = []

    def model_fn() -> nn.Module:
        built.append(small_network())
        return built[-1]

    attack = Trojan(variant="neuron", recipe=RECIPE, surrogate=RECIPE, steps=3, fine_tune_epochs=2)
    infected = attack.run(small_data(), model_fn, generator=rng.generator(0))
    assert built == [infected.model]
    assert infected.record["training"]["recipe"]["epochs"] == 2
    assert infected.record["training"]["recipe"]["learning_rate"] == attack.fine_tune_rate
    assert all(parameter.requires_grad for parameter in infected.model.parameters())
    assert len(infected.record["units"]) == 2
    assert infected.record["activation_after"] > infected.record["activation_before"]


def test_units_have_the_largest_outgoing_weights() -> None:
    head = nn.Linear(3, 2)
    head.weight.data = torch.tensor([[1.0, -2.0, 0.0], [1.0, 2.0, 0.5]])
    assert heaviest_units(head, 2) == [1, 0]
    assert heaviest_units(head, 9) == [1, 0, 2]


def test_features_are_what_the_head_reads() -> None:
    images = small_data(3).floats()
    model = awkward_model()
    modes = [module.training for module in model.modules()]
    features = penultimate_features(model, images)
    read = features(images)
    assert read.shape == (3, 16)
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad():
        torch.testing.assert_close(features.head(read), model.eval()(images))
    assert not features.head._forward_pre_hooks
    resnet = build("resnet10", width=4, in_channels=3)
    assert penultimate_features(resnet, images)(images).shape == (3, 32)


def test_gradients_reach_the_images() -> None:
    images = small_data(2).floats().requires_grad_()
    model = awkward_model().requires_grad_(requires_grad=False)
    penultimate_features(model, images.detach())(images).sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0


def test_networks_without_a_linear_layer_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 12), nn.Flatten())
    with pytest.raises(UnsupportedModelError, match=r"runs no nn\.Linear"):
        penultimate_features(model, small_data(1).floats())


def test_excitation_raises_the_unit_and_returns_the_best() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    features = penultimate_features(model, torch.zeros(1, 1, 2, 2))  # the features are the pixels
    start = torch.full((1, 2, 2), 0.5)
    seen: list[int] = []
    best = excite(
        features, lambda p: p[None], start, [0, 3], steps=40, step_size=0.3,
        progress=lambda _, done, total: seen.append(done),
    )  # fmt: skip
    assert best[0, 0, 0] > 0.95
    assert best[0, 1, 1] > 0.95
    assert best[0, 0, 1] == pytest.approx(0.5, abs=0.01)
    assert seen == [10, 20, 30, 40]
    torch.testing.assert_close(best * 255, (best * 255).round())


def test_an_interrupted_attack_ends_alike(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    first = run(variant="neuron", fine_tune_epochs=2, resume_from=state)
    assert state.with_name("state-surrogate.safetensors").exists()
    again = run(variant="neuron", fine_tune_epochs=2, resume_from=state)
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert again.record["training"]["resumed_at_epoch"] == 2


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "both"},
        {"neurons": 0},
        {"steps": 0},
        {"fine_tune_epochs": 0},
        {"patch_size": -1},
        {"margin": -2},
        {"step_size": 0.0},
        {"fine_tune_rate": float("nan")},
    ],
)
def test_odd_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="must be"):
        Trojan(**options)


def test_a_patch_that_does_not_fit_fails_before_training() -> None:
    def never() -> nn.Module:
        raise AssertionError("the network was built")

    with pytest.raises(InvalidInputError, match="does not lie inside 12x12 images"):
        Trojan(patch_size=11, variant="neuron", recipe=RECIPE).run(
            small_data(), never, generator=rng.generator(0)
        )


def test_the_paper_retrains_a_clean_network() -> None:
    assert (Trojan.paper().variant, Trojan.paper().steps) == ("neuron", 1000)
