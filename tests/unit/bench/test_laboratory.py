from __future__ import annotations

from pathlib import Path

import pytest

from unbackdoor.bench import training
from unbackdoor.bench.laboratory import Laboratory, Training
from unbackdoor.bench.training import Job


def test_models_are_trained_on_the_device_of_the_laboratory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Job] = []

    def note(job: Job, *_: object) -> dict[str, object]:
        trained.append(job)
        return {"metrics": {}, "validity": {}}

    monkeypatch.setattr(training, "run_alone", note)
    job = Job(
        name="none", data="digits", out=tmp_path / "clean", arch="resnet10", width=4, epochs=1, settings=(),
        split="train", test_split="test", limit=None, image_size=None, normalize="mnist", seed=0,
        device="auto", paper=True, half=True, twin=None,
    )  # fmt: skip
    record = Laboratory("digits", (tmp_path,), device="cpu")(Training(job))
    assert record["status"] == "ok", record
    assert [each.device for each in trained] == ["cpu"]
    # A clean model has no attack whose paper's settings it could take.
    assert "--paper" not in job.command()
