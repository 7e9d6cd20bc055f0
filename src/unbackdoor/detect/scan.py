"""One verdict on one model: which evidence counts, and when we do not know."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from unbackdoor.compute import check_fits
from unbackdoor.detect.calibration import CalibrationSet, shipped_calibration
from unbackdoor.detect.collapse import Collapse
from unbackdoor.detect.exposure import Exposure, Statistic, expose
from unbackdoor.detect.mnp import CorrelationRatio
from unbackdoor.detect.plausibility import Plausibility, check_plausible
from unbackdoor.errors import InvalidInputError
from unbackdoor.suppression import Suppression
from unbackdoor.types import Detection, LabelledImages, Progress, silent

Verdict = Literal["backdoored", "clean", "inconclusive"]

LIMITS = (
    "A clean verdict means that this scan found no evidence, not that there is no backdoor.",
    "Suppression exposes backdoors that were trained in with a high share of poisoned images; small "
    "patches at a low poison rate are expected to escape it, and were not measured.",
    "Backdoors with several triggers and targets at once, and attackers who know this scan, were not tried.",
    "Thresholds are guaranteed only for models like those they were calibrated on.",
)


@dataclass(frozen=True)
class ScanResult:
    """A verdict and everything it rests on.

    Args:
        verdict: ``clean`` means no evidence was found.
        reason: One sentence.
        target_class: The suspected target, or None.
        plausibility: What was found before any detector ran.
        collapse: The deciding detector's opinion, or None if the scan ended before.
        correlation: MNP's own detector's opinion, shown beside it.
        exposure: The suppression run that both read.
        seconds: Time taken.
    """

    verdict: Verdict
    reason: str
    plausibility: Plausibility
    target_class: int | None = None
    collapse: Detection | None = None
    correlation: Detection | None = None
    exposure: Exposure | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Scan:
    """Suppress the model's clean task once, and read it in two ways.

    The verdict follows the class collapse alone. MNP's correlation ratio is computed and shown, and does
    not decide: on our clean and infected models it did not tell them apart (see RESULTS.md).

    ``backdoored``: the score is above the threshold that at most ``alpha`` of clean models exceed.
    ``inconclusive``: it is above the level that at most 2 ``alpha`` exceed; or there are too few images, the
    model and the images do not fit together, or suppression did not take the accuracy away.
    ``clean``: otherwise.

    Args:
        suppression: Options of the shared run.
        statistic: Readings of magnitude and saliency.
        alpha: Largest false-positive rate, in (0, 1).
        calibration: Clean models' scores; None takes those that come with the package.
        smallest_per_class: With fewer images per class of the model on average, no verdict is given.
    """

    suppression: Suppression = field(default_factory=Suppression)
    statistic: Statistic = field(default_factory=Statistic)
    alpha: float = 0.05
    calibration: CalibrationSet | None = None
    smallest_per_class: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise InvalidInputError(f"alpha must lie in (0, 1), got {self.alpha}.")

    def run(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> ScanResult:
        """Scan ``model``, which is left untouched.

        Args:
            model: Takes float images in [0, 1].
            clean: Clean images with labels; a few hundred.
            generator: All randomness follows it; on the CPU.
            progress: Called during suppression.

        Raises:
            InvalidInputError: If there are fewer than two images, a label has no output of
                the model, or the calibration has too few models for ``alpha``.
            UnsupportedModelError: If the network's filters cannot be found.
        """
        check_fits(model, clean, purpose="a scan", at_least=2)
        for detector in self._detectors()[:2]:
            if detector.calibration is not None:
                detector.calibration.threshold(self.alpha)  # fail on too few models before the work
        started = time.perf_counter()
        plausibility = check_plausible(model, clean)
        if plausibility.problem:
            return ScanResult(
                "inconclusive",
                plausibility.problem,
                plausibility,
                seconds=time.perf_counter() - started,
            )
        exposure = expose(
            model, clean, self.suppression, self.statistic, generator=generator, progress=progress
        )
        collapse, correlation, warnings = self.judge(exposure)
        verdict, reason = self._verdict(collapse, clean, len(exposure.suppressed.confusion))
        return ScanResult(
            verdict=verdict,
            reason=reason,
            plausibility=plausibility,
            target_class=collapse.target_class if verdict != "clean" else None,
            collapse=collapse,
            correlation=correlation,
            exposure=exposure,
            warnings=(*plausibility.warnings, *warnings),
            seconds=time.perf_counter() - started,
        )

    def judge(self, exposure: Exposure) -> tuple[Detection, Detection, tuple[str, ...]]:
        """Return the opinions of both detectors on one exposure, and what weakens them."""
        collapse, ratio, warnings = self._detectors()
        return collapse.judge(exposure.suppressed), ratio.judge(exposure), warnings

    def _detectors(self) -> tuple[Collapse, CorrelationRatio, tuple[str, ...]]:
        calibration = self.calibration or shipped_calibration()
        warnings: tuple[str, ...] = ()
        detectors = calibration.detectors
        if calibration.options != calibration_options(self.suppression, self.statistic):
            warnings = (
                "The calibration was made with other options than this scan uses, so fixed thresholds "
                "without a known false-positive rate are used instead.",
            )
            detectors = {}
        collapse = Collapse(self.suppression, calibration=detectors.get("collapse"), alpha=self.alpha)
        ratio = CorrelationRatio(
            self.suppression, self.statistic, calibration=detectors.get("mnp"), alpha=self.alpha
        )
        return collapse, ratio, warnings

    def _verdict(self, collapse: Detection, clean: LabelledImages, classes: int) -> tuple[Verdict, str]:
        if collapse.undetermined:
            return "inconclusive", f"the scan cannot tell: {collapse.undetermined}"
        if len(clean) < self.smallest_per_class * classes:
            return "inconclusive", (
                f"{len(clean)} images for {classes} classes are too few for a verdict; give at least "
                f"{math.ceil(self.smallest_per_class * classes)}"
            )
        what = f"errors concentrate to {collapse.score:.2f}, threshold {collapse.threshold:.2f}"
        if collapse.score >= collapse.threshold:
            return "backdoored", f"when its clean task is suppressed the model falls into a pattern: {what}"
        if collapse.p_value is not None and collapse.p_value <= 2 * self.alpha:
            return "inconclusive", f"the model is close to the threshold: {what}"
        return "clean", f"no evidence of a backdoor: {what}"


def calibration_options(suppression: Suppression, statistic: Statistic) -> dict[str, Any]:
    """Return the options that a calibration depends on, as JSON values."""
    options = {"suppression": asdict(suppression), "statistic": asdict(statistic)}
    # Precision follows the hardware and moves no score by more than the seeds do.
    del options["suppression"]["precision"]
    return options
