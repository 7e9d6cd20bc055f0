"""One p-value from several detectors' scores, whatever depends on whatever.

Source: the single-step max-T procedure of Westfall and Young ("Resampling-Based Multiple Testing", 1993,
section 2.3), with clean models in the place of resamples. The suspect and the n clean models are pooled;
each detector's scores are centred and scaled within the pool; a model's statistic T is the largest of its
scaled scores. The p-value of the suspect is (1 + #{clean T >= T of the suspect}) / (n + 1).

If the suspect is clean and exchangeable with the others, so are all n + 1 values of T, since the pool is
treated symmetrically: flagging p <= alpha is wrong with probability at most alpha, for any number of
detectors and any dependence between them. Bonferroni's rule would need m times as many models for m
detectors.

A detector that abstains on a model has given it the lowest score, minus infinity, be it the suspect or a
clean model. So the same detectors and the same n models are compared whatever the suspect's scores are;
choosing either by who abstained would void the guarantee.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unbackdoor.detect.calibration import flags_allowed
from unbackdoor.errors import InvalidInputError

_MAD_TO_SIGMA = 1.4826
_MEAN_DEVIATION_TO_SIGMA = 1.2533


@dataclass(frozen=True)
class Joint:
    """What several scores together say about a model.

    Args:
        p_value: Of all scores together, at least 1 / (n + 1).
        p_values: Detector to its p-value, adjusted for the others; the smallest is ``p_value``.
        scaled: Detector to the distance of its score from the median, in robust standard deviations.
        thresholds: Detector to the score at and above which its adjusted p-value is at most alpha; infinite
            where n models cannot guarantee alpha.
        n: Clean models.
    """

    p_value: float
    p_values: Mapping[str, float]
    scaled: Mapping[str, float]
    thresholds: Mapping[str, float]
    n: int

    @property
    def smallest_p(self) -> float:
        """The smallest p-value that so many models permit."""
        return 1 / (self.n + 1)


def combine(clean: Sequence[Mapping[str, float]], suspect: Mapping[str, float], alpha: float) -> Joint:
    """Compare a suspect's scores with those of clean models.

    Args:
        clean: One mapping of detector to score a model, each with at least the suspect's detectors.
        suspect: Detector to score, at least one. Scores are finite, or minus infinity for abstentions.
        alpha: False-positive rate, in (0, 1), for the thresholds.

    Raises:
        InvalidInputError: If there are no scores, or one is missing, NaN or plus infinity.
    """
    missing = [name for row in clean for name in suspect if name not in row]
    values = [score for row in (suspect, *clean) for name, score in row.items() if name in suspect]
    if not suspect or missing or any(math.isnan(score) or score == math.inf for score in values):
        raise InvalidInputError(
            f"scores can only be combined if there are some, finite or abstained, of the same detectors; got "
            f"{dict(suspect)} and {missing[0] + ' missing' if missing else values}."
        )
    pools = {name: [suspect[name], *(row[name] for row in clean)] for name in suspect}
    frames = {name: _frame(pool) for name, pool in pools.items()}
    scaled = {name: [(s - frames[name][0]) / frames[name][1] for s in pool] for name, pool in pools.items()}
    largest = sorted(
        (max(column[1 + i] for column in scaled.values()) for i in range(len(clean))), reverse=True
    )
    p_values = {
        name: (1 + sum(other >= column[0] for other in largest)) / (len(clean) + 1)
        for name, column in scaled.items()
    }
    spared = flags_allowed(len(clean), alpha)
    critical = largest[spared] if spared >= 0 else math.inf
    return Joint(
        p_value=min(p_values.values()),
        p_values=p_values,
        scaled={name: column[0] for name, column in scaled.items()},
        thresholds={
            name: _threshold(*frames[name], critical, suspect[name], flagged=p_values[name] <= alpha + 1e-12)
            for name in suspect
        },
        n=len(clean),
    )


def _frame(pool: Sequence[float]) -> tuple[float, float]:
    """Return the median and robust standard deviation of the finite scores; 1 where all are equal."""
    known = [score for score in pool if score > -math.inf] or [0.0]
    centre = statistics.median(known)
    deviations = [abs(score - centre) for score in known]
    scale = _MAD_TO_SIGMA * statistics.median(deviations)
    # Scores that are equal for more than half of the models have no median deviation.
    scale = scale or _MEAN_DEVIATION_TO_SIGMA * statistics.fmean(deviations)
    return centre, scale or 1.0


def _threshold(centre: float, scale: float, critical: float, score: float, *, flagged: bool) -> float:
    threshold = math.nextafter(centre + scale * critical, math.inf)
    # Rounding must not contradict the p-value where scores tie.
    return min(threshold, score) if flagged else max(threshold, math.nextafter(score, math.inf))
