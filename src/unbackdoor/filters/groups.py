"""Find the filters of any network by watching one forward pass: the only architecture-aware module.

A filter is one output channel of a convolution or linear layer, together with the scale and shift of the
norm that follows it. Names and module types are never looked at: the pass runs under a dispatch mode that
sees each primitive operation and which parameters enter it, so control flow, functional layers and
unusual module layouts make no difference. What cannot be treated is listed with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from unbackdoor import rng
from unbackdoor.compute import device_of, mode
from unbackdoor.errors import UnsupportedModelError

NormKind = Literal["batch", "layer", "group"]


@dataclass(frozen=True)
class Norm:
    """The norm after a layer, by the names of its tensors in the model; None where it has none.

    Args:
        kind: Which statistics it uses.
        weight: Scale, ``(C,)``.
        bias: Shift, ``(C,)``.
        running_mean: Running mean, ``(C,)``.
        running_var: Running variance, ``(C,)``.
        eps: Added to the variance.
        foldable: It is a batch norm with running statistics whose input is the layer's output itself, and
            nothing else reads that output: in eval mode layer and norm are one affine map per filter.
    """

    kind: NormKind
    weight: str | None
    bias: str | None
    running_mean: str | None
    running_var: str | None
    eps: float
    foldable: bool


@dataclass(frozen=True)
class FilterGroup:
    """The filters of one layer.

    Args:
        name: The layer's name: its weight's name less ``.weight``.
        kind: ``conv`` or ``linear``.
        weight: Name of the weight, ``(filters, ...)``.
        bias: Name of the bias, ``(filters,)``, or None.
        filters: Number of output channels.
        norms: The norms that read this layer's output, channel by channel.
        is_head: Its output is the model's, or is added to that of other heads: a filter is a class, and is
            never removed.
        reads: The layers whose filters, channel by channel, add up to its input, in the order in which they
            run: one in a chain, several behind residual sums; none where its input is the image, or is put
            together in another way.
    """

    name: str
    kind: Literal["conv", "linear"]
    weight: str
    bias: str | None
    filters: int
    norms: tuple[Norm, ...] = ()
    is_head: bool = False
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Untreated:
    """A parameter that belongs to no removable filter, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class FilterMap:
    """All filters of a network in the order in which they run, and what is left over."""

    groups: tuple[FilterGroup, ...]
    untreated: tuple[Untreated, ...] = ()

    @property
    def prunable(self) -> tuple[FilterGroup, ...]:
        """Every group but the head."""
        return tuple(group for group in self.groups if not group.is_head)

    def require_prunable(self) -> tuple[FilterGroup, ...]:
        """Return every group but the head.

        Raises:
            UnsupportedModelError: If there is none.
        """
        if not self.prunable:
            raise UnsupportedModelError(
                "the network has no layer before its head whose filters could be removed, so that there is "
                "nothing to suspect; give a network with hidden layers."
            )
        return self.prunable

    @property
    def head(self) -> FilterGroup | None:
        """The layer whose outputs are the logits (the first of several that are summed), or None."""
        return next((group for group in self.groups if group.is_head), None)

    def group(self, name: str) -> FilterGroup:
        """Return the group called ``name``.

        Raises:
            UnsupportedModelError: If there is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise UnsupportedModelError(
            f"the model has no layer {name!r} with filters; it has {', '.join(g.name for g in self.groups)}."
        )


def find_filters(model: nn.Module, example: Tensor) -> FilterMap:
    """Trace ``model`` on ``example`` and return its filters.

    Args:
        model: Any network that maps ``example`` to logits ``(N, K)``; left untouched.
        example: Float images ``(N, C, H, W)`` in [0, 1]; one is enough.

    Raises:
        UnsupportedModelError: If the forward pass fails, does not return one tensor ``(N, K)``, or runs
            through no convolution or linear layer.
    """
    # Leaf copies that require gradients keep torch from replacing attention by one fused, opaque kernel.
    parameters = {
        name: p.detach().requires_grad_(p.is_floating_point()) for name, p in model.named_parameters()
    }
    # Copies too: some networks count or keep statistics in their buffers, even in eval mode.
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    tracer = _Tracer(names={id(t): name for name, t in {**buffers, **parameters}.items()})
    with mode(model, training=False), torch.enable_grad(), rng.isolated(rng.generator(0)), tracer:
        try:
            output = functional_call(
                model, {**parameters, **buffers}, (example[:1].to(device_of(model)),), tie_weights=True
            )
        except Exception as error:
            raise UnsupportedModelError(
                f"the model cannot be run on one image of shape {tuple(example.shape[1:])} ({error}); "
                "check the architecture and the image size."
            ) from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UnsupportedModelError(
            f"the model must return one tensor of logits (N, K), got {shape}; wrap it so that it does."
        )
    return _assemble(tracer, parameters, output)


@dataclass(frozen=True)
class _Origin:
    """A tensor whose channel c is a function of filter c of one layer alone."""

    layer: str
    axis: int
    is_output: bool
    keeps_zero: bool


@dataclass(frozen=True)
class _Stream:
    """A tensor whose channel c is the sum of what the filters c of some layers became."""

    axis: int
    layers: frozenset[str]


@dataclass
class _Layer:
    """What the trace has learnt about one layer so far."""

    kind: Literal["conv", "linear"]
    weight: str
    bias: str | None
    filters: int
    norms: list[_NormCall] = field(default_factory=list)
    readers: int = 0
    reads: frozenset[str] = frozenset()
    problem: str = ""


@dataclass(frozen=True)
class _NormCall:
    kind: NormKind
    names: tuple[str | None, str | None, str | None, str | None]
    eps: float
    origin: _Origin | None
    problem: str = ""

    @property
    def key(self) -> tuple[str | None, ...]:
        return self.names


_SKIP_WEIGHT_OPS = {"t", "transpose", "permute", "detach", "alias", "view", "expand", "clone", "_to_copy"}
_ZERO_KEEPING = {
    "relu", "relu_", "gelu", "silu", "silu_", "hardswish", "hardswish_", "leaky_relu", "leaky_relu_", "elu",
    "elu_", "tanh", "hardtanh", "hardtanh_", "dropout", "native_dropout", "clone", "contiguous", "alias",
    "detach", "_to_copy", "max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "_adaptive_avg_pool2d",
    "adaptive_avg_pool2d", "mean", "sum", "upsample_nearest2d", "upsample_bilinear2d", "constant_pad_nd",
    "mish", "mish_", "prelu", "_prelu_kernel", "mkldnn_max_pool2d", "adaptive_max_pool2d",
}  # fmt: skip
_ELEMENTWISE = {
    "sigmoid", "hardsigmoid", "softplus", "_log_softmax", "_softmax", "log_softmax", "softmax", "exp", "log",
}  # fmt: skip
_SUMS = {"add", "add_", "sub", "sub_"}
_CLASSWISE = _SUMS | {"mul", "mul_", "div", "div_", "_log_softmax", "_softmax", "clone", "_to_copy"}
_VIEWS = {"view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "flatten"}
_BATCH_NORMS = {
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "batch_norm",
    "_batch_norm_with_update", "_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm",
}  # fmt: skip
_PRODUCTS = {"mul", "mul_", "div", "div_"}
_NORMS = _BATCH_NORMS | {"native_layer_norm", "native_group_norm"}
_LAYERS_AND_NORMS = _NORMS | {"convolution", "addmm", "mm", "linear", "bmm"}  # fmt: skip


class _Tracer(TorchDispatchMode):
    """Follows channels from layers to norms and to the output."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.computed: dict[int, str] = {}
        self.transposed: set[int] = set()
        self.origins: dict[int, _Origin] = {}
        self.sums: dict[int, frozenset[str]] = {}
        self.streams: dict[int, _Stream] = {}
        self.layers: dict[str, _Layer] = {}
        self.norms: list[_NormCall] = []
        self.uses: dict[str, set[str]] = {}
        # Ids are only unique among living objects, so every tensor of the pass is kept.
        self.alive: list[Any] = []

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        self.alive.append((args, result))
        op = func.overloadpacket.__name__
        inputs = _tensors((*args, *(kwargs or {}).values()))
        for tensor in inputs:
            if name := self.names.get(id(tensor)) or self.computed.get(id(tensor)):
                self.uses.setdefault(name, set()).add(op)
        outputs = _tensors((result,))
        if outputs and not self._is_weight_view(op, inputs, outputs):
            stream = self._stream(op, args, inputs, outputs[0])
            self._record(op, args, inputs, outputs[0])
            self._carry(stream, outputs[0])
        return result

    def _record(self, op: str, args: tuple[Any, ...], inputs: list[Tensor], output: Tensor) -> None:
        for tensor in inputs:
            origin = self.origins.get(id(tensor))
            if origin is not None and origin.is_output:
                self.layers[origin.layer].readers += 1
        if op == "convolution":
            self._layer("conv", args[0], args[1], args[2], output, problem="transposed" if args[6] else "")
        elif op in ("addmm", "mm", "linear", "bmm") and self._linear(op, args, output):
            pass
        elif op in _BATCH_NORMS:
            # A norm that uses the batch's statistics even in eval mode has no running ones to speak of.
            own = op == "_batch_norm_with_update" or args[5:6] == (True,)
            statistics = (None, None) if own else args[3:5]
            self._norm("batch", args[0], (*args[1:3], *statistics), _float_after(args, 5), axis=1)
        elif op == "native_layer_norm":
            problem = "" if len(args[1]) == 1 else "a layer norm over several axes follows it"
            last = args[0].ndim - 1
            self._norm("layer", args[0], (args[2], args[3], None, None), args[4], axis=last, problem=problem)
        elif op == "native_group_norm":
            self._norm("group", args[0], (args[1], args[2], None, None), args[7], axis=1)
        else:
            self._follow(op, args, inputs, output)

    def _is_weight_view(self, op: str, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        if len(inputs) == 0 or op in _LAYERS_AND_NORMS:
            return False
        sources = [self.names.get(id(t)) or self.computed.get(id(t)) for t in inputs]
        if not all(sources):
            return False
        source = str(sources[0])
        plain = len(inputs) == 1 and id(inputs[0]) in self.names and op in _SKIP_WEIGHT_OPS
        for output in outputs:
            if plain:
                self.names[id(output)] = source
                flipped = op in ("t", "transpose", "permute")
                if flipped != (id(inputs[0]) in self.transposed):
                    self.transposed.add(id(output))
            else:
                # In place on a copy of a weight: it is no longer the stored one.
                self.names.pop(id(output), None)
                self.computed[id(output)] = source
        return True

    def _linear(self, op: str, args: tuple[Any, ...], output: Tensor) -> bool:
        if op == "linear":
            source, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
        elif op == "addmm":
            bias, source, weight = args[:3]
        else:
            source, weight, bias = args[0], args[1], None
        if id(weight) not in self.names and id(weight) not in self.computed:
            return False
        stored_rows_are_filters = (op == "linear") != (id(weight) in self.transposed)
        self._layer(
            "linear", source, weight, bias, output,
            problem="" if stored_rows_are_filters else "its weight is stored with inputs as rows",
        )  # fmt: skip
        return True

    def _layer(
        self,
        kind: Literal["conv", "linear"],
        source: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output: Tensor,
        *,
        problem: str,
    ) -> None:
        name = self.names.get(id(weight))
        bias_name = None if bias is None else self.names.get(id(bias))
        if name is None:
            name = self.computed.get(id(weight), "")
            problem = f"its weight is computed from {name!r} in every pass" if name else "no stored weight"
        elif problem == "transposed":
            problem = "it is a transposed convolution"
        elif bias is not None and bias_name is None:
            problem = "its bias is no parameter of its own"
        key = name.removesuffix(".weight") or "<weight that is no parameter>"
        axis = 1 if kind == "conv" else output.ndim - 1
        layer = self.layers.setdefault(key, _Layer(kind, name, bias_name, output.shape[axis]))
        layer.problem = layer.problem or problem
        self.origins[id(output)] = _Origin(key, axis, is_output=True, keeps_zero=True)
        stream = self.streams.get(id(source))
        if stream is not None and stream.axis == (1 if kind == "conv" else source.ndim - 1):
            layer.reads |= stream.layers

    def _norm(
        self,
        kind: NormKind,
        source: Tensor,
        tensors: Sequence[Tensor | None],
        eps: float,
        *,
        axis: int,
        problem: str = "",
    ) -> None:
        names = tuple(None if t is None else self.names.get(id(t)) for t in tensors)
        if any(t is not None and n is None for t, n in zip(tensors, names, strict=True)):
            problem = "the tensors of the norm after it are no parameters of their own"
        origin = self.origins.get(id(source))
        if origin is not None and origin.axis != axis:
            problem = "the norm after it runs over another axis"
        call = _NormCall(kind, (names[0], names[1], names[2], names[3]), float(eps), origin, problem)
        self.norms.append(call)
        if origin is not None:
            self.layers[origin.layer].norms.append(call)

    def _stream(self, op: str, args: tuple[Any, ...], inputs: list[Tensor], output: Tensor) -> _Stream | None:
        """Return what flows through an operation that is no layer, or None where it is not followed."""
        sources = [t for t in inputs if id(t) not in self.names and id(t) not in self.computed]
        if op in _PRODUCTS:  # what gates a stream does not add to it
            sources = [t for t in sources if t.shape == output.shape][:1]
        found = [self.streams.get(id(t)) for t in sources]
        axes = {
            None if stream is None else _stream_axis(op, args, source, output, stream.axis)
            for stream, source in zip(found, sources, strict=True)
        }
        axis = axes.pop() if len(axes) == 1 else None
        if axis is None:
            return None
        return _Stream(axis, frozenset().union(*(stream.layers for stream in found if stream)))

    def _carry(self, stream: _Stream | None, output: Tensor) -> None:
        origin = self.origins.get(id(output))
        if origin is not None and origin.is_output:
            stream = _Stream(origin.axis, frozenset({origin.layer}))
        # An in-place operation returns its input: what was known of that tensor no longer holds.
        self.streams.pop(id(output), None)
        if stream is not None:
            self.streams[id(output)] = stream

    def summands(self, tensor: Tensor) -> frozenset[str]:
        """Return the layers whose outputs, channel by channel, add up to ``tensor``; empty if unknown."""
        origin = self.origins.get(id(tensor))
        return self.sums.get(id(tensor), frozenset()) if origin is None else frozenset({origin.layer})

    def _follow(self, op: str, args: tuple[Any, ...], inputs: list[Tensor], output: Tensor) -> None:
        sources = [t for t in inputs if id(t) not in self.names and id(t) not in self.computed]
        origins = {self.origins.get(id(t)) for t in sources}
        layers = [self.summands(t) for t in sources]
        # An in-place operation returns its input: what was known of that tensor no longer holds.
        self.origins.pop(id(output), None)
        self.sums.pop(id(output), None)
        if all(layers) and (op in _SUMS or (len(layers) == 1 and op in _CLASSWISE)) and output.ndim == 2:
            self.sums[id(output)] = frozenset().union(*layers)
        origin = origins.pop() if len(origins) == 1 else None
        if origin is None:
            return
        axis = _axis_after(op, args, sources[0], output, origin.axis)
        if axis is None:
            return
        keeps_zero = origin.keeps_zero and (op not in _ELEMENTWISE)
        self.origins[id(output)] = _Origin(origin.layer, axis, is_output=False, keeps_zero=keeps_zero)


def _tensors(values: tuple[Any, ...]) -> list[Tensor]:
    flat = [v for value in values for v in (value if isinstance(value, (tuple, list)) else (value,))]
    return [value for value in flat if isinstance(value, Tensor)]


def _float_after(args: tuple[Any, ...], start: int) -> float:
    floats = [value for value in args[start:] if isinstance(value, float)]
    return floats[-1] if floats else 1e-5


def _axis_after(op: str, args: tuple[Any, ...], source: Tensor, output: Tensor, axis: int) -> int | None:
    """Return where the channel axis of ``source`` is in ``output``, or None if it is not followed."""
    if op in ("permute", "transpose", "t"):
        if op == "permute":
            order = [d % source.ndim for d in args[1]]
        else:
            a, b = (args[1] % source.ndim, args[2] % source.ndim) if op == "transpose" else (0, 1)
            order = list(range(source.ndim))
            order[a], order[b] = order[b], order[a]
        return order.index(axis)
    if op in _VIEWS or op in ("mean", "sum") or output.ndim != source.ndim:
        return _axis_by_layout(source, output, axis) if op in (_VIEWS | {"mean", "sum"}) else None
    known = op in _ZERO_KEEPING or op in _ELEMENTWISE or op in ("mul", "div", "mul_", "div_")
    return axis if known and output.shape[axis] == source.shape[axis] else None


def _stream_axis(op: str, args: tuple[Any, ...], source: Tensor, output: Tensor, axis: int) -> int | None:
    if op in _SUMS or op in _NORMS:
        return axis if source.shape == output.shape else None
    return _axis_after(op, args, source, output, axis)


def _axis_by_layout(source: Tensor, output: Tensor, axis: int) -> int | None:
    channels = source.shape[axis]
    before = math.prod(source.shape[:axis])
    after = math.prod(source.shape[axis + 1 :])
    for candidate, size in enumerate(output.shape):
        if size != channels or math.prod(output.shape[:candidate]) != before:
            continue
        # A reduction over the later axes shrinks them; a view keeps their product.
        if math.prod(output.shape[candidate + 1 :]) in (after, 1):
            return candidate
    return None


def _assemble(tracer: _Tracer, parameters: Mapping[str, Tensor], output: Tensor) -> FilterMap:
    heads = tracer.summands(output)
    feeders: dict[tuple[str | None, ...], set[str | None]] = {}
    for call in tracer.norms:
        feeders.setdefault(call.key, set()).add(call.origin.layer if call.origin else None)
    groups, untreated = [], []
    for name, layer in tracer.layers.items():
        reason = layer.problem or _tensor_problem(layer, parameters) or _norm_problem(layer, feeders)
        if reason:
            untreated.append(Untreated(name, reason))
            continue
        groups.append(
            FilterGroup(
                name=name,
                kind=layer.kind,
                weight=layer.weight,
                bias=layer.bias,
                filters=layer.filters,
                norms=tuple(dict.fromkeys(_norm_of(call, layer) for call in layer.norms)),
                is_head=name in heads,
                reads=tuple(other for other in tracer.layers if other in layer.reads),
            )
        )
    if not tracer.layers:
        raise UnsupportedModelError("the model runs through no convolution or linear layer.")
    if not heads:
        untreated.append(
            Untreated("<output>", "no layer yields the logits directly, so none is kept as head")
        )
    return FilterMap(tuple(groups), (*untreated, *_leftovers(tracer, parameters)))


def _tensor_problem(layer: _Layer, parameters: Mapping[str, Tensor]) -> str:
    for name in (layer.weight, layer.bias):
        if name is not None and name not in parameters:
            return f"{name} is a buffer, no parameter"
        if name is not None and len(parameters[name]) != layer.filters:
            return f"{name} does not have one row for each of its {layer.filters} outputs"
    return ""


def _norm_problem(layer: _Layer, feeders: Mapping[tuple[str | None, ...], set[str | None]]) -> str:
    for call in layer.norms:
        if call.problem:
            return call.problem
        if len(feeders[call.key]) > 1 and any(call.names):
            return f"the norm after it ({call.names[0] or call.names[2]}) also serves other layers"
        if call.names[0] is None:
            # Without scale and shift only a batch norm's running mean can be cleared.
            zero_in = call.origin is not None and call.origin.keeps_zero
            if not (call.kind == "batch" and call.names[2] and zero_in):
                return f"the {call.kind} norm after it has no scale and shift to clear"
    return ""


def _norm_of(call: _NormCall, layer: _Layer) -> Norm:
    weight, bias, mean, variance = call.names
    direct = call.origin is not None and call.origin.is_output and layer.readers == 1
    complete = None not in (weight, bias, mean, variance)
    return Norm(
        call.kind, weight, bias, mean, variance, call.eps,
        foldable=call.kind == "batch" and direct and complete and len(layer.norms) == 1,
    )  # fmt: skip


def _leftovers(tracer: _Tracer, parameters: Mapping[str, Tensor]) -> list[Untreated]:
    """List the parameters outside all layers and norms."""
    known = {name for layer in tracer.layers.values() for name in (layer.weight, layer.bias)}
    known |= {name for call in tracer.norms for name in call.names if name}
    left = []
    for name in parameters:
        if name in known:
            continue
        ops = tracer.uses.get(name, set())
        reason = f"used by {', '.join(sorted(ops))}: no output channels" if ops else "not used in the pass"
        left.append(Untreated(name.removesuffix(".weight"), reason))
    return left
