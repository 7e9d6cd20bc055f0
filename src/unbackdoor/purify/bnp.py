"""Batch Normalisation statistics-based Pruning: compare what norms remember with what clean images give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unbackdoor.compute import EVALUATION_BATCH, check_fits, logits_of
from unbackdoor.errors import UnsupportedModelError
from unbackdoor.filters.groups import FilterMap, Norm, find_filters
from unbackdoor.filters.mask import PruneMode
from unbackdoor.purify.clp import check_u, far_below, standardised
from unbackdoor.purify.selection import Selection, divide, exposed_copy, purified, select
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent


@dataclass(frozen=True)
class BNP:
    """Prune filters whose statistics on clean images are far from those of the training.

    Source: Zheng, Tang, Li, Liu, "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022. A
    batch norm's running mean and variance stem from training on poisoned data. For each filter j they are
    compared with mean and variance of the norm's input on clean images by the divergence of normal
    distributions, clean from remembered, ``KL(N(mu1, s1^2) || N(mu2, s2^2)) = log(s2 / s1) + (s1^2 +
    (mu1 - mu2)^2) / (2 s2^2) - 1/2``. A filter goes if that exceeds its layer's mean by more than u standard
    deviations.

    The score is the negative deviation from the layer's mean in standard deviations, so that filters of
    different layers can be ordered; the paper's rule is ``score < -u``.

    Deviations: both variances are enlarged by the norm's eps, so that dead filters have a divergence;
    how many filters go is decided on clean images by default. Some public code doubles the logarithm, and
    overwrites the clean statistics by those of poisoned images that a defender does not have.

    A network whose statistics were computed anew on clean data, as by fine-tuning, carries no signal. Only
    filters behind batch norms with running statistics are seen; a network without such norms is refused.

    Args:
        u: How many standard deviations above the mean are too many.
        selection: How many filters go.
        prune_mode: What removing a filter clears; the authors clear the norm's scale.
    """

    name: ClassVar[str] = "bnp"
    title: ClassVar[str] = "Batch Normalisation statistics-based Pruning"
    source: ClassVar[str] = "Zheng, Tang, Li, Liu 2022, NeurIPS"
    needs: ClassVar[str] = "clean images with labels; batch norms with running statistics"

    u: float = 3.0
    selection: Selection = field(default_factory=Selection)
    prune_mode: PruneMode = "norm_scale"

    def __post_init__(self) -> None:
        check_u(self.u)

    @staticmethod
    def paper(u: float = 3.0) -> BNP:
        """Return the paper's rule."""
        return BNP(u=u, selection=Selection(amount="own"))

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
        divergences = clean_divergences(model, learning, filter_map)
        scores = standardised({name: -values for name, values in divergences.items()})
        exposed = exposed_copy(
            model, learning, guarding, self.selection, generator=generator, progress=progress
        )
        selected = select(
            model, guarding, filter_map, scores, self.selection,
            own=far_below(scores, self.u), exposed=exposed, prune_mode=self.prune_mode, progress=progress,
        )  # fmt: skip
        found = {
            "divergence_nats": {n: _summary(values) for n, values in divergences.items()},
        }
        return purified(self, model, filter_map, scores, selected, self.prune_mode, found)


def clean_divergences(model: nn.Module, clean: LabelledImages, filter_map: FilterMap) -> dict[str, Tensor]:
    """Return the divergence of the clean from the remembered statistics for every filter.

    Args:
        model: The network; evaluated in eval mode, left untouched.
        clean: Clean images.
        filter_map: From ``find_filters``.

    Returns:
        Layer name to float32 ``(filters,)`` on the CPU, in nats.

    Raises:
        UnsupportedModelError: If no layer is followed by a batch norm with running statistics.
    """
    moments: dict[str, list[Tensor]] = {}

    def visit(layer: str, inputs: Tensor) -> None:
        values = inputs.detach().transpose(0, 1).flatten(1).double()
        count = torch.full((len(values),), float(values.shape[1]), dtype=torch.float64)
        mean, variance = values.mean(1).cpu(), values.var(1, unbiased=False).cpu()
        moments.setdefault(layer, []).append(torch.stack([count, mean, variance]))

    norms = visit_norm_inputs(model, clean.images, filter_map, visit)
    buffers = dict(model.named_buffers())
    divergences = {}
    for layer, norm in norms.items():
        assert norm.running_mean
        assert norm.running_var
        mean, variance = _pooled(torch.stack(moments[layer]))
        divergences[layer] = normal_divergence(
            mean,
            variance + norm.eps,
            buffers[norm.running_mean].double().cpu(),
            buffers[norm.running_var].double().cpu() + norm.eps,
        ).float()
    return divergences


def normal_divergence(mean1: Tensor, variance1: Tensor, mean2: Tensor, variance2: Tensor) -> Tensor:
    """Return KL(N(mean1, variance1) || N(mean2, variance2)), elementwise, in nats."""
    # log(s2 / s1) is half of the logarithm of the variances' ratio.
    spread = 0.5 * (variance2 / variance1).log()
    return spread + (variance1 + (mean1 - mean2).square()) / (2 * variance2) - 0.5


def _pooled(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Merge count, mean and variance of parts, ``(parts, 3, filters)``, into mean and unbiased variance."""
    count, mean, variance = parts.unbind(1)
    total = count.sum(0)
    pooled = (count * mean).sum(0) / total
    squares = (count * (variance + (mean - pooled).square())).sum(0)
    # Running variances are unbiased ones, too.
    return pooled, squares / (total - 1)


def visit_norm_inputs(
    model: nn.Module, images: Tensor, filter_map: FilterMap, visit: Callable[[str, Tensor], None]
) -> dict[str, Norm]:
    """Run ``images`` through ``model`` in eval mode and show the inputs of the filters' batch norms.

    Args:
        model: The network; left untouched.
        images: ``(N, C, H, W)``, uint8 or float32 in [0, 1].
        filter_map: From ``find_filters``.
        visit: Called as ``visit(layer name, inputs)`` for each part of the images, with inputs
            ``(n, filters, ...)``.

    Returns:
        Layer name to its norm, for all layers that were seen.

    Raises:
        UnsupportedModelError: If there is none.
    """
    modules, seen = dict(model.named_modules()), set()
    norms = {
        group.name: norm
        for group in filter_map.prunable
        for norm in group.norms
        if norm.kind == "batch" and norm.running_mean and norm.running_var
    }

    def hook(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def show(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.add(layer)
            visit(layer, inputs[0])

        return show

    places = {layer: str(norm.running_mean).rpartition(".")[0] for layer, norm in norms.items()}
    handles = [
        modules[place].register_forward_pre_hook(hook(layer))
        for layer, place in places.items()
        # A norm that is written as a function call has no module of its own to watch.
        if isinstance(modules.get(place), nn.modules.batchnorm._BatchNorm)
    ]
    try:
        logits_of(model, images, batch_size=EVALUATION_BATCH)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise UnsupportedModelError(
            "no layer of this network is followed by a batch norm module with running statistics, whose "
            "inputs this method compares; use a method that needs no such norm, such as MNP."
        )
    return {layer: norm for layer, norm in norms.items() if layer in seen}


def _summary(values: Tensor) -> Mapping[str, Any]:
    return {"mean": float(values.mean()), "max": float(values.max()), "filters": len(values)}
