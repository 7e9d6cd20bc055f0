"""Processes on this machine, each with its share of the cores.

Every worker is a process of its own with a pipe to this one. One that dies, of a signal or for want of
memory, costs the task that it had, and that one is given to another; workers end when this process does,
however it ends. What a job raises is a bug and is raised here.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from unbackdoor.bench.executors.base import TRIES, Job, Lost, Outcome, Record, Take, Task

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""Without these, glibc gives every activation back to the kernel and gets it again, page by page."""


@dataclass(frozen=True)
class Pool:
    """Worker processes on this machine; see ``base.Executor``.

    Args:
        slots: How many.
        threads: Threads each; 0 shares the cores out. More threads than cores in all slow every worker down
            several times.
    """

    slots: int = 2
    threads: int = 0

    def run(self, job: Job, take: Take) -> Iterator[Outcome]:
        """Yield each task with its record, as they end.

        Raises:
            JobError: If a job raised something.
        """
        variables = self._environment()
        workers: list[_Worker] = []
        tries: dict[str, int] = {}
        again: list[Task] = []
        try:
            while True:
                while len([w for w in workers if w.task]) < self.slots:
                    task = again.pop() if again else take()
                    if task is None:
                        break
                    worker = next((w for w in workers if w.task is None), None)
                    if worker is None:
                        worker = _Worker.started(job, variables)
                        workers.append(worker)
                    worker.give(task)
                busy = [worker for worker in workers if worker.task]
                if not busy:
                    return
                heard = wait([worker.pipe for worker in busy])
                for worker in busy:
                    if worker.pipe not in heard:
                        continue
                    task, record = worker.ended()
                    if record is not None:
                        yield task, record
                        continue
                    workers.remove(worker)
                    tries[task.key] = tries.get(task.key, 0) + 1
                    if tries[task.key] < TRIES:
                        again.append(task)
                    else:
                        yield task, Lost(worker.death())
        finally:
            for worker in workers:
                worker.stop()

    def _environment(self) -> dict[str, str]:
        """Return the variables that workers get; what the user has set counts, unless threads are given."""
        threads = str(self.threads or threads_for(self.slots))
        chosen = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        wanted = {**ENVIRONMENT, **chosen}
        unset = {name: value for name, value in wanted.items() if name not in os.environ}
        return unset | chosen if self.threads else unset


def threads_for(slots: int) -> int:
    """Return how many threads each of so many workers on this machine should have."""
    return max(1, len(os.sched_getaffinity(0)) // slots)


class JobError(RuntimeError):
    """A job raised something in its worker, which is a bug; the message ends with that traceback."""


@dataclass(frozen=True)
class _Raised:
    traceback: str


@dataclass(eq=False)
class _Worker:
    """A worker process as this one sees it."""

    process: SpawnProcess
    pipe: Connection
    task: Task | None = field(default=None)

    @staticmethod
    def started(job: Job, variables: Mapping[str, str]) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        # daemon: ended with this process when it leaves in an orderly way.
        process = context.Process(target=_work, args=(job, theirs), daemon=True)
        with _environment(variables):
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def give(self, task: Task) -> None:
        self.task = task
        # A worker that died idle is noticed when its answer is waited for.
        with suppress(OSError):
            self.pipe.send(task)

    def ended(self) -> tuple[Task, Record | None]:
        """Return the task that the worker had with its record, or None if the worker is lost.

        Raises:
            JobError: If the job raised something.
        """
        task, self.task = self.task, None
        assert task is not None
        try:
            answer: Record | _Raised = self.pipe.recv()
        except (EOFError, OSError):
            return task, None
        if isinstance(answer, _Raised):
            raise JobError(f"{task.label} raised in its worker:\n{answer.traceback}")
        return task, answer

    def death(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"its process was ended by {signal.Signals(-code).name} {TRIES} times"
        return f"its process ended with exit code {code} {TRIES} times"

    def stop(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()


def _work(job: Job, pipe: Connection) -> None:
    """Do tasks until the pipe is closed; the whole life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        answer: Record | _Raised
        try:
            answer = job(task)
        except Exception:  # noqa: BLE001 - it is raised again where it ends the run
            answer = _Raised(traceback.format_exc())
        pipe.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the block, for a child that is started there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
