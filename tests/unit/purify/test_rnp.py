from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters import find_filters
from unbackdoor.masks import MaskTraining, learn_masks
from unbackdoor.purify import RNP
from unbackdoor.purify.selection import Selection
from unbackdoor.suppression import Suppression, suppress
from unbackdoor.testing import planted_backdoor
from unbackdoor.types import LabelledImages, Purified

PLANTED = planted_backdoor()
CLEAN = PLANTED.clean_data(64, rng.generator(0))
UNLEARNING = Suppression(mu=5e-4, decay="all", decay_convention="torch", budget=6)
MASKS = MaskTraining(learning_rate=0.2, target="norm_scale", norm_mode="train", epochs=3)
QUICK = RNP(unlearning=UNLEARNING, masks=MASKS)
FILTERS = MaskTraining(target="filter", norm_mode="eval", epochs=2)


def purify(method: RNP, model: nn.Module = PLANTED.model, clean: LabelledImages = CLEAN) -> Purified:
    return method.purify(model, clean, generator=rng.generator(0))


def test_scores_are_the_masks_that_recover_the_unlearnt_copy() -> None:
    result = purify(QUICK)
    generator = rng.generator(0)
    copy = suppress(PLANTED.model, CLEAN, UNLEARNING, generator=rng.spawn(generator)).model
    filter_map = find_filters(PLANTED.model, CLEAN.images[:1].float())
    masks = learn_masks(
        copy, CLEAN, filter_map, replace(MASKS, learning_rate=0.04),
        penalty={g.name: torch.zeros(g.filters) for g in filter_map.prunable}, bounds=(0.0, 1.0),
        generator=rng.spawn(generator),
    )  # fmt: skip
    assert set(result.scores) == {"conv1", "conv2"}
    for name, values in result.scores.items():
        torch.testing.assert_close(values, masks.masks[name])
        assert float(values.min()) >= 0
        assert float(values.max()) <= 1
    assert min(float(values.min()) for values in result.scores.values()) < 1


def test_the_papers_rule_removes_masks_at_or_below_the_threshold() -> None:
    scores = torch.cat(list(purify(QUICK).scores.values()))
    threshold = float(scores.sort().values[9])
    result = purify(replace(QUICK, threshold=threshold, selection=Selection(amount="own")))
    assert result.mask is not None
    assert result.mask.n_removed == int((scores <= threshold).sum())


def test_only_scales_of_the_original_change() -> None:
    result = purify(replace(QUICK, selection=Selection(amount="count", count=5)))
    before, after = PLANTED.model.state_dict(), result.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert changed <= {"norm1.weight", "norm2.weight"}
    assert result.mask is not None
    for layer, j in result.mask.removed():
        assert float(after[layer.replace("conv", "norm") + ".weight"][j]) == 0.0


def test_an_unreached_accuracy_is_said_and_the_last_state_used() -> None:
    short = replace(QUICK, unlearning=replace(UNLEARNING, budget=1, learning_rate=1e-5))
    result = purify(short)
    assert result.diagnostics["ca_min_reached"] is False
    assert result.diagnostics["unlearning"]["stop_reason"] == "budget"
    json.dumps(dict(result.diagnostics))
    with pytest.raises(UnsupportedModelError, match=r"above CA_min = 0\.2"):
        purify(replace(short, on_not_reached="raise"))


def test_a_reached_accuracy_is_said() -> None:
    result = purify(replace(QUICK, unlearning=replace(UNLEARNING, budget=100, learning_rate=0.05)))
    assert result.diagnostics["ca_min_reached"] is True
    assert result.diagnostics["unlearning"]["accuracy"][-1] <= 0.2


def test_networks_without_batch_norm() -> None:
    with rng.isolated(rng.generator(0)):
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)
        ).eval()
    with pytest.raises(UnsupportedModelError, match="target = 'filter'"):
        purify(QUICK, model)
    assert set(purify(replace(QUICK, masks=FILTERS), model).scores) == {"0"}


def test_the_paper_has_the_authors_numbers() -> None:
    paper = RNP.paper()
    assert (paper.alpha, paper.masks.learning_rate, paper.masks.epochs, paper.masks.momentum) == (
        0.2, 0.2, 20, 0.9,
    )  # fmt: skip
    ascent = paper.unlearning
    assert (ascent.learning_rate, ascent.momentum, ascent.budget, ascent.unit, ascent.stop_accuracy) == (
        0.01, 0.9, 20, "epoch", 0.2,
    )  # fmt: skip
    assert (ascent.mu, ascent.decay_convention, ascent.clip_norm) == (5e-4, "torch", 0.0)
    assert (ascent.decay, ascent.augment, ascent.checks_per_epoch) == ("all", True, 1)
    assert (paper.masks.target, paper.masks.norm_mode, paper.masks.augment) == ("norm_scale", "train", True)
    assert (paper.selection.amount, paper.threshold, paper.masks.tolerance) == ("own", 0.3, 0.0)


def test_options_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="alpha must be positive"):
        RNP(alpha=0)
    with pytest.raises(InvalidInputError, match="threshold"):
        RNP(threshold=1.5)
    with pytest.raises(InvalidInputError, match="on_not_reached"):
        RNP(on_not_reached="stop")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="train mode"):
        RNP(masks=replace(FILTERS, norm_mode="train"))
