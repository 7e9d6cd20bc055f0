"""Screen inputs of a model, or what it was trained on: the work behind ``unbackdoor screen``."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import unbackdoor
from unbackdoor import catalogue, rng
from unbackdoor.bench.detecting import judges_models
from unbackdoor.catalogue import dashed
from unbackdoor.compute import NO_CLASS, predictions_of
from unbackdoor.detect.registry import SAMPLE_DETECTORS
from unbackdoor.detect.screening import Screening, at_most, more_than_chance, p_values, together
from unbackdoor.errors import InvalidInputError
from unbackdoor.report import documents as doc
from unbackdoor.settings import configure
from unbackdoor.types import LabelledImages, Progress

BEYOND_CHANCE, PERHAPS = 0.01 + 1e-9, 0.1 + 1e-9
"""How likely at least so many false alarms may be, if nothing is triggered, for it to be said that something
is; and up to where nothing is said."""

LIMITS = (
    "Inputs are compared with clean images: inputs of another kind (other cameras, classes, or sizes before "
    "resizing) stand out without any trigger.",
    "An input that looks clean may carry a trigger that all detectors miss; none sees all attacks.",
    "Near the bound it hangs on the draw of the clean images what is flagged; try another --seed.",
)

Verdict = Literal["triggered", "nothing found", "inconclusive"]

TRAINING_LIMITS = (
    "The reading of a training set as a verdict on its model is ours, and its threshold is not calibrated.",
    "What the labels of the training set say is believed, as is that the clean images are clean.",
)


RANKS = "This detector ranks images and does not say which are poisoned; its scores are in Python alone."


class Flagged(doc.Part):
    """An input that looks triggered.

    Args:
        name: Its file, or its row.
        p_value: Largest share of clean images that look so suspicious; None for training sets.
        score: Of the detector, for training sets; None elsewhere.
        found_by: The detectors that would list it by themselves; empty for training sets.
        answer: What the model says.
        answer_name: The name of that class.
    """

    name: doc.PathText
    p_value: doc.Fraction | None = None
    score: doc.Number = None
    found_by: doc.Many[str] = ()
    answer: doc.Count
    answer_name: str = ""


class ScreenDocument(doc.Part):
    """What ``unbackdoor screen`` found.

    Args:
        inputs: Where the inputs come from.
        count: How many.
        detectors: What they were screened with.
        left_out: Detectors that cannot read this model.
        false_alarms: Largest share of clean inputs that is flagged; None for training sets.
        chance: How likely at least so many flagged inputs are if none is triggered (``more_than_chance``);
            None for training sets.
        verdict: ``triggered``: far more are flagged than false alarms explain, or the training set is
            poisoned; ``inconclusive``: more than are expected, but not far more, or the detector abstains.
        reason: One sentence.
        target_class: What most flagged inputs are answered with, or the poisoned class.
        flagged: The most suspicious first.
        warnings: Things to know before believing the result.
        limits: What could fool it.
    """

    kind: Literal["screen"] = "screen"
    schema_version: Literal[1] = doc.SCHEMA_VERSION
    tool_version: str = unbackdoor.__version__
    created: doc.Utc = Field(default_factory=doc.utc_now)
    seconds: doc.Seconds
    model: doc.ModelInfo
    data: doc.DataInfo
    inputs: doc.PathText
    count: doc.Count
    detectors: doc.Many[str]
    left_out: doc.Many[str] = ()
    false_alarms: doc.Fraction | None = None
    chance: doc.Fraction | None = None
    verdict: Verdict
    reason: str
    target_class: doc.Count | None = None
    target_name: str = ""
    flagged: doc.Many[Flagged] = ()
    warnings: doc.Many[str] = ()
    limits: doc.Many[str] = ()


@dataclass(frozen=True, eq=False)
class Inputs:
    """What is screened.

    Args:
        source: The file or folder, as the user named it.
        images: uint8 or float32 ``(N, C, H, W)``.
        labels: int64 ``(N,)``, for training sets; None without.
        names: One an image.
    """

    source: str
    images: Tensor
    labels: Tensor | None
    names: Sequence[str]


def detector_named(name: str, settings: Sequence[str]) -> Any:  # noqa: ANN401 - one of many dataclasses
    """Return a configured detector of inputs or of training sets.

    Args:
        name: One of ``SAMPLE_DETECTORS``, or a class of the user's own, as ``path/to/file.py:Class``.
        settings: Its options, as ``--set`` takes them.

    Raises:
        InvalidInputError: If there is no such detector or option, or the user's class judges models.
        UnsupportedModelError: If the user's code cannot be imported.
    """
    kind = "detector of inputs"
    detector = configure(
        catalogue.configured(kind, SAMPLE_DETECTORS, name, paper=False, own="score"), settings
    )
    if judges_models(detector):
        raise InvalidInputError(f"{name} judges models, not inputs; give it to scan --detector.")
    return detector


def check_resolution(clean: LabelledImages, detector: Any, false_alarms: float) -> None:  # noqa: ANN401
    """Fail before the work if even one detector alone could flag nothing with so few clean images.

    Raises:
        InvalidInputError: If so.
    """
    _check_resolution(_kept(detector, clean), 1, false_alarms)


def screen_inputs(
    model: nn.Module,
    inputs: Inputs,
    clean: LabelledImages,
    *,
    detector: Any,  # noqa: ANN401 - one of many dataclasses
    false_alarms: float,
    seed: int,
    about: Mapping[str, Any],
    progress: Progress,
) -> ScreenDocument:
    """Compare inputs with clean images, and say which look triggered.

    Args:
        model: The network in use; left untouched.
        inputs: What it is given; labels are not used.
        clean: Clean images with labels, of which a share is kept for comparison (``Screening.kept``).
        detector: Of inputs.
        false_alarms: Largest share of clean inputs that is flagged, in (0, 0.5].
        seed: Of all random choices.
        about: Fields of the document on model and data.
        progress: Called during the work.

    Returns:
        What was found, the most suspicious inputs first.

    Raises:
        InvalidInputError: If there are too few clean images for this rate of false alarms, or the model gives
            no numbers for some inputs.
        UnsupportedModelError: If no detector can read the model.
    """
    start = time.perf_counter()
    answers = _answers(model, inputs)
    used = detector.asked if isinstance(detector, Screening) else (detector,)
    found = p_values(
        used, model, inputs.images, clean,
        kept=_share(detector), generator=rng.generator(seed), progress=progress,
    )  # fmt: skip
    kept = _kept(detector, clean)
    _check_resolution(kept, len(found), false_alarms)
    p = together(found)
    chosen = torch.nonzero(at_most(p, false_alarms)).flatten()
    chosen = chosen[p[chosen].argsort(stable=True)]
    flagged = [
        Flagged(
            name=inputs.names[row],
            p_value=float(p[row]),
            found_by=[
                dashed(name) for name, own in found.items() if at_most(own[row] * len(found), false_alarms)
            ],
            answer=answers[row],
            answer_name=clean.name_of(answers[row]),
        )
        for row in chosen.tolist()
    ]
    chance = more_than_chance(found, kept, false_alarms)
    target = _most_common(flagged)
    return ScreenDocument(
        seconds=time.perf_counter() - start,
        inputs=inputs.source,
        count=len(p),
        detectors=[dashed(name) for name in found],
        left_out=[dashed(each.name) for each in used if each.name not in found],
        false_alarms=false_alarms,
        chance=chance,
        verdict=_verdict(chance),
        reason=_reason(len(flagged), len(p), false_alarms, chance),
        target_class=target,
        target_name="" if target is None else clean.name_of(target),
        flagged=flagged,
        limits=LIMITS,
        **about,
    )


def screen_training_set(
    model: nn.Module,
    inputs: Inputs,
    clean: LabelledImages,
    *,
    detector: Any,  # noqa: ANN401 - one of many dataclasses
    seed: int,
    about: Mapping[str, Any],
    progress: Progress,
) -> ScreenDocument:
    """Say whether a training set is poisoned by a detector's own rule, and which images it would remove.

    Args:
        model: What was trained on it; left untouched.
        inputs: The training set, with its labels.
        clean: Clean images with labels.
        detector: Of training sets.
        seed: Of all random choices.
        about: Fields of the document on model and data.
        progress: Called during the work.

    Returns:
        What was found, the most suspicious images first.

    Raises:
        InvalidInputError: If a label has no output of the model, or it gives no numbers for some images.
        UnsupportedModelError: If the detector cannot read the model.
    """
    start = time.perf_counter()
    answers = _answers(model, inputs)
    said, scores = (
        ask(
            model, inputs.images, clean,
            labels=inputs.labels, generator=rng.generator(seed), progress=progress,
        )
        for ask in (detector.judge, detector.score)
    )  # fmt: skip
    poisoned = bool(said.is_backdoored)
    # Some rank the images of each class and leave it to the user how many of them go.
    decides = poisoned and not getattr(detector, "ranks_only", False)
    chosen = torch.nonzero(scores > 0).flatten() if decides else torch.zeros(0, dtype=torch.int64)
    chosen = chosen[scores[chosen].argsort(descending=True, stable=True)]
    flagged = [
        Flagged(
            name=inputs.names[row],
            score=float(scores[row]),
            answer=answers[row],
            answer_name=clean.name_of(answers[row]),
        )
        for row in chosen.tolist()
    ]
    verdict: Verdict = "inconclusive" if said.undetermined else "triggered" if poisoned else "nothing found"
    target = said.target_class if poisoned else None
    where = "at or above" if poisoned else "below"
    reason = said.undetermined or (
        f"the most suspicious class has a score of {said.score:.3g}, {where} the threshold of "
        f"{said.threshold:.3g}"
    )
    return ScreenDocument(
        seconds=time.perf_counter() - start,
        inputs=inputs.source,
        count=len(inputs.images),
        detectors=[dashed(detector.name)],
        verdict=verdict,
        reason=reason,
        target_class=target,
        target_name="" if target is None else clean.name_of(target),
        flagged=flagged,
        limits=TRAINING_LIMITS if decides or not poisoned else (*TRAINING_LIMITS, RANKS),
        **about,
    )


def _share(detector: Any) -> float:  # noqa: ANN401 - one of many dataclasses
    """Return the share of the clean images that a detector does not see."""
    return detector.kept if isinstance(detector, Screening) else Screening().kept


def _kept(detector: Any, clean: LabelledImages) -> int:  # noqa: ANN401 - one of many dataclasses
    return round(_share(detector) * len(clean))


def _check_resolution(kept: int, detectors: int, false_alarms: float) -> None:
    """Refuse a rate that no input could be flagged at: p-values are never below one over the images."""
    smallest = detectors / (kept + 1)
    if smallest > false_alarms * (1 + 1e-9):
        raise InvalidInputError(
            f"{kept} clean images kept for comparison with {detectors} detector(s) cannot flag anything at a "
            f"false-alarm rate of {false_alarms:g}; give more images with --clean-count, or --false-alarms "
            f"{math.ceil(1000 * smallest) / 1000:g} or more."
        )


def _answers(model: nn.Module, inputs: Inputs) -> list[int]:
    """Return the model's answer to each input.

    Raises:
        InvalidInputError: If some are none.
    """
    answers: list[int] = predictions_of(model, inputs.images).tolist()
    if without := [name for name, answer in zip(inputs.names, answers, strict=True) if answer == NO_CLASS]:
        raise InvalidInputError(
            f"the model gives no numbers for {len(without)} of {len(answers)} inputs, {without[0]!r} first; "
            "leave them out, or check the model's weights."
        )
    return answers


def _most_common(flagged: Sequence[Flagged]) -> int | None:
    answers = Counter(each.answer for each in flagged)
    return answers.most_common(1)[0][0] if answers else None


def _verdict(chance: float) -> Verdict:
    return (
        "triggered" if chance <= BEYOND_CHANCE else "inconclusive" if chance <= PERHAPS else "nothing found"
    )


def _reason(flagged: int, count: int, false_alarms: float, chance: float) -> str:
    if not flagged:
        return f"none of {count:,} input(s) looks triggered at a false-alarm rate of {false_alarms:g}"
    allowed = f"at most about {round(false_alarms * count, 2):,g} false alarms are expected"
    if chance <= PERHAPS:
        return f"{flagged:,} of {count:,} inputs look triggered; {allowed} (so many: chance {chance:.2g})"
    return f"{flagged:,} of {count:,} inputs look triggered, no more than chance explains: {allowed}"
