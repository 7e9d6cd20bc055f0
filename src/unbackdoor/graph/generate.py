"""Citation graphs made up: a degree-corrected block model with bags of words, for where no data are at hand.

They stand in for Cora, Citeseer and Pubmed: numbers of nodes, words and classes, mean degree and homophily
are theirs, and the share of words on topic is such that a graph network does about as well as there; the rest
is invented, so results on them are no results on the real graphs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbackdoor.errors import InvalidInputError
from unbackdoor.graph.data import Graph, undirected


@dataclass(frozen=True)
class CitationLike:
    """What a made-up citation graph is like.

    Source of the edges: Karrer and Newman, "Stochastic blockmodels and community structure in networks",
    Physical Review E 2011; degrees follow a power law.

    Args:
        nodes: Number of papers N.
        words: Size of the vocabulary F.
        classes: Number of topics.
        mean_degree: Mean number of neighbours.
        homophily: Share of the edges within a class, in [0, 1].
        length: Mean number of words of a paper.
        on_topic: Share of the words that come from the paper's topic, in [0, 1].
        topic_words: Share of the vocabulary that a topic uses; topics overlap.
        weighted: Weigh words by their rarity (TF-IDF), as Pubmed has it, instead of marking them with 1.
        degree_exponent: Of the power law of degrees, above 2.
    """

    nodes: int
    words: int
    classes: int
    mean_degree: float
    homophily: float
    length: float
    on_topic: float
    topic_words: float = 0.1
    weighted: bool = False
    degree_exponent: float = 2.5

    def scaled(self, scale: float) -> CitationLike:
        """Return the same kind of graph with ``scale`` times as many nodes, at least ten a class."""
        return replace(self, nodes=max(10 * self.classes, round(scale * self.nodes)))


PRESETS: dict[str, CitationLike] = {
    "cora-like": CitationLike(2708, 1433, 7, 3.9, 0.81, 18.0, 0.23),
    "citeseer-like": CitationLike(3327, 3703, 6, 2.74, 0.74, 32.0, 0.21),
    "pubmed-like": CitationLike(19717, 500, 3, 4.5, 0.80, 50.0, 0.12, 0.1, weighted=True),
    "tiny": CitationLike(400, 64, 4, 4.0, 0.80, 8.0, 0.4),
}
"""By the name that ``--data`` takes; ``tiny`` is for trials."""


def preset(text: str) -> CitationLike:
    """Return the preset that ``name`` or ``name:scale`` names, such as ``pubmed-like:0.1``.

    Raises:
        InvalidInputError: If there is none, or the scale is no number in (0, 10].
    """
    name, _, scale = text.partition(":")
    if name not in PRESETS:
        raise InvalidInputError(f"unknown graph {name!r}; known are {', '.join(PRESETS)}, or a path.")
    try:
        factor = float(scale or 1)
    except ValueError:
        factor = math.nan
    if not 0 < factor <= 10:
        raise InvalidInputError(f"the scale of a graph must lie in (0, 10], got {scale!r} in {text!r}.")
    return PRESETS[name].scaled(factor)


def generate(kind: CitationLike, generator: torch.Generator) -> Graph:
    """Return a made-up citation graph with all labels and features whose rows sum to 1.

    Args:
        kind: What it is like.
        generator: All randomness follows it; on the CPU.
    """
    # Classes of unequal size, as in the real graphs.
    shares = torch.randn(kind.classes, generator=generator).mul(0.3).exp()
    labels = shares.multinomial(kind.nodes, replacement=True, generator=generator)
    labels[: kind.classes] = torch.arange(kind.classes)
    return Graph(
        _features(kind, labels, generator),
        _edges(kind, labels, generator),
        labels,
        tuple(f"topic {label}" for label in range(kind.classes)),
    )


def _edges(kind: CitationLike, labels: Tensor, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(kind.nodes, generator=generator, dtype=torch.float64)
    propensity = (1 - uniform).pow(-1 / (kind.degree_exponent - 1)).clamp(max=50.0)
    wanted = round(kind.nodes * kind.mean_degree / 2)
    # More than wanted, because pairs repeat.
    count = round(1.3 * wanted) + 10
    first = propensity.multinomial(count, replacement=True, generator=generator)
    inside = torch.rand(count, generator=generator) < kind.homophily
    second = torch.empty_like(first)
    for label in range(kind.classes):
        for within in (True, False):
            places = ((labels[first] == label) & (inside == within)).nonzero().flatten()
            pool = propensity * ((labels == label) == within)
            if len(places) and float(pool.sum()) > 0:
                second[places] = pool.multinomial(len(places), replacement=True, generator=generator)
            else:
                second[places] = first[places]
    edges = undirected(torch.stack([first, second]))
    chosen = torch.randperm(edges.shape[1], generator=generator)[:wanted]
    return edges[:, chosen.sort().values]


def _features(kind: CitationLike, labels: Tensor, generator: torch.Generator) -> Tensor:
    ranks = torch.arange(1, kind.words + 1, dtype=torch.float64)
    popularity = (1 / ranks)[torch.randperm(kind.words, generator=generator)]
    # Three words at least: an empty row would be a node without features.
    lengths = torch.poisson(torch.full((kind.nodes,), kind.length), generator=generator).clamp(min=3).long()
    features = torch.zeros(kind.nodes, kind.words)
    owners = torch.arange(kind.nodes).repeat_interleave(lengths)
    on_topic = torch.rand(len(owners), generator=generator) < kind.on_topic
    for label in range(kind.classes):
        topic = torch.randperm(kind.words, generator=generator)[
            : max(1, round(kind.topic_words * kind.words))
        ]
        places = owners[on_topic & (labels[owners] == label)]
        drawn = popularity[topic].multinomial(len(places), replacement=True, generator=generator)
        features[places, topic[drawn]] = 1.0
    rest = owners[~on_topic]
    features[rest, popularity.multinomial(len(rest), replacement=True, generator=generator)] = 1.0
    if kind.weighted:
        rarity = (kind.nodes / features.sum(0).clamp(min=1)).log().clamp(min=0.1)
        features = features * rarity
    return normalised(features)


def normalised(features: Tensor) -> Tensor:
    """Divide each row by the sum of its absolute values; rows of zeros stay."""
    return features / features.abs().sum(1, keepdim=True).clamp(min=torch.finfo(features.dtype).tiny)
