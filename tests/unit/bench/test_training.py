from __future__ import annotations

from pathlib import Path

import pytest

from unbackdoor.bench.training import Job, run
from unbackdoor.errors import InvalidInputError
from unbackdoor.models.checkpoint import read_tensors
from unbackdoor.types import silent


def job(out: Path, epochs: int = 3) -> Job:
    return Job(
        name="none",
        out=out,
        data="digits",
        arch="resnet10",
        width=4,
        epochs=epochs,
        limit=60,
        image_size=8,
        settings=("recipe.batch_size=32",),
        split="train",
        test_split="test",
        normalize="none",
        seed=0,
        device="cpu",
    )


class Killed(Exception):
    """Raised where a kill would come."""


def killed_in_the_end(stage: str, done: int, total: int) -> None:
    if done == total:
        raise Killed


def test_what_was_begun_goes_on_and_its_mark_is_not_written_again(tmp_path: Path) -> None:
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    run(job(undisturbed), silent)
    with pytest.raises(Killed):
        run(job(out), killed_in_the_end)
    mark = (out / "job.json").stat()
    with pytest.raises(Killed):
        run(job(out), killed_in_the_end)
    # A kill in the middle of writing it would make the next start refuse its own folder.
    again = (out / "job.json").stat()
    assert (again.st_ino, again.st_mtime_ns) == (mark.st_ino, mark.st_mtime_ns)
    with pytest.raises(InvalidInputError, match="trained with other options"):
        run(job(out, epochs=4), silent)
    run(job(out), silent)
    wanted, found = (read_tensors(folder / "model.safetensors") for folder in (undisturbed, out))
    assert all(found[name].equal(wanted[name]) for name in wanted)
    assert not list(out.glob("*.tmp"))
