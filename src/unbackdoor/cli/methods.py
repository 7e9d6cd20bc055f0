"""``unbackdoor methods``: the scan and every attack, purifier and detector, with paper, needs and options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from unbackdoor.cli import options as o

if TYPE_CHECKING:
    from unbackdoor.catalogue import Entry, Option


def methods(
    name: str | None = typer.Argument(
        None, help="Show this method with all its options, also one of your own; all methods if left out."
    ),
    as_json: o.AsJson = False,
) -> None:
    """List the scan and all attacks, purifiers and detectors, or show one with its options."""
    import json
    from dataclasses import asdict

    from unbackdoor import catalogue
    from unbackdoor.attacks.registry import ATTACKS
    from unbackdoor.cli import console
    from unbackdoor.cli import show as shown
    from unbackdoor.detect.registry import MODEL_DETECTORS, SAMPLE_DETECTORS
    from unbackdoor.detect.scan import Scan
    from unbackdoor.graph.attacks import ATTACKS as GRAPH_ATTACKS
    from unbackdoor.graph.detect import RIGBD
    from unbackdoor.graph.purify import PURIFIERS as GRAPH_PURIFIERS
    from unbackdoor.purify.registry import PURIFIERS
    from unbackdoor.usercode import names_code

    kinds: dict[str, dict[str, type[Any]]] = {
        "scan": {"scan": Scan},
        "attack": ATTACKS,
        "purifier": PURIFIERS,
        "model detector": MODEL_DETECTORS,
        "sample detector": SAMPLE_DETECTORS,
        "graph attack": GRAPH_ATTACKS,
        "graph detector": {RIGBD.name: RIGBD},
        "graph purifier": GRAPH_PURIFIERS,
    }
    known = [(kind, key, cls) for kind, registry in kinds.items() for key, cls in registry.items()]
    if name is None:
        entries = [_entry(kind, cls) for kind, _, cls in known]
        if as_json:
            console.print_text(json.dumps([asdict(entry) for entry in entries]))
        else:
            shown.method_list(entries)
        return
    named = {key: cls for _, key, cls in known}
    if names_code(name):
        wanted = catalogue.own_class("method", named, name, "purify", "score")
        known = [("purifier" if hasattr(wanted, "purify") else "detector", wanted.name, wanted)]
    else:
        wanted = catalogue.find("method", named, name)
    # One name may be of several: MNP purifies and detects.
    key = next(key for _, key, cls in known if cls is wanted)
    found = [(_entry(kind, cls), cls, _options(kind, cls)) for kind, other, cls in known if other == key]
    if as_json:
        rows = [{**asdict(entry), "options": [asdict(x) for x in options]} for entry, _, options in found]
        console.print_text(json.dumps(rows))
        return
    for entry, cls, options in found:
        shown.method(entry, catalogue.description(cls), options)


def _entry(kind: str, cls: type[Any]) -> Entry:
    from unbackdoor import catalogue

    if kind != "scan":
        return catalogue.entry(kind, cls)
    return catalogue.Entry(
        kind=kind,
        name="scan",
        title="Detectors of two kinds, and a verdict",
        source="of this project, over the detectors' papers",
        needs="clean images with labels; scores of clean models",
        summary=catalogue.summary(cls),
    )


def _options(kind: str, cls: type[Any]) -> list[Option]:
    """Return the options that ``--set`` is for."""
    from unbackdoor import catalogue
    from unbackdoor.cli.scanning import FLAGS

    unlisted = FLAGS if kind == "scan" else ()
    return [option for option in catalogue.options_of(cls()) if option.path not in unlisted]
