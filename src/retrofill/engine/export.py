"""Rows as the Export API writes them: JSON lines, gzipped, in one streamed ZIP.

DuckDB writes the lines: one expression joins each column's JSON text, and properties pass as the text they were sent.
So a row costs no Python, and an Arrow column of lines is already the bytes to compress.

Rows come in order of position although a lake file is sorted by person: the blocks of each hour are cut into slices
of at most EXPORT_SLICE_BYTES, and a slice is put in order in memory. Where one file holds many slices it is read once
and its rows wait in a file without a name, slice by slice, rather than being read again for each slice. Memory is
bounded by a slice, a chunk of lines and one compressed member.

The ZIP stores each member as it is: gzip does not compress twice. Source: contract, read 2.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from isal import isal_zlib
from msgspec import Struct

from retrofill.core.block import Flag, Kind
from retrofill.core.row import EVENT_ID_SQL, EXPORT_KEYS, UUID_SQL
from retrofill.engine.query import Reader, Statement, View
from retrofill.errors import InputError
from retrofill.lake import arrow
from retrofill.limits import (
    EXPORT_CHUNK_ROWS,
    EXPORT_DAYS_MAX,
    EXPORT_MEMBER_ROWS,
    EXPORT_SLICE_BYTES,
    EXPORT_SLICES,
    MS_PER_DAY,
    MS_PER_HOUR,
    MS_PER_S,
)

_SAMPLE_ROWS = 1000
_PARTS_MAX = 100_000
_GZIP = 31  # zlib's name for a gzip stream with a window of 2^15
_LEVEL = 1  # of isal: level 2 saves 4 % of the bytes and costs half as much time again
_HIDDEN = frozenset({"import_id", "sent"})  # history for ourselves: in no row
_COLUMNS = tuple(name for name in arrow.SCHEMA.names if name not in _HIDDEN)
_TEXTS = tuple(name for name in _COLUMNS if arrow.SCHEMA.field(name).type == pa.string())
# What a row takes beside its texts: numbers, offsets, and the words of a column that repeats itself.
_ROW_BYTES = 256


class Hours(Struct, frozen=True):
    """Hours of server_upload_time, both ends included, as hours since the epoch."""

    first: int
    last: int


def hours_of(start: str, end: str) -> Hours:
    """Read `start` and `end` (YYYYMMDDTHH). Raises InputError naming what is wrong, also for too long a range."""
    first, last = _hour("start", start), _hour("end", end)
    if last < first:
        raise InputError(f"end {end} is before start {start}")
    most = EXPORT_DAYS_MAX * MS_PER_DAY // MS_PER_HOUR
    if last - first + 1 > most:
        raise InputError(
            f"{last - first + 1} hours from start to end, at most {most}: {EXPORT_DAYS_MAX} days"
        )
    return Hours(first, last)


def _hour(name: str, text: str) -> int:
    day, _, hour = text.partition("T")
    try:
        if (
            len(day) != len("YYYYMMDD")
            or len(hour) != len("HH")
            or not (day + hour).isdigit()
            or not text.isascii()
        ):
            raise ValueError
        moment = datetime(int(day[:4]), int(day[4:6]), int(day[6:]), int(hour), tzinfo=UTC)
    except ValueError:
        raise InputError(f"{name} must be an hour as YYYYMMDDTHH, found {text!r}") from None
    return int(moment.timestamp()) * MS_PER_S // MS_PER_HOUR


class Export:
    """One archive on its way: an iterator of pieces of bytes. Close it to let go of the snapshot that it reads."""

    def __init__(self, pieces: Iterator[bytes], held: ExitStack) -> None:
        self._pieces = pieces
        self._held = held

    def __iter__(self) -> Export:
        return self

    def __next__(self) -> bytes:
        return next(self._pieces)

    def close(self) -> None:
        """Stop reading; may be called again."""
        self._held.close()


def export(reader: Reader, project: int, hours: Hours, *, bytes_max: int) -> Export | None:
    """Return the archive of what arrived in these hours, None if nothing did.

    bytes_max: InputError if the answer is estimated to be larger; 0 is off.
    """
    with ExitStack() as held:
        view = held.enter_context(reader.view(project))
        parts = _parts(view, hours)
        if not len(parts) and not any(table.num_rows for table in _fresh(view, hours)):
            return None
        if bytes_max:
            _weigh(view, hours, parts, bytes_max)
        tables = chain(_sealed(view, hours, parts), _fresh(view, hours))
        pieces = _archive(view, tables)
        return Export(pieces, held.pop_all())


# Which rows, and how many bytes they are.


def _parts(view: View, hours: Hours) -> Any:
    """Return the lake's rows as a numpy table, a line a run of blocks: first block, last block, rows, bytes."""
    where = _in(hours)
    names = ("block", "server_upload_time", *_TEXTS)
    width, statement = _part_width(view, where), Statement()
    weight = " + ".join(f"coalesce(strlen({name}), 0)" for name in _TEXTS if name in _LONG)
    source = view.source(
        names,
        select=(f"block // {width} AS part", "block", f"{weight} AS weight"),
        where=where,
        fresh=arrow.SCHEMA.empty_table(),
    )
    found = view.ask(
        f"SELECT min(block), max(block), count(*), sum(weight)::BIGINT + count(*) * {_ROW_BYTES} "
        f"FROM {source} GROUP BY part ORDER BY part",
        statement,
    ).fetchnumpy()
    return np.stack([np.asarray(side, np.int64) for side in found.values()], axis=1)


_LONG = frozenset(
    {"event_properties", "user_properties", "group_properties", "groups", "insert_id"}
)


def _part_width(view: View, where: str) -> int:
    source = view.source(
        ("block", "server_upload_time"), where=where, fresh=arrow.SCHEMA.empty_table()
    )
    first, last = view.ask(f"SELECT min(block), max(block) FROM {source}").fetchone()
    return 1 if first is None else 1 + (last - first) // _PARTS_MAX


def _in(hours: Hours) -> str:
    first, after = hours.first * MS_PER_HOUR, (hours.last + 1) * MS_PER_HOUR
    return f"server_upload_time >= {first} AND server_upload_time < {after}"


def _fresh(view: View, hours: Hours) -> Iterator[pa.Table]:
    """Yield the unsealed rows of the project, in order of position."""
    first, after = hours.first * MS_PER_HOUR, (hours.last + 1) * MS_PER_HOUR
    for table in view.tables():
        time = table["server_upload_time"]
        of_us = pc.and_(
            pc.equal(table["project"], view.project), pc.equal(table["kind"], int(Kind.EVENT))
        )
        when = pc.and_(pc.greater_equal(time, first), pc.less(time, after))
        found = table.filter(pc.and_(of_us, when))
        if found.num_rows:
            yield found


def _weigh(view: View, hours: Hours, parts: Any, bytes_max: int) -> None:
    """Estimate the archive by what a sample of rows becomes. Raises InputError if it is over the limit."""
    fresh_rows, sample = 0, None
    for table in _fresh(view, hours):
        fresh_rows += table.num_rows
        sample = table.slice(0, _SAMPLE_ROWS) if sample is None else sample
    rows = int(parts[:, 2].sum()) + fresh_rows
    if len(parts):
        source = view.source(_COLUMNS, where=_in(hours), fresh=arrow.SCHEMA.empty_table())
        sample = view.ask(
            f"SELECT {', '.join(_COLUMNS)} FROM {source} LIMIT {_SAMPLE_ROWS}"
        ).to_arrow_table()
    assert sample is not None
    size = len(isal_zlib.compress(b"".join(lines(view, sample)), _LEVEL, wbits=_GZIP))
    estimate = size * rows // sample.num_rows
    if estimate > bytes_max:
        raise InputError(
            f"The export would have about {estimate:,} bytes ({rows:,} events), at most {bytes_max:,}",
            mend="Ask for fewer hours",
        )


# Rows of the lake in order of position.


def _sealed(view: View, hours: Hours, parts: Any) -> Iterator[pa.Table]:
    """Yield the lake's rows in order of position, a chunk at a time."""
    slices = _slices(parts)
    for at in range(0, len(slices), EXPORT_SLICES):
        some = slices[at : at + EXPORT_SLICES]
        if len(some) == 1:
            yield from _ordered(_read(view, hours, some).to_arrow_table())
            continue
        with _Spool(len(some)) as spool:
            starts = np.array([first for first, _ in some])
            for batch in _read(view, hours, some).to_arrow_reader(EXPORT_CHUNK_ROWS):
                spool.add(
                    batch, np.searchsorted(starts, batch["block"].to_numpy(), side="right") - 1
                )
            for table in spool.tables():
                yield from _ordered(table)


def _slices(parts: Any) -> list[tuple[int, int]]:
    """Return first and last block of each slice: at most EXPORT_SLICE_BYTES, or one part."""
    slices: list[list[int]] = []
    size = 0
    for first, last, _, weight in parts.tolist():
        if slices and size + weight <= EXPORT_SLICE_BYTES:
            slices[-1][1], size = last, size + weight
        else:
            slices.append([first, last])
            size = weight
    return [(first, last) for first, last in slices]


def _read(view: View, hours: Hours, slices: list[tuple[int, int]]) -> Any:
    source = view.source(
        _COLUMNS,
        where=f"block BETWEEN {slices[0][0]} AND {slices[-1][1]} AND {_in(hours)}",
        fresh=arrow.SCHEMA.empty_table(),
    )
    return view.ask(f"SELECT {', '.join(_COLUMNS)} FROM {source}")


def _ordered(table: pa.Table) -> Iterator[pa.Table]:
    """Yield a table's rows in order of position, a chunk at a time."""
    order = np.lexsort((table["row"].to_numpy(), table["block"].to_numpy()))
    for at in range(0, len(order), EXPORT_CHUNK_ROWS):
        yield table.take(pa.array(order[at : at + EXPORT_CHUNK_ROWS]))


class _Spool(AbstractContextManager["_Spool"]):
    """Rows of several slices, each waiting in its own file without a name."""

    def __init__(self, slices: int) -> None:
        self._files = [tempfile.TemporaryFile() for _ in range(slices)]
        self._writers: list[Any] = [None] * slices
        self._waiting: list[list[pa.RecordBatch]] = [[] for _ in range(slices)]

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def add(self, batch: pa.RecordBatch, places: np.ndarray[Any, Any]) -> None:
        """Lay each row of a batch to its slice."""
        order = np.argsort(places, kind="stable")
        sorted_rows = batch.take(pa.array(order))
        ends = np.searchsorted(places[order], np.arange(len(self._files)), side="right").tolist()
        start = 0
        for place, end in enumerate(ends):
            if end > start:
                self._write(place, sorted_rows.slice(start, end - start))
            start = end

    def _write(self, place: int, rows: pa.RecordBatch) -> None:
        if self._writers[place] is None:
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            self._writers[place] = pa.ipc.new_stream(
                self._files[place], rows.schema, options=options
            )
        self._writers[place].write_batch(rows)

    def tables(self) -> Iterator[pa.Table]:
        """Yield the rows of each slice, unordered."""
        for file, writer in zip(self._files, self._writers, strict=True):
            if writer is not None:
                writer.close()
                file.seek(0)
                yield pa.ipc.open_stream(file).read_all()
                file.close()


# Lines.


def lines(view: View, rows: pa.Table) -> Iterator[memoryview]:
    """Yield the rows as JSON lines, each ending with a newline, in the order given."""
    name = view.lend(rows.select(_COLUMNS))
    try:
        found = view.ask(f"SELECT {_LINE_SQL} AS line FROM {name}")
        for batch in found.to_arrow_reader(EXPORT_CHUNK_ROWS):
            yield _bytes_of(batch.column(0))
    finally:
        view.take_back(name)


def _bytes_of(column: pa.Array) -> memoryview:
    """Return all the text of a string column: one piece of its buffer."""
    large = pa.types.is_large_string(column.type)
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int64 if large else np.int32)
    if data is None:
        return memoryview(b"")
    return memoryview(data)[int(ends[column.offset]) : int(ends[column.offset + len(column)])]


def _text(column: str) -> str:
    return f"coalesce(to_json({column}), 'null')"


def _number(column: str) -> str:
    return f"coalesce(to_json({column}), 'null')"


def _object(column: str) -> str:
    # JSON text may have been sent with line breaks, always between its tokens.
    one = f"coalesce({column}, '{{}}')"
    return f"CASE WHEN contains({one}, chr(10)) OR contains({one}, chr(13)) THEN translate({one}, concat(chr(10), chr(13)), '  ') ELSE {one} END"


def _time(column: str) -> str:
    return (
        f"coalesce(strftime(make_timestamp({column} * 1000), '\"%Y-%m-%d %H:%M:%S.%f\"'), 'null')"
    )


# Types and values have no numbers of ours: they are made from their names, the same in each row of a project.
# Source: contract, read 2, `data.group_ids`.
_NUMBER_SQL = "CAST('0x' || substr(md5(concat_ws('/', project, {})), 1, {}) AS BIGINT)"
_GROUP_IDS = (
    "CASE WHEN groups IS NULL OR groups = '{}' THEN '{}' ELSE to_json(map_from_entries(list_transform("
    "map_entries(CAST(CAST(groups AS JSON) AS MAP(VARCHAR, VARCHAR[]))), lambda one: struct_pack("
    f"k := CAST({_NUMBER_SQL.format('one.key', 6)} AS VARCHAR), "
    f"v := list_transform(one.value, lambda value: {_NUMBER_SQL.format('one.key, value', 12)}))"
    "))) END"
)
_DATA = (
    "concat('{', "
    f"CASE WHEN (flags & {int(Flag.FIRST_EVENT)}) != 0 THEN '\"first_event\":true,' ELSE '' END, "
    f'\'"group_first_event":{{}},"group_ids":\', {_GROUP_IDS}, \',"path":\', {_text("path")}, '
    f"CASE WHEN (flags & {int(Flag.SKIP)}) != 0 THEN '}}' ELSE ',\"user_properties_updated\":true}}' END)"
)
# Readers with types take `paying` as a boolean. Source: contract, read 2 and 8.
_PAYING = (
    f"CASE WHEN lower(paying) IN ('true', 'false') THEN lower(paying) ELSE {_text('paying')} END"
)

# Keys whose value is not simply the text column of the same name. None: always null.
_VALUES: dict[str, str | None] = {
    "$insert_id": _text("insert_id"),
    "$insert_key": None,
    "$schema": None,
    "adid": None,
    "amplitude_attribution_ids": "coalesce(attribution_ids, 'null')",
    "amplitude_event_type": None,
    "amplitude_id": _number("amplitude_id"),
    "app": _number("project"),
    "client_event_time": _time("client_event_time"),
    "client_upload_time": _time("client_upload_time"),
    "data": _DATA,
    "data_type": "'\"event\"'",
    "device_carrier": _text("carrier"),
    "event_id": f"coalesce(event_id, {EVENT_ID_SQL})",
    "event_properties": _object("event_properties"),
    "event_time": _time("event_time"),
    "global_user_properties": None,
    "group_properties": _object("group_properties"),
    "groups": _object("groups"),
    "idfa": None,
    "is_attribution_event": None,
    "location_lat": _number("location_lat"),
    "location_lng": _number("location_lng"),
    "paying": _PAYING,
    "plan": _object("plan"),
    "processed_time": _time("server_upload_time"),
    "sample_rate": None,
    "server_received_time": _time("server_received_time"),
    "server_upload_time": _time("server_upload_time"),
    "session_id": _number("session_id"),
    "source_id": None,
    "user_creation_time": _time("created_time"),
    "user_properties": _object("user_properties"),
    "uuid": f"'\"' || {UUID_SQL} || '\"'",
}


def _line() -> str:
    """Return the SQL of a whole line: fixed text joined once, values between."""
    fixed, parts = "{", []
    for index, key in enumerate(sorted(EXPORT_KEYS)):
        fixed += f'{"," if index else ""}"{key}":'
        value = _VALUES.get(key, _text(key))
        if value is None:
            fixed += "null"
        else:
            parts += [f"'{fixed}'", value]
            fixed = ""
    return f"concat({', '.join(parts)}, '{fixed}}}', chr(10))"


_LINE_SQL = _line()


# The archive.


def _archive(view: View, tables: Iterable[pa.Table]) -> Iterator[bytes]:
    """Yield a ZIP of gzip members, each of one hour and about EXPORT_MEMBER_ROWS at most."""
    window = _Window()
    with zipfile.ZipFile(window, "w", zipfile.ZIP_STORED) as archive:
        for name, data in _members(view, tables):
            archive.writestr(zipfile.ZipInfo(name), data)
            yield window.drain()
    yield window.drain()


def _members(view: View, tables: Iterable[pa.Table]) -> Iterator[tuple[str, bytes]]:
    member = None
    for hour, table in _by_hour(tables):
        if member is None:
            member = _Member(view.project, hour, 0)
        elif member.hour != hour or member.rows >= EXPORT_MEMBER_ROWS:
            yield member.name, member.finish()
            member = _Member(view.project, hour, member.number + 1 if member.hour == hour else 0)
        member.add(lines(view, table), table.num_rows)
    if member is not None:
        yield member.name, member.finish()


def _by_hour(tables: Iterable[pa.Table]) -> Iterator[tuple[int, pa.Table]]:
    """Yield (hour, rows), each table cut where hours meet: server_upload_time rises with the position."""
    for table in tables:
        hours = table["server_upload_time"].to_numpy() // MS_PER_HOUR
        starts = [0, *(np.flatnonzero(np.diff(hours)) + 1).tolist(), len(hours)]
        for start, end in pairwise(starts):
            yield int(hours[start]), table.slice(start, end - start)


class _Member:
    """One file of the archive under way."""

    def __init__(self, project: int, hour: int, number: int) -> None:
        self.hour, self.number, self.rows = hour, number, 0
        moment = datetime.fromtimestamp(hour * MS_PER_HOUR / MS_PER_S, UTC)
        self.name = f"{project}/{project}_{moment:%Y-%m-%d}_{moment.hour}#{number}.json.gz"
        self._gzip = isal_zlib.compressobj(_LEVEL, wbits=_GZIP)
        self._pieces: list[bytes] = []

    def add(self, text: Iterable[memoryview], rows: int) -> None:
        """Add lines."""
        self._pieces += [self._gzip.compress(one) for one in text]
        self.rows += rows

    def finish(self) -> bytes:
        """Return the whole file."""
        return b"".join((*self._pieces, self._gzip.flush()))


class _Window(io.RawIOBase):
    """A file that can be read from its end only: what is drained is gone, what is not may still be written over.

    zipfile goes back to a member's head when its checksum is known; so the head is right and readers of streams are
    content.
    """

    def __init__(self) -> None:
        self._start = 0
        self._piece = io.BytesIO()

    def seekable(self) -> bool:
        """It can, within what is not drained."""
        return True

    def writable(self) -> bool:
        """It can."""
        return True

    def tell(self) -> int:
        """Return the place in the whole file."""
        return self._start + self._piece.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go to a place that is not drained."""
        assert whence == io.SEEK_SET
        assert offset >= self._start
        return self._start + self._piece.seek(offset - self._start)

    def write(self, data: Any, /) -> int:
        """Write here."""
        return self._piece.write(data)

    def drain(self) -> bytes:
        """Return what was written since the last call."""
        data = self._piece.getvalue()
        self._start += len(data)
        self._piece = io.BytesIO()
        return data
