"""A network as a graph: what can be pruned are its nodes, what feeds what are its edges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from unbackdoor.filters.groups import FilterGroup, FilterMap
from unbackdoor.filters.magnitude import magnitudes

Residual = Literal["group", "single"]

FEATURES = 9
"""Numbers that describe a node."""


@dataclass(frozen=True, eq=False)
class FilterGraph:
    """The nodes and edges of a network.

    Args:
        nodes: What is pruned together, as (layer, filter): one filter, or those that a residual sum ties.
        features: float32 ``(U, 9)``: per filter, mean over the node: magnitude in the model and in a
            suppressed copy and first-order saliency in both, each standardised within its layer; the layer's
            mean saliency in both, its depth, its width and whether it is a convolution.
        edges: int64 ``(2, M)``, in both directions.
        weights: float32 ``(M,)``: strength of the connection over the strongest into the same filter, divided
            by the number of edges into the node.
    """

    nodes: tuple[tuple[tuple[str, int], ...], ...]
    features: Tensor
    edges: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.nodes)


def filter_graph(
    model: nn.Module,
    copy: nn.Module,
    filter_map: FilterMap,
    saliency: Mapping[str, Tensor],
    copy_saliency: Mapping[str, Tensor],
    *,
    residual: Residual,
    neighbours: int,
) -> FilterGraph:
    """Build the graph of a network.

    Args:
        model: The network.
        copy: A suppressed copy of it.
        filter_map: From ``find_filters`` of the model.
        saliency: Layer to ``(filters,)``: rise of the clean loss without the filter, first order.
        copy_saliency: The same on the copy.
        residual: ``group`` makes one node of filters tied by a residual sum; ``single`` joins them by edges.
        neighbours: Strongest inputs of each filter that become edges.
    """
    layers = {group.name: group for group in filter_map.prunable}
    ties = _tied_layers(filter_map, layers)
    nodes = _nodes(layers, ties if residual == "group" else [])
    place = {member: index for index, node in enumerate(nodes) for member in node}
    described = _described(model, copy, filter_map, saliency, copy_saliency)
    features = torch.stack(
        [torch.stack([described[layer][index] for layer, index in node]).mean(0) for node in nodes]
    )
    pairs = _connections(model, layers, place, neighbours)
    if residual == "single":
        pairs += [
            (place[one, i], place[other, i], 1.0) for tie in ties for one, other, i in _steps(tie, layers)
        ]
    edges, weights = _both_ways(pairs, len(nodes))
    return FilterGraph(tuple(nodes), features, edges, weights)


def _tied_layers(filter_map: FilterMap, layers: Mapping[str, FilterGroup]) -> list[list[str]]:
    """Return the sets of layers whose filters are added channel by channel somewhere, in running order."""
    sets: list[set[str]] = []
    for group in filter_map.groups:
        read = {name for name in group.reads if name in layers}
        joined = [other for other in sets if other & read]
        sets = [other for other in sets if not other & read]
        if read:
            sets.append(read.union(*joined))
    return [[name for name in layers if name in tie] for tie in sets if len(tie) > 1]


def _nodes(layers: Mapping[str, FilterGroup], ties: list[list[str]]) -> list[tuple[tuple[str, int], ...]]:
    leader = {name: tie for tie in ties for name in tie}
    nodes: list[tuple[tuple[str, int], ...]] = []
    for name, group in layers.items():
        members = leader.get(name, [name])
        if members[0] == name:
            nodes += [tuple((member, index) for member in members) for index in range(group.filters)]
    return nodes


def _steps(tie: list[str], layers: Mapping[str, FilterGroup]) -> list[tuple[str, str, int]]:
    return [(one, other, i) for one, other in pairwise(tie) for i in range(layers[one].filters)]


def _described(
    model: nn.Module,
    copy: nn.Module,
    filter_map: FilterMap,
    saliency: Mapping[str, Tensor],
    copy_saliency: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return ``(filters, 9)`` for each layer."""
    norms, copy_norms = magnitudes(model, filter_map), magnitudes(copy, filter_map)
    described = {}
    for depth, group in enumerate(filter_map.prunable):
        name, ones = group.name, torch.ones(group.filters)
        described[name] = torch.stack(
            [
                _standardised(norms[name]),
                _standardised(copy_norms[name]),
                _standardised(saliency[name]),
                _standardised(copy_saliency[name]),
                ones * _signed_root(saliency[name].float().mean()).cpu(),
                ones * _signed_root(copy_saliency[name].float().mean()).cpu(),
                ones * depth / max(1, len(filter_map.prunable) - 1),
                ones * torch.tensor(float(group.filters)).log2() / 10,
                ones * float(group.kind == "conv"),
            ],
            dim=1,
        )
    return described


def _standardised(values: Tensor) -> Tensor:
    values = values.detach().float().cpu()
    spread = values.std(unbiased=False)
    return ((values - values.mean()) / spread.clamp(min=1e-12)).clamp(-5, 5)


def _signed_root(value: Tensor) -> Tensor:
    # Saliencies span orders of magnitude between layers.
    return value.sign() * value.abs().sqrt()


def _connections(
    model: nn.Module,
    layers: Mapping[str, FilterGroup],
    place: Mapping[tuple[str, int], int],
    neighbours: int,
) -> list[tuple[int, int, float]]:
    """Return (from, to, strength) for the strongest inputs of each filter."""
    parameters = dict(model.named_parameters())
    found = []
    for group in layers.values():
        weight = parameters[group.weight].detach().abs().float().cpu()
        strength = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
        for source in (name for name in group.reads if name in layers):
            if strength.shape[1] == layers[source].filters:
                values, inputs = strength.topk(min(neighbours, strength.shape[1]), dim=1)
                shares = values / values[:, :1].clamp(min=1e-12)
                found += [
                    (place[source, i], place[group.name, j], share)
                    for j, (row, parts) in enumerate(zip(inputs.tolist(), shares.tolist(), strict=True))
                    for i, share in zip(row, parts, strict=True)
                ]
            elif strength.shape[1] == 1:  # depthwise: a filter reads the channel of its own number
                each = range(min(group.filters, layers[source].filters))
                found += [(place[source, i], place[group.name, i], 1.0) for i in each]
    return found


def _both_ways(pairs: list[tuple[int, int, float]], nodes: int) -> tuple[Tensor, Tensor]:
    rows = [(one, other, s) for one, other, s in pairs if one != other]
    if not rows:
        return torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0)
    forward = torch.tensor([row[:2] for row in rows]).t()
    edges = torch.cat([forward, forward.flip(0)], dim=1)
    strengths = torch.tensor([row[2] for row in rows]).repeat(2)
    return edges, strengths / torch.bincount(edges[1], minlength=nodes)[edges[1]]
