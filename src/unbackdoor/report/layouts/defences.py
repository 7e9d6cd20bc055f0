"""Methods compared over all models: summaries, costs, ablations, and what the field's review asks for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from unbackdoor.bench.tables import summaries
from unbackdoor.report.layouts.common import (
    COSTS,
    NAN,
    OLDER,
    RATES,
    average,
    costs,
    draws,
    effect,
    is_clean,
    lost,
    mark_lowest,
    mean,
    number,
    share_done,
    text,
    title_of,
    title_of_model,
)
from unbackdoor.report.layouts.grid import WORDS
from unbackdoor.report.published import paper
from unbackdoor.report.run import Answer, Run, grouped, only
from unbackdoor.report.tables import Column, Entry, Table

RANKS = (
    "Brackets behind ASR left say how many of a method's questions have a result; places are among the "
    "methods with a result on the same model, so that ranks of methods with unlike brackets do not compare."
)


def summary_table(run: Run, answers: Sequence[Answer], *, name: str, title: str) -> Table:
    """Return what each method does over all models, the lowest ASR first."""
    several = len({answer.images for answer in answers}) > 1
    by_label = grouped(answers, lambda a: a.label + (f", {a.images} images" if several else ""))
    records = [
        a.record | {"cell": dict(a.cell), "label": label}
        for label, group in by_label.items()
        for a in group
        if a.record is not None
    ]
    rows = []
    for s in sorted(summaries(records), key=lambda s: (s.success != s.success, s.success)):
        rates = (s.success, s.worst, s.robust, s.accuracy_lost, s.accuracy_lost_clean)
        first, *others = (number(100 * value) for value in rates)
        rows.append(
            (
                text(s.method),
                number(s.models),
                _counted(first, by_label[s.method]),
                *others,
                number(s.rank),
                number(s.seconds),
                number(s.passes / 1000),
                number(s.refused),
            )
        )
    titles = ("ASR left", "worst ASR", "RA", "CA lost", "CA lost, clean models")
    return Table(
        name=name,
        title=title,
        columns=(
            Column("method"),
            Column("infected models", ("n",), digits=0),
            *(Column(each, ("%",)) for each in titles),
            Column("mean rank", ("place",), digits=1),
            COSTS[0],
            Column("passes (1,000 images)", ("all",), digits=1),
            Column("without result", ("n",), digits=0),
        ),
        rows=tuple(rows),
        notes=(RANKS, draws(run, answers), *share_done(run, answers)),
        command=run.command,
    )


def _counted(entry: Entry, answers: Sequence[Answer]) -> Entry:
    """Return an entry that says how many answers it rests on, and whether some are of earlier defaults."""
    older = any(answer.older and answer.ok for answer in answers)
    done = sum(answer.ok for answer in answers)
    return replace(entry, done=done, asked=len(answers), mark=OLDER if older else "")


def effect_table(
    run: Run,
    answers: Sequence[Answer],
    *,
    name: str,
    title: str,
    column: str = "model",
    rates: Sequence[str] = RATES,
) -> Table:
    """Return a row a method: rates for each value of a property, and the price.

    Args:
        run: The run.
        answers: Which of its answers.
        name: Of the table.
        title: Of the table.
        column: ``model``, or a field of the cells.
        rates: Which; the lowest of the second is marked.
    """

    def where(answer: Answer) -> object:
        return answer.model if column == "model" else answer.cell[column]

    notes = (draws(run, answers), *share_done(run, answers))
    answers = answers if column == "model" else [a for a in answers if a.took]
    by_place = grouped(answers, where)
    places = list(by_place)
    titles = [title_of_model(by_place[p]) if column == "model" else str(p) for p in places]
    before = [effect([a for a in answers if where(a) == p and a.ok][:1], "before", rates) for p in places]
    rows: list[tuple[Entry, ...]] = []
    if column == "model":
        rows.append((text("no defence"), *before, Entry(), Entry()))
    found = [
        (label, [effect([a for a in group if where(a) == p], rates=rates) for p in places], costs(group))
        for label, group in grouped(answers, lambda answer: answer.label).items()
    ]
    marks = []
    for i, place in enumerate(places):
        column_entries = [f[1][i] for f in found]
        took = all(a.took for a in by_place[place])
        marks.append(mark_lowest(column_entries) if took else column_entries)
    best = zip(*marks, strict=True)
    for (label, _, price), entries in zip(found, best, strict=True):
        rows.append((text(label), *entries, *price))
    return Table(
        name=name,
        title=f"{title} ({' / '.join(rates)})",
        columns=(Column("method"), *(Column(title, tuple(rates)) for title in titles), *COSTS),
        rows=tuple(rows),
        notes=notes,
        command=run.command,
    )


def cost_table(run: Run, answers: Sequence[Answer]) -> Table:
    """Return what each method costs, with the seconds that the MNP paper prints."""
    printed = paper("runtime")
    assert printed is not None
    rows = []
    for label, group in grouped(answers, lambda answer: answer.label).items():
        memory = [float(a.value("cost", "peak_memory_mb") or NAN) for a in group if a.ok]
        theirs = (printed.at(group[0].method, "seconds") or (NAN,))[0]
        rows.append(
            (
                text(label),
                *costs(group),
                number(mean(memory)),
                effect([a for a in group if a.took]),
                number(theirs),
            )
        )
    rows.sort(key=lambda row: row[1].values or (float("inf"),))
    return Table(
        name="costs",
        title=str(run.plan["title"]),
        columns=(
            Column("method"),
            *COSTS,
            Column("memory", ("MB",), digits=0),
            Column("after", RATES),
            Column("paper, RTX 3090 Ti", ("s",), digits=0),
        ),
        rows=tuple(rows),
        notes=(draws(run, answers), _device(answers), *share_done(run, answers)),
        command=run.command,
    )


def _device(answers: Sequence[Answer]) -> str:
    devices = sorted({str(a.value("device")) for a in answers if a.ok})
    return f"Measured on {'; '.join(devices)}." if devices else "Nothing was measured yet."


def clean_table(run: Run, answers: Sequence[Answer]) -> Table:
    """Return what each defence does to a model without a backdoor."""
    rows = []
    for label, group in grouped(answers, lambda answer: answer.label).items():
        removed = mean(float(a.value("filters_removed") or 0) for a in group if a.ok)
        rows.append(
            (
                text(label),
                effect(group, "before", ("CA",)),
                effect(group, "after", ("CA",)),
                number(lost(group)),
                number(removed),
                *costs(group),
            )
        )
    rows.sort(key=lambda row: row[3].values)
    return Table(
        name="no-attack",
        title="No attack: what each defence costs a clean model",
        columns=(
            Column("method"),
            Column("before", ("CA",)),
            Column("after", ("CA",)),
            Column("CA lost", ("points",)),
            Column("filters removed", ("n",), digits=1),
            *COSTS,
        ),
        rows=tuple(rows),
        notes=(draws(run, answers), *share_done(run, answers)),
        command=run.command,
    )


def stability_tables(run: Run, answers: Sequence[Answer]) -> list[Table]:
    """Return how much CA and ASR move when an option is halved or doubled: by method, and by option.

    Differences are between equal models and seeds; their absolute values are averaged. A setting with which
    there is no result has no difference; it is counted instead.
    """
    by_option: list[tuple[Entry, ...]] = []
    by_method: list[tuple[Entry, ...]] = []
    for method, group in grouped(answers, lambda answer: answer.method).items():
        usual = {(a.model, a.cell["seed"]): a for a in group if not a.options and a.ok and a.took}
        varied = [a for a in group if a.options]
        moves = {
            a.key: _moved(a, usual[a.model, a.cell["seed"]])
            for a in varied
            if a.ok and (a.model, a.cell["seed"]) in usual
        }
        for variant, here in grouped(varied, lambda answer: answer.variant).items():
            by_option.append(
                (
                    text(title_of(method)),
                    text(variant),
                    *_mean_moves([moves[a.key] for a in here if a.key in moves]),
                    number(_without_result(here)),
                )
            )
        options = {path for a in varied for path in a.options}
        largest = max((m[1] for m in moves.values()), default=NAN)
        by_method.append(
            (
                text(title_of(method)),
                number(len(options)),
                *_mean_moves(list(moves.values())),
                number(largest),
                number(_without_result(varied)),
                *costs(only(group, variant="")),
            )
        )
    by_method.sort(key=lambda row: (math.isnan(row[3].values[0]), row[3].values))
    moved = (Column("CA moves by", ("points",)), Column("ASR moves by", ("points",)))
    broken = Column("without result", ("n",), digits=0)
    note = "Each option halved and doubled, the others at their defaults; mean absolute differences."
    return [
        Table(
            "stability",
            "How much a result depends on a method's own options",
            (
                Column("method"),
                Column("options tried", ("n",), digits=0),
                *moved,
                Column("largest move of ASR", ("points",)),
                broken,
                *COSTS,
            ),
            tuple(by_method),
            (note, draws(run, answers), *share_done(run, answers)),
            run.command,
        ),
        Table(
            "stability-options",
            "The same, option by option",
            (Column("method"), Column("option"), *moved, broken),
            tuple(by_option),
            (note,),
            run.command,
        ),
    ]


def _without_result(answers: Sequence[Answer]) -> int:
    return sum(answer.status in ("refused", "failed") for answer in answers)


def _moved(one: Answer, other: Answer) -> tuple[float, float]:
    names = ("clean_accuracy", "attack_success")
    differences = [abs(one.rate(name) - other.rate(name)) for name in names]
    return differences[0], differences[1]


def _mean_moves(moves: Sequence[tuple[float, float]]) -> tuple[Entry, Entry]:
    parts = list(zip(*moves, strict=True)) or [(NAN,), (NAN,)]
    return number(statistics.mean(parts[0])), number(statistics.mean(parts[1]))


def sok_tables(run: Run) -> list[Table]:
    """Return the tables of the suite ``sok``."""
    tables = [clean_table(run, run.of("no attack"))]
    for part in ("low rates", "architectures"):
        answers = run.of(part)
        tables.append(effect_table(run, answers, name=part.replace(" ", "-"), title=WORDS[part].capitalize()))
    budgets = run.of("clean images")
    for kind, wanted in (("infected models", True), ("a clean model", False)):
        clean = {model for model, group in grouped(budgets, lambda a: a.model).items() if is_clean(group)}
        chosen = [a for a in budgets if (a.model not in clean) == wanted]
        tables.append(
            effect_table(
                run,
                chosen,
                name=f"clean-images-{'infected' if wanted else 'clean'}",
                title=f"Numbers of clean images: means over {kind}",
                column="clean_images",
            )
        )
    return [*(table for table in tables if table.rows), *stability_tables(run, run.of("options"))]


AWAKE = ("retuned_success", "queried_success", "queried_without_trigger")


def asleep_table(run: Run, answers: Sequence[Answer]) -> Table:
    """Return a row a method: ASR left, and what wakes the backdoor again, on each model and on average."""
    by_model = grouped(answers, lambda answer: answer.model)
    columns = [Column("method")]
    for group in by_model.values():
        columns.append(Column(title_of_model(group), ("ASR", "retuned", "query", "change alone")))
    columns.append(Column("mean", columns[-1].parts))
    rows: list[tuple[Entry, ...]] = []
    for label, group in grouped(answers, lambda answer: answer.label).items():
        entries = {model: _awake(only(group, model=model)) for model in by_model}
        counted = [entry for model, entry in entries.items() if all(a.took for a in by_model[model])]
        rows.append((text(label), *entries.values(), average(counted)))
    rows.sort(key=lambda row: row[-1].values[1:2] or (float("inf"),))
    return Table(
        name="asleep",
        title="What wakes a backdoor again",
        columns=tuple(columns),
        rows=tuple(rows),
        notes=(
            "ASR left; RA-ASR after fine-tuning on 500 images with five poisoned ones among them; RA-ASR "
            "with one small change on top of all triggered images, found by queries; and what a change found "
            "in the same way does without the trigger: only what is above it speaks of a backdoor.",
            draws(run, answers),
            *share_done(run, answers),
        ),
        command=run.command,
    )


def _awake(answers: Sequence[Answer]) -> Entry:
    found = effect(answers, rates=("ASR",))
    if not found.values:
        return found
    again = (mean(a.rate(name, "reactivated") for a in answers if a.ok) for name in AWAKE)
    return replace(found, values=(*found.values, *again))


def defence_tables(run: Run) -> list[Table]:
    """Return the tables of the suite ``defences``: rates and averages by part, and what wakes backdoors."""
    tables = []
    for part in run.parts():
        answers = run.of(part)
        if any(answer.cell.get("reactivate") for answer in answers):
            tables.append(asleep_table(run, answers))
            continue
        name, title = part.replace(" ", "-") or "all", WORDS.get(part, part or "all models").capitalize()
        rates = ("CA", "ASR", "RA")
        tables.append(summary_table(run, answers, name=f"{name}-summary", title=f"{title}: averages"))
        tables.append(effect_table(run, answers, name=name, title=title, rates=rates))
    return tables
