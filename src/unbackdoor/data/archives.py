"""Open zip files from strangers: everything is checked in the directory before a member is read."""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath

from unbackdoor.errors import InvalidInputError, UnsafeFileError

MAX_MEMBERS = 500_000
"""Archives with more members are refused."""

MAX_RATIO = 200
"""Archives that grow by more than this on unpacking are refused; image sets stay below 10 by far."""

HARMLESS_BYTES = 64 * 2**20
"""Below this unpacked size the ratio does not matter: blank images compress well."""


def open_archive(path: Path) -> zipfile.ZipFile:
    """Open a zip file after checking its directory; nothing is ever extracted to disk.

    Args:
        path: A ``.zip`` or ``.npz`` file.

    Raises:
        InvalidInputError: If it is no zip file.
        UnsafeFileError: If a member is encrypted, compressed in a rare way, or has a name that leads
            out of the archive or occurs twice; or if the archive is a bomb.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise InvalidInputError(
            f"{path} cannot be read as a zip file ({error}); check the download."
        ) from error
    try:
        _check(archive.infolist(), path)
    except UnsafeFileError:
        archive.close()
        raise
    return archive


def read_member(archive: zipfile.ZipFile, name: str, *, source: str) -> bytes:
    """Return the content of a member.

    Raises:
        InvalidInputError: If it is damaged.
    """
    try:
        return archive.read(name)
    except Exception as error:  # zipfile and zlib raise many unrelated types
        raise InvalidInputError(
            f"{source}: {name} cannot be unpacked ({error}); check the download."
        ) from error


def _check(members: list[zipfile.ZipInfo], path: Path) -> None:
    if len(members) > MAX_MEMBERS:
        raise UnsafeFileError(
            f"{path} has {len(members)} members, more than the {MAX_MEMBERS} allowed; split it."
        )
    for member in members:
        _check_name(member, path)
        if member.flag_bits & 0x1:
            raise UnsafeFileError(
                f"{path}: {member.filename!r} is encrypted; pack the archive without a password."
            )
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UnsafeFileError(
                f"{path}: {member.filename!r} uses compression method {member.compress_type}; "
                "only stored and deflated members are read, so pack it again."
            )
    if len({member.filename for member in members}) < len(members):
        raise UnsafeFileError(f"{path} has several members of the same name; pack it again.")
    _check_sizes(members, path)


def _check_name(member: zipfile.ZipInfo, path: Path) -> None:
    # `filename` is cut at a NUL; `orig_filename` is what the archive says.
    name = member.orig_filename
    parts = PurePosixPath(name).parts
    if not name or "\0" in name or "\\" in name or ":" in name[:2] or name.startswith("/") or ".." in parts:
        raise UnsafeFileError(
            f"{path} has a member called {name!r}, which is no plain relative path; "
            "pack it again with clean names."
        )


def _check_sizes(members: list[zipfile.ZipInfo], path: Path) -> None:
    packed = sum(member.compress_size for member in members)
    unpacked = sum(member.file_size for member in members)
    if packed > path.stat().st_size:
        raise UnsafeFileError(
            f"{path} claims {packed} packed bytes in a file of {path.stat().st_size}, so members overlap; "
            "get a sound copy."
        )
    if unpacked > HARMLESS_BYTES and unpacked > MAX_RATIO * packed:
        raise UnsafeFileError(
            f"{path} would grow from {packed} to {unpacked} bytes, more than {MAX_RATIO} times; "
            "it looks like a bomb, so give the images as a folder."
        )
