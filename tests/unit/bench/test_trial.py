from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from unbackdoor import rng
from unbackdoor.bench import trial, zoo
from unbackdoor.bench.artefact import save_clean
from unbackdoor.bench.store import Store
from unbackdoor.data import draw_balanced, load_images
from unbackdoor.errors import InvalidInputError
from unbackdoor.models import build

SPEC = Path(__file__).parents[3] / "benchmarks" / "detection_trial.toml"


def test_grids_spell_out_their_models() -> None:
    models = trial.expand(
        [
            {
                "name": "b", "attack": "badnets", "count": 3, "seed": 10, "epochs": [4, 6], "set": ["a=1"],
                "vary": {"target_class": [0, 3], "pattern": ["white"]},
            }
        ]
    )  # fmt: skip
    assert models["b-02"] == {
        "attack": "badnets",
        "seed": 12,
        "set": ["a=1", "target_class=0", 'pattern="white"'],
        "epochs": 4,
    }
    assert [values["epochs"] for values in models.values()] == [4, 6, 4]
    read = tomllib.loads(trial.specification({"width": 8, "set": ["x=true"]}, models))
    assert read == {"defaults": {"width": 8, "set": ["x=true"]}, "models": models}


@pytest.mark.parametrize(
    "grids",
    [
        [{"name": "a", "attack": "none"}],
        [{"name": "a", "attack": "none", "count": 1, "epoch": 3}],
        [{"name": "a", "attack": "none", "count": 1}, {"name": "a", "attack": "none", "count": 2}],
    ],
)
def test_odd_grids_are_refused(grids: list[dict[str, object]]) -> None:
    with pytest.raises(InvalidInputError, match=r"a grid of models must say|two models .* are called"):
        trial.expand(grids)


def test_the_trial_is_as_large_as_it_should_be() -> None:
    from unbackdoor.attacks.registry import attack_named
    from unbackdoor.settings import configure

    sets = tomllib.loads(SPEC.read_text())["sets"]
    models = {name: trial.expand(d["grids"], d["vary"]) for name, d in sets.items()}
    clean = [m for each in models.values() for m in each.values() if m["attack"] == "none"]
    infected = [m for each in models.values() for m in each.values() if m["attack"] != "none"]
    assert len(clean) >= 20
    assert len(infected) >= 40
    for each in models.values():
        # Half of the clean models must be able to guarantee 5 %.
        assert sum(m["attack"] == "none" for m in each.values()) >= 38
    for model in infected:
        configure(attack_named(model["attack"]), model["set"])
    assert {"sra", "iab", "lira"} <= {model["attack"] for model in infected}


def test_infected_models_of_the_trial_are_trained_as_clean_ones_are() -> None:
    for described in tomllib.loads(SPEC.read_text())["sets"].values():
        models = trial.expand(described["grids"], described["vary"]).values()
        recipes: dict[bool, set[str]] = {True: set(), False: set()}
        epochs: dict[bool, set[int]] = {True: set(), False: set()}
        for model in models:
            clean = model["attack"] == "none"
            varied = {text for text in model["set"] if text.partition("=")[0] in described["vary"]}
            assert len(varied) == len(described["vary"])
            recipes[clean] |= varied
            epochs[clean].add(model.get("epochs", described["defaults"]["epochs"]))
        assert recipes[False] == recipes[True]
        assert epochs[False] <= epochs[True]


def test_what_all_grids_vary_runs_on_from_grid_to_grid() -> None:
    grids: list[dict[str, object]] = [
        {"name": "a", "attack": "none", "count": 2},
        {"name": "b", "attack": "badnets", "count": 2, "vary": {"y": [7]}},
    ]
    models = trial.expand(grids, {"x": [1, 2, 3], "y": [0]})
    assert [model["set"] for model in models.values()] == [
        ["x=1", "y=0"], ["x=2", "y=0"], ["x=3", "y=7"], ["x=1", "y=7"],
    ]  # fmt: skip


def test_a_question_is_answered_once_and_a_changed_default_is_a_new_one(tmp_path: Path) -> None:
    digits = load_images("digits", split="test", image_size=8)
    folder = tmp_path / "zoo" / "clean-00"
    folder.mkdir(parents=True)
    with rng.isolated(rng.generator(0)):
        network = build("resnet10", width=4, num_classes=10, in_channels=1).eval()
    job = {"job": {"arch": "resnet10"}}
    save_clean(folder, network, draw_balanced(digits, 20, rng.generator(0)), seed=0, record=job)
    (entry,) = zoo.entries(tmp_path / "zoo")
    scan = trial.question(
        entry, "digits", "scan",
        ["suppression.budget=3", "search.first.steps=2", "search.second.steps=2"], clean_images=40,
    )  # fmt: skip
    label = trial.question(entry, "digits", "rnp-label", ["unlearning.budget=2"], clean_images=40)
    assert scan.key != trial.question(entry, "digits", "scan", clean_images=40).key
    store, said = Store(tmp_path / "scores.jsonl"), list[str]()
    for _ in range(2):
        trial.run(trial.Trial(tmp_path / "zoo", digits), [scan, label], store, said=said.append)
    assert len(said) == len(store.records()) == 2
    record = store.records()[scan.key]
    assert (record["status"], record["attack"], record["valid"]) == ("ok", None, True)
    assert set(record["detections"]) == {"collapse", "recovery", "mnp", "trigger_search", "head_weights"}
    assert record["detections"]["head_weights"]["score"] is not None
    assert record["kind"]["num_classes"] == 10
    # The whole takes at least as long as its parts, of which one is the run that two read.
    assert record["scan_seconds"] >= sum(each["seconds"] for each in record["detections"].values()) - 0.01
    json.dumps(record, allow_nan=False)


def test_what_a_detector_refuses_is_a_record(tmp_path: Path) -> None:
    digits = load_images("digits", split="test", image_size=8)
    folder = tmp_path / "zoo" / "clean-00"
    folder.mkdir(parents=True)
    network = build("resnet10", width=4, num_classes=5, in_channels=1).eval()
    few = draw_balanced(digits, 20, rng.generator(0))
    few = type(few)(few.images, few.labels % 5)
    save_clean(folder, network, few, seed=0, record={"job": {"arch": "resnet10"}})
    (entry,) = zoo.entries(tmp_path / "zoo")
    record = trial.Trial(tmp_path / "zoo", digits).answer(trial.question(entry, "digits", "nc"))
    assert record["status"] == "refused"
    assert "but the model has 5 outputs" in record["problem"]
    replaced = trial.question(entry, "digits", "nc", clean_images=40)
    with pytest.raises(InvalidInputError, match="other weights"):
        trial.Trial(tmp_path / "zoo", digits).answer(replace(replaced, model_sha256="0" * 64))
