"""Keep trained models in folders: weights, trigger, plan, pictures, and a card whose claims can be checked.

A folder holds ``model.safetensors``, ``card.json`` and, for infected models, ``trigger.safetensors``,
``plan.safetensors`` (which samples were poisoned), ``decoy-NAME.safetensors`` where the attack has decoys,
and ``triggers.png`` (clean, triggered, difference) where Pillow is installed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor.bench.cards import check_card
from unbackdoor.bench.validity import check_infected
from unbackdoor.errors import InvalidInputError, MissingDependencyError
from unbackdoor.evaluate import clean_accuracy
from unbackdoor.extras import require
from unbackdoor.models.checkpoint import read_tensors, write_tensors
from unbackdoor.stealth import contact_sheet
from unbackdoor.train import Recipe
from unbackdoor.triggers.files import load_trigger, save_trigger
from unbackdoor.types import Attack, Infected, LabelledImages, LabelRule, PoisonPlan, Trigger, label_rule_from

CARD_VERSION = 3
SHEET_COLUMNS = 8
"""Images in ``triggers.png``."""


def save_infected(
    out: Path,
    infected: Infected,
    test: LabelledImages,
    *,
    attack: Attack,
    seed: int,
    twin: nn.Module | None = None,
    half: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write everything about an infected model into ``out``, measured and judged.

    Args:
        out: An existing folder.
        infected: What the attack returned.
        test: Images on which the model is measured.
        attack: The attack, a dataclass; its options go into the card, and where they differ from those of
            its paper (``type(attack).paper()``), or the recipe from the MNP paper's, the card says so.
        seed: The seed of the generator that the attack was given.
        twin: A clean model of the same architecture and recipe, for the natural floor.
        half: Store weights in float16; what is measured are the rounded weights.
        extra: More JSON values for the card, such as the architecture and the command.

    Returns:
        The card; its ``validity`` says whether the attack took.
    """
    model = _rounded(infected.model) if half else infected.model
    stored = replace(infected, model=model)
    save_trigger(infected.trigger, out / "trigger.safetensors")
    for name, decoy in infected.decoys.items():
        save_trigger(decoy, out / f"decoy-{name}.safetensors")
    plan = infected.plan
    write_tensors(
        {"indices": plan.indices.int(), "new_labels": plan.new_labels.int()}, out / "plan.safetensors"
    )
    _draw(infected.trigger, infected.label_rule, test, out / "triggers.png")
    validity = check_infected(stored, test, attack=attack, twin=twin)
    options = asdict(attack)  # type: ignore[call-overload]
    return _save(
        out,
        model,
        {
            "attack": attack.name,
            "options": options,
            "differs_from_paper": differences(options, paper_options(attack)),
            "differs_from_mnp_recipe": differences(options.get("recipe", {}), asdict(Recipe())),
            "label_rule": infected.label_rule.describe(),
            "metrics": validity.metrics.describe(),
            "validity": validity.describe(),
            "poisoned": len(plan.indices),
            "seed": seed,
            **infected.record,
            **(extra or {}),
        },
        half=half,
    )


def save_clean(
    out: Path,
    model: nn.Module,
    test: LabelledImages,
    *,
    seed: int,
    record: Mapping[str, Any],
    half: bool = False,
) -> dict[str, Any]:
    """Write ``model.safetensors`` and ``card.json`` of a model without a backdoor; return the card."""
    model = _rounded(model) if half else model
    metrics = {"clean_accuracy": clean_accuracy(model, test).describe()}
    card = {"attack": None, "metrics": metrics, "num_classes": test.num_classes, "seed": seed, **record}
    return _save(out, model, card, half=half)


def paper_options(attack: Attack) -> dict[str, Any] | None:
    """Return the options of the attack's paper, or None where it does not state them."""
    paper = getattr(type(attack), "paper", None)
    return asdict(paper()) if paper is not None else None


def differences(options: Mapping[str, Any], paper: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the options that differ from the paper's, as ``{name: {"here": ..., "paper": ...}}``.

    Nested options get dotted names. The target class is the experimenter's choice and left out, as is the
    recipe: no attack's paper is asked for that, and it is compared with the MNP paper's on its own.
    """
    here, there = _flat(options), _flat(paper or options)
    return {
        name: {"here": value, "paper": there.get(name)}
        for name, value in here.items()
        if value != there.get(name)
        and name not in ("target_class", "precision")
        and not name.startswith("recipe.")
    }


def _flat(options: Mapping[str, Any], front: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value, f"{front}{name}.") if isinstance(value, Mapping) else {f"{front}{name}": value}
    return flat


def _rounded(model: nn.Module) -> nn.Module:
    """Return a copy whose weights survive float16 unchanged."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())
    return model


def _save(out: Path, model: nn.Module, card: dict[str, Any], *, half: bool) -> dict[str, Any]:
    weights = out / "model.safetensors"
    write_tensors({name: _stored(tensor, half=half) for name, tensor in model.state_dict().items()}, weights)
    files = sorted(path for path in out.glob("*.safetensors") if not path.stem.startswith("training"))
    card = {
        "card_version": CARD_VERSION,
        **finite(card),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sha256": sha256_of(weights),
        "files": {path.name: sha256_of(path) for path in files},
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    temporary = out / "card.json.tmp"
    temporary.write_text(json.dumps(card, indent=1, allow_nan=False) + "\n")
    temporary.replace(out / "card.json")
    return card


def finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Return a JSON value in which NaN and infinities, which JSON does not know, are None."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _stored(tensor: Tensor, *, half: bool) -> Tensor:
    return tensor.half() if half and tensor.is_floating_point() else tensor


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _draw(trigger: Trigger, label_rule: LabelRule, test: LabelledImages, path: Path) -> None:
    """Write the contact sheet of images that count towards ASR, if Pillow is there."""
    try:
        pil = require("PIL.Image", extra="data")
    except MissingDependencyError:
        return
    counted = label_rule.counts(test.labels).nonzero().flatten()[:SHEET_COLUMNS]
    if len(counted) and test.images.shape[1] in (1, 3):
        enlarge = max(1, 64 // test.images.shape[2])
        pil.fromarray(contact_sheet(test.images[counted], trigger, enlarge=enlarge).numpy()).save(path)


def load_plan(folder: Path) -> PoisonPlan:
    """Read which samples were poisoned.

    Raises:
        InvalidInputError: If the folder has no such file, or it is incomplete.
    """
    path = folder / "plan.safetensors"
    if not path.exists():
        raise InvalidInputError(f"{path} does not exist; give the folder of an infected model.")
    tensors = read_tensors(path)
    if set(tensors) != {"indices", "new_labels"}:
        raise InvalidInputError(f"{path} holds {sorted(tensors)} instead of a poison plan.")
    return PoisonPlan(tensors["indices"].long(), tensors["new_labels"].long())


def load_decoys(folder: Path) -> dict[str, Trigger]:
    """Read the decoys of an infected model, by name; empty if the attack has none."""
    paths = sorted(folder.glob("decoy-*.safetensors"))
    return {path.stem.removeprefix("decoy-"): load_trigger(path) for path in paths}


def read_card(folder: Path) -> dict[str, Any]:
    """Read ``card.json`` in ``folder``.

    Raises:
        InvalidInputError: If it is absent, no JSON object, or has values of other types than a card's.
    """
    path = folder / "card.json"
    try:
        card = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise InvalidInputError(
            f"{path} cannot be read as a model card ({problem}); give a folder that `unbackdoor attack` "
            "wrote."
        ) from error
    if not isinstance(card, dict):
        raise InvalidInputError(f"{path} holds no JSON object; it is not a model card.")
    check_card(card, path)
    return card


def judged_record(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a card keeps of an attack's record and its validity or a defence depends on."""
    return {key: card[key] for key in ("targeted", "edits_weights") if key in card}


def label_rule_of(card: Mapping[str, Any]) -> LabelRule:
    """Return the label rule in a card.

    Raises:
        InvalidInputError: If the card describes none.
    """
    rule = card.get("label_rule")
    if not isinstance(rule, dict):
        raise InvalidInputError("the card names no label rule; give the card.json of an infected model.")
    return label_rule_from(rule)
