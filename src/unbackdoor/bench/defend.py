"""Answer one cell: purify a model of a zoo, measure what is left of its backdoor, and record both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import nn

from unbackdoor import rng
from unbackdoor.bench import zoo
from unbackdoor.bench.cell import Cell
from unbackdoor.bench.records import Question, answered
from unbackdoor.bench.store import Record, Store
from unbackdoor.catalogue import options_of
from unbackdoor.costs import metered
from unbackdoor.data.splits import draw_balanced
from unbackdoor.evaluate import clean_accuracy, evaluate
from unbackdoor.purify.registry import purifier_named
from unbackdoor.reactivate import reactivation
from unbackdoor.settings import configure
from unbackdoor.types import Infected, LabelledImages, Progress, Purified, silent

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
        root: The zoo.
        train: Where the clean images are drawn from.
        test: What is measured on.
    """

    root: Path
    train: LabelledImages
    test: LabelledImages

    def answer(self, cell: Cell, *, progress: Progress = silent) -> Record:
        """Return the record of ``cell``; what the defence refuses or fails at is a record too.

        Args:
            cell: The question.
            progress: Called during the defence.
        """
        return answered(cell, lambda: self._measure(cell, progress))

    def _measure(self, cell: Cell, progress: Progress) -> dict[str, Any]:
        entry = zoo.entry_named(self.root, cell.model)
        infected = None if entry.is_clean else zoo.load_infected(entry)
        model = infected.model if infected else zoo.load_network(entry)
        method = _method(cell.method, cell.paper, cell.options)
        clean = draw_balanced(self.train, cell.clean_images, rng.generator(cell.seed))
        with metered() as cost:
            purified = method.purify(model, clean, generator=rng.generator(cell.seed), progress=progress)
        test = self.test
        if cell.test_images:
            test = draw_balanced(test, cell.test_images, rng.generator(0))
        result = {
            "attack": entry.card.get("attack"),
            "before": _rates(model, infected, test),
            "after": _rates(purified.model, infected, test),
            "filters_removed": purified.mask.n_removed if purified.mask else None,
            "notes": _notes(purified),
            "cost": cost.describe(),
        }
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


def cell_of(
    entry: zoo.Entry,
    method: str,
    *,
    data: str,
    paper: bool = False,
    options: Mapping[str, str] | None = None,
    **rest: Any,  # noqa: ANN401 - the other fields of a cell
) -> Cell:
    """Return the cell of a method on a model of a zoo, with all options spelt out."""
    configured = _method(method, paper, options or {})
    return Cell(
        model=entry.name,
        model_sha256=str(entry.card["sha256"]),
        data=data,
        method=configured.name,
        paper=paper,
        options=dict(options or {}),
        settings={option.path: option.default for option in options_of(configured)},
        **rest,
    )


def _method(name: str, paper: bool, options: Mapping[str, str]) -> Any:  # noqa: ANN401
    assignments = [f"{path}={value}" for path, value in options.items()]
    return configure(purifier_named(name, paper=paper), assignments)


def run(
    bench: Answering[Asked],
    cells: Iterable[Asked],
    store: Store,
    *,
    progress: Progress = silent,
    said: Any = print,  # noqa: ANN401 - anything that takes a line
) -> None:
    """Answer the cells that nobody has answered yet, in turn; others may run the same list beside.

    Args:
        bench: What they are answered with.
        cells: The questions.
        store: Where the records go.
        progress: Called during each defence.
        said: Called with a line for each new record.
    """
    for cell in cells:
        if cell.key in store.records():
            continue
        with store.claim(cell.key) as free:
            if not free or cell.key in store.records():
                continue
            record = bench.answer(cell, progress=progress)
            store.add(record)
        said(_line(cell, record))


def _line(cell: Question, record: Record) -> str:
    what = f"{cell.model} {cell.method}{' (paper)' if cell.paper else ''} seed {cell.seed}"
    if record["status"] != "ok":
        return f"{what}: {record['status']}: {record['problem']}"
    before, after = record["before"], record["after"]
    changes = ", ".join(
        f"{name} {100 * before[name]['value']:.2f} -> {100 * after[name]['value']:.2f}" for name in after
    )
    return f"{what}: {changes}; {record['cost']['seconds']:.1f} s"


def _rates(model: nn.Module, infected: Infected | None, test: LabelledImages) -> dict[str, Any]:
    if infected is None:
        return {"clean_accuracy": clean_accuracy(model, test).describe()}
    return evaluate(model, test, infected.trigger, infected.label_rule).describe()


def _notes(purified: Purified) -> dict[str, Any]:
    """Keep what tells one decision of a method from another, and leave its long lists out."""
    short = (str, int, float, bool, type(None))
    return {
        name: value
        for name, value in purified.diagnostics.items()
        if isinstance(value, short) and name != "options"
    }
