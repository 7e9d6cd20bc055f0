from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.graph import Plain, Pruning, evaluate
from unbackdoor.graph.attacks.triggers import GeneratedTrigger
from unbackdoor.graph.files import (
    load_division,
    load_graph,
    load_network,
    load_trigger,
    save_division,
    save_graph,
    save_network,
    save_trigger,
)
from unbackdoor.graph.laboratory import Staged

from .conftest import QUICK


def test_graphs_come_back_as_they_were(staged: Staged, tmp_path: Path) -> None:
    save_graph(staged.graph, tmp_path / "graph.safetensors")
    graph = load_graph(tmp_path / "graph.safetensors")
    assert torch.equal(graph.features, staged.graph.features)
    assert torch.equal(graph.edges, staged.graph.edges)
    assert torch.equal(graph.labels, staged.graph.labels)
    assert graph.num_classes == staged.graph.num_classes


def test_everything_that_was_saved_measures_the_same(staged: Staged, tmp_path: Path) -> None:
    assert staged.poisoned is not None
    defended = Pruning(training=QUICK).purify(staged.graph, generator=rng.generator(0))
    expected = evaluate(defended, staged.division, staged.poisoned.trigger, 2)
    save_division(staged.division, tmp_path / "laboratory.safetensors")
    save_trigger(staged.poisoned.trigger, tmp_path / "trigger.safetensors")
    save_network(defended, tmp_path / "model.safetensors")
    division = load_division(tmp_path / "laboratory.safetensors")
    network = load_network(tmp_path / "model.safetensors")
    assert evaluate(network, division, load_trigger(tmp_path / "trigger.safetensors"), 2) == expected
    assert torch.equal(division.training.labels, staged.division.training.labels)
    assert torch.equal(division.training.edges, staged.division.training.edges)


def test_a_network_without_pruning_sees_every_edge(staged: Staged, tmp_path: Path) -> None:
    save_network(Plain(QUICK).purify(staged.graph, generator=rng.generator(0)), tmp_path / "m.safetensors")
    assert load_network(tmp_path / "m.safetensors").seen(staged.graph) is staged.graph


def test_generated_triggers_come_back_as_they_were(tmp_path: Path) -> None:
    with rng.isolated(rng.generator(0)):
        trigger = GeneratedTrigger(7, 4, hidden=5)
    save_trigger(trigger, tmp_path / "trigger.safetensors")
    features = torch.randn(3, 7, generator=rng.generator(1))
    one, other = (
        trigger.subgraphs(features),
        load_trigger(tmp_path / "trigger.safetensors").subgraphs(features),
    )
    assert torch.equal(one.features, other.features)
    assert torch.equal(one.joined, other.joined)


def test_a_graph_is_no_division(staged: Staged, tmp_path: Path) -> None:
    save_graph(staged.graph, tmp_path / "graph.safetensors")
    with pytest.raises(InvalidInputError, match="told"):
        load_division(tmp_path / "graph.safetensors")
