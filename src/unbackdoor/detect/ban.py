"""BAN: under adversarial noise on its neurons, does a network answer with one class?"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.compute import Precision, arrange, autocast, device_of, memory_format_for, mode
from unbackdoor.detect.calibration import Calibration, threshold_from
from unbackdoor.detect.decoupling import (
    Decoupling,
    Split,
    answers_from,
    learn_masks,
    split_at_head,
)
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.groups import find_filters
from unbackdoor.filters.head import head_features
from unbackdoor.neuron_noise import Target, ascended, perturbed_tensors, random_noise, targets_of
from unbackdoor.train import batches
from unbackdoor.types import Detection, LabelledImages, Progress, as_float, silent


@dataclass(frozen=True)
class BAN:
    """Let noise on the neurons climb the clean loss, and measure how far the answers shift to one class.

    Source: Xu, Liu, Koffas, Yu, Picek, "BAN: Detecting Backdoors Activated by Adversarial Neuron Noise",
    NeurIPS 2024, arXiv 2405.19928, and the authors' code. Scale and shift of each norm become ``(1 + delta)
    gamma`` and ``(1 + xi) beta``; delta and xi start at random in [-eps, eps] and climb the clean
    cross-entropy by signed steps of eps / steps. A mask over the features keeps the benign ones, as in
    BTI-DBF, with the penalty ``lambda |m|`` divided by the value of |m|. With the noise, from the complement
    of the mask, an infected network answers with its target and a clean one errs in many directions.

    The authors print the histogram of these answers and name no threshold. The score is the largest *shift*:
    the share of the images of other classes that is answered with t, less the same share of the untouched
    network. Noise can drive clean networks into one class too, as it does with the clean twin of
    ``testing.planted_backdoor`` at eps 0.6, ``reading = "whole"`` and ``norm_mode = "eval"``: take a
    calibration. Images on which the complement is silent count as answered with no class, see ``bti_dbf``.
    All-to-all backdoors have no such class.

    Deviations: one noise is climbed over all clean images and read on all of them; the authors draw it anew
    for each batch, and what they read is the last batch's. Masks lie on what the head reads, after pooling,
    not on the map before it, and are learnt in eval mode; there are several starts; they are clipped after
    each step, not before it. Norms on residual sums, which belong to no single filter, have no noise. A
    network without norms has it on each filter's weight and bias.

    Args:
        decoupling: How masks are learnt; the authors document lambda = 0.75, their script's default is 0.25.
        eps: Size of the noise, relative to scale and shift.
        steps: Signed ascent steps; 30 in the authors' documentation, 1 by their script's default.
        project_noise: Clip the noise to [-eps, eps] after each step; the authors do not, so that it reaches
            up to twice eps.
        norm_mode: Mode of the norms, and of dropout, while the noise climbs. ``train``, as in the authors'
            code, uses the statistics of the batch, and the running ones, which are read with, follow the
            noise; ``eval`` leaves them as they are.
        reading: What the noisy network answers from: the ``complement`` of the mask, or the ``whole`` of its
            features, which the authors also print.
        batch_size: Images a forward and backward pass, at least 2.
        precision: Of those passes.
        threshold: Used without a calibration.
        fewest_classes: Abstain if the clean images are of fewer classes, at least 3.
        calibration: Scores of clean models, or None.
        alpha: False-positive rate of a calibrated threshold.
    """

    name: ClassVar[str] = "ban"
    title: ClassVar[str] = "BAN: answers under adversarial neuron noise"
    source: ClassVar[str] = "Xu et al. 2024, arXiv 2405.19928"
    needs: ClassVar[str] = (
        "clean images with labels; a linear head; without norm scales it treats weights and biases"
    )

    decoupling: Decoupling = field(default_factory=lambda: Decoupling(penalty=0.75))
    eps: float = 0.3
    steps: int = 30
    project_noise: bool = False
    norm_mode: Literal["train", "eval"] = "train"
    reading: Literal["complement", "whole"] = "complement"
    batch_size: int = 128
    precision: Precision = "auto"
    threshold: float = 0.5
    fewest_classes: int = 4
    calibration: Calibration | None = None
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.eps < math.inf or self.steps < 1 or self.batch_size < 2:
            raise InvalidInputError(
                "eps must be at least 0, steps at least 1 and batch_size at least 2, got "
                f"{self.eps}, {self.steps} and {self.batch_size}."
            )
        if self.norm_mode not in ("train", "eval") or self.reading not in ("complement", "whole"):
            raise InvalidInputError(
                "norm_mode must be 'train' or 'eval' and reading 'complement' or 'whole', got "
                f"{self.norm_mode!r} and {self.reading!r}."
            )
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
        """Disturb a copy of ``model``, which is left untouched, and compare its answers.

        Args:
            model: Takes float images in [0, 1]; its last layer is linear.
            clean: Clean images with labels; a few hundred.
            generator: Masks, noise, order of the images and dropout follow it; on the CPU.
            progress: Called after each step of either stage.

        Raises:
            InvalidInputError: If there are no images, or a label has no output of the model.
            UnsupportedModelError: If the last layer is not linear or does not yield the logits, or there is
                no other layer to disturb.
        """
        split = split_at_head(model, clean, purpose="adversarial neuron noise")
        targets = targets_of(find_filters(model, as_float(clean.images[:1])))
        if problem := split.problem(self.fewest_classes):
            threshold, source = self._threshold()
            return Detection(math.nan, threshold, source, undetermined=problem)
        masks = learn_masks(split, self.decoupling, generator=rng.spawn(generator), progress=progress)
        noisy = disturbed(model, targets, clean, self, generator=rng.spawn(generator), progress=progress)
        return self.judge(split, head_features(noisy, split.name, clean.images), masks)

    def judge(self, split: Split, features: Tensor, masks: Tensor) -> Detection:
        """Compare the answers of a network with those under noise.

        Args:
            split: The untouched network, from ``decoupling.split_at_head``.
            features: What the head reads under noise, float32 ``(N, F)``.
            masks: Of the benign features, ``(S, F)`` in [0, 1].
        """
        usual = answers_from(split, split.features, None)
        whole = answers_from(split, features, None)
        found = whole if self.reading == "whole" else answers_from(split, features, 1 - masks)
        problem = found.problem if whole.finite else "under noise some features are not finite; lower eps"
        threshold, source = self._threshold()
        shifts = found.shares - usual.shares
        score = float(shifts.max())
        return Detection(
            score=math.nan if problem else score,
            threshold=threshold,
            threshold_source=source,
            p_value=None if self.calibration is None or problem else self.calibration.p_value(score),
            target_class=None if problem else int(shifts.argmax()),
            undetermined=problem,
            evidence={
                "shift": shifts.tolist(),
                "class_share": found.shares.tolist(),
                "class_share_of_all_features": whole.shares.tolist(),
                "accuracy": usual.accuracy,
                "accuracy_under_noise": whole.accuracy,
                "answered": found.answered,
                "mean_mask": float(masks.mean()),
            },
        )

    def _threshold(self) -> tuple[float, str]:
        return threshold_from(self.calibration, self.alpha, fixed=self.threshold)


def disturbed(
    model: nn.Module,
    targets: Sequence[Target],
    clean: LabelledImages,
    options: BAN,
    *,
    generator: torch.Generator,
    progress: Progress = silent,
) -> nn.Module:
    """Return a copy of ``model`` with noise that climbs the loss on the clean images.

    Args:
        model: Takes float images in [0, 1]; left untouched.
        targets: From ``targets_of``.
        clean: Clean images with labels, at least two.
        options: See ``BAN``.
        generator: Start of the noise, order of the images and dropout follow it; on the CPU.
        progress: Called after each step.
    """
    noisy = arrange(copy.deepcopy(model).requires_grad_(False))
    clean = clean.to(device_of(model))
    noise = random_noise(targets, options.eps, generator=generator, device=device_of(model))
    with mode(noisy, training=options.norm_mode == "train"), rng.isolated(generator):
        for step in range(options.steps if options.eps > 0 else 0):
            slopes = loss_slopes(noisy, targets, noise, clean, options, generator=generator)
            noise = ascended(noise, slopes, options.eps, options.steps, project=options.project_noise)
            progress("neuron noise", step + 1, options.steps)
    tensors = dict(noisy.named_parameters())
    with torch.no_grad():
        for name, tensor in disturbed_tensors(tensors, targets, noise).items():
            tensors[name].copy_(tensor)
    return noisy


def loss_slopes(
    model: nn.Module,
    targets: Sequence[Target],
    noise: Mapping[str, Tensor],
    clean: LabelledImages,
    options: BAN,
    *,
    generator: torch.Generator,
) -> list[Tensor]:
    """Return the slope of the summed cross-entropy over one pass, in the order of ``noise``.

    Args:
        model: With frozen weights, in the mode in which it is to run.
        targets: From ``targets_of``.
        noise: Tensor name to ``(filters,)``.
        clean: Clean images with labels, on the model's device.
        options: See ``BAN``.
        generator: The order of the images follows it.
    """
    leaves = {name: each.detach().requires_grad_() for name, each in noise.items()}
    slopes = [torch.zeros_like(each) for each in noise.values()]
    tensors = dict(model.named_parameters())
    for batch in batches(clean, options.batch_size, generator, layout=memory_format_for(model)):
        with torch.enable_grad(), autocast(options.precision, batch.images.device):
            replaced = disturbed_tensors(tensors, targets, leaves)
            logits = functional_call(model, replaced, (batch.images,))
            loss = F.cross_entropy(logits.float(), batch.labels, reduction="sum")
        parts = torch.autograd.grad(loss, list(leaves.values()))
        slopes = [slope + part for slope, part in zip(slopes, parts, strict=True)]
    return slopes


def disturbed_tensors(
    tensors: Mapping[str, Tensor], targets: Sequence[Target], noise: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return ``(1 + delta) gamma`` and ``(1 + xi) beta`` for every target; differentiable.

    Args:
        tensors: The parameters of the network by name.
        targets: From ``targets_of``.
        noise: Tensor name to ``(filters,)``.
    """
    ones = {target.name: torch.ones_like(noise[target.scales[0]]) for target in targets}
    return perturbed_tensors(tensors, targets, ones, noise)
