"""The smallest warp that leads to each class: one far below the others is suspicious."""

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
class WarpSearch:
    """Measure how much less the pixels need to move for one class than for the others.

    Source: ours. The form of the trigger is that of WaNet (Nguyen & Tran, ICLR 2021, arXiv 2102.10369), a
    grid that a few control vectors bend; that a backdoor shows as an unusually small trigger is Neural
    Cleanse's (Wang et al., IEEE S&P 2019).

    The score is the logarithm of the median shift divided by the smallest, each the root mean square over
    the pixels. Warps do not lead to every class of a clean model: one that falls short of the asked-for
    success counts as larger, and at most as a shift of an eighth of the image. It sees warps that are the
    same for all images, however few training images carried them; patches and additive changes it misses.

    The value means something beside clean models that were scored in the same way; without a calibration
    it can raise a doubt (see ``Scan``), and flags nothing.

    Args:
        inversion: Of every class; its form is ``warp``.
        refined: How many classes, from the one that needs least, are inverted again before they are compared:
            one start may miss the small warp that a class has.
        restarts: How often each.
        held_out_fraction: Share of the images on which success is measured, in [0, 1).
        fewest_classes: With fewer classes the score is relative to the largest shift.
        threshold: Used without a calibration: half of what the median class needs, as MNP asks for.
        calibration: Scores of clean models, or None.
        alpha: False-positive rate of a calibrated threshold.
    """

    name: ClassVar[str] = "warp_search"
    title: ClassVar[str] = "Size of the smallest warp"
    source: ClassVar[str] = "ours; after WaNet, ICLR 2021, and Neural Cleanse, IEEE S&P 2019"
    needs: ClassVar[str] = "clean images with labels"
    form: ClassVar[Form] = "warp"
    partial: ClassVar[bool] = True

    inversion: Inversion = field(default_factory=Inversion.warp)
    refined: int = 3
    restarts: int = 1
    held_out_fraction: float = 0.2
    fewest_classes: int = 5
    threshold: float = 0.693
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
        return judge_smallest(self, found)
