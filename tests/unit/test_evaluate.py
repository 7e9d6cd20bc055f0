from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from unbackdoor.errors import InvalidInputError
from unbackdoor.evaluate import BackdoorMetrics, clean_accuracy, evaluate
from unbackdoor.rates import Rate
from unbackdoor.types import AllToAll, AllToOne, LabelledImages


class Reader(nn.Module):
    """Predicts the class that is written into the first pixel, or one more where the last is white."""

    def __init__(self, classes: int, target: int | None) -> None:
        super().__init__()
        self.classes, self.target = classes, target
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        written = (images[:, 0, 0, 0] * 255).round().long().clamp(max=self.classes - 1)
        triggered = images[:, 0, -1, -1] > 0.99
        wanted = torch.full_like(written, self.target) if self.target is not None else written + 1
        return nn.functional.one_hot(
            torch.where(triggered, wanted % self.classes, written), self.classes
        ).float()


def whiten(images: Tensor) -> Tensor:
    stamped = images.clone()
    stamped[:, :, -1, -1] = 1.0
    return stamped


def written(labels: list[int]) -> LabelledImages:
    values = torch.tensor(labels, dtype=torch.int64)
    images = torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = values.to(torch.uint8)
    return LabelledImages(images, values)


def test_attack_success_excludes_the_target_class() -> None:
    data = written([0, 0, 1, 2, 2])
    metrics = evaluate(Reader(3, target=0), data, whiten, AllToOne(0))
    assert metrics.clean_accuracy == Rate(5, 5)
    assert metrics.attack_success == Rate(3, 3)
    assert metrics.robust_accuracy == Rate(0, 3)


def test_a_wrong_target_counts_as_failure() -> None:
    metrics = evaluate(Reader(3, target=1), written([0, 0, 1, 2, 2]), whiten, AllToOne(0))
    assert metrics.attack_success == Rate(0, 3)
    assert metrics.robust_accuracy == Rate(1, 3)  # the image of class 1 is still called 1


def test_all_to_all_counts_every_image() -> None:
    metrics = evaluate(Reader(3, target=None), written([0, 1, 2, 2]), whiten, AllToAll(3))
    assert metrics.attack_success == Rate(4, 4)
    assert metrics.robust_accuracy == Rate(0, 4)


def test_a_harmless_trigger_leaves_robust_accuracy() -> None:
    metrics = evaluate(Reader(3, target=0), written([0, 1, 2, 2]), lambda images: images, AllToOne(0))
    assert metrics.attack_success == Rate(0, 3)
    assert metrics.robust_accuracy == Rate(3, 3)
    assert metrics.describe()["robust_accuracy"]["n"] == 3


def test_nothing_but_the_target_class_leaves_attack_success_unknown() -> None:
    metrics = evaluate(Reader(3, target=0), written([0, 0]), whiten, AllToOne(0))
    assert metrics.clean_accuracy == Rate(2, 2)
    assert metrics.attack_success.n == 0
    assert math.isnan(metrics.attack_success.value)


def test_triggered_images_are_rounded_to_bytes_unless_told_otherwise() -> None:
    def faint(images: Tensor) -> Tensor:
        stamped = images.clone()
        stamped[:, :, -1, -1] = 0.9895  # rounds to 252 / 255 = 0.988, below the reader's 0.99
        stamped[:, :, 0, 0] += 0.4 / 255
        return stamped

    class Exact(Reader):
        def forward(self, images: Tensor) -> Tensor:
            exact = images[:, 0, -1, -1] > 0.989
            return nn.functional.one_hot(exact.long(), 2).float()

    data = written([0, 0, 0])
    assert evaluate(Exact(2, 1), data, faint, AllToOne(1)).attack_success == Rate(0, 3)
    assert evaluate(Exact(2, 1), data, faint, AllToOne(1), eight_bit=False).attack_success == Rate(3, 3)


def test_batch_size_changes_nothing_and_the_mode_is_kept() -> None:
    model = Reader(3, target=0).train()
    data = written([0, 1, 2, 1, 2])
    assert evaluate(model, data, whiten, AllToOne(0), batch_size=2) == evaluate(
        model, data, whiten, AllToOne(0)
    )
    assert model.training


def test_empty_and_foreign_data_are_refused() -> None:
    model = Reader(3, target=0)
    with pytest.raises(InvalidInputError, match="an evaluation needs at least 1"):
        evaluate(model, written([]), whiten, AllToOne(0))
    with pytest.raises(InvalidInputError, match="an evaluation needs at least 1"):
        clean_accuracy(model, written([]))
    with pytest.raises(InvalidInputError, match="labels go up to 3, but the model has 3 outputs"):
        evaluate(model, written([0, 3]), whiten, AllToOne(0))


def test_metrics_read_as_a_line() -> None:
    metrics = BackdoorMetrics(Rate(850, 1000), Rate(441, 9000), Rate(6993, 9000))
    assert str(metrics) == "CA 85.0 %, ASR 4.9 % of 9000, RA 77.7 %"
    assert str(BackdoorMetrics(Rate(1, 1), Rate(0, 0), Rate(0, 0))) == "CA 100.0 %, ASR - of 0, RA -"
