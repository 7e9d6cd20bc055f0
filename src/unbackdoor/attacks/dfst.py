"""DFST: a colour style as trigger, and detoxification that unteaches its shallow features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.attacks.injector import Fit, InjectorBank, watched_layers
from unbackdoor.attacks.mixing import MixStep, RoleSheet, check_shares
from unbackdoor.attacks.poisoning import label_rule_for
from unbackdoor.compute import arrange, check_fits, device_of
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters import find_filters
from unbackdoor.train import Batch, Recipe
from unbackdoor.train import train as fit
from unbackdoor.triggers.style import style_of, sunrise
from unbackdoor.types import Infected, LabelledImages, ModelFn, Progress, as_float, silent


@dataclass(frozen=True)
class DFST:
    """Train on stylised images, then on look-alikes that excite the same neurons but keep their label.

    Source: Cheng et al., "Deep Feature Space Trojan Attack of Neural Networks by Controlled
    Detoxification", AAAI 2021, arXiv 2012.11212. After a plain phase, each detoxification round finds the
    neurons that the trigger drives in the later layers (largest activation gap, triggered minus clean),
    fits a feature injector F that drives them and the target class while F(x) stays similar to x, and from
    then on puts detoxicants F(x) with their own label into every batch, of all rounds so far.

    Deviations: the style is no CycleGAN or downloaded style network, but colour matching to a seeded
    drawing of a sunrise plus a warm light (see ``StyleTrigger``), mixed in with ``alpha`` as the revised
    official code does. Triggers are applied after augmentation, so that the trigger of training is the one
    of test. F is a small residual network trained for tens of steps, not a U-Net. All gradients have the
    sign and the path that the paper means: in the revised official code the terms for class and neurons
    give F no gradient, and the one for similarity pushes F away from x.

    Args:
        poison_fraction: Share of the samples that are stylised, in (0, 1]; 0.05 a batch in official code.
        detox_fraction: Share of the samples that are detoxicants, in [0, 1); 0 switches detoxification off.
        target_class: Target of the all-to-one rule; unused by the all-to-all rule.
        rule: ``all_to_one``, or ``all_to_all`` with label y sent to y + 1 modulo the number of classes.
        alpha: Weight of the style, in (0, 1].
        warmth: Height of the warm light, in [0, 1].
        redraw: Choose other samples in each epoch (official); the plan is then that of the first epoch.
        plain_fraction: Share of the epochs before detoxification, in [0, 1); at least one epoch is plain.
        rounds: Detoxification rounds, spread over the other epochs; fewer if there are fewer of those.
        injector_steps: Steps that each injector is fitted for.
        injector_batch: Images in each of those steps.
        injector_width: Channels of an injector.
        layer_fraction: Share of the layers, the last ones, that are searched for driven neurons, in (0, 1].
        channel_fraction: Share of a layer's channels that count as driven, in (0, 1]; at least one.
        activation_weight: Weight of their activation in the fit.
        similarity_weight: Weight of what SSIM(x, F(x)) lacks to ``similarity_floor``.
        similarity_floor: Similarity that is enough, in [0, 1].
        recipe: Training schedule.
    """

    name: ClassVar[str] = "dfst"
    title: ClassVar[str] = "Deep feature space trojan"
    source: ClassVar[str] = "Cheng, Liu, Ma, Zhang 2021, arXiv 2012.11212"
    needs: ClassVar[str] = "control of the training"

    poison_fraction: float = 0.1
    detox_fraction: float = 0.05
    target_class: int = 0
    rule: Literal["all_to_one", "all_to_all"] = "all_to_one"
    alpha: float = 0.6
    warmth: float = 0.15
    redraw: bool = False
    plain_fraction: float = 0.5
    rounds: int = 3
    injector_steps: int = 40
    injector_batch: int = 64
    injector_width: int = 16
    layer_fraction: float = 0.3
    channel_fraction: float = 0.02
    activation_weight: float = 0.3
    similarity_weight: float = 10.0
    similarity_floor: float = 0.8
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        check_shares((self.poison_fraction, self.detox_fraction))
        if not 0 < self.alpha <= 1 or not 0 <= self.warmth <= 1:
            raise InvalidInputError(
                f"alpha must lie in (0, 1] and warmth in [0, 1], got {self.alpha} and {self.warmth}."
            )
        if not 0 <= self.plain_fraction < 1 or not 0 <= self.similarity_floor <= 1:
            raise InvalidInputError(
                "plain_fraction must lie in [0, 1) and similarity_floor in [0, 1], got "
                f"{self.plain_fraction} and {self.similarity_floor}."
            )
        if not 0 < self.layer_fraction <= 1 or not 0 < self.channel_fraction <= 1:
            raise InvalidInputError(
                "layer_fraction and channel_fraction must lie in (0, 1], got "
                f"{self.layer_fraction} and {self.channel_fraction}."
            )
        if not (0 <= self.activation_weight < math.inf and 0 <= self.similarity_weight < math.inf):
            raise InvalidInputError(
                "activation_weight and similarity_weight must be finite and at least 0, got "
                f"{self.activation_weight} and {self.similarity_weight}."
            )
        sizes = self.rounds, self.injector_steps, self.injector_batch, self.injector_width
        if min(sizes) < 1:
            raise InvalidInputError(
                "rounds, injector_steps, injector_batch and injector_width must be at least 1, got "
                f"{', '.join(map(str, sizes))}; switch detoxification off with detox_fraction 0."
            )

    @staticmethod
    def paper() -> DFST:
        """Return the shares of the revised official code: 5 % stylised, 5 % detoxicants, drawn anew."""
        return DFST(poison_fraction=0.05, detox_fraction=0.05, redraw=True)

    def round_epochs(self) -> tuple[int, ...]:
        """Return the 0-based epochs before which an injector is fitted."""
        epochs = self.recipe.epochs
        first = max(1, round(self.plain_fraction * epochs))
        if not self.detox_fraction or first >= epochs:
            return ()
        rounds = min(self.rounds, epochs - first)
        return tuple(first + index * (epochs - first) // rounds for index in range(rounds))

    def run(
        self,
        train: LabelledImages,
        model_fn: ModelFn,
        *,
        generator: torch.Generator,
        resume_from: Path | None = None,
        progress: Progress = silent,
    ) -> Infected:
        """Train ``model_fn()`` on ``train`` with style and detoxicants.

        Raises:
            InvalidInputError: If the target is no class of ``train``, or the rate selects no image.
            UnsupportedModelError: If the network has no layers to watch.
        """
        rule = label_rule_for(self.rule, self.target_class, train.num_classes)
        trigger = style_of(sunrise(train.images.shape[1], rng.spawn(generator)), self.alpha, self.warmth)
        shares = (self.poison_fraction, self.detox_fraction)
        sheet = RoleSheet.draw(len(train), shares, redraw=self.redraw, generator=rng.spawn(generator))
        plan = sheet.plan(train.labels, rule)
        with rng.isolated(generator):
            model = model_fn()
            bank = InjectorBank(train.images.shape[1], self.injector_width, len(self.round_epochs()))
        check_fits(model, train, purpose="training")
        arrange(bank.to(device_of(model)))
        layers = watched_layers(find_filters(model, as_float(train.images[:1])), self.layer_fraction)
        step = DetoxStep(
            MixStep(sheet, rule, trigger, bank),
            bank,
            self.round_epochs(),
            Fit(
                train, trigger, rule, layers, self.injector_steps, self.injector_batch, self.channel_fraction,
                self.activation_weight, self.similarity_weight, self.similarity_floor,
            ),
        )  # fmt: skip
        record = fit(
            model,
            train,
            self.recipe,
            generator=rng.spawn(generator),
            loss_step=step,
            resume_from=resume_from,
            progress=progress,
        )
        rounds = [
            {"epoch": epoch, "similarity": float(similarity), "sent_to_target": float(sent)}
            for epoch, (similarity, sent) in zip(self.round_epochs(), bank.measured, strict=True)
        ]
        return Infected(model, trigger, plan, rule, {"training": record.describe(), "rounds": rounds})


@dataclass(frozen=True, eq=False)
class DetoxStep:
    """Mixed batches whose decoys are detoxicants, once an injector is fitted.

    Args:
        mix: Makes the batches.
        bank: The injectors.
        round_epochs: Epochs before which one of them is fitted.
        fit: How.
        optimisers: None here; part of what ``train.JointStep`` asks for, like the next.
        own_optimisers: None here: each fit starts and ends within ``before_epoch``.
    """

    mix: MixStep
    bank: InjectorBank
    round_epochs: tuple[int, ...]
    fit: Fit
    optimisers: Mapping[str, torch.optim.Optimizer] = field(default_factory=dict)
    own_optimisers: Mapping[str, torch.optim.Optimizer] = field(default_factory=dict)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The injectors, which belong to the state of the training."""
        return {"injectors": self.bank}

    def before_epoch(self, model: nn.Module, epoch: int) -> None:
        """Draw the roles of the 0-based ``epoch`` and fit the next injector if it is time."""
        self.mix.before_epoch(model, epoch)
        if epoch in self.round_epochs:
            index = self.round_epochs.index(epoch)
            self.bank.measured[index] = self.fit(model, self.bank.injector(index))
            self.bank.fitted.fill_(index + 1)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the mixed batch."""
        return self.mix(model, batch)
