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

from unbackdoor.compute import logits_of
from unbackdoor.models.normalise import PRESETS, NormalisedModel
from unbackdoor.rates import Rate
from unbackdoor.suppression import confusion_of
from unbackdoor.types import LabelledImages, as_float

MOST_PROBED = 200
"""Images on which other normalisations and sizes are tried."""

CLEAR_GAIN = 0.1
"""By how much the accuracy must rise with another normalisation or size for that to be the cause."""

SIZES = (28, 32, 48, 64, 96, 128, 224)
"""Usual image sizes, tried where the accuracy is low."""

MOST_SHIFTED = 0.1
"""In standard deviations; see ``statistics_shift`` and benchmarks/image_shift.py."""

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
            Rate(0, len(clean)),
            f"{len(damaged)} of the model's tensors, {damaged[0]!r} first, hold values that are not finite "
            "numbers; the checkpoint is damaged",
        )
    logits = logits_of(model, clean.images).cpu()
    classes = logits.shape[1]
    if not bool(torch.isfinite(logits).all()):
        return Plausibility(
            Rate(0, len(clean)), "the model's outputs are not finite numbers; the checkpoint is damaged"
        )
    answers = logits.argmax(1)
    accuracy = Rate.of(answers == clean.labels.cpu())
    lowest = min(max(chance_factor / classes, min(0.3, 1.2 / classes + 0.1)), 0.5 + 0.5 / classes)
    if accuracy.value >= max(0.6, lowest):
        return Plausibility(accuracy, warnings=_shift_warning(model, clean))
    cause, known = _cause(model, clean, answers, accuracy.value)
    sentence = f"the model is right on only {accuracy.value:.1%} of {accuracy.n} clean images"
    if accuracy.value >= lowest and not known:
        warning = f"{sentence.capitalize()}: {cause}."
        return Plausibility(accuracy, warnings=(warning, *_shift_warning(model, clean)))
    return Plausibility(accuracy, f"{sentence}: {cause}")


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


def _shift_warning(model: nn.Module, clean: LabelledImages) -> tuple[str, ...]:
    if len(clean) < ENOUGH_FOR_SHIFT:
        return ()
    shift = statistics_shift(model, clean.images[:MOST_PROBED])
    if not shift > MOST_SHIFTED:  # NaN: nothing to compare with
        return ()
    return (
        "Inside the network the images look unlike those that it was trained on (means differ by "
        f"{shift:.2f} standard deviations): they may be of another source, size, brightness or "
        "normalisation, or the network was changed after its training, as by pruning; the thresholds may not "
        "hold.",
    )


def _cause(model: nn.Module, clean: LabelledImages, answers: Tensor, accuracy: float) -> tuple[str, bool]:
    """Return the most likely cause of a low accuracy, and whether trying confirmed it."""
    confusion = confusion_of(model, clean)
    relabelled = float(confusion.max(1).values.sum() / confusion.sum())
    distinct = len(set(confusion.argmax(1).tolist()))
    if relabelled > accuracy + 0.3 and distinct > 0.7 * len(confusion):
        return (
            f"but {relabelled:.1%} would be right if the classes were ordered otherwise, so the label order "
            "of the images probably differs from the model's; give it with --class-names"
        ), True
    better = max((*_normalisations(model, clean), *_sizes(model, clean)), default=(0.0, ""))
    if better[0] >= accuracy + CLEAR_GAIN:
        return better[1], True
    if len(set(answers.tolist())) == 1 and len(clean) > 1:
        return (
            f"it answers {clean.name_of(int(answers[0]))!r} for every image, so it is untrained, damaged or "
            "gets other inputs than in training (--normalize or --mean and --std)"
        ), False
    return (
        "probably the normalisation (--normalize or --mean and --std), the label order (--class-names), the "
        "architecture or the images are not those that the model was trained with"
    ), False


def _normalisations(model: nn.Module, clean: LabelledImages) -> Iterator[tuple[float, str]]:
    """Try the known normalisations in the place of the model's."""
    probed = _probed(clean)
    network = model.network if isinstance(model, NormalisedModel) else model
    if isinstance(model, NormalisedModel):
        yield (
            _accuracy(network, probed.images, probed.labels),
            "without the normalisation that it was given it would be right more often, so the network "
            "probably normalises by itself; leave --normalize, --mean and --std out",
        )
    for name, (mean, std) in PRESETS.items():
        if len(mean) in (1, probed.images.shape[1]):
            accuracy = _accuracy(NormalisedModel(network, mean, std), probed.images, probed.labels)
            yield (
                accuracy,
                f"with --normalize {name} it would be right on {accuracy:.1%}, so the model probably expects "
                "normalised images",
            )


def _sizes(model: nn.Module, clean: LabelledImages) -> Iterator[tuple[float, str]]:
    """Try the usual image sizes."""
    probed = _probed(clean)
    images = as_float(probed.images)
    height, width = images.shape[2:]
    for size in SIZES:
        # Much larger images would take minutes, and nobody trains on enlarged ones.
        if size > 2 * max(height, width) or (height, width) == (size, size):
            continue
        resized = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True).clamp(0, 1)
        try:
            accuracy = _accuracy(model, resized, probed.labels)
        except RuntimeError:  # a network that takes one size only
            continue
        yield (
            accuracy,
            f"with --image-size {size} it would be right on {accuracy:.1%}, so the model was probably "
            "trained on images of that size",
        )


def _probed(clean: LabelledImages) -> LabelledImages:
    return clean.subset(torch.arange(min(MOST_PROBED, len(clean))))


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return Rate.of(logits_of(model, images).cpu().argmax(1) == labels.cpu()).value
