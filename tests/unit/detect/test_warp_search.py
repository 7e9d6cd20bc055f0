from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blocks import SixBlocks, six_blocks
from unbackdoor import rng
from unbackdoor.detect import WarpSearch
from unbackdoor.detect.smallest import Smallest, find_smallest, needed
from unbackdoor.errors import InvalidInputError
from unbackdoor.inversion import Inversion, InvertedTrigger
from unbackdoor.rates import Rate
from unbackdoor.types import LabelledImages, silent

QUICK = WarpSearch(replace(Inversion.warp(), precision="fp32", control_points=3, steps=60))


class Shifted(SixBlocks):
    """A dark right edge gives class 4 away."""

    def hint(self, x: Tensor) -> Tensor:
        return 200 * (0.7 - x[..., -1].mean((1, 2))).clamp_min(0)


def images() -> LabelledImages:
    data = six_blocks(16)
    pictures = data.images.clone()
    pictures[..., -1], pictures[..., -2] = 0.9, 0.0
    return LabelledImages(pictures, data.labels)


def trigger(target: int, norm: float, success: float) -> InvertedTrigger:
    field = torch.zeros(2, 6, 6)
    return InvertedTrigger(
        target, torch.ones(1, 32, 32), field, norm, success, success >= 0.9, 10, form="warp"
    )


def judged(norms: list[float], successes: list[float], count: int = 100) -> Any:  # noqa: ANN401
    found = [trigger(k, norm, rate) for k, (norm, rate) in enumerate(zip(norms, successes, strict=True))]
    suspect = min(found, key=lambda each: needed(WarpSearch(), each, 4.0))
    return WarpSearch().judge(Smallest(found, suspect, Rate(9, 10), count, (3, 32, 32)))


def test_a_warp_is_found_and_a_clean_model_scores_low() -> None:
    guilty = QUICK.score(Shifted(backdoor=True), images(), generator=rng.generator(0))
    clean = QUICK.score(Shifted(backdoor=False), images(), generator=rng.generator(0))
    assert guilty.target_class == 4
    assert guilty.score > clean.score + 0.5
    assert guilty.evidence["held_out_success"]["value"] > 0.8
    json.dumps(dict(guilty.evidence), allow_nan=False)


def test_the_score_compares_the_suspect_with_the_median_class() -> None:
    detection = judged([2.0, 0.5, 3.0, 2.5, 2.0], [0.95, 0.92, 0.9, 0.95, 0.91])
    assert detection.score == pytest.approx(math.log(2.0 / 0.5))
    assert detection.target_class == 1
    assert detection.evidence["rms_shift_pixels"] == [2.0, 0.5, 3.0, 2.5, 2.0]


def test_a_class_that_falls_short_counts_as_more() -> None:
    # Half of the asked-for success at a shift of 1.5 pixels counts as 3; less than half as the largest, 4.
    detection = judged([1.5, 1.0, 1.0, 1.0, 1.0], [0.45, 0.4, 0.1, math.nan, 0.0])
    assert detection.score == pytest.approx(math.log(4.0 / 3.0))
    assert detection.target_class == 0
    assert detection.evidence["rms_shift_pixels"] == [None] * 5


def test_a_model_that_no_warp_works_on_scores_zero() -> None:
    detection = judged([1.0] * 5, [0.1] * 5)
    assert not detection.undetermined
    assert detection.score == 0
    assert detection.target_class is None


def test_the_classes_that_need_least_are_inverted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = [(1.5, 0.95), (2.0, 0.95), (2.5, 0.95), (3.0, 0.95), (1.0, 0.2), (1.0, 0.1)]
    # Of class 1 both further starts are better, the second by more; of class 0 one is worse, and one fails.
    further = {0: [(1.9, 0.95), (0.1, 0.0)], 1: [(1.2, 0.95), (0.8, 0.95)]}
    asked: list[Any] = []

    def invert(*_: Any, classes: Any = None, **__: Any) -> tuple[InvertedTrigger, ...]:  # noqa: ANN401
        asked.append(classes)
        if classes is None:
            return tuple(trigger(k, norm, rate) for k, (norm, rate) in enumerate(first))
        return tuple(trigger(k, *further[k].pop(0)) for k in classes)

    monkeypatch.setattr("unbackdoor.detect.smallest.invert_all", invert)
    search, model = WarpSearch(refined=2, restarts=2), Shifted(backdoor=False)
    found = find_smallest(search, model, images(), generator=rng.generator(0), progress=silent)
    assert asked == [None, [0, 0, 1, 1]]
    assert [each.norm for each in found.triggers] == [1.5, 0.8, 2.5, 3.0, 1.0, 1.0]
    assert found.suspect.target_class == 1


def test_it_abstains_with_few_images() -> None:
    assert "give at least 8" in judged([1.0] * 5, [0.95] * 5, count=7).undetermined


def test_only_warps_are_taken() -> None:
    with pytest.raises(InvalidInputError, match=r"set inversion\.form to 'warp'"):
        WarpSearch(Inversion())
    with pytest.raises(InvalidInputError, match="control_points >= 2"):
        replace(Inversion.warp(), control_points=1)
