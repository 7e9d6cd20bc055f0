"""Train one model of a benchmark, infected or clean: resumable, measured, kept in a folder with its card."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.attacks.registry import attack_named
from unbackdoor.bench.artefact import (
    judged_record,
    label_rule_of,
    load_decoys,
    load_plan,
    read_card,
    save_clean,
    save_infected,
)
from unbackdoor.bench.store import locked
from unbackdoor.bench.validity import check_infected
from unbackdoor.bench.zoo import Entry, update_card
from unbackdoor.catalogue import dashed
from unbackdoor.compute import device_named
from unbackdoor.data import load_images
from unbackdoor.data.splits import draw_balanced
from unbackdoor.errors import InvalidInputError, MismatchedCheckpointError
from unbackdoor.models import NormalisedModel
from unbackdoor.models.checkpoint import read_tensors
from unbackdoor.models.factory import resolve_architecture
from unbackdoor.models.normalise import PRESETS
from unbackdoor.settings import configure
from unbackdoor.train import Recipe, train
from unbackdoor.triggers.files import load_trigger
from unbackdoor.types import Infected, LabelledImages, Progress

CLEAN = "none"
"""The name under which ``unbackdoor attack`` trains a clean twin."""


@dataclass(frozen=True)
class Job:
    """Everything that decides which model comes out."""

    name: str
    data: str
    out: Path
    arch: str
    width: int
    epochs: int
    settings: tuple[str, ...]
    split: str
    test_split: str
    limit: int | None
    image_size: int | None
    normalize: str
    seed: int
    device: str
    paper: bool = False
    half: bool = False
    twin: Path | None = None
    stem: str = "3x3"

    def ready(self) -> Job:
        """Return the job, without its twin where the twin's folder holds no model.

        For when it starts: the twin may be trained between the planning and that.
        """
        there = self.twin is None or (self.twin / "card.json").exists()
        return self if there else replace(self, twin=None)

    def describe(self) -> dict[str, Any]:
        """Return JSON values, without where things are and the device."""
        elsewhere = ("out", "data", "device", "twin")
        return {k: v for k, v in asdict(self).items() if k not in elsewhere} | {
            "settings": list(self.settings)
        }

    def command(self) -> str:
        """Return the command line that trains this model again."""
        parts = ["unbackdoor", "attack", self.name, "--data", self.data, "--out", str(self.out)]
        parts += ["--arch", self.arch, "--width", str(self.width), "--epochs", str(self.epochs)]
        parts += ["--seed", str(self.seed), "--normalize", self.normalize, "--split", self.split]
        parts += ["--test-split", self.test_split]
        parts += ["--limit", str(self.limit)] if self.limit else []
        parts += ["--image-size", str(self.image_size)] if self.image_size else []
        parts += ["--stem", self.stem] if self.stem != "3x3" else []
        parts += ["--paper"] if self.paper and self.name != CLEAN else []
        parts += ["--half"] if self.half else []
        parts += ["--twin", str(self.twin)] if self.twin else []
        for assignment in self.settings:
            parts += ["--set", assignment]
        return shlex.join(parts)


class Clock:
    """Time spent on a job, kept beside its state so that an interrupted job counts all of it.

    Args:
        path: Where the sum of earlier processes is kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        earlier = json.loads(path.read_text()) if path.exists() else {}
        self.wall = float(earlier.get("seconds", 0.0)) - time.perf_counter()
        self.cpu = float(earlier.get("cpu_seconds", 0.0)) - time.process_time()

    def read(self) -> dict[str, float]:
        """Return wall and processor seconds so far."""
        wall, cpu = self.wall + time.perf_counter(), self.cpu + time.process_time()
        return {"seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}

    def ticking(self, progress: Progress) -> Progress:
        """Return ``progress`` that also keeps the time each time it is called."""

        def tick(stage: str, done: int, total: int) -> None:
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.read()))
            temporary.replace(self.path)
            progress(stage, done, total)

        return tick


def run(job: Job, progress: Progress) -> dict[str, Any]:
    """Train and measure the model; return its card. A finished job is not done again.

    Raises:
        InvalidInputError: If the folder holds another job's result, or an option does not fit.
    """
    method = _configured(job)  # before the folder is made: a misspelt option leaves nothing behind
    finished = _prepare(job)
    if finished:
        return _with_twin(job, finished)
    generator = rng.generator(job.seed)
    clock = Clock(job.out / "training-clock.json")
    progress = clock.ticking(progress)
    data = load_images(job.data, split=job.split, image_size=job.image_size)
    test = load_images(job.data, split=job.test_split, image_size=job.image_size)
    data = limited(data, job.limit, generator)
    state = job.out / "training.safetensors"
    extra = {"job": job.describe(), "command": job.command()}
    if isinstance(method, Recipe):
        with rng.isolated(generator):
            model = _network(job, data)
        record = train(
            model, data, method, generator=rng.spawn(generator), resume_from=state, progress=progress
        )
        card = save_clean(
            job.out,
            model,
            test,
            seed=job.seed,
            half=job.half,
            record={"training": record.describe(), **clock.read(), **extra},
        )
    else:
        twin = _twin(job, data)
        infected = method.run(
            data, lambda: _network(job, data), generator=generator, resume_from=state, progress=progress
        )
        card = save_infected(
            job.out,
            infected,
            test,
            attack=method,
            seed=job.seed,
            twin=twin,
            half=job.half,
            extra={**clock.read(), **extra},
        )
    for leftover in job.out.glob("training*"):
        leftover.unlink()
    return card


def limited(data: LabelledImages, limit: int | None, generator: torch.Generator) -> LabelledImages:
    """Return the images that a job trains on.

    Args:
        data: The training set.
        limit: How many are drawn, balanced over the classes; None for all.
        generator: Of the job's seed, before anything else was drawn from it.
    """
    if limit is None or limit >= len(data):
        return data
    return draw_balanced(data, limit, rng.spawn(generator))


def run_alone(job: Job, progress: Progress) -> dict[str, Any] | None:
    """Train the model unless another process of this machine does; return its card, or None if one does.

    Raises:
        InvalidInputError: As ``run``.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    if (job.out / "card.json").exists():
        return run(job, progress)
    path = job.out / ".lock"
    with path.open("w") as lock:
        # Another process may end its training, and take the lock away, between these two lines.
        if not locked(lock, path):
            return run(job, progress) if (job.out / "card.json").exists() else None
        card = run(job, progress)
        path.unlink(missing_ok=True)
    return card


def _twin(job: Job, data: LabelledImages) -> nn.Module | None:
    """Load the clean twin before the training, so that a wrong file does not cost one."""
    if job.twin is None:
        return None
    if job.twin.is_dir() and (job.twin / "card.json").exists():
        attack = read_card(job.twin).get("attack")
        if attack is not None:
            raise InvalidInputError(
                f"{job.twin} holds a model infected by {dashed(str(attack))}, which is no clean twin; give "
                "one trained with `unbackdoor attack none`."
            )
    path = job.twin / "model.safetensors" if job.twin.is_dir() else job.twin
    network = _network(job, data)
    try:
        network.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        raise MismatchedCheckpointError(
            f"{path} does not fit {job.arch} of width {job.width}; give a clean model of the same kind, "
            "trained with `unbackdoor attack none`."
        ) from error
    return network.eval()


def _with_twin(job: Job, card: dict[str, Any]) -> dict[str, Any]:
    """Measure a finished job against a twin that it was not measured with; else return its card."""
    validity = card.get("validity", {})
    if job.twin is None or card.get("attack") is None or validity.get("clean_twin_accuracy"):
        return card
    test = load_images(job.data, split=job.test_split, image_size=job.image_size)
    twin = _twin(job, test)
    network = _network(job, test)
    network.load_state_dict(read_tensors(job.out / "model.safetensors"))
    infected = Infected(
        network.eval(),
        load_trigger(job.out / "trigger.safetensors"),
        load_plan(job.out),
        label_rule_of(card),
        judged_record(card),
        decoys=load_decoys(job.out),
    )
    checked = check_infected(infected, test, attack=_configured(job), twin=twin)
    measured = {
        "metrics": checked.metrics.describe(),
        "validity": checked.describe(),
        "command": job.command(),
    }
    update_card(Entry(job.out.name, job.out, card), measured)
    return {**card, **measured}


def _prepare(job: Job) -> dict[str, Any] | None:
    """Make the folder; return the card if this very job is done."""
    marker = job.out / "job.json"
    description = json.dumps(job.describe() | {"data": job.data}, sort_keys=True)
    if job.out.exists() and not job.out.is_dir():
        raise InvalidInputError(f"{job.out} is a file; give a folder with --out.")
    # A job that was refused before its first epoch left nothing worth keeping.
    begun = (job.out / "card.json").exists() or any(job.out.glob("training*.safetensors"))
    if begun and marker.exists() and marker.read_text() != description:
        raise InvalidInputError(
            f"{job.out} holds a model trained with other options; choose another folder, or delete it."
        )
    if (job.out / "card.json").exists():
        if not marker.exists():
            raise InvalidInputError(f"{job.out} holds another model already; choose another folder.")
        return read_card(job.out)
    try:
        job.out.mkdir(parents=True, exist_ok=True)
        if not marker.exists() or marker.read_text() != description:
            # A kill must not leave half of it: what was trained so far would be refused.
            temporary = job.out / "training-job.tmp"
            temporary.write_text(description)
            temporary.replace(marker)
    except OSError as error:
        raise InvalidInputError(
            f"cannot write into {job.out}: {error.strerror}; choose another --out."
        ) from error
    return None


def _configured(job: Job) -> Any:  # noqa: ANN401 - an attack or a recipe
    recipe = Recipe.short(job.epochs)
    if job.name == CLEAN:
        plain = [s.removeprefix("recipe.") for s in job.settings]
        return configure(recipe, plain)
    method = attack_named(job.name, paper=job.paper)
    return configure(replace(method, recipe=recipe), job.settings)


def _network(job: Job, data: LabelledImages) -> nn.Module:
    architecture = resolve_architecture(job.arch)
    channels = data.images.shape[1]
    options: dict[str, Any] = {"num_classes": data.num_classes}
    if not architecture.is_user_code:
        options |= {"width": job.width, "in_channels": channels}
        options |= {"stem": job.stem} if job.stem != "3x3" else {}
    network = architecture.build(**options)
    if job.normalize != "none":
        if job.normalize not in PRESETS:
            raise InvalidInputError(
                f"unknown normalisation {job.normalize!r}; known are none, {', '.join(PRESETS)}."
            )
        mean, std = PRESETS[job.normalize]
        if len(mean) not in (1, channels):
            mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
        network = NormalisedModel(network, mean, std)
    return network.to(device_named(job.device))
