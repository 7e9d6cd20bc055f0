"""Where a threshold comes from: the scores of models that are known to be clean.

With n clean models, the conformal p-value of a score s is (1 + #{clean scores >= s}) / (n + 1). If the
suspect is clean and exchangeable with them, flagging p <= alpha is wrong with probability at most alpha
(Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", 2005, section 2.2.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unbackdoor.errors import InvalidInputError


@dataclass(frozen=True)
class Calibration:
    """Scores of clean models for one detector.

    Args:
        scores: One a model.
        description: Which models these are, in words.
    """

    scores: tuple[float, ...]
    description: str

    def __post_init__(self) -> None:
        if not self.scores or not all(math.isfinite(score) for score in self.scores):
            raise InvalidInputError(f"a calibration needs finite scores, got {self.scores}.")

    def p_value(self, score: float) -> float:
        """Return the conformal p-value of ``score``, at least 1 / (n + 1)."""
        return (1 + sum(clean >= score for clean in self.scores)) / (len(self.scores) + 1)

    def threshold(self, alpha: float) -> float:
        """Return the largest clean score that is not flagged at ``alpha``: scores above it are.

        Raises:
            InvalidInputError: If there are fewer than 1 / alpha - 1 models.
        """
        allowed = math.floor(alpha * (len(self.scores) + 1) + 1e-9) - 1
        if allowed < 0:
            raise InvalidInputError(
                f"{len(self.scores)} clean models cannot guarantee a false-positive rate of {alpha:g}; "
                f"use at least {math.ceil(1 / alpha) - 1}."
            )
        return sorted(self.scores, reverse=True)[allowed]


def threshold_from(
    calibration: Calibration | None,
    alpha: float,
    *,
    fixed: float,
    source: str = "a fixed value, uncalibrated",
) -> tuple[float, str]:
    """Return the threshold at and above which a score is flagged, and where it comes from.

    Args:
        calibration: Scores of clean models, or None.
        alpha: False-positive rate of a calibrated threshold.
        fixed: The threshold without a calibration.
        source: Where that comes from.
    """
    if calibration is None:
        return fixed, source
    return math.nextafter(calibration.threshold(alpha), math.inf), calibration.description


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = Field(ge=1, le=1)
    description: str
    options: dict[str, Any]
    scores: dict[str, list[float]]


@dataclass(frozen=True)
class CalibrationSet:
    """The calibrations of several detectors on the same clean models.

    Args:
        detectors: Detector name to calibration.
        options: The options that they were run with; they hold for these only.
        description: Which models these are.
    """

    detectors: dict[str, Calibration]
    options: dict[str, Any]
    description: str


def parse_calibration(text: str, *, source: str) -> CalibrationSet:
    """Read a calibration file's text.

    Raises:
        InvalidInputError: If it is not one.
    """
    try:
        parsed = _File.model_validate_json(text)
    except ValidationError as error:
        raise InvalidInputError(
            f"{source} is no calibration file: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}."
        ) from error
    detectors = {name: Calibration(tuple(s), parsed.description) for name, s in parsed.scores.items()}
    return CalibrationSet(detectors, parsed.options, parsed.description)


def shipped_calibration() -> CalibrationSet:
    """Return the calibration that comes with the package."""
    file = resources.files("unbackdoor.detect") / "calibrations" / "cifar10_resnet18_w16.json"
    return parse_calibration(file.read_text(encoding="utf-8"), source=file.name)


def read_calibration(path: Path) -> CalibrationSet:
    """Read a calibration file of the user's.

    Raises:
        InvalidInputError: If it cannot be read or is no calibration file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path} cannot be read as a calibration file ({error}).") from error
    return parse_calibration(text, source=str(path))
