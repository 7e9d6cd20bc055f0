from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.detect.scale_up import Consistency, ScaleUp, class_statistics, consistency
from unbackdoor.errors import InvalidInputError
from unbackdoor.testing import planted_backdoor
from unbackdoor.types import LabelledImages, as_float


class Bands(nn.Module):
    """The class is the quarter of [0, 1] that the mean pixel lies in: 0 to 3."""

    def forward(self, images: Tensor) -> Tensor:
        band = (4 * images.flatten(1).mean(1)).long().clamp(max=3)
        return nn.functional.one_hot(band, 4).float()


def flat(*levels: float) -> LabelledImages:
    images = torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    return LabelledImages(images, torch.zeros(len(levels), dtype=torch.int64))


def test_the_share_of_kept_answers_by_hand() -> None:
    # Quarter 0 ends at 0.25: of 3, 5, 7, 9, 11 times 0.03 all but 0.27 and 0.33 stay below; 0.1 never does;
    # 0.8 is in the last quarter, where clipping keeps it; 0.3 leaves its quarter at once.
    found = consistency(Bands(), flat(0.03, 0.1, 0.8, 0.3, 0.0).images, (3.0, 5.0, 7.0, 9.0, 11.0))
    assert found.answers.tolist() == [0, 0, 3, 1, 0]
    assert found.shares.tolist() == pytest.approx([0.6, 0.0, 1.0, 0.0, 1.0])
    free = ScaleUp().score(Bands(), flat(0.03, 0.8).images, flat(0.5, 0.6), generator=rng.generator(0))
    assert free.tolist() == pytest.approx([0.6, 1.0])


def test_class_statistics_by_hand() -> None:
    # Class 0: 0, 1, 0.5; class 2: constant; class 1 has one image and class 3 none: those of all.
    shares = torch.tensor([0.0, 1.0, 0.5, 0.2, 0.8, 0.8], dtype=torch.float64)
    found = class_statistics(Consistency(torch.tensor([0, 0, 0, 1, 2, 2]), shares), 4, least_std=0.05)
    mean = 3.3 / 6
    std = math.sqrt(sum((x - mean) ** 2 for x in shares.tolist()) / 5)
    assert found.mean.tolist() == pytest.approx([0.5, mean, 0.8, mean])
    assert found.std.tolist() == pytest.approx([0.5, std, 0.05, std])


def test_the_data_limited_score_is_a_z_score_within_the_class_of_the_answer() -> None:
    # Clean images of class 0 have the shares 1 and 0 (mean 0.5, deviation 0.707), those of class 3 all 1.
    clean = flat(0.0, 0.1, 0.8, 0.9)
    scores = ScaleUp("data_limited").score(Bands(), flat(0.03, 0.8).images, clean, generator=rng.generator(0))
    assert scores.tolist() == pytest.approx([0.1 / math.sqrt(0.5), 0.0])


def test_constant_shares_divide_by_the_rounding_of_a_share() -> None:
    clean = flat(0.1, 0.1)
    scores = ScaleUp("data_limited").score(Bands(), flat(0.0).images, clean, generator=rng.generator(0))
    assert float(scores) == pytest.approx(5 * math.sqrt(12))


def test_labels_make_no_difference() -> None:
    clean, samples = flat(0.0, 0.1, 0.8), flat(0.03, 0.3).images
    relabelled = LabelledImages(clean.images, torch.tensor([3, 2, 1]))
    one = ScaleUp("data_limited").score(Bands(), samples, clean, generator=rng.generator(0))
    other = ScaleUp("data_limited").score(
        Bands(), samples, relabelled, labels=torch.tensor([2, 2]), generator=rng.generator(1)
    )
    assert torch.equal(one, other)


def test_triggered_samples_of_the_planted_network_stand_out() -> None:
    planted = planted_backdoor(target_class=3)
    # More than one batch.
    clean, test = (planted.clean_data(n, rng.generator(n)) for n in (100, 300))
    samples = torch.cat([as_float(test.images), planted.trigger(as_float(test.images))])
    labels = torch.cat([test.labels, test.labels])
    free, limited = (
        method.score(planted.model, samples, clean, generator=rng.generator(0))
        for method in (ScaleUp(), ScaleUp("data_limited"))
    )
    triggered = (torch.arange(600) >= 300) & (labels != 3)
    assert float((free[triggered] >= 0.5).float().mean()) > 0.95
    assert float((limited[triggered] >= 0.5).float().mean()) > 0.95
    # White squares, class 7, are bright by nature: only a comparison with their kind clears them.
    white, rest = (
        (torch.arange(600) < 300) & among for among in (labels == 7, (labels != 3) & (labels != 7))
    )
    assert float((free[rest] >= 0.5).float().mean()) < 0.05
    assert float((free[white] >= 0.5).float().mean()) > 0.95
    assert float((limited[white | rest] >= 0.5).float().mean()) < 0.05


@pytest.mark.parametrize(
    "options", [{"variant": "data"}, {"scales": ()}, {"scales": (1.0,)}, {"scales": (3.0, math.inf)}]
)
def test_senseless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=r"must be"):
        ScaleUp(**options)
