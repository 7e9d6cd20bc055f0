"""``unbackdoor methods``: every attack, purifier and detector, with its paper, its needs and its options."""

from __future__ import annotations

from typing import Any

import typer

from unbackdoor.cli import options as o


def methods(
    name: str | None = typer.Argument(
        None, help="Show this method with all its options; all methods if left out."
    ),
    as_json: o.AsJson = False,
) -> None:
    """List all attacks, purifiers and detectors, or show one with its options."""
    import json
    from dataclasses import asdict

    from unbackdoor import catalogue
    from unbackdoor.attacks.registry import ATTACKS
    from unbackdoor.cli import console
    from unbackdoor.cli import show as shown
    from unbackdoor.detect.registry import MODEL_DETECTORS, SAMPLE_DETECTORS
    from unbackdoor.graph.attacks import ATTACKS as GRAPH_ATTACKS
    from unbackdoor.graph.detect import RIGBD
    from unbackdoor.graph.purify import PURIFIERS as GRAPH_PURIFIERS
    from unbackdoor.purify.registry import PURIFIERS

    kinds: dict[str, dict[str, type[Any]]] = {
        "attack": ATTACKS,
        "purifier": PURIFIERS,
        "model detector": MODEL_DETECTORS,
        "sample detector": SAMPLE_DETECTORS,
        "graph attack": GRAPH_ATTACKS,
        "graph detector": {RIGBD.name: RIGBD},
        "graph purifier": GRAPH_PURIFIERS,
    }
    if name is None:
        entries = [catalogue.entry(kind, cls) for kind, known in kinds.items() for cls in known.values()]
        if as_json:
            console.print_json(json.dumps([asdict(entry) for entry in entries]))
        else:
            shown.method_list(entries)
        return
    every = {method: cls for known in kinds.values() for method, cls in known.items()}
    wanted = catalogue.find("method", every, name).name
    found = [(kind, known[wanted]) for kind, known in kinds.items() if wanted in known]
    if as_json:
        rows = [
            {
                **asdict(catalogue.entry(kind, cls)),
                "options": [asdict(x) for x in catalogue.options_of(cls())],
            }
            for kind, cls in found
        ]
        console.print_json(json.dumps(rows))
        return
    for kind, cls in found:
        shown.method(catalogue.entry(kind, cls), catalogue.description(cls), catalogue.options_of(cls()))
