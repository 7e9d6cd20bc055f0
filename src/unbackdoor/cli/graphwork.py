"""The work behind ``unbackdoor graph``: from inputs to documents, without printing."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import unbackdoor
from unbackdoor import rng
from unbackdoor.bench.artefact import read_card
from unbackdoor.catalogue import configured, dashed
from unbackdoor.errors import InvalidInputError
from unbackdoor.graph.attacks import ATTACKS
from unbackdoor.graph.data import UNKNOWN, Graph
from unbackdoor.graph.detect import RIGBD, NodeScan
from unbackdoor.graph.evaluate import clean_accuracy
from unbackdoor.graph.evaluate import evaluate as measure
from unbackdoor.graph.files import (
    load_division,
    load_network,
    load_trigger,
    save_division,
    save_graph,
    save_network,
    save_trigger,
)
from unbackdoor.graph.gcn import GCN
from unbackdoor.graph.laboratory import Staged, open_graph, stage
from unbackdoor.graph.purify import PURIFIERS, Defended, Plain
from unbackdoor.rates import Rate
from unbackdoor.report import documents as doc
from unbackdoor.settings import configure
from unbackdoor.types import AllToOne, Progress, label_rule_from

FILES = ("graph.safetensors", "laboratory.safetensors", "model.safetensors")

LIMITS = (
    "Only triggers that hang on edges can be seen: one in a node's own features has no edge to drop.",
    "In graphs whose neighbours are often of other classes, predictions on clean nodes change as well.",
    "The verdict tests whether labels at the top of the ranking are there by chance; a class whose clean "
    "nodes are less stable than others can look like a target.",
)

PURIFY_LIMITS = (
    *LIMITS,
    "Accuracy is measured on labels that were kept back; poisoned ones may be among them.",
    "Whether the trigger is dead, only its owner can measure.",
)

VERDICTS: dict[bool | None, Literal["backdoored", "clean", "inconclusive"]] = {
    True: "backdoored",
    False: "clean",
    None: "inconclusive",
}
OPINIONS: dict[bool | None, Literal["backdoored", "clean", "undetermined"]] = {
    True: "backdoored",
    False: "clean",
    None: "undetermined",
}
ADVICE = {
    "backdoored": "Do not train on this graph as it is: take the flagged nodes out, or use "
    "`unbackdoor graph purify`, and find out where they came from.",
    "clean": "No evidence was found; read below what this scan cannot see before you rely on it.",
    "inconclusive": "Do not rely on this graph yet: mend what is named above and scan again.",
}


def attack(
    name: str, data: str, out: Path, settings: Sequence[str], *, paper: bool, seed: int, progress: Progress
) -> dict[str, Any]:
    """Poison a graph, train on it, measure, and write everything into ``out``; return the card.

    Raises:
        InvalidInputError: If an option does not fit, or ``out`` holds files already.
    """
    method = None
    if name != "none":
        method = configure(configured("graph attack", ATTACKS, name, paper=paper), settings)
    elif settings or paper:
        given = ", ".join([*settings, *(["--paper"] if paper else [])])
        raise InvalidInputError(f"a clean twin has no options, got {given}; leave them out.")
    _prepare(out)
    staged = stage(data, method, seed, progress=progress)
    network = Plain().purify(staged.graph, generator=rng.generator(seed), progress=progress)
    save_graph(staged.graph, out / "graph.safetensors")
    save_division(staged.division, out / "laboratory.safetensors")
    save_network(network, out / "model.safetensors")
    card = {
        "attack": None if method is None else method.name,
        "data": data,
        "seed": seed,
        "options": {} if method is None else asdict(method),
        "metrics": _metrics(network, staged),
        **_poisoned(staged, out),
    }
    card["files"] = {path.name: _sha256(path) for path in sorted(out.glob("*.safetensors"))}
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    return card


def _prepare(out: Path) -> None:
    there = [file for file in (*FILES, "card.json", "trigger.safetensors") if (out / file).exists()]
    if there:
        raise InvalidInputError(f"{out} holds {there[0]} already; choose another folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"cannot make {out}: {error.strerror}; choose another --out.") from error


def _metrics(network: Defended, staged: Staged) -> dict[str, Any]:
    if staged.poisoned is None:
        return {"clean_accuracy": clean_accuracy(network, staged.division).describe()}
    poisoned = staged.poisoned
    return measure(network, staged.division, poisoned.trigger, poisoned.target_class).describe()


def _poisoned(staged: Staged, out: Path) -> dict[str, Any]:
    if staged.poisoned is None:
        return {}
    save_trigger(staged.poisoned.trigger, out / "trigger.safetensors")
    return {
        "poisoned": len(staged.poisoned.nodes),
        "poisoned_nodes": staged.poisoned.nodes.tolist(),
        "label_rule": AllToOne(staged.poisoned.target_class).describe(),
    }


def scan(
    source: str, settings: Sequence[str], *, paper: bool, seed: int, progress: Progress
) -> doc.ScanDocument:
    """Scan a training graph and describe the result."""
    method = configure(RIGBD.paper() if paper else RIGBD(), settings)
    graph, started = open_graph(source, rng.generator(seed)), time.perf_counter()
    found = method.score(graph, generator=rng.generator(seed), progress=progress)
    seconds = time.perf_counter() - started
    with rng.isolated(rng.generator(seed)):
        network = method.training.network(graph, self_loops=method.self_loops)
    verdict = VERDICTS[found.is_backdoored]
    known = len(graph.labelled)
    right = round(known * float(found.evidence["accuracy_on_labelled_nodes"]))
    return doc.ScanDocument(
        tool_version=unbackdoor.__version__,
        seconds=seconds,
        model=_model_info(source, network),
        data=_data_info(source, graph),
        clean_accuracy=_rate(Rate(right, known)),
        verdict=verdict,
        reason=_reason(found, graph),
        advice=ADVICE[verdict],
        target_class=found.target_class,
        target_name=None if found.target_class is None else graph.name_of(found.target_class),
        detectors=[_row(method, found, graph, seconds)],
        settings={"scan": asdict(method), "seed": seed},
        limits=list(LIMITS),
        warnings=["The accuracy is that on the nodes that the network learnt from."],
    )


def _reason(found: NodeScan, graph: Graph) -> str:
    if found.undetermined:
        return f"Undetermined: {found.undetermined}."
    if found.target_class is None:
        return (
            "The labels of the nodes whose prediction changes most when edges are dropped could be there by "
            f"chance (p = {found.p_value:.3f})."
        )
    return (
        f"{len(found.flagged)} nodes change their prediction most when edges are dropped, and all have the "
        f"label {graph.name_of(found.target_class)} (p = {found.p_value:.3f})."
    )


def _row(method: RIGBD, found: NodeScan, graph: Graph, seconds: float) -> doc.DetectorRow:
    scores = found.scores[found.flagged].tolist()
    return doc.DetectorRow(
        name=method.name,
        title=method.title,
        source=method.source,
        score=-math.log10(found.p_value),
        threshold=-math.log10(method.alpha),
        threshold_source=f"minus log10 of alpha, {method.alpha:g}; the score is that of the p-value",
        p_value=found.p_value,
        verdict=OPINIONS[found.is_backdoored],
        undetermined=found.undetermined,
        target_class=found.target_class,
        seconds=seconds,
        summary=_reason(found, graph),
        evidence={
            "flagged_nodes": found.flagged.tolist(),
            "scores_of_flagged_nodes": scores,
            **{name: value for name, value in found.evidence.items() if name != "options"},
        },
    )


def purify(
    source: str,
    out: Path,
    name: str,
    settings: Sequence[str],
    *,
    paper: bool,
    hold_out: float,
    seed: int,
    progress: Progress,
) -> doc.PurifyDocument:
    """Train a network on a suspect graph, write it, and describe what was done and what it cost."""
    method = configure(configured("graph purifier", PURIFIERS, name, paper=paper), settings)
    generator = rng.generator(seed)
    graph = open_graph(source, rng.generator(seed))
    seen, kept = _kept_back(graph, hold_out, rng.spawn(generator))
    started = time.perf_counter()
    defended = method.purify(seen, generator=rng.spawn(generator), progress=progress)
    seconds = time.perf_counter() - started
    plain = Plain().purify(seen, generator=rng.spawn(generator), progress=progress)
    save_network(defended, out)
    before, after = (
        Rate.of(network.predictions(graph)[kept] == graph.labels[kept]) for network in (plain, defended)
    )
    return doc.PurifyDocument(
        tool_version=unbackdoor.__version__,
        seconds=seconds,
        model=_model_info(source, defended.network),
        data=_data_info(source, seen),
        method=dashed(method.name),
        method_title=method.title,
        method_source=method.source,
        outcome=_outcome(defended, seen),
        options=asdict(method),
        output=str(out),
        output_sha256=_sha256(out),
        clean_accuracy_before=_rate(before),
        clean_accuracy_after=_rate(after),
        filters_total=0,
        filters_removed=0,
        passes={k: v for k, v in defended.diagnostics.items() if k != "options"},
        limits=list(PURIFY_LIMITS),
    )


def _kept_back(graph: Graph, share: float, generator: torch.Generator) -> tuple[Graph, Tensor]:
    """Hide a share of the labels; return the graph without them and their nodes."""
    known = graph.labelled
    kept = known[torch.randperm(len(known), generator=generator)[: round(share * len(known))]]
    return graph.relabelled(kept, UNKNOWN), kept


def _outcome(defended: Defended, graph: Graph) -> str:
    scan = defended.scan
    if scan is None:
        return "a network trained without looking for poisoned nodes"
    if scan.target_class is None:
        return "no poisoned nodes found, a network trained plainly"
    return (
        f"{len(scan.flagged)} of {len(graph.labelled)} labelled nodes taken out of the clean loss, target "
        f"class {graph.name_of(scan.target_class)} unlearnt on them"
    )


def evaluate(network: Path, infected: Path, label: str) -> doc.EvaluateDocument:
    """Measure a network against the attack in a folder."""
    started = time.perf_counter()
    defended, division = load_network(network), load_division(infected / "laboratory.safetensors")
    if defended.network.embed.in_features != division.whole.features.shape[1]:
        raise InvalidInputError(
            f"{network} takes {defended.network.embed.in_features} features a node, the graph in {infected} "
            f"has {division.whole.features.shape[1]}; they belong to different data."
        )
    card = read_card(infected)
    if card.get("attack") is None:
        metrics = {"clean_accuracy": _rate(clean_accuracy(defended, division))}
    else:
        rule = label_rule_from(card.get("label_rule", {}))
        if not isinstance(rule, AllToOne):
            raise InvalidInputError(f"the card in {infected} has a label rule that no graph attack has.")
        trigger = load_trigger(infected / "trigger.safetensors")
        measured = measure(defended, division, trigger, rule.target_class)
        metrics = {
            "clean_accuracy": _rate(measured.clean_accuracy),
            "attack_success": _rate(measured.attack_success),
            "robust_accuracy": _rate(measured.robust_accuracy),
        }
    return doc.EvaluateDocument(
        tool_version=unbackdoor.__version__,
        seconds=time.perf_counter() - started,
        model=_model_info(str(network), defended.network),
        data=_data_info(str(infected), division.whole),
        label=label or str(network),
        attack=card.get("attack"),
        metrics=metrics,
    )


def _model_info(source: str, network: GCN) -> doc.ModelInfo:
    path = Path(source)
    return doc.ModelInfo(
        path=source,
        sha256=_sha256(path) if path.is_file() else "",
        format="safetensors" if path.is_file() else "a data set, no file of its own",
        architecture=f"graph convolutional network of width {network.embed.out_features}",
        parameters=sum(p.numel() for p in network.parameters()),
        num_classes=network.classify.out_features,
        normalisation="none: the network gets the features as they are",
    )


def _data_info(source: str, graph: Graph) -> doc.DataInfo:
    labels = graph.labels[graph.labelled]
    return doc.DataInfo(
        source=source,
        split=f"{len(graph)} nodes, {graph.edges.shape[1]} edges",
        images=len(labels),
        num_classes=graph.num_classes,
        image_shape=[graph.features.shape[1]],
        smallest_class=int(torch.bincount(labels, minlength=graph.num_classes).min()),
        class_names=list(graph.class_names),
        unit="nodes",
    )


def _rate(rate: Rate) -> doc.Rate:
    return doc.Rate.model_validate(rate.describe())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
