from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
OPTIONS = (
    "--data", "digits", "--arch", "resnet10", "--width", 4, "--epochs", 1, "--limit", 60,
    "--set", "recipe.batch_size=32", "--half", "--allow-invalid",
)  # fmt: skip


@pytest.fixture
def root(run: Run, tmp_path: Path) -> Path:
    root = tmp_path / "zoo"
    assert run("attack", "none", *OPTIONS, "--out", root / "clean").code == 0
    made = run(
        "attack",
        "blend",
        *OPTIONS,
        "--out",
        root / "blend",
        "--twin",
        root / "clean",
        "--set",
        "target_class=3",
    )
    assert made.code == 0, made.err
    return root


def test_list_show_and_verify_agree_with_the_cards(run: Run, root: Path) -> None:
    listed = run("zoo", "list", "--zoo", root)
    assert listed.code == 0, listed.err
    lines = [line.split() for line in listed.out.splitlines()]
    assert lines[0][:4] == ["model", "attack", "poisoned", "target"]
    assert lines[1][:4] == ["blend", "blend", "6", "3"]
    assert lines[2][:4] == ["clean", "-", "-", "-"]
    assert [entry["name"] for entry in run("zoo", "list", "--zoo", root, "--json").json] == ["blend", "clean"]

    shown = run("zoo", "show", "blend", "--zoo", root)
    assert shown.code == 0, shown.err
    said = " ".join(shown.out.split())
    assert "attack success on the clean twin" in said
    assert "unbackdoor attack blend --data DATA --out runs/blend" in said
    assert f"--twin {root / 'clean'}" in said
    assert "triggers.png" in said
    assert "not checked" not in shown.err
    assert run("zoo", "show", "clean", "--zoo", root, "--json").json["attack"] is None

    verified = run("zoo", "verify", "--data", "digits", "--zoo", root)
    assert verified.code == 0, verified.err
    assert verified.out.splitlines() == ["blend: as claimed", "clean: as claimed"]


def test_show_warns_of_what_was_not_checked(run: Run, root: Path) -> None:
    card = json.loads((root / "blend" / "card.json").read_text())
    card["validity"]["unchecked"] = ["the attack success on a clean twin"]
    (root / "blend" / "card.json").write_text(json.dumps(card))
    shown = run("zoo", "show", "blend", "--zoo", root)
    assert "not checked: the attack success on a clean twin; give a clean model" in shown.err


def test_verify_finds_a_lie_and_a_swapped_file(run: Run, root: Path) -> None:
    card = json.loads((root / "clean" / "card.json").read_text())
    card["metrics"]["clean_accuracy"]["value"] = 0.99
    (root / "clean" / "card.json").write_text(json.dumps(card))
    (root / "blend" / "trigger.safetensors").write_bytes(b"swapped")
    verified = run("zoo", "verify", "--data", "digits", "--zoo", root)
    assert verified.code == 1
    assert "the card claims 0.9900" in verified.out
    assert "trigger.safetensors is not the file that the card was written for" in verified.out
    assert "2 models are not what their cards claim" in " ".join(verified.err.split())
    alone = run("zoo", "verify", "clean", "--data", "digits", "--zoo", root)
    assert alone.code == 1
    assert "1 model is not what its card claims." in alone.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("list",), "does not exist"),
        (("show", "x"), "does not exist"),
        (("verify", "--data", "digits"), "does not exist"),
    ],
)
def test_a_missing_zoo_is_said_in_a_line(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    result = run("zoo", *arguments, "--zoo", tmp_path / "absent")
    assert result.code == 2
    assert sentence in " ".join(result.err.split())


def test_names_in_the_list_are_whole_and_no_markup(run: Run, root: Path) -> None:
    name = "adaptive-magnitude-with-a-name-that-is-longer-than-the-width-of-a-terminal-[red]"
    (root / "blend").rename(root / name)
    assert name in run("zoo", "list", "--zoo", root).out


def test_names_for_people_have_hyphens(run: Run, root: Path) -> None:
    card = json.loads((root / "blend" / "card.json").read_text())
    card["attack"] = "adap_blend"
    (root / "blend" / "card.json").write_text(json.dumps(card))
    assert run("zoo", "list", "--zoo", root).out.splitlines()[1].split()[1] == "adap-blend"
    assert run("zoo", "show", "blend", "--zoo", root).out.startswith("blend: adap-blend")
