"""``unbackdoor scan``: is this model backdoored, and to which class?"""

from __future__ import annotations

from pathlib import Path

import typer

from unbackdoor.cli import options as o

EXIT_CODES = {"clean": 0, "backdoored": 1, "inconclusive": 3}

EXIT_REFUSED = 2

WORST_FIRST = (1, EXIT_REFUSED, 3, 0)
"""Exit codes, of which several files give the first that any of them has."""


def scan(
    model: o.ModelPaths,
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
    calibration: str | None = typer.Option(
        None, help="Scores of your own clean models, from `unbackdoor calibrate`; else what comes with it."
    ),
    fast: bool = typer.Option(
        False, "--fast", help="Leave trigger inversion out; the model cannot be called clean then."
    ),
    detector: list[str] | None = typer.Option(
        None,
        help="Also run this model detector (`unbackdoor methods`, or your own, path/to/file.py:Class, which "
        "runs your code); shown, it does not decide. Repeatable; "
        "its options by --set others.NAME.option=value.",
    ),
    settings: o.ScanSettings = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    as_json: o.AsJson = False,
    report: o.ReportPath = None,
    sarif: Path | None = typer.Option(None, help="Also write SARIF 2.1.0, for code scanning."),
    out: Path | None = typer.Option(
        None, help="Folder of a JSON and an HTML document a file, for several files; runs/scan if not given."
    ),
    executor: o.Executor = "",
    jobs: o.Jobs = 1,
    address: o.Address = "",
    resource: o.Resources = None,
) -> None:
    """Say whether a model is backdoored, with the evidence; of several, a line each.

    Exit code: 0 no evidence of a backdoor, 1 backdoored, 3 inconclusive, 2 error; of several files the worst:
    1 before 2 before 3 before 0.
    """
    from unbackdoor.bench.executors import executor_named
    from unbackdoor.cli import batch, benching, console, inputs, scanning, show
    from unbackdoor.detect.calibration import read_calibration
    from unbackdoor.detect.scan import Scan
    from unbackdoor.errors import InvalidInputError

    if taken := sorted(
        {
            name
            for name in ("alpha", "fast", "calibration")
            for text in settings or []
            if text.startswith(f"{name}=")
        }
    ):
        raise InvalidInputError(f"give --{taken[0]}, not --set {taken[0]}=, so that the two cannot differ.")
    needed = (*model, Path(clean), Path(calibration) if calibration else None)
    show.check_folder(report, *needed)
    show.check_folder(sarif, *needed, report)
    method = scanning.configured_scan(
        Scan(
            alpha=alpha,
            fast=fast,
            calibration=read_calibration(Path(calibration)) if calibration else None,
            others=tuple(detector or ()),
        ),
        settings or [],
    )
    how = inputs.ModelOptions(model[0], arch, num_classes, width, mean, std, normalize, device)
    images = inputs.DataOptions(clean, split, clean_count, image_size, class_names)
    if len(model) > 1 or out is not None or executor:
        if report is not None or sarif is not None:
            raise InvalidInputError("--report and --sarif are for one file; several are documented in --out.")
        place = executor_named(
            executor or ("pool" if jobs > 1 else "inline"),
            jobs=jobs,
            address=address,
            resources=benching.pairs(resource or ()),
            folder=(out or batch.OUT) / "slurm",
        )
        scanner = batch.FileScanner(how, images, method, seed, out or batch.OUT)
        found = batch.scan_files(scanner, model, place)
        batch.say(found, scanner.out, as_json=as_json)
        codes = {EXIT_CODES.get(record.get("verdict", ""), EXIT_REFUSED) for _, record in found}
        raise typer.Exit(next(code for code in WORST_FIRST if code in codes))
    loaded = inputs.open_model(how)
    show.announce(loaded)
    data = inputs.open_clean(images, loaded, seed=seed, hold_out=False)
    other = method.other_images(loaded.model, data.learning, split)
    foreseen = (*data.warnings, *method.foreseen(loaded.model, data.learning), *other)
    for warning in foreseen:
        console.warn(warning)
    with console.progress_bar(hidden=as_json) as progress:
        document = scanning.scan_document(
            loaded.model,
            data.learning,
            scan=method,
            info=inputs.describe_model(loaded),
            data=data.info,
            seed=seed,
            warnings=(*data.warnings, *other),
            progress=progress,
        )
    # The verdict comes first: what is written after it may fail.
    show.finish(document, as_json=as_json, report=report, said=foreseen)
    if sarif is not None:
        show.write_sarif(document, sarif, quiet=as_json)
    raise typer.Exit(EXIT_CODES[document.verdict])
