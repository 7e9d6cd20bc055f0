"""Implicit Backdoor Adversarial Unlearning: unlearn a universal perturbation, through its own optimum."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from unbackdoor import rng
from unbackdoor.compute import (
    Precision,
    arrange,
    autocast,
    check_fits,
    device_of,
    memory_format_for,
    predictions_of,
)
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.groups import find_filters
from unbackdoor.purify.copies import handed_back, working_copy
from unbackdoor.train import Batch, batches
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent


@dataclass(frozen=True)
class IBAU:
    """Minimise over weights the harm of the worst universal perturbation, by its implicit hypergradient.

    Source: Zeng et al., "Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022, arXiv
    2110.03735, Algorithm 1. Each round finds delta by ascent over one pass, then steps on each batch along
    ``dL_out/dtheta + (dPhi/dtheta)' v`` with ``v = (dPhi/ddelta)' v + dL_out/ddelta`` iterated K times and
    ``Phi(delta) = delta - phi_rate * dL_in/ddelta``. Works with any norm: statistics stay frozen.

    Deviations from the authors' code: at least one image of each batch carries delta, where rounding down
    left none in batches below 100; gradients do not pile up from step to step; attention runs unfused and
    ReLUs out of place while second derivatives are taken; the labels that delta fights are the model's at
    the start of the round, which saves a pass a step; those are also the labels in Phi, where the code takes
    the true ones (they differ where the model errs); images are shuffled anew in each round, where the code
    keeps one order; delta keeps to ``radius``; batch size and share suit 500 images.

    Args:
        rounds: Of finding delta and unlearning it; 5.
        iterations: K, fixed-point iterations of the hypergradient.
        batch_size: Images a step.
        outer_rate: Step of Adam on the weights.
        amsgrad: Use Adam's variant with a monotone second moment.
        inner_rate: Step of SGD on delta; set for images in [0, 1].
        inner_penalty: Weight of ``||delta||^2`` in the inner loss; set for images in [0, 1].
        radius: Largest root-mean-square change of a pixel by delta, which is scaled back to it after each
            step; the bound C of the paper's problem. 0 for none, as in the authors' code: with many steps
            delta then grows far beyond what an image can hold, and unlearning it ruins the model.
        phi_rate: Step of Phi.
        contracting: End the fixed-point iterations once their terms grow: the inner loss is concave where the
            model is sure of itself, the series then has no limit, and its last terms drown the gradient.
        stamped_fraction: Share of each batch that carries delta in the outer loss, in (0, 1]; at least one
            image. The authors' code has 0.01 of 100.
        inner_batch: On which images Phi is computed: ``first``, those of the first batch of the round's
            pass for every step, or ``own``, those of the step. The authors' code takes the first batch, too,
            but there it is the same one in all rounds.
        precision: Of the ascent on delta; second derivatives are always float32.
    """

    name: ClassVar[str] = "i_bau"
    title: ClassVar[str] = "Implicit Backdoor Adversarial Unlearning"
    source: ClassVar[str] = "Zeng et al. 2022, arXiv 2110.03735"
    needs: ClassVar[str] = "clean images with labels"

    rounds: int = 5
    iterations: int = 5
    batch_size: int = 32
    outer_rate: float = 1e-3
    amsgrad: bool = False
    inner_rate: float = 10.0
    inner_penalty: float = 0.001
    radius: float = 0.1
    phi_rate: float = 0.1
    contracting: bool = True
    stamped_fraction: float = 0.1
    inner_batch: Literal["first", "own"] = "first"
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.iterations < 0 or self.batch_size < 2:
            raise InvalidInputError(
                "I-BAU needs rounds >= 1, iterations >= 0 and batch_size >= 2, got "
                f"{self.rounds}, {self.iterations} and {self.batch_size}."
            )
        rates = (self.outer_rate, self.inner_rate, self.phi_rate)
        bounds = (self.inner_penalty, self.radius)
        if not all(0 < rate < math.inf for rate in rates) or not all(0 <= b < math.inf for b in bounds):
            raise InvalidInputError(
                "outer_rate, inner_rate and phi_rate must be positive, inner_penalty and radius at least 0, "
                f"got {', '.join(map(str, rates + bounds))}."
            )
        if not 0 < self.stamped_fraction <= 1 or self.inner_batch not in ("first", "own"):
            raise InvalidInputError(
                "stamped_fraction must lie in (0, 1] and inner_batch be 'first' or 'own', got "
                f"{self.stamped_fraction} and {self.inner_batch!r}."
            )

    @staticmethod
    def paper() -> IBAU:
        """Return the settings of the authors' code, made for 5,000 images."""
        return IBAU(batch_size=100, radius=0.0, contracting=False, stamped_fraction=0.01, precision="fp32")

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a copy of ``model`` that withstands universal perturbations.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels; a few hundred.
            generator: All randomness follows it; on the CPU.
            progress: Called after each round.

        Raises:
            InvalidInputError: If there are too few images, or a label has no output of the model.
            UnsupportedModelError: If the model has no layers, has operations without second derivatives,
                or the run diverges.
        """
        check_fits(model, clean, purpose="purification", at_least=2)
        find_filters(model, as_float(clean.images[:1]))
        clean = clean.to(device_of(model))
        work = arrange(working_copy(model))
        parameters = [p for p in work.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(parameters, lr=self.outer_rate, amsgrad=self.amsgrad)
        draws = rng.spawn(generator)
        rounds = []
        with rng.isolated(draws), twice_differentiable(work):
            for done in range(self.rounds):
                labels = predictions_of(work, clean.images).to(clean.labels.device)
                delta, norm = self._ascend(work, clean, labels, draws)
                losses = self._unlearn(work, clean, labels, delta, optimiser, draws)
                rounds.append({"delta_norm": norm, "outer_loss": sum(losses) / len(losses)})
                progress("adversarial unlearning", done + 1, self.rounds)
        return Purified(handed_back(work, model), None, {}, {"options": asdict(self), "rounds": rounds})

    def _ascend(
        self, work: nn.Module, clean: LabelledImages, labels: Tensor, draws: torch.Generator
    ) -> tuple[Tensor, float]:
        delta = torch.zeros_like(as_float(clean.images[:1])).requires_grad_()
        for batch in _pass(work, clean, self.batch_size, draws):
            with autocast(self.precision, delta.device):
                logits = work(batch.images + delta)
            (gradient,) = torch.autograd.grad(self._inner(logits, labels[batch.indices], delta), delta)
            delta = self._bounded(delta.detach() - self.inner_rate * gradient).requires_grad_()
        norm = float(delta.detach().norm())
        if not math.isfinite(norm):
            raise UnsupportedModelError(
                f"the perturbation diverged with inner_rate {self.inner_rate}; lower it."
            )
        return delta, norm

    def _bounded(self, delta: Tensor) -> Tensor:
        if self.radius == 0:
            return delta
        size = delta.square().mean().sqrt()
        return delta * (self.radius / size.clamp_min(self.radius))

    def _inner(self, logits: Tensor, labels: Tensor, delta: Tensor) -> Tensor:
        return self.inner_penalty * delta.square().sum() - F.cross_entropy(logits.float(), labels)

    def _unlearn(
        self,
        work: nn.Module,
        clean: LabelledImages,
        labels: Tensor,
        delta: Tensor,
        optimiser: torch.optim.Adam,
        draws: torch.Generator,
    ) -> list[float]:
        losses = []
        first: Batch | None = None
        for batch in _pass(work, clean, self.batch_size, draws):
            first = batch if first is None or self.inner_batch == "own" else first
            stamped = torch.zeros(len(batch.images), dtype=torch.bool)
            count = max(1, int(self.stamped_fraction * len(stamped)))
            stamped[torch.randperm(len(stamped), generator=draws)[:count]] = True
            loss, gradients = self._hypergradient(
                work, batch, stamped.to(delta.device), first, labels[first.indices], delta
            )
            if not math.isfinite(loss) or not all(bool(g.isfinite().all()) for g in gradients):
                raise UnsupportedModelError(
                    f"adversarial unlearning diverged with outer_rate {self.outer_rate}; lower it."
                )
            for parameter, gradient in zip(optimiser.param_groups[0]["params"], gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()
            losses.append(loss)
        return losses

    def _hypergradient(
        self, work: nn.Module, outer: Batch, stamped: Tensor, inner: Batch, labels: Tensor, delta: Tensor
    ) -> tuple[float, list[Tensor]]:
        parameters = [p for p in work.parameters() if p.requires_grad]
        images = outer.images + stamped.view(-1, 1, 1, 1) * delta
        loss = F.cross_entropy(work(images), outer.labels)
        direct, *gradients = _grad(loss, [delta, *parameters])
        inner_loss = self._inner(work(inner.images + delta), labels, delta)
        (slope,) = torch.autograd.grad(inner_loss, delta, create_graph=True)
        v = implicit_vector(
            slope,
            delta,
            direct,
            rate=self.phi_rate,
            iterations=self.iterations,
            contracting=self.contracting,
        )
        # dPhi/dtheta = -rate d2 L_in / (ddelta dtheta)
        implicit = _grad((slope * v).sum(), parameters)
        return float(loss.detach()), [g - self.phi_rate * i for g, i in zip(gradients, implicit, strict=True)]


def implicit_vector(
    slope: Tensor,
    delta: Tensor,
    direct: Tensor,
    *,
    rate: float,
    iterations: int,
    contracting: bool = False,
) -> Tensor:
    """Iterate ``v <- (dPhi/ddelta)' v + direct`` from 0, with ``Phi(delta) = delta - rate * slope``.

    Args:
        slope: ``dL_in/ddelta``, a differentiable function of ``delta``; its graph is kept.
        delta: Where the derivatives are taken.
        direct: ``dL_out/ddelta``, shaped as ``delta``.
        rate: Step of Phi.
        iterations: K; the result is the sum of the first K terms of the Neumann series.
        contracting: Leave out the terms from the first on that is larger than the one before: Phi is no
            contraction there, and the series has no limit.
    """
    if iterations == 0:
        return torch.zeros_like(direct)
    v = term = direct  # the first iteration: its product with v = 0 needs no pass
    for _ in range(iterations - 1):
        (curved,) = _grad((slope * term).sum(), [delta])
        following = term - rate * curved
        if contracting and not bool(following.norm() <= term.norm()):
            break
        v, term = v + following, following
    return v


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Make ``model`` use operations with second derivatives inside the block; restore flags afterwards."""
    changed = [module for module in model.modules() if getattr(module, "inplace", False) is True]
    for module in changed:
        vars(module)["inplace"] = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if "derivative" not in str(error):
            raise
        raise UnsupportedModelError(
            f"the model has an operation without second derivatives ({str(error).splitlines()[0]}); use a "
            "method that needs none."
        ) from error
    finally:
        for module in changed:
            vars(module)["inplace"] = True


def _pass(work: nn.Module, clean: LabelledImages, batch_size: int, draws: torch.Generator) -> Iterator[Batch]:
    return batches(clean, batch_size, draws, layout=memory_format_for(work))


def _grad(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    gradients: tuple[Any, ...] = torch.autograd.grad(
        loss, tensors, allow_unused=True, retain_graph=True, materialize_grads=True
    )
    return list(gradients)
