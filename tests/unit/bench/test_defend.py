from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.attacks import BadNets
from unbackdoor.bench import zoo
from unbackdoor.bench.artefact import save_clean, save_infected
from unbackdoor.bench.cell import Cell
from unbackdoor.bench.defend import Bench, cell_of, is_older, line_of, run
from unbackdoor.bench.detecting import area, caught_at, detect, training_set
from unbackdoor.bench.recording import series
from unbackdoor.bench.saliency import triggered
from unbackdoor.bench.store import Record, Store
from unbackdoor.data.splits import draw_balanced
from unbackdoor.errors import InvalidInputError
from unbackdoor.evaluate import BackdoorMetrics, clean_accuracy, evaluate
from unbackdoor.filters import FilterMask, find_filters
from unbackdoor.filters.saliency import clean_loss, exact_saliency
from unbackdoor.filters.select import order
from unbackdoor.models import build
from unbackdoor.purify import CLP
from unbackdoor.testing.subjects import small_data
from unbackdoor.train import Recipe
from unbackdoor.types import Detection, LabelledImages, LabelRule, Trigger

TRAIN, TEST = small_data(80), small_data(60)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("zoo")
    for name in ("badnets", "clean"):
        (root / name).mkdir()
    attack = BadNets(recipe=Recipe(epochs=1, batch_size=16), poison_fraction=0.3)
    infected = attack.run(
        TRAIN, lambda: build("resnet10", width=4, num_classes=4), generator=rng.generator(0)
    )
    job = {"job": {"arch": "resnet10"}}
    save_clean(root / "clean", infected.model, TEST, seed=0, record=job)
    save_infected(root / "badnets", infected, TEST, attack=attack, seed=0, extra=job)
    return Bench((root,), TRAIN, TEST)


def cell(bench: Bench, model: str, method: str, **options: str) -> Cell:
    entry = bench.entry(model)
    return cell_of(
        entry, method, data="small", options=options, clean_images=32, reactivate=model == "badnets"
    )


def test_a_cell_spells_out_what_decides_its_result(bench: Bench) -> None:
    one, other = cell(bench, "badnets", "clp"), cell(bench, "badnets", "clp", u="2")
    assert one.settings["u"] == "3"
    assert other.settings["u"] == "2"
    assert one.key != other.key
    assert one.key == cell(bench, "badnets", "CLP").key


def test_a_cell_of_other_defaults_is_older(bench: Bench) -> None:
    asked = cell(bench, "badnets", "clp", u="2").describe()
    assert not is_older(asked)
    assert is_older({**asked, "settings": {**asked["settings"], "u": "5"}})
    assert is_older({**asked, "method_version": 0})
    assert is_older({**asked, "method": "a_method_that_was_taken_out"})


def test_a_record_holds_what_was_asked_measured_and_spent(bench: Bench) -> None:
    record = bench.answer(cell(bench, "badnets", "clp"))
    assert record["status"] == "ok"
    assert record["attack"] == "badnets"
    assert set(record["after"]) == {"clean_accuracy", "attack_success", "robust_accuracy"}
    assert record["before"]["clean_accuracy"]["n"] == 60
    assert record["cost"]["forward_images"] > 0
    assert record["reactivated"]["retuned_accuracy"]["n"] == 30
    assert 0 <= record["reactivated"]["queried_without_trigger"]["value"] <= 1
    json.dumps(record, allow_nan=False)
    assert set(bench.answer(cell(bench, "clean", "clp"))["after"]) == {"clean_accuracy"}


def test_a_suspect_is_measured_once_for_all_methods(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[nn.Module] = []

    def counted(
        model: nn.Module, test: LabelledImages, trigger: Trigger, label_rule: LabelRule
    ) -> BackdoorMetrics:
        measured.append(model)
        return evaluate(model, test, trigger, label_rule)

    monkeypatch.setattr("unbackdoor.bench.defend.evaluate", counted)
    fresh = Bench(bench.homes, TRAIN, TEST)
    whole = replace(cell(bench, "badnets", "clp", **{"selection.amount": "count"}), reactivate=False)
    few = replace(whole, test_images=40)
    records = [fresh.answer(asked) for asked in (whole, few, few)]
    assert len(measured) == 3 + 2
    assert [record["before"]["clean_accuracy"]["n"] for record in records] == [60, 40, 40]


def test_a_refusal_is_a_record(bench: Bench) -> None:
    record = bench.answer(replace(cell(bench, "clean", "bnp"), clean_images=1))
    assert record["status"] == "refused"
    assert "at least 2" in record["problem"]
    assert record["attack"] is None
    refused = bench.answer(replace(cell(bench, "badnets", "bnp"), clean_images=1))
    assert (refused["status"], refused["attack"]) == ("refused", "badnets")
    assert refused["trained"]["valid"] in (True, False)


def test_finished_cells_are_not_answered_again(bench: Bench, tmp_path: Path) -> None:
    store, lines = Store(tmp_path / "records.jsonl"), list[str]()
    cells = [cell(bench, "clean", "clp"), cell(bench, "clean", "bnp")]
    run(bench, cells[:1], store, said=lines.append)
    run(bench, cells, store, said=lines.append)
    assert [line.split(":")[0] for line in lines] == [
        "clean clp 32 images seed 0",
        "clean bnp 32 images seed 0",
    ]
    assert list(store.records()) == [each.key for each in cells]
    with store.claim(cells[0].key):
        store.path.unlink()
        run(bench, cells[:1], store, said=lines.append)
    assert len(lines) == 2  # somebody else works on it


def test_old_questions_keep_their_keys_and_new_ones_have_others(bench: Bench) -> None:
    one = cell(bench, "badnets", "clp")
    assert not {"task", "samples", "method_version", "oracle"} & set(one.describe())
    changes: list[dict[str, Any]] = [{}, {"method_version": 2}, {"samples": 5}, {"oracle": True}]
    assert len({replace(one, **change).key for change in changes}) == 4
    assert one.label == "badnets clp 32 images reactivated seed 0"
    assert replace(one, method="ft_sam", clean_images=500).label == "badnets ft-sam reactivated seed 0"
    plain = replace(one, reactivate=False, paper=True, options={"u": "2"})
    assert plain.label == "badnets clp (paper, u=2) 32 images seed 0"


def test_a_record_has_a_log_the_courses_and_how_the_model_was_made(bench: Bench) -> None:
    record = bench.answer(cell(bench, "badnets", "fp", **{"recipe.epochs": "2"}))
    assert record["trained"]["label_rule"] == {"rule": "all_to_one", "target_class": 0}
    assert record["trained"]["poisoned"] == 24
    assert any(line.endswith("2 of 2") for line in record["log"]), record["log"]
    assert series({"options": {"a": [1, 2]}, "b": {"losses": [1.0, float("nan")]}, "c": [1], "d": "x"}) == {
        "b.losses": [1.0, None]
    }
    assert series(
        {"walk": [{"layer": "a", "filter": 3, "loss": 0.123456}, {"layer": "b", "loss": None}]}
    ) == {"walk.loss": [0.1235, None]}
    assert len(series({"long": list(range(1000))})["long"]) == 200


def test_the_oracle_curve_prunes_the_model_in_the_order_of_the_scores(bench: Bench) -> None:
    record = bench.answer(replace(cell(bench, "badnets", "clp"), oracle=True, reactivate=False))
    curve = record["oracle_curve"]
    assert [step["removed"] for step in curve] == [0, 1, 2, 5, 10, 20, 30, 50, 100]
    assert {name: curve[0][name] for name in record["before"]} == record["before"]
    infected = zoo.load_infected(bench.entry("badnets"))
    found = find_filters(infected.model, TEST.images[:1].float())
    scores = CLP().purify(infected.model, draw_balanced(TRAIN, 32, rng.generator(0)),
                          generator=rng.generator(0)).scores  # fmt: skip
    five = FilterMask.full(found).without(order(scores)[:5]).apply(infected.model, found)
    assert curve[3]["clean_accuracy"] == clean_accuracy(five, TEST).describe()
    assert "oracle_curve" not in bench.answer(cell(bench, "badnets", "clp"))
    for other in (cell(bench, "clean", "clp"), cell(bench, "badnets", "ft", **{"recipe.epochs": "1"})):
        assert "oracle_curve" not in bench.answer(replace(other, oracle=True, reactivate=False))


def test_a_bug_in_a_method_is_a_record(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: CLP, *_: object, **__: object) -> None:
        raise KeyError("layer")

    monkeypatch.setattr(CLP, "purify", broken)
    record = bench.answer(cell(bench, "clean", "clp"))
    assert (record["status"], record["problem"]) == ("failed", "KeyError: 'layer'")


def detection(
    bench: Bench, model: str, method: str, *, samples: int = 0, options: Mapping[str, str] | None = None
) -> Record:
    one = cell_of(
        bench.entry(model),
        method,
        data="small",
        task="detect",
        options=options or {},
        clean_images=32,
        samples=samples,
    )
    return bench.answer(one)


def test_detectors_of_models_training_sets_and_inputs_are_asked_in_their_ways(bench: Bench) -> None:
    model = detection(bench, "badnets", "collapse", options={"suppression.budget": "5"})
    assert (model["kind"], model["true_target"]) == ("model", 0)
    assert model["flagged"] is (None if model["undetermined"] else model["score"] >= model["threshold"])
    trained_on = detection(bench, "badnets", "sc", samples=60)
    assert trained_on["status"] == "ok", trained_on
    assert trained_on["kind"] == "training set"
    inputs = detection(bench, "badnets", "strip", options={"n": "4"})
    assert inputs["kind"] == "inputs"
    assert inputs["inputs_caught"]["n"] == 45  # of 60 test images, those that are not of the target class
    assert 0 <= inputs["area_under_curve"] <= 1
    caught = [inputs["inputs_caught"]["value"], *inputs["inputs_caught_at"].values()]
    assert caught == sorted(caught)
    json.dumps([model, trained_on, inputs], allow_nan=False)
    refused = detection(bench, "clean", "strip")
    assert (refused["status"], "no triggered inputs" in refused["problem"]) == ("refused", True)


def test_the_suspect_training_set_carries_the_poison(bench: Bench) -> None:
    infected = zoo.load_infected(bench.entry("badnets"))
    shown = training_set(TRAIN, infected, 0, rng.generator(0))
    changed = (shown.images != TRAIN.images).flatten(1).any(1)
    poisoned = torch.zeros(len(TRAIN), dtype=torch.bool)
    poisoned[infected.plan.indices] = True
    assert not (changed & ~poisoned).any()
    assert torch.equal(shown.labels[infected.plan.indices], infected.plan.new_labels)
    assert len(training_set(TRAIN, infected, 30, rng.generator(0))) == 30
    assert training_set(TRAIN, None, 0, rng.generator(0)) is TRAIN
    with pytest.raises(InvalidInputError, match="of a training set of 10"):
        training_set(TRAIN.subset(torch.arange(10)), infected, 0, rng.generator(0))


def test_what_is_shown_of_the_training_set_does_not_follow_the_attackers_draw(bench: Bench) -> None:
    # The attacker draws by the same seed in the same way, as BadNets does with 0.
    infected = zoo.load_infected(bench.entry("badnets"))
    chosen = (
        torch.randperm(len(TRAIN), generator=rng.spawn(rng.generator(0)))[: len(TRAIN) // 2].sort().values
    )
    plan = replace(infected.plan, indices=chosen, new_labels=torch.full((len(chosen),), 3))
    seen: list[Tensor] = []

    class Look:
        def score(self, model: nn.Module, samples: Tensor) -> None: ...

        def judge(
            self, model: nn.Module, images: Tensor, clean: LabelledImages, *, labels: Tensor, **rest: object
        ) -> Detection:
            seen.append(labels)
            return Detection(0.0, 1.0, "none")

    detect(
        Look(), infected.model, replace(infected, plan=plan), TEST, train=TRAIN, test=TEST,
        samples=len(TRAIN) // 2, generator=rng.generator(0),
    )  # fmt: skip
    assert 0.3 < float((seen[0] == 3).float().mean()) < 0.85


def test_inputs_above_what_a_share_of_clean_ones_exceeds_by_hand() -> None:
    clean = torch.tensor([0.0] * 8 + [1.0] * 2)
    assert caught_at(0.2, torch.tensor([1.0, 0.5]), clean).successes == 2
    # Two of ten clean scores equal those of triggered inputs: below that share nothing can be flagged.
    assert caught_at(0.1, torch.tensor([1.0, 0.5]), clean).successes == 0


def test_the_area_under_the_curve_by_hand() -> None:
    assert area(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0])) == 0.75
    assert area(torch.tensor([1.0]), torch.tensor([1.0, 1.0])) == 0.5


def test_every_filter_is_measured_on_clean_and_triggered_images(bench: Bench) -> None:
    entry = bench.entry("badnets")
    record = bench.answer(cell_of(entry, "ablate", data="small", task="ablate", clean_images=12))
    assert record["status"] == "ok", record
    # It runs the network operation by operation, so that no passes are seen; none are claimed.
    assert set(record["cost"]) == {"seconds", "cpu_seconds", "peak_memory_mb"}
    infected = zoo.load_infected(entry)
    images = draw_balanced(TEST, 12, rng.generator(0))
    stamped = triggered(images, infected)
    assert stamped.labels.tolist() == [0] * 12
    assert record["backdoor_loss"] == pytest.approx(clean_loss(infected.model, stamped), abs=1e-5)
    found = find_filters(infected.model, images.floats())
    assert list(record["filters"]) == [group.name for group in found.prunable]
    (change,) = exact_saliency(infected.model, stamped, found, [("conv1", 2)])
    assert record["filters"]["conv1"]["blc"][2] == pytest.approx(change, rel=1e-3, abs=1e-6)
    norm = float(infected.model.get_parameter("conv1.weight")[2].detach().norm())
    assert record["filters"]["conv1"]["magnitude"][2] == pytest.approx(norm, rel=1e-3)
    clean = bench.answer(
        cell_of(bench.entry("clean"), "ablate", data="small", task="ablate", clean_images=12)
    )
    assert set(clean["filters"]["conv1"]) == {"magnitude", "clc"}
    # Without its norm's shift a filter is gone; with its weights alone at zero, that shift stays.
    weights = {"options": {"prune_mode": "weight"}, "task": "ablate", "clean_images": 12}
    other = bench.answer(cell_of(entry, "ablate", data="small", **weights))  # type: ignore[arg-type]
    assert other["clean_loss"] == record["clean_loss"]
    assert other["filters"]["conv1"]["clc"] != record["filters"]["conv1"]["clc"]


def test_a_score_without_a_threshold_is_said_in_a_line() -> None:
    line = line_of("x", {"status": "ok", "score": 0.5, "threshold": None, "seconds": 1.0})
    assert line == "x: score 0.5, no threshold; 1.0 s"


def test_models_are_looked_for_in_all_homes(bench: Bench, tmp_path: Path) -> None:
    other = Bench((tmp_path, bench.homes[0]), TRAIN, TEST)
    assert other.entry("badnets").folder == bench.homes[0] / "badnets"
    with pytest.raises(InvalidInputError, match="no model 'lira'; it has badnets, clean"):
        bench.entry("lira")


def test_other_weights_than_those_asked_about_give_no_answer(bench: Bench) -> None:
    asked = replace(cell(bench, "badnets", "clp"), model_sha256="0" * 64)
    with pytest.raises(InvalidInputError, match=r"other weights .* than those asked about \(000000000000\)"):
        bench.answer(asked)


def test_detectors_of_training_sets_see_the_images_that_a_limited_job_drew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(bench.homes[0], tmp_path / "zoo")
    card = tmp_path / "zoo" / "badnets" / "card.json"
    content = json.loads(card.read_text())
    content["job"] |= {"limit": 70, "seed": 3}
    card.write_text(json.dumps(content))
    seen: list[LabelledImages] = []

    def noted(*_: object, train: LabelledImages, **__: object) -> dict[str, object]:
        seen.append(train)
        return {}

    monkeypatch.setattr("unbackdoor.bench.defend.detect", noted)
    other = Bench((tmp_path / "zoo",), TRAIN, TEST)
    entry = other.entry("badnets")
    assert other.answer(cell_of(entry, "ac", data="small", task="detect", clean_images=32))["status"] == "ok"
    # As the job drew them, before anything else was drawn from its seed.
    drawn = draw_balanced(TRAIN, 70, rng.spawn(rng.generator(3)))
    assert torch.equal(seen[0].images, drawn.images)
