"""The demonstration, step by step, with the functions that the other commands use."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.attacks import BadNets
from unbackdoor.bench.artefact import save_clean, save_infected
from unbackdoor.cli import inputs, show
from unbackdoor.cli.scanning import scan_document
from unbackdoor.cli.work import evaluate_document, purify_document
from unbackdoor.data import load_images, split
from unbackdoor.detect.calibration import CalibrationSet, Kind, ScoredModel, options_of, write_calibration
from unbackdoor.detect.scan import Scan
from unbackdoor.detect.trigger_search import TriggerSearch
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.select import Guard
from unbackdoor.inversion import Inversion
from unbackdoor.models import NormalisedModel, build
from unbackdoor.models.loading import LoadedModel, load_model
from unbackdoor.purify import MNP
from unbackdoor.report import documents as doc
from unbackdoor.train import Recipe, TrainingRecord, train
from unbackdoor.types import Infected, LabelledImages, Progress, silent

RECIPE = Recipe(epochs=30, batch_size=64, schedule="one_cycle", crop_padding=2, flip=False)
"""Digits are not mirrored."""

METHOD = MNP(guard=Guard(candidates=0.3, per_filter=0.03, total=0.1, accuracy=0.02, benefit=0.005))
"""A looser guard than the default: this network has 360 filters, and the backdoor shares many of them."""

TWINS = 9
"""Honest models for the threshold; n of them allow a false-positive rate of 1 / (n + 1)."""

ALPHA = 0.1

SCAN = Scan(
    alpha=ALPHA,
    search=TriggerSearch(
        first=Inversion(steps=80, batch_size=16, success=0.95),
        second=Inversion(steps=80, batch_size=16, success=0.95),
        refined=2,
    ),
)
"""A shorter trigger search than the default: images are small, and twelve models are searched."""

DATA = inputs.DataOptions("digits", "test", 400)


def tell(out: Path, *, seed: int, progress: Progress, say: Callable[[str], None]) -> None:
    """Run the demonstration and leave everything in ``out``.

    Args:
        out: Folder; made if absent.
        seed: Seed of everything.
        progress: Called by each stage.
        say: Gets one line a step.
    """
    started = time.perf_counter()
    folders = _folders(out)
    training = load_images("digits", split="train")
    defence, unseen = split(load_images("digits", split="test"), 0.2, rng.generator(seed))

    say("1. An attacker trains a model: a small white patch, on a quarter of the images, means 0.")
    infected = _train_infected(training, unseen, folders["infected"], seed, progress)
    say("2. An honest twin is trained in the same way.")
    _train_clean(training, unseen, folders["clean"], seed, progress)

    say(f"   {TWINS} more honest models show how a clean one scores: the threshold comes from them.")
    calibration = _calibrate(training, defence, seed, progress)
    write_calibration(calibration, out / "calibration.json")

    say("3. You get both files, and 400 clean images. Scan them:")
    scan = replace(SCAN, calibration=calibration)
    documents: list[doc.Document] = []
    models = {name: load_model(folder / "model.safetensors", "resnet10") for name, folder in folders.items()}
    for loaded in models.values():
        documents.append(_scan(loaded, defence, scan, seed, progress))
        show.finish(documents[-1], as_json=False, report=None)

    say("4. Purify the infected one, and scan the result:")
    target = out / "purified.safetensors"
    suspect = models["infected"]
    job = purify_document(
        suspect,
        defence,
        unseen,
        method=METHOD,
        out=target,
        info=inputs.describe_model(suspect),
        data=_data_info(defence),
        seed=seed,
        progress=progress,
    )
    show.finish(job.document, as_json=False, report=None)
    purified = load_model(target, "resnet10")
    documents += [job.document, _scan(purified, defence, scan, seed, progress)]
    show.finish(documents[-1], as_json=False, report=None)

    say("   Traces of a dead trigger can still be flagged; whether it is dead, only its owner can measure.")
    say("5. Only the laboratory knows the trigger. What it did before and after:")
    for label, loaded in (("infected, before", suspect), ("infected, purified", purified)):
        documents.append(_evaluate(loaded, infected, unseen, label))
        show.finish(documents[-1], as_json=False, report=None)
    for index, document in enumerate(documents):
        doc.write_document(document, out / f"{index}-{document.kind}.json")
    show.write_page(documents, out / "report.html", title="unbackdoor: a demonstration on digits")
    say(f"Done in {time.perf_counter() - started:.0f} s. Open {out / 'report.html'} in a browser.")


def _folders(out: Path) -> dict[str, Path]:
    folders = {"infected": out / "infected", "clean": out / "clean"}
    try:
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"cannot make {out}: {error.strerror}; choose another --out.") from error
    return folders


def _network() -> NormalisedModel:
    return NormalisedModel(build("resnet10", width=8, num_classes=10, in_channels=1), (0.3,), (0.35,))


def _train_infected(
    training: LabelledImages, test: LabelledImages, out: Path, seed: int, progress: Progress
) -> Infected:
    attack = BadNets(
        poison_fraction=0.25,
        pattern="white",
        patch_size=3,
        trigger_stage="after_augmentation",
        recipe=RECIPE,
    )
    infected = attack.run(training, _network, generator=rng.generator(seed), progress=progress)
    save_infected(out, infected, test, attack=attack, seed=seed)
    return infected


def _honest(training: LabelledImages, seed: int, progress: Progress) -> tuple[nn.Module, TrainingRecord]:
    generator = rng.generator(seed)
    with rng.isolated(generator):
        model = _network()
    return model, train(model, training, RECIPE, generator=rng.spawn(generator), progress=progress)


def _train_clean(
    training: LabelledImages, test: LabelledImages, out: Path, seed: int, progress: Progress
) -> None:
    model, record = _honest(training, seed, progress)
    save_clean(out, model, test, seed=seed, record={"training": record.describe()})


def _calibrate(
    training: LabelledImages, clean: LabelledImages, seed: int, progress: Progress
) -> CalibrationSet:
    """Score honest models of the same kind; what they score at most is the threshold."""
    models, kind = list[ScoredModel](), None
    for index in range(TWINS):
        model, _ = _honest(training, 1000 + seed + index, silent)
        kind = Kind.of(model, clean, clean.num_classes, architecture="resnet10")
        scores = SCAN.measure(model, clean, generator=rng.generator(index)).scores()
        models.append(ScoredModel(name=f"twin-{index}", scores=scores))
        progress("calibrate", index + 1, TWINS)
    assert kind is not None
    return CalibrationSet(
        description="trained on the same digits with other seeds",
        origin="models",
        kind=kind,
        images=len(clean),
        options={name: options_of(detector) for name, detector in SCAN.detectors().items()},
        models=tuple(models),
    )


def _scan(
    loaded: LoadedModel, clean: LabelledImages, scan: Scan, seed: int, progress: Progress
) -> doc.ScanDocument:
    return scan_document(
        loaded.model,
        clean,
        scan=scan,
        info=inputs.describe_model(loaded),
        data=_data_info(clean),
        seed=seed,
        progress=progress,
    )


def _evaluate(
    loaded: LoadedModel, infected: Infected, test: LabelledImages, label: str
) -> doc.EvaluateDocument:
    return evaluate_document(
        loaded.model,
        test,
        trigger=infected.trigger,
        label_rule=infected.label_rule,
        attack="badnets",
        label=label,
        info=inputs.describe_model(loaded),
        data=_data_info(test),
    )


def _data_info(data: LabelledImages) -> doc.DataInfo:
    options = replace(DATA, count=len(data))
    return inputs.describe_data(data, options, smallest=int(torch.bincount(data.labels).min()))
