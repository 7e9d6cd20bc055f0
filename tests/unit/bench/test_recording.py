from __future__ import annotations

import math
import subprocess
from pathlib import Path

import unbackdoor
from toy import Number
from unbackdoor.bench import recording
from unbackdoor.bench.executors import Inline
from unbackdoor.bench.executors.base import Record
from unbackdoor.bench.records import recorded
from unbackdoor.bench.runner import drive
from unbackdoor.bench.store import Store
from unbackdoor.types import silent


def test_a_number_that_is_not_finite_costs_neither_the_run_nor_the_rest_of_the_record(tmp_path: Path) -> None:
    def job(task: Number) -> Record:
        measured = {"clean_loss": math.inf, "filters": {"a": {"clc": [0.5, math.nan]}}}
        return recorded({"key": task.key}, lambda log: measured, progress=silent)

    store = Store(tmp_path / "records.jsonl")
    drive([Number(0), Number(1)], job, store, Inline())
    record = store.records()["n1"]
    assert (record["status"], record["clean_loss"]) == ("ok", None)
    assert record["filters"] == {"a": {"clc": [0.5, None]}}


def test_code_that_was_changed_since_its_commit_has_a_plus(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        person = ("-c", "user.name=N", "-c", "user.email=n@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *person, *arguments], check=True, capture_output=True)

    package = tmp_path / "src" / "unbackdoor"
    (package / "bench").mkdir(parents=True)
    (package / "types.py").write_text("a = 1\n")
    (tmp_path / "notes.md").write_text("a\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    state = recording.git_state.__wrapped__
    head = state(package)
    assert head is not None
    assert not head.endswith("+")
    (tmp_path / "notes.md").write_text("b\n")
    assert state(package) == head
    (package / "types.py").write_text("a = 2\n")
    assert state(package) == head + "+"
    assert state.__defaults__ == (Path(unbackdoor.__file__).parent,)


def test_notes_keep_what_is_short_and_the_only_step_of_a_log() -> None:
    step = {"exposure": "inversion", "taken": True, "accuracy": math.nan, "losses": [1.0, 0.5]}
    lists = {"long": [1, 2], "relearning": [step], "walk": [step, step]}
    assert recording.notes({"options": "left out", "images": 5, **lists}) == {
        "images": 5,
        "relearning.exposure": "inversion",
        "relearning.taken": True,
        "relearning.accuracy": None,
    }


def test_notes_say_which_classes_a_part_of_a_method_acted_on() -> None:
    inversion = {"acted_on": [3], "flagged": [], "median": 61.5, "norms": [1.0, 2.0], "order": [*range(9)]}
    assert recording.notes({"inversion": inversion}) == {
        "inversion.acted_on": "3", "inversion.flagged": "none", "inversion.median": 61.5
    }  # fmt: skip
