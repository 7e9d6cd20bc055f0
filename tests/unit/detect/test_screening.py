from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.detect.screening import (
    Part,
    Screening,
    at_most,
    conformal,
    more_than_chance,
    p_values,
    together,
)
from unbackdoor.detect.strip import STRIP
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.testing import planted_backdoor
from unbackdoor.types import LabelledImages, Progress, as_float, silent

PLANTED = planted_backdoor(target_class=3)
CLEAN, TEST = (PLANTED.clean_data(n, rng.generator(n)) for n in (200, 80))


class Brightness:
    """Scores a sample by its mean pixel, and remembers which clean images it was shown."""

    name = "brightness"

    def __init__(self) -> None:
        self.shown = 0

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
        self.shown = len(clean)
        return as_float(samples).flatten(1).mean(1)


class Refuses(Brightness):
    name = "refuses"

    def score(self, *_: object, **__: object) -> Tensor:
        raise UnsupportedModelError("it cannot be read.")


def test_conformal_p_values_by_hand() -> None:
    clean = torch.tensor([1.0, 3.0, 2.0, 2.0], dtype=torch.float64)
    scores = torch.tensor([4.0, 3.0, 2.0, 0.0], dtype=torch.float64)
    # Equal scores count against the sample.
    assert conformal(scores, clean).tolist() == [1 / 5, 2 / 5, 4 / 5, 1.0]


def test_several_detectors_count_as_their_number() -> None:
    found = {"a": torch.tensor([0.01, 0.7]), "b": torch.tensor([0.5, 0.9])}
    assert together(found).tolist() == pytest.approx([0.02, 1.0])


def test_the_chance_of_false_alarms_is_a_beta_binomial_tail_by_hand() -> None:
    # Of M = 3 kept images and a rate of a half, k = 2: with two samples P(X = x) is C(2, x) B(x + 2, 4 - x) /
    # B(2, 2), that is 0.3, 0.4 and 0.3.
    def chance(*p: float) -> float:
        return more_than_chance({"one": torch.tensor(p, dtype=torch.float64)}, 3, 0.5)

    assert chance(1.0, 0.75) == 1.0
    assert chance(0.5, 0.75) == pytest.approx(0.7)
    assert chance(0.25, 0.5) == pytest.approx(0.3)


def test_of_several_detectors_the_best_counts_times_their_number() -> None:
    few, many = torch.tensor([0.01, 0.9, 0.9]), torch.tensor([0.01, 0.01, 0.01])
    alone = more_than_chance({"a": many.double()}, 99, 0.01)
    both = more_than_chance({"a": many.double(), "b": few.double()}, 99, 0.02)
    assert both == pytest.approx(2 * alone)
    assert more_than_chance({"a": torch.tensor([0.01], dtype=torch.float64)}, 99, 0.01) == pytest.approx(0.01)


def test_many_clean_samples_are_seldom_too_many() -> None:
    # All are compared with the same kept images: in some draws many samples look suspicious at once.
    called = 0
    draws = 200
    for seed in range(draws):
        scores = torch.rand(2, 2000 + 200, generator=rng.generator(seed), dtype=torch.float64)
        found = {str(k): conformal(row[:2000], row[2000:]) for k, row in enumerate(scores)}
        called += more_than_chance(found, 200, 0.05) <= 0.05
    assert called / draws <= 0.08


def test_detectors_do_not_see_what_samples_are_compared_with() -> None:
    detector = Brightness()
    clean = LabelledImages(
        torch.linspace(0, 1, 40).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), torch.arange(40) % 4
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    samples = torch.ones(2, 3, 2, 2) * torch.tensor([2.0, -1.0]).view(-1, 1, 1, 1).clamp(0, 1)
    found = p_values([detector], model, samples, clean, kept=0.75, generator=rng.generator(0))
    assert detector.shown == 10
    assert found["brightness"][1] == 1
    assert 1 / 31 <= float(found["brightness"][0]) <= 2 / 31


def test_false_alarms_are_no_more_than_their_rate() -> None:
    # The score has nothing to do with a trigger: over draws of clean images p-values are uniform.
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    found: list[Tensor] = []
    for seed in range(30):
        images = torch.rand(300, 3, 2, 2, generator=rng.generator(seed))
        clean = LabelledImages(images[:100], torch.arange(100) % 4)
        found += p_values([Brightness()], model, images[100:], clean, generator=rng.generator(0)).values()
    for rate in (0.1, 0.2, 0.5):
        assert float((torch.cat(found) <= rate).double().mean()) == pytest.approx(rate, abs=0.03)


def test_two_detectors_together_keep_the_rate() -> None:
    flagged = []
    for seed in range(30):
        scores = torch.rand(2, 300 + 100, generator=rng.generator(seed), dtype=torch.float64)
        p = together({str(k): conformal(row[:300], row[300:]) for k, row in enumerate(scores)})
        flagged.append(float(at_most(p, 0.1).double().mean()))
    assert sum(flagged) / len(flagged) <= 0.11


@pytest.mark.parametrize(
    "scores", [torch.zeros(3), torch.zeros(104, 1), torch.full((104,), math.nan)], ids=["few", "shape", "nan"]
)
def test_scores_that_are_none_are_refused(scores: Tensor) -> None:
    class Wrong(Brightness):
        name = "wrong"

        def score(self, *_: object, **__: object) -> Tensor:
            return scores

    with pytest.raises(InvalidInputError, match="'wrong' must give one score a sample"):
        p_values([Wrong()], PLANTED.model, TEST.images, CLEAN, kept=0.12, generator=rng.generator(0))


def test_triggered_samples_of_the_planted_network_are_told_at_a_low_rate() -> None:
    samples = torch.cat([as_float(TEST.images), PLANTED.trigger(as_float(TEST.images))])
    # On this network the mean of two images tells more than their sum.
    screening = Screening(("strip",), STRIP(n=10, sample_weight=0.5, overlay_weight=0.5, clip=True))
    scores = screening.score(PLANTED.model, samples, CLEAN, generator=rng.generator(0))
    flagged = scores >= -math.log10(0.02)
    eligible = torch.cat([TEST.labels, TEST.labels]) != 3
    assert float(flagged[80:][eligible[80:]].float().mean()) > 0.9
    assert float(flagged[:80].float().mean()) < 0.1


def test_a_detector_that_cannot_read_the_network_is_left_out() -> None:
    # IBD-PSC refuses this network: its clean answers survive.
    ways: tuple[tuple[Part, ...], ...] = (("strip", "ibd_psc"), ("strip",))
    both, alone = (
        Screening(asked).score(PLANTED.model, TEST.images, CLEAN, generator=rng.generator(0))
        for asked in ways
    )
    assert torch.equal(both, alone)
    with pytest.raises(UnsupportedModelError, match="cannot be read"):
        p_values([Refuses(), Refuses()], PLANTED.model, TEST.images, CLEAN, generator=rng.generator(0))


def test_the_others_draw_the_same_whether_one_refuses_or_not() -> None:
    def of_strip(*before: Brightness) -> Tensor:
        found = p_values([*before, STRIP(n=3)], PLANTED.model, TEST.images, CLEAN, generator=rng.generator(0))
        return found["strip"]

    assert torch.equal(of_strip(Refuses()), of_strip(Brightness()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kept": 0.0}, "kept must lie in"),
        ({"kept": 1.0}, "kept must lie in"),
        ({"detectors": ()}, "at least one of strip, ibd_psc, rnp_sample"),
        ({"detectors": ("strip", "ac")}, "at least one of strip, ibd_psc, rnp_sample"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Screening(**options)
