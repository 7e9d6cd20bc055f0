"""Entropy-based Pruning: remove filters whose answers to images are unusually predictable."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from unbackdoor.compute import check_fits
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.groups import FilterMap, find_filters
from unbackdoor.filters.mask import PruneMode
from unbackdoor.purify.bnp import visit_norm_inputs
from unbackdoor.purify.clp import check_u, far_below, standardised
from unbackdoor.purify.selection import Selection, divide, exposed_copy, purified, select
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent


@dataclass(frozen=True)
class EP:
    """Prune filters whose strongest answers to images have low entropy.

    Source: Zheng, Tang, Li, Liu, "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022. Of
    each image the largest input ``f = max_{h,w}`` of the norm is kept for every filter, standardised over
    the images, and put into a histogram; a filter goes if the entropy of its histogram is more than u
    standard deviations below its layer's mean.

    The paper does this on a batch of the *poisoned* training data, where a backdoor's filters have two
    separate peaks, clean and triggered images, and thus low entropy after standardising. A purifier here is
    given clean images only. Then there is no second peak, and what is left is a weak hint: filters that
    few clean images excite have one tight peak and a long tail. Do not expect the paper's results; to get
    its conditions, hand over a batch of the suspect training set as ``clean``, and decide on labels that can
    be trusted, or use ``--paper``, in Python ``EP.paper()``, which needs none.

    The score is the deviation from the layer's mean in standard deviations, so that filters of different
    layers can be ordered; the paper's rule is ``score < -u``.

    Deviations: bins are half open and cover every value (public code drops values on an edge); filters with
    the same answer to all images, whose entropy is not defined, are left alone and do not count in the
    layer's mean; how many filters go is decided on clean images by default. Bins are wider than the authors'
    0.01, in which a few hundred images mostly have a bin each. Only filters behind batch norms with running
    statistics are seen; a network without such norms is refused.

    Args:
        u: How many standard deviations below the mean are too many.
        bin_width: Width of a bin, in standard deviations of the filter's answers.
        selection: How many filters go.
        prune_mode: What removing a filter clears; the authors clear the norm's scale.
    """

    name: ClassVar[str] = "ep"
    title: ClassVar[str] = "Entropy-based Pruning"
    source: ClassVar[str] = "Zheng, Tang, Li, Liu 2022, NeurIPS"
    needs: ClassVar[str] = "batch norms with running statistics; the paper: a batch of the poisoned data"

    u: float = 3.0
    bin_width: float = 0.1
    selection: Selection = field(default_factory=Selection)
    prune_mode: PruneMode = "norm_scale"

    def __post_init__(self) -> None:
        check_u(self.u)
        if not 1e-4 <= self.bin_width < float("inf"):
            raise InvalidInputError(
                f"bin_width must be at least 0.0001 standard deviations, got {self.bin_width}; the authors "
                "take 0.01."
            )

    @staticmethod
    def paper(u: float = 3.0) -> EP:
        """Return the authors' rule and bins; their data are poisoned, which no option can replace."""
        return EP(u=u, bin_width=0.01, selection=Selection(amount="own"))

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a copy of ``model`` without the filters of low entropy.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels; the labels serve the guarded walk alone.
            generator: For held-out images and an exposed copy, if asked for; on the CPU.
            progress: Called during the guarded walk.

        Raises:
            InvalidInputError: If there are too few images, or a label has no output of the model.
            UnsupportedModelError: If no layer is followed by a batch norm with running statistics.
        """
        check_fits(model, clean, purpose="purification", at_least=2)
        filter_map = find_filters(model, as_float(clean.images[:1]))
        learning, guarding = divide(clean, self.selection.held_out_fraction, generator)
        entropies = answer_entropies(model, learning, filter_map, self.bin_width)
        scores = standardised(entropies)
        exposed = exposed_copy(
            model, learning, guarding, self.selection, generator=generator, progress=progress
        )
        selected = select(
            model, guarding, filter_map, scores, self.selection,
            own=far_below(scores, self.u), exposed=exposed, prune_mode=self.prune_mode, progress=progress,
        )  # fmt: skip
        found = {
            "mean_entropy_nats": {
                name: float(values.nanmean()) if not bool(values.isnan().all()) else None
                for name, values in entropies.items()
            },
            "constant_filters": sum(int(values.isnan().sum()) for values in entropies.values()),
        }
        return purified(self, model, filter_map, scores, selected, self.prune_mode, found)


def answer_entropies(
    model: nn.Module, clean: LabelledImages, filter_map: FilterMap, bin_width: float
) -> dict[str, Tensor]:
    """Return the entropy of every filter's largest answers to the images.

    Args:
        model: The network; evaluated in eval mode, left untouched.
        clean: Clean images.
        filter_map: From ``find_filters``.
        bin_width: In standard deviations.

    Returns:
        Layer name to float32 ``(filters,)`` on the CPU, in nats; NaN for filters that never vary.

    Raises:
        UnsupportedModelError: If no layer is followed by a batch norm with running statistics.
    """
    largest: dict[str, list[Tensor]] = {}

    def visit(layer: str, inputs: Tensor) -> None:
        peaks = inputs.detach().flatten(2).amax(2) if inputs.ndim > 2 else inputs.detach()
        largest.setdefault(layer, []).append(peaks.cpu())

    norms = visit_norm_inputs(model, clean.images, filter_map, visit)
    return {layer: histogram_entropy(torch.cat(largest[layer]), bin_width) for layer in norms}


def histogram_entropy(values: Tensor, bin_width: float) -> Tensor:
    """Return the entropy of each column's standardised histogram.

    Args:
        values: ``(N, filters)``.
        bin_width: Width of the bins ``[k width, (k + 1) width)``, in standard deviations of the column.

    Returns:
        Float32 ``(filters,)`` in nats; NaN for columns that are constant or not finite.
    """
    values = values.double()
    constant = (values.amax(0) - values.amin(0)) <= 1e-6 * values.abs().amax(0)
    # A unit that overflows has no histogram either.
    constant |= ~values.isfinite().all(0)
    deviations = (values - values.mean(0)) / values.std(0).where(~constant, torch.ones(()).double())
    bins = (deviations.where(~constant, torch.zeros(()).double()) / bin_width).floor().long()
    bins -= bins.min()
    columns, width = values.shape[1], int(bins.max()) + 1
    # Standardised values of N images lie within sqrt(N), so that counting in one go stays small.
    keys = bins + width * torch.arange(columns)
    counts = torch.bincount(keys.flatten(), minlength=columns * width).view(columns, width)
    entropy: Tensor = torch.special.entr(counts.double() / len(values)).sum(1)
    return entropy.masked_fill(constant, float("nan")).float()
