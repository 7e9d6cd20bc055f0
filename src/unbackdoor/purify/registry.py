"""Every purifier by name."""

from __future__ import annotations

from typing import Any

from unbackdoor import catalogue
from unbackdoor.purify.anp import ANP
from unbackdoor.purify.awm import AWM
from unbackdoor.purify.bnp import BNP
from unbackdoor.purify.bs_ar import BSAR
from unbackdoor.purify.clp import CLP
from unbackdoor.purify.ep import EP
from unbackdoor.purify.fp import FP
from unbackdoor.purify.fst import FST
from unbackdoor.purify.ft import FT
from unbackdoor.purify.ft_sam import FTSAM
from unbackdoor.purify.gup import GUP
from unbackdoor.purify.i_bau import IBAU
from unbackdoor.purify.mnp import MNP
from unbackdoor.purify.nad import NAD
from unbackdoor.purify.nc import NC
from unbackdoor.purify.onp import ONP
from unbackdoor.purify.random_order import RandomOrder
from unbackdoor.purify.rnp import RNP
from unbackdoor.purify.sau import SAU
from unbackdoor.purify.tsbd import TSBD

CLASSES: tuple[type[Any], ...] = (
    *(MNP, FT, FP, ANP, CLP, RNP, NC, NAD, IBAU),
    *(FTSAM, AWM, BNP, EP, TSBD, BSAR, GUP, SAU, FST, ONP, RandomOrder),
)
"""MNP and the rivals of its Table 1, then the others, a control at the end."""

PURIFIERS: dict[str, type[Any]] = {cls.name: cls for cls in CLASSES}
"""By ``name`` in snake_case (users write dashes); ``Purifier`` protocol, frozen dataclasses."""


def purifier_named(name: str, *, paper: bool = False) -> Any:  # noqa: ANN401 - one of many dataclasses
    """Return a purifier with its default options, or those of its paper.

    Args:
        name: Snake case or with dashes; or a class of the user's own, ``package.module:Class`` or
            ``path/to/file.py:Class``, whose code is run.
        paper: Take the settings of the source paper, or of its authors' code.

    Raises:
        InvalidInputError: If there is no such method, or nothing is known of its paper's settings.
        UnsupportedModelError: If the user's code cannot be imported.
    """
    return catalogue.configured("purifier", PURIFIERS, name, paper=paper, own="purify")
