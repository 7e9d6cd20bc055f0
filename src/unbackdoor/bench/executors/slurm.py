"""A Slurm cluster, through submitit: each task is a job of the queue."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unbackdoor.bench.executors.base import TRIES, Job, Lost, Outcome, Take, Task
from unbackdoor.errors import InvalidInputError
from unbackdoor.extras import require


@dataclass(frozen=True)
class Slurm:
    """Jobs of a Slurm queue; see ``base.Executor``.

    Jobs outlive this process. Started again with the same folder, it finds those that it had submitted and
    waits for them instead of submitting their tasks once more.

    Args:
        folder: Where submitit keeps jobs, their results and logs; all nodes must see it.
        slots: Jobs submitted at a time at most.
        cluster: ``slurm``, or ``local`` for processes on this machine, to try things out.
        parameters: What submitit's ``update_parameters`` takes, such as ``timeout_min``, ``cpus_per_task``,
            ``gpus_per_node``, ``slurm_partition``.
        poll: Seconds between looks at the queue.
    """

    folder: Path
    slots: int = 16
    cluster: str = "slurm"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    poll: float = 5.0

    def run(self, job: Job, take: Take) -> Iterator[Outcome]:
        """Yield each task with its record, as they end."""
        queue = self._queue()
        errors = require("submitit.core.utils", extra="slurm")
        waiting: dict[str, tuple[Task, Any]] = {}
        tries: dict[str, int] = {}
        while True:
            while len(waiting) < self.slots and (task := take()) is not None:
                waiting[task.key] = task, self._submitted(queue, task) or self._submit(queue, job, task)
            if not waiting:
                return
            ended = [key for key, (_, submitted) in waiting.items() if submitted.done()]
            if not ended:
                time.sleep(self.poll)
            for key in ended:
                task, submitted = waiting.pop(key)
                try:
                    record = submitted.result()
                except errors.FailedJobError:
                    # Or the same failure would be found again after the bug is mended.
                    self._note(task).unlink(missing_ok=True)
                    raise
                except errors.UncompletedJobError as error:
                    tries[key] = tries.get(key, 0) + 1
                    if tries[key] < TRIES:
                        waiting[key] = task, self._submit(queue, job, task)
                        continue
                    first = next(iter(str(error).splitlines()), "")
                    record = Lost(f"its job was lost {TRIES} times ({first})")
                yield task, record
                # Only now is the record kept elsewhere.
                self._note(task).unlink(missing_ok=True)

    def _queue(self) -> Any:  # noqa: ANN401 - of an optional package
        submitit = require("submitit", extra="slurm")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            queue = submitit.AutoExecutor(folder=self.folder, cluster=self.cluster)
            queue.update_parameters(**{"timeout_min": 24 * 60, "name": "unbackdoor", **self.parameters})
        except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
            raise InvalidInputError(
                f"submitit cannot use the cluster {self.cluster!r} with {dict(self.parameters)} ({error}); "
                "check --address and --resource."
            ) from error
        return queue

    def _submit(self, queue: Any, job: Job, task: Task) -> Any:  # noqa: ANN401
        submitted = queue.submit(job, task)
        note = self._note(task)
        note.parent.mkdir(exist_ok=True)
        note.write_text(str(submitted.job_id))
        return submitted

    def _submitted(self, queue: Any, task: Task) -> Any:  # noqa: ANN401
        """Return the job that an earlier process submitted for the task, or None."""
        note = self._note(task)
        if not note.exists() or not (number := note.read_text().strip()):
            return None
        submitit = require("submitit", extra="slurm")
        kind = submitit.LocalJob if self.cluster == "local" else submitit.SlurmJob
        return kind(folder=queue.folder, job_id=number)

    def _note(self, task: Task) -> Path:
        return self.folder / "submitted" / task.key
