"""The place where tasks of a benchmark are done: data and models, by their paths.

It travels to worker processes and other machines; data are read there, once a process.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from unbackdoor.bench import training
from unbackdoor.bench.cell import Cell
from unbackdoor.bench.defend import Bench
from unbackdoor.bench.records import recorded
from unbackdoor.bench.store import Record
from unbackdoor.compute import device_named
from unbackdoor.data import load_images
from unbackdoor.types import LabelledImages, silent


@dataclass(frozen=True)
class Training:
    """A model that has to be trained; a task.

    Args:
        job: What decides which model comes out; its folder is named after the model.
    """

    job: training.Job

    @property
    def key(self) -> str:
        """SHA-256 of what decides the model, in hexadecimal."""
        text = json.dumps({"training": self.job.describe(), "model": self.job.out.name}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def label(self) -> str:
        """A few words for people."""
        return f"train {self.job.out.name}"

    @property
    def group(self) -> str:
        """Trainings of an attack take about the same time."""
        return f"train {self.job.name} {self.job.arch} {self.job.width} {self.job.epochs}"


@dataclass(frozen=True)
class Laboratory:
    """Does one task and returns its record.

    Args:
        data: The data set, with splits ``train`` and ``test``.
        homes: Folders of models, looked at in turn.
        device: ``auto``, ``cpu``, ``cuda`` ...
    """

    data: str
    homes: tuple[Path, ...]
    device: str = "auto"

    def __call__(self, task: Cell | Training) -> Record:
        """Answer a cell, or train a model."""
        if isinstance(task, Training):
            return self._train(task)
        return _bench(self).answer(task)

    def _train(self, task: Training) -> Record:
        job = replace(task.job.ready(), device=self.device)
        about = {"key": task.key, "kind": "training", "model": job.out.name, "command": job.command()}
        return recorded(
            about,
            lambda log: _trained(task, training.run_alone(job, log)),
            progress=silent,
            device=device_named(self.device),
        )


def _trained(task: Training, card: Record | None) -> Record:
    if card is None:
        return {"status": "failed", "problem": f"another process trains {task.job.out}; start again later"}
    problems = card.get("validity", {}).get("problems", [])
    return {"metrics": card["metrics"], "problems": problems}


@lru_cache(maxsize=2)
def _bench(laboratory: Laboratory) -> Bench:
    """Return what tasks of this process share: images, and what was measured of suspects."""
    return Bench(
        laboratory.homes,
        _images(laboratory.data, "train"),
        _images(laboratory.data, "test"),
        device=device_named(laboratory.device),
    )


@lru_cache(maxsize=4)
def _images(data: str, split: str) -> LabelledImages:
    return load_images(data, split=split)
