from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from unbackdoor import rng
from unbackdoor.cli import surrogates
from unbackdoor.cli.calibrating import highest
from unbackdoor.data import load_images
from unbackdoor.data.checks import clean_draw
from unbackdoor.detect.calibration import CalibrationSet, read_calibration
from unbackdoor.models.checkpoint import write_tensors
from unbackdoor.testing import planted_backdoor

from .conftest import ARCH, Files, Result, Run

QUICK = (
    "--set", "suppression.budget=60", "--set", "search.first.steps=10", "--set", "search.first.batch_size=4",
    "--set", "search.second.steps=10", "--set", "search.refined=1", "--clean-count", 80,
)  # fmt: skip


@pytest.fixture
def honest(tmp_path: Path) -> Path:
    folder = tmp_path / "honest"
    for seed in range(2):
        place = folder / f"model{seed}"
        place.mkdir(parents=True)
        model = planted_backdoor(infected=False, seed=seed).model
        write_tensors(model.state_dict(), place / "model.safetensors")
        write_tensors({"unrelated": model.state_dict()["head.bias"]}, place / "plan.safetensors")
    return folder


def calibrate(run: Run, files: Files, *arguments: object) -> Result:
    return run("calibrate", *arguments, "--arch", ARCH, "--clean", files.clean, *QUICK)


def test_own_models_are_scored_once_and_used_by_a_scan(
    run: Run, files: Files, honest: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c.json"
    first = calibrate(run, files, honest / "model0", "--out", out, "--detector", "rnp-label")
    assert first.code == 0, first.err
    assert "1 / 2 = 50.0%" in first.out
    assert {"trigger-search", "head-weights"} <= {line.split()[0] for line in first.out.splitlines()}
    found = read_calibration(out)
    assert (found.origin, found.images, found.split, len(found.models)) == ("models", 80, "train", 1)
    assert set(found.options) == {
        "collapse", "recovery", "mnp", "trigger_search", "head_weights", "rnp_label",
    }  # fmt: skip
    assert set(found.models[0].scores) == set(found.options)
    assert found.kind.num_classes == 8
    assert found.models[0].clean_accuracy == 1.0

    # A started file goes on: what is there stays, to the bit, and a new model is added.
    again = calibrate(run, files, honest, "--out", out, "--detector", "rnp-label", "--json")
    assert again.code == 0, again.err
    grown = CalibrationSet.model_validate_json(again.out)
    assert grown.models[:1] == found.models
    assert len(grown.models) == 2

    scan = run(
        "scan", files.infected, "--arch", ARCH, "--clean", files.clean, "--calibration", out, "--json",
        "--alpha", 0.35, "--fast", *QUICK,
    )  # fmt: skip
    assert (scan.json["confidence"]["models"], scan.json["confidence"]["origin"]) == (2, "models")

    # What was calibrated can be asked for, and is shown with its p-value beside what decides.
    more = run(
        "scan", files.infected, "--arch", ARCH, "--clean", files.clean, "--calibration", out, "--json",
        "--alpha", 0.35, "--fast", "--detector", "rnp-label", *QUICK,
    )  # fmt: skip
    row = next(row for row in more.json["detectors"] if row["name"] == "rnp_label")
    assert (row["decides"], row["p_value"] is not None) == (False, True)
    assert row["summary"].startswith("Class shares of the unlearnt model: score ")
    # The others are what they were without it.
    for one, before in zip(more.json["detectors"], scan.json["detectors"], strict=False):
        assert (one["score"], one["p_value"]) == (before["score"], before["p_value"])

    # With other options it is another detector: the calibration says nothing of it.
    changed = run(
        "scan", files.infected, "--arch", ARCH, "--clean", files.clean, "--calibration", out, "--json",
        "--alpha", 0.35, "--fast", "--detector", "rnp-label", *QUICK,
        "--set", "others.rnp-label.unlearning.budget=3",
    )  # fmt: skip
    assert changed.code == more.code, changed.err
    row = next(row for row in changed.json["detectors"] if row["name"] == "rnp_label")
    assert row["p_value"] is None
    assert changed.json["settings"]["scan"]["other_options"] == ["rnp-label.unlearning.budget=3"]
    stray = run("scan", files.infected, "--arch", ARCH, "--clean", files.clean, "--set", "others.nc.alpha=1")
    assert (stray.code, "is for a detector that does not run" in stray.err) == (2, True)

    other = calibrate(run, files, honest, "--out", out)
    assert other.code == 2
    assert "made with other options, models or images; choose another --out, or add --force" in other.err
    # Beginning anew must not cost the old file before there is something to replace it.
    failed = run("calibrate", honest, "--arch", ARCH, "--clean", tmp_path / "no", "--out", out, "--force")
    assert (failed.code, len(read_calibration(out).models)) == (2, 2)
    anew = calibrate(run, files, honest / "model1", "--out", out, "--force")
    assert (anew.code, len(read_calibration(out).models)) == (0, 1)


def test_models_that_do_not_fit_the_images_are_left_out(
    run: Run, files: Files, honest: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no model")
    out = ("--out", tmp_path / "c.json")
    result = calibrate(run, files, broken, honest / "model1", files.wants_half, *out)
    assert result.code == 0
    assert f"left out: {broken}: " in " ".join(result.err.split())
    assert f"left out: {files.wants_half}: the model is right on only" in " ".join(result.err.split())
    assert len(read_calibration(tmp_path / "c.json").models) == 1
    none = calibrate(run, files, files.wants_half, "--out", tmp_path / "d.json")
    assert none.code == 2
    assert "no model can be used for a calibration: the model is right on only" in none.err


def test_infected_models_and_empty_folders_are_refused(
    run: Run, files: Files, honest: Path, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "c.json")
    (honest / "model1" / "card.json").write_text(json.dumps({"attack": "badnets"}))
    result = calibrate(run, files, honest, *out)
    assert result.code == 2
    assert "is infected by badnets, as its card says" in result.err
    (tmp_path / "empty").mkdir()
    assert "holds no model files" in calibrate(run, files, tmp_path / "empty", *out).err
    assert "give either clean models, or a number of --surrogates" in calibrate(run, files, *out).err
    both = calibrate(run, files, honest, "--surrogates", 3, *out)
    assert "give either clean models" in both.err
    assert not (tmp_path / "c.json").exists()


def test_a_file_goes_on_with_the_same_images_alone(
    run: Run, files: Files, honest: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c.json"
    assert calibrate(run, files, honest / "model0", "--out", out).code == 0
    before = out.read_bytes()
    for change in (("--seed", 1), ("--mean", "0,0,0", "--std", "1,1,1")):
        other = calibrate(run, files, honest, "--out", out, *change)
        assert other.code == 2, change
        assert "holds a calibration made with other options, models or images" in other.err
    fewer = run("calibrate", honest, "--arch", ARCH, "--clean", files.few, *QUICK, "--out", out)
    assert fewer.code == 2
    assert out.read_bytes() == before


def test_of_several_draws_the_highest_scores_count(
    run: Run, files: Files, honest: Path, tmp_path: Path
) -> None:
    single = []
    for seed in (4, 5):
        out = tmp_path / f"{seed}.json"
        assert calibrate(run, files, honest / "model0", "--out", out, "--seed", seed).code == 0
        single.append(read_calibration(out).models[0].scores)
    assert single[0] != single[1]
    out = tmp_path / "c.json"
    assert calibrate(run, files, honest, "--out", out, "--seed", 4, "--draws", 2).code == 0
    found = read_calibration(out)
    assert found.draws == 2
    assert len(found.models) == 2
    for name, score in found.models[0].scores.items():
        seen = [value for scores in single if (value := scores[name]) is not None]
        assert score == max(seen, default=None)
    assert found.words().startswith("2 clean models by their highest of 2 scores, from your own models: ")
    # With another number of draws the scores mean something else.
    other = calibrate(run, files, honest, "--out", out, "--seed", 4)
    assert "holds a calibration made with other options, models or images" in other.err


def test_draws_that_cannot_differ_are_refused(run: Run, files: Files, honest: Path, tmp_path: Path) -> None:
    alike = run(
        "calibrate", honest, "--arch", ARCH, "--clean", files.clean, "--draws", 2, "--clean-count", 100_000,
        "--out", tmp_path / "c.json",
    )  # fmt: skip
    assert alike.code == 2
    assert "2 draws of 100000 images would all be the same" in alike.err


def test_several_side_by_side_make_the_same_file(
    run: Run, files: Files, honest: Path, tmp_path: Path
) -> None:
    broken = honest / "model0" / "broken.safetensors"
    broken.write_bytes(b"no model")
    models = (broken, honest / "model0" / "model.safetensors", honest / "model1" / "model.safetensors")
    for jobs in (1, 2):
        result = calibrate(run, files, *models, "--out", tmp_path / f"{jobs}.json", "--jobs", jobs)
        assert result.code == 0, result.err
        assert result.err.count("left out: ") == 1
    assert (tmp_path / "1.json").read_text() == (tmp_path / "2.json").read_text()
    odd = calibrate(run, files, files.wants_half, "--out", tmp_path / "d.json", "--jobs", 2)
    assert odd.code == 2
    assert "no model can be used for a calibration: the model is right on only" in odd.err


def test_a_detector_that_abstains_on_all_draws_has_no_score() -> None:
    draws = [{"a": None, "b": 0.1, "c": None}, {"a": -0.2, "b": 0.3, "c": None}]
    assert highest(draws) == {"a": -0.2, "b": 0.3, "c": None}


def test_surrogates_leave_out_what_a_scan_with_their_seed_draws() -> None:
    everything = load_images("digits", split="train")
    training, scanned, apart = surrogates.surrogate_images(everything, 200, seed=3)
    drawn = clean_draw(everything, 200, rng.spawn(rng.generator(3))).data
    assert apart
    assert torch.equal(scanned.images, drawn.images)
    assert len(training) == len(everything) - 200


def test_surrogates_are_trained_once_and_go_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c.json"
    common = (
        "calibrate", "--arch", "resnet10", "--width", 4, "--clean", "digits", "--image-size", 8,
        "--surrogates", 1, "--epochs", 3, "--out", out, "--clean-count", 100, "--set", "suppression.budget=5",
        "--set", "search.first.steps=2", "--set", "search.second.steps=2",
    )  # fmt: skip
    first = run(*common)
    assert first.code == 0, first.err
    found = read_calibration(out)
    assert (found.origin, len(found.models)) == ("surrogates", 1)
    assert found.description == "trained on 1197 images of digits for 3 epochs each"
    assert (tmp_path / "c-surrogates" / "surrogate-00" / "card.json").exists()
    assert not list((tmp_path / "c-surrogates").rglob("training*"))

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(surrogates, "train", never)
    out.unlink()
    assert run(*common).code == 0
    assert [model.sha256 for model in read_calibration(out).models] == [m.sha256 for m in found.models]
    for change in (("--epochs", 4), ("--stem", "7x7")):
        other = run(*common, *change, "--force")
        assert other.code == 2
        assert "holds a surrogate that was trained with other options" in other.err


def test_surrogates_trained_side_by_side_make_the_same_file(run: Run, tmp_path: Path) -> None:
    for jobs in (1, 2):
        result = run(
            "calibrate", "--arch", "resnet10", "--width", 4, "--clean", "digits", "--image-size", 8,
            "--surrogates", 2, "--epochs", 3, "--out", tmp_path / f"{jobs}.json", "--clean-count", 100,
            "--set", "suppression.budget=5", "--set", "search.first.steps=2",
            "--set", "search.second.steps=2", "--jobs", jobs,
        )  # fmt: skip
        assert result.code == 0, result.err
    assert (tmp_path / "1.json").read_text() == (tmp_path / "2.json").read_text()
    assert len(read_calibration(tmp_path / "2.json").models) == 2
