"""Answer cells on graphs: poison one, defend it, and measure what is left; the store is that of images."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unbackdoor import rng
from unbackdoor.bench.cell import key_of, task_label
from unbackdoor.bench.records import answered
from unbackdoor.bench.store import Record
from unbackdoor.bench.tables import label_of, markdown, percent
from unbackdoor.bench.validity import Requirements
from unbackdoor.catalogue import configured, options_of, version_of
from unbackdoor.costs import metered
from unbackdoor.graph.attacks import ATTACKS
from unbackdoor.graph.evaluate import clean_accuracy, evaluate, judge
from unbackdoor.graph.generate import PRESETS
from unbackdoor.graph.laboratory import Staged, stage
from unbackdoor.graph.purify import PURIFIERS, Defended, Plain
from unbackdoor.settings import configure
from unbackdoor.types import Progress, silent

VERSION = 1
"""Raised when the meaning of a graph cell changes."""

LATER = {"method_version": 1, "attack_version": 1}
"""Fields that came after the first records, with what those meant: equal questions keep their keys."""

_SCALED = ("poisoned",)
"""Options of attacks that go with the size of the data."""


@dataclass(frozen=True)
class GraphCell:
    """A defence on a poisoned graph, with everything that decides the result.

    Args:
        data: A preset, or the name of a Planetoid data set.
        attack: Name of the attack, or ``none``.
        method: Name of the purifier.
        seed: Of the graph, the division, the attack and the defence.
        paper: Whether the defence starts from the settings of its paper.
        options: Options of the defence set on top.
        settings: All options of the defence that result.
        attack_settings: All options of the attack.
        method_version: Of the purifier's code, raised when its results change.
        attack_version: Of the attack's code.
    """

    data: str
    attack: str
    method: str
    seed: int = 0
    paper: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    attack_settings: Mapping[str, str] = field(default_factory=dict)
    method_version: int = 1
    attack_version: int = 1

    @property
    def model(self) -> str:
        """What is defended, for tables: data and attack, with what was changed of the attack's options."""
        offence = _attack(self.attack, {})
        usual = {} if offence is None else _spelt(offence)
        changed = [
            f"{name}={value}"
            for name, value in self.attack_settings.items()
            if value != usual[name] and name not in _SCALED
        ]
        return f"{self.data}, {self.attack}" + (f" [{', '.join(changed)}]" if changed else "")

    @property
    def key(self) -> str:
        """Equal cells have equal keys."""
        return key_of({"kind": "graph", "version": VERSION, **self.describe()})

    @property
    def label(self) -> str:
        """A few words for people."""
        return f"{task_label(self.model, self.method, self.paper, self.options)} seed {self.seed}"

    @property
    def group(self) -> str:
        """Cells of a group take about the same time."""
        return f"{self.model} {self.method}"

    def describe(self) -> dict[str, Any]:
        """Return JSON values; fields that came later are left out where they say what was meant before."""
        values = {k: v for k, v in asdict(self).items() if k not in LATER or v != LATER[k]}
        return {"model": self.model, **values}


def graph_cell(
    data: str,
    attack: str,
    method: str,
    *,
    seed: int,
    paper: bool = False,
    options: Mapping[str, str] | None = None,
    attack_options: Mapping[str, str] | None = None,
) -> GraphCell:
    """Return a cell with all options spelt out.

    Raises:
        InvalidInputError: If there is no such attack, method or option.
    """
    offence = _attack(attack, attack_options or {})
    defence = _purifier(method, paper, options or {})
    return GraphCell(
        data=data,
        attack=attack,
        method=method,
        seed=seed,
        paper=paper,
        options=dict(options or {}),
        settings=_spelt(defence),
        attack_settings={} if offence is None else _spelt(offence),
        method_version=version_of(type(defence)),
        attack_version=1 if offence is None else version_of(type(offence)),
    )


def _spelt(method: Any) -> dict[str, str]:  # noqa: ANN401
    return {option.path: option.default for option in options_of(method)}


def _attack(name: str, options: Mapping[str, str]) -> Any:  # noqa: ANN401
    if name == "none":
        return None
    return configure(configured("graph attack", ATTACKS, name, paper=False), _assignments(options))


def _purifier(name: str, paper: bool, options: Mapping[str, str]) -> Any:  # noqa: ANN401
    return configure(configured("graph purifier", PURIFIERS, name, paper=paper), _assignments(options))


def _assignments(options: Mapping[str, str]) -> list[str]:
    return [f"{path}={value}" for path, value in options.items()]


@dataclass(eq=False)
class GraphBench:
    """What graph cells are answered with; the last poisoned graph is kept for the next method.

    Args:
        planetoid: Folder with Planetoid files, for cells whose data are no preset.
    """

    planetoid: Path | None = None
    _last: tuple[str, Staged, Defended] | None = None

    def answer(self, cell: GraphCell, *, progress: Progress = silent) -> Record:
        """Return the record of ``cell``; what is refused or fails is a record too.

        Args:
            cell: The question.
            progress: Called during the work.
        """
        return answered(cell, lambda log: self._measure(cell, log), progress=progress)

    def _measure(self, cell: GraphCell, progress: Progress) -> dict[str, Any]:
        staged, undefended = self._staged(cell, progress)
        method = _purifier(cell.method, cell.paper, cell.options)
        with metered() as cost:
            defended = method.purify(staged.graph, generator=rng.generator(cell.seed), progress=progress)
        before = _rates(undefended, staged)
        result = {
            "attack": None if staged.poisoned is None else cell.attack,
            "poisoned": 0 if staged.poisoned is None else len(staged.poisoned.nodes),
            "valid": is_valid(before),
            "before": before,
            "after": _rates(defended, staged),
            "cost": cost.describe(),
        }
        if defended.scan is not None:
            result["detection"] = {
                **judge(defended.scan, staged.poisoned).describe(),
                "flagged": len(defended.scan.flagged),
                "p_value": defended.scan.p_value,
                "backdoored": defended.scan.is_backdoored,
            }
        return result

    def _staged(self, cell: GraphCell, progress: Progress) -> tuple[Staged, Defended]:
        key = key_of({"data": cell.data, "attack": cell.attack, "seed": cell.seed, **cell.attack_settings})
        if self._last is None or self._last[0] != key:
            attack = _attack(cell.attack, cell.attack_settings)
            staged = stage(self._source(cell.data), attack, cell.seed, progress=progress)
            plain = Plain().purify(staged.graph, generator=rng.generator(cell.seed), progress=progress)
            self._last = key, staged, plain
        return self._last[1], self._last[2]

    def _source(self, data: str) -> str:
        if data.partition(":")[0] in PRESETS or self.planetoid is None:
            return data
        return str(self.planetoid / data)


def is_valid(before: Mapping[str, Any]) -> bool | None:
    """Return whether an attack took: the ASR without a defence is that of a valid infected model.

    Args:
        before: The rates without a defence, as JSON values.

    Returns:
        None where nobody attacked.
    """
    if "attack_success" not in before:
        return None
    success = before["attack_success"]["value"]
    return success is not None and success >= Requirements.attack_success


def _rates(defended: Defended, staged: Staged) -> dict[str, Any]:
    if staged.poisoned is None:
        return {"clean_accuracy": clean_accuracy(defended, staged.division).describe()}
    poisoned = staged.poisoned
    return evaluate(defended, staged.division, poisoned.trigger, poisoned.target_class).describe()


def graph_table(records: Sequence[Record]) -> str:
    """Return one row a graph, attack and method as Markdown: means over the seeds, with the range.

    Of the attacks, those count as valid that reach 90 % without a defence; only these say what one is worth.
    A mean over fewer runs than there are says over how many: nothing flagged has no precision.
    """
    columns: dict[str, Callable[[Sequence[Record]], str]] = {
        "seeds": lambda rows: str(len(rows)),
        "valid attacks": _valid,
        "CA": lambda rows: _spread(_values(rows, "clean_accuracy")),
        "ASR": lambda rows: _spread(_values(rows, "attack_success")),
        "RA": lambda rows: _spread(_values(rows, "robust_accuracy")),
        "recall": lambda rows: _spread(_found(rows, "recall"), _attacked(rows)),
        "precision": lambda rows: _spread(_found(rows, "precision"), _attacked(rows)),
        "AUROC": lambda rows: _spread(_aurocs(rows), _attacked(rows)),
        "said backdoored": _verdicts,
        "seconds": lambda rows: f"{statistics.median(r['cost']['seconds'] for r in rows):.1f}",
    }
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record["status"] == "ok":
            groups.setdefault((record["cell"]["model"], label_of(record)), []).append(record)
    rows = [[*names, *(show(group) for show in columns.values())] for names, group in groups.items()]
    return markdown(["graph, attack", "method", *columns], rows)


def _valid(rows: Sequence[Record]) -> str:
    took = [is_valid(row["before"]) for row in rows if row["attack"]]
    return f"{sum(map(bool, took))} of {len(took)}" if took else "-"


def _values(rows: Sequence[Record], rate: str) -> list[float]:
    return [row["after"][rate]["value"] for row in rows if rate in row["after"]]


def _attacked(rows: Sequence[Record]) -> int:
    """Return how many runs looked for nodes that were there to be found."""
    return sum("detection" in row and bool(row["attack"]) for row in rows)


def _found(rows: Sequence[Record], rate: str) -> list[float]:
    found = [row["detection"][rate]["value"] for row in rows if "detection" in row and row["attack"]]
    return [value for value in found if value is not None]


def _aurocs(rows: Sequence[Record]) -> list[float]:
    found = [row["detection"]["auroc"] for row in rows if "detection" in row]
    return [value for value in found if value is not None]


def _verdicts(rows: Sequence[Record]) -> str:
    said = [row["detection"]["backdoored"] for row in rows if "detection" in row]
    return f"{sum(map(bool, said))} of {len(said)}" if said else "-"


def _spread(values: Sequence[float], runs: int = 0) -> str:
    if not values:
        return "-"
    fewer = f"; {len(values)} of {runs} runs" if len(values) < runs else ""
    return f"{percent(statistics.mean(values))} ({percent(min(values))} to {percent(max(values))}{fewer})"
