"""The work behind ``unbackdoor calibrate``: score clean models, in this process or several side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from unbackdoor import rng
from unbackdoor.bench.artefact import read_card
from unbackdoor.bench.executors import Inline
from unbackdoor.bench.executors.base import Executor, Lost, Record
from unbackdoor.catalogue import dashed
from unbackdoor.cli.inputs import ModelOptions, open_model
from unbackdoor.compute import check_fits
from unbackdoor.data.splits import draw_balanced
from unbackdoor.detect.calibration import (
    CalibrationSet,
    Kind,
    Origin,
    ScoredModel,
    options_of,
    read_calibration,
    write_calibration,
)
from unbackdoor.detect.plausibility import check_plausible
from unbackdoor.detect.scan import Scan
from unbackdoor.errors import InvalidInputError, UnbackdoorError
from unbackdoor.types import LabelledImages, Progress, silent

FILES = (".safetensors", ".pt", ".pth")
"""Which files of a folder are models, unless it holds some called model.safetensors."""


@dataclass(frozen=True, eq=False)
class CleanModel:
    """A model that is known to be clean.

    Args:
        name: What to call it.
        load: Loads or trains it; takes a progress call, returns the network and the hash of its weights;
            picklable.
    """

    name: str
    load: Callable[[Progress], tuple[nn.Module, str]]

    @staticmethod
    def from_file(options: ModelOptions, path: Path) -> CleanModel:
        """Return the model in a file; ``options`` say all but the path."""
        return CleanModel(str(path), partial(_opened, replace(options, path=path)))


def _opened(options: ModelOptions, progress: Progress) -> tuple[nn.Module, str]:
    loaded = open_model(options)
    return loaded.model, loaded.checkpoint.sha256


@dataclass(frozen=True, eq=False)
class Plan:
    """What a calibration is made with.

    Args:
        out: The file; it grows by one model at a time, and a started one goes on.
        scan: The scan that it is for; its detectors score the models.
        pool: Where each model's clean images are drawn from.
        images: How many are drawn.
        split: The part of the data set that they are from; empty if unknown.
        seed: Draws and detectors follow it.
        draws: So many draws of images a model, whose highest scores count.
        origin: See ``CalibrationSet``.
        description: Which models these are, in words.
        architecture: Their name.
        normalisation: What the images are given to the models with, in words.
        anew: Do not go on with what the file holds; the first scored model replaces it.
    """

    out: Path
    scan: Scan
    pool: LabelledImages
    images: int
    seed: int
    origin: Origin
    description: str
    architecture: str
    split: str = ""
    normalisation: str = ""
    draws: int = 1
    anew: bool = False

    @cached_property
    def drawn_from(self) -> str:
        """Hash of the images, their labels and how they are normalised."""
        digest = hashlib.sha256(self.normalisation.encode())
        for tensor in (self.pool.labels, self.pool.images):
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def options(self) -> dict[str, dict[str, Any]]:
        """Return the options of all detectors by name."""
        return {name: options_of(detector) for name, detector in self.scan.detectors().items()}


@dataclass(frozen=True, eq=False)
class Scoring:
    """One model to be scored; a task of the executors.

    Args:
        index: Its place among the models; its draws follow it.
        model: Which.
        known: Hashes of the models that are scored.
    """

    index: int
    model: CleanModel
    known: frozenset[str]

    @property
    def key(self) -> str:
        """Every place is scored once."""
        return str(self.index)

    @property
    def label(self) -> str:
        """The model's name."""
        return self.model.name

    @property
    def group(self) -> str:
        """All take about the same time."""
        return "models"


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores one model after the other, in whatever process; picklable where ``progress`` is.

    Args:
        plan: What with.
        progress: Called during the work.
    """

    plan: Plan
    progress: Progress

    def __call__(self, task: Scoring) -> Record:
        """Return what came of a model.

        Returns:
            Nothing for one that is scored already; else what is wrong with the model (``left_out``) or with
            the calibration as a whole (``error``), or its ``kind``, number of ``images`` and ``model``.
        """
        try:
            network, digest = task.model.load(self.progress)
        except UnbackdoorError as error:
            # A surrogate's training that fails will fail for the others too.
            whose = "error" if self.plan.origin == "surrogates" else "left_out"
            return {whose: str(error).rstrip(".")}
        if digest in task.known:
            return {}  # scored before an interruption, or the same file twice
        try:
            return self._scored(task, network, digest)
        except UnbackdoorError as error:
            return {"error": str(error).rstrip(".")}

    def _scored(self, task: Scoring, network: nn.Module, digest: str) -> Record:
        plan = self.plan
        seeds = range(plan.seed + task.index * plan.draws, plan.seed + (task.index + 1) * plan.draws)
        first = draw_balanced(plan.pool, plan.images, rng.generator(seeds[0]))
        classes = check_fits(network, first, purpose="a calibration", at_least=2)
        plausible = check_plausible(network, first)
        if plausible.problem:
            return {"left_out": plausible.problem}
        return {
            "kind": Kind.of(network, first, classes, architecture=plan.architecture),
            "images": len(first),
            "model": ScoredModel(
                name=task.model.name,
                sha256=digest,
                clean_accuracy=plausible.accuracy.value,
                scores=highest(self._scores(network, seed) for seed in seeds),
            ),
        }

    def _scores(self, network: nn.Module, seed: int) -> dict[str, float | None]:
        clean = draw_balanced(self.plan.pool, self.plan.images, rng.generator(seed))
        measured = self.plan.scan.measure(
            network, clean, generator=rng.generator(seed), progress=self.progress
        )
        return measured.scores()


def calibrate(
    plan: Plan,
    models: Sequence[CleanModel],
    executor: Executor,
    *,
    progress: Progress,
    say: Callable[[str], None],
) -> CalibrationSet:
    """Score the models that are not scored yet, and write the file after each.

    Args:
        plan: What with.
        models: All of one kind.
        executor: Where. Only one in this process says how far it is within a model.
        progress: Called during the work; the stage ``models`` counts them.
        say: Called with a line for each model that is left out.

    Raises:
        InvalidInputError: If the file holds another calibration, models differ in kind, or none is usable.
    """
    found = _started(plan)
    problem = "there are none"
    waiting = iter(enumerate(models))
    places: dict[str, int] = {}

    def take() -> Scoring | None:
        known = frozenset(model.sha256 for model in found.models) if found else frozenset()
        return next((Scoring(index, model, known) for index, model in waiting), None)

    scorer = Scorer(plan, progress if isinstance(executor, Inline) else silent)
    progress("models", 0, len(models))
    for done, (task, answer) in enumerate(executor.run(scorer, take), start=1):
        record: Record = {"left_out": answer.reason} if isinstance(answer, Lost) else answer
        if "error" in record:
            raise InvalidInputError(f"{record['error']}.")
        if "left_out" in record:
            problem = record["left_out"]
            say(f"left out: {task.label}: {problem}")
        elif record:
            places.setdefault(record["model"].sha256, int(task.key))
            found = found or _begun(plan, record["kind"], record["images"])
            found = _grown(found, record["kind"], record["model"], places)
            write_calibration(found, plan.out)
        progress("models", done, len(models))
    if found is None or not found.models:
        raise InvalidInputError(f"no model can be used for a calibration: {problem}.")
    return found


def _grown(
    found: CalibrationSet, kind: Kind, scored: ScoredModel, places: Mapping[str, int]
) -> CalibrationSet:
    """Return the calibration with one more model, unless another worker was faster with the same one.

    Args:
        found: What there is.
        kind: Of the model.
        scored: The model.
        places: Hash to place, of those that were scored in this run; earlier ones stay in front.

    Raises:
        InvalidInputError: If the model is of another kind.
    """
    if not found.kind.is_like(kind):
        raise InvalidInputError(
            f"{scored.name} is {kind.words()}, the models before it are {found.kind.words()}; calibrate "
            "each kind by itself."
        )
    if any(model.sha256 == scored.sha256 for model in found.models):
        return found
    # The same file, however many were scored side by side.
    ordered = sorted((*found.models, scored), key=lambda model: places.get(model.sha256, -1))
    return found.model_copy(update={"models": tuple(ordered)})


def highest(scores: Iterable[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the highest score of each detector over several draws; None where it abstained on all.

    Args:
        scores: Detector to score, one mapping a draw, all of the same detectors.
    """
    draws = list(scores)
    return {
        name: max((score for row in draws if (score := row[name]) is not None), default=None)
        for name in draws[0]
    }


def model_files(paths: Iterable[Path]) -> list[Path]:
    """Return the model files that are named, or lie in the folders that are named.

    Raises:
        InvalidInputError: If there are none, or a card says that a model is infected.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(path.rglob("model.safetensors"))
        found = found or sorted(file for file in path.rglob("*") if file.suffix in FILES and file.is_file())
        if not found:
            raise InvalidInputError(
                f"{path} holds no model files ({', '.join(FILES)}); name files, or a folder that has some."
            )
        files += found
    for file in files:
        card = file.parent / "card.json"
        attack = read_card(file.parent).get("attack") if card.exists() else None
        if attack is not None:
            raise InvalidInputError(
                f"{file} is infected by {dashed(str(attack))}, as its card says; a calibration needs clean "
                "models alone."
            )
    return list(dict.fromkeys(files))


def _begun(plan: Plan, kind: Kind, images: int) -> CalibrationSet:
    return CalibrationSet(
        description=plan.description,
        origin=plan.origin,
        kind=kind,
        images=images,
        split=plan.split,
        drawn_from=plan.drawn_from,
        seed=plan.seed,
        draws=plan.draws,
        options=plan.options(),
    )


def _started(plan: Plan) -> CalibrationSet | None:
    """Return what an interrupted run left.

    Raises:
        InvalidInputError: If the file holds something else.
    """
    if plan.anew or not plan.out.exists():
        return None
    found = read_calibration(plan.out)
    wanted = (plan.origin, plan.description, min(plan.images, len(plan.pool)), plan.draws)
    same = (found.origin, found.description, found.images, found.draws) == wanted
    # Older files do not say.
    same = same and found.split in ("", plan.split) and found.drawn_from in ("", plan.drawn_from)
    same = same and found.seed in (None, plan.seed)
    detectors = plan.scan.detectors()
    if not same or set(found.options) != set(detectors) or not all(map(found.agrees, detectors.values())):
        raise InvalidInputError(
            f"{plan.out} holds a calibration made with other options, models or images; choose another "
            "--out, or add --force."
        )
    return found
