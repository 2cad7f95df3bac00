"""Where history lies: files, folders, globs, archives, object storage, a query.

A source is what the user named. `locate` says which `Origin`s that means, cheaply and without reading them: their sizes
and times make the fingerprint by which a finished stage is known again. `pieces` then makes them readable: what lies far
away is downloaded into the scratch folder, archives are opened to their members. The pieces come in the order in which
their rows count: as named, and in the natural order of names (9 before 10) inside a folder, glob or archive.
"""

from __future__ import annotations

import glob
import hashlib
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Final, Literal
from urllib.parse import parse_qs, unquote, urlsplit, urlunsplit

import msgspec
from msgspec import Struct

from retrofill.backfill import remote, unpack
from retrofill.errors import InputError

Format = Literal["ndjson", "json", "csv", "tsv", "parquet", "query"]

_FORMATS: Final[dict[str, Format]] = {
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
    ".json": "ndjson",  # an array if its first character says so
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
# What a mapping's `source: format` says for sure. The others are a look at the first byte away.
_SAID: Final[dict[str, Format]] = {
    "csv": "csv",
    "tsv": "tsv",
    "parquet": "parquet",
    "json": "json",
}
_PACKED: Final[dict[str, unpack.Packing]] = {".gz": "gz", ".zst": "zst"}
_QUERIES: Final = ("sqlite", "duckdb", "postgresql", "postgres")
# What a work directory holds beside its lock: each a sign that it is one.
_WORK: Final = ("stage", "stage.new", "scratch", "dead-letters.ndjson", "journal.db", "live.json")
_UTF16: Final = (b"\xff\xfe", b"\xfe\xff")  # how such a file begins
_FAR_LOOKED_AT = 3  # ours: objects fetched for a look
_NATURAL = re.compile(r"(\d+)")


class Origin(Struct, frozen=True):
    """One thing that was named or found, before anybody opened it.

    name: as people know it, without any password. place: a path, an s3:// address or a database's address.
    size: bytes, 0 if unknown. changed: anything that differs once the content does.
    """

    name: str
    place: str
    size: int = 0
    changed: str = ""
    query: str | None = None


class Piece(Struct, frozen=True):
    """One stream of rows. number: its place in the order of the source, from 0. member: inside a zip."""

    number: int
    name: str
    place: str
    format: Format
    packing: unpack.Packing = ""
    member: str | None = None
    query: str | None = None
    size: int = 0


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts `9` before `10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _NATURAL.split(name)]


def fingerprint(origins: Sequence[Origin]) -> str:
    """Return 32 hexadecimal digits that change when a file is added, gone, resized or written."""
    return hashlib.sha256(msgspec.json.encode(origins)).hexdigest()[:32]


def locate(
    named: Sequence[str], *, query: str | None = None, endpoint: str | None = None
) -> list[Origin]:
    """Say what the named sources are, in order. What is named twice, as by a folder and a file in it, is read once.

    query: the SQL for database addresses that carry none. endpoint: of S3, where it is not AWS.
    Raises InputError: nothing named, nothing found, a database without a query.
    """
    if not named:
        raise InputError("No source was named", mend="Name a file, a folder, s3://… or a database")
    every = [origin for name in named for origin in _locate(name, query, endpoint)]
    if query is not None and not any(origin.query for origin in every):
        raise InputError("A query was given, but no database", mend="Name sqlite:///file or so")
    once: dict[tuple[str, str | None], Origin] = {}
    for origin in every:
        place = origin.place if "://" in origin.place else str(Path(origin.place).resolve())
        once.setdefault((place, origin.query), origin)
    return list(once.values())


def _locate(name: str, query: str | None, endpoint: str | None) -> list[Origin]:
    scheme = name.split("://", 1)[0] if "://" in name else ""
    if scheme == "s3":
        objects = remote.listing(name, endpoint=endpoint)
        kept = [one for one in objects if _wanted(one.key)] if len(objects) > 1 else objects
        if not kept:
            raise InputError(f"No object is named {name}", mend="Look at bucket, prefix and region")
        kept.sort(key=lambda one: natural(one.key))
        return [Origin(one.url, one.url, one.size, one.etag) for one in kept]
    if scheme in _QUERIES:
        return [_database(name, scheme, query)]
    return [_file(path) for path in _paths(name)]


def _database(name: str, scheme: str, query: str | None) -> Origin:
    parts = urlsplit(name)
    told = parse_qs(parts.query)
    query = told.pop("query", [query or ""])[0]
    if not query.strip():
        raise InputError(f"The {scheme} source has no query", mend="Give one with --query")
    rest = "&".join(f"{key}={value}" for key, values in told.items() for value in values)
    place = urlunsplit((parts.scheme, parts.netloc, parts.path, rest, ""))
    shown = f"{scheme}://{(parts.hostname or '')}{parts.path}"
    if scheme not in {"sqlite", "duckdb"}:
        return Origin(shown, place, query=query)
    path = Path(unquote(parts.path).lstrip("/"))
    if parts.path.startswith("//") or not path.is_file():  # three slashes may mean either
        path = Path("/") / path
    if not path.is_file():
        raise InputError(
            f"There is no database file {path}", mend="Write ? as %3F, # as %23 and % as %25"
        )
    there = path.stat()
    return Origin(shown, f"{scheme}:{path}", there.st_size, str(there.st_mtime_ns), query)


def _paths(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        inside = [one for one in path.rglob("*") if one.is_file() and _wanted(str(one))]
        inside = [one for one in inside if not unpack.hidden(one.relative_to(path))]
        inside = _not_ours(inside, path)
    elif path.exists():
        return [path]
    else:
        inside = [Path(one) for one in glob.glob(str(path), recursive=True)]  # noqa: PTH207  # Path.glob takes no absolute pattern
        inside = _not_ours([one for one in inside if one.is_file()], _told(path))
    if not inside:
        what = f"No file of history is in {name}" if path.is_dir() else f"There is no source {name}"
        raise InputError(what, mend=f"Files end in {', '.join(_FORMATS)}, also .gz, .zst")
    return sorted(inside, key=lambda one: natural(str(one)))


def _told(pattern: Path) -> Path:
    """Return the folders of a glob that it names outright."""
    return Path(*takewhile(lambda part: not glob.has_magic(part), pattern.parts))


def _not_ours(files: Sequence[Path], told: Path) -> list[Path]:
    """Leave out what lies in work directories below a folder: the same line shall find the same source again."""
    ours = cache(_is_work)
    inside = [(file, file.relative_to(told).parents) for file in files]
    return [file for file, above in inside if not any(ours(told / one) for one in above[:-1])]


def _is_work(folder: Path) -> bool:
    there = _WORK if (folder / "lock").is_file() else ()
    return any((folder / name).exists() for name in there)


def _wanted(name: str) -> bool:
    return _suffix(name)[0] in {*_FORMATS, ".zip"}


def _suffix(name: str) -> tuple[str, unpack.Packing]:
    """Return the ending that says the format, and the packing outside of it."""
    path = PurePosixPath(name.lower())
    packing = _PACKED.get(path.suffix, "")
    return (PurePosixPath(path.stem) if packing else path).suffix, packing


def _file(path: Path) -> Origin:
    there = path.stat()
    return Origin(str(path), str(path.absolute()), there.st_size, str(there.st_mtime_ns))


def same(origin: Origin) -> bool:
    """Say whether a file is as it was when it was found."""
    path = Path(origin.place)
    there = path.stat() if path.is_file() else None
    return there is not None and (there.st_size, str(there.st_mtime_ns)) == (
        origin.size,
        origin.changed,
    )


def few(origins: Sequence[Origin]) -> list[Origin]:
    """Return what is enough to look at: of objects that must be fetched first, a few."""
    far = [origin for origin in origins if origin.place.startswith("s3://")]
    return [*far[:_FAR_LOOKED_AT], *(one for one in origins if not one.place.startswith("s3://"))]


def pieces(
    origins: Sequence[Origin],
    *,
    scratch: Path,
    format_name: str | None = None,
    endpoint: str | None = None,
) -> list[Piece]:
    """Make the origins readable: downloaded, archives opened to members, each with its format.

    format_name: as the mapping says it, for names that do not. Raises InputError for one nobody can read.
    """
    found: list[Piece] = []
    for number, origin in enumerate(origins):
        place = origin.place
        if place.startswith("s3://"):
            ending = PurePosixPath(place).name
            copy = (
                scratch / f"{number}-{ending}"
            )  # whole where it is there: whoever went before was killed
            if not copy.exists():
                remote.download(place, copy, endpoint=endpoint)
            place = str(copy)
        found += _open(origin, place, format_name, scratch / f"{number}-unpacked.parquet")
    return [msgspec.structs.replace(piece, number=at) for at, piece in enumerate(found)]


def _open(origin: Origin, place: str, format_name: str | None, unpacked: Path) -> Iterator[Piece]:
    if origin.query is not None:
        yield Piece(0, origin.name, place, "query", query=origin.query)
    elif zipfile.is_zipfile(place) or _suffix(origin.name)[0] == ".zip":
        yield from _members(origin, place, unpacked)
    else:
        kind, packing = _format(origin.name, place, format_name)
        piece = Piece(0, origin.name, place, kind, packing, size=origin.size)
        yield _whole(piece, unpacked)


def _whole(piece: Piece, unpacked: Path) -> Piece:
    """Unpack Parquet, which is read from its end. Raises InputError for text of another kind than UTF-8."""
    if piece.format != "parquet":
        if unpack.start(piece.place, piece.packing, piece.member, size=2) in _UTF16:
            raise InputError(
                "This file is UTF-16, as Windows writes it",
                where=piece.name,
                mend="Write it as UTF-8: iconv -f UTF-16 -t UTF-8 FILE > NEW",
            )
        return piece
    if not (piece.packing or piece.member):
        return piece
    try:
        place = unpack.to_file(piece.place, piece.packing, unpacked, piece.member)
    except unpack.BROKEN as error:
        raise InputError(f"It cannot be unpacked: {error}", where=piece.name) from error
    return msgspec.structs.replace(piece, place=place, packing="", member=None)


def _members(origin: Origin, place: str, unpacked: Path) -> Iterator[Piece]:
    try:
        with zipfile.ZipFile(place) as archive:
            listed = archive.infolist()
    except unpack.BROKEN as error:
        raise InputError(f"This is no zip that can be read: {error}", where=origin.name) from error
    inside = [one for one in listed if _wanted(one.filename) and not one.is_dir()]
    inside = [one for one in inside if not unpack.hidden(PurePosixPath(one.filename))]
    inside.sort(key=lambda member: natural(member.filename))
    named = Counter(one.filename for one in inside)
    for at, one in enumerate(inside):
        name = f"{origin.name}!{one.filename}"
        suffix, packing = _suffix(one.filename)
        if suffix == ".zip":
            raise InputError("A zip inside of a zip is not read", where=name, mend="Unpack it")
        if named[one.filename] > 1:
            raise InputError("Two members have this name", where=name, mend="Unpack and rename")
        kind = _FORMATS[suffix]
        if kind == "ndjson":
            kind, packing = _format(one.filename, place, None, one.filename)
        piece = Piece(0, name, place, kind, packing, one.filename, size=one.compress_size)
        yield _whole(piece, unpacked.with_name(f"{at}-{unpacked.name}"))


def _format(
    name: str, place: str, told: str | None, member: str | None = None
) -> tuple[Format, unpack.Packing]:
    suffix, packing = _suffix(name)
    guess = _SAID.get(told or "") or _FORMATS.get(suffix)
    if guess is not None and guess != "ndjson":
        return guess, packing
    start = unpack.start(place, packing, member, size=4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] == b"[":
        return "json", packing
    if start[:1] == b"{" or guess == "ndjson" or told in {"ndjson", "amplitude-export"}:
        return "ndjson", packing
    raise InputError(
        f"The format of {name} cannot be told", mend="Say it in the mapping: source: format: csv"
    )
