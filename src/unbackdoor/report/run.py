"""A run of a benchmark as it lies in its folder: what was asked, and what was answered so far."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unbackdoor.bench.cell import DIGITS, data_argument
from unbackdoor.bench.store import Record, Store
from unbackdoor.bench.tables import took
from unbackdoor.catalogue import dashed
from unbackdoor.errors import InvalidInputError

PLAN, RECORDS = "plan.json", "records.jsonl"
USUAL_ZOO, USUAL_RUNS = "zoo", Path("runs")
"""Where trained models, and runs, are if nothing else is said; models of a run's own are beside the run."""


@dataclass(frozen=True)
class Answer:
    """A question with what came of it.

    Args:
        key: Of the cell.
        parts: The parts of the suite that it belongs to.
        cell: What was asked.
        record: The answer, or None yet.
        name: What the suite calls the options that were set; empty if it does not.
        older: Whether today's version would ask something else in these words, since defaults have changed.
    """

    key: str
    parts: tuple[str, ...]
    cell: Mapping[str, Any]
    record: Record | None
    name: str = ""
    older: bool = False

    @property
    def status(self) -> str:
        """``ok``, ``refused``, ``failed`` or ``missing``."""
        return "missing" if self.record is None else str(self.record["status"])

    @property
    def ok(self) -> bool:
        """Whether there is a result."""
        return self.status == "ok"

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.cell["model"])

    @property
    def method(self) -> str:
        """Name of the method, in snake_case."""
        return str(self.cell["method"])

    @property
    def images(self) -> int:
        """Clean images that the method got."""
        return int(self.cell["clean_images"])

    @property
    def task(self) -> str:
        """What the method does."""
        return str(self.cell.get("task", "purify"))

    @property
    def options(self) -> dict[str, str]:
        """Options that were set."""
        return dict(self.cell.get("options", {}))

    @property
    def variant(self) -> str:
        """The settings in a few words; empty for the defaults."""
        words = ["paper"] if self.cell.get("paper") else []
        set_to = [self.name] if self.name else [f"{name}={value}" for name, value in self.options.items()]
        return ", ".join([*words, *set_to])

    @property
    def label(self) -> str:
        """The method with its settings."""
        return dashed(self.method) + (f" [{self.variant}]" if self.variant else "")

    @property
    def attack(self) -> str | None:
        """The attack that the model was infected by, None for a clean one or an unanswered question."""
        return None if self.record is None else self.record.get("attack")

    @property
    def took(self) -> bool:
        """Whether nothing is known against the attack on the model; one that failed is no success."""
        return self.record is None or took(self.record)

    def rate(self, name: str, when: str = "after") -> float:
        """Return a rate in per cent; NaN where there is none."""
        value = (self.record or {}).get(when, {}).get(name, {}).get("value")
        return float("nan") if value is None else 100 * float(value)

    def value(self, *path: str) -> Any:  # noqa: ANN401 - any JSON value
        """Return something in the record, None where it is not."""
        found: Any = self.record
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        return found


@dataclass(frozen=True)
class Run:
    """A run.

    Args:
        plan: What was written by ``unbackdoor bench``.
        answers: All questions, in the order of the plan.
        trainings: Records of the models that were trained.
    """

    plan: Mapping[str, Any]
    answers: tuple[Answer, ...]
    trainings: tuple[Record, ...] = field(default=())

    def of(self, part: str) -> list[Answer]:
        """Return the answers of a part."""
        return [answer for answer in self.answers if part in answer.parts]

    def parts(self) -> list[str]:
        """Return the parts in their order."""
        return list(dict.fromkeys(part for answer in self.answers for part in answer.parts))

    def count(self, status: str) -> int:
        """Return how many questions have a status."""
        return sum(answer.status == status for answer in self.answers)

    @property
    def command(self) -> str:
        """What goes on with the run, or makes its records again."""
        return self._command(self.plan["given"].get("only", ()))

    def command_for(self, answer: Answer) -> str:
        """What answers one question again."""
        return self._command([self.plan["cells"][answer.key]["label"]])

    def _command(self, only: Sequence[str]) -> str:
        given, size = self.plan["given"], str(self.plan["size"])
        usual = USUAL_RUNS / f"{self.plan['suite']}-{size}"
        # Older plans do not know where they were.
        out = Path(given.get("out", usual))
        models = out.parent / "models"
        words = ["unbackdoor", "bench", _place(given["suite"]), "--size", size]
        for name, place, default in (
            ("out", out, usual),
            ("zoo", given["zoo"], USUAL_ZOO),
            ("models", given["models"], models),
        ):
            words += [] if Path(place) == Path(default) else [f"--{name}", _place(place)]
        data = data_argument(str(self.plan["data"]))
        several = {
            **{name: given.get(name, ()) for name in ("part", "seeds")},
            "data": () if data == DIGITS else (data,),
            "only": only,
        }
        words += [
            word for name, values in several.items() for each in values for word in (f"--{name}", str(each))
        ]
        return shlex.join(words)


def _place(path: Path | str) -> str:
    """Return a path as others may see it: where it lies on this machine is nobody's business."""
    return Path(path).name if Path(path).is_absolute() else str(path)


def read_run(folder: Path, older: Callable[[Mapping[str, Any]], bool] = lambda cell: False) -> Run:
    """Read a run.

    Args:
        folder: As ``unbackdoor bench --out`` wrote it.
        older: Says of a cell whether it was asked with defaults of an earlier version; by default of none.

    Raises:
        InvalidInputError: If the folder holds none.
    """
    path = folder / PLAN
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        cells = {
            str(key): (tuple(map(str, value["parts"])), value["cell"], str(value.get("name", "")))
            for key, value in plan["cells"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # The message of an OSError repeats the path, after a number.
        problem = error.strerror if isinstance(error, OSError) else error
        raise InvalidInputError(
            f"{path} cannot be read as the plan of a run ({problem}); give the folder that "
            "`unbackdoor bench --out` wrote."
        ) from error
    records = Store(folder / RECORDS).records()
    answers = [
        Answer(key, parts, cell, records.get(key), name, older(cell))
        for key, (parts, cell, name) in cells.items()
    ]
    trainings = [record for record in records.values() if record.get("kind") == "training"]
    return Run(plan, tuple(answers), tuple(trainings))


def grouped(answers: Iterable[Answer], by: Callable[[Answer], Any]) -> dict[Any, list[Answer]]:
    """Return answers by a property, in the order in which its values first appear."""
    found: dict[Any, list[Answer]] = {}
    for answer in answers:
        found.setdefault(by(answer), []).append(answer)
    return found


def only(answers: Sequence[Answer], **wanted: Any) -> list[Answer]:  # noqa: ANN401 - any property
    """Return the answers whose properties have these values."""
    return [a for a in answers if all(getattr(a, name) == value for name, value in wanted.items())]
