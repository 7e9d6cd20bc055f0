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
from unbackdoor.detect import PerturbationSearch, TriggerSearch, UnlearntTrigger
from unbackdoor.detect.smallest import Smallest
from unbackdoor.errors import InvalidInputError
from unbackdoor.inversion import Inversion, InvertedTrigger
from unbackdoor.rates import Rate

WEAVE = (-1.0) ** torch.arange(64).view(8, 8)


class Woven(SixBlocks):
    """A weave over the whole image gives class 4 away."""

    def hint(self, x: Tensor) -> Tensor:
        return 10 * ((x.mean(1) * WEAVE).sum((1, 2)) - 2)


QUICK = PerturbationSearch(replace(Inversion.additive(), learning_rate=0.01, precision="fp32"))


def trigger(target: int, norm: float, *, reached: bool = True) -> InvertedTrigger:
    ones, change = torch.ones(1, 10, 10), torch.zeros(4, 10, 10)
    return InvertedTrigger(target, ones, change, norm, 1.0, reached, 10, form="additive")


def judged(norms: list[float | None], method: PerturbationSearch = QUICK, count: int = 100) -> Any:  # noqa: ANN401
    found = [trigger(k, 9.0 if n is None else n, reached=n is not None) for k, n in enumerate(norms)]
    smallest = min(found, key=lambda each: (not each.reached, each.norm))
    return method.judge(Smallest(found, smallest, Rate(9, 10), count, (4, 10, 10)))


def test_a_faint_trigger_is_found_and_a_clean_model_scores_low() -> None:
    guilty = QUICK.score(Woven(backdoor=True), six_blocks(8), generator=rng.generator(0))
    clean = QUICK.score(Woven(backdoor=False), six_blocks(8), generator=rng.generator(0))
    assert guilty.target_class == 4
    assert guilty.score > clean.score + 0.5
    assert guilty.evidence["held_out_success"]["value"] > 0.8
    json.dumps(dict(guilty.evidence), allow_nan=False)


def test_the_score_is_the_logarithm_of_an_effect_size() -> None:
    detection = judged([2.0, 4.0, 0.5, 5.0, 6.0])
    assert detection.score == pytest.approx(math.log(4 / 0.5))
    assert detection.target_class == 2
    # An l2 norm of 0.5 over 400 entries is a root mean square of 0.025.
    assert detection.evidence["grey_levels"] == pytest.approx(255 * 0.025)


def test_classes_without_a_change_count_as_the_largest_one() -> None:
    detection = judged([1.0, None, None, None, 6.0])
    assert detection.score == pytest.approx(math.log(20 / 1.0))
    assert detection.evidence["l2"] == [1.0, None, None, None, 6.0]


def test_few_classes_are_measured_by_the_largest_change() -> None:
    assert judged([1.0, 2.0]).score == pytest.approx(math.log(20))


def test_it_abstains_where_nothing_can_be_said() -> None:
    assert "give at least 8" in judged([1.0, 2.0, 3.0, 4.0, 5.0], count=7).undetermined
    assert "raise inversion.steps" in judged([None] * 5).undetermined


def test_forms_are_not_mixed() -> None:
    with pytest.raises(InvalidInputError, match=r"set inversion\.form to 'additive'"):
        PerturbationSearch(Inversion())
    with pytest.raises(InvalidInputError, match="use perturbation-search"):
        TriggerSearch(second=Inversion.additive())
    with pytest.raises(InvalidInputError, match=r"set inversion\.form to 'patch'"):
        UnlearntTrigger(inversion=Inversion.additive())
    with pytest.raises(InvalidInputError, match="fewest_classes >= 3"):
        PerturbationSearch(fewest_classes=2)
    with pytest.raises(InvalidInputError, match="form must be one of"):
        Inversion(form="mask")  # type: ignore[arg-type]
