"""The rule, on made evidence."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from unbackdoor.detect.calibration import CalibrationSet, Kind, Origin, ScoredModel
from unbackdoor.detect.evidence import Evidence
from unbackdoor.detect.joint import combine
from unbackdoor.detect.verdict import Judgement, Verdict, confidence_of, limits_of
from unbackdoor.types import Detection, LabelledImages

IMAGES = LabelledImages(torch.zeros(40, 3, 4, 4), torch.arange(40) % 4, ("cat", "dog", "hen", "cow"))
CLEAN = [{"collapse": 0.01 * i, "trigger_search": 0.02 * ((7 * i) % 19)} for i in range(19)]


def evidence(name: str, score: float, *, target: int | None = 1, undetermined: str = "") -> Evidence:
    found: dict[str, object] = {"pattern": "all-to-all, class + 1"}
    if name == "trigger_search":
        found = {
            "refined": [{"l1_pixels": 3.0, "image_fraction": 0.03}],
            "reference": "median over the classes",
        }
    detection = Detection(
        math.nan if undetermined else score, 0.5, "a guess", None, target, undetermined, evidence=found
    )
    return Evidence(name, name, name, "us", detection, decides=True, seconds=1.0)


def judge(
    collapse: Evidence | None,
    search: Evidence | None,
    *,
    models: int = 19,
    clean: list[dict[str, float]] = CLEAN,
    alpha: float = 0.05,
    images: LabelledImages = IMAGES,
    calibrated: tuple[str, ...] = ("collapse", "trigger_search"),
) -> tuple[Verdict, str, Evidence | None]:
    there = tuple(each for each in (collapse, search) if each is not None)
    usable = {
        e.name: -math.inf if e.detection.undetermined else e.detection.score
        for e in there
        if e.name in calibrated
    }
    joint = combine(clean[:models], usable, alpha) if usable and models else None
    judgement = Judgement(there, joint, images, 4, alpha, 5.0)
    verdict, reason = judgement.verdict()
    return verdict, reason, judgement.suspect(verdict)


LOW, HIGH = evidence("collapse", 0.05), evidence("collapse", 0.9)
SMALL, NONE = evidence("trigger_search", 2.0, target=2), evidence("trigger_search", 0.1, target=2)


def test_neither_kind_flags_a_clean_model() -> None:
    verdict, reason, suspect = judge(LOW, NONE)
    assert (verdict, suspect) == ("clean", None)
    assert reason.startswith("no evidence of a backdoor: errors of the suppressed model concentrate on 'dog'")


@pytest.mark.parametrize(("collapse", "search", "target"), [(HIGH, NONE, 1), (LOW, SMALL, 2)])
def test_either_kind_flags_an_infected_one(collapse: Evidence, search: Evidence, target: int) -> None:
    verdict, reason, suspect = judge(collapse, search)
    assert verdict == "backdoored"
    assert suspect is not None
    assert suspect.detection.target_class == target
    assert "0 of 19 clean models go as far, p = 0.050" in reason


@pytest.mark.parametrize(
    ("collapse", "search", "why"),
    [
        (LOW, None, "trigger inversion was left out"),
        (evidence("collapse", 0, undetermined="too steep"), NONE, "could not tell (too steep)"),
        (LOW, evidence("trigger_search", 0, undetermined="no trigger"), "could not tell (no trigger)"),
    ],
)
def test_one_kind_alone_never_says_clean(collapse: Evidence, search: Evidence | None, why: str) -> None:
    verdict, reason, suspect = judge(collapse, search)
    assert (verdict, suspect) == ("inconclusive", None)
    assert why in reason


def test_nothing_measured_is_inconclusive() -> None:
    mute = [evidence(name, 0, undetermined="too steep") for name in ("collapse", "trigger_search")]
    verdict, reason, suspect = judge(*mute, alpha=0.5)
    assert (verdict, suspect) == ("inconclusive", None)
    assert reason.endswith("nothing was measured")


def test_one_kind_alone_may_say_backdoored() -> None:
    assert judge(HIGH, None)[0] == "backdoored"


def test_what_has_no_clean_models_to_compare_with_points_somewhere() -> None:
    verdict, reason, suspect = judge(LOW, SMALL, calibrated=("collapse",))
    assert verdict == "inconclusive"
    assert "there are no clean models to compare trigger inversion with" in reason
    assert suspect is SMALL


def test_close_to_the_threshold_is_inconclusive() -> None:
    # One clean model of nineteen goes further: p = 0.1.
    odd = [{"collapse": 9.0, "trigger_search": 0.0}, *CLEAN[1:]]
    verdict, reason, suspect = judge(HIGH, NONE, clean=odd)
    assert verdict == "inconclusive"
    assert reason.startswith("the model is close to the threshold")
    assert suspect is not None


def test_too_few_clean_models_are_said() -> None:
    verdict, reason, suspect = judge(HIGH, SMALL, models=9)
    assert verdict == "inconclusive"
    assert reason.startswith("9 clean models cannot guarantee a false-positive rate of 0.05, at best 1 / 10")
    assert suspect is not None
    assert judge(HIGH, SMALL, models=9, alpha=0.1)[0] == "backdoored"


def test_no_clean_models_at_all() -> None:
    verdict, reason, suspect = judge(HIGH, NONE, models=0)
    assert verdict == "inconclusive"
    assert reason.startswith("there are no clean models to compare with")
    assert suspect is HIGH
    mute = evidence("collapse", 0, undetermined="two classes")
    assert judge(mute, None, models=0)[1] == "the scan cannot tell: two classes"


def test_few_images_come_first() -> None:
    verdict, reason, _ = judge(HIGH, SMALL, images=IMAGES.subset(torch.arange(19)))
    assert (verdict, reason) == (
        "inconclusive",
        "19 images are too few for a verdict: 1 of the model's 4 classes have fewer than 5, such as 'cow' "
        "with 4; give at least 5 of each, and --clean-count 20 or more",
    )


def test_each_class_of_the_model_needs_images() -> None:
    # Forty images, ten a class on average, and none of the last two classes.
    two = LabelledImages(IMAGES.images, torch.arange(40) % 2, IMAGES.class_names)
    verdict, reason, _ = judge(LOW, NONE, images=two)
    assert verdict == "inconclusive"
    assert "2 of the model's 4 classes have fewer than 5, such as 'hen' with 0; give at least 5" in reason


def calibration(origin: Origin) -> CalibrationSet:
    return CalibrationSet(
        description="d",
        origin=origin,
        kind=Kind(architecture="n", parameters=1, num_classes=4, image_shape=(3, 4, 4)),
        images=40,
        options={"collapse": {}},
        models=tuple(ScoredModel(name=str(i), scores={"collapse": 0.1}) for i in range(19)),
    )


def test_the_confidence_says_what_is_guaranteed() -> None:
    joint = combine(CLEAN, {"collapse": 0.9}, 0.05)
    found = confidence_of(calibration("models"), joint, 0.05)
    assert (
        found.guarantee == "Of clean models exchangeable with these 19, at most 5.0% are called backdoored."
    )
    assert (found.p_value, found.models, found.smallest_rate) == (0.05, 19, 0.05)
    assert (
        "only as far as such models score alike"
        in confidence_of(calibration("surrogates"), joint, 0.05).guarantee
    )
    shipped = confidence_of(calibration("shipped"), joint, 0.05).guarantee
    assert shipped.endswith("This does not hold for models of other data than theirs.")
    few = confidence_of(calibration("models"), replace(joint, n=9), 0.05)
    assert few.guarantee.startswith("The rate asked for is not guaranteed: 9 clean models")
    assert confidence_of(None, None, 0.05).origin == "none"


def test_the_limits_follow_what_was_done() -> None:
    whole, fast = limits_of(images=123, fast=False), limits_of(images=123, fast=True)
    assert any("saw 123 clean images" in limit for limit in whole)
    assert [limit for limit in fast if limit not in whole] == [fast[1]]
    assert "--fast" in fast[1]
