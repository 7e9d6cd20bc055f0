"""A trigger for each class at a small budget, then at a larger one for the few that need the least."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.compute import check_fits, predictions_of
from unbackdoor.data.splits import split
from unbackdoor.detect.calibration import Calibration, threshold_from
from unbackdoor.errors import InvalidInputError
from unbackdoor.inversion import Inversion, InvertedTrigger, invert_all
from unbackdoor.rates import Rate
from unbackdoor.types import Detection, LabelledImages, Progress, silent

FEWEST_IMAGES = 8
"""On fewer images any patch can be fitted."""

_SMALLEST_NORM = 0.1
"""Pixels; keeps the logarithm finite for a class that needs no trigger."""


@dataclass(frozen=True, eq=False)
class RecoveredTrigger:
    """A trigger with its success on images that it was not made from.

    Args:
        trigger: Mask, pattern, target class, and the success on the images that it was made from.
        held_out: Share of clean images of other classes, unseen by the inversion, that it sends to its class.
    """

    trigger: InvertedTrigger
    held_out: Rate

    @property
    def target_class(self) -> int:
        """Where it sends images."""
        return self.trigger.target_class

    @property
    def image_fraction(self) -> float:
        """The l1 norm of the mask as a share of the image, in [0, 1]."""
        return self.trigger.norm / self.trigger.mask.numel()

    def describe(self) -> dict[str, Any]:
        """Return JSON values without the tensors."""
        return {
            **self.trigger.describe(),
            "image_fraction": self.image_fraction,
            "held_out_success": self.held_out.describe(),
        }


@dataclass(frozen=True, eq=False)
class FoundTriggers:
    """What a search found.

    Args:
        first: One trigger a class, all at the same budget.
        refined: One a class that went on, smallest first; those that a caller asked for come last.
        images: How many images they were made from.
    """

    first: tuple[InvertedTrigger, ...]
    refined: tuple[RecoveredTrigger, ...]
    images: int

    def of(self, target_class: int | None) -> RecoveredTrigger | None:
        """Return the refined trigger of a class that reached its success, or None."""
        found = (each for each in self.refined if each.target_class == target_class)
        return next((each for each in found if each.trigger.reached), None)


@dataclass(frozen=True)
class TriggerSearch:
    """Measure how much smaller the smallest trigger of a model is than what its other classes need.

    Source: after Neural Cleanse (Wang et al., IEEE S&P 2019): a class that a backdoor leads to needs an
    unusually small trigger.

    Ours: two stages, so that a scan is short. All classes get the same small budget; those with the
    smallest masks are then inverted again at a larger one. The score is the logarithm of the median mask of
    the first stage divided by the smallest mask of either: an effect size, whose scale does not depend on how
    much the other classes vary, as an anomaly index does. A class whose trigger does not reach the asked-for
    success counts as a mask that covers the image. With few classes, whose median says nothing, the image
    itself is the measure. Part of the images is kept from the inversion and tells the trigger's success.

    The value depends on budgets and images: it means something beside clean models that were scored in the
    same way, and nothing without a calibration. Several targets at once move the median and hide one another.

    Args:
        first: Inversion of every class.
        second: Inversion of the ``refined`` classes, from a new start.
        refined: Classes that go on, at least 1.
        held_out_fraction: Share of the images on which success is measured, in [0, 1).
        fewest_classes: With fewer classes the score is relative to the image.
        threshold: Used without a calibration; a guess.
        calibration: Scores of clean models, or None.
        alpha: False-positive rate of a calibrated threshold.
    """

    name: ClassVar[str] = "trigger_search"
    title: ClassVar[str] = "Size of the smallest inverted trigger"
    source: ClassVar[str] = "after Neural Cleanse, IEEE S&P 2019"
    needs: ClassVar[str] = "clean images with labels"

    first: Inversion = field(default_factory=lambda: Inversion(steps=120, batch_size=16, success=0.95))
    second: Inversion = field(default_factory=lambda: Inversion(steps=150, batch_size=32, success=0.95))
    refined: int = 3
    held_out_fraction: float = 0.2
    fewest_classes: int = 5
    threshold: float = 1.1
    calibration: Calibration | None = None
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if self.refined < 1 or self.fewest_classes < 3 or not 0 <= self.held_out_fraction < 1:
            raise InvalidInputError(
                "a trigger search needs refined >= 1, fewest_classes >= 3 and held_out_fraction in [0, 1), "
                f"got {self.refined}, {self.fewest_classes} and {self.held_out_fraction}."
            )
        if {self.first.form, self.second.form} != {"patch"}:
            raise InvalidInputError(
                "a trigger search inverts patches; leave first.form and second.form at 'patch', and use "
                "perturbation-search for changes of all pixels."
            )

    def score(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Detection:
        """Search and judge; ``model`` is left untouched."""
        return self.judge(self.search(model, clean, generator=generator, progress=progress))

    def search(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        also: Iterable[int] = (),
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> FoundTriggers:
        """Invert triggers in two stages.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels; a few hundred.
            also: Classes that are refined whatever the first stage says of them. Their masks do not enter the
                score.
            generator: All randomness follows it; on the CPU.
            progress: Called after each round.

        Raises:
            InvalidInputError: If there are fewer than two images, or a class or label has no output.
            UnsupportedModelError: If the model cannot be run on the images.
        """
        check_fits(model, clean, purpose="a trigger search", at_least=2)
        learning, held_out = held_apart(clean, self.held_out_fraction, rng.spawn(generator))
        first = invert_all(
            model,
            learning,
            self.first,
            generator=rng.spawn(generator),
            progress=_staged(progress, "all classes"),
        )
        chosen = smallest_classes(first, self.refined)
        classes = list(dict.fromkeys([*chosen, *also]))
        second = invert_all(
            model,
            learning,
            self.second,
            classes=classes,
            generator=rng.spawn(generator),
            progress=_staged(progress, "smallest"),
        )
        best = [min(first[trigger.target_class], trigger, key=_needed) for trigger in second]
        refined = [RecoveredTrigger(trigger, success_on(model, trigger, held_out)) for trigger in best]
        competing = sorted(refined[: len(chosen)], key=lambda each: _needed(each.trigger))
        return FoundTriggers(first, (*competing, *refined[len(chosen) :]), len(learning))

    def judge(self, found: FoundTriggers) -> Detection:
        """Score what a search with these options found."""
        threshold, source = threshold_from(self.calibration, self.alpha, fixed=self.threshold)
        pixels = float(found.first[0].mask.numel())
        needed = [_needed(trigger) if trigger.reached else pixels for trigger in found.first]
        relative = len(needed) >= self.fewest_classes
        reference = statistics.median(needed) if relative else pixels
        suspect = found.refined[0]
        evidence = {
            "l1_pixels": [trigger.norm if trigger.reached else None for trigger in found.first],
            "reference_pixels": reference,
            "reference": "median over the classes" if relative else "the whole image",
            "refined": [each.describe() for each in found.refined],
        }
        problem = ""
        if found.images < FEWEST_IMAGES:
            problem = (
                f"a trigger that works on {found.images} images proves nothing; give at least {FEWEST_IMAGES}"
            )
        elif not suspect.trigger.reached:
            problem = (
                f"no class has a trigger that works within {self.second.steps} steps; raise first.steps and "
                "second.steps"
            )
        if problem:
            return Detection(math.nan, threshold, source, undetermined=problem, evidence=evidence)
        score = math.log(reference / max(suspect.trigger.norm, _SMALLEST_NORM))
        return Detection(
            score=score,
            threshold=threshold,
            threshold_source=source,
            p_value=None if self.calibration is None else self.calibration.p_value(score),
            target_class=suspect.target_class,
            evidence=evidence,
        )


def held_apart(
    clean: LabelledImages, fraction: float, generator: torch.Generator
) -> tuple[LabelledImages, LabelledImages]:
    """Return images to make triggers from, and a share kept from that; none where too few are left."""
    held_out = round(fraction * len(clean))
    if not 0 < held_out <= len(clean) - 2:
        return clean, clean.subset(torch.arange(0))
    return split(clean, fraction, generator)


def smallest_classes(triggers: Sequence[InvertedTrigger], count: int) -> list[int]:
    """Return the classes with the smallest triggers that work; then those that came nearest to it."""

    def place(trigger: InvertedTrigger) -> tuple[bool, float]:
        success = 0.0 if math.isnan(trigger.success) else trigger.success
        return not trigger.reached, trigger.norm if trigger.reached else -success

    return [trigger.target_class for trigger in sorted(triggers, key=place)[:count]]


def success_on(model: nn.Module, trigger: InvertedTrigger, images: LabelledImages) -> Rate:
    """Return the share of ``images`` of other classes that ``trigger`` sends to its class."""
    others = images.subset(images.labels != trigger.target_class)
    if not len(others):
        return Rate(0, 0)
    return Rate.of(predictions_of(model, trigger(others.floats())) == trigger.target_class)


def _needed(trigger: InvertedTrigger) -> float:
    return trigger.norm if trigger.reached else math.inf


def _staged(progress: Progress, which: str) -> Progress:
    return lambda stage, done, total: progress(f"{stage}, {which}", done, total)
