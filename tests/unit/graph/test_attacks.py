from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.graph import SBA, UGBA, Graph
from unbackdoor.graph.attacks.triggers import FixedTrigger, GeneratedTrigger, attach, attachment, inner_pairs
from unbackdoor.graph.edges import similarities
from unbackdoor.graph.laboratory import Staged

from .conftest import QUICK


def test_triggers_hang_on_their_nodes_by_one_edge() -> None:
    graph = Graph(torch.zeros(3, 2), torch.tensor([[0], [1]]), torch.tensor([0, 1, -1]))
    trigger = FixedTrigger(torch.ones(3, 2), torch.tensor([1.0, 0.0, 1.0]))
    triggered = attach(graph, torch.tensor([2, 0]), trigger)
    assert triggered.edges.tolist() == [[0, 2, 3, 4, 0, 6, 7], [1, 3, 4, 5, 6, 7, 8]]
    assert triggered.labels.tolist() == [0, 1, -1, -1, -1, -1, -1, -1, -1]
    assert triggered.features.sum(1).tolist() == [0, 0, 0, 2, 2, 2, 2, 2, 2]
    assert len(graph) == 3


def test_all_edges_that_a_trigger_may_have_are_in_the_order_of_its_weights() -> None:
    edges = attachment(10, torch.tensor([4, 7]), 3)
    assert edges.tolist() == [[4, 10, 10, 11, 7, 13, 13, 14], [10, 11, 12, 12, 13, 14, 15, 15]]
    assert inner_pairs(3).tolist() == [[0, 0, 1], [1, 2, 2]]


def test_a_trigger_for_other_features_is_refused() -> None:
    graph = Graph(torch.zeros(3, 2), torch.tensor([[0], [1]]), torch.tensor([0, 1, 0]))
    with pytest.raises(InvalidInputError, match="different data"):
        attach(graph, torch.tensor([0]), FixedTrigger(torch.ones(2, 5), torch.ones(1)))


def test_generated_edges_are_whole_and_have_gradients() -> None:
    with rng.isolated(rng.generator(0)):
        trigger = GeneratedTrigger(5, 3)
    made = trigger(torch.randn(4, 5, generator=rng.generator(1)))
    assert set(made.joined.detach().round(decimals=5).unique().tolist()) <= {0.0, 1.0}
    made.joined.sum().backward()
    assert trigger.pairs.weight.grad is not None
    assert float(trigger.pairs.weight.grad.abs().sum()) > 0


def test_sba_hangs_the_same_connected_subgraph_on_nodes_of_other_classes(staged: Staged) -> None:
    assert staged.poisoned is not None
    poisoned, training = staged.poisoned, staged.division.training
    assert len(poisoned.nodes.unique()) == 24
    assert bool((training.labels[poisoned.nodes] == -1).all())
    assert bool((poisoned.graph.labels[poisoned.nodes] == 2).all())
    assert len(poisoned.graph) == len(training) + 3 * 24
    new = poisoned.graph.features[len(training) :].view(24, 3, -1)
    assert bool((new == new[0]).all())
    # Those told before are told as before.
    known = training.labelled
    assert torch.equal(poisoned.graph.labels[known], training.labels[known])
    most = int((staged.division.whole.labels[poisoned.nodes] == 2).sum())
    assert most < 6, "nodes of the target class need no trigger"


def test_ugba_makes_triggers_that_look_like_their_nodes(staged: Staged) -> None:
    training = staged.division.training
    attack = UGBA(poisoned=12, steps=40, sample=32, surrogate=QUICK, similarity_weight=10.0)
    alike = attack.run(training, generator=rng.generator(0))
    unlike = replace(attack, similarity_weight=0.0).run(training, generator=rng.generator(0))
    assert torch.equal(alike.nodes, unlike.nodes)
    means = []
    for poisoned in (alike, unlike):
        new = poisoned.graph.edges[:, (poisoned.graph.edges >= len(training)).any(0)]
        means.append(float(similarities(poisoned.graph, new).mean()))
    assert means[0] > 0.5 > means[1]


def test_rare_words_are_in_use_and_had_by_the_fewest(staged: Staged) -> None:
    training = staged.division.training
    trigger = (
        SBA(poisoned=12, surrogate=QUICK, words="rare").run(training, generator=rng.generator(0)).trigger
    )
    assert isinstance(trigger, FixedTrigger)
    uses = (training.features != 0).sum(0)
    drawn = trigger.features.any(0)
    assert int(uses[drawn].min()) > 0
    count = int((trigger.features[0] != 0).sum())
    in_use = uses[uses > 0].sort().values
    assert int(uses[drawn].max()) <= int(in_use[max(count, round(len(in_use) / 10)) - 1])


def test_the_paper_of_ugba_weighs_similarity_more_and_takes_longer() -> None:
    assert UGBA.paper() == UGBA(steps=400, similarity=0.8, similarity_weight=100.0)


@pytest.mark.parametrize("attack", [SBA(surrogate=QUICK), UGBA(steps=2, surrogate=QUICK)])
def test_attacks_are_repeatable_and_leave_their_input_and_global_randomness_alone(
    staged: Staged, attack: SBA | UGBA
) -> None:
    training = staged.division.training
    before, state = training.features.clone(), torch.get_rng_state()
    one = attack.run(training, generator=rng.generator(7))
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(2)
    other = attack.run(training, generator=rng.generator(7))
    assert torch.equal(before, training.features)
    assert torch.equal(one.graph.features, other.graph.features)
    assert torch.equal(one.graph.edges, other.graph.edges)


@pytest.mark.parametrize("attack", [SBA(target_class=4, surrogate=QUICK), SBA(poisoned=500, surrogate=QUICK)])
def test_what_cannot_be_poisoned_is_refused(staged: Staged, attack: SBA) -> None:
    with pytest.raises(InvalidInputError, match="target"):
        attack.run(staged.division.training, generator=rng.generator(0))


def test_impossible_options_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="density"):
        SBA(density=0.0)
    with pytest.raises(InvalidInputError, match="'uniform' or 'rare'"):
        SBA(words="common")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="steps"):
        UGBA(steps=0)
