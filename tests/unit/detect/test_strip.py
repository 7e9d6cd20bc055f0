from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.compute import EVALUATION_BATCH
from unbackdoor.detect.strip import STRIP, entropy_bits
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.testing import planted_backdoor
from unbackdoor.types import LabelledImages, as_float


class Brightness(nn.Module):
    """Logits ``(log 3 * mean pixel, 0)``; remembers how many images each pass held."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        mean = images.flatten(1).mean(1)
        return torch.stack([math.log(3) * mean, torch.zeros_like(mean)], 1)


def flat(*levels: float) -> LabelledImages:
    images = torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    return LabelledImages(images, torch.zeros(len(levels), dtype=torch.int64))


def entropy(p: float) -> float:
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def test_entropies_are_in_bits() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(3), 0.0, -1e9, -1e9], [1e9, 0.0, 0.0, 0.0]])
    assert entropy_bits(logits).tolist() == pytest.approx([2.0, entropy(0.75), 0.0])


@pytest.mark.parametrize(
    ("detector", "levels"),
    [
        # What 0.75 becomes with 0.5 and 0, and what 0 becomes.
        (STRIP(sample_weight=0.5, overlay_weight=0.5), (0.625, 0.375, 0.25, 0.0)),
        (STRIP(), (1.25, 0.75, 0.5, 0.0)),
        (STRIP(clip=True), (1.0, 0.75, 0.5, 0.0)),
        (STRIP(overlay_weight=0.5, clip=True), (1.0, 0.75, 0.25, 0.0)),
    ],
)
def test_the_score_is_minus_the_mean_entropy_of_the_blends_by_hand(
    detector: STRIP, levels: tuple[float, ...]
) -> None:
    clean, samples = flat(0.5, 0.0), flat(0.75, 0.0).images
    scores = detector.score(Brightness(), samples, clean, generator=rng.generator(0))
    # Level v has the probability 3^v / (3^v + 1).
    one, two, three, four = (entropy(3**v / (3**v + 1)) for v in levels)
    assert scores.tolist() == pytest.approx([-(one + two) / 2, -(three + four) / 2])


def test_passes_are_full_batches_whatever_the_number_of_samples() -> None:
    model, clean = Brightness(), flat(*(i / 100 for i in range(100)))
    alone = STRIP().score(model, flat(0.3).images, clean, generator=rng.generator(0))
    assert max(model.batches) == 100
    many = STRIP().score(model, flat(*(i / 40 for i in range(41))).images, clean, generator=rng.generator(0))
    assert max(model.batches) == EVALUATION_BATCH
    # Same draw, so a sample's score does not depend on its company.
    assert float(many[12]) == pytest.approx(float(alone), abs=1e-6)


def test_n_clean_images_are_drawn() -> None:
    model, clean = Brightness(), flat(*(i / 100 for i in range(100)))
    scores = [
        float(STRIP(n=3).score(model, flat(0.0).images, clean, generator=rng.generator(seed)))
        for seed in range(3)
    ]
    assert model.batches.count(3) == 3
    assert len(set(scores)) == 3


def test_triggered_samples_of_the_planted_network_stand_out() -> None:
    planted = planted_backdoor(target_class=3)
    clean, test = (planted.clean_data(n, rng.generator(n)) for n in (100, 80))
    samples = torch.cat([as_float(test.images), planted.trigger(as_float(test.images))])
    scores = STRIP(n=20).score(planted.model, samples, clean, generator=rng.generator(0))
    assert float((scores[80:].unsqueeze(1) > scores[:80]).float().mean()) > 0.95
    twin = planted_backdoor(target_class=3, infected=False).model
    scores = STRIP(n=20).score(twin, samples, clean, generator=rng.generator(0))
    assert float((scores[80:].unsqueeze(1) > scores[:80]).float().mean()) < 0.7


def test_a_sum_that_saturates_makes_clean_samples_look_certain() -> None:
    # Squares on mid-grey: every sum that is clipped is white.
    planted = planted_backdoor(target_class=3)
    clean, test = (planted.clean_data(n, rng.generator(n)) for n in (20, 40))
    mean, clipped = (
        detector.score(planted.model, test.images, clean, generator=rng.generator(0))
        for detector in (STRIP(sample_weight=0.5, overlay_weight=0.5), STRIP(clip=True))
    )
    assert float(mean.max()) < -1 < -0.02 < float(clipped.min())


def test_the_default_is_the_authors_blend() -> None:
    assert STRIP() == STRIP.paper() == STRIP(sample_weight=1.0, overlay_weight=1.0, clip=False)


@pytest.mark.parametrize(
    "options", [{"n": 0}, {"sample_weight": 0.0}, {"overlay_weight": -1.0}, {"overlay_weight": math.inf}]
)
def test_senseless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="STRIP needs"):
        STRIP(**options)


def test_a_model_that_gives_no_numbers_is_refused() -> None:
    broken = nn.Sequential(nn.Flatten(), nn.Linear(12, 2), nn.Threshold(math.inf, math.nan)).eval()
    clean = LabelledImages(torch.rand(6, 3, 2, 2), torch.arange(6) % 2)
    with pytest.raises(UnsupportedModelError, match="no numbers for 5 of 5 samples"):
        STRIP(n=2).score(broken, clean.images[:5], clean, generator=rng.generator(0))
