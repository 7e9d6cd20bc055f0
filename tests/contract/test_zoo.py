"""The models that come with the project are whole, small, and what their cards and zoo.toml say."""

from __future__ import annotations

import runpy
import tomllib
from pathlib import Path

import pytest
import torch

from unbackdoor.attacks.registry import ATTACKS
from unbackdoor.bench.artefact import CARD_VERSION
from unbackdoor.bench.zoo import Entry, broken_files, entries, load_infected, load_network
from unbackdoor.models.checkpoint import read_tensors
from unbackdoor.rng import generator

ROOT = Path(__file__).parents[2] / "zoo"
ENTRIES = entries(ROOT) if any(ROOT.glob("*/card.json")) else []
MODELS = [pytest.param(entry, id=entry.name) for entry in ENTRIES]
IMAGES = torch.rand(4, 3, 32, 32, generator=generator(0))

pytestmark = pytest.mark.skipif(not MODELS, reason="this checkout has no zoo; see zoo/zoo.toml")


def test_the_zoo_holds_what_its_specification_names() -> None:
    specified = tomllib.loads((ROOT / "zoo.toml").read_text())["models"]
    names = {entry.name for entry in ENTRIES}
    assert names == set(specified)
    attacks = {entry.card["attack"] for entry in ENTRIES}
    assert attacks == {*ATTACKS, None}
    assert sum(entry.is_clean for entry in ENTRIES) >= 6


def test_the_zoo_is_small() -> None:
    files = [path for path in ROOT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 50e6
    assert max(path.stat().st_size for path in files) <= 1.5e6


@pytest.mark.parametrize("entry", MODELS)
def test_files_are_those_of_the_card(entry: Entry) -> None:
    assert broken_files(entry) == []
    assert entry.card["sha256"] == entry.card["files"]["model.safetensors"]
    stored = read_tensors(entry.folder / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.float16}
    assert entry.card["card_version"] == CARD_VERSION
    assert f"--out zoo/{entry.name} " in entry.card["command"]
    data = entry.card["command"].split("--data ")[1].split()[0]
    assert not Path(data).is_absolute()


@pytest.mark.parametrize("entry", MODELS)
def test_models_load_and_triggers_are_pure(entry: Entry) -> None:
    with torch.no_grad():
        assert load_network(entry)(IMAGES).shape == (4, 10)
    if entry.is_clean:
        return
    infected = load_infected(entry)
    for transform in (infected.trigger, *infected.decoys.values()):
        once = transform(IMAGES)
        assert torch.equal(once, transform(IMAGES))
        assert not torch.equal(once, IMAGES)
        assert 0 <= float(once.min()) <= float(once.max()) <= 1
    assert len(infected.plan.indices) == entry.card["poisoned"]


@pytest.mark.parametrize("entry", MODELS)
def test_infected_models_are_valid_and_clean_ones_good(entry: Entry) -> None:
    if entry.is_clean:
        accuracy = entry.rate("clean_accuracy")
        assert accuracy is not None
        assert accuracy >= (0.86 if entry.name == "clean" else 0.75)
        return
    assert not any(name.startswith("recipe.") for name in entry.card["differs_from_paper"])
    assert entry.card["differs_from_mnp_recipe"]["epochs"]["paper"] == 200
    assert entry.card["command"].count("--twin zoo/clean") == 1
    validity = entry.card["validity"]
    assert validity["valid"] is True, validity["problems"]
    assert bool(validity.get("attack_success_float")) is (entry.card["attack"] == "lira")
    assert validity["natural_floor"]["n"] == entry.card["metrics"]["attack_success"]["n"]


def test_the_table_names_the_success_of_learned_noise_without_rounding() -> None:
    table = runpy.run_path(str(ROOT.parent / "benchmarks" / "attack_table.py"))["table"]
    lira = [entry for entry in ENTRIES if entry.name == "lira"]
    assert table(lira, {}).endswith("\n\nASR on triggered images that are not rounded to 8 bits: lira 99.97.")
    assert "rounded" not in table([entry for entry in ENTRIES if entry.name == "wanet"], {})
