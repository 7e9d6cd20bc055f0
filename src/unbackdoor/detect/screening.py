"""Screening: several detectors of inputs at one rate of false alarms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.data.splits import split
from unbackdoor.detect.ibd_psc import IBDPSC
from unbackdoor.detect.rnp import UnlearntSample
from unbackdoor.detect.samples import check_samples
from unbackdoor.detect.strip import STRIP
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.types import LabelledImages, Progress, SampleDetector, as_float, silent

Part = Literal["strip", "ibd_psc", "rnp_sample"]


@dataclass(frozen=True)
class Screening:
    """Suspect the samples that one of several detectors finds more suspicious than it finds clean images.

    Not of a paper; ours. Detectors of inputs fail on different triggers: a blend destroys warps, norms that
    are turned up leave faint patterns behind (RESULTS.md). A share of the clean images is kept from the
    detectors and scored with the samples. A sample has with each the conformal p-value ``(1 + #{kept images
    with its score or more}) / (1 + kept images)`` (Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random
    World", Springer 2005); all together the smallest of these times their number (Bonferroni). So of clean
    inputs that are like the clean images at most a share of p has that p or less, whatever the detectors.

    The score is ``-log10 p``. It is never above ``log10((1 + kept images) / detectors)``: with few images no
    sample can reach a small rate of false alarms. A detector that cannot read the network is left out.

    Args:
        detectors: Which of them are asked: ``strip`` (triggers that survive a blend), ``ibd_psc`` (that hold
            out against louder norms), ``rnp_sample`` (that a copy which has unlearnt the clean task answers).
        strip: How.
        ibd_psc: How.
        rnp_sample: How.
        kept: Share of the clean images that the detectors do not see, in (0, 1). Of 500 images 0.8 lets two
            detectors flag at a rate of 1 % what one kept image reaches at most; 0.75 only what none does.
    """

    name: ClassVar[str] = "screening"
    title: ClassVar[str] = "Screening: several detectors of inputs at one rate of false alarms"
    source: ClassVar[str] = "ours, of arXiv 1902.06531, 2405.09786 and 2305.14876"
    needs: ClassVar[str] = "clean images with labels; the samples in question without"

    detectors: tuple[Part, ...] = ("strip", "ibd_psc")
    strip: STRIP = field(default_factory=lambda: STRIP(n=20))
    ibd_psc: IBDPSC = field(default_factory=IBDPSC)
    rnp_sample: UnlearntSample = field(default_factory=UnlearntSample)
    kept: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.kept < 1:
            raise InvalidInputError(f"kept must lie in (0, 1), got {self.kept}.")
        if not self.detectors or set(self.detectors) - set(get_args(Part)):
            raise InvalidInputError(
                f"detectors must name at least one of {', '.join(get_args(Part))}; got {self.detectors}."
            )

    @property
    def asked(self) -> tuple[SampleDetector, ...]:
        """The detectors that are asked."""
        return tuple(getattr(self, name) for name in dict.fromkeys(self.detectors))

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
        """Return float32 ``(N,)``, ``-log10 p``, at least 0; see ``SampleDetector``.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            samples: uint8 or float32 ``(N, C, H, W)`` in [0, 1].
            clean: Clean images with labels, at least four; a few hundred.
            labels: Checked, but not used: the model's answers are judged.
            generator: Draws which images are kept, and all that the detectors draw; on the CPU.
            progress: Called by the detectors.

        Raises:
            InvalidInputError: If there are no samples, too few clean images, or labels do not fit.
            UnsupportedModelError: If no detector can read the model; what the last one said.
        """
        found = p_values(
            self.asked, model, samples, clean,
            kept=self.kept, labels=labels, generator=generator, progress=progress,
        )  # fmt: skip
        return -together(found).log10().float()


def p_values(
    detectors: Sequence[SampleDetector],
    model: nn.Module,
    samples: Tensor,
    clean: LabelledImages,
    *,
    kept: float = 0.8,
    labels: Tensor | None = None,
    generator: torch.Generator,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Return by name what detectors of inputs make of samples, compared with clean images they did not see.

    Args:
        detectors: Those that cannot read the model are left out.
        model: Takes float images in [0, 1]; left untouched.
        samples: uint8 or float32 ``(N, C, H, W)`` in [0, 1].
        clean: Clean images with labels, at least four; a few hundred.
        kept: Share of the clean images that the detectors do not see, in (0, 1).
        labels: Checked, but not used.
        generator: Draws which images are kept, and all that the detectors draw; on the CPU.
        progress: Called by the detectors.

    Returns:
        p-values, float64 ``(N,)`` in (0, 1], at least ``1 / (1 + kept images)``.

    Raises:
        InvalidInputError: If there are no samples, too few clean images, labels do not fit, or a detector
            does not give one number a sample.
        UnsupportedModelError: If no detector can read the model; what the last one said.
    """
    check_samples(model, samples, clean, labels, at_least=4)
    shown, unseen = split(clean, kept, rng.spawn(generator))
    parts = samples, unseen.images.to(samples.device)
    # Detectors take both types; images that have one already are not held twice.
    both = torch.cat(parts if parts[0].dtype == parts[1].dtype else [as_float(part) for part in parts])
    found: dict[str, Tensor] = {}
    refusal = UnsupportedModelError("no detector was named.")
    for detector in detectors:
        draws = rng.spawn(generator)
        try:
            scores = detector.score(model, both, shown, generator=draws, progress=progress)
        except UnsupportedModelError as error:
            refusal = error
            continue
        checked = _checked(scores, len(both), detector.name)
        found[detector.name] = conformal(checked[: len(samples)], checked[len(samples) :])
    if not found:
        raise refusal
    return found


def _checked(scores: Tensor, count: int, name: str) -> Tensor:
    """Return a detector's scores as float64 on the CPU; it may be code of the user's own.

    Raises:
        InvalidInputError: If there is not one a sample, or some are no numbers.
    """
    if tuple(scores.shape) != (count,) or bool(scores.isnan().any()):
        raise InvalidInputError(
            f"detector {name!r} must give one score a sample, got shape {tuple(scores.shape)} for {count} "
            f"samples with {int(scores.isnan().sum())} that are no numbers; mend it or choose another."
        )
    return scores.cpu().double()


def together(found: Mapping[str, Tensor]) -> Tensor:
    """Return the p-values of several detectors as one: the smallest times their number, at most 1."""
    return (torch.stack(list(found.values())).amin(0) * len(found)).clamp(max=1.0)


def at_most(p: Tensor, rate: float) -> Tensor:
    """Say which p-values are at most a rate, up to rounding."""
    return p <= rate * (1 + 1e-9)


def conformal(scores: Tensor, clean: Tensor) -> Tensor:
    """Return ``(1 + #{clean >= s}) / (1 + #clean)`` of each score.

    Args:
        scores: float64 ``(N,)``.
        clean: float64 ``(M,)``, scores of what is clean.

    Returns:
        float64 ``(N,)``, from ``1 / (M + 1)`` to 1.
    """
    below = torch.searchsorted(clean.sort().values, scores.contiguous(), right=False)
    return (1 + len(clean) - below).double() / (1 + len(clean))


def more_than_chance(found: Mapping[str, Tensor], kept: int, rate: float) -> float:
    """Return how likely at least so many false alarms are if no sample is triggered.

    All samples are compared with the same kept images: if these happen to look harmless, many samples at once
    do not. Of N samples like M kept images the number with a p-value of at most ``k / (M + 1)`` with one
    detector is beta-binomial, with parameters k and M + 1 - k; ties make it smaller. The detector with the
    smallest tail counts, times their number (Bonferroni).

    Args:
        found: Each detector's p-values ``(N,)``, from ``p_values``.
        kept: Clean images that they were compared with, M.
        rate: Largest share of clean samples that is flagged by all together, in (0, 1).

    Returns:
        In (0, 1].
    """
    share = rate / len(found)
    k = min(kept, math.floor(share * (kept + 1) * (1 + 1e-9)))
    tails = [
        _beta_binomial_tail(int(at_most(p, share).sum()), len(p), k, kept + 1 - k) for p in found.values()
    ]
    return min(1.0, len(found) * min(tails))


def _beta_binomial_tail(least: int, n: int, a: int, b: int) -> float:
    """Return ``P(X >= least)`` of n trials whose chance is drawn from Beta(a, b)."""
    if least == 0:
        return 1.0
    if a == 0:
        return 0.0
    counts = torch.arange(least, n + 1, dtype=torch.float64)
    terms = (
        _log_choose(n, counts)
        + _log_beta(counts + a, n - counts + b)
        - _log_beta(torch.tensor(float(a), dtype=torch.float64), torch.tensor(float(b), dtype=torch.float64))
    )
    return min(1.0, float(terms.logsumexp(0).exp()))


def _log_choose(n: int, counts: Tensor) -> Tensor:
    total = torch.tensor(float(n), dtype=torch.float64)
    return torch.lgamma(total + 1) - torch.lgamma(counts + 1) - torch.lgamma(total - counts + 1)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
