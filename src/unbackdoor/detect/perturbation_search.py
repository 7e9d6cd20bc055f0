"""The smallest change of all pixels that leads to each class: one far below the others is suspicious."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.compute import check_fits
from unbackdoor.detect.calibration import Calibration, threshold_from
from unbackdoor.detect.trigger_search import FEWEST_IMAGES, held_apart, smallest_classes, success_on
from unbackdoor.errors import InvalidInputError
from unbackdoor.inversion import Inversion, InvertedTrigger, invert_all
from unbackdoor.rates import Rate
from unbackdoor.types import Detection, LabelledImages, Progress, silent

_SMALLEST_NORM = 0.01
"""Keeps the logarithm finite for a class that needs no change."""


@dataclass(frozen=True)
class PerturbationSearch:
    """Measure how much smaller the smallest change that leads to a class is than what other classes need.

    Source: after Xiang, Miller, Kesidis, "Detection of Backdoors in Trained Classifiers Without Access to
    the Training Set", 2020, arXiv 1908.10498: a backdoor with a faint trigger makes an additive perturbation
    of unusually small norm suffice.

    Ours: one change a class from the images of all others together, instead of one for each pair of classes;
    and an effect size, the logarithm of the median norm divided by the smallest, instead of a p-value under
    a distribution fitted to the other pairs. A class whose change does not reach the asked-for success counts
    as the largest possible one. It sees triggers that are spread over the image and the same for all images,
    such as blends and sinusoids, however few training images carried them; patches and warps it misses.

    The value means something beside clean models that were scored in the same way, and nothing without a
    calibration.

    Args:
        inversion: Of every class; its form is ``additive``.
        held_out_fraction: Share of the images on which success is measured, in [0, 1).
        fewest_classes: With fewer classes the score is relative to the largest possible change.
        threshold: Used without a calibration; a guess.
        calibration: Scores of clean models, or None.
        alpha: False-positive rate of a calibrated threshold.
    """

    name: ClassVar[str] = "perturbation_search"
    title: ClassVar[str] = "Size of the smallest change of all pixels"
    source: ClassVar[str] = "after Xiang, Miller, Kesidis 2020, arXiv 1908.10498"
    needs: ClassVar[str] = "clean images with labels"

    inversion: Inversion = field(default_factory=Inversion.additive)
    held_out_fraction: float = 0.2
    fewest_classes: int = 5
    threshold: float = 1.0
    calibration: Calibration | None = None
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if self.inversion.form != "additive":
            raise InvalidInputError(
                f"a perturbation search inverts changes of all pixels; set inversion.form to 'additive', got "
                f"{self.inversion.form!r}."
            )
        if self.fewest_classes < 3 or not 0 <= self.held_out_fraction < 1:
            raise InvalidInputError(
                "a perturbation search needs fewest_classes >= 3 and held_out_fraction in [0, 1), got "
                f"{self.fewest_classes} and {self.held_out_fraction}."
            )

    def score(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Detection:
        """Search and judge.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels; a few hundred.
            generator: All randomness follows it; on the CPU.
            progress: Called after each round.

        Raises:
            InvalidInputError: If there are fewer than two images, or a class or label has no output.
            UnsupportedModelError: If the model cannot be run on the images.
        """
        check_fits(model, clean, purpose="a perturbation search", at_least=2)
        learning, held_out = held_apart(clean, self.held_out_fraction, rng.spawn(generator))
        found = invert_all(model, learning, self.inversion, generator=rng.spawn(generator), progress=progress)
        by_class = {trigger.target_class: trigger for trigger in found}
        suspect = by_class[smallest_classes(found, 1)[0]]
        return self.judge(found, suspect, success_on(model, suspect, held_out), len(learning))

    def judge(
        self, found: Sequence[InvertedTrigger], suspect: InvertedTrigger, held_out: Rate, images: int
    ) -> Detection:
        """Score what a search with these options found.

        Args:
            found: One change a class.
            suspect: The smallest of them.
            held_out: Its success on images that it was not made from.
            images: How many it was made from.
        """
        threshold, source = threshold_from(self.calibration, self.alpha, fixed=self.threshold)
        largest = math.sqrt(suspect.pattern.numel())
        relative = len(found) >= self.fewest_classes
        norms = [trigger.norm if trigger.reached else largest for trigger in found]
        reference = statistics.median(norms) if relative else largest
        evidence = {
            "l2": [trigger.norm if trigger.reached else None for trigger in found],
            "reference_l2": reference,
            "reference": "median over the classes" if relative else "the largest possible change",
            # An l2 norm of pixels in [0, 1], as the root of the mean square in the 255 steps of a file.
            "grey_levels": 255 * suspect.norm / largest,
            "suspect": suspect.describe(),
            "held_out_success": held_out.describe(),
        }
        problem = ""
        if images < FEWEST_IMAGES:
            problem = f"a change that works on {images} images proves nothing; give at least {FEWEST_IMAGES}"
        elif not suspect.reached:
            problem = (
                f"no class has a change that works within {self.inversion.steps} steps; raise inversion.steps"
            )
        if problem:
            return Detection(math.nan, threshold, source, undetermined=problem, evidence=evidence)
        score = math.log(reference / max(suspect.norm, _SMALLEST_NORM))
        return Detection(
            score=score,
            threshold=threshold,
            threshold_source=source,
            p_value=None if self.calibration is None else self.calibration.p_value(score),
            target_class=suspect.target_class,
            evidence=evidence,
        )
