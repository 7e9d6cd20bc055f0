from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.attacks import CL, FC, LIRA, AdapBlend, BadNets, Blend
from unbackdoor.bench.artefact import differences, paper_options
from unbackdoor.bench.validity import Requirements, check_infected
from unbackdoor.testing import planted_backdoor
from unbackdoor.train import Recipe
from unbackdoor.triggers.learned_noise import LearnedNoiseTrigger
from unbackdoor.triggers.networks import TriggerNetwork
from unbackdoor.types import AllToAll, AllToOne, Infected, LabelledImages, PoisonPlan

PLANTED = planted_backdoor(target_class=2)
TEST = PLANTED.clean_data(80, rng.generator(0))
NONE = PoisonPlan(torch.tensor([0]), torch.tensor([2]))
INFECTED = Infected(PLANTED.model, PLANTED.trigger, NONE, PLANTED.label_rule)


def _nothing(images: Tensor) -> Tensor:
    return images.clone()


def test_a_working_backdoor_is_valid_and_fully_measured() -> None:
    infected = replace(INFECTED, decoys={"noise": _nothing})
    validity = check_infected(infected, TEST, attack=BadNets(), twin=PLANTED.model)
    assert validity.is_valid, validity.problems
    assert validity.metrics.attack_success.value == 1.0
    # The infected model as its own twin: the floor is the attack success itself.
    assert validity.floor == validity.metrics.attack_success
    assert validity.twin_accuracy == validity.metrics.clean_accuracy
    assert validity.decoys["noise"].value == validity.metrics.clean_accuracy.value
    assert validity.stealth.max_change > 0
    json.dumps(validity.describe(), allow_nan=False)


def test_without_a_twin_floor_and_loss_are_unknown() -> None:
    validity = check_infected(INFECTED, TEST, attack=BadNets())
    assert validity.floor is None
    assert validity.describe()["clean_twin_accuracy"] is None
    assert validity.describe()["unchecked"] == [
        "the loss of clean accuracy against a clean twin",
        "the attack success on a clean twin",
    ]
    assert check_infected(INFECTED, TEST, attack=BadNets(), twin=PLANTED.model).unchecked == ()


def test_an_attack_that_did_not_take_is_told_what_to_raise() -> None:
    attack = Blend(alpha=0.15, poison_fraction=0.07, recipe=Recipe(epochs=3))
    validity = check_infected(replace(INFECTED, trigger=_nothing), TEST, attack=attack)
    assert not validity.is_valid
    assert validity.problems == (
        f"the attack success rate is {validity.metrics.attack_success.value:.1%}, below 90.0%; raise alpha "
        "(now 0.15) or poison_fraction (now 0.07) or the epochs (now 3).",
    )


def test_learned_noise_is_also_measured_without_rounding_that_erases_it() -> None:
    model, trigger = Faint(), LearnedNoiseTrigger(_constant_noise(), 0.3 / 255)
    data = LabelledImages(torch.full((4, 1, 8, 8), 100, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    validity = check_infected(
        Infected(model, trigger, NONE, AllToOne(1)), data, attack=LIRA(eps=0.001, recipe=Recipe(epochs=3))
    )
    assert validity.metrics.attack_success.value == 0.0
    assert validity.float_success is not None
    assert validity.float_success.value == 1.0
    assert validity.describe()["attack_success_float"]["n"] == 2
    problem = next(problem for problem in validity.problems if "success rate" in problem)
    assert "is 0.0% (100.0% without rounding to 8 bits), below 90.0%; raise eps (now 0.001)" in problem
    assert check_infected(INFECTED, TEST, attack=BadNets()).float_success is None


def _constant_noise() -> TriggerNetwork:
    """Return a noise network whose output is large and positive, so that tanh makes it 1."""
    network = TriggerNetwork(1, 1, 1, 1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.fill_(50.0 if "bias" in name else 0.0)
    return network.eval()


class Faint(nn.Module):
    """Answers class 1 exactly if pixels lie off the 8-bit levels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        off = (images * 255 - (images * 255).round()).abs().mean((1, 2, 3)) - 0.1
        return self.scale * torch.stack([-off, off], 1)


def test_an_attack_on_chosen_images_is_not_judged_by_all_images() -> None:
    infected = replace(INFECTED, trigger=_nothing, record={"targeted": {"success_rate": 1.0}})
    assert check_infected(infected, TEST, attack=BadNets()).is_valid


@pytest.mark.parametrize("rate", [0.45, 0.0])
def test_an_attack_on_chosen_images_that_misses_most_of_them_is_not_valid(rate: float) -> None:
    infected = replace(INFECTED, record={"targeted": {"success_rate": rate}})
    validity = check_infected(infected, TEST, attack=FC(variant="targeted"))
    assert not validity.is_valid
    assert f"on the chosen images is {rate:.1%}, below 50.0%; raise" in validity.problems[0]
    easy = Requirements(targeted_success=0.0)
    assert check_infected(infected, TEST, attack=FC(), requirements=easy).is_valid


def test_all_to_all_is_held_against_the_clean_accuracy() -> None:
    accuracy = check_infected(INFECTED, TEST, attack=BadNets()).metrics.clean_accuracy.value
    infected = replace(INFECTED, label_rule=AllToAll(TEST.num_classes))
    validity = check_infected(infected, TEST, attack=BadNets(rule="all_to_all"))
    assert validity.metrics.attack_success.value < 0.85 * accuracy
    assert f"below {0.85 * accuracy:.1%}" in validity.problems[0]
    easy = Requirements(all_to_all_share=0.05)
    assert check_infected(infected, TEST, attack=BadNets(), requirements=easy).is_valid


def test_a_loss_of_accuracy_and_a_failing_decoy_are_problems() -> None:
    broken = planted_backdoor(target_class=2).model
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.zero_()
    infected = Infected(broken, PLANTED.trigger, NONE, PLANTED.label_rule, decoys={"cross": PLANTED.trigger})
    problems = check_infected(infected, TEST, attack=BadNets(), twin=PLANTED.model).problems
    assert any("more than 3.0% below the clean twin's" in problem for problem in problems)
    decoy = check_infected(
        replace(INFECTED, decoys={"cross": PLANTED.trigger}), TEST, attack=BadNets()
    ).problems
    assert len(decoy) == 1
    assert "under the cross decoy" in decoy[0]


@pytest.mark.parametrize("wanted", [1.01])
def test_requirements_can_be_changed(wanted: float) -> None:
    strict = Requirements(attack_success=wanted)
    assert not check_infected(INFECTED, TEST, attack=BadNets(), requirements=strict).is_valid


def test_what_differs_from_the_paper_is_listed_but_for_the_target() -> None:
    attack = Blend(alpha=0.3, target_class=4, recipe=Recipe(epochs=16))
    options = {"alpha": 0.3, "target_class": 4, "recipe": {"epochs": 16, "momentum": 0.9}}
    assert differences(options, paper_options(attack)) == {"alpha": {"here": 0.3, "paper": 0.2}}
    assert differences(options, None) == {}


def test_a_network_that_always_answers_the_target_is_not_infected() -> None:
    constant = planted_backdoor(target_class=2).model
    with torch.no_grad():
        for parameter in constant.parameters():
            parameter.zero_()
    validity = check_infected(replace(INFECTED, model=constant), TEST, attack=BadNets())
    assert "no better than guessing" in validity.problems[0]


def test_advice_never_names_what_makes_it_worse_or_has_no_room() -> None:
    infected = replace(INFECTED, trigger=_nothing)
    covers = check_infected(infected, TEST, attack=AdapBlend()).problems[0]
    assert "cover_fraction" not in covers
    assert "alpha_test (now 0.2)" in covers
    clean_label = check_infected(infected, TEST, attack=CL()).problems[0]
    assert "raise eps (now 16) or class_fraction (now 0.8) or the epochs" in clean_label
