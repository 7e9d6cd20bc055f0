"""Where a threshold comes from: the scores of models that are known to be clean.

With n clean models, the conformal p-value of a score s is (1 + #{clean scores >= s}) / (n + 1). If the
suspect is clean and exchangeable with them, flagging p <= alpha is wrong with probability at most alpha
(Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", 2005, section 2.2.2). The smallest
p-value, and so the smallest false-positive rate that n models can guarantee, is 1 / (n + 1).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from unbackdoor.errors import InvalidInputError
from unbackdoor.models.normalise import NormalisedModel
from unbackdoor.types import LabelledImages

VERSION: Final = 2
"""Raised whenever a key changes its meaning; files of other versions are refused."""

MAX_FILE_BYTES = 16 * 2**20
"""Larger files are refused unread: a thousand models with ten scores each take 1 MB."""

MOST_APART = 0.1
"""Clean models whose accuracy is further away than this say little of a model."""

_ELSEWHERE = {"calibration", "alpha", "threshold", "delta", "precision"}
"""Options that decide what becomes of a score, or how fast it is found, and not the score."""

Origin = Literal["shipped", "models", "surrogates"]
Finite = Annotated[float, Field(allow_inf_nan=False)]


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
        spared = flags_allowed(len(self.scores), alpha)
        if spared < 0:
            raise InvalidInputError(f"{too_few(len(self.scores), alpha)}.")
        return sorted(self.scores, reverse=True)[spared]


def flags_allowed(n: int, alpha: float) -> int:
    """Return how many of ``n`` clean models may reach a score that is still flagged; -1 for no guarantee."""
    return math.floor(alpha * (n + 1) + 1e-9) - 1


def too_few(n: int, alpha: float) -> str:
    """Say that ``n`` models cannot guarantee ``alpha``, and what they can."""
    return (
        f"{n} clean models cannot guarantee a false-positive rate of {alpha:g}, at best 1 / {n + 1} = "
        f"{1 / (n + 1):.3g}; use at least {math.ceil(1 / alpha - 1e-9) - 1} models"
    )


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


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Kind(_Part):
    """Which networks a calibration speaks of.

    Args:
        architecture: Name for people; the same network may have several.
        parameters: Number of weights; with the other fields it tells architectures and widths apart.
        width: Filters of the first convolution, or None without one.
        num_classes: Outputs of the network.
        image_shape: ``(C, H, W)``.
    """

    architecture: str
    parameters: int = Field(ge=0)
    width: int | None = Field(default=None, ge=1)
    num_classes: int = Field(ge=1)
    image_shape: tuple[int, int, int]

    @staticmethod
    def of(model: nn.Module, images: LabelledImages, classes: int, *, architecture: str = "") -> Kind:
        """Describe ``model`` with its ``classes`` outputs, on such images."""
        network = model.network if isinstance(model, NormalisedModel) else model
        parameters = list(model.parameters())
        first = next((tensor for tensor in parameters if tensor.ndim == 4), None)
        channels, height, width = images.images.shape[1:]
        return Kind(
            architecture=architecture or type(network).__name__,
            parameters=sum(tensor.numel() for tensor in parameters),
            width=None if first is None else len(first),
            num_classes=classes,
            image_shape=(channels, height, width),
        )

    def is_like(self, other: Kind) -> bool:
        """Whether both are the same network on images of the same shape, whatever it is called."""
        return self.model_copy(update={"architecture": other.architecture}) == other

    def words(self) -> str:
        """Describe the kind in a phrase."""
        width = "" if self.width is None else f" of width {self.width}"
        shape = " x ".join(map(str, self.image_shape))
        return (
            f"{self.architecture}{width} ({self.parameters:,} weights) with {self.num_classes} classes on "
            f"images of {shape}"
        )


class ScoredModel(_Part):
    """A clean model and what the detectors said of it.

    Args:
        name: What to call it.
        sha256: Hash of its file, or of its weights; empty if unknown.
        clean_accuracy: On the images that it was scored with.
        scores: One a detector that was run; None where it abstained, and no entry where it was not run.
    """

    name: str
    sha256: str = ""
    clean_accuracy: float | None = Field(default=None, ge=0, le=1)
    scores: dict[str, Finite | None]


class CalibrationSet(_Part):
    """The scores of several detectors on the same clean models of one kind; a file's content.

    Args:
        version: Of the format.
        description: Which models these are.
        origin: ``shipped`` with the package; ``models`` of the user's; ``surrogates`` that were trained on
            the user's clean images.
        kind: Which networks it speaks of.
        images: Clean images that each model was scored with.
        split: The part of the data set that they were drawn from; empty if unknown.
        drawn_from: Hash of the images that these were drawn from, and of how they were given to the models;
            empty if unknown.
        seed: Of the draws; None if unknown.
        draws: Each model was scored with so many draws of images, and the highest score of each detector was
            noted. A suspect is scored once, so that with more than one its p-value errs on the side of clean.
        options: Detector to the options it was run with; its scores hold for these only.
        models: One entry a model.
    """

    version: Literal[2] = VERSION
    description: str
    origin: Origin = "models"
    kind: Kind
    images: int = Field(ge=1)
    split: str = ""
    drawn_from: str = ""
    seed: int | None = None
    draws: int = Field(default=1, ge=1)
    options: dict[str, dict[str, Any]]
    models: tuple[ScoredModel, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        unknown = {name for model in self.models for name in model.scores} - set(self.options)
        if unknown:
            raise ValueError(f"there are scores of {sorted(unknown)[0]!r}, but not its options")
        return self

    def fits(self, detector: Any) -> bool:  # noqa: ANN401 - any model detector
        """Whether models were scored by ``detector`` with the options that it has."""
        return self.has(detector.name) and self.agrees(detector)

    def agrees(self, detector: Any) -> bool:  # noqa: ANN401 - any model detector
        """Whether the options noted for ``detector`` are those that it has."""
        noted = self.options.get(detector.name)
        return noted is not None and completed(noted, type(detector)) == options_of(detector)

    def has(self, name: str) -> bool:
        """Whether models were scored by a detector of this name, with whatever options."""
        return any(name in model.scores for model in self.models)

    def rows(self, names: Iterable[str]) -> list[dict[str, float]]:
        """Return these detectors' scores of each model that all of them were run on.

        An abstention is the lowest score, minus infinity; see ``joint``.
        """
        wanted = list(names)
        found = [model.scores for model in self.models if set(wanted) <= set(model.scores)]
        return [{name: _or_lowest(scores[name]) for name in wanted} for scores in found]

    def of(self, detector: Any) -> Calibration | None:  # noqa: ANN401 - any model detector
        """Return the calibration of one detector alone; None if it has none with these options.

        Models on which it abstained are left out. For one detector that is fair: a suspect on which it did
        not abstain is exchangeable with the rest.
        """
        scores = tuple(
            row[detector.name] for row in self.rows([detector.name]) if row[detector.name] > -math.inf
        )
        return Calibration(scores, self.words(len(scores))) if scores and self.fits(detector) else None

    def apart(self, accuracy: float) -> str:
        """Say so if these models are so much more or less accurate than one that they may not be like it.

        Args:
            accuracy: Of the other model on clean images, in [0, 1].

        Returns:
            A sentence, or nothing.
        """
        theirs = [model.clean_accuracy for model in self.models if model.clean_accuracy is not None]
        if not theirs or min(theirs) - MOST_APART <= accuracy <= max(theirs) + MOST_APART:
            return ""
        return (
            f"The clean models that it is compared with are right on {min(theirs):.1%} to {max(theirs):.1%} "
            f"of their images, this model on {accuracy:.1%} of these: it may be of another kind of data or "
            "training, and then the rates do not hold."
        )

    def words(self, n: int | None = None) -> str:
        """Say where a threshold comes from, in a phrase."""
        whose = {
            "shipped": "shipped with this package",
            "models": "from your own models",
            "surrogates": "from surrogates trained on your images",
        }
        count = len(self.models) if n is None else n
        highest = "" if self.draws == 1 else f" by their highest of {self.draws} scores"
        return f"{count} clean models{highest}, {whose[self.origin]}: {self.description}"

    def text(self) -> str:
        """Return the content of a file."""
        return self.model_dump_json(indent=1) + "\n"


def _or_lowest(score: float | None) -> float:
    return -math.inf if score is None else score


def options_of(detector: Any) -> dict[str, Any]:  # noqa: ANN401 - any frozen dataclass
    """Return the options on which a detector's score depends, as JSON values."""
    found: dict[str, Any] = json.loads(json.dumps(_plain(asdict(detector))))
    return found


def completed(noted: Mapping[str, Any], detector: type[Any]) -> dict[str, Any]:
    """Return options as they were noted, with those that are missing at the detector's default.

    An option that is missing did not exist when the scores were made. Its default leaves scores as they were
    (a detector whose default results change gets another name), so that a file made before an option
    existed holds for a detector that leaves it alone.

    Args:
        noted: From ``options_of``, perhaps of an earlier version of this package.
        detector: Its class.
    """
    return _merged(noted, options_of(detector()))


def _merged(noted: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(defaults)
    for name, value in noted.items():
        usual = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(usual, Mapping):
            found[name] = _merged(value, usual)
        else:
            found[name] = value
    return found


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _plain(value) if isinstance(value, Mapping) else value
        for name, value in options.items()
        if name not in _ELSEWHERE
    }


def parse_calibration(text: str | bytes, *, source: str) -> CalibrationSet:
    """Read a calibration file's text.

    Raises:
        InvalidInputError: If it is not one.
    """
    try:
        content = pydantic_core.from_json(text)
        version = content.get("version") if isinstance(content, dict) else None
        if version is not None and version != VERSION:
            raise InvalidInputError(
                f"{source} is a calibration file of version {version!r}, this package reads {VERSION}; make "
                "it again with `unbackdoor calibrate`."
            )
        return CalibrationSet.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise InvalidInputError(
            f"{source} is no calibration file: {first['msg']} at {where}; make one with `unbackdoor "
            "calibrate`."
        ) from error
    except ValueError as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(
            f"{source} is no calibration file: it holds no JSON ({error}); make one with `unbackdoor "
            "calibrate`."
        ) from error


def read_calibration(path: Path) -> CalibrationSet:
    """Read a calibration file of the user's.

    Raises:
        InvalidInputError: If it cannot be read or is no calibration file.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidInputError(
                f"{path} has {path.stat().st_size / 2**20:.0f} MiB, too many for a calibration file; give "
                "one made with `unbackdoor calibrate`."
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise InvalidInputError(
            f"{path} cannot be read as a calibration file ({problem}); give one made with "
            "`unbackdoor calibrate`."
        ) from error
    return parse_calibration(text, source=str(path))


def write_calibration(calibration: CalibrationSet, path: Path) -> None:
    """Write a file so that ``path`` holds the old content or the whole new one.

    Raises:
        InvalidInputError: If it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(calibration.text(), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise InvalidInputError(f"cannot write {path}: {error.strerror}; check the folder.") from error


def shipped_calibrations() -> Sequence[CalibrationSet]:
    """Return the calibrations that come with the package."""
    folder = resources.files("unbackdoor.detect") / "calibrations"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda f: f.name)
    found = [parse_calibration(file.read_text(encoding="utf-8"), source=file.name) for file in files]
    # `unbackdoor calibrate` wrote them, for which they were models of the user's.
    return [calibration.model_copy(update={"origin": "shipped"}) for calibration in found]


def shipped_for(kind: Kind) -> CalibrationSet | None:
    """Return the shipped calibration for networks of this kind, or None."""
    return next((found for found in shipped_calibrations() if found.kind.is_like(kind)), None)
