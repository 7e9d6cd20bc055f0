"""Magnitude-based Neuron Pruning: expose the filters that carry a backdoor, and prune them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.compute import accuracy_of, check_fits
from unbackdoor.concentration import concentration_of, unreadable
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.groups import FilterMap, find_filters
from unbackdoor.filters.magnitude import layer_normalised, magnitudes
from unbackdoor.filters.mask import FilterMask, PruneMode
from unbackdoor.filters.saliency import clean_loss
from unbackdoor.filters.select import Exposed, Guard, Step, below, guarded_walk, order
from unbackdoor.forms import largest_norm
from unbackdoor.inversion import Inversion, InvertedTrigger, invert_all
from unbackdoor.masks import LearntMasks, MaskTraining, learn_masks
from unbackdoor.purify.nc import suspects
from unbackdoor.purify.relearning import Relearning, between, relearn
from unbackdoor.purify.selection import divide
from unbackdoor.purify.stamping import joined, largest_success, stamped
from unbackdoor.suppression import Suppressed, Suppression, suppress
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent

Stage = Literal["suppress", "penalise", "preserve"]
Way = Literal["inversion", "perturbation", "warp", "suppression"]

_DRAWN: tuple[Way, ...] = ("inversion", "perturbation", "suppression", "warp")
"""In the order in which the ways came to be, so that a seed gives what it gave before."""


@dataclass(frozen=True)
class MNP:
    """Prune the filters that a suppressed copy of the model wants gone and the model itself can spare.

    Source: Li, Jiang, Yi, "Magnitude-based Neuron Pruning for Backdoor Defense", 2024, arXiv 2405.17750,
    Algorithm 1. Clean suppression (Eq. 6) yields theta_s; weight penalty (Eq. 5) learns M1 in [0, 1] on
    theta_s; clean preserving (Eq. 7) learns M2 in [1, 2] on theta; filters of theta with the smallest
    M1 + M2 are pruned.

    Deviations of the default from the paper, each an option; ``--paper``, in Python ``MNP.paper()``, is the
    literal reading: suppression stops by accuracy; masks train with norms in eval mode, since in train mode
    batch norm makes the loss independent of them; the order is M1 alone; the number of filters comes from a
    guarded walk on clean images instead of a fixed 30; removing a filter also clears its norm.

    Beyond the paper: suppression cannot see a small patch that few training images carried, nor a faint
    pattern, and trigger inversion can. ``exposures`` names the ways taken, in turn, each on what the ones
    before left: by ``inversion`` of patches (Neural Cleanse, Wang et al., S&P 2019), by ``perturbation``,
    the inversion of small changes of the whole image (after Xiang, Miller, Kesidis, arXiv 1908.10498), and by
    ``warp``, that of shifts of the pixels (the trigger of WaNet, arXiv 2102.10369), M1 is learnt on clean
    images and on the same images with the triggers of suspicious classes, under their true labels; by
    ``suppression``, as in the paper. One guard bounds what all together cost; a filter goes only if that
    helps where the backdoor was exposed. If no class is suspicious, inversion removes nothing; if it settled
    it, warps, and suppression, which costs clean accuracy, are left out. Not every backdoor sits in a few
    filters: what is left after pruning ``relearns`` (see ``Relearning``) to answer images with the triggers
    that were found as the suspect answers them without.

    Args:
        exposures: Ways in which filters are exposed: ``inversion``, ``perturbation``, ``warp``,
            ``suppression``.
        inversion: How patches are inverted, for every class.
        perturbation: How changes of the whole image are inverted, for every class.
        warp: How shifts of the pixels are inverted, for every class. A class that none leads to counts as an
            eighth of the image.
        outlier_share: Classes whose trigger's norm is at most this share of the median are suspicious, in
            (0, 1].
        outlier_index: But only if that norm is smaller than the median by this many robust standard
            deviations of the norms' logarithms as well, at least 0; 2 is the usual bound of an anomaly index.
            0, the default, asks for nothing (ADR 18). Warps are not asked for it.
        warp_share: The share for warps, in (0, 1]. Mostly one of an eighth of the image, see ``warp``.
        anomaly_threshold: Suspicious norms also need an anomaly index larger than this; the usual 2
            misses small patches where the norms of the other classes vary much.
        fewest_classes: With fewer valid norms no class is: their median says nothing.
        settled: If this share of the loss on stamped images is gone after removals and relearning, and no
            suspicious class is left, a backdoor was found and is gone: warps are then left out, and
            suppression, since it would cost clean accuracy for nothing. Above 1: all ways are always taken.
        settled_index: A way settles that only if, besides, the trigger of some class that it acted on is
            smaller than the median by this many robust standard deviations of the norms' logarithms, at least
            0: where classes differ much, as they do on larger images, clean models have small ones as well.
            0 asks for nothing.
        relearns: When the survivors are tuned: ``never``, as in the paper; if ``triggers`` were found; or
            ``always``, after suppression too, on clean images alone. A model that lost more clean accuracy
            than the guard allows is not taken whole; see ``partway``.
        relearning: How.
        retries: How often relearning on triggers that cost more clean accuracy than the guard allows is tried
            again, each time with half of the stamped share of its batches.
        retry_crops: Crop the images in these tries, too, as the recipe says. While the survivors learn, norms
            take the statistics of what they are shown: where crops cost too much, images as they are do not.
        partway: Where the last try cost too much as well, go from what was there before towards it, by
            tenths, as far as the guard allows: weights and statistics in between (Wortsman et al., CVPR 2022,
            arXiv 2109.01903) keep part of what was relearnt for less accuracy. With triggers only, and not
            where that try could not be tuned at all.
        restarts: How often triggers are inverted once more, from other random starts, before anything is
            removed: one is seldom the attacker's, several cover more of what works.
        refined: How many classes, from the one with the smallest patch, are inverted so often before any is
            judged: one start may miss the small patch that a class has. Other forms, which start at nearly
            nothing, and further suspects are inverted so often once they are suspicious.
        evidence: What suppression exposed is removed only if these filters together take at least this share
            of the suppressed copy's loss away, in [0, 1). Suppression exposes filters in clean models too,
            but there much of the loss stays; in a backdoored one few filters carry most of it. With
            ``amount`` = ``guarded`` only; 0 removes them without.
        collapsed: Or if that copy's errors gather this much in one class or, times 1.5, in one shift of
            classes, read at half of the accuracy as for the detector ``collapse``: a backdoor of many targets
            sits in many filters. Above 1.5 nothing counts but ``evidence``.
        rounds: How often at most the survivors relearn in each way. Between rounds, triggers of the
            suspicious classes are inverted anew: what one trigger taught may leave others that work as well.
            It ends when none of these is suspicious by the norms of the first inversion.
        act_on: ``flagged`` classes, or the class with the ``smallest`` trigger if none is flagged.
        suppression: Clean suppression, Eq. 6.
        masks: How M1 and M2 are learnt.
        stages: Which of the three objectives are used; leaving one out is the paper's ablation.
        lambda1: Weight of the norm penalty on M1, lambda in Eq. 5.
        lambda2: Weight of the norm reward on M2, lambda in Eq. 7.
        norm_source: Whose filter norms w weigh the masks: ``matching`` takes theta_s for M1 and theta for
            M2, ``original`` theta and ``suppressed`` theta_s for both. The paper is silent.
        norm_scaling: Raw norms, or divided by their layer's l2 norm (as Eq. 12).
        norm_folded: Multiply norms by the scale of the following batch norm.
        reward_weights: Whether M2's reward is weighed by the norms (Eq. 7) or the same for all filters.
        layers: Which layers may lose filters: ``all`` but the head, ``conv`` only, or ``normed``, those that
            a norm follows.
        tie_break: Among equal scores the lower M1 and then the larger norm goes first, or layer and index
            decide.
        score: ``m1``, ``sum`` (M1 + M2, the paper's), or ``rank_sum`` (of their ranks).
        literal_line12: Clip M2 from M1 as Algorithm 1 line 12 prints; M2 is then 1 for ever.
        amount: How many filters go: ``guarded``, ``count``, ``fraction`` or ``threshold``. A count or a
            fraction is that of all ways of exposing together: what the first takes, the next cannot.
        count: For ``count``; the paper's 30 is 0.6 % of a ResNet-18 of width 64.
        fraction: For ``fraction``, of the prunable filters, in [0, 1].
        threshold: For ``threshold``: prune scores at or below it.
        guard: For ``guarded``.
        held_out_fraction: Share of the clean images kept from the learning and used by the guard alone,
            in [0, 1); 0 lets the guard use the images that the masks were learnt on.
        prune_mode: What removing a filter clears.
    """

    name: ClassVar[str] = "mnp"
    title: ClassVar[str] = "Magnitude-based Neuron Pruning"
    source: ClassVar[str] = "Li, Jiang, Yi 2024, arXiv 2405.17750"
    needs: ClassVar[str] = "clean images with labels"

    exposures: tuple[Way, ...] = ("inversion", "perturbation", "warp", "suppression")
    inversion: Inversion = field(default_factory=lambda: Inversion(steps=120, batch_size=16, success=0.95))
    perturbation: Inversion = field(default_factory=Inversion.additive)
    warp: Inversion = field(default_factory=Inversion.warp)
    outlier_share: float = 0.35
    outlier_index: float = 0.0
    warp_share: float = 0.5
    anomaly_threshold: float = 0.0
    fewest_classes: int = 5
    settled: float = 0.7
    settled_index: float = 3.0
    relearns: Literal["never", "triggers", "always"] = "triggers"
    relearning: Relearning = field(default_factory=Relearning)
    retries: int = 2
    retry_crops: bool = False
    partway: bool = True
    restarts: int = 3
    refined: int = 2
    evidence: float = 0.6
    collapsed: float = 0.6
    rounds: int = 4
    act_on: Literal["flagged", "smallest"] = "flagged"
    suppression: Suppression = field(default_factory=Suppression)
    masks: MaskTraining = field(default_factory=MaskTraining)
    stages: tuple[Stage, ...] = ("suppress", "penalise", "preserve")
    lambda1: float = 5e-4
    lambda2: float = 5e-4
    norm_source: Literal["matching", "original", "suppressed"] = "matching"
    norm_scaling: Literal["none", "layer"] = "none"
    norm_folded: bool = False
    reward_weights: Literal["norm", "uniform"] = "norm"
    layers: Literal["all", "conv", "normed"] = "all"
    tie_break: Literal["magnitude", "index"] = "magnitude"
    score: Literal["m1", "sum", "rank_sum"] = "m1"
    literal_line12: bool = False
    amount: Literal["guarded", "count", "fraction", "threshold"] = "guarded"
    count: int = 30
    fraction: float = 0.02
    threshold: float = 1.0
    guard: Guard = field(default_factory=Guard)
    held_out_fraction: float = 0.0
    prune_mode: PruneMode = "silence"

    def __post_init__(self) -> None:
        unknown = set(self.stages) - {"suppress", "penalise", "preserve"}
        if unknown or not set(self.stages) & {"penalise", "preserve"}:
            raise InvalidInputError(
                f"stages must name 'penalise' or 'preserve' or both, and may name 'suppress'; "
                f"got {self.stages}."
            )
        if not self.exposures or set(self.exposures) - set(get_args(Way)):
            raise InvalidInputError(
                f"exposures must name at least one of {', '.join(get_args(Way))}; got {self.exposures}."
            )
        if self.relearns not in ("never", "triggers", "always"):
            raise InvalidInputError(
                f"relearns must be 'never', 'triggers' or 'always', got {self.relearns!r}."
            )
        if not (0 < self.outlier_share <= 1 and 0 < self.warp_share <= 1):
            raise InvalidInputError(
                f"outlier_share and warp_share must lie in (0, 1], got {self.outlier_share} and "
                f"{self.warp_share}."
            )
        if not 0 <= self.held_out_fraction < 1:
            raise InvalidInputError(f"held_out_fraction must lie in [0, 1), got {self.held_out_fraction}.")
        if not 0 <= self.evidence < 1:
            raise InvalidInputError(f"evidence must lie in [0, 1), got {self.evidence}.")
        if not (self.collapsed > 0 and self.settled_index >= 0 and self.outlier_index >= 0):
            raise InvalidInputError(
                "collapsed must be larger than 0, settled_index and outlier_index at least 0, got "
                f"{self.collapsed}, {self.settled_index} and {self.outlier_index}."
            )
        if self.rounds < 1 or min(self.restarts, self.refined, self.retries) < 0:
            raise InvalidInputError(
                f"rounds must be at least 1, restarts, refined and retries 0; got {self.rounds}, "
                f"{self.restarts}, {self.refined} and {self.retries}."
            )
        self._check_amount()

    def _check_amount(self) -> None:
        if self.amount == "threshold" and self.threshold >= 1:
            # Inverted triggers expose by M1 alone, and masks lie in [0, 1].
            summed = self.score != "m1" and self.exposures == ("suppression",)
            if not summed or (self.score == "sum" and self.threshold >= 3):
                raise InvalidInputError(
                    f"a threshold of {self.threshold} would remove every filter: give one below 1, or one "
                    "below 3 with score=sum and exposures=suppression."
                )
        if self.count < 0:
            raise InvalidInputError(f"count must be at least 0, got {self.count}.")
        if not 0 <= self.fraction <= 1:
            raise InvalidInputError(f"fraction must lie in [0, 1], got {self.fraction}.")

    @staticmethod
    def paper(count: int = 30) -> MNP:
        """Return the literal reading of the paper, as far as it can run.

        Section 5.1: mu 0.001, eta_1 0.01, 20 suppression epochs run blind, lambda 5e-4, eta_2 0.1, 30
        filters by M1 + M2, only the filter's weights set to zero, plain gradient steps without momentum, as
        Algorithm 1 prints them. Where the paper is silent: batch 128, 20 mask epochs; norms in train mode
        while suppressing (RNP's code) and in eval mode for the masks, because in train mode the objective of
        both does not depend on them.
        """
        return MNP(
            exposures=("suppression",),
            suppression=Suppression(budget=20, unit="epoch", stop_accuracy=0.0, momentum=0.0),
            masks=MaskTraining(momentum=0.0),
            score="sum",
            amount="count",
            count=count,
            prune_mode="weight",
            relearns="never",
            partway=False,
            evidence=0.0,
            collapsed=2.0,
            settled_index=0.0,
        )

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a copy of ``model`` without the exposed filters.

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
        learning, guarding = divide(clean, self.held_out_fraction, generator)
        run = _Run(self, model, filter_map, learning, guarding, progress)
        # All draw, so that leaving one out changes nothing about the others.
        draws = {way: rng.spawn(generator) for way in _DRAWN}
        settled = False
        for way in self.exposures:
            if settled and way in ("warp", "suppression"):
                continue
            if way == "suppression":
                run.resolve(way, run.by_suppression(draws[way]), draws[way])
                continue
            exposure = run.by_triggers(way, draws[way])
            relieved = run.resolve(way, exposure, draws[way])
            settled |= self.amount == "guarded" and self._settles(exposure, relieved)
        return Purified(
            model=run.pruned(),
            mask=run.mask,
            scores=run.scores,
            diagnostics={
                "options": asdict(self),
                "learning_images": len(learning),
                **run.diagnostics,
                "walk": run.steps,
                "untreated": [asdict(item) for item in filter_map.untreated],
            },
        )

    def _settles(self, exposure: _Exposure | None, relieved: float) -> bool:
        """Say whether a backdoor was found and is gone."""
        return exposure is not None and exposure.index >= self.settled_index and relieved >= self.settled


@dataclass(frozen=True, eq=False)
class _Exposure:
    """What one way of exposing filters found.

    Args:
        scores: Layer name to ``(filters,)``; lower goes first.
        tie_breaks: Decide among equal scores.
        exposed: Where removals should lower the loss, or None.
        concentration: How much the errors of the suppressed copy gathered; 0 where they say nothing.
        triggers: What was recovered on the way.
        limit: Triggers of their classes with a larger norm are not suspicious.
        index: How far the smallest of them lies below the others, see ``settled_index``.
    """

    scores: Mapping[str, Tensor]
    tie_breaks: Sequence[Mapping[str, Tensor]]
    exposed: Exposed | None
    concentration: float = 0.0
    triggers: tuple[InvertedTrigger, ...] = ()
    limit: float = math.inf
    index: float = 0.0


@dataclass(eq=False)
class _Run:
    """One purification: what was removed so far, and why."""

    method: MNP
    model: nn.Module
    filter_map: FilterMap
    learning: LabelledImages
    guarding: LabelledImages
    progress: Progress
    scores: dict[str, Tensor] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    diagnostics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mask = FilterMask.full(self.filter_map)
        self.survivor = self.model

    def pruned(self) -> nn.Module:
        """Return the model, as it was relearnt, without what was removed so far."""
        return self.mask.apply(self.survivor, self.filter_map, prune_mode=self.method.prune_mode)

    def by_suppression(self, generator: torch.Generator) -> _Exposure:
        """Learn M1 on a suppressed copy and M2 on the model: the paper's way."""
        method, model = self.method, self.pruned()
        suppressed: Suppressed | None = None
        if "suppress" in method.stages:
            suppressed = suppress(
                model,
                self.learning,
                method.suppression,
                generator=rng.spawn(generator),
                progress=self.progress,
            )
        copy = suppressed.model if suppressed else model
        generators = rng.spawn(generator), rng.spawn(generator)
        m1 = m2 = None
        if "penalise" in method.stages:
            source = model if method.norm_source == "original" else copy
            m1 = self._m1(copy, self.learning, source, generators[0])
        if "preserve" in method.stages and (method.score != "m1" or m1 is None):
            source = copy if method.norm_source == "suppressed" else model
            m2 = self._m2(model, source, generators[1])
        self.diagnostics["suppression"] = _described(suppressed)
        self.diagnostics["masks"] = {
            name: _learnt(masks)
            for name, masks in (("weight_penalty", m1), ("clean_preserving", m2))
            if masks is not None
        }
        exposed = Exposed(suppressed.model, self.guarding) if suppressed else None
        return replace(self._exposure(m1, m2, copy, exposed), concentration=_concentration(suppressed))

    def by_triggers(
        self, way: Literal["inversion", "perturbation", "warp"], generator: torch.Generator
    ) -> _Exposure | None:
        """Learn M1 on the model, with the inverted triggers of suspicious classes on its images."""
        method, model = self.method, self.pruned()
        options: Inversion = getattr(method, way)
        share = method.warp_share if way == "warp" else method.outlier_share
        asked = 0.0 if way == "warp" else method.outlier_index
        refined = method.refined if options.form == "patch" else 0
        triggers, found = suspects(
            model, self.learning, options, threshold=method.anomaly_threshold,
            largest_share=share, least_log_index=asked or -math.inf,
            fewest=method.fewest_classes, refined=refined, restarts=method.restarts,
            unreached=_unreached(options, self.learning), smallest=method.act_on == "smallest",
            generator=rng.spawn(generator), progress=self.progress,
        )  # fmt: skip
        self.diagnostics[way] = found
        if not triggers:
            return None
        limit = max(share * (found["median"] or 0.0), *(trigger.norm for trigger in triggers))
        restarted = {described["target_class"] for described in found.get("inverted_anew", ())}
        classes = {trigger.target_class for trigger in triggers} - restarted
        again = [target for target in sorted(classes) for _ in range(method.restarts)]
        others = self._inverted(way, model, again, limit, found, generator) if again else []
        triggers = [*triggers, *others]
        shown, held = (stamped(data, triggers) for data in (self.learning, self.guarding))
        m1 = self._m1(model, joined(self.learning, shown), model, generator)
        found["masks"] = _learnt(m1)
        exposure = self._exposure(m1, None, model, Exposed(model, held))
        return replace(exposure, triggers=tuple(triggers), limit=limit, index=found["log_index"] or 0.0)

    def resolve(self, way: Way, exposure: _Exposure | None, generator: torch.Generator) -> float:
        """Remove what was exposed, and let the survivors relearn.

        Returns:
            The share of the loss where the backdoor was exposed that is gone; 0 if nobody measured.
        """
        if exposure is None:
            return 0.0
        relieved = self._remove(way, exposure)
        if self.method.relearns == "always" or (self.method.relearns == "triggers" and exposure.triggers):
            relearnt = self._relearn_in_rounds(way, exposure, generator)
            relieved = relieved if relearnt is None else relearnt
        return relieved

    def _relearn_in_rounds(self, way: Way, exposure: _Exposure, generator: torch.Generator) -> float | None:
        """Let the survivors relearn until no new trigger is found.

        Returns:
            As ``resolve``; 0 if triggers are left, None if nothing was relearnt.
        """
        for turn in range(self.method.rounds):
            relieved = self._relearn(way, exposure, generator)
            if relieved is None:
                return None if turn == 0 else 0.0
            if not exposure.triggers or self.method.rounds == 1:
                return relieved
            log = self._last_try
            classes = sorted({trigger.target_class for trigger in exposure.triggers})
            left = self._inverted(way, self.pruned(), classes, exposure.limit, log, generator)
            log["left"] = [trigger.target_class for trigger in left]
            if not left:
                return relieved
            exposure = replace(exposure, triggers=(*exposure.triggers, *left))
        return 0.0

    def _inverted(
        self,
        way: Way,
        model: nn.Module,
        classes: Sequence[int],
        limit: float,
        log: dict[str, Any],
        generator: torch.Generator,
    ) -> list[InvertedTrigger]:
        """Invert triggers of ``classes`` anew; return those that work with a norm of at most ``limit``."""
        triggers = invert_all(
            model, self.learning, getattr(self.method, way), generator=rng.spawn(generator),
            classes=classes, progress=self.progress,
        )  # fmt: skip
        described = [trigger.describe() for trigger in triggers]
        log["inverted_anew"] = [*log.get("inverted_anew", ()), *described]
        return [trigger for trigger in triggers if trigger.reached and trigger.norm <= limit]

    def _remove(self, way: Way, exposure: _Exposure) -> float:
        """Remove what was exposed, as far as the method allows, and return what of the loss there is gone."""
        allowed = self._allowed()
        scores = {name: values.cpu() for name, values in exposure.scores.items() if name in allowed}
        ranked = order(scores, *exposure.tie_breaks)
        mask, steps = self._choose(exposure.exposed, scores, ranked)
        if way == "suppression" and steps:
            convincing = self._convincing(steps, exposure.concentration)
            self.diagnostics["evidence"] = convincing
            if not convincing["taken"]:
                mask, steps = FilterMask.full(self.filter_map), [replace(s, removed=False) for s in steps]
        self.mask = self.mask & mask
        self.steps += [{"exposure": way, **step.describe()} for step in steps]
        self.scores = {
            name: torch.minimum(values, self.scores[name]) if name in self.scores else values
            for name, values in scores.items()
        }
        return sum(step.benefit for step in steps if step.removed and not math.isnan(step.benefit))

    def _convincing(self, steps: Sequence[Step], concentration: float) -> dict[str, Any]:
        """Say what the walk on the suppressed copy found, and whether that is enough to act on."""
        benefits = [step.benefit for step in steps if step.removed and not math.isnan(step.benefit)]
        together = math.fsum(benefits)
        enough = together >= self.method.evidence or concentration >= self.method.collapsed
        return {
            "largest_benefit": max(benefits, default=0.0),
            "benefit": together,
            "filters": len(benefits),
            "concentration": concentration,
            "taken": enough or not benefits,
        }

    def _relearn(self, way: Way, exposure: _Exposure, generator: torch.Generator) -> float | None:
        """Tune the survivors and return what of the triggers' loss is gone; None if that costs too much."""
        options, retries = self.method.relearning, self.method.retries if exposure.triggers else 0
        relearnt = self._relearnt(way, exposure, options, generator)
        for _ in range(retries):
            if self._last_try["taken"]:
                break
            self._last_try["tried_again"] = True
            options = self._gentler(options)
            relearnt = self._relearnt(way, exposure, options, generator)
        if not self._last_try["taken"] and relearnt is not None:
            goes = self.method.partway and exposure.triggers
            relearnt = self._partway(relearnt, exposure.triggers) if goes else None
        if relearnt is None:
            return None
        self.survivor = relearnt
        if not exposure.triggers or exposure.exposed is None:
            return 0.0
        before, after = (
            clean_loss(network, exposure.exposed.data) for network in (exposure.exposed.model, relearnt)
        )
        return 1 - after / before if before > 0 else 0.0

    def _gentler(self, options: Relearning) -> Relearning:
        """Return what is tried where ``options`` cost too much."""
        crop = options.recipe.crop_padding if self.method.retry_crops else 0
        return replace(
            options,
            recipe=replace(options.recipe, crop_padding=crop),
            stamped_fraction=options.stamped_fraction / 2,
        )

    def _relearnt(
        self, way: Way, exposure: _Exposure, options: Relearning, generator: torch.Generator
    ) -> nn.Module | None:
        """Return a tuned copy of the survivors, None if that fails; the log says if it is taken whole."""
        method, model = self.method, self.pruned()

        def restrain(network: nn.Module) -> None:
            self.mask.clear(network, self.filter_map, prune_mode=method.prune_mode)

        log = self.diagnostics.setdefault("relearning", [])
        try:
            relearnt, record = relearn(
                model, self.model, self.learning, exposure.triggers, options,
                restrain=restrain, generator=rng.spawn(generator), progress=self.progress,
            )  # fmt: skip
        except UnsupportedModelError as error:
            # What was pruned is worth keeping, even where the network cannot be tuned.
            log.append({"exposure": way, "taken": False, "share": 0.0, "problem": str(error)})
            return None
        suspect, now = (accuracy_of(network, self.guarding) for network in (self.model, relearnt))
        taken = self._is_allowed(now, suspect)
        successes = [
            largest_success(network, self.guarding, exposure.triggers) for network in (model, relearnt)
        ]
        log.append(
            {
                "exposure": way,
                "taken": taken,
                "share": float(taken),
                "stamped_fraction": options.stamped_fraction,
                "learning_rate": options.recipe.learning_rate,
                "crop_padding": options.recipe.crop_padding,
                "losses": list(record.losses),
                "accuracy_of_the_suspect": suspect,
                "accuracy": now,
                "trigger_success": successes,
            }
        )
        return relearnt

    def _partway(self, relearnt: nn.Module, triggers: Sequence[InvertedTrigger]) -> nn.Module | None:
        """Go from the survivors towards ``relearnt`` as far as the guard allows; None for not at all."""
        pruned, log = self.pruned(), self._last_try
        for tenths in range(9, 0, -1):
            share = tenths / 10
            network = between(pruned, relearnt, share)
            accuracy = accuracy_of(network, self.guarding)
            if self._is_allowed(accuracy, log["accuracy_of_the_suspect"]):
                success = largest_success(network, self.guarding, triggers)
                log |= {"share": share, "accuracy_kept": accuracy, "trigger_success_left": success}
                return network
        return None

    def _is_allowed(self, accuracy: float, of_the_suspect: float) -> bool:
        return accuracy >= of_the_suspect - self.method.guard.accuracy - 1e-9

    @property
    def _last_try(self) -> dict[str, Any]:
        last: dict[str, Any] = self.diagnostics["relearning"][-1]
        return last

    def _m1(
        self, model: nn.Module, data: LabelledImages, source: nn.Module, generator: torch.Generator
    ) -> LearntMasks:
        method = self.method
        penalty = {name: method.lambda1 * w for name, w in self._norms(source).items()}
        return learn_masks(
            model, data, self.filter_map, method.masks, penalty=penalty, bounds=(0.0, 1.0),
            generator=generator, stage="weight penalty", progress=self.progress,
        )  # fmt: skip

    def _m2(self, model: nn.Module, source: nn.Module, generator: torch.Generator) -> LearntMasks:
        method, weights = self.method, self._norms(source)
        if method.reward_weights == "uniform":
            weights = {name: torch.ones_like(w) for name, w in weights.items()}
        reward = {name: -method.lambda2 * w for name, w in weights.items()}
        learnt = learn_masks(
            model, self.learning, self.filter_map, method.masks, penalty=reward, bounds=(1.0, 2.0),
            generator=generator, stage="clean preserving", progress=self.progress,
        )  # fmt: skip
        if not method.literal_line12:
            return learnt
        return replace(learnt, masks={name: torch.ones_like(m) for name, m in learnt.masks.items()})

    def _exposure(
        self, m1: LearntMasks | None, m2: LearntMasks | None, copy: nn.Module, exposed: Exposed | None
    ) -> _Exposure:
        tie_breaks: list[Mapping[str, Tensor]] = []
        if self.method.tie_break == "magnitude":
            tie_breaks = [m1.masks] if m1 else []
            tie_breaks.append({name: -values for name, values in self._norms(copy).items()})
        return _Exposure(_combine(m1, m2, self.method.score), tie_breaks, exposed)

    def _norms(self, model: nn.Module) -> dict[str, Tensor]:
        norms = magnitudes(model, self.filter_map, folded=self.method.norm_folded)
        return layer_normalised(norms) if self.method.norm_scaling == "layer" else norms

    def _allowed(self) -> set[str]:
        layers = self.method.layers
        chosen = {
            group.name
            for group in self.filter_map.prunable
            if layers == "all" or (group.kind == "conv" if layers == "conv" else group.norms)
        }
        if not chosen:
            raise UnsupportedModelError(
                f"no layer of this network is left with layers = {layers!r}; use layers = 'all'."
            )
        return chosen

    def _choose(
        self, exposed: Exposed | None, scores: Mapping[str, Tensor], ranked: list[tuple[str, int]]
    ) -> tuple[FilterMask, list[Step]]:
        method, full = self.method, FilterMask.full(self.filter_map)
        gone = set(self.mask.removed())
        left = [place for place in ranked if place not in gone]
        if method.amount == "threshold":
            low = set(below(scores, method.threshold))
            return full.without(place for place in left if place in low), []
        if method.amount != "guarded":
            # One budget for all ways of exposing: what the ways before took is spent.
            budget = method.count if method.amount == "count" else round(method.fraction * len(ranked))
            return full.without(left[: max(0, budget - len(gone))]), []
        return guarded_walk(
            self.pruned(),
            self.guarding,
            self.filter_map,
            left[: max(1, round(method.guard.candidates * len(ranked)))],
            method.guard,
            exposed=exposed,
            reference=self.model,
            prune_mode=method.prune_mode,
            progress=self.progress,
        )


def _unreached(options: Inversion, clean: LabelledImages) -> float:
    """Return the norm of a class that no trigger was found for; NaN where it says nothing."""
    # Patches and changes lead to every class if they may be large; warps, in a clean model, to few.
    if options.form != "warp":
        return math.nan
    channels, height, width = clean.images.shape[1:]
    return largest_norm(options.form, channels, height, width)


def _combine(m1: LearntMasks | None, m2: LearntMasks | None, score: str) -> dict[str, Tensor]:
    present = [learnt.masks for learnt in (m1, m2) if learnt is not None]
    if len(present) == 1:
        return dict(present[0])
    if score == "rank_sum":
        present = [_ranks(masks) for masks in present]
    return {name: present[0][name] + present[1][name] for name in present[0]}


def _ranks(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    flat = torch.cat([values.flatten() for values in masks.values()])
    ranks = flat.argsort(stable=True).argsort(stable=True).float()
    sizes = [len(values) for values in masks.values()]
    return dict(zip(masks, ranks.split(sizes), strict=True))


def _described(suppressed: Suppressed | None) -> dict[str, Any] | None:
    if suppressed is None:
        return None
    return {
        "accuracy": list(suppressed.accuracies),
        "stop_reason": suppressed.stop_reason,
        "steps": suppressed.checks[-1].step,
        "class_share": suppressed.class_share.tolist(),
    }


def _concentration(suppressed: Suppressed | None) -> float:
    if suppressed is None or unreadable(suppressed):
        return 0.0
    return concentration_of(suppressed).score


def _learnt(masks: LearntMasks) -> dict[str, Any]:
    return {"losses": list(masks.losses), "clipped_fraction": masks.clipped, "steps": masks.steps}
