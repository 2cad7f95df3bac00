"""Bytes of a file as they were before gzip or Zstandard packed them, a piece at a time.

Where the packed bytes break off or were damaged, everything before that place is given first, then the error.
"""

from __future__ import annotations

import contextlib
import functools
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path, PurePath
from typing import IO, Literal, cast

import zstandard
from isal import isal_zlib

# Takes packed bytes, gives plain ones, and at its end what it did not need.
Unpack = Callable[[Iterator[bytes]], Generator[bytes, None, bytes]]
Packing = Literal["", "gz", "zst"]

# What reading raises when the bytes break off or were damaged.
BROKEN: tuple[type[Exception], ...] = (
    EOFError,
    OSError,
    zipfile.BadZipFile,
    zlib.error,
    zstandard.ZstdError,
    cast("type[Exception]", isal_zlib.error),
)

_READ = 256 * 1024  # read from the file at once
PLAIN_BYTES = 1024 * 1024  # the same of a file that is not packed: as much as is looked at together
# Given to Zstandard at once. It cannot be told how much to give back: of a block that repeats one byte, 32,000 times
# as much.
_PACKED = 4 * 1024
_GZIP = 31  # zlib's word for: with a gzip header, the largest window


def hidden(path: PurePath) -> bool:
    """Whether a file inside of a folder or archive is none of its data: `.hidden`, `_SUCCESS`, `__MACOSX/…`."""
    return any(part.startswith((".", "_")) and part != ".." for part in path.parts)


def chunks(
    place: str, packing: Packing, member: str | None = None, *, start: int = 0
) -> Iterator[bytes]:
    """Yield the bytes of a file, or of a member of a zip archive. Raises one of BROKEN.

    start: the byte to begin with; only of a file that is not packed.
    """
    if member is None:
        with Path(place).open("rb") as file:
            file.seek(start)
            yield from _unpacked(file, packing)
        return
    archive = _archive(place, Path(place).stat().st_mtime_ns)
    try:
        inside = archive.open(member)
    except RuntimeError as error:  # a password is needed, or another unpacker
        raise zipfile.BadZipFile(str(error)) from error
    with inside:
        yield from _unpacked(inside, packing)


@functools.lru_cache(maxsize=1)
def _archive(place: str, _changed_ns: int) -> zipfile.ZipFile:
    """Return an archive that stays open for its next member: a year of exports has thousands of them."""
    return zipfile.ZipFile(place)


def _unpacked(file: IO[bytes], packing: Packing) -> Iterator[bytes]:
    if packing == "gz":
        return _members(file, _gzip)
    if packing == "zst":
        return _members(file, _zstandard)
    return iter(lambda: file.read(PLAIN_BYTES), b"")


def _gzip(packed: Iterator[bytes]) -> Generator[bytes, None, bytes]:
    unpacker = isal_zlib.decompressobj(_GZIP)
    for data in packed:
        part = unpacker.decompress(data, 4 * _READ)
        while part or unpacker.unconsumed_tail:
            yield part
            part = unpacker.decompress(unpacker.unconsumed_tail, 4 * _READ)
        if unpacker.eof:
            return unpacker.unused_data
    raise EOFError("it ends inside of a gzip member")


def _zstandard(packed: Iterator[bytes]) -> Generator[bytes, None, bytes]:
    unpacker = zstandard.ZstdDecompressor().decompressobj()
    for data in packed:
        yield unpacker.decompress(data)
        if unpacker.eof:
            return unpacker.unused_data
    raise EOFError("it ends inside of a Zstandard frame")


def _members(file: IO[bytes], unpack: Unpack) -> Iterator[bytes]:
    """Unpack one member or frame after another. Zeros behind the last are padding."""
    rest = b""

    def packed() -> Iterator[bytes]:
        if rest:
            yield rest
        yield from iter(lambda: file.read(_PACKED if unpack is _zstandard else _READ), b"")

    while True:
        rest = (rest or file.read(_PACKED)).lstrip(b"\0")
        if not rest:
            return
        rest = yield from unpack(packed())


def start(place: str, packing: Packing, member: str | None = None, *, size: int) -> bytes:
    """Return the first bytes of a file, as many as can be read up to a size: who reads on is told why not."""
    found = b""
    with contextlib.suppress(*BROKEN):
        for chunk in chunks(place, packing, member):
            found += chunk
            if len(found) >= size:
                break
    return found[:size]


def to_file(place: str, packing: Packing, to: Path, member: str | None = None) -> str:
    """Unpack a file whole and return the place of the copy. Raises one of BROKEN."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with to.open("wb") as plain:
        plain.writelines(chunks(place, packing, member))
    return str(to)
