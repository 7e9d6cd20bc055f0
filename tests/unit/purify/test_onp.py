from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

import networks as nets
from unbackdoor import rng
from unbackdoor.errors import InvalidInputError, MissingDependencyError, UnsupportedModelError
from unbackdoor.filters import find_filters
from unbackdoor.filters.mask import FilterMask
from unbackdoor.filters.saliency import clean_loss, taylor_saliency
from unbackdoor.models import build
from unbackdoor.purify.filter_graph import FEATURES, FilterGraph, Residual, filter_graph
from unbackdoor.purify.onp import ONP, Agent
from unbackdoor.purify.pruning_search import Limits, Objective, Search, Worth, by_chance, by_greed
from unbackdoor.suppression import Suppression
from unbackdoor.testing import planted_backdoor
from unbackdoor.testing.subjects import small_data, small_network
from unbackdoor.types import silent

needs_rl = pytest.mark.skipif(
    any(find_spec(package) is None for package in ("gymnasium", "sb3_contrib")), reason="needs the extra rl"
)
PAYING = {1, 4, 6}
"""Nodes of the made-up search that are worth removing."""


def graph_of(residual: Residual, width: int = 4) -> tuple[FilterGraph, int]:
    with rng.isolated(rng.generator(0)):
        model = build("resnet10", width=width, num_classes=4)
    filter_map, data = find_filters(model, torch.zeros(1, 3, 12, 12)), small_data()
    saliency = taylor_saliency(model, data, filter_map)
    graph = filter_graph(model, model, filter_map, saliency, saliency, residual=residual, neighbours=2)
    return graph, sum(group.filters for group in filter_map.prunable)


def test_every_filter_is_in_one_node() -> None:
    for residual in ("group", "single"):
        graph, filters = graph_of(residual)
        members = [member for node in graph.nodes for member in node]
        assert len(members) == len(set(members)) == filters
        assert graph.features.shape == (len(graph), FEATURES)
        assert bool(torch.isfinite(graph.features).all())


def test_residual_sums_tie_filters_of_one_channel() -> None:
    graph, _ = graph_of("group")
    node = next(node for node in graph.nodes if ("conv1", 2) in node)
    assert {index for _, index in node} == {2}
    assert ("layer1.0.conv2", 2) in node
    single, filters = graph_of("single")
    assert len(single) == filters > len(graph)


def test_edges_join_the_strongest_inputs_both_ways() -> None:
    model = small_network()
    second = model[4]
    with torch.no_grad():
        assert isinstance(second, torch.nn.Conv2d)
        second.weight.fill_(0.01)
        second.weight[3, 5] = 1.0
    filter_map, data = find_filters(model, torch.zeros(1, 3, 12, 12)), small_data()
    saliency = taylor_saliency(model, data, filter_map)
    graph = filter_graph(model, model, filter_map, saliency, saliency, residual="group", neighbours=1)
    place = {node[0]: index for index, node in enumerate(graph.nodes)}
    edge = [place["0", 5], place["4", 3]]
    pairs = graph.edges.t().tolist()
    assert edge in pairs
    assert edge[::-1] in pairs
    assert len(pairs) == 2 * 16
    # What a node hears is at most a mean.
    heard = torch.zeros(len(graph)).index_add(0, graph.edges[1], graph.weights)
    assert float(heard.max()) <= 1 + 1e-6


def test_worth_is_measured_exactly_and_nothing_stays_removed() -> None:
    model, data = small_network().eval(), small_data()
    copy = suppressed_like(model)
    filter_map = find_filters(model, data.floats()[:1])
    objective = Objective(model, copy, data, filter_map, "silence", Limits(10.0, 1.0), 2.0, 0.01)
    places = [("0", 3), ("4", 1)]
    mask = FilterMask.full(filter_map).without(places)
    losses = [clean_loss(mask.apply(network, filter_map), data) for network in (model, copy)]
    starts = [clean_loss(network, data) for network in (model, copy)]
    expected = (starts[1] - losses[1]) / starts[1] - 2.0 * max(0.0, losses[0] - starts[0]) - 0.02
    for _ in range(2):
        assert objective.worth(places).value == pytest.approx(expected, abs=1e-5)
        assert objective.worth([]).value == pytest.approx(0.0, abs=1e-6)
    strict = Objective(model, copy, data, filter_map, "silence", Limits(-1.0, 1.0), 2.0, 0.01)
    assert not strict.worth(places).allowed


def suppressed_like(model: torch.nn.Sequential) -> torch.nn.Module:
    copy = small_network().eval()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        copy[4].weight.mul_(-1.0)  # type: ignore[operator]
    return copy


def made_up(steps: int, **changed: object) -> Search:
    """Return a search in which each of PAYING brings 1, others cost 1, and more than 5 nodes are too many."""

    def worth(places: object) -> Worth:
        removed = {index for _, index in places}  # type: ignore[attr-defined]
        return Worth(float(2 * len(removed & PAYING) - len(removed)), len(removed) <= 5)

    options: dict[str, object] = {
        "nodes": tuple((("layer", index),) for index in range(12)), "worth": worth,
        "candidates": torch.ones(12, dtype=torch.bool), "horizon": 8, "penalty": 1.0, "steps": steps,
        "seconds": 60.0, "progress": silent,
    } | changed  # fmt: skip
    return Search(**options)  # type: ignore[arg-type]


def test_greed_keeps_what_pays() -> None:
    search = made_up(100)
    by_greed(search, -torch.arange(12.0))
    assert search.best == PAYING
    assert search.best_value == 3.0
    assert search.taken < 40
    assert search.mean_gains()[[1, 4, 6]].tolist() == [1.0, 1.0, 1.0]
    assert search.mean_gains()[0] == -1.0


def test_chance_finds_something_and_keeps_to_the_budget() -> None:
    search = made_up(200)
    by_chance(search, rng.generator(0))
    assert search.taken == 200
    assert 1.0 <= search.best_value <= 3.0
    assert len(search.describe()["best_value_by_step"]) <= 51


def test_only_candidates_are_tried() -> None:
    search = made_up(50, candidates=torch.arange(12) < 3)
    by_chance(search, rng.generator(0))
    assert search.best == {1}
    assert search.mean_gains()[3:].abs().sum() == 0


def test_a_search_ends_when_the_time_is_up() -> None:
    search = made_up(10**9, seconds=0.05)
    by_chance(search, rng.generator(0))
    assert 0 < search.taken < 10**6


def ring() -> FilterGraph:
    """Return a graph whose nodes say in their features whether they pay."""
    features = torch.zeros(12, FEATURES)
    features[list(PAYING), 3] = 1.0
    edges = torch.stack([torch.arange(12), (torch.arange(12) + 1) % 12])
    nodes = tuple((("layer", index),) for index in range(12))
    return FilterGraph(nodes, features, torch.cat([edges, edges.flip(0)], 1), torch.full((24,), 0.5))


def learnt(steps: int, learning_rate: float, rollout: int = 64) -> tuple[Search, frozenset[int], int]:
    """Return an agent's search, the set that its policy built in the end, and the number of updates."""
    from unbackdoor.purify.pruning_agent import learn

    search, built = made_up(steps), [frozenset[int]()]
    original = search.step

    def step(removed: frozenset[int], node: int) -> tuple[float, bool]:
        built.append(removed | {node})
        return original(removed, node)

    search.step = step  # type: ignore[method-assign]
    with rng.fenced(rng.generator(1)) as seed:
        updates = learn(
            ring(),
            search,
            seed=seed,
            hidden=16,
            rounds=1,
            rollout=rollout,
            passes=8,
            learning_rate=learning_rate,
            entropy=0.0,
        )
    return search, built[-1], updates


@needs_rl
def test_the_agent_learns_from_the_features_which_nodes_pay() -> None:
    search, built, updates = learnt(640, 0.02)
    assert search.best == PAYING
    # The policy is followed in the end: it builds the best set by itself, and no other has learnt to.
    assert built == PAYING
    assert updates == 9  # of 64 steps, with 8 kept for the end
    assert search.taken <= 640
    assert learnt(640, 1e-9)[1] != PAYING


@needs_rl
@pytest.mark.parametrize("steps", [3, 4, 20, 64])
def test_a_small_budget_has_shorter_rollouts_and_is_learnt_from_all_the_same(steps: int) -> None:
    search, _, updates = learnt(steps, 0.02)
    assert updates == 1
    assert search.taken <= steps
    with pytest.raises(InvalidInputError, match="learns nothing from 2 steps"):
        ONP(steps=2)
    assert ONP("greedy", steps=2).steps == 2


def test_estimates_are_the_reward_to_first_order_and_in_its_unit() -> None:
    method = ONP(clean_weight=2.0, price=0.01)
    own = {"a": torch.tensor([0.1, -0.2]), "b": torch.tensor([0.3])}
    copied = {"a": torch.tensor([-1.0, 0.5]), "b": torch.tensor([-2.0])}
    nodes = [[("a", 0), ("b", 0)], [("a", 1)]]
    found = method.estimates(nodes, own, copied, 4.0)
    assert found == pytest.approx([3.0 / 4 - 2 * 0.4 - 0.02, -0.5 / 4 - 0.01])


@needs_rl
def test_the_environment_keeps_the_rules_of_gymnasium() -> None:
    import warnings

    from gymnasium.utils.env_checker import check_env

    from unbackdoor.purify.pruning_agent import PruningEnv

    environment = PruningEnv(made_up(1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(environment, skip_render_check=True)
    environment.reset()
    environment.step(4)
    assert environment.action_masks().tolist() == [index != 4 for index in range(13)]
    _, reward, ended, _, _ = environment.step(12)
    assert (reward, ended) == (0.0, True)


@needs_rl
def test_global_randomness_is_fenced() -> None:
    before = torch.get_rng_state()
    planted = planted_backdoor(target_class=3)
    data = planted.clean_data(40, rng.generator(0))
    method = ONP(
        steps=12, horizon=3, agent=Agent(rollout=4), suppression=Suppression(budget=2, batch_size=16)
    )
    method.purify(planted.model, data, generator=rng.generator(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("search", ["greedy", "random"])
def test_searches_stay_within_the_limits(search: str) -> None:
    planted = planted_backdoor(target_class=3)
    data = planted.clean_data(120, rng.generator(0))
    method = ONP(search, steps=60, candidates=1.0, suppression=Suppression(budget=30, batch_size=32))  # type: ignore[arg-type]
    result = method.purify(planted.model, data, generator=rng.generator(0))
    rise = clean_loss(result.model, data) - clean_loss(planted.model, data)
    assert rise <= method.limits.loss + 1e-5
    assert result.diagnostics["steps"] <= 60
    assert result.mask is not None
    removed = result.mask.n_removed
    assert (result.diagnostics["best_value"] > 0) == (removed > 0)


def test_a_missing_extra_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(MissingDependencyError, match=r"\[rl\]"):
        ONP().purify(small_network(), small_data(), generator=rng.generator(0))


def test_networks_without_filters_are_refused() -> None:
    head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 144, nets.CLASSES))
    with pytest.raises(UnsupportedModelError, match="no filters"):
        ONP("greedy").purify(head, small_data(), generator=rng.generator(0))


@pytest.mark.parametrize(
    "options", [{"search": "x"}, {"steps": 0}, {"seconds": 0.0}, {"candidates": 0.0}, {"residual": "all"}]
)
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        replace(ONP(), **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError):
        Agent(rollout=1)
