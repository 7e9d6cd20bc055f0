"""Run a network again and again on the same images, each time only from the first layer that changed.

What ran before a layer in a forward pass cannot depend on it, whatever the architecture. So modules that
finished before the changed one begins answer from memory. That is exact: equal bits, not an approximation.
``costs`` counts the share of the multiply-adds, in convolutions and linear layers, that is done again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor, nn

from unbackdoor.compute import EVALUATION_BATCH, device_of, memory_format_for, mode
from unbackdoor.costs import partial_pass
from unbackdoor.types import as_float

_COMPARED = 32
"""How many images a restarted pass is compared on with a full one, once a layer."""

MEMORY = 4 * 2**30
"""Most bytes that one ``Replay`` remembers; networks and images that need more run in full."""


@dataclass(frozen=True, eq=False)
class _Call:
    """When a module ran within a pass, and what it returned."""

    start: int
    end: int
    output: Tensor


@dataclass(frozen=True, eq=False)
class _Observed:
    """What one pass showed.

    Args:
        logits: ``(n, K)``.
        starts: When each module first ran.
        calls: What can be answered from memory.
        work: When a call of a layer ended, and its multiply-adds.
    """

    logits: Tensor
    starts: dict[str, int]
    calls: dict[str, _Call]
    work: list[tuple[int, int]]


@dataclass(eq=False)
class Replay:
    """A network in eval mode and fp32 on fixed images.

    Args:
        model: Its weights may be changed between calls; its modes are restored after each.
        images: ``(N, C, H, W)``, uint8 or float32 in [0, 1].
        batch_size: Images a pass.
        memory: Most bytes to remember.
    """

    model: nn.Module
    images: Tensor
    batch_size: int = EVALUATION_BATCH
    memory: int = MEMORY
    _starts: dict[str, int] = field(default_factory=dict)
    _passes: list[Mapping[str, _Call]] = field(default_factory=list)
    _checked: dict[int, bool] = field(default_factory=dict)
    _work: list[tuple[int, int]] = field(default_factory=list)
    _shares: dict[int, float] = field(default_factory=dict)

    def record(self) -> Tensor:
        """Run in full, remember what the modules returned, and give the logits ``(N, K)``.

        To be called when weights have changed for good; ``keep`` does with less where few of them have.
        """
        self._passes, self._starts, self._shares, used, logits = [], {}, {}, 0, []
        for part in self._parts():
            seen = _observed(self.model, part, remember=used <= self.memory)
            logits.append(seen.logits)
            used += _bytes(seen.calls)
            self._passes.append(seen.calls)
            self._starts, self._work = seen.starts, seen.work
        if used > self.memory:
            self._passes = [{} for _ in self._passes]
        return torch.cat(logits)

    def logits_after(self, changed: Sequence[str]) -> Tensor:
        """Return the logits ``(N, K)`` now that some tensors differ from those of the recorded pass.

        Args:
            changed: Names of the parameters and buffers that differ.
        """
        if not self._passes:
            return self.record()
        start = self._start(changed)
        if start == 0 or not self._checked.get(start, True):
            return self._run(0)
        logits = self._run(start)
        if start not in self._checked:
            # Tied weights and other tricks may use a tensor before its owner runs: compare once a layer.
            full = self._run(0, parts=1)
            few = logits[: len(full)]
            self._checked[start] = torch.equal(few, full) or torch.allclose(few, full, atol=1e-5)
            return logits if self._checked[start] else self._run(0)
        return logits

    def keep(self, changed: Sequence[str]) -> None:
        """Remember the pass of the weights as they are, running from the first layer that changed.

        To be called when what differs from the recorded pass will stay.

        Args:
            changed: As for ``logits_after``.
        """
        start = self._start(changed) if self._passes else 0
        if start == 0 or not self._checked.get(start, False) or not self._remember(start):
            self.record()

    def _start(self, changed: Sequence[str]) -> int:
        """Return when the first module began that uses what changed; 0 if that is not known."""
        owners = {name.rpartition(".")[0] for name in changed}
        # A module that never ran lends its tensors to somebody else, who may have run at any time.
        return min((self._starts.get(owner, 0) for owner in owners), default=0)

    def _remember(self, start: int) -> bool:
        """Replace what was remembered from ``start`` on; False if modules now run in another order."""
        with torch.no_grad(), mode(self.model, training=False), partial_pass(self._share(start)):
            for position, (part, calls) in enumerate(zip(self._parts(), self._passes, strict=True)):
                before = {name: call for name, call in calls.items() if call.end < start}
                after = sorted((name for name in calls if name not in before), key=lambda n: calls[n].end)
                with (
                    _answering(self.model, {name: call.output for name, call in before.items()}),
                    _outputs(self.model, after) as seen,
                ):
                    self.model(part)
                if [name for name, *_ in seen] != after:
                    return False
                unchanged = ((name, output) for name, output, version in seen if output._version == version)
                self._passes[position] = {
                    **before,
                    **{name: replace(calls[name], output=output) for name, output in unchanged},
                }
        self._shares.clear()
        return True

    def _run(self, start: int, parts: int | None = None) -> Tensor:
        """Return the logits of all images, or of the first parts, from ``start`` on."""
        found = []
        with torch.no_grad(), mode(self.model, training=False), partial_pass(self._share(start)):
            for part, calls in islice(zip(self._parts(), self._passes, strict=True), parts):
                with _answering(self.model, {n: c.output for n, c in calls.items() if c.end < start}):
                    found.append(self.model(part))
        return torch.cat(found)

    def _share(self, start: int) -> float:
        """Return the share of the multiply-adds that a pass from ``start`` on does again."""
        if start not in self._shares:
            answered = [(c.start, c.end) for c in self._passes[-1].values() if c.end < start]
            again = [
                count
                for end, count in self._work
                if not any(first <= end <= last for first, last in answered)
            ]
            total = sum(count for _, count in self._work)
            self._shares[start] = sum(again) / total if total else 1.0
        return self._shares[start]

    def _parts(self) -> Iterator[Tensor]:
        device, layout = device_of(self.model), memory_format_for(self.model)
        # The first part is small, since each layer's first trial runs it in full as well.
        first = min(_COMPARED, self.batch_size)
        for part in (self.images[:first], *self.images[first:].split(self.batch_size)):
            if len(part):
                yield as_float(part.to(device)).contiguous(memory_format=layout)


def _observed(model: nn.Module, images: Tensor, *, remember: bool) -> _Observed:
    """Run once and watch."""
    clock = 0
    starts: dict[str, int] = {}
    open_calls: dict[str, int] = {}
    seen: dict[str, list[tuple[_Call, int] | None]] = {}
    work: list[tuple[int, int]] = []

    def enter(name: str) -> None:
        nonlocal clock
        clock += 1
        starts.setdefault(name, clock)
        open_calls[name] = clock

    def leave(name: str, module: nn.Module, output: object) -> None:
        nonlocal clock
        clock += 1
        if isinstance(module, nn.Conv2d | nn.Linear) and isinstance(output, Tensor):
            work.append((clock, output.numel() * module.weight.shape[1:].numel()))
        plain = isinstance(output, Tensor) and remember
        call = (_Call(open_calls[name], clock, output), output._version) if plain else None  # type: ignore[attr-defined, arg-type]
        seen.setdefault(name, []).append(call)

    handles = []
    for name, module in model.named_modules():
        if name:
            handles += [
                module.register_forward_pre_hook(lambda *_, name=name: enter(name)),
                module.register_forward_hook(lambda *given, name=name: leave(name, given[0], given[-1])),
            ]
    try:
        with torch.no_grad(), mode(model, training=False):
            logits: Tensor = model(images)
    finally:
        for handle in handles:
            handle.remove()
    calls = {}
    for name, found in seen.items():
        # What ran twice, or was changed in place afterwards, is computed again.
        if len(found) == 1 and found[0] is not None and found[0][0].output._version == found[0][1]:
            calls[name] = found[0][0]
    return _Observed(logits, starts, calls, work)


def _bytes(calls: Mapping[str, _Call]) -> int:
    storages = {call.output.untyped_storage().data_ptr(): call.output for call in calls.values()}
    return sum(output.untyped_storage().nbytes() for output in storages.values())


@contextmanager
def _outputs(model: nn.Module, names: Sequence[str]) -> Iterator[list[tuple[str, Tensor, int]]]:
    """Collect what the modules named return, with the version of the tensor, in the order of their ends."""
    seen: list[tuple[str, Tensor, int]] = []

    def leave(name: str, output: Tensor) -> None:
        seen.append((name, output, output._version))

    handles = [
        model.get_submodule(name).register_forward_hook(lambda *given, name=name: leave(name, given[-1]))
        for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _answering(model: nn.Module, answers: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the modules named return what is given instead of running."""
    modules = dict(model.named_modules())
    own = {name: modules[name].__dict__.get("forward") for name in answers}
    try:
        for name, answer in answers.items():
            modules[name].__dict__["forward"] = lambda *_, answer=answer, **__: answer
        yield
    finally:
        for name, before in own.items():
            if before is None:
                del modules[name].__dict__["forward"]
            else:
                modules[name].__dict__["forward"] = before
