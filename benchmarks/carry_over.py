"""Take answers about MNP over from before options that could not have acted there.

    python benchmarks/carry_over.py --records results/mnp-lasting.jsonl --out runs/carried.jsonl
    cat runs/carried.jsonl >> runs/defences-cpu/records.jsonl

`partway` (ADR 15) acts only where the last try of a relearning is refused, `evidence_together` (ADR 14) only
where filters that suppression exposed were kept. An answer in which neither happened would be the same today:
such a record is written again as an answer to today's question, and says where it comes from. Answers where
one did are named and must be asked again. Keys that the output holds already are left alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unbackdoor.bench.cell import Cell
from unbackdoor.bench.defend import settings_of
from unbackdoor.bench.store import Store
from unbackdoor.purify import MNP

BEFORE = "retry_crops"
"""Records with this option are new enough."""

WHY = "asked before MNP had {}, which could not have acted here"
"""Said of each; the question that was asked is named beside it."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    out = Store(options.out)
    known, carried = set(out.records()), 0
    for path in options.records:
        for record in Store(path).records().values():
            if not concerns(record):
                continue
            cell = record["cell"]
            if acted := [option for option in lacking(record) if ACTED[option](record)]:
                question = f"{cell['model']} seed {cell['seed']} {dict(cell['options'])}"
                print(f"to be asked again, {' and '.join(acted)} could act: {question}")
                continue
            new = carried_over(record)
            if new["key"] not in known:
                known.add(new["key"])
                out.add(new)
                carried += 1
    print(f"{carried} answers taken over: {options.out}")


def concerns(record: Mapping[str, Any]) -> bool:
    """Say whether a record is an answer of MNP that lacks one of the options, and is new enough."""
    cell = record.get("cell", {})
    return (
        record["status"] == "ok"
        and cell.get("method") == "mnp"
        and not cell.get("paper")
        and BEFORE in cell["settings"]
        and bool(lacking(record))
    )


def lacking(record: Mapping[str, Any]) -> list[str]:
    """Return the options that were not there, or not asked for, when the record was made."""
    cell = record["cell"]
    return [o for o in ACTED if o not in cell["settings"] and o not in cell.get("options", {})]


def was_refused(record: Mapping[str, Any]) -> bool:
    """Say whether the last try of some relearning was refused."""
    name = "relearning.taken"
    course = record.get("series", {}).get(name, [record.get("notes", {}).get(name, True)])
    most = int(record["cell"]["settings"]["retries"])
    refused_in_a_row = 0
    for taken in course:
        refused_in_a_row = 0 if taken else refused_in_a_row + 1
        if refused_in_a_row > most:
            return True
    return refused_in_a_row > 0


def was_kept(record: Mapping[str, Any]) -> bool:
    """Say whether what suppression exposed was kept although it takes as much away as is enough today."""
    notes = record.get("notes", {})
    together = notes.get("evidence.benefit") or 0.0
    return notes.get("evidence.taken") is False and together >= MNP().evidence_together


ACTED = {"partway": was_refused, "evidence_together": was_kept}
"""The options that came, and whether one could have acted."""


def carried_over(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record as an answer to the question with the options."""
    today, came = settings_of(MNP()), lacking(record)
    settings = {**record["cell"]["settings"], **{option: today[option] for option in came}}
    cell = {**record["cell"], "settings": settings}
    return {
        **record,
        "cell": cell,
        "key": Cell(**cell).key,
        "carried_over": WHY.format(" and ".join(came)),
        "carried_from": record.get("carried_from", record["key"]),
    }


if __name__ == "__main__":
    main()
