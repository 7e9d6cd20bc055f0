from __future__ import annotations

import pytest
import torch

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.graph import RIGBD, EdgeDropping, Plain, Pruning, RobustTraining, evaluate, judge
from unbackdoor.graph.detect import NodeScan
from unbackdoor.graph.edges import similarities
from unbackdoor.graph.evaluate import auroc, clean_accuracy
from unbackdoor.graph.laboratory import Staged
from unbackdoor.graph.purify import GraphPurifier

from .conftest import QUICK

METHODS: dict[str, GraphPurifier] = {
    "plain": Plain(QUICK),
    "drop_edge": EdgeDropping(training=QUICK),
    "prune": Pruning(training=QUICK),
    "rigbd": RobustTraining(RIGBD(training=QUICK), training=QUICK),
}


def test_robust_training_kills_the_trigger_and_plain_training_learns_it(staged: Staged) -> None:
    assert staged.poisoned is not None
    rates = {}
    for name in ("plain", "rigbd"):
        defended = METHODS[name].purify(staged.graph, generator=rng.generator(1))
        rates[name] = evaluate(defended, staged.division, staged.poisoned.trigger, 2)
    assert rates["plain"].attack_success.value > 0.7
    assert rates["rigbd"].attack_success.value < 0.2
    assert rates["rigbd"].clean_accuracy.value > rates["plain"].clean_accuracy.value - 0.1
    victims = staged.division.victims
    eligible = int((staged.division.whole.labels[victims] != 2).sum())
    assert rates["plain"].attack_success.n == eligible
    assert rates["plain"].clean_accuracy.n == len(staged.division.test)


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_repeatable_and_leave_the_graph_alone(staged: Staged, name: str) -> None:
    graph = staged.graph
    edges, labels, state = graph.edges.clone(), graph.labels.clone(), torch.get_rng_state()
    one = METHODS[name].purify(graph, generator=rng.generator(3))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(edges, graph.edges)
    assert torch.equal(labels, graph.labels)
    other = METHODS[name].purify(graph, generator=rng.generator(3))
    assert torch.equal(one.network.embed.weight, other.network.embed.weight)
    assert clean_accuracy(one, staged.division).value > 0.6


def test_pruning_cuts_the_share_that_is_least_alike_and_goes_on_doing_so(staged: Staged) -> None:
    defended = Pruning(0.3, QUICK).purify(staged.graph, generator=rng.generator(0))
    seen = defended.seen(staged.graph)
    left = seen.edges.shape[1] / staged.graph.edges.shape[1]
    assert left <= 0.7
    assert float(similarities(seen).min()) > defended.least_similarity
    assert defended.diagnostics["edges_cut"] == staged.graph.edges.shape[1] - seen.edges.shape[1]


def test_without_a_finding_robust_training_is_plain_training(staged: Staged) -> None:
    clean = staged.division.training
    defended = METHODS["rigbd"].purify(clean, generator=rng.generator(0))
    assert defended.scan is not None
    assert defended.diagnostics["target_class"] is None
    generator = rng.generator(0)
    rng.spawn(generator)
    plain = Plain(QUICK).purify(clean, generator=generator)
    assert torch.equal(defended.network.embed.weight, plain.network.embed.weight)


def test_found_nodes_are_counted_against_the_truth(staged: Staged) -> None:
    assert staged.poisoned is not None
    nodes, size = staged.poisoned.nodes, len(staged.graph)
    clean = staged.division.training.labelled[:2]
    scores = torch.full((size,), torch.nan)
    scores[staged.graph.labelled] = 0.0
    scores[nodes[:12]] = 1.0
    found = NodeScan(scores, torch.cat([nodes[:6], clean]), 2, 0.001, True)
    judged = judge(found, staged.poisoned)
    assert (judged.recall.successes, judged.recall.n) == (6, 24)
    assert (judged.precision.successes, judged.precision.n) == (6, 8)
    assert judged.auroc == pytest.approx(0.75)
    assert judged.target_found is True


def test_auroc_counts_ties_half() -> None:
    assert auroc(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0])) == pytest.approx(0.875)


@pytest.mark.parametrize(
    "make",
    [lambda: EdgeDropping(rate=0.0), lambda: Pruning(fraction=1.0), lambda: RobustTraining(weight=-1.0)],
)
def test_impossible_options_are_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(InvalidInputError):
        make()
