"""The main job on real models: scan, purify and scan again, over defence seeds; prints RESULTS.md's tables.

    python benchmarks/main_job.py --models runs/reference --data DIR --out runs/main_job.jsonl

Each line of the output file is one record; finished ones are not computed again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.bench.artefact import label_rule_of, read_card
from unbackdoor.data import draw_balanced, load_images
from unbackdoor.detect.scan import Scan
from unbackdoor.evaluate import clean_accuracy, evaluate
from unbackdoor.models.loading import load_model
from unbackdoor.purify import MNP
from unbackdoor.triggers import load_trigger
from unbackdoor.types import LabelledImages

METHODS = {"MNP default": MNP(), "MNP.paper()": MNP.paper()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--names", nargs="+", default=["clean-0", "badnets-0", "blend-0"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data, test = load_images(options.data, split="train"), load_images(options.data, split="test")
    records = _read(options.out)
    done = {(r["model"], r["seed"], r["what"]) for r in records}
    for seed in range(options.seeds):
        clean = draw_balanced(data, options.images, rng.generator(seed))
        for name in options.names:
            for what in ("scan", *METHODS):
                if (name, seed, what) in done:
                    continue
                record = {"model": name, "seed": seed, "what": what}
                record |= _run(options.models / name, what, clean, test, seed)
                records.append(record)
                with options.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(record, flush=True)
    _tables(records)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _run(folder: Path, what: str, clean: LabelledImages, test: LabelledImages, seed: int) -> dict[str, Any]:
    model = load_model(folder / "model.safetensors", "resnet18").model
    started = time.perf_counter()
    if what == "scan":
        return _scan(model, clean, seed, started) | _measure(model, folder, test)
    purified = METHODS[what].purify(model, clean, generator=rng.generator(seed))
    seconds = time.perf_counter() - started
    removed = purified.mask.n_removed if purified.mask else 0
    rescan = _scan(purified.model, clean, seed, time.perf_counter())
    return {
        "seconds": round(seconds, 1),
        "removed": removed,
        "rescan": rescan["verdict"],
        "rescan_score": rescan["score"],
        **_measure(purified.model, folder, test),
    }


def _scan(model: nn.Module, clean: LabelledImages, seed: int, started: float) -> dict[str, Any]:
    result = Scan().run(model, clean, generator=rng.generator(seed))
    collapse, ratio = result.detection("collapse"), result.detection("mnp")
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "verdict": result.verdict,
        "target": result.target_class,
        "score": round(collapse.score, 3) if collapse else None,
        "threshold": round(collapse.threshold, 3) if collapse else None,
        "ratio": round(ratio.evidence["ratio"], 3) if ratio else None,
    }


def _measure(model: nn.Module, folder: Path, test: LabelledImages) -> dict[str, float]:
    card = read_card(folder)
    if card["attack"] is None:
        return {"ca": clean_accuracy(model, test).value}
    metrics = evaluate(model, test, load_trigger(folder / "trigger.safetensors"), label_rule_of(card))
    return {
        "ca": metrics.clean_accuracy.value,
        "asr": metrics.attack_success.value,
        "ra": metrics.robust_accuracy.value,
    }


def _tables(records: list[dict[str, Any]]) -> None:
    print("\n| model | seed | verdict | target | score (threshold) | ratio of Eq. 8 | seconds |")
    print("|---|---|---|---|---|---|---|")
    for r in (r for r in records if r["what"] == "scan"):
        print(
            f"| {r['model']} | {r['seed']} | {r['verdict']} | {r['target']} | {r['score']} "
            f"({r['threshold']}) | {r['ratio']} | {r['seconds']} |"
        )
    print("\n| model | method | CA before | CA after | ASR before | ASR after | RA after | removed | "
          "rescan | seconds |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    keys = sorted({(r["model"], r["what"]) for r in records if r["what"] != "scan"})
    for name, what in keys:
        rows = [r for r in records if (r["model"], r["what"]) == (name, what)]
        before = next(r for r in records if r["model"] == name and r["what"] == "scan")
        print(
            f"| {name} | {what} | {before['ca']:.2%} | {_spread(rows, 'ca')} | "
            f"{before.get('asr', float('nan')):.2%} | {_spread(rows, 'asr')} | {_spread(rows, 'ra')} | "
            f"{', '.join(str(r['removed']) for r in rows)} | {', '.join(r['rescan'] for r in rows)} | "
            f"{statistics.mean(r['seconds'] for r in rows):.0f} |"
        )


def _spread(rows: list[dict[str, Any]], key: str) -> str:
    values = [100 * r[key] for r in rows if key in r]
    if not values:
        return "-"
    mean = statistics.mean(values)
    return f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
