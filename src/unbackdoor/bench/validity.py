"""Whether an infected model is one: an attack that did not take must not enter a table as a success."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from torch import nn

from unbackdoor.evaluate import BackdoorMetrics, clean_accuracy, decoy_accuracy, evaluate, natural_floor
from unbackdoor.rates import Rate
from unbackdoor.stealth import Stealth, measure_stealth
from unbackdoor.triggers.learned_noise import LearnedNoiseTrigger
from unbackdoor.types import AllToAll, Attack, Infected, LabelledImages

STRENGTHS = (
    "alpha", "alpha_train", "alpha_test", "delta_train", "strength", "eps", "watermark", "warmth",
    "test_opacity", "poison_fraction", "class_fraction",
)  # fmt: skip
"""Options that make a backdoor easier to learn when raised, where an attack has them; covers do not."""


@dataclass(frozen=True)
class Requirements:
    """What makes an infected model valid.

    Args:
        attack_success: Least ASR, in [0, 1].
        all_to_all_share: Least ASR of an all-to-all attack as a share of the clean accuracy, which bounds it.
        accuracy_loss: Largest loss of clean accuracy against the clean twin.
        decoy_share: Least accuracy on decoys as a share of the clean accuracy; below it any trigger of the
            kind sets the backdoor off, not the attacker's.
        targeted_success: Least share of the chosen images that an attack without a trigger misleads; far
            below ``attack_success``, as published ones do not come near that.
    """

    attack_success: float = 0.9
    all_to_all_share: float = 0.85
    accuracy_loss: float = 0.03
    decoy_share: float = 0.8
    targeted_success: float = 0.5


@dataclass(frozen=True)
class Validity:
    """What an infected model was measured to do.

    Args:
        metrics: CA, ASR and RA.
        twin_accuracy: Clean accuracy of the clean twin, or None without one.
        floor: ASR on the clean twin, or None.
        decoys: Accuracy on each decoy.
        float_success: For learned noise, ASR on images that are not rounded to 8 bits, which can erase it;
            else None.
        stealth: How visible the trigger is.
        problems: Why the model is not valid, with what to do; empty for a valid one.
    """

    metrics: BackdoorMetrics
    twin_accuracy: Rate | None
    floor: Rate | None
    decoys: Mapping[str, Rate]
    stealth: Stealth
    float_success: Rate | None = None
    problems: tuple[str, ...] = field(default=())

    @property
    def is_valid(self) -> bool:
        """Whether no requirement is broken."""
        return not self.problems

    @property
    def unchecked(self) -> tuple[str, ...]:
        """What was not measured, and might have been a problem."""
        if self.twin_accuracy is not None:
            return ()
        return ("the loss of clean accuracy against a clean twin", "the attack success on a clean twin")

    def describe(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "valid": self.is_valid,
            "problems": list(self.problems),
            "unchecked": list(self.unchecked),
            "clean_twin_accuracy": self.twin_accuracy.describe() if self.twin_accuracy else None,
            "natural_floor": self.floor.describe() if self.floor else None,
            "attack_success_float": self.float_success.describe() if self.float_success else None,
            "decoy_accuracy": {name: rate.describe() for name, rate in self.decoys.items()},
            "stealth": self.stealth.describe(),
        }


def check_infected(
    infected: Infected,
    test: LabelledImages,
    *,
    attack: Attack,
    twin: nn.Module | None = None,
    requirements: Requirements | None = None,
) -> Validity:
    """Measure an infected model and say whether it is valid.

    Args:
        infected: What the attack returned.
        test: Images that nobody trained on.
        attack: The attack; its options are named in the advice.
        twin: A clean model of the same architecture and recipe; without one neither the natural floor
            nor the loss of accuracy is known, and ``Validity.unchecked`` says so.
        requirements: Bounds; the defaults are those of the benchmark.
    """
    metrics = evaluate(infected.model, test, infected.trigger, infected.label_rule)
    decoys = {name: decoy_accuracy(infected.model, test, decoy) for name, decoy in infected.decoys.items()}
    twin_accuracy = clean_accuracy(twin, test) if twin is not None else None
    float_success = _float_success(infected, test)
    problems = _problems(
        metrics,
        decoys,
        twin_accuracy,
        float_success=float_success,
        num_classes=test.num_classes,
        all_to_all=isinstance(infected.label_rule, AllToAll),
        targeted=infected.record["targeted"]["success_rate"] if "targeted" in infected.record else None,
        attack=attack,
        bounds=requirements or Requirements(),
    )
    return Validity(
        metrics=metrics,
        twin_accuracy=twin_accuracy,
        floor=natural_floor(twin, test, infected.trigger, infected.label_rule) if twin is not None else None,
        decoys=decoys,
        stealth=measure_stealth(test, infected.trigger),
        float_success=float_success,
        problems=tuple(problems),
    )


def _float_success(infected: Infected, test: LabelledImages) -> Rate | None:
    if not isinstance(infected.trigger, LearnedNoiseTrigger):
        return None
    unrounded = evaluate(infected.model, test, infected.trigger, infected.label_rule, eight_bit=False)
    return unrounded.attack_success


def _problems(
    metrics: BackdoorMetrics,
    decoys: Mapping[str, Rate],
    twin_accuracy: Rate | None,
    *,
    float_success: Rate | None,
    num_classes: int,
    all_to_all: bool,
    targeted: float | None,
    attack: Attack,
    bounds: Requirements,
) -> list[str]:
    accuracy, success = metrics.clean_accuracy.value, metrics.attack_success.value
    least = bounds.all_to_all_share * accuracy if all_to_all else bounds.attack_success
    problems = []
    # A network that always answers the target has an ASR of 100 % and no backdoor.
    if not metrics.clean_accuracy.interval[0] > 1 / num_classes:
        problems.append(
            f"the clean accuracy is {accuracy:.1%}, no better than guessing among {num_classes} classes, so "
            "the attack success means nothing; train for more epochs or on more images."
        )
    # An attack on chosen images is judged by its success on them, which its record has, and not on all.
    # NaN, from a test set without a countable image, fails the comparison and is a problem too.
    if targeted is None and not success >= least:
        unrounded = f" ({float_success.value:.1%} without rounding to 8 bits)" if float_success else ""
        problems.append(
            f"the attack success rate is {success:.1%}{unrounded}, below {least:.1%}; {_advice(attack)}."
        )
    if targeted is not None and not targeted >= bounds.targeted_success:
        problems.append(
            f"the success rate on the chosen images is {targeted:.1%}, below {bounds.targeted_success:.1%}; "
            f"{_advice(attack)}."
        )
    if twin_accuracy is not None and not twin_accuracy.value - accuracy <= bounds.accuracy_loss:
        problems.append(
            f"the clean accuracy is {accuracy:.1%}, more than {bounds.accuracy_loss:.1%} below the clean "
            f"twin's {twin_accuracy.value:.1%}; lower the rate or the strength, or train for more epochs."
        )
    problems += [
        f"the accuracy under the {name} decoy is {rate.value:.1%}, below {bounds.decoy_share:.0%} of the "
        "clean accuracy, so other triggers work too; raise the share of decoys or train for more epochs."
        for name, rate in decoys.items()
        if not rate.value >= bounds.decoy_share * accuracy
    ]
    return problems


def _advice(attack: Attack) -> str:
    known: set[str] = {option.name for option in fields(attack)} if is_dataclass(attack) else set()
    values = {name: getattr(attack, name) for name in STRENGTHS if name in known}
    if values.get("poison_fraction") == 0:  # counted within the class instead
        del values["poison_fraction"]
    full = {
        name
        for name, value in values.items()
        if value >= 1 and name not in ("delta_train", "strength", "eps")
    }
    levers = [f"{name} (now {value:g})" for name, value in values.items() if name not in full]
    recipe = getattr(attack, "recipe", None)
    levers += [f"the epochs (now {recipe.epochs})"] if recipe else []
    return f"raise {' or '.join(levers)}" if levers else "train for more epochs"
