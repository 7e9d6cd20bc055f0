"""Data sets from strangers: each must be refused at once, and nothing in it may run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unbackdoor.data import archives as archives_module
from unbackdoor.data import load_images, parquet
from unbackdoor.errors import InvalidInputError, UnbackdoorError, UnsafeFileError


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < 5


def png(level: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), level, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def huge_png(side: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def folder_with(root: Path, content: bytes, name: str = "1.png") -> Path:
    (root / "cat").mkdir()
    (root / "cat" / name).write_bytes(content)
    return root


@pytest.mark.parametrize("side", [5_000, 12_000, 60_000])
def test_png_header_of_a_bomb(tmp_path: Path, side: int) -> None:
    with pytest.raises(InvalidInputError, match="pixels"):
        load_images(folder_with(tmp_path, huge_png(side)), image_size=32)


def test_truncated_jpeg(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    half = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    with pytest.raises(InvalidInputError, match=r"1\.jpg cannot be decoded as an image"):
        load_images(folder_with(tmp_path, half, "1.jpg"))


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "ICO"])
def test_rare_formats_are_not_even_parsed(tmp_path: Path, kind: str) -> None:
    # Pillow could read them; EPS it would hand to an external program.
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(buffer, kind)
    with pytest.raises(InvalidInputError, match="cannot be decoded"):
        load_images(folder_with(tmp_path, buffer.getvalue()))


def test_named_pipe_does_not_block(tmp_path: Path) -> None:
    folder_with(tmp_path, png())
    os.mkfifo(tmp_path / "cat" / "2.png")
    with pytest.raises(InvalidInputError, match="is not a regular file"):
        load_images(tmp_path)


def archive_of(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    "name",
    ["../cat/1.png", "cat/../../1.png", "/cat/1.png", "C:/cat/1.png", "cat\\..\\1.png", "cat/1.png#.txt"],
)
def test_zip_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    path = archive_of(tmp_path / "x.zip", {"cat/0.png": png(), name: png()})
    # The writer would cut a name at a NUL, so that one is put in afterwards.
    path.write_bytes(path.read_bytes().replace(b"#", b"\0"))
    with pytest.raises(UnsafeFileError, match="no plain relative path"):
        load_images(path)
    assert list(tmp_path.iterdir()) == [path]


def test_zip_bomb(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "x.zip", {"cat/1.png": png(), "cat/2.png": bytes(65 * 2**20)})
    with pytest.raises(UnsafeFileError, match="looks like a bomb"):
        load_images(path)


def test_zip_with_a_huge_image_file(tmp_path: Path) -> None:
    noise = os.urandom(2**20) * 65
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("cat/1.png", noise)
    with pytest.raises(UnsafeFileError, match="allowed for an image file"):
        load_images(tmp_path / "x.zip")


def test_zip_with_overlapping_members(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/1.png", png() + bytes(5000))
        first = archive.infolist()[0]
        for index in range(2, 50):
            twin = zipfile.ZipInfo(f"cat/{index}.png")
            twin.header_offset, twin.file_size, twin.compress_size, twin.CRC = (
                first.header_offset,
                first.file_size,
                first.compress_size,
                first.CRC,
            )
            archive.filelist.append(twin)
    with pytest.raises(UnsafeFileError, match="members overlap"):
        load_images(path)


def test_zip_with_a_name_twice(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("cat/1.png", png())
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("cat/1.png", png(9))
    with pytest.raises(UnsafeFileError, match="same name"):
        load_images(tmp_path / "x.zip")


def test_zip_with_rare_compression(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("cat/1.png", png())
    with pytest.raises(UnsafeFileError, match="compression method 14"):
        load_images(tmp_path / "x.zip")


def test_encrypted_zip(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "x.zip", {"cat/1.png": png()})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(UnsafeFileError, match="is encrypted"):
        load_images(path)


def test_zip_with_too_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives_module, "MAX_MEMBERS", 3)
    path = archive_of(tmp_path / "x.zip", {f"cat/{index}.png": png() for index in range(4)})
    with pytest.raises(UnsafeFileError, match="has 4 members"):
        load_images(path)


def test_damaged_zip(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "x.zip", {"cat/1.png": os.urandom(500)})
    sound = path.read_bytes()
    path.write_bytes(sound[:200])
    with pytest.raises(InvalidInputError, match="cannot be read as a zip file"):
        load_images(path)
    path.write_bytes(sound[:100] + b"\xff" * 50 + sound[150:])
    with pytest.raises(InvalidInputError, match="cannot be unpacked"):
        load_images(path)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
def test_payload_in_a_cifar_batch(tmp_path: Path, name: str, protocol: int) -> None:
    sound = pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0]}, protocol=2)
    for index in range(1, 6):
        (tmp_path / f"data_batch_{index}").write_bytes(sound)
    content = {
        "data": np.zeros((1, 3072), np.uint8),
        "labels": [0],
        "label_names": ["a"],
        "x": Payload(tmp_path / "ran"),
    }
    (tmp_path / name).write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(UnsafeFileError, match="Nothing in the file was executed"):
        load_images(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_array_of_objects_in_a_cifar_batch(tmp_path: Path) -> None:
    content = {"data": np.array([[{}] * 3072], dtype=object), "labels": [0]}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UnbackdoorError):
        load_images(tmp_path, split="test")


def test_cifar_array_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    sound = pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0]}, protocol=2)
    claim = b"K\x01M\x00\x0c\x86"
    assert claim in sound
    (tmp_path / "test_batch").write_bytes(sound.replace(claim, b"J\xff\xff\xff\x7fM\x00\x0c\x86"))
    with pytest.raises(InvalidInputError, match="does not hold a uint8 array"):
        load_images(tmp_path, split="test")


def test_codec_other_than_latin1_in_a_cifar_batch(tmp_path: Path) -> None:
    # Codec names are modules that Python imports.
    call = b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x0b\x00\x00\x00quopri_code\x86R"
    stream = b"\x80\x02}(X\x04\x00\x00\x00data" + call + b"u."
    (tmp_path / "test_batch").write_bytes(stream)
    with pytest.raises(InvalidInputError, match="unexpected encoding"):
        load_images(tmp_path, split="test")


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"garbage", b"\x80\x02}q\x00."])
def test_damaged_cifar_batch(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(UnbackdoorError):
        load_images(tmp_path, split="test")


def test_named_pipe_in_place_of_parquet_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.parquet")
    with pytest.raises(InvalidInputError):
        load_images(tmp_path)


def packed_images(path: Path, count: int, size: int, *, shared: bool) -> Path:
    rows = pa.array([{"bytes": bytes(size), "path": ""}] * count)
    table = pa.table({"img": rows, "label": [0] * count})
    pq.write_table(table, path, compression="zstd", use_dictionary=shared)
    return path


def test_parquet_bombs(tmp_path: Path) -> None:
    # One value that all rows share is held once, and here it is no image.
    path = packed_images(tmp_path / "shared.parquet", 128, 2**20, shared=True)
    assert path.stat().st_size < 2000
    shard = parquet._open(path)
    assert sum(batch.nbytes for batch in parquet._batches(shard)) < 2 * 2**20
    with pytest.raises(InvalidInputError, match="cannot be decoded"):
        load_images(path)
    path = packed_images(tmp_path / "packed.parquet", 80, 2**20, shared=False)
    assert path.stat().st_size < 10_000
    with pytest.raises(UnsafeFileError, match="times its size, which no images do"):
        load_images(path)


def test_npz_of_a_single_value(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.uint8(3), labels=np.zeros(1, np.int64))
    with pytest.raises((InvalidInputError, UnsafeFileError)):
        load_images(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["images", "labels"])
def test_npz_with_objects(tmp_path: Path, name: str) -> None:
    arrays: dict[str, np.ndarray] = {"images": np.zeros((1, 4, 4), np.uint8), "labels": np.zeros(1, np.int64)}
    arrays[name] = np.array([Payload(tmp_path / "ran")], dtype=object)
    np.savez(tmp_path / "x.npz", allow_pickle=True, **arrays)
    with pytest.raises(UnsafeFileError, match="holds Python objects"):
        load_images(tmp_path / "x.npz")
    assert not (tmp_path / "ran").exists()


def npy(claimed: tuple[int, ...], content: bytes) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": claimed}
    np.lib.format.write_array_header_1_0(buffer, header)  # type: ignore[no-untyped-call, unused-ignore]
    return buffer.getvalue() + content


@pytest.mark.parametrize("shape", [(10**12, 4, 4), (-1, 4, 4), (1, 4, 5)])
def test_npz_that_claims_more_than_it_holds(tmp_path: Path, shape: tuple[int, ...]) -> None:
    members = {"images.npy": npy(shape, bytes(16)), "labels.npy": npy((1,), bytes(1))}
    with pytest.raises(UnsafeFileError, match="claims the shape"):
        load_images(archive_of(tmp_path / "x.npz", members))


def test_npz_bomb(tmp_path: Path) -> None:
    members = {"images.npy": npy((2**20 * 65, 1, 1), bytes(2**20 * 65)), "labels.npy": npy((1,), bytes(1))}
    with pytest.raises(UnsafeFileError, match="looks like a bomb"):
        load_images(archive_of(tmp_path / "x.npz", members))


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x93NUMPY\x01\x00\xff\xff", b"\x93NUMPY\x09\x09aaaa"])
def test_npz_with_damaged_arrays(tmp_path: Path, content: bytes) -> None:
    members = {"images.npy": content, "labels.npy": npy((1,), bytes(1))}
    with pytest.raises(InvalidInputError, match="is no sound array"):
        load_images(archive_of(tmp_path / "x.npz", members))


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1garbagePAR1", b"PAR1" + bytes(200) + b"\xff\xff\xff\x7fPAR1"]
)
def test_garbage_in_place_of_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.parquet").write_bytes(content)
    for path in (tmp_path, tmp_path / "train.parquet"):
        with pytest.raises(InvalidInputError, match="cannot be read as parquet"):
            load_images(path)


def test_parquet_with_damaged_pages(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"img": [os.urandom(50) for _ in range(100)], "label": [0] * 100}), path)
    sound = path.read_bytes()
    path.write_bytes(sound[:40] + b"\xff" * 3000 + sound[3040:])
    with pytest.raises(InvalidInputError):
        load_images(path)


@pytest.mark.parametrize("label", [-1, 10**6, 2**62])
def test_label_out_of_range(tmp_path: Path, label: int) -> None:
    pq.write_table(pa.table({"img": [png(), png()], "label": [0, label]}), tmp_path / "x.parquet")
    with pytest.raises(InvalidInputError, match=r"has labels from .* outside 0 to"):
        load_images(tmp_path / "x.parquet")
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.array([0, label]))
    with pytest.raises(InvalidInputError, match=r"has labels from .* outside 0 to"):
        load_images(tmp_path / "x.npz")


def test_class_names_of_a_wrong_kind_are_ignored(tmp_path: Path) -> None:
    for names in (b'"ab"', b"5", b"{}", b"null", b"[" * 100_000):
        text = b'{"info": {"features": {"label": {"names": ' + names + b"}}}}"
        table = pa.table({"img": [png()], "label": [0]}).replace_schema_metadata({b"huggingface": text})
        pq.write_table(table, tmp_path / "x.parquet")
        assert load_images(tmp_path / "x.parquet").class_names == ()
