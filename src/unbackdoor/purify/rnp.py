"""Reconstructive Neuron Pruning: unlearn the clean task, recover it, prune what the recovery leaves out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.compute import check_fits
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.groups import FilterMap, find_filters
from unbackdoor.filters.mask import PruneMode
from unbackdoor.filters.select import Exposed, below
from unbackdoor.masks import LearntMasks, MaskTraining, learn_masks
from unbackdoor.purify.selection import Selection, divide, purified, select
from unbackdoor.suppression import Suppressed, Suppression, suppress
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent


@dataclass(frozen=True)
class RNP:
    """Prune the filters that the recovery of an unlearnt copy leaves out.

    Source: Li, Lyu, Ma, Koren, Lyu, Li, Jiang, "Reconstructive Neuron Pruning for Backdoor Defense", ICML
    2023, arXiv 2305.14876. Unlearning is gradient ascent on the clean loss over all weights of a copy,
    until its clean accuracy is at most CA_min; recovering learns masks m in [0, 1] on the scales of that
    copy's batch norms, which minimise ``alpha CE(F(x; m * theta_u), y)``; the original network loses the
    filters with the smallest masks.

    Deviations: the accuracy that ends unlearning is measured in eval mode on the clean images, not as the
    running mean of an epoch in train mode; the rate stays constant where the authors divide it by ten after
    10 and 20 epochs. If CA_min is not reached the last sound state is used and ``diagnostics`` says so:
    the authors' scripts write no checkpoint then, and go on with a missing or older one. The authors' code
    clips empty gradients, so nothing is clipped; neither is it here. How many filters go is decided on
    clean images by default.

    Masks exist for layers that a batch norm with a scale follows; others lose no filter. For networks
    without batch norm take ``masks.target=filter`` and ``masks.norm_mode=eval`` together: masks then multiply
    the filters' weights, in all layers but the head.

    The paper's first use of an unlearnt copy, to find the filters for other pruning methods, is
    ``selection.expose`` of those; here the copy is the one that the masks are learnt on.

    Args:
        unlearning: How the clean task is unlearnt; its ``stop_accuracy`` is CA_min.
        masks: How the recovery masks are learnt.
        alpha: Weight of the recovery loss. With SGD that is the same as a learning rate alpha times as
            large, which is how it is done.
        threshold: The paper's rule removes masks at or below it. The authors' log has 24 filters at 0.2, 32
            at 0.3 and 204 at 0.7 (ResNet-18, BadNets); the last costs 12 points of accuracy.
        on_not_reached: What to do if CA_min is not reached.
        selection: How many filters go.
        prune_mode: What removing a filter clears; the authors clear the norm's scale.
    """

    name: ClassVar[str] = "rnp"
    title: ClassVar[str] = "Reconstructive Neuron Pruning"
    source: ClassVar[str] = "Li, Lyu, Ma, Koren, Lyu, Li, Jiang 2023, arXiv 2305.14876"
    needs: ClassVar[str] = "clean images with labels; batch norms, or masks.target=filter"

    unlearning: Suppression = field(default_factory=Suppression.rnp)
    masks: MaskTraining = field(
        default_factory=lambda: MaskTraining(learning_rate=0.2, target="norm_scale", norm_mode="train")
    )
    alpha: float = 0.2
    threshold: float = 0.3
    on_not_reached: Literal["continue", "raise"] = "continue"
    selection: Selection = field(default_factory=Selection)
    prune_mode: PruneMode = "norm_scale"

    def __post_init__(self) -> None:
        if not self.alpha > 0 or not 0 <= self.threshold <= 1:
            raise InvalidInputError(
                f"alpha must be positive and threshold lie in [0, 1], got {self.alpha} and {self.threshold}."
            )
        if self.on_not_reached not in ("continue", "raise"):
            raise InvalidInputError(
                f"on_not_reached must be 'continue' or 'raise', got {self.on_not_reached!r}."
            )
        if self.masks.target == "filter" and self.masks.norm_mode == "train":
            raise InvalidInputError(
                "masks on filters do nothing while norms are in train mode, which undoes any scaling; use "
                "norm_mode = 'eval' with target = 'filter'."
            )

    @staticmethod
    def paper() -> RNP:
        """Return the settings of the authors' code, as far as it says: 20 passes each on augmented images.

        Its loop unlearns for one pass more, at a rate that falls. It prunes at each threshold from 0 to 0.9
        and prints clean accuracy and attack success of all, choosing none; 0.3 is ours, see ``threshold``.
        """
        return RNP(
            unlearning=replace(
                Suppression.rnp(), budget=20, unit="epoch", augment=True, checks_per_epoch=1
            ),
            masks=MaskTraining(
                learning_rate=0.2, target="norm_scale", norm_mode="train", tolerance=0.0, augment=True
            ),
            selection=Selection(amount="own"),
        )  # fmt: skip

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a copy of ``model`` without the filters that were not recovered.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels; a few hundred.
            generator: All randomness follows it; on the CPU.
            progress: Called during each stage.

        Raises:
            InvalidInputError: If there are too few images, or a label has no output of the model.
            UnsupportedModelError: If no layer is followed by a batch norm with a scale, or CA_min is not
                reached and ``on_not_reached`` is ``raise``.
        """
        check_fits(model, clean, purpose="purification", at_least=2)
        filter_map = find_filters(model, as_float(clean.images[:1]))
        learning, guarding = divide(clean, self.selection.held_out_fraction, generator)
        masked = _masked_layers(filter_map, self.masks.target)
        unlearnt = suppress(
            model, learning, self.unlearning, generator=rng.spawn(generator), progress=progress
        )
        reached = unlearnt.accuracies[-1] <= self.unlearning.stop_accuracy
        if not reached and self.on_not_reached == "raise":
            raise UnsupportedModelError(
                f"unlearning left a clean accuracy of {unlearnt.accuracies[-1]:.3f}, above CA_min = "
                f"{self.unlearning.stop_accuracy}; raise unlearning.budget or unlearning.learning_rate."
            )
        recovered = self._recover(unlearnt.model, learning, filter_map, rng.spawn(generator), progress)
        scores = {name: recovered.masks[name].float().cpu() for name in masked}
        exposed = Exposed(unlearnt.model, guarding) if self.selection.expose == "unlearnt" else None
        selected = select(
            model, guarding, filter_map, scores, self.selection,
            own=below(scores, self.threshold), exposed=exposed, prune_mode=self.prune_mode, progress=progress,
        )  # fmt: skip
        found = {"ca_min_reached": reached, **_measured(unlearnt, recovered)}
        return purified(self, model, filter_map, scores, selected, self.prune_mode, found)

    def _recover(
        self,
        unlearnt: nn.Module,
        clean: LabelledImages,
        filter_map: FilterMap,
        generator: torch.Generator,
        progress: Progress,
    ) -> LearntMasks:
        nothing: dict[str, Tensor] = {g.name: torch.zeros(g.filters) for g in filter_map.prunable}
        return learn_masks(
            unlearnt, clean, filter_map,
            # A factor on the loss is a factor on every step of SGD, with momentum too.
            replace(self.masks, learning_rate=self.alpha * self.masks.learning_rate),
            penalty=nothing, bounds=(0.0, 1.0), generator=generator, stage="recovering", progress=progress,
        )  # fmt: skip


def _masked_layers(filter_map: FilterMap, target: str) -> list[str]:
    names = [
        group.name
        for group in filter_map.prunable
        if target == "filter" or any(norm.kind == "batch" and norm.weight for norm in group.norms)
    ]
    if not names:
        raise UnsupportedModelError(
            "no layer of this network is followed by a batch norm with a scale, which the masks act on; use "
            "masks with target = 'filter' and norm_mode = 'eval'."
        )
    return names


def _measured(unlearnt: Suppressed, recovered: LearntMasks) -> dict[str, Any]:
    return {
        "unlearning": {
            "accuracy": list(unlearnt.accuracies),
            "stop_reason": unlearnt.stop_reason,
            "steps": unlearnt.checks[-1].step,
            "class_share": unlearnt.class_share.tolist(),
        },
        "recovering": {
            "losses": list(recovered.losses),
            "clipped_fraction": recovered.clipped,
            "steps": recovered.steps,
        },
    }
