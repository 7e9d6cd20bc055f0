"""What layouts share: means over draws, entries, and the columns of costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace

from unbackdoor.report.run import Answer, Run
from unbackdoor.report.tables import Column, Entry

RATES = ("CA", "ASR")
NAN = float("nan")
NOT_TAKEN = " (attack did not take)"

TITLES = {
    "none": "No defence",
    "fp": "FP",
    "anp": "ANP",
    "clp": "CLP",
    "rnp": "RNP",
    "nc": "NC",
    "nad": "NAD",
    "i_bau": "I-BAU",
    "mnp": "MNP",
    "badnets": "BadNets",
    "trojan": "Trojan",
    "blend": "Blend",
    "cl": "CL",
    "sig": "SIG",
    "iab": "IAB",
    "wanet": "WaNet",
    "fc": "FC",
    "dfst": "DFST",
    "lira": "LIRA",
    "ac": "AC",
    "sc": "SC",
    "strip": "STRIP",
    "collapse": "Class collapse (ours)",
    "ft": "FT",
    "ft_sam": "FT-SAM",
    "awm": "AWM",
    "bnp": "BNP",
    "ep": "EP",
    "tsbd": "TSBD",
    "bs_ar": "BS-AR",
    "gup": "GUP",
    "sau": "SAU",
    "fst": "FST",
}


def title_of(name: str) -> str:
    """Return what a method or attack is called in tables."""
    return TITLES.get(name, name.replace("_", "-"))


def title_of_model(answers: Sequence[Answer]) -> str:
    """Return what the model of some answers is called, with a mark if its attack did not take."""
    return title_of(answers[0].model) + ("" if all(a.took for a in answers) else NOT_TAKEN)


def mean(values: Iterable[float]) -> float:
    """Return the mean of what is not NaN; NaN of nothing."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.mean(known) if known else NAN


def text(value: object) -> Entry:
    """Return an entry of text."""
    return Entry(text=str(value))


def number(*values: float | None) -> Entry:
    """Return an entry of numbers."""
    return Entry(tuple(NAN if value is None else float(value) for value in values))


def effect(answers: Sequence[Answer], when: str = "after", rates: Sequence[str] = RATES) -> Entry:
    """Return mean rates over draws; where there is no result, why."""
    names = {"CA": "clean_accuracy", "ASR": "attack_success", "RA": "robust_accuracy"}
    done = [answer for answer in answers if answer.ok]
    if not done:
        states = {answer.status for answer in answers}
        return Entry(text=states.pop() if len(states) == 1 and states != {"missing"} else "")
    values = tuple(mean(answer.rate(names[rate], when) for answer in done) for rate in rates)
    return Entry(values, key=done[0].key)


def lost(answers: Sequence[Answer]) -> float:
    """Return the mean loss of clean accuracy in points."""
    return mean(a.rate("clean_accuracy", "before") - a.rate("clean_accuracy") for a in answers if a.ok)


def average(entries: Iterable[Entry]) -> Entry:
    """Return the mean of entries part by part; empty if one of them is missing."""
    rows = [entry.values for entry in entries]
    if not rows or any(not row or any(map(math.isnan, row)) for row in rows):
        return Entry()
    return Entry(tuple(statistics.mean(part) for part in zip(*rows, strict=True)))


def mark_lowest(entries: Sequence[Entry], part: int = 1) -> list[Entry]:
    """Mark the entries whose number of a part is the lowest."""
    values = [e.values[part] for e in entries if len(e.values) > part and not math.isnan(e.values[part])]
    lowest = min(values, default=NAN)
    return [
        replace(e, best=True) if len(e.values) > part and e.values[part] == lowest else e for e in entries
    ]


COSTS = (
    Column("seconds", ("s",), digits=1),
    Column("passes (1,000 images)", ("forward", "backward"), digits=1),
)


def costs(answers: Sequence[Answer]) -> list[Entry]:
    """Return the median price of a treatment: seconds, and thousands of image passes."""
    done = [answer for answer in answers if answer.ok and answer.value("cost")]
    if not done:
        return [Entry(), Entry()]
    numbers = [
        statistics.median(float(answer.value("cost", name) or 0) for answer in done)
        for name in ("seconds", "forward_images", "backward_images")
    ]
    return [number(numbers[0]), number(numbers[1] / 1000, numbers[2] / 1000)]


def draws(run: Run) -> str:
    """Return a note on what the means are over."""
    seeds = sorted({int(answer.cell["seed"]) for answer in run.answers})
    images = sorted({int(answer.cell["clean_images"]) for answer in run.answers})
    tests = {int(answer.cell.get("test_images", 0)) for answer in run.answers}
    measured = "all test images" if tests == {0} else f"{max(tests, default=0)} test images"
    return (
        f"{run.plan['size_text']} Means over seeds {', '.join(map(str, seeds))} of draw and method, "
        f"{' or '.join(map(str, images))} clean images, {measured}; per cent."
    )


def share_done(run: Run) -> tuple[str, ...]:
    """Return notes on what is not there, and on models that are and do not count."""
    missing, failed = run.count("missing"), run.count("failed")
    notes = [f"{missing} of {len(run.answers)} questions are not answered yet."] if missing else []
    notes += [f"{failed} questions ended in a failure; their records say why."] if failed else []
    absent = run.plan.get("missing_models", [])
    notes += [f"Models not trained yet: {', '.join(absent)}."] if absent else []
    weak = list(dict.fromkeys(answer.model for answer in run.answers if not answer.took))
    if weak:
        notes.append(
            f"Models whose attack did not take, in no mean over models and no detection rate: {len(weak)} "
            f"({', '.join(weak)})."
        )
    return tuple(notes)
