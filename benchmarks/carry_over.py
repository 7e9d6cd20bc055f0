"""Take answers about MNP over from before it had `partway`, where that option could not have acted.

    python benchmarks/carry_over.py --records results/mnp-lasting.jsonl --out runs/carried.jsonl
    cat runs/carried.jsonl >> runs/defences-cpu/records.jsonl

`partway` (ADR 15) acts only where the last try of a relearning is refused. An answer whose relearnings
were all taken at some try, or that had none, would be the same with it: such a record is written again as
an answer to the question with `partway=true`, and says where it comes from. Answers with a refusal are named
and must be asked again. Keys that the output holds already are left alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unbackdoor.bench.cell import Cell
from unbackdoor.bench.store import Store

OPTION, BEFORE = "partway", "retry_crops"
"""What came, and the option whose records are new enough to be taken over."""

WHY = "asked before MNP had partway, which acts only where the last try of a relearning is refused: none was"
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
            if was_refused(record):
                print(f"refused: {cell['model']} seed {cell['seed']} {dict(cell['options'])}")
                continue
            new = carried_over(record)
            if new["key"] not in known:
                known.add(new["key"])
                out.add(new)
                carried += 1
    print(f"{carried} answers taken over: {options.out}")


def concerns(record: Mapping[str, Any]) -> bool:
    """Say whether a record is an answer of MNP of the last version before the option."""
    cell = record.get("cell", {})
    settings = cell.get("settings", {})
    return (
        record["status"] == "ok"
        and cell.get("method") == "mnp"
        and not cell.get("paper")
        and OPTION not in cell.get("options", {})
        and BEFORE in settings
        and OPTION not in settings
    )


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


def carried_over(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record as an answer to the question with the option."""
    cell = {**record["cell"], "settings": {**record["cell"]["settings"], OPTION: "true"}}
    return {
        **record,
        "cell": cell,
        "key": Cell(**cell).key,
        "carried_over": WHY,
        "carried_from": record["key"],
    }


if __name__ == "__main__":
    main()
