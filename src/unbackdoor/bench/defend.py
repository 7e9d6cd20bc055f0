"""Answer one cell: treat a model of a zoo, measure what came of it, and record both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.bench import zoo
from unbackdoor.bench.cell import Cell
from unbackdoor.bench.cell import Task as CellTask
from unbackdoor.bench.detecting import detect
from unbackdoor.bench.executors import Inline
from unbackdoor.bench.executors.base import Task
from unbackdoor.bench.methods import configured
from unbackdoor.bench.oracle import oracle_curve
from unbackdoor.bench.recording import notes, series
from unbackdoor.bench.records import Question, answered
from unbackdoor.bench.runner import Tally, Watcher, drive
from unbackdoor.bench.saliency import ablations
from unbackdoor.bench.store import Record, Store
from unbackdoor.bench.training import limited
from unbackdoor.catalogue import options_of, version_of
from unbackdoor.costs import metered
from unbackdoor.data.splits import draw_balanced
from unbackdoor.errors import InvalidInputError, UnbackdoorError
from unbackdoor.evaluate import clean_accuracy, evaluate
from unbackdoor.reactivate import reactivation
from unbackdoor.types import Infected, LabelledImages, Progress, silent
from unbackdoor.usercode import fingerprint, names_code

Asked = TypeVar("Asked", bound=Question)
Asked_contra = TypeVar("Asked_contra", bound=Question, contravariant=True)


class Answering(Protocol[Asked_contra]):
    """Answers questions of one kind."""

    def answer(self, cell: Asked_contra, *, progress: Progress = silent) -> Record:
        """Return the record of ``cell``."""
        ...


@dataclass(frozen=True, eq=False)
class Bench:
    """What cells are answered with.

    Args:
        homes: Folders in which models are looked for, in turn: the zoo, and those that a run trained.
        train: Where the clean images are drawn from.
        test: What is measured on.
        device: Where networks run.
        undefended: What models showed before treatment, by their hash and the number of test images: every
            method starts from the same.
    """

    homes: Sequence[Path]
    train: LabelledImages
    test: LabelledImages
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    undefended: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    def answer(self, cell: Cell, *, progress: Progress = silent) -> Record:
        """Return the record of ``cell``; what the method refuses or fails at is a record too.

        Args:
            cell: The question.
            progress: Called during the work.

        Raises:
            InvalidInputError: If there is no such model, or it has other weights than those asked about.
        """
        entry = self.entry(cell.model)
        zoo.check_asked(entry, cell.model_sha256)
        return _history(entry) | answered(
            cell, lambda log: self._measure(cell, entry, log), progress=progress, device=self.device
        )

    def entry(self, name: str) -> zoo.Entry:
        """Return a model.

        Raises:
            InvalidInputError: If there is none of that name.
        """
        for home in self.homes:
            if (home / name / "card.json").exists():
                return zoo.entry_at(home / name)
        return zoo.entry_named(self.homes[0], name)

    def _measure(self, cell: Cell, entry: zoo.Entry, progress: Progress) -> dict[str, Any]:
        infected = None if entry.is_clean else zoo.load_infected(entry)
        model = (infected.model if infected else zoo.load_network(entry)).to(self.device)
        job = entry.card.get("job", {})
        trained_on = limited(self.train, job.get("limit"), rng.generator(job.get("seed", 0)))
        suspect = Suspect(model, infected, trained_on)
        answers = {"purify": self._purify, "detect": self._detect, "ablate": self._ablate}
        return answers[cell.task](cell, suspect, progress)

    def _purify(self, cell: Cell, suspect: Suspect, progress: Progress) -> dict[str, Any]:
        method = configured("purify", cell.method, cell.paper, cell.options)
        clean = draw_balanced(self.train, cell.clean_images, rng.generator(cell.seed))
        with metered() as cost:
            purified = method.purify(
                suspect.model, clean, generator=rng.generator(cell.seed), progress=progress
            )
        test, infected = self._tested(cell), suspect.infected
        result = {
            "before": self._before(cell, suspect, test),
            "after": _rates(purified.model, infected, test),
            "filters_removed": purified.mask.n_removed if purified.mask else None,
            "notes": notes(purified.diagnostics),
            "series": series(purified.diagnostics),
            "cost": cost.describe(),
        }
        if cell.oracle and infected and purified.mask is not None and purified.scores:
            result["oracle_curve"] = oracle_curve(suspect.model, purified.scores, infected, test)
        if cell.reactivate and infected:
            rates = reactivation(
                purified.model,
                test,
                infected.trigger,
                infected.label_rule,
                generator=rng.generator(cell.seed),
            )
            result["reactivated"] = {name: rate.describe() for name, rate in rates.items()}
        return result

    def _before(self, cell: Cell, suspect: Suspect, test: LabelledImages) -> dict[str, Any]:
        key = (cell.model_sha256, cell.test_images)
        if key not in self.undefended:
            self.undefended[key] = _rates(suspect.model, suspect.infected, test)
        return self.undefended[key]

    def _detect(self, cell: Cell, suspect: Suspect, progress: Progress) -> dict[str, Any]:
        method = configured("detect", cell.method, cell.paper, cell.options)
        clean = draw_balanced(self.train, cell.clean_images, rng.generator(cell.seed))
        with metered() as cost:
            found = detect(
                method, suspect.model, suspect.infected, clean,
                train=suspect.trained_on, test=self._tested(cell), samples=cell.samples,
                generator=rng.generator(cell.seed), progress=progress,
            )  # fmt: skip
        return {**found, "cost": cost.describe()}

    def _ablate(self, cell: Cell, suspect: Suspect, progress: Progress) -> dict[str, Any]:
        method = configured("ablate", cell.method, cell.paper, cell.options)
        images = draw_balanced(self.test, cell.clean_images, rng.generator(cell.seed))
        with metered() as cost:
            found = ablations(
                suspect.model, suspect.infected, images, prune_mode=method.prune_mode, progress=progress
            )
        # It runs the network operation by operation: passes are not seen.
        seen = {
            k: v
            for k, v in cost.describe().items()
            if k not in ("forward_images", "backward_images", "kinds")
        }
        return {**found, "cost": seen}

    def _tested(self, cell: Cell) -> LabelledImages:
        return draw_balanced(self.test, cell.test_images, rng.generator(0)) if cell.test_images else self.test


@dataclass(frozen=True, eq=False)
class Suspect:
    """A model with what its attack left behind.

    Args:
        model: The network.
        infected: Trigger, plan and label rule; None for a clean model.
        trained_on: The images that its training drew, before poisoning.
    """

    model: nn.Module
    infected: Infected | None
    trained_on: LabelledImages


def _history(entry: zoo.Entry) -> dict[str, Any]:
    """Return what a model's card says of how it was made."""
    card = entry.card
    job = card.get("job", {})
    trained = {key: job[key] for key in ("arch", "width", "epochs") if key in job}
    trained |= {key: card[key] for key in ("poisoned", "label_rule") if key in card}
    if "validity" in card:
        trained["valid"] = card["validity"].get("valid")
    return {"attack": card.get("attack"), "trained": trained}


def cell_of(
    entry: zoo.Entry,
    method: str,
    *,
    data: str,
    paper: bool = False,
    options: Mapping[str, str] | None = None,
    task: CellTask = "purify",
    **rest: Any,  # noqa: ANN401 - the other fields of a cell
) -> Cell:
    """Return the cell of a method on a model of a zoo, with all options spelt out."""
    model, method_fields = model_fields(entry), asked_of(method, paper=paper, options=options, task=task)
    return Cell(**model, **method_fields, data=data, **rest)


def model_fields(entry: zoo.Entry) -> dict[str, Any]:
    """Return the fields of a cell that say which model it is about.

    Raises:
        InvalidInputError: If the model's card does not name its weights.
    """
    if "sha256" not in entry.card:
        raise InvalidInputError(
            f"the card of {entry.name} does not say which weights it speaks of; train that model again."
        )
    return {"model": entry.name, "model_sha256": str(entry.card["sha256"])}


def asked_of(
    method: str,
    *,
    paper: bool = False,
    options: Mapping[str, str] | None = None,
    task: CellTask = "purify",
) -> dict[str, Any]:
    """Return the fields of a cell that say what is done, the same for every model: all options spelt out.

    Raises:
        InvalidInputError: If there is no such method or option.
    """
    one = configured(task, method, paper, options or {})
    return {
        "method": method if names_code(method) else one.name,
        "paper": paper,
        "options": dict(options or {}),
        "settings": settings_of(one),
        "task": task,
        "method_version": version_of(type(one)),
    }


LATER_OPTIONS = {
    "mnp": {
        "relearning.path_radius": "0",
        "evidence": "0",
        "retry_crops": "true",
        "partway": "false",
        "collapsed": "2",
        "settled_index": "0",
        "outlier_index": "0",
    }
}
"""Options that came after the first records, with what was meant before: equal questions keep their keys."""


def settings_of(method: Any) -> dict[str, str]:  # noqa: ANN401 - one of many dataclasses
    """Return all options of a method by path, but for those that came later and are as they were before.

    Of code of the user's own the hash of its file is one, so that changed code is a new question.
    """
    later = LATER_OPTIONS.get(method.name, {})
    found = {option.path: option.default for option in options_of(method)}
    code = fingerprint(type(method))
    found |= {} if code is None else {"code": code}
    return {path: value for path, value in found.items() if later.get(path) != value}


def is_older(cell: Mapping[str, Any]) -> bool:
    """Say whether the same method, options and paper mean something else today than when a cell was made.

    Args:
        cell: As ``Cell.describe`` returns it.
    """
    task = str(cell.get("task", "purify"))
    try:
        method = configured(task, str(cell["method"]), bool(cell.get("paper")), cell.get("options", {}))
    except UnbackdoorError:
        return True
    asked = dict(cell.get("settings", {})), int(cell.get("method_version", 1))
    return asked != (settings_of(method), version_of(type(method)))


def run(
    bench: Answering[Asked],
    cells: Iterable[Asked],
    store: Store,
    *,
    said: Callable[[str], object] = print,
) -> None:
    """Answer the cells that nobody has answered yet, in turn; others may run the same list beside.

    Args:
        bench: What they are answered with.
        cells: The questions.
        store: Where the records go.
        said: Called with a line for each new record.
    """
    drive(list(cells), bench.answer, store, Inline(), watcher=Lines(said))


class Lines(Watcher):
    """Says a line for each new record."""

    def __init__(
        self, said: Callable[[str], object], line: Callable[[str, Record], str] | None = None
    ) -> None:
        self.said, self.line = said, line or line_of

    def ended(self, task: Task, record: Record, tally: Tally) -> None:
        """Say what came of a task."""
        self.said(self.line(task.label, record))


def line_of(label: str, record: Record) -> str:
    """Return one line on a record."""
    if record["status"] != "ok":
        return f"{label}: {record['status']}: {record['problem']}"
    spent = f"{record.get('seconds', 0):.1f} s"
    if "after" not in record:
        score = record.get("score")
        limit = record.get("threshold")
        found = "" if score is None else f"score {score:.3g}, "
        found += "" if score is None else "no threshold; " if limit is None else f"threshold {limit:.3g}; "
        return f"{label}: {found}{spent}"
    before, after = record["before"], record["after"]
    changes = ", ".join(
        f"{name} {100 * before[name]['value']:.2f} -> {100 * after[name]['value']:.2f}" for name in after
    )
    return f"{label}: {changes}; {spent}"


def _rates(model: nn.Module, infected: Infected | None, test: LabelledImages) -> dict[str, Any]:
    if infected is None:
        return {"clean_accuracy": clean_accuracy(model, test).describe()}
    return evaluate(model, test, infected.trigger, infected.label_rule).describe()
