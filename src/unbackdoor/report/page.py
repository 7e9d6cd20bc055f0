"""The report page: documents in, one self-contained HTML page out.

The page asks for nothing from outside, and its content security policy forbids it to. All that comes from
documents passes through the autoescape of the templates; only plots and the page's own script are inserted
as they are.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from unbackdoor.errors import InvalidInputError
from unbackdoor.report import plots, walk
from unbackdoor.report.documents import (
    Document,
    EvaluateDocument,
    PurifyDocument,
    Rate,
    ScanDocument,
)
from unbackdoor.report.values import MISSING, chance, duration, entries, interval, number, percent

MAX_ROWS = 2000
"""Longer tables are cut; the JSON document has them in full."""

METRICS = (
    ("clean_accuracy", "Clean accuracy", "up"),
    ("attack_success", "Attack success", "down"),
    ("robust_accuracy", "Robust accuracy", "up"),
)
"""Key, title, and the direction that is better."""

WOKEN = (
    ("retuned_success", "Attack success after retuning", "down"),
    ("queried_success", "Attack success with a universal change", "down"),
    ("queried_without_trigger", "The same change without the trigger", "down"),
)
"""Shown where some evaluation tried to wake the backdoor."""

LEFT_OUT = {"trigger_search": "trigger inversion"}
"""Detectors that a scan can leave out, in words."""


@dataclass(frozen=True)
class Section:
    """A document with the plots that belong to it; ``key`` makes the ids of its elements unique."""

    document: Document
    key: str
    plots: Mapping[str, Markup]

    @property
    def measured(self) -> bool:
        """Whether a scan got as far as to measure anything; where images are of no use, it does not."""
        document = self.document
        shown = isinstance(document, ScanDocument) and (
            document.detectors or document.trigger or document.filters
        )
        return bool(shown or self.plots)


@dataclass(frozen=True)
class Deciding:
    """How many of the detectors that decide called the model backdoored.

    Args:
        fired: How many.
        total: Of how many, those included that did not run.
        left_out: What those look for that did not run.
    """

    fired: int
    total: int
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Change:
    """The difference between two evaluations, in percentage points per metric."""

    attack: str
    points: Mapping[str, float | None] = field(default_factory=dict)


def render(documents: Sequence[Document], *, title: str) -> str:
    """Return one self-contained HTML page on ``documents``.

    Args:
        documents: What was found, in the order in which it is to be shown.
        title: Heading and title of the page.

    Raises:
        InvalidInputError: If there are no documents.
        MissingDependencyError: If there is something to plot and matplotlib is absent.
    """
    if not documents:
        raise InvalidInputError("a report needs at least one document, got 0; give files written by --json.")
    environment = _environment()
    script = environment.get_template("page.js").render()
    evaluations = [document for document in documents if isinstance(document, EvaluateDocument)]
    purifications = [
        Section(document, f"purify{index}", _purify_plots(document, f"purify{index}"))
        for index, document in enumerate(documents)
        if isinstance(document, PurifyDocument)
    ]
    scans = [
        Section(document, f"scan{index}", _scan_plots(document, f"scan{index}"))
        for index, document in enumerate(documents)
        if isinstance(document, ScanDocument)
    ]
    return environment.get_template("page.html").render(
        title=title,
        documents=documents,
        scans=scans,
        measured=any(section.measured for section in scans),
        purifications=purifications,
        # A graph network has no filters.
        pruned=[section for section in purifications if getattr(section.document, "filters_total", 0)],
        evaluations=evaluations,
        change=_change(evaluations),
        metrics=_metrics_of(evaluations),
        limits=_distinct(limit for document in documents for limit in getattr(document, "limits", ())),
        script=Markup(script),  # noqa: S704 - the page's own file
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def deciding(document: ScanDocument) -> Deciding:
    """Count the detectors that a verdict follows from."""
    rows = [row for row in document.detectors if row.decides]
    options = document.settings.get("scan")
    asked = options.get("deciding") if isinstance(options, Mapping) else None
    names = [name for name in asked if isinstance(name, str)] if isinstance(asked, list) else []
    there = {row.name for row in document.detectors}
    absent = [name for name in names if name not in there]
    return Deciding(
        fired=sum(row.verdict == "backdoored" for row in rows),
        total=len(rows) + len(absent),
        left_out=tuple(LEFT_OUT.get(name, name.replace("_", " ")) for name in absent),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("unbackdoor.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "interval": interval,
        "number": number,
        "chance": chance,
        "duration": duration,
        "entries": entries,
        "points": _points,
        "deciding": deciding,
        "walk_caption": walk.caption,
        "walk_reasons": walk.reasons,
        "rows": lambda values: values[:MAX_ROWS],
    }
    return environment


def _scan_plots(document: ScanDocument, key: str) -> dict[str, Markup]:
    found: dict[str, str] = {}
    if document.scatter is not None:
        found["scatter_before"], found["scatter_after"] = plots.scatter(document.scatter, key=key)
    suppression = document.suppression
    if suppression is not None and suppression.class_share:
        names = document.data.class_names
        found["class_share"] = plots.class_share(suppression, names, document.target_class, key=key)
    if suppression is not None and suppression.shift_share:
        found["shift_share"] = plots.shift_share(suppression, key=key)
    if suppression is not None and suppression.accuracy:
        found["accuracy_course"] = plots.accuracy_course(suppression, key=key)
    return _trusted(found)


def _purify_plots(document: PurifyDocument, key: str) -> dict[str, Markup]:
    found: dict[str, str] = {}
    if any(row.removed for row in document.layers):
        found["removed_by_layer"] = plots.removed_by_layer(document.layers, key=key)
    if document.walk:
        found["walk"] = plots.walk(document.walk, key=key)
    return _trusted(found)


def _trusted(svgs: Mapping[str, str]) -> dict[str, Markup]:
    # matplotlib escapes the names it is given, and _inline those it adds.
    return {name: Markup(svg) for name, svg in svgs.items()}  # noqa: S704


def _change(evaluations: Sequence[EvaluateDocument]) -> Change | None:
    if len(evaluations) != 2 or evaluations[0].attack != evaluations[1].attack:
        return None
    before, after = (document.metrics for document in evaluations)
    return Change(
        attack=evaluations[0].attack or "",
        points={key: _difference(before.get(key), after.get(key)) for key, _, _ in _metrics_of(evaluations)},
    )


def _metrics_of(evaluations: Sequence[EvaluateDocument]) -> tuple[tuple[str, str, str], ...]:
    woken = [row for row in WOKEN if any(row[0] in document.metrics for document in evaluations)]
    return (*METRICS, *woken)


def _difference(before: Rate | None, after: Rate | None) -> float | None:
    if before is None or after is None or before.value is None or after.value is None:
        return None
    return after.value - before.value


def _points(fraction: float | None) -> str:
    if fraction is None:
        return MISSING
    sign = "\N{MINUS SIGN}" if fraction < 0 else "+"
    return f"{sign}{abs(100 * fraction):.1f} points"


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
