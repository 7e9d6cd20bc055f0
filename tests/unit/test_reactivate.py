from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.evaluate import evaluate
from unbackdoor.reactivate import QueryAttack, Retuning
from unbackdoor.testing import planted_backdoor
from unbackdoor.train import Recipe
from unbackdoor.types import AllToOne, LabelledImages


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


def test_retuning_wakes_an_infected_model_and_leaves_its_input_alone() -> None:
    planted, twin = planted_backdoor(), planted_backdoor(infected=False)
    clean, test = (planted.clean_data(n, rng.generator(n)) for n in (160, 200))
    before = {name: value.clone() for name, value in planted.model.state_dict().items()}
    attack = Retuning(recipe=Recipe(epochs=1, learning_rate=1e-3, schedule="constant", crop_padding=0))
    rates = [
        attack.run(
            each.model, clean, test, planted.trigger, planted.label_rule, generator=rng.generator(0)
        ).attack_success.value
        for each in (planted, twin)
    ]
    assert rates[0] > 0.9 > 0.2 > rates[1]
    assert all(torch.equal(value, planted.model.state_dict()[name]) for name, value in before.items())


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
