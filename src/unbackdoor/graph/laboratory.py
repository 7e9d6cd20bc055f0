"""Set the stage for a measurement on graphs: open a graph, divide it, poison it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.graph.attacks.triggers import Poisoned
from unbackdoor.graph.data import Division, Graph, divide
from unbackdoor.graph.files import load_graph
from unbackdoor.graph.generate import PRESETS, generate, preset
from unbackdoor.graph.planetoid import planetoid_names, read_planetoid
from unbackdoor.types import Progress, silent


@dataclass(frozen=True, eq=False)
class Staged:
    """A graph, divided and perhaps poisoned.

    Args:
        division: Who gets what.
        poisoned: What the attack left, or None where nobody attacked.
    """

    division: Division
    poisoned: Poisoned | None

    @property
    def graph(self) -> Graph:
        """What the defender gets."""
        return self.division.training if self.poisoned is None else self.poisoned.graph


def open_graph(source: str, generator: torch.Generator) -> Graph:
    """Make or read a graph.

    Args:
        source: A preset such as ``cora-like`` or ``pubmed-like:0.1``; a ``.safetensors`` file; a folder with
            the Planetoid files of one data set, or of several, with the name of one behind it: ``DIR/cora``.
        generator: For presets.

    Raises:
        InvalidInputError: If there is no such graph, or a file does not hold one.
        UnsafeFileError: If a file is not merely data.
    """
    path = Path(source)
    if source.partition(":")[0] in PRESETS:
        return generate(preset(source), generator)
    if path.is_file():
        return load_graph(path)
    if path.is_dir():
        names = planetoid_names(path)
        if len(names) == 1:
            return read_planetoid(path, names[0])
        raise InvalidInputError(
            f"{path} holds {len(names)} Planetoid data sets ({', '.join(names) or 'none'}); name one, such "
            f"as {path / (names[0] if names else 'cora')}."
        )
    if path.parent.is_dir() and path.name in planetoid_names(path.parent):
        return read_planetoid(path.parent, path.name)
    raise InvalidInputError(
        f"there is no graph {source!r}: give {', '.join(PRESETS)}, a .safetensors file, or a folder with "
        "Planetoid files."
    )


def stage(
    source: str,
    attack: Any,  # noqa: ANN401 - one of several dataclasses
    seed: int,
    *,
    progress: Progress = silent,
) -> Staged:
    """Open, divide and poison a graph; equal arguments give equal graphs.

    Args:
        source: As ``open_graph`` takes it.
        attack: A graph attack, or None for a clean twin.
        seed: Of the made-up graph, the division and the attack.
        progress: Called during the attack.
    """
    generator = rng.generator(seed)
    graph = open_graph(source, rng.spawn(generator))
    division = divide(graph, rng.spawn(generator))
    if attack is None:
        return Staged(division, None)
    poisoned = attack.run(division.training, generator=rng.spawn(generator), progress=progress)
    return Staged(division, poisoned)
