"""The work behind ``unbackdoor bench``: train what is missing, answer what is open, show how far it is."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from rich.table import Table

from unbackdoor.bench.defend import line_of
from unbackdoor.bench.executors import executor_named
from unbackdoor.bench.executors.base import Executor, Record, Task
from unbackdoor.bench.laboratory import Laboratory
from unbackdoor.bench.runner import Tally, drive
from unbackdoor.bench.store import Store
from unbackdoor.bench.suite import Plan, Suite, read_suite, suite_names
from unbackdoor.cli import console
from unbackdoor.cli.display import Display
from unbackdoor.data import load_images
from unbackdoor.data.digits import NAME as DIGITS
from unbackdoor.errors import InvalidInputError
from unbackdoor.report.run import PLAN, RECORDS

STATES = ("ok", "refused", "failed")
"""Of records of trainings: a model that is not there is trained whatever its record says."""


def data_of(suite: Suite) -> str:
    """Return the data set of a suite that needs none to be given, or a name that cannot be read."""
    return DIGITS if suite.data == DIGITS else suite.data.upper()


def list_suites() -> None:
    """Print the suites of the package."""
    table = Table("suite", "sizes", "what", box=None, pad_edge=False)
    for name in suite_names():
        suite = read_suite(name)
        table.add_row(name, ", ".join(suite.sizes), suite.title)
    console.print_table(table, whole=True)


def show_plan(plan: Plan) -> None:
    """Print which models and how many questions a run has."""
    out = console.results
    trainings = plan.trainings()
    cells = plan.cells()
    out.print(f"{plan.suite.title} ({plan.size}: {plan.suite.sizes[plan.size].text})", markup=False)
    out.print(f"{len(plan.jobs)} models, {len(trainings)} of them to be trained", markup=False)
    for training in trainings:
        out.print(f"  {training.job.command()}", markup=False)
    open_text = ", and those on the models to be trained" if trainings else ""
    out.print(f"{len(cells)} questions{open_text}", markup=False)


def carry_out(
    plan: Plan,
    folder: Path,
    *,
    executor: str,
    jobs: int,
    address: str,
    resources: Sequence[str],
    data: str,
    device: str,
    only: Sequence[str],
    train: bool,
    retry: bool,
) -> bool:
    """Do a run; return whether every question has an answer that is no failure.

    Raises:
        InvalidInputError: If data are missing, or an option makes no sense.
    """
    data = _checked_data(plan.suite, data)
    place = executor_named(
        executor, jobs=jobs, address=address, resources=pairs(resources), folder=folder / "slurm"
    )
    store = Store(folder / RECORDS)
    homes = plan.places.homes(plan.suite.sizes[plan.size])
    laboratory = Laboratory(data, homes, device)
    _keep_plan(plan, folder)
    if train and plan.trainings():
        _drive(plan.trainings(), laboratory, store, place, title="models", retry=STATES)
        _keep_plan(plan, folder)
    cells = [cell for _, cell in plan.cells().values() if not only or _fits(cell.label, only)]
    if only and not cells:
        raise InvalidInputError(
            f"no question fits {' or '.join(map(repr, only))}; labels read like "
            f"{next((c.label for _, c in plan.cells().values()), 'badnets mnp seed 0')!r}."
        )
    tally = _drive(cells, laboratory, store, place, title="questions", retry=("failed",) if retry else ())
    absent = [training.job.out.name for training in plan.trainings()]
    if absent:
        console.warn(f"no questions were asked about models that are not there: {', '.join(absent)}")
    records = store.records()
    failed = sum(records.get(cell.key, {}).get("status") == "failed" for cell in cells)
    console.note(
        f"{tally.ended} of {len(cells)} questions answered, {failed} of them with a failure: {store.path}"
    )
    return tally.ended == len(cells) and not failed and not absent


def _checked_data(suite: Suite, data: str) -> str:
    """Return where the data are, found to be readable."""
    if not data and suite.data != DIGITS:
        raise InvalidInputError(f"suite {suite.name} needs --data, the folder of {suite.data}.")
    data = data or DIGITS
    for split in ("train", "test"):
        load_images(data, split=split, limit=1)
    return data


def pairs(resources: Sequence[str]) -> dict[str, str]:
    """Return what ``--resource NAME=VALUE`` says.

    Raises:
        InvalidInputError: If a text has another form.
    """
    found = {}
    for text in resources:
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidInputError(f"--resource must read NAME=VALUE, got {text!r}.")
        found[name.strip()] = value.strip()
    return found


def _fits(label: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(label, pattern) for pattern in patterns)


def _keep_plan(plan: Plan, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{PLAN}.tmp"
        temporary.write_text(json.dumps(plan.describe(), indent=1) + "\n", encoding="utf-8")
        temporary.replace(folder / PLAN)
    except OSError as error:
        raise InvalidInputError(
            f"cannot write into {folder}: {error.strerror}; choose another --out."
        ) from error


def _drive(
    tasks: Sequence[Task],
    laboratory: Laboratory,
    store: Store,
    place: Executor,
    *,
    title: str,
    retry: Sequence[str],
) -> Tally:
    display: Display | AbstractContextManager[Display] = Display(title, _line)
    with display as watcher:
        return drive(tasks, laboratory, store, place, watcher=watcher, retry=retry)


def _line(task: Task, record: Record) -> str:
    if record.get("kind") == "training" and record["status"] == "ok":
        rates = ", ".join(f"{name} {100 * rate['value']:.2f}" for name, rate in record["metrics"].items())
        problems = "".join(f"; not valid: {problem}" for problem in record["problems"])
        return f"{task.label}: {rates}; {record['seconds']:.0f} s{problems}"
    return line_of(task.label, record)
