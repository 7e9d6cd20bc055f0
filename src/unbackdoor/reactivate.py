"""Is a backdoor gone, or asleep? What it takes an attacker to wake it in a purified model.

A low attack success rate is no removal: a purified model can sit so close to the infected one that a few
poisoned images, or a slightly changed trigger, bring the backdoor back. Like ``evaluate``, this module sees
trigger and model together; no defence may import it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.compute import check_fits, device_of, logits_of, predictions_of
from unbackdoor.data.splits import balanced_order, draw_balanced
from unbackdoor.errors import InvalidInputError
from unbackdoor.evaluate import BackdoorMetrics, evaluate
from unbackdoor.rates import Rate
from unbackdoor.train import Recipe, train
from unbackdoor.types import LabelledImages, LabelRule, Progress, Trigger, as_float, quantise, silent

ATTACKER_IMAGES = 500
"""Images that an attacker who wants to wake a backdoor has; they are not tested on."""


@dataclass(frozen=True)
class Retuning:
    """Fine-tune on clean images with a handful of poisoned ones among them.

    Source: the retuning attack of Min, Qin, Zhang, Shen, Cheng, "Uncovering, Explaining, and Mitigating the
    Superficial Safety of Backdoor Defense", NeurIPS 2024, arXiv 2410.09838: 5 epochs at 0.01 on 2 % of the
    training data with 5 poisoned samples.

    Deviations: 2 % of CIFAR-10 are 1000 images of the training set; ``reactivation`` has up to 500 of the
    test set, so half as many steps, and adds stamped copies of 5 of these to them. Images are neither
    cropped nor mirrored, which would show the network triggers that the attacker never uses.

    What the numbers mean is only seen beside a control: run the same on a clean model. A model without a
    backdoor learns little from 5 images in so few steps; where it does learn the trigger, the test says
    nothing.

    Args:
        poisoned: Poisoned images among the tuning images, drawn from those that the label rule counts.
        recipe: Of the fine-tuning.
    """

    poisoned: int = 5
    recipe: Recipe = field(
        default_factory=lambda: Recipe(
            epochs=5, learning_rate=0.01, schedule="constant", crop_padding=0, flip=False
        )
    )

    def __post_init__(self) -> None:
        if self.poisoned < 1:
            raise InvalidInputError(f"retuning needs at least 1 poisoned image, got {self.poisoned}.")

    def run(
        self,
        model: nn.Module,
        tuning: LabelledImages,
        test: LabelledImages,
        trigger: Trigger,
        label_rule: LabelRule,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> BackdoorMetrics:
        """Return CA, ASR and RA of a copy of ``model`` after the retuning.

        Args:
            model: The purified model; left untouched.
            tuning: Clean images with labels, some hundred; the poisoned ones are stamped on top of these.
            test: As in ``evaluate``.
            trigger: The attacker's trigger.
            label_rule: The attacker's label rule.
            generator: Choice of the poisoned images and order of training; on the CPU.
            progress: Called after each epoch.

        Raises:
            InvalidInputError: If fewer images than ``poisoned`` count under the label rule.
        """
        check_fits(model, tuning, purpose="a retuning", at_least=2)
        counted = label_rule.counts(tuning.labels.cpu()).nonzero().flatten()
        if len(counted) < self.poisoned:
            raise InvalidInputError(
                f"{self.poisoned} poisoned images were asked for, but the label rule counts only "
                f"{len(counted)} of the tuning images; lower poisoned."
            )
        chosen = counted[torch.randperm(len(counted), generator=generator)[: self.poisoned]]
        stamped = quantise(trigger(as_float(tuning.images[chosen])))
        mixed = LabelledImages(
            torch.cat([quantise(as_float(tuning.images)), stamped]),
            torch.cat([tuning.labels, label_rule(tuning.labels[chosen])]),
            tuning.class_names,
        )
        retuned = copy.deepcopy(model)
        for parameter in retuned.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        train(
            retuned, mixed, self.recipe, generator=rng.spawn(generator),
            progress=lambda _, done, total: progress("retuning", done, total),
        )  # fmt: skip
        return evaluate(retuned.eval(), test, trigger, label_rule)


@dataclass(frozen=True)
class Reactivated:
    """What a universal change of the input did.

    Args:
        attack_success: ASR of the trigger with the change on top, on images that it was not fitted to.
        without_trigger: Share of the same images that the change alone, fitted in the same way but without
            the trigger, sends where the attacker wants: what any model suffers from such a change. Only what
            ``attack_success`` exceeds this by speaks of a backdoor.
        queries: Images that were sent through the model while fitting each of the two.
    """

    attack_success: Rate
    without_trigger: Rate
    queries: int


@dataclass(frozen=True)
class QueryAttack:
    """Search one small change for all images that makes the sleeping trigger work again.

    Source: Zhu, Liang, Wu, "Breaking the False Sense of Security in Backdoor Defense through Re-Activation
    Attack", NeurIPS 2024, and the query-based reactivation of Min et al., arXiv 2410.09838: a universal
    change delta with ``|delta| <= eps`` added to triggered images, found by querying the purified model
    (or, as an upper bound, by its gradients).

    Deviations: the papers' query attacks are not reproduced step by step; ``query`` is a random search over
    squares of +-eps (Andriushchenko et al., "Square Attack", ECCV 2020, arXiv 1912.00049) on the mean
    cross-entropy to the wanted labels, made universal; ``gradient`` is signed descent. The control without
    the trigger is ours.

    Args:
        eps: Largest change of a pixel, in [0, 1]-images.
        steps: Changes tried (``query``) or gradient steps.
        images: Images that the change is fitted to.
        knowledge: ``query`` sees the model's outputs, ``gradient`` its weights.
        first_square: Side of the first squares, as a share of the image's; it shrinks to one pixel.
    """

    eps: float = 8 / 255
    steps: int = 300
    images: int = 64
    knowledge: Literal["query", "gradient"] = "query"
    first_square: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.eps <= 1 or not 0 < self.first_square <= 1 or self.steps < 1 or self.images < 1:
            raise InvalidInputError(
                "eps and first_square must lie in (0, 1], steps and images be at least 1, got "
                f"{self.eps}, {self.first_square}, {self.steps} and {self.images}."
            )
        if self.knowledge not in ("query", "gradient"):
            raise InvalidInputError(f"knowledge must be 'query' or 'gradient', got {self.knowledge!r}.")

    def run(
        self,
        model: nn.Module,
        fitting: LabelledImages,
        test: LabelledImages,
        trigger: Trigger,
        label_rule: LabelRule,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Reactivated:
        """Fit the change with and without the trigger, and measure both on ``test``.

        Args:
            model: The purified model; left untouched, used in eval mode.
            fitting: Images that the attacker has.
            test: Images that neither attacker nor defender used.
            trigger: The attacker's trigger.
            label_rule: The attacker's label rule.
            generator: All randomness follows it; on the CPU.
            progress: Called while fitting.

        Raises:
            InvalidInputError: If the label rule counts none of the images.
        """
        check_fits(model, fitting, purpose="a query attack")
        counted = fitting.subset(label_rule.counts(fitting.labels.cpu()).to(fitting.labels.device))
        eligible = test.subset(label_rule.counts(test.labels.cpu()).to(test.labels.device))
        if not len(counted) or not len(eligible):
            raise InvalidInputError("the label rule counts none of the images; give images of other classes.")
        if len(counted) > self.images:
            counted = draw_balanced(counted, self.images, rng.spawn(generator))
        rates = []
        for number, stamp in enumerate((trigger, _nothing)):
            base = stamp(as_float(counted.images))
            delta = self._fit(model, base, label_rule(counted.labels), rng.spawn(generator))
            progress("query attack", number + 1, 2)
            rates.append(_success(model, eligible, stamp, delta, label_rule))
        return Reactivated(rates[0], rates[1], queries=len(counted) * (self.steps + 1))

    def _fit(self, model: nn.Module, base: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
        if self.knowledge == "gradient":
            return self._descend(model, base, wanted)
        channels, height, width = base.shape[1:]
        signs = torch.randint(0, 2, (channels, 1, width), generator=generator) * 2.0 - 1.0
        best = (self.eps * signs).expand(channels, height, width).clone().to(base.device)
        lowest = _loss(model, base + best, wanted)
        for step in range(self.steps):
            side = max(1, round(self.first_square * (1 - step / self.steps) * min(height, width)))
            row = int(torch.randint(0, height - side + 1, (1,), generator=generator))
            column = int(torch.randint(0, width - side + 1, (1,), generator=generator))
            trial = best.clone()
            colour = torch.randint(0, 2, (channels, 1, 1), generator=generator) * 2.0 - 1.0
            trial[:, row : row + side, column : column + side] = (self.eps * colour).to(base.device)
            if (loss := _loss(model, base + trial, wanted)) < lowest:
                best, lowest = trial, loss
        return best

    def _descend(self, model: nn.Module, base: Tensor, wanted: Tensor) -> Tensor:
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        base, wanted = base.to(device_of(model)), wanted.to(device_of(model))
        delta = torch.zeros_like(base[0])
        rate = 2.5 * self.eps / self.steps
        for _ in range(self.steps):
            delta.requires_grad_()
            loss = F.cross_entropy(frozen((base + delta).clamp(0, 1)), wanted)
            (gradient,) = torch.autograd.grad(loss, delta)
            delta = (delta.detach() - rate * gradient.sign()).clamp(-self.eps, self.eps)
        return delta.cpu()


def reactivation(
    model: nn.Module,
    test: LabelledImages,
    trigger: Trigger,
    label_rule: LabelRule,
    *,
    generator: torch.Generator,
    attacker_images: int = ATTACKER_IMAGES,
    progress: Progress = silent,
) -> dict[str, Rate]:
    """Try both attacks with their defaults.

    Args:
        model: The purified model; left untouched.
        test: Test images; the attacker gets some, and the rest is measured on.
        trigger: The attacker's trigger.
        label_rule: The attacker's label rule.
        generator: All randomness follows it; on the CPU.
        attacker_images: Images that the attacker gets, at most half of all.
        progress: Called during the work.

    Returns:
        ``retuned_success`` and ``retuned_accuracy`` (ASR and CA after retuning), ``queried_success`` (ASR
        with the universal change) and ``queried_without_trigger`` (what it does without the trigger).
    """
    order = balanced_order(test.labels, rng.spawn(generator))
    count = min(attacker_images, len(test) // 2)
    attacker, rest = test.subset(order[:count]), test.subset(order[count:])
    retuned = Retuning().run(
        model, attacker, rest, trigger, label_rule, generator=rng.spawn(generator), progress=progress
    )
    queried = QueryAttack().run(
        model, attacker, rest, trigger, label_rule, generator=rng.spawn(generator), progress=progress
    )
    return {
        "retuned_success": retuned.attack_success,
        "retuned_accuracy": retuned.clean_accuracy,
        "queried_success": queried.attack_success,
        "queried_without_trigger": queried.without_trigger,
    }


def _nothing(images: Tensor) -> Tensor:
    return images


def _loss(model: nn.Module, images: Tensor, wanted: Tensor) -> float:
    logits = logits_of(model, images.clamp(0, 1))
    return float(F.cross_entropy(logits, wanted.to(logits.device)))


def _stamped(images: Tensor, stamp: Trigger, delta: Tensor) -> list[Tensor]:
    """Return the images with trigger and change in parts, where they lie."""
    stamped = (stamp(as_float(part)) for part in images.split(1024))
    return [quantise(part + delta.to(part.device)) for part in stamped]


def _success(
    model: nn.Module, eligible: LabelledImages, stamp: Trigger, delta: Tensor, label_rule: LabelRule
) -> Rate:
    parts = _stamped(eligible.images, stamp, delta)
    predictions = torch.cat([predictions_of(model, part).cpu() for part in parts])
    return Rate.of(predictions == label_rule(eligible.labels).cpu())
