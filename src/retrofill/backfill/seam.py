"""Where a history ends because live data begins: for each event type the moment of its first live row.

Live is every row of the destination that no retrofill import brought. A history that stops at the seam of each type
leaves out what is there already, and nothing else: a type that was never live is taken whole, and of a type's first live
day what lies before its first row. The seam is found once for a work directory, before anything is staged, and kept in
`live.json`: the rows that the run itself sends, and live data that arrives meanwhile, do not move it.

What the destination holds is read through its Export API, a year of arrival at a time, less where it says that a year is
too much; or from a file, such as an export fetched before. Memory: a few numbers for each type and day.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from msgspec import Struct

from retrofill.backfill import readback, source, unpack
from retrofill.backfill.keys import Keys
from retrofill.backfill.profile import Target
from retrofill.errors import CorruptError, FinalError, InputError

NAME = "live.json"
LIVE = "live"  # the word after --until
IMPORTER = "retrofill"
_FIRST = datetime(2012, 1, 1, tzinfo=UTC)  # Amplitude began that year
_HOURS_MAX = 365 * 24  # contract, read 2: of one export
_HOUR = timedelta(hours=1)
_LATE = timedelta(days=1)  # a first row that took longer to arrive may be a straggler, not the seam


class Type(Struct, frozen=True):
    """An event type's live rows. first_ms: the time of the earliest. arrived_ms: when its first row was taken."""

    first_ms: int
    arrived_ms: int | None
    events: int

    @property
    def late(self) -> bool:
        """Whether the earliest row is from long before any arrived: a straggler would leave out too much."""
        return self.arrived_ms is not None and (
            self.arrived_ms - self.first_ms > _LATE.total_seconds() * 1000
        )


class Live(Struct, frozen=True):
    """What is live. where: what was read. types: by event type. days: rows by UTC day. imported: rows of imports, not live."""

    where: str
    types: dict[str, Type] = {}
    days: dict[str, int] = {}
    imported: int = 0

    @property
    def until(self) -> dict[str, int]:
        """The first moment of each type that is not history any more."""
        return {name: one.first_ms for name, one in self.types.items()}


def find(
    work: Path,
    to: Target,
    keys: Callable[[], Keys],
    *,
    file: str | None,
    now: datetime,
    step: Callable[[str], None] = lambda _: None,
) -> Live:
    """Return the seam of a work directory, found anew only if it has none, or one of elsewhere and nothing is sent yet.

    keys: asked only if the destination is read. file: an export to read instead: a zip, a folder, or NDJSON.
    Raises InputError, FinalError when neither can be read.
    """
    known = read(work)
    where = file or to.name
    if known is not None and (known.where == where or (work / "journal.db").exists()):
        return known
    work.mkdir(parents=True, exist_ok=True)
    # The sign of a work directory: in a folder that is the source, it is none of that.
    (work / "lock").touch()
    seen = _Seen()
    if file is not None:
        step(f"reading what is live from {file}")
        with tempfile.TemporaryDirectory(prefix="retrofill-") as scratch:
            for line in _of_file(file, Path(scratch)):
                seen.add(line)
    else:
        for line in _of_destination(to, keys(), work / "live.tmp", now, step):
            seen.add(line)
    found = seen.live(where)
    _write(work / NAME, found)
    return found


def read(work: Path) -> Live | None:
    """Return the seam that a work directory has, None if it has none. Raises CorruptError."""
    path = work / NAME
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Live)
    except msgspec.DecodeError as error:
        raise CorruptError(
            f"What is live cannot be read: {error}",
            where=str(path),
            mend="Remove the file; it is made anew",
        ) from error


def _write(path: Path, found: Live) -> None:
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


class _Origin(Struct, gc=False):
    source_name: str | None = None


class _Row(Struct, gc=False):
    event_type: str
    event_time: str
    server_upload_time: str | None = None
    ingestion_metadata: _Origin | None = None


class _Seen:
    """What has been seen of the rows. Times stay texts, which sort as they are, until the end."""

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder(_Row).decode
        self._first: dict[str, str] = {}
        self._arrived: dict[str, str] = {}
        self._events: Counter[str] = Counter()
        self._days: Counter[str] = Counter()
        self._imported = 0

    def add(self, line: bytes) -> None:
        """Look at an Export row. Raises InputError for what is none."""
        try:
            row = self._decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if not line.strip():
                return
            raise InputError(
                f"A row of live data is no row of an export: {error}",
                where=line[:200].decode(errors="replace"),
                mend="Give --live the file as the Export API gave it",
            ) from error
        if row.ingestion_metadata is not None and row.ingestion_metadata.source_name == IMPORTER:
            self._imported += 1
            return
        kind, time = row.event_type, row.event_time.replace("T", " ")
        self._events[kind] += 1
        self._days[time[:10]] += 1
        if time < self._first.get(kind, "~"):
            self._first[kind] = time
        if row.server_upload_time is not None:
            arrived = row.server_upload_time.replace("T", " ")
            if arrived < self._arrived.get(kind, "~"):
                self._arrived[kind] = arrived

    def live(self, where: str) -> Live:
        """Return what was seen."""
        types = {
            kind: Type(
                _millis(first),
                _millis(self._arrived[kind]) if kind in self._arrived else None,
                self._events[kind],
            )
            for kind, first in sorted(self._first.items())
        }
        return Live(where, types, dict(sorted(self._days.items())), self._imported)


def _millis(text: str) -> int:
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"{text!r} is no time of an export", mend="It is UTC, ISO 8601") from error
    aware = found if found.tzinfo else found.replace(tzinfo=UTC)
    return (aware - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def _of_file(named: str, scratch: Path) -> Iterator[bytes]:
    for piece in source.pieces(
        source.locate([named]), scratch=scratch, format_name="amplitude-export"
    ):
        if piece.format != "ndjson":
            raise InputError(f"{piece.name} is no export", mend="Rows of an export are NDJSON")
        rest = b""
        try:
            for chunk in unpack.chunks(piece.place, piece.packing, piece.member):
                *whole, rest = (rest + chunk).split(b"\n")
                yield from whole
        except unpack.BROKEN as error:
            raise InputError(
                f"The export cannot be read to its end: {error}",
                where=piece.name,
                mend="Fetch it again: a part of what is live would give a wrong seam",
            ) from error
        yield rest


def _of_destination(
    to: Target, keys: Keys, path: Path, now: datetime, step: Callable[[str], None]
) -> Iterator[bytes]:
    """Yield all rows of the destination, by hour of arrival."""
    first, hours = _FIRST, -(-(now + _HOUR - _FIRST) // _HOUR)
    try:
        while hours > 0:
            some = min(hours, _HOURS_MAX)
            yield from window(to, keys, path, first, some, step)
            first, hours = first + some * _HOUR, hours - some
    finally:
        path.unlink(missing_ok=True)


def window(
    to: Target, keys: Keys, path: Path, first: datetime, hours: int, step: Callable[[str], None]
) -> Iterator[bytes]:
    """Yield the rows of some hours of arrival, in halves where they are too many. Raises FinalError."""
    last = first + (hours - 1) * _HOUR
    span = f"start={first:%Y%m%dT%H}&end={last:%Y%m%dT%H}"
    step(f"reading what others brought: {first:%Y-%m-%d %H}h to {last:%Y-%m-%d %H}h")
    url = f"{to.read}/api/2/export?{span}"
    fetched = readback.fetch(url, keys, path, divisible=hours > 1, step=step)
    if fetched.status == 200:
        yield from readback.given(path)
    elif fetched.status == 400 and hours > 1:
        half = hours // 2
        yield from window(to, keys, path, first, half, step)
        yield from window(to, keys, path, first + half * _HOUR, hours - half, step)
    elif fetched.status == 400:
        raise FinalError(
            f"The destination does not let us read: 400 {fetched.said}",
            where=url,
            mend="Give --live a file of its export, or --until a date",
        )
