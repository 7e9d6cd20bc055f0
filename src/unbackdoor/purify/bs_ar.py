"""Benign salience and adaptive regularisation: shrink what clean images do not need, while fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor.compute import EVALUATION_BATCH, check_fits, device_of, memory_format_for, mode
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.groups import FilterGroup, FilterMap, find_filters
from unbackdoor.purify.copies import fine_tuned
from unbackdoor.train import Batch, Recipe
from unbackdoor.types import LabelledImages, Progress, Purified, as_float, silent

_TANGENT_FROM = 5.0


@dataclass(frozen=True)
class BSAR:
    """Fine-tune while a regulariser shrinks the filters that clean images need least. A reconstruction.

    Source: Fan, Liu, Chen, Liu, Guo, "Defense against Backdoor Attacks via Identifying and Purifying Bad
    Neurons", 2022, arXiv 2208.06537. Benign salience of a parameter is ``-theta dCE/dtheta``, the
    first-order estimate of what the clean loss rises by without it; a filter's is the sum over its weight.
    The filters of lowest salience are suspects. Fine-tuning minimises ``CE + alpha sum R(theta)`` over them,
    where R(theta) is |theta| up to 1 and exp(|theta| - 1) beyond: large parameters are pulled the harder the
    larger they are, small ones as by an l1 norm.

    Reconstructed from the paper's abstract and introduction and from what the first author's public code
    computes; the paper's formulas were not seen.

    Choices of ours where nothing is known: salience is measured in eval mode once an epoch, since in train
    mode that of a filter before a batch norm is zero but for rounding; for the same reason a suspect filter
    behind a norm is shrunk at the norm's scale and shift, else at its weight and bias; suspects are the
    lowest share of each layer. Beyond 5 R goes on as its tangent, so that no step explodes.

    Not reproduced from that code: its salience also contains the regulariser's gradient; its regulariser
    falls without bound for parameters below -1 (a lost sign), which drives them away instead of shrinking
    them; its mask selects *all* parameters of moderate size, suspects or not. ``BSAR.authors()`` has the
    settings of its example, less these three: single weights of the head, those of *highest* salience, a
    share that grows from a half to all. The paper's own settings are not known, so there is no ``--paper``;
    on the command line the example is alpha=0.01, beta=0.5, growing=true, unit=weight, layers=head and
    suspects=highest.

    Running statistics change, as in any fine-tuning.

    Args:
        recipe: Of the fine-tuning.
        alpha: Strength of the regulariser.
        beta: Share of each layer's filters (or weights) that is suspected, in (0, 1].
        growing: Let the share grow to 1 in the last epoch.
        eta: How much of the salience of the epochs before is kept, in [0, 1).
        unit: Whether ``filter`` or single ``weight`` is judged.
        layers: ``hidden`` are all but the head, ``head`` is that alone, ``all`` both. A filter of the head
            is a class, so that it can be judged by ``weight`` only.
        suspects: Which end of the order is suspected.
        regulariser: ``adaptive`` is R above; ``l1`` is |theta|, ``l2`` theta^2.
    """

    name: ClassVar[str] = "bs_ar"
    title: ClassVar[str] = "Benign salience with adaptive regularisation (reconstruction)"
    source: ClassVar[str] = "Fan, Liu, Chen, Liu, Guo 2022, arXiv 2208.06537"
    needs: ClassVar[str] = "clean images with labels"

    recipe: Recipe = field(
        default_factory=lambda: Recipe(
            epochs=10, batch_size=64, learning_rate=0.01, weight_decay=1e-4, schedule="constant"
        )
    )
    alpha: float = 0.1
    beta: float = 0.1
    growing: bool = False
    eta: float = 0.9
    unit: Literal["filter", "weight"] = "filter"
    layers: Literal["hidden", "head", "all"] = "hidden"
    suspects: Literal["lowest", "highest"] = "lowest"
    regulariser: Literal["adaptive", "l1", "l2"] = "adaptive"

    def __post_init__(self) -> None:
        if not self.alpha >= 0 or not 0 < self.beta <= 1 or not 0 <= self.eta < 1:
            raise InvalidInputError(
                "alpha must be at least 0, beta lie in (0, 1] and eta in [0, 1), got "
                f"{self.alpha}, {self.beta} and {self.eta}."
            )
        known: dict[str, tuple[str, ...]] = {
            "unit": ("filter", "weight"),
            "layers": ("hidden", "head", "all"),
            "suspects": ("lowest", "highest"),
            "regulariser": ("adaptive", "l1", "l2"),
        }
        for option, values in known.items():
            if getattr(self, option) not in values:
                raise InvalidInputError(
                    f"{option} must be one of {', '.join(values)}, got {getattr(self, option)!r}."
                )
        if self.unit == "filter" and self.layers != "hidden":
            raise InvalidInputError(
                f"a filter of the head is a class, so layers = {self.layers!r} needs unit = 'weight'."
            )

    @staticmethod
    def authors() -> BSAR:
        """Return the settings of the example in the first author's code; see the class for what differs."""
        return BSAR(alpha=0.01, beta=0.5, growing=True, unit="weight", layers="head", suspects="highest")

    def purify(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Purified:
        """Return a fine-tuned copy of ``model``.

        Args:
            model: Takes float images in [0, 1]; left untouched.
            clean: Clean images with labels; a few hundred.
            generator: All randomness follows it; on the CPU.
            progress: Called after each epoch.

        Raises:
            InvalidInputError: If there are too few images, or a label has no output of the model.
            UnsupportedModelError: If there is no such layer, or the training diverges.
        """
        check_fits(model, clean, purpose="purification", at_least=2)
        filter_map = find_filters(model, as_float(clean.images[:1]))
        groups = self._groups(filter_map)
        loss_step = _RegularisedStep(self, groups, clean.to(device_of(model)))
        purified, record = fine_tuned(
            model, clean, self.recipe, generator=generator, loss_step=loss_step,
            stage="adaptive regularisation", progress=progress,
        )  # fmt: skip
        weights = {group.name: loss_step.first[group.weight] for group in groups}
        return Purified(
            model=purified,
            mask=None,
            scores={n: s.cpu() for n, s in weights.items()} if self.unit == "filter" else {},
            diagnostics={
                "options": asdict(self),
                "reconstruction": True,
                "losses": list(record.losses),
                "penalty": loss_step.penalties,
                "suspects": loss_step.counts,
            },
        )

    def _groups(self, filter_map: FilterMap) -> tuple[FilterGroup, ...]:
        wanted = {"hidden": (False,), "head": (True,), "all": (False, True)}[self.layers]
        groups = tuple(group for group in filter_map.groups if group.is_head in wanted)
        if not groups:
            raise UnsupportedModelError(
                f"this network has no layer with layers = {self.layers!r}; choose others, or another method."
            )
        return groups


def benign_salience(
    model: nn.Module, clean: LabelledImages, names: list[str], *, batch_size: int = EVALUATION_BATCH
) -> dict[str, Tensor]:
    """Return ``-theta dL/dtheta`` of every parameter value, L being the mean clean cross-entropy.

    Args:
        model: The network, whose named parameters require gradients; evaluated in eval mode and fp32.
        clean: Images and labels on the model's device.
        names: Which parameters.
        batch_size: Images per pass; gradients are summed, so it changes nothing.

    Returns:
        Parameter name to float32 of the parameter's shape.
    """
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in names]
    totals = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in chosen]
    layout = memory_format_for(model)
    with mode(model, training=False), torch.enable_grad():
        for start in range(0, len(clean), batch_size):
            part = slice(start, start + batch_size)
            images = as_float(clean.images[part]).contiguous(memory_format=layout)
            loss = F.cross_entropy(model(images).float(), clean.labels[part], reduction="sum")
            for total, gradient in zip(totals, torch.autograd.grad(loss, chosen), strict=True):
                total.add_(gradient)
    return {
        name: -total * parameter.detach() / len(clean)
        for name, total, parameter in zip(names, totals, chosen, strict=True)
    }


def penalty_of(values: Tensor, regulariser: Literal["adaptive", "l1", "l2"]) -> Tensor:
    """Return R elementwise: |v|, v^2, or |v| up to 1, exp(|v| - 1) up to 5 and its tangent beyond."""
    size = values.abs()
    if regulariser == "l2":
        return values.square()
    if regulariser == "l1":
        return size
    beyond = (size - _TANGENT_FROM).clamp_min(0)
    steep = (size.clamp(1.0, _TANGENT_FROM) - 1).exp() * (1 + beyond)
    return torch.where(size <= 1, size, steep)


def suspected(salience: Tensor, share: float, end: Literal["lowest", "highest"]) -> Tensor:
    """Return which entries are the ``share`` of lowest or highest salience, at least one; bool, same shape.

    Args:
        salience: Any shape.
        share: In (0, 1].
        end: Which end of the order.
    """
    flat = salience.flatten() if end == "lowest" else -salience.flatten()
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[flat.argsort(stable=True)[: max(1, int(share * len(flat)))]] = True
    return chosen.view(salience.shape)


class _RegularisedStep:
    """Cross-entropy plus the regulariser; chooses its suspects anew before each epoch."""

    def __init__(self, method: BSAR, groups: tuple[FilterGroup, ...], clean: LabelledImages) -> None:
        self.method, self.groups, self.clean = method, groups, clean
        self.first: dict[str, Tensor] = {}
        self.salience: dict[str, Tensor] = {}
        self.chosen: dict[str, Tensor] = {}
        self.counts: list[int] = []
        self.penalties: list[float] = []
        # The one training loop asks steps for networks of their own; there are none.
        self.modules: Mapping[str, nn.Module] = {}
        self.optimisers: Mapping[str, torch.optim.Optimizer] = {}
        self.own_optimisers: Mapping[str, torch.optim.Optimizer] = {}

    def before_epoch(self, model: nn.Module, epoch: int) -> None:
        """Measure salience and choose the suspects of the 0-based ``epoch``."""
        method, names = self.method, [group.weight for group in self.groups]
        if method.unit == "weight":
            names += [group.bias for group in self.groups if group.bias]
        now = benign_salience(model, self.clean, names)
        if method.unit == "filter":
            now = {name: values.flatten(1).sum(1) for name, values in now.items()}
        before = self.salience or now
        self.first = self.first or now
        self.salience = {n: method.eta * before[n] + (1 - method.eta) * now[n] for n in names}
        grown = (1 - method.beta) * (epoch + 1) / method.recipe.epochs if method.growing else 0.0
        chosen = {n: suspected(s, method.beta + grown, method.suspects) for n, s in self.salience.items()}
        self.counts.append(sum(int(c.sum()) for c in chosen.values()))
        self.chosen = chosen if method.unit == "weight" else self._on_filters(chosen)
        with torch.no_grad():
            self.penalties.append(float(self._penalty(model)))

    def _on_filters(self, chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return, by tensor name, the suspect rows of what decides how loud a filter is."""
        rows: dict[str, Tensor] = {}
        for group in self.groups:
            scales = [n.weight for n in group.norms if n.weight]
            shifts = [n.bias for n in group.norms if n.weight and n.bias]
            own = [group.weight, *([group.bias] if group.bias else [])]
            rows |= dict.fromkeys([*scales, *shifts] if scales else own, chosen[group.weight])
        return rows

    def _penalty(self, model: nn.Module) -> Tensor:
        parameters = dict(model.named_parameters())
        parts = [
            penalty_of(parameters[name].float()[chosen], self.method.regulariser).sum()
            for name, chosen in self.chosen.items()
        ]
        return self.method.alpha * torch.stack(parts).sum()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of one batch."""
        logits: Tensor = model(batch.images)
        return F.cross_entropy(logits.float(), batch.labels) + self._penalty(model)
