"""The Export API's archive: every row of some hours, in order of position, as one streamed ZIP.

A lake file is sorted by person, an export by position. So the blocks of each hour are cut into slices of at most
EXPORT_SLICE_BYTES, and a slice is put in order in memory. Several slices are read at once: their rows wait in files
without a name, one a slice, rather than one large lake file being read again for each.

Memory is bounded, however large rows are and however slowly it is read: two readings of EXPORT_READ_BYTES, or two slices; one
member that is collected, EXPORT_THREADS and one that wait to be made or taken, with the chunk that each thread makes lines of.
Unsealed rows are built some thousand at a time and kept for nobody.

The ZIP stores each member as it is, gzipped already. Source: contract, read 2.
"""

from __future__ import annotations

import io
import tempfile
import threading
import zipfile
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime
from itertools import chain, pairwise
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from isal import isal_zlib
from msgspec import Struct

from retrofill.core.block import Kind
from retrofill.engine.lines import COLUMNS, HASH_SQL, WORDED, chunks, lines, text_of, worded
from retrofill.engine.query import Reader, Statement, View
from retrofill.errors import InputError
from retrofill.lake import arrow
from retrofill.limits import (
    EXPORT_CHUNK_ROWS,
    EXPORT_DAYS_MAX,
    EXPORT_MEMBER_BYTES,
    EXPORT_MEMBER_ROWS,
    EXPORT_READ_BYTES,
    EXPORT_RELEASE_SLICES,
    EXPORT_SLICE_BYTES,
    EXPORT_SLICES,
    EXPORT_THREADS,
    MS_PER_DAY,
    MS_PER_HOUR,
    MS_PER_S,
    TIME_MS_MAX,
)

T = TypeVar("T")

_SAMPLE_ROWS = 1000
_READ_ROWS = 16_384  # of the lake at a time at most; smaller pieces cost more to set apart
_READ_ROWS_MIN = 256
_PARTS_MAX = 100_000
_GZIP = 31  # zlib's name for a gzip stream with a window of 2^15
_LEVEL = 1  # of isal: level 2 saves 4 % of the bytes and costs half as much time again
_ASKED = ("server_upload_time", "import_id")  # what decides whether a row is wanted
_BLOCK = COLUMNS.index("block")
_LONG = ("event_properties", "user_properties", "groups", "group_properties", "plan")
# What a row takes beside its texts: numbers, offsets, and the words of a column that repeats itself.
_ROW_BYTES = 256


class Hours(Struct, frozen=True):
    """Hours of server_upload_time, both ends included, as hours since the epoch. import_id: of this import alone."""

    first: int
    last: int
    import_id: str | None = None


def hours_of_import(name: str) -> Hours:
    """Return what asks for a whole import, whenever it arrived."""
    return Hours(0, TIME_MS_MAX // MS_PER_HOUR, name)


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

    def __init__(self, pieces: Generator[bytes, None, None], held: ExitStack) -> None:
        self._pieces = pieces
        self._held = held
        self._taking = threading.Lock()

    def __iter__(self) -> Export:
        return self

    def __next__(self) -> bytes:
        with self._taking:
            return next(self._pieces)

    def close(self) -> None:
        """Stop reading, once the piece that is being made has ended; may be called again."""
        with self._taking:
            self._pieces.close()  # what reads ahead ends before the snapshot does
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
        tables = chain(_sealed(view, hours, parts), map(worded, _fresh(view, hours)))
        archive = _archive(project, tables)
        held.callback(archive.close)
        # All of them are made in one thread: each thread of the readers would keep some of its memory.
        return Export(_ahead(archive), held.pop_all())


# Which rows, and how many bytes they are.


def _parts(view: View, hours: Hours) -> Any:
    """Return the lake's rows as a numpy table, a line a run of blocks: first block, last block, rows, bytes."""
    where = _in(hours)
    names = ("block", *_ASKED, *_LONG)
    width, statement = _part_width(view, where), Statement()
    weight = " + ".join(f"coalesce(strlen({name}), 0)" for name in _LONG)
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


def _part_width(view: View, where: str) -> int:
    source = view.source(("block", *_ASKED), where=where, fresh=arrow.SCHEMA.empty_table())
    first, last = view.ask(f"SELECT min(block), max(block) FROM {source}").fetchone()
    return 1 if first is None else 1 + (last - first) // _PARTS_MAX


def _in(hours: Hours) -> str:
    first, after = hours.first * MS_PER_HOUR, (hours.last + 1) * MS_PER_HOUR
    when = f"server_upload_time >= {first} AND server_upload_time < {after}"
    if hours.import_id is None:
        return when
    # As digits: a statement's text holds nothing that a sender wrote.
    return f"{when} AND import_id = decode(from_hex('{hours.import_id.encode().hex()}'))"


def _fresh(view: View, hours: Hours) -> Iterator[pa.Table]:
    """Yield the unsealed rows of the project, in order of position."""
    first, after = hours.first * MS_PER_HOUR, (hours.last + 1) * MS_PER_HOUR
    for table in view.tables(keep=False):
        time = table["server_upload_time"]
        of_us = pc.and_(
            pc.equal(table["project"], view.project), pc.equal(table["kind"], int(Kind.EVENT))
        )
        when = pc.and_(pc.greater_equal(time, first), pc.less(time, after))
        wanted = pc.and_(of_us, when)
        if hours.import_id is not None:
            wanted = pc.and_(wanted, pc.equal(table["import_id"], hours.import_id))
        found = table.filter(wanted)
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
        source = view.source(
            (*COLUMNS, *_ASKED), where=_in(hours), fresh=arrow.SCHEMA.empty_table()
        )
        sample = view.ask(
            f"SELECT {', '.join(COLUMNS)} FROM {source} LIMIT {_SAMPLE_ROWS}"
        ).to_arrow_table()
    assert sample is not None
    size = len(isal_zlib.compress(text_of(sample), _LEVEL, wbits=_GZIP))
    estimate = size * rows // sample.num_rows
    if estimate > bytes_max:
        raise InputError(
            f"The export would have about {estimate:,} bytes ({rows:,} events), at most {bytes_max:,}",
            mend="Ask for fewer hours",
        )


# Rows of the lake in order of position.


def _sealed(view: View, hours: Hours, parts: Any) -> Iterator[pa.Table]:
    """Yield the lake's rows, worded, in order of position."""
    slices = _slices(parts)
    read_rows = _read_rows(parts)
    for at in range(0, len(slices), EXPORT_SLICES):
        some = slices[at : at + EXPORT_SLICES]
        starts = np.array([first for first, _ in some])
        with _Spool(len(some)) as spool:
            found = _read(view, hours, some).to_arrow_reader(read_rows)
            for batch in _ahead(found):
                block = batch.column(_BLOCK).to_numpy()
                rows = worded(pa.Table.from_batches([batch]))
                spool.add(rows, np.searchsorted(starts, block, side="right") - 1)
            for number, table in enumerate(_ahead(spool.tables())):
                yield from _ordered(table)
                # What the threads have freed stays with each of them otherwise, some MB more with every slice.
                if number % EXPORT_RELEASE_SLICES == 0:
                    pa.default_memory_pool().release_unused()


def _ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """Yield the same. While one is used the next is made in a thread; at the end nothing is being made."""
    with ThreadPoolExecutor(1, thread_name_prefix="export-ahead") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


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


def _read_rows(parts: Any) -> int:
    """Return how many rows to read of the lake at a time."""
    rows, weight = parts[:, 2].sum(), parts[:, 3].sum()
    return int(min(_READ_ROWS, max(_READ_ROWS_MIN, EXPORT_READ_BYTES * rows // max(1, weight))))


def _read(view: View, hours: Hours, slices: list[tuple[int, int]]) -> Any:
    source = view.source(
        (*COLUMNS, *_ASKED),
        where=f"block BETWEEN {slices[0][0]} AND {slices[-1][1]} AND {_in(hours)}",
        fresh=arrow.SCHEMA.empty_table(),
    )
    return view.ask(f"SELECT {', '.join(COLUMNS)}, {HASH_SQL} AS hash FROM {source}")


def _ordered(table: pa.Table) -> Iterator[pa.Table]:
    """Yield a table's rows in order of position, a chunk at a time."""
    order = np.lexsort((table["row"].to_numpy(), table["block"].to_numpy()))
    for at in range(0, len(order), EXPORT_CHUNK_ROWS):
        yield table.take(pa.array(order[at : at + EXPORT_CHUNK_ROWS])).combine_chunks()


class _Spool(AbstractContextManager["_Spool"]):
    """Rows of several slices, each waiting in its own file without a name."""

    def __init__(self, slices: int) -> None:
        self._files = [tempfile.TemporaryFile() for _ in range(slices)]  # noqa: SIM115 - closed by `close`
        self._writers: list[Any] = [None] * slices

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def add(self, rows: pa.Table, places: np.ndarray[Any, Any]) -> None:
        """Lay each row to its slice."""
        order = np.argsort(places, kind="stable")
        rows = rows.take(pa.array(order))
        ends = np.searchsorted(places[order], np.arange(len(self._files)), side="right").tolist()
        start = 0
        for place, end in enumerate(ends):
            if end > start:
                self._write(place, rows.slice(start, end - start))
            start = end

    def _write(self, place: int, rows: pa.Table) -> None:
        writer = self._writers[place]
        if writer is None:
            options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
            writer = pa.ipc.new_stream(self._files[place], WORDED, options=options)
            self._writers[place] = writer
        writer.write_table(rows)

    def tables(self) -> Iterator[pa.Table]:
        """Yield the rows of each slice, unordered."""
        for file, writer in zip(self._files, self._writers, strict=True):
            if writer is not None:
                writer.close()
                file.seek(0)
                yield pa.ipc.open_stream(file).read_all().unify_dictionaries().combine_chunks()
                file.close()


# The archive.


class _Member(Struct, frozen=True):
    """One file of the archive: rows of one hour, EXPORT_MEMBER_ROWS or EXPORT_MEMBER_BYTES and a chunk at most."""

    name: str
    chunks: list[pa.RecordBatch]


def _archive(project: int, tables: Iterable[pa.Table]) -> Generator[bytes, None, None]:
    """Yield a ZIP of gzip members. The next ones are made in threads of their own while one is taken."""
    window = _Window()
    with (
        ThreadPoolExecutor(EXPORT_THREADS, thread_name_prefix="export") as threads,
        zipfile.ZipFile(window, "w", zipfile.ZIP_STORED) as archive,
    ):
        coming: deque[Future[tuple[str, bytes]]] = deque()
        for member in _members(project, tables):
            coming.append(threads.submit(_made, member))
            if len(coming) > EXPORT_THREADS:
                archive.writestr(*_plain(coming.popleft()))
                yield window.drain()
        while coming:
            archive.writestr(*_plain(coming.popleft()))
            yield window.drain()
    yield window.drain()


def _plain(made: Future[tuple[str, bytes]]) -> tuple[zipfile.ZipInfo, bytes]:
    name, data = made.result()
    return zipfile.ZipInfo(name), data


def _made(member: _Member) -> tuple[str, bytes]:
    """Compress a member's lines."""
    gzip = isal_zlib.compressobj(_LEVEL, wbits=_GZIP)
    pieces = [gzip.compress(lines(chunk)) for chunk in member.chunks]
    return member.name, b"".join((*pieces, gzip.flush()))


def _members(project: int, tables: Iterable[pa.Table]) -> Iterator[_Member]:
    hour, number = -1, 0
    waiting: list[pa.RecordBatch] = []
    rows = size = 0
    for its_hour, chunk in _by_hour(tables):
        full = rows >= EXPORT_MEMBER_ROWS or size >= EXPORT_MEMBER_BYTES
        if waiting and (full or its_hour != hour):
            yield _Member(_name(project, hour, number), waiting)
            number, waiting, rows, size = number + 1, [], 0, 0
        if its_hour != hour:
            hour, number = its_hour, 0
        waiting.append(chunk)
        rows, size = rows + chunk.num_rows, size + chunk.nbytes
    if waiting:
        yield _Member(_name(project, hour, number), waiting)


def _by_hour(tables: Iterable[pa.Table]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield (hour, chunk of rows), cut where hours meet: server_upload_time rises with the position."""
    for table in tables:
        hours = table["server_upload_time"].to_numpy() // MS_PER_HOUR
        for start, end in pairwise([0, *(np.flatnonzero(np.diff(hours)) + 1).tolist(), len(hours)]):
            for chunk in chunks(table.slice(start, end - start)):
                yield int(hours[start]), chunk


def _name(project: int, hour: int, number: int) -> str:
    moment = datetime.fromtimestamp(hour * MS_PER_HOUR / MS_PER_S, UTC)
    return f"{project}/{project}_{moment:%Y-%m-%d}_{moment.hour}#{number}.json.gz"


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
