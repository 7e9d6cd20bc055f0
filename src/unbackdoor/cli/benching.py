"""The work behind ``unbackdoor bench``: train what is missing, answer what is open, show how far it is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from unbackdoor.bench.cell import Cell
from unbackdoor.bench.defend import line_of
from unbackdoor.bench.executors import executor_named
from unbackdoor.bench.executors.base import Executor, Record, Task
from unbackdoor.bench.laboratory import Laboratory
from unbackdoor.bench.runner import Tally, drive
from unbackdoor.bench.store import Store
from unbackdoor.bench.suite import Plan, Suite, fits_any, read_suite, suite_names
from unbackdoor.bench.training import CLEAN
from unbackdoor.cli import console
from unbackdoor.cli.display import Display
from unbackdoor.data import load_images
from unbackdoor.data.digits import NAME as DIGITS
from unbackdoor.errors import InvalidInputError
from unbackdoor.report.run import PLAN, RECORDS

Wanted = TypeVar("Wanted")

STATES = ("ok", "refused", "failed")
"""Of records of trainings: a model that is not there is trained whatever its record says."""


SHOWN = 500
"""Images of each split that tell one data set from another."""

WAIT = 2.0
"""Seconds between looks at models that another runner trains."""


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


def show_plan(plan: Plan, only: Sequence[str] = ()) -> None:
    """Print which models and how many questions a run has; with ``only``, of the questions that fit."""
    out = console.results
    trainings = plan.trainings(plan.models_of(lambda label: fits_any(label, only)) if only else None)
    cells = [cell for _, cell in plan.cells().values() if not only or fits_any(cell.label, only)]
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
    shown: Plan,
    executor: str,
    jobs: int,
    address: str,
    resources: Sequence[str],
    data: str,
    device: str,
    only: Sequence[str],
    reuse: Sequence[Path],
    train: bool,
    retry: bool,
) -> bool:
    """Do a run; return whether every question has an answer that is no failure.

    ``shown`` is what the folder is about from now on, see ``asked_before``.

    Raises:
        InvalidInputError: If data are missing, an option makes no sense, or the folder holds another run.
    """
    data, fingerprint = _checked_data(plan.suite, data)
    place = executor_named(
        executor, jobs=jobs, address=address, resources=pairs(resources), folder=folder / "slurm"
    )
    store = Store(folder / RECORDS)
    homes = plan.places.homes(plan.suite.sizes[plan.size])
    laboratory = Laboratory(data, homes, device)
    models = plan.models_of(lambda label: fits_any(label, only)) if only else plan.asked
    if only and not models:
        raise InvalidInputError(
            f"no question fits {' or '.join(map(repr, only))}; labels read like "
            f"{next((c.label for _, c in plan.cells().values()), 'badnets mnp seed 0')!r}."
        )
    _keep_plan(shown, folder, fingerprint, only)
    for other in reuse:
        taken = take_over(plan, store, other, fingerprint)
        console.note(f"{taken} answers taken over from {other}")
    if train and (trainings := plan.trainings(models)):
        # In two goes, so that the clean twins are there when the others are measured beside them.
        clean = [training for training in trainings if training.job.name == CLEAN]
        infected = [training for training in trainings if training.job.name != CLEAN]
        for title, part in (("clean models", clean), ("infected models", infected)):
            if part:
                _drive(part, laboratory, store, place, title=title, retry=STATES, wait=WAIT)
        _keep_plan(shown, folder, fingerprint, only)
    cells = [cell for _, cell in plan.cells().values() if not only or fits_any(cell.label, only)]
    again = ("failed",) if retry else ()
    keys = {cell.key for cell in cells}
    # Wider answers, also of another part or an earlier call, answer these.
    take_answers(cells, store, store.records())
    if wide := {one.key: one for cell in cells for one in cell.wider() if one.key in keys}:
        # What they measure on top costs less than asking the rest of it a second time.
        _drive(
            list(wide.values()),
            laboratory,
            store,
            place,
            title="questions that answer others as well",
            retry=again,
            # Another runner's answer to a wider question would answer the narrow one here, too.
            wait=WAIT,
        )
        take_answers(cells, store, store.records())
    tally = _drive(cells, laboratory, store, place, title="questions", retry=again)
    there = plan.entries()
    absent = [name for name in plan.jobs if name in models and name not in there]
    if absent:
        console.warn(f"no questions were asked about models that are not there: {', '.join(absent)}")
    records = store.records()
    failed = sum(records.get(cell.key, {}).get("status") == "failed" for cell in cells)
    console.note(
        f"{tally.ended} of {len(cells)} questions answered, {failed} of them with a failure: {store.path}"
    )
    return tally.ended == len(cells) and not failed and not absent


def take_over(plan: Plan, store: Store, other: Path, fingerprint: str) -> int:
    """Copy the answers of another run that answer questions of this one; return how many.

    What failed there is asked again.

    Args:
        plan: Of this run.
        store: Of this run.
        other: Folder of the other run; without a plan, whose data nobody knows, it is refused.
        fingerprint: Of this run's data.

    Raises:
        InvalidInputError: If the folder holds no run, or one on other data.
    """
    try:
        theirs = json.loads((other / PLAN).read_text(encoding="utf-8"))["data_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"{other} holds no run whose answers could be taken over ({PLAN} cannot be read); give the "
            "folder that `unbackdoor bench --out` wrote."
        ) from error
    if theirs != fingerprint:
        raise InvalidInputError(
            f"{other} holds answers on other data than those of --data; leave it out of --reuse."
        )
    cells = [cell for _, cell in plan.cells().values()]
    return take_answers(cells, store, Store(other / RECORDS).records())


def take_answers(cells: Sequence[Cell], store: Store, found: Mapping[str, Record]) -> int:
    """Add answers to ``cells`` that are among ``found``, or in a wider one's; return how many.

    Args:
        cells: The questions.
        store: Where answers are added that it lacks, or that failed there.
        found: Records by key; what failed is passed over.
    """
    there, taken = store.records(), 0
    for cell in cells:
        record = _answer_to(cell, found)
        if record is None or _is_answered(cell, there):
            continue
        with store.claim(cell.key) as mine:
            # Whoever holds it answers it, or is taking over the same answer.
            if mine and not _is_answered(cell, there := store.records()):
                store.add(record)
                taken += 1
    return taken


def _is_answered(cell: Cell, records: Mapping[str, Record]) -> bool:
    return cell.key in records and records[cell.key]["status"] != "failed"


def _answer_to(cell: Cell, found: Mapping[str, Record]) -> Record | None:
    """Return the answer to ``cell``, or that in the answer to a wider one; None where all failed."""
    for one in (cell, *cell.wider()):
        record = found.get(one.key)
        if record is not None and record["status"] != "failed":
            return record if one == cell else cell.narrowed(record)
    return None


def _checked_data(suite: Suite, data: str) -> tuple[str, str]:
    """Return where the data are, found to be readable, and a hash that tells them from other data."""
    if not data and suite.data != DIGITS:
        raise InvalidInputError(f"suite {suite.name} needs --data, the folder of {suite.data}.")
    data = data or DIGITS
    digest = hashlib.sha256()
    for split in ("train", "test"):
        some = load_images(data, split=split, limit=SHOWN)
        for tensor in (some.labels, some.images):
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return data, digest.hexdigest()


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


def _keep_plan(plan: Plan, folder: Path, fingerprint: str, only: Sequence[str]) -> None:
    content = {**plan.describe(), "data_sha256": fingerprint}
    _check_same_run(content, folder)
    patterns = _patterns(folder, only)
    content["given"] |= {"out": str(folder), **({"only": patterns} if patterns else {})}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Several runners may share the folder.
        temporary = folder / f"{PLAN}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(folder / PLAN)
    except OSError as error:
        raise InvalidInputError(
            f"cannot write into {folder}: {error.strerror}; choose another --out."
        ) from error


def asked_before(
    folder: Path, suite: Suite, size: str, parts: Sequence[str], seeds: Sequence[int]
) -> tuple[list[str], list[int]]:
    """Return the parts and draws that a run was ever asked for, these included; none if that was all.

    So a call for one part does not take what was asked before from the tables.

    Args:
        folder: Of the run.
        suite: Its suite; parts and draws that it has no more are left out.
        size: Name of its size.
        parts: Asked for now; all if empty.
        seeds: The same.
    """
    try:
        kept = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        given, same = kept["given"], (kept["suite"], kept["size"]) == (suite.name, size)
        before = list(given.get("part", [])), list(given.get("seeds", []))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        same = False
    if not same:
        return list(parts), list(seeds)
    grids = suite.grids_of(size)
    draws = {*suite.sizes[size].seeds, *(seed for grid in grids for seed in grid.seeds)}
    return (
        _together(before[0], parts, {grid.part for grid in grids}),
        _together(before[1], seeds, draws),
    )


def _together(before: Sequence[Wanted], now: Sequence[Wanted], known: Collection[Wanted]) -> list[Wanted]:
    """Return what was asked for at any time and is known; nothing, which is all, if that was ever asked."""
    return [each for each in dict.fromkeys([*before, *now]) if each in known] if before and now else []


def _patterns(folder: Path, only: Sequence[str]) -> list[str]:
    """Return the patterns of all questions that a run was ever asked; none if that was every question."""
    try:
        before = json.loads((folder / PLAN).read_text(encoding="utf-8"))["given"].get("only", [])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return list(only)
    return list(dict.fromkeys([*before, *only])) if before and only else []


def _check_same_run(content: dict[str, Any], folder: Path) -> None:
    """Refuse a folder with the plan of another suite or size, or with answers on other data."""
    try:
        kept = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        names = [(each["suite"], each["size"]) for each in (kept, content)]
    except (OSError, ValueError, KeyError, TypeError):
        return  # nothing that could be lost
    if names[0] != names[1]:
        raise InvalidInputError(
            f"{folder} holds a run of {' in size '.join(map(str, names[0]))}, not of "
            f"{' in size '.join(names[1])}; choose another --out."
        )
    if kept.get("data_sha256", content["data_sha256"]) != content["data_sha256"]:
        raise InvalidInputError(
            f"{folder} holds answers on other data than those of --data; choose another --out."
        )


def _drive(
    tasks: Sequence[Task],
    laboratory: Laboratory,
    store: Store,
    place: Executor,
    *,
    title: str,
    retry: Sequence[str],
    wait: float = 0.0,
) -> Tally:
    display: Display | AbstractContextManager[Display] = Display(title, _line)
    with display as watcher:
        return drive(tasks, laboratory, store, place, watcher=watcher, retry=retry, wait=wait)


def _line(task: Task, record: Record) -> str:
    if record.get("kind") == "training" and record["status"] == "ok":
        rates = ", ".join(f"{name} {100 * rate['value']:.2f}" for name, rate in record["metrics"].items())
        problems = "".join(f"; not valid: {problem}" for problem in record["problems"])
        return f"{task.label}: {rates}; {record['seconds']:.0f} s{problems}"
    return line_of(task.label, record)
