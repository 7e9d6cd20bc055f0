from __future__ import annotations

import math
from typing import Any

import pytest

from unbackdoor.bench.tables import model_table, summaries, summary_table


def rates(ca: float, asr: float | None) -> dict[str, Any]:
    values = {"clean_accuracy": ca}
    if asr is not None:
        values |= {"attack_success": asr, "robust_accuracy": 0.5}
    return {name: {"value": value} for name, value in values.items()}


def record(model: str, method: str, ca: float, asr: float | None, *, seed: int = 0) -> dict[str, Any]:
    cell = {"model": model, "method": method, "seed": seed, "paper": False, "options": {}}
    return {
        "cell": cell,
        "status": "ok",
        "attack": None if asr is None else "badnets",
        "before": rates(0.9, None if asr is None else 1.0),
        "after": rates(ca, asr),
        "cost": {"seconds": 2.0, "forward_images": 600, "backward_images": 400},
    }


RECORDS = [
    record("a", "ft_sam", 0.88, 0.02),
    record("a", "ft_sam", 0.86, 0.04, seed=1),
    record("b", "ft_sam", 0.90, 0.50),
    record("clean", "ft_sam", 0.85, None),
    record("a", "clp", 0.90, 0.01),
    record("b", "clp", 0.80, 0.90),
    {**record("clean", "clp", 0.0, None), "status": "refused", "problem": "no norms"},
]


def test_summaries_average_seeds_first_and_models_then() -> None:
    sam, clp = summaries(RECORDS)
    assert (sam.method, sam.models, sam.refused) == ("ft-sam", 2, 0)
    assert sam.success == pytest.approx((0.03 + 0.5) / 2)
    assert sam.worst == pytest.approx(0.5)
    assert sam.accuracy_lost == pytest.approx((0.03 + 0.0) / 2)
    assert sam.accuracy_lost_clean == pytest.approx(0.05)
    assert (sam.rank, clp.rank) == (1.5, 1.5)
    assert clp.refused == 1
    assert math.isnan(clp.accuracy_lost_clean)
    assert sam.passes == 1000


def test_attacks_that_did_not_take_are_counted_and_left_out() -> None:
    weak = record("weak", "ft_sam", 0.5, 0.0) | {"trained": {"valid": False}}
    before, after = summaries(RECORDS)[0], summaries([*RECORDS, weak])[0]
    assert (before.invalid, after.invalid) == (0, 1)
    assert (after.models, after.success, after.rank, after.accuracy_lost) == (
        before.models, before.success, before.rank, before.accuracy_lost
    )  # fmt: skip
    assert "| weak (attack did not take) |" in model_table([*RECORDS, weak])


def test_ties_share_a_place() -> None:
    tied = summaries([record("a", name, 0.9, 0.1) for name in ("x", "y", "z")])
    assert [row.rank for row in tied] == [2, 2, 2]


def test_tables_are_markdown_with_the_best_first_and_bold() -> None:
    lines = summary_table(RECORDS).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| ft-sam", "| clp"]
    rows = model_table(RECORDS).splitlines()
    assert rows[0] == "| model | undefended | ft-sam | clp |"
    assert rows[2] == "| a | 90.0 / 100.0 / 50.0 | 87.0 / 3.0 / 50.0 | **90.0 / 1.0 / 50.0** |"
    assert rows[4] == "| clean | 90.0 | 85.0 | - |"


def woken(model: str, method: str, retuned: float, queried: float, control: float) -> dict[str, Any]:
    rates = {"retuned_success": retuned, "queried_success": queried, "queried_without_trigger": control}
    found = {name: {"value": value} for name, value in rates.items()}
    return record(model, method, 0.9, 0.02) | {"reactivated": found}


def test_reactivation_stands_beside_the_success_left() -> None:
    records = [
        woken("a", "ft_sam", 0.8, 0.4, 0.1), woken("b", "ft_sam", 0.6, 0.2, 0.05), *RECORDS[4:]
    ]  # fmt: skip
    table = summary_table(records).splitlines()
    head, rows = table[0].split(" | "), [line.split(" | ") for line in table[2:]]
    place = head.index("worst ASR")
    assert head[place + 1 : place + 4] == ["RA-ASR, retuning", "RA-ASR, query", "query without trigger"]
    assert rows[0][place + 1 : place + 4] == ["70.0", "30.0", "7.5"]
    assert rows[1][place + 1 : place + 4] == ["-", "-", "-"]
    assert "90.0 / 2.0 / 50.0, RA-ASR 80.0 / 40.0 (10.0) |" in model_table(records).splitlines()[2]
    assert "RA-ASR" not in summary_table(RECORDS) + model_table(RECORDS)


def test_models_whose_attack_did_not_take_are_no_reactivation() -> None:
    weak = woken("weak", "ft_sam", 1.0, 1.0, 1.0) | {"trained": {"valid": False}}
    assert summaries([woken("a", "ft_sam", 0.8, 0.4, 0.1), weak])[0].retuned == pytest.approx(0.8)
