"""Where tasks are done: this process, processes on this machine, Ray, Slurm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from unbackdoor.bench.executors.base import Executor
from unbackdoor.bench.executors.inline import Inline as Inline
from unbackdoor.bench.executors.pool import Pool as Pool
from unbackdoor.bench.executors.pool import threads_for
from unbackdoor.bench.executors.ray import Ray as Ray
from unbackdoor.bench.executors.slurm import Slurm as Slurm
from unbackdoor.errors import InvalidInputError

NAMES = ("inline", "pool", "ray", "slurm")


def executor_named(
    name: str,
    *,
    jobs: int = 1,
    address: str = "",
    resources: Mapping[str, str] | None = None,
    folder: Path = Path("slurm"),
) -> Executor:
    """Return an executor by its name.

    Args:
        name: One of ``NAMES``.
        jobs: Tasks side by side.
        address: Of a Ray cluster; for Slurm ``local`` tries jobs out without a queue.
        resources: For each task: ``threads`` of the pool; ``cpus`` and ``gpus`` of Ray; what submitit takes.
        folder: Where Slurm's jobs are kept.

    Raises:
        InvalidInputError: If there is no such executor, or it does not know a resource.
    """
    given = dict(resources or {})
    if jobs < 1:
        raise InvalidInputError(f"jobs must be at least 1, got {jobs}.")
    known = {"inline": (), "pool": ("threads",), "ray": ("cpus", "gpus")}.get(name)
    if known is not None and set(given) - set(known):
        raise InvalidInputError(
            f"the executor {name!r} has no resource {', '.join(sorted(set(given) - set(known)))}; it has "
            f"{', '.join(known) or 'none'}."
        )
    numbers = {key: _number(key, value) for key, value in given.items()} if known else {}
    if name == "inline":
        return Inline()
    if name == "pool":
        return Pool(jobs, threads=int(numbers.get("threads", 0)))
    if name == "ray":
        cpus = numbers.get("cpus", threads_for(jobs) if not address else 1)
        return Ray(jobs, address, cpus=cpus, gpus=numbers.get("gpus", 0))
    if name == "slurm":
        parameters = {key: int(value) if value.isdigit() else value for key, value in given.items()}
        cluster = address or "slurm"
        return Slurm(folder, jobs, cluster, parameters, poll=0.2 if cluster == "local" else 5.0)
    raise InvalidInputError(f"unknown executor {name!r}; known are {', '.join(NAMES)}.")


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not number >= 0:
        raise InvalidInputError(f"resource {name!r} must be a number of at least 0, got {text!r}.")
    return number
