"""Trigger inversion: the smallest trigger that sends clean images of all other classes to one class.

Source of patches: Neural Cleanse (Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks
in Neural Networks", IEEE S&P 2019): ``x' = (1 - m) x + m p``, minimise ``CE(F(x'), t) + lambda ||m||_1`` over
mask m and pattern p. A class that a backdoor leads to needs an unusually small mask.

A trigger that is spread over the image, as blends, sinusoids and faint noise are, is no small patch, but an
unusually small change of all pixels: ``x' = clip(x + d)``, minimise ``CE(F(x'), t) + lambda ||d||_2``; after
Xiang, Miller, Kesidis, "Detection of Backdoors in Trained Classifiers Without Access to the Training Set",
2020, arXiv 1908.10498, who look for the smallest additive perturbation of each pair of classes.

A warp is neither: it moves pixels. ``x'`` is the image sampled on a grid that a few control vectors bend
(the trigger of WaNet, Nguyen & Tran, ICLR 2021, arXiv 2102.10369), minimise ``CE(F(x'), t) + lambda r`` with
r the root mean square of how far pixels move; UNICORN (Wang et al., ICLR 2023) also inverts triggers outside
of pixel space, in one that it learns.

Ours: classes advance side by side, each with a few images, in one forward pass; images of the target class
are left out, since they need no trigger; a mask counts only after its success was measured again, in fp32
on all images of other classes; each class has its own schedule, so nothing leaks from class to class.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.compute import (
    Precision,
    arrange,
    autocast,
    check_fits,
    device_of,
    logits_of,
    memory_format_for,
)
from unbackdoor.errors import InvalidInputError
from unbackdoor.forms import NORMS, Form, applied, largest_norm, norm_of
from unbackdoor.types import LabelledImages, Progress, as_float, silent

_OPEN = 1e-6
"""Keeps tanh from saturating where a mask or pattern starts at 0 or 1."""

_MEASURED_TOGETHER = 64
"""Images a pass when a mask is measured: most masks fail on the first few."""

_MAD_TO_SIGMA = 1.4826
_MEAN_DEVIATION_TO_SIGMA = 1.2533


@dataclass(frozen=True)
class Inversion:
    """How triggers are inverted. Symbols are those of Neural Cleanse.

    Args:
        form: What a trigger is: a ``patch``, measured by the l1 norm of its mask, in pixels; ``additive``,
            measured by the l2 norm of the change, with pixels in [0, 1]; or a ``warp``, measured by the root
            mean square of how far pixels move, in pixels.
        control_points: Control vectors a side of a warp.
        steps: Most gradient steps of each class; the classes share each forward pass.
        round_steps: Steps after which success is judged and lambda may move; a "mini-epoch".
        batch_size: Images a step and class.
        together: Most classes in one forward pass; the others wait for a free place.
        learning_rate: Step of Adam: of patches in tanh space, of changes in pixel values, of warps as a share
            of the largest shift that counts (``forms.largest_norm``), so that it grows with the image.
        betas: Of Adam.
        lambda0: First weight of the trigger's norm.
        multiplier: Lambda times this after ``patience`` good rounds; divided by its 1.5th power after as
            many bad ones.
        patience: Rounds, see ``multiplier``.
        start: Whether lambda starts at ``lambda0``, or at ``zero`` until the first ``patience`` good rounds.
        success: Share of the images that a trigger must send to its class, in (0, 1].
        early_stop_factor: A norm below this times the last one that counted is an improvement.
        early_stop_patience: Rounds without improvement, once lambda went both up and down, that end a
            class's run.
        init: Whether mask and pattern of a patch start ``random``, uniform in [0, 1], or at ``ones`` in tanh
            space. A change starts at 0, a warp at shifts of about a tenth of a pixel.
        precision: Of the forward and backward passes.
    """

    form: Form = "patch"
    control_points: int = 6
    steps: int = 150
    round_steps: int = 5
    batch_size: int = 32
    together: int = 10
    learning_rate: float = 0.1
    betas: tuple[float, float] = (0.5, 0.9)
    lambda0: float = 1e-3
    multiplier: float = 2.0
    patience: int = 2
    start: Literal["lambda0", "zero"] = "lambda0"
    success: float = 0.99
    early_stop_factor: float = 0.99
    early_stop_patience: int = 12
    init: Literal["random", "ones"] = "random"
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        counts = (self.steps, self.round_steps, self.batch_size, self.together, self.patience)
        if min(counts) < 1 or self.early_stop_patience < 1:
            raise InvalidInputError(
                "steps, round_steps, batch_size, together and both patiences must be at least 1, got "
                f"{', '.join(map(str, counts))} and {self.early_stop_patience}."
            )
        if self.control_points < 2:
            raise InvalidInputError(f"a warp needs control_points >= 2, got {self.control_points}.")
        if not (0 < self.learning_rate < math.inf and self.lambda0 > 0 and self.multiplier > 1):
            raise InvalidInputError(
                "inversion needs learning_rate > 0, lambda0 > 0 and multiplier > 1, got "
                f"{self.learning_rate}, {self.lambda0} and {self.multiplier}."
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InvalidInputError(f"betas must lie in [0, 1), got {self.betas}.")
        if not (0 < self.success <= 1 and 0 < self.early_stop_factor <= 1):
            raise InvalidInputError(
                f"success and early_stop_factor must lie in (0, 1], got {self.success} and "
                f"{self.early_stop_factor}."
            )
        if self.init not in ("random", "ones") or self.start not in ("lambda0", "zero"):
            raise InvalidInputError(
                "init must be 'random' or 'ones' and start 'lambda0' or 'zero', got "
                f"{self.init!r} and {self.start!r}."
            )
        if self.form not in get_args(Form):
            raise InvalidInputError(f"form must be one of {', '.join(get_args(Form))}; got {self.form!r}.")

    @staticmethod
    def additive() -> Inversion:
        """Return settings for triggers that change the whole image a little."""
        return Inversion(
            form="additive", steps=120, batch_size=16, learning_rate=0.003, lambda0=0.1, success=0.95
        )

    @staticmethod
    def warp() -> Inversion:
        """Return settings for triggers that move pixels a little."""
        return Inversion(form="warp", steps=120, batch_size=16, learning_rate=0.1, lambda0=0.1, success=0.9)

    @staticmethod
    def paper() -> Inversion:
        """Return the settings of the authors' example: up to 1000 rounds of 31 batches of 32 images."""
        return Inversion(
            steps=31_000,
            round_steps=31,
            together=1,
            patience=5,
            start="zero",
            early_stop_factor=1.0,
            early_stop_patience=25,
            precision="fp32",
        )


@dataclass(frozen=True, eq=False)
class InvertedTrigger:
    """What was found for one class; a function on images.

    Args:
        target_class: Where it sends images.
        mask: float32 ``(1, H, W)`` in [0, 1], on the CPU; 1 everywhere for other forms than a patch.
        pattern: float32 ``(C, H, W)``, on the CPU; in [0, 1], or in [-1, 1] for a change. Of a warp the
            control field, ``(2, k, k)``: shifts along the columns, then along the rows, in pixels.
        norm: See ``forms.norm_of``.
        success: Share of the clean images of other classes that it sends to ``target_class``; measured
            in eval mode and fp32. NaN if there are none.
        reached: Whether ``success`` is what was asked for; the norm of other masks means nothing.
        steps: Gradient steps taken.
        form: What it does to images.
        history: JSON values, one a round: step, loss, success and norm within the round, lambda.
    """

    target_class: int
    mask: Tensor
    pattern: Tensor
    norm: float
    success: float
    reached: bool
    steps: int
    form: Form = "patch"
    history: tuple[Mapping[str, Any], ...] = ()

    def __call__(self, images: Tensor) -> Tensor:
        """Return ``images``, float ``(N, C, H, W)`` in [0, 1], with the trigger on them."""
        return applied(self.form, self.mask.to(images.device), self.pattern.to(images.device), images)

    def describe(self) -> dict[str, Any]:
        """Return JSON values without the tensors and the history."""
        return {
            "target_class": self.target_class,
            NORMS[self.form]: self.norm,
            "success": None if math.isnan(self.success) else self.success,
            "reached": self.reached,
            "steps": self.steps,
        }


def invert(
    model: nn.Module,
    clean: LabelledImages,
    options: Inversion,
    target_class: int,
    *,
    generator: torch.Generator,
    progress: Progress = silent,
) -> InvertedTrigger:
    """Invert the trigger of one class; see ``invert_all``."""
    return invert_all(model, clean, options, classes=(target_class,), generator=generator, progress=progress)[
        0
    ]


def invert_all(
    model: nn.Module,
    clean: LabelledImages,
    options: Inversion,
    *,
    classes: Sequence[int] | None = None,
    generator: torch.Generator,
    progress: Progress = silent,
) -> tuple[InvertedTrigger, ...]:
    """Find, for each class, the smallest trigger that sends clean images of other classes to it.

    Args:
        model: Takes float images in [0, 1]; left untouched, used in eval mode with frozen weights.
        clean: Clean images with labels.
        options: See ``Inversion``.
        classes: Which classes; None for all outputs of the model.
        generator: Start and order of the images follow it, for each class by itself; on the CPU.
        progress: Called after each round with the steps done by all classes together.

    Returns:
        One trigger a class, in the order of ``classes``.

    Raises:
        InvalidInputError: If there are fewer than two images, or a class or label has no output.
        UnsupportedModelError: If the model cannot be run on the images.
    """
    outputs = check_fits(model, clean, purpose="trigger inversion", at_least=2)
    wanted = list(range(outputs)) if classes is None else list(classes)
    if beyond := [k for k in wanted if not 0 <= k < outputs]:
        raise InvalidInputError(f"class {beyond[0]} is no output of the model, which has {outputs}.")
    clean = clean.to(device_of(model))
    frozen = arrange(copy.deepcopy(model).requires_grad_(False)).eval()
    searches = [_Search.begin(k, clean, options, rng.spawn(generator)) for k in wanted]
    waiting = [search for search in searches if len(search.others)]
    total, active = options.steps * max(1, len(waiting)), list[_Search]()
    while waiting or active:
        while waiting and len(active) < options.together:
            active.append(waiting.pop(0))
        for _ in range(min(options.round_steps, *(options.steps - search.steps for search in active))):
            _step(frozen, clean.images, active, options)
        active = [search for search in active if search.goes_on(options)]
        progress("trigger inversion", sum(search.steps for search in searches), total)
    progress("trigger inversion", total, total)
    return tuple(_measured(frozen, clean, search, options) for search in searches)


def norms_of(triggers: Sequence[InvertedTrigger], *, unreached: float = math.nan) -> list[float]:
    """Return the norm of each trigger; ``unreached`` for those that do not work, and nothing above it."""
    # A comparison with NaN fails.
    return [
        unreached if not trigger.reached or trigger.norm > unreached else trigger.norm for trigger in triggers
    ]


def anomaly_indices(norms: Sequence[float], *, fewest: int = 5) -> list[float]:
    """Return how far below the median each norm lies, in robust standard deviations.

    Index ``(median - norm) / (1.4826 MAD)`` with MAD the median absolute deviation; positive for small
    norms. If more than half of the norms are equal, MAD is 0 and 1.2533 times the mean absolute deviation
    takes its place; if all are equal, every index is 0.

    Args:
        norms: One a class; NaN for classes without a valid mask, which are left out.
        fewest: With fewer valid norms than this a median says nothing.

    Returns:
        One index a norm; NaN where the norm is NaN, and everywhere if there are too few.
    """
    values = torch.tensor(list(norms), dtype=torch.float64)
    valid = values[~values.isnan()]
    if len(valid) < max(1, fewest):
        return [math.nan] * len(values)
    median = valid.quantile(0.5)
    deviations = (valid - median).abs()
    scale = _MAD_TO_SIGMA * deviations.quantile(0.5)
    # Rounding leaves a tiny MAD where the norms are equal on paper.
    if scale <= 1e-9 * median.abs():
        scale = _MEAN_DEVIATION_TO_SIGMA * deviations.mean()
    if scale <= 1e-9 * median.abs():
        return [math.nan if math.isnan(norm) else 0.0 for norm in norms]
    return [float(index) for index in (median - values) / scale]


@dataclass(frozen=True, eq=False)
class _Candidate:
    mask: Tensor
    pattern: Tensor
    norm: float


@dataclass(eq=False)
class _Search:
    """The state of one class's run."""

    form: Form
    target_class: int
    others: Tensor
    generator: torch.Generator
    mask: Tensor
    pattern: Tensor
    optimiser: torch.optim.Adam
    coefficient: float
    nearest: _Candidate | None = None
    nearest_success: float = -1.0
    steps: int = 0
    hits: Tensor | None = None
    losses: Tensor | None = None
    seen: int = 0
    good: int = 0
    bad: int = 0
    went_up: bool = False
    went_down: bool = False
    stalled: int = 0
    reference: float = math.inf
    found: list[_Candidate] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def begin(
        target_class: int, clean: LabelledImages, options: Inversion, generator: torch.Generator
    ) -> _Search:
        channels, height, width = clean.images.shape[1:]
        device = clean.images.device
        if options.form == "patch":
            starts = [_start((c, height, width), options.init, generator).to(device) for c in (1, channels)]
            mask, pattern = (tensor.requires_grad_() for tensor in starts)
            learnt = [mask, pattern]
        else:
            mask = torch.ones(1, height, width, device=device)
            if options.form == "additive":
                pattern = torch.zeros(channels, height, width, device=device)
            else:
                # Without any shift all pixels lie on kinks of the bilinear interpolation.
                side = options.control_points
                pattern = (0.1 * torch.randn(2, side, side, generator=generator)).to(device)
            learnt = [pattern.requires_grad_()]
        unit = largest_norm("warp", channels, height, width) if options.form == "warp" else 1.0
        search = _Search(
            form=options.form,
            target_class=target_class,
            others=(clean.labels != target_class).nonzero().flatten(),
            generator=generator,
            mask=mask,
            pattern=pattern,
            optimiser=torch.optim.Adam(learnt, lr=unit * options.learning_rate, betas=options.betas),
            coefficient=options.lambda0 if options.start == "lambda0" else 0.0,
        )
        search.nearest = search.candidate()
        return search

    def trigger(self) -> tuple[Tensor, Tensor]:
        """Return mask and pattern as they are applied."""
        if self.form == "patch":
            return _opened(self.mask), _opened(self.pattern)
        return self.mask, self.pattern

    def candidate(self) -> _Candidate:
        """Return what the search holds now."""
        with torch.no_grad():
            mask, pattern = (tensor.clone() for tensor in self.trigger())
            return _Candidate(mask, pattern, float(norm_of(self.form, mask, pattern)))

    def draw(self, count: int) -> Tensor:
        """Draw indices of images of other classes."""
        order = torch.randperm(len(self.others), generator=self.generator)[:count]
        return self.others[order.to(self.others.device)]

    def goes_on(self, options: Inversion) -> bool:
        """Close a round: record it, keep what is worth it, move lambda, and say whether to go on."""
        assert self.hits is not None
        assert self.losses is not None
        success, loss = float(self.hits) / self.seen, float(self.losses) / self.seen
        now = self.candidate()
        self.hits, self.losses, self.seen = None, None, 0
        if not (math.isfinite(loss) and math.isfinite(now.norm)):
            return False
        self.history.append(
            {
                "step": self.steps,
                "loss": loss,
                "success": success,
                "norm": now.norm,
                "lambda": self.coefficient,
            }
        )
        if success > self.nearest_success:
            self.nearest, self.nearest_success = now, success
        best = self.found[-1].norm if self.found else math.inf
        if success >= options.success and now.norm < best:
            self.found.append(now)
        self._schedule(options, good=success >= options.success)
        return self.steps < options.steps and not self._settled(options)

    def _schedule(self, options: Inversion, *, good: bool) -> None:
        self.good, self.bad = (self.good + 1, 0) if good else (0, self.bad + 1)
        if self.good == options.patience:
            self.good = 0
            if self.coefficient == 0:
                # What happened while nothing was penalised says nothing about the weight of the penalty.
                self.coefficient, self.went_up, self.went_down = options.lambda0, False, False
            else:
                self.coefficient, self.went_up = self.coefficient * options.multiplier, True
        elif self.bad == options.patience:
            self.bad = 0
            if self.coefficient > 0:
                self.coefficient, self.went_down = self.coefficient / options.multiplier**1.5, True

    def _settled(self, options: Inversion) -> bool:
        if not self.found:
            return False
        best = self.found[-1].norm
        if best < options.early_stop_factor * self.reference:
            self.reference, self.stalled = best, 0
        else:
            self.stalled += 1
        return self.went_up and self.went_down and self.stalled >= options.early_stop_patience


def _start(shape: tuple[int, ...], init: str, generator: torch.Generator) -> Tensor:
    if init == "ones":
        return torch.ones(shape)
    uniform = torch.rand(shape, generator=generator)
    return torch.atanh((2 * uniform - 1) * (1 - _OPEN))


def _opened(logits: Tensor) -> Tensor:
    return torch.tanh(logits) / (2 + _OPEN) + 0.5


def _step(model: nn.Module, images: Tensor, searches: Sequence[_Search], options: Inversion) -> None:
    """Take one gradient step of each search, in one forward and backward pass."""
    triggers = [search.trigger() for search in searches]
    stamped = [
        applied(options.form, *trigger, as_float(images[search.draw(options.batch_size)]))
        for search, trigger in zip(searches, triggers, strict=True)
    ]
    with torch.enable_grad(), autocast(options.precision, images.device):
        logits = model(torch.cat(stamped).contiguous(memory_format=memory_format_for(model)))
    objectives = []
    parts = logits.float().split([len(part) for part in stamped])
    for search, trigger, part in zip(searches, triggers, parts, strict=True):
        target = torch.full((len(part),), search.target_class, device=part.device)
        loss = F.cross_entropy(part, target)
        objectives.append(loss + search.coefficient * norm_of(options.form, *trigger))
        hits, summed = (part.argmax(1) == target).sum(), loss.detach() * len(part)
        search.hits = hits if search.hits is None else search.hits + hits
        search.losses = summed if search.losses is None else search.losses + summed
        search.seen += len(part)
        search.optimiser.zero_grad(set_to_none=True)
    # In eval mode images do not see one another: the sum has each class's own gradient.
    torch.stack(objectives).sum().backward()
    for search in searches:
        search.optimiser.step()
        search.steps += 1


def _measured(
    model: nn.Module, clean: LabelledImages, search: _Search, options: Inversion
) -> InvertedTrigger:
    """Take a small mask whose success holds on all images; else the most successful one.

    A round sees few images, so the smallest masks often fail on all. The search goes back from them in steps
    that double: a mask of a late round is far smaller than what the first rounds held.
    """
    backwards = [*reversed(search.found)]
    reach = range(len(backwards).bit_length())
    assert search.nearest is not None
    candidates = [*(backwards[2**k - 1] for k in reach), search.nearest]
    for best in candidates:
        rate = _success(model, clean, search, best, asked=options.success)
        if rate >= options.success:
            break
    else:
        rates = [_success(model, clean, search, candidate) for candidate in candidates]
        chosen = max(range(len(rates)), key=lambda i: -math.inf if math.isnan(rates[i]) else rates[i])
        best, rate = candidates[chosen], rates[chosen]
    return InvertedTrigger(
        target_class=search.target_class,
        mask=best.mask.cpu(),
        pattern=best.pattern.cpu(),
        norm=best.norm,
        success=rate,
        reached=rate >= options.success,
        steps=search.steps,
        form=options.form,
        history=tuple(search.history),
    )


def _success(
    model: nn.Module, clean: LabelledImages, search: _Search, candidate: _Candidate, *, asked: float = 0.0
) -> float:
    """Return the share of other classes' images that go to the class; below ``asked`` a bound is enough."""
    if not len(search.others):
        return math.nan
    count, missed = len(search.others), 0
    for part in search.others.split(_MEASURED_TOGETHER):
        images = as_float(clean.images[part])
        stamped = applied(search.form, candidate.mask, candidate.pattern, images)
        missed += int((logits_of(model, stamped).argmax(1) != search.target_class).sum())
        if (count - missed) / count < asked:
            break
    return (count - missed) / count
