"""One small graph, poisoned and clean, for all tests of graphs; skipped where the extra is absent."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest

from unbackdoor import rng
from unbackdoor.graph import SBA, Graph, divide, generate, preset
from unbackdoor.graph.gcn import Training
from unbackdoor.graph.laboratory import Staged

QUICK = Training(epochs=60, hidden=32)


@pytest.fixture(scope="session", autouse=True)
def geometric() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch_geometric", reason="needs the extra graph")


@pytest.fixture(scope="session")
def graph() -> Graph:
    return generate(replace(preset("tiny"), nodes=600, words=120, on_topic=0.5), rng.generator(0))


@pytest.fixture(scope="session")
def staged(graph: Graph) -> Staged:
    division = divide(graph, rng.generator(1), labelled=0.3)
    attack = SBA(target_class=2, poisoned=24, surrogate=QUICK)
    return Staged(division, attack.run(division.training, generator=rng.generator(2)))
