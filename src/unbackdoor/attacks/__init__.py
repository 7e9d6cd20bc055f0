"""Attacks: trigger and poison plan, one file a paper."""

from unbackdoor.attacks import registry as registry
from unbackdoor.attacks.adap import AdapBlend as AdapBlend
from unbackdoor.attacks.adap import AdapPatch as AdapPatch
from unbackdoor.attacks.adaptive_magnitude import AdaptiveMagnitude as AdaptiveMagnitude
from unbackdoor.attacks.badnets import BadNets as BadNets
from unbackdoor.attacks.blend import Blend as Blend
from unbackdoor.attacks.bpp import BPP as BPP
from unbackdoor.attacks.cl import CL as CL
from unbackdoor.attacks.dfst import DFST as DFST
from unbackdoor.attacks.fc import FC as FC
from unbackdoor.attacks.iab import IAB as IAB
from unbackdoor.attacks.lf import LF as LF
from unbackdoor.attacks.lira import LIRA as LIRA
from unbackdoor.attacks.sig import SIG as SIG
from unbackdoor.attacks.sra import SRA as SRA
from unbackdoor.attacks.trojan import Trojan as Trojan
from unbackdoor.attacks.wanet import WaNet as WaNet
