"""Detection rates by attack, and false alarms: Table 4 of the MNP paper with what it leaves out."""

from __future__ import annotations

from collections.abc import Sequence

from unbackdoor.rates import Rate
from unbackdoor.report.layouts.common import (
    NAN,
    keys_of,
    mean,
    number,
    share_done,
    text,
    title_of,
    title_of_model,
)
from unbackdoor.report.published import paper
from unbackdoor.report.run import Answer, Run, grouped
from unbackdoor.report.tables import Column, Entry, Table

JUDGED = ("ok", "refused")
"""What counts as an answer: a detector that refuses a model has not found its backdoor."""


def detection_tables(run: Run, published: str = "table4") -> list[Table]:
    """Return the detection rates, and every score with its threshold."""
    answers = [answer for answer in run.answers if answer.task == "detect"]
    return [_rates(run, answers, published), _scores(run, answers)] if answers else []


def _rates(run: Run, answers: Sequence[Answer], published: str) -> Table:
    printed = paper(published) if published else None
    attacks = list(dict.fromkeys(a.model for a in answers if a.attack is not None))
    columns = [Column("detector"), Column("source")]
    by_model = grouped(answers, lambda answer: answer.model)
    columns += [Column(title_of_model(by_model[attack]), ("DR",)) for attack in attacks]
    columns += [Column("Average", ("DR",)), Column("right target", ("%",)), Column("false alarms", ("FPR",))]
    columns += [Column("abstained", ("%",)), Column("seconds", ("s",), digits=1)]
    rows: list[tuple[Entry, ...]] = []
    for method, everything in grouped(answers, lambda answer: answer.method).items():
        # One population in all columns: where the attack did not take there is nothing to detect.
        group = [a for a in everything if a.took]
        by_attack = [[a for a in group if a.model == attack] for attack in attacks]
        infected = [a for a in group if a.attack is not None]
        clean = [a for a in group if a.attack is None]
        targets = [
            100.0 * (a.value("target_class") == a.value("true_target"))
            for a in infected
            if a.value("flagged")
            and a.value("target_class") is not None
            and a.value("true_target") is not None
        ]
        abstained = [100.0 * (a.value("flagged") is None) for a in group if a.status in JUDGED]
        seconds = [float(a.value("cost", "seconds") or NAN) for a in everything if a.ok]
        rows.append(
            (
                text(title_of(method)),
                text("measured"),
                *map(_counted, by_attack),
                _counted(infected),
                number(mean(targets)),
                _counted(clean),
                number(mean(abstained)),
                number(mean(seconds)),
            )
        )
        if printed is not None and method in printed.rows:
            values = [(printed.at(method, attack) or (NAN,))[0] for attack in attacks]
            total = printed.row_averages[method][0]
            rows.append(
                (text(title_of(method)), text("paper"), *map(number, values), number(total), *[Entry()] * 4)
            )
    return Table(
        name="table4",
        title=f"{run.plan['title']}: detection rate (DR) on infected models, false alarms on clean ones",
        columns=tuple(columns),
        rows=tuple(rows),
        notes=(
            f"{run.plan['size_text']} Flagged of all models and draws, in brackets the 95 % Wilson interval "
            f"in per cent, which takes draws on one model for independent; {_counts(answers)}. "
            "Abstaining, or refusing a model, counts as not detected, and as no false alarm.",
            *share_done(run, answers),
        ),
        command=run.command,
    )


def _counted(answers: Sequence[Answer]) -> Entry:
    """Return the share of the judged models that were flagged."""
    judged = [answer for answer in answers if answer.status in JUDGED]
    rate = Rate(sum(bool(answer.value("flagged")) for answer in judged), len(judged))
    if not rate.n:
        return Entry(keys=keys_of(answers))
    low, high = (100 * bound for bound in rate.interval)
    shown = f"{rate.successes}/{rate.n} [{low:.1f}, {high:.1f}]"
    return Entry((100 * rate.value,), shown, keys=keys_of(answers))


def _counts(answers: Sequence[Answer]) -> str:
    infected = {a.model for a in answers if a.attack is not None and a.took}
    clean = {a.model for a in answers if a.status in JUDGED and a.attack is None}
    return f"{len(infected)} infected and {len(clean)} clean models"


def _scores(run: Run, answers: Sequence[Answer]) -> Table:
    methods = list(dict.fromkeys(answer.method for answer in answers))
    rows = []
    for model, group in grouped(answers, lambda answer: answer.model).items():
        entries = []
        for method in methods:
            here = [a for a in group if a.method == method and a.ok]
            entries.append(
                number(
                    mean(float(a.value("score")) for a in here if a.value("score") is not None),
                    mean(float(a.value("threshold")) for a in here if a.value("threshold") is not None),
                )
            )
        rows.append((text(title_of(model)), *entries))
    return Table(
        name="scores",
        title="Scores and their thresholds, means over draws",
        columns=(Column("model"), *(Column(title_of(m), ("score", "threshold"), digits=3) for m in methods)),
        rows=tuple(rows),
        notes=("A model is called backdoored if its score is at or above the threshold.",),
        command=run.command,
    )
