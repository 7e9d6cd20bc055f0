from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from unbackdoor import rng
from unbackdoor.attacks import BadNets
from unbackdoor.bench.artefact import save_clean, save_infected
from unbackdoor.bench.cell import Cell
from unbackdoor.bench.defend import Bench, cell_of, run
from unbackdoor.bench.store import Store
from unbackdoor.models import build
from unbackdoor.testing.subjects import small_data
from unbackdoor.train import Recipe

TRAIN, TEST = small_data(80), small_data(60)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("zoo")
    for name in ("badnets", "clean"):
        (root / name).mkdir()
    attack = BadNets(recipe=Recipe(epochs=1, batch_size=16), poison_fraction=0.3)
    infected = attack.run(
        TRAIN, lambda: build("resnet10", width=4, num_classes=4), generator=rng.generator(0)
    )
    job = {"job": {"arch": "resnet10"}}
    save_clean(root / "clean", infected.model, TEST, seed=0, record=job)
    save_infected(root / "badnets", infected, TEST, attack=attack, seed=0, extra=job)
    return Bench((root,), TRAIN, TEST)


def cell(bench: Bench, model: str, method: str, **options: str) -> Cell:
    entry = bench.entry(model)
    return cell_of(
        entry, method, data="small", options=options, clean_images=32, reactivate=model == "badnets"
    )


def test_a_cell_spells_out_what_decides_its_result(bench: Bench) -> None:
    one, other = cell(bench, "badnets", "clp"), cell(bench, "badnets", "clp", u="2")
    assert one.settings["u"] == "3"
    assert other.settings["u"] == "2"
    assert one.key != other.key
    assert one.key == cell(bench, "badnets", "CLP").key


def test_a_record_holds_what_was_asked_measured_and_spent(bench: Bench) -> None:
    record = bench.answer(cell(bench, "badnets", "clp"))
    assert record["status"] == "ok"
    assert record["attack"] == "badnets"
    assert set(record["after"]) == {"clean_accuracy", "attack_success", "robust_accuracy"}
    assert record["before"]["clean_accuracy"]["n"] == 60
    assert record["cost"]["forward_images"] > 0
    assert record["reactivated"]["retuned_accuracy"]["n"] == 30
    assert 0 <= record["reactivated"]["queried_without_trigger"]["value"] <= 1
    json.dumps(record, allow_nan=False)
    assert set(bench.answer(cell(bench, "clean", "clp"))["after"]) == {"clean_accuracy"}


def test_a_refusal_is_a_record(bench: Bench) -> None:
    record = bench.answer(replace(cell(bench, "clean", "bnp"), clean_images=1))
    assert record["status"] == "refused"
    assert "at least 2" in record["problem"]


def test_finished_cells_are_not_answered_again(bench: Bench, tmp_path: Path) -> None:
    store, lines = Store(tmp_path / "records.jsonl"), list[str]()
    cells = [cell(bench, "clean", "clp"), cell(bench, "clean", "bnp")]
    run(bench, cells[:1], store, said=lines.append)
    run(bench, cells, store, said=lines.append)
    assert [line.split(":")[0] for line in lines] == ["clean clp seed 0", "clean bnp seed 0"]
    assert list(store.records()) == [each.key for each in cells]
    with store.claim(cells[0].key):
        store.path.unlink()
        run(bench, cells[:1], store, said=lines.append)
    assert len(lines) == 2  # somebody else works on it
