"""All executors keep one contract; Ray and Slurm where their packages are installed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from toy import Number, Square, begun
from unbackdoor.bench.executors import Inline, Pool, Ray, Slurm, executor_named
from unbackdoor.bench.executors.base import Executor, Lost, Take
from unbackdoor.bench.executors.pool import JobError
from unbackdoor.bench.runner import drive
from unbackdoor.bench.store import Store
from unbackdoor.errors import InvalidInputError

TESTS = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _workers_find_the_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), *filter(None, sys.path)]))


def taking(count: int) -> Take:
    numbers: Iterator[Number] = iter([Number(value) for value in range(count)])
    return lambda: next(numbers, None)


def check(executor: Executor, folder: Path, count: int = 4) -> None:
    outcomes = list(executor.run(Square(folder), taking(count)))
    assert {task.key: record["square"] for task, record in outcomes if isinstance(record, dict)} == {
        f"n{value}": value**2 for value in range(count)
    }
    assert [begun(folder, value) for value in range(count)] == [1] * count


def test_this_process(tmp_path: Path) -> None:
    check(Inline(), tmp_path)


def test_a_pool_shares_the_cores_and_survives_the_loss_of_workers(tmp_path: Path) -> None:
    job = Square(tmp_path, deadly=(2,), once=(1,))
    outcomes = {task.key: record for task, record in Pool(2, threads=3).run(job, taking(5))}
    assert [begun(tmp_path, value) for value in range(5)] == [1, 2, 3, 1, 1]
    assert outcomes.pop("n2") == Lost("its process was ended by SIGKILL 3 times")
    for number, record in outcomes.items():
        assert isinstance(record, dict)
        assert (record["square"], record["threads"]) == (int(number[1:]) ** 2, "3")
    assert os.environ.get("OMP_NUM_THREADS") != "3"


def test_the_loss_of_all_workers_of_a_task_is_a_record(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    drive([Number(0), Number(1)], Square(tmp_path, deadly=(0,)), store, Pool(1))
    records = store.records()
    assert records["n0"]["status"] == "failed"
    assert "SIGKILL 3 times" in records["n0"]["problem"]
    assert records["n1"]["square"] == 1


def test_a_bug_in_a_job_ends_the_run_of_a_pool_with_its_traceback(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    with pytest.raises(
        JobError, match=r"(?s)^number 1 raised in its worker:.*toy\.py.*KeyError: 'broken at 1'"
    ):
        drive([Number(0), Number(1)], Square(tmp_path, broken=(1,)), store, Pool(1))
    assert set(store.records()) == {"n0"}
    assert begun(tmp_path, 1) == 1


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from toy import *; from unbackdoor.bench.executors import Pool\n"
        f"tasks = iter([Number(0)])\n"
        f"list(Pool(1).run(Square(Path({str(tmp_path)!r}), seconds=60), lambda: next(tasks, None)))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not begun(tmp_path, 0):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker = int(next(tmp_path.glob("0-*")).name.split("-")[1])
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while _alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_local_slurm_queue(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    folder = tmp_path / "slurm"
    check(Slurm(folder, slots=2, cluster="local", poll=0.05), tmp_path, count=2)
    assert not list((folder / "submitted").iterdir())


def test_jobs_that_an_earlier_runner_submitted_are_waited_for(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    slurm = Slurm(tmp_path / "slurm", cluster="local", poll=0.05)
    first = slurm.run(Square(tmp_path), taking(1))
    assert isinstance(first, Generator)
    task, record = next(first)
    first.close()  # the runner died before it kept the record
    assert list(slurm.run(Square(tmp_path), taking(1))) == [(task, record)]
    assert begun(tmp_path, 0) == 1


class _FailedJobError(Exception):
    pass


class _Job:
    job_id = "7"

    def __init__(self, **_: object) -> None: ...

    def done(self) -> bool:
        return True

    def result(self) -> None:
        raise _FailedJobError


def test_a_job_that_raised_is_not_waited_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = SimpleNamespace(FailedJobError=_FailedJobError, UncompletedJobError=TimeoutError)
    queue = SimpleNamespace(folder=tmp_path, update_parameters=lambda **_: None, submit=lambda *_: _Job())
    package = SimpleNamespace(AutoExecutor=lambda **_: queue, LocalJob=_Job, SlurmJob=_Job)
    packages = {"submitit": package, "submitit.core.utils": errors}
    monkeypatch.setattr("unbackdoor.bench.executors.slurm.require", lambda name, extra: packages[name])
    with pytest.raises(_FailedJobError):
        list(Slurm(tmp_path).run(Square(tmp_path), taking(1)))
    assert not list((tmp_path / "submitted").iterdir())


@pytest.mark.slow
def test_a_ray_cluster_runs_the_tasks_of_lost_workers_again(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    job = Square(tmp_path, once=(1,))
    outcomes = dict(Ray(slots=2, cpus=1).run(job, taking(3)))
    assert {task.key: record["square"] for task, record in outcomes.items() if isinstance(record, dict)} == {
        f"n{value}": value**2 for value in range(3)
    }
    assert [begun(tmp_path, value) for value in range(3)] == [1, 2, 1]


def test_executors_by_name() -> None:
    assert executor_named("inline") == Inline()
    assert executor_named("pool", jobs=3, resources={"threads": "2"}) == Pool(3, threads=2)
    assert executor_named("ray", jobs=4, address="auto", resources={"gpus": "0.25"}) == Ray(
        4, "auto", cpus=1, gpus=0.25
    )
    slurm = executor_named("slurm", jobs=8, resources={"slurm_partition": "gpu", "timeout_min": "60"})
    assert isinstance(slurm, Slurm)
    assert (slurm.cluster, slurm.parameters) == ("slurm", {"slurm_partition": "gpu", "timeout_min": 60})


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("dask", {}, "known are inline, pool, ray, slurm"),
        ("pool", {"jobs": 0}, "at least 1, got 0"),
        ("pool", {"resources": {"gpus": "1"}}, "has no resource gpus; it has threads"),
        ("ray", {"resources": {"gpus": "many"}}, "must be a number of at least 0, got 'many'"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        executor_named(name, **options)  # type: ignore[arg-type]


def test_a_slurm_queue_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    with pytest.raises(InvalidInputError, match="cannot use the cluster"):
        list(Slurm(tmp_path, cluster="nosuch").run(Square(tmp_path), taking(1)))
