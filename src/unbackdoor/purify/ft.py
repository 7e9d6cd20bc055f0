"""Vanilla fine-tuning: train on with clean images; the baseline of every comparison."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from unbackdoor.compute import check_fits
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.groups import find_filters
from unbackdoor.purify.copies import fine_tuned
from unbackdoor.train import Recipe, TrainingRecord
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent


@dataclass(frozen=True)
class TriangularRecipe(Recipe):
    """A recipe whose rate swings between two bounds, the upper one being huge at first (super-FT).

    ``learning_rate`` is the early peak; ``schedule`` and ``warmup_fraction`` have no effect.

    Args:
        base_rate: Lowest rate.
        late_peak: Highest rate of the later part.
        early_fraction: Share of the steps that swing up to ``learning_rate``, in [0, 1].
        half_cycle: Steps from the lowest to the highest rate.
    """

    base_rate: float = 0.03
    late_peak: float = 0.05
    early_fraction: float = 0.4
    half_cycle: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.half_cycle < 1 or not 0 <= self.early_fraction <= 1:
            raise InvalidInputError(
                "half_cycle must be at least 1 and early_fraction lie in [0, 1], got "
                f"{self.half_cycle} and {self.early_fraction}."
            )
        if not 0 < self.base_rate <= min(self.late_peak, self.learning_rate):
            raise InvalidInputError(
                "base_rate must be positive and at most late_peak and learning_rate, got "
                f"{self.base_rate}, {self.late_peak} and {self.learning_rate}."
            )

    def rate_at(self, step: int, steps: int) -> float:
        """Return the learning rate of 0-based ``step`` out of ``steps``."""
        peak = self.learning_rate if step < self.early_fraction * steps else self.late_peak
        place = step % (2 * self.half_cycle)
        height = min(place, 2 * self.half_cycle - place) / self.half_cycle
        return self.base_rate + height * (peak - self.base_rate)


@dataclass(frozen=True)
class FT:
    """Train all weights on with clean images and labels.

    Source: a baseline of most papers; constants of BackdoorBench's ``ft``. Minimises ``CE(F(x; theta), y)``
    with norms in train mode, crops and flips; running statistics follow the clean images.

    Deviations: the default runs 20 epochs of batch 64 (160 steps on 500 images; BackdoorBench takes 1000 on
    2500). The cosine ends with the last epoch instead of after a fixed 100. The last state is returned; no
    epoch is picked.

    Args:
        recipe: Schedule. That of super-FT, whose rate swings, is ``FT.super()``: in Python only.
    """

    name: ClassVar[str] = "ft"
    title: ClassVar[str] = "Fine-tuning"
    source: ClassVar[str] = "baseline; constants of BackdoorBench (Wu et al. 2022, arXiv 2206.12654)"
    needs: ClassVar[str] = "clean images with labels"

    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=20, batch_size=64, learning_rate=0.01))

    @staticmethod
    def paper() -> FT:
        """Return BackdoorBench's settings: 100 epochs of batch 256 at 0.01, for 5 % of the training set."""
        return FT(Recipe(epochs=100, batch_size=256, learning_rate=0.01))

    @staticmethod
    def super(epochs: int = 100) -> FT:
        """Return super-FT: plain SGD whose rate swings up to 2.5 for 40 % of the steps, then to 0.05.

        Source: Sha et al. 2022, arXiv 2212.09067; constants of backdoor-toolbox. One swing is 20 steps.
        """
        return FT(
            TriangularRecipe(epochs=epochs, batch_size=128, learning_rate=2.5, momentum=0.0, weight_decay=0.0)
        )

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a fine-tuned copy of ``model``.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels; a few hundred.
            generator: All randomness follows it; on the CPU.
            progress: Called after each epoch.

        Raises:
            InvalidInputError: If there are too few images, or a label has no output of the model.
            UnsupportedModelError: If the model has no layers, or training diverges.
        """
        check_fits(model, clean, purpose="purification", at_least=2)
        find_filters(model, as_float(clean.images[:1]))
        tuned, record = fine_tuned(model, clean, self.recipe, generator=generator, progress=progress)
        return Purified(tuned, None, {}, {"options": asdict(self), "fine_tuning": training_summary(record)})


def training_summary(record: TrainingRecord) -> dict[str, Any]:
    """Return JSON values on a training run for ``Purified.diagnostics``."""
    return {"losses": list(record.losses), "precision": record.precision}
