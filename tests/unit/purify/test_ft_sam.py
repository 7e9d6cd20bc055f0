from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.costs import metered
from unbackdoor.errors import InvalidInputError
from unbackdoor.purify.ft_sam import FTSAM
from unbackdoor.settings import configure
from unbackdoor.testing.subjects import small_data, small_network
from unbackdoor.train import Batch, Recipe

with rng.isolated(rng.generator(0)):
    MODEL = small_network().eval()
    MODEL[9].p = 0.0  # type: ignore[assignment]
DATA = small_data(16)
ONE_STEP = Recipe(
    epochs=1, batch_size=16, learning_rate=0.1, momentum=0.0, weight_decay=0.0, crop_padding=0, flip=False,
    schedule="constant", precision="fp32",
)  # fmt: skip


def by_hand(model: nn.Module, rho: float, smoothing: float, *, adaptive: bool) -> dict[str, Tensor]:
    """Perturb the weights in place, take the gradient, restore, step."""
    twin = copy.deepcopy(model).train()
    images = DATA.floats()

    def gradients() -> list[Tensor]:
        loss = F.cross_entropy(twin(images), DATA.labels, label_smoothing=smoothing)
        return list(torch.autograd.grad(loss, list(twin.parameters())))

    first = gradients()
    statistics = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    origin = [p.detach().clone() for p in twin.parameters()]
    scaled = [(w.abs() if adaptive else 1.0) * g for w, g in zip(origin, first, strict=True)]
    norm = torch.cat([s.flatten() for s in scaled]).norm()
    with torch.no_grad():
        for p, w, g in zip(twin.parameters(), origin, first, strict=True):
            p.add_(rho * (w**2 if adaptive else 1.0) * g / norm)
    second = gradients()
    names = [name for name, _ in twin.named_parameters()]
    return {n: w - 0.1 * g for n, w, g in zip(names, origin, second, strict=True)} | statistics


@pytest.mark.parametrize(("rho", "smoothing", "adaptive"), [(2.0, 0.1, True), (0.5, 0.0, False)])
def test_one_step_follows_the_gradient_at_the_shift(rho: float, smoothing: float, adaptive: bool) -> None:
    method = FTSAM(rho, adaptive, smoothing, ONE_STEP)
    after = method.purify(MODEL, DATA, generator=rng.generator(0)).model.state_dict()
    expected = by_hand(MODEL, rho, smoothing, adaptive=adaptive)
    assert set(expected) == set(after)
    for name, tensor in expected.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_shift_worked_out_for_two_weights() -> None:
    weights = {"w": torch.tensor([3.0, -1.0, 0.0])}
    gradients = {"w": torch.tensor([1.0, 4.0, 9.0])}
    # |theta| g = (3, 4, 0), of norm 5; eps = rho (9, 4, 0) / 5.
    torch.testing.assert_close(FTSAM(rho=2.0)._shifts(weights, gradients)["w"], torch.tensor([3.6, 1.6, 0.0]))
    plain = FTSAM(rho=2.0, adaptive=False)._shifts(weights, gradients)["w"]
    torch.testing.assert_close(plain, 2.0 * gradients["w"] / 98**0.5)


@pytest.mark.parametrize("method", [FTSAM(rho=2.0, recipe=ONE_STEP), configure(FTSAM(), ["adaptive=true"])])
def test_adaptivity_is_on_by_default_and_asking_for_it_does_not_turn_it_off(method: FTSAM) -> None:
    weights, gradients = {"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([1.0, 9.0])}
    torch.testing.assert_close(method._shifts(weights, gradients)["w"], torch.tensor([6.0, 0.0]))


def test_statistics_move_once_a_step() -> None:
    result = FTSAM(recipe=ONE_STEP).purify(MODEL, DATA, generator=rng.generator(0))
    assert int(result.model.state_dict()["1.num_batches_tracked"]) == 1


def test_a_step_costs_two_passes_each_way() -> None:
    with metered() as cost:
        FTSAM(recipe=ONE_STEP).purify(MODEL, DATA, generator=rng.generator(0))
    assert cost.forward_images == 2 * 16 + 3
    assert cost.backward_images == 2 * 16


def test_a_flat_loss_shifts_nothing() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    batch = Batch(torch.rand(2, 1, 2, 2, generator=rng.generator(0)), torch.tensor([0, 1]), torch.arange(2))
    assert float(FTSAM().loss(model, batch).detach()) == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"rho": float("inf")}, {"label_smoothing": 1.0}])
def test_odd_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        FTSAM(**options)


def test_the_rate_falls_to_the_end_of_the_last_epoch() -> None:
    recipe = FTSAM.paper().recipe
    rates = [recipe.rate_at(step, 1000) for step in range(1000)]
    assert rates == sorted(rates, reverse=True)
