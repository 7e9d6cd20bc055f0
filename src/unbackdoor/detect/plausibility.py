"""Is this the model and the data that belong together? Asked before any verdict.

A wrong normalisation, label order or architecture makes every method useless, and a careless report would
call the result a finding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from unbackdoor.compute import logits_of
from unbackdoor.models.normalise import PRESETS, NormalisedModel
from unbackdoor.rates import Rate
from unbackdoor.suppression import confusion_of
from unbackdoor.types import LabelledImages

MOST_PROBED = 200
"""Images on which other normalisations are tried."""


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
        chance_factor: An accuracy below this many times 1 / K, or below 30 %, permits no verdict.

    Returns:
        The accuracy, and a sentence on what is probably wrong.
    """
    logits = logits_of(model, clean.images).cpu()
    classes = logits.shape[1]
    if not bool(torch.isfinite(logits).all()):
        return Plausibility(
            Rate(0, len(clean)), "the model's outputs are not finite numbers; the checkpoint is damaged"
        )
    accuracy = Rate.of(logits.argmax(1) == clean.labels.cpu())
    lowest = max(chance_factor / classes, min(0.3, 1.2 / classes + 0.1))
    if accuracy.value >= max(0.6, lowest):
        return Plausibility(accuracy)
    cause = _cause(model, clean, accuracy.value)
    sentence = f"the model is right on only {accuracy.value:.1%} of {accuracy.n} clean images"
    if accuracy.value >= lowest:
        return Plausibility(accuracy, warnings=(f"{sentence.capitalize()}: {cause}.",))
    return Plausibility(accuracy, f"{sentence}: {cause}")


def _cause(model: nn.Module, clean: LabelledImages, accuracy: float) -> str:
    confusion = confusion_of(model, clean)
    relabelled = float(confusion.max(1).values.sum() / confusion.sum())
    distinct = len(set(confusion.argmax(1).tolist()))
    if relabelled > accuracy + 0.3 and distinct > 0.7 * len(confusion):
        return (
            f"but {relabelled:.1%} would be right if the classes were ordered otherwise, so the label order "
            "of the images probably differs from the model's; give it with --class-names"
        )
    if not isinstance(model, NormalisedModel):
        better = _better_normalisation(model, clean, accuracy)
        if better:
            return better
    return (
        "probably the normalisation (--normalize or --mean and --std), the label order (--class-names), the "
        "architecture or the images are not those that the model was trained with"
    )


def _better_normalisation(model: nn.Module, clean: LabelledImages, accuracy: float) -> str:
    probed = clean.subset(torch.arange(min(MOST_PROBED, len(clean))))
    channels = probed.images.shape[1]
    found = {
        name: Rate.of(
            logits_of(NormalisedModel(model, mean, std), probed.images).cpu().argmax(1) == probed.labels.cpu()
        ).value
        for name, (mean, std) in PRESETS.items()
        if len(mean) in (1, channels)
    }
    name = max(found, key=lambda preset: found[preset])
    if found[name] < accuracy + 0.1:
        return ""
    return (
        f"with --normalize {name} it would be right on {found[name]:.1%}, so the model probably expects "
        "normalised images"
    )
