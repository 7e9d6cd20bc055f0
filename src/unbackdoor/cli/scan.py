"""``unbackdoor scan``: is this model backdoored, and to which class?"""

from __future__ import annotations

import typer

from unbackdoor.cli import options as o

EXIT_CODES = {"clean": 0, "backdoored": 1, "inconclusive": 3}


def scan(
    model: o.ModelPath,
    arch: o.Arch,
    clean: o.Clean,
    num_classes: o.NumClasses = None,
    width: o.Width = None,
    split: o.Split = "train",
    clean_count: o.CleanCount = 500,
    image_size: o.ImageSize = None,
    class_names: o.ClassNames = None,
    mean: o.Mean = None,
    std: o.Std = None,
    normalize: o.Normalize = None,
    alpha: float = typer.Option(0.05, min=0.001, max=0.5, help="Largest share of clean models flagged."),
    calibration: str | None = typer.Option(None, help="Calibration file made from your own clean models."),
    settings: o.Settings = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    as_json: o.AsJson = False,
    report: o.ReportPath = None,
) -> None:
    """Say whether a model is backdoored, with the evidence.

    Exit code: 0 no evidence of a backdoor, 1 backdoored, 3 inconclusive, 2 error.
    """
    from pathlib import Path

    from unbackdoor.cli import console, inputs, show
    from unbackdoor.cli.work import scan_document
    from unbackdoor.detect.calibration import read_calibration
    from unbackdoor.detect.scan import Scan
    from unbackdoor.settings import configure

    method = configure(
        Scan(alpha=alpha, calibration=read_calibration(Path(calibration)) if calibration else None),
        settings or [],
    )
    loaded = inputs.open_model(
        inputs.ModelOptions(model, arch, num_classes, width, mean, std, normalize, device)
    )
    show.announce(loaded)
    data = inputs.open_clean(
        inputs.DataOptions(clean, split, clean_count, image_size, class_names),
        loaded,
        seed=seed,
        hold_out=False,
    )
    with console.progress_bar(hidden=as_json) as progress:
        document = scan_document(
            loaded.model,
            data.learning,
            scan=method,
            info=inputs.describe_model(loaded),
            data=data.info,
            seed=seed,
            warnings=data.warnings,
            progress=progress,
        )
    show.finish(document, as_json=as_json, report=report)
    raise typer.Exit(EXIT_CODES[document.verdict])
