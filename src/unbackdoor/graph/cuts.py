"""Where the poisoned nodes end in a ranking, for which class, and whether that could be chance.

The labels of a ranking from most to least suspicious are all that is read. Poisoned nodes share the target's
label, so a backdoor shows as a run of one class at the top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Cut = Literal["consecutive", "likelihood"]


@dataclass(frozen=True)
class Top:
    """The top of a ranking.

    Args:
        target_class: The class that stands out.
        length: Places above the cut.
        strength: What permuted rankings are compared by.
        p_value: Chance of such a strength if labels had nothing to do with the ranking.
    """

    target_class: int
    length: int
    strength: float
    p_value: float


def find_top(
    labels: Tensor,
    classes: int,
    cut: Cut,
    *,
    patience: int,
    permutations: int,
    generator: torch.Generator,
) -> Top:
    """Find the class that stands out at the top of a ranking, and where its top ends.

    Args:
        labels: int64 ``(R,)`` in [0, classes), from most to least suspicious.
        classes: Number of classes.
        cut: ``consecutive`` ends at the first ``patience`` places in a row of other classes (RIGBD);
            ``likelihood`` where two constant shares of the class, above and below, explain the ranking best.
        patience: For ``consecutive``.
        permutations: Random orders that the strength is compared with.
        generator: Draws them; on the CPU.
    """
    lengths, strengths = _tops(labels.unsqueeze(0), classes, cut, patience)
    best = int(strengths[0].argmax())
    strength = float(strengths[0, best])
    orders = torch.rand(permutations, len(labels), generator=generator).argsort(1)
    _, chance = _tops(labels[orders], classes, cut, patience)
    as_strong = int((chance.max(1).values >= strength - 1e-9).sum())
    return Top(best, int(lengths[0, best]), strength, (1 + as_strong) / (1 + permutations))


def _tops(rankings: Tensor, classes: int, cut: Cut, patience: int) -> tuple[Tensor, Tensor]:
    """Return the lengths and the strengths, each ``(B, classes)``, of rankings ``(B, R)``."""
    lengths, strengths = [], []
    for label in range(classes):
        hits = rankings == label
        length, strength = _consecutive(hits, patience) if cut == "consecutive" else _likelihood(hits)
        lengths.append(length)
        strengths.append(strength)
    return torch.stack(lengths, 1), torch.stack(strengths, 1)


def _consecutive(hits: Tensor, patience: int) -> tuple[Tensor, Tensor]:
    """End at ``patience`` misses in a row; the strength is the number of hits above."""
    size = hits.shape[1]
    if size < patience:
        ends = torch.full((len(hits),), size)
    else:
        missed = (~hits).unfold(1, patience, 1).all(2)
        ends = torch.where(missed.any(1), missed.long().argmax(1), size)
    above = torch.arange(size) < ends.unsqueeze(1)
    # A miss just above the cut belongs to the rest.
    last = torch.where(hits & above, torch.arange(1, size + 1), 0).amax(1)
    return last, (hits & above).sum(1).double()


def _likelihood(hits: Tensor) -> tuple[Tensor, Tensor]:
    """End where the log-likelihood of two shares exceeds that of one the most; only falls count."""
    size = hits.shape[1]
    above = hits.cumsum(1).double()
    total, length = above[:, -1:], torch.arange(1, size + 1, dtype=torch.float64)
    gain = _log_likelihood(above, length) + _log_likelihood(total - above, size - length)
    gain = gain - _log_likelihood(total, torch.tensor(float(size), dtype=torch.float64))
    falls = above * (size - length) > (total - above) * length
    gain = torch.where(falls, gain, 0.0)
    strength, place = gain.max(1)
    return torch.where(strength > 0, place + 1, 0), strength


def _log_likelihood(hits: Tensor, count: Tensor) -> Tensor:
    """Return the largest log-likelihood of ``hits`` in ``count`` independent trials of one chance."""
    misses, count = count - hits, count.clamp(min=1)
    total: Tensor = torch.special.xlogy(hits, hits / count) + torch.special.xlogy(misses, misses / count)
    return total
