"""What RNP's unlearnt model is good for besides pruning: the backdoor's label, its trigger, its samples.

Source: Li, Lyu, Ma, Koren, Lyu, Li, Jiang, "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023,
arXiv 2305.14876, whose abstract names four uses of the unlearnt model: removal (``purify.rnp``), trigger
recovery, label detection and sample detection. The authors' code has the first only; the rules of the other
three are reconstructed, with what the same first author's "Expose Before You Defend" (arXiv 2410.19427) adds.

All three unlearn a copy by gradient ascent on clean images; an infected copy falls back to its backdoor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.compute import logits_of, predictions_of
from unbackdoor.detect.calibration import Calibration, threshold_from
from unbackdoor.detect.floor import FEWEST_IMAGES, too_little_at_first
from unbackdoor.detect.samples import check_samples, check_scores
from unbackdoor.errors import InvalidInputError
from unbackdoor.inversion import Inversion, invert
from unbackdoor.suppression import Suppressed, Suppression, suppress
from unbackdoor.types import Detection, LabelledImages, Progress, as_float, silent

INDEX_OF_EBYD = 0.01 * 100 / 9
"""Concentration above which "Expose Before You Defend" calls a model backdoored: a variance of 0.01 of the
ten class shares. As a variance it would be out of reach from 99 classes on."""


@dataclass(frozen=True)
class UnlearntLabel:
    """Call a model backdoored if its unlearnt copy puts most clean images into one class, and name the class.

    Source: backdoor label detection of RNP (arXiv 2305.14876); the rule is that of its successor (arXiv
    2410.19427), which flags a variance of the class shares above 0.01 at ten classes.

    Deviations: the score is the Herfindahl index ``(K sum c^2 - 1) / (K - 1)`` of the shares c, which is that
    variance times K^2 / (K - 1) and runs from 0 (even) to 1 (one class) for any K; the threshold is 0.11 for
    any K, which is 0.01 at ten classes. Clean models collapse too, if pushed far enough: take a
    calibration. For all-to-all backdoors there is no such class. ``collapse`` reads the same run earlier,
    and by its errors. The unlearning takes at most 300 steps at a constant rate and reads the accuracy in
    eval mode; the authors' takes up to 20 epochs, lowers the rate and reads it in train mode.

    Args:
        unlearning: How the copy is unlearnt; the shares are read at its end.
        calibration: Scores of clean models, or None.
        alpha: False-positive rate of a calibrated threshold.
    """

    name: ClassVar[str] = "rnp_label"
    title: ClassVar[str] = "Class shares of the unlearnt model"
    source: ClassVar[str] = "RNP, arXiv 2305.14876, and arXiv 2410.19427 (reconstruction)"
    needs: ClassVar[str] = "clean images with labels"

    unlearning: Suppression = field(default_factory=Suppression.rnp)
    calibration: Calibration | None = None
    alpha: float = 0.05

    def score(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Detection:
        """Unlearn a copy of ``model`` and read its class shares; ``model`` is left untouched."""
        return self.judge(suppress(model, clean, self.unlearning, generator=generator, progress=progress))

    def judge(self, unlearnt: Suppressed) -> Detection:
        """Score a run that was made with this detector's options."""
        shares = unlearnt.class_share.double()
        classes = len(shares)
        factor = classes**2 / max(1, classes - 1)
        threshold, source = threshold_from(
            self.calibration,
            self.alpha,
            fixed=INDEX_OF_EBYD,
            source="the variance 0.01 at ten classes of arXiv 2410.19427, uncalibrated",
        )
        score = float(factor * shares.var(unbiased=False))
        problem = too_little_at_first(unlearnt) or _not_unlearnt(unlearnt, self.unlearning)
        return Detection(
            score=math.nan if problem else score,
            threshold=threshold,
            threshold_source=source,
            p_value=None if self.calibration is None or problem else self.calibration.p_value(score),
            target_class=None if problem else int(shares.argmax()),
            undetermined=problem,
            evidence={"class_share": shares.tolist(), "accuracy": list(unlearnt.accuracies)},
        )


@dataclass(frozen=True)
class UnlearntTrigger:
    """Recover a trigger from the unlearnt copy, for the class that it falls to, and try it on the model.

    Source: trigger recovery of RNP (arXiv 2305.14876): with the clean features gone, what an inversion
    (Neural Cleanse, S&P 2019) finds is the backdoor's trigger rather than a feature of the class.

    Deviations, as the procedure is not public: the copy is read before it has collapsed, and inversion uses
    the images that it does not send to the class anyway, since there the empty trigger works; the score is
    the share of clean images of other classes that the trigger sends to the class *in the model itself*,
    times the share of the image that it leaves alone. A trigger of the copy's that is large, or does
    nothing in the model, is no evidence. The unlearning takes at most 300 steps at a constant rate and reads
    the accuracy in eval mode; the authors' takes up to 20 epochs, lowers the rate and reads it in train mode.

    Args:
        unlearning: How the copy is unlearnt.
        inversion: How the trigger is inverted, for one class only.
        threshold: Used without a calibration.
        calibration: Scores of clean models, or None.
        alpha: False-positive rate of a calibrated threshold.
    """

    name: ClassVar[str] = "rnp_trigger"
    title: ClassVar[str] = "Trigger recovered from the unlearnt model"
    source: ClassVar[str] = "RNP, arXiv 2305.14876 (reconstruction)"
    needs: ClassVar[str] = "clean images with labels"

    unlearning: Suppression = field(
        default_factory=lambda: replace(Suppression.rnp(stop_accuracy=0.5), checks_per_epoch=4)
    )
    inversion: Inversion = field(default_factory=Inversion)
    threshold: float = 0.9
    calibration: Calibration | None = None
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if self.inversion.form != "patch":
            raise InvalidInputError(
                f"rnp-trigger scores the size of a patch; set inversion.form to 'patch', got "
                f"{self.inversion.form!r}."
            )

    def score(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Detection:
        """Unlearn a copy, invert a trigger on it and try it on ``model``, which is left untouched."""
        unlearnt = suppress(model, clean, self.unlearning, generator=rng.spawn(generator), progress=progress)
        threshold, source = threshold_from(self.calibration, self.alpha, fixed=self.threshold)
        target = int(unlearnt.class_share.argmax())
        # On images that the copy sends there anyway the empty trigger works.
        elsewhere = predictions_of(unlearnt.model, clean.images) != target
        others = clean.subset((clean.labels.cpu() != target) & elsewhere)
        problem = _not_unlearnt(unlearnt, self.unlearning)
        if len(others) < FEWEST_IMAGES:
            problem = (
                f"the unlearnt model sends all but {len(others)} images to class {target}, so that a trigger "
                "has nothing to do; lower unlearning.learning_rate"
            )
        if problem:
            return Detection(math.nan, threshold, source, undetermined=problem)
        trigger = invert(
            unlearnt.model, others, self.inversion, target, generator=rng.spawn(generator), progress=progress
        )
        stamped = trigger(as_float(others.images))
        success = float((predictions_of(model, stamped) == target).float().mean())
        height, width = clean.images.shape[2:]
        score = success * (1 - trigger.norm / (height * width))
        return Detection(
            score=score,
            threshold=threshold,
            threshold_source=source,
            p_value=None if self.calibration is None else self.calibration.p_value(score),
            target_class=target,
            evidence={
                "success_on_the_model": success,
                "success_on_the_unlearnt_model": trigger.success,
                "l1_pixels": trigger.norm,
                "class_share": unlearnt.class_share.tolist(),
            },
        )


@dataclass(frozen=True)
class UnlearntSample:
    """Suspect the samples that the unlearnt copy still sends, with confidence, to the class that it falls to.

    Source: backdoor sample detection of RNP (arXiv 2305.14876): unlearning takes the clean task away and
    leaves the backdoor, so that triggered inputs keep their answer.

    Deviations, as the procedure is not public: the score is the log-odds of that class on the copy, less
    their mean over the clean images; probabilities of an unlearnt copy would round to 1, for clean and
    triggered inputs alike. The copy is read before it has collapsed, since then every input goes there. The
    unlearning takes at most 300 steps at a constant rate and reads the accuracy in eval mode; the authors'
    takes up to 20 epochs, lowers the rate and reads it in train mode.

    Args:
        unlearning: How the copy is unlearnt.
    """

    name: ClassVar[str] = "rnp_sample"
    title: ClassVar[str] = "Samples that the unlearnt model still answers"
    source: ClassVar[str] = "RNP, arXiv 2305.14876 (reconstruction)"
    needs: ClassVar[str] = "clean images with labels; the samples in question without"
    version: ClassVar[int] = 2

    unlearning: Suppression = field(
        default_factory=lambda: replace(Suppression.rnp(stop_accuracy=0.4), checks_per_epoch=4)
    )

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
            samples: uint8 or float ``(N, C, H, W)`` in [0, 1].
            clean: Clean images with labels; a few hundred.
            labels: Not used: the class is the one that the copy falls to.
            generator: All randomness follows it; on the CPU.
            progress: Called while the copy is unlearnt.

        Raises:
            InvalidInputError: If there are no samples, too few clean images, or a label has no output.
            UnsupportedModelError: If the unlearnt copy gives no numbers.
        """
        check_samples(model, samples, clean, labels)
        unlearnt = suppress(model, clean, self.unlearning, generator=generator, progress=progress)
        target = int(unlearnt.class_share.argmax())
        usual, theirs = (
            _log_odds(logits_of(unlearnt.model, images), target) for images in (clean.images, samples)
        )
        return check_scores((theirs - usual.mean()).float().cpu())


def _log_odds(logits: Tensor, target: int) -> Tensor:
    """Return ``ln(p / (1 - p))`` of a class, float64 ``(N,)``."""
    others = logits.double().index_fill(1, torch.tensor(target, device=logits.device), -math.inf)
    return logits[:, target].double() - others.logsumexp(1)


def _not_unlearnt(unlearnt: Suppressed, options: Suppression) -> str:
    if unlearnt.accuracies[-1] <= options.stop_accuracy:
        return ""
    left = (
        f"unlearning left a clean accuracy of {unlearnt.accuracies[-1]:.2f}, above the "
        f"{options.stop_accuracy:g} at which the model is read"
    )
    classes = len(unlearnt.confusion)
    if options.stop_accuracy < 1 / classes:
        # A copy that puts all images into one class is right on 1 / K of them: no budget gets it lower.
        return (
            f"{left} and no more than what {classes} classes leave to chance; raise unlearning.stop_accuracy"
        )
    return f"{left}; raise unlearning.budget"
