"""The smallest change of all pixels that leads to each class: one far below the others is suspicious."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from unbackdoor.detect.calibration import Calibration
from unbackdoor.detect.smallest import Smallest, check_options, find_smallest, judge_smallest
from unbackdoor.forms import Form
from unbackdoor.inversion import Inversion
from unbackdoor.types import Detection, LabelledImages, Progress, silent


@dataclass(frozen=True)
class PerturbationSearch:
    """Measure how much smaller the smallest change that leads to a class is than what other classes need.

    Source: after Xiang, Miller, Kesidis, "Detection of Backdoors in Trained Classifiers Without Access to
    the Training Set", 2020, arXiv 1908.10498: a backdoor with a faint trigger makes an additive perturbation
    of unusually small norm suffice.

    Ours: one change a class from the images of all others together, instead of one for each pair of classes;
    and an effect size, the logarithm of the median norm divided by the smallest, instead of a p-value under
    a distribution fitted to the other pairs. A class whose change does not reach the asked-for success counts
    as the largest possible one. It sees triggers that are spread over the image and the same for all images,
    such as blends and sinusoids, however few training images carried them; patches and warps it misses.

    The value means something beside clean models that were scored in the same way, and nothing without a
    calibration.

    Args:
        inversion: Of every class; its form is ``additive``.
        held_out_fraction: Share of the images on which success is measured, in [0, 1).
        fewest_classes: With fewer classes the score is relative to the largest possible change.
        threshold: Used without a calibration; a guess.
        calibration: Scores of clean models, or None.
        alpha: False-positive rate of a calibrated threshold.
    """

    name: ClassVar[str] = "perturbation_search"
    title: ClassVar[str] = "Size of the smallest change of all pixels"
    source: ClassVar[str] = "after Xiang, Miller, Kesidis 2020, arXiv 1908.10498"
    needs: ClassVar[str] = "clean images with labels"
    form: ClassVar[Form] = "additive"
    partial: ClassVar[bool] = False
    refined: ClassVar[int] = 0
    restarts: ClassVar[int] = 0

    inversion: Inversion = field(default_factory=Inversion.additive)
    held_out_fraction: float = 0.2
    fewest_classes: int = 5
    threshold: float = 1.0
    calibration: Calibration | None = None
    alpha: float = 0.05

    def __post_init__(self) -> None:
        check_options(self)

    def score(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Detection:
        """Search and judge; see ``find_smallest``."""
        return self.judge(find_smallest(self, model, clean, generator=generator, progress=progress))

    def judge(self, found: Smallest) -> Detection:
        """Score what a search with these options found."""
        # An l2 norm of pixels in [0, 1], as the root of the mean square in the 255 steps of a file.
        grey_levels = 255 * found.suspect.norm / found.largest
        return judge_smallest(self, found, further={"grey_levels": grey_levels})
