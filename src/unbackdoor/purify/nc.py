"""Neural Cleanse as a purifier: invert the trigger, then make the model forget it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.compute import check_fits
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.groups import find_filters
from unbackdoor.filters.head import head_features, linear_head
from unbackdoor.filters.select import Exposed, Step, order
from unbackdoor.inversion import Inversion, InvertedTrigger, anomaly_indices, invert_all, norms_of
from unbackdoor.purify.copies import fine_tuned, handed_back, working_copy
from unbackdoor.purify.selection import Selection, divide, exposed_copy, guarded_units
from unbackdoor.train import Batch, LossStep, Recipe
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent

_TINY = 1e-6
"""Keeps the logarithm of a norm finite."""


@dataclass(frozen=True)
class NC:
    """Invert a trigger for each class, and unlearn (or prune away) those that are suspiciously small.

    Source: Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks",
    IEEE S&P 2019, sections IV to VI: inversion, anomaly index by the median absolute deviation, mitigation
    by unlearning (fine-tuning with the inverted trigger under true labels) or by pruning the penultimate
    units that the trigger excites most.

    If no class is flagged the model comes back unchanged, and ``diagnostics["action"]`` says so:
    that, not a failed repair, is what NC's numbers on large or dynamic triggers usually are. Works with any
    norm; pruning needs a linear head on flat features.

    Deviations: triggers stay tensors (saving them as images with rescaling distorts mask times pattern);
    what is fine-tuned is what is returned; a class whose trigger does not work is left out of the median
    instead of entering it with a meaningless norm; too few classes, or MAD 0, give no false index. The
    trigger is stamped after augmentation, so that a flip never moves it. Pruning zeroes columns of the
    head, which is exactly pruning the penultimate units, also behind a residual sum. How many go follows
    ``selection``; ``own`` is the paper's rule, from the top until the trigger stops working.

    Args:
        inversion: How triggers are inverted.
        anomaly_threshold: Classes with a larger index are flagged; the paper's 2.
        fewest_classes: With fewer valid norms nothing is flagged: their median says nothing.
        act_on: ``flagged`` classes, or the class with the ``smallest`` norm if none is flagged.
        mitigation: ``unlearn`` or ``prune``.
        recipe: Unlearning; its epochs are passes over the clean images.
        stamped_fraction: Share of each batch that carries an inverted trigger, in (0, 1]; at least one image.
        selection: How many penultimate units go, for ``prune``; its guard's ``screen`` has no part.
        own_success: With ``own``, prune until the inverted triggers' success is at most this, in [0, 1].
    """

    name: ClassVar[str] = "nc"
    title: ClassVar[str] = "Neural Cleanse"
    source: ClassVar[str] = "Wang et al. 2019, IEEE S&P"
    needs: ClassVar[str] = "clean images with labels"

    inversion: Inversion = field(default_factory=Inversion)
    anomaly_threshold: float = 2.0
    fewest_classes: int = 5
    act_on: Literal["flagged", "smallest"] = "flagged"
    mitigation: Literal["unlearn", "prune"] = "unlearn"
    recipe: Recipe = field(
        default_factory=lambda: Recipe(epochs=15, batch_size=64, learning_rate=0.01, schedule="cosine")
    )
    stamped_fraction: float = 0.2
    selection: Selection = field(default_factory=Selection)
    own_success: float = 0.05

    def __post_init__(self) -> None:
        if self.act_on not in ("flagged", "smallest") or self.mitigation not in ("unlearn", "prune"):
            raise InvalidInputError(
                "act_on must be 'flagged' or 'smallest' and mitigation 'unlearn' or 'prune', got "
                f"{self.act_on!r} and {self.mitigation!r}."
            )
        if not 0 < self.stamped_fraction <= 1 or not 0 <= self.own_success <= 1:
            raise InvalidInputError(
                "stamped_fraction must lie in (0, 1] and own_success in [0, 1], got "
                f"{self.stamped_fraction} and {self.own_success}."
            )
        if not self.anomaly_threshold > 0 or self.fewest_classes < 2:
            raise InvalidInputError(
                "anomaly_threshold must be positive and fewest_classes at least 2, got "
                f"{self.anomaly_threshold} and {self.fewest_classes}."
            )

    @staticmethod
    def paper() -> NC:
        """Return the paper's budget: the authors' inversion, then one pass with a fifth of it stamped.

        The paper's clean share is 10 % of the training data. Its learning rate is not stated; 0.01 is what
        later code uses.
        """
        return NC(
            inversion=Inversion.paper(),
            recipe=Recipe(
                epochs=1,
                learning_rate=0.01,
                schedule="constant",
                crop_padding=0,
                flip=False,
                precision="fp32",
            ),
            selection=Selection(amount="own"),
        )

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a copy of ``model`` that has unlearnt the triggers found in it, if any.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels; a few hundred.
            generator: All randomness follows it; on the CPU.
            progress: Called during each stage.

        Raises:
            InvalidInputError: If there are too few images, or a label has no output of the model.
            UnsupportedModelError: If pruning is asked for and the head is not linear on flat features.
        """
        check_fits(model, clean, purpose="purification", at_least=2)
        find_filters(model, as_float(clean.images[:1]))
        prunes = self.mitigation == "prune"
        held_out = self.selection.held_out_fraction if prunes else 0.0
        learning, guarding = divide(clean, held_out, generator)
        acted, found = suspects(
            model,
            learning,
            self.inversion,
            threshold=self.anomaly_threshold,
            fewest=self.fewest_classes,
            smallest=self.act_on == "smallest",
            generator=rng.spawn(generator),
            progress=progress,
        )
        diagnostics: dict[str, Any] = {
            "options": asdict(self),
            "action": self.mitigation if acted else "none: no class was flagged, the model is unchanged",
            **found,
        }
        if not acted:
            return Purified(handed_back(working_copy(model), model), None, {}, diagnostics)
        if prunes:
            exposed = exposed_copy(
                model, learning, guarding, self.selection, generator=generator, progress=progress
            )
            return self._prune(model, learning, guarding, exposed, acted, diagnostics, progress)
        work, record = fine_tuned(
            model,
            learning,
            self.recipe,
            generator=generator,
            loss_step=stamped_step(acted, self.stamped_fraction),
            stage="unlearning",
            progress=progress,
        )
        return Purified(work, None, {}, diagnostics | {"losses": list(record.losses)})

    def _prune(
        self,
        model: nn.Module,
        learning: LabelledImages,
        guarding: LabelledImages,
        exposed: Exposed | None,
        triggers: Sequence[InvertedTrigger],
        diagnostics: Mapping[str, Any],
        progress: Progress,
    ) -> Purified:
        head = linear_head(model, learning.images)
        before = head_features(model, head, learning.images)
        stamped = [head_features(model, head, trigger(learning.floats())) for trigger in triggers]
        guarded = before if guarding is learning else head_features(model, head, guarding.images)
        rises = torch.stack([(after - before).mean(0) for after in stamped])
        units = f"{head}.inputs"
        scores = {units: -rises.amax(0).cpu()}
        work = working_copy(model)
        layer = work.get_submodule(head)
        assert isinstance(layer, nn.Linear)
        copy = None
        if exposed is not None:
            copied = exposed.model.get_submodule(head)
            copy = copied, head_features(exposed.model, head, guarding.images)
        labels, guarded_labels = (part.labels.to(before.device) for part in (learning, guarding))
        walk = _Walk(layer, units, guarded, guarded_labels, copy, stamped, triggers, labels)
        ranked = [unit for _, unit in order(scores)]
        excited = int((scores[units] < 0).sum())
        removed, steps = walk.remove(ranked, self.selection, excited, self.own_success)
        progress("pruning units", 1, 1)
        with torch.no_grad():
            layer.weight[:, removed] = 0.0
        found = {
            "pruned_units": removed,
            "trigger_success": walk.success(walk.keeping(removed)),
            "walk": [step.describe() for step in steps],
        }
        return Purified(handed_back(work, model), None, scores, {**diagnostics, **found})


def suspects(
    model: nn.Module,
    clean: LabelledImages,
    inversion: Inversion,
    *,
    threshold: float,
    fewest: int,
    smallest: bool,
    largest_share: float = 1.0,
    least_log_index: float = -math.inf,
    unreached: float = math.nan,
    refined: int = 0,
    restarts: int = 0,
    generator: torch.Generator,
    progress: Progress = silent,
) -> tuple[list[InvertedTrigger], dict[str, Any]]:
    """Invert all triggers and return those to act on, with JSON values that say why.

    One start may miss the small trigger that a class has. Those with the smallest are therefore inverted
    from ``restarts`` further ones before they are judged by their best. The median that they are compared
    with hangs on other classes.

    Args:
        model: Left untouched.
        clean: Clean images with labels.
        inversion: How triggers are inverted.
        threshold: Classes with a larger anomaly index are flagged.
        fewest: With fewer valid norms nothing is flagged.
        smallest: Act on the smallest mask that works if nothing is flagged.
        largest_share: Flagged classes also need a norm of at most this share of the median.
        least_log_index: And an anomaly index of at least this by the norms' logarithms.
        unreached: The norm that classes without a trigger that works count as, and the largest that counts;
            NaN leaves them out.
        refined: How many classes, from the smallest trigger, get further starts.
        restarts: How many each.
        generator: All randomness follows it.
        progress: Called after each round.

    Returns:
        The best trigger of each class to act on, and the other ones of it that work and are no larger than
        what makes a class suspicious.
    """
    first = invert_all(model, clean, inversion, generator=generator, progress=progress)
    ranked = sorted(first, key=lambda trigger: (not trigger.reached, trigger.norm))
    again = [trigger.target_class for trigger in ranked[:refined] for _ in range(restarts)]
    more = (
        invert_all(model, clean, inversion, classes=again, generator=generator, progress=progress)
        if again
        else ()
    )
    triggers = [_best((one, *(t for t in more if t.target_class == one.target_class))) for one in first]
    logs = _log_indices(triggers, fewest=fewest, unreached=unreached)
    indices, small = flagged_classes(
        triggers, threshold, fewest=fewest, largest_share=largest_share, unreached=unreached
    )
    flagged = [target for target in small if _at_least(logs[target], least_log_index)]
    middle = _median_norm(triggers, unreached)
    chosen = flagged or (smallest_reached(triggers) if smallest else [])
    found = {
        "triggers": [trigger.describe() for trigger in triggers],
        "anomaly_indices": [None if math.isnan(index) else index for index in indices],
        "median": None if math.isnan(middle) else middle,
        "flagged": flagged,
        "acted_on": chosen,
        "log_index": max((logs[k] for k in chosen if not math.isnan(logs[k])), default=None),
    }
    if more:
        found["inverted_anew"] = [trigger.describe() for trigger in more]
    acted = [trigger for trigger in triggers if trigger.target_class in chosen]
    limit = max(largest_share * middle, *(trigger.norm for trigger in acted)) if acted else math.nan
    others = [
        trigger
        for trigger in (*first, *more)
        if trigger.target_class in chosen
        and trigger.reached
        and trigger.norm <= limit
        and all(trigger is not each for each in acted)
    ]
    return [*acted, *others], found


def _best(triggers: Sequence[InvertedTrigger]) -> InvertedTrigger:
    """Return the smallest trigger that works, or else the first."""
    return min(triggers, key=lambda trigger: trigger.norm if trigger.reached else math.inf)


def flagged_classes(
    triggers: Sequence[InvertedTrigger],
    threshold: float,
    *,
    fewest: int,
    largest_share: float = 1.0,
    unreached: float = math.nan,
) -> tuple[list[float], list[int]]:
    """Return the anomaly index of each norm, NaN where there is none, and the flagged classes."""
    norms = norms_of(triggers, unreached=unreached)
    indices = anomaly_indices(norms, fewest=fewest)
    limit = largest_share * _median_norm(triggers, unreached)
    flagged = [
        trigger.target_class
        for trigger, index in zip(triggers, indices, strict=True)
        if trigger.reached and index > threshold and trigger.norm <= limit
    ]
    return indices, flagged


def _log_indices(triggers: Sequence[InvertedTrigger], *, fewest: int, unreached: float) -> dict[int, float]:
    """Return the anomaly index of each class by the norms' logarithms, NaN where there is none."""
    # The maximum of NaN and anything after it is NaN.
    logs = [math.log(max(norm, _TINY)) for norm in norms_of(triggers, unreached=unreached)]
    indices = anomaly_indices(logs, fewest=fewest)
    return {trigger.target_class: index for trigger, index in zip(triggers, indices, strict=True)}


def _at_least(index: float, bound: float) -> bool:
    """Say whether an index reaches a bound; one that there is not does if the bound is -inf."""
    return index >= bound or bound == -math.inf


def _median_norm(triggers: Sequence[InvertedTrigger], unreached: float) -> float:
    """Return the median norm of the triggers that work, others as ``unreached``; NaN if there is none."""
    norms = torch.tensor(norms_of(triggers, unreached=unreached))
    return float(norms.nanquantile(0.5)) if triggers else math.nan


def smallest_reached(triggers: Sequence[InvertedTrigger]) -> list[int]:
    """Return the class with the smallest mask that works, or nothing."""
    reached = [trigger for trigger in triggers if trigger.reached]
    return [min(reached, key=lambda trigger: trigger.norm).target_class] if reached else []


def stamped_step(triggers: Sequence[InvertedTrigger], fraction: float) -> LossStep:
    """Return a loss step that stamps a share of each batch, and keeps the true labels.

    Args:
        triggers: Each stamped image gets one of them at random.
        fraction: Share of the batch, in (0, 1]; at least one image.
    """

    def step(model: nn.Module, batch: Batch) -> Tensor:
        count = max(1, int(fraction * len(batch.images)))
        images = batch.images.clone()
        # The training loop has fenced torch's global generator off.
        which = torch.randint(len(triggers), (count,)).tolist()
        for place, index in zip(torch.randperm(len(images))[:count].tolist(), which, strict=True):
            images[place] = triggers[index](images[place : place + 1])[0]
        logits: Tensor = model(images)
        return F.cross_entropy(logits.float(), batch.labels)

    return step


@dataclass(frozen=True, eq=False)
class _Walk:
    """Pruning units on features that were computed once: each trial costs one product with the head.

    Args:
        head: The linear layer.
        units: What its inputs are called.
        clean: Features ``(N, F)`` of the images on which the cost is measured.
        clean_labels: Their labels.
        copy: The head and the features of the same images in an exposed copy, if there is one.
        stamped: For each trigger, features of the images that learn, stamped with it.
        triggers: The triggers.
        labels: The labels of the images that learn.
    """

    head: nn.Linear
    units: str
    clean: Tensor
    clean_labels: Tensor
    copy: tuple[nn.Module, Tensor] | None
    stamped: Sequence[Tensor]
    triggers: Sequence[InvertedTrigger]
    labels: Tensor

    def keeping(self, removed: Sequence[int]) -> Tensor:
        """Return a float ``(F,)`` mask without ``removed``."""
        keep = torch.ones(self.clean.shape[1], device=self.clean.device)
        keep[list(removed)] = 0.0
        return keep

    @torch.no_grad()
    def success(self, keep: Tensor) -> float:
        """Return the largest success of the triggers on images of other classes."""
        rates = []
        for features, trigger in zip(self.stamped, self.triggers, strict=True):
            others = self.labels != trigger.target_class
            hits = self.head(features * keep).argmax(1)[others] == trigger.target_class
            rates.append(float(hits.float().mean()))
        return max(rates)

    @torch.no_grad()
    def measure(self, removed: Sequence[int]) -> tuple[float, float]:
        """Return mean clean cross-entropy and accuracy without the units ``removed``."""
        logits = self.head(self.clean * self.keeping(removed))
        loss = float(F.cross_entropy(logits, self.clean_labels))
        return loss, float((logits.argmax(1) == self.clean_labels).float().mean())

    @torch.no_grad()
    def _copy_loss(self, removed: Sequence[int]) -> float:
        assert self.copy is not None
        head, features = self.copy
        return float(F.cross_entropy(head(features * self.keeping(removed)), self.clean_labels))

    def remove(
        self, ranked: Sequence[int], selection: Selection, excited: int, own_success: float
    ) -> tuple[list[int], list[Step]]:
        """Return the units that go, by the rule of ``selection``, and the steps of its guarded walk."""
        if selection.amount == "count":
            return list(ranked[: selection.count]), []
        if selection.amount == "fraction":
            return list(ranked[: round(selection.fraction * len(ranked))]), []
        if selection.amount == "own":
            # Units that the trigger does not excite cannot carry it, whatever its success.
            enough = (n for n in range(excited + 1) if self.success(self.keeping(ranked[:n])) <= own_success)
            return list(ranked[: next(enough, excited)]), []
        candidates = ranked[: max(1, round(selection.guard.candidates * len(ranked)))]
        exposed = self._copy_loss if self.copy else None
        return guarded_units(self.measure, self.units, candidates, selection.guard, exposed=exposed)
