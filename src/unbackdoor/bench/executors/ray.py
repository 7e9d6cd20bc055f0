"""A Ray cluster: one that is there, or one on this machine for the time of the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from unbackdoor.bench.executors.base import TRIES, Job, Lost, Outcome, Record, Take, Task
from unbackdoor.extras import require


@dataclass(frozen=True)
class Ray:
    """Tasks of a Ray cluster; see ``base.Executor``.

    A worker that is lost, with its node or for want of memory, has its task run again elsewhere by Ray.
    Nodes need this package, and data and models at the same paths.

    Args:
        slots: Tasks under way at most.
        address: Of a running cluster, such as ``auto`` or ``ray://host:10001``; empty starts one here.
        cpus: Cores for each task; a task's threads are as many.
        gpus: GPUs for each task; fractions share one.
    """

    slots: int = 2
    address: str = ""
    cpus: float = 1
    gpus: float = 0

    def run(self, job: Job, take: Take) -> Iterator[Outcome]:
        """Yield each task with its record, as they end."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray = require("ray", extra="ray")
        ours = not ray.is_initialized()
        if ours:
            ray.init(**self._cluster())
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": TRIES - 1}
        variables = {"OMP_NUM_THREADS": str(max(1, int(self.cpus)))}

        def do(task: Task) -> Record:  # Ray takes functions only, not what is callable
            return job(task)

        remote = ray.remote(do).options(**options, runtime_env={"env_vars": variables})
        waiting: dict[Any, Task] = {}
        try:
            while True:
                while len(waiting) < self.slots and (task := take()) is not None:
                    waiting[remote.remote(task)] = task
                if not waiting:
                    return
                for reference in ray.wait(list(waiting), num_returns=1)[0]:
                    yield waiting.pop(reference), _answer(ray, reference)
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)
            if ours:
                ray.shutdown()

    def _cluster(self) -> dict[str, Any]:
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        if self.address:
            return {"address": self.address, **quiet}
        # Not more than the machine has, so that a task of several cores is not promised cores twice.
        here = {"num_cpus": max(1, round(self.cpus * self.slots)), "include_dashboard": False}
        return {**here, **quiet, "num_gpus": None if self.gpus else 0}


def _answer(ray: Any, reference: Any) -> Record | Lost:  # noqa: ANN401 - an optional package
    try:
        record: Record = ray.get(reference)
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        first = next(iter(str(error).splitlines()), "")
        return Lost(f"Ray lost its worker {TRIES} times ({type(error).__name__}: {first})")
    return record
