from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.detect.screening import Part, Screening, conformal, more_than_chance, p_values, together
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


@pytest.mark.parametrize(("flagged", "of", "rate"), [(0, 5, 0.1), (1, 1, 0.01), (2, 3, 0.2), (3, 3, 0.5)])
def test_the_chance_of_false_alarms_is_a_binomial_tail(flagged: int, of: int, rate: float) -> None:
    tail = sum(math.comb(of, k) * rate**k * (1 - rate) ** (of - k) for k in range(flagged, of + 1))
    assert more_than_chance(flagged, of, rate) == pytest.approx(tail)


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
