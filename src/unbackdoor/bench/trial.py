"""A trial of detectors: which models are trained, and what each detector says of each.

A model is scored without a threshold; thresholds come later, from the scores of clean models
(``trial_tables``), so that a table can be made again without scoring anything.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unbackdoor import rng
from unbackdoor.bench import zoo
from unbackdoor.bench.cell import key_of
from unbackdoor.bench.defend import Lines
from unbackdoor.bench.executors import Inline
from unbackdoor.bench.records import answered
from unbackdoor.bench.runner import drive
from unbackdoor.bench.store import Record, Store
from unbackdoor.catalogue import find
from unbackdoor.compute import check_fits
from unbackdoor.data.splits import draw_balanced
from unbackdoor.detect.calibration import Kind, options_of
from unbackdoor.detect.registry import MODEL_DETECTORS
from unbackdoor.detect.scan import Scan
from unbackdoor.errors import InvalidInputError
from unbackdoor.settings import configure
from unbackdoor.types import Detection, LabelledImages, Progress, silent

VERSION = 1
"""Raised when the meaning of a question changes: old records are no answers to new questions."""

SCAN = "scan"
"""The name under which all detectors of ``Scan`` are run at once."""

_GRID = {"name", "attack", "count", "seed", "epochs", "set", "vary", "arch", "width", "plain"}


def expand(
    grids: Sequence[Mapping[str, Any]], vary: Mapping[str, Sequence[Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Spell out the models of some grids, for ``benchmarks/build_zoo.py``.

    Args:
        grids: Each with ``name``, ``attack`` and ``count``; the i-th model, ``NAME-i``, has the seed
            ``seed + i`` and takes, of each list in ``vary`` (option to values) and of a list of ``epochs``,
            the entry i modulo its length. Lists whose lengths have no common divisor meet in all
            combinations.
        vary: The same for options of all grids, so that infected and clean models are trained alike: the
            n-th model of all takes the entry n modulo the list's length, unless its grid varies that option.

    Returns:
        Model name to what a specification says of it.

    Raises:
        InvalidInputError: If a grid lacks something, says what is not known, or two models share a name.
    """
    models: dict[str, dict[str, Any]] = {}
    for grid in grids:
        unknown, missing = sorted(set(grid) - _GRID), {"name", "attack", "count"} - set(grid)
        if unknown or missing:
            raise InvalidInputError(
                "a grid of models must say name, attack and count, and may say "
                f"{', '.join(sorted(_GRID))}; got {', '.join(sorted(grid))}."
            )
        for index in range(grid["count"]):
            name = f"{grid['name']}-{index:02d}"
            if name in models:
                raise InvalidInputError(f"two models of the trial are called {name!r}; rename a grid.")
            shared = {option: values[len(models) % len(values)] for option, values in (vary or {}).items()}
            models[name] = _model(grid, index, shared)
    return models


def _model(grid: Mapping[str, Any], index: int, shared: Mapping[str, Any]) -> dict[str, Any]:
    own = {option: values[index % len(values)] for option, values in grid.get("vary", {}).items()}
    varied = {**shared, **own}
    epochs = grid.get("epochs")
    found = {
        "attack": grid["attack"],
        "seed": grid.get("seed", 0) + index,
        "set": [*grid.get("set", []), *(f"{option}={json.dumps(value)}" for option, value in varied.items())],
    }
    if epochs is not None:
        found["epochs"] = epochs[index % len(epochs)] if isinstance(epochs, list) else epochs
    return found | {name: grid[name] for name in ("arch", "width", "plain") if name in grid}


def specification(defaults: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the text of a TOML file that ``benchmarks/build_zoo.py`` reads."""
    lines = ["[defaults]", *_assignments(defaults)]
    for name, values in models.items():
        lines += ["", f"[models.{json.dumps(name)}]", *_assignments(values)]
    return "\n".join(lines) + "\n"


def _assignments(values: Mapping[str, Any]) -> list[str]:
    # Text, numbers, truth values and lists of them look the same in JSON and TOML.
    return [f"{key} = {json.dumps(value)}" for key, value in values.items()]


@dataclass(frozen=True)
class Question:
    """One detector, or a whole scan, on one model; everything that decides the answer.

    Args:
        model: Name of the model in its zoo.
        model_sha256: Hash of its weights.
        data: Name of its data set.
        detector: Name of a model detector, or ``scan``.
        options: Options set on top of the defaults, as ``--set`` takes them.
        settings: All options that result, so that a changed default is a new question.
        clean_images: Clean images that the detector gets.
        seed: Draws them and drives the detector.
    """

    model: str
    model_sha256: str
    data: str
    detector: str
    options: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    clean_images: int = 500
    seed: int = 0

    @property
    def key(self) -> str:
        """Equal questions have equal keys."""
        return key_of({"version": VERSION, **self.describe()})

    @property
    def label(self) -> str:
        """A few words for people."""
        return f"{self.data} {self.model} {self.detector}"

    @property
    def group(self) -> str:
        """Questions of a group take about the same time."""
        return f"{self.data} {self.detector}"

    def describe(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def question(
    entry: zoo.Entry, data: str, detector: str, options: Sequence[str] = (), **rest: int
) -> Question:
    """Return the question that a detector with these options is on a model."""
    method = _method(detector, options)
    parts = method.detectors() if isinstance(method, Scan) else {method.name: method}
    return Question(
        model=entry.name,
        model_sha256=str(entry.card["sha256"]),
        data=data,
        detector=detector,
        options=tuple(options),
        settings={name: options_of(part) for name, part in parts.items()},
        **rest,
    )


@dataclass(frozen=True, eq=False)
class Trial:
    """What questions are answered with.

    Args:
        root: The zoo of one data set.
        pool: Where clean images are drawn from; better none that a model was trained on.
    """

    root: Path
    pool: LabelledImages

    def answer(self, asked: Question, *, progress: Progress = silent) -> Record:
        """Return the record of a question; what a detector refuses or fails at is a record too.

        Raises:
            InvalidInputError: If there is no such model, or it has other weights than those asked about.
        """
        entry = zoo.entry_named(self.root, asked.model)
        zoo.check_asked(entry, asked.model_sha256)
        history = {
            "attack": entry.card.get("attack"),
            "label_rule": entry.card.get("label_rule"),
            "poison_fraction": entry.card.get("options", {}).get("poison_fraction"),
            "valid": entry.is_clean or bool(entry.card.get("validity", {}).get("valid", True)),
            "metrics": {name: entry.rate(name) for name in ("clean_accuracy", "attack_success")},
        }
        return history | answered(asked, lambda log: self._detect(entry, asked, log), progress=progress)

    def _detect(self, entry: zoo.Entry, asked: Question, progress: Progress) -> dict[str, Any]:
        model = zoo.load_network(entry)
        # Each model is seen with images of its own, as each user has.
        seed = asked.seed + int(asked.model_sha256[:8], 16)
        clean = draw_balanced(self.pool, asked.clean_images, rng.generator(seed))
        method, generator = _method(asked.detector, asked.options), rng.generator(seed)
        classes = check_fits(model, clean, purpose="a trial")
        kind = {"kind": Kind.of(model, clean, classes).model_dump(mode="json")}
        started = time.perf_counter()
        if isinstance(method, Scan):
            measured = method.measure(model, clean, generator=generator, progress=progress)
            # More than its detectors' own times, some of which share a run.
            seconds = round(time.perf_counter() - started, 3)
            found = {each.name: _described(each.detection, each.seconds) for each in measured.evidence}
            return kind | {"detections": found, "scan_seconds": seconds}
        detection = method.score(model, clean, generator=generator, progress=progress)
        return kind | {"detections": {method.name: _described(detection, time.perf_counter() - started)}}


def run(
    trial: Trial, questions: Iterable[Question], store: Store, *, said: Callable[[str], None] = print
) -> None:
    """Answer the questions that nobody has answered yet, in turn; others may run the same list beside."""
    drive(list(questions), trial.answer, store, Inline(), watcher=Lines(said, _line))


def _method(detector: str, options: Sequence[str]) -> Any:  # noqa: ANN401 - a scan or any model detector
    base = Scan() if detector == SCAN else find("model detector", MODEL_DETECTORS, detector)()
    return configure(base, options)


def _described(detection: Detection, seconds: float) -> dict[str, Any]:
    usable = not detection.undetermined and math.isfinite(detection.score)
    return {
        "score": detection.score if usable else None,
        "undetermined": detection.undetermined,
        "target_class": detection.target_class,
        "fixed_threshold": detection.threshold if math.isfinite(detection.threshold) else None,
        "seconds": round(seconds, 3),
    }


def _line(label: str, record: Record) -> str:
    if record["status"] != "ok":
        return f"{label}: {record['status']}: {record['problem']}"
    scores = ", ".join(
        f"{name} {'-' if found['score'] is None else format(found['score'], '.3f')}"
        for name, found in record["detections"].items()
    )
    return f"{label}: {scores}"
