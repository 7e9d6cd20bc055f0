from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.graph import RIGBD, Graph, judge
from unbackdoor.graph.cuts import Cut, find_top
from unbackdoor.graph.detect import divergence
from unbackdoor.graph.laboratory import Staged

from .conftest import QUICK

METHOD = RIGBD(training=QUICK)


def top_of(labels: list[int], cut: Cut = "consecutive") -> tuple[int, int, float]:
    found = find_top(torch.tensor(labels), 3, cut, patience=2, permutations=99, generator=rng.generator(0))
    return found.target_class, found.length, found.p_value


def test_the_top_ends_before_two_others_in_a_row() -> None:
    assert top_of([1, 1, 0, 1, 1, 2, 0, 1, 1, 0, 2, 2, 0, 1])[:2] == (1, 5)
    # A single other at the very top does not hide the class.
    assert top_of([0, 1, 1, 1, 2, 0, 0, 2])[:2] == (1, 4)
    assert top_of([2] * 5)[:2] == (2, 5)
    assert top_of([0])[:2] == (0, 1)


def test_the_likelihood_cut_passes_over_a_few_others() -> None:
    labels = [1, 0, 2, 1, 1, 1, 1, 1, 1, *[0, 2, 0, 2, 1, 0, 2, 2, 0, 0, 2, 0]]
    assert top_of(labels, "likelihood")[:2] == (1, 9)
    assert top_of([0, 1, 2], "likelihood")[1] <= 1


@pytest.mark.parametrize("cut", ["consecutive", "likelihood"])
def test_a_run_at_the_top_is_no_chance_and_a_mixture_is(cut: Cut) -> None:
    rest = [0, 1, 2, 2, 1, 0] * 20
    assert top_of([1] * 12 + rest, cut)[2] == 0.01
    assert top_of(rest, cut)[2] > 0.2


def test_divergence_is_the_mean_over_classes() -> None:
    before, after = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    expected = 0.5 * (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    assert divergence(before, after).tolist() == pytest.approx([expected, 0.5 * math.log(2)], abs=1e-6)
    assert divergence(before, before).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_poisoned_nodes_and_their_target_are_found(staged: Staged) -> None:
    found = METHOD.score(staged.graph, generator=rng.generator(0))
    assert found.is_backdoored is True
    assert found.target_class == 2
    judged = judge(found, staged.poisoned)
    assert judged.auroc > 0.85
    assert judged.precision.value > 0.8
    assert judged.recall.value > 0.3
    assert bool(found.scores.isnan().sum() == len(staged.graph) - len(staged.graph.labelled))
    assert bool((staged.graph.labels[found.flagged] == 2).all())


def test_nothing_is_flagged_in_a_clean_graph(staged: Staged) -> None:
    found = METHOD.score(staged.division.training, generator=rng.generator(0))
    assert found.is_backdoored is False
    assert (found.target_class, len(found.flagged)) == (None, 0)
    judged = judge(found, None)
    assert judged.target_found is None
    assert math.isnan(judged.auroc)


def test_equal_generators_give_equal_scores_and_nothing_else_changes(staged: Staged) -> None:
    labels, state = staged.graph.labels.clone(), torch.get_rng_state()
    one = replace(METHOD, runs=2).score(staged.graph, generator=rng.generator(5))
    assert torch.equal(state, torch.get_rng_state())
    other = replace(METHOD, runs=2).score(staged.graph, generator=rng.generator(5))
    assert torch.equal(one.scores.nan_to_num(), other.scores.nan_to_num())
    assert torch.equal(labels, staged.graph.labels)


def test_too_few_labels_are_undetermined(staged: Staged) -> None:
    few = staged.graph.told(staged.graph.labelled[:12])
    found = replace(METHOD, runs=2).score(few, generator=rng.generator(0))
    assert found.is_backdoored is None
    assert "12 nodes" in found.undetermined
    assert not len(found.flagged)


def test_a_network_that_learnt_nothing_is_undetermined(graph: Graph) -> None:
    noise = replace(graph, features=torch.zeros_like(graph.features))
    found = replace(METHOD, runs=2).score(noise, generator=rng.generator(0))
    assert found.is_backdoored is None
    assert "learnt nothing" in found.undetermined


@pytest.mark.parametrize(
    "options",
    [{"runs": 0}, {"rate": 1.0}, {"patience": 0}, {"alpha": 0.001, "permutations": 99}, {"cut": "x"}],
)
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError):
        RIGBD(**options)  # type: ignore[arg-type]


def test_the_settings_of_the_paper_are_there() -> None:
    assert (RIGBD.paper().training.epochs, RIGBD.paper().runs, RIGBD.paper().rate) == (1000, 20, 0.5)
