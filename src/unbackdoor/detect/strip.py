"""STRong Intentional Perturbation: blend an input with clean images; a trigger keeps its answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from unbackdoor.compute import EVALUATION_BATCH, device_of, logits_of
from unbackdoor.detect.samples import check_samples, check_scores
from unbackdoor.errors import InvalidInputError
from unbackdoor.types import LabelledImages, Progress, as_float, silent


@dataclass(frozen=True)
class STRIP:
    """Suspect the samples whose answer stays certain, whatever clean image is blended into them.

    Source: Gao, Xu, Wang, Chen, Ranasinghe, Nepal, "STRIP: A Defence Against Trojan Attacks on Deep Neural
    Networks", ACSAC 2019, arXiv 1902.06531. The score is minus the mean entropy, in bits, of the model's
    probabilities over the blends of a sample. The paper fits a normal distribution to the entropies of
    clean images and flags what lies below its 1 % quantile; here the caller sets the threshold.

    Public code blends in five ways. The authors' notebook adds float images of [0, 1] without a clip, up to
    values of 2; that is the default. TrojanZoo and ART take the mean (weights of 0.5), the same blend at half
    the brightness, which stays in the range that models are made for, but halves the trigger as well: on our
    models it tells next to nothing (RESULTS.md). VinAIResearch's code adds bytes that saturate (``clip``): of
    images brighter than mid-grey all blends are white, and clean samples get certain answers too.
    backdoor-toolbox's firewall has 1 and 0.5 with a clip. BackdoorBench adds images after normalisation; as
    that is inside of the model here, it is not offered.

    Deviations: all samples are blended with the same clean images, drawn without replacement, so that a
    score does not depend on what else is scored, and differences between samples are not differences
    between draws. With fewer clean images than ``n`` all are used once.

    Triggers that a blend destroys (input-aware, source-specific) are not seen, and clean images of an easy
    class have low entropies too.

    Args:
        n: Clean images that each sample is blended with (the paper's N), at least 1; the cost is n passes
            a sample.
        sample_weight: Weight of the sample in a blend, above 0.
        overlay_weight: Weight of the clean image in a blend, above 0.
        clip: Clip blends to [0, 1]; without, weights that sum to more than 1 leave the range of images.
    """

    name: ClassVar[str] = "strip"
    title: ClassVar[str] = "STRIP: entropy of blended inputs"
    source: ClassVar[str] = "Gao et al. 2019, arXiv 1902.06531"
    needs: ClassVar[str] = "clean images; the samples in question"

    n: int = 100
    sample_weight: float = 1.0
    overlay_weight: float = 1.0
    clip: bool = False

    def __post_init__(self) -> None:
        if self.n < 1 or not (0 < self.sample_weight < math.inf and 0 < self.overlay_weight < math.inf):
            raise InvalidInputError(
                f"STRIP needs n of at least 1 and both weights above 0, got {self.n}, "
                f"{self.sample_weight} and {self.overlay_weight}."
            )

    @staticmethod
    def paper() -> STRIP:
        """Return the authors' settings, which are the defaults."""
        return STRIP()

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
        """Return float32 ``(N,)`` in [-log2 K, 0], higher for more suspicious; see ``SampleDetector``.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            samples: uint8 or float32 ``(N, C, H, W)`` in [0, 1].
            clean: Clean images; their labels are not used.
            labels: Checked, but not used: the model's answers are judged.
            generator: Draws the clean images; on the CPU.
            progress: Called after each batch of blends.

        Raises:
            InvalidInputError: If there are no samples, too few clean images, or labels do not fit.
            UnsupportedModelError: If the model cannot be run on such an image, or gives no numbers.
        """
        check_samples(model, samples, clean, labels)
        chosen = torch.randperm(len(clean), generator=generator)[: self.n].to(clean.images.device)
        return check_scores(-self._entropies(model, samples, clean.images[chosen], progress).mean(1).float())

    def _entropies(self, model: nn.Module, samples: Tensor, overlays: Tensor, progress: Progress) -> Tensor:
        """Return the entropy of every sample with every overlay, ``(N, n)`` on the CPU, in bits."""
        device, count = device_of(model), len(overlays)
        overlays = as_float(overlays.to(device))
        total = len(samples) * count
        parts = []
        # Pairs are numbered sample by sample, so that batches are full even for a single sample.
        for start in range(0, total, EVALUATION_BATCH):
            pairs = torch.arange(start, min(start + EVALUATION_BATCH, total))
            own = as_float(samples[(pairs // count).to(samples.device)].to(device))
            other = overlays[(pairs % count).to(device)]
            blends = self.sample_weight * own + self.overlay_weight * other
            if self.clip:
                blends = blends.clamp(0.0, 1.0)
            parts.append(entropy_bits(logits_of(model, blends)).cpu())
            progress("blending", start + len(pairs), total)
        return torch.cat(parts).view(len(samples), count)


def entropy_bits(logits: Tensor) -> Tensor:
    """Return the entropy of the softmax of ``logits`` ``(N, K)`` in bits, ``(N,)``."""
    entropies: Tensor = torch.special.entr(logits.float().softmax(1)).sum(1) / math.log(2)
    return entropies
