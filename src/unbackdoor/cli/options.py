"""The flags that several commands share. Nothing here imports torch: ``--help`` has to be quick."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Stem(StrEnum):
    """The first layers of a ResNet."""

    SMALL = "3x3"
    LARGE = "7x7"


ModelPaths = Annotated[
    list[Path],
    typer.Argument(help="Model files: .safetensors, or state dicts from torch.save. Several: see --out."),
]


ModelPath = Annotated[Path, typer.Argument(help="Model file: .safetensors, or a state dict from torch.save.")]
Arch = Annotated[
    str,
    typer.Option(
        help="Architecture: resnet10, resnet18, resnet34, resnet50, preactresnet18, preactresnet34, vgg11, "
        "vgg11_bn, vgg16, vgg16_bn, densenet40, vit_small, or your own factory as package.module:function or "
        "path/to/file.py:function (which runs your code)."
    ),
]
NumClasses = Annotated[
    int | None, typer.Option(help="Outputs of the model; read from its head if not given.")
]
Width = Annotated[int | None, typer.Option(help="Channels of the first stage; read from the file.")]
StemOption = Annotated[
    Stem, typer.Option(help="First layer of a ResNet: 3x3, or 7x7 with stride and pooling for larger images.")
]
Clean = Annotated[
    str,
    typer.Option(
        help="Clean images: folder with one sub-folder a class, zip of one, parquet, CIFAR batches, npz."
    ),
]
Split = Annotated[str, typer.Option(help="Split to use, where the images come in splits.")]
CleanCount = Annotated[int, typer.Option(min=2, help="Clean images to use, drawn balanced over classes.")]
ImageSize = Annotated[
    int | None,
    typer.Option(
        help="Resize images to this many pixels a side, not keeping the aspect ratio and without cropping; "
        "needed where sizes differ."
    ),
]
ClassNames = Annotated[
    str | None,
    typer.Option(help="Class names in the order of the model's outputs, separated by commas."),
]
Mean = Annotated[str | None, typer.Option(help="Channel means, such as 0.49,0.48,0.45.")]
Std = Annotated[str | None, typer.Option(help="Channel standard deviations, such as 0.25,0.24,0.26.")]
Normalize = Annotated[
    str | None,
    typer.Option(help="Known mean and std: cifar10, cifar100, imagenet, mnist or half. For models that "
                      "do not normalise by themselves."),
]  # fmt: skip
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of all random choices.")]
Executor = Annotated[
    str, typer.Option(help="inline, pool, ray or slurm; pool for several jobs, else inline.")
]
Jobs = Annotated[int, typer.Option(min=1, help="Tasks side by side.")]
Address = Annotated[
    str,
    typer.Option(help="Of a Ray cluster, such as auto; for slurm, `local` tries jobs without a queue."),
]
Resources = Annotated[
    list[str] | None,
    typer.Option(
        help="For each task, NAME=VALUE: threads (pool), cpus and gpus (ray), what submitit takes (slurm)."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
ReportPath = Annotated[Path | None, typer.Option(help="Also write a self-contained HTML report.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Set an option of the method, NAME=VALUE; `unbackdoor methods NAME` lists them; repeatable.",
    ),
]
ScanSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Set an option of the scan, NAME=VALUE; `unbackdoor methods scan` lists them; repeatable.",
    ),
]
