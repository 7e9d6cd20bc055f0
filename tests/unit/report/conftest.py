"""Synthetic documents of realistic size: a width-64 ResNet-18 with 4,800 filters, ten classes."""

from __future__ import annotations

import base64
import math
import random
import struct
import zlib

import pytest

from unbackdoor.report.documents import (
    DataInfo,
    DetectorRow,
    EvaluateDocument,
    Example,
    LayerRow,
    ModelInfo,
    PurifyDocument,
    Rate,
    RemovedFilter,
    ScanDocument,
    Scatter,
    Suppression,
    Untreated,
    WalkStep,
)

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
WIDTHS = {
    "conv1": 64,
    **{
        f"layer{stage}.{block}.{part}": 32 * 2**stage
        for stage in (1, 2, 3, 4)
        for block in (0, 1)
        for part in ("conv1", "conv2", *(("downsample.0",) if stage > 1 and not block else ()))
    },
}
HASH = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
LIMITS = (
    "The thresholds were calibrated on small ResNet-18 networks trained on CIFAR-10.",
    "Backdoors that few poisoned images planted, and several targets at once, are often missed.",
)


def rate(successes: int, n: int) -> Rate:
    p, z2 = successes / n, 1.96**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = 1.96 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Rate(value=p, low=max(0.0, centre - half), high=min(1.0, centre + half), successes=successes, n=n)


def png(generator: random.Random, *, size: int = 32, tone: int = 128, spread: int = 60) -> str:
    rows = b"".join(
        b"\0"
        + bytes(
            max(0, min(255, tone + generator.randint(-spread, spread) + 3 * (x - y)))
            for x in range(size)
            for _ in range(3)
        )
        for y in range(size)
    )

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    image = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9))
    return base64.b64encode(image + chunk(b"IEND", b"")).decode()


def model(path: str = "models/resnet18-from-a-stranger.pth") -> ModelInfo:
    return ModelInfo(
        path=path,
        sha256=HASH,
        format="PyTorch zip archive, tensors only",
        architecture="resnet18",
        parameters=11_173_962,
        num_classes=10,
        normalisation="mean 0.491, 0.482, 0.447; std 0.247, 0.243, 0.262",
    )


def data() -> DataInfo:
    return DataInfo(
        source="clean-images",
        split="",
        images=500,
        num_classes=10,
        image_shape=(3, 32, 32),
        smallest_class=50,
        class_names=CLASSES,
    )


def scatter(filters: int | None = None) -> Scatter:
    generator = random.Random(0)
    layer_of = [index for index, width in enumerate(WIDTHS.values()) for _ in range(width)][:filters]
    magnitude = [1.0 + generator.gauss(0, 0.15) + layer / 8 for layer in layer_of]
    saliency = [m**2 * math.exp(generator.gauss(-8, 1.2)) - 1e-5 for m in magnitude]
    return Scatter(
        layers=tuple(WIDTHS),
        layer_of=layer_of,
        magnitude=magnitude,
        saliency=saliency,
        magnitude_after=[m + abs(generator.gauss(0, 0.2)) for m in magnitude],
        saliency_after=[generator.gauss(0, 0.004) for _ in magnitude],
        rho=0.41,
        rho_after=0.19,
    )


def suppression() -> Suppression:
    return Suppression(
        accuracy=[0.94 - 0.74 / (1 + math.exp(5 - epoch)) for epoch in range(11)],
        stop_reason="clean accuracy fell to 0.2",
        norm_mode="train",
        class_share=(0.02, 0.01, 0.03, 0.74, 0.05, 0.04, 0.02, 0.03, 0.05, 0.01),
        shift_share=(0.2, 0.08, 0.09, 0.1, 0.07, 0.1, 0.1, 0.09, 0.09, 0.08),
    )


def detectors() -> tuple[DetectorRow, ...]:
    generator = random.Random(1)
    return (
        DetectorRow(
            name="suppression_collapse",
            title="Collapse under suppression",
            source="this package; suppression as in Magnitude-based Neuron Pruning",
            score=0.74,
            threshold=0.41,
            threshold_source="95 % quantile of 24 clean ResNet-18 models, CIFAR-10",
            p_value=0.0004,
            verdict="backdoored",
            target_class=3,
            seconds=31.2,
            summary="With the clean task unlearnt, 74 % of all clean images are called ‘cat’.",
            evidence={"runner_up": "deer", "share_of_runner_up": 0.05, "epochs": 11, "seeds": [0, 1, 2]},
        ),
        DetectorRow(
            name="trigger_inversion",
            title="Trigger inversion",
            source="Wang et al., Neural Cleanse, S&P 2019",
            score=2.9,
            threshold=2.0,
            threshold_source="paper",
            verdict="backdoored",
            target_class=3,
            seconds=204.0,
            summary="A patch of 7.7 pixels turns any image into ‘cat’; other classes need 36 or so.",
            evidence={
                "mask_norm_per_class": [31.2, 40.1, 36.0, 7.7, 38.2, 29.9, 36.4, 44.0, 35.1, 39.8],
                "mask_png": png(generator, tone=30, spread=25),
                "stamped_png": png(generator),
            },
        ),
        DetectorRow(
            name="magnitude_saliency",
            title="Magnitude-saliency ratio",
            source="Magnitude-based Neuron Pruning, Eq. 8",
            score=-0.46,
            threshold=-0.2,
            threshold_source="paper",
            verdict="clean",
            seconds=12.4,
            summary="The rank correlation fell to 0.46 of what it was, less than in backdoored models.",
        ),
        DetectorRow(
            name="margin",
            title="Maximum margin",
            source="Wang et al., MM-BD, S&P 2024",
            score=None,
            threshold=0.05,
            threshold_source="paper",
            verdict="undetermined",
            undetermined="two of ten classes gave no finite margin",
            seconds=3.0,
            summary="No statement is possible.",
        ),
    )


def example_scan() -> ScanDocument:
    return ScanDocument(
        tool_version="0.1.0",
        seconds=251.0,
        model=model(),
        data=data(),
        clean_accuracy=rate(471, 500),
        verdict="backdoored",
        reason="Two detectors of different kinds agree on the same target class.",
        advice="Do not use this model; purify it, or train a new one from data that you trust.",
        target_class=3,
        target_name="cat",
        warnings=("The file was pickled; nothing but tensors was read from it.",),
        detectors=detectors(),
        suppression=suppression(),
        scatter=scatter(),
        settings={"profile": "standard", "seed": 0, "device": "cpu", "detectors": ["collapse", "inversion"]},
        limits=LIMITS,
    )


def example_purify() -> PurifyDocument:
    generator = random.Random(2)
    names = list(WIDTHS)
    walk = []
    for rank in range(60):
        kept = rank > 2 and generator.random() < 0.4
        change = generator.uniform(0.021, 0.6) if kept else generator.uniform(-0.004, 0.018)
        walk.append(
            WalkStep(
                rank=rank,
                layer=generator.choice(names[8:]),
                filter=generator.randrange(64),
                loss_change=change,
                kept=kept,
                clean_accuracy=None if kept else 0.942 - rank / 4000,
            )
        )
    gone = [step for step in walk if not step.kept]
    return PurifyDocument(
        tool_version="0.1.0",
        seconds=312.0,
        model=model(),
        data=data(),
        method="mnp",
        options={"candidates": 60, "max_loss_change": 0.02, "weights": [1.0, 1.0, 0.1]},
        output="models/resnet18-purified.safetensors",
        output_sha256=HASH[::-1],
        clean_accuracy_before=rate(2355, 2500),
        clean_accuracy_after=rate(2330, 2500),
        filters_total=sum(WIDTHS.values()),
        filters_removed=len(gone),
        removed=[
            RemovedFilter(
                layer=step.layer,
                filter=step.filter,
                rank=step.rank,
                score=0.01 * step.rank,
                magnitude=1.3,
                loss_change=step.loss_change,
            )
            for step in gone
        ],
        layers=[
            LayerRow(name=name, filters=width, removed=sum(step.layer == name for step in gone))
            for name, width in WIDTHS.items()
        ],
        walk=walk,
        untreated=(Untreated(layer="fc", reason="the classifier has one output a class"),),
        passes={"suppression_forward": 88, "suppression_backward": 88},
        limits=(LIMITS[0], "Filters that serve both the clean task and the backdoor were kept."),
    )


def example_evaluate(label: str, path: str, *, right: int, attacked: int, robust: int) -> EvaluateDocument:
    generator = random.Random(label)
    return EvaluateDocument(
        tool_version="0.1.0",
        seconds=14.0,
        model=model(path),
        data=data(),
        label=label,
        attack="badnets",
        metrics={
            "clean_accuracy": rate(right, 10_000),
            "attack_success": rate(attacked, 9_000),
            "robust_accuracy": rate(robust, 9_000),
        },
        examples=[
            Example(
                clean_png=png(generator),
                triggered_png=png(generator),
                difference_png=png(generator, tone=10, spread=10),
                true_label=CLASSES[index],
                predicted_label="cat" if attacked > 4500 else CLASSES[index],
            )
            for index in (0, 4, 8)
        ],
    )


@pytest.fixture(name="scan")
def _scan() -> ScanDocument:
    return example_scan()


@pytest.fixture(name="purify")
def _purify() -> PurifyDocument:
    return example_purify()


@pytest.fixture(name="before")
def _before() -> EvaluateDocument:
    return example_evaluate("infected model", "stranger.pth", right=9412, attacked=8998, robust=2)


@pytest.fixture(name="after")
def _after() -> EvaluateDocument:
    return example_evaluate("purified model", "clean.safetensors", right=9325, attacked=171, robust=8204)
