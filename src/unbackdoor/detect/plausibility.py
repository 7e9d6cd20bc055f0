"""Are these the model and the data that belong together? Asked before any verdict.

A wrong normalisation, image size, label order or architecture makes every method useless, and a careless
report would call the result a finding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from unbackdoor.compute import device_of, logits_of
from unbackdoor.detect.floor import mean_recall
from unbackdoor.models.normalise import PRESETS, NormalisedModel
from unbackdoor.rates import Rate
from unbackdoor.suppression import confusion_from
from unbackdoor.types import LabelledImages, as_float

MOST_PROBED = 200
"""Images on which other normalisations, channel orders and sizes are tried."""

LOW = 0.6
"""An accuracy below this is worth a warning, whatever the number of classes."""

FEWEST_TO_RELABEL = 2
"""Images that a class must have to say something on the order of the labels."""

FEWEST_TO_EXCHANGE = 3
"""Images that a class must have to be called exchanged with another."""

CLEAR_GAIN = 0.1
"""By how much the accuracy must rise with another normalisation, channel order or size for that to be the
cause."""

AS_GOOD = 0.03
"""Normalisations whose accuracy differs by less than this are named together."""

UNKNOWN_CAUSE = (
    "probably the normalisation (--normalize or --mean and --std), the label order (--class-names), the "
    "architecture or the images are not those that the model was trained with"
)

SIZES = (28, 32, 48, 64, 96, 128, 224)
"""Usual image sizes."""

MOST_SHIFTED = 0.1
"""In standard deviations; see ``statistics_shift`` and benchmarks/image_shift.py."""

SHIFTED = "Inside the network the images look unlike those"
"""How the warning of moved statistics begins; what a scan compares with may not hold then."""

ENOUGH_FOR_SHIFT = 50
"""With fewer images the shift is mostly noise."""


@dataclass(frozen=True)
class Plausibility:
    """Whether a verdict makes sense.

    Args:
        accuracy: Of the model on the clean images.
        problem: Empty, or why no verdict can be given, with the most likely cause.
        warnings: What is odd, but no obstacle.
    """

    accuracy: Rate
    problem: str = ""
    warnings: tuple[str, ...] = ()


def check_plausible(model: nn.Module, clean: LabelledImages, *, chance_factor: float = 2.0) -> Plausibility:
    """Compare the clean accuracy with chance, and look for the cause if it is low.

    Each class that there are images of weighs the same, so that one frequent class decides nothing. Causes
    are tried where that accuracy is low, where the statistics inside the network have moved, and where it
    has no such statistics and could be much more accurate.

    Args:
        model: The suspect network; left untouched.
        clean: Clean images with labels.
        chance_factor: An accuracy below this many times 1 / K permits no verdict, nor one below a tenth more
            than chance; halfway from chance to 1 is enough for any K.

    Returns:
        The accuracy, and a sentence on what is probably wrong.
    """
    damaged = [name for name, tensor in model.state_dict().items() if not bool(tensor.isfinite().all())]
    if damaged:
        return Plausibility(
            Rate(0, 0),
            f"{len(damaged)} of the model's tensors, {damaged[0]!r} first, hold values that are not finite "
            "numbers; the checkpoint is damaged",
        )
    logits = logits_of(model, clean.images).cpu()
    classes = logits.shape[1]
    if not bool(torch.isfinite(logits).all()):
        return Plausibility(
            Rate(0, 0), "the model's outputs are not finite numbers; the checkpoint is damaged"
        )
    confusion = confusion_from(logits, clean.labels)
    accuracy = Rate(int(confusion.diagonal().sum()), len(clean))
    recall = mean_recall(confusion)
    sentence = _rightness(accuracy, recall)
    if constant := _constant_answer(confusion, clean):
        known = _cause(model, clean, confusion)
        return Plausibility(accuracy, f"{sentence}: {known or constant}")
    lowest = min(max(chance_factor / classes, min(0.3, 1.2 / classes + 0.1)), 0.5 + 0.5 / classes)
    is_low = recall < max(LOW, lowest)
    moved = statistics_shift(model, clean.images[:MOST_PROBED])
    shift = _shift_warning(moved) if len(clean) >= ENOUGH_FOR_SHIFT else ()
    # Without batch norms nothing inside tells whether the images are as in training.
    unknown = math.isnan(moved) and recall < 1 - CLEAR_GAIN
    known = _cause(model, clean, confusion) if is_low or shift or unknown else ""
    if known:
        return Plausibility(accuracy, f"{sentence}: {known}")
    if recall < lowest:
        return Plausibility(accuracy, f"{sentence}: {UNKNOWN_CAUSE}")
    low = (f"{sentence.capitalize()}: {UNKNOWN_CAUSE}.",) if is_low else ()
    return Plausibility(accuracy, warnings=(*low, *_exchanged(confusion, clean), *shift))


def statistics_shift(model: nn.Module, images: Tensor) -> float:
    """Return how far the statistics of ``images`` inside the network lie from those of its training.

    For each batch norm, the distance of its input's channel means from the running means, in running
    standard deviations, as the median over channels; then the median over the norms.

    Args:
        model: Left untouched.
        images: ``(N, C, H, W)``, uint8 or float32 in [0, 1].

    Returns:
        A non-negative number, or NaN if no batch norm keeps running statistics.
    """
    shifts: list[float] = []

    def measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is None or norm.running_var is None:
            return
        values = inputs[0].detach()
        means = values.mean([axis for axis in range(values.ndim) if axis != 1])
        deviations = (norm.running_var + norm.eps).sqrt()
        shifts.append(float(((means - norm.running_mean) / deviations).abs().median()))

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    try:
        logits_of(model, images, batch_size=max(1, len(images)))
    finally:
        for handle in handles:
            handle.remove()
    return float(torch.tensor(shifts).median()) if shifts else math.nan


def _shift_warning(shift: float) -> tuple[str, ...]:
    if not shift > MOST_SHIFTED:  # NaN: nothing to compare with
        return ()
    return (
        f"{SHIFTED} that it was trained on (means differ by "
        f"{shift:.2f} standard deviations): they may be of another source, size, brightness or "
        "normalisation, or the network was changed after its training, as by pruning; the thresholds may not "
        "hold.",
    )


def _rightness(accuracy: Rate, recall: float) -> str:
    sentence = f"the model is right on only {accuracy.value:.1%} of {accuracy.n} clean images"
    if abs(recall - accuracy.value) < 0.05:
        return sentence
    return f"{sentence}, on {recall:.1%} with each class weighing the same"


def _constant_answer(confusion: Tensor, clean: LabelledImages) -> str:
    """Say that images of several classes all get one answer; nothing if they do not."""
    answers, present = confusion.sum(0), confusion.sum(1) > 0
    if int((answers > 0).sum()) != 1 or int(present.sum()) < 2:
        return ""
    return (
        f"it answers {clean.name_of(int(answers.argmax()))!r} for every image, so it is untrained, damaged "
        "or gets other inputs than in training (--normalize or --mean and --std)"
    )


def _exchanged(confusion: Tensor, clean: LabelledImages) -> tuple[str, ...]:
    """Name classes whose images all go to another class, as where two names were exchanged."""
    counts = confusion.sum(1)
    shares = confusion.double() / counts.clamp_min(1).unsqueeze(1)
    highest = shares.max(1)
    wrong = [
        (label, int(highest.indices[label]))
        for label in range(len(confusion))
        if counts[label] >= FEWEST_TO_EXCHANGE
        and float(highest.values[label]) > 0.5
        and float(shares[label, label]) < 0.2
    ]
    if len(wrong) < 2 or {a for a, _ in wrong} != {b for _, b in wrong}:
        return ()
    told = ", ".join(f"{clean.name_of(a)!r} as {clean.name_of(b)!r}" for a, b in wrong)
    return (
        f"Images of {len(wrong)} classes are answered as one another's ({told}): their names are probably "
        "exchanged; check --class-names, or the labels.",
    )


def _cause(model: nn.Module, clean: LabelledImages, confusion: Tensor) -> str:
    """Return the cause of a low accuracy that trying confirms, or nothing."""
    # A class with one image is always right once its answer counts as its name.
    several = confusion[confusion.sum(1) >= FEWEST_TO_RELABEL].double()
    if len(several):
        shares = several / several.sum(1, keepdim=True)
        own = confusion.diagonal()[confusion.sum(1) >= FEWEST_TO_RELABEL] / several.sum(1)
        relabelled = float(shares.max(1).values.mean())
        distinct = len(set(shares.argmax(1).tolist()))
        if relabelled > float(own.mean()) + 0.3 and distinct > 0.7 * len(confusion):
            return (
                f"but {relabelled:.1%} would be right if the classes were ordered otherwise, so the label "
                "order of the images probably differs from the model's; give it with --class-names"
            )
    probed = _probed(clean)
    usual = _recall(model, probed.images, probed.labels)
    tried = (*_normalisations(model, probed), *_channels(model, probed), *_sizes(model, probed))
    # The first of equals: normalisations are likelier to be forgotten than sizes.
    better = max(tried, key=lambda pair: pair[0], default=(0.0, ""))
    return better[1] if better[0] >= usual + CLEAR_GAIN else ""


def _normalisations(model: nn.Module, probed: LabelledImages) -> Iterator[tuple[float, str]]:
    """Try the known normalisations in the place of the model's."""
    network = model.network if isinstance(model, NormalisedModel) else model
    if isinstance(model, NormalisedModel):
        yield (
            _tried(network, probed.images, probed.labels),
            "without the normalisation that it was given it would be right more often, so the network "
            "probably normalises by itself; leave --normalize, --mean and --std out",
        )
    recalls: dict[str, float] = {}
    for name, (mean, std) in PRESETS.items():
        if len(mean) in (1, probed.images.shape[1]):
            # Its mean and deviation belong where the network is.
            normalised = NormalisedModel(network, mean, std).to(device_of(model))
            recalls[name] = _tried(normalised, probed.images, probed.labels)
    best = max(recalls.values(), default=0.0)
    # Few images do not tell similar ones apart.
    close = sorted(
        (name for name in recalls if recalls[name] > best - AS_GOOD), key=lambda name: -recalls[name]
    )
    yield (
        best,
        f"with --normalize {' or '.join(close)} it would be right on {best:.1%}, so the model probably "
        "expects normalised images",
    )


def _channels(model: nn.Module, probed: LabelledImages) -> Iterator[tuple[float, str]]:
    """Try blue, green, red, as OpenCV reads images."""
    if probed.images.shape[1] == 3:
        recall = _tried(model, probed.images.flip(1), probed.labels)
        yield (
            recall,
            f"with the channels in reverse (BGR) it would be right on {recall:.1%}, so the model was "
            "probably trained on images as OpenCV reads them; reverse the channels of the images",
        )


def _sizes(model: nn.Module, probed: LabelledImages) -> Iterator[tuple[float, str]]:
    """Try the usual image sizes."""
    images = as_float(probed.images)
    height, width = images.shape[2:]
    for size in SIZES:
        # Much larger images would take minutes, and nobody trains on enlarged ones.
        if size > 2 * max(height, width) or (height, width) == (size, size):
            continue
        resized = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True).clamp(0, 1)
        recall = _tried(model, resized, probed.labels)
        yield (
            recall,
            f"with --image-size {size} it would be right on {recall:.1%}, so the model was probably "
            "trained on images of that size",
        )


def _probed(clean: LabelledImages) -> LabelledImages:
    return clean.subset(torch.arange(min(MOST_PROBED, len(clean))))


def _tried(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the mean recall on changed images, 0 if the network cannot be run on them."""
    try:
        return _recall(model, images, labels)
    except Exception:  # noqa: BLE001 - networks that take one size or range only say so as they like
        return 0.0


def _recall(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return mean_recall(confusion_from(logits_of(model, images), labels))
