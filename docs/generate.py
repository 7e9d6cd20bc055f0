"""Write purifiers.md, detectors.md and graphs.md of docs/reference from the docstrings.

So they say what the code does.

    python docs/generate.py

A test compares the committed pages with what this makes.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from unbackdoor import catalogue
from unbackdoor.detect.registry import MODEL_DETECTORS, SAMPLE_DETECTORS
from unbackdoor.graph.attacks import ATTACKS as GRAPH_ATTACKS
from unbackdoor.graph.detect import RIGBD
from unbackdoor.graph.purify import PURIFIERS as GRAPH_PURIFIERS
from unbackdoor.purify.registry import PURIFIERS

PAGE = Path(__file__).parent / "reference" / "purifiers.md"

HEAD = """# Purifiers

Made from the docstrings by `python docs/generate.py`; change those. `unbackdoor methods NAME` prints the same in a
terminal, with the options of all parts.

Each purifier gets the same: a model, clean images with labels, a generator. None sees a trigger, a poisoned image
or the attack success rate, and the import rules that `make lint` checks keep it so. `unbackdoor purify --method
NAME` runs one, `--paper` starts from the settings of its paper, `--set option=value` reaches every option, those of
parts as `recipe.epochs`.

**How much is pruned.** Methods that rank filters share one rule, `selection.amount=guarded`: walk down the ranking
and skip each filter whose removal costs more on clean images than the guard allows
([why](../adr/0004-guarded-walk.md)). So a comparison compares rankings and not tuning, with
two exceptions: MNP's guard also asks each removal for a benefit where MNP exposed the backdoor (and what is left may relearn), and TSBD chooses a share
of the filters by the accuracy of the whole defence on images that it keeps for that. `own` is each paper's own rule,
`count` and `fraction` take a number.

**What removing a filter means** is `prune_mode`: `silence` clears the filter and its norm, `norm` the norm's scale
and shift, `norm_scale` its scale alone, `weight` the filter's weights alone. The default is what the method's
authors do.

**Any network.** Filters are found by watching one forward pass; no method knows an architecture. What it does
without batch norms stands in its text: it works, it takes another reading that is named, or it refuses in words.

**Cost.** Every purification is metered from outside: image passes, seconds, peak memory (`passes` in the JSON
document).
"""


DETECTORS_PAGE = PAGE.with_name("detectors.md")

DETECTORS_HEAD = """# Detectors

Made from the docstrings and from `docs/generate.py` by `python docs/generate.py`; change those. `unbackdoor methods NAME`
prints the same in a terminal, with the options of all parts.

None sees a trigger, a poisoned image that is marked as one, or the attack success rate, and the import rules that `make lint`
checks keep it so. Scores are higher for what is more suspicious. A detector that cannot tell abstains, and says why.

**In a scan.** [`unbackdoor scan`](../how-to/scan-a-model.md) runs `collapse`, `recovery`, `mnp`, `trigger-search` and `head-weights`.
`collapse`, `recovery` and `trigger-search` decide, compared jointly with clean models ([why](../adr/0009-two-kinds-of-evidence-one-p-value.md)). Other
detectors of models are run and shown by `--detector NAME`.

**Thresholds.** `calibration` takes the scores of clean models; a score is then flagged if its conformal p-value is at most
`alpha`. In a scan they come from a file of `unbackdoor calibrate`. Without, a fixed threshold holds, each detector's own, whose
false-positive rate is not known.

**What was measured.** Detectors of models are what `benchmarks/detection_trial.py` compares. Detectors of training sets and inputs are measured by
the benchmark: `ac`, `sc` and `strip` by suites `smoke` and `table4`; `strip`, `rnp-sample`, `scale-up`, `ibd-psc` and `sc-an` on the paper's ten
attacks by `benchmarks/inputs.toml`, `screening` by `benchmarks/screening.py`. Which were run says RESULTS.md.
"""

SAMPLES_HEAD = """## Detectors of training sets and inputs

They score samples: rows of a suspect training set, or inputs of a model in use. [`unbackdoor screen`](../how-to/screen-inputs.md) asks them, and the
[benchmark](suites.md): a scan of a downloaded model has neither.

Those of training sets (AC, SC, SCAn) also speak on the model, by the rule in their text: each class gets one statistic, and
the most suspicious class gives the score. Detectors of inputs have no such rule. The benchmark, which alone knows what is
triggered, counts the backdoor as found if at least half of the triggered test images score above what one clean one in a
hundred exceeds.
"""

FIXED = {
    "mnp": "1 - `delta`",
    "rnp_label": "0.11, the source's variance of 0.01 at ten classes",
    "mm_bd": "-log10 of `alpha`, the source's p-value, or what `null` makes of it",
}
"""Thresholds without a calibration of detectors that have no option of that name."""


GRAPHS_PAGE = PAGE.with_name("graphs.md")

GRAPHS_HEAD = """# Graphs

Made from the docstrings and from `docs/generate.py` by `python docs/generate.py`; change those.

Node classification under subgraph triggers, and the defence RIGBD ([how to](../how-to/defend-a-graph.md)). Needs the extra
`graph` (PyTorch Geometric). Images and graphs share rates, stored benchmarks and reports, nothing else.

**Who gets what.** A graph is divided at random: 20 % of its nodes have a label that the defender knows, 20 % are unseen (half
of them test nodes, half victims), the rest are in the training graph without a label. The attacker hangs a trigger, a few new
nodes, on some nodes without a label and gives them the target's label. The defender gets this graph and nothing else: no clean nodes, no
trigger, no target class. Import rules keep it so.

**What is measured.** CA: accuracy on test nodes in the whole graph. ASR and RA: share of the victims of other classes that go to the
target, or keep their class, when all of them get their trigger at once. Recall and precision of flagged nodes; a run that flags
none has no precision, and where a mean is over fewer runs than there are, tables say over how many.

**Data.** `cora-like`, `citeseer-like`, `pubmed-like` and `tiny` are made up (a degree-corrected block model with bags of words;
`cora-like:0.5` has half the nodes); Planetoid files are read where you have them.

## What to expect

The numbers are in RESULTS.md of the project, in the section on graphs. In short: on Cora RIGBD does what its paper says, but for one
learned trigger in five, which escaped. On made-up graphs of 1,000 to 1,600 nodes with 12 to 20 poisoned ones it misses many attacks: the
fewer the poisoned nodes and the larger the classes, the less the top of a ranking stands out. No clean graph was flagged with the
default cut; with `detection.cut=likelihood`, which misses less, some were.

One gap is in the method: a network without self-loops hears of a neighbour only through that neighbour's neighbours, so the features
of a new node that is joined to its victim alone do not reach it.
"""


def graphs_page() -> str:
    """Return the whole page on graphs."""
    parts: dict[str, Any] = {}
    kinds = (
        ("Attacks", "graph attack", GRAPH_ATTACKS),
        ("Detection", "graph detector", {RIGBD.name: RIGBD}),
        ("Training on a suspect graph", "graph purifier", GRAPH_PURIFIERS),
    )
    sections = []
    for heading, kind, known in kinds:
        sections += [f"## {heading}", ""]
        sections += [_section(cls, parts, kind=kind, level="###") for cls in known.values()]
    described = [_part(name, parts[name]) for name in sorted(parts)]
    return "\n".join([GRAPHS_HEAD, *sections, "## Parts", "", *described])


def detectors_page() -> str:
    """Return the whole page on detectors."""
    parts: dict[str, Any] = {}
    sections = [DETECTORS_HEAD, "## Detectors of models", ""]
    for name, cls in MODEL_DETECTORS.items():
        fixed = f"`threshold`, {cls().threshold:g}" if hasattr(cls(), "threshold") else FIXED[name]
        rule = f"**Threshold without a calibration:** {fixed}."
        sections.append(_section(cls, parts, kind="model detector", level="###", rule=rule))
    sections.append(SAMPLES_HEAD)
    for cls in SAMPLE_DETECTORS.values():
        rule = "**Threshold:** the caller's."
        if hasattr(cls, "judge"):
            verdict = cls().verdict
            score = {"largest": "statistic", "index": "robust deviations"}[verdict.score]
            rule = (
                f"**Threshold of the verdict on the model:** {verdict.threshold:g}, on the {score} of the most "
                "suspicious class."
            )
        sections.append(_section(cls, parts, kind="sample detector", level="###", rule=rule))
    described = [_part(name, parts[name]) for name in sorted(parts)]
    return "\n".join([*sections, "## Parts", "", *described])


def page() -> str:
    """Return the whole page on purifiers."""
    parts: dict[str, Any] = {}
    sections = [_section(cls, parts) for cls in PURIFIERS.values()]
    described = [_part(name, parts[name]) for name in sorted(parts)]
    return "\n".join([HEAD, *sections, "## Parts", "", *described])


def _section(
    cls: type[Any], parts: dict[str, Any], *, kind: str = "purifier", level: str = "##", rule: str = ""
) -> str:
    entry = catalogue.entry(kind, cls)
    lines = [f"{level} {entry.title} (`{entry.name}`)", "", f"*{entry.source}.* Needs {entry.needs}.", ""]
    text = [_markdown(catalogue.description(cls)), "", *([rule, ""] if rule else [])]
    return "\n".join([*lines, *text, *_table(cls(), parts), ""])


def _part(name: str, cls: type[Any]) -> str:
    summary = _markdown(catalogue.description(cls).split("\n\n")[0])
    # Parts without defaults, such as a verdict, are described where they stand.
    table = _table(cls(), {}) if all(_has_default(field) for field in fields(cls)) else []
    return "\n".join([f"### {name}", "", summary, "", *table, ""])


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _table(method: Any, parts: dict[str, Any]) -> list[str]:  # noqa: ANN401 - any dataclass
    """Return the rows of a method's own options; its parts are collected in ``parts`` and linked."""
    texts = catalogue.argument_texts(type(method))
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for field in fields(method):
        value = getattr(method, field.name)
        default = f"`{catalogue.shown(value)}`"
        if is_dataclass(value) and not isinstance(value, type):
            name = type(value).__name__
            parts[name] = type(value)
            default = f"[{name}](#{name.lower()}){_differences(value)}"
            _table(value, parts)
        rows.append(f"| `{field.name}` | {default} | {_cell(texts.get(field.name, ''))} |")
    return rows


def _differences(part: Any) -> str:  # noqa: ANN401 - any dataclass
    usual = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(part)}
    names = [name for name, value in usual.items() if getattr(part, name) != value]
    values = ", ".join(f"{name} {catalogue.shown(getattr(part, name))}" for name in names)
    return f" with {values}" if values else ""


def _markdown(text: str) -> str:
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def _cell(text: str) -> str:
    return _markdown(text).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
    DETECTORS_PAGE.write_text(detectors_page())
    GRAPHS_PAGE.write_text(graphs_page())
