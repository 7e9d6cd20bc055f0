"""SIG: faint stripes on images of the target class, whose labels stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from unbackdoor import rng
from unbackdoor.attacks.poisoning import label_rule_for, plan_clean_label
from unbackdoor.attacks.training import TriggerStage, armed, train_infected
from unbackdoor.errors import InvalidInputError
from unbackdoor.train import Recipe
from unbackdoor.triggers.sine import SQUARE_PERIODS, SineForm, SineTrigger
from unbackdoor.types import (
    Infected,
    LabelledImages,
    ModelFn,
    Progress,
    silent,
)


@dataclass(frozen=True)
class SIG:
    """Lay stripes over some images of the target class and leave all labels alone.

    Source: Barni, Kallas and Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption without Label
    Poisoning", ICIP 2019, arXiv 1902.11237, equation 2: a signal ``Delta sin(2 pi f j / W)`` is added.

    The literature knows a second reading: the mask that RNP, NAD and ABL load for CIFAR-10 is a sine
    whose negative half wrapped around in 8 bits, blended in with weight 0.2. That is a far stronger trigger
    and darkens the image. The paper's formula is the default; ``form="square_wave"`` is the other.

    Deviations: the share of the target class is 0.8, as MNP's line of code has it at most; if every image
    of the class is striped, the network no longer knows the class without stripes. The paper reports no
    CIFAR-10; amplitude and frequency are those of BackdoorBench.

    Args:
        class_fraction: Rate within the target class, in (0, 1]; used if ``poison_fraction`` is 0.
        poison_fraction: Overall poison rate, or 0 to use ``class_fraction``.
        target_class: The class whose images are striped, and which stripes lead to.
        form: ``additive`` (the paper) or ``square_wave`` (RNP).
        delta_train: Amplitude in grey levels of the striped training images, in (0, 255]; additive form.
        delta_test: The same for the test trigger; the paper allows a larger one.
        periods: Periods of the sine per image width; additive form.
        weight_train: Weight of the wave in training, in (0, 1]; square-wave form.
        weight_test: The same for the test trigger.
        trigger_stage: Stamp stored images, or batches after augmentation.
        recipe: Training schedule.
    """

    name: ClassVar[str] = "sig"
    title: ClassVar[str] = "Sinusoidal signal"
    source: ClassVar[str] = "Barni, Kallas, Tondi 2019, arXiv 1902.11237"
    needs: ClassVar[str] = "poisoned training data with true labels"

    class_fraction: float = 0.8
    poison_fraction: float = 0.0
    target_class: int = 0
    form: SineForm = "additive"
    delta_train: float = 40.0
    delta_test: float = 40.0
    periods: float = 6.0
    weight_train: float = 0.2
    weight_test: float = 0.2
    trigger_stage: TriggerStage = "before_augmentation"
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        self.triggers()

    @staticmethod
    def paper() -> SIG:
        """Return the settings of BackdoorBench, which stripes the whole class; the paper has no CIFAR-10."""
        return SIG(class_fraction=1.0)

    def triggers(self) -> tuple[SineTrigger, SineTrigger]:
        """Return the training trigger and the test trigger.

        Raises:
            InvalidInputError: If amplitudes, weights or periods are out of range.
        """
        if self.form != "additive":
            weights = (self.weight_train, self.weight_test)
            return SineTrigger(self.form, weights[0], SQUARE_PERIODS), SineTrigger(
                self.form, weights[1], SQUARE_PERIODS
            )
        if not (0 < self.delta_train <= 255 and 0 < self.delta_test <= 255):
            raise InvalidInputError(
                "delta_train and delta_test are grey levels in (0, 255], got "
                f"{self.delta_train} and {self.delta_test}; the usual value is 40."
            )
        return SineTrigger(self.form, self.delta_train / 255, self.periods), SineTrigger(
            self.form, self.delta_test / 255, self.periods
        )

    def run(
        self,
        train: LabelledImages,
        model_fn: ModelFn,
        *,
        generator: torch.Generator,
        resume_from: Path | None = None,
        progress: Progress = silent,
    ) -> Infected:
        """Stripe images of the target class and train ``model_fn()`` on the result.

        Raises:
            InvalidInputError: If the target is no class of ``train``, or the rate does not fit.
        """
        label_rule = label_rule_for("all_to_one", self.target_class, train.num_classes)
        plan = plan_clean_label(
            train.labels,
            self.target_class,
            rng.spawn(generator),
            class_fraction=self.class_fraction,
            poison_fraction=self.poison_fraction,
        )
        train_trigger, test_trigger = self.triggers()
        poisoned, loss_step = armed(train, plan, train_trigger, self.trigger_stage)
        return train_infected(
            poisoned,
            model_fn,
            plan=plan,
            trigger=test_trigger,
            label_rule=label_rule,
            recipe=self.recipe,
            generator=generator,
            loss_step=loss_step,
            resume_from=resume_from,
            progress=progress,
        )
