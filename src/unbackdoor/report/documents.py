"""The JSON documents of the command line: what a scan, a purification and an evaluation found.

They are printed by ``--json``, written beside the results, and read back by ``unbackdoor report``. Files
are untrusted when read: sizes and numbers are bounded, unknown keys are refused, and nothing in them is
executed. Lists are accepted wherever a sequence is declared and kept as tuples; numbers that are not finite
become null, because JSON has no word for them.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar

import pydantic_core
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from unbackdoor.errors import InvalidInputError

SCHEMA_VERSION: Final = 1
"""Raised whenever a key changes its meaning; files of other versions are refused."""

MAX_FILE_BYTES = 64 * 2**20
"""Larger files are refused unread: the largest real documents are some 2 MB."""

MAX_INTEGER = 2**53
"""Integers beyond are not exact in JSON readers of other languages."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

UNCHANGED = "nothing was changed"
"""How the outcome of a purification begins that left all weights as they were."""

Element = TypeVar("Element")


def utc_now() -> str:
    """Return the current time as ISO 8601 in UTC, to the second: the ``created`` of a document."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def class_words(index: int, name: str | None) -> str:
    """Return a class for people: its number, and its name if that says more."""
    return f"class {index}" if name in (None, "", str(index)) else f"class {index} ({name})"


def _finite_or_none(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json_value(value: object) -> object:
    """Return ``value`` made of what JSON knows; arrays become lists, other objects their text."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _json_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_json_value(entry) for entry in value]
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise ValueError("an integer is beyond 2^53")
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # arrays and their scalars, without importing their packages
        return _json_value(value.tolist())
    return str(value)


def _utc(value: str) -> str:
    offset = datetime.fromisoformat(value).utcoffset()
    if offset is None or offset.total_seconds():
        raise ValueError("it must be an ISO 8601 time in UTC, such as 2026-01-31T12:00:00+00:00")
    return value


def png_text(value: str) -> str:
    """Return ``value`` if it is the base64 text of a PNG image.

    Raises:
        ValueError: If it is not.
    """
    try:
        start = base64.b64decode(value, validate=True)[: len(PNG_SIGNATURE)]
    except (binascii.Error, ValueError) as error:
        raise ValueError("it must be base64 text") from error
    if start != PNG_SIGNATURE:
        raise ValueError("it must hold a PNG image")
    return value


def _path_text(value: object) -> object:
    # Names that are no valid Unicode exist on disk, and JSON cannot hold them.
    return str(value).encode("utf-8", "replace").decode() if isinstance(value, str | Path) else value


Many = Annotated[Sequence[Element], AfterValidator(tuple)]
Number = Annotated[float | None, BeforeValidator(_finite_or_none)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Seconds = Annotated[float, Field(ge=0.0)]
Json = Annotated[dict[str, Any], BeforeValidator(_json_value)]
PathText = Annotated[str, BeforeValidator(_path_text)]
Utc = Annotated[str, AfterValidator(_utc)]
Png = Annotated[str, Field(max_length=2**20), AfterValidator(png_text)]


class Part(BaseModel):
    """Base of all parts: unknown keys are errors, values do not change, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rate(Part):
    """A fraction with its 95 % interval and its counts; ``value`` is None without trials."""

    value: Annotated[Fraction | None, BeforeValidator(_finite_or_none)]
    low: Fraction
    high: Fraction
    successes: Count
    n: Count

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.successes > self.n or self.low > self.high or (self.value is None) != (self.n == 0):
            raise ValueError("it must have successes <= n, low <= high, and a value exactly if n > 0")
        return self


class ModelInfo(Part):
    """Which model was looked at.

    Args:
        path: The file, as the user named it.
        sha256: Hash of the file, lower-case hexadecimal.
        format: The file format in words.
        architecture: Name of the network.
        parameters: Number of weights.
        num_classes: Number of outputs.
        normalisation: The mean and standard deviation that the model applies, in words.
        user_code: Whether the network was built by the user's own code instead of the registry.
    """

    path: PathText
    sha256: str
    format: str
    architecture: str
    parameters: Count
    num_classes: Count
    normalisation: str
    user_code: bool = False


class DataInfo(Part):
    """Which clean images, or which graph, were used.

    Args:
        source: The file or folder, as the user named it.
        split: The part of it, or an empty string.
        images: Number of images, or of nodes with a known label.
        num_classes: Number of classes.
        image_shape: ``(C, H, W)``; for nodes ``(F,)``, the size of their features.
        smallest_class: Number of images or nodes in the smallest class.
        class_names: Optional names; entry ``i`` names class ``i``.
        unit: What was counted.
    """

    source: PathText
    split: str
    images: Count
    num_classes: Count
    image_shape: Many[Count]
    smallest_class: Count
    class_names: Many[str] = ()
    unit: Literal["images", "nodes"] = "images"


class DetectorRow(Part):
    """The opinion of one detector; fields as in ``unbackdoor.types.Detection``.

    Args:
        name: Short name in snake_case.
        title: Name for people.
        source: Where the method comes from.
        score: Higher is more suspicious; None when undetermined.
        threshold: A score of at least this means backdoored; None when there is none.
        threshold_source: Where the threshold comes from, in words.
        p_value: Chance of such a score for a clean model, where calibrated.
        verdict: What follows from score and threshold.
        undetermined: Empty, or the reason why the score must not be believed.
        target_class: The suspected target.
        seconds: Time taken.
        summary: One sentence for people.
        evidence: JSON values.
        kind: What it looks at; detectors of one kind are not independent.
        decides: Whether the verdict follows from it; its p-value is then adjusted for the others that do.
    """

    name: str
    title: str
    source: str
    kind: str = ""
    decides: bool = True
    score: Number
    threshold: Number
    threshold_source: str
    p_value: Annotated[Fraction | None, BeforeValidator(_finite_or_none)] = None
    verdict: Literal["backdoored", "clean", "undetermined"]
    undetermined: str = ""
    target_class: Count | None = None
    seconds: Seconds
    summary: str
    evidence: Json = Field(default_factory=dict)


class Suppression(Part):
    """The course of clean suppression, and what was left of the model at its end.

    Args:
        accuracy: Clean accuracy at each check, the first before any step.
        steps: Ascent steps taken before each check; empty if unknown.
        stop_reason: Why it ended, in words.
        norm_mode: Mode of the normalisation layers, such as ``"train"``.
        class_share: Share of the clean images that the suppressed model sends to each class.
        shift_share: Entry ``s``: share of the clean images sent to their true class plus ``s``.
    """

    accuracy: Many[Fraction]
    steps: Many[Count] = ()
    stop_reason: str
    norm_mode: str
    class_share: Many[Fraction]
    shift_share: Many[Fraction] = ()


class Scatter(Part):
    """Magnitude and saliency of every filter, before and after clean suppression.

    Args:
        layers: Names of the layers, from input to output.
        layer_of: Per filter, the index of its layer.
        magnitude: Per filter, before suppression; so is ``saliency``.
        saliency: Rise of the clean loss when the filter is removed.
        magnitude_after: Per filter, after suppression; so is ``saliency_after``.
        saliency_after: As ``saliency``.
        rho: Rank correlation of magnitude and saliency before suppression.
        rho_after: The same after suppression.
    """

    layers: Many[str]
    layer_of: Many[Count]
    magnitude: Many[Number]
    saliency: Many[Number]
    magnitude_after: Many[Number]
    saliency_after: Many[Number]
    rho: Number
    rho_after: Number

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        columns = (self.magnitude, self.saliency, self.magnitude_after, self.saliency_after)
        if any(len(column) != len(self.layer_of) for column in columns):
            raise ValueError("its lists must have one entry per filter each")
        if any(index >= len(self.layers) for index in self.layer_of):
            raise ValueError(f"layer_of must point into the {len(self.layers)} layers")
        return self


class Confidence(Part):
    """What a verdict rests on.

    Args:
        p_value: Chance that a clean model scores like this or higher; None if it cannot be told.
        alpha: Largest false-positive rate that was asked for.
        models: Clean models that it was compared with.
        origin: Where these come from.
        description: Which models these are, in words.
        smallest_rate: The smallest false-positive rate that so many models can guarantee.
        guarantee: What is guaranteed, in a sentence.
    """

    p_value: Annotated[Fraction | None, BeforeValidator(_finite_or_none)]
    alpha: Fraction
    models: Count
    origin: Literal["shipped", "models", "surrogates", "none"]
    description: str
    smallest_rate: Annotated[Fraction | None, BeforeValidator(_finite_or_none)]
    guarantee: str

    @property
    def rate_holds(self) -> bool:
        """Whether there are enough clean models for the rate that was asked for."""
        # Both come from small fractions: equal ones may differ by rounding.
        return self.smallest_rate is not None and self.smallest_rate <= self.alpha + 1e-9


class RecoveredTrigger(Part):
    """The trigger that inversion found for the suspected class.

    Args:
        target_class: Where it sends images.
        target_name: The name of that class.
        l1_pixels: Sum of its mask: pixels that it replaces.
        image_fraction: The same as a share of the image.
        success: Share of clean images of other classes, unseen by the inversion, that it sends there.
        success_seen: The same on the images that it was made from.
        mask_png: The mask, white where it replaces the image; absent without Pillow, as are the others.
        pattern_png: What it puts there, on grey.
        clean_png: A clean image.
        stamped_png: The same image with the trigger.
    """

    target_class: Count
    target_name: str
    l1_pixels: Annotated[float, Field(ge=0.0)]
    image_fraction: Fraction
    success: Rate
    success_seen: Annotated[Fraction | None, BeforeValidator(_finite_or_none)] = None
    mask_png: Png | None = None
    pattern_png: Png | None = None
    clean_png: Png | None = None
    stamped_png: Png | None = None


class SuspectFilter(Part):
    """A filter on which the backdoor leans more than the clean task; values are layer-normalised.

    Args:
        layer: Its layer.
        filter: Its index there.
        suspicion: ``backdoor_saliency`` less ``clean_saliency``.
        backdoor_saliency: Rise of the backdoor's loss if it is removed, to first order.
        clean_saliency: The same for the clean loss.
        magnitude: Norm of its weights.
    """

    layer: str
    filter: Count
    suspicion: Number
    backdoor_saliency: Number
    clean_saliency: Number
    magnitude: Number


class RemovedFilter(Part):
    """One filter that was removed; ``loss_change`` is that of the clean loss, ``rank`` counts from 0."""

    layer: str
    filter: Count
    rank: Count
    score: Number = None
    magnitude: Number = None
    loss_change: Number = None


class LayerRow(Part):
    """How many filters a layer had and how many of them were removed."""

    name: str
    filters: Count
    removed: Count


class WalkStep(Part):
    """One candidate of the guarded walk.

    Args:
        rank: Position in the order of candidates, from 0.
        layer: Its layer.
        filter: Its index in the layer.
        loss_change: Change of the clean loss if it is removed too.
        kept: True if the filter stayed in the network, False if it was removed.
        clean_accuracy: On the defence images after this step, where measured.
        benefit: Fall of the loss where the backdoor was exposed, as a share of its start; None where it was
            not asked, as in older documents.
    """

    rank: Count
    layer: str
    filter: Count
    loss_change: Number
    kept: bool
    clean_accuracy: Annotated[Fraction | None, BeforeValidator(_finite_or_none)] = None
    benefit: Number = None


class Untreated(Part):
    """A layer that the method could not treat, and why."""

    layer: str
    reason: str


class Example(Part):
    """One image without and with the trigger, and ten times their difference or so, as base64 PNG."""

    clean_png: Png
    triggered_png: Png
    difference_png: Png
    true_label: str
    predicted_label: str


class ScanDocument(Part):
    """What ``unbackdoor scan`` found.

    Args:
        verdict: ``clean`` means that no evidence of a backdoor was found, no more.
        reason: One sentence.
        advice: What to do next.
        clean_accuracy: Of the model on the clean images.
        target_class: The suspected target.
        target_name: The name of that class.
        confidence: Which clean models the model was compared with; None if the scan ended before.
        warnings: Things to know before believing the result.
        detectors: What each detector said.
        trigger: The recovered trigger of the suspected class.
        filters: The most suspicious filters.
        suppression: The suppression run.
        scatter: Magnitude and saliency of all filters.
        limits: What was not checked and what could fool the check.
        settings: Options of the scan.
    """

    kind: Literal["scan"] = "scan"
    schema_version: Literal[1] = SCHEMA_VERSION
    tool_version: str
    created: Utc = Field(default_factory=utc_now)
    seconds: Seconds
    model: ModelInfo
    data: DataInfo
    clean_accuracy: Rate
    verdict: Literal["backdoored", "clean", "inconclusive"]
    reason: str
    advice: str
    target_class: Count | None = None
    target_name: str | None = None
    confidence: Confidence | None = None
    warnings: Many[str] = ()
    detectors: Many[DetectorRow] = ()
    trigger: RecoveredTrigger | None = None
    filters: Many[SuspectFilter] = ()
    suppression: Suppression | None = None
    scatter: Scatter | None = None
    settings: Json = Field(default_factory=dict)
    limits: Many[str] = ()


class PurifyDocument(Part):
    """What ``unbackdoor purify`` did.

    Args:
        method: Name of the method.
        method_title: Its name for people; empty in older documents, as is its source.
        method_source: Where the method comes from.
        outcome: What became of the weights, in a phrase; empty in older documents.
        options: Its options.
        output: The file written.
        output_sha256: Its hash.
        clean_accuracy_before: On clean images that the method did not train on.
        clean_accuracy_after: On the same images.
        filters_total: Filters in the network.
        filters_removed: Filters removed.
        removed: The removed filters.
        layers: All layers with filters.
        walk: The candidates of a guarded walk, in order.
        untreated: Layers the method could not treat.
        passes: Image passes, seconds and memory.
        warnings: Things to know before believing the result.
        limits: What was not checked and what could fool the method.
    """

    kind: Literal["purify"] = "purify"
    schema_version: Literal[1] = SCHEMA_VERSION
    tool_version: str
    created: Utc = Field(default_factory=utc_now)
    seconds: Seconds
    model: ModelInfo
    data: DataInfo
    method: str
    method_title: str = ""
    method_source: str = ""
    outcome: str = ""
    options: Json = Field(default_factory=dict)
    output: PathText
    output_sha256: str
    clean_accuracy_before: Rate
    clean_accuracy_after: Rate
    filters_total: Count
    filters_removed: Count
    removed: Many[RemovedFilter] = ()
    layers: Many[LayerRow] = ()
    walk: Many[WalkStep] = ()
    untreated: Many[Untreated] = ()
    passes: Json = Field(default_factory=dict)
    warnings: Many[str] = ()
    limits: Many[str] = ()

    @property
    def unchanged(self) -> bool:
        """Whether the new file has the weights of the old one."""
        return self.outcome.startswith(UNCHANGED)


class EvaluateDocument(Part):
    """What ``unbackdoor evaluate`` measured, with the attacker's trigger in hand.

    Args:
        label: What the model is in this report, such as ``"infected model, before"``.
        attack: Name of the attack, where known.
        metrics: ``clean_accuracy`` and, with a trigger, ``attack_success`` and ``robust_accuracy``.
        examples: Some triggered images.
        warnings: Things to know before believing the result.
    """

    kind: Literal["evaluate"] = "evaluate"
    schema_version: Literal[1] = SCHEMA_VERSION
    tool_version: str
    created: Utc = Field(default_factory=utc_now)
    seconds: Seconds
    model: ModelInfo
    data: DataInfo
    label: str
    attack: str | None = None
    metrics: dict[str, Rate]
    examples: Many[Example] = ()
    warnings: Many[str] = ()


Document = ScanDocument | PurifyDocument | EvaluateDocument

_ADAPTER: TypeAdapter[Document] = TypeAdapter(Annotated[Document, Field(discriminator="kind")])
_KINDS = ("scan", "purify", "evaluate")


def read_document(path: Path | str) -> Document:
    """Read a document; the file is untrusted.

    Args:
        path: A JSON file written by ``write_document`` or by ``--json``.

    Returns:
        The document, of the class that its ``kind`` names.

    Raises:
        InvalidInputError: If the file cannot be read, is too large, is no JSON, or is no document of this
            version.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidInputError(
                f"{path} is {path.stat().st_size / 2**20:.0f} MiB, more than the {MAX_FILE_BYTES // 2**20} "
                "MiB allowed for a report document; give a file written by --json."
            )
        text = path.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"cannot read {path}: {error.strerror}; check the path.") from error
    return parse_document(text, name=str(path))


def parse_document(text: bytes | str, *, name: str = "the document") -> Document:
    """Parse the JSON text of a document; ``name`` stands for it in errors.

    Raises:
        InvalidInputError: As ``read_document``.
    """
    try:
        content = pydantic_core.from_json(text)
    except ValueError as error:
        raise InvalidInputError(
            f"{name} is not valid JSON ({error}); give a file written by --json."
        ) from error
    _check_header(content, name)
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"][1:]) or "the whole"
        raise InvalidInputError(
            f"{name} is no {content['kind']} document: {where}: {first['msg']} "
            f"({error.error_count()} problem(s)); write it anew with this version."
        ) from error


def write_document(document: Document, path: Path | str) -> None:
    """Write ``document`` as JSON so that ``path`` holds the old content or the whole new one.

    Raises:
        InvalidInputError: If the file cannot be written.
    """
    write_text(document.model_dump_json(indent=2) + "\n", path)


def write_text(text: str, path: Path | str) -> None:
    """Write a file so that ``path`` holds the old content or the whole new one.

    Raises:
        InvalidInputError: If the file cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise InvalidInputError(f"cannot write {path}: {error.strerror}; check the folder.") from error


def _check_header(content: object, name: str) -> None:
    header = content if isinstance(content, dict) else {}
    kind, version = header.get("kind"), header.get("schema_version")
    if kind not in _KINDS:
        raise InvalidInputError(
            f"{name} must be a JSON object whose kind is one of {', '.join(_KINDS)}, got {_short(kind)}; "
            "give a file written by --json."
        )
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise InvalidInputError(
            f"{name} must have schema_version {SCHEMA_VERSION}, got {_short(version)}; write it "
            "anew with this version of unbackdoor."
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
