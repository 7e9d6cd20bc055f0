"""MNP against BadNets at several poison rates, one target and all to all: Table 3 of the MNP paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from unbackdoor.report.layouts.common import RATES, draws, effect, share_done, text
from unbackdoor.report.published import paper
from unbackdoor.report.run import Answer, Run
from unbackdoor.report.tables import Column, Entry, Table

RULES = {"all_to_one": "BadNets-A2O", "all_to_all": "BadNets-A2A"}
TRAINING_IMAGES = 50_000


def rate_table(run: Run) -> Table:
    """Return Table 3: poison rates across, without and with MNP."""
    printed = paper("table3")
    assert printed is not None
    columns = [Column("attack"), Column("source")]
    for count in printed.columns:
        share = 100 * int(count) / TRAINING_IMAGES
        columns += [Column(f"{share:g} %, no defence", RATES), Column(f"{share:g} %, MNP", RATES)]
    rows: list[tuple[Entry, ...]] = []
    for rule, title in RULES.items():
        for part in run.parts():
            cells = [
                entry for count in printed.columns for entry in _pair(_chosen(run.of(part), rule, int(count)))
            ]
            source = "measured" if part == "ours" else f"measured, {part}'s settings"
            rows.append((text(title), text(source), *cells))
        pairs = [
            Entry(printed.at(row, count) or ()) for count in printed.columns for row in (rule, f"{rule}_mnp")
        ]
        rows.append((text(title), text("paper"), *pairs))
    return Table(
        name="table3",
        title=f"{run.plan['title']} (CA / ASR)",
        columns=tuple(columns),
        rows=tuple(rows),
        notes=(
            draws(run, run.answers),
            "The paper calls the first rate 0.05 % (250 images), which is 0.5 %.",
            *share_done(run, run.answers),
        ),
        command=run.command,
    )


def _chosen(answers: Sequence[Answer], rule: str, poisoned: int) -> list[Answer]:
    # What was poisoned stands in records alone: those that are missing belong to the model's others.
    models = {
        answer.model
        for answer in answers
        if answer.value("trained", "label_rule", "rule") == rule
        and answer.value("trained", "poisoned") == poisoned
    }
    return [answer for answer in answers if answer.model in models]


def _pair(answers: Sequence[Answer]) -> list[Entry]:
    done = [answer for answer in answers if answer.ok]
    mark = "" if all(answer.took for answer in answers) else "attack did not take"
    return [effect(done[:1], "before") if done else Entry(), replace(effect(answers), mark=mark)]
