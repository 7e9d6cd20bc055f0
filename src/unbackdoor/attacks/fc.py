"""FC: clean-label poisons that collide with other classes in feature space."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.attacks.features import PenultimateFeatures, penultimate_features
from unbackdoor.attacks.poisoning import label_rule_for, plan_clean_label, replaced
from unbackdoor.attacks.training import train_infected, train_surrogate
from unbackdoor.compute import device_of, predictions_of
from unbackdoor.errors import InvalidInputError
from unbackdoor.train import Batch, Recipe, cross_entropy_step
from unbackdoor.triggers.blend import BlendTrigger, noise_key
from unbackdoor.triggers.patch import PatchTrigger
from unbackdoor.types import (
    Infected,
    LabelledImages,
    LabelRule,
    ModelFn,
    OneToOne,
    PoisonPlan,
    Progress,
    as_float,
    quantise,
    silent,
)

CRAFTING_BATCH = 128


@dataclass(frozen=True)
class FC:
    """Make images of the target class look, to a network's last features, like images of other classes.

    Sources: Shafahi et al., "Poison Frogs! Targeted Clean-Label Poisoning Attacks on Neural Networks",
    NeurIPS 2018, arXiv 1804.00792, equation 1 and algorithm 1; Saha et al., "Hidden Trigger Backdoor
    Attacks", AAAI 2020, arXiv 1910.00033.

    The FC of the RNP and MNP papers is known from stored arrays only: crafted training images in up to 80 %
    of one class, crafted test images, clean labels. The four variants are our readings, not theirs:

    ``backdoor`` (the default, and the only one that can reach their success rates): the trigger is a key
    image blended in; a poison starts from a target-class image with the key and collides with another class's
    image with the key.
    ``pair``: the same with one source class; only that class counts towards the success rate.
    ``hidden``: Saha et al.; poisons collide with patched images but show no patch; the clean network is
    fine-tuned on them.
    ``targeted``: Shafahi et al.; no trigger. ``record["targeted"]`` names held-out training images that the
    poisons aim at (they are left out of all training) and the share that ends in the target class:
    a success rate over instances, not an ASR. Its ``trigger`` blends in the first such image, the
    watermark of some poisons, and need not work on other images.

    Deviations: each step moves the most changed pixel by ``step`` (falling linearly to 0), not by a fixed
    multiple of the gradient, whose scale depends on the network; the pull towards the base image is
    ``a / eps`` in a step of size a, which bounds the change by ``eps`` for every poison. ``targeted`` aims
    at all instances in one training, where the paper trains once for each. ``hidden`` stamps a fixed place.

    Args:
        variant: Which reading.
        class_fraction: Rate within the target class, in (0, 1]; used if ``poison_fraction`` is 0.
        poison_fraction: Overall poison rate, or 0 to use ``class_fraction``.
        target_class: The class whose images are poisoned.
        source_class: The class that ``pair`` sends to the target.
        watermark: Weight of the key, or of the instance in ``targeted``, in (0, 1].
        eps: Largest change of a pixel by the collision, in grey levels.
        step: Largest change of a pixel in the first step, in grey levels.
        steps: Steps of the collision.
        patch_size: Side of the patch of ``hidden``; 0 for round(5 H / 32), at least 2.
        instances: Images that ``targeted`` aims at.
        fine_tune_epochs: Epochs in which ``hidden`` and ``targeted`` fine-tune the clean network.
        fine_tune_rate: Peak learning rate of those.
        fine_tune_layers: Last layers (modules with parameters) that are fine-tuned; 0 for all. Five are the
            last block of a ResNet-18 and its head.
        surrogate: Schedule of the clean network.
        recipe: Training schedule.
    """

    name: ClassVar[str] = "fc"
    title: ClassVar[str] = "Feature collision"
    source: ClassVar[str] = "Shafahi et al. 2018, arXiv 1804.00792; Saha et al. 2020, arXiv 1910.00033"
    needs: ClassVar[str] = "poisoned training data with true labels"

    variant: Literal["backdoor", "hidden", "targeted", "pair"] = "backdoor"
    class_fraction: float = 0.8
    poison_fraction: float = 0.0
    target_class: int = 0
    source_class: int = 1
    watermark: float = 0.3
    eps: float = 16.0
    step: float = 2.0
    steps: int = 60
    patch_size: int = 0
    instances: int = 20
    fine_tune_epochs: int = 5
    fine_tune_rate: float = 0.02
    fine_tune_layers: int = 5
    surrogate: Recipe = field(default_factory=lambda: Recipe.short(8))
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        if self.variant not in ("backdoor", "hidden", "targeted", "pair"):
            raise InvalidInputError(
                f"variant must be 'backdoor', 'hidden', 'targeted' or 'pair', got {self.variant!r}."
            )
        if not (0 < self.watermark <= 1 and 0 < self.step <= self.eps <= 255 and self.fine_tune_rate > 0):
            raise InvalidInputError(
                "watermark must lie in (0, 1], step and eps satisfy 0 < step <= eps <= 255 and "
                f"fine_tune_rate be positive, got {self.watermark}, {self.step}, {self.eps} and "
                f"{self.fine_tune_rate}."
            )
        if min(self.steps, self.instances, self.fine_tune_epochs) < 1:
            raise InvalidInputError(
                "steps, instances and fine_tune_epochs must be at least 1, got "
                f"{self.steps}, {self.instances} and {self.fine_tune_epochs}."
            )
        if min(self.patch_size, self.fine_tune_layers) < 0:
            raise InvalidInputError(
                f"patch_size and fine_tune_layers must be at least 0, got {self.patch_size} and "
                f"{self.fine_tune_layers}."
            )
        if self.variant == "pair" and self.source_class == self.target_class:
            raise InvalidInputError(
                f"source_class and target_class are both {self.target_class}; choose two classes."
            )

    @staticmethod
    def paper() -> FC:
        """Return the settings of Shafahi et al.: no trigger, watermark 0.3, the clean network fine-tuned.

        One instance and, on CIFAR-10, fifty poisons, with no bound on their change but the pull back.
        """
        return FC(variant="targeted", class_fraction=0.01, instances=1, eps=255.0, steps=120)

    def run(
        self,
        train: LabelledImages,
        model_fn: ModelFn,
        *,
        generator: torch.Generator,
        resume_from: Path | None = None,
        progress: Progress = silent,
    ) -> Infected:
        """Craft poisons on a clean network and train on them, from scratch or by fine-tuning it.

        Raises:
            InvalidInputError: If a class is none of ``train``'s, or a rate or the patch does not fit.
            UnsupportedModelError: If the network has no linear layer.
        """
        label_rule = self._label_rule(train)
        plan = self._plan(train, rng.spawn(generator))
        sources = self._sources(train, rng.spawn(generator))
        trigger = self._trigger(train, sources, rng.spawn(generator))
        held = sources[: self.instances] if self.variant == "targeted" else sources[:0]
        clean = train_surrogate(
            without(train, held),
            model_fn,
            self.surrogate,
            generator=rng.spawn(generator),
            resume_from=resume_from,
            progress=progress,
        )
        poisons, record = self._craft(clean, train, plan, trigger, sources, progress)
        aimed_at = train.images[held.to(train.images.device)]
        # Before training, which for this variant changes the clean network itself.
        before = predictions_of(clean, aimed_at) if len(held) else held
        infected = self._train(
            clean,
            without(replaced(train, plan, poisons), held),
            model_fn,
            Infected(clean, trigger, plan, label_rule, record),
            generator,
            resume_from,
            progress,
        )
        if self.variant != "targeted":
            return infected
        after = predictions_of(infected.model, aimed_at)
        outcome = describe_targets(held, train.labels.cpu()[held], before, after, self.target_class)
        return replace(infected, record={"targeted": outcome, **infected.record})

    def _label_rule(self, train: LabelledImages) -> LabelRule:
        rule = label_rule_for("all_to_one", self.target_class, train.num_classes)
        if self.variant != "pair":
            return rule
        if not 0 <= self.source_class < train.num_classes:
            raise InvalidInputError(
                f"source_class {self.source_class} is not a class of a data set with {train.num_classes} "
                f"classes; choose one from 0 to {train.num_classes - 1}."
            )
        return OneToOne(self.source_class, self.target_class)

    def _plan(self, train: LabelledImages, generator: torch.Generator) -> PoisonPlan:
        return plan_clean_label(
            train.labels,
            self.target_class,
            generator,
            class_fraction=self.class_fraction,
            poison_fraction=self.poison_fraction,
        )

    def _sources(self, train: LabelledImages, generator: torch.Generator) -> Tensor:
        labels = train.labels.cpu()
        eligible = labels == self.source_class if self.variant == "pair" else labels != self.target_class
        places = eligible.nonzero().flatten()
        needed = self.instances + 1 if self.variant == "targeted" else 1
        if len(places) < needed:
            raise InvalidInputError(
                f"variant {self.variant!r} needs {needed} image(s) to collide with, of other classes than "
                f"{self.target_class}, and there are {len(places)}; give more data or lower instances."
            )
        return places[torch.randperm(len(places), generator=generator)]

    def _trigger(
        self, train: LabelledImages, sources: Tensor, generator: torch.Generator
    ) -> BlendTrigger | PatchTrigger:
        channels, height, width = train.images.shape[1:]
        if self.variant == "hidden":
            side = self.patch_size or max(2, round(5 * height / 32))
            pattern = torch.rand(channels, side, side, generator=generator).round()
            trigger = PatchTrigger(pattern, -side, -side)
            trigger(
                torch.zeros(1, channels, height, width)
            )  # fail on a patch that does not fit before training
            return trigger
        if self.variant == "targeted":
            return BlendTrigger(as_float(train.images[sources[0]]).cpu().clone(), self.watermark)
        return BlendTrigger(noise_key(channels, height, width, generator), self.watermark)

    def _craft(
        self,
        clean: nn.Module,
        train: LabelledImages,
        plan: PoisonPlan,
        trigger: BlendTrigger | PatchTrigger,
        sources: Tensor,
        progress: Progress,
    ) -> tuple[Tensor, dict[str, Any]]:
        device, store = device_of(clean), train.images.device
        features = penultimate_features(clean, as_float(train.images[:1]).to(device))
        pool = sources[: self.instances] if self.variant == "targeted" else sources
        partners = pool[torch.arange(len(plan.indices)) % len(pool)]
        poisons: list[Tensor] = []
        distances: list[Tensor] = []
        for part, partner in zip(
            plan.indices.split(CRAFTING_BATCH), partners.split(CRAFTING_BATCH), strict=True
        ):
            bases = as_float(train.images[part.to(store)]).to(device)
            goals = as_float(train.images[partner.to(store)]).to(device)
            if self.variant == "targeted":
                bases = (1 - self.watermark) * bases + self.watermark * goals
            else:
                goals = trigger(goals)
                bases = bases if self.variant == "hidden" else trigger(bases)
            with torch.no_grad():
                wanted = features(goals)
            poison = collide(
                features,
                bases,
                wanted,
                eps=self.eps / 255,
                step=self.step / 255,
                steps=self.steps,
                pairing=self.variant == "hidden",
            )
            poisons.append(quantise(poison))
            distances.append(distance_ratios(features, bases, poison, wanted))
            progress("poisons", sum(len(each) for each in poisons), len(plan.indices))
        return torch.cat(poisons), {"feature_distance_ratio": float(torch.cat(distances).median())}

    def _train(
        self,
        clean: nn.Module,
        poisoned: LabelledImages,
        model_fn: ModelFn,
        crafted: Infected,
        generator: torch.Generator,
        resume_from: Path | None,
        progress: Progress,
    ) -> Infected:
        tunes = self.variant in ("hidden", "targeted")
        recipe = self.recipe
        if tunes:
            recipe = replace(recipe, epochs=self.fine_tune_epochs, learning_rate=self.fine_tune_rate)
        infected = train_infected(
            poisoned,
            (lambda: unfreeze(clean, self.fine_tune_layers)) if tunes else model_fn,
            plan=crafted.plan,
            trigger=crafted.trigger,
            label_rule=crafted.label_rule,
            recipe=recipe,
            generator=generator,
            loss_step=frozen_norms_step if tunes else cross_entropy_step,
            record=crafted.record,
            resume_from=resume_from,
            progress=progress,
        )
        if tunes:
            infected.model.requires_grad_(requires_grad=True)
        return infected


def collide(
    features: PenultimateFeatures,
    bases: Tensor,
    wanted: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    pairing: bool = False,
) -> Tensor:
    """Move images towards wanted features by forward-backward splitting, while staying near where they were.

    A step goes down the slope of ``||f(z) - f*||^2``, scaled so that the most changed pixel of each image
    moves by the step size a, which falls linearly to 0; then ``z <- (z + c b) / (1 + c)`` with c = a / eps
    pulls towards the base b. Both together keep every pixel within ``eps`` of it.

    Args:
        features: Features of a network with frozen parameters.
        bases: float32 ``(N, C, H, W)`` in [0, 1]: where to start and stay near.
        wanted: float32 ``(N, F)``.
        eps: Largest change of a pixel.
        step: Size of the first step, at most ``eps``.
        steps: Number of steps.
        pairing: Pair images and wanted features anew in each step, nearest first (Saha et al.).

    Returns:
        float32 as ``bases``, in [0, 1].
    """
    current = bases.detach()
    for index in range(steps):
        size = step * (1 - index / steps)
        current = current.requires_grad_()
        with torch.enable_grad():
            found = features(current)
            goal = wanted[nearest_pairs(found.detach(), wanted)] if pairing else wanted
            loss = (found - goal).square().sum()
        (slope,) = torch.autograd.grad(loss, current)
        largest = slope.abs().flatten(1).amax(1).clamp_min(1e-20).view(-1, 1, 1, 1)
        moved = current.detach() - size * slope / largest
        current = ((moved + size / eps * bases) / (1 + size / eps)).clamp(0.0, 1.0)
    return current.detach()


def nearest_pairs(found: Tensor, wanted: Tensor) -> Tensor:
    """Pair rows greedily, nearest pair first; each row of ``wanted`` is used once.

    Args:
        found: ``(N, F)``.
        wanted: ``(N, F)``.

    Returns:
        int64 ``(N,)``: the row of ``wanted`` for each row of ``found``.
    """
    count = len(found)
    order = torch.cdist(found, wanted).flatten().argsort().tolist()
    partner: dict[int, int] = {}
    taken: set[int] = set()
    for entry in order:
        row, column = divmod(entry, count)
        if row not in partner and column not in taken:
            partner[row] = column
            taken.add(column)
    return torch.tensor([partner[row] for row in range(count)], device=found.device)


@torch.no_grad()
def distance_ratios(features: PenultimateFeatures, bases: Tensor, poisons: Tensor, wanted: Tensor) -> Tensor:
    """Return how much of the distance to ``wanted`` is left after crafting, per image, on the CPU."""
    before = (features(bases) - wanted).norm(dim=1)
    ratio: Tensor = (features(poisons) - wanted).norm(dim=1) / before.clamp_min(1e-12)
    return ratio.cpu()


def without(data: LabelledImages, held: Tensor) -> LabelledImages:
    """Return ``data`` without the samples at ``held``, int64 ``(M,)``; class names stay."""
    if not len(held):
        return data
    keep = torch.ones(len(data), dtype=torch.bool)
    keep[held] = False
    return data.subset(keep.to(data.images.device))


def unfreeze(model: nn.Module, layers: int) -> nn.Module:
    """Let the last ``layers`` modules with parameters learn (0 for all), in place, and freeze the rest."""
    owners = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    model.requires_grad_(requires_grad=False)
    chosen = owners[-layers:] if layers else owners
    for parameter in itertools.chain.from_iterable(m.parameters(recurse=False) for m in chosen):
        parameter.requires_grad = True
    return model


def frozen_norms_step(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy with the norms of frozen layers in eval mode.

    Otherwise their running statistics would drift under layers that stay, and with them the features that
    the poisons collide in.
    """
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        if hasattr(module, "running_mean") and parameters and not any(p.requires_grad for p in parameters):
            module.eval()
    return cross_entropy_step(model, batch)


def describe_targets(
    held: Tensor, labels: Tensor, before: Tensor, after: Tensor, target_class: int
) -> dict[str, Any]:
    """Return JSON values on the chosen instances of a triggerless attack.

    Args:
        held: Their places in the training set, int64 ``(M,)``.
        labels: Their true classes.
        before: What the clean network says.
        after: What the poisoned network says.
        target_class: What it should say.
    """
    return {
        "indices": held.tolist(),
        "labels": labels.tolist(),
        "predictions_clean": before.tolist(),
        "predictions_poisoned": after.tolist(),
        "success_rate": float((after == target_class).float().mean()),
        "success_rate_clean": float((before == target_class).float().mean()),
    }
