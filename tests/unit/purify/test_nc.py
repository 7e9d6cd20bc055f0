from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.compute import accuracy_of, predictions_of
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.head import head_features
from unbackdoor.filters.select import Guard
from unbackdoor.inversion import Inversion, InvertedTrigger
from unbackdoor.purify import nc
from unbackdoor.purify.nc import NC, flagged_classes, smallest_reached, stamped_step
from unbackdoor.purify.selection import Selection
from unbackdoor.testing import planted_backdoor
from unbackdoor.testing.subjects import awkward_model, small_data
from unbackdoor.train import Batch, Recipe
from unbackdoor.types import LabelledImages, Purified

PLANTED = planted_backdoor(target_class=3)
CLEAN = PLANTED.clean_data(64, rng.generator(0))
RECIPE = Recipe(epochs=6, batch_size=32, learning_rate=0.002, crop_padding=0, flip=False)
QUICK = NC(
    inversion=Inversion(steps=100, batch_size=16), act_on="smallest", recipe=RECIPE, stamped_fraction=0.5
)


def purify(method: NC) -> Purified:
    return method.purify(PLANTED.model, CLEAN, generator=rng.generator(0))


def asr(model: nn.Module) -> float:
    others = CLEAN.subset(CLEAN.labels != 3)
    return float((predictions_of(model, PLANTED.trigger(others.floats())) == 3).float().mean())


def trigger(target: int, l1: float, *, reached: bool = True) -> InvertedTrigger:
    return InvertedTrigger(
        target, torch.ones(1, 12, 12), torch.ones(3, 12, 12), l1, float(reached), reached, 5
    )


def test_unlearning_takes_the_backdoor_and_keeps_the_task() -> None:
    result = purify(QUICK)
    assert asr(PLANTED.model) == 1.0
    assert asr(result.model) < 0.3
    assert accuracy_of(result.model, CLEAN) > 0.9
    assert result.diagnostics["acted_on"] == [3]
    assert result.mask is None
    json.dumps(dict(result.diagnostics), allow_nan=False)


def test_nothing_flagged_means_nothing_changed() -> None:
    result = purify(replace(QUICK, act_on="flagged"))
    assert result.diagnostics["flagged"] == []
    assert result.diagnostics["action"].startswith("none")
    for name, tensor in PLANTED.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], tensor)


def test_pruning_by_the_paper_takes_the_guilty_units_alone() -> None:
    result = purify(replace(QUICK, mitigation="prune", selection=Selection(amount="own")))
    assert set(result.diagnostics["pruned_units"]) <= {46, 47}
    assert result.diagnostics["trigger_success"] <= 0.05
    assert asr(result.model) < 0.3
    before, after = PLANTED.model.state_dict(), result.model.state_dict()
    kept = [j for j in range(48) if j not in result.diagnostics["pruned_units"]]
    assert torch.equal(after["head.weight"][:, kept], before["head.weight"][:, kept])
    assert all(torch.equal(after[name], before[name]) for name in before if name != "head.weight")


def test_units_are_ranked_by_how_much_the_triggers_raise_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that is loud on every image is none that the trigger excites."""
    model = copy.deepcopy(PLANTED.model)
    with torch.no_grad():
        model.get_parameter("norm2.bias")[5] += 20.0
        head = model.get_submodule("head")
        assert isinstance(head, nn.Linear)
        head.bias.sub_(20.0 * head.weight[:, 5])
    mask = torch.zeros(1, 16, 16)
    mask[:, -3:, -3:] = 1.0
    corner = torch.zeros(3, 16, 16)
    corner[:, -3:, -3:] = PLANTED.trigger(torch.zeros(1, 3, 16, 16))[0, :, -3:, -3:]
    # Two triggers: a unit counts by the one that raises it more.
    triggers = [
        InvertedTrigger(3, mask, corner, 9.0, 1.0, True, 5),
        InvertedTrigger(1, torch.ones(1, 16, 16), torch.full((3, 16, 16), 0.9), 256.0, 1.0, True, 5),
    ]
    monkeypatch.setattr(nc, "suspects", lambda *_, **__: (triggers, {}))
    method = replace(QUICK, mitigation="prune", selection=Selection(amount="count", count=4))
    result = method.purify(model, CLEAN, generator=rng.generator(0))
    plain = head_features(model, "head", CLEAN.images)
    stamped = [head_features(model, "head", each(CLEAN.floats())) for each in triggers]
    rises = [(after - plain).mean(0) for after in stamped]
    highest = torch.maximum(*rises)
    torch.testing.assert_close(result.scores["head.inputs"], -highest)
    assert result.diagnostics["pruned_units"] == highest.argsort(descending=True)[:4].tolist()
    assert int(stamped[0].mean(0).argmax()) == 5
    assert set(rises[0].argsort(descending=True)[:2].tolist()) == {46, 47}
    assert not torch.allclose(highest, rises[0])
    assert not torch.allclose(highest, rises[1])


@pytest.mark.parametrize(
    ("selection", "count"),
    [
        (Selection(amount="count", count=3), 3),
        (Selection(amount="fraction", fraction=0.25), 12),
        (Selection(guard=Guard(candidates=0.1, per_filter=9, total=9, accuracy=1, benefit=0)), 5),
        (Selection(guard=Guard(candidates=0.1, per_filter=-9, benefit=0)), 0),
    ],
)
def test_how_many_units_go(selection: Selection, count: int) -> None:
    result = purify(replace(QUICK, mitigation="prune", selection=selection))
    assert len(result.diagnostics["pruned_units"]) == count
    assert result.scores["head.inputs"].shape == (48,)
    assert {46, 47} <= set(result.scores["head.inputs"].argsort()[:2].tolist())


def test_flags_by_hand() -> None:
    norms = [10.0, 30, 32, 34, 36]
    triggers = [trigger(k, norm) for k, norm in enumerate(norms)]
    indices, flagged = flagged_classes(triggers, 2.0, fewest=5)
    assert indices[0] == pytest.approx(22 / 2.9652)
    assert flagged == [0]
    # The median is 32: a class needs a norm of at most the share of it that was asked for.
    assert flagged_classes(triggers, 2.0, fewest=5, largest_share=0.3)[1] == []
    assert flagged_classes(triggers, 2.0, fewest=5, largest_share=0.32)[1] == [0]
    # A tiny mask that does not work is no evidence: it is left out and flags nothing.
    failed = [trigger(0, 1.0, reached=False), *(trigger(k, 30.0 + k) for k in range(1, 6))]
    assert flagged_classes(failed, 2.0, fewest=5)[1] == []
    assert smallest_reached(failed) == [1]
    assert smallest_reached(failed[:1]) == []
    assert flagged_classes(triggers[:4], 2.0, fewest=5)[1] == []


def test_classes_without_a_trigger_may_count_as_a_norm() -> None:
    # One class of five has a trigger that works: alone it is no outlier, beside four that need 4 it is.
    lone = [trigger(0, 0.5), *(trigger(k, 0.1, reached=False) for k in range(1, 5))]
    assert flagged_classes(lone, 0.0, fewest=5, largest_share=0.5)[1] == []
    indices, flagged = flagged_classes(lone, 0.0, fewest=5, largest_share=0.5, unreached=4.0)
    assert flagged == [0]
    assert indices[1:] == [0.0] * 4
    assert flagged_classes(lone, 0.0, fewest=5, largest_share=0.1, unreached=4.0)[1] == []


def test_how_far_a_class_stands_out_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    logs = [0.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    inverted = tuple(trigger(k, math.exp(log)) for k, log in enumerate(logs))
    monkeypatch.setattr(nc, "invert_all", lambda *_, **__: inverted)

    def found(least: float) -> dict[str, Any]:
        _, described = nc.suspects(
            nn.Identity(), small_data(), Inversion(), threshold=0.0, fewest=5, smallest=False,
            largest_share=0.2, least_log_index=least, generator=rng.generator(0),
        )  # fmt: skip
        return described

    # The median logarithm is 5, and the median distance from it 2: classes 0 and 1 lie 1.69 and 0.67 below.
    index = 5 / (1.4826 * 2)
    assert found(-math.inf)["acted_on"] == [0, 1]
    assert found(1.0)["acted_on"] == [0]
    assert found(1.0)["log_index"] == pytest.approx(index)
    assert (found(1.7)["acted_on"], found(1.7)["log_index"]) == ([], None)


def test_where_no_index_says_anything_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three norms are too few for a median.
    monkeypatch.setattr(nc, "invert_all", lambda *_, **__: tuple(trigger(k, 1.0 + k) for k in range(3)))
    monkeypatch.setattr(nc, "flagged_classes", lambda *_, **__: ([math.nan] * 3, [0]))
    for least, acted in ((-math.inf, [0]), (0.0, [])):
        _, found = nc.suspects(
            nn.Identity(), small_data(), Inversion(), threshold=0.0, fewest=5, smallest=False,
            least_log_index=least, generator=rng.generator(0),
        )  # fmt: skip
        assert found["acted_on"] == acted


class Remember(nn.Module):
    """Returns equal logits and keeps the images that it saw."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return torch.zeros(len(x), 4, requires_grad=True)


@pytest.mark.parametrize(("size", "fraction", "count"), [(20, 0.2, 4), (3, 0.01, 1), (8, 1.0, 8)])
def test_a_share_of_each_batch_is_stamped_and_labels_stay(size: int, fraction: float, count: int) -> None:
    model, images = Remember(), torch.zeros(size, 3, 12, 12)
    batch = Batch(images, torch.zeros(size, dtype=torch.int64), torch.arange(size))
    with rng.isolated(rng.generator(0)):
        stamped_step([trigger(1, 5.0)], fraction)(model, batch)
    assert int((model.seen == 1).flatten(1).all(1).sum()) == count
    assert float(images.max()) == 0
    assert int(batch.labels.max()) == 0


def test_two_triggers_are_both_used() -> None:
    model, images = Remember(), torch.zeros(40, 3, 12, 12)
    dark = replace(trigger(2, 5.0), pattern=torch.full((3, 12, 12), 0.5))
    with rng.isolated(rng.generator(0)):
        stamped_step([trigger(1, 5.0), dark], 1.0)(
            model, Batch(images, torch.zeros(40, dtype=torch.int64), torch.arange(40))
        )
    assert sorted(set(model.seen.flatten().tolist())) == [0.5, 1.0]


def test_pruning_without_a_linear_head_is_refused() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    method = replace(QUICK, mitigation="prune", inversion=Inversion(steps=3, success=1e-6), act_on="smallest")
    with pytest.raises(UnsupportedModelError, match="linear head"):
        method.purify(model, small_data(), generator=rng.generator(0))


def test_images_of_one_class_are_survived() -> None:
    data = small_data()
    alone: LabelledImages = data.subset(data.labels == 2)
    result = replace(QUICK, inversion=Inversion(steps=2)).purify(
        awkward_model(), alone, generator=rng.generator(0)
    )
    assert not result.diagnostics["triggers"][2]["reached"]


@pytest.mark.parametrize(
    "options",
    [
        {"act_on": "all"},
        {"mitigation": "hope"},
        {"stamped_fraction": 0.0},
        {"own_success": 1.5},
        {"anomaly_threshold": 0.0},
        {"fewest_classes": 1},
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        NC(**options)


def test_the_papers_numbers() -> None:
    paper = NC.paper()
    assert (paper.recipe.epochs, paper.stamped_fraction, paper.anomaly_threshold) == (1, 0.2, 2.0)
