"""Guarantees that hold on average over draws."""

from __future__ import annotations

import math

import pytest
import torch

from unbackdoor import rng
from unbackdoor.detect.calibration import Calibration, CalibrationSet, Kind, ScoredModel, options_of
from unbackdoor.detect.joint import combine
from unbackdoor.detect.scan import Scan
from unbackdoor.filters.saliency import spearman


@pytest.mark.statistical
@pytest.mark.parametrize(("models", "alpha"), [(19, 0.05), (20, 0.05), (39, 0.1), (9, 0.3)])
def test_exchangeable_scores_are_flagged_at_most_alpha(models: int, alpha: float) -> None:
    # Of 4000 independent trials with flagging probability <= alpha, more than alpha n + 4 sigma happen with
    # probability < 1e-4 (normal tail 3.2e-5; the binomial's right tail at these n p is within a factor 2).
    trials = 4000
    scores = torch.randn(trials, models + 1, generator=rng.generator(models), dtype=torch.float64)
    by_p = by_threshold = 0
    for row in scores.tolist():
        calibration = Calibration(tuple(row[1:]), "simulated")
        by_p += calibration.p_value(row[0]) <= alpha
        by_threshold += row[0] > calibration.threshold(alpha)
    most = alpha * trials + 4 * math.sqrt(alpha * (1 - alpha) * trials)
    assert by_p <= most
    assert by_threshold <= most
    assert by_threshold >= 0.5 * by_p  # the threshold is no empty promise


@pytest.mark.statistical
@pytest.mark.parametrize("dependence", [0.0, 0.9])
def test_joint_scores_of_clean_models_are_flagged_at_most_alpha(dependence: float) -> None:
    # As above. Three detectors, one of them heavy-tailed, and few models: the guarantee needs no more.
    models, alpha, trials = 19, 0.05, 1500
    generator = rng.generator(int(10 * dependence))
    common = torch.randn(trials, models + 1, 1, generator=generator, dtype=torch.float64)
    own = torch.randn(trials, models + 1, 3, generator=generator, dtype=torch.float64)
    scores = dependence * common + (1 - dependence**2) ** 0.5 * own
    scores[..., 2] = scores[..., 2].exp() ** 2
    flagged = 0
    for trial in scores.tolist():
        suspect, *clean = [dict(zip("abc", row, strict=True)) for row in trial]
        flagged += combine(clean, suspect, alpha).p_value <= alpha
    assert flagged <= alpha * trials + 4 * math.sqrt(alpha * (1 - alpha) * trials)
    assert flagged >= 0.4 * alpha * trials  # nor is it an empty promise


@pytest.mark.statistical
@pytest.mark.parametrize("where", ["high", "anywhere"])
def test_a_search_that_abstains_does_not_raise_the_false_positive_rate(where: str) -> None:
    # As above. One model in five has no trigger score, at worst those whose other score is the highest.
    models, alpha, trials = 39, 0.2, 600
    scan = Scan()
    options = {name: options_of(scan.detectors()[name]) for name in scan.deciding}
    kind = Kind(architecture="n", parameters=1, num_classes=4, image_shape=(3, 4, 4))
    drawn = torch.randn(trials, models + 1, 3, generator=rng.generator(3), dtype=torch.float64)
    flagged = 0
    for trial in drawn.tolist():
        suspect, *clean = [
            {
                "collapse": collapse,
                "trigger_search": None if (collapse if where == "high" else other) > 0.8416 else search,
            }
            for collapse, search, other in trial
        ]
        calibration = CalibrationSet(
            description="simulated",
            kind=kind,
            images=1,
            options=options,
            models=tuple(ScoredModel(name="m", scores=scores) for scores in clean),
        )
        joint = scan.joint(suspect, calibration)
        assert joint is not None
        flagged += joint.p_value <= alpha + 1e-12
    assert flagged <= alpha * trials + 4 * math.sqrt(alpha * (1 - alpha) * trials)
    assert flagged >= 0.4 * alpha * trials


@pytest.mark.statistical
def test_spearman_of_independent_values_is_centred_with_the_textbook_spread() -> None:
    # Under independence the mean of r is 0 and its variance 1 / (n - 1); 4 standard errors: p < 1e-4.
    n, trials = 50, 2000
    values = torch.randn(2, trials, n, generator=rng.generator(0))
    found = torch.tensor([spearman(a, b) for a, b in zip(*values, strict=True)], dtype=torch.float64)
    assert abs(float(found.mean())) < 4 / math.sqrt((n - 1) * trials)
    # The variance of a sample variance of a near-normal variable is 2 sigma^4 / trials.
    assert abs(float(found.var()) * (n - 1) - 1) < 4 * math.sqrt(2 / trials)
