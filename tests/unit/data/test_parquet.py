from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from unbackdoor.data import images as images_module
from unbackdoor.data import load_images
from unbackdoor.data import parquet as parquet_module
from unbackdoor.data.parquet import read_parquet
from unbackdoor.errors import InvalidInputError

NAMES = ("cat", "dog", "owl")


def png(level: int, size: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), level, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(
    path: Path,
    labels: Sequence[int | None],
    *,
    first_level: int = 0,
    names: Sequence[str] | None = NAMES,
    column: str = "img",
    label_column: str = "label",
) -> None:
    """Write a file as the hub's libraries do; the grey level of each image is its row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": png(first_level + row), "path": None} for row in range(len(labels))]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "id": pa.array([""] * len(rows)),
            column: pa.array(rows, kind),
            label_column: pa.array(labels, pa.int64()),
        }
    )
    if names is not None:
        features = {column: {"_type": "Image"}, label_column: {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


def levels(images: torch.Tensor) -> list[int]:
    return [int(value) for value in images[:, 0, 0, 0]]


def test_file_with_class_names(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", [2, 0, 1])
    data = read_parquet(tmp_path / "x.parquet")
    assert data.images.shape == (3, 3, 4, 4)
    assert levels(data.images) == [0, 1, 2]
    assert data.labels.tolist() == [2, 0, 1]
    assert data.class_names == NAMES


@pytest.mark.parametrize(("column", "label_column"), [("image", "fine_label"), ("picture", "kind")])
def test_column_names_are_found(tmp_path: Path, column: str, label_column: str) -> None:
    write(tmp_path / "x.parquet", [2, 0, 1], column=column, label_column=label_column)
    data = load_images(tmp_path / "x.parquet")
    assert data.labels.tolist() == [2, 0, 1]
    assert data.class_names == NAMES


def test_plain_binary_column_without_metadata(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(7), png(8)], "label": [1, 0]}), tmp_path / "x.parquet")
    data = load_images(tmp_path / "x.parquet")
    assert levels(data.images) == [7, 8]
    assert data.class_names == ()


@pytest.mark.parametrize(
    "layout", ["{}.parquet", "{}-00000-of-00001.parquet", "data/{}-00000-of-00001-0a1b.parquet"]
)
def test_folder_with_splits(tmp_path: Path, layout: str) -> None:
    write(tmp_path / layout.format("train"), [0, 1, 2])
    write(tmp_path / layout.format("test"), [2, 2], first_level=100)
    assert levels(load_images(tmp_path).images) == [0, 1, 2]
    assert levels(load_images(tmp_path, split="test").images) == [100, 101]
    assert len(load_images(tmp_path, split=None)) == 5


def test_folders_named_after_splits(tmp_path: Path) -> None:
    write(tmp_path / "train" / "0000.parquet", [0])
    write(tmp_path / "train" / "0001.parquet", [1], first_level=1)
    write(tmp_path / "validation" / "0000.parquet", [2], first_level=50)
    assert levels(load_images(tmp_path).images) == [0, 1]
    assert levels(load_images(tmp_path, split="val").images) == [50]


def test_shards_are_joined_in_order(tmp_path: Path) -> None:
    for shard in (2, 0, 1):
        write(tmp_path / f"train-{shard:05}-of-00003.parquet", [shard] * 2, first_level=10 * shard)
    data = load_images(tmp_path)
    assert levels(data.images) == [0, 1, 10, 11, 20, 21]
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_missing_shards_are_named(tmp_path: Path) -> None:
    write(tmp_path / "train-00001-of-00003.parquet", [0])
    with pytest.raises(InvalidInputError, match=r"1 of 3 shards of the split 'train' \(missing: \[0, 2\]\)"):
        load_images(tmp_path)


def test_absent_split_lists_the_others(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0])
    write(tmp_path / "test.parquet", [0])
    with pytest.raises(InvalidInputError, match="has no split 'validation', it has the splits test, train"):
        load_images(tmp_path, split="validation")


def test_single_file_has_no_splits(tmp_path: Path) -> None:
    write(tmp_path / "test.parquet", [0])
    assert len(load_images(tmp_path / "test.parquet", split=None)) == 1
    with pytest.raises(InvalidInputError, match=r"a single file, has no split 'test', it has no splits"):
        load_images(tmp_path / "test.parquet", split="test")


def test_disagreeing_class_names_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0])
    write(tmp_path / "test.parquet", [0], names=("dog", "cat", "owl"))
    with pytest.raises(InvalidInputError, match="disagree on the class names"):
        load_images(tmp_path, split=None)


def test_limit_decodes_only_the_chosen_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", [0, 1, 2] * 20)
    write(tmp_path / "train-00001-of-00002.parquet", [0, 1, 2] * 20, first_level=60)
    decoded: list[str] = []
    original = images_module._pixels

    def counting(encoded: bytes, name: str, size: int | None) -> np.ndarray:
        decoded.append(name)
        return original(encoded, name, size)

    monkeypatch.setattr(images_module, "_pixels", counting)
    data = load_images(tmp_path, limit=12)
    assert len(decoded) == len(data) == 12
    assert data.labels.bincount().tolist() == [4, 4, 4]
    assert [level % 3 for level in levels(data.images)] == data.labels.tolist()


@pytest.mark.parametrize("count", [parquet_module._BATCH_ROWS + 1, 256])
def test_rows_beyond_one_batch_keep_their_labels(tmp_path: Path, count: int) -> None:
    labels = [row % 3 for row in range(count)]
    write(tmp_path / "x.parquet", labels)
    assert levels(load_images(tmp_path / "x.parquet").images) == list(range(count))
    limited = load_images(tmp_path / "x.parquet", limit=100)
    assert [level % 3 for level in levels(limited.images)] == limited.labels.tolist()


def test_image_size(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", [0])
    assert load_images(tmp_path / "x.parquet", image_size=6).images.shape == (1, 3, 6, 6)


def test_rows_without_label_or_image_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", [0, None])
    with pytest.raises(InvalidInputError, match="rows without a label"):
        load_images(tmp_path / "x.parquet")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"img": pa.array([{"bytes": None, "path": "a.png"}], kind), "label": [0]})
    pq.write_table(table, tmp_path / "y.parquet")
    with pytest.raises(InvalidInputError, match="row 0 holds no image bytes"):
        load_images(tmp_path / "y.parquet")


def test_missing_columns_are_listed(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "x.parquet")
    with pytest.raises(InvalidInputError, match=r"no image column among \['text', 'label'\]"):
        load_images(tmp_path / "x.parquet")
    pq.write_table(pa.table({"img": [png(0)], "label": ["cat"]}), tmp_path / "y.parquet")
    with pytest.raises(InvalidInputError, match=r"no integer label column among \['img', 'label'\]"):
        load_images(tmp_path / "y.parquet")


def real_cifar() -> Path | None:
    named = os.environ.get("UNBACKDOOR_DATA")
    beside = Path(__file__).resolve().parents[4] / "shared" / "data"
    for folder in ([Path(named), Path(named) / "cifar10"] if named else []) + [beside / "cifar10"]:
        if (folder / "test.parquet").is_file():
            return folder
    return None


def test_real_cifar10() -> None:
    folder = real_cifar()
    if folder is None:
        pytest.skip("no CIFAR-10 parquet files; set UNBACKDOOR_DATA to their folder")
    data = load_images(folder, split="test", limit=200)
    assert data.images.shape == (200, 3, 32, 32)
    assert data.labels.bincount().tolist() == [20] * 10
    assert data.class_names[:3] == ("airplane", "automobile", "bird")
    # Photographs use the whole range, and their mean is near the known 0.47 of CIFAR-10.
    assert 0.40 < float(data.floats().mean()) < 0.55
