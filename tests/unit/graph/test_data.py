from __future__ import annotations

import pytest
import torch

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.graph import Graph, divide, generate, preset
from unbackdoor.graph.data import undirected
from unbackdoor.graph.edges import degrees, similarities, thinned

PATH = torch.tensor([[0, 1, 2], [1, 2, 3]])


def small() -> Graph:
    return Graph(torch.eye(4), PATH, torch.tensor([0, 1, 0, 2]))


def test_pairs_become_edges_once_and_without_loops() -> None:
    pairs = torch.tensor([[1, 0, 2, 2, 3], [0, 1, 2, 1, 0]])
    assert undirected(pairs).tolist() == [[0, 0, 1], [1, 3, 2]]


@pytest.mark.parametrize(
    ("features", "edges", "labels", "complaint"),
    [
        (torch.eye(4, dtype=torch.float64), PATH, torch.zeros(4).long(), "float32"),
        (torch.full((4, 2), torch.nan), PATH, torch.zeros(4).long(), "finite"),
        (torch.eye(4), PATH, torch.zeros(3).long(), "one label a node"),
        (torch.eye(4), PATH, torch.full((4,), -2), "at least -1"),
        (torch.eye(4), PATH + 1, torch.zeros(4).long(), "from 0 to 3"),
        (torch.eye(4), PATH.flip(0), torch.zeros(4).long(), "undirected"),
        (torch.eye(4), torch.cat([PATH, PATH], 1), torch.zeros(4).long(), "undirected"),
        (torch.eye(4), PATH.float(), torch.zeros(4).long(), "int64"),
    ],
)
def test_unsound_graphs_are_refused(
    features: torch.Tensor, edges: torch.Tensor, labels: torch.Tensor, complaint: str
) -> None:
    with pytest.raises(InvalidInputError, match=complaint):
        Graph(features, edges, labels)


def test_a_part_of_a_graph_keeps_its_edges_and_the_number_of_classes() -> None:
    part = small().induced(torch.tensor([2, 0, 1]))
    assert part.edges.tolist() == [[0, 1], [2, 2]]
    assert part.labels.tolist() == [0, 0, 1]
    assert part.num_classes == 3
    assert torch.equal(part.features, torch.eye(4)[[2, 0, 1]])


def test_told_labels_are_all_that_is_known() -> None:
    told = small().told(torch.tensor([1, 3]))
    assert told.labels.tolist() == [-1, 1, -1, 2]
    assert told.labelled.tolist() == [1, 3]
    assert small().labels.tolist() == [0, 1, 0, 2]


def test_a_division_keeps_unseen_nodes_out_of_training(graph: Graph) -> None:
    division = divide(graph, rng.generator(3), labelled=0.2, unseen=0.2)
    training, whole = division.training, division.whole
    assert (len(training), len(whole)) == (480, 600)
    assert len(training.labelled) == 120
    unseen = torch.cat([division.test, division.victims])
    assert sorted(unseen.tolist()) == list(range(480, 600))
    known = training.labelled
    assert torch.equal(training.labels[known], whole.labels[known])
    assert torch.equal(training.features, whole.features[:480])
    # The whole graph is the one that was divided, renumbered.
    assert torch.equal(degrees(whole.edges, 600).sort().values, degrees(graph.edges, 600).sort().values)


@pytest.mark.parametrize(("labelled", "unseen"), [(0.0, 0.2), (0.9, 0.2), (0.2, 0.0)])
def test_shares_that_leave_nothing_are_refused(graph: Graph, labelled: float, unseen: float) -> None:
    with pytest.raises(InvalidInputError, match="shares"):
        divide(graph, rng.generator(0), labelled=labelled, unseen=unseen)


def test_made_up_graphs_are_what_was_ordered() -> None:
    kind = preset("cora-like:0.3")
    graph = generate(kind, rng.generator(0))
    same = generate(kind, rng.generator(0))
    assert torch.equal(graph.edges, same.edges)
    assert torch.equal(graph.features, same.features)
    assert (len(graph), graph.num_classes, graph.features.shape[1]) == (812, 7, 1433)
    assert graph.labels.bincount().min() > 0
    assert 2 * graph.edges.shape[1] / len(graph) == pytest.approx(3.9, abs=0.1)
    alike = graph.labels[graph.edges[0]] == graph.labels[graph.edges[1]]
    assert float(alike.float().mean()) == pytest.approx(0.81, abs=0.05)
    assert torch.allclose(graph.features.sum(1), torch.ones(len(graph)))
    assert bool((graph.features >= 0).all())


@pytest.mark.parametrize("text", ["cora", "cora-like:0", "cora-like:many", "tiny:nan"])
def test_unknown_presets_are_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match=r"known are|scale"):
        preset(text)


def test_thinning_drops_the_rate_and_rescues_the_lonely() -> None:
    nodes = 3000
    ring = undirected(torch.stack([torch.arange(nodes), (torch.arange(nodes) + 1) % nodes]))
    plain = thinned(ring, nodes, 0.5, rng.generator(0), rescue=False)
    assert plain.shape[1] / nodes == pytest.approx(0.5, abs=0.04)
    rescued = thinned(ring, nodes, 0.5, rng.generator(0))
    assert int(degrees(rescued, nodes).min()) == 1
    # A node that lost both edges gets both back.
    lonely = (degrees(plain, nodes) == 0).nonzero().flatten()
    assert bool((degrees(rescued, nodes)[lonely] == 2).all())


def test_similarity_is_that_of_the_ends() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    graph = Graph(features, torch.tensor([[0, 0, 1], [1, 2, 2]]), torch.tensor([0, 0, 0]))
    assert similarities(graph).tolist() == pytest.approx([0.5**0.5, 0.0, 0.5**0.5])
