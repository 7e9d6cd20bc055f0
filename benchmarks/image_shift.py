"""How far do statistics inside a network move when the images are not like those of its training?

    python benchmarks/image_shift.py --data DIR_WITH_TEST_PARQUET --zoo zoo

What `detect.plausibility.statistics_shift` says of each model of a zoo, on test images as they are and
changed; its warning's border, MOST_SHIFTED, should lie between them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.bench import zoo
from unbackdoor.compute import predictions_of
from unbackdoor.data import draw_balanced, load_images
from unbackdoor.detect.plausibility import ENOUGH_FOR_SHIFT, MOST_PROBED, MOST_SHIFTED, statistics_shift

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda images: images,
    f"{ENOUGH_FOR_SHIFT} of them": lambda images: images[:ENOUGH_FOR_SHIFT],
    "grey": lambda images: images.mean(1, keepdim=True).expand_as(images),
    "half as bright": lambda images: 0.5 * images,
    "blurred": lambda images: F.avg_pool2d(images, 3, 1, 1),
    "enlarged by half": lambda images: F.interpolate(images, scale_factor=1.5),
    "noise": torch.rand_like,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--zoo", type=Path, default=Path("zoo"))
    options = parser.parse_args()
    data = draw_balanced(load_images(options.data, split="test"), MOST_PROBED, rng.generator(0))
    models = {entry.name: zoo.load_network(entry) for entry in zoo.entries(options.zoo)}
    for name, change in CHANGES.items():
        images = change(data.floats()).contiguous()
        found = {model: statistics_shift(network, images) for model, network in models.items()}
        right = [
            float((predictions_of(network, images) == data.labels[: len(images)]).float().mean())
            for network in models.values()
        ]
        values = torch.tensor(list(found.values()))
        furthest = max(found, key=lambda model: found[model])
        print(
            f"{name}: {values.min():.3f} to {values.max():.3f} ({furthest}), warned of "
            f"{int((values > MOST_SHIFTED).sum())} of {len(values)}; accuracy {min(right):.2f} to "
            f"{max(right):.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
