from __future__ import annotations

import copy
import json
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import networks as nets
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters import FilterMap, find_filters
from unbackdoor.filters.saliency import clean_loss
from unbackdoor.filters.select import Exposed, Guard, below, guarded_walk, order
from unbackdoor.types import LabelledImages

DEAD = (1, 4)
VITAL = (0, 2, 3, 5)


def planted() -> tuple[nn.Module, LabelledImages, FilterMap]:
    """A network that reads the class off the brightest pixel; two of its six hidden units lead nowhere."""
    model = nets.TwoLayers(6)
    first, second = model.first, model.second
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for label, unit in enumerate(VITAL):
            first.weight[unit, label] = 1.0
            second.weight[label, unit] = 12.0
        for unit in DEAD:
            first.weight[unit] = 5.0
    labels = torch.arange(40) % nets.CLASSES
    images = torch.zeros(40, 3, 2, 2)
    images[:, 0] = torch.nn.functional.one_hot(labels, 4).float().view(40, 2, 2)
    return model, LabelledImages(images, labels), find_filters(model, images)


ALL = [("first", j) for j in range(6)]
LOOSE = Guard(candidates=1.0, per_filter=100.0, total=100.0, accuracy=1.0)


def test_order_is_by_score_over_all_layers() -> None:
    scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, float("-inf")])}
    assert order(scores) == [("b", 1), ("a", 1), ("b", 0), ("a", 0)]


def test_ties_follow_the_tie_breaks_then_layer_then_index() -> None:
    scores = {"a": torch.zeros(3), "b": torch.zeros(2)}
    assert order(scores) == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    first = {"a": torch.tensor([1.0, 0.0, 1.0]), "b": torch.tensor([0.0, 1.0])}
    assert order(scores, first) == [("a", 1), ("b", 0), ("a", 0), ("a", 2), ("b", 1)]
    second = {"b": torch.tensor([-2.0, 0.0]), "a": torch.tensor([5.0, -1.0, 0.0])}
    assert order(scores, first, second) == [("b", 0), ("a", 1), ("a", 2), ("b", 1), ("a", 0)]
    decided = {"a": torch.tensor([2.0, 1.0, 0.0]), "b": torch.tensor([-1.0, 3.0])}
    assert order(decided, first) == order(decided)


def test_order_of_many_ties_is_always_the_same() -> None:
    scores = {name: torch.arange(200) % 3 for name in "abc"}
    result = order(scores)
    assert result == order(scores)
    places = {place: rank for rank, place in enumerate(result)}
    for name in "abc":
        ones = [places[(name, j)] for j in range(200) if j % 3 == 1]
        assert all(x < y for x, y in pairwise(ones))


@pytest.mark.parametrize("scores", [{}, {"a": torch.zeros(0)}])
def test_no_filters_have_no_order(scores: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no filter to put in order.*hidden layers"):
        order(scores)


def test_below_includes_the_threshold() -> None:
    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.5, 1.0])}
    assert below(scores, 1.5) == [("a", 0), ("b", 0), ("b", 1)]
    assert below(scores, 0.5) == []


@pytest.mark.parametrize("candidates", [0.0, -0.1, 1.5])
def test_a_guard_needs_a_sensible_share(candidates: float) -> None:
    with pytest.raises(InvalidInputError, match="candidates"):
        Guard(candidates=candidates)


@pytest.mark.parametrize("accuracy", [-0.01, 1.01, 2.0, math.nan])
def test_a_guard_allows_a_share_of_the_accuracy(accuracy: float) -> None:
    with pytest.raises(InvalidInputError, match=rf"fraction and must lie in \[0, 1\], got {accuracy}; 0.02"):
        Guard(accuracy=accuracy)
    assert (Guard(accuracy=0.0).accuracy, Guard(accuracy=1.0).accuracy) == (0.0, 1.0)


def test_the_walk_removes_dead_filters_and_skips_vital_ones() -> None:
    model, clean, found = planted()
    mask, steps = guarded_walk(model, clean, found, ALL, Guard())
    assert mask.removed() == [("first", j) for j in DEAD]
    assert [(s.layer, s.filter) for s in steps] == ALL
    assert [s.removed for s in steps] == [j in DEAD for j in range(6)]
    for step in steps:
        if step.filter in DEAD:
            assert step.loss_change == 0.0
        else:
            assert step.loss_change > 0.1
        assert step.accuracy == 1.0


def test_rejected_filters_come_back_exactly() -> None:
    model, clean, found = planted()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twice = [*((("first", j)) for j in VITAL), *((("first", j)) for j in VITAL)]
    mask, steps = guarded_walk(model, clean, found, twice, Guard())
    assert mask.n_removed == 0
    # Had a rejection left a trace, the second round would measure other changes.
    assert [s.loss_change for s in steps[:4]] == [s.loss_change for s in steps[4:]]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


def test_the_mask_reproduces_what_the_walk_measured() -> None:
    model = nets.randomise(nets.SmallConvNet())
    clean = LabelledImages(nets.images(24, size=8), torch.arange(24) % nets.CLASSES)
    found = find_filters(model, clean.images)
    candidates = [(g.name, j) for g in found.prunable for j in range(g.filters)]
    mask, steps = guarded_walk(model, clean, found, candidates, Guard(per_filter=0.05, total=0.2))
    assert 0 < mask.n_removed < len(candidates)
    change = clean_loss(mask.apply(model, found), clean) - clean_loss(model, clean)
    assert change == pytest.approx(sum(s.loss_change for s in steps if s.removed), abs=1e-5)
    assert change <= 0.2 + 1e-6
    assert all(s.loss_change <= 0.05 for s in steps if s.removed)
    assert mask.removed() == [(s.layer, s.filter) for s in steps if s.removed]


def test_the_total_budget_binds_although_each_step_is_allowed() -> None:
    model, clean, found = planted()
    _, steps = guarded_walk(model, clean, found, ALL, LOOSE)
    assert all(s.removed for s in steps)
    first = next(s.loss_change for s in steps if s.filter == VITAL[0])
    only_one = Guard(candidates=1.0, per_filter=100.0, total=first * 1.1, accuracy=1.0)
    mask, _ = guarded_walk(model, clean, found, ALL, only_one)
    assert mask.removed() == [("first", 0), ("first", 1), ("first", 4)]


def test_the_accuracy_budget_binds() -> None:
    model, clean, found = planted()
    # Without a unit its class has no evidence left, and ties go to class 0: a quarter is lost with unit 2.
    guard = Guard(candidates=1.0, per_filter=100.0, total=100.0, accuracy=0.25)
    mask, steps = guarded_walk(model, clean, found, [("first", j) for j in (2, 3, 5, 1)], guard)
    assert mask.removed() == [("first", 1), ("first", 2)]
    assert [s.accuracy for s in steps] == [0.75] * 4
    tighter = Guard(candidates=1.0, per_filter=100.0, total=100.0, accuracy=0.24)
    mask, _ = guarded_walk(model, clean, found, [("first", 2), ("first", 1)], tighter)
    assert mask.removed() == [("first", 1)]


def test_progress_is_told_of_every_candidate() -> None:
    model, clean, found = planted()
    calls: list[tuple[str, int, int]] = []
    guarded_walk(model, clean, found, ALL, Guard(), progress=lambda *call: calls.append(call))
    assert calls == [("guarded walk", done, 6) for done in range(1, 7)]


def harmed() -> tuple[nn.Module, LabelledImages, FilterMap, Exposed]:
    """The network above and a copy that its first dead unit drives to class 0; the other does nothing."""
    model, clean, found = planted()
    poisoned = copy.deepcopy(model)
    with torch.no_grad():
        poisoned.second.weight[0, DEAD[0]] = 5.0  # type: ignore[union-attr, operator]
    return model, clean, found, Exposed(poisoned, clean)


def test_what_promises_nothing_is_passed_over_without_a_trial() -> None:
    model, clean, found, exposed = harmed()
    mask, steps = guarded_walk(model, clean, found, ALL, Guard(), exposed=exposed)
    assert mask.removed() == [("first", DEAD[0])]
    other = steps[DEAD[1]]
    assert math.isnan(other.loss_change)
    assert not other.removed
    tried, all_steps = guarded_walk(model, clean, found, ALL, Guard(screen=0.0), exposed=exposed)
    assert tried.equals(mask)
    assert not any(math.isnan(step.loss_change) for step in all_steps)
    assert json.loads(json.dumps(other.describe(), allow_nan=False))["loss_change"] is None


def test_promises_are_made_again_after_each_removal() -> None:
    model, clean, found, exposed = harmed()
    with torch.no_grad():
        # The second unit drives to class 1, but less: that shows only once the first is gone.
        exposed.model.second.weight[1, DEAD[1]] = 3.0  # type: ignore[union-attr, operator]
    backwards, _ = guarded_walk(model, clean, found, ALL[:0:-1], Guard(), exposed=exposed)
    assert backwards.removed() == [("first", DEAD[0])]
    mask, _ = guarded_walk(model, clean, found, ALL, Guard(), exposed=exposed)
    assert mask.removed() == [("first", j) for j in DEAD]


def test_the_walk_ends_when_nothing_has_come_of_it_for_long() -> None:
    model, clean, found = planted()
    vital_first = [("first", j) for j in (*VITAL, *DEAD)]
    mask, steps = guarded_walk(model, clean, found, vital_first, Guard(patience=3))
    assert mask.n_removed == 0
    assert [step.filter for step in steps] == list(VITAL[:3])
    mask, steps = guarded_walk(model, clean, found, vital_first, Guard(patience=5))
    assert mask.n_removed == len(DEAD)
    calls: list[tuple[str, int, int]] = []
    guarded_walk(
        model, clean, found, vital_first, Guard(patience=1), progress=lambda *call: calls.append(call)
    )
    assert calls[-1] == ("guarded walk", 6, 6)


@pytest.mark.parametrize("wrong", [{"screen": -0.1}, {"patience": -1}])
def test_a_guard_needs_a_sensible_screen_and_patience(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match="screen and patience"):
        Guard(**wrong)  # type: ignore[arg-type]


def test_a_copy_without_any_loss_gives_no_benefit() -> None:
    model, clean, found = planted()
    with torch.no_grad():
        model.second.weight.mul_(100)  # type: ignore[operator, union-attr]
    assert clean_loss(model, clean) == 0.0
    mask, steps = guarded_walk(model, clean, found, ALL, LOOSE, exposed=Exposed(model, clean))
    assert mask.n_removed == 0
    assert {step.benefit for step in steps} == {0.0}
