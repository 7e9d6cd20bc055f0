"""Backdoors in graph networks: node classification under subgraph triggers, and RIGBD against them.

Nothing here is shared with images but rates, stored benchmarks and reports. Needs the extra ``graph``.
"""

from unbackdoor.graph.attacks import SBA as SBA
from unbackdoor.graph.attacks import UGBA as UGBA
from unbackdoor.graph.data import Division as Division
from unbackdoor.graph.data import Graph as Graph
from unbackdoor.graph.data import divide as divide
from unbackdoor.graph.detect import RIGBD as RIGBD
from unbackdoor.graph.evaluate import evaluate as evaluate
from unbackdoor.graph.evaluate import judge as judge
from unbackdoor.graph.generate import generate as generate
from unbackdoor.graph.generate import preset as preset
from unbackdoor.graph.planetoid import read_planetoid as read_planetoid
from unbackdoor.graph.purify import EdgeDropping as EdgeDropping
from unbackdoor.graph.purify import Plain as Plain
from unbackdoor.graph.purify import Pruning as Pruning
from unbackdoor.graph.purify import RobustTraining as RobustTraining
