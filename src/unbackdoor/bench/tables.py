"""Tables from records: pure functions to Markdown; every number can be made again from the raw file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from unbackdoor.catalogue import dashed

Record = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """What a method does over models and seeds; rates are fractions, NaN where there is nothing to average.

    Args:
        method: Its label.
        models: Infected models measured whose attack took; rates and rank are over these.
        accuracy_lost: Mean loss of clean accuracy on infected models.
        accuracy_lost_clean: The same on clean models: what the defence costs where there was nothing to do.
        success: Mean ASR left, each model with the mean over its seeds.
        worst: Largest of these.
        robust: Mean RA.
        rank: Mean place among the methods by ASR left on each model, ties shared; 1 is best.
        seconds: Median wall time.
        passes: Median image passes, forward and backward.
        refused: Records without a result.
        invalid: Infected models that were left out, since their attack did not take.
    """

    method: str
    models: int
    accuracy_lost: float
    accuracy_lost_clean: float
    success: float
    worst: float
    robust: float
    rank: float
    seconds: float
    passes: float
    refused: int
    invalid: int


def label_of(record: Record) -> str:
    """Return how a record's method is called in tables; ``label`` where a report has put one in."""
    if "label" in record:
        return str(record["label"])
    cell = record["cell"]
    options = ", ".join(f"{name}={value}" for name, value in cell["options"].items())
    return (
        dashed(cell["method"]) + (" (paper)" if cell["paper"] else "") + (f" [{options}]" if options else "")
    )


def took(record: Record) -> bool:
    """Whether nothing is known against the attack on a record's model; one that failed is no success."""
    return record.get("trained", {}).get("valid") is not False


def mean_of(records: Iterable[Record], rate: str, when: str = "after") -> float:
    """Return the mean of a rate over records, NaN without any."""
    values = [r[when][rate]["value"] for r in records if r["status"] == "ok" and rate in r[when]]
    return statistics.mean(values) if values else math.nan


def summaries(records: Sequence[Record]) -> list[Summary]:
    """Summarise each method, in the order in which methods first appear."""
    methods = list(dict.fromkeys(label_of(record) for record in records))
    by_method = {method: [r for r in records if label_of(r) == method] for method in methods}
    ranks = _ranks(by_method)
    return [_summary(method, by_method[method], ranks[method]) for method in methods]


def _summary(method: str, records: Sequence[Record], rank: float) -> Summary:
    done = [r for r in records if r["status"] == "ok"]
    infected = [r for r in done if r["attack"] is not None and took(r)]
    success = list(_per_model(infected, "attack_success").values())
    return Summary(
        method=method,
        models=len(success),
        accuracy_lost=_lost(infected),
        accuracy_lost_clean=_lost([r for r in done if r["attack"] is None]),
        success=_mean(success),
        worst=max(success, default=math.nan),
        robust=_mean(_per_model(infected, "robust_accuracy").values()),
        rank=rank,
        seconds=_median([r["cost"]["seconds"] for r in done]),
        passes=_median([r["cost"]["forward_images"] + r["cost"]["backward_images"] for r in done]),
        refused=len(records) - len(done),
        invalid=len({r["cell"]["model"] for r in done if not took(r)}),
    )


def _per_model(records: Iterable[Record], rate: str, when: str = "after") -> dict[str, float]:
    grouped: dict[str, list[Record]] = {}
    for record in records:
        grouped.setdefault(record["cell"]["model"], []).append(record)
    return {model: mean_of(group, rate, when) for model, group in grouped.items()}


def _lost(records: Sequence[Record]) -> float:
    before, after = (_per_model(records, "clean_accuracy", when) for when in ("before", "after"))
    return _mean(before[model] - after[model] for model in before)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return statistics.mean(listed) if listed else math.nan


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def _ranks(by_method: dict[str, list[Record]]) -> dict[str, float]:
    success = {
        method: _per_model(
            [r for r in records if r["status"] == "ok" and r["attack"] and took(r)], "attack_success"
        )
        for method, records in by_method.items()
    }
    places: dict[str, list[float]] = {method: [] for method in by_method}
    for model in dict.fromkeys(model for rates in success.values() for model in rates):
        there = {method: rates[model] for method, rates in success.items() if model in rates}
        for method, rate in there.items():
            better = sum(other < rate for other in there.values())
            equal = sum(other == rate for other in there.values())
            places[method].append(better + (equal + 1) / 2)
    return {method: _mean(values) for method, values in places.items()}


def summary_table(records: Sequence[Record]) -> str:
    """Return the averages of each method as a Markdown table, best ASR first."""
    columns: dict[str, Callable[[Summary], str]] = {
        "method": lambda s: s.method,
        "infected models": lambda s: str(s.models),
        "ASR left": lambda s: percent(s.success),
        "worst ASR": lambda s: percent(s.worst),
        "RA": lambda s: percent(s.robust),
        "CA lost": lambda s: percent(s.accuracy_lost),
        "CA lost, clean models": lambda s: percent(s.accuracy_lost_clean),
        "mean rank": lambda s: f"{s.rank:.1f}",
        "seconds": lambda s: f"{s.seconds:.1f}",
        "passes (1000 images)": lambda s: f"{s.passes / 1000:.0f}",
        "refused": lambda s: str(s.refused),
        "attack did not take": lambda s: str(s.invalid),
    }
    rows = sorted(summaries(records), key=lambda s: (math.isnan(s.success), s.success))
    return markdown(list(columns), [[show(row) for show in columns.values()] for row in rows])


def model_table(records: Sequence[Record], methods: Sequence[str] = ()) -> str:
    """Return CA / ASR / RA of each method on each model as a Markdown table, means over the seeds.

    Args:
        records: All records.
        methods: Labels of the methods to show, in order; all if empty. The lowest ASR of a row is bold.
    """
    chosen = list(methods) or list(dict.fromkeys(label_of(record) for record in records))
    models = list(dict.fromkeys(record["cell"]["model"] for record in records))
    rows = []
    for model in models:
        here = [r for r in records if r["cell"]["model"] == model and r["status"] == "ok"]
        groups = [[r for r in here if label_of(r) == method] for method in chosen]
        lowest = min((mean_of(group, "attack_success") for group in groups if group), default=math.nan)
        name = model if all(map(took, here)) else f"{model} (attack did not take)"
        rows.append([name, _rates_of(here, "before"), *(_rates_of(g, "after", lowest) for g in groups)])
    return markdown(["model", "undefended", *chosen], rows)


def _rates_of(records: Sequence[Record], when: str, lowest: float = math.nan) -> str:
    if not records:
        return "-"
    rates = [mean_of(records, rate, when) for rate in ("clean_accuracy", "attack_success", "robust_accuracy")]
    text = " / ".join(percent(rate) for rate in rates if not math.isnan(rate))
    return f"**{text}**" if rates[1] == lowest else text


def percent(value: float) -> str:
    """Return a fraction in per cent, or a dash."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
