"""Randomness without hidden state: explicit generators, and a fence around torch's global one."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def generator(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a new generator seeded with ``seed``."""
    return torch.Generator(device=device).manual_seed(seed)


def spawn(parent: torch.Generator) -> torch.Generator:
    """Draw an independent CPU generator from ``parent`` (which advances by one draw)."""
    return generator(draw_seed(parent))


def spawn_for(parent: torch.Generator, purpose: str) -> torch.Generator:
    """Draw a CPU generator from ``parent`` that shares no draws with one seeded alike for another purpose.

    Attacker and defender, who both count their seeds from 0 and spawn alike, would choose the same images.
    """
    digest = hashlib.sha256(f"{purpose} {draw_seed(parent)}".encode()).digest()
    return generator(int.from_bytes(digest[:8], "big") >> 2)


def draw_seed(parent: torch.Generator) -> int:
    """Draw a seed in [0, 2^62) from ``parent``."""
    return int(torch.randint(2**62, (1,), generator=parent, device=parent.device).item())


@contextmanager
def isolated(parent: torch.Generator) -> Iterator[None]:
    """Seed torch's global generators from ``parent`` inside the block and restore them afterwards.

    Weight initialisation and dropout read the global generator; inside this block they follow
    ``parent``, and the caller's global state is left as it was.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(draw_seed(parent))
        yield


@contextmanager
def fenced(parent: torch.Generator) -> Iterator[int]:
    """Give a seed to libraries that seed everything global, and restore all global states afterwards.

    Those are torch's, numpy's and that of ``random``.

    Args:
        parent: Advanced by two draws.

    Yields:
        A seed in [0, 2^31).
    """
    before = np.random.get_state(), random.getstate()  # noqa: NPY002 - put back below
    try:
        with isolated(parent):
            yield draw_seed(parent) % 2**31
    finally:
        np.random.set_state(before[0])  # noqa: NPY002
        random.setstate(before[1])
