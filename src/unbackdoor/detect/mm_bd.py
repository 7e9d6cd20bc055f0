"""Maximum margin: can one class be made far more certain than all others, by any image at all?"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.compute import arrange, check_fits, device_of, memory_format_for
from unbackdoor.detect.calibration import Calibration, threshold_from
from unbackdoor.errors import InvalidInputError
from unbackdoor.types import Detection, LabelledImages, Progress, silent

_NEWTON_STEPS = 8
"""The start is right to 1.5 %, and each step squares the error."""

_DEEP_TAIL = 1e-250
"""Below this a survival probability is about to underflow, and its asymptote is exact enough."""

_LARGEST_SHAPE = 1e6
"""A larger one means margins that agree to a thousandth, whose spread is noise."""


@dataclass(frozen=True)
class MaximumMargin:
    """Climb, for each class, to the largest margin that any image gives it, and test the largest of them.

    Source: Wang, Xiang, Miller, Kesidis, "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary
    Backdoor Pattern Types Using a Maximum Margin Statistic", IEEE S&P 2024, arXiv 2205.06900, and the
    authors' code: training on a backdoor raises the target's logit above all others somewhere in the input
    box. ``r_t = max_x z_t(x) - max_{k != t} z_k(x)`` is climbed from random images; a Gamma distribution G is
    fitted to all ``r_t`` but the largest, whose p-value as the maximum of K is ``1 - G(r_max)^K``.

    No data are used: of the clean images only the shape matters. The score is -log10 of that p-value.
    It is no p-value of the test, since G is fitted to few points from which the largest was taken away:
    p <= 0.05 flags far more than 5 % of clean models, whose ten margins are Gamma-distributed or log-normal
    (``benchmarks/null_rates.py``). ``null = "simulated"`` moves the threshold to where it flags ``alpha`` of
    Gamma-distributed margins; only a calibration accounts for margins that are distributed otherwise. Several
    targets at once hide one another.

    Deviations: images are projected onto [0, 1] after each step, where the authors clip them inside the
    forward pass and so lose a pixel for good once it has left; momentum acts (their optimiser is made anew
    at each step); G starts at 0, whose fit is unique, where theirs has a free start, which nine points hardly
    determine; classes that no image reached (margin not above 0) are left out.

    Args:
        restarts: Random images a class; the best counts.
        steps: Most steps of gradient ascent.
        learning_rate: Step on images in [0, 1].
        momentum: Of the ascent, in [0, 1).
        tolerance: A class stops once a step changes the sum of its margins by less than this fraction.
        together: Most classes in one forward pass.
        fewest_classes: Abstain with fewer margins, at least 4.
        null: Without a calibration, take p at its word (``plug_in``, the paper), or compare it with those
            of margins drawn from G (``simulated``).
        draws: How many models are simulated.
        calibration: Scores of clean models, or None.
        alpha: Largest p that is flagged, the paper's 0.05; false-positive rate of a calibrated threshold.
    """

    name: ClassVar[str] = "mm_bd"
    title: ClassVar[str] = "Maximum margin"
    source: ClassVar[str] = "MM-BD, arXiv 2205.06900"
    needs: ClassVar[str] = "one image, for its shape"

    restarts: int = 30
    steps: int = 300
    learning_rate: float = 0.01
    momentum: float = 0.2
    tolerance: float = 1e-5
    together: int = 10
    fewest_classes: int = 5
    null: Literal["plug_in", "simulated"] = "plug_in"
    draws: int = 2000
    calibration: Calibration | None = None
    alpha: float = 0.05

    def __post_init__(self) -> None:
        counts = (self.restarts, self.steps, self.together, self.draws)
        if min(counts) < 1 or self.fewest_classes < 4:
            raise InvalidInputError(
                "restarts, steps, together and draws must be at least 1 and fewest_classes at least 4, got "
                f"{', '.join(map(str, counts))} and {self.fewest_classes}."
            )
        if not (0 < self.learning_rate < math.inf and 0 <= self.momentum < 1 and self.tolerance >= 0):
            raise InvalidInputError(
                "the ascent needs learning_rate > 0, momentum in [0, 1) and tolerance >= 0, got "
                f"{self.learning_rate}, {self.momentum} and {self.tolerance}."
            )
        if self.null not in ("plug_in", "simulated"):
            raise InvalidInputError(f"null must be 'plug_in' or 'simulated', got {self.null!r}.")
        if not 0 < self.alpha < 1 or self.draws < 1 / self.alpha - 1:
            raise InvalidInputError(
                f"alpha must lie in (0, 1) and draws be at least 1 / alpha - 1, got {self.alpha} and "
                f"{self.draws}."
            )

    def score(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Detection:
        """Climb to the margins of ``model``, which is left untouched, and test the largest.

        Args:
            model: Takes float images in [0, 1].
            clean: At least one image; its shape is all that is used.
            generator: Random images and simulated margins follow it; on the CPU.
            progress: Called after each step with the steps done, of all classes.

        Raises:
            InvalidInputError: If there are no images, or a label has no output of the model.
            UnsupportedModelError: If the model cannot be run on such images.
        """
        classes = check_fits(model, clean, purpose="the maximum margin")
        margins, settled = self._climb(
            model, tuple(clean.images.shape[1:]), classes, rng.spawn(generator), progress
        )
        return self.judge(margins, settled=settled, generator=generator)

    def judge(self, margins: Tensor, *, settled: int | None = None, generator: torch.Generator) -> Detection:
        """Test the largest of some margins.

        Args:
            margins: float ``(K,)``, one a class.
            settled: How many classes ended within ``tolerance``, for the evidence.
            generator: Simulated margins follow it.
        """
        margins = margins.double().cpu()
        valid = margins[margins.isfinite() & (margins > 0)]
        shape, problem = math.nan, ""
        if len(valid) < self.fewest_classes:
            problem = (
                f"an image was found for {len(valid)} of {len(margins)} classes, and a distribution needs "
                f"{self.fewest_classes}; raise steps or learning_rate if classes are missing"
            )
        elif (shape := float(gamma_fit(valid.sort().values[:-1])[0])) > _LARGEST_SHAPE:
            problem = "all margins but the largest are equal, so that no distribution can be fitted to them"
        score = math.nan if problem else float(surprise(valid))
        null = self.calibration
        if null is None and self.null == "simulated" and not problem:
            simulated = simulated_surprises(len(valid), shape, self.draws, generator=generator)
            null = Calibration(tuple(simulated.tolist()), "margins simulated from the fitted distribution")
        threshold, source = threshold_from(
            null,
            self.alpha,
            fixed=-math.log10(self.alpha),
            source=f"the paper's p = {self.alpha:g}, uncalibrated",
        )
        return Detection(
            score=score,
            threshold=threshold,
            threshold_source=source,
            p_value=None if null is None or problem else null.p_value(score),
            target_class=None if problem else int(margins.nan_to_num(-math.inf, -math.inf).argmax()),
            undetermined=problem,
            evidence={
                "margins": [margin if math.isfinite(margin) else None for margin in margins.tolist()],
                "settled_classes": settled,
                "gamma_shape": None if problem else shape,
            },
        )

    def _climb(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        classes: int,
        generator: torch.Generator,
        progress: Progress,
    ) -> tuple[Tensor, int]:
        """Return the margins ``(K,)`` and how many classes settled."""
        frozen = arrange(copy.deepcopy(model).requires_grad_(False)).eval()
        device = device_of(frozen)
        margins, settled = torch.empty(classes), 0
        for part in torch.arange(classes).split(self.together):
            # Drawn class by class, so that `together` changes speed and memory alone.
            starts = torch.stack([torch.rand(self.restarts, *shape, generator=generator) for _ in part])
            images, targets = starts.to(device), part.to(device)
            velocity, sums = torch.zeros_like(images), torch.full((len(part),), math.nan)
            moving = torch.arange(len(part))
            for step in range(self.steps):
                found, slope = margins_of(frozen, images[moving], targets[moving])
                margins[part[moving]], now = found.amax(1).cpu(), found.sum(1).cpu()
                before, sums[moving] = sums[moving], now
                goes_on = ~((now - before).abs() <= self.tolerance * before.abs())
                velocity[moving] = self.momentum * velocity[moving] + slope
                images[moving] = (images[moving] + self.learning_rate * velocity[moving]).clamp_(0, 1)
                moving = moving[goes_on]
                progress("maximum margins", int(part[0]) * self.steps + step + 1, classes * self.steps)
                if not len(moving):
                    break
            settled += len(part) - len(moving)
        progress("maximum margins", classes * self.steps, classes * self.steps)
        return margins, settled


def margins_of(model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far each image's target logit lies above all others, and the slope of that.

    Args:
        model: In eval mode, so that images do not see one another, with frozen weights.
        images: float ``(T, R, C, H, W)``: R images for each of T classes.
        targets: int64 ``(T,)``.

    Returns:
        Margins ``(T, R)``, and their gradient in the shape of ``images``.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        batch = images.flatten(0, 1).contiguous(memory_format=memory_format_for(model))
        logits = model(batch).float().view(*images.shape[:2], -1)
        column = targets.view(-1, 1, 1).expand(-1, images.shape[1], 1)
        others = logits.scatter(2, column, -math.inf).amax(2)
        margins = logits.gather(2, column).squeeze(2) - others
    (slope,) = torch.autograd.grad(margins.sum(), images)
    return margins.detach(), slope


def gamma_fit(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return shape and scale of the Gamma distribution, starting at 0, most likely to yield ``values``.

    Args:
        values: Positive float64 ``(..., n)``.

    Returns:
        Shape and scale ``(...)``; the shape is infinite where the values are all but equal.
    """
    mean = values.mean(-1)
    # The likelihood is stationary where log(shape) - digamma(shape) equals this.
    gap = mean.log() - values.log().mean(-1)
    shape = (3 - gap + ((gap - 3) ** 2 + 24 * gap).sqrt()) / (12 * gap)
    for _ in range(_NEWTON_STEPS):
        error = shape.log() - torch.special.digamma(shape) - gap
        slope = shape.reciprocal() - torch.special.polygamma(1, shape)
        shape = 1 / (1 / shape + error / (shape**2 * slope))
    # Rounding decides the gap of equal values.
    shape = torch.where(gap > 1e-13, shape, math.inf)
    return shape, mean / shape


def surprise(margins: Tensor) -> Tensor:
    """Return -log10 of the p-value of the largest margin under the Gamma distribution of the others.

    Args:
        margins: Positive float64 ``(..., K)``.

    Returns:
        ``-log10(1 - G(r_max)^K)``, ``(...)``, at least 0.
    """
    ordered, count = margins.sort(-1).values, margins.shape[-1]
    shape, scale = gamma_fit(ordered[..., :-1])
    above = _log_survival(ordered[..., -1] / scale, shape)
    # For a small q, 1 - (1 - q)^K is K q, also where q would underflow.
    p = torch.where(
        above < -30, above + math.log(count), (-torch.expm1(count * torch.log1p(-above.exp()))).log()
    )
    return -p / math.log(10)


def simulated_surprises(count: int, shape: float, draws: int, *, generator: torch.Generator) -> Tensor:
    """Return ``surprise`` of ``draws`` models with ``count`` Gamma-distributed margins each, ``(draws,)``."""
    with rng.isolated(generator):
        margins = torch.distributions.Gamma(torch.tensor(shape, dtype=torch.float64), 1.0).sample(
            (draws, count)
        )
    return surprise(margins)


def _log_survival(x: Tensor, shape: Tensor) -> Tensor:
    """Return the logarithm of the probability that a Gamma variable of scale 1 exceeds ``x``."""
    near = torch.special.gammaincc(shape, x)
    # First convergent of the continued fraction (NIST Digital Library of Mathematical Functions, 8.9.2).
    far = shape * x.log() - x - torch.lgamma(shape) - (x - shape + 1).log()
    return torch.where(near > _DEEP_TAIL, near.log(), far)
