"""CLC and BLC of every filter: Fig. 1 of the MNP paper and what it is said to show, in numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from unbackdoor.report.layouts.common import NAN, mean, number, share_done, text, title_of
from unbackdoor.report.run import Answer, Run
from unbackdoor.report.tables import Column, Entry, Table

DEPTHS = ("shallow", "deep")


@dataclass(frozen=True)
class Cloud:
    """The filters of some layers of a model.

    Args:
        model: Its name.
        depth: ``shallow`` or ``deep``.
        clc: Clean loss changes, nats.
        blc: Backdoor loss changes, nats.
        norm: l_2 norms of the filters' weights.
    """

    model: str
    depth: str
    clc: tuple[float, ...]
    blc: tuple[float, ...]
    norm: tuple[float, ...]


def clouds(answers: Iterable[Answer]) -> list[Cloud]:
    """Return the shallow and the deep filters of each model: the first and the last quarter of its layers.

    A filter without which a loss is no finite number is left out.
    """
    found = []
    for answer in answers:
        if answer.task != "ablate" or not answer.ok:
            continue
        layers = list((answer.value("filters") or {}).values())
        quarter = max(1, len(layers) // 4)
        for depth, chosen in zip(DEPTHS, (layers[:quarter], layers[-quarter:]), strict=True):
            filters = [each for each in _filters(chosen) if None not in each]
            if filters:
                found.append(Cloud(answer.model, depth, *zip(*filters, strict=True)))
    return found


def _filters(layers: Sequence[dict[str, list[float | None]]]) -> Iterator[tuple[Any, ...]]:
    """Yield CLC, BLC and norm of each filter; None for a number that was not finite."""
    for layer in layers:
        yield from zip(layer["clc"], layer.get("blc", []), layer["magnitude"], strict="blc" in layer)


def filter_table(run: Run) -> Table:
    """Return the shares of the kinds of filters, and how norm and saliency go together.

    A filter is backdoored if removing it raises the backdoor loss and not the clean loss, clean the other way
    round, hybrid if it raises both, redundant if neither: the paper's section 3.3 with tau = epsilon = 0.
    """
    rows: list[tuple[Entry, ...]] = []
    for cloud in clouds(run.answers):
        kinds = [(c > 0, b > 0) for c, b in zip(cloud.clc, cloud.blc, strict=True)]
        shares = [
            100.0 * kinds.count(kind) / len(kinds)
            for kind in ((False, True), (True, False), (True, True), (False, False))
        ]
        norms = [
            mean(n for n, kind in zip(cloud.norm, kinds, strict=True) if kind == wanted)
            for wanted in ((False, True), (True, False))
        ]
        rows.append(
            (
                text(title_of(cloud.model)),
                text(cloud.depth),
                number(len(kinds)),
                *map(number, shares),
                number(rank_correlation(cloud.norm, cloud.clc)),
                number(rank_correlation(cloud.norm, cloud.blc)),
                *map(number, norms),
            )
        )
    columns = [Column("model"), Column("layers"), Column("filters", ("n",), digits=0)]
    columns += [Column(kind, ("%",), digits=1) for kind in ("backdoor", "clean", "hybrid", "redundant")]
    columns += [Column(f"rank correlation of norm and {loss}", ("rho",)) for loss in ("CLC", "BLC")]
    columns += [Column(f"mean norm, {kind} filters", ("l2",), digits=3) for kind in ("backdoor", "clean")]
    return Table(
        name="filters",
        title="Kinds of filters, and whether the norm tells what they are worth",
        columns=tuple(columns),
        rows=tuple(rows),
        notes=(
            f"{run.plan['size_text']} Backdoor: removing raises the backdoor loss alone; clean: the clean "
            "loss alone; hybrid: both; redundant: neither (the paper's thresholds at 0). The paper says that "
            "norms follow CLC for clean filters, and that backdoor filters have larger norms.",
            *share_done(run, run.answers),
        ),
        command=run.command,
    )


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation, with average ranks for ties; NaN if one is constant."""
    x, y = _ranks(a), _ranks(b)
    centre = (len(x) + 1) / 2
    products = sum((i - centre) * (j - centre) for i, j in zip(x, y, strict=True))
    sizes = [sum((i - centre) ** 2 for i in ranks) ** 0.5 for ranks in (x, y)]
    return products / (sizes[0] * sizes[1]) if all(sizes) else NAN


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            ranks[place] = (start + end) / 2 + 1
        start = end + 1
    return ranks
