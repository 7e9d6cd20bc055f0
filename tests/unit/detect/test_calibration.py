from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unbackdoor.detect.calibration import (
    Calibration,
    parse_calibration,
    read_calibration,
    shipped_calibration,
)
from unbackdoor.detect.scan import Scan, calibration_options
from unbackdoor.errors import InvalidInputError

NINE = Calibration((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), "nine")
VALID: dict[str, Any] = {
    "version": 1,
    "description": "d",
    "options": {"a": 1},
    "scores": {"collapse": [0.1, 0.2]},
}


@pytest.mark.parametrize(
    ("score", "p_value"), [(1.0, 0.1), (0.95, 0.1), (0.9, 0.2), (0.85, 0.2), (0.5, 0.6), (0.0, 1.0)]
)
def test_p_values_by_hand(score: float, p_value: float) -> None:
    assert NINE.p_value(score) == pytest.approx(p_value)


@pytest.mark.parametrize(
    ("alpha", "threshold"), [(0.1, 0.9), (0.19, 0.9), (0.2, 0.8), (0.3, 0.7), (0.5, 0.5)]
)
def test_thresholds_by_hand(alpha: float, threshold: float) -> None:
    assert NINE.threshold(alpha) == threshold
    # A score just above the threshold is flagged by its p-value, one at it is not.
    assert NINE.p_value(threshold + 1e-9) <= alpha + 1e-12
    assert NINE.p_value(threshold) > alpha


def test_too_few_models_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"9 clean models cannot guarantee .* 0.05; use at least 19"):
        NINE.threshold(0.05)
    assert Calibration(tuple(range(19)), "19").threshold(0.05) == 18


@pytest.mark.parametrize("scores", [(), (0.1, float("nan")), (float("inf"),)])
def test_scores_must_be_numbers(scores: tuple[float, ...]) -> None:
    with pytest.raises(InvalidInputError, match="needs finite scores"):
        Calibration(scores, "x")


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(VALID))
    read = read_calibration(path)
    assert read.detectors == {"collapse": Calibration((0.1, 0.2), "d")}
    assert (read.options, read.description) == ({"a": 1}, "d")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is no calibration file"),
        ("[]", "is no calibration file"),
        (json.dumps({**VALID, "extra": 1}), "Extra inputs are not permitted"),
        (json.dumps({**VALID, "version": 2}), "less than or equal to 1"),
        (json.dumps({k: v for k, v in VALID.items() if k != "options"}), "Field required"),
        (json.dumps({**VALID, "scores": {"collapse": ["high"]}}), "is no calibration file"),
        (json.dumps({**VALID, "scores": {"collapse": []}}), "needs finite scores"),
        (json.dumps({**VALID, "scores": {"collapse": [float("nan")]}}), "needs finite scores"),
    ],
)
def test_odd_files_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        parse_calibration(text, source="c.json")


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.json"):
        with pytest.raises(InvalidInputError, match="cannot be read as a calibration file"):
            read_calibration(path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_calibration(tmp_path / "binary.json")


def test_the_shipped_calibration_fits_the_default_scan() -> None:
    shipped = shipped_calibration()
    assert "collapse" in shipped.detectors
    assert shipped.options == calibration_options(Scan().suppression, Scan().statistic)
    for calibration in shipped.detectors.values():
        calibration.threshold(Scan().alpha)
