"""Which filters look as if they carry the backdoor: a reading aid for reports, not a test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unbackdoor.detect.exposure import Exposure
from unbackdoor.filters.magnitude import layer_normalised
from unbackdoor.filters.saliency import taylor_saliency
from unbackdoor.inversion import InvertedTrigger
from unbackdoor.types import LabelledImages, quantise


@dataclass(frozen=True)
class SuspectFilter:
    """A filter and why it is suspicious; all values are layer-normalised.

    Args:
        layer: Its layer.
        filter: Its index there.
        suspicion: How much more the backdoor leans on it than the clean task does.
        backdoor_saliency: First-order rise of the backdoor's loss if the filter is removed.
        clean_saliency: The same for the clean loss.
        magnitude: Norm of its weights.
    """

    layer: str
    filter: int
    suspicion: float
    backdoor_saliency: float
    clean_saliency: float
    magnitude: float


def suspect_filters(
    model: nn.Module,
    clean: LabelledImages,
    exposure: Exposure,
    trigger: InvertedTrigger | None,
    *,
    count: int = 12,
) -> tuple[SuspectFilter, ...]:
    """Return the filters on which the backdoor leans more than the clean task does, most suspicious first.

    With a recovered trigger, the backdoor's loss is the cross-entropy of stamped images to the trigger's
    class; else it is the clean loss of the suppressed copy, which has little left but the backdoor. Saliency
    is MNP's Taylor estimate (arXiv 2405.17750, Eq. 11), normalised within each layer.

    Args:
        model: Takes float images in [0, 1]; left untouched.
        clean: Clean images with labels.
        exposure: Of this model.
        trigger: Its recovered trigger, or None.
        count: Most filters to return.
    """
    backdoor = exposure.after.saliency
    if trigger is not None:
        others = clean.subset(clean.labels != trigger.target_class)
        if not len(others):
            return ()
        stamped = LabelledImages(
            quantise(trigger(others.floats())), torch.full_like(others.labels, trigger.target_class)
        )
        backdoor = layer_normalised(taylor_saliency(model, stamped, exposure.filter_map))
    kept = exposure.before.saliency
    excess = {name: (backdoor[name] - kept[name]).cpu() for name in kept if name in backdoor}
    flat = torch.cat(list(excess.values()))
    places = [(name, j) for name, values in excess.items() for j in range(len(values))]
    chosen = [index for index in flat.argsort(descending=True)[:count].tolist() if flat[index] > 0]
    return tuple(_suspect(places[index], excess, backdoor, exposure) for index in chosen)


def _suspect(
    place: tuple[str, int], excess: dict[str, Tensor], backdoor: dict[str, Tensor], exposure: Exposure
) -> SuspectFilter:
    layer, index = place
    return SuspectFilter(
        layer=layer,
        filter=index,
        suspicion=float(excess[layer][index]),
        backdoor_saliency=float(backdoor[layer][index]),
        clean_saliency=float(exposure.before.saliency[layer][index]),
        magnitude=float(exposure.before.magnitude[layer][index]),
    )
