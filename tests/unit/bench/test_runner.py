from __future__ import annotations

import json
import multiprocessing
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import unbackdoor
from toy import Number, Square, begun
from unbackdoor.bench.executors import Inline
from unbackdoor.bench.executors.base import Job, Lost, Outcome, Take, Task
from unbackdoor.bench.runner import Tally, Watcher, drive
from unbackdoor.bench.store import Store

NUMBERS = [Number(value) for value in range(40)]
FORK = multiprocessing.get_context("fork")
"""Quick to start; these children start no threads."""


class Seen(Watcher):
    def __init__(self) -> None:
        self.held: list[str] = []
        self.lines: list[str] = []
        self.waited: list[str] = []

    def began(self, tally: Tally) -> None:
        self.lines.append(f"{tally.found} of {tally.total}")

    def ended(self, task: Task, record: dict[str, Any], tally: Tally) -> None:
        self.lines.append(f"{task.label}: {record['status']}")

    def left(self, tasks: Sequence[Task]) -> None:
        self.held = [task.label for task in tasks]

    def waits(self, tasks: Sequence[Task]) -> None:
        self.waited = [task.label for task in tasks]


def squares(store: Store) -> dict[str, int]:
    return {key: record["square"] for key, record in store.records().items()}


def test_a_run_keeps_every_record_and_a_second_does_nothing(tmp_path: Path) -> None:
    store, seen = Store(tmp_path / "records.jsonl"), Seen()
    tally = drive(NUMBERS[:8], Square(tmp_path), store, Inline(), watcher=seen)
    assert squares(store) == {f"n{value}": value**2 for value in range(8)}
    assert tally.states == {"ok": 6, "failed": 1, "refused": 1}
    assert seen.lines[0] == "0 of 8"
    assert seen.lines[-1] == "number 7: ok"
    again = drive([*NUMBERS[:8], NUMBERS[3]], Square(tmp_path), store, Inline(), watcher=seen)
    assert (again.found, again.total, again.states) == (8, 8, {})
    assert [begun(tmp_path, value) for value in range(8)] == [1] * 8


def test_failures_are_tried_again_when_asked_and_once_only(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    drive(NUMBERS[:7], Square(tmp_path), store, Inline())
    drive(NUMBERS[:7], Square(tmp_path), store, Inline(), retry=("failed",))
    assert [begun(tmp_path, value) for value in range(7)] == [1, 1, 1, 1, 1, 2, 1]


def test_what_another_runner_holds_is_left_to_it(tmp_path: Path) -> None:
    store, seen = Store(tmp_path / "records.jsonl"), Seen()
    with store.claim("n1") as mine:
        assert mine
        tally = drive(NUMBERS[:3], Square(tmp_path), store, Inline(), watcher=seen)
    assert (tally.ended, seen.held) == (2, ["number 1"])
    assert sorted(squares(store)) == ["n0", "n2"]


def test_what_another_runner_holds_can_be_waited_for(tmp_path: Path) -> None:
    store, seen = Store(tmp_path / "records.jsonl"), Seen()
    claims = {key: store.claim(key) for key in ("n1", "n2")}
    for claim in claims.values():
        assert claim.__enter__()

    def others() -> None:
        time.sleep(0.1)
        store.add({"key": "n1", "square": -1})
        claims["n1"].__exit__(None, None, None)
        claims["n2"].__exit__(None, None, None)  # given up

    runner = threading.Thread(target=others)
    runner.start()
    tally = drive(NUMBERS[:3], Square(tmp_path), store, Inline(), watcher=seen, wait=0.01)
    runner.join()
    assert (tally.ended, tally.found, seen.held) == (3, 1, [])
    assert seen.waited == ["number 1", "number 2"]
    assert squares(store) == {"n0": 0, "n1": -1, "n2": 4}


def test_a_bug_ends_the_run_and_releases_what_was_claimed(tmp_path: Path) -> None:
    def broken(task: Number) -> dict[str, Any]:
        raise KeyError(task.label)

    store = Store(tmp_path / "records.jsonl")
    with pytest.raises(KeyError, match="number 0"):
        drive(NUMBERS[:2], broken, store, Inline())
    with store.claim("n0") as free:
        assert free


def _run(path: Path, seconds: float) -> None:
    drive(NUMBERS, Square(path.parent, seconds), Store(path), Inline())


def test_killed_at_random_moments_it_ends_with_the_records_of_an_undisturbed_run(tmp_path: Path) -> None:
    calm, stormy = tmp_path / "calm" / "records.jsonl", tmp_path / "stormy" / "records.jsonl"
    for path in (calm, stormy):
        path.parent.mkdir()
    _run(calm, 0.0)
    chance, kills = random.Random(0), 0
    deadline = time.monotonic() + 60
    while len(Store(stormy).records()) < len(NUMBERS):
        assert time.monotonic() < deadline
        # Two runners at a time, so that claims are taken over, too.
        runners = [FORK.Process(target=_run, args=(stormy, 0.02)) for _ in range(2)]
        for runner in runners:
            runner.start()
        for runner in runners:
            runner.join(chance.uniform(0.002, 0.03 + 0.005 * kills))  # ends on slow machines, too
            kills += runner.is_alive()
            runner.kill()
            runner.join()
    assert kills >= 5, "the test would show nothing"
    lines = stormy.read_text().splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]
    assert len(records) == len({record["key"] for record in records}) == len(NUMBERS), (
        "something was repeated"
    )
    assert squares(Store(stormy)) == squares(Store(calm))
    # What was killed was begun again, and nothing else.
    assert sum(begun(stormy.parent, number.value) for number in NUMBERS) <= len(NUMBERS) + kills


def test_the_record_of_a_lost_task_says_what_it_asked_and_of_which_code(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Asking(Number):
        def describe(self) -> dict[str, int]:
            return {"value": self.value}

    class Deadly(Inline):
        def run(self, job: Job, take: Take) -> Iterator[Outcome]:
            while (task := take()) is not None:
                yield task, Lost("it was killed")

    store = Store(tmp_path / "r.jsonl")
    drive([Asking(1), Number(2)], Square(tmp_path), store, Deadly())
    found = store.records()
    assert (found["n1"]["status"], found["n1"]["cell"]) == ("failed", {"value": 1})
    assert "cell" not in found["n2"]
    assert found["n1"]["unbackdoor"] == unbackdoor.__version__
    assert {"git", "torch", "created"} <= found["n1"].keys()


def test_two_runners_share_the_work(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    runners = [FORK.Process(target=_run, args=(path, 0.003)) for _ in range(2)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert [begun(tmp_path, number.value) for number in NUMBERS] == [1] * len(NUMBERS)
    assert len(path.read_text().splitlines()) == len(NUMBERS)


def test_the_time_left_is_estimated_by_group() -> None:
    now = [0.0]
    tally = Tally(5, slots=2, clock=lambda: now[0])
    quick, slow = [Number(value, "quick") for value in (1, 2)], [Number(value, "slow") for value in (3, 4, 5)]
    tally.expect([*quick, *slow])
    assert tally.seconds_left() is None
    tally.start(quick[0])
    now[0] = 10.0
    tally.end(quick[0], "ok")
    # One quick task of 10 s, and three of which nothing is known but that a task took 10 s; two at a time.
    assert tally.seconds_left() == pytest.approx((10 + 30) / 2)
    tally.start(slow[0])
    now[0] = 110.0
    tally.end(slow[0], "failed")
    assert tally.seconds_left() == pytest.approx((10 + 200) / 2)
    tally.start(slow[1])
    now[0] = 150.0
    assert tally.seconds_left() == pytest.approx((10 + 200 - 40) / 2)
    assert (tally.ended, tally.states) == (2, {"ok": 1, "failed": 1})
