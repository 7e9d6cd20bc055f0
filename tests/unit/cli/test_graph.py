from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from .conftest import Run

DATA = "tiny:2"
ATTACK = ("--set", "surrogate.epochs=40", "--set", "poisoned=40", "--set", "target_class=1")
QUICK = ("--set", "training.epochs=60")


@pytest.fixture(autouse=True)
def geometric() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch_geometric", reason="needs the extra graph")


def test_a_graph_is_attacked_scanned_purified_measured_and_reported(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "infected"
    result = run("graph", "attack", "sba", "--data", DATA, "--out", out, *ATTACK, "--json")
    assert result.code == 0, result.err
    assert result.json["attack"] == "sba"
    assert result.json["metrics"]["attack_success"]["value"] > 0.5
    assert set(result.json["files"]) == {
        f"{n}.safetensors" for n in ("graph", "laboratory", "model", "trigger")
    }

    page = tmp_path / "scan.html"
    result = run("graph", "scan", out / "graph.safetensors", *QUICK, "--json", "--report", page)
    assert (result.code, result.json["verdict"], result.json["target_class"]) == (1, "backdoored", 1)
    assert "Labelled nodes" in page.read_text()
    flagged = set(result.json["detectors"][0]["evidence"]["flagged_nodes"])
    card = json.loads((out / "card.json").read_text())
    assert len(flagged & set(card["poisoned_nodes"])) > 0.8 * len(flagged)

    new = tmp_path / "purified.safetensors"
    result = run("graph", "purify", out / "graph.safetensors", "--out", new, *QUICK, "--json")
    assert result.code == 0, result.err
    (tmp_path / "1.json").write_text(result.out)
    assert result.json["filters_total"] == 0
    assert "target class" in result.json["outcome"]
    assert result.json["clean_accuracy_after"]["n"] > 20

    rates = []
    for position, network in ((0, out / "model.safetensors"), (2, new)):
        result = run("graph", "evaluate", network, "--infected", out, "--json")
        assert result.code == 0, result.err
        (tmp_path / f"{position}.json").write_text(result.out)
        rates.append(result.json["metrics"]["attack_success"]["value"])
    assert rates[1] < 0.5 * rates[0]
    assert rates[0] == card["metrics"]["attack_success"]["value"]
    documents = [tmp_path / f"{position}.json" for position in range(3)]
    assert run("report", *documents, "--out", tmp_path / "report.html").code == 0
    text = (tmp_path / "report.html").read_text()
    assert "Nodes" in text
    assert "Removed filters" not in text


def test_a_clean_twin_is_scanned_clean_and_said_so_in_words(run: Run, tmp_path: Path) -> None:
    result = run("graph", "attack", "none", "--data", DATA, "--out", tmp_path / "clean")
    assert result.code == 0, result.err
    assert "clean accuracy" in result.out
    result = run("graph", "scan", tmp_path / "clean" / "graph.safetensors", *QUICK)
    assert result.code == 0
    assert "no evidence of a backdoor" in result.out
    assert "nodes" in result.out
    assert result.out.splitlines()[-1].startswith("- The verdict tests whether labels")
    new = tmp_path / "network.safetensors"
    result = run("graph", "purify", tmp_path / "clean" / "graph.safetensors", "--out", new, *QUICK)
    assert "no poisoned nodes found" in result.out
    result = run("graph", "evaluate", new, "--infected", tmp_path / "clean")
    assert "attack success" not in result.out


def test_mistakes_are_said_in_a_line(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments, words in (
        (("attack", "sbb", "--out", out), "did you mean 'sba'"),
        (("attack", "none", "--out", out, "--set", "size=3"), "no options"),
        (("attack", "sba", "--out", out, "--set", "sizes=3"), "did you mean 'size'"),
        (("attack", "sba", "--out", out, "--data", "nowhere"), "there is no graph"),
        (("scan", tmp_path / "absent"), "there is no graph"),
        (("purify", "tiny", "--out", tmp_path / "no" / "x", *QUICK), "cannot write"),
        (("purify", "tiny", "--out", tmp_path / "x.safetensors", "--method", "rigdb"), "did you mean"),
        (
            ("purify", "tiny", "--out", tmp_path / "p.pt"),
            f"--out must end in .safetensors, got {tmp_path}/p.pt.",
        ),
        (("evaluate", tmp_path / "absent", "--infected", out), "absent"),
    ):
        result = run("graph", *arguments)
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert words in result.err
    run("graph", "attack", "none", "--data", "tiny", "--out", out)
    result = run("graph", "attack", "none", "--data", "tiny", "--out", out)
    assert (result.code, "holds graph.safetensors already" in result.err) == (2, True)


def test_an_attack_can_start_from_its_papers_settings(run: Run, tmp_path: Path) -> None:
    quick = ("--data", "tiny", "--paper", "--set", "surrogate.epochs=5", "--set", "poisoned=8", "--json")
    made = run("graph", "attack", "ugba", *quick, "--set", "steps=2", "--out", tmp_path / "ugba")
    assert made.code == 0, made.err
    assert made.json["options"]["similarity_weight"] == 100.0
    refused = run("graph", "attack", "sba", *quick, "--out", tmp_path / "sba")
    assert refused.code == 2
    assert "the paper behind sba are not known" in " ".join(refused.err.split())
    # The papers' many steps, cut short again: what else they have stays.
    short = ("--paper", "--json", "--set", "training.epochs=5")
    scanned = run("graph", "scan", "tiny", *short)
    assert scanned.json["settings"]["scan"]["training"]["epochs"] == 5, scanned.err
    detection = ("--set", "detection.runs=1")
    purified = run("graph", "purify", "tiny", "--out", tmp_path / "n.safetensors", *short, *detection)
    assert purified.json["options"]["detection"]["training"]["epochs"] == 1000, purified.err
    no_paper = run(
        "graph", "purify", "tiny", "--out", tmp_path / "p.safetensors", "--method", "prune", *short
    )
    assert "the paper behind prune are not known" in " ".join(no_paper.err.split())
    refused = run("graph", "attack", "none", "--paper", "--out", tmp_path / "none")
    assert "a clean twin has no options, got --paper" in " ".join(refused.err.split())
