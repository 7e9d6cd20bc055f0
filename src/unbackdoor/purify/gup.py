"""Gradient-based unlearning by pruning: remove the filters whose gradients say that they carry a trigger."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.compute import (
    EVALUATION_BATCH,
    check_fits,
    device_of,
    memory_format_for,
    mode,
)
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.groups import FilterMap, find_filters
from unbackdoor.filters.mask import FilterMask, PruneMode, cleared_tensors
from unbackdoor.filters.select import order
from unbackdoor.inversion import Inversion, InvertedTrigger
from unbackdoor.purify.copies import fine_tuned, handed_back, working_copy
from unbackdoor.purify.nc import suspects
from unbackdoor.purify.selection import Selection, divide, exposed_copy, select
from unbackdoor.train import Batch, LossStep, Recipe, cross_entropy_step
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent


@dataclass(frozen=True)
class GUP:
    """Prune the filters with the largest gradients of an unlearning loss, then fine-tune shortly.

    Source: Dunnett et al., "Unlearning Backdoor Attacks through Gradient-Based Model Pruning", 2024, arXiv
    2405.03918. Known of it: the gradients of an unlearning loss expose filters, which are pruned one after
    the other; a short fine-tune follows. Works with any norm.

    Reconstructed: nearly everything else, as no code was at hand. Ours are the loss ``CE(x, y) +
    triggered_weight CE(x', y)`` with true labels y, the scores of filters, in eval mode and float32, the
    rules by which pruning stops, and all constants. The paper stamps images with a trigger that it takes as
    known; here triggers are inverted from clean images, for the classes that Neural Cleanse flags or else the
    class with the smallest mask. If no mask works, the model comes back unchanged, and
    ``diagnostics["action"]`` says so.

    How many filters go follows ``selection``: by default the guarded walk down the first scores; ``own``
    prunes the filter with the largest gradient, takes the gradients again, and so on, until the clean
    accuracy falls by more than ``accuracy_drop`` or the triggered loss stops falling; filters removed after
    its lowest point are given back.

    Args:
        inversion: How triggers are inverted.
        anomaly_threshold: Classes with a larger anomaly index are flagged.
        fewest_classes: With fewer valid norms nothing is flagged, and the smallest mask is taken.
        triggered_weight: Weight of the triggered loss.
        score: ``gradient``, the mean absolute gradient of a filter's weights, or ``taylor``, the fall of the
            loss that its removal promises, ``<dL/dW_j, W_j>``; large ones go first.
        accuracy_drop: With ``own``, largest loss of clean accuracy, as a fraction.
        patience: With ``own``, removals without a lower triggered loss after which pruning ends.
        most: With ``own``, largest share of the filters, in (0, 1].
        selection: How many filters go.
        recipe: The short fine-tune on clean images, in which removed filters stay removed; None for none.
        prune_mode: What removing a filter clears.
    """

    name: ClassVar[str] = "gup"
    title: ClassVar[str] = "Gradient-based Unlearning by Pruning"
    source: ClassVar[str] = "Dunnett et al. 2024, arXiv 2405.03918 (reconstruction)"
    needs: ClassVar[str] = "clean images with labels"

    inversion: Inversion = field(default_factory=Inversion)
    anomaly_threshold: float = 2.0
    fewest_classes: int = 5
    triggered_weight: float = 1.0
    score: Literal["gradient", "taylor"] = "taylor"
    accuracy_drop: float = 0.05
    patience: int = 10
    most: float = 0.1
    selection: Selection = field(default_factory=Selection)
    recipe: Recipe | None = field(default_factory=lambda: Recipe(epochs=5, batch_size=64, learning_rate=0.01))
    prune_mode: PruneMode = "silence"

    def __post_init__(self) -> None:
        if not 0 < self.triggered_weight < math.inf or not self.anomaly_threshold > 0:
            raise InvalidInputError(
                "triggered_weight and anomaly_threshold must be positive, got "
                f"{self.triggered_weight} and {self.anomaly_threshold}."
            )
        if not (0 <= self.accuracy_drop <= 1 and 0 < self.most <= 1):
            raise InvalidInputError(
                f"accuracy_drop must lie in [0, 1] and most in (0, 1], got {self.accuracy_drop} and "
                f"{self.most}."
            )
        if self.score not in ("gradient", "taylor"):
            raise InvalidInputError(f"score must be 'gradient' or 'taylor', got {self.score!r}.")
        if self.patience < 1 or self.fewest_classes < 2:
            raise InvalidInputError(
                "patience must be at least 1 and fewest_classes at least 2, got "
                f"{self.patience} and {self.fewest_classes}."
            )

    @staticmethod
    def paper() -> GUP:
        """Return the iterative rule, on convolution weights, in the reading that our sources allow."""
        return GUP(
            inversion=Inversion.paper(),
            score="gradient",
            selection=Selection(amount="own"),
            prune_mode="weight",
        )

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a copy of ``model`` without the filters that carry the inverted triggers.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels; a few hundred.
            generator: All randomness follows it; on the CPU.
            progress: Called during each stage.

        Raises:
            InvalidInputError: If there are too few images, or a label has no output of the model.
            UnsupportedModelError: If the network's filters cannot be found.
        """
        check_fits(model, clean, purpose="purification", at_least=2)
        filter_map = find_filters(model, as_float(clean.images[:1]))
        learning, guarding = divide(clean, self.selection.held_out_fraction, generator)
        triggers, found = suspects(
            model,
            learning,
            self.inversion,
            threshold=self.anomaly_threshold,
            fewest=self.fewest_classes,
            smallest=True,
            generator=rng.spawn(generator),
            progress=progress,
        )
        diagnostics: dict[str, Any] = {
            "options": asdict(self),
            "action": "prune" if triggers else "none: no inverted trigger works, the model is unchanged",
            "untreated": [asdict(item) for item in filter_map.untreated],
            **found,
        }
        if not triggers:
            return Purified(handed_back(working_copy(model), model), None, {}, diagnostics)
        first = unlearning_pass(
            model, learning, triggers, filter_map, self.score, weight=self.triggered_weight
        )
        own: list[tuple[str, int]] = []
        if self.selection.amount == "own":
            own = self._own(model, learning, triggers, filter_map, first, diagnostics, progress)
        exposed = exposed_copy(
            model, learning, guarding, self.selection, generator=generator, progress=progress
        )
        selected = select(
            model, guarding, filter_map, first.scores, self.selection,
            own=own, exposed=exposed, prune_mode=self.prune_mode, progress=progress,
        )  # fmt: skip
        pruned = selected.mask.apply(model, filter_map, prune_mode=self.prune_mode)
        if self.recipe is not None:
            pruned, record = fine_tuned(
                pruned, learning, self.recipe, generator=generator,
                loss_step=keeping_cleared(selected.mask, filter_map, self.prune_mode), progress=progress,
            )  # fmt: skip
            pruned = selected.mask.apply(pruned, filter_map, prune_mode=self.prune_mode)
            diagnostics["losses"] = list(record.losses)
        return Purified(
            handed_back(pruned, model), selected.mask, first.scores, diagnostics | selected.describe()
        )

    def _own(
        self,
        model: nn.Module,
        clean: LabelledImages,
        triggers: Sequence[InvertedTrigger],
        filter_map: FilterMap,
        first: UnlearningPass,
        diagnostics: dict[str, Any],
        progress: Progress,
    ) -> list[tuple[str, int]]:
        full = FilterMask.full(filter_map)
        most = max(1, round(self.most * full.n_filters))
        removed: list[tuple[str, int]] = []
        now, lowest, kept = first, first.triggered_loss, 0
        steps = []
        while len(removed) < most and len(removed) - kept < self.patience:
            candidate = next((one for one in order(now.scores) if one not in removed), None)
            if candidate is None:
                break
            trial = full.without([*removed, candidate]).apply(model, filter_map, prune_mode=self.prune_mode)
            new = unlearning_pass(
                trial, clean, triggers, filter_map, self.score, weight=self.triggered_weight
            )
            accepted = first.accuracy - new.accuracy <= self.accuracy_drop + 1e-9
            steps.append(
                {"layer": candidate[0], "filter": candidate[1], "removed": accepted}
                | {"accuracy": new.accuracy, "triggered_loss": new.triggered_loss}
            )
            if not accepted:
                break
            removed, now = [*removed, candidate], new
            if new.triggered_loss < lowest:
                lowest, kept = new.triggered_loss, len(removed)
            progress("gradient pruning", len(removed), most)
        progress("gradient pruning", most, most)
        diagnostics["own_steps"] = steps
        return removed[:kept]


@dataclass(frozen=True, eq=False)
class UnlearningPass:
    """What one pass over clean and stamped images shows.

    Args:
        scores: Layer name to float32 ``(filters,)`` on the CPU: lower goes first, so they are negated.
        accuracy: On clean images.
        triggered_loss: Mean cross-entropy on stamped images with their true labels.
    """

    scores: dict[str, Tensor]
    accuracy: float
    triggered_loss: float


def unlearning_pass(
    model: nn.Module,
    clean: LabelledImages,
    triggers: Sequence[InvertedTrigger],
    filter_map: FilterMap,
    score: Literal["gradient", "taylor"] = "gradient",
    *,
    weight: float,
    batch_size: int = EVALUATION_BATCH,
) -> UnlearningPass:
    """Take the gradient of ``CE(x, y) + weight CE(x', y)`` over all images, in eval mode and float32.

    Args:
        model: The network; left untouched.
        clean: Images and true labels.
        triggers: x' is each image with each of them; their losses are averaged.
        filter_map: From ``find_filters``.
        score: See ``GUP``.
        weight: Of the triggered loss.
        batch_size: Images a pass; gradients are summed, so it changes nothing.
    """
    work = working_copy(model).requires_grad_(False)
    parameters = dict(work.named_parameters())
    weights = [parameters[group.weight].requires_grad_() for group in filter_map.require_prunable()]
    totals = [torch.zeros_like(tensor) for tensor in weights]
    device, layout = device_of(model), memory_format_for(model)
    hits, triggered = 0, 0.0
    with mode(work, training=False), torch.enable_grad():
        for part in torch.arange(len(clean)).split(batch_size):
            images, labels = as_float(clean.images[part].to(device)), clean.labels[part].to(device)
            variants = [images, *(trigger(images) for trigger in triggers)]
            for index, variant in enumerate(variants):
                logits = work(variant.contiguous(memory_format=layout)).float()
                loss = F.cross_entropy(logits, labels, reduction="sum") / len(clean)
                if index == 0:
                    hits += int((logits.argmax(1) == labels).sum())
                else:
                    triggered += float(loss.detach()) / len(triggers)
                    loss = loss * weight / len(triggers)
                for total, gradient in zip(totals, torch.autograd.grad(loss, weights), strict=True):
                    total.add_(gradient)
    values = [
        total.abs().flatten(1).mean(1) if score == "gradient" else (total * tensor.detach()).flatten(1).sum(1)
        for total, tensor in zip(totals, weights, strict=True)
    ]
    scores = {
        group.name: -value.float().cpu() for group, value in zip(filter_map.prunable, values, strict=True)
    }
    return UnlearningPass(scores, hits / len(clean), triggered)


def keeping_cleared(mask: FilterMask, filter_map: FilterMap, prune_mode: PruneMode) -> LossStep:
    """Return ordinary training that clears the removed filters again before each step."""
    cleared = {
        name: ~kept
        for layer, kept in mask.keep.items()
        if not bool(kept.all())
        for name in cleared_tensors(filter_map.group(layer), prune_mode)
    }

    def step(model: nn.Module, batch: Batch) -> Tensor:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for name, gone in cleared.items():
                tensors[name][gone.to(tensors[name].device)] = 0
        return cross_entropy_step(model, batch)

    return step
