from __future__ import annotations

import fcntl
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

from unbackdoor.bench import training
from unbackdoor.bench.laboratory import Laboratory, Training
from unbackdoor.bench.training import Job
from unbackdoor.types import silent


def _job(out: Path) -> Job:
    return Job(
        name="none", data="digits", out=out, arch="resnet10", width=4, epochs=1, settings=(),
        split="train", test_split="test", limit=None, image_size=None, normalize="mnist", seed=0,
        device="auto", paper=True, half=True, twin=None,
    )  # fmt: skip


def test_models_are_trained_on_the_device_of_the_laboratory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Job] = []

    def note(job: Job, *_: object) -> dict[str, object]:
        trained.append(job)
        return {"metrics": {}, "validity": {}}

    monkeypatch.setattr(training, "run_alone", note)
    job = _job(tmp_path / "clean")
    record = Laboratory("digits", (tmp_path,), device="cpu")(Training(job))
    assert record["status"] == "ok", record
    assert [each.device for each in trained] == ["cpu"]
    # A clean model has no attack whose paper's settings it could take.
    assert "--paper" not in job.command()


def test_a_model_that_another_process_finishes_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(_job(tmp_path / "clean"), device="cpu")
    lock = fcntl.flock

    def late(file: IO[str], operation: int) -> None:
        # What the other does between opening and locking here: it ends, and takes its lock away.
        (job.out / "card.json").write_text("{}")
        (job.out / ".lock").unlink()
        monkeypatch.setattr(fcntl, "flock", lock)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    monkeypatch.setattr(training, "run", lambda job, progress: {"taken": True})
    assert training.run_alone(job, silent) == {"taken": True}
