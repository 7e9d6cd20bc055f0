from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

from unbackdoor.bench.cell import Cell
from unbackdoor.bench.store import Store


def test_equal_cells_have_equal_keys_and_others_do_not() -> None:
    cell = Cell("badnets", "ab" * 32, "cifar10", "rnp", options={"a": "1", "b": "2"})
    same = Cell("badnets", "ab" * 32, "cifar10", "rnp", options={"b": "2", "a": "1"})
    assert cell.key == same.key
    others = [
        Cell("badnets", "ab" * 32, "cifar10", "rnp", options={"a": "1"}),
        Cell("badnets", "cd" * 32, "cifar10", "rnp", options={"a": "1", "b": "2"}),
        Cell("badnets", "ab" * 32, "cifar10", "rnp", options={"a": "1", "b": "2"}, seed=1),
        Cell("badnets", "ab" * 32, "cifar10", "rnp", paper=True, options={"a": "1", "b": "2"}),
    ]
    assert len({cell.key, *(other.key for other in others)}) == 5


def test_records_come_back_by_key_the_last_one_wins(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "records.jsonl")
    assert store.records() == {}
    store.add({"key": "a", "value": 1})
    store.add({"key": "b", "value": 2})
    store.add({"key": "a", "value": 3})
    assert {key: record["value"] for key, record in store.records().items()} == {"a": 3, "b": 2}


def test_a_line_that_a_crash_cut_off_costs_that_line_only(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    store.add({"key": "a"})
    with store.path.open("a") as file:
        file.write(json.dumps({"key": "b"})[:5])
    store.add({"key": "c"})
    assert list(store.records()) == ["a", "c"]
    assert store.path.read_text().endswith('{"key": "c"}\n')


def test_one_process_at_a_time_has_a_cell(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    with store.claim("a") as mine:
        assert mine
        with store.claim("a") as again, store.claim("b") as other:
            assert (again, other) == (False, True)
    with store.claim("a") as free:
        assert free
    assert not list(store.path.with_suffix(".locks").iterdir())


def _write(path: Path, name: str) -> None:
    store = Store(path)
    for number in range(50):
        with store.claim(str(number)) as free:
            if free and str(number) not in store.records():
                store.add({"key": str(number), "by": name, "filler": "x" * 2000})


def test_two_processes_tear_no_line_and_repeat_nothing(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(path, name)) for name in ("one", "two")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lines = path.read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    assert sorted(keys, key=int) == [str(number) for number in range(50)]
