from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from unbackdoor.detect.calibration import (
    MAX_FILE_BYTES,
    Calibration,
    Kind,
    flags_allowed,
    options_of,
    parse_calibration,
    read_calibration,
    shipped_calibrations,
    shipped_for,
    write_calibration,
)
from unbackdoor.detect.collapse import Collapse
from unbackdoor.detect.evidence import DECIDING
from unbackdoor.detect.mnp import CorrelationRatio
from unbackdoor.detect.recovery import Recovery
from unbackdoor.detect.trigger_search import TriggerSearch
from unbackdoor.errors import InvalidInputError
from unbackdoor.models import NormalisedModel, build
from unbackdoor.suppression import Suppression
from unbackdoor.testing.subjects import small_data

NINE = Calibration((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), "nine")
KIND = {
    "architecture": "net",
    "parameters": 7,
    "width": 2,
    "num_classes": 3,
    "image_shape": [3, 8, 8],
}
VALID: dict[str, Any] = {
    "version": 2,
    "description": "d",
    "kind": KIND,
    "images": 5,
    "options": {"collapse": options_of(Collapse()), "mnp": {"comparison": "difference"}},
    "models": [
        {"name": "a", "scores": {"collapse": 0.1, "mnp": 1.0}},
        {"name": "b", "scores": {"collapse": None, "mnp": 2.0}},
        {"name": "c", "scores": {"collapse": 0.2}},
    ],
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
    said = r"9 clean models cannot guarantee .* of 0.05, at best 1 / 10 = 0.1; use at least 19 models"
    with pytest.raises(InvalidInputError, match=said):
        NINE.threshold(0.05)
    assert Calibration(tuple(range(19)), "19").threshold(0.05) == 18


@pytest.mark.parametrize("scores", [(), (0.1, float("nan")), (float("inf"),)])
def test_scores_must_be_numbers(scores: tuple[float, ...]) -> None:
    with pytest.raises(InvalidInputError, match="needs finite scores"):
        Calibration(scores, "x")


@pytest.mark.parametrize(
    ("n", "alpha", "allowed"), [(19, 0.05, 0), (18, 0.05, -1), (39, 0.05, 1), (9, 0.1, 0)]
)
def test_the_smallest_rate_that_n_models_guarantee(n: int, alpha: float, allowed: int) -> None:
    assert flags_allowed(n, alpha) == allowed


def test_a_file_is_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(VALID))
    read = read_calibration(path)
    # An abstention is the lowest score; a detector that was not run has none.
    assert read.rows(["collapse"]) == [{"collapse": 0.1}, {"collapse": -math.inf}, {"collapse": 0.2}]
    assert read.rows(["collapse", "mnp"]) == [
        {"collapse": 0.1, "mnp": 1.0},
        {"collapse": -math.inf, "mnp": 2.0},
    ]
    assert read.has("mnp")
    assert not read.has("trigger_search")
    assert (read.origin, read.images, read.kind.image_shape) == ("models", 5, (3, 8, 8))
    write_calibration(read, tmp_path / "again.json")
    assert read_calibration(tmp_path / "again.json") == read
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.json", "c.json"]
    with pytest.raises(InvalidInputError, match="cannot write"):
        write_calibration(read, tmp_path / "absent" / "c.json")


def test_scores_hold_for_the_options_they_were_made_with() -> None:
    read = parse_calibration(json.dumps(VALID), source="c.json")
    alone = read.of(Collapse(alpha=0.2, threshold=0.1))
    assert alone is not None
    assert alone.scores == (0.1, 0.2)
    assert alone.description == "2 clean models, from your own models: d"
    # Precision follows the hardware; everything else moves scores.
    assert read.fits(Collapse(Suppression(precision="fp32")))
    assert read.of(Collapse(Suppression(budget=7))) is None
    assert read.of(CorrelationRatio()) is None


def test_options_that_came_later_count_as_their_defaults() -> None:
    older = json.loads(json.dumps(VALID))
    del older["options"]["collapse"]["shift_weight"]
    del older["options"]["collapse"]["suppression"]["clip_norm"]
    read = parse_calibration(json.dumps(older), source="c.json")
    assert read.fits(Collapse())
    assert not read.fits(Collapse(shift_weight=2.0))
    assert not read.fits(Collapse(Suppression(clip_norm=1.0)))
    # What is noted is compared, and an option that is no more voids the scores.
    older["options"]["collapse"]["suppression"]["budget"] = 7
    assert not parse_calibration(json.dumps(older), source="c.json").fits(Collapse())
    gone = json.loads(json.dumps(VALID))
    gone["options"]["collapse"]["gone"] = 1
    assert not parse_calibration(json.dumps(gone), source="c.json").fits(Collapse())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no JSON"),
        ("[]", "is no calibration file"),
        (json.dumps({**VALID, "extra": 1}), "Extra inputs are not permitted at extra"),
        (json.dumps({**VALID, "version": 1}), "of version 1, this package reads 2; make it again with"),
        (json.dumps({k: v for k, v in VALID.items() if k != "options"}), "Field required at options"),
        (json.dumps({**VALID, "models": [{"name": "a", "scores": {"mnp": "high"}}]}), "valid number"),
        (json.dumps({**VALID, "models": [{"name": "a", "scores": {"mnp": float("nan")}}]}), "no calibration"),
        (json.dumps({**VALID, "models": [{"name": "a", "scores": {"nc": 1.0}}]}), "scores of 'nc', but not"),
        (json.dumps({**VALID, "images": 0}), "greater than or equal to 1 at images"),
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
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(InvalidInputError, match="too many for a calibration file"):
        read_calibration(tmp_path / "large.json")


def test_kinds_tell_architectures_widths_classes_and_sizes_apart() -> None:
    data = small_data()

    def kind(arch: str, width: int = 4, classes: int = 4) -> Kind:
        return Kind.of(build(arch, width=width, num_classes=classes), data, classes, architecture="x")

    one = kind("resnet10")
    assert one.is_like(one.model_copy(update={"architecture": "another name"}))
    for other in (kind("resnet18"), kind("resnet10", width=8), kind("resnet10", classes=5)):
        assert not one.is_like(other)
    assert not one.is_like(one.model_copy(update={"image_shape": (3, 32, 32)}))
    assert "of width 4" in one.words()


def test_the_shipped_calibration_is_found_by_the_network() -> None:
    images = small_data(10, classes=10)
    images = type(images)(torch.zeros(10, 3, 32, 32), images.labels)
    model = NormalisedModel(build("resnet18", width=16, num_classes=10), (0.5,), (0.5,))
    found = shipped_for(Kind.of(model, images, 10))
    assert found is not None
    assert (found.origin, found.kind.architecture) == ("shipped", "resnet18")
    assert shipped_for(Kind.of(model, images, 9)) is None


def test_shipped_calibrations_fit_the_detectors_as_they_are() -> None:
    shipped = shipped_calibrations()
    assert shipped
    for calibration in shipped:
        assert calibration.origin == "shipped"
        # All that decides, of enough models for 5 %: otherwise no scan could ever say clean.
        for detector in (Collapse(), Recovery(), TriggerSearch()):
            assert calibration.fits(detector)
            alone = calibration.of(detector)
            assert alone is not None
            alone.threshold(0.05)
        assert len(calibration.rows(DECIDING)) >= 19
