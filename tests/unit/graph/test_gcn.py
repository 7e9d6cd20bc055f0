from __future__ import annotations

import pytest
import torch

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.graph import Graph
from unbackdoor.graph.gcn import GCN, Training, compact, cross_entropy, fit, probabilities
from unbackdoor.graph.laboratory import Staged

from .conftest import QUICK


@pytest.mark.parametrize("self_loops", [True, False])
def test_the_network_computes_what_kipf_and_welling_write(self_loops: bool) -> None:
    edges = torch.tensor([[0, 0, 1], [1, 2, 2]])
    features = torch.randn(4, 5, generator=rng.generator(0))
    with rng.isolated(rng.generator(1)):
        network = GCN(5, 3, hidden=6, self_loops=self_loops).eval()
    adjacency = torch.zeros(4, 4)
    adjacency[edges[0], edges[1]] = adjacency[edges[1], edges[0]] = 1.0
    if self_loops:
        adjacency += torch.eye(4)
    degree = adjacency.sum(1)
    scale = torch.where(degree > 0, degree.clamp(min=1).rsqrt(), 0.0)
    spread = scale.unsqueeze(1) * adjacency * scale
    hidden = (spread @ features @ network.embed.weight.t() + network.shift).relu()
    expected = spread @ hidden @ network.classify.weight.t() + network.offset
    assert torch.allclose(network(features, edges), expected, atol=1e-6)


def test_sparse_features_and_blocks_of_rows_give_the_same(staged: Staged) -> None:
    graph = staged.graph
    features = compact(graph.features)
    assert features.layout == torch.sparse_csr
    with rng.isolated(rng.generator(0)):
        network = GCN(features.shape[1], 4).eval()
    expected = network(graph.features, graph.edges)
    assert torch.allclose(network(features, graph.edges), expected, atol=1e-5)
    blocks = compact(graph.features[:100]), graph.features[100:]
    assert torch.allclose(network(blocks, graph.edges), expected, atol=1e-5)


def test_sparse_features_give_the_same_gradient(staged: Staged) -> None:
    gradients = []
    for features in (staged.graph.features, compact(staged.graph.features)):
        with rng.isolated(rng.generator(0)):
            network = GCN(features.shape[1], 4).eval()
        network(features, staged.graph.edges).square().sum().backward()
        gradient = network.embed.weight.grad
        assert gradient is not None
        gradients.append(gradient)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-4)


def test_without_self_loops_a_leaf_is_heard_of_by_its_edge_alone() -> None:
    edges = torch.tensor([[0, 1], [1, 2]])
    features, changed = torch.eye(3), torch.eye(3)
    changed[2] = 5.0
    with rng.isolated(rng.generator(0)):
        deaf, hearing = (GCN(3, 2, self_loops=loops).eval() for loops in (False, True))
    assert torch.equal(deaf(features, edges)[1], deaf(changed, edges)[1])
    assert not torch.equal(hearing(features, edges)[1], hearing(changed, edges)[1])


def test_edges_of_weight_zero_are_no_edges() -> None:
    edges = torch.tensor([[0, 1], [1, 2]])
    features = torch.eye(3)
    with rng.isolated(rng.generator(0)):
        network = GCN(3, 2).eval()
    weighted = network(features, edges, torch.tensor([1.0, 0.0]))
    assert torch.allclose(weighted, network(features, edges[:, :1]), atol=1e-6)


def test_training_learns_is_repeatable_and_leaves_global_randomness_alone(staged: Staged) -> None:
    graph = staged.division.training
    state = torch.get_rng_state()
    one = fit(graph, cross_entropy(graph.labels), QUICK, generator=rng.generator(4))
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    other = fit(graph, cross_entropy(graph.labels), QUICK, generator=rng.generator(4))
    assert torch.equal(probabilities(one, graph), probabilities(other, graph))
    known = graph.labelled
    right = probabilities(one, graph).argmax(1)[known] == graph.labels[known]
    assert float(right.float().mean()) > 0.8


@pytest.mark.parametrize(
    "graph",
    [
        Graph(torch.eye(3), torch.zeros(2, 0, dtype=torch.int64), torch.tensor([0, 1, 0])),
        Graph(torch.eye(3), torch.tensor([[0], [1]]), torch.tensor([0, 0, -1])),
        Graph(torch.eye(3), torch.tensor([[0], [1]]), torch.tensor([-1, -1, -1])),
    ],
)
def test_graphs_without_anything_to_learn_are_refused(graph: Graph) -> None:
    with pytest.raises(InvalidInputError, match="two classes"):
        fit(graph, cross_entropy(graph.labels), QUICK, generator=rng.generator(0))


@pytest.mark.parametrize("options", [{"epochs": 0}, {"hidden": 0}, {"dropout": 1.0}, {"learning_rate": 0.0}])
def test_impossible_trainings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match="at least 1"):
        Training(**options)  # type: ignore[arg-type]
