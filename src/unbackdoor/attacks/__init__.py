"""Attacks: trigger and poison plan, one file a paper."""

from unbackdoor.attacks.badnets import BadNets as BadNets
from unbackdoor.attacks.blend import Blend as Blend
