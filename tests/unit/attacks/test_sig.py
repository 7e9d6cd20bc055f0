from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.attacks import SIG
from unbackdoor.attacks.poisoning import plan_clean_label
from unbackdoor.attacks.training import StampAfterAugmentation, TriggerStage, armed
from unbackdoor.errors import InvalidInputError
from unbackdoor.testing.subjects import small_data, small_network
from unbackdoor.train import Recipe, cross_entropy_step
from unbackdoor.types import PoisonPlan, as_float, quantise

RECIPE = Recipe(epochs=1, batch_size=16, learning_rate=0.01, crop_padding=1)


def test_the_paper_stripes_the_whole_class_with_the_stripes_of_the_defaults() -> None:
    train_trigger, test_trigger = SIG.paper().triggers()
    assert train_trigger == test_trigger
    assert (train_trigger.strength, train_trigger.periods) == (40 / 255, 6)
    assert SIG.paper() == SIG(class_fraction=1.0)
    assert SIG().class_fraction == 0.8


def test_training_and_test_stripes_can_differ() -> None:
    one, other = SIG(delta_train=20, delta_test=60).triggers()
    assert (one.strength, other.strength) == (20 / 255, 60 / 255)
    one, other = SIG(form="square_wave", weight_train=0.1, weight_test=0.3).triggers()
    assert (one.strength, other.strength, one.form) == (0.1, 0.3, "square_wave")


def test_only_the_class_is_striped_and_its_labels_stay() -> None:
    data = small_data(40)
    attack = SIG(class_fraction=0.5, target_class=2, delta_train=20, delta_test=60, recipe=RECIPE)
    infected = attack.run(data, small_network, generator=rng.generator(0))
    plan = infected.plan
    assert len(plan.indices) == 5
    assert bool((data.labels[plan.indices] == 2).all())
    assert torch.equal(plan.new_labels, data.labels[plan.indices])
    assert infected.trigger == attack.triggers()[1]


@pytest.mark.parametrize("stage", ["before_augmentation", "after_augmentation"])
def test_stripes_enter_where_the_stage_says(stage: TriggerStage) -> None:
    data = small_data(8)
    plan = PoisonPlan(torch.tensor([2, 6]), data.labels[[2, 6]])
    trigger = SIG().triggers()[0]
    poisoned, step = armed(data, plan, trigger, stage)
    assert torch.equal(poisoned.labels, data.labels)
    if stage == "before_augmentation":
        assert step is cross_entropy_step
        assert torch.equal(poisoned.images[[2, 6]], quantise(trigger(as_float(data.images[[2, 6]]))))
        assert torch.equal(poisoned.images[3:6], data.images[3:6])
    else:
        assert isinstance(step, StampAfterAugmentation)
        assert step.poisoned.nonzero().flatten().tolist() == [2, 6]
        assert torch.equal(poisoned.images, data.images)


def test_an_overall_rate_is_counted_over_all_classes() -> None:
    labels = torch.arange(40) % 4
    plan = plan_clean_label(labels, 1, rng.generator(0), poison_fraction=0.1)
    assert len(plan.indices) == 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"delta_train": 0.0}, "grey levels"),
        ({"delta_test": 256.0}, "grey levels"),
        ({"delta_test": float("nan")}, "grey levels"),
        ({"periods": 0.0}, "positive number of periods"),
        ({"form": "square_wave", "weight_train": 1.5}, "strength in"),
        ({"form": "triangle"}, "needs the form"),
    ],
)
def test_odd_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        SIG(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_class": 4}, "is not a class"),
        ({"class_fraction": 0.0}, "class_fraction must lie"),
        ({"poison_fraction": 0.9}, "can use at most"),
    ],
)
def test_what_does_not_fit_the_data_fails_before_training(options: dict[str, Any], sentence: str) -> None:
    def never() -> nn.Module:
        raise AssertionError("the network was built")

    with pytest.raises(InvalidInputError, match=sentence):
        SIG(**options, recipe=RECIPE).run(small_data(), never, generator=rng.generator(0))
