"""What clean suppression exposes of a model: the run that several detectors share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.compute import check_fits, device_of
from unbackdoor.filters.ablation import ablate
from unbackdoor.filters.groups import FilterMap, find_filters
from unbackdoor.filters.magnitude import layer_normalised, magnitudes
from unbackdoor.filters.saliency import spearman, taylor_saliency
from unbackdoor.suppression import Suppressed, Suppression, suppress
from unbackdoor.types import LabelledImages, Progress, as_float, silent


@dataclass(frozen=True)
class Statistic:
    """How magnitude and saliency are set against each other (MNP, appendix A.3).

    Args:
        p: Order of the norm.
        squared: Square the magnitudes first, as section 4.3 writes; A.3 does not. Within a layer that
            changes no rank.
        absolute: Use |CLC~| (A.3) instead of the signed CLC~ (section 4.3).
        head: Count the head's rows as filters too.
        saliency: ``taylor`` is Eq. 11; ``exact`` is Eq. 2, one pass over the images for every filter.
        normalised: Divide by each layer's l2 norm (Eqs. 12 and 13) before filters are pooled.
        pooling: Rank all filters together, as the paper writes, or average the layers' correlations.
    """

    p: float = 2.0
    squared: bool = False
    absolute: bool = True
    head: bool = False
    saliency: Literal["taylor", "exact"] = "taylor"
    normalised: bool = True
    pooling: Literal["global", "layer_mean"] = "global"


@dataclass(frozen=True, eq=False)
class Deviation:
    """Magnitude and saliency of every filter of one model.

    Args:
        magnitude: Layer name to layer-normalised norms, Eq. 12.
        saliency: Layer name to layer-normalised saliencies, Eq. 13.
        pooling: How the layers' filters come together in ``correlation``.
    """

    magnitude: dict[str, Tensor]
    saliency: dict[str, Tensor]
    pooling: Literal["global", "layer_mean"] = "global"

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation of both; NaN if either is constant."""
        if self.pooling == "layer_mean":
            each = [spearman(self.magnitude[name], self.saliency[name]) for name in self.magnitude]
            defined = [rho for rho in each if math.isfinite(rho)]
            return sum(defined) / len(defined) if defined else math.nan
        return spearman(torch.cat(list(self.magnitude.values())), torch.cat(list(self.saliency.values())))


@dataclass(frozen=True, eq=False)
class Exposure:
    """The suppressed copy, and the deviation before and after."""

    suppressed: Suppressed
    before: Deviation
    after: Deviation
    filter_map: FilterMap


def deviation_of(
    model: nn.Module, clean: LabelledImages, filter_map: FilterMap, statistic: Statistic
) -> Deviation:
    """Measure magnitude and saliency of every filter of ``model`` on ``clean``."""
    norms = magnitudes(model, filter_map, p=statistic.p, head=statistic.head)
    if statistic.squared:
        norms = {name: values**2 for name, values in norms.items()}
    saliency = _saliency(model, clean, filter_map, statistic)
    if statistic.absolute:
        saliency = {name: values.abs() for name, values in saliency.items()}
    if statistic.normalised:
        norms, saliency = layer_normalised(norms), layer_normalised(saliency)
    return Deviation(norms, saliency, statistic.pooling)


def _saliency(
    model: nn.Module, clean: LabelledImages, filter_map: FilterMap, statistic: Statistic
) -> dict[str, Tensor]:
    if statistic.saliency == "taylor":
        return taylor_saliency(model, clean, filter_map, head=statistic.head)
    groups = filter_map.groups if statistic.head else filter_map.prunable
    filters = [(group.name, index) for group in groups for index in range(group.filters)]
    changes = ablate(model, clean, filter_map, filters).changes()
    return {name: values.float().to(device_of(model)) for name, values in changes.items()}


def expose(
    model: nn.Module,
    clean: LabelledImages,
    options: Suppression,
    statistic: Statistic,
    *,
    generator: torch.Generator,
    progress: Progress = silent,
) -> Exposure:
    """Suppress the clean task in a copy of ``model`` and measure both.

    Raises:
        InvalidInputError: If there are fewer than two images, or a label has no output of the model.
        UnsupportedModelError: If the network's filters cannot be found.
    """
    check_fits(model, clean, purpose="a detector", at_least=2)
    filter_map = find_filters(model, as_float(clean.images[:1]))
    before = deviation_of(model, clean, filter_map, statistic)
    suppressed = suppress(model, clean, options, generator=rng.spawn(generator), progress=progress)
    after = deviation_of(suppressed.model, clean, filter_map, statistic)
    return Exposure(suppressed, before, after, filter_map)
