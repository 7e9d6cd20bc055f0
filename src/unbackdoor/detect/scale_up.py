"""SCALE-UP: multiply an input's pixel values; a triggered one keeps its answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor.compute import EVALUATION_BATCH, device_of, predictions_of
from unbackdoor.detect.samples import check_answers, check_samples
from unbackdoor.errors import InvalidInputError
from unbackdoor.types import LabelledImages, Progress, as_float, silent

FEWEST_OF_A_CLASS = 2
"""A single image has no standard deviation."""


@dataclass(frozen=True)
class ScaleUp:
    """Suspect the samples that are answered alike after their pixel values were multiplied and clipped.

    Source: Guo, Li, Chen, Guo, Sun, Liu, "SCALE-UP: An Efficient Black-box Input-level Backdoor Detection via
    Analyzing Scaled Prediction Consistency", ICLR 2023, arXiv 2302.03251. The scaled prediction consistency
    (SPC) of a sample is the share of the copies ``clip(s x)``, s in ``scales``, that get the answer which the
    sample itself gets. That is the score of the data-free variant. The data-limited variant takes, from
    clean images of the class that the sample is answered with, the mean of their SPC off and divides by their
    standard deviation. The paper flags 0.5 and more in both, and prefers the data-limited one; the default
    here is the other. In an infected model scaled clean images, too, end in the attacked class: what it is
    answered with keeps its answer usually, so that triggered samples do not stand out in their class, while
    clean ones of other classes do (RESULTS.md).

    Public code disagrees: BackdoorBox takes one mean and deviation over all classes, which leaves the order
    of the data-free scores as it is, and compares scaled clean images with their labels; backdoor-toolbox
    has the scales 3, 5 and 7.

    Deviations: clean images belong to the class that the model answers with, and are compared with that
    answer, exactly as the samples are, so that labels are not needed. A class with fewer than two clean
    images takes the statistics of all. A standard deviation counts as ``1 / (S sqrt(12))`` at least, that of
    rounding to multiples of 1 / S for S scales: a class whose clean images all have the same SPC would
    otherwise divide by 0.

    The pixel values are those of images in [0, 1], before any normalisation. Images that are bright or dark
    by nature keep their answer as well.

    Args:
        variant: ``data_free`` reads the samples alone, ``data_limited`` compares with clean images.
        scales: What pixel values are multiplied by (the paper's S), each above 1.
    """

    name: ClassVar[str] = "scale_up"
    title: ClassVar[str] = "SCALE-UP: scaled prediction consistency"
    source: ClassVar[str] = "Guo et al. 2023, arXiv 2302.03251"
    needs: ClassVar[str] = "clean images; the samples in question"

    variant: Literal["data_free", "data_limited"] = "data_free"
    scales: tuple[float, ...] = (3.0, 5.0, 7.0, 9.0, 11.0)

    def __post_init__(self) -> None:
        if self.variant not in ("data_free", "data_limited"):
            raise InvalidInputError(f"variant must be 'data_free' or 'data_limited', got {self.variant!r}.")
        if not self.scales or not all(1 < scale < math.inf for scale in self.scales):
            raise InvalidInputError(f"scales must be one or more finite numbers above 1, got {self.scales}.")

    def score(
        self,
        model: nn.Module,
        samples: Tensor,
        clean: LabelledImages,
        *,
        labels: Tensor | None = None,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Tensor:
        """Return float32 ``(N,)``, higher for more suspicious samples; see ``SampleDetector``.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            samples: uint8 or float32 ``(N, C, H, W)`` in [0, 1].
            clean: Clean images; their labels are not used.
            labels: Checked, but not used: the model's answers are judged.
            generator: Unused: there is nothing random.
            progress: Called after each batch.

        Raises:
            InvalidInputError: If there are no samples, too few clean images, or labels do not fit.
            UnsupportedModelError: If the model cannot be run on such an image, or its answers are no numbers.
        """
        classes = check_samples(model, samples, clean, labels)
        theirs = consistency(model, samples, self.scales, stage="scaling samples", progress=progress)
        if self.variant == "data_free":
            return theirs.shares.float()
        usual = consistency(model, clean.images, self.scales, stage="scaling clean images", progress=progress)
        resolution = 1 / (len(self.scales) * math.sqrt(12))
        statistics = class_statistics(usual, classes, least_std=resolution)
        centred = theirs.shares - statistics.mean[theirs.answers]
        return (centred / statistics.std[theirs.answers]).float()


class Consistency(NamedTuple):
    """Answers int64 ``(N,)``, and the share of scaled copies that keep it, float64 ``(N,)``; on the CPU."""

    answers: Tensor
    shares: Tensor


class ClassStatistics(NamedTuple):
    """Mean and standard deviation of the shares for each class, float64 ``(K,)``."""

    mean: Tensor
    std: Tensor


def consistency(
    model: nn.Module,
    images: Tensor,
    scales: tuple[float, ...],
    *,
    stage: str = "scaling",
    progress: Progress = silent,
) -> Consistency:
    """Return each image's answer, and the share of its scaled copies that get the same.

    Args:
        model: Takes float images in [0, 1]; left untouched.
        images: uint8 or float32 ``(N, C, H, W)`` in [0, 1], at least one.
        scales: What pixel values are multiplied by.
        stage: How the work is called in ``progress``.
        progress: Called after each batch.
    """
    answers, shares = [], []
    for part in images.split(EVALUATION_BATCH):
        pixels = as_float(part.to(device_of(model)))
        answer = check_answers(predictions_of(model, pixels))
        kept = [predictions_of(model, (scale * pixels).clamp(max=1.0)) == answer for scale in scales]
        answers.append(answer)
        shares.append(torch.stack(kept).double().mean(0))
        progress(stage, sum(map(len, answers)), len(images))
    return Consistency(torch.cat(answers), torch.cat(shares))


def class_statistics(usual: Consistency, classes: int, *, least_std: float) -> ClassStatistics:
    """Return mean and standard deviation of the shares of clean images for each class that they get.

    Args:
        usual: Of clean images, at least two.
        classes: Outputs of the model, K.
        least_std: Smallest standard deviation, above 0.

    Returns:
        The statistics; classes with fewer than two images have those of all images.
    """
    member = nn.functional.one_hot(usual.answers, classes).double()
    count = member.sum(0)
    shares = usual.shares.unsqueeze(1)
    mean = (member * shares).sum(0) / count.clamp_min(1)
    squares = (member * (shares - mean).square()).sum(0)
    std = (squares / (count - 1).clamp_min(1)).sqrt()
    few = count < FEWEST_OF_A_CLASS
    mean = torch.where(few, usual.shares.mean(), mean)
    std = torch.where(few, usual.shares.std(), std)
    return ClassStatistics(mean, std.clamp_min(least_std))
