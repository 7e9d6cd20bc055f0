"""Small hand-written networks, one for each way in which layers and norms are arranged in practice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

CLASSES = 4


def images(count: int = 3, *, size: int = 16, seed: int = 5) -> Tensor:
    """Return random images in [0, 1]."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every vector (biases, scales, shifts) and every running statistic a telling random value.

    Freshly built norms have scale 1, shift 0 and mean 0: with those many wrong pairings go unnoticed.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        else:
            fan_in = max(1, parameter[0].numel())
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator) + 0.4)
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


_CHANNEL_AXIS = {
    "convolution": 1, "addmm": -1, "mm": -1, "native_batch_norm": 1, "native_layer_norm": -1,
    "native_group_norm": 1,
}  # fmt: skip


class _Watch(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {
            tensor.untyped_storage().data_ptr(): name
            for name, tensor in (*model.named_buffers(), *model.named_parameters())
        }
        self.seen: dict[str, list[Tensor]] = defaultdict(list)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        axis = _CHANNEL_AXIS.get(func.overloadpacket.__name__)
        if axis is not None:
            output = result[0] if isinstance(result, tuple) else result
            for tensor in args:
                name = isinstance(tensor, Tensor) and self.names.get(tensor.untyped_storage().data_ptr())
                if name:
                    self.seen[name].append(output.detach().clone().movedim(axis, 0))
        return result


def watch(model: nn.Module, inputs: Tensor) -> dict[str, list[Tensor]]:
    """Return by tensor name what each operation that reads the tensor puts out, channels first.

    Tensors are recognised by their storage, so views count; no names or module types are looked at. Works
    for layers that are no modules, which forward hooks cannot see. Needs gradients enabled: without them
    torch fuses attention.
    """
    with _Watch(model) as seen:
        model(inputs)
    return dict(seen.seen)


class _Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from all channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, 4, 1)
        self.expand = nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))
        return x * F.hardsigmoid(self.expand(gate))


class MobileNet(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise 3x3, squeeze-and-excitation, linear projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(True))
        self.wide = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(True))
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(16)
        self.se = SqueezeExcite(16)
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Sequential(nn.Linear(8, 12), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(12, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.se(F.hardswish(self.depthwise_bn(self.depthwise(self.wide(x)))))
        x = x + self.project(y)
        logits: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class ShuffleNet(nn.Module):
    """Grouped 1x1 convolutions with a channel shuffle between them; halves are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.bn3 = nn.BatchNorm2d(4)
        self.head = _Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        left, right = x.chunk(2, dim=1)
        logits: Tensor = self.head(torch.cat([left, self.bn3(self.conv3(right))], 1))
        return logits


class DenseNet(nn.Module):
    """Norm, ReLU, convolution; each layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.norm3, self.conv3 = nn.BatchNorm2d(12), nn.Conv2d(12, 4, 3, padding=1, bias=False)
        self.norm4, self.head = nn.BatchNorm2d(16), _Head(16)

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        b = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(torch.cat([a], 1)))))))
        c = self.conv3(F.relu(self.norm3(torch.cat([a, b], 1))))
        logits: Tensor = self.head(F.relu(self.norm4(torch.cat([a, b, c], 1))))
        return logits


class ConvNeXt(nn.Module):
    """Depthwise convolution, layer norm over permuted channels, two linear layers, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.dwconv, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gamma = nn.Parameter(torch.full((8,), 0.1))
        self.head_norm, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        x = x + y.permute(0, 3, 1, 2)
        logits: Tensor = self.head(self.head_norm(x.mean((2, 3))))
        return logits


class VisionTransformer(nn.Module):
    """Patch embedding, class token, position embedding, one encoder layer of torch, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        logits: Tensor = self.head(self.norm(self.block(x))[:, 0])
        return logits


def vgg_with_bias() -> nn.Module:
    """VGG-like, each convolution with both a bias and a batch norm; two hidden linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.MaxPool2d(4),
        nn.Flatten(), nn.Linear(48, 16), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(16, CLASSES),
    )  # fmt: skip


def relu_before_norm() -> nn.Module:
    """Convolution, ReLU, pooling, then the norm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.BatchNorm2d(8, affine=False),
        _Head(8),
    )  # fmt: skip


def norm_without_affine() -> nn.Module:
    """Batch norm that has a mean and a variance only, directly after a convolution with bias."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), _Head(8))


def sigmoid_before_bare_norm() -> nn.Module:
    """The norm cannot be cleared and a silent filter reaches it as 0.5."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.BatchNorm2d(8, affine=False), _Head(8))


def bare_layer_norm() -> nn.Module:
    """A layer norm without scale and shift maps a silent filter to something that depends on the others."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(768, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, CLASSES)
    )


class SharedNorm(nn.Module):
    """One norm after two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), _Head(8)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.norm(self.b(F.relu(self.norm(self.a(x)))))))
        return logits


class SharedConv(nn.Module):
    """One convolution used twice, each time with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.norm1, self.norm2, self.head = nn.BatchNorm2d(8), nn.BatchNorm2d(8), _Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv(F.relu(self.stem(x)))))
        logits: Tensor = self.head(F.relu(self.norm2(self.conv(x))))
        return logits


class StandardisedConv(nn.Conv2d):
    """Its weight is standardised in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, centred / (centred.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, padding=1)


class EditedCopy(nn.Conv2d):
    """A copy of its weight is changed in place: no view of the stored weight any more."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.clone()
        weight -= weight.mean(0)
        return F.conv2d(x, weight, self.bias, padding=1)


def computed_weights() -> nn.Module:
    """Weights that are not the stored ones: standardised, edited in place, weight-normalised."""
    return nn.Sequential(
        StandardisedConv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), EditedCopy(8, 8, 3), nn.ReLU(),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), nn.ReLU(), _Head(8),
    )  # fmt: skip


def transposed() -> nn.Module:
    """A transposed convolution: its filters lie along the second axis of the weight."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 2, 2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        _Head(8),
    )


class Functional(nn.Module):
    """No layer modules at all: functions on parameters with names of their own."""

    mean: Tensor
    variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(8, 3, 3, 3))
        self.offset = nn.Parameter(torch.zeros(8))
        self.scale, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.pointwise = nn.Parameter(torch.zeros(6, 8, 1, 1))
        self.out = nn.Parameter(torch.zeros(CLASSES, 6))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, self.offset)
        x = F.relu(F.batch_norm(x, self.mean, self.variance, self.scale, self.shift, eps=1e-3))
        x = F.relu(F.linear(x.mean((2, 3)), self.pointwise.view(6, 8)))
        return x @ self.out.t()


class InputsAsRows(nn.Module):
    """Linear maps stored as (inputs, outputs), and as one flat vector."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(48, 8))
        self.flat = nn.Parameter(torch.zeros(64))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.adaptive_avg_pool2d(x, 4).flatten(1) @ self.rows)
        logits: Tensor = self.head(F.linear(x, self.flat.view(8, 8)))
        return logits


class ControlFlow(nn.Module):
    """Which branch runs depends on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.bright, self.dark, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), _Head(8)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bright if bool(x.mean() > 0.1) else self.dark
        logits: Tensor = self.head(F.relu(branch(F.relu(self.bn(self.stem(x))))))
        return logits


class InPlace(nn.Module):
    """In-place ReLUs and an in-place residual sum, on which a second norm runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.after = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = _Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(x))
        y += x
        z = self.conv3(F.relu_(y))
        z += y
        logits: Tensor = self.head(self.after(z).relu_())
        return logits


def group_norm() -> nn.Module:
    """Group norms, and an instance norm without parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.GroupNorm(1, 8),
        nn.ReLU(), nn.Conv2d(8, 8, 1), nn.InstanceNorm2d(8), nn.ReLU(), _Head(8),
    )  # fmt: skip


def mlp() -> nn.Module:
    """Linear layers with one-dimensional batch norms."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(768, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8, bias=False),
        nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES),
    )  # fmt: skip


def network_in_network() -> nn.Module:
    """The head is a 1x1 convolution with global pooling."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def log_probabilities() -> nn.Module:
    """Returns log-probabilities instead of logits."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), _Head(8), nn.LogSoftmax(1))


class TwoHeads(nn.Module):
    """The logits are the mean of two linear layers, the second added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.mean_head, self.max_head = nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        logits: Tensor = self.mean_head(x.mean((2, 3)))
        logits += self.max_head(x.amax((2, 3)))
        return logits / 2


class Wrapped(nn.Module):
    """Another module around the network, as DataParallel and many toolkits have it."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), _Head(8))

    def forward(self, *inputs: Tensor, **options: Tensor) -> Tensor:
        logits: Tensor = self.module(*inputs, **options)
        return logits


def logits_after_norm() -> nn.Module:
    """The logits leave a norm, not a layer."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Identity(), _Head(8), nn.BatchNorm1d(CLASSES))


def frozen() -> nn.Module:
    """Some parameters require no gradient."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), _Head(8))
    model[0].requires_grad_(False)
    return model


class Auxiliary(nn.Module):
    """A second head that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), _Head(8)
        self.aux = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        logits: Tensor = self.head(x) + self.aux(x.mean((2, 3))) if self.training else self.head(x)
        return logits


class FixedKernel(nn.Module):
    """A blur whose kernel is a buffer, and a convolution that two readers share with its norm."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), _Head(16)
        self.register_buffer("kernel", torch.full((8, 1, 3, 3), 1 / 9))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        x = self.conv(x)
        x = torch.cat([F.relu(self.bn(x)), x], 1)
        logits: Tensor = self.head(
            torch.cat([F.conv2d(x[:, :8], self.kernel, padding=1, groups=8), x[:, 8:]], 1)
        )
        return logits


class BatchStatistics(nn.Module):
    """A batch norm that uses the batch's statistics in eval mode too."""

    mean: Tensor
    variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), _Head(8)
        self.scale, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.conv(x), self.mean, self.variance, self.scale, self.shift, training=True)
        logits: Tensor = self.head(F.relu(x))
        return logits


class HandWrittenNorm(nn.Module):
    """A layer norm written out by hand cannot be told from other arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), _Head(8)
        self.scale, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt()
        logits: Tensor = self.head(F.relu(self.scale[:, None, None] * x + self.shift[:, None, None]))
        return logits


class TupleOutput(nn.Module):
    """Returns logits and features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), _Head(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x)
        return self.head(x), x


class TwoLayers(nn.Module):
    """The smallest network with a prunable layer: linear, ReLU, linear on flat 2x2 images."""

    def __init__(self, hidden: int = 6, *, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(12, hidden, bias=bias)
        self.second = nn.Linear(hidden, CLASSES, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(F.relu(self.first(x.flatten(1))))
        return logits


class SmallConvNet(nn.Module):
    """Two convolutions with batch norms and a head, for tests that learn something."""

    def __init__(self, width: int = 8, *, bias: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=bias), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=bias), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        logits: Tensor = self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))
        return logits
