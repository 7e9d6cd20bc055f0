"""A small made-up run of a benchmark, as it lies on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unbackdoor.bench.store import Store


def rate(value: float, n: int = 1000) -> dict[str, Any]:
    return {
        "value": value, "low": max(0.0, value - 0.01), "high": min(1.0, value + 0.01),
        "successes": round(value * n), "n": n,
    }  # fmt: skip


def cell(model: str, method: str, **changes: object) -> dict[str, Any]:
    return {
        "model": model, "model_sha256": "ab", "data": "cifar10", "method": method, "paper": False,
        "options": {}, "settings": {"guard.per_filter": "0.01"}, "clean_images": 500, "seed": 0,
        "test_images": 0, "reactivate": False, **changes,
    }  # fmt: skip


def purified(
    question: dict[str, Any], *, ca: float, asr: float | None, before: float = 0.86, **more: object
) -> dict[str, Any]:
    def rates(accuracy: float, success: float) -> dict[str, Any]:
        found = {"clean_accuracy": rate(accuracy)}
        if asr is not None:
            found |= {"attack_success": rate(success), "robust_accuracy": rate(1 - success)}
        return found

    return {
        "cell": question,
        "status": "ok",
        "attack": None if asr is None else question["model"],
        "trained": {"arch": "resnet18", "width": 16, "poisoned": 5000,
                    "label_rule": {"rule": "all_to_one", "target_class": 0}},
        "before": rates(before, 1.0),
        "after": rates(ca, asr or 0.0),
        "filters_removed": 7,
        "cost": {"seconds": 2.5, "forward_images": 6000, "backward_images": 4000, "peak_memory_mb": 800.0,
                 "kinds": {"forward fp32": 6000}},
        "notes": {"action": "pruned"},
        "device": "a processor, 1 threads",
        "unbackdoor": "0.1.0",
        "created": "2026-01-01T00:00:00+00:00",
        **more,
    }  # fmt: skip


def detected(
    question: dict[str, Any],
    *,
    attack: str | None,
    score: float,
    threshold: float = 0.5,
    target: int | None = 0,
) -> dict[str, Any]:
    return {
        "cell": question, "status": "ok", "attack": attack, "kind": "model", "score": score,
        "threshold": threshold, "threshold_source": "made up", "p_value": None, "flagged": score >= threshold,
        "undetermined": "", "target_class": target, "true_target": 0 if attack else None,
        "cost": {"seconds": 1.0, "forward_images": 10, "backward_images": 0},
    }  # fmt: skip


def write(folder: Path, layout: str, records: list[tuple[str, dict[str, Any]]], **plan: object) -> None:
    """Write a run: ``records`` are (parts with ``|`` between, record); ``missing`` ones stay unanswered."""
    store, cells = Store(folder / "records.jsonl"), {}
    for number, (part, record) in enumerate(records):
        key = f"k{number}"
        question = record["cell"]
        label = f"{question['model']} {question['method']} seed {question['seed']}"
        cells[key] = {"parts": part.split("|"), "label": label, "cell": question}
        if record["status"] != "missing":
            store.add({"key": key, **record})
    content = {
        "suite": "mine", "given": {"suite": "mine", "zoo": "zoo", "models": "runs/models"},
        "title": "A made-up run", "text": "For tests.", "layout": layout, "data": "cifar10",
        "size": "cpu", "size_text": "Small.", "missing_models": [],
        "commands": {"badnets": "unbackdoor attack"}, "cells": cells, **plan,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(content))


def make_run(folder: Path) -> None:
    """Write a run of two defences and a refusal on two attacks and a clean model."""
    walk = {"walk.loss_change": [0.001, 0.02, 0.004], "walk.accuracy": [0.86, None, 0.85]}
    records = [
        ("ours", purified(cell("badnets", "mnp"), ca=0.85, asr=0.015, series=walk,
                          log=["     1.0 s  guarded walk: 3 of 3"])),
        ("ours", purified(cell("blend", "mnp"), ca=0.84, asr=0.02)),
        ("ours", purified(cell("clean", "mnp"), ca=0.86, asr=None)),
        ("ours", purified(cell("badnets", "ft_sam"), ca=0.83, asr=0.10)),
        ("ours", purified(cell("blend", "ft_sam"), ca=0.82, asr=0.30)),
        ("ours", purified(cell("clean", "ft_sam"), ca=0.83, asr=None)),
        ("ours", purified(cell("badnets", "clp"), ca=0.84, asr=0.9)),
        ("ours", {"cell": cell("blend", "clp"), "status": "refused", "problem": "<b>no</b> batch norms"}),
    ]  # fmt: skip
    write(folder, "table1", records)
