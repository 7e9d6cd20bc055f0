"""Split the features that a head reads into those that carry the clean task and the rest.

A mask m in [0, 1] over the features phi minimises ``CE(g(m phi), y) - CE(g((1 - m) phi), y)``, g being the
head: what it keeps answers rightly, and what it leaves, the complement, as wrongly as can be. BTI-DBF and BAN
share this step (see ``bti_dbf`` and ``ban``) and then look at what the complement answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor.compute import check_fits, logits_of
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.head import head_features, linear_head
from unbackdoor.types import LabelledImages, Progress, silent

_PROBED = 32
"""Images on which the head's outputs are compared with the model's."""

_SAME = 1e-2
"""Largest difference of equal probabilities; low-precision models round."""

_SILENT = 1e-2
"""Features that move the logits by less than this fraction of what all do on average give no answer."""

_FEWEST_ANSWERED = 0.1
"""With answers to fewer of the images than this, finding no class that stands out is no finding."""


@dataclass(frozen=True)
class Decoupling:
    """How the masks are learnt: Adam on all clean images at once, from random masks, side by side.

    Args:
        steps: Updates; BAN's script does 400 with its documented options, on 128 images each.
        learning_rate: Of Adam; 0.01 in both papers.
        penalty: lambda: weight of ``|m| / |m|_now``, whose value is 1 and whose slope shrinks the mask.
        starts: Masks learnt from independent starts, uniform in [0, 1].
    """

    steps: int = 400
    learning_rate: float = 0.01
    penalty: float = 0.0
    starts: int = 4

    def __post_init__(self) -> None:
        if self.steps < 1 or self.starts < 1:
            raise InvalidInputError(
                f"decoupling needs steps and starts of at least 1, got {self.steps} and {self.starts}."
            )
        if not 0 < self.learning_rate < math.inf or not 0 <= self.penalty < math.inf:
            raise InvalidInputError(
                "decoupling needs learning_rate > 0 and penalty >= 0, got "
                f"{self.learning_rate} and {self.penalty}."
            )


@dataclass(frozen=True, eq=False)
class Split:
    """A network cut before its linear head, with what the clean images become there.

    Args:
        name: Of the head.
        weight: float32 ``(K, F)``.
        bias: float32 ``(K,)``.
        features: float32 ``(N, F)``.
        labels: int64 ``(N,)``.
    """

    name: str
    weight: Tensor
    bias: Tensor
    features: Tensor
    labels: Tensor

    @property
    def classes(self) -> int:
        """Number of outputs, K."""
        return len(self.weight)

    def problem(self, fewest_classes: int) -> str:
        """Say why shares of answers would mean nothing, or return an empty text."""
        present = len(self.labels.unique())
        if present < fewest_classes:
            return (
                f"the clean images are of {present} classes, which leaves wrong answers too few places to "
                f"go; {fewest_classes} are needed"
            )
        if not bool(self.features.isfinite().all()):
            return "the features of some clean images are not finite"
        return ""


def split_at_head(model: nn.Module, clean: LabelledImages, *, purpose: str) -> Split:
    """Cut ``model`` before its head.

    Args:
        model: Takes float images in [0, 1]; left untouched.
        clean: Clean images with labels.
        purpose: What for, for the message.

    Raises:
        InvalidInputError: If there are no images, or a label has no output of the model.
        UnsupportedModelError: If the last layer is not linear, does not read flat features, or the model
            answers with something else than what that layer yields.
    """
    outputs = check_fits(model, clean, purpose=purpose)
    name = linear_head(model, clean.images)
    head = model.get_submodule(name)
    assert isinstance(head, nn.Linear)
    features = head_features(model, name, clean.images)
    weight = head.weight.detach().float()
    bias = torch.zeros_like(weight[:, 0]) if head.bias is None else head.bias.detach().float()
    probed = logits_of(model, clean.images[:_PROBED]).float().softmax(1)
    rebuilt = F.linear(features[:_PROBED], weight, bias).softmax(1)
    if len(weight) != outputs or not torch.allclose(probed, rebuilt, rtol=0, atol=_SAME, equal_nan=True):
        raise UnsupportedModelError(
            f"the model does not answer with what its last linear layer {name!r} yields, so that features "
            "cannot be masked before it; choose another method."
        )
    return Split(name, weight, bias, features, clean.labels.to(features.device))


def learn_masks(
    split: Split, options: Decoupling, *, generator: torch.Generator, progress: Progress = silent
) -> Tensor:
    """Return masks of the features that carry the clean task, float32 ``(starts, F)`` in [0, 1].

    Args:
        split: From ``split_at_head``.
        options: See ``Decoupling``.
        generator: The starts follow it; on the CPU.
        progress: Called after each step.
    """
    drawn = torch.rand(options.starts, split.features.shape[1], generator=generator)
    masks = drawn.to(split.features.device).requires_grad_()
    optimiser = torch.optim.Adam([masks], lr=options.learning_rate)
    everything = split.features @ split.weight.T
    for step in range(options.steps):
        with torch.enable_grad():
            loss = _objective(split, everything, masks, options.penalty)
        (masks.grad,) = torch.autograd.grad(loss, [masks])
        optimiser.step()
        with torch.no_grad():
            masks.clamp_(0.0, 1.0)
        progress("feature masks", step + 1, options.steps)
    return masks.detach()


def _objective(split: Split, everything: Tensor, masks: Tensor, penalty: float) -> Tensor:
    """Return the sum over the masks of what each minimises.

    Args:
        split: From ``split_at_head``.
        everything: What all features together add to the logits, ``(N, K)``.
        masks: ``(S, F)``.
        penalty: lambda.
    """
    kept = masked_sums(split.weight, split.features, masks)
    labels = split.labels.expand(len(masks), -1).flatten()
    # The head is linear: what the complement adds to the logits is all that the mask does not.
    right = F.cross_entropy((kept + split.bias).flatten(0, 1), labels)
    wrong = F.cross_entropy((everything - kept + split.bias).flatten(0, 1), labels)
    sizes = masks.sum(1)
    return len(masks) * (right - wrong) + penalty * (sizes / sizes.detach().clamp_min(1e-12)).sum()


def masked_sums(weight: Tensor, features: Tensor, masks: Tensor) -> Tensor:
    """Return what masked features add to the logits, ``(S, N, K)``.

    Args:
        weight: ``(K, F)``.
        features: ``(N, F)``.
        masks: ``(S, F)``.
    """
    # Masking the weights instead of the features makes this one matrix product.
    rows = (masks.unsqueeze(1) * weight).flatten(0, 1)
    return (features @ rows.T).view(len(features), len(masks), -1).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class Answers:
    """What the head answers from masked features.

    Args:
        shares: float64 ``(K,)``: for each class, the share of images of other classes that is answered with
            it, over all masks; see ``foreign_shares``.
        accuracy: Share of right answers.
        answered: Share of images, over all masks, that got an answer.
        finite: Whether the features were.
    """

    shares: Tensor
    accuracy: float
    answered: float
    finite: bool

    @property
    def problem(self) -> str:
        """Say why the answers tell nothing about the features, or return an empty text."""
        if not self.finite:
            return "the features of some clean images are not finite"
        if self.answered < _FEWEST_ANSWERED:
            return (
                f"the features that are read decide the answer to only {self.answered:.0%} of the clean "
                "images, too few to read anything from; for a complement, raise decoupling.penalty"
            )
        return ""


def answers_from(split: Split, features: Tensor, masks: Tensor | None) -> Answers:
    """Let the head answer from features, masked or not.

    Where they move the logits by less than a hundredth of what those of the untouched network do on average,
    none is given; nor where masked features alone would have another answer than with the head's bias. A
    complement that is all but empty would have the class of the largest bias for every image.

    Args:
        split: From ``split_at_head``.
        features: ``(N, F)`` of the same images, of this network or of a changed one.
        masks: ``(S, F)``, what each feature is multiplied by: 1 - m for a complement; None for nothing.
    """
    everything = torch.ones_like(features[:1]) if masks is None else masks
    sums = masked_sums(split.weight, features, everything)
    answers = (sums + split.bias).argmax(2)
    audible = _spread(sums) > _SILENT * _spread(split.features @ split.weight.T).mean()
    if masks is not None:
        audible &= sums.argmax(2) == answers
    answers[~audible] = split.classes
    return Answers(
        shares=foreign_shares(counts_of(answers, split.labels, split.classes)),
        accuracy=float((answers == split.labels).float().mean()),
        answered=float(audible.float().mean()),
        finite=bool(features.isfinite().all()),
    )


def _spread(logits: Tensor) -> Tensor:
    """Return the length of logits ``(..., K)`` less their mean over the classes, which changes no answer."""
    length: Tensor = torch.linalg.vector_norm(logits - logits.mean(-1, keepdim=True), dim=-1)
    return length


def counts_of(answers: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return how often each class was answered for each true class, int64 ``(K, K + 1)`` on the CPU.

    Args:
        answers: int64 ``(..., N)``; leading axes are counted together; K stands for no answer.
        labels: int64 ``(N,)``.
        classes: K.
    """
    pairs = (labels * (classes + 1) + answers).flatten()
    return torch.bincount(pairs, minlength=classes * (classes + 1)).view(classes, classes + 1).cpu()


def foreign_shares(counts: Tensor) -> Tensor:
    """Return, for each class t, the share of images of other classes that is answered t, float64 ``(K,)``.

    Every true class that has images weighs the same, so that the mix of the clean images does not matter.

    Args:
        counts: ``(K, K + 1)``: rows true class, columns answer, the last one for none.
    """
    images = counts.sum(1)
    rates = counts[:, :-1].double() / images.clamp_min(1).unsqueeze(1)
    rates.fill_diagonal_(0.0)
    present = (images > 0).double()
    return rates.sum(0) / (present.sum() - present).clamp_min(1)
