"""Do what is not done yet, wherever, and keep the records: killed at any point, it goes on where it was.

Only this process touches the store; workers return records. A task is claimed while it is under way, so that
several runners on one store share the work; a claim ends with the process that holds it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from unbackdoor.bench.executors.base import Executor, Job, Lost, Record, Task
from unbackdoor.bench.recording import now, versions
from unbackdoor.bench.store import Follower, Store


@dataclass(eq=False)
class Tally:
    """How far a run is.

    Args:
        total: Tasks in all.
        slots: How many are done side by side.
        clock: Gives seconds.
    """

    total: int
    slots: int = 1
    clock: Callable[[], float] = time.monotonic
    found: int = 0
    states: dict[str, int] = field(default_factory=dict)
    running: dict[str, tuple[Task, float]] = field(default_factory=dict)
    _seconds: dict[str, list[float]] = field(default_factory=dict)
    _left: dict[str, int] = field(default_factory=dict)

    def expect(self, tasks: Iterable[Task]) -> None:
        """Remember what is left, for the estimate."""
        for task in tasks:
            self._left[task.group] = self._left.get(task.group, 0) + 1

    def start(self, task: Task) -> None:
        """A task is under way."""
        self.running[task.key] = task, self.clock()

    def end(self, task: Task, state: str) -> None:
        """A task has ended with a record of this state."""
        _, started = self.running.pop(task.key)
        self._seconds.setdefault(task.group, []).append(self.clock() - started)
        self.states[state] = self.states.get(state, 0) + 1
        self.skip(task)

    def skip(self, task: Task) -> None:
        """A task need not be done here any more."""
        self._left[task.group] -= 1

    @property
    def ended(self) -> int:
        """Tasks with a record, of this run or an earlier one."""
        return self.found + sum(self.states.values())

    def seconds_left(self) -> float | None:
        """Return an estimate of the time that remains; None before the first task has ended.

        A task takes the mean of its group, or of all where its group has none yet.
        """
        times = [value for values in self._seconds.values() for value in values]
        if not times:
            return None
        usual = sum(times) / len(times)
        means = {group: sum(values) / len(values) for group, values in self._seconds.items()}
        work = sum(count * means.get(group, usual) for group, count in self._left.items())
        gone = sum(
            min(self.clock() - started, means.get(task.group, usual))
            for task, started in self.running.values()
        )
        return max(0.0, work - gone) / max(1, min(self.slots, sum(self._left.values())))


class Watcher:
    """Is told what happens in a run; does nothing with it. To be overridden."""

    def began(self, tally: Tally) -> None:
        """Some tasks were done before."""

    def started(self, task: Task, tally: Tally) -> None:
        """A task was given out."""

    def ended(self, task: Task, record: Record, tally: Tally) -> None:
        """A record was kept."""

    def left(self, tasks: Sequence[Task]) -> None:
        """Other runners hold these tasks."""

    def waits(self, tasks: Sequence[Task]) -> None:
        """Other runners hold these tasks, and this one waits for them."""


def drive(
    tasks: Sequence[Task],
    job: Job,
    store: Store,
    executor: Executor,
    *,
    watcher: Watcher | None = None,
    retry: Collection[str] = (),
    wait: float = 0.0,
) -> Tally:
    """Do all tasks that have no record yet.

    Args:
        tasks: In the order in which they are given out; equal ones are done once.
        job: Does a task; what it raises is a bug and ends the run.
        store: Where records are kept.
        executor: Where tasks are done.
        watcher: Is told what happens.
        retry: States of records of earlier runs whose tasks are done again, such as ``failed``.
        wait: Seconds between looks at tasks that other runners hold, until these are done, or free since
            their runner ended; 0 leaves them to the others.

    Returns:
        How far it came.
    """
    run = _Run(store, list({task.key: task for task in tasks}.values()), watcher or Watcher(), retry)
    run.tally.slots = executor.slots
    run.begin()
    run.work(executor, job)
    held = run.held()
    while held and wait:
        run.watcher.waits(held)
        while held and not run.any_free(held):
            time.sleep(wait)
            held = run.held()
        if held:
            run.work(executor, job)
            held = run.held()
    if held:
        run.watcher.left(held)
    return run.tally


class _Run:
    """The state of one run: what waits, what is under way, what other runners hold."""

    def __init__(self, store: Store, tasks: list[Task], watcher: Watcher, retry: Collection[str]) -> None:
        self.store, self.watcher = store, watcher
        self.follower = Follower(store)
        self.stale = retry
        self.answered: set[str] = set()
        self.claims: dict[str, AbstractContextManager[bool]] = {}
        self.waiting: deque[Task] = deque(tasks)
        self.tally = Tally(len(tasks))

    def begin(self) -> None:
        self._look()
        self.stale = ()  # a failure of this run is not tried again
        done = [task for task in self.waiting if task.key in self.answered]
        self.waiting = deque(task for task in self.waiting if task.key not in self.answered)
        self.tally.found = len(done)
        self.tally.expect(self.waiting)
        self.watcher.began(self.tally)

    def work(self, executor: Executor, job: Job) -> None:
        """Do what nobody else holds."""
        outcomes = executor.run(job, self.take)
        try:
            for task, outcome in outcomes:
                self.keep(task, outcome)
        finally:
            close = getattr(outcomes, "close", None)
            if close is not None:
                close()
            self.release()

    def take(self) -> Task | None:
        """Claim the next task that nobody has; see ``executors.base.Take``."""
        self._look()
        for _ in range(len(self.waiting)):
            task = self.waiting.popleft()
            if task.key in self.answered:
                self._found(task)
                continue
            claim = self.store.claim(task.key)
            if not claim.__enter__():
                claim.__exit__(None, None, None)
                self.waiting.append(task)
                continue
            # Another runner may have kept its record between the look and the claim.
            self._look()
            if task.key in self.answered:
                claim.__exit__(None, None, None)
                self._found(task)
                continue
            self.claims[task.key] = claim
            self.tally.start(task)
            self.watcher.started(task, self.tally)
            return task
        return None

    def keep(self, task: Task, outcome: Record | Lost) -> None:
        if isinstance(outcome, Lost):
            # The worker is gone: its device is unknown, its code is taken to be that of this process.
            ending = {"status": "failed", "problem": outcome.reason, "task": task.label}
            outcome = {"key": task.key, **versions(), "created": now(), **ending}
            if describe := getattr(task, "describe", None):
                outcome["cell"] = describe()
        self.store.add(outcome)
        self.answered.add(task.key)
        self.claims.pop(task.key).__exit__(None, None, None)
        self.tally.end(task, str(outcome.get("status", "ok")))
        self.watcher.ended(task, outcome, self.tally)

    def held(self) -> list[Task]:
        """Return what waits for other runners, without what they have done by now."""
        self._look()
        for task in [task for task in self.waiting if task.key in self.answered]:
            self.waiting.remove(task)
            self._found(task)
        return list(self.waiting)

    def any_free(self, tasks: Sequence[Task]) -> bool:
        """Say whether the runner that held one of the tasks is gone."""
        for task in tasks:
            with self.store.claim(task.key) as mine:
                if mine:
                    return True
        return False

    def release(self) -> None:
        for claim in self.claims.values():
            claim.__exit__(None, None, None)
        self.claims.clear()

    def _look(self) -> None:
        for record in self.follower.new():
            if record.get("status") in self.stale:
                self.answered.discard(record["key"])
            else:
                self.answered.add(record["key"])

    def _found(self, task: Task) -> None:
        self.tally.found += 1
        self.tally.skip(task)
