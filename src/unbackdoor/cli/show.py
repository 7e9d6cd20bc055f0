"""How results look in a terminal, and where pages go."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from unbackdoor.catalogue import dashed
from unbackdoor.cli import console
from unbackdoor.errors import InvalidInputError
from unbackdoor.report import documents as doc

if TYPE_CHECKING:
    from unbackdoor.catalogue import Entry, Option
    from unbackdoor.cli.screening import ScreenDocument
    from unbackdoor.detect.calibration import CalibrationSet
    from unbackdoor.models.loading import LoadedModel

_STYLES = {"backdoored": "bold red", "clean": "bold green", "inconclusive": "bold yellow"}
_HEADLINES = {
    "backdoored": "BACKDOORED",
    "clean": "CLEAN: no evidence of a backdoor",
    "inconclusive": "INCONCLUSIVE",
}


def announce(loaded: LoadedModel) -> None:
    """Say what was loaded, and whether it ran the user's code."""
    if loaded.architecture.is_user_code:
        console.note(f"note: ran your own code, {loaded.architecture.name}, to build the network.")


def check_output(out: Path, model: Path, *, force: bool) -> None:
    """Fail before the work if the result could not be written, or would destroy something.

    Raises:
        InvalidInputError: If ``out`` is the input, exists, has no folder, or does not end in
            .safetensors, which is what is written.
    """
    if out.exists() and out.resolve() == model.resolve():
        raise InvalidInputError(f"{out} is the input model; give another file with --out.")
    if out.is_dir() or not out.parent.is_dir():
        raise InvalidInputError(f"cannot write {out}: its folder does not exist, or it is a folder itself.")
    if out.suffix != ".safetensors":
        raise InvalidInputError(f"--out must end in .safetensors, got {out}.")
    if out.exists() and not force:
        raise InvalidInputError(f"{out} exists already; choose another name or add --force.")
    _check_writable(out)


def check_folder(out: Path | None, *inputs: Path | None) -> None:
    """Fail before the work if a page could not be written, or would destroy what the work needs.

    Raises:
        InvalidInputError: If ``out`` is a folder or one of ``inputs``, or its folder does not exist.
    """
    if out is None:
        return
    if out.is_dir() or not out.parent.is_dir():
        raise InvalidInputError(f"cannot write {out}: its folder does not exist, or it is a folder itself.")
    if any(each is not None and out.resolve() == each.resolve() for each in inputs):
        raise InvalidInputError(
            f"{out} is an input of this command, or written by it already; give another file to write to."
        )
    _check_writable(out)


def _check_writable(out: Path) -> None:
    """Try to make a file beside ``out``; a folder that exists may still be closed to this user.

    Raises:
        InvalidInputError: If that fails.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=out.parent, prefix=".unbackdoor-"):
            pass
    except OSError as error:
        raise InvalidInputError(
            f"cannot write {out}: {error.strerror}; give a file in a folder that you may write to."
        ) from error


def finish(document: doc.Document, *, as_json: bool, report: Path | None, said: Collection[str] = ()) -> None:
    """Print a result, and write its page if asked for: the page may fail, the result is not lost then.

    Args:
        document: The result.
        as_json: Print the document, not words.
        report: Where the page goes, if anywhere.
        said: Warnings that were printed before the work, and are not repeated.
    """
    document = _introduced(document)
    _tell(document, as_json=as_json, said=said)
    if report is not None:
        write_page([document], report, title=title_of(document), quiet=as_json)


MOST_SHOWN = 20
"""Flagged inputs in a terminal; --json has all."""


def screened(document: ScreenDocument) -> None:
    """Print what a screening found: the verdict first, then the most suspicious inputs."""
    styles = {"triggered": "bold red", "nothing found": "bold green", "inconclusive": "bold yellow"}
    style = styles[document.verdict]
    console.results.print(f"[{style}]{document.verdict.upper()}[/]: {escape(document.reason)}.")
    if document.target_class is not None and document.verdict != "nothing found":
        words = doc.class_words(document.target_class, document.target_name)
        count = sum(each.answer == document.target_class for each in document.flagged)
        said = (
            f"The poisoned class is {words}."
            if document.false_alarms is None
            else f"The model answers {count} of these {len(document.flagged)} with {words}."
        )
        console.results.print(console.printable(said), markup=False)
    if document.flagged:
        table = Table(box=None, pad_edge=False)
        p = document.false_alarms is not None
        for name in ("input", "p" if p else "score", "the model says", *(["found by"] if p else [])):
            table.add_column(name)
        for each in document.flagged[:MOST_SHOWN]:
            number = each.p_value if p else each.score
            table.add_row(
                escape(console.printable(each.name)),
                "-" if number is None else f"{number:.2g}",
                escape(console.printable(doc.class_words(each.answer, each.answer_name))),
                *([", ".join(each.found_by)] if p else []),
            )
        console.print_table(table)
        if (more := len(document.flagged) - MOST_SHOWN) > 0:
            console.results.print(f"and {more} more; --json has all.", markup=False)
    for name in document.left_out:
        console.results.print(f"{name} cannot read this network and was left out.", markup=False)
    for limit in document.limits:
        console.results.print(f"- {limit}", markup=False)


def title_of(document: doc.Document) -> str:
    """Return the title of a document's own page: a scan's begins with the verdict."""
    if isinstance(document, doc.ScanDocument):
        return f"{document.verdict.capitalize()}: {Path(document.model.path).name}"
    return "Backdoor report"


def _tell(document: doc.Document, *, as_json: bool, said: Collection[str]) -> None:
    if as_json:
        console.print_text(document.model_dump_json(indent=1))
        return
    for warning in getattr(document, "warnings", ()):
        if warning not in said:
            console.warn(warning)
    if isinstance(document, doc.ScanDocument):
        _scan(document)
    elif isinstance(document, doc.PurifyDocument):
        _purify(document)
    else:
        _evaluate(document)


def _introduced(document: doc.Document) -> doc.Document:
    """Return a purification with the name and the source of its method for people, if it has none yet."""
    if not isinstance(document, doc.PurifyDocument) or document.method_title:
        return document
    from unbackdoor.purify.registry import PURIFIERS

    method = PURIFIERS.get(document.method.replace("-", "_"))
    if method is None:
        return document
    return document.model_copy(update={"method_title": method.title, "method_source": method.source})


def write_page(documents: Sequence[doc.Document], out: Path, *, title: str, quiet: bool = False) -> None:
    """Render the documents and write the page.

    Raises:
        InvalidInputError: If the file cannot be written.
    """
    from unbackdoor.report.page import render

    page = render([_introduced(document) for document in documents], title=title)
    doc.write_text(page, out)
    if not quiet:
        console.note(f"wrote {out} ({len(page) // 1024} KiB)")


def write_sarif(document: doc.ScanDocument, out: Path, *, quiet: bool = False) -> None:
    """Write a scan as SARIF.

    Raises:
        InvalidInputError: If the file cannot be written.
    """
    from unbackdoor.report.sarif import sarif_text

    doc.write_text(sarif_text(document), out)
    if not quiet:
        console.note(f"wrote {out}")


def calibration(found: CalibrationSet, out: Path, *, as_json: bool) -> None:
    """Print what a calibration holds and allows."""
    if as_json:
        console.print_text(found.text())
        return
    table = Table("detector", "models", "abstained", "median", "largest", box=None, pad_edge=False)
    for name in found.options:
        scored = [row[name] for row in found.rows([name])]
        scores = sorted(score for score in scored if score > -math.inf)
        if not scores:
            table.add_row(dashed(name), "0", str(len(scored)), "-", "-")
            continue
        table.add_row(
            dashed(name),
            str(len(scores)),
            str(len(scored) - len(scores)),
            f"{statistics.median(scores):.3f}",
            f"{scores[-1]:.3f}",
        )
    console.print_table(table)
    count = len(found.models)
    console.results.print(
        f"{count} clean models of one kind: {found.kind.words()}. The smallest false-positive rate that they "
        f"can guarantee is 1 / {count + 1} = {1 / (count + 1):.1%}; for 5 % it takes 19, for 1 % 99.",
        markup=False,
    )
    console.results.print(f"wrote {out}; scan with --calibration {out}", markup=False)


def card(values: Mapping[str, Any], out: Path) -> None:
    """Print what an attack's card claims, and where everything is."""
    claims(values)
    console.results.print(f"wrote {out}/: {', '.join(sorted(p.name for p in out.glob('*.*')))}", markup=False)


def claims(values: Mapping[str, Any]) -> None:
    """Print the rates of a card, the visibility of its trigger and what was scaled down."""
    metrics = {name: doc.Rate.model_validate(value) for name, value in values["metrics"].items()}
    validity = values.get("validity", {})
    for name, rate in (
        ("clean twin's accuracy", validity.get("clean_twin_accuracy")),
        ("attack success on the clean twin", validity.get("natural_floor")),
        ("ASR without rounding to 8 bits", validity.get("attack_success_float")),
        *((f"accuracy under {name}", rate) for name, rate in validity.get("decoy_accuracy", {}).items()),
    ):
        if rate:
            metrics[name] = doc.Rate.model_validate(rate)
    console.print_table(_rates(metrics))
    if "stealth" in validity:
        console.results.print(stealth(validity["stealth"]), markup=False)
    for against, key in (
        ("the attack's paper", "differs_from_paper"),
        ("the training recipe of the MNP paper", "differs_from_mnp_recipe"),
    ):
        differs = values.get(key)
        if differs:
            console.results.print(
                f"scaled down or changed against {against}: "
                + ", ".join(f"{k} {v['here']} (paper {v['paper']})" for k, v in differs.items()),
                markup=False,
            )


def doubts(values: Mapping[str, Any]) -> list[str]:
    """Warn of what makes the model of a card useless, or was not checked; return the former."""
    validity = values.get("validity", {})
    problems: list[str] = validity.get("problems", [])
    for problem in problems:
        console.warn(f"not a valid infected model: {problem}")
    if values.get("attack") is None and (guess := _guessing(values)):
        console.warn(f"of no use as a clean twin: {guess}")
        problems = [*problems, guess]
    if validity.get("unchecked"):
        console.warn(f"not checked: {', '.join(validity['unchecked'])}; give a clean model with --twin.")
    return problems


def _guessing(values: Mapping[str, Any]) -> str:
    """Say so if a clean model is no better than chance; older cards do not tell."""
    accuracy, classes = values["metrics"]["clean_accuracy"], values.get("num_classes")
    if not classes or accuracy["low"] > 1 / classes:
        return ""
    return (
        f"the clean accuracy is {accuracy['value']:.1%}, no better than guessing among {classes} classes; "
        "train for more epochs or on more images."
    )


def stealth(values: Mapping[str, Any]) -> str:
    """Return how visible a trigger is, in a line."""
    psnr = values["psnr_db"]
    return (
        f"visibility of the trigger: PSNR {'inf' if psnr is None else f'{psnr:.1f}'} dB, "
        f"SSIM {values['ssim']:.3f}, largest change of a pixel {255 * values['max_change']:.0f} of 255"
    )


_HOW = {
    "scan": "unbackdoor scan MODEL --arch ARCH --clean IMAGES --set ...",
    "attack": "unbackdoor attack NAME --data DATA --out FOLDER --set ...",
    "purifier": "unbackdoor purify MODEL --arch ARCH --clean IMAGES --out FILE --method NAME --set ...",
    "model detector": "unbackdoor scan MODEL --arch ARCH --clean IMAGES; all: from Python, score(...)",
    "sample detector": "from Python: score(model, samples, clean, generator=...)",
    "graph attack": "unbackdoor graph attack NAME --data GRAPH --out FOLDER --set ...",
    "graph detector": "unbackdoor graph scan GRAPH --set ...",
    "graph purifier": "unbackdoor graph purify GRAPH --out FILE --method NAME --set ...",
}


def method_list(entries: Sequence[Entry]) -> None:
    """Print all methods, one table a kind."""
    for kind, how in _HOW.items():
        rows = [entry for entry in entries if entry.kind == kind]
        if not rows:
            continue
        table = Table("name", "what it is", "source", "needs", box=None, pad_edge=False)
        for row in rows:
            table.add_row(row.name, row.title, row.source, row.needs)
        console.results.print(f"{kind}s: {how}", style="bold", markup=False)
        console.print_table(table)
        console.results.print()
    console.results.print("unbackdoor methods NAME shows the options of a method.", markup=False)


def method(entry: Entry, description: str, options: Sequence[Option]) -> None:
    """Print one method with its options."""
    out = console.results
    out.print(f"{entry.name} ({entry.kind}): {entry.title}", style="bold", markup=False)
    out.print(f"source: {entry.source}\nneeds: {entry.needs}\n\n{description}\n", markup=False)
    table = Table("option", "default", "type", "meaning", box=None, pad_edge=False)
    for option in options:
        table.add_row(option.path, option.default, escape(option.kind), escape(option.text))
    console.print_table(table)


def percent(value: doc.Rate) -> str:
    """Return a rate with its interval, in per cent."""
    if value.value is None:
        return "-"
    return f"{value.value:.1%} [{value.low:.1%}, {value.high:.1%}]"


def _scan(document: doc.ScanDocument) -> None:
    out = console.results
    headline = _HEADLINES[document.verdict]
    if document.target_class is not None:
        headline += f", suspected target {doc.class_words(document.target_class, document.target_name)}"
    out.print(headline, style=_STYLES[document.verdict], markup=False)
    out.print(document.reason, markup=False)
    out.print(
        f"clean accuracy {percent(document.clean_accuracy)} on {document.data.images} {document.data.unit}, "
        f"{document.seconds:.0f} s",
        markup=False,
    )
    if document.detectors:
        _opinions(document.detectors)
        for row in document.detectors:
            out.print(f"- {row.summary}", markup=False)
    if document.trigger is not None:
        out.print(f"- {recovered(document.trigger)}", markup=False)
    if document.confidence is not None:
        out.print(f"- compared with {document.confidence.description}", markup=False)
        out.print(f"- {document.confidence.guarantee}", markup=False)
    out.print(document.advice, markup=False)
    # The advice on a clean model points here; for the others these stand in the report.
    if document.verdict == "clean":
        for limit in document.limits:
            out.print(f"- {limit}", markup=False)


def _opinions(rows: Sequence[doc.DetectorRow]) -> None:
    """Print a row for each detector; where a terminal is too narrow, without what matters least, or lines."""
    for left_out in ((), ("looks at",), ("looks at", "s")):
        named = [{k: v for k, v in _opinion(row).items() if k not in left_out} for row in rows]
        table = Table(*named[0], box=None, pad_edge=False)
        for cells in named:
            table.add_row(*map(escape, cells.values()))
        if console.fits(table):
            console.print_table(table)
            return
    for row in rows:
        cells = _opinion(row)
        name, kind, says, seconds = (cells.pop(key) for key in ("detector", "looks at", "says", "s"))
        console.results.print(f"{name}{f', {kind}' if kind else ''}: {says}", markup=False)
        numbers = [f"{key} {value}" for key, value in cells.items() if value != "-"]
        console.results.print(f"  {', '.join([*numbers, f'{seconds} s'])}", markup=False)


def _opinion(row: doc.DetectorRow) -> dict[str, str]:
    """Return what a detector found by the heading of its column."""
    # A detector that saw nothing does not vouch for the model.
    says = "no evidence" if row.verdict == "clean" else row.verdict
    return {
        "detector": dashed(row.name),
        "looks at": row.kind,
        "score": "-" if row.score is None else f"{row.score:.3f}",
        "threshold": "-" if row.threshold is None else f"{row.threshold:.3f}",
        "p": "-" if row.p_value is None else f"{row.p_value:.3f}",
        "says": says if row.decides else f"({says})",
        "target": "-" if row.target_class is None else str(row.target_class),
        "s": f"{row.seconds:.0f}",
    }


def recovered(trigger: doc.RecoveredTrigger) -> str:
    """Return what is known of a recovered trigger, in a line."""
    return (
        f"recovered trigger: {trigger.l1_pixels:.1f} pixels, {trigger.image_fraction:.1%} of the image, "
        f"sends {percent(trigger.success)} of {trigger.success.n} held-out clean images to "
        f"{doc.class_words(trigger.target_class, trigger.target_name)}"
    )


def _purify(document: doc.PurifyDocument) -> None:
    out = console.results
    out.print(
        f"{document.method}: {document.outcome} in {document.seconds:.0f} s, wrote {document.output}",
        style="bold",
        markup=False,
    )
    table = Table("layer", "removed", "filters", box=None, pad_edge=False)
    for layer in document.layers:
        if layer.removed:
            numbers = ", ".join(str(f.filter) for f in document.removed if f.layer == layer.name)
            table.add_row(layer.name, f"{layer.removed} of {layer.filters}", numbers)
    if table.row_count:
        console.print_table(table)
    out.print(
        f"clean accuracy on {document.clean_accuracy_before.n} {document.data.unit} that the method did not "
        "see: "
        f"{percent(document.clean_accuracy_before)} before, {percent(document.clean_accuracy_after)} after",
        markup=False,
    )
    if document.model.normalisation.endswith("given by the user"):
        out.print("Open the new file with the same normalisation that you gave for this one.", markup=False)
    for item in document.untreated:
        console.note(f"not treated: {item.layer}: {item.reason}")
    if document.unchanged:
        out.print(_retry(document), markup=False)
    elif document.data.unit == "images":
        out.print(
            "Scan the new file to see what evidence is left; traces can remain after the trigger is dead.",
            markup=False,
        )


def _retry(document: doc.PurifyDocument) -> str:
    """Say what a purification that left everything as it was means, and what else may be tried."""
    same = "the new file has the weights of the old one."
    # Some outcomes go on with a reason of their own.
    same = same.capitalize() if document.outcome != doc.UNCHANGED else f"No filter met the conditions: {same}"
    smallest = "`--set act_on=smallest` or " if document.options.get("act_on") == "flagged" else ""
    return f"{same} Try {smallest}another `--method`."


def _evaluate(document: doc.EvaluateDocument) -> None:
    console.results.print(document.label, style="bold", markup=False)
    console.print_table(_rates(document.metrics))


def _rates(metrics: Mapping[str, doc.Rate]) -> Table:
    names = {
        "clean_accuracy": "clean accuracy (CA)",
        "attack_success": "attack success (ASR)",
        "robust_accuracy": "robust accuracy (RA)",
        "retuned_success": "ASR after retuning on 5 poisoned images",
        "retuned_accuracy": "CA after retuning",
        "queried_success": "ASR with a universal change of 8/255",
        "queried_without_trigger": "the same change without the trigger",
    }
    table = Table("metric", "value [95 % interval]", "n", box=None, pad_edge=False)
    for name, value in metrics.items():
        table.add_row(names.get(name, name), percent(value), str(value.n))
    return table
