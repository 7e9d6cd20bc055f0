"""Attacks on node classification by subgraphs that are attached to nodes; one file a paper."""

from unbackdoor.graph.attacks.sba import SBA as SBA
from unbackdoor.graph.attacks.ugba import UGBA as UGBA

ATTACKS = {cls.name: cls for cls in (SBA, UGBA)}
"""Every graph attack by its snake_case name."""
