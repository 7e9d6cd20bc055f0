from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import reactivate, rng
from unbackdoor import train as training
from unbackdoor.errors import InvalidInputError
from unbackdoor.evaluate import evaluate
from unbackdoor.rates import Rate
from unbackdoor.reactivate import QueryAttack, Retuning, reactivation
from unbackdoor.testing import planted_backdoor
from unbackdoor.testing.planted import GUILTY_FILTERS, PlantedBackdoor
from unbackdoor.types import AllToOne, LabelledImages, as_float, quantise


class Sleeper(nn.Module):
    """Answers class 1 if the trigger's corner pixel and the pixel beside it are bright enough, else 0."""

    def forward(self, x: Tensor) -> Tensor:
        score = 20 * (x[:, 0, 0, 0] + x[:, 0, 0, 1] - 1.2)
        return torch.stack([torch.zeros_like(score), score], 1)


def corner(images: Tensor) -> Tensor:
    stamped = images.clone()
    stamped[:, :, 0, 0] = 0.65
    return stamped


def grey(count: int) -> LabelledImages:
    noise = torch.rand((count, 1, 4, 4), generator=rng.generator(0))
    return LabelledImages(0.5 + 0.01 * noise, torch.zeros(count, dtype=torch.int64))


@pytest.mark.parametrize("knowledge", ["query", "gradient"])
def test_a_small_change_wakes_a_sleeping_trigger_and_not_a_clean_image(knowledge: str) -> None:
    attack = QueryAttack(eps=0.05, steps=60, images=8, knowledge=knowledge)  # type: ignore[arg-type]
    model = Sleeper()
    before = evaluate(model, grey(30), corner, AllToOne(1)).attack_success.value
    result = attack.run(model, grey(10), grey(30), corner, AllToOne(1), generator=rng.generator(0))
    assert before == 0
    assert result.attack_success.value == 1
    assert result.without_trigger.value == 0
    assert result.queries == 8 * 61


def test_a_change_that_works_without_the_trigger_is_counted_as_such() -> None:
    attack = QueryAttack(eps=0.3, steps=60, images=8)
    result = attack.run(Sleeper(), grey(10), grey(30), corner, AllToOne(1), generator=rng.generator(0))
    assert result.without_trigger.value == 1


def test_the_change_keeps_to_its_bound_and_the_model_is_left_alone() -> None:
    seen: list[Tensor] = []
    model = Sleeper()
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    QueryAttack(eps=0.05, steps=5, images=8).run(
        model, grey(8), grey(8), lambda images: images, AllToOne(1), generator=rng.generator(0)
    )
    assert all(float((part - 0.505).abs().max()) <= 0.05 + 0.005 + 1 / 255 for part in seen)
    assert model.training


class Forked(nn.Module):
    """With the trigger's bright corner two more pixels have to be brighter; without it, one darker."""

    def forward(self, x: Tensor) -> Tensor:
        stamped = x[:, 0, 0, 0] > 0.58
        brighter = torch.minimum(x[:, 0, 0, 1], x[:, 0, 2, 2]) - 0.53
        score = 50 * torch.where(stamped, brighter, 0.47 - x[:, 0, 2, 2])
        return torch.stack([torch.zeros_like(score), score], 1)


def test_the_control_gets_a_change_of_its_own_and_both_are_measured_on_the_test_images() -> None:
    attack = QueryAttack(eps=0.05, steps=60, images=8)
    result = attack.run(Forked(), grey(10), grey(30), corner, AllToOne(1), generator=rng.generator(0))
    assert (result.attack_success.value, result.without_trigger.value) == (1, 1)
    assert (result.attack_success.n, result.without_trigger.n) == (30, 30)


def asleep(planted: PlantedBackdoor) -> nn.Module:
    """Return the model with the guilty filters' weights in the head at a tenth: the trigger does little."""
    model = copy.deepcopy(planted.model)
    with torch.no_grad():
        model.get_parameter("head.weight")[planted.label_rule.target_class, -GUILTY_FILTERS:] *= 0.1
    return model


def test_retuning_wakes_a_sleeping_backdoor_and_teaches_a_clean_model_none() -> None:
    planted, twin = planted_backdoor(), planted_backdoor(infected=False)
    clean, test = (planted.clean_data(n, rng.generator(n)) for n in (300, 200))
    sleeping = asleep(planted)
    before = evaluate(sleeping, test, planted.trigger, planted.label_rule).attack_success.value
    state = {name: value.clone() for name, value in sleeping.state_dict().items()}
    woken, control = (
        Retuning()
        .run(model, clean, test, planted.trigger, planted.label_rule, generator=rng.generator(0))
        .attack_success
        for model in (sleeping, twin.model)
    )
    assert before < 0.2 < 0.9 < woken.value
    assert control.value < 0.2
    assert woken.n == int((test.labels != 0).sum())
    assert all(torch.equal(value, sleeping.state_dict()[name]) for name, value in state.items())


def test_stamped_images_are_shown_as_the_attacker_stamps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = planted_backdoor()
    clean = planted.clean_data(60, rng.generator(0))
    shown: list[bool] = []
    true_batches = training.batches

    def spy(data: LabelledImages, *given: Any, **options: Any) -> Iterator[training.Batch]:  # noqa: ANN401
        for batch in true_batches(data, *given, **options):
            as_they_are = (batch.images - as_float(data.images[batch.indices])).abs().flatten(1).amax(1) == 0
            shown.extend(as_they_are[batch.indices >= len(clean)].tolist())
            yield batch

    monkeypatch.setattr(training, "batches", spy)
    Retuning().run(
        planted.model, clean, clean, planted.trigger, planted.label_rule, generator=rng.generator(0)
    )
    assert len(shown) == 5 * 5
    assert all(shown)


def test_nothing_is_measured_on_images_that_the_attacker_has(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = planted_backdoor()
    data = planted.clean_data(48, rng.generator(0))
    data = replace(data, images=quantise(data.floats() * 0 + torch.arange(48).view(-1, 1, 1, 1) / 255))
    seen: list[tuple[set[int], set[int]]] = []

    def note(
        self: object,
        model: nn.Module,
        attacker: LabelledImages,
        test: LabelledImages,
        *_: object,
        **__: object,
    ) -> Any:  # noqa: ANN401
        mine, rest = (set(part.images[:, 0, 0, 0].tolist()) for part in (attacker, test))
        seen.append((mine, rest))
        rate = Rate(0, 1)
        return SimpleNamespace(
            attack_success=rate, clean_accuracy=rate, without_trigger=rate, queries=0
        )  # fmt: skip

    monkeypatch.setattr(Retuning, "run", note)
    monkeypatch.setattr(QueryAttack, "run", note)
    for count, expected in ((10, 10), (500, 24)):
        reactivation(
            planted.model, data, planted.trigger, planted.label_rule,
            generator=rng.generator(0), attacker_images=count,
        )  # fmt: skip
        for mine, rest in seen[-2:]:
            assert len(mine) == expected
            assert not mine & rest
            assert mine | rest == set(range(48))
    assert len(seen) == 4


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="at least 1 poisoned"):
        Retuning(poisoned=0)
    with pytest.raises(InvalidInputError, match="counts only 0"):
        Retuning().run(Sleeper(), grey(10), grey(10), corner, AllToOne(0), generator=rng.generator(0))
    with pytest.raises(InvalidInputError, match="counts none"):
        QueryAttack().run(Sleeper(), grey(10), grey(10), corner, AllToOne(0), generator=rng.generator(0))
    with pytest.raises(InvalidInputError, match="eps"):
        replace(QueryAttack(), eps=0.0)
    with pytest.raises(InvalidInputError, match="knowledge"):
        replace(QueryAttack(), knowledge="oracle")  # type: ignore[arg-type]


def test_the_change_works_where_the_images_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def falling(model: nn.Module, images: Tensor, wanted: Tensor) -> float:
        seen.append(images.device.type)
        return -float(len(seen))

    monkeypatch.setattr(reactivate, "_loss", falling)
    # Without an accelerator, the device that holds shapes alone stands for one.
    images, wanted = torch.empty(8, 1, 4, 4, device="meta"), torch.zeros(8, dtype=torch.int64)
    delta = QueryAttack(steps=2, images=8)._fit(nn.Identity(), images, wanted, rng.generator(0))
    assert seen == ["meta"] * 3
    # A change that was found on the CPU is brought to the images.
    for found in (delta, torch.zeros(1, 4, 4)):
        parts = reactivate._stamped(images, lambda stamped: stamped, found)
        assert {part.device.type for part in parts} == {"meta"}
