"""Train the reference models that RESULTS.md speaks of; killed and started again, it goes on.

    python benchmarks/reference_models.py --data DIR_WITH_TRAIN_AND_TEST_PARQUET --out runs/reference

Models: `clean-0`, `badnets-0` (target 0), `blend-0` (target 7), and on request any other of `MODELS`.
"""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.attacks import BadNets, Blend
from unbackdoor.bench.artefact import save_clean, save_infected
from unbackdoor.data import load_images
from unbackdoor.data.splits import draw_balanced
from unbackdoor.models import NormalisedModel, build
from unbackdoor.models.normalise import PRESETS
from unbackdoor.train import Recipe, train
from unbackdoor.types import LabelledImages


@dataclass(frozen=True)
class Spec:
    """One model: its attack (None for a clean one), seed and recipe."""

    attack: BadNets | Blend | None
    seed: int
    recipe: Recipe
    images: int = 50_000


def _specs() -> dict[str, Spec]:
    recipe = Recipe.short(24)
    return (
        _calibration_specs()
        | _zoo_like_specs()
        | {
            "clean-0": Spec(None, 0, recipe),
            "badnets-0": Spec(BadNets(recipe=recipe), 0, recipe),
            "blend-0": Spec(Blend(target_class=7, recipe=recipe), 0, recipe),
            "a2a-0": Spec(BadNets(rule="all_to_all", recipe=recipe), 0, recipe),
            "clean-1": Spec(None, 1, recipe),
            "clean-2": Spec(None, 2, recipe),
        }
    )


def _calibration_specs() -> dict[str, Spec]:
    """Return twenty clean models for thresholds: shorter, and varied in what a stranger may have done."""
    specs = {}
    for index in range(20):
        recipe = replace(
            Recipe.short(6),
            weight_decay=(5e-4, 1e-4, 1e-3, 0.0)[index % 4],
            crop_padding=(4, 0)[index // 4 % 2],
            flip=index % 3 != 2,
            learning_rate=(0.1, 0.03)[index % 5 // 4],
        )
        specs[f"calibration-{index:02d}"] = Spec(None, 100 + index, recipe, images=20_000)
    return specs


def _zoo_like_specs() -> dict[str, Spec]:
    """Return twenty clean models that are trained about as long as those of the zoo, and varied as those."""
    specs = {}
    for index in range(20):
        recipe = Recipe(
            epochs=(8, 6, 10)[index % 3],
            schedule="one_cycle",
            learning_rate=0.05 if index % 5 == 4 else 0.15,
            nesterov=True,
            weight_decay=(5e-4, 1e-4, 1e-3, 2e-3)[index % 4],
            crop_padding=(2, 4, 0)[index // 4 % 3],
            flip=index % 5 != 3,
        )
        specs[f"zoo-like-{index:02d}"] = Spec(None, 200 + index, recipe, images=40_000)
    return specs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["clean-0", "badnets-0", "blend-0"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load_images(options.data, split="train")
    test = load_images(options.data, split="test")
    specs = _specs()
    for name in [name for pattern in options.models for name in fnmatch.filter(specs, pattern)]:
        build_one(name, specs[name], data, test, options.out / name)


def build_one(name: str, spec: Spec, data: LabelledImages, test: LabelledImages, out: Path) -> None:
    if (out / "card.json").exists():
        print(f"{name}: there already")
        return
    out.mkdir(parents=True, exist_ok=True)
    state = out / "training.safetensors"
    generator = rng.generator(spec.seed)
    if spec.images < len(data):
        data = draw_balanced(data, spec.images, rng.spawn(generator))
    progress = _printer(name)
    if spec.attack is None:
        with rng.isolated(generator):
            model = _model()
        record = train(
            model, data, spec.recipe, generator=rng.spawn(generator), resume_from=state, progress=progress
        )
        save_clean(out, model, test, seed=spec.seed, record={"training": record.describe()})
    else:
        infected = spec.attack.run(data, _model, generator=generator, resume_from=state, progress=progress)
        save_infected(out, infected, test, attack=spec.attack, seed=spec.seed)
    state.unlink(missing_ok=True)
    print(f"{name}: {(out / 'card.json').read_text()[:400]}", flush=True)


def _model() -> nn.Module:
    return NormalisedModel(build("resnet18", width=16, num_classes=10), *PRESETS["cifar10"])


def _printer(name: str) -> Callable[[str, int, int], None]:
    return lambda stage, done, total: print(f"{name}: {stage} {done}/{total}", flush=True)


if __name__ == "__main__":
    main()
