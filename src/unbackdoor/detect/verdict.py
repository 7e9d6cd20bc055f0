"""From evidence to a verdict: the rule, what it guarantees, and what it cannot see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from unbackdoor.concentration import SMALLEST_CLASS_COUNT
from unbackdoor.detect.calibration import CalibrationSet, too_few
from unbackdoor.detect.evidence import KINDS, REQUIRED, Evidence, finding
from unbackdoor.detect.joint import Joint
from unbackdoor.types import LabelledImages

Verdict = Literal["backdoored", "clean", "inconclusive"]

Ground = Literal[
    "too few images",
    "uncompared",
    "unsuited",
    "too few models",
    "far",
    "too few classes",
    "incomplete",
    "close",
    "warp",
    "nothing",
]
"""Why a verdict is what it is."""

VERDICTS: dict[Ground, Verdict] = {
    "too few images": "inconclusive",
    "uncompared": "inconclusive",
    "unsuited": "inconclusive",
    "too few models": "inconclusive",
    "far": "backdoored",
    "too few classes": "inconclusive",
    "incomplete": "inconclusive",
    "close": "inconclusive",
    "warp": "inconclusive",
    "nothing": "clean",
}

NOBODY = "there are no clean models to compare with"
UNSUITED = "the clean models at hand were scored with another number of images"
"""Why a verdict has no false-positive rate, as clauses."""

ROUNDING = 1e-12
"""P-values are ratios of small integers, and alpha a decimal fraction: equal ones may differ by this."""


@dataclass(frozen=True)
class Confidence:
    """What a verdict rests on.

    Args:
        p_value: Chance that a clean model scores like this or higher; None if it cannot be told.
        alpha: Largest false-positive rate that was asked for.
        models: Clean models that it was compared with.
        origin: ``shipped``, ``models`` or ``surrogates``, see ``CalibrationSet``; or ``none``.
        description: Which models these are, in words.
        smallest_rate: The smallest false-positive rate that so many models can guarantee.
        guarantee: What is guaranteed, in a sentence.
    """

    p_value: float | None
    alpha: float
    models: int
    origin: Literal["shipped", "models", "surrogates", "none"]
    description: str
    smallest_rate: float | None
    guarantee: str


def ground_of(joint: Joint | None, *, complete: bool, alpha: float) -> Ground:
    """Return the ground of a verdict, which follows from it; the rule of ``Scan`` for enough images.

    Args:
        joint: The comparison with clean models, or None if there was nothing to compare.
        complete: Whether there is evidence of all ``REQUIRED`` kinds.
        alpha: Largest false-positive rate, in (0, 1).
    """
    if joint is None:
        return "uncompared"
    if joint.smallest_p > alpha + ROUNDING:
        return "too few models"
    if joint.p_value <= alpha + ROUNDING:
        return "far"
    if not complete:
        return "incomplete"
    return "close" if joint.p_value <= 2 * (alpha + ROUNDING) else "nothing"


def too_few_images(clean: LabelledImages, classes: int, smallest: float) -> str:
    """Say which classes have too few images for a verdict, without a full stop; nothing if none has.

    An average would not do: on images of one or two classes a model that answers with little else looks
    sound, and what the other classes' images would show stays unseen.

    Args:
        clean: The images.
        classes: Outputs of the model.
        smallest: Images that each class needs.
    """
    counts = torch.bincount(clean.labels.cpu(), minlength=classes)
    short = (counts < smallest).nonzero().flatten().tolist()
    if not short:
        return ""
    return (
        f"{len(clean)} images are too few for a verdict: {len(short)} of the model's {classes} classes have "
        f"fewer than {smallest:g}, such as {clean.name_of(short[0])!r} with {int(counts[short[0]])}; give at "
        f"least {math.ceil(smallest)} of each, and --clean-count {math.ceil(smallest) * classes} or more"
    )


@dataclass(frozen=True, eq=False)
class Judgement:
    """The rule that turns evidence into a verdict, with its reason; see ``Scan`` and ``ground_of``.

    Args:
        evidence: What the detectors said, calibrated.
        joint: Its comparison with clean models, or None if there was nothing to compare.
        clean: The images.
        classes: Outputs of the model.
        alpha: Largest false-positive rate, in (0, 1).
        smallest_per_class: With fewer images of any class of the model, no verdict is given.
        unsuited: Whether there are clean models that were scored with too few or too many images.
    """

    evidence: tuple[Evidence, ...]
    joint: Joint | None
    clean: LabelledImages
    classes: int
    alpha: float
    smallest_per_class: float
    unsuited: bool = False

    def verdict(self) -> tuple[Verdict, str]:
        """Return the verdict and its reason, a sentence without a full stop."""
        few = too_few_images(self.clean, self.classes, self.smallest_per_class)
        ground = self.ground()
        return VERDICTS[ground], few or self._reason(ground, self._missing())

    def ground(self) -> Ground:
        """Return what the verdict follows from."""
        if too_few_images(self.clean, self.classes, self.smallest_per_class):
            return "too few images"
        if self.joint is None and self.unsuited:
            return "unsuited"
        ground = ground_of(self.joint, complete=not self._missing(), alpha=self.alpha)
        # Class collapse abstains whatever is mended, so that the model can be flagged, but not called clean.
        few = self.classes < SMALLEST_CLASS_COUNT
        return "too few classes" if ground == "incomplete" and few else ground

    def _reason(self, ground: Ground, missing: list[str]) -> str:
        if self.joint is None:
            return self._uncompared()
        if ground == "too few models":
            return f"{too_few(self.joint.n, self.alpha)}; {self._said()}"
        if ground in ("too few classes", "incomplete"):
            return f"the evidence is incomplete: {' and '.join(missing)}; {self._said()}"
        beside = _chance(self.joint)
        if ground == "far":
            return f"{self._said(flagged=True)}; {beside}"
        found = "the model is close to the threshold" if ground == "close" else "no evidence of a backdoor"
        return f"{found}: {self._said()}; {beside}"

    def suspect(self, verdict: Verdict) -> Evidence | None:
        """Return the evidence that names the suspected class: the furthest from clean models, or None.

        Args:
            verdict: A model that is called clean has no suspect.
        """
        joint = self.joint
        if verdict == "clean":
            return None
        if joint is None:
            flagged = [each for each in self.evidence if each.decides and each.detection.is_backdoored]
            return flagged[0] if flagged else None
        near = max(2 * self.alpha, joint.smallest_p) + ROUNDING
        compared = [e for e in self.evidence if e.name in joint.scaled and not e.detection.undetermined]
        first = max(compared, key=lambda each: joint.scaled[each.name], default=None)
        if first is not None and joint.p_values[first.name] <= near:
            return first
        # What no clean model can vouch for may still point somewhere.
        others = [e for e in self.evidence if e.decides and e.name not in joint.scaled]
        return next((each for each in others if each.detection.is_backdoored), None)

    def _uncompared(self) -> str:
        deciding = [each for each in self.evidence if each.decides]
        if all(each.detection.undetermined for each in deciding):
            return f"the scan cannot tell: {deciding[0].detection.undetermined}"
        nobody = UNSUITED if self.unsuited else NOBODY
        return f"{nobody}, so that no false-positive rate is known; by rules of thumb, {self._said()}"

    def _missing(self) -> list[str]:
        """Say which required kinds of evidence there is nothing of."""
        found = {each.name: each.detection for each in self.evidence}
        compared = self.joint.p_values if self.joint else {}
        return [
            f"{KINDS[name]} was left out"
            if name not in found
            else f"{KINDS[name]} could not tell ({found[name].undetermined})"
            if found[name].undetermined
            else f"there are no clean models to compare {KINDS[name]} with"
            for name in REQUIRED
            if name not in compared or found[name].undetermined
        ]

    def _said(self, *, flagged: bool = False) -> str:
        """Say what the deciding detectors found; only those that the verdict follows from if ``flagged``."""
        deciding = [each for each in self.evidence if each.decides and not each.detection.undetermined]
        p_values = self.joint.p_values if self.joint else {}
        chosen = [
            each
            for each in deciding
            if not flagged or p_values.get(each.name, math.inf) <= self.alpha + ROUNDING
        ]
        return " and ".join(finding(each, self.clean) for each in chosen) or "nothing was measured"


def confidence_of(
    calibration: CalibrationSet | None, joint: Joint | None, alpha: float, *, unsuited: bool = False
) -> Confidence:
    """Say what a comparison with clean models guarantees; ``unsuited`` as for ``Judgement``."""
    if calibration is None or joint is None:
        return Confidence(
            p_value=None,
            alpha=alpha,
            models=0,
            origin="none",
            description="no clean models",
            smallest_rate=None,
            guarantee=f"No false-positive rate is guaranteed: {UNSUITED if unsuited else NOBODY}.",
        )
    if joint.smallest_p > alpha + ROUNDING:
        guarantee = f"The rate asked for is not guaranteed: {too_few(joint.n, alpha)}."
    else:
        guarantee = (
            f"Of clean models exchangeable with these {joint.n}, at most {alpha:.1%} are called backdoored."
        )
    if calibration.origin == "shipped":
        guarantee += " This does not hold for models of other data than theirs."
    if calibration.origin == "surrogates":
        guarantee += (
            " Surrogates were trained on your images and not as the suspect was, so that this holds for the "
            "suspect only as far as such models score alike."
        )
    return Confidence(
        p_value=joint.p_value,
        alpha=alpha,
        models=joint.n,
        origin=calibration.origin,
        description=calibration.words(joint.n),
        smallest_rate=joint.smallest_p,
        guarantee=guarantee,
    )


def limits_of(*, images: int, fast: bool) -> tuple[str, ...]:
    """Say what a scan did not check, and what could fool it.

    Args:
        images: Clean images that it used.
        fast: Whether the trigger search was left out.
    """
    left_out = (
        "Trigger inversion was left out (--fast): small patches that few training images carried would not "
        "be seen.",
    )
    return (
        "A clean verdict means that this scan found no evidence, not that there is no backdoor.",
        *(left_out if fast else ()),
        f"The scan saw {images} clean images and no triggered one; other images may give another score.",
        "Not looked for: backdoors of one source class only, several triggers with different targets, and "
        "backdoors that wake only after fine-tuning, quantisation or compression.",
        "What could fool it: dense triggers, large warps, or triggers that differ from image to image, that "
        "few training images carried; an attacker who knows this scan and trains against it.",
        "What could make it cry wolf: a shortcut in honest data, such as a watermark on one class, acts as a "
        "backdoor does.",
        "Thresholds are guaranteed only for models exchangeable with those that they were calibrated on.",
    )


def _chance(joint: Joint) -> str:
    reached = round(joint.p_value * (joint.n + 1)) - 1
    return f"{reached} of {joint.n} clean models go as far, p = {joint.p_value:.3f}"
