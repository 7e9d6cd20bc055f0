"""BTI-DBF: take the benign features away; does what is left answer with one class?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.detect.calibration import Calibration, threshold_from
from unbackdoor.detect.decoupling import Decoupling, answers_from, learn_masks, split_at_head
from unbackdoor.errors import InvalidInputError
from unbackdoor.types import Detection, LabelledImages, Progress, silent


@dataclass(frozen=True)
class BTIDBF:
    """Mask the features that carry the clean task, and take the largest class share of what the rest answers.

    Source: Xu, Huang, Li, Qin, Ren, "Towards Reliable and Efficient Backdoor Trigger Inversion via Decoupling
    Benign Features", ICLR 2024, and the authors' code: a mask m over the features phi minimises
    ``CE(g(m phi), y) - CE(g((1 - m) phi), y)``. The target is the class that most images are given to, and
    its share is the natural score; the authors print the class and have no verdict on models.

    Deviations: the authors then train a U-Net that changes images so as to move the complement, and count
    the answers to its images. That step is left out: the answers of the complement itself, on clean images,
    are counted, as BAN's authors do for their comparison. So **features that are silent on clean images are
    not seen**, which a trigger in the images would excite; BAN's noise excites some of them. Shares are over
    images of other classes, each true class weighing the same. Masks lie on the features that the head reads,
    after pooling, not on the map before it; are clipped to [0, 1] where the authors squash them by tanh; and
    are learnt on features in eval mode, where the authors' train mode lets running statistics drift.

    Nothing keeps a mask from being all ones, where an empty complement would answer with the largest bias. So
    images on which it moves the logits by less than a hundredth of what all features do, or where the bias
    decides, count as answered with no class, and with answers to less than a tenth of the images the detector
    abstains. What is left of a clean model need be no even mixture, and the default threshold is a mere
    majority: take a calibration. BAN's authors find that prominent features are favoured and BadNets missed.
    All-to-all backdoors have no such class.

    Args:
        decoupling: How masks are learnt.
        threshold: Used without a calibration.
        fewest_classes: Abstain if the clean images are of fewer classes, at least 3.
        calibration: Scores of clean models, or None.
        alpha: False-positive rate of a calibrated threshold.
    """

    name: ClassVar[str] = "bti_dbf"
    title: ClassVar[str] = "BTI-DBF: what is left without the benign features"
    source: ClassVar[str] = "Xu et al. 2024, ICLR (without its trigger generator)"
    needs: ClassVar[str] = "clean images with labels; a linear head"

    decoupling: Decoupling = field(default_factory=Decoupling)
    threshold: float = 0.5
    fewest_classes: int = 4
    calibration: Calibration | None = None
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if self.fewest_classes < 3:
            raise InvalidInputError(f"fewest_classes must be at least 3, got {self.fewest_classes}.")

    def score(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Detection:
        """Mask the features of ``model``, which is left untouched, and count what the rest answers.

        Args:
            model: Takes float images in [0, 1]; its last layer is linear.
            clean: Clean images with labels; a few hundred.
            generator: The masks' starts follow it; on the CPU.
            progress: Called after each step.

        Raises:
            InvalidInputError: If there are no images, or a label has no output of the model.
            UnsupportedModelError: If the last layer is not linear, or does not yield the logits.
        """
        split = split_at_head(model, clean, purpose="decoupling benign features")
        threshold, source = threshold_from(self.calibration, self.alpha, fixed=self.threshold)
        if problem := split.problem(self.fewest_classes):
            return Detection(math.nan, threshold, source, undetermined=problem)
        masks = learn_masks(split, self.decoupling, generator=rng.spawn(generator), progress=progress)
        found = answers_from(split, split.features, 1 - masks)
        evidence = {
            "class_share": found.shares.tolist(),
            "accuracy_of_the_complement": found.accuracy,
            "answered_by_the_complement": found.answered,
            "mean_mask": float(masks.mean()),
        }
        if found.problem:
            return Detection(math.nan, threshold, source, undetermined=found.problem, evidence=evidence)
        score = float(found.shares.max())
        return Detection(
            score=score,
            threshold=threshold,
            threshold_source=source,
            p_value=None if self.calibration is None else self.calibration.p_value(score),
            target_class=int(found.shares.argmax()),
            evidence=evidence,
        )
