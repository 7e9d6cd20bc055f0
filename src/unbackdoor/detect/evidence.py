"""What detectors say in a scan, and in which words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from unbackdoor.types import Detection, LabelledImages

REQUIRED = ("collapse", "trigger_search")
"""Without both of these, which fail on different attacks, no model is called clean."""

DECIDING = (*REQUIRED, "recovery")
"""What a verdict follows from if nothing else is asked for, as far as clean models were scored by it."""

KINDS = {
    "collapse": "unlearning exposure",
    "recovery": "unlearning exposure",
    "mnp": "unlearning exposure",
    "trigger_search": "trigger inversion",
    "head_weights": "weights of the head",
}
"""Detector to the kind of evidence that it gives."""

OTHER = "a further detector"
"""The kind of all that is run on request."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """The opinion of one detector in a scan.

    Args:
        kind: What is looked at; detectors of one kind share a run and are not independent.
        name: Of the detector.
        title: Its name for people.
        source: Where it comes from.
        detection: Its opinion. In a result, threshold and p-value of deciding detectors are adjusted for one
            another, so that one alone may flag the model.
        decides: Whether the verdict follows from it; others are shown for comparison.
        seconds: Time taken; detectors that read a run of another one took none.
    """

    kind: str
    name: str
    title: str
    source: str
    detection: Detection
    decides: bool
    seconds: float


def finding(evidence: Evidence, clean: LabelledImages) -> str:
    """Return what a detector measured, in a phrase.

    Args:
        evidence: Of a detector that did not abstain.
        clean: For the names of classes.
    """
    detection = evidence.detection
    score, threshold, found = detection.score, detection.threshold, detection.evidence
    target = "" if detection.target_class is None else f"{clean.name_of(detection.target_class)!r}"
    limit = f"threshold {threshold:.2f}" if math.isfinite(threshold) else "no threshold"
    if evidence.name == "collapse":
        where = f"on {target}" if target else f"on {found['pattern']}"
        return f"errors of the suppressed model concentrate {where} to {score:.2f} ({limit})"
    if evidence.name == "recovery":
        few = len(found["filters"])
        where = f"those of {target}" if target else f"errors of the pattern {found['pattern']}"
        return (
            f"{few} filters give back {score:.0%} each on average of what suppression broke, most of all "
            f"{where} ({limit})"
        )
    if evidence.name == "trigger_search":
        suspect = found["refined"][0]
        limit = _factor(threshold)
        measure = "what the median class needs" if "median" in found["reference"] else "the whole image"
        return (
            f"a trigger of {suspect['l1_pixels']:.1f} pixels ({suspect['image_fraction']:.1%} of the image) "
            f"leads to {target}, {math.exp(score):.2f} times less than {measure} ({limit})"
        )
    if evidence.name == "warp_search":
        return _warp(detection, target)
    if evidence.name == "mnp":
        return (
            f"magnitude and saliency of the filters correlate by {found['correlation']:.2f}, after "
            f"suppression by {found['correlation_suppressed']:.2f}"
        )
    if evidence.name == "head_weights":
        return f"the row of {target} in the head stands out by {score:.2f} robust deviations ({limit})"
    suspected = f", suspected target {target}" if target else ""
    return f"{evidence.title}: score {score:.3g} ({limit}){suspected}"


def _warp(detection: Detection, target: str) -> str:
    suspect, limit = detection.evidence["suspect"], _factor(detection.threshold)
    if not target:
        return f"no shift of the pixels by less than an eighth of the image leads to a class ({limit})"
    return (
        f"a shift of the pixels by {suspect['rms_shift_pixels']:.1f} leads {suspect['success']:.0%} of the "
        f"images to {target}, {math.exp(detection.score):.2f} times less than what the median class needs "
        f"({limit})"
    )


def _factor(threshold: float) -> str:
    return f"threshold {math.exp(threshold):.2f}" if threshold < 700 else "no threshold"
