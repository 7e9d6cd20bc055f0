"""One measurement of a benchmark as a value: what is asked for, and a key that equal questions share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

from unbackdoor.catalogue import dashed

Task = Literal["purify", "detect", "ablate"]

VERSION = 1
"""Raised when the meaning of a cell changes: old records are no answers to new questions."""

USUAL_IMAGES = 500
"""Clean images that labels don't mention."""

DIGITS = "digits"
"""The embedded data set; the name is not taken from where it is read, so that reports need no torch."""

LATER: dict[str, Any] = {"task": "purify", "samples": 0, "method_version": 1, "oracle": False}
"""Fields that came after the first records, with what those meant: equal questions keep their keys."""


@dataclass(frozen=True)
class Cell:
    """A method on a model, with everything that decides the result.

    Args:
        model: Name of the model in its zoo; attack, options and architecture are those of its weights.
        model_sha256: Hash of its weights: a model trained anew is another model.
        data: The data set that clean and test images come from, by its name.
        method: Name of the purifier or detector.
        paper: Whether it starts from the settings of its paper.
        options: Options set on top, as ``--set`` takes them.
        settings: All options that result, so that a changed default is a new question.
        clean_images: Clean images that the defence gets.
        seed: Draws the clean images and drives the defence.
        test_images: Test images that CA, ASR and RA are measured on; 0 for all.
        reactivate: Whether the re-activation tests are run as well.
        task: ``purify``; ``detect``; or ``ablate``, which removes every filter in turn.
        samples: Images of the suspect training set that a detector of training sets gets; 0 for all.
        method_version: Of the method's code, raised when its results change.
        oracle: Whether CA and ASR over the number of pruned filters are measured as well (``bench.oracle``).
    """

    model: str
    model_sha256: str
    data: str
    method: str
    paper: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    clean_images: int = USUAL_IMAGES
    seed: int = 0
    test_images: int = 0
    reactivate: bool = False
    task: Task = "purify"
    samples: int = 0
    method_version: int = 1
    oracle: bool = False

    def describe(self) -> dict[str, Any]:
        """Return JSON values; fields that came later are left out where they say what was meant before."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        own |= {"options": dict(self.options), "settings": dict(self.settings)}
        return {k: v for k, v in own.items() if k not in LATER or v != LATER[k]}

    @cached_property
    def key(self) -> str:
        """SHA-256 of the canonical JSON text, in hexadecimal: equal cells have equal keys."""
        return key_of({"version": VERSION, **self.describe()})

    def wider(self) -> tuple[Cell, ...]:
        """Return the cells whose answers hold this one's: the same with a measurement more."""
        if self.task != "purify":
            return ()
        some = (replace(self, reactivate=True), replace(self, oracle=True))
        return tuple(cell for cell in some if cell != self)

    def narrowed(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to this cell out of that to a wider one; ``taken_from`` has the other's key."""
        extra = {"reactivated": self.reactivate, "oracle_curve": self.oracle}
        kept = {name: value for name, value in record.items() if extra.get(name, True)}
        return {**kept, "key": self.key, "cell": self.describe(), "taken_from": record["key"]}

    @property
    def label(self) -> str:
        """A few words for people; they name the task where it is not to purify."""
        task = f" {self.task}" if self.task != "purify" else ""
        images = f" {self.clean_images} images" if self.clean_images != USUAL_IMAGES else ""
        what = task_label(self.model, self.method, self.paper, self.options)
        reactivated = " reactivated" if self.reactivate else ""
        return f"{what}{task}{images}{reactivated} seed {self.seed}"

    @property
    def group(self) -> str:
        """Cells of a group take about the same time."""
        return f"{self.task} {self.method}{' (paper)' if self.paper else ''} {self.clean_images}"


def task_label(model: str, method: str, paper: bool, options: Mapping[str, str]) -> str:
    """Name a method with what was set, on a model, for people."""
    words = ["paper"] if paper else []
    words += [f"{name}={value}" for name, value in options.items()]
    settings = f" ({', '.join(words)})" if words else ""
    return f"{model} {dashed(method)}{settings}"


def data_argument(data: str) -> str:
    """Return what stands for a data set in commands that others are shown; theirs lies elsewhere."""
    return data if data == DIGITS else f"{data.upper()}_FOLDER"


def key_of(description: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the canonical JSON text of a description, in hexadecimal."""
    text = json.dumps(description, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
