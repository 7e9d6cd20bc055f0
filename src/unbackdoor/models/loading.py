"""From a model file to a working network, and back into a file of the same form."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError, MismatchedCheckpointError, UnsupportedModelError
from unbackdoor.models.checkpoint import Checkpoint, read_checkpoint, save_state_dict
from unbackdoor.models.factory import Architecture, resolve_architecture
from unbackdoor.models.normalise import NormalisedModel
from unbackdoor.models.pickle_guard import shown
from unbackdoor.models.registry import ARCHITECTURES, build

PREFIXES = ("module.", "model.", "net.", "network.", "state_dict.", "_orig_mod.")
"""What DataParallel, Lightning, torch.compile and training scripts put in front of every name."""

MEAN, STD, INNER = "normalise.mean", "normalise.std", "network."
"""The names that ``NormalisedModel`` gives its tensors."""

COUNTER = "num_batches_tracked"
"""Batch norm's step counter, which older checkpoints lack and inference does not use."""

_STEMS = ("conv1.weight", "features.0.weight")
_HEADS = ("linear.weight", "fc.weight", "classifier.weight")
_SHOWN_KEYS = 5


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network with the weights of a file.

    Args:
        model: On the CPU, in float32 and eval mode; takes images in [0, 1].
        checkpoint: The file as it was read.
        architecture: How the network was built.
        num_classes: Outputs of the network.
        normalisation: Where it comes from: the file, the caller's mean and std, or there is none.
        key_prefix: What was stripped from the front of every name.
    """

    model: nn.Module
    checkpoint: Checkpoint
    architecture: Architecture
    num_classes: int
    normalisation: Literal["checkpoint", "option", "none"]
    key_prefix: str

    def __repr__(self) -> str:
        """Say what was loaded; the network and its tensors would fill the screen."""
        weights = sum(tensor.numel() for tensor in self.model.parameters())
        return (
            f"LoadedModel({self.architecture.name}, {self.num_classes} classes, {weights:,} weights, "
            f"normalisation: {self.normalisation}, {self.checkpoint!r})"
        )


def load_model(
    path: Path,
    arch: str,
    *,
    num_classes: int | None = None,
    width: int | None = None,
    in_channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> LoadedModel:
    """Build the architecture ``arch`` and give it the weights in ``path``.

    For our architectures, width, channels, classes, stem and layout follow from the tensors. A ResNet of
    torchvision with a 3x3 stem is taken to have no max-pooling; the file cannot tell.

    Args:
        path: A safetensors or ``torch.save`` file; read by ``checkpoint.read_checkpoint``.
        arch: A name of ours, ``package.module:function`` or ``path/to/file.py:function``.
        num_classes: Expected number of classes; handed to a function of the user that takes it.
        width: Expected channels of the first stage.
        in_channels: Expected channels of the images.
        mean: Channel means in [0, 1] that training subtracted, if the file does not hold them.
        std: Channel standard deviations that training divided by.

    Raises:
        InvalidInputError: If an option is wrong or the file is missing.
        UnsafeFileError: If the file is refused; nothing in it is executed.
        UnsupportedModelError: If the user's code fails.
        MismatchedCheckpointError: If names, shapes or the number of classes do not fit.
    """
    if (mean is None) != (std is None):
        raise InvalidInputError("mean and std belong together, got only one of them; give both or neither.")
    given = {"num_classes": num_classes, "width": width, "in_channels": in_channels}
    asked = {name: value for name, value in given.items() if value is not None}
    for name, value in asked.items():
        if value < 1:
            raise InvalidInputError(f"{name} must be at least 1, got {value}.")
    architecture = resolve_architecture(arch)
    checkpoint = read_checkpoint(path)
    views = list(_views(checkpoint.tensors))
    if architecture.is_user_code:
        network, view = _load_user_network(architecture, asked, views, path)
    else:
        network, view = _load_own_network(architecture, asked, views[-1], path)
    model, normalisation = _with_normalisation(network, view, mean, std, path)
    return LoadedModel(
        model=model.eval(),
        checkpoint=checkpoint,
        architecture=architecture,
        num_classes=_classes_of(network, num_classes, path, ask=architecture.is_user_code),
        normalisation=normalisation,
        key_prefix=view.prefix,
    )


def save_like(loaded: LoadedModel, model: nn.Module, path: Path) -> None:
    """Write a changed copy of ``loaded.model`` as safetensors, under the names of the input file.

    Without the stripped prefix, and with normalisation tensors or batch counters only where the input
    had them.

    Args:
        loaded: What ``load_model`` returned.
        model: A module of the same structure, such as a purified copy; layers may be narrower.
        path: Where to; must not be the input file.

    Raises:
        InvalidInputError: If ``path`` is the input file, cannot be written, or the structure differs.
    """
    tensors: dict[str, Tensor] = dict(model.state_dict())
    if set(tensors) != set(loaded.model.state_dict()):
        odd = sorted(set(tensors) ^ set(loaded.model.state_dict()))
        raise InvalidInputError(
            f"the model to save differs from the loaded one in {_listing(odd)}; save a copy of that one."
        )
    if loaded.normalisation == "option":
        tensors = {name.removeprefix(INNER): t for name, t in tensors.items() if name.startswith(INNER)}
    if not any(name.endswith(COUNTER) for name in loaded.checkpoint.tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTER)}
    save_state_dict(tensors, path, never=loaded.checkpoint.path)


# --- Names


@dataclass(frozen=True, eq=False)
class _View:
    """The tensors of a checkpoint after some prefixes were stripped."""

    prefix: str
    tensors: Mapping[str, Tensor]
    mean: Tensor | None = None
    std: Tensor | None = None


MOST_PREFIXES = 16
"""Nobody wraps a network so often; each wrapping that is removed costs a copy of all names."""


def _views(tensors: Mapping[str, Tensor]) -> Iterator[_View]:
    """Yield the checkpoint as it is, then with one more wrapping removed each time."""
    view = _View("", tensors)
    for _ in range(MOST_PREFIXES):
        yield view
        names = view.tensors.keys()
        rest = names - {MEAN, STD}
        if len(names) == len(rest) + 2 and rest and all(name.startswith(INNER) for name in rest):
            inner = {name.removeprefix(INNER): view.tensors[name] for name in names if name in rest}
            view = _View(view.prefix, inner, view.tensors[MEAN], view.tensors[STD])
            continue
        prefix = next((p for p in PREFIXES if all(name.startswith(p) and name != p for name in names)), "")
        if not prefix:
            return
        stripped = {name.removeprefix(prefix): tensor for name, tensor in view.tensors.items()}
        view = _View(view.prefix + prefix, stripped, view.mean, view.std)


def _without_counters(names: Mapping[str, Tensor]) -> set[str]:
    return {name for name in names if not name.endswith(COUNTER)}


# --- Our architectures


def _load_own_network(
    architecture: Architecture, asked: Mapping[str, int], view: _View, path: Path
) -> tuple[nn.Module, _View]:
    inferred = _infer(architecture.name, view.tensors)
    for name, value in asked.items():
        if inferred.get(name, value) != value:
            raise MismatchedCheckpointError(
                f"{path} has {name} {inferred[name]} but {value} was given; leave that out or check the file."
            )
    network = _on_meta(architecture.name, {**inferred, **asked}, path)
    expected = network.state_dict()
    problems = _differences(expected, view.tensors)
    if problems:
        raise _mismatch(path, architecture.name, problems, _fitting(view.tensors))
    network.load_state_dict(_fitted(expected, view.tensors), strict=True, assign=True)
    return network, view


def _infer(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the options of one of our architectures off the shapes of its tensors."""
    options: dict[str, Any] = {}
    stem = next((tensors[key] for key in _STEMS if key in tensors), None)
    head = next((tensors[key] for key in _HEADS if key in tensors), None)
    if stem is not None and stem.ndim == 4 and stem.numel():
        options |= {"width": stem.shape[0], "in_channels": stem.shape[1]}
    if head is not None and head.ndim == 2 and head.numel():
        options["num_classes"] = head.shape[0]
    if name.startswith("resnet"):
        large = stem is not None and stem.ndim == 4 and stem.shape[2] == 7
        torchvision = any(".downsample." in key or key.startswith("fc.") for key in tensors)
        options["stem"] = "7x7" if large else "3x3"
        options["layout"] = "torchvision" if torchvision else "cifar"
    return options


class _NoRandomWeights(TorchFunctionMode):
    """Leave ``normal_`` out: on the meta device it only imports the compiler of PyTorch, for seconds."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the intercepted function returns
        return args[0] if func is Tensor.normal_ else func(*args, **(kwargs or {}))


def _on_meta(name: str, options: Mapping[str, Any], path: Path) -> nn.Module:
    """Build without allocating anything: the shapes come from a stranger's file."""
    try:
        with rng.isolated(rng.generator(0)), torch.device("meta"), _NoRandomWeights():
            return build(name, **options)
    except (RuntimeError, ValueError) as error:
        raise MismatchedCheckpointError(
            f"{path} does not fit {name!r}: it cannot be built with {dict(options)}; check the architecture."
        ) from error


def _fitting(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return which of our architectures these tensors fit."""
    names = []
    for name in ARCHITECTURES:
        try:
            network = _on_meta(name, _infer(name, tensors), Path())
        except (InvalidInputError, MismatchedCheckpointError):
            continue
        if not _differences(network.state_dict(), tensors):
            names.append(name)
    return names


# --- Architectures of the user


def _load_user_network(
    architecture: Architecture, asked: Mapping[str, int], views: Sequence[_View], path: Path
) -> tuple[nn.Module, _View]:
    # Unlike ours, other people's constructors may compute with their weights, so no meta device here.
    with rng.isolated(rng.generator(0)):
        network = architecture.build(**asked).cpu().float()
    expected = network.state_dict()
    names = _without_counters(expected)
    # Their names may begin with "model." themselves: the least stripped view that fits is the right one.
    view = next((view for view in views if _without_counters(view.tensors) == names), views[-1])
    problems = _differences(expected, view.tensors)
    if problems:
        raise _mismatch(path, architecture.name, problems, [])
    try:
        network.load_state_dict(_fitted(expected, view.tensors), strict=True)
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"architecture {architecture.name!r} does not take the tensors of {path} ({error}); mend it."
        ) from error
    return network, view


SIZES = (32, 28, 64, 224)
"""Sides of the images on which a network of the user is asked how many outputs it has."""


def _classes_of(network: nn.Module, num_classes: int | None, path: Path, *, ask: bool) -> int:
    outputs = [module.out_features for module in network.modules() if isinstance(module, nn.Linear)]
    found = _outputs_of(network) if ask else outputs[-1]
    outputs = outputs if found is None else [found]
    if num_classes is None and not outputs:
        raise InvalidInputError(
            f"the number of classes of {path} is not clear from the layers; give num_classes."
        )
    if num_classes is None:
        return outputs[-1]
    if found is not None and num_classes != found:
        raise MismatchedCheckpointError(
            f"{path} has {found} classes but num_classes {num_classes} was given; leave that out or check "
            "the file."
        )
    return num_classes


def _outputs_of(network: nn.Module) -> int | None:
    """Return how many logits a network in eval mode has, by asking it; None if it takes no usual size."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    # Copies: some networks count or keep statistics in their buffers, even in eval mode.
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    for size in SIZES:
        images = torch.zeros(1, 3 if first is None else first.in_channels, size, size)
        try:
            with torch.no_grad(), rng.isolated(rng.generator(0)):
                logits = functional_call(network, buffers, (images,))
        except Exception:  # noqa: BLE001, S112 - networks that take one size only say so as they like
            continue
        return int(logits.shape[1]) if isinstance(logits, Tensor) and logits.ndim == 2 else None
    return None


# --- Comparing and converting


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Return phrases about missing, unexpected and wrong-shaped tensors; none if all fit."""
    wanted, present = _without_counters(expected), _without_counters(found)
    phrases = []
    if wanted - present:
        phrases.append(f"{len(wanted - present)} missing: {_listing(sorted(wanted - present))}")
    if present - wanted:
        phrases.append(f"{len(present - wanted)} unexpected: {_listing(sorted(present - wanted))}")
    wrong = [name for name in expected if name in found and not _fits(expected[name], found[name])]
    if wrong:
        texts = [
            f"{shown(name)} {_kind(found[name])} instead of {_kind(expected[name])}"
            for name in wrong[:_SHOWN_KEYS]
        ]
        phrases.append(f"{len(wrong)} of another shape: {', '.join(texts)}{_more(wrong)}")
    return phrases


def _fits(expected: Tensor, found: Tensor) -> bool:
    return expected.shape == found.shape and expected.is_floating_point() == found.is_floating_point()


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _listing(names: Sequence[str]) -> str:
    return ", ".join(shown(name) for name in names[:_SHOWN_KEYS]) + _more(names)


def _more(names: Sequence[str]) -> str:
    return ", ..." if len(names) > _SHOWN_KEYS else ""


def _mismatch(
    path: Path, name: str, problems: Sequence[str], fitting: Sequence[str]
) -> MismatchedCheckpointError:
    advice = (
        f"it fits {' or '.join(repr(other) for other in fitting)}, name that one"
        if fitting
        else "name the architecture that it was trained with, with the same number of classes"
    )
    return MismatchedCheckpointError(f"{path} does not fit {name!r}: {'; '.join(problems)}; {advice}.")


def _fitted(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in the types of the network; half precision becomes float32."""
    return {
        name: found[name].to(like.dtype, copy=True)
        if name in found
        else torch.zeros(like.shape, dtype=like.dtype)
        for name, like in expected.items()
    }


# --- Normalisation


def _with_normalisation(
    network: nn.Module, view: _View, mean: Sequence[float] | None, std: Sequence[float] | None, path: Path
) -> tuple[nn.Module, Literal["checkpoint", "option", "none"]]:
    own = view.mean is not None or {MEAN, STD} <= view.tensors.keys()
    if own and mean is not None:
        raise InvalidInputError(
            f"{path} carries its own normalisation; leave --normalize, --mean and --std out."
        )
    if view.mean is not None and view.std is not None:
        values = [tensor.double().flatten().tolist() for tensor in (view.mean, view.std)]
        _check_channels(values[0], network, f"the normalisation in {path}")
        return NormalisedModel(network, *values), "checkpoint"
    if own:
        return network, "checkpoint"
    if mean is None or std is None:
        return network, "none"
    _check_channels(mean, network, "mean")
    return NormalisedModel(network, mean, std), "option"


def _check_channels(mean: Sequence[float], network: nn.Module, source: str) -> None:
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and len(mean) not in (1, first.in_channels):
        raise InvalidInputError(
            f"{source} has {len(mean)} channels but the network takes {first.in_channels}; give as many."
        )
