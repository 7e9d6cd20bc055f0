"""Fractions that never come without their counts and intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Z_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Rate:
    """A fraction with its counts.

    Args:
        successes: Number of successes, in [0, n].
        n: Number of trials, at least 0.
    """

    successes: int
    n: int

    @staticmethod
    def of(hits: Tensor) -> Rate:
        """Count the true entries of a bool tensor."""
        return Rate(int(hits.sum()), hits.numel())

    @property
    def value(self) -> float:
        """The fraction; NaN without trials."""
        return self.successes / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson score interval at 95 % (Wilson, JASA 1927); (0, 1) without trials."""
        if not self.n:
            return (0.0, 1.0)
        p, z2 = self.value, Z_95**2
        centre = (p + z2 / (2 * self.n)) / (1 + z2 / self.n)
        half = Z_95 / (1 + z2 / self.n) * math.sqrt(p * (1 - p) / self.n + z2 / (4 * self.n**2))
        # Rounding must not put the fraction itself outside.
        return (min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)))

    def describe(self) -> dict[str, Any]:
        """Return JSON values."""
        low, high = self.interval
        return {
            "value": None if math.isnan(self.value) else self.value,
            "low": low,
            "high": high,
            "successes": self.successes,
            "n": self.n,
        }
