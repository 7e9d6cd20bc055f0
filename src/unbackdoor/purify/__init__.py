"""Purifiers: model and clean images to a new model, one file a paper."""

from unbackdoor.purify import registry as registry
from unbackdoor.purify.anp import ANP as ANP
from unbackdoor.purify.awm import AWM as AWM
from unbackdoor.purify.bnp import BNP as BNP
from unbackdoor.purify.bs_ar import BSAR as BSAR
from unbackdoor.purify.clp import CLP as CLP
from unbackdoor.purify.ep import EP as EP
from unbackdoor.purify.fp import FP as FP
from unbackdoor.purify.fst import FST as FST
from unbackdoor.purify.ft import FT as FT
from unbackdoor.purify.ft_sam import FTSAM as FTSAM
from unbackdoor.purify.gup import GUP as GUP
from unbackdoor.purify.i_bau import IBAU as IBAU
from unbackdoor.purify.mnp import MNP as MNP
from unbackdoor.purify.nad import NAD as NAD
from unbackdoor.purify.nc import NC as NC
from unbackdoor.purify.onp import ONP as ONP
from unbackdoor.purify.random_order import RandomOrder as RandomOrder
from unbackdoor.purify.rnp import RNP as RNP
from unbackdoor.purify.sau import SAU as SAU
from unbackdoor.purify.tsbd import TSBD as TSBD
