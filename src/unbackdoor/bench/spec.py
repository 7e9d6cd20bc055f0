"""Which models are trained, and how: the TOML files behind the zoo and the suites."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unbackdoor.bench.training import CLEAN, Job
from unbackdoor.errors import InvalidInputError

KNOWN = {
    "attack",
    "seed",
    "epochs",
    "set",
    "plain",
    "arch",
    "width",
    "stem",
    "twin",
    "normalize",
    "paper",
    "text",
}
"""What a model, or ``defaults``, may say."""


def read_spec(path: Path) -> dict[str, Any]:
    """Read a specification of models.

    Raises:
        InvalidInputError: If the file cannot be read, or is none.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise InvalidInputError(
            f"{path} cannot be read as a list of models ({problem}); name the folder of the zoo with --zoo."
        ) from error
    check_spec(content, str(path))
    return content


def check_spec(content: Mapping[str, Any], source: str) -> None:
    """Check the tables ``defaults`` and ``models`` of a specification.

    Raises:
        InvalidInputError: If one is missing, or says what is not understood.
    """
    models, defaults = content.get("models"), content.get("defaults", {})
    if not isinstance(models, dict) or not isinstance(defaults, dict):
        raise InvalidInputError(f"{source} must have a table [models.NAME] for each model.")
    for name, values in {**models, "defaults": defaults}.items():
        unknown = sorted(set(values) - KNOWN)
        if unknown:
            raise InvalidInputError(
                f"{source}: {name} says {', '.join(unknown)}, which means nothing; known are "
                f"{', '.join(sorted(KNOWN))}."
            )
        if name != "defaults" and not {"attack", "seed"} <= set(values):
            raise InvalidInputError(f'{source}: model {name} needs an attack (or "none") and a seed.')


def jobs(content: Mapping[str, Any], data: str, out: Path) -> dict[str, Job]:
    """Return the jobs that a specification describes, by model name.

    ``set`` of a model comes after that of the defaults, unless it is ``plain``. Each infected model names its
    clean twin, whether that is there yet or not: see ``Job.ready``.

    Args:
        content: From ``read_spec``.
        data: The data set.
        out: Folder of the models.
    """
    defaults = content.get("defaults", {})
    return {name: _job(values, defaults, data, out / name) for name, values in content["models"].items()}


def _job(values: Mapping[str, Any], defaults: Mapping[str, Any], data: str, out: Path) -> Job:
    given = {**defaults, **values}
    twin = given.get("twin") if values["attack"] != CLEAN else None
    return Job(
        name=values["attack"],
        data=data,
        out=out,
        arch=given.get("arch", "resnet18"),
        width=given.get("width", 16),
        epochs=given["epochs"],
        settings=(*([] if given.get("plain") else defaults.get("set", [])), *values.get("set", [])),
        split="train",
        test_split="test",
        limit=None,
        image_size=None,
        normalize=given.get("normalize", "cifar10"),
        seed=values["seed"],
        device="auto",
        paper=given.get("paper", False),
        half=True,
        twin=out.parent / twin if twin else None,
        stem=given.get("stem", "3x3"),
    )
