"""Attack by defence, as Tables 1 and 2 of the MNP paper, with what the paper prints below each row."""

from __future__ import annotations

import re
from collections.abc import Sequence

from unbackdoor.report.layouts.common import (
    RATES,
    average,
    draws,
    effect,
    is_clean,
    mark_lowest,
    share_done,
    text,
    title_of,
    title_of_model,
)
from unbackdoor.report.published import Published, paper
from unbackdoor.report.run import Answer, Run, grouped, only
from unbackdoor.report.tables import AVERAGE, Column, Entry, Table

WORDS = {
    "ours": "our settings, one stopping rule for all pruning methods",
    "paper": "settings of each method's paper or public code",
    "paper, by share": "MNP's paper, pruning the paper's share of the filters",
    "low rates": "low poison rates",
    "architectures": "other architecture families",
}
"""What the parts of suites are called."""


def grid_tables(run: Run, published: str = "", parts: Sequence[str] = ()) -> list[Table]:
    """Return a table for each part: attacks down, defences across.

    Args:
        run: The run.
        published: Name of the paper's table with the same rows and columns, or empty.
        parts: Which; all that are about purification if empty.
    """
    printed = paper(published) if published else None
    chosen = parts or list(dict.fromkeys(part for a in run.answers if a.task == "purify" for part in a.parts))
    return [_table(run, part, run.of(part), printed) for part in chosen if run.of(part)]


def _table(run: Run, part: str, answers: Sequence[Answer], printed: Published | None) -> Table:
    methods = grouped(answers, lambda answer: (answer.method, answer.variant, answer.images))
    titles = _titles(list(methods))
    columns = [Column("model"), Column("source"), Column("No defence", RATES)]
    columns += [Column(title, RATES) for title in titles]
    rows, measured = [], []
    for model, group in grouped(answers, lambda answer: answer.model).items():
        before = effect([answer for answer in group if answer.ok][:1], "before")
        after = [effect(only(group, method=m, variant=v, images=n)) for m, v, n in methods]
        took = all(answer.took for answer in group)
        if took and not is_clean(group):
            measured.append([before, *after])
        shown = mark_lowest(after) if took else after
        rows.append((text(title_of_model(group)), text("measured"), before, *shown))
        rows += _printed_row(model, printed, [method for method, *_ in methods])
    rows += _averages(measured, printed, [method for method, *_ in methods])
    return Table(
        name=re.sub(r"\W+", "-", part).strip("-") or "grid",
        title=f"{run.plan['title']}: {WORDS.get(part, part) or 'all'} (CA / ASR)",
        columns=tuple(columns),
        rows=tuple(rows),
        notes=(draws(run, answers), *share_done(run, answers)),
        command=run.command,
    )


def _titles(methods: Sequence[tuple[str, str, int]]) -> list[str]:
    """Name methods by what tells them apart: their settings, and how many clean images they got."""
    budgets = {images for *_, images in methods}
    titles = []
    for method, variant, images in methods:
        alike = [each for each in methods if each[0] == method]
        words = [variant] if variant and len({v for _, v, _ in alike}) > 1 else []
        words += [f"{images} images"] if len(budgets) > 1 else []
        titles.append(title_of(method) + (f" [{', '.join(words)}]" if words else ""))
    return titles


def _printed_row(model: str, printed: Published | None, methods: Sequence[str]) -> list[tuple[Entry, ...]]:
    if printed is None or model not in printed.rows:
        return []
    values = [printed.at(model, name) for name in ("none", *methods)]
    return [(text(title_of(model)), text("paper"), *(Entry(value or ()) for value in values))]


def _averages(
    measured: Sequence[Sequence[Entry]], printed: Published | None, methods: Sequence[str]
) -> list[tuple[Entry, ...]]:
    if not measured:
        return []
    means = [average(column) for column in zip(*measured, strict=True)]
    rows: list[tuple[Entry, ...]] = [(text(AVERAGE), text("measured"), *means)]
    if printed is not None:
        names = ("none", *methods)
        rows += [
            (
                text(AVERAGE),
                text("paper, printed"),
                *(Entry(printed.printed_average(n) or ()) for n in names),
            ),
            (
                text(AVERAGE),
                text("paper, computed"),
                *(Entry(printed.computed_average(n) or ()) for n in names),
            ),
        ]
    return rows
