"""Channel Lipschitzness-based Pruning: remove the filters that react most strongly to small changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbackdoor.compute import check_fits
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.groups import FilterGroup, FilterMap, find_filters
from unbackdoor.filters.mask import PruneMode
from unbackdoor.purify.selection import Selection, divide, exposed_copy, purified, select
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent


@dataclass(frozen=True)
class CLP:
    """Prune filters whose Lipschitz constant stands out in their layer.

    Source: Zheng, Tang, Li, Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022,
    arXiv 2208.03111. A convolution and the batch norm after it are one linear map in eval mode; the
    constant of filter j is bounded by the largest singular value of its kernel, written as a matrix
    ``(inputs, kernel size)``, times |gamma_j| / sigma_j. A filter goes if that exceeds the layer's mean by
    more than u standard deviations.

    The score is the negative deviation from the layer's mean in standard deviations, so that filters of
    different layers can be ordered; the paper's rule is ``score < -u``.

    Deviations: with the default selection clean images decide how far to go, because the paper's rule goes
    from harmless to destructive within one unit of u; ``selection.amount=own`` needs no image but one, for
    its shape. A norm belongs to the layer that feeds it in the traced pass; public code pairs each norm with
    the convolution listed last, which is wrong in pre-activation networks. The norm's eps is added to the
    variance, so that dead filters have a constant.

    Args:
        u: How many standard deviations above the mean are too many.
        layers: ``normed`` looks at convolutions that a batch norm alone reads, as the paper does;
            ``conv`` also at convolutions without a norm, whose constant is that of the bare kernel.
        selection: How many filters go.
        prune_mode: What removing a filter clears; the authors clear scale and shift of the norm.
    """

    name: ClassVar[str] = "clp"
    title: ClassVar[str] = "Channel Lipschitzness-based Pruning"
    source: ClassVar[str] = "Zheng, Tang, Li, Liu 2022, arXiv 2208.03111"
    needs: ClassVar[str] = "convolutions with batch norms; clean images only decide how many filters go"

    u: float = 3.0
    layers: Literal["normed", "conv"] = "normed"
    selection: Selection = field(default_factory=Selection)
    prune_mode: PruneMode = "norm"

    def __post_init__(self) -> None:
        if self.layers not in ("normed", "conv"):
            raise InvalidInputError(f"layers must be 'normed' or 'conv', got {self.layers!r}.")
        check_u(self.u)

    @staticmethod
    def paper(u: float = 3.0) -> CLP:
        """Return the paper's data-free rule."""
        return CLP(u=u, selection=Selection(amount="own"))

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a copy of ``model`` without the filters that stand out.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels; one is enough for the paper's rule.
            generator: For held-out images and an exposed copy, if asked for; on the CPU.
            progress: Called during the guarded walk.

        Raises:
            InvalidInputError: If there is no image, or a label has no output of the model.
            UnsupportedModelError: If no convolution is directly followed by a batch norm.
        """
        check_fits(model, clean, purpose="purification")
        filter_map = find_filters(model, as_float(clean.images[:1]))
        learning, guarding = divide(clean, self.selection.held_out_fraction, generator)
        constants = lipschitz_constants(model, filter_map, layers=self.layers)
        scores = standardised({name: -values for name, values in constants.items()})
        exposed = exposed_copy(
            model, learning, guarding, self.selection, generator=generator, progress=progress
        )
        selected = select(
            model, guarding, filter_map, scores, self.selection,
            own=far_below(scores, self.u), exposed=exposed, prune_mode=self.prune_mode, progress=progress,
        )  # fmt: skip
        found = {"constants": {name: _summary(values) for name, values in constants.items()}}
        return purified(self, model, filter_map, scores, selected, self.prune_mode, found)


@torch.no_grad()
def lipschitz_constants(
    model: nn.Module, filter_map: FilterMap, *, layers: Literal["normed", "conv"] = "normed"
) -> dict[str, Tensor]:
    """Return the Lipschitz bound of every filter of the convolutions.

    Args:
        model: The network; left untouched.
        filter_map: From ``find_filters``.
        layers: See ``CLP``.

    Returns:
        Layer name to float32 ``(filters,)`` on the CPU, all finite and at least 0.

    Raises:
        UnsupportedModelError: If there is no such convolution.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    constants = {
        group.name: _constants_of(group, tensors)
        for group in filter_map.prunable
        if group.kind == "conv" and (_foldable(group) or (layers == "conv" and not group.norms))
    }
    if not constants:
        raise UnsupportedModelError(
            "no convolution of this network is read by a batch norm alone, so there is no Lipschitz constant "
            "of the two together; use layers = 'conv' for that of bare kernels, or another method."
        )
    return constants


def _foldable(group: FilterGroup) -> bool:
    return len(group.norms) == 1 and group.norms[0].foldable


def _constants_of(group: FilterGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    kernel = tensors[group.weight].detach().double().flatten(2)
    # The squared singular values are the eigenvalues of the smaller Gram matrix: 9 x 9 for 3 x 3 kernels.
    gram = kernel @ kernel.mT if kernel.shape[1] < kernel.shape[2] else kernel.mT @ kernel
    spectral: Tensor = torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0).sqrt()
    if _foldable(group):
        norm = group.norms[0]
        assert norm.weight
        assert norm.running_var
        sigma = (tensors[norm.running_var].double() + norm.eps).sqrt()
        spectral = spectral * tensors[norm.weight].detach().double().abs() / sigma
    return spectral.float().cpu()


def standardised(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each layer's scores less their mean, divided by their (unbiased) standard deviation.

    Args:
        scores: Layer name to ``(filters,)``. NaN marks filters without a score: they do not count in the
            layer's mean, and get 0, as do all filters of a layer in which none differs from another.

    Returns:
        Layer name to float32 ``(filters,)`` on the CPU.
    """
    return {name: _standardised(values.double().cpu()).float() for name, values in scores.items()}


def _standardised(values: Tensor) -> Tensor:
    known = values[values.isfinite()]
    if len(known) < 2 or float(known.max() - known.min()) == 0:
        return torch.zeros_like(values)
    deviations: Tensor = (values - known.mean()) / known.std()
    return deviations.nan_to_num(0.0, 0.0, 0.0)


def far_below(scores: Mapping[str, Tensor], u: float) -> list[tuple[str, int]]:
    """Return the filters, as (layer, filter), more than ``u`` standard deviations below their layer's mean.

    Args:
        scores: Layer name to standardised ``(filters,)``.
        u: Number of standard deviations.
    """
    return [(name, int(j)) for name, values in scores.items() for j in (values < -u).nonzero().flatten()]


def check_u(u: float) -> None:
    """Refuse a number of standard deviations that is no number.

    Raises:
        InvalidInputError: If ``u`` is negative or not a number.
    """
    if not u >= 0:
        raise InvalidInputError(f"u must be at least 0 standard deviations, got {u}; the papers take 3.")


def _summary(values: Tensor) -> dict[str, Any]:
    return {"mean": float(values.mean()), "max": float(values.max()), "filters": len(values)}
