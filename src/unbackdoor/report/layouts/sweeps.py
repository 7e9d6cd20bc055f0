"""One quantity varied: clean images (Fig. 3), lambda and mu (Fig. 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unbackdoor.report.layouts.common import RATES, draws, effect, share_done, text, title_of_model
from unbackdoor.report.run import Answer, Run, grouped
from unbackdoor.report.tables import Column, Table


@dataclass(frozen=True)
class Line:
    """CA and ASR over a quantity.

    Args:
        label: What the line is about.
        xs: Values of the quantity.
        accuracy: CA in per cent.
        success: ASR in per cent.
    """

    label: str
    xs: tuple[float, ...]
    accuracy: tuple[float, ...]
    success: tuple[float, ...]


SETTINGS = {"ours": "our settings", "paper": "the paper's settings"}


def over_images(answer: Answer) -> float | None:
    """Return how many clean images there were."""
    return float(answer.cell["clean_images"])


def over_option(path: str) -> Callable[[Answer], float | None]:
    """Return a function that gives the value of an option that was set, or None."""

    def value(answer: Answer) -> float | None:
        found = answer.options.get(path)
        return None if found is None else float(found)

    return value


def lines(answers: Sequence[Answer], x: Callable[[Answer], float | None]) -> list[Line]:
    """Return a line a model and part, means over draws."""
    found = []
    chosen = [a for a in answers if x(a) is not None]
    for (_, where), group in _by_model_and_part(chosen).items():
        points = sorted(grouped([a for a in group if a.ok], x).items())
        entries = [(value, effect(here).values) for value, here in points]
        label = f"{title_of_model(group)}, {SETTINGS.get(where, where)}"
        columns = zip(*[(v, e[0], e[1]) for v, e in entries if len(e) == 2], strict=True)
        found.append(Line(label, *(tuple(column) for column in columns))) if entries else None
    return found


def _by_model_and_part(answers: Sequence[Answer]) -> dict[tuple[str, str], list[Answer]]:
    found: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        for part in answer.parts:
            found.setdefault((answer.model, part), []).append(answer)
    return found


def sweep_table(
    run: Run, x: Callable[[Answer], float | None], *, name: str, title: str, quantity: str
) -> Table:
    """Return CA and ASR of each model and part over a quantity.

    Args:
        run: The run.
        x: The quantity of an answer, None where it was not varied.
        name: Of the table.
        title: Of the table.
        quantity: What it is called.
    """
    chosen = [answer for answer in run.answers if x(answer) is not None]
    values = sorted({value for answer in chosen if (value := x(answer)) is not None})
    rows = []
    for (_, part), group in _by_model_and_part(chosen).items():
        by_value = grouped(group, x)
        rows.append(
            (
                text(title_of_model(group)),
                text(SETTINGS.get(part, part)),
                *(effect(by_value.get(value, [])) for value in values),
            )
        )
    return Table(
        name=name,
        title=f"{title} (CA / ASR)",
        columns=(
            Column("model"),
            Column("settings"),
            *(Column(f"{quantity} {value:g}", RATES) for value in values),
        ),
        rows=tuple(rows),
        notes=(
            draws(run, chosen),
            "The paper shows a figure without numbers.",
            *share_done(run, chosen),
        ),
        command=run.command,
    )
