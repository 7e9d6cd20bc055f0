from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unbackdoor.bench.defend import run
from unbackdoor.bench.graphs import GraphBench, GraphCell, graph_cell, graph_table, is_valid
from unbackdoor.bench.store import Store
from unbackdoor.bench.tables import summary_table
from unbackdoor.graph.attacks import ATTACKS
from unbackdoor.graph.purify import PURIFIERS

QUICK = {"training.epochs": "20", "training.hidden": "16"}
DETECTION = {f"detection.{name}": value for name, value in QUICK.items()}
ATTACK = {"poisoned": "12", "surrogate.epochs": "20"}


def cell(attack: str, method: str, **more: str) -> GraphCell:
    options = QUICK | more | (DETECTION if method == "rigbd" else {})
    return graph_cell("tiny", attack, method, seed=1, options=options, attack_options=ATTACK)


def test_everything_that_decides_a_result_is_in_the_key() -> None:
    assert cell("sba", "rigbd").key == cell("sba", "rigbd").key
    others = [cell("none", "rigbd"), cell("sba", "plain"), cell("sba", "rigbd", weight="2")]
    assert len({cell("sba", "rigbd").key, *(other.key for other in others)}) == 4
    assert cell("sba", "rigbd").settings["detection.runs"] == "20"
    assert cell("sba", "rigbd").attack_settings["poisoned"] == "12"


def test_changed_code_of_a_method_or_attack_is_a_new_question(monkeypatch: pytest.MonkeyPatch) -> None:
    old = cell("sba", "rigbd")
    assert not {"method_version", "attack_version"} & set(old.describe())
    assert graph_cell("tiny", "none", "plain", seed=0).key == (
        "40a115deae3d29d28263a49757161a6ebb12c575782a5b8ce18d126aa646097f"
    )
    keys = {old.key}
    for place in (PURIFIERS["rigbd"], ATTACKS["sba"]):
        monkeypatch.setattr(place, "version", 2, raising=False)
        keys.add(cell("sba", "rigbd").key)
    assert len(keys) == 3


def test_changed_options_of_an_attack_are_in_the_name_of_what_is_defended() -> None:
    def model(attack: str, options: dict[str, str]) -> str:
        return graph_cell("tiny", attack, "plain", seed=0, attack_options=options).model

    assert model("ugba", {"poisoned": "12"}) == "tiny, ugba"
    assert model("ugba", {"similarity_weight": "100"}) == "tiny, ugba [similarity_weight=100]"
    assert model("none", {}) == "tiny, none"


def test_records_are_kept_and_tables_made_from_them(tmp_path: Path) -> None:
    store = Store(tmp_path / "graphs.jsonl")
    lines: list[str] = []
    cells = [cell(attack, method) for attack in ("sba", "none") for method in ("plain", "rigbd")]
    run(GraphBench(), cells, store, said=lines.append)
    run(GraphBench(), cells, store, said=lines.append)
    assert len(lines) == 4
    records = list(store.records().values())
    assert [record["status"] for record in records] == ["ok"] * 4
    assert set(records[0]["after"]) == {"clean_accuracy", "attack_success", "robust_accuracy"}
    assert set(records[2]["after"]) == {"clean_accuracy"}
    assert records[1]["detection"]["recall"]["n"] == 12
    assert [record["valid"] for record in records] == [
        *[records[0]["before"]["attack_success"]["value"] >= 0.9] * 2,
        None,
        None,
    ]
    table = graph_table(records)
    assert table.count("\n") == 5
    assert "tiny, sba" in table
    assert "rigbd" in summary_table(records)


def test_attacks_below_ninety_per_cent_are_counted_as_not_valid() -> None:
    def record(success: float | None) -> dict[str, Any]:
        rate = {"attack_success": {"value": success}}
        return {
            "status": "ok", "cell": {"model": "g, sba", "method": "plain", "options": {}, "paper": False},
            "attack": "sba",
            "before": rate, "after": {}, "cost": {"seconds": 1.0},
        }  # fmt: skip

    records = [record(success) for success in (0.9, 0.89, None)]
    assert [is_valid(each["before"]) for each in records] == [True, False, False]
    assert is_valid({"clean_accuracy": {"value": 0.9}}) is None
    heading, _, row = graph_table(records).splitlines()
    assert [cell.strip() for cell in heading.split("|")][3:5] == ["seeds", "valid attacks"]
    assert [cell.strip() for cell in row.split("|")][3:5] == ["3", "1 of 3"]


def test_a_mean_over_fewer_runs_says_over_how_many() -> None:
    def record(precision: float | None) -> dict[str, Any]:
        rates = {"recall": {"value": 0.5}, "precision": {"value": precision}, "auroc": 0.75}
        return {
            "status": "ok", "cell": {"model": "g, sba", "method": "rigbd", "options": {}, "paper": False},
            "attack": "sba", "before": {"attack_success": {"value": 1.0}}, "after": {},
            "detection": {**rates, "backdoored": precision is not None}, "cost": {"seconds": 1.0},
        }  # fmt: skip

    _, _, row = graph_table([record(1.0), record(None), record(0.5)]).splitlines()
    found = [cell.strip() for cell in row.split("|")]
    assert "75.0 (50.0 to 100.0; 2 of 3 runs)" in found
    assert "50.0 (50.0 to 50.0)" in found


def test_an_impossible_cell_is_a_record() -> None:
    impossible = graph_cell("tiny", "sba", "plain", seed=0, attack_options={"poisoned": "5000"})
    record = GraphBench().answer(impossible)
    assert record["status"] == "refused"
    assert "5000 nodes" in record["problem"]
