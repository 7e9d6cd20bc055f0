"""Ask one detector about one model, infected or clean.

Detectors of models see clean images. Detectors of training sets see the set that the model was trained on:
clean images, those of the poison plan with the trigger and their new labels, and speak on the model by their
own ``judge``. What the plan does not hold is not shown: perturbations beside the trigger (CL, FC), weaker
triggers and covers of training (SIG, Adap-Blend, Adap-Patch), and decoys that are drawn anew in each epoch
(WaNet, IAB, BPP, DFST). Detectors of inputs see triggered and clean test images; such a detector counts as
having found the backdoor if it flags at least half of the triggered images with a threshold that one clean
image in a hundred exceeds. That rule is ours: the MNP paper (Table 4) does not say how inputs become a
verdict on a model.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.attacks.poisoning import stamp
from unbackdoor.bench.saliency import triggered
from unbackdoor.errors import InvalidInputError
from unbackdoor.rates import Rate
from unbackdoor.types import Detection, Infected, LabelledImages, Progress, silent

FALSE_POSITIVES = 0.01
"""Share of clean inputs that the threshold of a detector of inputs flags."""

FOUND = 0.5
"""Share of triggered inputs that have to be flagged."""

ALSO_AT = (0.05, 0.1, 0.2)
"""Shares of clean inputs at which it is told as well how many triggered ones are flagged: a score that
triggered inputs share with more than one clean image in a hundred flags none at the share above."""

MOST_INPUTS = 1000
"""Triggered, and as many clean, inputs."""


def detect(
    detector: Any,  # noqa: ANN401 - one of many dataclasses
    model: nn.Module,
    infected: Infected | None,
    clean: LabelledImages,
    *,
    train: LabelledImages,
    test: LabelledImages,
    samples: int = 0,
    generator: torch.Generator,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Return what the detector says, as JSON values.

    Args:
        detector: A configured detector of models, training sets or inputs.
        model: The suspect.
        infected: What its attack left behind; None for a clean model.
        clean: The defender's clean images.
        train: The training set before poisoning.
        test: Images that nobody trained on.
        samples: Images of the training set that are shown; 0 for all.
        generator: All randomness follows it.
        progress: Called during the work.

    Raises:
        InvalidInputError: If a detector of inputs is asked about a clean model.
    """
    if judges_models(detector):
        kind = "model"
        found = _described(detector.score(model, clean, generator=generator, progress=progress))
    elif judges_training_sets(detector):
        kind = "training set"
        shown = training_set(train, infected, samples, rng.spawn_for(generator, "training set"))
        detection = detector.judge(
            model, shown.images, clean, labels=shown.labels, generator=generator, progress=progress
        )
        found = _described(detection)
    else:
        kind = "inputs"
        found = _inputs(detector, model, infected, clean, test, generator, progress)
    rule = infected.label_rule.describe() if infected else {}
    return {"kind": kind, **found, "true_target": rule.get("target_class")}


def judges_models(detector: Any) -> bool:  # noqa: ANN401 - one of many dataclasses
    """Say whether a detector, ours or the user's own, is given a model and clean images alone."""
    return "samples" not in inspect.signature(detector.score).parameters


def judges_training_sets(detector: Any) -> bool:  # noqa: ANN401 - one of many dataclasses
    """Say whether a detector is made for training sets, and speaks on the model by them."""
    return hasattr(detector, "judge")


def training_set(
    train: LabelledImages, infected: Infected | None, samples: int, generator: torch.Generator
) -> LabelledImages:
    """Return what the model was trained on, or a random part of it."""
    whole = train if infected is None or not len(infected.plan.indices) else _stamped(train, infected)
    if not samples or samples >= len(whole):
        return whole
    return whole.subset(torch.randperm(len(whole), generator=generator)[:samples])


def _stamped(train: LabelledImages, infected: Infected) -> LabelledImages:
    last = int(infected.plan.indices.max())
    if last >= len(train):
        raise InvalidInputError(
            f"the poison plan names image {last} of a training set of {len(train)}; "
            "give the data that the model was trained on."
        )
    return stamp(train, infected.plan, infected.trigger)


def _described(detection: Detection) -> dict[str, Any]:
    return {
        "score": _finite(detection.score),
        "threshold": _finite(detection.threshold),
        "threshold_source": detection.threshold_source,
        "p_value": detection.p_value,
        "flagged": detection.is_backdoored,
        "undetermined": detection.undetermined,
        "target_class": detection.target_class,
    }


def _inputs(
    detector: Any,  # noqa: ANN401
    model: nn.Module,
    infected: Infected | None,
    clean: LabelledImages,
    test: LabelledImages,
    generator: torch.Generator,
    progress: Progress,
) -> dict[str, Any]:
    if infected is None:
        raise InvalidInputError("a clean model has no triggered inputs to tell from clean ones.")
    order = torch.randperm(len(test), generator=rng.spawn(generator))
    counted = infected.label_rule.counts(test.labels)[order]
    bad = triggered(test.subset(order[counted][:MOST_INPUTS]), infected).images
    good = test.subset(order[: len(bad)]).images
    good = good if good.dtype == bad.dtype else (good * 255).round().to(bad.dtype)
    scores = detector.score(
        model, torch.cat([bad, good]), clean, labels=None, generator=generator, progress=progress
    )
    on_bad, on_good = scores[: len(bad)], scores[len(bad) :]
    caught = caught_at(FALSE_POSITIVES, on_bad, on_good)
    return {
        "score": _finite(caught.value),
        "threshold": FOUND,
        "threshold_source": f"half of the triggered inputs, at {FALSE_POSITIVES:.0%} false positives",
        "p_value": None,
        "flagged": caught.value >= FOUND,
        "undetermined": "",
        "target_class": None,
        "inputs_caught": caught.describe(),
        "inputs_caught_at": {f"{share:g}": caught_at(share, on_bad, on_good).value for share in ALSO_AT},
        "area_under_curve": area(on_bad, on_good),
    }


def caught_at(share: float, positive: Tensor, negative: Tensor) -> Rate:
    """Return how many scores of the first kind are above what a share of the second kind exceeds.

    Args:
        share: In (0, 1).
        positive: ``(P,)``.
        negative: ``(N,)``.
    """
    return Rate.of(positive.double() > torch.quantile(negative.double(), 1 - share))


def area(positive: Tensor, negative: Tensor) -> float:
    """Return the chance that a score of the first kind is above one of the second; ties count half.

    Args:
        positive: ``(P,)``.
        negative: ``(N,)``.
    """
    ordered = negative.double().sort().values
    below = torch.searchsorted(ordered, positive.double(), right=False)
    upto = torch.searchsorted(ordered, positive.double(), right=True)
    return float((below + upto).double().mean() / (2 * len(negative)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
