"""Two-stage backdoor defence: clear the weights that unlearning moves most, then tune flat."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.compute import accuracy_of, check_fits
from unbackdoor.data.splits import split
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.groups import FilterMap, find_filters
from unbackdoor.filters.select import order
from unbackdoor.purify.copies import fine_tuned
from unbackdoor.purify.ft import training_summary
from unbackdoor.purify.ft_sam import gradients_of, learnable, shifted_loss
from unbackdoor.purify.selection import Selection
from unbackdoor.suppression import Suppressed, Suppression, suppress
from unbackdoor.train import Batch, Recipe, TrainingRecord
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent


@dataclass(frozen=True)
class TSBD:
    """Clear single weights where unlearning clean images changes filters most, then fine-tune.

    Source: Lin, Liu, Wei, Li, Xiong, "Unveiling and Mitigating Backdoor Vulnerabilities based on Unlearning
    Weight Changes and Backdoor Activeness", NeurIPS 2024, arXiv 2405.20291. Stage 1: gradient ascent on a
    copy until its clean accuracy is chance; a filter's weight change is ``sum |w_unlearnt - w|``; in the
    share n of the filters with the largest, the fraction m of their weights that moved most becomes zero in
    the original. Stage 2: fine-tuning with ``(1 - alpha) g1 + alpha g2``, g1 the gradient at theta and g2
    that at ``theta + r g1 / ||g1||``, norm by norm of each parameter. Cleared weights may learn again.

    The share n: neither paper nor code has a rule, so results picked by attack success are an oracle. Under
    ``guarded`` n is the largest of ``shares`` whose whole defence loses no more accuracy on held-out clean
    images than ``selection.guard.accuracy``, against the same fine-tuning without cleared weights (n = 0,
    also the answer if none does). It is found by bisection, all runs with the same randomness, and what was
    measured is returned; the other limits of the guard have no part.

    Deviations: unlearning at 0.01 in steps of 128 images for the code's 1e-4, which takes hundreds of
    passes, without its crops and flips; chance is 1 / K for the code's 0.10, and accuracy is that of the
    images that unlearn, as they are; 10 epochs of batch 32 whose rate falls as a cosine for 21 of 256 at a
    constant one. Every conv layer counts, shortcuts too: their few weights make small sums. Numbers of
    filters and weights are rounded, where the code cuts them off; it also clears every weight that equals
    the last one chosen, and ranks filters by four decimals. Running statistics follow theta in stage 2: in
    the code they only move through an extra pass that is there to watch the loss. Images are shuffled.

    Args:
        unlearning: Gradient ascent of stage 1.
        stop_at_chance: End it at accuracy 1 / K, whatever ``unlearning.stop_accuracy`` says.
        weight_fraction: m, of the weights of the chosen filters, in [0, 1].
        selection: How many filters are chosen: ``guarded``, ``count`` or ``fraction`` (of the conv filters).
        shares: Values of n that ``guarded`` chooses from, ascending, in (0, 1].
        held_out_fraction: Share of the images that ``guarded`` measures on, in (0, 1).
        radius: r, positive.
        alpha: Weight of the gradient at the shift, in [0, 1].
        recipe: Of the fine-tuning.
    """

    name: ClassVar[str] = "tsbd"
    title: ClassVar[str] = "Two-stage backdoor defence"
    source: ClassVar[str] = "Lin, Liu, Wei, Li, Xiong 2024, arXiv 2405.20291"
    needs: ClassVar[str] = "clean images with labels; convolutions"

    unlearning: Suppression = field(default_factory=lambda: Suppression(mu=0.0))
    stop_at_chance: bool = True
    weight_fraction: float = 0.7
    selection: Selection = field(default_factory=Selection)
    shares: tuple[float, ...] = (0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
    held_out_fraction: float = 0.2
    radius: float = 0.05
    alpha: float = 0.7
    recipe: Recipe = field(
        default_factory=lambda: Recipe(epochs=10, batch_size=32, learning_rate=0.01, weight_decay=0.0)
    )

    def __post_init__(self) -> None:
        if self.selection.amount == "own":
            raise InvalidInputError(
                "the paper has no rule for the number of filters, so amount 'own' means nothing here; use "
                "'guarded', 'count' or 'fraction'."
            )
        if self.selection.held_out_fraction or self.selection.expose != "none":
            raise InvalidInputError(
                "this method has a held_out_fraction and an unlearnt copy of its own; set held_out_fraction, "
                "and leave selection.held_out_fraction at 0 and selection.expose at 'none'."
            )
        if not (0 <= self.weight_fraction <= 1 and 0 <= self.alpha <= 1 and 0 < self.held_out_fraction < 1):
            raise InvalidInputError(
                "weight_fraction and alpha must lie in [0, 1] and held_out_fraction in (0, 1), got "
                f"{self.weight_fraction}, {self.alpha} and {self.held_out_fraction}."
            )
        if not self.shares or list(self.shares) != sorted(set(self.shares)):
            raise InvalidInputError(f"shares must be distinct and ascending, got {self.shares}.")
        if not (self.shares[0] > 0 and self.shares[-1] <= 1 and self.radius > 0):
            raise InvalidInputError(
                f"shares must lie in (0, 1] and radius be positive, got {self.shares} and {self.radius}."
            )

    @staticmethod
    def paper(share: float = 0.15) -> TSBD:
        """Return the settings of the official code, which runs a list of shares; name one of them.

        Args:
            share: n. The code has 0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7 and 0.9.
        """
        return TSBD(
            unlearning=Suppression(
                mu=0.0, learning_rate=1e-4, budget=1000, unit="epoch", batch_size=256, augment=True,
                checks_per_epoch=1,
            ),
            selection=Selection(amount="fraction", fraction=share),
            recipe=Recipe(
                epochs=21, batch_size=256, learning_rate=0.01, weight_decay=0.0, schedule="constant"
            ),
        )  # fmt: skip

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a copy of ``model`` with weights cleared and fine-tuned.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels; a few hundred.
            generator: All randomness follows it; on the CPU.
            progress: Called during each stage.

        Raises:
            InvalidInputError: If there are too few images, or a label has no output of the model.
            UnsupportedModelError: If the model has no convolution that can lose weights, or training
                diverges.
        """
        classes = check_fits(model, clean, purpose="purification", at_least=2)
        filter_map = find_filters(model, as_float(clean.images[:1]))
        guarded = self.selection.amount == "guarded"
        learning, held = clean, clean
        if guarded:
            learning, held = split(clean, self.held_out_fraction, rng.spawn(generator))
        options = self.unlearning
        if self.stop_at_chance:
            options = replace(options, stop_accuracy=1 / classes)
        unlearnt = suppress(model, learning, options, generator=rng.spawn(generator), progress=progress)
        moves = weight_changes(model, unlearnt.model, filter_map)
        run = _Run(self, model, filter_map, moves, learning, held, rng.draw_seed(generator), progress)
        tried = _largest_allowed(run, self) if guarded else [run.attempt(self._count(moves))]
        return Purified(
            model=tried[-1].model,
            mask=None,
            scores={name: -change.flatten(1).sum(1).cpu() for name, change in moves.items()},
            diagnostics=_diagnostics(self, unlearnt, tried, learning, held if guarded else None),
        )

    def _count(self, moves: Mapping[str, Tensor]) -> int:
        total = sum(len(change) for change in moves.values())
        selection = self.selection
        return selection.count if selection.amount == "count" else round(selection.fraction * total)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return a loss whose value is the mix of both losses and whose gradient is that of stage 2."""
        weights = learnable(model)
        logits: Tensor = model(batch.images)
        first = F.cross_entropy(logits.float(), batch.labels)
        gradients = gradients_of(first, weights)
        shifts = {name: self.radius * g / g.norm().clamp_min(1e-12) for name, g in gradients.items()}
        # g1 is known by now: as coefficients of the weights it saves the second backward pass at theta.
        linear = torch.stack([(gradients[name] * weights[name]).sum() for name in gradients]).sum()
        at_theta = first.detach() + linear - linear.detach()
        return (1 - self.alpha) * at_theta + self.alpha * shifted_loss(model, batch, shifts)


def weight_changes(model: nn.Module, unlearnt: nn.Module, filter_map: FilterMap) -> dict[str, Tensor]:
    """Return ``|w_unlearnt - w|`` of each conv layer by name, float32 of the weight's shape.

    Raises:
        UnsupportedModelError: If there is no conv layer but the head.
    """
    changes = {
        group.name: (
            unlearnt.get_parameter(group.weight).detach().float()
            - model.get_parameter(group.weight).detach().float()
        ).abs()
        for group in filter_map.prunable
        if group.kind == "conv"
    }
    if not changes:
        raise UnsupportedModelError(
            "this network has no convolution whose filters can be told apart, and weight changes are "
            "compared between those; use a fine-tuning method."
        )
    return changes


def cleared_weights(changes: Mapping[str, Tensor], count: int, fraction: float) -> dict[str, Tensor]:
    """Return which single weights go: the largest changes within the filters that changed most.

    Args:
        changes: Layer name to the change of each weight, ``(filters, ...)``.
        count: Number of filters that are looked at.
        fraction: Share of their weights that go, in [0, 1].

    Returns:
        Layer name to bool of the weight's shape; True goes.
    """
    ranked = order({name: -change.flatten(1).sum(1) for name, change in changes.items()})[:count]
    gone = {name: torch.zeros_like(change, dtype=torch.bool) for name, change in changes.items()}
    if not ranked:
        return gone
    pool = torch.cat([changes[name][j].flatten() for name, j in ranked])
    chosen = torch.zeros_like(pool, dtype=torch.bool)
    chosen[pool.argsort(descending=True, stable=True)[: round(fraction * len(pool))]] = True
    sizes = [changes[name][j].numel() for name, j in ranked]
    for (name, j), part in zip(ranked, chosen.split(sizes), strict=True):
        gone[name][j] = part.view_as(changes[name][j])
    return gone


@dataclass(frozen=True, eq=False)
class _Attempt:
    model: nn.Module
    filters: int
    weights: int
    accuracy: float
    record: TrainingRecord


@dataclass(frozen=True, eq=False)
class _Run:
    """Clears and fine-tunes with the same randomness each time."""

    method: TSBD
    model: nn.Module
    filter_map: FilterMap
    changes: Mapping[str, Tensor]
    learning: LabelledImages
    held: LabelledImages
    seed: int
    progress: Progress

    def attempt(self, count: int) -> _Attempt:
        gone = cleared_weights(self.changes, count, self.method.weight_fraction)
        cleared = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, chosen in gone.items():
                cleared.get_parameter(self.filter_map.group(name).weight)[chosen] = 0.0
        tuned, record = fine_tuned(
            cleared,
            self.learning,
            self.method.recipe,
            generator=rng.generator(self.seed),
            loss_step=self.method.loss,
            stage=f"fine-tuning without {count} filters",
            progress=self.progress,
        )
        weights = sum(int(chosen.sum()) for chosen in gone.values())
        return _Attempt(tuned, count, weights, accuracy_of(tuned, self.held), record)


def _largest_allowed(run: _Run, method: TSBD) -> list[_Attempt]:
    """Return all attempts of a bisection over the shares, the chosen one last."""
    total = sum(len(change) for change in run.changes.values())
    counts = sorted({max(1, round(share * total)) for share in method.shares})
    plain = best = run.attempt(0)
    tried = [plain]
    low, high = 0, len(counts)
    while low < high:
        middle = (low + high) // 2
        attempt = run.attempt(counts[middle])
        tried.append(attempt)
        if plain.accuracy - attempt.accuracy <= method.selection.guard.accuracy + 1e-9:
            low, best = middle + 1, attempt
        else:
            high = middle
    return [*(attempt for attempt in tried if attempt is not best), best]


def _diagnostics(
    method: TSBD,
    unlearnt: Suppressed,
    tried: Sequence[_Attempt],
    learning: LabelledImages,
    held: LabelledImages | None,
) -> dict[str, Any]:
    chosen = tried[-1]
    return {
        "options": asdict(method),
        "learning_images": len(learning),
        "held_out_images": len(held) if held else 0,
        "unlearning": {
            "accuracy": list(unlearnt.accuracies),
            "stop_reason": unlearnt.stop_reason,
            "steps": unlearnt.checks[-1].step,
        },
        "filters": chosen.filters,
        "weights_cleared": chosen.weights,
        "tried": [
            {"filters": a.filters, "weights": a.weights, "accuracy": a.accuracy}
            for a in sorted(tried, key=lambda a: a.filters)
        ],
        "fine_tuning": training_summary(chosen.record),
    }
