"""How a forward pass is run: device, memory layout, precision, and the modes that must be restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.types import LabelledImages, as_float

Precision = Literal["auto", "fp32", "bf16"]
EVALUATION_BATCH = 250

NO_CLASS = -1
"""What a network predicts whose logits are not numbers."""


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer (the CPU if it has none)."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def device_named(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` takes CUDA where there is some.

    Raises:
        InvalidInputError: If there is no such device, or not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidInputError(f"unknown device {name!r}; use cpu, cuda or auto.") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(f"device {name!r} is not available here; use cpu or auto.") from error
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Say whether bf16 matrix products are faster than fp32 ones on ``device``.

    On a CPU that holds with AMX or AVX512_BF16 only; elsewhere bf16 is emulated and slower.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type != "cpu":
        return False
    capabilities = torch.backends.cpu.get_cpu_capability()
    if capabilities not in ("AVX512", "AMX", "AVX10_2"):
        return False
    try:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except AttributeError:  # private names: without them, stay with fp32
        return False


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """Resolve ``"auto"`` to what the hardware has."""
    return precision == "bf16" or (precision == "auto" and has_fast_bf16(device))


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return a context that runs matrix products in bf16 where asked for, or sensible (``"auto"``)."""
    if uses_bf16(precision, device):
        # The weight cache would keep stale casts across functional calls with substituted weights.
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
    return nullcontext()


def memory_format_for(model: nn.Module) -> torch.memory_format:
    """Return the memory layout in which ``model`` runs fastest and safely.

    Channels-last is faster throughout. On CPUs, torch 2.13 corrupts the heap in the backward pass of
    channels-last convolutions whose channel count is no multiple of 16, for odd batches on several
    threads; such networks keep the default layout.
    """
    if device_of(model).type == "cpu":
        odd = any(p.ndim == 4 and p.shape[0] % 16 for p in model.parameters())
        return torch.contiguous_format if odd else torch.channels_last
    return torch.channels_last


def arrange(model: nn.Module) -> nn.Module:
    """Put the weights of ``model``, in place, into the layout that ``memory_format_for`` names."""
    # torch's annotations lack this overload of Module.to.
    arranged: nn.Module = model.to(memory_format=memory_format_for(model))  # type: ignore[call-overload]
    return arranged


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put every module into train or eval mode inside the block; restore each flag afterwards."""
    flags = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor, *, batch_size: int = EVALUATION_BATCH) -> Tensor:
    """Run ``model`` in eval mode and fp32 on all ``images``.

    Args:
        model: Network taking float images in [0, 1]; its modes are restored.
        images: ``(N, C, H, W)``, uint8 or float32 in [0, 1], on any device.
        batch_size: Images per forward pass.

    Returns:
        Logits ``(N, K)`` on the model's device.
    """
    device, layout = device_of(model), memory_format_for(model)
    with mode(model, training=False):
        parts = [
            model(as_float(part.to(device)).contiguous(memory_format=layout))
            for part in images.split(batch_size)
        ]
    return torch.cat(parts) if parts else torch.empty(0, 0, device=device)


def predictions_of(model: nn.Module, images: Tensor, *, batch_size: int = EVALUATION_BATCH) -> Tensor:
    """Return the predicted classes, int64 ``(N,)`` on the CPU; -1 where the model's answer is no number.

    Otherwise a network that was ruined would count as right on the first class.
    """
    logits = logits_of(model, images, batch_size=batch_size)
    return logits.argmax(1).masked_fill(logits.isnan().any(1), NO_CLASS).cpu()


def accuracy_of(model: nn.Module, data: LabelledImages, *, batch_size: int = EVALUATION_BATCH) -> float:
    """Return the fraction of ``data`` that ``model`` classifies correctly in eval mode."""
    predictions = predictions_of(model, data.images, batch_size=batch_size)
    return float((predictions == data.labels.cpu()).float().mean())


def check_channels(model: nn.Module, data: LabelledImages) -> None:
    """Fail early, and in words, if ``model`` was not made for images with so many channels.

    Running it on one image does not tell: a normalisation in front of it spreads one channel over three.

    Raises:
        InvalidInputError: If the first convolution takes another number of channels.
    """
    first = next((p for p in model.parameters() if p.ndim == 4), None)
    channels = data.images.shape[1]
    if first is not None and first.shape[1] > 1 and first.shape[1] != channels:
        raise InvalidInputError(
            f"the images have {channels} channel(s), the model's first convolution takes {first.shape[1]}; "
            "give images of the kind that the model was trained on."
        )


def check_fits(model: nn.Module, data: LabelledImages, *, purpose: str, at_least: int = 1) -> int:
    """Check, on one image, that ``model`` and ``data`` belong together; return the model's outputs K.

    Args:
        model: Network taking float images in [0, 1]; left untouched.
        data: The images and labels that it is to be used on.
        purpose: What for, for the message.
        at_least: Smallest number of images.

    Raises:
        InvalidInputError: If there are fewer images, or a label has no output.
        UnsupportedModelError: If the model cannot be run on such an image or returns no logits ``(N, K)``.
    """
    if len(data) < at_least:
        raise InvalidInputError(f"{purpose} needs at least {at_least} image(s), got {len(data)}; give more.")
    try:
        with torch.no_grad(), mode(model, training=False), torch.random.fork_rng(devices=[]):
            logits = model(as_float(data.images[:1].to(device_of(model))))
    except Exception as error:  # a network of the user's own may check its inputs as its author likes
        raise UnsupportedModelError(
            f"the model cannot be run on one image of shape {tuple(data.images.shape[1:])} "
            f"({_why_not(model, data, error)}."
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedModelError(
            f"the model must return one tensor of logits (N, K), got {shape}; wrap it so that it does."
        )
    largest = int(data.labels.max()) if len(data) else 0
    if largest >= logits.shape[1]:
        raise InvalidInputError(
            f"the labels go up to {largest}, but the model has {logits.shape[1]} outputs, so they must be "
            f"below {logits.shape[1]}; give the data that the model was trained for."
        )
    return int(logits.shape[1])


def _why_not(model: nn.Module, data: LabelledImages, error: Exception) -> str:
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = data.images.shape[1]
    if first is not None and first.in_channels != channels:
        return (
            f"its first convolution takes {first.in_channels} channel(s), not {channels}); give images of "
            "the kind that it was trained on"
        )
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"{said}); check the architecture and the images"
