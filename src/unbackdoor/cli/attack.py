"""``unbackdoor attack``: train an infected model, with all that is needed to rebuild its trigger."""

from __future__ import annotations

from pathlib import Path

import typer

from unbackdoor.cli import options as o


def attack(
    name: str = typer.Argument(help="badnets, blend, or none for a clean twin trained in the same way."),
    data: str = typer.Option(..., help="Data set to train on, in any form that --clean takes."),
    out: Path = typer.Option(..., help="Folder for model.safetensors, trigger.safetensors and card.json."),
    arch: o.Arch = "resnet18",
    width: int = typer.Option(16, min=1, help="Channels of the first stage; the papers' is 64."),
    epochs: int = typer.Option(24, min=1, help="Passes over the data, with a one-cycle schedule."),
    settings: o.Settings = None,
    split: o.Split = "train",
    test_split: str = typer.Option("test", help="Split that CA, ASR and RA are measured on."),
    limit: int | None = typer.Option(None, min=2, help="Train on that many images only."),
    image_size: o.ImageSize = None,
    normalize: str = typer.Option("cifar10", help="Normalisation built into the model: a name, or none."),
    seed: o.Seed = 0,
    device: o.Device = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Train a model with a backdoor (or without), and measure it.

    Killed and started again with the same options, the training goes on where it was.
    """
    import json

    from unbackdoor.cli import console, show, training

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
    )
    with console.progress_bar(hidden=as_json) as progress:
        card = training.run(job, progress)
    if as_json:
        console.print_json(json.dumps(card))
    else:
        show.card(card, out)
