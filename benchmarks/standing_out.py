"""How far the triggers that MNP acted on lie below those of the other classes, from recorded answers.

    python benchmarks/standing_out.py results/defences-cpu/records.jsonl results/imagenet12-defences.jsonl

One row for each class whose patch or faint change was acted on, the least outstanding first: its norm as a
share of the median, its anomaly index by the norms' logarithms (what `outlier_index` and `settled_index` ask
for), and whether it is the attacker's. Warps are judged by their share alone and not listed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unbackdoor.bench.recording import SIZES, stood_out
from unbackdoor.bench.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path, nargs="+")
    paths = parser.parse_args().records
    found = {row for path in paths for record in Store(path).records().values() for row in rows(record)}
    print("| way | data | model | seed | class | share | index | attacker's |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in sorted(found, key=lambda row: (row[0], row[-1], row[-2])):
        print(
            "| " + " | ".join(f"{each:.2f}" if isinstance(each, float) else str(each) for each in row) + " |"
        )


def rows(record: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Yield what stood out in an answer of MNP's default; nothing for other records."""
    cell = record.get("cell", {})
    if record["status"] != "ok" or cell.get("method") != "mnp" or cell["options"] or cell["paper"]:
        return
    target = ((record.get("trained") or {}).get("label_rule") or {}).get("target_class")
    for way in SIZES:
        for k, (share, index) in stood_out(record, way).items():
            who = "yes" if k == target else "no"
            yield way, cell["data"], cell["model"], cell["seed"], k, share, index, who


if __name__ == "__main__":
    main()
