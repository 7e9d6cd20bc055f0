"""How often do the fixed rules of detectors flag a clean model, if its classes differ by chance alone?

    python benchmarks/null_rates.py

Simulated, no network is involved: the statistics of a clean model's classes are drawn independently from
one distribution, and the rule is applied to them. Real classes are neither independent nor of one
distribution, so that these are no false-positive rates of the detectors; they show what a rule can promise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from unbackdoor import rng
from unbackdoor.detect.head_weights import HeadWeights
from unbackdoor.detect.mm_bd import simulated_surprises, surprise
from unbackdoor.detect.nc import Statistic, smallness
from unbackdoor.rates import Rate

SPREAD = 0.5
"""Standard deviation of the logarithm of log-normal statistics."""

SHAPE = 4.0
"""Of Gamma-distributed margins: a coefficient of variation of 0.5."""

FEATURES = 128
"""That simulated heads read."""

ALPHA = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=2000, help="clean models a line")
    options = parser.parse_args()
    for name, flagged in rules().items():
        rate = Rate(sum(flagged(rng.generator(i)) for i in range(options.draws)), options.draws)
        low, high = rate.interval
        print(f"{name}: {rate.value:.1%} [{low:.1%}, {high:.1%}] of {rate.n}", flush=True)


def rules() -> dict[str, Callable[[torch.Generator], bool]]:
    """Return the rules by name; each draws a clean model and says whether it is flagged."""

    def trigger_size(
        draw: Callable[[torch.Generator], Tensor], statistic: Statistic
    ) -> Callable[[torch.Generator], bool]:
        return lambda generator: smallness(draw(generator).tolist(), statistic) > 2.0

    def head(classes: int) -> Callable[[torch.Generator], bool]:
        return lambda generator: bool(
            HeadWeights()
            .judge(
                torch.randn(classes, FEATURES, generator=generator), torch.randn(classes, generator=generator)
            )
            .is_backdoored
        )

    limit = -torch.tensor(ALPHA).log10()
    return {
        "nc, index > 2, 10 Gaussian norms": trigger_size(
            lambda g: 100 + torch.randn(10, generator=g), "index"
        ),
        "nc, index > 2, 43 Gaussian norms": trigger_size(
            lambda g: 100 + torch.randn(43, generator=g), "index"
        ),
        "nc, index > 2, 10 log-normal norms": trigger_size(lambda g: log_normal(10, g), "index"),
        "nc, log_index > 2, 10 log-normal norms": trigger_size(lambda g: log_normal(10, g), "log_index"),
        "mm_bd, p <= 0.05, 10 Gamma margins": lambda g: bool(
            simulated_surprises(10, SHAPE, 1, generator=g) >= limit
        ),
        "mm_bd, p <= 0.05, 10 log-normal margins": lambda g: bool(
            surprise(log_normal(10, g).double()) >= limit
        ),
        "head_weights, 6, 10 classes": head(10),
        "head_weights, 6, 5 classes": head(5),
    }


def log_normal(count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` log-normal values around 1."""
    return (SPREAD * torch.randn(count, generator=generator)).exp()


if __name__ == "__main__":
    main()
