"""The page of a benchmark run: tables, figures, every question with its answer, in one HTML file.

Like the report page it asks for nothing from outside and forbids itself to. All is there without scripts but
for sorting, filters and the details of single answers, which are drawn from data in the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import unbackdoor
from unbackdoor.catalogue import dashed
from unbackdoor.report.figures import Drawing
from unbackdoor.report.layouts.suites import figures_of, tables_of
from unbackdoor.report.run import Answer, Run
from unbackdoor.report.tables import AVERAGE, Entry, Table, comma_separated, latex, markdown, shown

STATES = ("ok", "refused", "failed", "missing")
CIRCUMSTANCES = ("created", "unbackdoor", "git", "torch", "python", "device", "carried_over")
"""What of a record says under which it came about."""

OLDER_LONG = (
    "Asked with defaults of an earlier version: the command below asks with today's. All options of this "
    "answer stand at the end."
)

LONGEST_TEXT = 4000
"""Longer messages are cut in the page; the records have them in full."""


@dataclass(frozen=True)
class Written:
    """What was written of a run.

    Args:
        page: The HTML file.
        tables: The tables, in the page's order.
        files: All other files.
    """

    page: Path
    tables: tuple[Table, ...]
    files: tuple[Path, ...]


def write_run(run: Run, out: Path) -> Written:
    """Write tables (Markdown, LaTeX, CSV), figures (SVG, PNG) and ``index.html`` of a run into ``out``.

    Raises:
        MissingDependencyError: If there is something to draw and matplotlib is absent.
    """
    tables, figures = tables_of(run), figures_of(run)
    files: dict[Path, bytes] = {}
    for table in tables:
        for suffix, write in (("md", markdown), ("tex", latex), ("csv", comma_separated)):
            files[out / "tables" / f"{table.name}.{suffix}"] = write(table).encode()
    for figure in figures:
        files[out / "figures" / f"{figure.name}.svg"] = figure.svg().encode()
        files[out / "figures" / f"{figure.name}.png"] = figure.png()
    page = out / "index.html"
    for path, content in {**files, page: render(run, tables, figures).encode()}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return Written(page, tuple(tables), tuple(files))


def render(run: Run, tables: Sequence[Table], figures: Sequence[Drawing]) -> str:
    """Return the page."""
    environment = Environment(
        loader=PackageLoader("unbackdoor.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["shown"] = shown
    environment.globals["averages"] = (Entry(text=AVERAGE),)
    environment.filters["sort_value"] = _sort_value
    script = environment.get_template("bench.js").render()
    return environment.get_template("bench.html").render(
        run=run,
        plan=run.plan,
        counts={state: run.count(state) for state in STATES},
        tables=tables,
        figures=[(figure, Markup(figure.inline())) for figure in figures],  # noqa: S704 - ours, escaped
        rows=[_row(answer) for answer in run.answers],
        choices=_choices(run),
        details=Markup(_embedded({answer.key: _details(run, answer) for answer in run.answers})),  # noqa: S704
        trainings=run.trainings,
        circumstances=_circumstances(run.answers),
        version=unbackdoor.__version__,
        script=Markup(script),  # noqa: S704 - the page's own file
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _row(answer: Answer) -> dict[str, Any]:
    """Return what the list of answers shows of one; numbers are None where there are none."""
    cell = answer.cell
    rates = {
        "ca_before": answer.rate("clean_accuracy", "before"),
        "ca": answer.rate("clean_accuracy"),
        "asr_before": answer.rate("attack_success", "before"),
        "asr": answer.rate("attack_success"),
        "ra": answer.rate("robust_accuracy"),
        "score": _number(answer.value("score")),
        "seconds": _number(answer.value("cost", "seconds")),
    }
    return {
        "key": answer.key,
        "parts": answer.parts,
        "model": answer.model,
        "method": dashed(answer.method),
        "settings": answer.variant,
        "images": cell["clean_images"],
        "seed": cell["seed"],
        "status": answer.status,
        **{name: None if math.isnan(value) else value for name, value in rates.items()},
    }


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _choices(run: Run) -> dict[str, list[str]]:
    """Return the values that the list can be filtered by."""
    rows = [_row(answer) for answer in run.answers]
    return {
        "part": run.parts(),
        **{name: list(dict.fromkeys(row[name] for row in rows)) for name in ("model", "method", "status")},
    }


def _details(run: Run, answer: Answer) -> dict[str, Any]:
    """Return what is shown when an answer is opened."""
    record = answer.record or {}
    cost = dict(record.get("cost", {}))
    kinds = cost.pop("kinds", {})
    return {
        "title": f"{answer.model}: {answer.label}",
        "status": answer.status,
        "older": OLDER_LONG if answer.older else "",
        "problem": str(record.get("problem", ""))[:LONGEST_TEXT],
        "command": run.command_for(answer),
        "rates": {
            when: {name: _percent(rate) for name, rate in record.get(when, {}).items()}
            for when in ("before", "after", "reactivated")
            if record.get(when)
        },
        "found": {
            name: record[name]
            for name in ("score", "threshold", "threshold_source", "flagged", "target_class", "true_target",
                         "undetermined", "kind", "filters_removed", "clean_loss", "backdoor_loss")
            if record.get(name) not in (None, "")
        },
        "set": dict(answer.cell.get("options", {})),
        "settings": dict(answer.cell.get("settings", {})),
        "notes": _flat(record.get("notes", {})),
        "cost": {**cost, **{f"images {name}": value for name, value in kinds.items()}},
        "trained": _flat(record.get("trained", {})),
        "log": list(record.get("log", [])),
        "series": record.get("series", {}),
        "oracle": _oracle(record.get("oracle_curve", [])),
        "circumstances": {name: record[name] for name in CIRCUMSTANCES if name in record},
        "cell": {name: value for name, value in answer.cell.items() if name not in ("settings", "options")},
    }  # fmt: skip


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested values as one list of names and values, since the page shows no JSON."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}: ")
        else:
            found[before + name] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return found


def _oracle(curve: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Return CA and ASR in per cent over the number of pruned filters."""
    counts = ", ".join(str(step["removed"]) for step in curve)
    return {
        f"{title} (%) without {counts} filters": [
            None if step[name]["value"] is None else round(100 * step[name]["value"], 2) for step in curve
        ]
        for title, name in (("CA", "clean_accuracy"), ("ASR", "attack_success"))
        if curve
    }


def _percent(rate: dict[str, Any]) -> str:
    if rate.get("value") is None:
        return "no images"
    return (
        f"{100 * rate['value']:.2f} % (95 %: {100 * rate['low']:.1f} to {100 * rate['high']:.1f}, "
        f"{rate['successes']:,} of {rate['n']:,})"
    )


def _circumstances(answers: Sequence[Answer]) -> dict[str, list[str]]:
    """Return the versions and devices that records were made with."""
    names = CIRCUMSTANCES[1:]
    found = {name: sorted({str(a.value(name)) for a in answers if a.value(name)}) for name in names}
    return {name: values for name, values in found.items() if values}


def _embedded(content: object) -> str:
    """Return JSON that cannot end the element it stands in."""
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _sort_value(values: Sequence[float], parts: Sequence[str]) -> str:
    """Return the number that a cell is sorted by: its ASR, or the last of its parts where it has none."""
    known = [value for value in values if not math.isnan(value)]
    if len(values) == len(parts) and "ASR" in parts and not math.isnan(rate := values[parts.index("ASR")]):
        return f"{rate:.6g}"
    return f"{known[-1]:.6g}" if known else ""
