"""The methods that a cell can name: purifiers, detectors, and the measurement of every filter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from unbackdoor import catalogue
from unbackdoor.detect.registry import MODEL_DETECTORS, SAMPLE_DETECTORS
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.mask import PruneMode
from unbackdoor.purify.registry import PURIFIERS
from unbackdoor.settings import configure


@dataclass(frozen=True)
class Ablate:
    """Remove every filter in turn and measure the losses: CLC and BLC of MNP (arXiv 2405.17750), Eqs. 2, 3.

    Args:
        prune_mode: What removing a filter clears.
    """

    name: ClassVar[str] = "ablate"
    title: ClassVar[str] = "Exact CLC and BLC of every filter"
    source: ClassVar[str] = "MNP, arXiv 2405.17750, Fig. 1"
    needs: ClassVar[str] = "labelled images and the trigger"

    prune_mode: PruneMode = "silence"


METHODS: dict[str, dict[str, type[Any]]] = {
    "purify": PURIFIERS,
    "detect": {**MODEL_DETECTORS, **SAMPLE_DETECTORS},
    "ablate": {Ablate.name: Ablate},
}
"""By task and ``name`` in snake_case (users write dashes)."""

OWN = {"purify": "purify", "detect": "score"}
"""By task, what a class of the user's own must do."""


def configured(task: str, name: str, paper: bool, options: Mapping[str, str]) -> Any:  # noqa: ANN401
    """Return a method with options as ``--set`` takes them.

    Args:
        task: What it does, a key of ``METHODS``.
        name: Snake case or with dashes; or a class of the user's own, as ``path/to/file.py:Class``.
        paper: Start from the settings of its paper.
        options: Set on top.

    Raises:
        InvalidInputError: If there is no such task, method or option.
        UnsupportedModelError: If the user's code cannot be imported.
    """
    if task not in METHODS:
        raise InvalidInputError(f"unknown task {task!r}; known are {', '.join(METHODS)}.")
    method = catalogue.configured(
        f"method to {task}", METHODS[task], name, paper=paper, own=OWN.get(task, "")
    )
    return configure(method, [f"{path}={value}" for path, value in options.items()])
