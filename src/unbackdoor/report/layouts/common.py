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
OLDER = "earlier default"

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
    "recovery": "Recovery by filters (ours)",
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
    "random_order": "Random order",
}


def title_of(name: str) -> str:
    """Return what a method or attack is called in tables."""
    return TITLES.get(name, name.replace("_", "-"))


def title_of_model(answers: Sequence[Answer]) -> str:
    """Return what the model of some answers is called, with a mark if its attack did not take."""
    return title_of(answers[0].model) + ("" if all(a.took for a in answers) else NOT_TAKEN)


def is_clean(answers: Sequence[Answer]) -> bool:
    """Whether a model has no backdoor, by any of its answers; unknown ones count as infected."""
    return any(answer.ok and answer.attack is None for answer in answers)


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
    """Return mean rates over draws, and how many of these have a result; where none has, why."""
    names = {"CA": "clean_accuracy", "ASR": "attack_success", "RA": "robust_accuracy"}
    done = [answer for answer in answers if answer.ok]
    if not done:
        states = [answer.status for answer in answers]
        words = ", ".join(sorted(set(states) - {"missing"}))
        return Entry(text=words, keys=keys_of(answers), asked=states.count("missing"))
    values = tuple(mean(answer.rate(names[rate], when) for answer in done) for rate in rates)
    mark = OLDER if when == "after" and any(answer.older for answer in done) else ""
    return Entry(values, keys=keys_of(answers), done=len(done), asked=len(answers), mark=mark)


def keys_of(answers: Iterable[Answer]) -> tuple[str, ...]:
    """Return the keys of those that have a record."""
    return tuple(answer.key for answer in answers if answer.record is not None)


def lost(answers: Sequence[Answer]) -> float:
    """Return the mean loss of clean accuracy in points."""
    return mean(a.rate("clean_accuracy", "before") - a.rate("clean_accuracy") for a in answers if a.ok)


def average(entries: Iterable[Entry]) -> Entry:
    """Return the mean of entries part by part; empty if one of them is missing."""
    listed = list(entries)
    rows = [entry.values for entry in listed]
    if not rows or any(not row or any(map(math.isnan, row)) for row in rows):
        return Entry()
    means = tuple(statistics.mean(part) for part in zip(*rows, strict=True))
    mark = OLDER if any(e.mark == OLDER for e in listed) else ""
    return Entry(means, done=sum(e.done for e in listed), asked=sum(e.asked for e in listed), mark=mark)


def mark_lowest(entries: Sequence[Entry], part: int = 1) -> list[Entry]:
    """Mark the entries whose number of a part is the lowest; none where one could still win."""
    if any(entry.done < entry.asked for entry in entries):
        return list(entries)
    values = [entry.values[part] for entry in entries if len(entry.values) > part]
    lowest = min((value for value in values if not math.isnan(value)), default=NAN)
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


def draws(run: Run, answers: Sequence[Answer]) -> str:
    """Return a note on what the means of a table with these answers are over."""
    if not answers:
        return str(run.plan["size_text"])
    seeds = sorted({int(answer.cell["seed"]) for answer in answers})
    images = sorted({int(answer.cell["clean_images"]) for answer in answers})
    tests = {int(answer.cell.get("test_images", 0)) for answer in answers}
    measured = "all test images" if tests == {0} else f"{max(tests)} test images"
    return (
        f"{run.plan['size_text']} Means over seeds {', '.join(map(str, seeds))} of draw and method, "
        f"{' or '.join(map(str, images))} clean images, {measured}; per cent. Where some of these gave no "
        "result, brackets say how many did. The lowest ASR is in bold, unless one that lacks results could "
        "still win."
    )


def share_done(run: Run, answers: Sequence[Answer]) -> tuple[str, ...]:
    """Return notes on what a table with these answers lacks, and on models that do not count."""
    count = {state: sum(a.status == state for a in answers) for state in ("missing", "refused", "failed")}
    total = len(answers)
    notes = [f"{count['missing']} of {total} questions are not answered yet."] if count["missing"] else []
    for state, words in (("refused", "were refused"), ("failed", "ended in a failure")):
        if count[state]:
            notes.append(f"{count[state]} of {total} questions {words}; their records say why.")
    older = list(dict.fromkeys(title_of(a.method) for a in answers if a.older and a.ok))
    if older:
        notes.append(
            f"Of earlier defaults, as their options say: {', '.join(older)}. The command asks with today's."
        )
    absent = run.plan.get("missing_models", [])
    notes += [f"Models not trained yet: {', '.join(absent)}."] if absent else []
    weak = list(dict.fromkeys(answer.model for answer in answers if not answer.took))
    if weak:
        notes.append(
            f"Models whose attack did not take, in no mean over models and no detection rate: {len(weak)} "
            f"({', '.join(weak)})."
        )
    return tuple(notes)
