"""RIGBD and its rivals on graphs, over seeds; killed and started again, it goes on where it was.

    python benchmarks/rigbd.py --out runs/rigbd.jsonl
    python benchmarks/rigbd.py --out runs/rigbd-cora.jsonl --planetoid FOLDER --data cora
    python benchmarks/rigbd.py --out runs/rigbd.jsonl --tables

A method or an attack with options of its own is written as `rigbd:detection.cut=likelihood`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from unbackdoor.bench.defend import run
from unbackdoor.bench.graphs import GraphBench, GraphCell, graph_cell, graph_table
from unbackdoor.bench.store import Store

DATA = ("cora-like:0.5", "citeseer-like:0.3", "pubmed-like:0.08")
METHODS = ("plain", "drop_edge", "prune", "rigbd", "rigbd:detection.cut=likelihood")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", nargs="+", default=list(DATA), help="presets, or Planetoid data sets")
    parser.add_argument("--planetoid", type=Path, help="folder with Planetoid files")
    parser.add_argument("--attacks", nargs="+", default=["sba", "ugba", "none"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--poisoned", type=int, help="nodes; if left out, the literature's share of each")
    parser.add_argument("--tables", action="store_true", help="compute nothing, print the table")
    options = parser.parse_args()
    store = Store(options.out)
    if not options.tables:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
        bench = GraphBench(options.planetoid)
        run(bench, cells(options), store, said=lambda line: print(line, flush=True))
    print(graph_table(list(store.records().values())))


def cells(options: argparse.Namespace) -> list[GraphCell]:
    """Return the questions, seed by seed, so that a run that is stopped early is balanced."""
    return [
        graph_cell(
            data,
            attack.partition(":")[0],
            method.partition(":")[0],
            seed=seed,
            options=given(method),
            attack_options={"poisoned": str(options.poisoned or poisoned(data)), **given(attack)},
        )
        for seed in options.seeds
        for data in options.data
        for attack in options.attacks
        for method in options.methods
    ]


def given(text: str) -> dict[str, str]:
    """Return the options in ``NAME:OPTION=VALUE,...``."""
    return dict(part.split("=", 1) for part in text.partition(":")[2].split(",") if part)


def poisoned(data: str) -> int:
    """Return 40 nodes for Cora and Citeseer, 160 for Pubmed (RIGBD's commands), scaled with the graph."""
    name, _, scale = data.partition(":")
    return round((160 if name.startswith("pubmed") else 40) * float(scale or 1))


if __name__ == "__main__":
    main()
