"""Two clusters in a cloud of points, and how well they are apart."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 1024
"""Rows of the distance matrix that are held at once."""

_ROUNDING = 1e-6
"""Relative size of differences that float32 features of equal images may have."""


def is_constant(rows: Tensor) -> bool:
    """Say whether all that differs between the rows, float ``(N, D)``, is rounding; True for no rows."""
    if not rows.numel():
        return True
    return float((rows - rows.mean(0)).abs().max()) <= _ROUNDING * float(rows.abs().max())


def two_means(
    points: Tensor, *, generator: torch.Generator, restarts: int = 10, iterations: int = 100
) -> Tensor:
    """Split points by 2-means (k-means++ starts, Lloyd's iterations) and return the smaller cluster.

    Args:
        points: float ``(N, D)``.
        generator: Draws the starts; on the CPU.
        restarts: Starts; the split with the smallest sum of squared distances is returned. All run at once.
        iterations: Most iterations of each start.

    Returns:
        bool ``(N,)``, True in the smaller cluster; of two equal ones, in that without the first point. All
        False if the points cannot be split.
    """
    if is_constant(points):
        return torch.zeros(len(points), dtype=torch.bool)
    rows = points - points.mean(0)
    centres = _starts(rows, restarts, generator)
    second = _nearest(rows, centres)
    for _ in range(iterations):
        centres = _centres(rows, second, centres)
        before, second = second, _nearest(rows, centres)
        if torch.equal(before, second):
            break
    centres = _centres(rows, second, centres)
    # Sum of squares within: what the centres leave of the total, so the largest sum between is best.
    counts = torch.stack([(~second).sum(0), second.sum(0)], dim=1)
    best = int((counts * centres.square().sum(2)).sum(1).argmax())
    chosen = second[:, best]
    in_second = int(chosen.sum())
    is_smaller = 2 * in_second < len(points) or (2 * in_second == len(points) and not bool(chosen[0]))
    return chosen if is_smaller else ~chosen


def sides(points: Tensor, members: Tensor) -> Tensor:
    """Return by how much each point is nearer to the members' centre than to that of the others.

    The value is ``(b - a) / max(a, b)`` with a the distance to the members' centre and b to the others': the
    silhouette with distances to centres.

    Args:
        points: float ``(N, D)``.
        members: bool ``(N,)``.

    Returns:
        ``(N,)`` in [-1, 1], positive on the members' side; 0 throughout if one side is empty.
    """
    if not bool(members.any()) or bool(members.all()):
        return points.new_zeros(len(points))
    own, other = (torch.linalg.vector_norm(points - points[m].mean(0), dim=1) for m in (members, ~members))
    nearer: Tensor = (other - own) / torch.maximum(own, other).clamp_min(1e-300)
    return nearer


def silhouette(points: Tensor, members: Tensor) -> float:
    """Return the mean silhouette of two clusters, in [-1, 1].

    Source: Rousseeuw, J. Comput. Appl. Math. 20, 1987. For each point, with a the mean distance to the
    others of its cluster and b to those of the other cluster, ``(b - a) / max(a, b)``; 0 for a point that is
    alone in its cluster.

    Args:
        points: float ``(N, D)``.
        members: bool ``(N,)``.

    Returns:
        0 if one side is empty.
    """
    if not bool(members.any()) or bool(members.all()):
        return 0.0
    indicator = torch.stack([~members, members], dim=1).to(points.dtype)
    # The faster way of cdist would leave a point a distance to itself.
    exact = "donot_use_mm_for_euclid_dist"
    sums = torch.cat(
        [torch.cdist(part, points, compute_mode=exact) @ indicator for part in points.split(_ROWS)]
    )
    counts = indicator.sum(0)
    own_count = counts[members.long()]
    own = sums.gather(1, members.long().unsqueeze(1)).squeeze(1) / (own_count - 1).clamp_min(1)
    other = (sums / counts).gather(1, (~members).long().unsqueeze(1)).squeeze(1)
    values = (other - own) / torch.maximum(own, other).clamp_min(1e-300)
    return float(torch.where(own_count > 1, values, 0.0).mean())


def _starts(rows: Tensor, restarts: int, generator: torch.Generator) -> Tensor:
    """Return k-means++ centres ``(R, 2, D)``: a random point, and one drawn by its square distance to it."""
    first = rows[torch.randint(len(rows), (restarts,), generator=generator)]
    distances = torch.cdist(first, rows)
    # Relative to the largest, which is not 0, so that the squares cannot vanish either.
    weights = (distances / distances.amax(1, keepdim=True)).square()
    second = rows[torch.multinomial(weights, 1, generator=generator).squeeze(1)]
    return torch.stack([first, second], dim=1)


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """Return bool ``(N, R)``: which points are nearer to the second centre."""
    axis = centres[:, 1] - centres[:, 0]
    middle = centres.mean(1)
    return rows @ axis.T > (axis * middle).sum(1)


def _centres(rows: Tensor, second: Tensor, previous: Tensor) -> Tensor:
    """Return the means of both sides ``(R, 2, D)``; an empty side keeps its centre."""
    indicator = torch.stack([~second, second], dim=0).to(rows.dtype)
    counts = indicator.sum(1).unsqueeze(2)
    means = indicator.transpose(1, 2) @ rows / counts.clamp_min(1)
    return torch.where(counts > 0, means, previous.transpose(0, 1)).transpose(0, 1)
