"""Every bad input ends in exit code 2 and one line on stderr, without a traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from unbackdoor.triggers import PatchTrigger, save_trigger
from unbackdoor.triggers.patch import white_square

from .conftest import ARCH, Files, Run


def refused(run: Run, *arguments: object, says: str, lines: int = 1) -> None:
    result = run(*arguments)
    assert result.code == 2, (result.out, result.err)
    assert "Traceback" not in result.err
    assert result.out == ""
    said = [line for line in result.err.splitlines() if not line.startswith(("note:", "warning:"))]
    # Notes are wrapped at the width of the terminal; the error itself is one line.
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == lines, result.err
    assert says in errors[0], errors[0]


def test_an_unknown_architecture_gets_a_suggestion(run: Run, files: Files) -> None:
    refused(
        run, "scan", files.twin, "--arch", "resnet81", "--clean", files.clean, says="did you mean 'resnet18'?"
    )


def test_another_architecture_than_the_files(run: Run, files: Files) -> None:
    refused(run, "scan", files.twin, "--arch", "resnet18", "--clean", files.clean, says="does not fit")


def test_a_wrong_number_of_classes(run: Run, files: Files) -> None:
    refused(run, "scan", files.twin, "--arch", ARCH, "--num-classes", 7, "--clean", files.clean, says="7")


def test_missing_and_foreign_model_files(run: Run, files: Files, tmp_path: Path) -> None:
    common = ("--arch", ARCH, "--clean", files.clean)
    refused(run, "scan", tmp_path / "no.safetensors", *common, says="no.safetensors")
    pickle = tmp_path / "evil.pt"
    pickle.write_bytes(b"\x80\x04cos\nsystem\nX\x04\x00\x00\x00echo\x85R.")
    refused(run, "scan", pickle, *common, says="Refused to load 'evil.pt'")
    refused(run, "scan", pickle, *common, says="docs/how-to/open-a-refused-file.md says more")
    refused(run, "scan", tmp_path, *common, says=str(tmp_path.name))
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    refused(run, "scan", empty, *common, says="empty")


def test_bad_images(run: Run, files: Files, tmp_path: Path) -> None:
    common = ("scan", files.twin, "--arch", ARCH, "--clean")
    refused(run, *common, tmp_path / "absent", says="does not exist")
    (tmp_path / "bare").mkdir()
    refused(run, *common, tmp_path / "bare", says="bare")
    broken = tmp_path / "broken" / "a"
    broken.mkdir(parents=True)
    (broken / "x.png").write_bytes(b"no picture")
    refused(run, *common, tmp_path / "broken", says="x.png")
    (tmp_path / "text.txt").write_text("hello")
    refused(run, *common, tmp_path / "text.txt", says="unknown kind")
    refused(run, *common, files.folder, "--class-names", "a,b", says="class")
    refused(run, *common, files.clean, "--image-size", 0, says="image_size must be")


def test_images_of_more_classes_or_other_channels(run: Run, files: Files) -> None:
    refused(
        run, "scan", files.twin, "--arch", ARCH, "--clean", "digits", says="10 classes, the model's head 8"
    )


def test_images_with_other_channels(run: Run, files: Files, tmp_path: Path) -> None:
    import numpy as np

    grey = tmp_path / "grey.npz"
    np.savez(grey, images=np.zeros((20, 16, 16, 1), np.uint8), labels=np.arange(20) % 8)
    refused(run, "scan", files.twin, "--arch", ARCH, "--clean", grey, says="have 1 channel(s)")


def test_normalisation_options(run: Run, files: Files) -> None:
    common = ("scan", files.twin, "--arch", ARCH, "--clean", files.clean)
    refused(run, *common, "--normalize", "cifar", says="unknown normalisation 'cifar'")
    refused(run, *common, "--mean", "0.5,0.5,0.5", says="--mean and --std belong together")
    refused(run, *common, "--mean", "a,b", "--std", "1,1", says="--mean must be numbers")
    refused(run, *common, "--normalize", "half", "--mean", "0.5", "--std", "0.5", says="not both")
    refused(run, *common, "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0", says="std")
    refused(
        run,
        *common,
        "--mean",
        "0.5,0.5",
        "--std",
        "0.5,0.5",
        says="mean has 2 channels but the network takes 3",
    )


def test_unknown_settings_get_a_suggestion(run: Run, files: Files, tmp_path: Path) -> None:
    common = ("scan", files.twin, "--arch", ARCH, "--clean", files.clean, "--set")
    refused(
        run,
        *common,
        "suppression.buget=3",
        says="did you mean 'suppression.budget'? known are suppression.mu, suppression.",
    )
    refused(
        run,
        *common,
        "nothing=1",
        says="known are suppression, statistic, search, doubt, warps, deciding, alpha",
    )
    refused(run, *common, "supression.budget=3", says="did you mean 'suppression'?")
    refused(run, *common, "suppression.budget", says="must read name=value")
    refused(run, *common, "suppression.budget=few", says="cannot be 'few'")
    refused(run, *common, "suppression.budget=0", says="budget >= 1")
    refused(run, *common, "suppression.checks_per_epoch=0", says="checks_per_epoch must be at least 1")
    refused(run, *common, "suppression.momentum=-1", says="momentum in [0, 1)")
    refused(run, *common, "suppression.mu=nan", says="cannot be 'nan': it is no number")
    refused(run, *common, "search.first.betas=1,2", says="betas must lie in [0, 1)")
    refused(run, *common, "suppression=3", says="has parts")
    refused(run, *common, "alpha.x=3", says="has no parts")
    purify = (
        "purify",
        files.twin,
        "--arch",
        ARCH,
        "--clean",
        files.clean,
        "--out",
        tmp_path / "n.safetensors",
    )
    refused(run, *purify, "--set", "stages=suppress", says="stages must name")
    refused(run, *purify, "--set", "masks.momentum=-1", says="momentum of mask training")
    refused(run, *purify, "--set", "guard.benefit=5", says="benefit lie in [0, 1)")
    refused(run, *purify, "--set", "amount=threshold", says="would remove every filter")
    refused(run, *purify, "--method", "anp", "--set", "momentum=-1", says="momentum must lie in [0, 1)")
    nesterov = ("--set", "recipe.nesterov=true", "--set", "recipe.momentum=0")
    refused(run, *purify, "--method", "ft", *nesterov, says="nesterov needs a momentum above 0")
    refused(run, *purify, "--method", "magic", says="unknown purifier 'magic': known are mnp, ft, fp")
    refused(run, *purify, "--method", "i-bao", says="did you mean 'i-bau'?")
    refused(run, *purify, "--method", "gup", "--set", "learning=1", says="unknown option 'learning'")
    refused(run, *purify, "--method", "bs-ar", "--paper", says="not known; leave --paper out")


def test_devices(run: Run, files: Files) -> None:
    common = ("scan", files.twin, "--arch", ARCH, "--clean", files.clean, "--device")
    refused(run, *common, "gpu", says="unknown device 'gpu'; use cpu, cuda or auto.")
    refused(run, *common, "cuda:99", says="device 'cuda:99' is not available here")


def test_calibration_files(run: Run, files: Files, tmp_path: Path) -> None:
    common = ("scan", files.twin, "--arch", ARCH, "--clean", files.clean, "--calibration")
    refused(run, *common, tmp_path / "absent.json", says="cannot be read as a calibration file")
    (tmp_path / "bad.json").write_text("{}")
    refused(run, *common, tmp_path / "bad.json", says="is no calibration file")
    refused(run, *common, old_calibration(tmp_path / "old.json"), says="make it again with `unbackdoor")


def old_calibration(path: Path) -> Path:
    path.write_text(json.dumps({"version": 1, "description": "d", "options": {}, "scores": {}}))
    return path


def test_a_calibration_of_another_network(run: Run, files: Files, tmp_path: Path) -> None:
    content = json.loads(files.strict.read_text())
    content["kind"]["num_classes"] = 9
    (tmp_path / "other.json").write_text(json.dumps(content))
    common = ("scan", files.twin, "--arch", ARCH, "--clean", files.clean, "--calibration")
    refused(run, *common, tmp_path / "other.json", says="the calibration is of")


def test_scan_pages_that_cannot_be_written(run: Run, files: Files, tmp_path: Path) -> None:
    common = ("scan", files.twin, "--arch", ARCH, "--clean", files.clean)
    for option in ("--report", "--sarif"):
        refused(run, *common, option, tmp_path, says="cannot write")
        refused(run, *common, option, tmp_path / "no" / "x", says="its folder does not exist")


def test_outputs_that_would_destroy_something(run: Run, files: Files, tmp_path: Path) -> None:
    common = ("purify", files.twin, "--arch", ARCH, "--clean", files.clean, "--out")
    before = files.twin.read_bytes()
    refused(run, *common, files.twin, says="is the input model")
    refused(run, *common, files.twin, "--force", says="is the input model")
    link = tmp_path / "link.safetensors"
    link.symlink_to(files.twin)
    refused(run, *common, link, "--force", says="is the input model")
    refused(run, *common, tmp_path / "no" / "x.safetensors", says="folder does not exist")
    refused(run, *common, tmp_path, says="it is a folder itself")
    refused(run, *common, tmp_path / "p.pt", says=f"--out must end in .safetensors, got {tmp_path}/p.pt.")
    (tmp_path / "there.safetensors").write_text("mine")
    refused(run, *common, tmp_path / "there.safetensors", says="add --force")
    assert files.twin.read_bytes() == before
    assert (tmp_path / "there.safetensors").read_text() == "mine"


def test_pages_never_replace_what_was_read(run: Run, files: Files, tmp_path: Path) -> None:
    model = tmp_path / "mine.safetensors"
    shutil.copy(files.twin, model)
    before = model.read_bytes()
    common = (model, "--arch", ARCH)
    clean, out = ("--clean", files.clean), ("--out", tmp_path / "new.safetensors")
    for option in ("--report", "--sarif"):
        refused(run, "scan", *common, *clean, option, model, says="is an input of this command")
    refused(run, "purify", *common, *clean, *out, "--report", model, says="is an input of this command")
    refused(run, "purify", *common, *clean, *out, "--report", tmp_path / "no" / "x", says="does not exist")
    refused(run, "evaluate", *common, "--data", files.clean, "--report", model, says="is an input")
    refused(run, "purify", *common, *clean, *out, "--report", out[1], says="or written by it already")
    page = tmp_path / "page"
    refused(run, "scan", *common, *clean, "--report", page, "--sarif", page, says="written by it already")
    for command, option in (("scan", "--clean"), ("evaluate", "--data")):
        refused(run, command, *common, option, files.clean, "--report", files.clean, says="is an input")
    assert not out[1].exists()
    document = tmp_path / "d.json"
    document.write_text("{}")
    refused(run, "report", document, "--out", document, says="is an input of this command")
    refused(run, "calibrate", *common, *clean, "--out", model, "--force", says="is an input of this command")
    assert (model.read_bytes(), document.read_text()) == (before, "{}")


def test_purify_declines_where_model_and_images_do_not_fit(run: Run, files: Files, tmp_path: Path) -> None:
    out = tmp_path / "n.safetensors"
    refused(
        run, "purify", files.wants_half, "--arch", ARCH, "--clean", files.clean, "--out", out,
        says="nothing was purified: the model is right on only",
    )  # fmt: skip
    assert not out.exists()


def test_evaluate_needs_a_folder_of_an_attack(run: Run, files: Files, tmp_path: Path) -> None:
    common = (
        "evaluate",
        files.twin,
        "--arch",
        ARCH,
        "--data",
        files.folder,
        "--split",
        "train",
        "--infected",
    )
    refused(run, *common, tmp_path, says="cannot be read as a model card")
    (tmp_path / "card.json").write_text("[]")
    refused(run, *common, tmp_path, says="holds no JSON object")
    (tmp_path / "card.json").write_text(json.dumps({"attack": None}))
    refused(run, *common, tmp_path, says="holds a clean model, which has no trigger")
    (tmp_path / "card.json").write_text(json.dumps({"attack": "badnets"}))
    refused(run, *common, tmp_path, says="there is no file")
    save_trigger(PatchTrigger(white_square(2), 0, 0), tmp_path / "trigger.safetensors")
    refused(run, *common, tmp_path, says="the card names no label rule")


def test_attacks_that_cannot_be_done(run: Run, tmp_path: Path) -> None:
    common = ("--data", "digits", "--arch", "resnet10", "--width", 4, "--epochs", 1, "--limit", 40)
    out = ("--out", tmp_path / "m")
    for option in (("--paper",), ("--twin", tmp_path)):
        refused(run, "attack", "none", *common, *out, *option, says="a clean model has no attack")
    refused(
        run, "attack", "magic", *common, *out, says="unknown attack 'magic': known are badnets, trojan, blend"
    )
    refused(run, "attack", "badnets", *common, *out, "--set", "poison_fraction=2", says="must lie in (0, 1]")
    # A refused job does not block its folder.
    refused(run, "attack", "badnets", *common, *out, "--set", "target_class=10", says="is not a class")
    refused(run, "attack", "none", *common, *out, "--device", "toaster", says="unknown device 'toaster'")
    (tmp_path / "file").write_text("mine")
    refused(run, "attack", "badnets", *common, "--out", tmp_path / "file", says="is a file")
    refused(
        run,
        "attack",
        "none",
        *common,
        "--out",
        tmp_path / "p",
        "--normalize",
        "odd",
        says="unknown normalisation",
    )


def test_reports_of_what_is_no_document(run: Run, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "r.html")
    refused(run, "report", tmp_path / "absent.json", *out, says="absent.json")
    (tmp_path / "odd.json").write_text("[1")
    refused(run, "report", tmp_path / "odd.json", *out, says="odd.json")
    assert not (tmp_path / "r.html").exists()


def test_a_factory_that_fails_is_reported_in_a_line(run: Run, files: Files, tmp_path: Path) -> None:
    common = ("scan", files.twin, "--clean", files.clean, "--arch")
    factory = tmp_path / "mine.py"
    factory.write_text("def network():\n    raise KeyError('oops')\n")
    refused(run, *common, f"{factory}:network", says="oops")
    refused(run, *common, f"{factory}:absent", says="absent")
    refused(run, *common, f"{tmp_path}/no.py:network", says="no.py")
    refused(run, *common, "no.such.module:network", says="no.such.module")


@pytest.mark.parametrize(
    "arguments", [["scan"], ["scan", "x", "--clean-count", "1"], ["nonsense"], ["scan", "--bad"]]
)
def test_wrong_usage_exits_with_2(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert "Traceback" not in result.err
    assert "Usage" in result.err


def test_the_real_process_ends_the_same_way(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "unbackdoor", "report", str(tmp_path / "absent.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["words", "json"])
def test_a_reader_that_leaves_early_does_not_change_the_exit_code(
    files: Files, form: tuple[str, ...]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "unbackdoor", "scan", str(files.wants_half), "--arch", ARCH),
            *("--clean", str(files.clean), "--fast", *form),
        ],
        stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_pipe_that_breaks_within_the_work_is_no_verdict(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("unbackdoor.bench.zoo.entries", broken)
    stdout, stderr = sys.stdout, sys.stderr
    code = run("zoo", "list").code
    sys.stdout, sys.stderr = stdout, stderr
    assert code == 2
