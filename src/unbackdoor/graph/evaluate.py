"""Measure graph networks and detectors against known triggers: the only module that sees both.

The rates are those of images (``unbackdoor.evaluate``): CA is the accuracy on unseen clean nodes, ASR the
share of triggered nodes of other classes that go to the target, RA the share of these that keep their class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbackdoor.evaluate import BackdoorMetrics
from unbackdoor.graph.attacks.triggers import Poisoned, SubgraphTrigger, attach
from unbackdoor.graph.data import Division
from unbackdoor.graph.detect import NodeScan
from unbackdoor.graph.purify import Defended
from unbackdoor.rates import Rate


def clean_accuracy(defended: Defended, division: Division) -> Rate:
    """Return the accuracy on the unseen test nodes, in the whole graph without triggers."""
    right = defended.predictions(division.whole) == division.whole.labels
    return Rate.of(right[division.test])


def evaluate(
    defended: Defended, division: Division, trigger: SubgraphTrigger, target_class: int
) -> BackdoorMetrics:
    """Measure clean accuracy, attack success and robust accuracy.

    All victims get their trigger at once, in the whole graph; the triggers of the training graph are not
    in it.

    Args:
        defended: What is measured.
        division: The test and victim nodes, none of which it was trained on.
        trigger: The attacker's.
        target_class: The attacker's.
    """
    labels = division.whole.labels[division.victims]
    victims = division.victims[labels != target_class]
    predicted = defended.predictions(attach(division.whole, victims, trigger))[victims]
    return BackdoorMetrics(
        clean_accuracy=clean_accuracy(defended, division),
        attack_success=Rate.of(predicted == target_class),
        robust_accuracy=Rate.of(predicted == division.whole.labels[victims]),
    )


@dataclass(frozen=True)
class NodeDetection:
    """How well a scan found the poisoned nodes.

    Args:
        recall: Share of the poisoned nodes that were flagged.
        precision: Share of the flagged nodes that are poisoned.
        auroc: Chance that a poisoned node scores higher than a clean labelled one; NaN without both.
        target_found: Whether the target class was named; None if there is none.
    """

    recall: Rate
    precision: Rate
    auroc: float
    target_found: bool | None

    def describe(self) -> Mapping[str, Any]:
        """Return JSON values."""
        return {
            "recall": self.recall.describe(),
            "precision": self.precision.describe(),
            "auroc": None if math.isnan(self.auroc) else self.auroc,
            "target_found": self.target_found,
        }


def judge(scan: NodeScan, poisoned: Poisoned | None) -> NodeDetection:
    """Compare what was flagged with what was poisoned; with None, nothing was."""
    truth = torch.zeros(len(scan.scores), dtype=torch.bool)
    if poisoned is not None:
        truth[poisoned.nodes] = True
    return NodeDetection(
        recall=Rate(int(truth[scan.flagged].sum()), int(truth.sum())),
        precision=Rate.of(truth[scan.flagged]),
        auroc=auroc(scan.scores[truth], scan.scores[~truth & ~scan.scores.isnan()]),
        target_found=None if poisoned is None else scan.target_class == poisoned.target_class,
    )


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Return the chance that a positive score exceeds a negative one, ties half; NaN without both."""
    if not len(positive) or not len(negative):
        return math.nan
    above = (positive.unsqueeze(1) > negative).double() + 0.5 * (positive.unsqueeze(1) == negative).double()
    return float(above.mean())
