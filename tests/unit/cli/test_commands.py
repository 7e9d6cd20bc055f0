from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from unbackdoor.attacks.registry import ATTACKS
from unbackdoor.bench.artefact import load_plan
from unbackdoor.cli.attack import NAMES
from unbackdoor.detect.calibration import read_calibration, write_calibration
from unbackdoor.errors import InvalidInputError
from unbackdoor.models.checkpoint import read_tensors
from unbackdoor.testing import planted_backdoor
from unbackdoor.triggers import save_trigger

from .conftest import ARCH, SEARCH, Files, Run

QUICK = ("--set", "suppression.budget=5")
WEAK = ("--set", "suppression.learning_rate=1e-6")
SHORT = (
    "--set", "inversion.steps=60", "--set", "inversion.batch_size=8",
    "--set", "perturbation.steps=60", "--set", "perturbation.batch_size=8",
)  # fmt: skip
"""Of a purification."""


def test_scan_finds_the_planted_backdoor(run: Run, files: Files, tmp_path: Path) -> None:
    page, log = tmp_path / "scan.html", tmp_path / "scan.sarif"
    result = run(
        "scan", files.infected, "--arch", ARCH, "--clean", files.clean, "--calibration", files.strict,
        "--json", "--report", page, "--sarif", log, *SEARCH,
    )  # fmt: skip
    assert result.code == 1
    document = result.json
    assert document["verdict"] == "backdoored"
    assert document["target_class"] == 3
    assert document["clean_accuracy"]["value"] == 1.0
    assert document["model"]["user_code"] is True
    deciding = [row for row in document["detectors"] if row["decides"]]
    assert [row["name"] for row in deciding] == ["collapse", "recovery", "trigger_search"]
    assert all(row["p_value"] == 0.05 for row in deciding)
    assert document["confidence"]["models"] == 19
    assert document["trigger"]["target_class"] == 3
    assert document["trigger"]["success"]["value"] >= 0.9
    assert document["trigger"]["mask_png"]
    assert document["filters"]
    assert "Recovered trigger for" in page.read_text()
    assert "Most suspicious filters" in page.read_text()
    assert f"<h1>Backdoored: {files.infected.name}</h1>" in page.read_text()
    assert json.loads(log.read_text())["runs"][0]["results"][0]["level"] == "error"


def test_scan_says_in_words_what_it_found(run: Run, files: Files) -> None:
    result = run(
        "scan", files.infected, "--arch", ARCH, "--clean", files.clean, "--calibration", files.strict,
        "--fast",
    )  # fmt: skip
    assert result.code == 1
    assert result.out.startswith("BACKDOORED, suspected target class 3")
    assert "compared with 19 clean models, from your own models: made for this test" in result.out
    assert "at most 5.0% are called backdoored" in result.out
    assert "class 3 (3)" not in result.out
    assert f"note: ran your own code, {ARCH}" in " ".join(result.err.split())


def test_scan_of_a_model_like_the_calibrated_ones_exits_with_0(run: Run, files: Files) -> None:
    result = run(
        "scan", files.twin, "--arch", ARCH, "--clean", files.clean, "--calibration", files.lax, "--json",
        *SEARCH,
    )  # fmt: skip
    assert (result.code, result.json["verdict"]) == (0, "clean")
    assert result.json["target_class"] is None
    assert result.json["limits"]


def test_a_calibration_on_another_part_of_the_data_is_warned_of(
    run: Run, files: Files, tmp_path: Path
) -> None:
    other = tmp_path / "test.json"
    found = read_calibration(files.lax).model_copy(update={"split": "test"})
    write_calibration(found, other)
    common = ("--arch", ARCH, "--clean", files.clean, "--calibration", other, "--set", "suppression.budget=5")
    result = run("scan", files.twin, *common, "--fast")
    told = " ".join(result.err.split())
    assert told.count("was made with images of the split 'test', this scan takes those of 'train'") == 1
    many = run("scan", files.twin, *common, "--fast", "--out", tmp_path / "scans", "--json")
    assert "give --split test" in many.out


def test_what_a_scan_cannot_see_stands_below_the_advice_that_points_there(run: Run, files: Files) -> None:
    result = run(
        "scan", files.twin, "--arch", ARCH, "--clean", files.clean, "--calibration", files.lax, *SEARCH
    )
    assert result.code == 0
    lines = result.out.splitlines()
    below = lines[
        1 + next(i for i, line in enumerate(lines) if "read below what this scan cannot see" in line) :
    ]
    assert below[0].startswith("- A clean verdict means that this scan found no evidence")
    assert any(line.startswith("- Not looked for: ") for line in below)


def test_a_missing_calibration_is_said_before_the_work_and_in_the_advice(
    run: Run, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object, **__: object) -> None:
        raise InvalidInputError("stop here.")

    result = run("scan", files.infected, "--arch", ARCH, "--clean", files.clean, "--fast")
    assert result.code == 3
    assert result.out.splitlines()[-1] == (
        "Do not rely on this model yet. Score clean models of this kind with `unbackdoor calibrate` and scan "
        "again with `--calibration`."
    )
    warning = "warning: No calibration comes with this package"
    assert result.err.count(warning) == 1
    monkeypatch.setattr("unbackdoor.detect.scan.Scan.measure", measure)
    stopped = run("scan", files.infected, "--arch", ARCH, "--clean", files.clean, "--fast")
    assert stopped.code == 2
    assert warning in stopped.err


def test_a_fast_scan_cannot_say_clean(run: Run, files: Files) -> None:
    result = run(
        "scan", files.twin, "--arch", ARCH, "--clean", files.clean, "--calibration", files.lax, "--fast"
    )
    assert result.code == 3
    assert "trigger inversion was left out" in result.out


def test_a_calibration_that_is_too_small_is_said(run: Run, files: Files) -> None:
    result = run(
        "scan", files.infected, "--arch", ARCH, "--clean", files.clean, "--calibration", files.strict,
        "--alpha", 0.01, "--fast", "--json",
    )  # fmt: skip
    assert (result.code, result.json["verdict"]) == (3, "inconclusive")
    assert "cannot guarantee a false-positive rate of 0.01" in result.json["reason"]
    assert "use at least 99 models" in result.json["confidence"]["guarantee"]


def test_scan_with_few_images_is_inconclusive(run: Run, files: Files) -> None:
    result = run(
        "scan", files.infected, "--arch", ARCH, "--clean", files.few, "--calibration", files.strict, "--json",
        "--fast",
    )  # fmt: skip
    assert (result.code, result.json["verdict"]) == (3, "inconclusive")
    assert "8 of the model's 8 classes have fewer than 5, such as" in result.json["reason"]
    assert any("fewer than 5 images" in warning for warning in result.json["warnings"])


def test_scan_with_too_weak_suppression_is_inconclusive(run: Run, files: Files) -> None:
    result = run(
        "scan", files.infected, "--arch", ARCH, "--clean", files.clean, "--json", "--fast", *QUICK, *WEAK
    )
    assert (result.code, result.json["verdict"]) == (3, "inconclusive")
    assert "suppression took the accuracy only from 1.00" in result.json["reason"]
    assert any("No calibration comes with this package" in w for w in result.json["warnings"])


def test_a_wrong_normalisation_is_named(run: Run, files: Files) -> None:
    common = ("scan", files.wants_half, "--arch", ARCH, "--clean", files.clean, "--json", "--fast")
    wrong = run(*common)
    assert (wrong.code, wrong.json["verdict"]) == (3, "inconclusive")
    # On these images several known normalisations serve equally well; all of them are named.
    assert re.search(r"with --normalize [\w ]+ it would be right on 100.0%", wrong.json["reason"])
    # What is measured with a trigger means nothing then, either.
    measured = ("evaluate", files.wants_half, "--arch", ARCH, "--data", files.clean, "--split", "train")
    doubted = run(*measured)
    assert doubted.code == 0
    assert "warning: The model is right on only 12.5% of 240 clean images: with --normalize" in doubted.err
    assert "warning" not in run(*measured, "--normalize", "half").err
    assert run(*measured, "--normalize", "half").out != doubted.out
    right = run(*common, "--normalize", "half", "--calibration", files.strict)
    assert (right.code, right.json["verdict"]) == (1, "backdoored")


def test_scan_is_repeatable(run: Run, files: Files) -> None:
    arguments = (
        "scan",
        files.infected,
        "--arch",
        ARCH,
        "--clean",
        files.clean,
        "--clean-count",
        64,
        "--json",
        *SEARCH,
    )
    one, other = run(*arguments).json, run(*arguments).json
    for volatile in ("seconds", "created"):
        one.pop(volatile, None), other.pop(volatile, None)
    for document in (one, other):
        for row in document["detectors"]:
            row.pop("seconds")
    assert one == other


def test_purify_writes_a_new_file_and_keeps_the_old_one(run: Run, files: Files, tmp_path: Path) -> None:
    out, page, before = tmp_path / "new.safetensors", tmp_path / "p.html", files.infected.read_bytes()
    images = ("--clean", files.clean, "--clean-count", 200)
    arguments = ("purify", files.infected, "--arch", ARCH, *images, *SHORT)
    result = run(*arguments, "--out", out, "--json", "--report", page)
    assert result.code == 0
    document = result.json
    assert document["filters_removed"] == len(document["removed"]) > 0
    assert document["clean_accuracy_after"]["value"] >= 0.95
    assert files.infected.read_bytes() == before
    old, new = read_tensors(files.infected), read_tensors(out)
    assert set(old) == set(new)
    for removed in document["removed"]:
        weights = new[f"{removed['layer']}.weight"][removed["filter"]]
        assert not bool(weights.any())
    assert page.exists()

    again = run(*arguments, "--out", out)
    assert again.code == 2
    assert "add --force" in again.err
    forced = run(*arguments, "--out", out, "--force")
    assert forced.code == 0
    assert "removed" in forced.out


def test_purify_lowers_the_attack_success(run: Run, files: Files, tmp_path: Path) -> None:
    planted = planted_backdoor(target_class=3)
    save_trigger(planted.trigger, tmp_path / "trigger.safetensors")
    card = {"attack": "planted", "label_rule": planted.label_rule.describe()}
    (tmp_path / "card.json").write_text(json.dumps(card))
    new = tmp_path / "new.safetensors"
    inputs = (files.infected, "--arch", ARCH, "--clean", files.clean, "--clean-count", 200)
    run("purify", *inputs, "--out", new, *SHORT)
    rates = [
        run(
            "evaluate", model, "--arch", ARCH, "--data", files.clean, "--split", "train",
            "--infected", tmp_path, "--json",
        ).json["metrics"]
        for model in (files.infected, new)
    ]  # fmt: skip
    assert rates[0]["attack_success"]["value"] == 1.0
    assert rates[1]["attack_success"]["value"] <= 0.1
    assert rates[1]["clean_accuracy"]["value"] >= 0.95


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (("fst", "--set", "recipe.epochs=1"), "weights changed"),
        (("clp", "--paper", "--set", "u=1"), "filters removed"),
        (
            ("nc", "--set", "inversion.steps=5", "--set", "anomaly_threshold=99"),
            "nothing was changed: no class",
        ),
        (("RNP", "--set", "masks.epochs=1", "--set", "selection.amount=count"), "30 of"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_every_purifier_is_reached_and_says_what_it_changed(
    run: Run, files: Files, tmp_path: Path, method: tuple[str, ...], says: str
) -> None:
    out, report = tmp_path / "new.safetensors", tmp_path / "page.html"
    common = ("--arch", ARCH, "--clean", files.clean, "--out", out, "--clean-count", 100, "--report", report)
    result = run("purify", files.infected, *common, "--method", *method)
    assert result.code == 0, result.err
    assert says in result.out.replace("\n", " ")
    assert says.lower() in report.read_text().lower()
    assert out.exists()
    if says.startswith("nothing was changed"):
        assert result.out.splitlines()[-1] == (
            "The new file has the weights of the old one. Try `--set act_on=smallest` or another `--method`."
        )
    else:
        assert "Scan the new file" in result.out


def test_a_purification_that_removed_nothing_says_what_else_to_try(
    run: Run, files: Files, tmp_path: Path
) -> None:
    result = run(
        "purify", files.twin, "--arch", ARCH, "--clean", files.clean, "--out", tmp_path / "n.safetensors",
        "--method", "clp", "--set", "selection.amount=count", "--set", "selection.count=0",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == (
        "No filter met the conditions: the new file has the weights of the old one. Try another `--method`."
    )


def test_methods_lists_everything_and_shows_one(run: Run) -> None:
    listed: list[dict[str, str]] = json.loads(run("methods", "--json").out)
    assert {row["kind"] for row in listed} >= {"attack", "purifier", "model detector"}
    assert {"i-bau", "ft-sam", "bs-ar", "badnets", "collapse"} <= {row["name"] for row in listed}
    assert "unbackdoor methods NAME" in run("methods").out
    shown = run("methods", "i_bau")
    assert "arXiv 2110.03735" in shown.out
    assert "inner_rate" in shown.out
    described = json.loads(run("methods", "iab", "--json").out)[0]["options"]
    assert {option["path"] for option in described} <= set(run("methods", "iab").out.split())
    assert [row["kind"] for row in json.loads(run("methods", "mnp", "--json").out)] == [
        "purifier",
        "model detector",
    ]
    assert "did you mean 'anp'" in run("methods", "anpp").err


def test_the_options_of_a_scan_are_listed_without_those_that_have_flags(run: Run) -> None:
    (scan,) = json.loads(run("methods", "scan", "--json").out)
    paths = {option["path"] for option in scan["options"]}
    assert {"suppression.budget", "search.first.steps", "deciding", "smallest_per_class"} <= paths
    assert not {"fast", "calibration", "others", "other_options"} & paths
    words = run("methods", "scan").out
    assert words.startswith("scan (scan): ")
    assert "suppression.budget" in words.split()
    assert {"scan"} == {
        row["name"] for row in json.loads(run("methods", "--json").out) if row["kind"] == "scan"
    }


def test_tables_are_not_wrapped_where_there_is_no_terminal(run: Run) -> None:
    row = next(line for line in run("methods").out.splitlines() if line.startswith("adaptive-magnitude "))
    assert "arXiv" in row or "project" in row
    assert len([line for line in run("methods", "mnp").out.splitlines() if "act_on" in line]) == 1
    option = next(line for line in run("methods", "mnp").out.splitlines() if line.startswith("act_on "))
    assert option.rstrip().endswith("if none is flagged.")


def test_evaluate_tries_to_wake_a_backdoor(run: Run, files: Files, tmp_path: Path) -> None:
    attack = ("attack", "badnets", "--data", "digits", "--arch", "resnet10", "--width", 4, "--limit", 60)
    options = ("--epochs", 1, "--normalize", "mnist", "--allow-invalid", "--out", tmp_path / "m")
    assert run(*attack, *options).code == 0
    model = tmp_path / "m" / "model.safetensors"
    page = tmp_path / "page.html"
    common = ("--arch", "resnet10", "--data", "digits", "--count", 60)
    infected = ("--infected", tmp_path / "m")
    result = run("evaluate", model, *common, *infected, "--reactivate", "--json", "--report", page)
    assert result.code == 0, result.err
    assert {"retuned_success", "queried_success"} <= set(result.json["metrics"])
    assert "after retuning" in page.read_text()
    assert "name its folder with --infected" in run("evaluate", model, *common, "--reactivate").err


def test_evaluate_without_a_trigger_measures_accuracy(run: Run, files: Files) -> None:
    result = run(
        "evaluate",
        files.twin,
        "--arch",
        ARCH,
        "--data",
        files.clean,
        "--split",
        "train",
        "--count",
        40,
        "--json",
    )
    assert result.code == 0
    assert set(result.json["metrics"]) == {"clean_accuracy"}
    assert result.json["metrics"]["clean_accuracy"]["n"] == 40


def test_image_folders_serve_as_data(run: Run, files: Files) -> None:
    result = run("evaluate", files.twin, "--arch", ARCH, "--data", files.folder, "--split", "train", "--json")
    assert result.code == 0
    assert result.json["metrics"]["clean_accuracy"] == {
        "value": 1.0, "low": pytest.approx(0.912, abs=1e-3), "high": 1.0, "successes": 40, "n": 40,
    }  # fmt: skip


def test_a_permuted_label_order_is_named_and_mended(run: Run, files: Files, tmp_path: Path) -> None:
    # Reading folders sorts them by name; the model's order is the reverse of these.
    folder = tmp_path / "renamed"
    folder.mkdir()
    for label in range(8):
        (folder / f"{'hgfedcba'[label]}").symlink_to(files.folder / f"colour{label}")
    copied = tmp_path / "copied"
    for place in folder.iterdir():
        target = copied / place.name
        target.mkdir(parents=True)
        for picture in place.iterdir():
            (target / picture.name).write_bytes(picture.read_bytes())
    common = ("scan", files.twin, "--arch", ARCH, "--clean", copied, "--fast", "--json")
    wrong = run(*common)
    assert wrong.code == 3
    assert "the classes were ordered otherwise" in wrong.json["reason"]
    assert "--class-names" in wrong.json["reason"]
    right = run(*common, "--class-names", "h,g,f,e,d,c,b,a")
    assert "ordered otherwise" not in right.json["reason"]
    assert right.json["clean_accuracy"]["value"] == 1.0


def test_report_joins_documents(run: Run, files: Files, tmp_path: Path) -> None:
    common = ("--arch", ARCH, "--json")
    scan = run("scan", files.infected, "--clean", files.clean, "--fast", *common, *QUICK)
    (tmp_path / "scan.json").write_text(scan.out)
    measured = run("evaluate", files.twin, "--data", files.folder, "--split", "train", *common)
    (tmp_path / "evaluate.json").write_text(measured.out)
    out = tmp_path / "all.html"
    result = run(
        "report", tmp_path / "scan.json", tmp_path / "evaluate.json", "--out", out, "--title", "Two <b>things"
    )
    assert result.code == 0
    page = out.read_text()
    assert "Two &lt;b&gt;things" in page


ATTACK = (
    "--data", "digits", "--arch", "resnet10", "--width", 4, "--epochs", 1, "--limit", 60, "--image-size", 8,
    "--set", "recipe.batch_size=32", "--allow-invalid",
)  # fmt: skip


def test_the_attacks_of_the_help_are_those_that_exist() -> None:
    assert [name.replace("-", "_") for name in NAMES] == list(ATTACKS)


def test_attack_trains_measures_and_does_not_repeat_itself(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "infected"
    first = run("attack", "badnets", *ATTACK, "--out", out, "--json", "--set", "poison_fraction=0.2")
    assert first.code == 0, first.err
    card = first.json
    assert card["attack"] == "badnets"
    assert card["poisoned"] == len(load_plan(out).indices) == 12
    assert card["label_rule"] == {"rule": "all_to_one", "target_class": 0}
    assert card["metrics"]["clean_accuracy"]["n"] == 500
    assert card["command"].startswith("unbackdoor attack badnets --data digits")
    assert not (out / "training.safetensors").exists()
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    again = run("attack", "badnets", *ATTACK, "--out", out, "--json", "--set", "poison_fraction=0.2")
    assert again.json == card
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    other = run("attack", "badnets", *ATTACK, "--out", out, "--set", "poison_fraction=0.3")
    assert other.code == 2
    assert "trained with other options" in other.err

    model = out / "model.safetensors"
    measured = run(
        "evaluate",
        model,
        "--arch",
        "resnet10",
        "--data",
        "digits",
        "--image-size",
        8,
        "--infected",
        out,
        "--json",
    )
    assert measured.code == 0, measured.err
    assert measured.json["metrics"] == card["metrics"]


def test_attack_none_trains_a_twin_and_blend_a_blend(run: Run, tmp_path: Path) -> None:
    twin = run("attack", "none", *ATTACK, "--out", tmp_path / "twin", "--json")
    assert twin.code == 0, twin.err
    assert twin.json["attack"] is None
    assert twin.json["num_classes"] == 10
    assert set(twin.json["metrics"]) == {"clean_accuracy"}
    blend = run("attack", "blend", *ATTACK, "--out", tmp_path / "blend", "--set", "rule=all_to_all")
    assert blend.code == 0, blend.err
    assert "attack success" in blend.out
    assert "normalise.mean" in read_tensors(tmp_path / "blend" / "model.safetensors")


def test_an_attack_that_did_not_take_is_said_loudly_and_kept(run: Run, tmp_path: Path) -> None:
    twin = run("attack", "none", *ATTACK, "--out", tmp_path / "twin", "--half")
    assert twin.code == 0, twin.err
    options = [option for option in ATTACK if option != "--allow-invalid"]
    out = tmp_path / "weak"
    failed = run(
        "attack", "blend", *options, "--out", out, "--twin", tmp_path / "twin", "--half",
        "--set", "poison_fraction=0.05", "--set", "alpha=0.1",
    )  # fmt: skip
    assert failed.code == 1
    said = " ".join(failed.err.split())
    assert "not a valid infected model: the attack success rate is" in said
    assert "raise alpha (now 0.1) or poison_fraction (now 0.05) or the epochs (now 1)" in said
    assert "attack success on the clean twin" in failed.out
    assert "visibility of the trigger: PSNR" in failed.out
    printed = " ".join(failed.out.split())
    assert "against the attack's paper: poison_fraction 0.05 (paper 0.1), alpha 0.1 (paper 0.2)" in printed
    assert "against the training recipe of the MNP paper: epochs 1 (paper 200)" in printed
    card = json.loads((out / "card.json").read_text())
    assert card["validity"]["valid"] is False
    assert card["validity"]["natural_floor"]["n"] == card["metrics"]["attack_success"]["n"]
    assert read_tensors(out / "model.safetensors")["normalise.mean"].dtype == torch.float16
    wrong = run(
        "attack", "blend", *options, "--out", tmp_path / "x", "--width", 6, "--twin", tmp_path / "twin"
    )
    assert wrong.code == 2
    assert "does not fit resnet10 of width 6" in " ".join(wrong.err.split())


def test_a_users_file_is_run_and_announced(run: Run, files: Files, tmp_path: Path) -> None:
    factory = tmp_path / "mine.py"
    factory.write_text(
        "from unbackdoor.testing import planted_network\n\ndef network():\n    return planted_network(8)\n"
    )
    result = run(
        "evaluate", files.twin, "--arch", f"{factory}:network", "--data", files.folder, "--split", "train"
    )
    assert result.code == 0, result.err
    said = "".join(result.err.split())
    assert "note:ranyourowncode," in said
    assert "mine.py:network" in said


def test_state_dicts_from_torch_save_are_read(run: Run, files: Files, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"state_dict": read_tensors(files.twin)}, path)
    result = run("evaluate", path, "--arch", ARCH, "--data", files.folder, "--split", "train", "--json")
    assert result.code == 0, result.err


def test_a_twin_given_later_is_measured_without_a_second_training(run: Run, tmp_path: Path) -> None:
    assert run("attack", "none", *ATTACK, "--out", tmp_path / "twin").code == 0
    out = tmp_path / "blend"
    alone = run("attack", "blend", *ATTACK, "--out", out, "--json")
    assert "not checked: the loss of clean accuracy against a clean twin" in " ".join(alone.err.split())
    first = alone.json
    assert first["validity"]["natural_floor"] is None
    assert "--twin" not in first["command"]
    weights = (out / "model.safetensors").read_bytes()
    both = run("attack", "blend", *ATTACK, "--out", out, "--json", "--twin", tmp_path / "twin")
    assert "not checked" not in both.err
    again = both.json
    assert again["validity"]["unchecked"] == []
    assert f"--twin {tmp_path / 'twin'}" in again["command"]
    assert again["validity"]["natural_floor"]["n"] == again["metrics"]["attack_success"]["n"]
    assert again["metrics"] == first["metrics"]
    assert json.loads((out / "card.json").read_text()) == again
    assert (out / "model.safetensors").read_bytes() == weights


def test_an_infected_model_is_no_clean_twin(run: Run, tmp_path: Path) -> None:
    assert run("attack", "blend", *ATTACK, "--out", tmp_path / "blend").code == 0
    refused = run("attack", "badnets", *ATTACK, "--out", tmp_path / "x", "--twin", tmp_path / "blend")
    assert refused.code == 2
    assert "a model infected by blend, which is no clean twin" in refused.err


def test_a_folder_that_cannot_be_made_is_said_in_a_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused = run("attack", "blend", *ATTACK, "--out", tmp_path / "file" / "below")
    assert refused.code == 2
    assert "choose another --out" in refused.err


def test_impossible_seeds_and_sizes_are_usage_errors(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "x"
    for option, value in (("--seed", 2**70), ("--seed", -1), ("--set", "alhpa=1"), ("--set", "alpha=x")):
        refused = run("attack", "blend", *ATTACK, "--out", out, option, value)
        assert refused.code == 2, refused.err
    assert not out.exists()
    refused = run("attack", "blend", *ATTACK, "--out", out, "--image-size", -4)
    assert refused.code == 2
    assert "image_size must be from 1 to 4096 pixels, got -4" in refused.err


def test_a_diverged_training_still_has_a_card_in_json(run: Run, tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    out = tmp_path / "x"
    made = run("attack", "blend", *ATTACK, "--out", out, "--json", "--set", "recipe.learning_rate=1e30")
    assert made.code in (0, 2), made.err
    if made.code == 0:
        json.loads(made.out, parse_constant=refuse)
        json.loads((out / "card.json").read_text(), parse_constant=refuse)


def test_a_twin_that_only_guesses_is_said_and_no_success(run: Run, tmp_path: Path) -> None:
    options = (*ATTACK[:-1], "--set", "recipe.learning_rate=1e-9", "--out", tmp_path / "twin")
    guesses = run("attack", "none", *options)
    assert guesses.code == 1
    assert "of no use as a clean twin: the clean accuracy is" in guesses.err
    assert "no better than guessing among 10 classes" in guesses.err
    assert run("attack", "none", *options, "--allow-invalid").code == 0


def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    run: Run, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("unbackdoor.cli.show.tempfile.NamedTemporaryFile", closed)
    monkeypatch.setattr("unbackdoor.cli.inputs.open_model", None)
    common = (files.infected, "--arch", ARCH, "--clean", files.clean)
    for arguments in (
        ("purify", *common, "--out", tmp_path / "new.safetensors"),
        ("scan", *common, "--sarif", tmp_path / "scan.sarif"),
        ("scan", *common, "--report", tmp_path / "scan.html"),
        ("calibrate", *common, "--out", tmp_path / "c.json"),
    ):
        result = run(*arguments)
        assert result.code == 2
        assert f"cannot write {arguments[-1]}: Permission denied" in " ".join(result.err.split())


def test_a_trigger_for_other_images_is_refused(run: Run, files: Files, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    attack = ("attack", "badnets", "--data", "digits", "--arch", "resnet10", "--width", 4, "--limit", 60)
    assert run(*attack, "--epochs", 1, "--normalize", "mnist", "--allow-invalid", "--out", folder).code == 0
    images = ("--data", files.clean, "--split", "train")
    result = run("evaluate", files.twin, "--arch", ARCH, *images, "--infected", folder)
    assert result.code == 2
    assert f"the trigger of {folder} is for other images: " in " ".join(result.err.split())
    # The folder of an attack stands for the model in it.
    measured = run("evaluate", folder, "--arch", "resnet10", "--data", "digits", "--count", 20, "--json")
    assert (measured.code, measured.json["model"]["path"]) == (0, str(folder / "model.safetensors"))


def test_options_of_a_scan_are_not_given_twice(run: Run, files: Files) -> None:
    common = ("scan", files.infected, "--arch", ARCH, "--clean", files.clean)
    result = run(*common, "--alpha", 0.01, "--set", "alpha=0.2")
    assert (result.code, "give --alpha, not --set alpha=" in result.err) == (2, True)
    # As `attack` has it.
    assert (
        run(
            "evaluate",
            files.twin,
            "--arch",
            ARCH,
            "--data",
            files.clean,
            "--split",
            "train",
            "--normalize",
            "none",
        ).code
        == 0
    )


def test_what_is_known_before_a_scan_is_said_before(
    run: Run, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise InvalidInputError("the scan began.")

    monkeypatch.setattr("unbackdoor.cli.scanning.scan_document", fails)
    result = run("scan", files.infected, "--arch", ARCH, "--clean", files.clean, "--clean-count", 900)
    said = " ".join(result.err.split())
    assert "warning: Only 240 clean images exist where 900 were asked for." in said.split("the scan began")[0]
