from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from unbackdoor.data import load_images
from unbackdoor.data.cifar_batches import has_batches, read_cifar_batches
from unbackdoor.errors import InvalidInputError

NAMES = ("airplane", "automobile", "bird")


def rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def text(value: bytes) -> bytes:
    """Return a Python 2 ``str`` as Python 2 pickled it, which Python 3 cannot write any more."""
    return (
        b"U" + bytes([len(value)]) + value
        if len(value) < 256
        else b"T" + struct.pack("<i", len(value)) + value
    )


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def array(pixels: np.ndarray) -> bytes:
    shape = b"(" + b"".join(number(length) for length in pixels.shape) + b"t"
    blank = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
    state = b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    kind = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR" + state
    return blank + b"(K\x01" + shape + kind + b"\x89" + text(pixels.tobytes()) + b"tb"


def python_2(content: Mapping[bytes, bytes]) -> bytes:
    items = b"".join(text(key) + value for key, value in content.items())
    return b"\x80\x02}(" + items + b"u."


def batch(pixels: np.ndarray, labels: Sequence[int], key: bytes = b"labels") -> bytes:
    listed = b"](" + b"".join(number(label) for label in labels) + b"e"
    return python_2({b"batch_label": text(b"training batch"), key: listed, b"data": array(pixels)})


def meta(names: Sequence[str], key: bytes = b"label_names") -> bytes:
    return python_2({key: b"](" + b"".join(text(name.encode()) for name in names) + b"e"})


def write_cifar10(folder: Path, per_batch: int = 4) -> None:
    folder.mkdir(exist_ok=True)
    for index in range(1, 6):
        labels = [(index + row) % 3 for row in range(per_batch)]
        (folder / f"data_batch_{index}").write_bytes(batch(rows(per_batch, index), labels))
    (folder / "test_batch").write_bytes(batch(rows(2, 9), [2, 1]))
    (folder / "batches.meta").write_bytes(meta(NAMES))


def test_training_batches_are_joined_in_order(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    data = load_images(tmp_path)
    assert data.class_names == NAMES
    assert data.images.shape == (20, 3, 32, 32)
    assert data.images.dtype == torch.uint8
    assert data.labels.tolist() == [(index + row) % 3 for index in range(1, 6) for row in range(4)]
    expected = np.concatenate([rows(4, index) for index in range(1, 6)]).reshape(20, 3, 32, 32)
    assert np.array_equal(data.images.numpy(), expected)


def test_test_batch_and_all(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    assert load_images(tmp_path, split="test").labels.tolist() == [2, 1]
    assert len(load_images(tmp_path, split=None)) == 22


def test_folder_of_the_archive_is_found(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "cifar-10-batches-py")
    assert has_batches(tmp_path)
    assert len(load_images(tmp_path, split="test")) == 2


def test_cifar100_has_fine_labels(tmp_path: Path) -> None:
    (tmp_path / "train").write_bytes(batch(rows(3, 0), [0, 2, 1], b"fine_labels"))
    (tmp_path / "test").write_bytes(batch(rows(2, 1), [1, 1], b"fine_labels"))
    (tmp_path / "meta").write_bytes(meta(NAMES, b"fine_label_names"))
    assert load_images(tmp_path).labels.tolist() == [0, 2, 1]
    assert load_images(tmp_path, split="test").class_names == NAMES


@pytest.mark.parametrize("order", ["C", "F"])
def test_files_written_by_python_3_are_read(tmp_path: Path, order: str) -> None:
    pixels = rows(3, 5)
    stored = np.asfortranarray(pixels) if order == "F" else pixels
    content = pickle.dumps({"data": stored, "labels": [0, 1, 2]}, protocol=2)
    (tmp_path / "test_batch").write_bytes(content)
    data = load_images(tmp_path, split="test")
    assert np.array_equal(data.images.flatten(1).numpy(), pixels)
    assert data.class_names == ()


def test_limit_and_size(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    whole, limited = load_images(tmp_path), load_images(tmp_path, limit=6, image_size=16)
    assert limited.images.shape == (6, 3, 16, 16)
    expected = whole.labels.bincount() * 6 / 20
    assert float((limited.labels.bincount() - expected).abs().max()) < 1


def test_missing_batches_are_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(InvalidInputError, match="lacks data_batch_3"):
        load_images(tmp_path)


def test_absent_split_lists_the_others(tmp_path: Path) -> None:
    (tmp_path / "test_batch").write_bytes(batch(rows(2, 9), [2, 1]))
    with pytest.raises(InvalidInputError, match="has no split 'train', it has the splits test"):
        load_images(tmp_path)


def test_folder_without_batches(tmp_path: Path) -> None:
    assert not has_batches(tmp_path)
    with pytest.raises(InvalidInputError, match="holds no CIFAR batches"):
        read_cifar_batches(tmp_path, split=None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": rows(2, 0), "labels": [0]}, "2 images but 1 labels"),
        ({"data": rows(2, 0)[:, :-1], "labels": [0, 1]}, r"uint8 array of shape \(N, 3072\)"),
        ({"data": rows(2, 0).astype(np.int16), "labels": [0, 1]}, "uint8 array"),
        ({"data": rows(2, 0).reshape(2, 3, 32, 32), "labels": [0, 1]}, "uint8 array"),
        ({"data": rows(2, 0), "labels": [0, -1]}, "labels from -1 to 0"),
        ({"data": rows(2, 0), "labels": [0, 0.5]}, "labels that are no integers"),
        ({"data": rows(2, 0), "fine": [0, 1]}, "lacks an array 'data' or a list 'labels'"),
        ({"data": [1, 2], "labels": [0, 1]}, "lacks an array 'data'"),
        ([1, 2], "holds no dictionary"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(InvalidInputError, match=message):
        load_images(tmp_path, split="test")


def test_label_without_a_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_batch").write_bytes(batch(rows(2, 0), [0, 3]))
    (tmp_path / "batches.meta").write_bytes(meta(NAMES))
    with pytest.raises(InvalidInputError, match="labels from 0 to 3, outside 0 to 2"):
        load_images(tmp_path, split="test")


def test_meta_without_names_is_refused(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "batches.meta").write_bytes(meta(NAMES, b"other"))
    with pytest.raises(InvalidInputError, match="no list of names called 'label_names'"):
        load_images(tmp_path)
