"""The script behind the table of speeds prices what the meter counts."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "defence_speed.py"))


def test_shares_of_passes_are_priced_like_passes() -> None:
    counted = {"forward fp32": 100, "forward fp32 replayed": 20, "backward bf16 weights": 10}
    prices = {"forward fp32": 0.01, "backward bf16 weights": 0.03}
    assert SCRIPT["passes_bare"](counted, prices) == pytest.approx(1.2 + 0.3)


def test_a_method_is_asked_for_with_options() -> None:
    asked = SCRIPT["asked"]
    assert asked("clp") == ("clp", False, {})
    assert asked("fp:paper,recipe=none") == ("fp", True, {"recipe": "none"})


def test_passes_in_bf16_are_as_many_in_fp32() -> None:
    counted = {
        "forward fp32": 100,
        "forward bf16": 20,
        "backward bf16 frozen": 10,
        "forward bf16 replayed": 1,
    }
    assert SCRIPT["in_fp32"](counted) == {
        "forward fp32": 120,
        "backward fp32 frozen": 10,
        "forward fp32 replayed": 1,
    }
