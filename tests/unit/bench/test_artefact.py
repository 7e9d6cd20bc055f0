from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from unbackdoor import rng
from unbackdoor.attacks import BadNets, WaNet
from unbackdoor.bench.artefact import label_rule_of, load_plan, read_card, save_clean, save_infected
from unbackdoor.errors import InvalidInputError
from unbackdoor.models.checkpoint import read_tensors
from unbackdoor.testing import planted_backdoor
from unbackdoor.train import Recipe
from unbackdoor.triggers import load_trigger
from unbackdoor.types import Infected, PoisonPlan

PLANTED = planted_backdoor(target_class=2)
TEST = PLANTED.clean_data(40, rng.generator(0))


def test_an_infected_model_can_be_rebuilt_from_its_folder(tmp_path: Path) -> None:
    plan = PoisonPlan(torch.tensor([3, 5]), torch.tensor([2, 2]))
    infected = Infected(PLANTED.model, PLANTED.trigger, plan, PLANTED.label_rule, {"training": {}})
    card = save_infected(
        tmp_path, infected, TEST, attack=BadNets(), seed=7, extra={"architecture": "planted"}
    )
    assert read_card(tmp_path) == card == json.loads((tmp_path / "card.json").read_text())
    assert card["sha256"] == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert (card["seed"], card["poisoned"], card["architecture"]) == (7, 2, "planted")
    restored = load_plan(tmp_path)
    assert torch.equal(restored.indices, plan.indices)
    assert torch.equal(restored.new_labels, plan.new_labels)
    assert card["metrics"]["attack_success"]["value"] == 1.0
    assert card["options"]["poison_fraction"] == 0.1
    assert label_rule_of(card) == PLANTED.label_rule
    images = TEST.floats()
    assert torch.equal(load_trigger(tmp_path / "trigger.safetensors")(images), PLANTED.trigger(images))
    stored = read_tensors(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[name], t) for name, t in PLANTED.model.state_dict().items())
    assert not (tmp_path / "card.json.tmp").exists()


def test_the_recipe_is_held_against_the_one_of_mnp_and_not_of_the_attack(tmp_path: Path) -> None:
    infected = Infected(
        PLANTED.model, PLANTED.trigger, PoisonPlan(torch.tensor([3]), torch.tensor([2])), PLANTED.label_rule
    )
    attack = WaNet(recipe=Recipe(epochs=16, learning_rate=0.15, precision="fp32"))
    card = save_infected(tmp_path, infected, TEST, attack=attack, seed=0)
    assert card["differs_from_paper"] == {"strength": {"here": 1.5, "paper": 0.5}}
    assert card["differs_from_mnp_recipe"] == {
        "epochs": {"here": 16, "paper": 200},
        "learning_rate": {"here": 0.15, "paper": 0.1},
    }


def test_a_clean_model_has_no_label_rule(tmp_path: Path) -> None:
    card = save_clean(tmp_path, PLANTED.model, TEST, seed=1, record={"training": {"losses": [1.0]}})
    assert card["attack"] is None
    assert card["metrics"]["clean_accuracy"]["n"] == 40
    with pytest.raises(InvalidInputError, match="names no label rule"):
        label_rule_of(read_card(tmp_path))


@pytest.mark.parametrize(("text", "sentence"), [("{", "cannot be read"), ("[]", "holds no JSON object")])
def test_odd_cards_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_card(tmp_path)
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(InvalidInputError, match=sentence):
        read_card(tmp_path)


def test_a_card_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_card(tmp_path)
