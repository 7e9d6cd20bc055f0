"""What sample detectors share: checked inputs and scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unbackdoor.compute import NO_CLASS, check_fits
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.types import LabelledImages


def check_samples(
    model: nn.Module, samples: Tensor, clean: LabelledImages, labels: Tensor | None, *, at_least: int = 2
) -> int:
    """Check that samples, clean images and model belong together; return the model's outputs K.

    Args:
        model: Takes float images in [0, 1].
        samples: ``(N, C, H, W)``, uint8 or float32 in [0, 1].
        clean: Clean images with labels.
        labels: int64 ``(N,)`` or None.
        at_least: Fewest clean images.

    Raises:
        InvalidInputError: If there are no samples, fewer clean images, or shapes, types or labels do not fit.
        UnsupportedModelError: If the model cannot be run on such an image.
    """
    outputs = check_fits(model, clean, purpose="sample detection", at_least=at_least)
    # The checks of images with labels are those of samples, whose labels may be missing.
    placeholder = torch.zeros(len(samples), dtype=torch.int64)
    checked = LabelledImages(samples, placeholder if labels is None else labels.cpu())
    check_fits(model, checked, purpose="sample detection")
    if samples.shape[1:] != clean.images.shape[1:]:
        raise InvalidInputError(
            f"samples must have the shape of the clean images, {tuple(clean.images.shape[1:])}, got "
            f"{tuple(samples.shape[1:])}; resize them."
        )
    return outputs


def check_scores(scores: Tensor) -> Tensor:
    """Return the scores of samples, ``(N,)``.

    Raises:
        UnsupportedModelError: If some are no numbers, since the model's answers are not.
    """
    _refuse_broken(~scores.isfinite())
    return scores


def check_answers(answers: Tensor) -> Tensor:
    """Return the classes that a model answers with, int64 ``(N,)`` from ``predictions_of``.

    Raises:
        UnsupportedModelError: If some are none, since the model's answers are no numbers.
    """
    _refuse_broken(answers == NO_CLASS)
    return answers


def _refuse_broken(broken: Tensor) -> None:
    count = int(broken.sum())
    if count:
        raise UnsupportedModelError(
            f"the model's answers are no numbers for {count} of {len(broken)} samples, so that they cannot "
            "be scored; its weights are too large or broken."
        )
