"""What a piece of work costs: image passes, seconds and memory, counted from outside.

A method need not count for itself: calls of networks are seen by a hook. Only what answers from memory inside
a network says so, with ``partial_pass``; and exact ablations run a network operation by operation, which no
hook sees, so that of these seconds and memory alone are known.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_SHARE: ContextVar[float] = ContextVar("share of a pass that is computed", default=1.0)


@dataclass
class Cost:
    """What was spent inside ``metered``; complete when the block is left.

    Args:
        forward_images: Images that went forward through a network. A pass in which parts of the network
            answered from memory (``partial_pass``) counts as the share of its images that it computed.
        backward_images: Images whose output received a gradient.
        kinds: The same by kind, which differ in price: ``forward`` or ``backward``, ``fp32`` or ``bf16``, and
            for backward passes ``weights`` where kernels and matrices receive gradients, or ``frozen`` where
            images, or scales and shifts (and so masks on them) alone do, which is cheaper. Shares of forward
            passes have ``replayed`` behind it; an image costs as much as in a full pass.
        seconds: Wall time.
        cpu_seconds: Processor time of this process, all threads.
        peak_memory_mb: Largest memory: allocated on the GPU if there is one in use, else resident in this
            process; None where the system does not tell.
    """

    forward_images: int = 0
    backward_images: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_mb: float | None = None

    def describe(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "forward_images": self.forward_images,
            "backward_images": self.backward_images,
            "kinds": dict(self.kinds),
            "seconds": round(self.seconds, 3),
            "cpu_seconds": round(self.cpu_seconds, 3),
            "peak_memory_mb": None if self.peak_memory_mb is None else round(self.peak_memory_mb, 1),
        }


@contextmanager
def partial_pass(share: float) -> Iterator[None]:
    """Let the passes inside the block count as ``share`` of as many images: the rest answers from memory.

    Args:
        share: Of the multiply-adds of a full pass, in [0, 1]; at 1 passes are full ones.
    """
    before = _SHARE.set(share)
    try:
        yield
    finally:
        _SHARE.reset(before)


@contextmanager
def metered() -> Iterator[Cost]:
    """Count what is spent inside the block.

    A pass is one call of an outermost module with images ``(N, C, H, W)`` as its first argument, whatever
    the module is: a classifier, a copy of it, or a part that is called by itself. A backward pass is
    counted when a gradient reaches the output, up to once for each backward call.
    """
    cost, depth = Cost(), [0]

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        depth[0] += 1

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        depth[0] -= 1
        # After a failure there is no output.
        if (
            depth[0]
            or output is None
            or not inputs
            or not isinstance(inputs[0], Tensor)
            or inputs[0].ndim != 4
        ):
            return
        count, share = len(inputs[0]), _SHARE.get()
        device = inputs[0].device.type
        precision = "bf16" if torch.is_autocast_enabled(device) else "fp32"
        computed = count if share == 1 else round(share * count)
        cost.forward_images += computed
        cost.kinds[f"forward {precision}" if share == 1 else f"forward {precision} replayed"] += computed
        if isinstance(output, Tensor) and output.requires_grad:
            # While ``functional_call`` runs, masked scales stand among the parameters: a mask on these does
            # not make the pass one that computes gradients of weights.
            learns = any(p.requires_grad and p.ndim >= 2 for p in module.parameters())
            kind = f"backward {precision} {'weights' if learns else 'frozen'}"
            output.register_hook(lambda _: _add_backward(cost, kind, count))

    handles = [
        register_module_forward_pre_hook(enter),
        # A call that fails must leave the depth as it was, too.
        register_module_forward_hook(leave, always_call=True),
    ]
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    _reset_peak(on_gpu=on_gpu)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield cost
    finally:
        cost.seconds, cost.cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        cost.peak_memory_mb = _peak(on_gpu=on_gpu)
        for handle in handles:
            handle.remove()


def _add_backward(cost: Cost, kind: str, count: int) -> None:
    cost.backward_images += count
    cost.kinds[kind] += count


def _reset_peak(*, on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            _CLEAR.write_text("5")


def _peak(*, on_gpu: bool) -> float | None:
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM")), None)
