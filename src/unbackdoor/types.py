"""The nouns of the package: what attacks, defences, detectors and reports hand to one another.

Conventions that hold everywhere: images are ``(N, C, H, W)``, either float32 in [0, 1] or uint8 in
[0, 255]; labels are int64 ``(N,)``; normalisation is the first layer of a model; rates are fractions
in [0, 1]; a higher score is more suspicious; randomness comes from an explicit ``torch.Generator``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from unbackdoor.errors import InvalidInputError

if TYPE_CHECKING:
    from unbackdoor.filters.mask import FilterMask

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``; purely informative."""

ModelFn = Callable[[], nn.Module]
"""Builds a freshly initialised network; called inside ``rng.isolated``."""


def silent(stage: str, done: int, total: int) -> None:
    """Report progress to nobody: the default of every ``progress`` argument."""


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images with their labels, all in memory.

    Args:
        images: ``(N, C, H, W)``; uint8 in [0, 255] (storage) or float32 in [0, 1].
        labels: int64 ``(N,)``, all non-negative.
        class_names: Optional names; entry ``i`` names class ``i``.

    Raises:
        InvalidInputError: If shapes, types or value ranges differ from the above.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.ndim != 4:
            raise InvalidInputError(
                f"images must have shape (N, C, H, W), got {tuple(self.images.shape)}; add the missing axes."
            )
        if self.images.dtype not in (torch.uint8, torch.float32):
            raise InvalidInputError(
                f"images must be uint8 or float32, got {self.images.dtype}; convert them first."
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise InvalidInputError(
                f"labels must be int64 of shape ({len(self.images)},), got {self.labels.dtype} of shape "
                f"{tuple(self.labels.shape)}; give one integer label per image."
            )
        if len(self.labels) and int(self.labels.min()) < 0:
            raise InvalidInputError(f"labels must be at least 0, got {int(self.labels.min())}; recode them.")
        if self.images.dtype == torch.float32 and self.images.numel():
            low, high = (float(bound) for bound in self.images.aminmax())
            # NaN fails every comparison, hence the negated form.
            if not (low >= 0.0 and high <= 1.0):
                raise InvalidInputError(
                    f"float images must lie in [0, 1], got values from {low:g} to {high:g}; divide by 255 or "
                    "undo the normalisation (it belongs into the model, see --mean and --std)."
                )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes: the length of ``class_names`` or the largest label plus one."""
        largest = int(self.labels.max()) + 1 if len(self) else 0
        return max(len(self.class_names), largest)

    def subset(self, indices: Tensor) -> LabelledImages:
        """Return the images at ``indices`` (int64 ``(M,)`` or bool ``(N,)``)."""
        return LabelledImages(self.images[indices], self.labels[indices], self.class_names)

    def floats(self) -> Tensor:
        """Return all images as float32 in [0, 1]."""
        return as_float(self.images)

    def to(self, device: torch.device | str) -> LabelledImages:
        """Return a copy on ``device``."""
        return LabelledImages(self.images.to(device), self.labels.to(device), self.class_names)

    def name_of(self, label: int) -> str:
        """Return the name of class ``label``, or its number."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else str(label)


def as_float(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1]; float images are returned as they are."""
    return images.float().div_(255.0) if images.dtype == torch.uint8 else images


def quantise(images: Tensor) -> Tensor:
    """Clip float images to [0, 1] and round them to 8-bit levels, returning uint8.

    Clipping comes before the cast: an out-of-range float would wrap around.
    """
    return images.clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8)


@runtime_checkable
class Trigger(Protocol):
    """A pure function on images: float32 ``(N, C, H, W)`` in [0, 1] to the same shape and range."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return the triggered images."""
        ...


@runtime_checkable
class LabelRule(Protocol):
    """What a backdoor makes of a label."""

    def __call__(self, labels: Tensor) -> Tensor:
        """Return the labels that the attacker wants for triggered images, int64 ``(N,)``."""
        ...

    def counts(self, labels: Tensor) -> Tensor:
        """Return bool ``(N,)``: which samples count towards the attack success rate."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return a JSON value from which ``label_rule_from`` rebuilds the rule."""
        ...


@dataclass(frozen=True)
class AllToOne:
    """Every class is sent to ``target_class``; samples of that class do not count towards ASR."""

    target_class: int

    def __call__(self, labels: Tensor) -> Tensor:
        """Return ``target_class`` for every sample."""
        return torch.full_like(labels, self.target_class)

    def counts(self, labels: Tensor) -> Tensor:
        """Return which samples are not of the target class already."""
        return labels != self.target_class

    def describe(self) -> dict[str, Any]:
        """Return ``{"rule": "all_to_one", "target_class": ...}``."""
        return {"rule": "all_to_one", "target_class": self.target_class}


@dataclass(frozen=True)
class AllToAll:
    """Class ``y`` is sent to ``(y + shift) mod num_classes``; every sample counts towards ASR."""

    num_classes: int
    shift: int = 1

    def __call__(self, labels: Tensor) -> Tensor:
        """Return the shifted labels."""
        return (labels + self.shift) % self.num_classes

    def counts(self, labels: Tensor) -> Tensor:
        """Return True for every sample."""
        return torch.ones_like(labels, dtype=torch.bool)

    def describe(self) -> dict[str, Any]:
        """Return ``{"rule": "all_to_all", "num_classes": ..., "shift": ...}``."""
        return {"rule": "all_to_all", "num_classes": self.num_classes, "shift": self.shift}


@dataclass(frozen=True)
class OneToOne:
    """Class ``source_class`` is sent to ``target_class``; others stay and do not count towards ASR."""

    source_class: int
    target_class: int

    def __call__(self, labels: Tensor) -> Tensor:
        """Return ``target_class`` for samples of the source class, and the labels of all others."""
        return torch.where(labels == self.source_class, self.target_class, labels)

    def counts(self, labels: Tensor) -> Tensor:
        """Return which samples are of the source class."""
        return labels == self.source_class

    def describe(self) -> dict[str, Any]:
        """Return ``{"rule": "one_to_one", "source_class": ..., "target_class": ...}``."""
        return {"rule": "one_to_one", "source_class": self.source_class, "target_class": self.target_class}


MOST_CLASSES = 1_000_000
"""A card that names a larger class is damaged, or made to break what reads it."""


def _label(value: object, *, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < MOST_CLASSES:
        raise ValueError(f"{value!r} is no whole number from {least} to {MOST_CLASSES - 1}")
    return value


def label_rule_from(description: Mapping[str, Any]) -> LabelRule:
    """Rebuild a label rule from what its ``describe`` returned.

    Raises:
        InvalidInputError: If the description names no known rule or lacks a value.
    """
    try:
        if description["rule"] == "all_to_one":
            return AllToOne(_label(description["target_class"]))
        if description["rule"] == "all_to_all":
            return AllToAll(_label(description["num_classes"], least=1), _label(description["shift"]))
        if description["rule"] == "one_to_one":
            return OneToOne(_label(description["source_class"]), _label(description["target_class"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(f"the label rule {dict(description)!r} is incomplete: {error}.") from error
    raise InvalidInputError(
        f"unknown label rule {description['rule']!r}; known: 'all_to_one', 'all_to_all', 'one_to_one'."
    )


@dataclass(frozen=True, eq=False)
class PoisonPlan:
    """Which training samples are poisoned, apart from how they look.

    Args:
        indices: int64 ``(P,)``, positions in the training set, distinct.
        new_labels: int64 ``(P,)``, their labels after poisoning.
    """

    indices: Tensor
    new_labels: Tensor


@dataclass(frozen=True, eq=False)
class Infected:
    """What an attack leaves behind: the model, and all that is needed to rebuild its trigger.

    Args:
        model: The infected network, in eval mode.
        trigger: What sets the backdoor off.
        plan: Which training samples were poisoned; empty for attacks that edit weights.
        label_rule: What the backdoor makes of a label.
        record: JSON values: how it was made.
        decoys: Transformations that look like the trigger but must leave the label alone, by name, such
            as another image's trigger (``cross``) or a random warp (``noise``).
    """

    model: nn.Module
    trigger: Trigger
    plan: PoisonPlan
    label_rule: LabelRule
    record: Mapping[str, Any] = field(default_factory=dict)
    decoys: Mapping[str, Trigger] = field(default_factory=dict)


class Attack(Protocol):
    """Trains a backdoored model."""

    @property
    def name(self) -> str:
        """The short name of the paper, in snake_case."""
        ...

    def run(
        self,
        train: LabelledImages,
        model_fn: ModelFn,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Infected:
        """Poison ``train``, train a network on it and return both the model and the trigger."""
        ...


@dataclass(frozen=True, eq=False)
class Purified:
    """A cleaned copy of a model.

    Args:
        model: The new model, on the device and in the train/eval mode of the input.
        mask: The filters that were kept and removed, or None for methods that do not prune.
        scores: Per layer, one score a filter; lower is removed first.
        diagnostics: JSON values: what was measured on the way, with units in the key names.
    """

    model: nn.Module
    mask: FilterMask | None
    scores: Mapping[str, Tensor]
    diagnostics: Mapping[str, Any]


class Purifier(Protocol):
    """Turns a suspect model into a cleaned one, seeing clean images only."""

    @property
    def name(self) -> str:
        """The short name of the paper, in snake_case."""
        ...

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a cleaned copy; ``model`` is left untouched."""
        ...


@dataclass(frozen=True, eq=False)
class Detection:
    """The opinion of one detector on one model.

    Args:
        score: Higher is more suspicious; NaN when ``undetermined`` says why.
        threshold: ``score >= threshold`` means backdoored.
        threshold_source: Where the threshold comes from, in words.
        p_value: Chance of such a score for a clean model, where calibrated; else None.
        target_class: The suspected target, or None.
        undetermined: Empty, or the reason why the score must not be believed.
        evidence: JSON values for the report.
    """

    score: float
    threshold: float
    threshold_source: str
    p_value: float | None = None
    target_class: int | None = None
    undetermined: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_backdoored(self) -> bool | None:
        """True, False, or None when undetermined."""
        return None if self.undetermined else self.score >= self.threshold


class ModelDetector(Protocol):
    """Says how suspicious a model is, seeing clean images only."""

    @property
    def name(self) -> str:
        """The short name of the method, in snake_case."""
        ...

    def score(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Detection:
        """Return the score of ``model``, which is left untouched; higher is more suspicious."""
        ...


class SampleDetector(Protocol):
    """Says how suspicious each of some samples is for a given model."""

    @property
    def name(self) -> str:
        """The short name of the method, in snake_case."""
        ...

    def score(
        self,
        model: nn.Module,
        samples: Tensor,
        clean: LabelledImages,
        *,
        labels: Tensor | None = None,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Tensor:
        """Score samples for a model that is left untouched.

        Args:
            model: Takes float images in [0, 1].
            samples: uint8 or float32 ``(N, C, H, W)`` in [0, 1]: a suspect training set, or inputs.
            clean: Clean images with labels.
            labels: int64 ``(N,)``, the labels that came with the samples; None takes the model's answers.
            generator: All randomness follows it; on the CPU.
            progress: Called during the work.

        Returns:
            float32 ``(N,)`` on the CPU, one finite score a sample; higher is more suspicious.

        Raises:
            InvalidInputError: If there are no samples, too few clean images, or labels do not fit.
        """
        ...
