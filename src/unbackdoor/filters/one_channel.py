"""What a primitive operation makes of a tensor that differs from a known one in a single channel.

A filter that is removed changes one channel of its layer's output. Norms, activations, pooling and additions
keep that so and cost one channel. The next convolution turns it into a change everywhere, but a sum over
input channels of which one changed needs the product of that channel alone, added to the known sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Keywords = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Channel:
    """A tensor that equals ``base`` but for one index of one axis.

    Args:
        base: The known tensor.
        axis: The axis of the channel.
        index: Which channel.
        values: The channel as it is now; of size 1 along ``axis``.
    """

    base: Tensor
    axis: int
    index: int
    values: Tensor

    def slice_of(self, other: Tensor) -> Tensor:
        """Return the same channel of a tensor of the same layout."""
        return other.narrow(self.axis, self.index, 1)

    def difference(self) -> Tensor:
        """Return by how much the channel changed, of size 1 along the axis."""
        return self.values - self.slice_of(self.base)

    def whole(self) -> Tensor:
        """Return the changed tensor in full."""
        tensor = self.base.clone()
        self.slice_of(tensor).copy_(self.values)
        return tensor

    def is_unchanged(self) -> bool:
        """Say whether nothing changed after all, as in a channel that an activation silences anyway."""
        return torch.equal(self.values, self.slice_of(self.base))


def apply(op: Any, arguments: Sequence[Any], keywords: Keywords, base: Any) -> Any:  # noqa: ANN401
    """Run an operation some of whose arguments are ``Channel``, and all others as they were.

    Args:
        op: A primitive operation of torch without side effects.
        arguments: Its arguments.
        keywords: Its keyword arguments.
        base: What it returned for the known tensors.

    Returns:
        ``Channel`` where the result is known to differ from ``base`` in one channel only, else the result
        itself; of several results, a tuple of such.
    """
    rule = RULES.get(op.overloadpacket.__name__)
    result = rule(op, tuple(arguments), keywords, base) if rule else None
    if result is not None:
        return result
    return op(*(whole(each) for each in arguments), **{name: whole(each) for name, each in keywords.items()})


def whole(value: Any) -> Any:  # noqa: ANN401 - any argument
    """Return an argument with each ``Channel`` in it, also inside of lists, in full."""
    if isinstance(value, (list, tuple)):
        return [whole(each) for each in value]
    return value.whole() if isinstance(value, Channel) else value


# --- Rules: the result, or None where the operation has to run in full


def _pointwise(op: Any, arguments: tuple[Any, ...], keywords: Keywords, base: Tensor) -> Any:  # noqa: ANN401
    """A value depends on the value in its place."""
    changed, *rest = arguments
    if not isinstance(changed, Channel):
        return None
    return Channel(base, changed.axis, changed.index, op(changed.values, *rest, **keywords))


def _pooling(op: Any, arguments: tuple[Any, ...], keywords: Keywords, base: Any) -> Any:  # noqa: ANN401
    """A value depends on pixels of its channel."""
    changed, *rest = arguments
    if changed.axis != 1 or changed.base.ndim != 4:
        return None
    result = op(changed.values, *rest, **keywords)
    if isinstance(result, Tensor):
        return Channel(base, 1, changed.index, result)
    return tuple(Channel(b, 1, changed.index, r) for b, r in zip(base, result, strict=True))


def _mean(op: Any, arguments: tuple[Any, ...], keywords: Keywords, base: Tensor) -> Any:  # noqa: ANN401
    changed, axes, *rest = arguments
    gone = {axis % changed.base.ndim for axis in axes or ()}
    if not gone or changed.axis in gone:
        return None
    keep = bool(rest and rest[0])
    axis = changed.axis - (0 if keep else sum(each < changed.axis for each in gone))
    return Channel(base, axis, changed.index, op(changed.values, axes, *rest, **keywords))


def _binary(op: Any, arguments: tuple[Any, ...], keywords: Keywords, base: Tensor) -> Any:  # noqa: ANN401
    """Sums and products of two tensors, one of which may be a number or broadcast."""
    like = next(each for each in arguments if isinstance(each, Channel))
    if like.base.shape != base.shape:
        return None
    sides = []
    for each in arguments[:2]:
        if isinstance(each, Channel):
            if (each.axis, each.index, each.base.shape) != (like.axis, like.index, base.shape):
                return None
            sides.append(each.values)
        elif isinstance(each, Tensor) and each.ndim:
            if each.ndim != base.ndim:
                return None
            sides.append(each if each.shape[like.axis] == 1 else like.slice_of(each))
        else:
            sides.append(each)
    return Channel(base, like.axis, like.index, op(*sides, *arguments[2:], **keywords))


def _batch_norm(op: Any, arguments: tuple[Any, ...], keywords: Keywords, base: Any) -> Any:  # noqa: ANN401
    """In eval mode: one affine map a channel."""
    source, weight, bias, mean, variance, training, _, eps = arguments[:8]
    index = _common_index(source, 1, (weight, bias, mean, variance))
    if training or mean is None or variance is None or index is None:
        return None
    scale, shift, centre, spread = (_row(each, 0, index) for each in (weight, bias, mean, variance))
    values = F.batch_norm(_row(source, 1, index), centre, spread, scale, shift, training=False, eps=eps)
    return (Channel(base[0], 1, index, values), *base[1:])


def _convolution(op: Any, arguments: tuple[Any, ...], keywords: Keywords, base: Tensor) -> Any:  # noqa: ANN401
    source, weight, bias, stride, padding, dilation, transposed, extra, groups = arguments
    if transposed:
        return None

    def convolve(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        result: Tensor = op(x, w, b, stride, padding, dilation, False, extra, 1)
        return result

    if isinstance(source, Channel):
        if source.axis != 1 or isinstance(weight, Channel) or isinstance(bias, Channel):
            return None
        if groups == 1:
            return _added(base, convolve(source.difference(), weight.narrow(1, source.index, 1), None))
        if groups == base.shape[1] == source.base.shape[1]:  # depthwise: channels stay apart
            index = source.index
            values = convolve(source.values, weight.narrow(0, index, 1), _row(bias, 0, index))
            return Channel(base, 1, index, values)
        return None
    own = _common_index(None, 0, (weight, bias))
    return None if own is None else _own_filter(source, weight, bias, own, base, convolve, groups)


def _own_filter(
    source: Tensor,
    weight: Any,  # noqa: ANN401
    bias: Any,  # noqa: ANN401
    index: int,
    base: Tensor,
    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    groups: int,
) -> Channel:
    """Compute one output channel of a convolution."""
    rows, shift = _row(weight, 0, index), _row(bias, 0, index)
    if not bool(rows.any()):  # a filter of zeros yields its bias
        return Channel(base, 1, index, _constant(shift, base, axis=1))
    inputs = rows.shape[1]
    part = source.narrow(1, index // (base.shape[1] // groups) * inputs, inputs)
    return Channel(base, 1, index, convolve(part, rows, shift))


def _addmm(op: Any, arguments: tuple[Any, ...], keywords: Keywords, base: Tensor) -> Any:  # noqa: ANN401
    """``bias + source @ weight``: an input that changed adds its product, an output is a column."""
    if keywords:
        return None
    return _matrix_product(*arguments, base=base)


def _mm(op: Any, arguments: tuple[Any, ...], keywords: Keywords, base: Tensor) -> Any:  # noqa: ANN401
    return _matrix_product(None, *arguments, base=base)


def _matrix_product(bias: Any, source: Any, weight: Any, *, base: Tensor) -> Any:  # noqa: ANN401
    if isinstance(source, Channel):
        if source.axis != 1 or isinstance(weight, Channel) or isinstance(bias, Channel):
            return None
        return _added(base, source.difference() @ weight.narrow(0, source.index, 1))
    index = _common_index(weight, 1, (bias,))
    if index is None:
        return None
    column = source @ _row(weight, 1, index)
    return Channel(base, 1, index, column if bias is None else column + _row(bias, 0, index))


def _transposed(op: Any, arguments: tuple[Any, ...], keywords: Keywords, base: Tensor) -> Any:  # noqa: ANN401
    changed = arguments[0]
    return Channel(base, 1 - changed.axis, changed.index, changed.values.t()) if base.ndim == 2 else None


def _flattened(op: Any, arguments: tuple[Any, ...], keywords: Keywords, base: Tensor) -> Any:  # noqa: ANN401
    """A view that only drops or adds axes of size 1 at the end."""
    changed = arguments[0]
    before, after = changed.base.shape, base.shape
    common = min(len(before), len(after))
    if before[:common] != after[:common] or changed.axis >= common:
        return None
    shape = list(after)
    shape[changed.axis] = 1
    return Channel(base, changed.axis, changed.index, changed.values.reshape(shape))


def _concatenated(op: Any, arguments: tuple[Any, ...], keywords: Keywords, base: Tensor) -> Any:  # noqa: ANN401
    parts, axis = arguments[0], (arguments[1] if len(arguments) > 1 else 0) % base.ndim
    changed = [number for number, part in enumerate(parts) if isinstance(part, Channel)]
    part = parts[changed[0]]
    if len(changed) > 1 or part.axis != axis:
        return None
    before = sum(int(each.shape[axis]) for each in parts[: changed[0]])
    return Channel(base, axis, before + part.index, part.values)


def _added(base: Tensor, change: Tensor) -> Tensor:
    return change.add_(base)


def _constant(value: Tensor | None, base: Tensor, *, axis: int) -> Tensor:
    shape = list(base.shape)
    shape[axis] = 1
    return base.new_zeros(shape) if value is None else value.reshape([1] * base.ndim).expand(shape)


def _row(value: Any, axis: int, index: int) -> Any:  # noqa: ANN401 - a tensor, a channel of it, or None
    if isinstance(value, Channel):
        return value.values
    return None if value is None else value.narrow(axis, index, 1)


def _common_index(matrix: Any, axis: int, vectors: Sequence[Any]) -> int | None:  # noqa: ANN401
    """Return the one channel that all changed arguments speak of, or None."""
    changed = [each for each in vectors if isinstance(each, Channel)]
    if isinstance(matrix, Channel):
        if matrix.axis != axis:
            return None
        changed.append(matrix)
    indices = {each.index for each in changed}
    return indices.pop() if len(indices) == 1 else None


_POINTWISE = (
    "relu", "gelu", "silu", "hardswish", "leaky_relu", "elu", "tanh", "hardtanh", "sigmoid", "hardsigmoid",
    "mish", "softplus", "clone", "detach", "alias", "_to_copy",
)  # fmt: skip
_POOLING = (
    "max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d",
)  # fmt: skip

RULES: dict[str, Callable[[Any, tuple[Any, ...], Keywords, Any], Any]] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(_POOLING, _pooling),
    **dict.fromkeys(("add", "sub", "mul", "div"), _binary),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze"), _flattened),
    **dict.fromkeys(("t", "t_copy"), _transposed),
    "mean": _mean,
    "native_batch_norm": _batch_norm,
    "convolution": _convolution,
    "addmm": _addmm,
    "mm": _mm,
    "cat": _concatenated,
}
"""By the name of the primitive operation; others run in full."""
