"""Tables of a detection trial: thresholds from one half of the clean models, figures from the other.

With a calibration file the thresholds come from it, and all clean models but its own are tested. Pure
functions from records to Markdown. A model on which a detector abstains, or that it refuses, counts as not
flagged: a miss where it is infected, and the lowest score where it is a clean model of the calibration.

The row ``scan`` follows the scan's own rule (``detect.verdict.ground_of``), so that a model may also be
inconclusive: not flagged, and not cleared either. The other detectors are inconclusive where they abstain.
"""

from __future__ import annotations

import hashlib
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from unbackdoor import rng
from unbackdoor.bench.store import Record
from unbackdoor.bench.tables import markdown, percent
from unbackdoor.detect.calibration import CalibrationSet, Kind, completed
from unbackdoor.detect.evidence import DECIDING, REQUIRED
from unbackdoor.detect.joint import Joint, combine
from unbackdoor.detect.registry import MODEL_DETECTORS
from unbackdoor.detect.verdict import VERDICTS, Verdict, ground_of
from unbackdoor.rates import Rate

JOINT = "scan"
"""The row of the scan's verdict, from its deciding detectors together."""

ADAPTIVE = ("adaptive_magnitude",)
"""Attacks on this very scan, which no summary counts."""

TABLE_4 = ("badnets", "trojan", "blend", "cl", "iab", "wanet")
"""Attacks of Table 4 of the MNP paper (arXiv 2405.17750), at the attack's usual rate with one target."""

TABLE_1 = (*TABLE_4, "sig", "fc", "dfst", "lira")
"""All ten attacks of that paper."""

LOW_RATE = 0.02
"""Largest share of poisoned training images that counts as a low rate."""

RESAMPLES = 2000
_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


@dataclass(frozen=True)
class Scored:
    """A model and what all detectors said of it.

    Args:
        name: Of the model.
        data: Its data set.
        group: Its name without the number at the end: the attack with its options.
        attack: None for a clean model.
        target: The attack's target, where it has one for all classes.
        poison_fraction: Share of the training images that were poisoned, 0 where that follows from the share
            of the target class; None if unknown.
        scores: Detector that was asked, with the options that were set, to score; None where it abstained or
            refused.
        targets: Detector to the class that it suspects, or None.
        seconds: Detector to time; ``scan`` to that of a whole scan.
        fixed: Detector to the threshold that it has without clean models, of those that have one.
    """

    name: str
    data: str
    group: str
    attack: str | None
    target: int | None
    poison_fraction: float | None
    scores: Mapping[str, float | None]
    targets: Mapping[str, int | None]
    seconds: Mapping[str, float]
    fixed: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        """Whether it was trained without an attack."""
        return self.attack is None

    @property
    def has_low_rate(self) -> bool:
        """Whether few training images were poisoned."""
        return self.poison_fraction is not None and 0 < self.poison_fraction <= LOW_RATE

    def is_as_in(self, attacks: Sequence[str]) -> bool:
        """Whether it carries one of these attacks as the paper sets them: one target, no low rate."""
        usual = self.poison_fraction is not None and not self.has_low_rate
        return self.attack in attacks and self.target is not None and usual


SELECTIONS: dict[str, Callable[[Scored], bool]] = {
    "all": lambda model: model.attack not in ADAPTIVE,
    "six of Table 4": lambda model: model.is_as_in(TABLE_4),
    "ten of the paper": lambda model: model.is_as_in(TABLE_1),
    f"rates <= {LOW_RATE:.0%}": lambda model: model.has_low_rate and model.attack not in ADAPTIVE,
}
"""Which infected models a row of the summary counts."""


@dataclass(frozen=True)
class Outcome:
    """What one detector makes of one model that its threshold does not come from.

    Args:
        model: The model.
        verdict: ``clean`` for a single detector means that its threshold is not reached.
        statistic: What AUC ranks; minus infinity where the detector abstained.
        target: The suspected class.
        p_value: Among the clean models that it was compared with; NaN without any.
    """

    model: Scored
    verdict: Verdict
    statistic: float
    target: int | None
    p_value: float

    @property
    def flagged(self) -> bool:
        """Whether it is called backdoored."""
        return self.verdict == "backdoored"

    @property
    def inconclusive(self) -> bool:
        """Whether it is neither called backdoored nor clean."""
        return self.verdict == "inconclusive"


@dataclass(frozen=True)
class Column:
    """A detector on one data set.

    Args:
        detector: Its name, or ``scan``.
        data: The data set.
        rate: The false-positive rate that its threshold guarantees; alpha, or the smallest possible one. NaN
            for a fixed threshold.
        calibrated_on: Clean models behind the threshold, those on which it abstained among them.
        outcomes: All infected models that it was asked about, and the clean ones of the other half.
        seconds: Median time of a model.
    """

    detector: str
    data: str
    rate: float
    calibrated_on: int
    outcomes: tuple[Outcome, ...]
    seconds: float

    def of(self, *, clean: bool, group: str | None = None) -> list[Outcome]:
        """Return the outcomes on clean or on infected models, of one group or all."""
        return [
            outcome
            for outcome in self.outcomes
            if outcome.model.is_clean == clean and group in (None, outcome.model.group)
        ]


def scored(records: Sequence[Record]) -> list[Scored]:
    """Gather the records of each valid model.

    A detector with options that were set is told apart from the same one without, as in ``nc
    [statistic=ratio]``. Of answers that were asked for alike, and given with other settings since a default
    changed, those with the newest settings count.
    """
    newest = {
        (record["cell"]["data"], _label(name, record["cell"])): _whole(name, settings)
        for record in records
        for name, settings in record["cell"].get("settings", {}).items()
    }
    by_model: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.get("valid", True):
            cell = record["cell"]
            by_model.setdefault((cell["data"], cell["model"]), []).append(record)
    return [_scored(data, name, found, newest) for (data, name), found in sorted(by_model.items())]


def _scored(data: str, name: str, records: Sequence[Record], newest: Mapping[tuple[str, str], Any]) -> Scored:
    scores: dict[str, float | None] = {}
    found: dict[str, Mapping[str, Any]] = {}
    seconds: dict[str, float] = {}
    for record in records:
        cell = record["cell"]
        labels = {part: _label(part, cell) for part in _asked(record)}
        settings = {part: _whole(part, options) for part, options in cell.get("settings", {}).items()}
        asked = {
            part: label for part, label in labels.items() if settings.get(part) == newest.get((data, label))
        }
        # What was answered once stays answered, whatever another try ended in.
        scores |= {label: None for label in asked.values() if label not in scores}
        if record["status"] != "ok":
            continue
        answers = {label: record["detections"][part] for part, label in asked.items()}
        found |= answers
        scores |= {label: answer["score"] for label, answer in answers.items()}
        seconds |= {label: answer["seconds"] for label, answer in answers.items()}
        if cell["detector"] == JOINT:
            parts = sum(answer["seconds"] for answer in record["detections"].values())
            seconds[_label(JOINT, cell)] = record.get("scan_seconds", parts)
    rule = records[-1].get("label_rule") or {}
    return Scored(
        name=name,
        data=data,
        group=re.sub(r"-\d+$", "", name),
        attack=records[-1]["attack"],
        target=rule.get("target_class") if rule.get("rule") == "all_to_one" else None,
        poison_fraction=records[-1].get("poison_fraction"),
        scores=scores,
        targets={label: answer["target_class"] for label, answer in found.items()},
        seconds=seconds,
        fixed={
            label: answer["fixed_threshold"]
            for label, answer in found.items()
            if answer.get("fixed_threshold") is not None
        },
    )


def _asked(record: Record) -> tuple[str, ...]:
    """Return the detectors that a question was put to; all of its own for a scan."""
    cell = record["cell"]
    usual = REQUIRED if cell["detector"] == JOINT else (cell["detector"].replace("-", "_"),)
    return tuple(cell.get("settings") or record.get("detections") or usual)


def _whole(detector: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return settings with the options that did not exist yet, which move no score."""
    known = MODEL_DETECTORS.get(detector)
    return settings if known is None else completed(settings, known)


def _label(detector: str, cell: Mapping[str, Any]) -> str:
    given = ", ".join(cell.get("options", ()))
    return f"{detector} [{given}]" if given else detector


def _detector(label: str) -> str:
    return label.partition(" [")[0]


def comparable(records: Sequence[Record], calibration: CalibrationSet) -> tuple[list[Record], dict[str, int]]:
    """Keep what a calibration file speaks of.

    Args:
        records: Of a trial.
        calibration: Where thresholds come from.

    Returns:
        The records that it holds for, of several detectors those parts; and reason to the models that it
        does not hold for, or that it was made from.
    """
    known = {model.sha256 for model in calibration.models} - {""}
    kept, left_out = [], dict[str, set[tuple[str, str]]]()
    for record in records:
        cell = record["cell"]
        settings = cell.get("settings", {})
        parts = [name for name, options in settings.items() if _holds(calibration, name, options)]
        kind = record.get("kind")
        reason = (
            "in the calibration itself"
            if cell.get("model_sha256") in known
            else f"not scored with {calibration.images} clean images"
            if cell.get("clean_images", calibration.images) != calibration.images
            else "of another kind"
            if kind is not None and not Kind.model_validate(kind).is_like(calibration.kind)
            else "scored by a detector with other options"
            if len(parts) < len(settings)
            else ""
        )
        if reason:
            left_out.setdefault(reason, set()).add((cell["data"], cell["model"]))
        if not reason or (parts and "options" in reason):
            kept.append(_of_parts(record, parts) if settings else record)
    return kept, {reason: len(models) for reason, models in left_out.items()}


def _holds(calibration: CalibrationSet, name: str, options: Mapping[str, Any]) -> bool:
    """Whether a file says nothing of a detector, which then has no column, or was made with its options."""
    noted = calibration.options.get(name)
    return noted is None or _whole(name, noted) == _whole(name, options)


def _of_parts(record: Record, parts: Sequence[str]) -> Record:
    cell = record["cell"]
    kept = {"cell": cell | {"settings": {name: cell["settings"][name] for name in parts}}}
    if "detections" in record:
        kept["detections"] = {name: record["detections"][name] for name in parts}
    return record | kept


def halves(models: Sequence[Scored]) -> tuple[list[Scored], list[Scored]]:
    """Split clean models in two by a hash of their names, which knows neither scores nor recipes."""
    ordered = sorted(models, key=lambda model: hashlib.sha256(model.name.encode()).hexdigest())
    return ordered[::2], ordered[1::2]


def columns(
    models: Sequence[Scored], alpha: float = 0.05, calibration: CalibrationSet | None = None
) -> list[Column]:
    """Calibrate each detector, and apply it to the models that it was not calibrated on.

    Args:
        models: All models, of any data sets.
        alpha: False-positive rate asked for; where the clean models cannot guarantee it, the smallest rate
            that they can.
        calibration: Where thresholds come from, for the detectors that it has, with whatever options it was
            made (see ``comparable``); all clean models are then tested. The others are judged by their fixed
            thresholds, which guarantee nothing. Without a file, one half of the clean models of each data
            set.
    """
    found = []
    for data in dict.fromkeys(model.data for model in models):
        here = [model for model in models if model.data == data]
        clean = [model for model in here if model.is_clean]
        known, rest = ([], clean) if calibration else halves(clean)
        tested = [*rest, *(model for model in here if not model.is_clean)]
        compared = DECIDING if calibration is None else tuple(filter(calibration.has, DECIDING))
        for detector, parts in _columns_of(here, compared).items():
            if calibration is None:
                rows = [_scores(model, parts) for model in known if set(parts) <= set(model.scores)]
            else:
                rows = [
                    {part: row[_detector(part)] for part in parts}
                    for row in calibration.rows([_detector(part) for part in parts])
                ]
            if rows or calibration is None:
                found.append(_column(detector, parts, data, rows, tested, alpha))
            elif any(detector in model.fixed for model in tested):
                found.append(_fixed_column(detector, data, tested))
    return found


def _columns_of(models: Sequence[Scored], deciding: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return each column's name with the detectors behind it; those of a scan have the same options."""
    asked: dict[str, tuple[str, ...]] = {name: (name,) for model in models for name in model.scores}
    for label in list(asked):
        given = label.removeprefix(REQUIRED[0])
        parts = tuple(f"{name}{given}" for name in deciding if f"{name}{given}" in asked)
        if _detector(label) == REQUIRED[0] and {_detector(part) for part in parts} >= set(REQUIRED):
            asked[f"{JOINT}{given}"] = parts
    return asked


def _column(
    detector: str,
    parts: Sequence[str],
    data: str,
    rows: Sequence[Mapping[str, float]],
    tested: Sequence[Scored],
    alpha: float,
) -> Column:
    asked = [model for model in tested if set(parts) <= set(model.scores)]
    rate = max(alpha, 1 / (len(rows) + 1))
    times = [
        model.seconds.get(detector, sum(model.seconds.get(part, 0.0) for part in parts)) for model in asked
    ]
    return Column(
        detector=detector,
        data=data,
        rate=rate,
        calibrated_on=len(rows),
        outcomes=tuple(_outcome(model, parts, rows, rate) for model in asked),
        seconds=statistics.median(times) if times else math.nan,
    )


def _fixed_column(detector: str, data: str, tested: Sequence[Scored]) -> Column:
    """Judge by the threshold that a detector has without clean models."""
    asked = [model for model in tested if detector in model.scores]
    outcomes = []
    for model in asked:
        score, threshold = model.scores[detector], model.fixed.get(detector, math.inf)
        verdict: Verdict = (
            "inconclusive" if score is None else "backdoored" if score >= threshold else "clean"
        )
        outcomes.append(
            Outcome(
                model,
                verdict,
                statistic=-math.inf if score is None else score,
                target=model.targets.get(detector),
                p_value=math.nan,
            )
        )
    seconds = statistics.median(model.seconds.get(detector, 0.0) for model in asked)
    return Column(detector, data, math.nan, 0, tuple(outcomes), seconds)


def _scores(model: Scored, parts: Sequence[str]) -> dict[str, float]:
    """Return what detectors that were asked said; an abstention is the lowest score, see ``detect.joint``."""
    found = {part: model.scores[part] for part in parts}
    return {part: -math.inf if score is None else score for part, score in found.items()}


def _outcome(
    model: Scored, parts: Sequence[str], calibration: Sequence[Mapping[str, float]], rate: float
) -> Outcome:
    scores = _scores(model, parts)
    if not calibration:
        return Outcome(model, "inconclusive", statistic=-math.inf, target=None, p_value=math.nan)
    joint = combine(calibration, scores, rate)
    leading = max(joint.scaled, key=lambda part: joint.scaled[part])
    needed = [part for part in parts if len(parts) == 1 or _detector(part) in REQUIRED]
    complete = all(scores[part] > -math.inf for part in needed)
    return Outcome(
        model,
        _verdict(joint, complete=complete, alpha=rate, alone=len(parts) == 1),
        statistic=joint.scaled[leading] if len(parts) > 1 else scores[parts[0]],
        target=model.targets.get(leading),
        p_value=joint.p_value,
    )


def _verdict(joint: Joint, *, complete: bool, alpha: float, alone: bool) -> Verdict:
    ground = ground_of(joint, complete=complete, alpha=alpha)
    # A single detector has a threshold and no rule for what is close to it.
    return "clean" if alone and ground == "close" else VERDICTS[ground]


def area_under_curve(
    clean: Sequence[float], infected: Sequence[float], *, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Return the area under the ROC curve and its 95 % interval by bootstrap over models.

    Args:
        clean: Scores of clean models.
        infected: Scores of infected ones.
        resamples: Of the bootstrap, clean and infected models apart.

    Returns:
        Area, low and high; NaN without models of either sort.
    """
    if not clean or not infected:
        return math.nan, math.nan, math.nan
    low, high = torch.tensor(clean, dtype=torch.float64), torch.tensor(infected, dtype=torch.float64)
    wins = (high.view(-1, 1) > low).double() + 0.5 * (high.view(-1, 1) == low).double()
    generator = rng.generator(0)
    drawn_high = torch.randint(len(high), (resamples, len(high)), generator=generator)
    drawn_low = torch.randint(len(low), (resamples, len(low)), generator=generator)
    areas = torch.stack([wins[i][:, j].mean() for i, j in zip(drawn_high, drawn_low, strict=True)])
    bounds = areas.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(wins.mean()), float(bounds[0]), float(bounds[1])


def summary_table(found: Sequence[Column]) -> str:
    """Return a row for each data set, detector and selection of infected models that has any.

    Inconclusive infected models are misses in DR, inconclusive clean ones no false positives in FPR; both are
    counted on their own as well.
    """
    head = [
        "data", "detector", "attacks", "DR", "FPR", "AUC", "right target", "inconclusive, infected",
        "inconclusive, clean", "s", "threshold from",
    ]  # fmt: skip
    rows = []
    for column in found:
        clean = column.of(clean=True)
        for name, chosen in SELECTIONS.items():
            infected = [outcome for outcome in column.of(clean=False) if chosen(outcome.model)]
            if infected or name == "all":
                rows.append([column.data, column.detector, name, *_summary(column, infected, clean)])
    return markdown(head, rows)


def _summary(column: Column, infected: Sequence[Outcome], clean: Sequence[Outcome]) -> list[str]:
    named = [o for o in infected if o.flagged and o.model.target is not None]
    area = area_under_curve([o.statistic for o in clean], [o.statistic for o in infected])
    return [
        shown(_rate(infected, lambda o: o.flagged)),
        shown(_rate(clean, lambda o: o.flagged)),
        "-" if math.isnan(area[0]) else f"{area[0]:.3f} [{area[1]:.3f}, {area[2]:.3f}]",
        shown(_rate(named, lambda o: o.target == o.model.target)),
        counted(_rate(infected, lambda o: o.inconclusive)),
        counted(_rate(clean, lambda o: o.inconclusive)),
        f"{column.seconds:.1f}",
        "fixed" if math.isnan(column.rate) else f"{column.calibrated_on} clean, {column.rate:.1%}",
    ]


def attack_table(found: Sequence[Column], data: str) -> str:
    """Return the models of each group that each detector flags on one data set, and its AUC on them."""
    here = [column for column in found if column.data == data]
    outcomes = [outcome for column in here for outcome in column.outcomes]
    groups = sorted({outcome.model.group for outcome in outcomes if not outcome.model.is_clean})
    rows = [
        [
            group,
            *(_caught(column, group) for column in here),
        ]
        for group in groups
    ]
    clean = ["clean", *(counted(_rate(column.of(clean=True), lambda o: o.flagged)) for column in here)]
    return markdown([data, *(column.detector for column in here)], [*rows, clean])


def model_table(models: Sequence[Scored], found: Sequence[Column], data: str) -> str:
    """Return for each model of one data set the scan's verdict, and every detector's score and class.

    Models that thresholds come from have no verdict. A class is right or wrong where the attack has one
    target; the score of ``mnp`` is 1 minus the ratio of Eq. 8.
    """
    here = [model for model in models if model.data == data]
    detectors = list(dict.fromkeys(name for model in here for name in model.scores))
    verdicts = {
        outcome.model.name: [outcome.verdict, f"{outcome.p_value:.3f}"]
        for column in found
        if (column.detector, column.data) == (JOINT, data)
        for outcome in column.outcomes
    }
    rows = [
        [model.name, *verdicts.get(model.name, ["-", "-"]), *(_said(model, name) for name in detectors)]
        for model in sorted(here, key=lambda each: (each.is_clean, each.name))
    ]
    return markdown([data, "verdict", "p", *detectors], rows)


def _said(model: Scored, detector: str) -> str:
    if detector not in model.scores:
        return "-"
    score, suspected = model.scores[detector], model.targets.get(detector)
    if score is None:
        return "abstained"
    if suspected is None or model.target is None:
        return f"{score:.2f}"
    return f"{score:.2f} ({'right' if suspected == model.target else 'wrong'})"


def _caught(column: Column, group: str) -> str:
    infected, clean = column.of(clean=False, group=group), column.of(clean=True)
    area, _, _ = area_under_curve([o.statistic for o in clean], [o.statistic for o in infected], resamples=1)
    rate = counted(_rate(infected, lambda o: o.flagged))
    return rate if math.isnan(area) else f"{rate}, AUC {area:.2f}"


def ratio_table(models: Sequence[Scored]) -> str:
    """Return the distribution of MNP's ratio (Eq. 8) on clean and on infected models."""
    rows = []
    for data in dict.fromkeys(model.data for model in models):
        for name, clean in (("clean", True), ("infected", False)):
            scores = [m.scores.get("mnp") for m in models if m.data == data and m.is_clean == clean]
            ratios = torch.tensor([1 - s for s in scores if s is not None], dtype=torch.float64)
            if len(ratios):
                cuts = ratios.quantile(torch.tensor(_QUANTILES, dtype=torch.float64)).tolist()
                below = Rate.of(ratios <= 0.2)
                rows.append([data, name, str(len(ratios)), *(f"{cut:.2f}" for cut in cuts), shown(below)])
    cuts_head = [f"{quantile:.0%}" for quantile in _QUANTILES]
    return markdown(["data", "models", "n", *cuts_head, "ratio <= 0.2"], rows)


def shown(rate: Rate) -> str:
    """Return a rate in per cent with its counts and Wilson interval."""
    if not rate.n:
        return "-"
    low, high = rate.interval
    return f"{percent(rate.value)} ({rate.successes}/{rate.n}) [{percent(low)}, {percent(high)}]"


def counted(rate: Rate) -> str:
    """Return a rate as counts with its Wilson interval in per cent."""
    if not rate.n:
        return "-"
    low, high = rate.interval
    return f"{rate.successes}/{rate.n} [{percent(low)}, {percent(high)}]"


def _rate(outcomes: Sequence[Outcome], counts: Callable[[Outcome], bool]) -> Rate:
    return Rate(sum(counts(outcome) for outcome in outcomes), len(outcomes))
