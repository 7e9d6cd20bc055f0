from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.compute import accuracy_of
from unbackdoor.costs import metered
from unbackdoor.data.splits import split
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.groups import find_filters
from unbackdoor.filters.select import Guard
from unbackdoor.purify.selection import Selection
from unbackdoor.purify.tsbd import TSBD, cleared_weights, weight_changes
from unbackdoor.suppression import Suppression
from unbackdoor.testing.subjects import small_data, small_network
from unbackdoor.train import Recipe
from unbackdoor.types import Purified

with rng.isolated(rng.generator(0)):
    MODEL = small_network().eval()
    MODEL[9].p = 0.0  # type: ignore[assignment]
DATA = small_data(64)
ONE_STEP = Recipe(
    epochs=1, batch_size=64, learning_rate=0.1, momentum=0.0, weight_decay=0.0, crop_padding=0, flip=False,
    schedule="constant", precision="fp32",
)  # fmt: skip
SHORT = Suppression(mu=0.0, budget=4, batch_size=16)
QUICK = TSBD(unlearning=SHORT, recipe=ONE_STEP)


def counted(count: int, **options: Any) -> TSBD:  # noqa: ANN401
    return replace(QUICK, selection=Selection(amount="count", count=count), **options)


def purify(method: TSBD) -> Purified:
    return method.purify(MODEL, DATA, generator=rng.generator(0))


def test_weights_cleared_worked_out_for_three_filters() -> None:
    changes = {
        "a": torch.tensor([[[[5.0, 1.0]]], [[[0.1, 0.2]]]]),  # sums 6 and 0.3
        "b": torch.tensor([[[[2.0]], [[2.5]]]]),  # sum 4.5
    }
    gone = cleared_weights(changes, count=2, fraction=0.5)
    assert gone["a"].flatten().tolist() == [True, False, False, False]
    assert gone["b"].flatten().tolist() == [False, True]
    three = cleared_weights(changes, count=2, fraction=0.75)
    assert three["b"].flatten().tolist() == [True, True]
    assert not any(bool(layer.any()) for layer in cleared_weights(changes, 0, 1.0).values())
    assert int(cleared_weights(changes, 3, 1.0)["a"].sum()) == 4


def test_changes_cover_convolutions_and_scores_put_the_largest_first() -> None:
    other = copy.deepcopy(MODEL)
    with torch.no_grad():
        other.get_parameter("0.weight")[3] += 0.5
        other.get_parameter("4.weight")[7, 2, 0, 0] -= 2.0
        other.get_parameter("10.weight").zero_()
    changes = weight_changes(MODEL, other, find_filters(MODEL, DATA.floats()[:1]))
    assert list(changes) == ["0", "4"]
    assert float(changes["0"][3].sum()) == pytest.approx(27 * 0.5, rel=1e-5)
    assert float(changes["4"].sum()) == pytest.approx(2.0)
    result = purify(counted(2))
    assert {name: tuple(score.shape) for name, score in result.scores.items()} == {"0": (16,), "4": (16,)}
    assert all(float(score.max()) < 0 for score in result.scores.values())
    assert result.mask is None


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_one_step_mixes_the_gradients_at_both_places(alpha: float) -> None:
    after = purify(counted(0, alpha=alpha, radius=0.3)).model.state_dict()
    twin = copy.deepcopy(MODEL).train()
    images = DATA.floats()
    first = torch.autograd.grad(F.cross_entropy(twin(images), DATA.labels), list(twin.parameters()))
    statistics = twin.state_dict()["1.running_mean"].clone()
    shifted = copy.deepcopy(twin)
    with torch.no_grad():
        for parameter, g in zip(shifted.parameters(), first, strict=True):
            parameter.add_(0.3 * g / g.norm().clamp_min(1e-12))
    second = torch.autograd.grad(F.cross_entropy(shifted(images), DATA.labels), list(shifted.parameters()))
    for (name, w), one, other in zip(MODEL.named_parameters(), first, second, strict=True):
        expected = w.detach() - 0.1 * ((1 - alpha) * one + alpha * other)
        # Before batch norm a bias has no gradient but rounding, whose direction is arbitrary.
        if name != "4.bias":
            torch.testing.assert_close(after[name], expected, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(after["1.running_mean"], statistics)
    assert int(after["1.num_batches_tracked"]) == 1


def test_a_step_costs_two_passes_each_way() -> None:
    with metered() as cost:
        QUICK.loss(copy.deepcopy(MODEL), _batch()).backward()
    assert (cost.forward_images, cost.backward_images) == (128, 128)


def _batch() -> Any:  # noqa: ANN401
    from unbackdoor.train import Batch

    return Batch(DATA.floats(), DATA.labels, torch.arange(64))


def test_unlearning_stops_at_chance_whatever_the_number_of_classes() -> None:
    long = Suppression(mu=0.0, budget=200, batch_size=16, checks_per_epoch=4)
    result = purify(counted(1, unlearning=long))
    unlearning = result.diagnostics["unlearning"]
    assert unlearning["stop_reason"] == "accuracy"
    assert unlearning["accuracy"][-1] <= 0.25
    never = purify(counted(1, unlearning=replace(SHORT, stop_accuracy=0.0), stop_at_chance=False))
    assert never.diagnostics["unlearning"]["stop_reason"] == "budget"


def test_the_original_loses_the_weights_before_it_is_tuned() -> None:
    still = replace(ONE_STEP, learning_rate=1e-12)
    result = purify(counted(5, recipe=still, weight_fraction=0.5))
    state = result.model.state_dict()
    zeros = sum(int((state[f"{name}.weight"].abs() < 1e-9).sum()) for name in ("0", "4"))
    assert zeros == result.diagnostics["weights_cleared"]
    assert zeros > 5 * 9
    kept = state["4.weight"].abs() >= 1e-9
    torch.testing.assert_close(state["4.weight"][kept], MODEL.state_dict()["4.weight"][kept])


def test_cleared_weights_learn_again() -> None:
    result = purify(counted(5, weight_fraction=0.5))
    assert result.diagnostics["weights_cleared"] > 5 * 9
    assert all(float(result.model.state_dict()[f"{name}.weight"].abs().min()) > 0 for name in ("0", "4"))
    # Without any kernel only the bias of the head gets a gradient, and it does learn.
    state, before = purify(counted(32, weight_fraction=1.0)).model.state_dict(), MODEL.state_dict()
    assert not any(float(state[f"{name}.weight"].abs().max()) for name in ("0", "4"))
    assert float((state["10.bias"] - before["10.bias"]).abs().max()) > 1e-3


def guarded(accuracy: float) -> TSBD:
    return replace(QUICK, selection=Selection(guard=Guard(benefit=0.0, accuracy=accuracy)))


def test_a_lax_guard_takes_the_largest_share_and_one_that_nothing_meets_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lax = purify(guarded(1.0)).diagnostics
    assert lax["filters"] == round(0.3 * 32)
    # The defence without cleared weights is right everywhere, all others nowhere.
    measured = iter([1.0])
    monkeypatch.setattr("unbackdoor.purify.tsbd.accuracy_of", lambda *given: next(measured, 0.0))
    none = purify(guarded(0.9)).diagnostics
    assert (none["filters"], none["weights_cleared"]) == (0, 0)
    # Seven shares, of which two round to the same number: three bisections and n = 0.
    assert len(lax["tried"]) <= 4
    assert json.dumps(none)


def test_the_share_is_measured_on_images_that_nothing_learnt_from() -> None:
    result = purify(guarded(1.0))
    generator = rng.generator(0)
    _, held = split(DATA, 0.2, rng.spawn(generator))
    assert result.diagnostics["held_out_images"] == len(held) == 13
    chosen = next(t for t in result.diagnostics["tried"] if t["filters"] == result.diagnostics["filters"])
    assert chosen["accuracy"] == accuracy_of(result.model, held)


def test_a_count_uses_all_images() -> None:
    diagnostics = purify(counted(3)).diagnostics
    assert (diagnostics["learning_images"], diagnostics["held_out_images"]) == (64, 0)
    assert diagnostics["filters"] == 3
    unlearning = TSBD.paper().unlearning
    assert (unlearning.learning_rate, unlearning.batch_size, unlearning.unit, unlearning.budget) == (
        1e-4, 256, "epoch", 1000,
    )  # fmt: skip
    assert (unlearning.augment, unlearning.checks_per_epoch, unlearning.mu) == (True, 1, 0.0)
    paper = replace(TSBD.paper(0.25), unlearning=SHORT, recipe=ONE_STEP)
    assert purify(paper).diagnostics["filters"] == 8


def test_networks_without_convolutions_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with pytest.raises(UnsupportedModelError, match="no convolution"):
        counted(1).purify(model, DATA, generator=rng.generator(0))


@pytest.mark.parametrize(
    "options",
    [
        {"weight_fraction": 1.1},
        {"alpha": -0.1},
        {"held_out_fraction": 0.0},
        {"radius": 0.0},
        {"shares": ()},
        {"shares": (0.2, 0.1)},
        {"shares": (0.0, 0.1)},
        {"shares": (0.5, 1.5)},
        {"selection": Selection(amount="own")},
    ],
)
def test_odd_options_are_refused(options: dict[str, Any]) -> None:
    name = "no rule" if "selection" in options else next(iter(options))
    with pytest.raises(InvalidInputError, match=name):
        TSBD(**options)
