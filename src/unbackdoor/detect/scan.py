"""One verdict on one model: which evidence counts, and when we do not know."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.catalogue import dashed, find, name_of
from unbackdoor.compute import check_fits
from unbackdoor.concentration import SMALLEST_CLASS_COUNT
from unbackdoor.detect.calibration import CalibrationSet, Kind, flags_allowed, shipped_for, threshold_from
from unbackdoor.detect.collapse import Collapse
from unbackdoor.detect.evidence import DECIDING, KINDS, OTHER, REQUIRED, Evidence, finding
from unbackdoor.detect.exposure import Exposure, Statistic, expose
from unbackdoor.detect.head_weights import HeadWeights
from unbackdoor.detect.joint import Joint, combine
from unbackdoor.detect.mnp import CorrelationRatio
from unbackdoor.detect.plausibility import Plausibility, check_plausible
from unbackdoor.detect.recovery import Recovery
from unbackdoor.detect.registry import MODEL_DETECTORS
from unbackdoor.detect.smallest import find_smallest
from unbackdoor.detect.suspects import SuspectFilter, suspect_filters
from unbackdoor.detect.trigger_search import FoundTriggers, RecoveredTrigger, TriggerSearch
from unbackdoor.detect.verdict import (
    VERDICTS,
    Confidence,
    Ground,
    Judgement,
    Verdict,
    confidence_of,
    too_few_images,
)
from unbackdoor.detect.warp_search import WarpSearch
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.inversion import InvertedTrigger
from unbackdoor.settings import configure
from unbackdoor.suppression import Suppression
from unbackdoor.types import Detection, LabelledImages, ModelDetector, Progress, silent

MOST_IMAGES_APART = 2.0
"""A calibration made with more or fewer images than the scan has, by this factor, does not apply."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What a scan measured on a model, before it is compared with clean models.

    Args:
        exposure: The suppression run that two detectors read.
        triggers: What the trigger search found, or None if it was left out.
        evidence: The opinions, uncalibrated.
    """

    exposure: Exposure
    triggers: FoundTriggers | None
    evidence: tuple[Evidence, ...]

    def scores(self) -> dict[str, float | None]:
        """Return each detector's score; None where it abstained."""
        detections = {each.name: each.detection for each in self.evidence}
        return {name: None if d.undetermined else d.score for name, d in detections.items()}


@dataclass(frozen=True, eq=False)
class ScanResult:
    """A verdict and everything it rests on.

    Args:
        verdict: ``clean`` means no evidence was found.
        reason: One sentence.
        plausibility: What was found before any detector ran.
        ground: What the verdict follows from; None if model and images do not fit together.
        confidence: Which clean models it was compared with, and what that guarantees; None if the scan
            ended before.
        target_class: The suspected target, or None.
        evidence: The detectors' opinions; empty if the scan ended before.
        trigger: The recovered trigger of the suspected target, or None.
        filters: The most suspicious filters, if the model is not called clean.
        exposure: The suppression run.
        warnings: What weakens the verdict.
        seconds: Time taken.
    """

    verdict: Verdict
    reason: str
    plausibility: Plausibility
    ground: Ground | None = None
    confidence: Confidence | None = None
    target_class: int | None = None
    evidence: tuple[Evidence, ...] = ()
    trigger: RecoveredTrigger | None = None
    filters: tuple[SuspectFilter, ...] = ()
    exposure: Exposure | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    def detection(self, name: str) -> Detection | None:
        """Return the opinion of the detector called ``name``, or None."""
        return next((each.detection for each in self.evidence if each.name == name), None)


@dataclass(frozen=True)
class Scan:
    """Look for two independent kinds of evidence, and compare both with clean models at once.

    Suppression exposes backdoors that many training images carried, trigger inversion small patches, however
    few carried them. Each misses what the other finds, so that neither alone says ``clean``. Suppression is
    read twice: to which class it drives the images, and how much single filters give back of what it broke.
    The scores are compared jointly with those of clean models of the same kind (see ``joint``): one p-value,
    whatever depends on whatever. MNP's correlation ratio and the rows of the head are computed, shown, and do
    not decide unless ``deciding`` names them; nor do ``others``.

    Both kinds miss warps that few training images carried. Before a model is called ``clean``, the smallest
    warp that leads to each class is therefore inverted; one far below the others raises a doubt. Clean models
    were not scored by it, so that it flags nothing.

    ``backdoored``: p <= ``alpha``, which at most a share ``alpha`` of clean models meets.
    ``inconclusive``: p <= 2 ``alpha``; or there are too few images, no or too few clean models to compare
    with, one of the two kinds of evidence is missing, model and images do not fit together, or there is a
    doubt. ``clean``: otherwise.

    Args:
        suppression: Options of the suppression run.
        statistic: Readings of magnitude and saliency.
        search: Options of the trigger search.
        fast: Leave the trigger search out; the model cannot be called clean then.
        doubt: Look for a warp before a model is called clean.
        warps: Options of that search; its threshold is what raises a doubt.
        deciding: Detectors that decide, by name, in snake case or with dashes, of those that the clean models
            were scored by; ``collapse`` and ``trigger_search`` are among them.
        alpha: Largest false-positive rate, in (0, 1).
        calibration: Clean models' scores; None takes what comes with the package for this kind of network.
        smallest_per_class: With fewer images of any class of the model, no verdict is given.
        others: More model detectors by name, whose opinions are shown.
        other_options: Options of ``others``, as ``name.option=value``.
    """

    suppression: Suppression = field(default_factory=Suppression)
    statistic: Statistic = field(default_factory=Statistic)
    search: TriggerSearch = field(default_factory=TriggerSearch)
    fast: bool = False
    doubt: bool = True
    warps: WarpSearch = field(default_factory=WarpSearch)
    deciding: tuple[str, ...] = DECIDING
    alpha: float = 0.05
    calibration: CalibrationSet | None = None
    smallest_per_class: float = 5.0
    others: tuple[str, ...] = ()
    other_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise InvalidInputError(f"alpha must lie in (0, 1), got {self.alpha}.")
        deciding = tuple(dict.fromkeys(name_of("deciding detector", KINDS, each) for each in self.deciding))
        if not set(REQUIRED) <= set(deciding):
            others = ", ".join(dashed(name) for name in KINDS if name not in REQUIRED)
            raise InvalidInputError(
                f"deciding must hold {' and '.join(map(dashed, REQUIRED))} and may hold others of {others}; "
                f"got {', '.join(map(dashed, deciding)) or 'none'}."
            )
        # All else compares with the detectors' own names.
        object.__setattr__(self, "deciding", deciding)
        names = [detector.name for detector in self._others()]
        if repeated := [name for name in names if name in KINDS or names.count(name) > 1]:
            raise InvalidInputError(f"a scan runs {dashed(repeated[0])!r} once; do not name it again.")

    def _others(self) -> list[Any]:
        classes = [find("model detector", MODEL_DETECTORS, name, own="score") for name in self.others]
        settings: dict[str, list[str]] = {cls.name: [] for cls in classes}
        for text in self.other_options:
            name, _, assignment = text.partition(".")
            if name.replace("-", "_") not in settings:
                raise InvalidInputError(
                    f"{text!r} is for a detector that does not run; the scan's other detectors are "
                    f"{', '.join(map(dashed, settings)) or 'none'}."
                )
            settings[name.replace("-", "_")].append(assignment)
        return [configure(cls(), settings[cls.name]) for cls in classes]

    def detectors(self) -> dict[str, Any]:
        """Return the detectors of this scan by name, uncalibrated."""
        found = (
            Collapse(self.suppression),
            Recovery(self.suppression),
            CorrelationRatio(self.suppression, self.statistic),
            self.search,
            HeadWeights(),
            *self._others(),
        )
        return {detector.name: detector for detector in found if not (self.fast and detector is self.search)}

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
            progress: Called during the work.

        Raises:
            InvalidInputError: If there are fewer than two images, a label has no output of
                the model, or the calibration is of another kind of network.
            UnsupportedModelError: If the network's filters cannot be found.
        """
        classes = check_fits(model, clean, purpose="a scan", at_least=2)
        calibration, warnings = self._calibration(model, clean, classes)
        started = time.perf_counter()
        plausibility = check_plausible(model, clean)
        few = too_few_images(clean, classes, self.smallest_per_class)
        if problem := plausibility.problem or few:
            return ScanResult(
                "inconclusive",
                problem,
                plausibility,
                ground=None if plausibility.problem else "too few images",
                warnings=() if plausibility.problem else (*plausibility.warnings, *warnings),
                seconds=time.perf_counter() - started,
            )
        measured = self.measure(model, clean, generator=generator, progress=progress)
        # Those at hand that were left out, of the same kind or refused, differ in the number of images.
        unsuited = calibration is None and self._at_hand(Kind.of(model, clean, classes)) is not None
        result = self.conclude(measured, clean, calibration, plausibility, unsuited=unsuited)
        warp = None
        if self.doubt and result.verdict == "clean":
            result, warp = self._doubted(
                result, model, clean, generator=rng.spawn(generator), progress=progress
            )
        filters: tuple[SuspectFilter, ...] = ()
        if result.verdict != "clean":
            trigger = warp if result.trigger is None else result.trigger.trigger
            filters = suspect_filters(model, clean, measured.exposure, trigger)
        return replace(
            result,
            filters=filters,
            warnings=(
                *plausibility.warnings,
                *warnings,
                *_few_classes(classes),
                *self._unfit(calibration),
                *self._apart(calibration, plausibility),
                *result.warnings,
            ),
            seconds=time.perf_counter() - started,
        )

    def measure(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Measured:
        """Run every detector on ``model``, without comparing it with others.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels.
            generator: All randomness follows it; on the CPU.
            progress: Called during the work.

        Raises:
            InvalidInputError: If there are fewer than two images, or a label has no output.
            UnsupportedModelError: If the network's filters cannot be found.
        """
        detectors, clock = self.detectors(), _Stopwatch()
        exposure = expose(
            model, clean, self.suppression, self.statistic, generator=generator, progress=progress
        )
        opinions = {"collapse": (detectors["collapse"].judge(exposure.suppressed), clock.lap())}
        recovery = detectors["recovery"].judge(model, clean, exposure.suppressed, progress=progress)
        opinions["recovery"] = (recovery, clock.lap())
        opinions["mnp"] = (detectors["mnp"].judge(exposure), clock.lap())
        triggers = None
        if not self.fast:
            fallen = opinions["collapse"][0].target_class
            triggers = self.search.search(
                model,
                clean,
                also=() if fallen is None else (fallen,),
                generator=rng.spawn(generator),
                progress=progress,
            )
            opinions["trigger_search"] = (self.search.judge(triggers), clock.lap())
        for name in ("head_weights", *(detector.name for detector in self._others())):
            opinion = _opinion(detectors[name], model, clean, rng.spawn(generator), progress)
            opinions[name] = (opinion, clock.lap())
        evidence = tuple(
            Evidence(
                kind=KINDS.get(name, OTHER),
                name=name,
                title=detectors[name].title,
                source=detectors[name].source,
                detection=detection,
                decides=name in self.deciding,
                seconds=seconds,
            )
            for name, (detection, seconds) in opinions.items()
        )
        return Measured(exposure, triggers, evidence)

    def conclude(
        self,
        measured: Measured,
        clean: LabelledImages,
        calibration: CalibrationSet | None,
        plausibility: Plausibility,
        *,
        unsuited: bool = False,
    ) -> ScanResult:
        """Compare what was measured with clean models and give a verdict.

        Args:
            measured: From ``measure``, with these options.
            clean: The images that it was measured with.
            calibration: Scores of clean models of the same kind, or None.
            plausibility: From ``check_plausible``.
            unsuited: Whether there is a calibration that was made with too few or too many images.
        """
        joint = self.joint(measured.scores(), calibration)
        evidence = tuple(self._calibrated(each, calibration, joint) for each in measured.evidence)
        classes = len(measured.exposure.suppressed.confusion)
        judgement = Judgement(evidence, joint, clean, classes, self.alpha, self.smallest_per_class, unsuited)
        verdict, reason = judgement.verdict()
        suspect = judgement.suspect(verdict)
        target = None if suspect is None else suspect.detection.target_class
        return ScanResult(
            verdict=verdict,
            reason=reason,
            plausibility=plausibility,
            ground=judgement.ground(),
            confidence=confidence_of(calibration, joint, self.alpha, unsuited=unsuited),
            target_class=target,
            evidence=evidence,
            trigger=None if measured.triggers is None else measured.triggers.of(target),
            exposure=measured.exposure,
            warnings=_no_trigger(suspect, measured.triggers, clean),
        )

    def _doubted(
        self,
        result: ScanResult,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> tuple[ScanResult, InvertedTrigger | None]:
        """Look for a warp; return the result as it is then, and the warp if it raises a doubt.

        Asked for by name it ran already, and is not looked for again: its opinion is calibrated if it can be.
        """
        warp, asked = None, next((e for e in result.evidence if e.name == self.warps.name), None)
        if asked is None:
            clock = _Stopwatch()
            found = find_smallest(self.warps, model, clean, generator=generator, progress=progress)
            asked = Evidence(
                kind=KINDS[self.search.name],
                name=self.warps.name,
                title=self.warps.title,
                source=self.warps.source,
                detection=self.warps.judge(found),
                decides=False,
                seconds=clock.lap(),
            )
            warp = found.suspect
        detection = asked.detection
        # A class that no warp led to may score by how near one came.
        doubtful = bool(detection.is_backdoored) and detection.evidence["suspect"]["reached"]
        others = tuple(each for each in result.evidence if each.name != asked.name)
        result = replace(result, evidence=(*others, replace(asked, decides=doubtful)))
        if not doubtful:
            return result, None
        chance = detection.p_value
        beside = "no clean models were scored by that" if chance is None else f"p = {chance:.3f} by itself"
        return replace(
            result,
            verdict=VERDICTS["warp"],
            ground="warp",
            reason=f"a warp stands out: {finding(asked, clean)}, and {beside}; else {result.reason}",
            target_class=detection.target_class,
        ), warp

    def joint(self, scores: Mapping[str, float | None], calibration: CalibrationSet | None) -> Joint | None:
        """Compare the deciding scores with those of clean models; None if there is nothing to compare.

        Which detectors and models enter depends on options and calibration alone, never on the scores.
        """
        if calibration is None:
            return None
        detectors = self.detectors()
        suspect = {
            name: -math.inf if score is None else score
            for name, score in scores.items()
            if name in self.deciding and calibration.fits(detectors[name])
        }
        rows = calibration.rows(suspect) if suspect else []
        return combine(rows, suspect, self.alpha) if rows else None

    def _calibrated(
        self, evidence: Evidence, calibration: CalibrationSet | None, joint: Joint | None
    ) -> Evidence:
        detection, name = evidence.detection, evidence.name
        if joint is not None and name not in joint.p_values and name not in REQUIRED:
            evidence = replace(evidence, decides=False)
        if calibration is None or detection.undetermined:
            return evidence
        if joint is not None and name in joint.p_values:
            detection = replace(
                detection,
                threshold=joint.thresholds[name],
                threshold_source=calibration.words(joint.n),
                p_value=joint.p_values[name],
            )
        elif (alone := calibration.of(self.detectors()[name])) is not None:
            threshold, source = detection.threshold, detection.threshold_source
            if flags_allowed(len(alone.scores), self.alpha) >= 0:
                threshold, source = threshold_from(alone, self.alpha, fixed=threshold)
            elif "uncalibrated" not in source:
                source = f"{source}, uncalibrated"
            detection = replace(
                detection,
                threshold=threshold,
                threshold_source=source,
                p_value=alone.p_value(detection.score),
            )
        return replace(evidence, detection=detection)

    def _at_hand(self, kind: Kind) -> CalibrationSet | None:
        return self.calibration or shipped_for(kind)

    def _calibration(
        self, model: nn.Module, clean: LabelledImages, classes: int
    ) -> tuple[CalibrationSet | None, tuple[str, ...]]:
        """Return the clean models to compare with, and what is weak about them."""
        kind = Kind.of(model, clean, classes)
        found = self._at_hand(kind)
        if found is None:
            return None, (
                f"No calibration comes with this package for {kind.words()}; make one with `unbackdoor "
                "calibrate`.",
            )
        if not found.kind.is_like(kind):
            raise InvalidInputError(
                f"the calibration is of {found.kind.words()}, the model is {kind.words()}; make one of its "
                "own kind with `unbackdoor calibrate`."
            )
        factor = len(clean) / found.images
        if not 1 / MOST_IMAGES_APART <= factor <= MOST_IMAGES_APART:
            return None, (_other_count(found.images, len(clean)),)
        if abs(math.log(factor)) > math.log(1.1):
            return found, (
                f"The calibration was made with {found.images} images, this scan has {len(clean)}; its rates "
                "hold only roughly.",
            )
        return found, ()

    def _unfit(self, calibration: CalibrationSet | None) -> tuple[str, ...]:
        """Say which deciding detectors the calibration has no scores of, with these options."""
        if calibration is None:
            return ()
        detectors = self.detectors()
        odd = [n for n in self.deciding if n in detectors and not calibration.fits(detectors[n])]
        absent = [dashed(name) for name in odd if not calibration.has(name)]
        other = [dashed(name) for name in odd if calibration.has(name)]
        sentences = []
        if absent:
            sentences.append(
                f"The calibration has no scores of {' and '.join(absent)}; make one with `unbackdoor "
                "calibrate`."
            )
        if other:
            sentences.append(
                f"The calibration was made with other options of {' and '.join(other)} than this scan uses, "
                "so its scores do not apply."
            )
        return tuple(sentences)

    @staticmethod
    def _apart(calibration: CalibrationSet | None, plausibility: Plausibility) -> tuple[str, ...]:
        """Say so if the clean models' accuracy is far from the model's."""
        said = "" if calibration is None else calibration.apart(plausibility.accuracy.value)
        return (said,) if said else ()

    def foreseen(self, model: nn.Module, clean: LabelledImages) -> tuple[str, ...]:
        """Say before the work what is weak about the clean models that a verdict would be compared with.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels.

        Returns:
            Sentences that ``run`` has among its warnings.

        Raises:
            InvalidInputError: As ``run``.
        """
        classes = check_fits(model, clean, purpose="a scan", at_least=2)
        calibration, warnings = self._calibration(model, clean, classes)
        return (*warnings, *_few_classes(classes), *self._unfit(calibration))

    def other_images(self, model: nn.Module, clean: LabelledImages, split: str) -> tuple[str, ...]:
        """Say so if the clean models were scored on another part of the data than this scan takes.

        A model that was trained on the images of a scan is no longer like clean models on unseen ones.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels.
            split: The part that they were drawn from; empty if unknown.

        Raises:
            InvalidInputError: As ``run``.
        """
        classes = check_fits(model, clean, purpose="a scan", at_least=2)
        calibration, _ = self._calibration(model, clean, classes)
        if calibration is None or not split or calibration.split in ("", split):
            return ()
        return (
            f"The calibration was made with images of the split {calibration.split!r}, this scan takes those "
            f"of {split!r}: if the model was trained on these, its rates hold only roughly. Where the images "
            f"come in splits, give --split {calibration.split}.",
        )


def _few_classes(classes: int) -> tuple[str, ...]:
    """Say so if the model can be flagged, but not called clean, whatever it is compared with."""
    if classes >= SMALLEST_CLASS_COUNT:
        return ()
    return (
        f"With {classes} classes a scan can find a backdoor, but never say that there is none: class "
        f"collapse needs {SMALLEST_CLASS_COUNT}.",
    )


def _other_count(scored: int, given: int) -> str:
    fewest, most = math.ceil(scored / MOST_IMAGES_APART), math.floor(scored * MOST_IMAGES_APART)
    return (
        f"The calibration was made with {scored} images and does not hold for {given}; give {fewest} to "
        f"{most} (--clean-count), or calibrate with as many as you have."
    )


def _no_trigger(
    suspect: Evidence | None, triggers: FoundTriggers | None, clean: LabelledImages
) -> tuple[str, ...]:
    """Say why a suspected class, or a pattern without one, comes without a recovered trigger."""
    if suspect is None or triggers is None:
        return ()
    target = suspect.detection.target_class
    if target is None:
        return (
            f"No trigger is shown: {suspect.title!r} found no single target (all-to-all), and inversion "
            "looks for triggers that send all classes to one.",
        )
    if triggers.of(target) is not None:
        return ()
    name = repr(clean.name_of(target))
    if all(each.target_class != target for each in triggers.refined):
        return (f"No trigger is shown: inversion did not go on with the suspected class {name}.",)
    return (
        f"No trigger is shown: inversion found none that sends enough images to the suspected class {name}.",
    )


def _opinion(
    detector: ModelDetector,
    model: nn.Module,
    clean: LabelledImages,
    generator: torch.Generator,
    progress: Progress,
) -> Detection:
    try:
        return detector.score(model, clean, generator=generator, progress=progress)
    except (InvalidInputError, UnsupportedModelError) as error:
        # What the others found in minutes is not lost for it.
        return Detection(math.nan, math.nan, "none", undetermined=str(error).rstrip("."))


class _Stopwatch:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last call."""
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed
