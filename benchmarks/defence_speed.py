r"""How far is each purifier from its own forward and backward passes, run bare?

    python benchmarks/defence_speed.py --data DIR_WITH_TRAIN_PARQUET --model zoo/badnets --threads 2
    python benchmarks/defence_speed.py --data DIR_WITH_TRAIN_PARQUET --width 64 \
        --methods clp:paper fp:paper,recipe=none rnp:paper mnp

A method may be followed by options; `paper` among them starts from its paper's settings, where each method
prunes by its own rule.

Prints, for each method, seconds, image passes by kind, what those passes cost when nothing else is done (same
network, precision and threads, batch 128, timed right before and after), and the ratio; then what they would
cost in fp32, and how many times as fast the method was. Passes in which parts of the network answered from
memory ("replayed") are counted, and priced, as the share of full ones that they computed. Without `--model`
the network is trained on the clean images for a few epochs: decisions differ, passes cost the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.bench.methods import configured
from unbackdoor.compute import arrange, autocast, has_fast_bf16, memory_format_for
from unbackdoor.costs import metered
from unbackdoor.data import draw_balanced, load_images
from unbackdoor.models import NormalisedModel, build
from unbackdoor.models.loading import load_model
from unbackdoor.models.normalise import PRESETS
from unbackdoor.purify.registry import PURIFIERS
from unbackdoor.train import Recipe, train
from unbackdoor.types import LabelledImages

BATCH = 128
KINDS = (
    "forward fp32", "forward bf16", "backward fp32 weights", "backward fp32 frozen",
    "backward bf16 weights", "backward bf16 frozen",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="folder of a zoo's model; its architecture is ResNet-18")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=list(PURIFIERS))
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clean = draw_balanced(load_images(options.data, split="train"), options.images, rng.generator(0))
    model = network(options, clean)
    columns = ("seconds", "passes bare, s", "ratio", "bare in fp32, s", "times as fast", "peak MiB", "passes")
    print(f"| method | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name in options.methods:
        before = prices(model, clean)
        method = configured("purify", *asked(name))
        with metered() as cost:
            method.purify(model, clean, generator=rng.generator(0))
        after = prices(model, clean)
        unit = {kind: (before[kind] + after[kind]) / 2 for kind in before}
        bare, single = passes_bare(cost.kinds, unit), passes_bare(in_fp32(cost.kinds), unit)
        passes = ", ".join(f"{count} {kind}" for kind, count in sorted(cost.kinds.items()))
        print(
            f"| {name} | {cost.seconds:.1f} | {bare:.1f} | {cost.seconds / bare if bare else 0:.2f} | "
            f"{single:.1f} | {single / cost.seconds:.2f} | {cost.peak_memory_mb or 0:.0f} | {passes} |",
            flush=True,
        )


def asked(text: str) -> tuple[str, bool, dict[str, str]]:
    """Return the method, whether its paper's settings are meant, and its options."""
    name, _, rest = text.partition(":")
    parts = [part for part in rest.split(",") if part]
    return name, "paper" in parts, dict(part.split("=", 1) for part in parts if part != "paper")


def passes_bare(kinds: Mapping[str, int], unit: Mapping[str, float]) -> float:
    """Return what image passes cost by themselves, in seconds, at so many seconds an image of each kind."""
    return sum(unit[kind.removesuffix(" replayed")] * count for kind, count in kinds.items())


def in_fp32(kinds: Mapping[str, int]) -> dict[str, int]:
    """Return the passes as if all were made in float32."""
    found: dict[str, int] = {}
    for kind, count in kinds.items():
        single = kind.replace("bf16", "fp32")
        found[single] = found.get(single, 0) + count
    return found


def network(options: argparse.Namespace, clean: LabelledImages) -> nn.Module:
    if options.model:
        return load_model(options.model / "model.safetensors", "resnet18").model
    generator = rng.generator(0)
    with rng.isolated(generator):
        built = NormalisedModel(build("resnet18", width=options.width, num_classes=10), *PRESETS["cifar10"])
    train(built, clean, Recipe.short(8), generator=generator)
    return built.eval()


def prices(model: nn.Module, clean: LabelledImages) -> dict[str, float]:
    """Return seconds an image of each kind of pass; backward ones without their forward pass.

    What is ``frozen`` is priced by the gradient of the images, which runs through all layers; that of masks
    on scales ends at the first of them.
    """
    copied = arrange(model).eval()
    images = clean.floats()[:BATCH].contiguous(memory_format=memory_format_for(copied))
    labels = clean.labels[:BATCH]
    kinds = [kind for kind in KINDS if "bf16" not in kind or has_fast_bf16(images.device)]
    return {kind: _price(kind, copied, images, labels) for kind in kinds}


def _price(kind: str, model: nn.Module, images: Tensor, labels: Tensor) -> float:
    precision = "bf16" if "bf16" in kind else "fp32"
    flags: Mapping[nn.Parameter, bool] = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_("weights" in kind)
    inputs = images.clone().requires_grad_("frozen" in kind)

    def forward() -> Tensor:
        with autocast(precision, images.device):  # type: ignore[arg-type]
            return F.cross_entropy(model(inputs).float(), labels)

    if kind.startswith("forward"):
        with torch.no_grad():
            seconds = _median(forward)
    else:
        seconds = _median(lambda: forward().backward()) - _median(forward)
    for parameter, flag in flags.items():
        parameter.grad = None
        parameter.requires_grad_(flag)
    return max(0.0, seconds) / len(images)


def _median(work: Callable[[], object], rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
