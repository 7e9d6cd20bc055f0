"""Take answers about MNP's default over from before later options, where these could not have acted.

    python benchmarks/carry_over.py --records results/mnp-lasting.jsonl --out runs/carried.jsonl
    cat runs/carried.jsonl >> runs/defences-cpu/records.jsonl

`partway` (ADR 15) acts only where the last try of a relearning is refused, and `evidence` (ADR 14), which
asks another thing than before, only where suppression was used and both decide differently, and `collapsed`
(ADR 16) only where the filters that suppression exposed stayed. An answer without any would be the same
today: it is written again as an answer to today's question, and says where it comes from. So is one without
warps, whose step is another today (ADR 17), and where what settled the matter stood out by `settled_index`.
Where one could act, the answer is named and must be asked again. Keys that the output holds already are left
alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unbackdoor.bench.cell import Cell
from unbackdoor.bench.defend import settings_of
from unbackdoor.bench.recording import SIZES, stood_out
from unbackdoor.bench.store import Store
from unbackdoor.purify import MNP

WHY = "asked with other defaults of options that came later, which made no difference here"
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
            cell, new = record["cell"], carried_over(record)
            if acted := [option for option, could_act in ACTED.items() if could_act(record)]:
                print(
                    f"to be asked again, {' and '.join(acted)} could act: {cell['model']} seed {cell['seed']}"
                )
            elif new["key"] not in known:
                known.add(new["key"])
                out.add(new)
                carried += 1
    print(f"{carried} answers taken over: {options.out}")


def concerns(record: Mapping[str, Any]) -> bool:
    """Say whether a record is about MNP's default of before, with other values of these options alone."""
    cell = record.get("cell", {})
    if record["status"] != "ok" or cell.get("method") != "mnp" or cell["options"]:
        return False
    today = todays(cell)
    return cell["settings"] != today and others(cell["settings"]) == others(today)


def todays(cell: Mapping[str, Any]) -> dict[str, str]:
    """Return what the same question means today."""
    return settings_of(MNP.paper() if cell["paper"] else MNP())


def others(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the settings without the options, one of which was two for a day."""
    return {name: value for name, value in settings.items() if name not in (*ACTED, "evidence_together")}


def was_refused(record: Mapping[str, Any]) -> bool:
    """Say whether the last try of some relearning was refused, and not gone towards."""
    if record["cell"]["settings"].get("partway") == "true":
        return False
    name = "relearning.taken"
    course = record.get("series", {}).get(name, [record.get("notes", {}).get(name, True)])
    most = int(record["cell"]["settings"]["retries"])
    refused_in_a_row = 0
    for taken in course:
        refused_in_a_row = 0 if taken else refused_in_a_row + 1
        if refused_in_a_row > most:
            return True
    return refused_in_a_row > 0


def was_judged_otherwise(record: Mapping[str, Any]) -> bool:
    """Say whether what suppression exposed was removed then and would be kept today, or the reverse."""
    notes = record.get("notes", {})
    if "evidence.taken" not in notes:
        return False
    today = not notes["evidence.filters"] or notes["evidence.benefit"] >= MNP().evidence
    return bool(notes["evidence.taken"]) != today


def was_kept(record: Mapping[str, Any]) -> bool:
    """Say whether filters that suppression exposed stayed, whatever the errors of the copy gathered in."""
    if "collapsed" in record["cell"]["settings"]:
        return False
    return record.get("notes", {}).get("evidence.taken") is False


def was_bent(record: Mapping[str, Any]) -> bool:
    """Say whether warps were inverted, by another step than today's."""
    today = settings_of(MNP())["warp.learning_rate"]
    same = record["cell"]["settings"].get("warp.learning_rate") == today
    return not same and any(name.startswith("warp.") for name in record.get("notes", {}))


def was_settled_by_little(record: Mapping[str, Any]) -> bool:
    """Say whether triggers were acted on of which none stood out by what settles a matter today."""
    cell = record["cell"]
    bound = (MNP.paper() if cell["paper"] else MNP()).settled_index
    if "settled_index" in cell["settings"] or not bound:
        return False
    for way in SIZES:
        indices = [index for _, index in stood_out(record, way).values()]
        if indices and not any(index >= bound for index in indices):
            return True
    return False


ACTED = {
    "partway": was_refused,
    "evidence": was_judged_otherwise,
    "collapsed": was_kept,
    "warp.learning_rate": was_bent,
    "settled_index": was_settled_by_little,
}
"""The options, and whether one could have acted."""


def carried_over(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record as an answer to today's question."""
    cell = {**record["cell"], "settings": todays(record["cell"])}
    return {
        **record,
        "cell": cell,
        "key": Cell(**cell).key,
        "carried_over": WHY,
        "carried_from": record.get("carried_from", record["key"]),
    }


if __name__ == "__main__":
    main()
