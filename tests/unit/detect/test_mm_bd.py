from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.detect.calibration import Calibration
from unbackdoor.detect.mm_bd import MaximumMargin, gamma_fit, margins_of, simulated_surprises, surprise
from unbackdoor.errors import InvalidInputError
from unbackdoor.testing import planted_backdoor
from unbackdoor.types import LabelledImages

QUICK = MaximumMargin(restarts=8, steps=40, learning_rate=0.05)


def gammas(shape: float, *size: int, seed: int = 0) -> Tensor:
    with rng.isolated(rng.generator(seed)):
        return torch.distributions.Gamma(torch.tensor(shape).double(), 1.0).sample(size)


def judge(margins: Tensor, detector: MaximumMargin = QUICK) -> tuple[float, bool | None]:
    found = detector.judge(margins, generator=rng.generator(0))
    return found.score, found.is_backdoored


class OnePixelAClass(nn.Module):
    """Pixel k, times weight k, is the logit of class k: no margin can be larger than the weight."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, images: Tensor) -> Tensor:
        return self.weights * images.flatten(1)


def one_image(pixels: int) -> LabelledImages:
    return LabelledImages(torch.zeros(1, 1, 1, pixels, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))


def test_the_largest_margins_by_hand() -> None:
    weights = [4.0, 5.0, 6.0, 5.5, 30.0]
    detector = MaximumMargin(restarts=4, steps=400, learning_rate=0.01)
    found = detector.score(OnePixelAClass(weights), one_image(5), generator=rng.generator(0))
    # The pixels of other classes are pushed down one at a time, to a step's length of 0.
    assert found.evidence["margins"] == pytest.approx(weights, rel=0.1)
    assert found.target_class == 4
    assert found.is_backdoored
    assert found.p_value is None


def test_margins_and_their_slope() -> None:
    model = OnePixelAClass([1.0, 2.0, 4.0])
    images = torch.tensor([[0.5, 0.25, 0.5], [1.0, 1.0, 0.0]]).view(1, 2, 1, 1, 3).expand(2, 2, 1, 1, 3)
    margins, slope = margins_of(model, images, torch.tensor([2, 0]))
    # Logits 0.5, 0.5, 2 and 1, 2, 0.
    assert margins.tolist() == [[1.5, -2.0], [-1.5, -1.0]]
    assert slope[0, 1].flatten().tolist() == [0, -2, 4]
    assert slope[1, 0].flatten().tolist() == [1, 0, -4]


def test_classes_advance_independently_and_may_settle() -> None:
    model, shape = OnePixelAClass([4.0, 5.0, 6.0, 5.5, 30.0]), one_image(5)
    alone, all_at_once = (
        replace(QUICK, together=n).score(model, shape, generator=rng.generator(0)) for n in (1, 5)
    )
    assert alone.evidence == all_at_once.evidence
    # At the corner of the box nothing changes any more.
    assert all_at_once.evidence["settled_classes"] == 5
    restless = replace(QUICK, steps=2).score(model, shape, generator=rng.generator(0))
    assert restless.evidence["settled_classes"] == 0


def test_the_fit_and_the_p_value_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for shape in (0.7, 4.0, 300.0):
        margins = gammas(shape, 10).sort().values
        fitted, scale = gamma_fit(margins[:-1])
        expected, _, expected_scale = stats.gamma.fit(margins[:-1].numpy(), floc=0)
        assert float(fitted) == pytest.approx(expected, rel=1e-6)
        assert float(scale) == pytest.approx(expected_scale, rel=1e-6)
        for largest in (float(margins[-1]), 2 * float(margins[-1])):
            margins[-1] = largest
            p = 1 - stats.gamma.cdf(largest, expected, scale=expected_scale) ** 10
            if p > 1e-8:
                assert float(surprise(margins)) == pytest.approx(-math.log10(p), rel=1e-5)


def test_the_score_has_no_ceiling_and_no_step() -> None:
    others = gammas(20, 9).expand(400, 9)
    largest = torch.linspace(float(others.max()), 60 * float(others.max()), 400).double()
    scores = surprise(torch.cat([others, largest.unsqueeze(1)], 1))
    steps = scores.diff()
    assert float(scores[-1]) > 350  # beyond the smallest float64
    assert bool((steps > 0).all())
    assert float(steps.diff()[20:].abs().max()) < 0.05 * float(steps.mean())
    assert float(surprise(torch.cat([others[0], others[0].max().view(1)]))) >= 0


def test_units_do_not_matter() -> None:
    margins = gammas(5, 10)
    assert float(surprise(1e4 * margins)) == pytest.approx(float(surprise(margins)))


def test_the_plug_in_p_flags_clean_models_and_the_simulated_one_does_not() -> None:
    draws = gammas(4, 150, 10)
    simulating = replace(QUICK, null="simulated", draws=300)
    plug_in, simulated = (
        sum(bool(judge(margins, detector)[1]) for margins in draws) / len(draws)
        for detector in (QUICK, simulating)
    )
    assert plug_in > 0.15
    assert 0.005 < simulated < 0.12
    found = simulating.judge(draws[0], generator=rng.generator(0))
    assert found.p_value is not None
    assert "simulated" in found.threshold_source
    assert found.score == judge(draws[0])[0]
    scores = simulated_surprises(10, 4.0, 50, generator=rng.generator(0))
    assert torch.equal(scores, simulated_surprises(10, 4.0, 50, generator=rng.generator(0)))


def test_classes_that_no_image_reaches_are_left_out() -> None:
    margins = torch.tensor([math.nan, 8.0, 9.0, -1.0, 10.0, 11.0, 40.0, 0.0])
    found = QUICK.judge(margins, generator=rng.generator(0))
    assert found.score == judge(torch.tensor([8.0, 9.0, 10.0, 11.0, 40.0]))[0]
    assert found.target_class == 6
    assert found.evidence["margins"][0] is None
    few = QUICK.judge(margins[:5], generator=rng.generator(0))
    assert "for 3 of 5 classes" in few.undetermined
    assert (few.target_class, few.p_value) == (None, None)


@pytest.mark.parametrize("null", ["plug_in", "simulated"])
def test_equal_margins_get_no_opinion(null: str) -> None:
    detector = MaximumMargin(null=null)  # type: ignore[arg-type]
    found = detector.judge(torch.tensor([5.0] * 9 + [9.0]), generator=rng.generator(0))
    assert "equal" in found.undetermined
    assert found.is_backdoored is None


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_get_no_opinion(classes: int) -> None:
    model = OnePixelAClass([2.0] * classes)
    found = replace(QUICK, fewest_classes=4).score(model, one_image(classes), generator=rng.generator(0))
    assert math.isnan(found.score)
    assert found.undetermined


def test_a_calibration_replaces_the_paper_threshold() -> None:
    calibration = Calibration(tuple(i / 10 for i in range(19)), "nineteen clean models")
    detector = replace(QUICK, calibration=calibration, null="simulated")
    found = detector.judge(torch.tensor([8.0, 9.0, 10.0, 11.0, 40.0]), generator=rng.generator(0))
    assert found.threshold_source == "nineteen clean models"
    assert (found.p_value, found.is_backdoored) == (0.05, True)


def test_the_planted_target_is_found_without_data() -> None:
    simulating = replace(QUICK, null="simulated")
    for seed in (0, 1):
        infected, twin = (planted_backdoor(target_class=3, infected=i, seed=seed) for i in (True, False))
        blank = LabelledImages(
            torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
        )
        found = simulating.score(infected.model, blank, generator=rng.generator(seed))
        assert (found.is_backdoored, found.target_class) == (True, 3)
        # Images have no influence, only their shape.
        data = infected.clean_data(8, rng.generator(0))
        assert simulating.score(infected.model, data, generator=rng.generator(seed)).score == found.score
        clean = simulating.score(twin.model, blank, generator=rng.generator(seed))
        assert clean.is_backdoored is False
        assert clean.score < found.score


def test_options_are_checked() -> None:
    for options, message in [
        ({"restarts": 0}, "at least 1"),
        ({"fewest_classes": 3}, "fewest_classes at least 4"),
        ({"momentum": 1.0}, "momentum"),
        ({"null": "exact"}, "plug_in"),
        ({"draws": 5}, "draws"),
        ({"alpha": 0.0}, "alpha"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            replace(QUICK, **options)  # type: ignore[arg-type]
