"""Measure models against known triggers: the only module that sees a trigger and a model together.

Definitions are those of the field (and of the MNP paper, section 5.1, where it states them):
CA is the accuracy on clean images; ASR the share of triggered images classified as the attacker wants,
over the images that the label rule counts (for all-to-one, those of other classes than the target); RA,
the robust accuracy, the share of the same images still classified by their true label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unbackdoor.compute import EVALUATION_BATCH, check_fits, predictions_of
from unbackdoor.rates import Rate
from unbackdoor.types import LabelledImages, LabelRule, Trigger, as_float, quantise


@dataclass(frozen=True)
class BackdoorMetrics:
    """What a model does on clean and on triggered images."""

    clean_accuracy: Rate
    attack_success: Rate
    robust_accuracy: Rate

    def __str__(self) -> str:
        """Return the rates in a line, with the number of triggered images."""
        return (
            f"CA {_percent(self.clean_accuracy)}, ASR {_percent(self.attack_success)} of "
            f"{self.attack_success.n}, RA {_percent(self.robust_accuracy)}"
        )

    def describe(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "clean_accuracy": self.clean_accuracy.describe(),
            "attack_success": self.attack_success.describe(),
            "robust_accuracy": self.robust_accuracy.describe(),
        }


def _percent(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} %" if rate.n else "-"


def clean_accuracy(model: nn.Module, test: LabelledImages, *, batch_size: int = EVALUATION_BATCH) -> Rate:
    """Return the accuracy of ``model``, in eval mode and fp32, on ``test``.

    Raises:
        InvalidInputError: If ``test`` is empty, or a label has no output of the model.
    """
    check_fits(model, test, purpose="an evaluation")
    return Rate.of(predictions_of(model, test.images, batch_size=batch_size) == test.labels.cpu())


def evaluate(
    model: nn.Module,
    test: LabelledImages,
    trigger: Trigger,
    label_rule: LabelRule,
    *,
    batch_size: int = EVALUATION_BATCH,
    eight_bit: bool = True,
) -> BackdoorMetrics:
    """Measure clean accuracy, attack success and robust accuracy.

    Args:
        model: Takes float images in [0, 1]; evaluated in eval mode and fp32, left untouched.
        test: Images that neither attacker nor defender trained on.
        trigger: The attacker's trigger.
        label_rule: The attacker's label rule.
        batch_size: Images per forward pass.
        eight_bit: Round triggered images to 8-bit levels, as a real input would be.

    Raises:
        InvalidInputError: If ``test`` is empty, or a label has no output of the model.
    """
    check_fits(model, test, purpose="an evaluation")
    labels = test.labels.cpu()
    counted = label_rule.counts(labels)
    wanted = label_rule(labels)[counted]
    triggered = [
        quantise(trigger(as_float(part))) if eight_bit else trigger(as_float(part))
        for part in test.images[counted.to(test.images.device)].split(1024)
    ]
    predictions = [predictions_of(model, part, batch_size=batch_size) for part in triggered]
    flat = labels.new_tensor([label for part in predictions for label in part.tolist()])
    return BackdoorMetrics(
        clean_accuracy=clean_accuracy(model, test, batch_size=batch_size),
        attack_success=Rate.of(flat == wanted),
        robust_accuracy=Rate.of(flat == labels[counted]),
    )


def natural_floor(
    twin: nn.Module,
    test: LabelledImages,
    trigger: Trigger,
    label_rule: LabelRule,
    *,
    batch_size: int = EVALUATION_BATCH,
) -> Rate:
    """Return the attack success rate on a model without a backdoor: what the trigger does by itself.

    Args:
        twin: A clean model of the same architecture and recipe.
        test: As in `evaluate`.
        trigger: The attacker's trigger.
        label_rule: The attacker's label rule.
        batch_size: Images per forward pass.
    """
    return evaluate(twin, test, trigger, label_rule, batch_size=batch_size).attack_success


def decoy_accuracy(
    model: nn.Module, test: LabelledImages, decoy: Trigger, *, batch_size: int = EVALUATION_BATCH
) -> Rate:
    """Return the accuracy on images that look triggered but must keep their label.

    Source: cross accuracy of Nguyen and Tran, "Input-Aware Dynamic Backdoor Attack", 2020, arXiv
    2010.08138; noise accuracy of the same authors' "WaNet", 2021, arXiv 2102.10369.

    Raises:
        InvalidInputError: If ``test`` is empty, or a label has no output of the model.
    """
    check_fits(model, test, purpose="an evaluation")
    parts = [quantise(decoy(as_float(part))) for part in test.images.split(1024)]
    predictions = [predictions_of(model, part, batch_size=batch_size) for part in parts]
    return Rate.of(torch.cat(predictions).cpu() == test.labels.cpu())
