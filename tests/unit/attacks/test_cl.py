from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.attacks import CL
from unbackdoor.attacks.cl import AdversarialStep, ascend
from unbackdoor.errors import InvalidInputError
from unbackdoor.testing.subjects import awkward_model, small_data, small_network
from unbackdoor.train import Batch, Recipe

RECIPE = Recipe(epochs=1, batch_size=16, learning_rate=0.01, crop_padding=1)


class Brightness(nn.Module):
    """Logits (-b, b) of the brightness b: class 1 is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, images: Tensor) -> Tensor:
        bright = self.scale * images.mean((1, 2, 3))
        return torch.stack([-bright, bright], 1)


def test_ascent_moves_away_from_the_true_class_within_its_bounds() -> None:
    images = torch.tensor([0.5, 0.5, 0.02, 0.99]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    moved = ascend(Brightness(), images, torch.tensor([0, 1, 1, 0]), eps=0.1, step=0.04, steps=5)
    assert moved[:, 0, 0, 0].tolist() == pytest.approx([0.6, 0.4, 0.0, 1.0])
    once = ascend(Brightness(), images, torch.tensor([0, 1, 1, 0]), eps=0.1, step=0.04, steps=1)
    assert once[:2, 0, 0, 0].tolist() == pytest.approx([0.54, 0.46])
    assert torch.equal(ascend(Brightness(), images, torch.tensor([0, 1, 1, 0]), 0.1, 0.04, 0), images)


def test_ascent_leaves_the_model_alone() -> None:
    model = awkward_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    ascend(model, small_data(4).floats(), torch.arange(4), 0.1, 0.05, 2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_noise_keeps_its_bound_after_rounding() -> None:
    data = small_data(9)
    noisy = CL(eps=8, step=3, steps=4).perturb(awkward_model(), data)
    assert noisy.dtype == torch.uint8
    change = (noisy.int() - data.images.int()).abs()
    assert int(change.max()) == 8
    assert float(change.float().mean()) > 3


def test_four_patches_are_mirror_images() -> None:
    delta = CL().trigger_for(32, 32).delta
    assert delta[0, -3:, -3:].tolist() == [[-1, -1, 1], [-1, 1, -1], [1, -1, 1]]
    assert torch.equal(delta, delta.flip(-1))
    assert torch.equal(delta, delta.flip(-2))
    assert int(delta.abs().sum()) == 36
    assert int(CL(corners="one").trigger_for(32, 32).delta.abs().sum()) == 9
    assert float(CL(amplitude=0.25).trigger_for(32, 32).delta.max()) == 0.25
    assert CL(patch_size=5).trigger_for(12, 11).delta.shape == (1, 12, 11)


def test_poisons_carry_noise_and_patch_but_the_trigger_only_the_patch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = small_data(40)
    seen: list[Tensor] = []
    true_perturb = CL.perturb

    def spy(self: CL, *args: Any) -> Tensor:  # noqa: ANN401
        seen.append(true_perturb(self, *args))
        return seen[-1]

    monkeypatch.setattr(CL, "perturb", spy)
    attack = CL(recipe=RECIPE, surrogate=RECIPE, target_class=1, class_fraction=0.5, steps=2)
    infected = attack.run(data, small_network, generator=rng.generator(0))
    plan = infected.plan
    assert len(plan.indices) == 5 == len(seen[0])
    assert plan.new_labels.tolist() == [1] * 5
    assert int((seen[0].int() - data.images[plan.indices].int()).abs().max()) == 4
    triggered = infected.trigger(data.floats())
    inside = slice(2, -2)
    assert torch.equal(triggered[..., inside, :], data.floats()[..., inside, :])
    assert 0 <= infected.record["surrogate_error_on_poisons"] <= 1


def test_adversarial_training_perturbs_and_then_trains() -> None:
    seen: list[tuple[Tensor, bool]] = []

    class Spy(Brightness):
        def forward(self, images: Tensor) -> Tensor:
            seen.append((images.detach().clone(), self.training))
            return super().forward(images)

    images = torch.full((2, 1, 2, 2), 0.5)
    model = Spy().train()
    loss = AdversarialStep(0.1, 2)(model, Batch(images, torch.tensor([0, 1]), torch.arange(2)))
    assert [training for _, training in seen] == [False, False, True]
    assert seen[-1][0][:, 0, 0, 0].tolist() == pytest.approx([0.6, 0.4])
    loss.backward()
    assert model.scale.grad is not None


def test_an_interrupted_attack_ends_alike(tmp_path: Path) -> None:
    attack = CL(recipe=RECIPE, surrogate=RECIPE, steps=1, surrogate_steps=1)
    state = tmp_path / "state.safetensors"
    first, again = (
        attack.run(small_data(), small_network, generator=rng.generator(0), resume_from=state)
        for _ in range(2)
    )
    assert state.with_name("state-surrogate.safetensors").exists()
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"eps": 0.0}, "grey levels"),
        ({"step": float("nan")}, "grey levels"),
        ({"surrogate_eps": 300.0}, "grey levels"),
        ({"steps": -1}, "at least 0"),
        ({"amplitude": 0.0}, "amplitude in"),
        ({"corners": "two"}, "'four' or 'one'"),
    ],
)
def test_odd_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        CL(**options)


def test_what_does_not_fit_the_data_fails_before_training() -> None:
    def never() -> nn.Module:
        raise AssertionError("the network was built")

    for attack, sentence in (
        (CL(patch_size=7), "overlap in 12x12 images"),
        (CL(patch_size=13, corners="one"), "does not lie inside"),
        (CL(target_class=5), "is not a class"),
        (CL(class_fraction=2.0), "class_fraction must lie"),
    ):
        with pytest.raises(InvalidInputError, match=sentence):
            attack.run(small_data(), never, generator=rng.generator(0))


def test_the_paper_poisons_the_whole_class_with_a_robust_surrogate() -> None:
    paper = CL.paper()
    assert (paper.class_fraction, paper.steps, paper.surrogate_steps) == (1.0, 100, 5)
    assert (paper.eps, paper.step) == (8.0, 1.5)
