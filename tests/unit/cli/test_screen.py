from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unbackdoor import rng
from unbackdoor.detect import SpectralSignatures
from unbackdoor.testing import planted_backdoor
from unbackdoor.types import Detection, as_float, quantise

from .conftest import ARCH, Files, Run

PLANTED = planted_backdoor(target_class=3)
MEAN = ("--set", "n=10", "--set", "sample_weight=0.5", "--set", "overlay_weight=0.5", "--set", "clip=true")
STRIP = ("--detector", "strip", *MEAN, "--false-alarms", "0.02")
"""On the planted network the mean of two images tells more than their sum."""


def asked(files: Files, inputs: Path, *flags: object) -> tuple[object, ...]:
    return ("screen", files.infected, "--arch", ARCH, "--clean", files.clean, "--inputs", inputs, *flags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten triggered and thirty clean images without labels, in two folders."""
    root = tmp_path_factory.mktemp("inputs")
    data = PLANTED.clean_data(80, rng.generator(5))
    others = data.subset(torch.nonzero(data.labels != 3).flatten()[:40])
    triggered = quantise(PLANTED.trigger(as_float(others.images[:10])))
    for name, images in (("bad", triggered), ("good", others.images[10:])):
        (root / name).mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / name / f"{number:02d}.png")
    (root / "good" / ".hidden.png").write_bytes(b"no image")
    return root


def test_triggered_inputs_are_named(run: Run, files: Files, folder: Path) -> None:
    found = run(*asked(files, folder, *STRIP, "--json"))
    assert found.code == 1, found.err
    document = found.json
    assert document["count"] == 40
    assert document["verdict"] == "triggered"
    assert document["target_class"] == 3
    assert document["chance"] < 0.01
    names = [each["name"] for each in document["flagged"]]
    assert sum(name.startswith("bad/") for name in names) >= 9
    assert sum(name.startswith("good/") for name in names) <= 2
    assert {each["found_by"][0] for each in document["flagged"]} == {"strip"}
    assert all(each["p_value"] <= 0.02 for each in document["flagged"])


def test_clean_inputs_pass_and_words_say_so(run: Run, files: Files, folder: Path) -> None:
    clean = run(*asked(files, folder / "good", *STRIP))
    assert clean.code == 0, clean.out
    assert clean.out.startswith("NOTHING FOUND: none of 30 input")
    bad = run(*asked(files, folder / "bad", *STRIP))
    assert bad.code == 1
    assert bad.out.startswith("TRIGGERED: ")
    assert "class 3" in bad.out
    assert "03.png" in bad.out
    one = run(*asked(files, folder / "bad" / "03.png", "--detector", "strip", *MEAN))
    assert "1 of 1 inputs look triggered" in one.out


def test_the_default_leaves_out_what_cannot_read_the_network(run: Run, files: Files, folder: Path) -> None:
    found = run(*asked(files, folder / "bad", "--false-alarms", "0.02"))
    assert found.code == 1
    assert "ibd-psc cannot read this network and was left out" in found.out


def test_a_training_set_speaks_by_the_detectors_rule(run: Run, files: Files, tmp_path: Path) -> None:
    data = PLANTED.clean_data(200, rng.generator(6))
    images, labels = data.images.clone(), data.labels.clone()
    chosen = torch.nonzero(labels != 3).flatten()[:40]
    images[chosen], labels[chosen] = quantise(PLANTED.trigger(as_float(images[chosen]))), 3
    for name, (x, y) in {"poisoned": (images, labels), "clean": (data.images, data.labels)}.items():
        np.savez(tmp_path / f"{name}.npz", images=x.permute(0, 2, 3, 1).numpy(), labels=y.numpy())
    poisoned = run(*asked(files, tmp_path / "poisoned.npz", "--detector", "sc-an", "--json"))
    assert poisoned.code == 1, poisoned.err
    assert poisoned.json["target_class"] == 3
    rows = {int(each["name"].removeprefix("row ")) for each in poisoned.json["flagged"]}
    assert len(rows & set(chosen.tolist())) > 0.8 * max(len(rows), len(chosen))
    clean = run(*asked(files, tmp_path / "clean.npz", "--detector", "sc-an"))
    assert clean.code == 0
    assert clean.out.startswith("NOTHING FOUND: ")


def test_what_only_ranks_names_no_images(run: Run, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Detection(9.0, 7.0, "made up", target_class=3)
    monkeypatch.setattr(SpectralSignatures, "judge", lambda *_, **__: said)
    found = run(*asked(files, files.clean, "--detector", "sc"))
    assert found.code == 1
    assert "The poisoned class is class 3" in found.out
    assert "does not say which are poisoned" in found.out


def test_a_training_set_with_other_classes_is_refused(run: Run, files: Files, tmp_path: Path) -> None:
    (tmp_path / "set" / "colour0").mkdir(parents=True)
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(tmp_path / "set" / "colour0" / "a.png")
    found = run(
        "screen", files.infected, "--arch", ARCH, "--clean", files.folder, "--inputs", tmp_path / "set",
        "--detector", "sc-an",
    )  # fmt: skip
    assert found.code == 2
    assert "are not those of the clean images" in found.err


def test_names_of_files_steer_no_terminal(run: Run, files: Files, folder: Path, tmp_path: Path) -> None:
    evil = "a\x1b[31mNOTHING\nFOUND :smile: [bold].png"
    shutil.copy(folder / "bad" / "03.png", tmp_path / evil)
    found = run(*asked(files, tmp_path, "--detector", "strip", *MEAN))
    assert found.code == 1
    assert "a\ufffd[31mNOTHING\ufffdFOUND :smile: [bold].png" in found.out
    assert "\x1b" not in found.out


OWN = """
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Mean:
    name: ClassVar[str] = "mean_pixel"
    title: ClassVar[str] = "Mean pixel"
    source: ClassVar[str] = "mine"
    needs: ClassVar[str] = "nothing"

    def score(self, model, samples, clean, *, labels=None, generator, progress):
        return samples.float().flatten(1).mean(1)


@dataclass(frozen=True)
class OfModels:
    name: ClassVar[str] = "of_models"
    title: ClassVar[str] = "Of models"
    source: ClassVar[str] = "mine"
    needs: ClassVar[str] = "nothing"

    def score(self, model, clean, *, generator, progress):
        return None
"""


def test_a_detector_of_the_users_own(run: Run, files: Files, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    found = run(*asked(files, folder, "--detector", f"{tmp_path / 'own.py'}:Mean", "--json"))
    assert found.code in (0, 1, 3), found.err
    assert found.json["detectors"] == ["mean-pixel"]
    of_models = run(*asked(files, folder, "--detector", f"{tmp_path / 'own.py'}:OfModels"))
    assert of_models.code == 2
    assert "judges models, not inputs" in of_models.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--inputs", "nowhere"), "nowhere does not exist"),
        (("--detector", "strap"), "did you mean 'strip'?"),
        (("--detector", "nc"), "unknown detector of inputs 'nc'"),
        (("--set", "strip.m=3"), "unknown option"),
        (("--false-alarms", "0.001"), "give more images with --clean-count"),
        (("--inputs-split", "nonsense"), "no sub-folder 'nonsense'"),
        (("--detector", "sc-an"), "is a file of an unknown kind"),
    ],
)
def test_bad_requests_end_in_a_line(
    run: Run, files: Files, folder: Path, arguments: tuple[str, str], message: str
) -> None:
    given = {"--inputs": str(folder), arguments[0]: arguments[1]}
    if arguments[1] == "sc-an":
        given["--inputs"] = str(folder / "good" / "01.png")
    flags = [part for pair in given.items() for part in pair]
    found = run("screen", files.infected, "--arch", ARCH, "--clean", files.clean, *flags)
    assert found.code == 2
    assert message in found.err
    assert found.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in found.err


def test_images_of_another_kind_are_refused(run: Run, files: Files, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(tmp_path / "small.png")
    found = run(*asked(files, tmp_path, *STRIP))
    assert found.code == 2
    assert "(3, 9, 9), the clean ones have (3, 16, 16)" in found.err
    resized = run(*asked(files, tmp_path, *STRIP, "--image-size", "16"))
    assert resized.code in (0, 1, 3), resized.err
