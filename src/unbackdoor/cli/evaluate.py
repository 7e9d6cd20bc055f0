"""``unbackdoor evaluate``: measure any model against a known trigger."""

from __future__ import annotations

from pathlib import Path

import typer

from unbackdoor.cli import options as o


def evaluate(
    model: o.ModelPath,
    arch: o.Arch,
    data: str = typer.Option(..., help="Test images, in any form that --clean takes."),
    infected: Path | None = typer.Option(
        None, help="Folder that `unbackdoor attack` wrote; its trigger and label rule are used."
    ),
    num_classes: o.NumClasses = None,
    width: o.Width = None,
    split: o.Split = "test",
    count: int = typer.Option(0, min=0, help="Test images to use, balanced; 0 for all."),
    image_size: o.ImageSize = None,
    class_names: o.ClassNames = None,
    mean: o.Mean = None,
    std: o.Std = None,
    normalize: o.Normalize = None,
    reactivate: bool = typer.Option(
        False,
        "--reactivate",
        help="Also try to wake the backdoor: by retuning on 5 poisoned images, and by a query attack.",
    ),
    label: str = typer.Option("", help="How the report calls this model."),
    seed: o.Seed = 0,
    device: o.Device = "auto",
    as_json: o.AsJson = False,
    report: o.ReportPath = None,
) -> None:
    """Measure clean accuracy, attack success and robust accuracy, with counts and intervals."""
    from unbackdoor import rng
    from unbackdoor.bench.artefact import label_rule_of, read_card
    from unbackdoor.cli import console, inputs, show
    from unbackdoor.cli.work import evaluate_document
    from unbackdoor.compute import check_channels
    from unbackdoor.data import check_against_model, draw_balanced
    from unbackdoor.errors import InvalidInputError
    from unbackdoor.triggers import load_trigger

    if reactivate and infected is None:
        raise InvalidInputError("--reactivate needs the trigger; name its folder with --infected.")
    show.check_folder(report, model, Path(data))
    card = read_card(infected) if infected else {}
    if infected and not card.get("attack"):
        raise InvalidInputError(
            f"{infected} holds a clean model, which has no trigger; name an infected one."
        )
    loaded = inputs.open_model(
        inputs.ModelOptions(model, arch, num_classes, width, mean, std, normalize, device)
    )
    show.announce(loaded)
    source = inputs.DataOptions(data, split, count, image_size, class_names)
    test = inputs.read_data(source)
    check_against_model(test, loaded.num_classes)
    check_channels(loaded.model, test)
    if infected:
        inputs.check_trigger_fits(infected, test)
    if count:
        test = draw_balanced(test, count, rng.generator(seed))
    with console.progress_bar(hidden=as_json) as progress:
        document = evaluate_document(
            loaded.model,
            test,
            trigger=load_trigger(infected / "trigger.safetensors") if infected else None,
            label_rule=label_rule_of(card) if infected else None,
            attack=str(card.get("attack")) if infected else None,
            label=label or str(model),
            info=inputs.describe_model(loaded),
            data=inputs.describe_data(test, source, smallest=int(test.labels.bincount().min())),
            reactivate=reactivate,
            seed=seed,
            claimed=card.get("metrics", {}).get("clean_accuracy", {}).get("value"),
            progress=progress,
        )
    show.finish(document, as_json=as_json, report=report)
