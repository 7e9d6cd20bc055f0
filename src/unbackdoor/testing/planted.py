"""A small network with a backdoor whose filters are known, wired by hand: ground truth without training.

Images show one coloured square on grey noise; the class is its colour. Each class has several filters in
both layers, and a few filters in each answer to a black and white patch in the lower right corner alone
and push the target's logit. Weights are set, norm statistics are measured on clean and triggered images,
as training on poisoned data would have left them.

The guilty filters' thresholds are low enough for batch statistics of clean images to excite them, which is
what clean suppression feeds on; with high thresholds it misses some. So this network shows that a method
does what it says where it can, not how often it can.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.triggers import PatchTrigger
from unbackdoor.types import AllToOne, LabelledImages, quantise

SIZE = 16
"""Pixels a side."""

WIDTH = 48
"""Filters in each of the two layers; a multiple of 16, see ``compute.memory_format_for``."""

GUILTY_FILTERS = 2
"""Filters in each layer that carry the backdoor."""

MOST_CLASSES = 8
"""Colours are the eight corners of a cube around grey."""

_SQUARE = 8
_CONTRAST = 0.3
_NOISE = 0.03
_POISONED = 0.1
_STATISTICS_IMAGES = 512


@dataclass(frozen=True, eq=False)
class PlantedBackdoor:
    """The network and the truth about it.

    Args:
        model: Takes float images ``(N, 3, 16, 16)`` in [0, 1]; in eval mode on the CPU.
        trigger: What makes it answer with the target.
        label_rule: All to one.
        guilty: (layer, filter) of every filter that carries the backdoor; empty for a clean twin.
        classes: Number of classes.
    """

    model: nn.Module
    trigger: PatchTrigger
    label_rule: AllToOne
    guilty: frozenset[tuple[str, int]]
    classes: int

    def clean_data(self, n: int, generator: torch.Generator) -> LabelledImages:
        """Return ``n`` uint8 images with balanced labels, which the model classifies correctly."""
        return coloured_squares(n, self.classes, generator)


def planted_backdoor(
    *, classes: int = MOST_CLASSES, target_class: int = 0, seed: int = 0, infected: bool = True
) -> PlantedBackdoor:
    """Wire a network by hand, with a backdoor or (the clean twin) without.

    Args:
        classes: Number of classes, in [4, 8].
        target_class: What triggered images are classified as, in [0, classes).
        seed: Small noise on the weights, and the images that norm statistics are measured on, follow it.
        infected: Whether the backdoor is wired in.

    Raises:
        InvalidInputError: If ``classes`` or ``target_class`` is out of range.
    """
    if not 4 <= classes <= MOST_CLASSES or not 0 <= target_class < classes:
        raise InvalidInputError(
            f"classes must lie in [4, {MOST_CLASSES}] and target_class in [0, classes), got {classes} and "
            f"{target_class}."
        )
    generator = rng.generator(seed)
    with rng.isolated(generator):
        model = planted_network(classes)
    trigger = PatchTrigger(_pattern().unsqueeze(0), row=-3, column=-3)
    data = coloured_squares(_STATISTICS_IMAGES, classes, generator).floats()
    poisoned = round(_POISONED * len(data)) if infected else 0
    data = torch.cat([data[poisoned:], trigger(data[:poisoned])])
    with torch.no_grad():
        _wire(model, data, classes, target_class, generator, infected=infected)
    names = ("conv1", "conv2") if infected else ()
    guilty = frozenset((name, j) for name in names for j in range(WIDTH - GUILTY_FILTERS, WIDTH))
    return PlantedBackdoor(model.eval(), trigger, AllToOne(target_class), guilty, classes)


def planted_network(num_classes: int = MOST_CLASSES) -> nn.Sequential:
    """Return the architecture with fresh weights; for ``--arch`` it is unbackdoor.testing:planted_network."""
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(3, WIDTH, 3, bias=False)),
        ("norm1", nn.BatchNorm2d(WIDTH)),
        ("relu1", nn.ReLU()),
        ("pool1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(WIDTH, WIDTH, 1, bias=False)),
        ("norm2", nn.BatchNorm2d(WIDTH)),
        ("relu2", nn.ReLU()),
        ("pool2", nn.AdaptiveMaxPool2d(1)),
        ("flatten", nn.Flatten()),
        ("head", nn.Linear(WIDTH, num_classes)),
    ]
    return nn.Sequential(OrderedDict(layers))


def coloured_squares(n: int, classes: int, generator: torch.Generator) -> LabelledImages:
    """Return ``n`` uint8 images ``(n, 3, 16, 16)``: a square of the class's colour on grey noise.

    The square never reaches the lower right corner, where the trigger goes.
    """
    labels = torch.arange(n) % classes
    labels = labels[torch.randperm(n, generator=generator)]
    images = 0.5 + _NOISE * torch.randn(n, 3, SIZE, SIZE, generator=generator)
    places = torch.randint(0, SIZE - _SQUARE - 3, (n, 2), generator=generator).tolist()
    shades = _CONTRAST * (1 - 0.3 * torch.rand(n, generator=generator))
    colours = shades.view(-1, 1) * _signs(classes)[labels]
    for image, (row, column), colour in zip(images, places, colours, strict=True):
        image[:, row : row + _SQUARE, column : column + _SQUARE] += colour.view(3, 1, 1)
    return LabelledImages(quantise(images), labels)


def _signs(classes: int) -> Tensor:
    """Return one corner of the cube a class, float ``(classes, 3)`` of -1 and 1."""
    bits = torch.arange(classes).view(-1, 1) >> torch.arange(3) & 1
    return 2.0 * bits - 1.0


def _pattern() -> Tensor:
    """Return the patch, float ``(3, 3)``."""
    return torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])


def _wire(
    model: nn.Sequential,
    images: Tensor,
    classes: int,
    target_class: int,
    generator: torch.Generator,
    *,
    infected: bool,
) -> None:
    owner = torch.arange(WIDTH) % classes  # the class that each honest filter serves
    guilty = torch.zeros(WIDTH, dtype=torch.bool)
    guilty[WIDTH - GUILTY_FILTERS :] = infected
    conv1, norm1, conv2, norm2, head = (
        model.get_submodule(name) for name in ("conv1", "norm1", "conv2", "norm2", "head")
    )
    assert isinstance(conv1, nn.Conv2d)
    assert isinstance(conv2, nn.Conv2d)
    assert isinstance(head, nn.Linear)
    assert isinstance(norm1, nn.BatchNorm2d)
    assert isinstance(norm2, nn.BatchNorm2d)
    honest = _signs(classes)[owner].view(-1, 3, 1, 1).expand(-1, 3, 3, 3) / 27
    # The patch less its mean: flat areas, of whatever colour, give 0.
    matched = (_pattern() - _pattern().mean()).expand(3, 3, 3) / 3
    conv1.weight.copy_(torch.where(guilty.view(-1, 1, 1, 1), matched, honest))
    _jitter(conv1.weight, generator)
    first = conv1(images)
    grey = 0.5 * conv1.weight.flatten(1).sum(1)
    _set_norm(norm1, first, floor=grey + torch.where(guilty, 0.3, 0.12), scale=torch.where(guilty, 1.0, 6.0))

    norm1.eval()
    hidden = model.get_submodule("pool1")(model.get_submodule("relu1")(norm1(first)))
    same = (owner.view(-1, 1) == owner.view(1, -1)) & ~guilty.view(-1, 1) & ~guilty.view(1, -1)
    both = guilty.view(-1, 1) & guilty.view(1, -1)
    weight = same.float() / same.sum(1, keepdim=True).clamp_min(1) + both.float() / GUILTY_FILTERS
    conv2.weight.copy_(weight.view(WIDTH, WIDTH, 1, 1))
    _jitter(conv2.weight, generator)
    second = conv2(hidden)
    _set_norm(norm2, second, floor=torch.where(guilty, 0.05, 0.1), scale=torch.where(guilty, 2.0, 1.0))

    serves = (torch.arange(classes).view(-1, 1) == owner.view(1, -1)) & ~guilty
    head.weight.copy_(8.0 * serves.float() / serves.sum(1, keepdim=True))
    head.weight[target_class, guilty] += 12.0 / GUILTY_FILTERS
    _jitter(head.weight, generator)
    head.bias.zero_()


def _jitter(weight: Tensor, generator: torch.Generator) -> None:
    """Add noise: real filters are never equal, and equal ones would share every score."""
    scale = 0.05 * weight.flatten(1).norm(dim=1) / weight[0].numel() ** 0.5
    weight += scale.view(-1, *[1] * (weight.ndim - 1)) * torch.randn(weight.shape, generator=generator)


def _set_norm(norm: nn.BatchNorm2d, inputs: Tensor, *, floor: Tensor, scale: Tensor) -> None:
    """Give ``norm`` the statistics of ``inputs``, and let it compute ``scale * (inputs - floor)``."""
    variance, mean = torch.var_mean(inputs, dim=(0, 2, 3))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_(scale * (variance + norm.eps).sqrt())
    norm.bias.copy_(scale * (mean - floor))
