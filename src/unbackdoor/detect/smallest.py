"""How much smaller the smallest trigger of a model is than what its other classes need."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.compute import check_fits
from unbackdoor.detect.calibration import Calibration, threshold_from
from unbackdoor.detect.trigger_search import FEWEST_IMAGES, held_apart, smallest_classes, success_on
from unbackdoor.errors import InvalidInputError
from unbackdoor.forms import NORMS, Form, largest_norm
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


class Search(Protocol):
    """What the detectors that rest on the smallest trigger have in common: their options, and what they ask.

    ``partial`` says whether a trigger that falls short of the asked-for success counts, see ``needed``.
    """

    form: ClassVar[Form]
    partial: ClassVar[bool]

    @property
    def refined(self) -> int:
        """How many classes, from the one that needs least, are inverted again; at least 0."""

    @property
    def restarts(self) -> int:
        """How often each; at least 0."""

    @property
    def inversion(self) -> Inversion:
        """Of every class."""

    @property
    def held_out_fraction(self) -> float:
        """Share of the images on which success is measured, in [0, 1)."""

    @property
    def fewest_classes(self) -> int:
        """With fewer classes the score is relative to the largest norm."""

    @property
    def threshold(self) -> float:
        """Used without a calibration."""

    @property
    def calibration(self) -> Calibration | None:
        """Scores of clean models, or None."""

    @property
    def alpha(self) -> float:
        """False-positive rate of a calibrated threshold."""


def check_options(search: Search) -> None:
    """Refuse what cannot be searched for.

    Raises:
        InvalidInputError: If the inversion is of another form, or a number is out of range.
    """
    if search.inversion.form != search.form:
        raise InvalidInputError(
            f"this detector inverts triggers of one form; set inversion.form to {search.form!r}, got "
            f"{search.inversion.form!r}."
        )
    if search.fewest_classes < 3 or not 0 <= search.held_out_fraction < 1:
        raise InvalidInputError(
            "this detector needs fewest_classes >= 3 and held_out_fraction in [0, 1), got "
            f"{search.fewest_classes} and {search.held_out_fraction}."
        )
    if min(search.refined, search.restarts) < 0:
        raise InvalidInputError(
            f"refined and restarts must be at least 0, got {search.refined} and {search.restarts}."
        )


def needed(search: Search, trigger: InvertedTrigger, largest: float) -> float:
    """Return the norm that a class counts as needing.

    That of its trigger if it reached what was asked for. Else ``largest``; or, if the search is ``partial``
    and at least half of the asked-for success was reached, the norm divided by the reached share of it.

    Args:
        search: What was asked for.
        trigger: Of the class.
        largest: See ``largest_norm``; nothing counts as more.
    """
    if trigger.reached:
        return min(trigger.norm, largest)
    asked = search.inversion.success
    # NaN, which a class without images of others has, fails the comparison.
    if search.partial and trigger.success >= asked / 2:
        return min(trigger.norm * asked / trigger.success, largest)
    return largest


def find_smallest(
    search: Search,
    model: nn.Module,
    clean: LabelledImages,
    *,
    generator: torch.Generator,
    progress: Progress,
) -> Smallest:
    """Invert a trigger of every class, and those of the classes that need least from further starts.

    Args:
        search: How.
        model: Takes float images in [0, 1]; left untouched.
        clean: Clean images with labels; a few hundred.
        generator: All randomness follows it; on the CPU.
        progress: Called after each round.

    Raises:
        InvalidInputError: If there are fewer than two images, or a class or label has no output.
        UnsupportedModelError: If the model cannot be run on the images.
    """
    check_fits(model, clean, purpose="a search for triggers", at_least=2)
    learning, held_out = held_apart(clean, search.held_out_fraction, rng.spawn(generator))
    found = invert_all(model, learning, search.inversion, generator=rng.spawn(generator), progress=progress)
    channels, height, width = clean.images.shape[1:]
    largest = largest_norm(search.form, channels, height, width)
    # One start may miss the small trigger that a class has.
    ranked = sorted(found, key=lambda each: needed(search, each, largest))
    again = [each.target_class for each in ranked[: search.refined] for _ in range(search.restarts)]
    if again:
        found += invert_all(
            model,
            learning,
            search.inversion,
            classes=again,
            generator=rng.spawn(generator),
            progress=progress,
        )
    by_class: dict[int, InvertedTrigger] = {}
    for each in found:
        best = by_class.get(each.target_class, each)
        by_class[each.target_class] = min(best, each, key=lambda one: needed(search, one, largest))
    found = tuple(by_class.values())
    # Where none works at all, the one that came nearest.
    nearest = [by_class[k] for k in smallest_classes(found, len(found))]
    suspect = min(nearest, key=lambda each: needed(search, each, largest))
    rate = success_on(model, suspect, held_out)
    return Smallest(found, suspect, rate, len(learning), (channels, height, width))


def judge_smallest(search: Search, found: Smallest, *, further: Mapping[str, Any] | None = None) -> Detection:
    """Score the logarithm of what the median class needs divided by what the suspect does.

    A ``partial`` search has a score also where no trigger reached what was asked for.

    Args:
        search: That ``found`` comes from.
        found: From ``find_smallest``.
        further: Evidence beside what is here.
    """
    limit, source = threshold_from(search.calibration, search.alpha, fixed=search.threshold)
    suspect, largest = found.suspect, found.largest
    relative = len(found.triggers) >= search.fewest_classes
    least = needed(search, suspect, largest)
    norms = [needed(search, trigger, largest) for trigger in found.triggers]
    reference = statistics.median(norms) if relative else largest
    measure = NORMS[suspect.form]
    evidence = {
        measure: [trigger.norm if trigger.reached else None for trigger in found.triggers],
        f"reference_{measure}": reference,
        "reference": "median over the classes" if relative else "the largest norm that counts",
        **(further or {}),
        "suspect": suspect.describe(),
        "held_out_success": found.held_out.describe(),
    }
    problem = ""
    if found.images < FEWEST_IMAGES:
        problem = (
            f"a trigger that works on {found.images} images proves nothing; give at least {FEWEST_IMAGES}"
        )
    elif not suspect.reached and not search.partial:
        problem = f"no class has a trigger that works within {suspect.steps} steps; raise inversion.steps"
    if problem:
        return Detection(math.nan, limit, source, undetermined=problem, evidence=evidence)
    score = math.log(reference / max(least, SMALLEST_NORM))
    return Detection(
        score=score,
        threshold=limit,
        threshold_source=source,
        p_value=None if search.calibration is None else search.calibration.p_value(score),
        target_class=suspect.target_class if least < largest else None,
        evidence=evidence,
    )
