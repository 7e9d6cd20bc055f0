from __future__ import annotations

import json
import math

import pytest
import torch

from unbackdoor import rng
from unbackdoor.detect.trigger_search import (
    FoundTriggers,
    RecoveredTrigger,
    TriggerSearch,
    smallest_classes,
    success_on,
)
from unbackdoor.errors import InvalidInputError
from unbackdoor.inversion import Inversion, InvertedTrigger
from unbackdoor.rates import Rate
from unbackdoor.testing import planted_backdoor
from unbackdoor.types import LabelledImages

QUICK = TriggerSearch(
    first=Inversion(steps=60, batch_size=8, success=0.95),
    second=Inversion(steps=60, batch_size=16, success=0.95),
    refined=2,
)


def trigger(target: int, l1: float, *, reached: bool = True, success: float = 1.0) -> InvertedTrigger:
    return InvertedTrigger(target, torch.zeros(1, 10, 10), torch.zeros(3, 10, 10), l1, success, reached, 10)


def found(norms: list[float | None], refined: list[float | None], images: int = 100) -> FoundTriggers:
    def made(values: list[float | None]) -> list[InvertedTrigger]:
        return [trigger(k, 50.0 if v is None else v, reached=v is not None) for k, v in enumerate(values)]

    return FoundTriggers(
        tuple(made(norms)), tuple(RecoveredTrigger(t, Rate(9, 10)) for t in made(refined)), images
    )


def test_the_score_is_the_logarithm_of_an_effect_size() -> None:
    detection = TriggerSearch().judge(found([20.0, 40.0, 30.0, 50.0, 60.0], [10.0, 35.0]))
    assert detection.score == pytest.approx(math.log(40 / 10))
    assert detection.target_class == 0
    assert detection.evidence["refined"][0]["image_fraction"] == pytest.approx(0.1)
    json.dumps(dict(detection.evidence), allow_nan=False)


def test_classes_without_a_trigger_count_as_the_whole_image() -> None:
    detection = TriggerSearch().judge(found([10.0, None, None, None, 60.0], [10.0]))
    assert detection.score == pytest.approx(math.log(100 / 10))
    assert detection.evidence["l1_pixels"] == [10.0, None, None, None, 60.0]


def test_few_classes_are_measured_by_the_image() -> None:
    detection = TriggerSearch().judge(found([5.0, 20.0], [4.0]))
    assert detection.score == pytest.approx(math.log(100 / 4))
    assert detection.evidence["reference"] == "the whole image"


def test_it_abstains_where_nothing_works_or_anything_would() -> None:
    assert (
        "no class has a trigger that works" in TriggerSearch().judge(found([None] * 5, [None])).undetermined
    )
    assert "proves nothing" in TriggerSearch().judge(found([5.0] * 5, [4.0], images=7)).undetermined
    # A class that needs no trigger at all keeps the score finite.
    assert math.isfinite(TriggerSearch().judge(found([5.0] * 5, [0.0])).score)


def test_the_smallest_triggers_that_work_go_on() -> None:
    triggers = [
        trigger(0, 30.0),
        trigger(1, 5.0, reached=False, success=0.5),
        trigger(2, 20.0),
        trigger(3, 4.0, reached=False, success=0.9),
        trigger(4, 9.0, reached=False, success=math.nan),
    ]
    assert smallest_classes(triggers, 4) == [2, 0, 3, 1]


def test_a_planted_patch_is_found_with_its_target_and_measured_on_unseen_images() -> None:
    planted = planted_backdoor(target_class=3)
    clean = planted.clean_data(120, rng.generator(1))
    triggers = QUICK.search(planted.model, clean, also=(5,), generator=rng.generator(0))
    detection = QUICK.judge(triggers)
    assert detection.target_class == 3
    assert detection.is_backdoored
    assert triggers.images == 96
    recovered = triggers.of(3)
    assert recovered is not None
    assert recovered.held_out.n == 21  # a fifth of 120, less those of the target class
    assert recovered.held_out.value >= 0.9
    assert recovered.image_fraction < 0.15
    assert [each.target_class for each in triggers.refined[2:]] == [5]
    assert triggers.of(None) is None


def test_success_needs_images_of_other_classes() -> None:
    planted = planted_backdoor(target_class=3)
    alone = LabelledImages(torch.zeros(3, 3, 16, 16), torch.full((3,), 2))
    flat = InvertedTrigger(2, torch.zeros(1, 16, 16), torch.zeros(3, 16, 16), 0.0, 1.0, True, 1)
    assert success_on(planted.model, flat, alone) == Rate(0, 0)


@pytest.mark.parametrize("options", [{"refined": 0}, {"fewest_classes": 2}, {"held_out_fraction": 1.0}])
def test_impossible_options(options: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match="a trigger search needs"):
        TriggerSearch(**options)  # type: ignore[arg-type]
