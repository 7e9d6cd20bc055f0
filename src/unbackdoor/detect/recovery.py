"""How much of what clean suppression broke does one filter give back? In an infected model a lot."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.concentration import SMALLEST_CLASS_COUNT, shift_concentration, target_concentration
from unbackdoor.detect.calibration import Calibration, threshold_from
from unbackdoor.detect.floor import too_little_at_first
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.groups import find_filters
from unbackdoor.filters.mask import FilterMask
from unbackdoor.filters.saliency import taylor_saliency
from unbackdoor.filters.select import order, removal_losses
from unbackdoor.suppression import Suppressed, Suppression, confusion_of, suppress
from unbackdoor.types import Detection, LabelledImages, Progress, as_float, silent

MOST_OF_ONE_CLASS = 0.5
"""A step from class to class is no pattern if images of one class are more of it than this."""


@dataclass(frozen=True)
class Recovery:
    """Measure how much clean loss single filters give back when they leave the suppressed model.

    Source: after MNP (Li, Jiang, Yi 2024, arXiv 2405.17750), section 4: once the clean task is suppressed
    (Eq. 6), what is left is the backdoor, and few filters carry it.

    Ours: the paper prunes such filters and detects by another statistic. Here the loss L that the suppressed
    model has on clean images is compared with L without a filter j, ``(L - L_j) / L``. A backdoor pulls clean
    images to its target through a few filters, and one of them gives most of L back; in a clean model
    suppression has spoilt all of them a little. Only deep layers are looked at, and there only filters that
    the model itself does not need: in the first layers of clean models, too, there are filters that give back
    much. The score is the mean of the ``count`` largest benefits.

    The suspected target is the class that lost most of its wrong images when the filters of the score left
    together; there is none where these images were moved by a step from class to class (all-to-all), of
    several classes alike.

    Args:
        suppression: Clean suppression, Eq. 6 of MNP.
        depth: Share of the layers that are looked at, from the one that runs last before the head, in (0, 1].
        candidates: So many filters are tried, by the first-order estimate of their benefit (Eq. 11).
        spared: A filter counts only if the clean loss of the model itself rises by at most this (nats)
            without it.
        count: The score is the mean over so many filters.
        shift_weight: Factor on the concentration of shifts, as for class collapse.
        threshold: Used without a calibration.
        calibration: Scores of clean models, or None.
        alpha: False-positive rate of a calibrated threshold.
    """

    name: ClassVar[str] = "recovery"
    title: ClassVar[str] = "Recovery of the suppressed model by single filters"
    source: ClassVar[str] = "after MNP, arXiv 2405.17750, section 4"
    needs: ClassVar[str] = "clean images with labels"

    suppression: Suppression = field(default_factory=Suppression)
    depth: float = 0.25
    candidates: int = 30
    spared: float = 0.01
    count: int = 5
    shift_weight: float = 1.5
    threshold: float = 0.12
    calibration: Calibration | None = None
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if not (1 <= self.count <= self.candidates and 0 < self.depth <= 1 and math.isfinite(self.spared)):
            raise InvalidInputError(
                "recovery needs 1 <= count <= candidates, depth in (0, 1] and a finite spared, got "
                f"{self.count}, {self.candidates}, {self.depth} and {self.spared}."
            )

    def score(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Detection:
        """Suppress a copy of ``model`` and take filters away; ``model`` is left untouched."""
        # Drawn as in a scan, so that both say the same.
        run = rng.spawn(generator)
        suppressed = suppress(model, clean, self.suppression, generator=run, progress=progress)
        return self.judge(model, clean, suppressed, progress=progress)

    def judge(
        self, model: nn.Module, clean: LabelledImages, suppressed: Suppressed, *, progress: Progress = silent
    ) -> Detection:
        """Score a suppression run of ``model`` that was made with this detector's options.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: The images that it was suppressed with.
            suppressed: The run.
            progress: Called during the work.

        Raises:
            UnsupportedModelError: If the network's filters cannot be found.
        """
        threshold, source = threshold_from(self.calibration, self.alpha, fixed=self.threshold)
        problem = too_little_at_first(suppressed) or _not_suppressed(suppressed)
        if problem:
            return Detection(math.nan, threshold, source, undetermined=problem)
        filter_map = find_filters(model, as_float(clean.images[:1]))
        promised = taylor_saliency(suppressed.model, clean, filter_map)
        layers = [group.name for group in filter_map.prunable]
        deep = layers[-max(1, round(self.depth * len(layers))) :]
        places = order({name: promised[name] for name in deep})[: self.candidates]
        broken, without = removal_losses(suppressed.model, clean, filter_map, places, progress=progress)
        whole, costs = removal_losses(model, clean, filter_map, places, progress=progress)
        found = sorted(
            (
                ((broken - loss) / broken, place)
                for place, loss, cost in zip(places, without, costs, strict=True)
                if cost - whole <= self.spared
            ),
            reverse=True,
        )[: self.count]
        # Where fewer filters can be spared, the others give nothing back.
        score = math.fsum(max(benefit, 0.0) for benefit, _ in found) / self.count
        mask = FilterMask.full(filter_map).without(place for _, place in found)
        after = confusion_of(mask.apply(suppressed.model, filter_map), clean)
        target, pattern = self._target(suppressed.confusion, after)
        return Detection(
            score=score,
            threshold=threshold,
            threshold_source=source,
            p_value=None if self.calibration is None else self.calibration.p_value(score),
            target_class=target,
            evidence={
                "loss": broken,
                "filters": [
                    {"layer": name, "filter": index, "benefit": benefit} for benefit, (name, index) in found
                ],
                "accuracy_without_them": float(after.diagonal().sum() / after.sum()),
                "pattern": pattern,
            },
        )

    def _target(self, before: Tensor, after: Tensor) -> tuple[int | None, str]:
        """Say where the images went that came back."""
        returned = (before - after).clamp_min(0)
        returned.fill_diagonal_(0)
        if not returned.any():
            return None, "none"
        targets, shifts = target_concentration(returned), shift_concentration(returned)
        step = int(shifts.argmax()) + 1
        by_step = self.shift_weight * float(shifts.max()) > float(targets.max())
        if by_step and _is_spread(returned, step):
            return None, f"all-to-all, class + {step}"
        return int(targets.argmax()), "all-to-one"


def _is_spread(moved: Tensor, step: int) -> bool:
    """Say whether a step from class to class is a pattern, and not what images of one class did."""
    classes = len(moved)
    if classes < SMALLEST_CLASS_COUNT:
        return False
    rows = torch.arange(classes)
    counts = moved[rows, (rows + step) % classes].double()
    return float(counts.max()) <= MOST_OF_ONE_CLASS * float(counts.sum())


def _not_suppressed(suppressed: Suppressed) -> str:
    """Say so if the clean task is still there: its filters then are what the loss depends on."""
    first, last = suppressed.checks[0].accuracy, suppressed.checks[-1].accuracy
    if last > first / 2:
        return (
            f"suppression took the accuracy only from {first:.2f} to {last:.2f}, so that nothing is exposed"
        )
    return ""
