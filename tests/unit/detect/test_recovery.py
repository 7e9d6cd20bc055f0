from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.detect import Recovery
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.groups import find_filters
from unbackdoor.filters.mask import FilterMask
from unbackdoor.filters.saliency import clean_loss
from unbackdoor.suppression import Check, Suppressed, Suppression, suppress
from unbackdoor.testing import PlantedBackdoor, planted_backdoor
from unbackdoor.types import Detection, LabelledImages

SUPPRESSION = Suppression(budget=60)
RECOVERY = Recovery(SUPPRESSION, depth=1.0, count=1)


@cache
def planted(*, infected: bool = True) -> PlantedBackdoor:
    return planted_backdoor(target_class=3, infected=infected)


@cache
def images() -> LabelledImages:
    return planted().clean_data(160, rng.generator(1))


@cache
def suppressed(*, infected: bool = True) -> Suppressed:
    return suppress(
        planted(infected=infected).model, images(), SUPPRESSION, generator=rng.spawn(rng.generator(0))
    )


def judged(detector: Recovery, *, infected: bool = True) -> Detection:
    return detector.judge(planted(infected=infected).model, images(), suppressed(infected=infected))


def places(detection: Detection) -> list[tuple[str, int]]:
    return [(each["layer"], each["filter"]) for each in detection.evidence["filters"]]


def test_the_filters_that_carry_a_backdoor_give_back_what_suppression_broke() -> None:
    guilty, clean = judged(replace(RECOVERY, count=3)), judged(replace(RECOVERY, count=3), infected=False)
    assert set(places(guilty)) <= planted().guilty
    assert guilty.target_class == 3
    assert guilty.evidence["pattern"] == "all-to-one"
    assert guilty.score > 2.5 * clean.score
    assert guilty.is_backdoored
    # A threshold between the two flags the one and not the other.
    between = replace(RECOVERY, count=3, threshold=(guilty.score + clean.score) / 2)
    assert judged(between).is_backdoored
    assert not judged(between, infected=False).is_backdoored
    assert guilty.evidence["accuracy_without_them"] > 0.9
    json.dumps(dict(guilty.evidence), allow_nan=False)


def test_the_score_is_the_mean_benefit_measured_by_hand() -> None:
    found = judged(replace(RECOVERY, count=2))
    model, filter_map = suppressed().model, find_filters(planted().model, images().floats()[:1])
    whole = clean_loss(model, images())
    for each in found.evidence["filters"]:
        mask = FilterMask.full(filter_map).without([(each["layer"], each["filter"])])
        without = clean_loss(mask.apply(model, filter_map), images())
        assert each["benefit"] == pytest.approx((whole - without) / whole, abs=1e-5)
    benefits = [each["benefit"] for each in found.evidence["filters"]]
    assert benefits == sorted(benefits, reverse=True)
    assert found.score == pytest.approx(sum(benefits) / 2)
    assert found.evidence["loss"] == pytest.approx(whole, rel=1e-5)


def test_filters_that_the_model_needs_do_not_count() -> None:
    # Nothing may cost so little.
    found = judged(replace(RECOVERY, spared=-1e9))
    assert (found.score, found.target_class, found.evidence["pattern"]) == (0.0, None, "none")
    assert places(found) == []
    # Where fewer filters can be spared than asked for, the mean is over as many as asked for.
    one = judged(RECOVERY)
    assert judged(replace(RECOVERY, candidates=20, count=20)).score < one.score


def test_only_deep_layers_are_looked_at() -> None:
    assert {layer for layer, _ in places(judged(replace(RECOVERY, count=8)))} == {"conv1", "conv2"}
    deep = judged(replace(RECOVERY, depth=0.25, count=2))
    assert set(places(deep)) == {place for place in planted().guilty if place[0] == "conv2"}
    assert deep.target_class == 3


def test_scoring_leaves_the_model_alone_and_is_what_judging_its_run_gives() -> None:
    before = {name: tensor.clone() for name, tensor in planted().model.state_dict().items()}
    stages: set[str] = set()
    found = RECOVERY.score(
        planted().model,
        images(),
        generator=rng.generator(0),
        progress=lambda stage, done, total: stages.add(stage),
    )
    assert found.score == pytest.approx(judged(RECOVERY).score)
    assert "single filters" in stages
    for name, tensor in planted().model.state_dict().items():
        assert torch.equal(tensor, before[name])


def checks(*matrices: Any) -> tuple[Check, ...]:  # noqa: ANN401
    return tuple(Check(i, torch.as_tensor(matrix)) for i, matrix in enumerate(matrices))


def test_returned_images_say_which_class_or_pattern_it_was() -> None:
    right = 10 * torch.eye(5, dtype=torch.int64)
    target, pattern = RECOVERY._target(torch.zeros(5, 5).long().index_fill(1, torch.tensor(2), 10), right)
    assert (target, pattern) == (2, "all-to-one")
    target, pattern = RECOVERY._target(torch.roll(right, 2, dims=1), right)
    assert (target, pattern) == (None, "all-to-all, class + 2")


def test_a_step_that_images_of_one_class_took_is_no_pattern() -> None:
    # Of ten classes; 30 images of class 5 and 9 others had fallen into class 2, 8 of class 3 elsewhere.
    before = 50 * torch.eye(10, dtype=torch.int64)
    before[5, 2], before[6, 2], before[7, 2], before[3, 8] = 30, 5, 4, 8
    assert RECOVERY._target(before, 50 * torch.eye(10, dtype=torch.int64)) == (2, "all-to-one")


def test_between_two_classes_there_is_a_target() -> None:
    before, after = torch.tensor([[50, 0], [48, 2]]), torch.tensor([[50, 0], [8, 42]])
    assert RECOVERY._target(before, after) == (0, "all-to-one")


@pytest.mark.parametrize(
    ("first", "last", "problem"),
    [
        (10 * torch.eye(5).long(), 10 * torch.eye(5).long(), "only from 1.00 to 1.00, so that nothing is"),
        (torch.full((5, 5), 2), torch.full((5, 5), 2), "no better than chance"),
    ],
)
def test_what_cannot_be_read_is_said(first: torch.Tensor, last: torch.Tensor, problem: str) -> None:
    found = RECOVERY.judge(nn.Identity(), images(), Suppressed(nn.Identity(), checks(first, last), "budget"))
    assert problem in found.undetermined
    assert math.isnan(found.score)
    assert not found.is_backdoored


@pytest.mark.parametrize(
    "options", [{"count": 0}, {"count": 31}, {"candidates": 0}, {"depth": 0.0}, {"spared": math.inf}]
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="recovery needs 1 <= count <= candidates"):
        Recovery(**options)
