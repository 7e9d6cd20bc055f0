"""The work behind the commands: from inputs to documents, without printing."""

from __future__ import annotations

import base64
import hashlib
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import unbackdoor
from unbackdoor import rng
from unbackdoor.catalogue import dashed
from unbackdoor.compute import predictions_of
from unbackdoor.costs import metered
from unbackdoor.data.splits import draw_balanced
from unbackdoor.detect.plausibility import SHIFTED, check_plausible
from unbackdoor.evaluate import clean_accuracy, evaluate
from unbackdoor.extras import require
from unbackdoor.filters.groups import FilterMap, find_filters
from unbackdoor.filters.magnitude import magnitudes
from unbackdoor.models.loading import LoadedModel, save_like
from unbackdoor.rates import Rate
from unbackdoor.reactivate import reactivation
from unbackdoor.report import documents as doc
from unbackdoor.types import (
    LabelledImages,
    LabelRule,
    Progress,
    Purified,
    Purifier,
    Trigger,
    as_float,
    quantise,
    silent,
)

PURIFY_LIMITS = (
    "Whether a backdoor was there, and whether it is gone, cannot be seen from clean images alone; scan the "
    "purified model again.",
    "Backdoors trained in with very few poisoned images may survive pruning.",
    "A purified model can be infected again by fine-tuning on poisoned images.",
)

PROBED = 1000
"""Test images on which an evaluation asks whether model and images belong together."""

FAR_BELOW = 0.2
"""How far below its card's clean accuracy a model is, before that is worth a warning; purifiers cost some."""

DEAR = 0.03
"""A purification that costs more accuracy than this is warned of."""


@dataclass(frozen=True, eq=False)
class PurifyJob:
    """A purification before its result is written."""

    purified: Purified
    document: doc.PurifyDocument


def purify_document(
    loaded: LoadedModel,
    learning: LabelledImages,
    held_out: LabelledImages,
    *,
    method: Purifier,
    out: Path,
    info: doc.ModelInfo,
    data: doc.DataInfo,
    seed: int,
    warnings: tuple[str, ...] = (),
    progress: Progress,
) -> PurifyJob:
    """Purify, write the new file and describe what was done and what it cost."""
    with metered() as cost:
        purified = method.purify(loaded.model, learning, generator=rng.generator(seed), progress=progress)
    save_like(loaded, purified.model, out)
    before, after = (clean_accuracy(network, held_out) for network in (loaded.model, purified.model))
    filter_map = find_filters(loaded.model, as_float(learning.images[:1]))
    diagnostics = purified.diagnostics
    document = doc.PurifyDocument(
        tool_version=unbackdoor.__version__,
        seconds=cost.seconds,
        model=info,
        data=data,
        method=dashed(method.name),
        method_title=getattr(method, "title", ""),
        method_source=getattr(method, "source", ""),
        outcome=_outcome(loaded.model, purified, filter_map),
        options=plain(diagnostics.get("options", {})),
        output=str(out),
        output_sha256=hashlib.sha256(out.read_bytes()).hexdigest(),
        clean_accuracy_before=rate(before),
        clean_accuracy_after=rate(after),
        filters_total=sum(group.filters for group in filter_map.prunable),
        filters_removed=purified.mask.n_removed if purified.mask else 0,
        removed=_removed(purified, loaded.model, filter_map),
        layers=_layers(purified, filter_map),
        walk=_walk(diagnostics.get("walk", [])),
        untreated=[doc.Untreated(layer=item.name, reason=item.reason) for item in filter_map.untreated],
        passes=cost.describe(),
        warnings=[
            *warnings,
            *price(before, after, len(learning)),
            *weak_evidence(diagnostics.get("evidence", {})),
            *relearning_cut_short(diagnostics.get("relearning", [])),
            *remaining_triggers(diagnostics.get("relearning", []), learning.name_of),
        ],
        limits=list(PURIFY_LIMITS),
    )
    return PurifyJob(purified, document)


def price(before: Rate, after: Rate, learnt_from: int) -> list[str]:
    """Say so if a purification cost more clean accuracy than one should pay.

    Args:
        before: Accuracy on images that the method did not see.
        after: The same of the purified model.
        learnt_from: How many images the method saw.
    """
    lost = before.value - after.value
    if not lost > DEAR:  # NaN: nothing was measured
        return []
    return [
        f"It cost {100 * lost:.1f} points of accuracy on {after.n} images that the method did not see; give "
        f"more clean images than {learnt_from}, check that their labels are right, or take another --method."
    ]


def weak_evidence(found: Mapping[str, Any]) -> list[str]:
    """Say that filters which suppression exposed stay, since they tell too little.

    Args:
        found: MNP's diagnostics of what suppression exposed.
    """
    if found.get("taken", True):
        return []
    return [
        f"Suppression exposed {found['filters']} filters, as it does in clean models, too: together they "
        f"give back no more than {found['benefit']:.0%} of what it broke, and its errors gather in no class "
        "or shift of classes, so all were kept. Remove them all the same with --set evidence=0."
    ]


def relearning_cut_short(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say where a trigger was found and what relearnt to ignore it was not taken whole, so that it may work.

    Args:
        log: MNP's diagnostics of each relearning; of several rounds after one exposure the last one counts.
    """
    last = {step["exposure"]: step for step in log}
    return [
        f"The relearning after {way} was {_taken_so_far(step)}; the trigger that was found may still work. "
        "Allow more with --set guard.accuracy, or lower --set relearning.recipe.learning_rate."
        for way, step in last.items()
        if not step["taken"]
    ]


def _taken_so_far(step: Mapping[str, Any]) -> str:
    if "problem" in step:
        return f"not taken: {step['problem'].rstrip('.')}"
    before, whole = f"{step['accuracy_of_the_suspect']:.1%}", f"{step['accuracy']:.1%}"
    if not step.get("share"):
        return f"not taken: clean accuracy fell from {before} to {whole}"
    return (
        f"taken {step['share']:.0%} of the way, where clean accuracy goes from {before} to "
        f"{step['accuracy_kept']:.1%}, since all of it would leave {whole}"
    )


def remaining_triggers(log: Sequence[Mapping[str, Any]], name_of: Callable[[int], str]) -> list[str]:
    """Say where the last round of relearning left a trigger that is as small as a backdoor's.

    Args:
        log: MNP's diagnostics of each relearning.
        name_of: Name of a class, by its number.
    """
    last = {step["exposure"]: step["left"] for step in log if "left" in step}
    return [
        f"After {way} and the last relearning a suspiciously small trigger still leads to "
        f"{' and '.join(f'class {name_of(k)}' for k in left)}; allow more with "
        "--set rounds, or do not use this model."
        for way, left in last.items()
        if left
    ]


def _outcome(model: nn.Module, purified: Purified, filter_map: FilterMap) -> str:
    """Say in a phrase what became of the weights."""
    before, after = dict(model.named_parameters()), dict(purified.model.named_parameters())
    total = sum(tensor.numel() for tensor in before.values())
    changed = sum(int((tensor != after[name]).sum()) for name, tensor in before.items())
    if not changed:
        action = str(purified.diagnostics.get("action", ""))
        return f"{doc.UNCHANGED}{': ' + action.removeprefix('none: ') if action else ''}"
    removed = purified.mask.n_removed if purified.mask else 0
    filters = sum(group.filters for group in filter_map.prunable)
    pruned = f"{removed:,} of {filters:,} filters removed" if removed else ""
    if removed and changed <= total / 2:
        return pruned
    return ", ".join(filter(None, (pruned, f"{changed:,} of {total:,} weights changed")))


def evaluate_document(
    model: nn.Module,
    test: LabelledImages,
    *,
    trigger: Trigger | None,
    label_rule: LabelRule | None,
    attack: str | None,
    label: str,
    info: doc.ModelInfo,
    data: doc.DataInfo,
    examples: int = 6,
    reactivate: bool = False,
    seed: int = 0,
    claimed: float | None = None,
    progress: Progress = silent,
) -> doc.EvaluateDocument:
    """Measure ``model`` on clean and, where there is a trigger, on triggered images; try to wake it.

    ``claimed`` is the clean accuracy that the card of the attack has for the model that it left.
    """
    started = time.perf_counter()
    if trigger is None or label_rule is None:
        metrics = {"clean_accuracy": rate(clean_accuracy(model, test))}
        shown: list[doc.Example] = []
    else:
        measured = evaluate(model, test, trigger, label_rule)
        metrics = {
            "clean_accuracy": rate(measured.clean_accuracy),
            "attack_success": rate(measured.attack_success),
            "robust_accuracy": rate(measured.robust_accuracy),
        }
        if reactivate:
            woken = reactivation(
                model, test, trigger, label_rule, generator=rng.generator(seed), progress=progress
            )
            metrics |= {name: rate(value) for name, value in woken.items()}
        shown = _examples(model, test, trigger, label_rule, examples)
    return doc.EvaluateDocument(
        tool_version=unbackdoor.__version__,
        seconds=time.perf_counter() - started,
        model=info,
        data=data,
        label=label,
        attack=attack,
        metrics=metrics,
        examples=shown,
        warnings=_doubts(model, test, metrics["clean_accuracy"].value, claimed),
    )


def _doubts(model: nn.Module, test: LabelledImages, found: float | None, claimed: float | None) -> list[str]:
    """Say why what was measured may not mean much: the model may have been trained on other inputs."""
    plausible = check_plausible(model, draw_balanced(test, min(len(test), PROBED), rng.generator(0)))
    # Statistics that moved are for scans: they do so in every pruned network, and no rate depends on them.
    seen = [warning for warning in plausible.warnings if not warning.startswith(SHIFTED)]
    doubts = [sentence(plausible.problem)] if plausible.problem else seen
    if not doubts and claimed is not None and found is not None and found < claimed - FAR_BELOW:
        doubts = [
            f"The model is right on {found:.1%} of these images, where the card of the attack claims "
            f"{claimed:.1%} for the model that it left: they may be other images, or given in another way "
            "(--normalize)."
        ]
    return doubts


def rate(value: Rate) -> doc.Rate:
    """Convert a rate into its document form."""
    return doc.Rate.model_validate(value.describe())


def sentence(text: str) -> str:
    """Return ``text`` with a capital letter and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out calibrations, which may be long; their description stands beside each threshold."""
    return {key: value for key, value in options.items() if key != "calibration"}


def _removed(purified: Purified, model: nn.Module, filter_map: FilterMap) -> list[doc.RemovedFilter]:
    if purified.mask is None:
        return []
    norms = magnitudes(model, filter_map)
    steps = {(s["layer"], s["filter"]): (i, s) for i, s in enumerate(purified.diagnostics.get("walk", []))}
    rows = []
    for position, (layer, index) in enumerate(purified.mask.removed()):
        rank, step = steps.get((layer, index), (position, {}))
        rows.append(
            doc.RemovedFilter(
                layer=layer,
                filter=index,
                rank=rank,
                score=float(purified.scores[layer][index]) if layer in purified.scores else None,
                magnitude=float(norms[layer][index]),
                loss_change=step.get("loss_change"),
            )
        )
    return sorted(rows, key=lambda row: row.rank)


def _layers(purified: Purified, filter_map: FilterMap) -> list[doc.LayerRow]:
    keep = purified.mask.keep if purified.mask else {}
    return [
        doc.LayerRow(
            name=group.name,
            filters=group.filters,
            removed=int((~keep[group.name]).sum()) if group.name in keep else 0,
        )
        for group in filter_map.prunable
    ]


def _walk(steps: list[dict[str, Any]]) -> list[doc.WalkStep]:
    return [
        doc.WalkStep(
            rank=rank,
            layer=step["layer"],
            filter=step["filter"],
            loss_change=step["loss_change"],
            kept=not step["removed"],
            clean_accuracy=step["accuracy"],
            benefit=step.get("benefit"),
        )
        for rank, step in enumerate(steps)
    ]


def _examples(
    model: nn.Module, test: LabelledImages, trigger: Trigger, label_rule: LabelRule, count: int
) -> list[doc.Example]:
    eligible = label_rule.counts(test.labels).nonzero().flatten()[:count]
    clean = as_float(test.images[eligible])
    triggered = as_float(quantise(trigger(clean)))
    predictions = predictions_of(model, triggered).tolist()
    difference = (triggered - clean).mul(5).add(0.5).clamp(0, 1)
    return [
        doc.Example(
            clean_png=png(clean[i]),
            triggered_png=png(triggered[i]),
            difference_png=png(difference[i]),
            true_label=test.name_of(int(test.labels[eligible[i]])),
            predicted_label="no class" if predictions[i] < 0 else test.name_of(predictions[i]),
        )
        for i in range(len(eligible))
    ]


def png(image: Tensor) -> str:
    """Encode one float image ``(C, H, W)`` in [0, 1] as base64 PNG, enlarged to be seen."""
    pil = require("PIL.Image", extra="data")
    pixels = quantise(image).permute(1, 2, 0).squeeze(-1).contiguous().cpu()
    factor = max(1, 96 // max(image.shape[1:]))
    picture = pil.fromarray(pixels.numpy())
    picture = picture.resize((picture.width * factor, picture.height * factor), pil.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
