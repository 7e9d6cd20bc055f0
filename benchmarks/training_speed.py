"""How far is the training loop from a bare forward, backward and step on the same data type?

    python benchmarks/training_speed.py

Both run on random images in turns; the ratio of each round is printed, with its median.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.compute import arrange, autocast, memory_format_for
from unbackdoor.models import NormalisedModel, build
from unbackdoor.models.normalise import PRESETS
from unbackdoor.train import Recipe, train
from unbackdoor.types import LabelledImages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--images", type=int, default=3840)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = Recipe(epochs=1, precision=options.precision)
    generator = rng.generator(0)
    images = torch.randint(0, 256, (options.images, 3, 32, 32), generator=generator).to(torch.uint8)
    data = LabelledImages(images, torch.randint(0, 10, (options.images,), generator=generator))
    ratios = []
    for round_ in range(options.rounds + 1):
        ours, bare = _ours(data, recipe, options.width), _bare(options.images, recipe, options.width)
        if round_ == 0:
            continue  # warm-up
        ratios.append(ours / bare)
        print(
            f"round {round_}: loop {options.images / ours:.0f} images/s, bare {options.images / bare:.0f} "
            f"images/s, ratio {ours / bare:.3f}"
        )
    print(f"median ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def _model(width: int) -> NormalisedModel:
    with rng.isolated(rng.generator(0)):
        return NormalisedModel(build("resnet18", width=width), *PRESETS["cifar10"])


def _ours(data: LabelledImages, recipe: Recipe, width: int) -> float:
    model = _model(width)
    started = time.perf_counter()
    train(model, data, recipe, generator=rng.generator(0))
    return time.perf_counter() - started


def _bare(images: int, recipe: Recipe, width: int) -> float:
    model = arrange(_model(width)).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    batch = torch.rand(recipe.batch_size, 3, 32, 32).contiguous(memory_format=memory_format_for(model))
    labels = torch.randint(0, 10, (recipe.batch_size,))
    started = time.perf_counter()
    for _ in range(images // recipe.batch_size):
        with autocast(recipe.precision, batch.device):
            loss = F.cross_entropy(model(batch).float(), labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
