"""Turn the options that several commands share into a model and images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unbackdoor import rng
from unbackdoor.bench.zoo import entry_at, load_network
from unbackdoor.compute import check_channels, device_named
from unbackdoor.data import check_against_model, clean_draw, load_images
from unbackdoor.data.splits import balanced_order, split
from unbackdoor.errors import InvalidInputError, UnbackdoorError
from unbackdoor.models.loading import LoadedModel, load_model
from unbackdoor.models.normalise import PRESETS
from unbackdoor.report.documents import DataInfo, ModelInfo
from unbackdoor.types import LabelledImages

MOST_HELD_OUT = 1000
"""Images beyond the method's own on which its cost is measured."""


@dataclass(frozen=True)
class ModelOptions:
    """Where a model comes from, as given on the command line."""

    path: Path
    arch: str
    num_classes: int | None = None
    width: int | None = None
    mean: str | None = None
    std: str | None = None
    normalize: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class DataOptions:
    """Where images come from, as given on the command line."""

    path: str
    split: str | None = "train"
    count: int = 500
    image_size: int | None = None
    class_names: str | None = None


@dataclass(frozen=True, eq=False)
class CleanData:
    """Images for a method, others to measure it on, and what is weak about them.

    Args:
        learning: What the method sees.
        held_out: What it never sees.
        info: For the report.
        warnings: Sentences for the user.
    """

    learning: LabelledImages
    held_out: LabelledImages
    info: DataInfo
    warnings: tuple[str, ...]


def model_file(path: Path) -> Path:
    """Return the file of a model: a folder that an attack wrote stands for the one in it."""
    inside = path / "model.safetensors"
    return inside if inside.is_file() else path


def open_model(options: ModelOptions) -> LoadedModel:
    """Load the model and put it on its device."""
    mean, std = _normalisation(options)
    loaded = load_model(
        model_file(options.path),
        options.arch,
        num_classes=options.num_classes,
        width=options.width,
        mean=mean,
        std=std,
    )
    loaded.model.to(device_named(options.device))
    return loaded


def describe_model(loaded: LoadedModel) -> ModelInfo:
    """Return what a report says about the model."""
    words = {
        "checkpoint": "mean and standard deviation from the checkpoint",
        "option": "mean and standard deviation given by the user",
        "none": "none: the model gets images in [0, 1]",
    }
    return ModelInfo(
        path=str(loaded.checkpoint.path),
        sha256=loaded.checkpoint.sha256,
        format=loaded.checkpoint.format,
        architecture=loaded.architecture.name,
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        num_classes=loaded.num_classes,
        normalisation=words[loaded.normalisation],
        user_code=loaded.architecture.is_user_code,
    )


def read_data(options: DataOptions) -> LabelledImages:
    """Read the images that the options name.

    Raises:
        InvalidInputError: If there are no such images, or the size is none.
    """
    names = options.class_names.split(",") if options.class_names else None
    return load_images(options.path, split=options.split, image_size=options.image_size, class_names=names)


def open_clean(options: DataOptions, loaded: LoadedModel, *, seed: int, hold_out: bool) -> CleanData:
    """Draw the method's clean images, and others that it never sees where ``hold_out`` is set.

    If the source has no others, a fifth of the images is held out.
    """
    return drawn_clean(read_data(options), options, loaded, seed=seed, hold_out=hold_out)


def drawn_clean(
    everything: LabelledImages, options: DataOptions, loaded: LoadedModel, *, seed: int, hold_out: bool
) -> CleanData:
    """Do what ``open_clean`` does, with images that were read before."""
    warnings = check_against_model(everything, loaded.num_classes)
    generator = rng.generator(seed)
    drawn = clean_draw(everything, options.count, rng.spawn(generator))
    learning = held_out = drawn.data
    if hold_out:
        learning, held_out = _held_out(everything, options.count, generator, seed)
    check_channels(loaded.model, learning)
    counts = torch.bincount(learning.labels, minlength=loaded.num_classes)
    info = describe_data(learning, options, smallest=int(counts.min()))
    return CleanData(learning, held_out, info, (*drawn.warnings, *warnings))


def like(images: Tensor, clean: LabelledImages, source: str) -> Tensor:
    """Return images with the channels of the clean ones: grey ones become RGB.

    Raises:
        InvalidInputError: If they are colour images and the clean ones grey, or of another size.
    """
    channels, size = clean.images.shape[1], tuple(clean.images.shape[2:])
    if images.shape[1] == 1 < channels:
        images = images.expand(-1, channels, -1, -1).contiguous()
    if images.shape[1] != channels or tuple(images.shape[2:]) != size:
        raise InvalidInputError(
            f"{source} holds images of shape {tuple(images.shape[1:])}, the clean ones have "
            f"{tuple(clean.images.shape[1:])}; give images of the same kind, or one --image-size."
        )
    return images


def check_classes(data: LabelledImages, clean: LabelledImages, source: str) -> None:
    """Check that both name the same classes, where both name any: else labels mean different things.

    Raises:
        InvalidInputError: If they do not.
    """
    if data.class_names and clean.class_names and data.class_names != clean.class_names:
        odd = sorted(set(data.class_names) ^ set(clean.class_names)) or list(data.class_names)
        raise InvalidInputError(
            f"the classes of {source} are not those of the clean images: {odd[0]!r} is one of "
            f"{len(odd)} that differ; give --class-names, in the order of the model's outputs."
        )


def describe_data(data: LabelledImages, options: DataOptions, *, smallest: int) -> DataInfo:
    """Return what a report says about the images."""
    return DataInfo(
        source=options.path,
        split=options.split or "",
        images=len(data),
        num_classes=data.num_classes,
        image_shape=list(data.images.shape[1:]),
        smallest_class=smallest,
        class_names=list(data.class_names),
    )


def check_trigger_fits(infected: Path, test: LabelledImages) -> None:
    """Check that the images are of the kind that the attack's own model takes, as its trigger is.

    Args:
        infected: Folder that an attack wrote.
        test: What the trigger will be put on.

    Raises:
        InvalidInputError: If they have other channels.
    """
    try:
        network = load_network(entry_at(infected))
    except UnbackdoorError:
        return  # a network of the user's own code, or weights that were taken away: nothing to compare with
    first = next((tensor for tensor in network.parameters() if tensor.ndim == 4), None)
    channels = test.images.shape[1]
    if first is not None and first.shape[1] != channels:
        raise InvalidInputError(
            f"the trigger of {infected} is for other images: its model takes {first.shape[1]} channel(s), "
            f"these have {channels}; give images of the kind that it was trained on."
        )


def _held_out(
    everything: LabelledImages, count: int, generator: torch.Generator, seed: int
) -> tuple[LabelledImages, LabelledImages]:
    order = balanced_order(everything.labels, rng.spawn(rng.generator(seed)))
    others = order[count : count + MOST_HELD_OUT]
    if len(others) >= max(20, count // 5):
        return everything.subset(order[:count]), everything.subset(others)
    return split(everything.subset(order[:count]), 0.2, rng.spawn(generator))


def _normalisation(options: ModelOptions) -> tuple[list[float] | None, list[float] | None]:
    if options.normalize is not None:
        if options.mean or options.std:
            raise InvalidInputError("give either --normalize or --mean and --std, not both.")
        if options.normalize == "none":
            return None, None
        if options.normalize not in PRESETS:
            raise InvalidInputError(
                f"unknown normalisation {options.normalize!r}; known are none, {', '.join(PRESETS)}."
            )
        mean, std = PRESETS[options.normalize]
        return list(mean), list(std)
    if (options.mean is None) != (options.std is None):
        raise InvalidInputError("--mean and --std belong together; give both.")
    return _numbers(options.mean, "--mean"), _numbers(options.std, "--std")


def _numbers(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise InvalidInputError(f"{option} must be numbers such as 0.49,0.48,0.45, got {text!r}.") from error
