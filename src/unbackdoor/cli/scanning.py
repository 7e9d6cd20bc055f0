"""The work behind ``unbackdoor scan``: from a model and images to a document, without printing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from torch import Tensor, nn

import unbackdoor
from unbackdoor import rng
from unbackdoor.cli.work import plain, png, rate, sentence
from unbackdoor.detect.evidence import Evidence, finding
from unbackdoor.detect.exposure import Exposure
from unbackdoor.detect.scan import Scan, ScanResult
from unbackdoor.detect.trigger_search import RecoveredTrigger
from unbackdoor.detect.verdict import Ground, limits_of
from unbackdoor.errors import MissingDependencyError
from unbackdoor.report import documents as doc
from unbackdoor.settings import configure
from unbackdoor.types import LabelledImages, Progress, as_float

ADVICE = {
    "backdoored": "Do not use this model. Get it from a source you trust, or remove the backdoor with "
    "`unbackdoor purify`, scan the result again and look at what it cost.",
    "clean": "No evidence was found; read below what this scan cannot see before you rely on it.",
    "inconclusive": "Do not rely on this model yet: mend what is named above and scan again.",
}

CLOSE = (
    "Do not rely on this model yet: scan it again with --seed 1, --seed 2 and other clean images; if it "
    "stays close to the threshold, get it from another source or compare it with more clean models."
)
"""The advice where nothing is there to mend."""

FLAGS = ("fast", "calibration", "others", "other_options")
"""Options of a scan that the commands have flags of their own for."""

OTHERS = "others."
"""Before the options of further detectors, as in ``others.nc.fewest_classes=4``."""

UNCOMPARED = (
    "Do not rely on this model yet. Score clean models of this kind with `unbackdoor calibrate` and scan "
    "again with `--calibration`."
)
"""The advice where nothing is missing but clean models to compare with."""


OTHER_IMAGES = (
    "Do not rely on this model yet. Scan again with about as many clean images as the clean models were "
    "scored with, as the warning says."
)
"""The advice where clean models are there, but were scored with more or fewer images."""

FEW_CLASSES = (
    "Do not rely on this model because of this scan: nothing was found, but with so few classes that does "
    "not say that nothing is there. Get it from a source you trust, or `unbackdoor purify` it."
)
"""The advice where clean models were compared with, and there are too few classes to say clean."""

WARP = (
    "Do not rely on this model yet: `unbackdoor purify` it, which acts on such a warp, scan the result again "
    "and look at what it cost; or get it from a source you trust."
)
"""The advice where nothing but a warp stands out, by which no clean models were scored."""

BY_GROUND: dict[Ground | None, str] = {
    "close": CLOSE,
    "warp": WARP,
    "unsuited": OTHER_IMAGES,
    "too few classes": FEW_CLASSES,
}


def configured_scan(scan: Scan, settings: Sequence[str]) -> Scan:
    """Return ``scan`` with options as ``--set`` takes them, those of its further detectors included.

    Raises:
        InvalidInputError: If an option does not exist, or a value does not fit.
    """
    of_others = tuple(each.strip().removeprefix(OTHERS) for each in settings if _is_of_others(each))
    own = [each for each in settings if not _is_of_others(each)]
    return configure(replace(scan, other_options=of_others), own, unlisted=FLAGS)


def _is_of_others(setting: str) -> bool:
    return setting.strip().startswith(OTHERS)


def scan_document(
    model: nn.Module,
    clean: LabelledImages,
    *,
    scan: Scan,
    info: doc.ModelInfo,
    data: doc.DataInfo,
    seed: int,
    warnings: tuple[str, ...] = (),
    progress: Progress,
) -> doc.ScanDocument:
    """Scan ``model`` and describe the result."""
    result = scan.run(model, clean, generator=rng.generator(seed), progress=progress)
    target = result.target_class
    return doc.ScanDocument(
        tool_version=unbackdoor.__version__,
        seconds=result.seconds,
        model=info,
        data=data,
        clean_accuracy=rate(result.plausibility.accuracy),
        verdict=result.verdict,
        reason=sentence(result.reason),
        advice=advice_on(result),
        target_class=target,
        target_name=None if target is None else clean.name_of(target),
        confidence=None if result.confidence is None else doc.Confidence(**asdict(result.confidence)),
        warnings=[*warnings, *result.warnings],
        detectors=[_detector_row(evidence, clean) for evidence in result.evidence],
        trigger=None if result.trigger is None else _trigger(result.trigger, clean),
        filters=[doc.SuspectFilter(**asdict(each)) for each in result.filters],
        suppression=_suppression(result.exposure, scan),
        scatter=_scatter(result.exposure),
        settings={"scan": plain(asdict(scan)), "seed": seed},
        limits=limits_of(images=len(clean), fast=scan.fast),
    )


def advice_on(result: ScanResult) -> str:
    """Say what to do next."""
    if (advice := BY_GROUND.get(result.ground)) is not None:
        return advice
    deciding = [each.detection for each in result.evidence if each.decides]
    told = not any(each.undetermined for each in deciding)
    uncompared = told and any(each.p_value is None for each in deciding)
    return UNCOMPARED if result.verdict == "inconclusive" and uncompared else ADVICE[result.verdict]


def _detector_row(evidence: Evidence, clean: LabelledImages) -> doc.DetectorRow:
    detection = evidence.detection
    flagged = detection.is_backdoored
    said = f"not determined: {detection.undetermined}" if detection.undetermined else finding(evidence, clean)
    shown = "" if evidence.decides else " Shown for comparison, it does not decide the verdict."
    return doc.DetectorRow(
        name=evidence.name,
        title=evidence.title,
        source=evidence.source,
        kind=evidence.kind,
        decides=evidence.decides,
        score=detection.score,
        threshold=detection.threshold,
        threshold_source=detection.threshold_source,
        p_value=detection.p_value,
        verdict="undetermined" if flagged is None else "backdoored" if flagged else "clean",
        undetermined=detection.undetermined,
        target_class=detection.target_class,
        seconds=evidence.seconds,
        summary=sentence(said) + shown,
        evidence=dict(detection.evidence),
    )


def _trigger(recovered: RecoveredTrigger, clean: LabelledImages) -> doc.RecoveredTrigger:
    trigger = recovered.trigger
    return doc.RecoveredTrigger(
        target_class=trigger.target_class,
        target_name=clean.name_of(trigger.target_class),
        l1_pixels=trigger.norm,
        image_fraction=recovered.image_fraction,
        success=rate(recovered.held_out),
        success_seen=trigger.success,
        **_trigger_pictures(recovered, clean),
    )


def _trigger_pictures(recovered: RecoveredTrigger, clean: LabelledImages) -> dict[str, str]:
    """Draw the trigger; without Pillow, which a scan itself does not need, there are no pictures."""
    trigger = recovered.trigger
    others = clean.subset(clean.labels != trigger.target_class)
    image = as_float(others.images[:1]).cpu()
    pictures = {
        "mask_png": trigger.mask.expand(3, -1, -1),
        "pattern_png": 0.5 + trigger.mask * (trigger.pattern - 0.5),
        **({"clean_png": image[0], "stamped_png": trigger(image)[0]} if len(image) else {}),
    }
    try:
        return {name: png(picture) for name, picture in pictures.items()}
    except MissingDependencyError:
        return {}


def _suppression(exposure: Exposure | None, scan: Scan) -> doc.Suppression | None:
    if exposure is None:
        return None
    reasons = {
        "accuracy": f"the clean accuracy fell to {scan.suppression.stop_accuracy:.0%} or below",
        "budget": "the budget of steps ran out",
        "not finite": "the loss overflowed",
    }
    suppressed = exposure.suppressed
    return doc.Suppression(
        accuracy=list(suppressed.accuracies),
        steps=[check.step for check in suppressed.checks],
        stop_reason=reasons[suppressed.stop_reason],
        norm_mode=scan.suppression.norm_mode,
        class_share=suppressed.class_share.tolist(),
    )


def _scatter(exposure: Exposure | None) -> doc.Scatter | None:
    if exposure is None:
        return None
    layers = list(exposure.before.magnitude)
    lengths = [len(exposure.before.magnitude[name]) for name in layers]

    def flat(values: Mapping[str, Tensor]) -> list[float]:
        return [round(value, 6) for name in layers for value in values[name].tolist()]

    return doc.Scatter(
        layers=layers,
        layer_of=[index for index, length in enumerate(lengths) for _ in range(length)],
        magnitude=flat(exposure.before.magnitude),
        saliency=flat(exposure.before.saliency),
        magnitude_after=flat(exposure.after.magnitude),
        saliency_after=flat(exposure.after.saliency),
        rho=exposure.before.correlation,
        rho_after=exposure.after.correlation,
    )
