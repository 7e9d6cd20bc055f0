"""``unbackdoor purify``: write a copy of the model without its backdoor, by any of the purifiers."""

from __future__ import annotations

from pathlib import Path

import typer

from unbackdoor.cli import options as o


def purify(
    model: o.ModelPath,
    arch: o.Arch,
    clean: o.Clean,
    out: Path = typer.Option(..., help="New .safetensors file; never the input."),
    method: str = typer.Option(
        "mnp",
        help="A purifier; `unbackdoor methods` lists them. Or your own, path/to/file.py:Class (which runs "
        "your code).",
    ),
    paper: bool = typer.Option(False, "--paper", help="Start from the settings of the method's paper."),
    num_classes: o.NumClasses = None,
    width: o.Width = None,
    split: o.Split = "train",
    clean_count: o.CleanCount = 500,
    image_size: o.ImageSize = None,
    class_names: o.ClassNames = None,
    mean: o.Mean = None,
    std: o.Std = None,
    normalize: o.Normalize = None,
    settings: o.Settings = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    force: bool = typer.Option(False, "--force", help="Overwrite an existing output file."),
    as_json: o.AsJson = False,
    report: o.ReportPath = None,
) -> None:
    """Remove a backdoor by pruning or retraining; say what was changed and at what cost in clean accuracy."""
    from unbackdoor.cli import console, inputs, show
    from unbackdoor.cli.work import purify_document
    from unbackdoor.detect.plausibility import check_plausible
    from unbackdoor.errors import UnsupportedModelError
    from unbackdoor.purify.registry import purifier_named
    from unbackdoor.settings import configure

    named = purifier_named(method, paper=paper)
    show.check_output(out, model, force=force)
    show.check_folder(report, model, out, Path(clean))
    purifier = configure(named, settings or [])
    loaded = inputs.open_model(
        inputs.ModelOptions(model, arch, num_classes, width, mean, std, normalize, device)
    )
    show.announce(loaded)
    data = inputs.open_clean(
        inputs.DataOptions(clean, split, clean_count, image_size, class_names),
        loaded,
        seed=seed,
        hold_out=True,
    )
    plausible = check_plausible(loaded.model, data.learning)
    if plausible.problem:
        raise UnsupportedModelError(f"nothing was purified: {plausible.problem}.")
    with console.progress_bar(hidden=as_json) as progress:
        job = purify_document(
            loaded,
            data.learning,
            data.held_out,
            method=purifier,
            out=out,
            info=inputs.describe_model(loaded),
            data=data.info,
            seed=seed,
            warnings=(*data.warnings, *plausible.warnings),
            progress=progress,
        )
    show.finish(job.document, as_json=as_json, report=report)
