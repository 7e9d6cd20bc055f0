from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.attacks import BadNets
from unbackdoor.bench import zoo
from unbackdoor.bench.artefact import save_clean, save_infected
from unbackdoor.errors import InvalidInputError
from unbackdoor.evaluate import evaluate
from unbackdoor.models import NormalisedModel, build
from unbackdoor.testing.subjects import small_data
from unbackdoor.train import Recipe
from unbackdoor.types import Infected, LabelledImages

TEST = small_data(60)


def _network() -> nn.Module:
    return NormalisedModel(build("resnet10", width=4, num_classes=4), (0.5,) * 3, (0.25,) * 3)


def _infected() -> Infected:
    attack = BadNets(recipe=Recipe(epochs=1, batch_size=16), poison_fraction=0.3)
    return attack.run(small_data(64), _network, generator=rng.generator(0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("zoo")
    for name in ("badnets", "clean"):
        (root / name).mkdir()
    infected = _infected()
    job = {"job": {"arch": "resnet10"}}
    save_clean(root / "clean", infected.model, TEST, seed=0, record=job, half=True)
    save_infected(
        root / "badnets", infected, TEST, attack=BadNets(), seed=0, extra=job, half=True, twin=infected.model
    )
    return root


def _verify(root: Path, *names: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    broken = zoo.verify(root, list(names), TEST, report=found.__setitem__)
    assert broken == sum(bool(problems) for problems in found.values())
    return found


def test_entries_are_listed_by_name_with_their_claims(root: Path) -> None:
    infected, clean = zoo.entries(root)
    assert (infected.name, infected.is_clean, clean.is_clean) == ("badnets", False, True)
    assert infected.rate("natural_floor") == infected.card["validity"]["natural_floor"]["value"]
    assert clean.rate("attack_success") is None


def test_everything_an_attack_left_can_be_loaded_again(root: Path) -> None:
    entry = zoo.entry_named(root, "badnets")
    again = zoo.load_infected(entry)
    assert len(again.plan.indices) == entry.card["poisoned"] == 19
    measured = evaluate(again.model, TEST, again.trigger, again.label_rule)
    assert measured.describe() == entry.card["metrics"]


def test_the_success_on_chosen_images_is_judged_again(root: Path, tmp_path: Path) -> None:
    copy = _edited(root, tmp_path / "zoo", targeted={"success_rate": 0.1})
    measured = zoo.measure(zoo.entry_named(copy, "badnets"), TEST)
    assert "on the chosen images is 10.0%" in "".join(measured["validity"]["problems"])


def test_a_sound_zoo_is_as_claimed(root: Path) -> None:
    assert _verify(root) == {"badnets": [], "clean": []}


def test_false_claims_changed_and_missing_files_are_found(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "zoo"
    shutil.copytree(root, copy)
    entry = zoo.entry_named(copy, "badnets")
    metrics: dict[str, Any] = dict(entry.card["metrics"])
    true = metrics["clean_accuracy"]["value"]
    wrong = true + 0.5 if true < 0.5 else true - 0.5
    zoo.update_card(
        entry, {"metrics": metrics | {"clean_accuracy": metrics["clean_accuracy"] | {"value": wrong}}}
    )
    problems = _verify(copy, "badnets")["badnets"]
    assert len(problems) == 1
    assert f"the card claims {wrong:.4f}" in problems[0]
    (copy / "badnets" / "trigger.safetensors").write_bytes(b"other")
    (copy / "badnets" / "plan.safetensors").unlink()
    assert _verify(copy, "badnets")["badnets"] == [
        "plan.safetensors is missing",
        "trigger.safetensors is not the file that the card was written for",
    ]
    assert _verify(copy, "clean") == {"clean": []}


def test_unknown_names_and_empty_folders_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no model 'lira'; it has badnets, clean"):
        zoo.entry_named(root, "lira")
    for empty, problem in ((tmp_path, "holds no models"), (tmp_path / "absent", "does not exist")):
        with pytest.raises(InvalidInputError, match=problem):
            zoo.entries(empty)


def test_a_clean_model_has_nothing_infected_to_load(root: Path) -> None:
    with pytest.raises(InvalidInputError):
        zoo.load_infected(zoo.entry_named(root, "clean"))


def test_weights_are_stored_in_half_precision_and_measured_so(root: Path) -> None:
    from unbackdoor.models.checkpoint import read_tensors

    stored = read_tensors(root / "badnets" / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.float16}
    loaded = zoo.load_network(zoo.entry_named(root, "badnets")).state_dict()
    assert all(torch.equal(loaded[name], t.to(loaded[name].dtype)) for name, t in stored.items())


def _edited(root: Path, copy: Path, **changes: Any) -> Path:  # noqa: ANN401 - JSON values
    shutil.copytree(root, copy)
    zoo.update_card(zoo.entry_named(copy, "badnets"), changes)
    return copy


def test_a_card_cannot_make_its_reader_run_code(root: Path, tmp_path: Path) -> None:
    code = tmp_path / "evil.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef net(): ...\n")
    for number, arch in enumerate((f"{code}:net", "os:system", "antigravity:fly")):
        copy = _edited(root, tmp_path / str(number), job={"arch": arch})
        with pytest.raises(InvalidInputError, match="code that a card names is never run"):
            zoo.load_network(zoo.entry_named(copy, "badnets"))
        assert "never run" in _verify(copy)["badnets"][0]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../badnets/model.safetensors", "..", "", "/etc/hostname", "a/../b"])
def test_file_names_in_a_card_stay_in_its_folder(root: Path, tmp_path: Path, name: str) -> None:
    files = zoo.entry_named(root, "badnets").card["files"]
    copy = _edited(root, tmp_path / "zoo", files={**files, name: files["model.safetensors"]})
    assert _verify(copy, "badnets")["badnets"] == [f"{name!r} is no name of a file in the folder"]


def test_a_card_without_hashes_is_not_as_claimed(root: Path, tmp_path: Path) -> None:
    copy = _edited(root, tmp_path / "zoo", files={})
    needed = ("model", "plan", "trigger")
    assert _verify(copy)["badnets"] == [f"the card has no SHA-256 of {name}.safetensors" for name in needed]


def test_one_model_that_cannot_be_measured_does_not_stop_the_others(root: Path, tmp_path: Path) -> None:
    copy = _edited(root, tmp_path / "zoo", attack="nosuch")
    found = _verify(copy)
    assert found["clean"] == []
    assert "'nosuch', which does not exist here" in found["badnets"][0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            (key, value)
            for key in ("metrics", "validity", "files", "job", "label_rule")
            for value in ("x", [1], 5)
        ),
        ("attack", 5),
        ("metrics", {"attack_success": {"value": "x"}}),
        ("metrics", {"attack_success": {"value": None, "low": 0, "high": 1, "successes": 0, "n": 5}}),
        ("validity", {"decoy_accuracy": {"cross": 1}}),
        ("validity", {"stealth": {}}),
        ("differs_from_paper", {"alpha": 1}),
        ("targeted", {"success_rate": None}),
    ],
)
def test_oddly_typed_cards_are_refused_in_a_sentence(
    root: Path, tmp_path: Path, key: str, value: object
) -> None:
    copy = _edited(root, tmp_path / "zoo", **{key: value})
    with pytest.raises(InvalidInputError, match=rf"card\.json is no sound model card: {key}"):
        zoo.entries(copy)


def test_a_card_of_a_million_brackets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "card.json").write_text("[" * 1_000_000)
    with pytest.raises(InvalidInputError, match="cannot be read as a model card"):
        zoo.entries(tmp_path)


def test_an_infected_model_cannot_pose_as_a_clean_one(root: Path, tmp_path: Path) -> None:
    copy = _edited(root, tmp_path / "zoo", attack=None)
    assert _verify(copy, "badnets")["badnets"] == ["there is a trigger, but the card names no attack"]


def test_the_hash_that_is_shown_is_that_of_the_file(root: Path, tmp_path: Path) -> None:
    copy = _edited(root, tmp_path / "zoo", sha256="0" * 64)
    assert _verify(copy, "badnets")["badnets"] == ["sha256 is not that of model.safetensors in files"]


def test_other_weights_than_those_of_the_card_are_not_measured(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "zoo"
    shutil.copytree(root, copy)
    (copy / "other").mkdir()
    save_clean(copy / "other", _network(), TEST, seed=0, record={"job": {"arch": "resnet10"}})
    shutil.copy(copy / "other" / "model.safetensors", copy / "badnets" / "model.safetensors")
    with pytest.raises(InvalidInputError, match="holds other weights than those its card speaks of"):
        zoo.load_network(zoo.entry_named(copy, "badnets"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"num_classes": "ten"}, "num_classes"), ({"sha256": 3}, "sha256")],
)
def test_cards_with_odd_numbers_are_refused(
    root: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        zoo.entries(_edited(root, tmp_path / "zoo", **changes))


def test_a_card_that_claims_nothing_is_refused(root: Path, tmp_path: Path) -> None:
    copy = _edited(root, tmp_path / "zoo", metrics={})
    with pytest.raises(InvalidInputError, match="claims no clean_accuracy"):
        zoo.entries(copy)


def test_images_with_other_channels_are_not_measured_on(root: Path) -> None:
    # The normalisation in front of these networks would spread one channel over three.
    grey = LabelledImages(TEST.images[:, :1], TEST.labels)
    for entry in zoo.entries(root):
        with pytest.raises(InvalidInputError, match=r"have 1 channel\(s\)"):
            zoo.measure(entry, grey)


def test_a_trigger_that_is_not_the_attacks_is_refused(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "zoo"
    shutil.copytree(root, copy)
    trigger = copy / "badnets" / "trigger.safetensors"
    trigger.write_bytes(trigger.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(InvalidInputError, match=r"trigger\.safetensors is not the file that the card"):
        zoo.load_infected(zoo.entry_named(copy, "badnets"))
