"""Reading a destination: archives of its Export API downloaded into files, and the lines of an archive."""

from __future__ import annotations

import errno
import gzip
import http.client
import io
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from retrofill.backfill import unpack
from retrofill.backfill.keys import Keys
from retrofill.errors import FinalError

READ_TRIES = 8
READ_S = 600.0  # ours: an archive may take so long to begin


class Fetched(NamedTuple):
    """How a download ended. status: 200, 404 for no data, or 400 and what it said: too much, or no such hours."""

    status: int
    said: str = ""


def fetch(
    url: str,
    keys: Keys,
    path: Path,
    *,
    divisible: bool = False,
    step: Callable[[str], None] = lambda _: None,
) -> Fetched:
    """Download into a file. Tries again for as long as it may help, and tells `step` why.

    divisible: the caller asks for less when there was too much; then a 504 counts as 400 and is not tried again.
    Raises FinalError: the keys are refused, or nothing helps.
    """
    request = urllib.request.Request(url)  # noqa: S310 - http or https: `target` checked it
    keys.sign(request)
    problem = ""
    for tries in range(READ_TRIES):
        if tries:
            pause = min(60.0, 2.0**tries)
            step(f"the destination cannot be read ({problem}); again in {pause:.0f} s")
            time.sleep(pause)
        try:
            with urllib.request.urlopen(request, timeout=READ_S) as answer, path.open("wb") as file:  # noqa: S310 - the same
                size = answer.headers.get("Content-Length")
                copied = _copy(answer, file)
            if size is None or int(size) == copied:
                return Fetched(200)
            problem = f"{copied:,} of {int(size):,} bytes"
        except urllib.error.HTTPError as refused:
            with refused:
                said = refused.read(500).decode("utf-8", "replace").strip()
            if refused.code in {400, 404}:
                return Fetched(refused.code, said)
            if refused.code == 504 and divisible:
                return Fetched(400, said)
            if refused.code in {401, 403}:
                raise FinalError(
                    f"The destination does not let us read: {refused.code} {said}",
                    where=url,
                    mend="Check the keys; both are needed for reading",
                ) from refused
            problem = f"{refused.code} {said}"
        except (OSError, http.client.HTTPException) as failed:
            if isinstance(failed, OSError) and failed.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise  # it is our disk that is full
            problem = str(failed)
    raise FinalError(f"The destination cannot be read: {problem}", where=url, mend="Try it later")


def _copy(answer: http.client.HTTPResponse, file: IO[bytes]) -> int:
    copied = 0
    while block := answer.read(1 << 18):
        copied += file.write(block)
    return copied


def given(path: Path) -> Iterator[bytes]:
    """Yield the lines of what a destination gave as an archive. Raises FinalError if it is none."""
    try:
        yield from lines(path)
    except (EOFError, OSError, zipfile.BadZipFile, zlib.error) as problem:
        raise FinalError(
            f"What the destination gave as an export cannot be read: {problem}", mend="Try it again"
        ) from problem


def lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of an archive: a ZIP of gzip members, a folder of such, one gzip file, or plain lines.

    What computers add to an archive of theirs is passed over, see `unpack.hidden`.
    """
    if path.is_dir():
        for one in sorted(path.rglob("*")):
            if one.is_file() and not unpack.hidden(one.relative_to(path)):
                yield from lines(one)
        return
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        if start.startswith(b"PK"):
            with zipfile.ZipFile(file) as archive:
                for name in archive.namelist():
                    if name.endswith("/") or unpack.hidden(PurePosixPath(name)):
                        continue
                    with archive.open(name) as member:
                        if name.endswith(".gz"):
                            with gzip.open(member) as unpacked:
                                yield from io.BufferedReader(unpacked)
                        else:
                            yield from member
        elif start.startswith(b"\x1f\x8b"):
            with gzip.open(file) as unpacked:
                yield from unpacked
        else:
            yield from file
