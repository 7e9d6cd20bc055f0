"""Suites: which methods are measured on which models, as TOML files that come with the package.

A suite has sizes, each with its models (lists of models to train, ``suites/models/*.toml``, or ``zoo``), and
grids: every method with every variant of its options on every model, for each number of clean images and each
seed.
"""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unbackdoor.bench.cell import Cell, data_argument
from unbackdoor.bench.defend import asked_of, model_fields
from unbackdoor.bench.laboratory import Training
from unbackdoor.bench.methods import METHODS, configured
from unbackdoor.bench.spec import check_spec, jobs, read_spec
from unbackdoor.bench.training import CLEAN, Job
from unbackdoor.bench.zoo import Entry, entry_at
from unbackdoor.catalogue import dashed, find, options_of
from unbackdoor.errors import InvalidInputError
from unbackdoor.usercode import names_code

ZOO = "zoo"
"""The name of the list of models that is ``zoo.toml`` in the zoo itself."""

FACTORS = (0.5, 2.0)
"""By which an option is scaled to see how much depends on it."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Grid(_Strict):
    """Methods on models.

    Args:
        part: What it is called in tables.
        task: What the methods do.
        models: Names or patterns.
        methods: Names or patterns.
        paper: Start from the settings of each method's paper.
        options: Variants; each is what ``--set`` takes.
        names: What each of these is called in tables; one that is empty or not there shows the options.
        scale: By method, options that are halved and doubled, one at a time, beside the defaults.
        clean_images: Clean images that a method gets.
        seeds: Instead of those of the size.
        reactivate: Whether to look for backdoors that are only asleep.
        oracle: Whether pruning methods get their oracle curves, which use the trigger.
        samples: Training images shown to detectors of training sets; 0 for all.
        sizes: Only in these; empty for all.
    """

    part: str = ""
    task: Literal["purify", "detect", "ablate"] = "purify"
    models: tuple[str, ...]
    methods: tuple[str, ...]
    paper: bool = False
    options: tuple[dict[str, str], ...] = ({},)
    names: tuple[str, ...] = ()
    scale: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    clean_images: tuple[int, ...] = (500,)
    seeds: tuple[int, ...] = ()
    reactivate: bool = False
    oracle: bool = False
    samples: int = 0
    sizes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        given = [name for name in self.names if name]
        if self.names and len(self.names) != len(self.options):
            raise ValueError(f"{len(self.names)} names for {len(self.options)} options")
        if len(set(given)) != len(given):
            raise ValueError("two variants have one name")
        return self

    def name_of(self, options: Mapping[str, str]) -> str:
        """Return what a variant is called; empty where it has no name."""
        return next((n for n, each in zip(self.names, self.options, strict=False) if each == options), "")


class Size(_Strict):
    """How large a suite is run.

    Args:
        text: For whom.
        models: Lists of models, in which names are looked up in turn.
        seeds: Of draw and method.
        test_images: Test images measured on; 0 for all.
        only: Patterns of labels, as `badnets mnp *`: questions of which none fits are left out; all if empty.
    """

    text: str
    models: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    test_images: int = 0
    only: tuple[str, ...] = ()

    def asks(self, label: str) -> bool:
        """Say whether a question belongs to this size."""
        return not self.only or fits_any(label, self.only)


class Suite(_Strict):
    """A benchmark.

    Args:
        name: Of its file.
        source: As it was asked for: its name, or the path of its file.
        title: In a line.
        text: What it shows, and what to know about it.
        layout: How its records become tables and figures.
        data: Data set that the models were trained on.
        sizes: By name; the first is the default.
        grid: What is measured.
    """

    name: str
    source: str
    title: str
    text: str
    layout: str
    data: str
    sizes: dict[str, Size]
    grid: tuple[Grid, ...]

    def grids_of(self, size: str) -> list[Grid]:
        """Return the grids of a size."""
        return [grid for grid in self.grid if not grid.sizes or size in grid.sizes]

    def narrowed(self, size: str, parts: Sequence[str], seeds: Sequence[int]) -> Suite:
        """Return the suite with some parts and draws of a size alone.

        Args:
            size: Name of the size.
            parts: Which parts; all if empty.
            seeds: Which draws; all if empty.

        Raises:
            InvalidInputError: If it has no such size, part or draw.
        """
        if size not in self.sizes:
            raise InvalidInputError(
                f"suite {self.name} has no size {size!r}; it has {', '.join(self.sizes)}."
            )
        chosen, grids = self.sizes[size], self.grids_of(size)
        draws = dict.fromkeys([*chosen.seeds, *(seed for grid in grids for seed in grid.seeds)])
        _check_known("part", parts, dict.fromkeys(grid.part for grid in grids), self.name)
        _check_known("draw", seeds, draws, self.name)
        kept = set(seeds or draws)
        few = chosen.model_copy(update={"seeds": tuple(seed for seed in chosen.seeds if seed in kept)})
        grid = (
            each.model_copy(update={"seeds": tuple(seed for seed in each.seeds if seed in kept)})
            for each in grids
            if (not parts or each.part in parts) and (not each.seeds or kept & set(each.seeds))
        )
        return self.model_copy(update={"grid": tuple(grid), "sizes": {**self.sizes, size: few}})


def _check_known(what: str, asked: Collection[object], known: Collection[object], name: str) -> None:
    if unknown := [each for each in asked if each not in known]:
        raise InvalidInputError(
            f"suite {name} has no {what} {unknown[0]!r}; it has {', '.join(map(repr, known))}."
        )


def suite_names() -> list[str]:
    """Return the suites that come with the package."""
    return sorted(
        path.name.removesuffix(".toml") for path in _folder().iterdir() if path.name.endswith(".toml")
    )


def read_suite(name: str) -> Suite:
    """Read a suite of the package by its name, or of the user by the path of a ``.toml`` file.

    Raises:
        InvalidInputError: If there is none, or it says what is not understood.
    """
    if name.endswith(".toml"):
        source, text = name, _read(Path(name))
    elif name in suite_names():
        source, text = f"suite {name}", (_folder() / f"{name}.toml").read_text(encoding="utf-8")
    else:
        raise InvalidInputError(
            f"unknown suite {name!r}; known are {', '.join(suite_names())}, or give the path of a .toml file."
        )
    try:
        return Suite.model_validate({"name": Path(name).stem, **tomllib.loads(text), "source": name})
    except tomllib.TOMLDecodeError as error:
        raise InvalidInputError(f"{source} is no TOML file ({error}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InvalidInputError(f"{source} is no suite: {place}: {first['msg']}.") from error


def _folder() -> Any:  # noqa: ANN401 - a traversable of importlib
    return resources.files("unbackdoor.bench") / "suites"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be read as a suite ({error}).") from error


@dataclass(frozen=True)
class Places:
    """Where models are.

    Args:
        zoo: Trained models that came from elsewhere.
        models: Where a run trains its own, in one folder for each list.
    """

    zoo: Path
    models: Path

    def homes(self, size: Size) -> tuple[Path, ...]:
        """Return the folders in which models of a size are looked for, in this order."""
        zoo = (self.zoo,) if ZOO in size.models else ()
        return (*zoo, *(self.models / name for name in size.models))


@dataclass(frozen=True, eq=False)
class Plan:
    """What has to be done for a suite.

    Args:
        suite: The suite.
        size: Name of its size.
        places: Where models are.
        jobs: How each model that is needed is trained, by name, clean ones first; clean twins of others are
            needed as well.
        narrow: The parts and draws that were asked for; all where there are none.
    """

    suite: Suite
    size: str
    places: Places
    jobs: Mapping[str, Job]
    narrow: Mapping[str, Sequence[object]] = field(default_factory=dict)

    @staticmethod
    def of(
        suite: Suite,
        size: str,
        places: Places,
        data: str,
        *,
        parts: Sequence[str] = (),
        seeds: Sequence[int] = (),
    ) -> Plan:
        """Find out which models are needed and how they are trained.

        Args:
            suite: The suite.
            size: Name of its size.
            places: Where models are.
            data: The data set, for commands that train.
            parts: Only these parts of the suite; all if empty.
            seeds: Only these draws; all if empty.

        Raises:
            InvalidInputError: If there is no such size, part or draw, or a model is in none of its lists.
        """
        suite = suite.narrowed(size, parts, seeds)
        chosen = suite.sizes[size]
        known: dict[str, Job] = {}
        for name in reversed(chosen.models):
            known |= jobs(_spec(name, places), data, places.models / name)
        for grid in suite.grids_of(size):
            matching(grid.models, known, suite.name)
        narrow: dict[str, Sequence[object]] = {"part": list(parts), "seeds": list(seeds)}
        needed = Plan(suite, size, places, known, narrow).asked
        needed |= {twin for name in needed if (twin := _twin_of(known[name], known))}
        # Clean twins first: the others are measured beside them.
        order = sorted(needed, key=lambda name: (known[name].name != CLEAN, list(known).index(name)))
        found = {name: _with_twin(known[name], places) for name in order}
        return Plan(suite, size, places, found, narrow)

    @property
    def asked(self) -> set[str]:
        """Models that questions are about; the others are clean twins of these."""
        if self.suite.sizes[self.size].only:
            return self.models_of(lambda label: True)
        return {model for grid in self.grids for model in self._models(grid)}

    @property
    def grids(self) -> list[Grid]:
        """The grids of this size."""
        return self.suite.grids_of(self.size)

    def entries(self) -> dict[str, Entry]:
        """Return the models that are there.

        Raises:
            InvalidInputError: If a folder outside the zoo holds a model that was trained in another way.
        """
        found = {}
        for name, job in self.jobs.items():
            for home in self.places.homes(self.suite.sizes[self.size]):
                if (home / name / "card.json").exists():
                    found[name] = entry_at(home / name)
                    if home != self.places.zoo:
                        _check_job(found[name], job)
                    break
        return found

    def trainings(self, models: Collection[str] | None = None) -> list[Training]:
        """Return the models that have to be trained yet, and their clean twins, clean ones first.

        Args:
            models: Only these and their twins; all that questions are about if None.
        """
        there = self.entries()
        missing = {name for name in (self.asked if models is None else models) if name not in there}
        twins = {_twin_of(self.jobs[name], self.jobs) for name in missing}
        return [
            Training(job)
            for name, job in self.jobs.items()
            if name in missing or (name in twins and name not in there)
        ]

    def models_of(self, fits: Callable[[str], bool]) -> set[str]:
        """Return the models, there or not, with a question whose label fits."""
        return {cell.model for cell in self.expected() if fits(cell.label)}

    def expected(self) -> list[Cell]:
        """Return the cells of all models, there or not; the hash of their weights is left empty."""
        any_weights = {name: Entry(name, job.out, {"sha256": ""}) for name, job in self.jobs.items()}
        return [cell for _, cell in self._questions(any_weights).values()]

    def cells(self) -> dict[str, tuple[tuple[str, ...], Cell]]:
        """Return the cells of all models that are there, with their parts, by key, seed by seed.

        A cell that several grids ask for is one question, and belongs to the parts of all of them.
        """
        return self._questions(self.entries())

    def _questions(self, there: Mapping[str, Entry]) -> dict[str, tuple[tuple[str, ...], Cell]]:
        size = self.suite.sizes[self.size]
        found: dict[str, tuple[tuple[str, ...], Cell]] = {}
        for seed in dict.fromkeys([*size.seeds, *(seed for grid in self.grids for seed in grid.seeds)]):
            for grid in self.grids:
                if seed in (grid.seeds or size.seeds):
                    for cell in (cell for cell in self._cells(grid, seed, there) if size.asks(cell.label)):
                        parts, _ = found.get(cell.key, ((), cell))
                        found[cell.key] = tuple(dict.fromkeys((*parts, grid.part))), cell
        return found

    def _models(self, grid: Grid) -> list[str]:
        # A size that asks some questions only has no jobs for models that none of these is about.
        whole = not self.suite.sizes[self.size].only
        patterns = [each for each in grid.models if whole or fnmatch.filter(self.jobs, each)]
        return matching(patterns, self.jobs, self.suite.name)

    def _cells(self, grid: Grid, seed: int, there: Mapping[str, Entry]) -> Iterator[Cell]:
        size = self.suite.sizes[self.size]
        for method in methods_of(grid, self.suite.name):
            for options in variants(grid, method):
                asked = asked_of(method, paper=grid.paper, options=options, task=grid.task)
                for model in filter(there.__contains__, self._models(grid)):
                    fixed = {**model_fields(there[model]), **asked}
                    for clean_images in grid.clean_images:
                        yield Cell(
                            **fixed,
                            data=self.suite.data,
                            clean_images=clean_images,
                            seed=seed,
                            test_images=size.test_images,
                            reactivate=grid.reactivate,
                            oracle=grid.oracle,
                            samples=grid.samples,
                        )

    def describe(self) -> dict[str, Any]:
        """Return JSON values: what belongs to the run, and how it is shown."""
        there, asked = self.entries(), self.asked
        missing = [name for name in self.jobs if name in asked and name not in there]
        return {
            "suite": self.suite.name,
            "given": {
                "suite": self.suite.source,
                "zoo": str(self.places.zoo),
                "models": str(self.places.models),
                **{name: values for name, values in self.narrow.items() if values},
            },
            "title": self.suite.title,
            "text": self.suite.text,
            "layout": self.suite.layout,
            "data": self.suite.data,
            "size": self.size,
            "size_text": self._size_text(),
            "missing_models": missing,
            # A run is shown to others, whose data lie elsewhere.
            "commands": {
                name: replace(job, data=data_argument(self.suite.data)).command()
                for name, job in self.jobs.items()
            },
            "cells": {
                key: {
                    "parts": list(parts),
                    "label": cell.label,
                    **({"name": name} if (name := self._name_of(parts, cell)) else {}),
                    "cell": cell.describe(),
                }
                for key, (parts, cell) in self.cells().items()
            },
        }

    def _size_text(self) -> str:
        words = [f"{name} {', '.join(map(str, values))}" for name, values in self.narrow.items() if values]
        alone = f" Of this only {' and '.join(words)}." if words else ""
        return self.suite.sizes[self.size].text + alone

    def _name_of(self, parts: Sequence[str], cell: Cell) -> str:
        names = (grid.name_of(cell.options) for grid in self.grids if grid.part in parts)
        return next(filter(None, names), "")


def _twin_of(job: Job, known: Mapping[str, Job]) -> str | None:
    """Return the name of a job's clean twin if it is among the known ones, of the same list."""
    name = job.twin.name if job.twin else ""
    return name if name in known and known[name].out.parent == job.out.parent else None


def _with_twin(job: Job, places: Places) -> Job:
    """Return a job whose twin is that of the zoo, for a model of the zoo's list, if it is there."""
    if job.twin is None or job.out.parent.name != ZOO or not (places.zoo / job.twin.name).is_dir():
        return job
    return replace(job, twin=places.zoo / job.twin.name)


def _check_job(entry: Entry, job: Job) -> None:
    usual = {field.name: field.default for field in fields(Job)}
    trained = entry.card.get("job") or {}
    other = [name for name, value in job.describe().items() if trained.get(name, usual[name]) != value]
    if other:
        raise InvalidInputError(
            f"{entry.folder} holds a model that was trained in another way than its list says "
            f"({', '.join(other)}); move it away, or name another folder with --models."
        )


def _spec(name: str, places: Places) -> dict[str, Any]:
    if name == ZOO:
        return read_spec(places.zoo / "zoo.toml")
    path = _folder() / "models" / f"{name}.toml"
    if not path.is_file():
        raise InvalidInputError(f"there is no list of models {name!r}.")
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    check_spec(content, f"models {name}")
    return content


def fits_any(label: str, patterns: Sequence[str]) -> bool:
    """Say whether a label fits a pattern, in which methods are written with dashes or as in Python."""
    return any(fnmatch.fnmatch(label, each) for pattern in patterns for each in (pattern, dashed(pattern)))


def matching(patterns: Sequence[str], known: Mapping[str, Any], source: str) -> list[str]:
    """Return the known names that patterns stand for, in the order of the patterns.

    Raises:
        InvalidInputError: If a pattern stands for none.
    """
    found: list[str] = []
    for pattern in patterns:
        dashes = pattern.replace("-", "_")
        names = [name for name in known if fnmatch.fnmatch(name, pattern)] or [
            name for name in known if fnmatch.fnmatch(name, dashes)
        ]
        if not names:
            raise InvalidInputError(f"{source} names {pattern!r}; known are {', '.join(known)}.")
        found += names
    return list(dict.fromkeys(found))


def methods_of(grid: Grid, source: str) -> list[str]:
    """Return the names of the methods that a grid asks about, and the code of the user's own as it is named.

    Args:
        grid: Methods in its task's registry go by patterns.
        source: The suite, for the message.

    Raises:
        InvalidInputError: If a pattern stands for none.
    """
    found: list[str] = []
    for each in grid.methods:
        found += [each] if names_code(each) else matching([each], METHODS[grid.task], source)
    return list(dict.fromkeys(found))


def variants(grid: Grid, method: str) -> list[dict[str, str]]:
    """Return the settings of a method that a grid asks for: its variants, and its scaled options."""
    scaled = [
        {**base, path: value}
        for name, paths in grid.scale.items()
        if (name if names_code(name) else find(f"method to {grid.task}", METHODS[grid.task], name).name)
        == method
        for base in grid.options
        for path in paths
        for value in _scaled(configured(grid.task, method, grid.paper, base), path)
    ]
    return [*map(dict, grid.options), *scaled]


def _scaled(method: Any, path: str) -> list[str]:  # noqa: ANN401 - one of many dataclasses
    """Return an option's value halved and doubled, as text; whole numbers stay whole and at least 1."""
    texts = {option.path: option.default for option in options_of(method)}
    try:
        value = float(texts[path])
    except (KeyError, ValueError) as error:
        raise InvalidInputError(f"{path!r} of {method.name} is no number that could be scaled.") from error
    whole = "." not in texts[path] and "e" not in texts[path] and value == int(value) and value > 1
    values = [max(1, round(value * factor)) if whole else value * factor for factor in FACTORS]
    return [f"{each:g}" for each in values]
