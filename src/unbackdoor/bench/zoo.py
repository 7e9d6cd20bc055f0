"""The zoo: a folder of trained models, infected and clean, whose cards can be checked again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unbackdoor.attacks.registry import ATTACKS
from unbackdoor.bench.artefact import (
    judged_record,
    label_rule_of,
    load_decoys,
    load_plan,
    read_card,
    sha256_of,
)
from unbackdoor.bench.validity import check_infected
from unbackdoor.compute import check_channels
from unbackdoor.errors import InvalidInputError, UnbackdoorError
from unbackdoor.evaluate import clean_accuracy
from unbackdoor.models import ARCHITECTURES
from unbackdoor.models.loading import load_model
from unbackdoor.triggers.files import load_trigger
from unbackdoor.types import Attack, Infected, LabelledImages

TOLERANCE = 0.002
"""How far a rate may be from its claim on other hardware: rounding moves single images over a border."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A model of the zoo."""

    name: str
    folder: Path
    card: Mapping[str, Any]

    @property
    def is_clean(self) -> bool:
        """Whether the model was trained without an attack."""
        return self.card.get("attack") is None

    def rate(self, metric: str) -> float | None:
        """Return a claimed rate: of ``metrics``, or one that ``validity`` has by itself."""
        value = self.card.get("metrics", {}).get(metric) or self.card.get("validity", {}).get(metric)
        return value["value"] if value else None


def entries(root: Path) -> list[Entry]:
    """Return the models in ``root``, by name.

    Raises:
        InvalidInputError: If there are none, or a card cannot be read.
    """
    folders = sorted(path.parent for path in root.glob("*/card.json")) if root.is_dir() else []
    if not folders:
        problem = "holds no models" if root.is_dir() else "does not exist"
        raise InvalidInputError(f"{root} {problem}; give the folder of a zoo with --zoo.")
    found = [Entry(folder.name, folder, read_card(folder)) for folder in folders]
    for entry in found:
        if "clean_accuracy" not in entry.card.get("metrics", {}):
            raise InvalidInputError(
                f"{entry.folder / 'card.json'} claims no clean_accuracy in its metrics; restore the file, or "
                "train the model again."
            )
    return found


def entry_at(folder: Path) -> Entry:
    """Return the model in ``folder``.

    Raises:
        InvalidInputError: If its card cannot be read.
    """
    return Entry(folder.name, folder, read_card(folder))


def entry_named(root: Path, name: str) -> Entry:
    """Return one model.

    Raises:
        InvalidInputError: If it does not exist.
    """
    known = entries(root)
    for entry in known:
        if entry.name == name:
            return entry
    raise InvalidInputError(f"{root} has no model {name!r}; it has {', '.join(e.name for e in known)}.")


def load_network(entry: Entry) -> nn.Module:
    """Build the network of ``entry`` with its weights, in eval mode; takes images in [0, 1].

    Raises:
        InvalidInputError: If the card names code instead of a built-in architecture: a card may come from
            a stranger, so what it names is never run; or if the weights are not those that it speaks of.
    """
    architecture = str(entry.card.get("job", {}).get("arch", "resnet18"))
    if architecture not in ARCHITECTURES:
        raise InvalidInputError(
            f"the card of {entry.name} names the architecture {architecture!r}, which is not one of this "
            f"package ({', '.join(ARCHITECTURES)}); code that a card names is never run, so measure that "
            "model with `unbackdoor evaluate --arch`."
        )
    loaded = load_model(entry.folder / "model.safetensors", architecture)
    said = entry.card.get("sha256")
    if said and loaded.checkpoint.sha256 != said:
        raise InvalidInputError(
            f"{loaded.checkpoint.path} holds other weights than those its card speaks of; restore the "
            "file, or train that model again."
        )
    return loaded.model


def check_asked(entry: Entry, sha256: str) -> None:
    """Check that ``entry`` holds the weights that a question is about; a model may be replaced meanwhile.

    Args:
        entry: The model that answers.
        sha256: Of the weights that were asked about.

    Raises:
        InvalidInputError: If it holds others.
    """
    found = str(entry.card.get("sha256", ""))
    if found != sha256:
        raise InvalidInputError(
            f"{entry.folder} holds other weights ({found[:12]}) than those asked about ({sha256[:12]}); "
            "start the run again, so that it asks about what is there."
        )


def load_infected(entry: Entry) -> Infected:
    """Rebuild everything an attack left behind.

    Raises:
        InvalidInputError: If the model is a clean one, or a file is missing, incomplete or not the one that
            the card was written for.
    """
    for name, digest in dict(entry.card.get("files", {})).items():
        path = entry.folder / Path(name).name
        if name.endswith(".safetensors") and path.is_file() and sha256_of(path) != digest:
            raise InvalidInputError(
                f"{path} is not the file that the card of {entry.name} was written for; restore it, or train "
                "that model again."
            )
    return Infected(
        load_network(entry),
        load_trigger(entry.folder / "trigger.safetensors"),
        load_plan(entry.folder),
        label_rule_of(entry.card),
        judged_record(entry.card),
        decoys=load_decoys(entry.folder),
    )


def measure(entry: Entry, test: LabelledImages, *, twin: nn.Module | None = None) -> dict[str, Any]:
    """Measure a model again.

    Returns:
        The fields ``metrics`` and, for infected models, ``validity`` of its card.

    Raises:
        InvalidInputError: If the images are not of the kind that the model was trained on.
    """
    if entry.is_clean:
        network = load_network(entry)
        check_channels(network, test)
        return {"metrics": {"clean_accuracy": clean_accuracy(network, test).describe()}}
    infected = load_infected(entry)
    check_channels(infected.model, test)
    validity = check_infected(infected, test, attack=_attack(entry), twin=twin)
    return {"metrics": validity.metrics.describe(), "validity": validity.describe()}


def _attack(entry: Entry) -> Attack:
    name = str(entry.card["attack"])
    if name not in ATTACKS:
        raise InvalidInputError(f"{entry.name} claims the attack {name!r}, which does not exist here.")
    attack: Attack = ATTACKS[name]()
    return attack


def broken_files(entry: Entry) -> list[str]:
    """Return a sentence for each file that is missing or not the one that the card was written for."""
    needed = {"model.safetensors"} | (
        set() if entry.is_clean else {"trigger.safetensors", "plan.safetensors"}
    )
    listed = entry.card.get("files", {})
    wrong = [f"the card has no SHA-256 of {name}" for name in sorted(needed - set(listed))]
    if entry.is_clean and (entry.folder / "trigger.safetensors").exists():
        wrong.append("there is a trigger, but the card names no attack")
    shown = listed.get("model.safetensors")
    if shown and entry.card.get("sha256", shown) != shown:
        wrong.append("sha256 is not that of model.safetensors in files")
    for name, digest in dict(entry.card.get("files", {})).items():
        path = entry.folder / name
        if name in ("", "..") or Path(name).name != name:
            wrong.append(f"{name!r} is no name of a file in the folder")
        elif not path.is_file():
            wrong.append(f"{name} is missing")
        elif sha256_of(path) != digest:
            wrong.append(f"{name} is not the file that the card was written for")
    return wrong


def broken_claims(entry: Entry, measured: Mapping[str, Any], *, tolerance: float = TOLERANCE) -> list[str]:
    """Return a sentence for each rate that differs from what the card claims."""
    claimed, found = _rates(entry.card), _rates(measured)
    return [
        f"{name} is {found[name]:.4f}, the card claims {value:.4f}"
        for name, value in claimed.items()
        if name in found and not abs(found[name] - value) <= tolerance
    ]


def _rates(card: Mapping[str, Any]) -> dict[str, float]:
    rates = dict(card.get("metrics", {}))
    validity = card.get("validity", {})
    rates |= {f"accuracy under {name}": rate for name, rate in validity.get("decoy_accuracy", {}).items()}
    measured_once = ("natural_floor", "attack_success_float")
    rates |= {name: validity[name] for name in measured_once if validity.get(name)}
    return {name: float(rate["value"]) for name, rate in rates.items() if rate["value"] is not None}


def update_card(entry: Entry, measured: Mapping[str, Any]) -> None:
    """Write new measurements into the card, atomically."""
    temporary = entry.folder / "card.json.tmp"
    temporary.write_text(json.dumps({**entry.card, **measured}, indent=1) + "\n")
    temporary.replace(entry.folder / "card.json")


def twin_of(entry: Entry, root: Path, default: str = "clean") -> nn.Module | None:
    """Return the clean twin of an infected model: the one that its card names, else ``default``."""
    folder = twin_folder(entry, root, default)
    return None if folder is None else load_network(entry_named(root, folder.name))


def twin_folder(entry: Entry, root: Path, default: str = "clean") -> Path | None:
    """Return where ``twin_of`` finds the clean twin; None for a clean model, or if there is no twin."""
    folder = root / str(entry.card.get("twin", default))
    return folder if not entry.is_clean and (folder / "card.json").exists() else None


def verify(
    root: Path,
    names: list[str],
    test: LabelledImages,
    *,
    report: Callable[[str, list[str]], None],
) -> int:
    """Check files and claims of the models named, or of all; return how many are broken.

    Args:
        root: The zoo.
        names: Models to check; empty for all.
        test: The whole test set that the cards speak of.
        report: Called with each name and what is broken about it.
    """
    chosen = [entry_named(root, name) for name in names] if names else entries(root)
    broken = 0
    for entry in chosen:
        problems = broken_files(entry)
        if not problems:
            problems = _false_claims(entry, test, root)
        report(entry.name, problems)
        broken += bool(problems)
    return broken


def _false_claims(entry: Entry, test: LabelledImages, root: Path) -> list[str]:
    """Measure one model; what cannot be measured is a problem of its own and not of the others."""
    try:
        with torch.no_grad():
            return broken_claims(entry, measure(entry, test, twin=twin_of(entry, root)))
    except UnbackdoorError as error:
        return [str(error)]
