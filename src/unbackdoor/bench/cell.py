"""One measurement of a benchmark as a value: what is asked for, and a key that equal questions share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

VERSION = 1
"""Raised when the meaning of a cell changes: old records are no answers to new questions."""


@dataclass(frozen=True)
class Cell:
    """A defence on a model, with everything that decides the result.

    Args:
        model: Name of the model in its zoo.
        model_sha256: Hash of its weights: a model trained anew is another model.
        data: The data set that clean and test images come from, by its name.
        method: Name of the purifier.
        paper: Whether it starts from the settings of its paper.
        options: Options set on top, as ``--set`` takes them.
        settings: All options that result, so that a changed default is a new question.
        clean_images: Clean images that the defence gets.
        seed: Draws the clean images and drives the defence.
        test_images: Test images that CA, ASR and RA are measured on; 0 for all.
        reactivate: Whether the re-activation tests are run as well.
    """

    model: str
    model_sha256: str
    data: str
    method: str
    paper: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    clean_images: int = 500
    seed: int = 0
    test_images: int = 0
    reactivate: bool = False

    def describe(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @property
    def key(self) -> str:
        """SHA-256 of the canonical JSON text, in hexadecimal: equal cells have equal keys."""
        return key_of({"version": VERSION, **self.describe()})


def key_of(description: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the canonical JSON text of a description, in hexadecimal."""
    text = json.dumps(description, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
