"""Read image classification sets in the parquet layout of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbackdoor.data.images import MAX_FILE_BYTES, decode_all
from unbackdoor.data.labels import label_tensor
from unbackdoor.data.layout import canonical_split, choose_splits
from unbackdoor.data.splits import spread
from unbackdoor.errors import InvalidInputError, UnsafeFileError
from unbackdoor.extras import require
from unbackdoor.types import LabelledImages

MAX_ROWS = 5_000_000
"""Files that claim more rows are refused: a few compressed bytes can stand for any number of them."""

_Schema = Any
"""pyarrow carries no annotations."""

_BATCH_ROWS = 128
MOST_PACKED = 50
"""Times that a column of images may grow when it is unpacked."""
_SHARD = re.compile(r"(?P<split>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?")


@dataclass(frozen=True, eq=False)
class _Shard:
    path: Path
    image_column: str
    leaf: str
    labels: Tensor
    class_names: tuple[str, ...]


def read_parquet(path: Path, *, limit: int | None = None, image_size: int | None = None) -> LabelledImages:
    """Read one parquet file with an image column (``{bytes, path}``) and an integer label column.

    Class names are taken from the schema metadata where the hub's libraries wrote them.

    Args:
        path: A ``.parquet`` file.
        limit: Read only that many images, each class in proportion.
        image_size: Resize to this many pixels a side.

    Raises:
        InvalidInputError: If the file is no parquet file or has no such columns.
    """
    return _read_shards([path], source=str(path), limit=limit, image_size=image_size)


def read_parquet_folder(
    path: Path, *, split: str | None, limit: int | None = None, image_size: int | None = None
) -> LabelledImages:
    """Read a split from a folder of parquet files; all of its shards, in order.

    Args:
        path: A folder with ``{split}.parquet`` or ``{split}-00000-of-00002.parquet`` and so on, in
            itself, in ``data/``, or in folders named after the splits.
        split: The split, or None for all of them.
        limit: Read only that many images, each class in proportion.
        image_size: Resize to this many pixels a side.

    Raises:
        InvalidInputError: If the split or one of its shards is absent, or a file cannot be read.
    """
    found = find_parquet(path)
    chosen = choose_splits(list(found), split, source=str(path))
    files = [file for name in chosen for file in found[name]]
    for name in chosen:
        _check_complete(found[name], name, path)
    return _read_shards(files, source=str(path), limit=limit, image_size=image_size)


def find_parquet(path: Path) -> dict[str, list[Path]]:
    """Return the parquet files of each split of a folder, in order; empty if there are none."""
    for folder in (path, path / "data"):
        found: dict[str, list[Path]] = {}
        for file in _files(folder):
            shard = _SHARD.fullmatch(file.stem)
            found.setdefault(shard["split"] if shard else file.stem, []).append(file)
        if found:
            return found
    inner = {folder.name: _files(folder) for folder in sorted(path.iterdir()) if folder.is_dir()}
    return {name: files for name, files in inner.items() if files and canonical_split(name)}


def _files(folder: Path) -> list[Path]:
    # Opening a named pipe would block for ever.
    return sorted(file for file in folder.glob("*.parquet") if file.is_file())


def _check_complete(files: Sequence[Path], split: str, path: Path) -> None:
    shards = [match for file in files if (match := _SHARD.fullmatch(file.stem))]
    if len(shards) < len(files) or not shards:
        return
    expected = set(range(int(shards[0]["count"])))
    missing = sorted(expected - {int(shard["index"]) for shard in shards})
    if missing or len(shards) > len(expected):
        raise InvalidInputError(
            f"{path} has {len(shards)} of {len(expected)} shards of the split {split!r} (missing: "
            f"{missing[:5] or 'none'}); download the rest, or point to a single file."
        )


def _read_shards(
    files: Sequence[Path], *, source: str, limit: int | None, image_size: int | None
) -> LabelledImages:
    shards = [_open(file) for file in files]
    names = {shard.class_names for shard in shards}
    if len(names) > 1:
        raise InvalidInputError(
            f"{source} has files that disagree on the class names, so labels would not agree; read one split."
        )
    labels = torch.cat([shard.labels for shard in shards])
    rows = spread(labels, limit)
    images = decode_all(_encoded(shards, rows), len(rows), source=source, size=image_size)
    return LabelledImages(images, labels[rows], names.pop())


def _open(path: Path) -> _Shard:
    """Read everything but the images."""
    parquet = require("pyarrow.parquet", extra="data")
    try:
        with parquet.ParquetFile(path) as file:
            count, schema = file.metadata.num_rows, file.schema_arrow
            _check_rows(count, path)
            image_column, label_column = _image_column(schema, path), _label_column(schema, path)
            values = file.read(columns=[label_column]).column(label_column).to_pylist()
    except InvalidInputError:
        raise
    except Exception as error:  # pyarrow raises many unrelated types on damaged files
        raise InvalidInputError(f"{path} cannot be read as parquet ({error}); check the download.") from error
    if any(label is None for label in values):
        raise InvalidInputError(f"{path} has rows without a label; remove them.")
    names = _class_names(schema.metadata, label_column)
    labels = label_tensor(values, source=str(path), class_names=names)
    # The bytes themselves, where the column also has a path beside them.
    nested = f"{image_column}.bytes" if hasattr(schema.field(image_column).type, "get_field_index") else ""
    return _Shard(path, image_column, nested or image_column, labels, names)


def _check_rows(count: int, path: Path) -> None:
    if count > MAX_ROWS:
        raise InvalidInputError(
            f"{path} claims {count} rows, more than the {MAX_ROWS} allowed; split the file."
        )


def _encoded(shards: Sequence[_Shard], rows: Tensor) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the images at ``rows`` (ascending) of all shards taken together."""
    start = 0
    for shard in shards:
        stop = start + len(shard.labels)
        yield from _encoded_in(shard, rows[(rows >= start) & (rows < stop)] - start)
        start = stop


def _encoded_in(shard: _Shard, rows: Tensor) -> Iterator[tuple[str, bytes]]:
    if not len(rows):
        return
    start = 0
    for batch in _batches(shard):
        stop = start + len(batch)
        inside = rows[(rows >= start) & (rows < stop)].tolist()
        for row in inside:
            yield f"{shard.path.name} row {row}", _bytes_of(batch[row - start].as_py(), shard.path, row)
        start = stop
        if start > int(rows[-1]):
            return


def _batches(shard: _Shard) -> Iterator[Any]:
    """Yield the image column in pieces: it may be far larger unpacked than the file."""
    parquet = require("pyarrow.parquet", extra="data")
    try:
        # A value that many rows share is held once.
        with parquet.ParquetFile(shard.path, read_dictionary=[shard.leaf]) as file:
            _check_unpacked(file.metadata, shard)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[shard.image_column]):
                yield batch.column(0)
    except UnsafeFileError:
        raise
    except Exception as error:  # pyarrow raises many unrelated types on damaged files
        raise InvalidInputError(f"{shard.path} cannot be read ({error}); check the download.") from error


def _check_unpacked(metadata: Any, shard: _Shard) -> None:  # noqa: ANN401 - pyarrow has no types
    """Refuse a column of images that unpacks to far more than any images do: these are packed already."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            unpacked, packed = column.total_uncompressed_size, max(1, column.total_compressed_size)
            if column.path_in_schema == shard.leaf and unpacked > max(MAX_FILE_BYTES, MOST_PACKED * packed):
                raise UnsafeFileError(
                    f"{shard.path} unpacks to {unpacked / packed:.0f} times its size, which no images do; "
                    "check where it comes from."
                )


def _bytes_of(value: object, path: Path, row: int) -> bytes:
    encoded = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(encoded, bytes):
        raise InvalidInputError(
            f"{path} row {row} holds no image bytes (only a path?); save the data set with embedded images."
        )
    return encoded


def _image_column(schema: _Schema, path: Path) -> str:
    types = require("pyarrow.types", extra="data")
    for name in ("img", "image", *schema.names):
        if name in schema.names:
            kind = schema.field(name).type
            if types.is_binary(kind) or types.is_large_binary(kind):
                return str(name)
            if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                return str(name)
    raise InvalidInputError(
        f"{path} has no image column among {schema.names}; it needs one of type {{bytes, path}}."
    )


def _label_column(schema: _Schema, path: Path) -> str:
    types = require("pyarrow.types", extra="data")
    for name in ("label", "labels", "fine_label", "coarse_label", *schema.names):
        if name in schema.names and types.is_integer(schema.field(name).type):
            return str(name)
    raise InvalidInputError(
        f"{path} has no integer label column among {schema.names}; add one called 'label'."
    )


def _class_names(metadata: dict[bytes, bytes] | None, label_column: str) -> tuple[str, ...]:
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label_column]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):  # metadata is optional, and written by anybody
        return ()
    return tuple(str(name) for name in names) if isinstance(names, list) else ()
