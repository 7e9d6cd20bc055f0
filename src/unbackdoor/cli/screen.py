"""``unbackdoor screen``: which of these inputs look triggered, or is this training set poisoned?"""

from __future__ import annotations

import typer

from unbackdoor.cli import options as o

EXIT_CODES = {"nothing found": 0, "triggered": 1, "inconclusive": 3}


def screen(
    model: o.ModelPath,
    arch: o.Arch,
    clean: o.Clean,
    inputs: str = typer.Option(
        ...,
        help="What to screen: an image file, a folder of images (no labels needed), or any form that --clean "
        "takes. For a detector of training sets, the training set with its labels.",
    ),
    detector: str = typer.Option(
        "screening",
        help="screening (STRIP and IBD-PSC together), another detector of inputs, or one of training sets: "
        "ac, sc, sc-an; or your own, path/to/file.py:Class, which runs your code.",
    ),
    false_alarms: float = typer.Option(
        0.01, min=0.0001, max=0.5, help="Largest share of clean inputs that is flagged."
    ),
    num_classes: o.NumClasses = None,
    width: o.Width = None,
    split: o.Split = "train",
    clean_count: o.CleanCount = 500,
    inputs_split: str | None = typer.Option(
        None, help="Split of the inputs, where they come in splits; all, and `train` for training sets."
    ),
    image_size: o.ImageSize = None,
    class_names: o.ClassNames = None,
    mean: o.Mean = None,
    std: o.Std = None,
    normalize: o.Normalize = None,
    settings: o.Settings = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Say which inputs of a model look triggered, at a stated rate of false alarms.

    Exit code: 0 no more than chance explains, 1 triggered inputs or a poisoned training set, 3 inconclusive,
    2 error. Each input that is listed is so suspicious whatever the exit code.
    """
    from unbackdoor.bench.detecting import judges_training_sets
    from unbackdoor.cli import console, screening, show
    from unbackdoor.cli import inputs as read
    from unbackdoor.data import check_against_model, load_samples
    from unbackdoor.detect.plausibility import check_plausible
    from unbackdoor.errors import UnsupportedModelError

    chosen = screening.detector_named(detector, settings or [])
    loaded = read.open_model(read.ModelOptions(model, arch, num_classes, width, mean, std, normalize, device))
    show.announce(loaded)
    source = read.DataOptions(clean, split, clean_count, image_size, class_names)
    data = read.open_clean(source, loaded, seed=seed, hold_out=False)
    plausible = check_plausible(loaded.model, data.learning)
    if plausible.problem:
        raise UnsupportedModelError(f"nothing was screened: {plausible.problem}.")
    warnings = [*data.warnings, *plausible.warnings]
    of_training_sets = judges_training_sets(chosen)
    if of_training_sets:
        given = read.read_data(read.DataOptions(inputs, inputs_split or "train", 0, image_size, class_names))
        read.check_classes(given, data.learning, inputs)
        warnings += check_against_model(given, loaded.num_classes)
        images, labels, names = given.images, given.labels, tuple(f"row {row}" for row in range(len(given)))
    else:
        screening.check_resolution(data.learning, chosen, false_alarms)
        images, names = load_samples(inputs, split=inputs_split, image_size=image_size)
        labels = None
    what = screening.Inputs(inputs, read.like(images, data.learning, inputs), labels, names)
    for warning in warnings:
        console.warn(warning)
    about = {"model": read.describe_model(loaded), "data": data.info, "warnings": warnings}
    with console.progress_bar(hidden=as_json) as progress:
        if of_training_sets:
            document = screening.screen_training_set(
                loaded.model, what, data.learning, detector=chosen, seed=seed, about=about, progress=progress
            )
        else:
            document = screening.screen_inputs(
                loaded.model, what, data.learning, detector=chosen, false_alarms=false_alarms, seed=seed,
                about=about, progress=progress,
            )  # fmt: skip
    if as_json:
        console.print_text(document.model_dump_json(indent=1))
    else:
        show.screened(document)
    raise typer.Exit(EXIT_CODES[document.verdict])
