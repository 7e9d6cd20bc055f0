"""Keep trained models: weights, trigger and a card with all that is needed to rebuild and check them."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unbackdoor.errors import InvalidInputError
from unbackdoor.evaluate import clean_accuracy, evaluate
from unbackdoor.models.checkpoint import write_tensors
from unbackdoor.triggers.files import save_trigger
from unbackdoor.types import Attack, Infected, LabelledImages, LabelRule, label_rule_from

CARD_VERSION = 1


def save_infected(
    out: Path,
    infected: Infected,
    test: LabelledImages,
    *,
    attack: Attack,
    seed: int,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``model.safetensors``, ``trigger.safetensors`` and ``card.json`` into ``out``.

    Args:
        out: An existing folder.
        infected: What the attack returned.
        test: Images on which CA, ASR and RA are measured.
        attack: The attack, a dataclass; its options go into the card.
        seed: The seed of the generator that the attack was given.
        extra: More JSON values for the card, such as the architecture and the command.

    Returns:
        The card.
    """
    save_trigger(infected.trigger, out / "trigger.safetensors")
    return _save(
        out,
        infected.model,
        {
            "attack": attack.name,
            "options": asdict(attack),  # type: ignore[call-overload]
            "label_rule": infected.label_rule.describe(),
            "metrics": evaluate(infected.model, test, infected.trigger, infected.label_rule).describe(),
            "poisoned": len(infected.plan.indices),
            "poisoned_indices": infected.plan.indices.tolist(),
            "seed": seed,
            **infected.record,
            **(extra or {}),
        },
    )


def save_clean(
    out: Path, model: nn.Module, test: LabelledImages, *, seed: int, record: Mapping[str, Any]
) -> dict[str, Any]:
    """Write ``model.safetensors`` and ``card.json`` of a model without a backdoor; return the card."""
    metrics = {"clean_accuracy": clean_accuracy(model, test).describe()}
    return _save(out, model, {"attack": None, "metrics": metrics, "seed": seed, **record})


def _save(out: Path, model: nn.Module, card: dict[str, Any]) -> dict[str, Any]:
    weights = out / "model.safetensors"
    write_tensors(model.state_dict(), weights)
    card = {
        "card_version": CARD_VERSION,
        **card,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    temporary = out / "card.json.tmp"
    temporary.write_text(json.dumps(card, indent=1) + "\n")
    temporary.replace(out / "card.json")
    return card


def read_card(folder: Path) -> dict[str, Any]:
    """Read ``card.json`` in ``folder``.

    Raises:
        InvalidInputError: If it is absent or no JSON object.
    """
    path = folder / "card.json"
    try:
        card = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be read as a model card ({error}).") from error
    if not isinstance(card, dict):
        raise InvalidInputError(f"{path} holds no JSON object; it is not a model card.")
    return card


def label_rule_of(card: Mapping[str, Any]) -> LabelRule:
    """Return the label rule in a card.

    Raises:
        InvalidInputError: If the card describes none.
    """
    rule = card.get("label_rule")
    if not isinstance(rule, dict):
        raise InvalidInputError("the card names no label rule; give the card.json of an infected model.")
    return label_rule_from(rule)
