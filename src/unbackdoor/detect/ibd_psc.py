"""IBD-PSC: turn the last norms of the network up; a triggered input keeps its confidence."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from unbackdoor.compute import accuracy_of, logits_of, predictions_of
from unbackdoor.detect.samples import check_answers, check_samples
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.groups import FilterMap, find_filters
from unbackdoor.types import LabelledImages, Progress, as_float, silent


@dataclass(frozen=True)
class IBDPSC:
    """Suspect the samples that stay confident while scale and shift of the last norms are multiplied.

    Source: Hou, Feng, Hua, Luo, Zhang, Li, "IBD-PSC: Input-level Backdoor Detection via Parameter-oriented
    Scaling Consistency", ICML 2024, arXiv 2405.09786. Version i of the model has scale and shift of its
    last i batch norms multiplied by omega. The first depth k is the smallest at which more than a share xi
    of the clean images is answered wrongly; PSC is the mean, over the versions k to k + n - 1, of the
    probability of the class that the unchanged model answers with. The paper flags PSC of 0.9 and more.

    The score is ``-ln(1 - PSC)``, which orders samples as PSC does: 2.3 is the paper's 0.9. Scaled norms make
    logits large, and the PSC of some clean images rounds to 1 as that of triggered ones does, so that no
    threshold on PSC itself tells them apart (RESULTS.md).

    "Last" is meant in the order in which the network runs. The authors' code takes the order in which modules
    were registered, which differs for shortcuts, and averages from k + 1 on; where no depth reaches xi it
    ends without a result.

    Deviations: there are fewer than n versions if k + n - 1 exceeds the number of norms, instead of the
    last one several times. Layer and group norms with a scale count too, as the product acts on a norm's
    output whatever its statistics. Only norms that read the output of one layer are found, so that those
    after a sum, every other one of a pre-activation network, stay as they are. If xi is not reached the
    network is refused: with clean images still right, confidence says nothing about triggers.

    Args:
        omega: What scale and shift of a norm are multiplied by, above 1.
        n: Number of versions whose confidence is averaged, at least 1.
        xi: Clean error that the first of them must exceed, in [0, 1).
    """

    name: ClassVar[str] = "ibd_psc"
    title: ClassVar[str] = "IBD-PSC: parameter-oriented scaling consistency"
    source: ClassVar[str] = "Hou et al. 2024, arXiv 2405.09786"
    needs: ClassVar[str] = "clean images with labels; the samples in question without; norms with a scale"
    version: ClassVar[int] = 2

    omega: float = 1.5
    n: int = 5
    xi: float = 0.6

    def __post_init__(self) -> None:
        if not 1 < self.omega < math.inf or self.n < 1 or not 0 <= self.xi < 1:
            raise InvalidInputError(
                "IBD-PSC needs omega above 1, n of at least 1 and xi in [0, 1), got "
                f"{self.omega}, {self.n} and {self.xi}."
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
        """Return float32 ``(N,)``, at least 0, higher for more suspicious samples; see ``SampleDetector``.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            samples: uint8 or float32 ``(N, C, H, W)`` in [0, 1].
            clean: Clean images with labels, which the clean error is measured on.
            labels: Checked, but not used: the model's answers are judged.
            generator: Unused: there is nothing random.
            progress: Called after each norm.

        Raises:
            InvalidInputError: If there are no samples, too few clean images, or labels do not fit.
            UnsupportedModelError: If the model cannot be run on such an image, its answers are no numbers,
                it has no norm with a scale, or is right on too many clean images with all norms scaled.
        """
        check_samples(model, samples, clean, labels)
        norms = norm_tensors(find_filters(model, as_float(clean.images[:1])))
        answers = check_answers(predictions_of(model, samples))
        doubts: list[Tensor] = []
        error = 0.0
        for depth, version in enumerate(amplified(model, norms, self.omega), 1):
            if not doubts:
                error = 1 - accuracy_of(version, clean)
            if error > self.xi:
                doubts.append(log_doubt(version, samples, answers))
            progress("scaling norms", depth, len(norms))
            if len(doubts) == self.n:
                break
        if not doubts:
            raise UnsupportedModelError(
                f"with all {len(norms)} norms scaled by {self.omega:g} the clean error is {error:.2f}, not "
                f"above xi = {self.xi:g}, so that confidence does not tell triggered from clean images; "
                "raise omega, lower xi, or choose another method."
            )
        mean = torch.logsumexp(torch.stack(doubts), 0) - math.log(len(doubts))
        return -mean.clamp(max=0).float()


def norm_tensors(filter_map: FilterMap) -> tuple[tuple[str, ...], ...]:
    """Return, for each norm with a scale, the names of its scale and shift, in the order in which they run.

    Args:
        filter_map: From ``find_filters``.

    Raises:
        UnsupportedModelError: If there is none.
    """
    norms = (norm for group in filter_map.groups for norm in group.norms)
    # Layers that share one norm must not scale it twice.
    tensors = dict.fromkeys(
        tuple(name for name in (norm.weight, norm.bias) if name) for norm in norms if norm.weight
    )
    if not tensors:
        raise UnsupportedModelError(
            "no layer of this network is followed by a norm with a scale, which this method multiplies; "
            "choose another method, such as SCALE-UP."
        )
    return tuple(tensors)


def amplified(model: nn.Module, norms: Sequence[tuple[str, ...]], omega: float) -> Iterator[nn.Module]:
    """Yield copies of ``model`` with its last 1, 2, ... norms multiplied: one object, changed in between.

    Args:
        model: The network; left untouched.
        norms: From ``norm_tensors``.
        omega: The factor.
    """
    work = copy.deepcopy(model)
    tensors = {**dict(work.named_buffers()), **dict(work.named_parameters())}
    for names in reversed(norms):
        with torch.no_grad():
            for name in names:
                tensors[name].mul_(omega)
        yield work


def log_doubt(model: nn.Module, images: Tensor, answers: Tensor) -> Tensor:
    """Return the logarithm of what probability all classes but ``answers`` have together.

    Args:
        model: Gives logits.
        images: ``(N, C, H, W)``.
        answers: int64 ``(N,)``.

    Returns:
        float64 ``(N,)`` on the CPU, at most 0; 0 where the model overflows: without an answer it has no
        confidence.
    """
    probabilities = logits_of(model, images).cpu().double().log_softmax(1)
    others = probabilities.scatter(1, answers.unsqueeze(1), -math.inf).logsumexp(1)
    # Where all other logits are -inf nothing is left of them.
    return others.nan_to_num(nan=0.0, neginf=float(torch.finfo(torch.float32).min))
