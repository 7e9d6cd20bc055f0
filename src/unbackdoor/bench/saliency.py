"""CLC and BLC of every filter of a model, with its norm: what Fig. 1 of the MNP paper shows.

Source: MNP (arXiv 2405.17750), Eqs. 2 and 3. BLC takes the same images with the trigger and the labels that
the attacker wants, those of the target class included, as printed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor.filters import find_filters
from unbackdoor.filters.ablation import ablate
from unbackdoor.filters.magnitude import magnitudes
from unbackdoor.filters.mask import PruneMode
from unbackdoor.types import Infected, LabelledImages, Progress, as_float, quantise, silent


def ablations(
    model: nn.Module,
    infected: Infected | None,
    images: LabelledImages,
    *,
    prune_mode: PruneMode = "silence",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure every filter.

    Args:
        model: The network.
        infected: Trigger and label rule; None for a clean model, which has no BLC.
        images: D_t of the paper, clean.
        prune_mode: What removing means.
        progress: Called after each filter.

    Returns:
        JSON values: ``filters`` by layer with lists ``magnitude`` (l_2 norms), ``clc`` and ``blc`` (nats),
        and the losses of the whole model. What is not finite stays so: ``records.recorded`` makes it None.
    """
    filter_map = find_filters(model, as_float(images.images[:1]))
    columns = {"magnitude": magnitudes(model, filter_map)}
    clean = ablate(model, images, filter_map, prune_mode=prune_mode, progress=progress)
    columns["clc"] = clean.changes()
    losses = {"clean_loss": clean.base}
    if infected is not None:
        stamped = ablate(
            model, triggered(images, infected), filter_map, prune_mode=prune_mode, progress=progress
        )
        columns["blc"] = stamped.changes()
        losses["backdoor_loss"] = stamped.base
    layers = [group.name for group in filter_map.prunable]
    return {
        **losses,
        "filters": {
            layer: {name: _rounded(values[layer]) for name, values in columns.items()} for layer in layers
        },
    }


def triggered(images: LabelledImages, infected: Infected) -> LabelledImages:
    """Return all images with the trigger, on 8-bit levels, and the labels that the attacker wants."""
    stamped = [quantise(infected.trigger(as_float(part))) for part in images.images.split(1024)]
    return LabelledImages(torch.cat(stamped), infected.label_rule(images.labels), images.class_names)


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
