from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.costs import metered
from unbackdoor.errors import InvalidInputError
from unbackdoor.inversion import (
    Inversion,
    InvertedTrigger,
    anomaly_indices,
    invert,
    invert_all,
    norms_of,
)
from unbackdoor.testing import planted_backdoor
from unbackdoor.testing.subjects import Snapshot, awkward_model, global_randomness_untouched, small_data
from unbackdoor.types import LabelledImages

CLASSES = 5
QUICK = Inversion(steps=120, precision="fp32")


class Blocks(nn.Module):
    """Class k is the brightest of five 2x2 blocks; one pixel in the corner gives class 2 away."""

    def __init__(self, *, backdoor: bool = True) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(10.0))
        self.backdoor = backdoor

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x.mean(1, keepdim=True), 2).flatten(1)[:, :CLASSES]
        logits = self.strength * pooled
        corner = (x[:, :, 5, 5].mean(1) - 0.5) * 80 * self.backdoor
        return logits + corner.view(-1, 1) * F.one_hot(torch.tensor(2), CLASSES)


class Constant(nn.Module):
    """Always says class 0, but lets gradients of 0 through."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits + 0 * x.sum((1, 2, 3)).view(-1, 1)


def blocks(count: int = 40) -> LabelledImages:
    labels = torch.arange(count) % CLASSES
    images = 0.4 * torch.rand(count, 3, 6, 6, generator=rng.generator(1))
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 2 * (label // 3), 2 * (label % 3)
        image[:, row : row + 2, column : column + 2] = 0.9
    images[:, :, 5, 5] = 0.1
    return LabelledImages(images, labels)


def invert_blocks(options: Inversion = QUICK, *, backdoor: bool = True) -> tuple[InvertedTrigger, ...]:
    return invert_all(Blocks(backdoor=backdoor), blocks(), options, generator=rng.generator(0))


def test_a_backdoor_of_one_pixel_is_found() -> None:
    triggers = invert_blocks()
    assert [trigger.target_class for trigger in triggers] == list(range(CLASSES))
    guilty = triggers[2]
    assert guilty.reached
    assert guilty.norm < 1.2
    assert float(guilty.mask[0, 5, 5]) > 0.5 * guilty.norm
    assert float(guilty.pattern[:, 5, 5].mean()) > 0.5
    norms = [trigger.norm for trigger in triggers]
    assert all(trigger.reached for trigger in triggers)
    indices = anomaly_indices(norms)
    assert max(range(CLASSES), key=indices.__getitem__) == 2
    assert invert_blocks(backdoor=False)[2].norm > 2 * guilty.norm


WEAVE = (-1.0) ** torch.arange(36).view(6, 6)


class Woven(Blocks):
    """A faint weave over the whole image gives class 2 away."""

    def forward(self, x: Tensor) -> Tensor:
        woven = (x.mean(1) * WEAVE).sum((1, 2)) - 2
        return super().forward(x) + 10 * woven.view(-1, 1) * F.one_hot(torch.tensor(2), CLASSES)


def test_a_faint_trigger_on_all_pixels_is_found_as_a_change() -> None:
    data, options = blocks(), replace(Inversion.additive(), precision="fp32", learning_rate=0.01)
    triggers = invert_all(Woven(backdoor=False), data, options, generator=rng.generator(0))
    norms = [trigger.norm for trigger in triggers]
    assert all(trigger.reached for trigger in triggers)
    assert min(range(CLASSES), key=norms.__getitem__) == 2
    guilty = triggers[2]
    assert guilty.form == "additive"
    assert guilty.norm == pytest.approx(float(guilty.pattern.norm()))
    assert guilty.describe()["l2"] == guilty.norm
    # It follows the weave, whose sign changes from pixel to pixel.
    cosine = F.cosine_similarity(guilty.pattern.mean(0).flatten(), WEAVE.flatten(), dim=0)
    assert float(cosine) > 0.6
    stamped = guilty(data.images)
    torch.testing.assert_close(stamped, (data.images + guilty.pattern).clamp(0, 1))
    others = data.labels != 2
    rate = float((Woven(backdoor=False)(stamped[others]).argmax(1) == 2).float().mean())
    assert guilty.success == pytest.approx(rate)


class Shifted(Blocks):
    """A dark edge, where clean images are bright, gives class 2 away."""

    def forward(self, x: Tensor) -> Tensor:
        darker = 200 * (0.4 - x[:, :, 3:, 5].mean((1, 2))).clamp_min(0)
        return super().forward(x) + darker.view(-1, 1) * F.one_hot(torch.tensor(2), CLASSES)


def striped(count: int = 40) -> LabelledImages:
    data = blocks(count)
    images = data.images.clone()
    # Bright at the right edge, and dark beside it: a shift by less than a column darkens the edge.
    images[:, :, :, 5], images[:, :, :, 4] = 0.9, 0.0
    return LabelledImages(images, data.labels)


def test_a_shift_of_the_pixels_is_found_as_a_warp() -> None:
    data, options = striped(), replace(Inversion.warp(), precision="fp32", control_points=3)
    # One start may miss the smallest.
    starts = [
        invert_all(Shifted(backdoor=False), data, options, generator=rng.generator(s)) for s in range(3)
    ]
    guilty = min((triggers[2] for triggers in starts if triggers[2].reached), key=lambda each: each.norm)
    assert guilty.form == "warp"
    assert guilty.pattern.shape == (2, 3, 3)
    assert guilty.describe()["rms_shift_pixels"] == guilty.norm
    innocent = [trigger for triggers in starts for trigger in triggers if trigger.target_class != 2]
    assert not any(trigger.reached and trigger.norm < 2 * guilty.norm for trigger in innocent)
    others = data.labels != 2
    rate = float((Shifted(backdoor=False)(guilty(data.images)[others]).argmax(1) == 2).float().mean())
    assert guilty.success == pytest.approx(rate)


@pytest.mark.parametrize("size", [6, 12])
def test_warps_are_stepped_by_a_share_of_the_largest_shift(size: int) -> None:
    data, generators = striped(), (rng.generator(0), rng.generator(0))
    larger = LabelledImages(F.interpolate(data.images, size=(size, size)), data.labels)
    options = replace(Inversion.warp(), precision="fp32", steps=1)
    still, moved = (
        invert(Shifted(), larger, replace(options, learning_rate=rate), 2, generator=generator).pattern
        for rate, generator in zip((1e-9, 0.1), generators, strict=True)
    )
    # Adam's first step is as long wherever there is a gradient; an eighth of the side is the unit.
    assert float((moved - still).abs().max()) == pytest.approx(0.1 * size / 8, rel=1e-3)


def test_nothing_counts_as_more_than_a_class_without_a_trigger() -> None:
    mask, pattern = torch.ones(1, 6, 6), torch.zeros(2, 6, 6)
    triggers = [
        InvertedTrigger(k, mask, pattern, norm, 1.0, reached, 1, form="warp")
        for k, (norm, reached) in enumerate([(1.0, True), (7.0, True), (2.0, False)])
    ]
    assert norms_of(triggers, unreached=4.0) == [1.0, 4.0, 4.0]
    assert norms_of(triggers) == pytest.approx([1.0, 7.0, math.nan], nan_ok=True)


def test_early_stopping_forgets_what_happened_before_lambda_was_set() -> None:
    # Five bad rounds at lambda 0, then only good ones: lambda never went down, so nothing is settled.
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(CLASSES))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            bonus = 9.0 if self.calls > 6 else -9.0
            return (
                self.logits + bonus * F.one_hot(torch.tensor(0), CLASSES) + 0 * x.sum((1, 2, 3)).view(-1, 1)
            )

    options = replace(
        QUICK,
        steps=60,
        round_steps=1,
        start="zero",
        patience=3,
        early_stop_patience=2,
        early_stop_factor=1e-9,
    )
    trigger = invert(Late(), blocks(), options, 0, generator=rng.generator(0))
    assert trigger.steps == 60


def test_a_trigger_is_what_its_fields_say() -> None:
    data = blocks()
    trigger = invert(Blocks(), data, QUICK, 2, generator=rng.generator(0))
    assert trigger.mask.shape == (1, 6, 6)
    assert trigger.pattern.shape == (3, 6, 6)
    for tensor in (trigger.mask, trigger.pattern):
        assert float(tensor.min()) >= 0
        assert float(tensor.max()) <= 1
    assert trigger.norm == pytest.approx(float(trigger.mask.sum()))
    stamped = trigger(data.images)
    torch.testing.assert_close(stamped, data.images + trigger.mask * (trigger.pattern - data.images))
    others = data.labels != 2
    rate = float((Blocks()(stamped[others]).argmax(1) == 2).float().mean())
    assert trigger.success == pytest.approx(rate)
    assert trigger.steps == len(trigger.history) * QUICK.round_steps
    json.dumps([trigger.describe(), *trigger.history])


def test_the_first_loss_is_that_of_the_formula() -> None:
    data = blocks(10)
    options = replace(QUICK, steps=1, round_steps=1, init="ones")
    trigger = invert(Blocks(), data, options, 1, generator=rng.generator(0))
    opened = (math.tanh(1.0) + 1) / 2
    others = data.labels != 1
    stamped = (1 - opened) * data.images[others] + opened**2
    expected = F.cross_entropy(Blocks()(stamped), torch.ones(8, dtype=torch.int64))
    assert trigger.history[0]["loss"] == pytest.approx(float(expected.detach()), abs=1e-4)


@pytest.mark.parametrize(
    ("start", "target", "expected"),
    [
        ("lambda0", 0, [1, 1, 2, 2, 4]),
        ("zero", 0, [0, 0, 1, 1, 2]),
        ("lambda0", 1, [1, 1, 2**-1.5, 2**-1.5, 2**-3]),
        ("zero", 1, [0, 0, 0, 0, 0]),
    ],
)
def test_lambda_follows_the_schedule(
    start: Literal["lambda0", "zero"], target: int, expected: list[float]
) -> None:
    options = replace(QUICK, steps=5, round_steps=1, start=start, lambda0=1.0)
    trigger = invert(Constant([9.0, 0, 0, 0, 0]), blocks(), options, target, generator=rng.generator(0))
    assert [row["lambda"] for row in trigger.history] == pytest.approx(expected)
    assert trigger.reached == (target == 0)


def test_classes_do_not_see_one_another() -> None:
    options = replace(QUICK, steps=20)
    together = invert_blocks(options)
    in_turn = invert_blocks(replace(options, together=1))
    for one, other in zip(together, in_turn, strict=True):
        torch.testing.assert_close(one.mask, other.mask, atol=1e-3, rtol=0)


def test_runs_stop_early_and_stay_within_the_budget() -> None:
    eager = replace(QUICK, steps=400, early_stop_patience=3)
    with metered() as cost:
        triggers = invert_blocks(eager)
    assert min(trigger.steps for trigger in triggers) < 400
    drawn = sum(trigger.steps for trigger in triggers) * 32
    assert drawn <= cost.backward_images + 1 == drawn + 1
    assert cost.forward_images <= drawn + CLASSES * 6 * 32 + 2


def test_what_cannot_be_reached_is_marked() -> None:
    triggers = invert_all(
        Constant([9.0, 0, 0, 0, 0]), blocks(), QUICK, classes=(1,), generator=rng.generator(0)
    )
    assert not triggers[0].reached
    assert triggers[0].success == 0
    alone = blocks().subset(blocks().labels == 2)
    nothing = invert(Blocks(), alone, QUICK, 2, generator=rng.generator(0))
    assert not nothing.reached
    assert nothing.steps == 0
    assert math.isnan(nothing.success)
    assert nothing.describe()["success"] is None


def test_a_planted_patch_needs_few_pixels() -> None:
    planted = planted_backdoor(target_class=3)
    clean = planted.clean_data(48, rng.generator(0))
    trigger = invert(planted.model, clean, replace(QUICK, batch_size=16), 3, generator=rng.generator(0))
    assert trigger.reached
    assert trigger.norm < 9


def test_model_and_global_randomness_are_left_alone() -> None:
    model = awkward_model()
    before = Snapshot.of(model)
    with global_randomness_untouched():
        invert_all(model, small_data(), replace(QUICK, steps=3), generator=rng.generator(0))
    before.check(model)


def test_weights_that_are_not_finite_end_in_unreached() -> None:
    model = Blocks()
    model.strength.data.fill_(math.nan)
    triggers = invert_all(model, blocks(), QUICK, generator=rng.generator(0))
    assert not any(trigger.reached for trigger in triggers[1:])
    assert all(bool(trigger.mask.isfinite().all()) for trigger in triggers)


def test_anomaly_indices_by_hand() -> None:
    # Median 32, deviations 22 2 0 2 4, MAD 2.
    assert anomaly_indices([10, 30, 32, 34, 36]) == pytest.approx(
        [22 / 2.9652, 2 / 2.9652, 0, -2 / 2.9652, -4 / 2.9652]
    )
    # Even count: the median lies between the middle two, 3.5, and MAD is 1.5.
    assert anomaly_indices([1, 2, 3, 4, 5, 6])[0] == pytest.approx(2.5 / (1.4826 * 1.5))


def test_anomaly_indices_are_guarded() -> None:
    # MAD 0: the mean absolute deviation is 0.8.
    assert anomaly_indices([1, 5, 5, 5, 5]) == pytest.approx([4 / (1.2533 * 0.8), 0, 0, 0, 0])
    assert anomaly_indices([7.0] * 6) == [0.0] * 6
    assert all(math.isnan(index) for index in anomaly_indices([1, 50, 50, 50]))
    assert anomaly_indices([]) == []
    invalid = anomaly_indices([10, 30, math.nan, 32, 34, 36])
    assert math.isnan(invalid[2])
    assert invalid[0] == pytest.approx(22 / 2.9652)
    assert anomaly_indices([1, 2, 9], fewest=3)[0] == pytest.approx(1 / 1.4826)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"together": 0},
        {"learning_rate": 0.0},
        {"multiplier": 1.0},
        {"success": 1.5},
        {"early_stop_factor": 0.0},
        {"init": "zeros"},
        {"start": "late"},
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        Inversion(**options)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="class 5 is no output"):
        invert(Blocks(), blocks(), QUICK, 5, generator=rng.generator(0))
    with pytest.raises(InvalidInputError, match="at least 2"):
        invert_all(Blocks(), blocks().subset(torch.tensor([0])), QUICK, generator=rng.generator(0))


def test_the_authors_settings() -> None:
    paper = Inversion.paper()
    assert (paper.steps // paper.round_steps, paper.patience, paper.start) == (1000, 5, "zero")
    assert (paper.learning_rate, paper.betas, paper.multiplier) == (0.1, (0.5, 0.9), 2.0)
