from __future__ import annotations

import io
import json
import os
from multiprocessing import get_context
from pathlib import Path

import pytest
from rich.console import Console

from toy import Number
from unbackdoor.bench.cell import Cell
from unbackdoor.bench.runner import Tally
from unbackdoor.bench.store import Record, Store
from unbackdoor.cli import console
from unbackdoor.cli.benching import take_answers
from unbackdoor.cli.display import Display, summary
from unbackdoor.report.run import read_run

from .conftest import Run

SUITE = """
title = "A suite for tests"
text = "Digits."
layout = "smoke"
data = "digits"

[sizes.cpu]
text = "Tiny."
models = ["smoke"]
seeds = [0]

[[grid]]
part = "defences"
models = ["clean"]
methods = ["clp", "bnp"]
clean_images = [40]
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(SUITE)
    # The list of models that comes with the package, shortened.
    from unbackdoor.bench import suite as suites

    original = suites._spec

    def quick(name: str, places: suites.Places) -> dict[str, object]:
        content = original(name, places)
        content["defaults"] |= {"epochs": 1, "width": 4}
        return content

    monkeypatch.setattr(suites, "_spec", quick)
    return path


def test_a_suite_trains_what_is_missing_answers_and_goes_on_where_it_was(
    run: Run, suite: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs" / "mine"
    planned = run("bench", suite, "--out", out, "--plan", "--only", "clean clp*")
    assert planned.code == 0
    assert "1 models, 1 of them to be trained" in planned.out
    assert "unbackdoor attack none" in planned.out
    assert not out.exists()
    first = run("bench", suite, "--out", out, "--only", "clean clp*")
    assert first.code == 0, first.err
    assert "[1/1] train clean: clean_accuracy" in first.err
    assert "[1/1] clean clp 40 images seed 0: clean_accuracy" in first.err
    assert (tmp_path / "runs" / "models" / "smoke" / "clean" / "card.json").exists()
    second = run("bench", suite, "--out", out)
    assert second.code == 0, second.err
    assert "train clean" not in second.err
    assert "1 of 2 questions were there already" in second.err
    assert "2 of 2 questions answered, 0 of them with a failure" in second.err
    assert len((out / "records.jsonl").read_text().splitlines()) == 3
    shown = run("tables", out)
    assert shown.code == 0
    assert "| clean | measured |" in shown.out
    assert "unbackdoor bench mine.toml --size cpu --out mine\n" in shown.out
    assert str(tmp_path) not in shown.out
    assert (out / "index.html").exists()
    assert (out / "tables" / "defences.tex").exists()
    assert run("tables", out, "--format", "csv", "--out", tmp_path / "elsewhere").out.startswith(
        "model,source,"
    )


def test_the_command_of_a_run_goes_on_with_what_was_asked(
    run: Run, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def again(*arguments: object) -> str:
        run("bench", suite.name, "--out", "mine", "--no-train", *arguments)
        return read_run(Path("mine")).command

    command = "unbackdoor bench mine.toml --size cpu --out mine"
    assert again("--only", "clean clp*") == f"{command} --only 'clean clp*'"
    assert again("--only", "*bnp*") == f"{command} --only 'clean clp*' --only '*bnp*'"
    assert again() == command
    # All questions belong to the run from now on, whichever are asked once more.
    assert again("--only", "clean clp*", "--zoo", "z", "--models", "m") == f"{command} --zoo z --models m"
    assert again("--part", "defences", "--seeds", 0) == command


def test_a_run_is_about_all_parts_and_draws_that_were_ever_asked(
    run: Run, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    suite.write_text(
        SUITE + SUITE[SUITE.index("[[grid]]") :].replace("defences", "more") + "seeds = [0, 1]\n"
    )

    def asked(*arguments: object) -> str:
        run("bench", suite.name, "--out", "mine", "--no-train", *arguments)
        return read_run(Path("mine")).command.removeprefix("unbackdoor bench mine.toml --size cpu --out mine")

    assert asked("--part", "defences", "--seeds", 0) == " --part defences --seeds 0"
    assert asked("--part", "more", "--seeds", 1) == " --part defences --part more --seeds 0 --seeds 1"
    assert asked("--part", "more") == " --part defences --part more"
    # A part that the suite has no more is no part of the run either.
    suite.write_text(SUITE)
    assert asked("--part", "defences") == " --part defences"
    assert asked() == ""


def test_answers_of_another_run_to_the_same_questions_are_taken_over(
    run: Run, suite: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "runs" / "first", tmp_path / "runs" / "second"
    assert run("bench", suite, "--out", first, "--only", "clean clp*").code == 0
    again = run("bench", suite, "--out", second, "--reuse", first)
    assert again.code == 0, again.err
    assert f"1 answers taken over from {first}" in "".join(again.err.split("\n"))
    assert "1 of 2 questions were there already" in again.err
    # What failed is asked again, and nothing is taken twice.
    lines = (first / "records.jsonl").read_text().splitlines()
    failed = [json.dumps({**json.loads(line), "status": "failed"}) for line in lines]
    (first / "records.jsonl").write_text("\n".join(failed) + "\n")
    assert "0 answers taken over" in run("bench", suite, "--out", second, "--reuse", first).err
    third = tmp_path / "runs" / "third"
    asked = run(
        "bench", suite, "--out", third, "--reuse", first, "--only", "clean b_p*", "--only", "clean bnp*"
    ).err
    assert "0 answers taken over" in asked
    plan = json.loads((first / "plan.json").read_text())
    (first / "plan.json").write_text(json.dumps({**plan, "data_sha256": "0"}))
    for folder, sentence in ((first, "answers on other data"), (tmp_path, "holds no run")):
        refused = run("bench", suite, "--out", third, "--reuse", folder)
        assert (refused.code, len(refused.err.splitlines())) == (2, 1)
        assert sentence in refused.err


def test_an_answer_with_a_measurement_more_answers_the_question_without_it(
    run: Run, suite: Path, tmp_path: Path
) -> None:
    asked = suite.read_text()
    more = asked[asked.index("[[grid]]") :].replace("defences", "curves") + "oracle = true\n"
    suite.write_text(asked + more)
    first, second = tmp_path / "runs" / "first", tmp_path / "runs" / "second"
    done = run("bench", suite, "--out", first, "--only", "clean clp*")
    assert done.code == 0, done.err
    assert "2 of 2 questions answered" in done.err
    assert done.err.count("clean clp") == 1
    answers = [json.loads(line) for line in (first / "records.jsonl").read_text().splitlines()[1:]]
    wide, plain = sorted(answers, key=lambda record: "taken_from" in record)
    assert plain["taken_from"] == wide["key"] != plain["key"]
    assert wide["cell"].pop("oracle") is True
    assert plain["cell"] == wide["cell"]
    assert plain["after"] == wide["after"]
    # So does one of an earlier call, of another part.
    third = tmp_path / "runs" / "third"
    for part in ("curves", "defences"):
        done = run("bench", suite, "--out", third, "--part", part, "--only", "clean clp*")
        assert (done.code, done.err.count("clean clp")) == (0, int(part == "curves")), done.err
    # Another run that asks the plain question alone takes it from there, too.
    suite.write_text(asked)
    (first / "records.jsonl").write_text(json.dumps({**wide, "cell": {}}) + "\n")
    assert "1 answers taken over" in run("bench", suite, "--out", second, "--reuse", first).err


def _take(path: Path, cells: list[Cell], found: dict[str, Record]) -> None:
    take_answers(cells, Store(path), found)


def test_two_runners_take_an_answer_over_once(tmp_path: Path) -> None:
    cells = [Cell(str(number), "ab", "digits", "clp") for number in range(60)]
    found: dict[str, Record] = {
        cell.key: {"key": cell.key, "status": "failed" if cell.model == "7" else "ok"} for cell in cells
    }
    path = tmp_path / "records.jsonl"
    # One that somebody is working on is left to them.
    with Store(path).claim(cells[3].key) as mine:
        assert mine
        runners = [get_context("fork").Process(target=_take, args=(path, cells, found)) for _ in range(3)]
        for runner in runners:
            runner.start()
        for runner in runners:
            runner.join()
            assert runner.exitcode == 0
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(keys) == len(set(keys))
    assert set(keys) == {cell.key for cell in cells if cell.model not in ("3", "7")}


def test_suites_are_listed(run: Run) -> None:
    listed = run("bench", "list")
    assert listed.code == 0
    assert "table1" in listed.out
    assert "cpu, paper" in listed.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("table1",), "suite table1 needs --data, the folder of cifar10"),
        (("table1", "--data", "nowhere"), "nowhere does not exist"),
        (("nosuch",), "unknown suite 'nosuch'"),
        (("smoke", "--size", "paper"), "has no size 'paper'; it has cpu"),
        (("smoke", "--executor", "dask"), "unknown executor 'dask'"),
        (("smoke", "--resource", "gpus"), "--resource must read NAME=VALUE"),
        (("smoke", "--no-train", "--only", "x"), "no question fits 'x'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    root = Path(__file__).parents[3]
    refused = run("bench", *arguments, "--out", tmp_path / "run", "--zoo", root / "zoo")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert sentence in refused.err


def test_models_that_are_missing_leave_questions_open(run: Run, suite: Path, tmp_path: Path) -> None:
    left = run("bench", suite, "--out", tmp_path / "run", "--no-train")
    assert left.code == 1
    assert "models that are not there: clean" in left.err
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["missing_models"] == ["clean"]


def test_an_infected_model_is_measured_beside_the_clean_twin_that_the_suite_trains_first(
    run: Run, suite: Path, tmp_path: Path
) -> None:
    suite.write_text(SUITE.replace('models = ["clean"]', 'models = ["badnets"]'))
    result = run("bench", suite, "--out", tmp_path / "runs" / "mine", "--only", "badnets clp*")
    assert result.code == 0, result.err
    card = json.loads((tmp_path / "runs" / "models" / "smoke" / "badnets" / "card.json").read_text())
    assert card["validity"]["clean_twin_accuracy"]["n"] > 0
    assert "--twin" in card["command"]


def test_only_trains_the_models_of_the_questions_it_chooses(run: Run, suite: Path, tmp_path: Path) -> None:
    suite.write_text(SUITE.replace('models = ["clean"]', 'models = ["clean", "badnets"]'))
    some = run("bench", suite, "--out", tmp_path / "run", "--only", "clean clp*")
    assert some.code == 0, some.err
    assert "train badnets" not in some.err
    assert "not there" not in some.err
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["missing_models"] == ["badnets"]
    none = run("bench", suite, "--out", tmp_path / "run", "--only", "lira*")
    assert (none.code, "no question fits 'lira*'" in none.err) == (2, True)


def test_a_folder_belongs_to_one_suite_and_size_and_data(run: Run, suite: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        result = run("bench", *arguments, "--out", tmp_path / "run", "--no-train")
        assert (result.code, len(result.err.splitlines())) == (2, 1)
        return " ".join(result.err.split())

    run("bench", suite, "--out", tmp_path / "run", "--no-train")
    assert "holds a run of mine in size cpu, not of smoke in size cpu; choose another --out" in refused(
        "smoke"
    )
    suite.write_text(SUITE.replace("[sizes.cpu]", "[sizes.tiny]"))
    assert "not of mine in size tiny" in refused(suite)
    suite.write_text(SUITE)
    path = tmp_path / "run" / "plan.json"
    path.write_text(path.read_text().replace('"data_sha256": "', '"data_sha256": "0'))
    assert "holds answers on other data" in refused(suite)
    path.write_text("{")
    assert run("bench", suite, "--out", tmp_path / "run", "--no-train").code == 1
    assert [each.name for each in (tmp_path / "run").glob("plan*")] == ["plan.json"]


def test_two_runners_write_their_plans_at_once(
    run: Run, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    original = Path.replace

    def replace(self: Path, target: Path) -> Path:
        written.append(self.name)
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    run("bench", suite, "--out", tmp_path / "run", "--no-train")
    assert f"plan.json.{os.getpid()}.tmp" in written


def test_tables_of_nothing_are_refused(run: Run, tmp_path: Path) -> None:
    refused = run("tables", tmp_path)
    assert refused.code == 2
    assert "cannot be read as the plan of a run (No such file or directory)" in refused.err


def test_the_display_tells_done_failed_running_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        console, "notes", Console(file=screen, force_terminal=True, width=100, highlight=False)
    )
    now = [0.0]
    tally = Tally(4, clock=lambda: now[0])
    tasks = [Number(value) for value in range(4)]
    tally.expect(tasks)
    with Display("questions", lambda task, record: f"{task.label}: {record['status']}") as display:
        display.began(tally)
        tally.start(tasks[0])
        now[0] = 60.0
        tally.end(tasks[0], "failed")
        display.ended(tasks[0], {"status": "failed"}, tally)
        display.waits(tasks[2:])
        tally.start(tasks[1])
        assert summary(tally).startswith("1 of 4 done, 1 failed, 1 running, 3 min left, until about ")
        assert display._live is not None
        display._live.refresh()
    text = screen.getvalue()
    assert "[1/4] number 0: failed" in text
    assert "waiting for 2 questions of another runner: number 2, number 3" in text
    assert "number 1, 0 s" in text


def test_a_log_says_with_each_answer_how_long_the_rest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "notes", Console(file=screen, width=100, highlight=False))
    now = [0.0]
    tally = Tally(2, clock=lambda: now[0])
    tasks = [Number(value) for value in range(2)]
    tally.expect(tasks)
    with Display("questions", lambda task, record: f"{task.label}: {record['status']}") as display:
        for task in tasks:
            tally.start(task)
            now[0] += 120.0
            tally.end(task, "ok")
            display.ended(task, {"status": "ok"}, tally)
    assert screen.getvalue().splitlines() == ["[1/2, 2 min left] number 0: ok", "[2/2] number 1: ok"]
