"""Every attack by name."""

from __future__ import annotations

from typing import Any

from unbackdoor import catalogue
from unbackdoor.attacks.adap import AdapBlend, AdapPatch
from unbackdoor.attacks.adaptive_magnitude import AdaptiveMagnitude
from unbackdoor.attacks.badnets import BadNets
from unbackdoor.attacks.blend import Blend
from unbackdoor.attacks.bpp import BPP
from unbackdoor.attacks.cl import CL
from unbackdoor.attacks.dfst import DFST
from unbackdoor.attacks.fc import FC
from unbackdoor.attacks.iab import IAB
from unbackdoor.attacks.lf import LF
from unbackdoor.attacks.lira import LIRA
from unbackdoor.attacks.sig import SIG
from unbackdoor.attacks.sra import SRA
from unbackdoor.attacks.trojan import Trojan
from unbackdoor.attacks.wanet import WaNet

CLASSES: tuple[type[Any], ...] = (
    *(BadNets, Trojan, Blend, CL, SIG, IAB, WaNet, FC, DFST, LIRA),
    *(SRA, AdapBlend, AdapPatch, BPP, LF, AdaptiveMagnitude),
)
"""The ten attacks of the MNP paper in its order, then the others."""

ATTACKS: dict[str, type[Any]] = {cls.name: cls for cls in CLASSES}
"""By ``name`` in snake_case (users write dashes); ``Attack`` protocol, frozen; defaults train in minutes."""


def attack_named(name: str, *, paper: bool = False) -> Any:  # noqa: ANN401 - one of many dataclasses
    """Return an attack with its default options, or those of its paper.

    Args:
        name: Snake case or with dashes.
        paper: Take the settings of the source paper.

    Raises:
        InvalidInputError: If there is no such attack.
    """
    return catalogue.configured("attack", ATTACKS, name, paper=paper)
