"""Clean models for a calibration where the user has none: short trainings on the user's clean images."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.bench.artefact import read_card, save_clean
from unbackdoor.cli.calibrating import CleanModel
from unbackdoor.data.splits import balanced_order
from unbackdoor.errors import InvalidInputError
from unbackdoor.models import NormalisedModel
from unbackdoor.models.checkpoint import read_tensors
from unbackdoor.models.factory import resolve_architecture
from unbackdoor.train import Recipe, train
from unbackdoor.types import LabelledImages, Progress

ENOUGH_TO_HOLD_OUT = 5
"""Surrogates leave the images of the scan out of their training if there are this many times as many."""


@dataclass(frozen=True, eq=False)
class Surrogates:
    """Clean models to train on the user's clean images, varied in what a stranger may have done.

    Args:
        folder: Where they are kept; a started training goes on.
        data: What they are trained on.
        test: Where their accuracy is measured.
        arch: Architecture, as ``--arch`` names it.
        width: Channels of the first stage, or None for the architecture's own.
        stem: First layer of a ResNet, ``3x3`` or ``7x7``.
        num_classes: Outputs.
        epochs: Of each.
        seed: The first one's; each has its own.
        device: Where they are trained.
    """

    folder: Path
    data: LabelledImages
    test: LabelledImages
    arch: str
    width: int | None
    stem: str
    num_classes: int
    epochs: int
    seed: int
    device: torch.device

    def models(self, count: int) -> list[CleanModel]:
        """Return ``count`` models, which are trained when they are loaded."""
        return [CleanModel(f"surrogate-{index:02d}", partial(self._load, index)) for index in range(count)]

    def recipe(self, index: int) -> Recipe:
        """Return how one of them is trained: weight decay, crops, flips and learning rate take turns."""
        return Recipe(
            epochs=self.epochs,
            batch_size=max(2, min(64, len(self.data) // 8)),
            schedule="one_cycle",
            weight_decay=(5e-4, 1e-4, 1e-3, 0.0)[index % 4],
            crop_padding=(self.data.images.shape[-1] // 8, 0)[index // 4 % 2],
            flip=index % 3 != 2,
            learning_rate=(0.1, 0.03)[index % 5 // 4],
        )

    def _load(self, index: int, progress: Progress) -> tuple[nn.Module, str]:
        folder = self.folder / f"surrogate-{index:02d}"
        network = self._network(index)
        if (folder / "card.json").exists():
            digest = self._checked(folder, index)
            network.load_state_dict(read_tensors(folder / "model.safetensors"))
            return network.eval(), digest
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInputError(
                f"cannot make {folder}: {error.strerror}; choose another --out."
            ) from error
        state = folder / "training.safetensors"
        record = train(
            network,
            self.data,
            self.recipe(index),
            generator=rng.generator(self.seed + index),
            resume_from=state,
            progress=lambda stage, done, total: progress("training", done, total),
        )
        card = save_clean(
            folder,
            network,
            self.test,
            seed=self.seed + index,
            record={"training": record.describe(), "job": self._job(index)},
        )
        for leftover in folder.glob("training*"):
            leftover.unlink()
        return network.eval(), str(card["sha256"])

    def _network(self, index: int) -> nn.Module:
        architecture = resolve_architecture(self.arch)
        options: dict[str, Any] = {"num_classes": self.num_classes}
        if not architecture.is_user_code:
            options["in_channels"] = self.data.images.shape[1]
            options |= {} if self.width is None else {"width": self.width}
            options |= {} if self.stem == "3x3" else {"stem": self.stem}
        with rng.isolated(rng.generator(self.seed + index)):
            network = architecture.build(**options)
        mean, std = channel_statistics(self.data)
        return NormalisedModel(network, mean, std).to(self.device)

    def _job(self, index: int) -> dict[str, Any]:
        """Return what decides the weights, as JSON values."""
        described = {
            "arch": self.arch,
            "width": self.width,
            "stem": self.stem,
            "num_classes": self.num_classes,
            "images": len(self.data),
            "data_sha256": hashlib.sha256(self.data.images.cpu().numpy().tobytes()).hexdigest(),
            "seed": self.seed + index,
            "recipe": asdict(self.recipe(index)),
        }
        found: dict[str, Any] = json.loads(json.dumps(described))
        return found

    def _checked(self, folder: Path, index: int) -> str:
        """Return the hash of a finished surrogate's weights."""
        card = read_card(folder)
        if card.get("job") != self._job(index):
            raise InvalidInputError(
                f"{folder} holds a surrogate that was trained with other options; delete {self.folder}, or "
                "choose another --out."
            )
        return str(card["sha256"])


def surrogate_images(
    everything: LabelledImages, count: int, seed: int
) -> tuple[LabelledImages, LabelledImages, bool]:
    """Return images to train surrogates on, others to scan with, and whether they are apart.

    Args:
        everything: The user's clean images.
        count: How many a scan takes.
        seed: The choice follows it.
    """
    # A scan with this seed draws the same images.
    order = balanced_order(everything.labels, rng.spawn(rng.generator(seed)))
    scanned = everything.subset(order[:count])
    if len(everything) < ENOUGH_TO_HOLD_OUT * count:
        return everything, scanned, False
    return everything.subset(order[count:]), scanned, True


def channel_statistics(data: LabelledImages) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, of images in [0, 1]."""
    images = data.floats()
    mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3)).clamp_min(1e-3)
    return mean.tolist(), std.tolist()
