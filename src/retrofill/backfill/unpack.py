"""Bytes of a file as they were before gzip or Zstandard packed them, streamed."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Literal, cast

import zstandard
from isal import igzip

Packing = Literal["", "gz", "zst"]

# What a reader raises when the bytes break off or were damaged.
BROKEN = (EOFError, OSError, zipfile.BadZipFile, zstandard.ZstdError)


@contextmanager
def stream(place: str, packing: Packing, member: str | None = None) -> Iterator[IO[bytes]]:
    """Open a file, or a member of a zip archive, for reading from its start.

    Raises one of BROKEN while reading, when the packed bytes are damaged.
    """
    with ExitStack() as opened:
        raw: IO[bytes] = opened.enter_context(Path(place).open("rb"))
        if member is not None:
            archive = opened.enter_context(zipfile.ZipFile(raw))
            raw = opened.enter_context(archive.open(member))
        if packing == "gz":
            raw = cast("IO[bytes]", opened.enter_context(igzip.open(raw, "rb")))
        elif packing == "zst":
            reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            raw = opened.enter_context(reader)
        yield raw
