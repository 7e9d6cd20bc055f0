"""A planted model, its clean twin and their images as files; and the command line called in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unbackdoor import rng
from unbackdoor.detect.calibration import CalibrationSet, Kind, ScoredModel, options_of, write_calibration
from unbackdoor.detect.scan import Scan
from unbackdoor.models.checkpoint import write_tensors
from unbackdoor.settings import configure
from unbackdoor.testing import planted_backdoor
from unbackdoor.types import LabelledImages

ARCH = "unbackdoor.testing:planted_network"

SEARCH = (
    "--set", "search.first.steps=50", "--set", "search.first.batch_size=8", "--set", "search.refined=1",
    "--set", "search.second.steps=50", "--set", "search.second.batch_size=8",
    "--set", "warps.inversion.steps=20",
)  # fmt: skip
"""A short trigger search, for which the calibrations of ``files`` are made."""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.out)
        return loaded


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    from unbackdoor.cli.app import main

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["unbackdoor", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as leave:
            code = int(leave.code or 0)
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call


@dataclass(frozen=True)
class Files:
    """Where everything is."""

    infected: Path
    twin: Path
    wants_half: Path
    clean: Path
    few: Path
    folder: Path
    strict: Path
    lax: Path


def save_npz(path: Path, data: LabelledImages) -> Path:
    np.savez(path, images=data.images.permute(0, 2, 3, 1).numpy(), labels=data.labels.numpy())
    return path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("cli")
    planted, twin = planted_backdoor(target_class=3), planted_backdoor(infected=False)
    data = planted.clean_data(240, rng.generator(1))
    write_tensors(planted.model.state_dict(), root / "infected.safetensors")
    write_tensors(twin.model.state_dict(), root / "twin.safetensors")
    write_tensors(expecting_half(planted.model.state_dict()), root / "half.safetensors")
    for position in range(40):
        label = int(data.labels[position])
        place = root / "folder" / f"colour{label}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = data.images[position].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(place / f"{position}.png")
    return Files(
        infected=root / "infected.safetensors",
        twin=root / "twin.safetensors",
        wants_half=root / "half.safetensors",
        clean=save_npz(root / "clean.npz", data),
        few=save_npz(root / "few.npz", data.subset(torch.arange(16))),
        folder=root / "folder",
        strict=calibration(root / "strict.json", [0.01 * i for i in range(19)]),
        lax=calibration(root / "lax.json", [9.0] * 39),
    )


def expecting_half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fold ``x = 0.5 n + 0.5`` into the first layer: the network then wants images in [-1, 1]."""
    changed = dict(tensors)
    weight = tensors["conv1.weight"]
    changed["conv1.weight"] = 0.5 * weight
    changed["norm1.running_mean"] = tensors["norm1.running_mean"] - 0.5 * weight.flatten(1).sum(1)
    return changed


def calibration(path: Path, scores: list[float]) -> Path:
    """Write clean models of the planted kind with these scores of every detector of a scan."""
    clean = planted_backdoor(infected=False).clean_data(240, rng.generator(1))
    detectors = configure(Scan(), SEARCH[1::2]).detectors()
    found = CalibrationSet(
        description="made for this test",
        kind=Kind.of(planted_backdoor().model, clean, 8),
        images=len(clean),
        options={name: options_of(detector) for name, detector in detectors.items()},
        models=tuple(
            ScoredModel(name=str(i), scores=dict.fromkeys(detectors, score)) for i, score in enumerate(scores)
        ),
    )
    write_calibration(found, path)
    return path
