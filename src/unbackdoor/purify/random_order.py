"""Filters in random order under the rule that all pruning methods share: what a ranking has to beat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.compute import check_fits
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.groups import find_filters
from unbackdoor.filters.mask import PruneMode
from unbackdoor.purify.selection import Selection, divide, exposed_copy, purified, select
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent


@dataclass(frozen=True)
class RandomOrder:
    """Prune filters in random order.

    Source: none; a control. All methods here that rank filters share one walk that keeps what clean images
    need; this is that walk without a ranking. What a ranking does not do better it owes to the walk.

    Deviations: none, as there is no paper. There is no rule of its own for how many filters go, so that
    ``selection.amount=own`` is refused.

    Args:
        selection: How many filters go.
        prune_mode: What removing a filter clears.
    """

    name: ClassVar[str] = "random_order"
    title: ClassVar[str] = "Random order"
    source: ClassVar[str] = "a control, no paper"
    needs: ClassVar[str] = "clean images with labels"

    selection: Selection = field(default_factory=Selection)
    prune_mode: PruneMode = "silence"

    def __post_init__(self) -> None:
        if self.selection.amount == "own":
            raise InvalidInputError(
                "a random order has no rule of its own for how many filters go; use amount = 'guarded', "
                "'count' or 'fraction'."
            )

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a copy of ``model`` without filters that clean images do not need.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels; a few hundred.
            generator: The order follows it; on the CPU.
            progress: Called during the guarded walk.

        Raises:
            InvalidInputError: If there is no image, or a label has no output of the model.
            UnsupportedModelError: If the network's filters cannot be found.
        """
        check_fits(model, clean, purpose="purification")
        filter_map = find_filters(model, as_float(clean.images[:1]))
        learning, guarding = divide(clean, self.selection.held_out_fraction, generator)
        draws = rng.spawn(generator)
        scores = {group.name: torch.rand(group.filters, generator=draws) for group in filter_map.prunable}
        exposed = exposed_copy(
            model, learning, guarding, self.selection, generator=generator, progress=progress
        )
        selected = select(
            model, guarding, filter_map, scores, self.selection,
            own=(), exposed=exposed, prune_mode=self.prune_mode, progress=progress,
        )  # fmt: skip
        return purified(self, model, filter_map, scores, selected, self.prune_mode, {})
