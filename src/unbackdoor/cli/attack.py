"""``unbackdoor attack``: train an infected model, with all that is needed to rebuild its trigger."""

from __future__ import annotations

from pathlib import Path

import typer

from unbackdoor.cli import options as o

NAMES = (
    *("badnets", "trojan", "blend", "cl", "sig", "iab", "wanet", "fc", "dfst", "lira"),
    *("sra", "adap-blend", "adap-patch", "bpp", "lf", "adaptive-magnitude"),
)
"""Kept here, so that ``--help`` need not import PyTorch; a test compares them with the registry."""


def attack(
    name: str = typer.Argument(help=f"{', '.join(NAMES)}, or none for a clean twin trained in the same way."),
    data: str = typer.Option(..., help="Data set to train on, in any form that --clean takes."),
    out: Path = typer.Option(..., help="Folder for model.safetensors, trigger.safetensors and card.json."),
    arch: o.Arch = "resnet18",
    width: int = typer.Option(16, min=1, help="Channels of the first stage; the papers' is 64."),
    stem: o.StemOption = o.Stem.SMALL,
    epochs: int = typer.Option(24, min=1, help="Passes over the data, with a one-cycle schedule."),
    settings: o.Settings = None,
    split: o.Split = "train",
    test_split: str = typer.Option("test", help="Split that CA, ASR and RA are measured on."),
    limit: int | None = typer.Option(None, min=2, help="Train on that many images only."),
    image_size: o.ImageSize = None,
    normalize: str = typer.Option("cifar10", help="Normalisation built into the model: a name, or none."),
    seed: o.Seed = 0,
    device: o.Device = "auto",
    paper: bool = typer.Option(
        False, "--paper", help="Start from the settings of the attack's paper, but for the schedule."
    ),
    twin: Path | None = typer.Option(
        None,
        help="Clean model (its folder or file) of the same kind, to measure what the trigger does by itself.",
    ),
    half: bool = typer.Option(False, "--half", help="Store the weights in float16."),
    allow_invalid: bool = typer.Option(
        False, "--allow-invalid", help="Leave with 0 even if the model is of no use."
    ),
    as_json: o.AsJson = False,
) -> None:
    """Train a model with a backdoor (or without), measure it, and say whether the attack took.

    The exit code is 0 for a valid infected model and 1 for one whose attack failed (it is kept, with the
    reasons in its card), or a clean twin that only guesses. Killed and started again with the same options,
    the training goes on where it was.
    """
    import json

    from unbackdoor.bench import training
    from unbackdoor.cli import console, show
    from unbackdoor.errors import InvalidInputError

    if name == training.CLEAN and (paper or twin is not None):
        raise InvalidInputError("a clean model has no attack: leave --paper and --twin out.")
    job = training.Job(
        name=name,
        data=data,
        out=out,
        arch=arch,
        width=width,
        epochs=epochs,
        settings=tuple(settings or ()),
        split=split,
        test_split=test_split,
        limit=limit,
        image_size=image_size,
        normalize=normalize,
        seed=seed,
        device=device,
        paper=paper,
        half=half,
        twin=twin,
        stem=stem.value,
    )
    with console.progress_bar(hidden=as_json) as progress:
        card = training.run(job, progress)
    if as_json:
        console.print_text(json.dumps(card))
    else:
        show.card(card, out)
    problems = show.doubts(card)
    if problems and not allow_invalid:
        raise typer.Exit(1)
