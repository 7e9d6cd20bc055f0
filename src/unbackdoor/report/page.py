"""The report page: documents in, one self-contained HTML page out.

The page asks for nothing from outside, and its content security policy forbids it to. All that comes from
documents passes through the autoescape of the templates; only plots and the page's own script are inserted
as they are.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from unbackdoor.errors import InvalidInputError
from unbackdoor.report import plots
from unbackdoor.report.documents import (
    Document,
    EvaluateDocument,
    PurifyDocument,
    Rate,
    ScanDocument,
    png_text,
)

MAX_EVIDENCE_CHARACTERS = 1500
"""Longer values of a detector's evidence are cut; the JSON document has them in full."""

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

NARROW_SPACE = "\N{NARROW NO-BREAK SPACE}"
MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class Section:
    """A document with the plots that belong to it; ``key`` makes the ids of its elements unique."""

    document: Document
    key: str
    plots: Mapping[str, Markup]


@dataclass(frozen=True)
class EvidenceRow:
    """One entry of a detector's evidence, as text or as the base64 text of a PNG image."""

    name: str
    text: str = ""
    image: str = ""


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
    return environment.get_template("page.html").render(
        title=title,
        documents=documents,
        scans=[
            Section(document, f"scan{index}", _scan_plots(document, f"scan{index}"))
            for index, document in enumerate(documents)
            if isinstance(document, ScanDocument)
        ],
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


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as a percentage, such as ``94.1 %``."""
    return MISSING if value is None else f"{100 * value:.{digits}f}{NARROW_SPACE}%"


def interval(rate: Rate) -> str:
    """Return the 95 % interval of ``rate`` in percent and the number of images behind it."""
    return f"{100 * rate.low:.1f}{MISSING}{100 * rate.high:.1f}{NARROW_SPACE}%, n = {rate.n:,}"


def number(value: float | None) -> str:
    """Return ``value`` to three significant digits; integers up to a million in full."""
    if value is None:
        return MISSING
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}", 1 if value < 0 else 0)


def chance(value: float | None) -> str:
    """Return a p-value in words of three digits at most."""
    if value is None:
        return "not calibrated"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Return a time in the largest two units that matter."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def evidence_rows(evidence: Mapping[str, Any]) -> list[EvidenceRow]:
    """Return what a detector found as rows; the values of keys that end in ``_png`` as images."""
    rows = []
    for key, value in evidence.items():
        name = key.replace("_", " ").strip()
        if key.endswith("_png") and _is_png(value):
            rows.append(EvidenceRow(name.removesuffix(" png"), image=value))
        else:
            rows.append(EvidenceRow(name, text=_value_text(value)))
    return rows


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
        "evidence_rows": evidence_rows,
        "value_text": _value_text,
        "points": _points,
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


def _is_png(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(png_text(value))
    except ValueError:
        return False


def _value_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, int | float):
        return number(value)
    if isinstance(value, str):
        return _cut(value)
    if isinstance(value, list | tuple) and all(
        isinstance(entry, int | float | str | None) for entry in value
    ):
        return _cut(", ".join(_value_text(entry) for entry in value)) if value else "none"
    text = json.dumps(value, ensure_ascii=False, default=list)
    # Three digits are enough for people, and seventeen are unreadable.
    return _cut(re.sub(r"-?\d+\.\d{4,}(?:e-?\d+)?", lambda match: f"{float(match[0]):.3g}", text))


def _cut(text: str) -> str:
    if len(text) <= MAX_EVIDENCE_CHARACTERS:
        return text
    return f"{text[:MAX_EVIDENCE_CHARACTERS]}… ({len(text):,} characters in all)"
