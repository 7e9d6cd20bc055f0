"""How much smaller the smallest trigger of a model is than what its other classes need."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.compute import check_fits
from unbackdoor.detect.calibration import Calibration, threshold_from
from unbackdoor.detect.trigger_search import FEWEST_IMAGES, held_apart, smallest_classes, success_on
from unbackdoor.errors import InvalidInputError
from unbackdoor.forms import NORMS, largest_norm
from unbackdoor.inversion import Inversion, InvertedTrigger, invert_all
from unbackdoor.rates import Rate
from unbackdoor.types import Detection, LabelledImages, Progress

SMALLEST_NORM = 0.01
"""Keeps the logarithm finite for a class that needs no trigger."""


@dataclass(frozen=True, eq=False)
class Smallest:
    """What an inversion of all classes found.

    Args:
        triggers: One a class.
        suspect: That of the class that needs least.
        held_out: Its success on images that it was not made from.
        images: How many it was made from.
        shape: ``(C, H, W)`` of these.
    """

    triggers: Sequence[InvertedTrigger]
    suspect: InvertedTrigger
    held_out: Rate
    images: int
    shape: tuple[int, int, int]

    @property
    def largest(self) -> float:
        """The norm that a class counts as for which no trigger works."""
        return largest_norm(self.suspect.form, *self.shape)


def needed(trigger: InvertedTrigger, asked: float, largest: float, *, partial: bool) -> float:
    """Return the norm that a class counts as needing.

    That of its trigger if it reached what was asked for. Else ``largest``; or, if ``partial`` and at least
    half of the asked-for success was reached, the norm divided by the reached share of it.

    Args:
        trigger: Of the class.
        asked: Share of the images that it should send there, in (0, 1].
        largest: See ``largest_norm``; nothing counts as more.
        partial: Whether a trigger that falls short counts.
    """
    if trigger.reached:
        return min(trigger.norm, largest)
    # NaN, which a class without images of others has, fails the comparison.
    if partial and trigger.success >= asked / 2:
        return min(trigger.norm * asked / trigger.success, largest)
    return largest


def find_smallest(
    model: nn.Module,
    clean: LabelledImages,
    inversion: Inversion,
    *,
    held_out_fraction: float,
    partial: bool,
    purpose: str,
    generator: torch.Generator,
    progress: Progress,
) -> Smallest:
    """Invert a trigger of every class.

    Args:
        model: Takes float images in [0, 1]; left untouched.
        clean: Clean images with labels; a few hundred.
        inversion: How.
        held_out_fraction: Share of the images on which success is measured, in [0, 1).
        partial: See ``needed``.
        purpose: What the images are for, in an error.
        generator: All randomness follows it; on the CPU.
        progress: Called after each round.

    Raises:
        InvalidInputError: If there are fewer than two images, or a class or label has no output.
        UnsupportedModelError: If the model cannot be run on the images.
    """
    check_fits(model, clean, purpose=purpose, at_least=2)
    learning, held_out = held_apart(clean, held_out_fraction, rng.spawn(generator))
    found = invert_all(model, learning, inversion, generator=rng.spawn(generator), progress=progress)
    channels, height, width = clean.images.shape[1:]
    largest = largest_norm(inversion.form, channels, height, width)
    by_class = {trigger.target_class: trigger for trigger in found}
    # Where none works at all, the one that came nearest.
    nearest = [by_class[k] for k in smallest_classes(found, len(found))]
    suspect = min(nearest, key=lambda each: needed(each, inversion.success, largest, partial=partial))
    rate = success_on(model, suspect, held_out)
    return Smallest(found, suspect, rate, len(learning), (channels, height, width))


def judge_smallest(
    found: Smallest,
    *,
    fewest_classes: int,
    threshold: float,
    calibration: Calibration | None,
    alpha: float,
    asked: float,
    partial: bool,
    further: Mapping[str, Any],
) -> Detection:
    """Score the logarithm of what the median class needs divided by what the suspect does.

    Args:
        found: From ``find_smallest``.
        fewest_classes: With fewer classes the score is relative to the largest norm.
        threshold: Used without a calibration.
        calibration: Scores of clean models, or None.
        alpha: False-positive rate of a calibrated threshold.
        asked: Share of the images that a trigger should send to its class.
        partial: See ``needed``. Then a model without any trigger that works has a score as well.
        further: Evidence beside what is here.
    """
    limit, source = threshold_from(calibration, alpha, fixed=threshold)
    suspect, largest = found.suspect, found.largest
    relative = len(found.triggers) >= fewest_classes
    least = needed(suspect, asked, largest, partial=partial)
    norms = [needed(trigger, asked, largest, partial=partial) for trigger in found.triggers]
    reference = statistics.median(norms) if relative else largest
    measure = NORMS[suspect.form]
    evidence = {
        measure: [trigger.norm if trigger.reached else None for trigger in found.triggers],
        f"reference_{measure}": reference,
        "reference": "median over the classes" if relative else "the largest possible change",
        **further,
        "suspect": suspect.describe(),
        "held_out_success": found.held_out.describe(),
    }
    problem = ""
    if found.images < FEWEST_IMAGES:
        problem = (
            f"a trigger that works on {found.images} images proves nothing; give at least {FEWEST_IMAGES}"
        )
    elif not suspect.reached and not partial:
        problem = f"no class has a trigger that works within {suspect.steps} steps; raise inversion.steps"
    if problem:
        return Detection(math.nan, limit, source, undetermined=problem, evidence=evidence)
    score = math.log(reference / max(least, SMALLEST_NORM))
    return Detection(
        score=score,
        threshold=limit,
        threshold_source=source,
        p_value=None if calibration is None else calibration.p_value(score),
        target_class=suspect.target_class if least < largest else None,
        evidence=evidence,
    )


def check_options(inversion: Inversion, form: str, fewest_classes: int, held_out_fraction: float) -> None:
    """Refuse options of a detector that rests on ``find_smallest``.

    Raises:
        InvalidInputError: If the inversion is of another form, or a number is out of range.
    """
    if inversion.form != form:
        raise InvalidInputError(
            f"this detector inverts triggers of one form; set inversion.form to {form!r}, got "
            f"{inversion.form!r}."
        )
    if fewest_classes < 3 or not 0 <= held_out_fraction < 1:
        raise InvalidInputError(
            f"this detector needs fewest_classes >= 3 and held_out_fraction in [0, 1), got {fewest_classes} "
            f"and {held_out_fraction}."
        )
