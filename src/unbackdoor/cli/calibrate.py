"""``unbackdoor calibrate``: learn how clean models score, so that a scan can say how sure it is."""

from __future__ import annotations

from pathlib import Path

import typer

from unbackdoor.cli import options as o


def calibrate(
    arch: o.Arch,
    clean: o.Clean,
    models: list[Path] | None = typer.Argument(
        None, help="Clean models: files, or folders that hold some. None with --surrogates."
    ),
    out: Path = typer.Option(..., help="The calibration file; a started one goes on."),
    surrogates: int = typer.Option(
        0, min=0, help="Train this many clean models on the clean images instead; 19 allow a rate of 5 %."
    ),
    epochs: int = typer.Option(30, min=1, help="Epochs of each surrogate."),
    stem: o.StemOption = o.Stem.SMALL,
    num_classes: o.NumClasses = None,
    width: int | None = typer.Option(
        None,
        help="Channels of the first stage: read from the files; with --surrogates the suspect's, else 64.",
    ),
    split: o.Split = "train",
    clean_count: o.CleanCount = 500,
    draws: int = typer.Option(
        1, min=1, help="Score each model with so many draws of images, and keep its highest scores."
    ),
    image_size: o.ImageSize = None,
    class_names: o.ClassNames = None,
    mean: o.Mean = None,
    std: o.Std = None,
    normalize: o.Normalize = None,
    detector: list[str] | None = typer.Option(
        None, help="Also score with this detector, for `unbackdoor scan --detector`; repeatable."
    ),
    description: str | None = typer.Option(None, help="Which models these are, in words, for reports."),
    settings: o.ScanSettings = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    jobs: o.Jobs = 1,
    force: bool = typer.Option(False, "--force", help="Begin anew where the file holds something else."),
    as_json: o.AsJson = False,
) -> None:
    """Score clean models with the detectors of a scan, for `unbackdoor scan --calibration`.

    Use as many clean images as you will scan with, and the same --set options.
    """
    from unbackdoor.bench.executors import executor_named
    from unbackdoor.cli import calibrating, console, inputs, show
    from unbackdoor.cli import surrogates as surrogates_of
    from unbackdoor.cli.scanning import configured_scan
    from unbackdoor.compute import device_named
    from unbackdoor.detect.scan import Scan
    from unbackdoor.errors import InvalidInputError

    if bool(models) == bool(surrogates):
        raise InvalidInputError("give either clean models, or a number of --surrogates to train.")
    show.check_folder(out)
    scan = configured_scan(Scan(others=tuple(detector or ())), settings or [])
    data = inputs.read_data(inputs.DataOptions(clean, split, clean_count, image_size, class_names))
    pool, entries = data, list[calibrating.CleanModel]()
    if surrogates:
        kept = clean_count * draws
        training, pool, apart = surrogates_of.surrogate_images(data, kept, seed)
        if not apart:
            console.warn(
                f"{len(data)} images are too few to keep {kept} from the surrogates' training, so they are "
                "scored on images that they know, as a suspect is not; give more."
            )
        entries = surrogates_of.Surrogates(
            folder=out.with_name(f"{out.stem}-surrogates"),
            data=training,
            test=pool,
            arch=arch,
            width=width,
            stem=stem.value,
            num_classes=num_classes or data.num_classes,
            epochs=epochs,
            seed=seed,
            device=device_named(device),
        ).models(surrogates)
        words = f"trained on {len(training)} images of {Path(clean).name} for {epochs} epochs each"
    else:
        options = inputs.ModelOptions(Path(), arch, num_classes, width, mean, std, normalize, device)
        files = calibrating.model_files(models or [])
        show.check_folder(out, *files)
        entries = [calibrating.CleanModel.from_file(options, path) for path in files]
        words = f"{arch} models of your own"
    if draws > 1 and len(pool) <= clean_count:
        raise InvalidInputError(
            f"{draws} draws of {clean_count} images would all be the same {len(pool)}; give more images, a "
            "smaller --clean-count or --draws 1."
        )
    plan = calibrating.Plan(
        out=out,
        scan=scan,
        pool=pool,
        images=clean_count,
        seed=seed,
        origin="surrogates" if surrogates else "models",
        description=description or words,
        architecture=arch,
        split=split or "",
        normalisation=f"{normalize} {mean} {std}",
        draws=draws,
        anew=force,
    )
    with console.progress_bar(hidden=as_json) as progress:
        place = executor_named("pool" if jobs > 1 else "inline", jobs=jobs)
        found = calibrating.calibrate(plan, entries, place, progress=progress, say=console.warn)
    show.calibration(found, out, as_json=as_json)
