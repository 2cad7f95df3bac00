"""From rows to events: the mapping's query over the source, its answer checked, counted and put down.

One pass over the source, streaming. Events go to a spill as they come; who is one person is known only at the end,
so that sorting comes after (`order`). What stays in memory: the distinct (device, user) pairs, and a thin sample of rows
from which the sorting takes its borders. Texts that are events as they stand in a file stay there.

After every so many bytes it is noted how far the source is read, so that reading can be left at any moment and gone on
with. What memory holds is made again from the spill. Of large sources only what the expressions need passes the query
(`narrow`). A query is asked about so many rows at a time for that, but for one with a window, which sees all of them; it is begun
anew, and so is what DuckDB reads by itself (Parquet) and the rest of a database's answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Raw, Struct

from retrofill.backfill import columns, compiled, hashes, records, texts
from retrofill.backfill.check import Checker
from retrofill.backfill.checkpoint import Counted, Reading
from retrofill.backfill.columns import Columns
from retrofill.backfill.compiled import Compiled
from retrofill.backfill.deadletter import DeadLetters
from retrofill.backfill.manifest import Options
from retrofill.backfill.people import Ints, Pairs
from retrofill.backfill.places import PLACES, SIZES, spelled
from retrofill.backfill.records import JSON_SCHEMA, Place
from retrofill.backfill.source import Piece
from retrofill.backfill.spill import Spill, short
from retrofill.backfill.straight import SCANNED_BYTES, SCANNED_BYTES_MIN, Straight, straight
from retrofill.core.mapping import Field, Mapping
from retrofill.core.sql import literal
from retrofill.errors import FullError, InputError

if TYPE_CHECKING:
    import duckdb

    from retrofill.backfill.narrow import Narrow

SPILL, ODD = "spill.arrow", "odd.arrow"
MEMORY_MB = 700  # of DuckDB; a window in a mapping goes to disk beyond it
_ROWS = 20_000  # of one batch on its way
_SAMPLE_ROWS = 10_000  # looked at to learn the columns
_SAMPLE_PIECES = 20
_CUT_ANSWER_ROWS = 8192
_CUT_ROWS = 1000  # of them are cut, to learn whether many rows can be
_BORDERS_MAX = 200_000  # rows of the thin sample
# Of the source's text from one checkpoint to the next, ours. A kill costs up to one step: 90,000 rows of 500 bytes are less than
# half a percent of 20 M. Small sources have smaller steps, each costs a millisecond; a query asked anew costs up to 30.
STEP_BYTES = 48 * 1024 * 1024
STEP_BYTES_MIN = 2 * 1024 * 1024
_STEPS = 200

# An event on its way. key: known by device and given insert_id, 0 where that is made. event: a line of JSON, less a made
# insert_id, which gets its last form when equal events stand together; nothing where it stands in the source, at byte `at` of
# the file and `size` long. Else `at` is -1. Ids and type are there, or they have places in the event, and the type a hash in `kind`.
SPILLED = pa.schema(
    [
        ("file", pa.int32()),
        ("line", pa.int64()),
        ("time_ms", pa.int64()),
        ("event_type", pa.string()),
        ("user_id", pa.string()),
        ("device_id", pa.string()),
        ("user_node", pa.int64()),
        ("device_node", pa.int64()),
        ("key", pa.int64()),
        ("insert_id", pa.string()),
        (PLACES, pa.int64()),
        (SIZES, pa.int64()),
        ("kind", pa.int64()),
        ("event", pa.string()),
        ("at", pa.int64()),
        ("size", pa.int32()),
    ]
)
_NOTED = ("device_node", "user_node", "key", "time_ms")
_TROUBLES = {
    "user_id too short": compiled.USER_SHORT,
    "user_id too long": compiled.USER_LONG,
    "user_id forbidden": compiled.USER_FORBIDDEN,
    "user_id null-like": compiled.USER_NULL,
    "device_id too short": compiled.DEVICE_SHORT,
    "device_id too long": compiled.DEVICE_LONG,
    "device_id forbidden": compiled.DEVICE_FORBIDDEN,
    "device_id null-like": compiled.DEVICE_NULL,
}
_REASONS = {
    compiled.UNREADABLE: ("unreadable", "this is no JSON object"),
    compiled.NO_TYPE: ("event_type", "it is empty"),
    compiled.NO_TIME: ("time", "it is empty"),
    compiled.WRONG_TIME: ("time", "it is before 1970 or after 9999"),
    compiled.NO_ID: ("no usable id", "user_id and device_id are empty"),
}


class Thin:
    """Every n-th row's device, user and time, so few that they stay small."""

    def __init__(self) -> None:
        self._parts: list[Ints] = []
        self._step, self._next, self._size = 1, 0, 0

    def add(self, device: Ints, user: Ints, time_ms: Ints) -> None:
        """Look at a batch of rows."""
        at = np.arange(self._next, len(device), self._step)
        self._next = int(at[-1]) + self._step - len(device) if len(at) else self._next - len(device)
        self._parts.append(np.stack((device[at], user[at], time_ms[at])))
        self._size += len(at)
        if self._size > 2 * _BORDERS_MAX:
            kept = np.concatenate(self._parts, axis=1)[:, ::2]
            self._parts, self._size, self._step = [kept], kept.shape[1], self._step * 2

    def rows(self) -> tuple[Ints, Ints, Ints]:
        """Return devices, users and times."""
        if not self._parts:
            return (np.zeros(0, np.int64),) * 3
        device, user, time_ms = np.concatenate(self._parts, axis=1)
        return device, user, time_ms


class Taken(Struct, kw_only=True):
    """What memory holds of all rows that were put down."""

    pairs: Pairs = msgspec.field(default_factory=Pairs)
    keys: list[Ints] = []
    borders: Thin = msgspec.field(default_factory=Thin)

    def note(self, device: Ints, user: Ints, key: Ints, time_ms: Ints) -> None:
        """Remember of spilled rows what is asked of all of them."""
        self.pairs.add(device, user)
        self.borders.add(device, user, time_ms)
        self.keys.append(key[key != 0])


def connect(scratch: Path) -> duckdb.DuckDBPyConnection:
    """Return a DuckDB with bounded memory and the functions that mappings may use."""
    import duckdb  # noqa: PLC0415  # a tenth of a second that plain columns do without

    connection = duckdb.connect(
        config={
            "memory_limit": f"{MEMORY_MB}MB",
            "temp_directory": str(scratch / "duckdb"),
            "preserve_insertion_order": "false",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
        }
    )
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET enable_progress_bar = false")  # it would stand between lines of JSON
    # The first two would read the source twice, which is a stream: the second reading finds nothing. The third takes
    # what an expression holds twice out of its TRY, where one row that does not fit ends the run.
    connection.execute(
        "SET disabled_optimizers = 'window_self_join,common_subplan,common_subexpressions'"
    )
    for macro in compiled.MACROS:
        connection.execute(macro)
    return connection


class Intake:
    """One source under one mapping. Compiling happens at once, so that a wrong mapping is known before any row is read."""

    def __init__(  # what an intake works with
        self,
        pieces: Sequence[Piece],
        mapping: Mapping,
        options: Options,
        connect: Callable[[], duckdb.DuckDBPyConnection],
        letters: DeadLetters,
    ) -> None:
        """connect: as the function of this name; called once at most, when the mapping or a row needs it."""
        self.pieces, self.mapping, self.options = pieces, mapping, options
        self._connect, self.letters = connect, letters
        self.taken, self.counted = Taken(), Counted()
        self._failed: BaseException | None = None
        self._piece, self._place = 0, Place()  # where reading is
        self._odd: Spill | None = None  # rows that are not for the straight way
        self._step = STEP_BYTES
        self._packed = False
        self._checker = Checker(self._refused, id_length_min=options.id_length_min)
        self.source = look(pieces, mapping)
        self.columns = Columns(self.source.style, self.source.types, mapping.columns)
        named = compiled.named(mapping, self.columns)
        way = None if named is None else self._straight(named)
        self._way = way or self._straight(self.compiled)
        self._narrow = self._narrow_way() if self._way is None else None

    @cached_property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """DuckDB, opened by whoever asks first."""
        return self._connect()

    @cached_property
    def compiled(self) -> Compiled:
        """The mapping with its query. Raises InputError for a wrong one. When it is asked first, `source` is made empty."""
        self._register(iter(()))
        return compiled.compile_mapping(
            self.mapping, self.columns, self.connection, id_length_min=self.options.id_length_min
        )

    def run(
        self,
        scratch: Path,
        reading: Reading,
        *,
        save: Callable[[], None],
        seen: Callable[[int], None] = lambda _rows: None,
    ) -> Taken:
        """Read all rows, put the events among them into the spill. Raises InputError when too many are bad.

        reading: where to begin, and moved on; `save` makes it the checkpoint.
        """
        spill = Spill(scratch / SPILL, SPILLED, length=reading.spill)
        odd = self._odd = Spill(scratch / ODD, JSON_SCHEMA, length=reading.odd)
        spill.cut()
        odd.cut()
        self._remember(reading, spill)

        def checkpoint() -> None:
            reading.piece, reading.place = self._piece, msgspec.structs.replace(self._place)
            reading.spill, reading.odd = spill.bytes, odd.bytes
            save()
            self._packed = short(scratch, self.counted.bytes)  # as many as in buckets

        if self._way is not None:
            self._straight_on(self._way, spill, checkpoint, seen)
        elif self._narrow is not None:
            self._narrow_on(self._narrow, spill, checkpoint, seen)
        if self._piece < len(self.pieces) or odd.bytes:
            self._ask(reading, odd, spill, checkpoint, seen)
        self._judge()
        checkpoint()
        return self.taken

    def _remember(self, reading: Reading, spill: Spill) -> None:
        self.counted = reading.counted  # it goes on being counted there, for the next checkpoint
        self._piece, self._place = reading.piece, msgspec.structs.replace(reading.place)
        for batch, _end in spill.batches():
            self.taken.note(*(_numbers(batch, name).copy() for name in _NOTED))
        size = sum(piece.size for piece in self.pieces)
        self._step = min(STEP_BYTES, max(STEP_BYTES_MIN, size // _STEPS))

    def _straight_on(
        self,
        way: Straight,
        spill: Spill,
        checkpoint: Callable[[], None],
        seen: Callable[[int], None],
    ) -> None:
        size = 0
        for records_ in self._records():
            for batch, good in way.events((records_,)):
                self.counted.rows += batch.num_rows
                found = batch if good else finished(self._checker.mended(batch))
                self._keep(self._in_bounds(found), spill)
                seen(self.counted.rows)
            size += records_.nbytes
            if size >= self._step and not self._place.last:
                checkpoint()
                size = 0

    def _narrow_on(
        self,
        way: Narrow,
        spill: Spill,
        checkpoint: Callable[[], None],
        seen: Callable[[int], None],
    ) -> None:
        # DuckDB's other threads give all free memory of the process back to the system, ten times a second.
        self.connection.execute("SET threads = 1")
        records_ = self._records()
        for first in records_:
            for batch, good in way.events(chain((first,), _up_to(STEP_BYTES, records_))):
                self.counted.rows += batch.num_rows
                found = self._in_bounds(batch if good else self._checker.mended(batch))
                self._count_troubles(found)
                self._keep(found if good else finished(found), spill)
                seen(self.counted.rows)
            if not self._place.last:
                checkpoint()
        self.connection.execute("RESET threads")

    def _ask(
        self,
        reading: Reading,
        odd: Spill,
        spill: Spill,
        checkpoint: Callable[[], None],
        seen: Callable[[int], None],
    ) -> None:
        """Ask the query about the rows, or about those that were put aside."""
        query = self.compiled.sql  # before the rows are registered: it is asked of none
        for rows in self._together(reading, odd):
            self._register(iter(rows))
            answers = self._answers(query)
            for batch in answers if self._at_once else _in_order(answers):
                self.counted.rows += batch.num_rows
                found = self._in_bounds(self._checker.mended(self._without_bad(batch)))
                self._count_troubles(found)
                self._keep(finished(found), spill)
                seen(self.counted.rows)
            if not self._place.last and not self._at_once:
                checkpoint()

    @property
    def _at_once(self) -> bool:
        """Whether one query has to see all rows."""
        return self.source.style == "native" or self.compiled.windowed

    def _together(self, reading: Reading, odd: Spill) -> Iterator[Iterable[pa.RecordBatch]]:
        """Yield the rows that are asked about together."""
        if self._at_once:
            if self._piece < len(self.pieces):
                yield self._records()
                self._piece = len(self.pieces)  # also where DuckDB read them by itself
            return
        # Whoever read before us may have put some aside.
        yield from _steps(chain(self._records(), self._set_aside_from(reading, odd)))

    def _set_aside_from(self, reading: Reading, odd: Spill) -> Iterator[pa.RecordBatch]:
        for batch, end in odd.batches(reading.odd_read):
            reading.odd_read = end
            yield batch

    def _straight(self, found: Compiled) -> Straight | None:
        size = sum(piece.size for piece in self.pieces)
        large = size >= SCANNED_BYTES or (size >= SCANNED_BYTES_MIN and _compiled())
        rows = self.source.rows if large else ()
        return straight(found, self.columns, self._checker, self._set_aside, rows)

    def _narrow_way(self) -> Narrow | None:
        found = self.compiled.narrow
        if found is None:
            return None
        from retrofill.backfill import narrow  # noqa: PLC0415  # for large sources alone

        size = sum(piece.size for piece in self.pieces)
        if size < SCANNED_BYTES and not (size >= SCANNED_BYTES_MIN and narrow.there()):
            return None
        way = narrow.narrow(
            found, self.columns, self.connection, self._cut_answers, self._set_aside
        )
        return way if way is not None and way.standing(self.source.rows[:_CUT_ROWS]) else None

    def _set_aside(self, rows: pa.RecordBatch) -> None:
        assert self._odd is not None
        self._odd.add(rows, packed=self._packed)

    @property
    def unread(self) -> int:
        """Rows that were refused before the query saw them."""
        counts = self.letters.counts
        return counts["unreadable"] + counts[records.CUT_OFF] - self.counted.unreadable

    # The relation `source`.

    def _register(self, found: Iterator[pa.RecordBatch]) -> None:
        if self.source.style == "native":
            self.connection.execute(self._parquet())
            return
        reader = pa.RecordBatchReader.from_batches(self.source.schema, found)
        self.connection.register("source", _stream(reader))

    def _parquet(self) -> str:
        names = ", ".join(literal(piece.place) for piece in self.pieces)
        numbers = ", ".join(str(piece.number) for piece in self.pieces)
        return (
            f"CREATE OR REPLACE TEMP VIEW source AS SELECT * EXCLUDE ({columns.FILE}, file_row_number), "  # names are quoted
            f"CAST([{numbers}][list_position([{names}], {columns.FILE})] AS INTEGER) AS {columns.FILE}, "
            f"CAST(file_row_number + 1 AS BIGINT) AS {columns.LINE} FROM read_parquet([{names}], "
            f"filename = '{columns.FILE}', file_row_number = true, union_by_name = true)"
        )

    def _records(self) -> Iterator[pa.RecordBatch]:
        """Yield all records. DuckDB pulls from here; its own words about an error are worth little, so keep ours."""
        try:
            while self._piece < len(self.pieces):
                piece = self.pieces[self._piece]
                yield from read(piece, self.source, self.mapping, self.letters, self._place)
                self._piece, self._place = self._piece + 1, Place()
        except BaseException as error:
            self._failed = error
            raise

    def _cut_answers(
        self, query: str, schema: pa.Schema, rows: Iterator[pa.RecordBatch]
    ) -> Iterator[pa.RecordBatch]:
        """Ask about rows that were cut. One thread gives the answers in the order of the rows."""
        reader = pa.RecordBatchReader.from_batches(schema, self._watched(rows))
        self.connection.register("narrow", _stream(reader))
        yield from self._answers(query, _CUT_ANSWER_ROWS)

    def _watched(self, rows: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        try:
            yield from rows
        except BaseException as error:
            self._failed = error
            raise

    def _answers(self, query: str, rows: int = _ROWS) -> Iterator[pa.RecordBatch]:
        import duckdb  # noqa: PLC0415  # as in `connect`

        try:
            answer = self.connection.execute(query).to_arrow_reader(rows)
            yield from answer
        except (duckdb.Error, pa.ArrowException) as error:
            if self._failed is not None:
                raise self._failed from error
            if "No space left" in str(error):
                raise FullError(
                    "No room is left on the device", mend="Free some space; nothing was sent"
                ) from error
            raise InputError(
                f"The mapping failed while the source was read: {_one_line(error)}",
                where=self._culprit(error),
                mend="An expression over several rows (OVER …) cannot leave out single ones",
            ) from error

    def _culprit(self, error: Exception) -> str:
        del error
        windows = [field for field in self.compiled.fields if " over " in field.expression.lower()]
        return "; ".join(f"{field.name}: {field.expression}" for field in windows)

    # One batch of events.

    def _count_troubles(self, batch: pa.RecordBatch) -> None:
        for name, bit in _TROUBLES.items():
            lost = int(np.count_nonzero(_numbers(batch, "trouble") & bit))
            if lost:
                _add(self.counted.ids, name, lost)

    def _keep(self, batch: pa.RecordBatch, spill: Spill) -> None:
        if batch.num_rows == 0:
            return
        device, user, key = _hashes(batch)
        key = hashes.both(np.where(device == 0, user, device), key)
        size = pc.binary_length(batch.column("event"))
        self.counted.events += batch.num_rows
        self.counted.bytes += pc.sum(size).as_py()
        made = {
            "device_node": pa.array(device),
            "user_node": pa.array(user),
            "key": pa.array(key),
            "size": size,
        }
        if "at" in batch.schema.names:  # it stays there
            self.counted.lying += pc.sum(size).as_py()
            made["event"] = _empty(batch.num_rows)
        else:
            made["at"] = pa.array(np.full(batch.num_rows, -1, np.int64))
        if PLACES not in batch.schema.names:
            made |= dict.fromkeys(
                (PLACES, SIZES, "kind"), pa.array(np.zeros(batch.num_rows, np.int64))
            )
        columns = [made[name] if name in made else batch.column(name) for name in SPILLED.names]
        rows = pa.RecordBatch.from_arrays(columns, schema=SPILLED)
        self.taken.note(device, user, key, _numbers(batch, "time_ms"))
        spill.add(rows, packed=self._packed)

    def _without_bad(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        bad = batch.column("bad")
        if bad.null_count == len(bad):
            return batch
        wrong = batch.filter(pc.is_valid(bad)).select(
            ["file", "line", "bad", "row", "shown", "trouble"]
        )
        for row in wrong.to_pylist():
            self._refuse(row)
        return batch.filter(pc.is_null(bad))

    def _refuse(self, row: dict[str, Any]) -> None:
        bad, text = row["bad"], (row["row"] or "").rstrip("\r\n")
        if self.pieces[row["file"]].format == "json":
            text = text.strip()  # elements of an array bring along what stands before them
        if self.source.style == "json" and not text.lstrip().startswith("{"):
            bad = compiled.UNREADABLE
        self.counted.unreadable += bad == compiled.UNREADABLE
        kind, reason = self._reason(bad, row["shown"])
        if bad == compiled.NO_ID and row["trouble"]:
            troubles = [name for name, bit in _TROUBLES.items() if row["trouble"] & bit]
            for name in troubles:
                _add(self.counted.ids, f"{name}, no other", 1)
            reason = f"{' and '.join(troubles)}, and there is no other"
        self.letters.add(self.pieces[row["file"]].name, row["line"], kind, reason, text)

    def _refused(self, file: int, line: int, kind: str, reason: str, event: str) -> None:
        """Keep an event that the core refuses. The row itself is not at hand any more (see `original`)."""
        self.letters.add_event(self.pieces[file].name, line, kind, reason, event)

    @property
    def _asked(self) -> dict[int, Field]:
        """What is asked of a row before its fields, by the code of its failing."""
        told = self.mapping
        return {
            compiled.WHERE: Field(("where",), told.where or ""),
            compiled.EACH: Field(("each",), told.each or ""),
        }

    def _reason(self, bad: int, shown: str | None) -> tuple[str, str]:
        if bad in _REASONS:
            return _REASONS[bad]
        field = self._asked.get(bad) or self.compiled.fields[bad]
        try:  # no decoder holds every number
            held = msgspec.json.decode(shown or "{}", type=dict[str, Raw])
        except msgspec.DecodeError:  # NaN and Infinity: DuckDB takes them for JSON
            values = (shown or "")[:500]
        else:
            values = ", ".join(
                f"{name} = {bytes(one).decode()[:200]}"
                for name, one in held.items()
                if _names(field.expression, name)
            )
        return field.name, f"{field.expression} does not fit where {values or 'the row is so'}"

    def _in_bounds(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        options, time_ms = self.options, _numbers(batch, "time_ms")
        if options.since_ms is None and options.until_ms is None and not options.until_types:
            return batch
        early = (
            time_ms < options.since_ms
            if options.since_ms is not None
            else np.zeros(len(time_ms), bool)
        )
        late = time_ms >= self._until(batch)
        if early.any() or late.any():
            _add(self.counted.left_out, "since", int(early.sum()))
            _add(self.counted.left_out, "until", int(late.sum()))
            batch = batch.filter(pa.array(~(early | late)))
        return batch

    def _until(self, batch: pa.RecordBatch) -> Ints | np.int64:
        """Return the time from which each row is left out: its type's own, or the one of all, whichever is earlier."""
        options = self.options
        end = np.int64(np.iinfo(np.int64).max if options.until_ms is None else options.until_ms)
        if not options.until_types:
            return end
        kinds = batch.column("event_type")
        if PLACES in batch.schema.names:
            where = (_numbers(batch, PLACES), _numbers(batch, SIZES))
            kinds = spelled("event_type", kinds, batch.column("event"), *where)
        types = kinds.dictionary_encode()
        ends = [min(end, options.until_types.get(one, end)) for one in types.dictionary.to_pylist()]
        found: Ints = np.asarray(ends, np.int64)[types.indices.to_numpy()]
        return found

    def _judge(self) -> None:
        refused = self.letters.total
        rows = max(self.counted.rows + self.unread, 1)
        if refused <= rows * self.options.bad_rows:
            return
        firsts = self.letters.firsts
        first = next(firsts[piece.name] for piece in self.pieces if piece.name in firsts)
        short = any("too short" in name for name in self.counted.ids)
        shorter = ", take shorter ids with --min-id-length" if short else ""
        worst = ", ".join(f"{kind} {count:,}" for kind, count in self.letters.counts.most_common(5))
        raise InputError(
            f"{refused:,} of {rows:,} rows were refused ({worst}), the first: {first.reason}",
            where=f"{first.file}, row {first.line}: {first.row[:300]}",
            mend=f"Mend the mapping{shorter}, or allow more with --bad-rows; all are in {self.letters.shown}",
        )


def _stream(reader: pa.RecordBatchReader) -> object:
    """Return a reader as DuckDB pulls from it by itself: out of any other object Arrow reads ahead, in a thread of its own.

    What that thread took of memory was freed by another, and given back to the system: two of three page faults of staging.
    """
    return reader.__arrow_c_stream__()


def _up_to(size: int, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield batches until they are so large together."""
    while size > 0 and (batch := next(batches, None)) is not None:
        size -= batch.nbytes
        yield batch


def _steps(batches: Iterable[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    """Yield rows that are asked about together."""
    waiting: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        waiting.append(batch)
        size += batch.nbytes
        if size >= STEP_BYTES:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


def _compiled() -> bool:
    """Say whether what looks at rows is compiled."""
    from retrofill.backfill import native  # noqa: PLC0415  # for large sources alone

    return native.there("look")


def _in_order(answers: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the rows as the source has them: DuckDB's threads give them as they come, each time in another order."""
    batches = list(answers)
    if not batches:
        return
    table = pa.Table.from_batches(batches)
    file, line = (table.column(name).to_numpy() for name in ("file", "line"))
    rows = np.lexsort((line, file))
    for start in range(0, len(rows), _ROWS):
        some = table.take(pa.array(rows[start : start + _ROWS])).combine_chunks()
        yield from some.to_batches()


def _add(counts: dict[str, int], name: str, more: int) -> None:
    counts[name] = counts.get(name, 0) + more


def _empty(count: int) -> pa.StringArray:
    return pa.StringArray.from_buffers(
        count, pa.py_buffer(np.zeros(count + 1, np.int32)), pa.py_buffer(b"")
    )


def finished(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return events of the query's form as SPILLED has them, with the insert_id that was given, but without hashes."""
    insert_id, body = batch.column("insert_id"), batch.column("body")
    given = pc.starts_with(insert_id, '"')
    member = pc.if_else(given, pc.binary_join_element_wise('"insert_id":', insert_id, ",", ""), "")
    plain = pc.if_else(given, texts.spoken(insert_id), insert_id)
    columns = {
        name: batch.column(name)
        for name in ("file", "line", "time_ms", "event_type", "user_id", "device_id")
    }
    return pa.RecordBatch.from_pydict(
        {
            **columns,
            "given": pc.if_else(given, plain, pa.scalar(None, pa.string())),
            "insert_id": plain,
            "event": pc.binary_join_element_wise("{", member, body, "\n", ""),
        }
    )


def _names(expression: str, name: str) -> bool:
    return name.rpartition(".")[2].lower() in expression.lower()


def _numbers(batch: pa.RecordBatch, name: str) -> Any:  # an array of the column's type
    return batch.column(name).to_numpy(zero_copy_only=False)


def _hashes(batch: pa.RecordBatch) -> tuple[Ints, Ints, Ints]:
    """Return the hashes of devices, users and given insert_ids: as they were found on the way, or made now."""
    if "insert_hash" in batch.schema.names:
        device, user, given = (
            _numbers(batch, name) for name in ("device_node", "user_node", "insert_hash")
        )
        return device, user, given
    return (
        hashes.of(batch.column("device_id"), seed=hashes.DEVICE),
        hashes.of(batch.column("user_id"), seed=hashes.USER),
        hashes.of(batch.column("given"), seed=hashes.INSERT),
    )


def _one_line(error: Exception) -> str:
    """Return what DuckDB says, less the query of ours that it shows."""
    return " ".join(str(error).partition("\nLINE ")[0].split())[:500]


class Source(Struct, frozen=True):
    """What a look at the source tells. names: of CSV cells, and `table` the sample of these. rows: that of others, as JSON."""

    style: columns.Style
    types: dict[columns.Path, str]
    names: list[str]
    schema: Any
    rows: list[str | None]
    table: Any = None


_SAID = {"cells": "CSV", "json": "JSON", "native": "Parquet"}


def look(pieces: Sequence[Piece], mapping: Mapping | None) -> Source:
    """Read the first rows of some pieces and say what columns there are."""
    if not pieces:
        raise InputError("The source holds no file that can be read")
    styles = {_style(piece) for piece in pieces}
    if len(styles) > 1:
        raise InputError(
            f"The source mixes {' and '.join(sorted(_SAID[style] for style in styles))} files",
            mend="Import each kind in a run of its own",
        )
    style = styles.pop()
    told = mapping.delimiter if mapping else None
    if style == "native":
        return _look_native(pieces)
    if style == "cells":
        return _look_cells(pieces, told)
    rows: list[str | None] = []
    with DeadLetters(Path("/dev/null")) as nowhere:
        for piece in _spread(pieces):
            for batch in records.json_records(piece, nowhere, chunk=1024 * 1024):
                rows += batch.column("text")[: _SAMPLE_ROWS // 2].to_pylist()
                break
    if nowhere.firsts and not rows:
        first = next(iter(nowhere.firsts.values()))
        raise InputError(f"No row can be read: {first.reason}", where=first.file)
    types = columns.json_types(row for row in rows[: 2 * _SAMPLE_ROWS] if row)
    return Source(style, types, [], records.JSON_SCHEMA, rows)


def _look_cells(pieces: Sequence[Piece], told: str | None) -> Source:
    names = list(dict.fromkeys(name for piece in pieces for name in records.header(piece, told)))
    batches = []
    with DeadLetters(Path("/dev/null")) as nowhere:
        for piece in _spread(pieces):
            for batch in records.csv_records(piece, names, nowhere, told=told, chunk=1024 * 1024):
                batches.append(batch.slice(0, _SAMPLE_ROWS))
                break
    schema = records.cells_schema(names)
    table = pa.Table.from_batches(batches, schema)
    types: dict[columns.Path, str] = {
        (name,): columns.cell_type(table.column(f"cell_{at}").to_pylist())
        for at, name in enumerate(names)
    }
    for at, name in enumerate(names):
        if types[name,] == "VARCHAR":
            types |= columns.text_types(name, table.column(f"cell_{at}").to_pylist())
    return Source("cells", types, names, schema, [], table)


def _look_native(pieces: Sequence[Piece]) -> Source:
    import duckdb  # noqa: PLC0415  # as in `connect`

    names = ", ".join(literal(piece.place) for piece in pieces)
    try:
        with duckdb.connect() as connection:
            relation = connection.sql(
                f"FROM read_parquet([{names}], union_by_name = true)"
            )  # names are quoted
            types: dict[columns.Path, str] = {}
            for name, kind in zip(relation.columns, relation.types, strict=True):
                types |= dict(_members((name,), kind))
            sample = relation.limit(_SAMPLE_ROWS).to_arrow_table()
            rows: list[str | None] = [*records.as_json(connection, sample)]
    except duckdb.Error as error:
        raise InputError(
            f"This is no Parquet that can be read: {_one_line(error)}",
            where=", ".join(piece.name for piece in pieces[:3]),
        ) from error
    if any(path[0].lower() == "file_row_number" for path in types):
        raise InputError(
            "A column of Parquet cannot be named file_row_number",
            where=", ".join(piece.name for piece in pieces[:3]),
            mend="Write the file with another name for it",
        )
    told = columns.json_types(row for row in rows if row)
    inner = {path: kind for path, kind in told.items() if len(path) > 1}
    return Source("native", inner | types, [], None, rows)


def _members(path: columns.Path, kind: Any) -> Iterator[tuple[columns.Path, str]]:
    """Yield a column of Parquet, and what is inside of it where it is a struct, each with its type."""
    yield path, str(kind)
    if kind.id == "struct":
        for name, inner in kind.children:
            yield from _members((*path, name), inner)


def _style(piece: Piece) -> columns.Style:
    if piece.format in {"csv", "tsv"}:
        return "cells"
    return "native" if piece.format == "parquet" else "json"


def _spread(pieces: Sequence[Piece]) -> Sequence[Piece]:
    step = max(1, len(pieces) // _SAMPLE_PIECES)
    return pieces[::step][:_SAMPLE_PIECES]


def read(
    piece: Piece, source: Source, mapping: Mapping, letters: DeadLetters, place: Place
) -> Iterator[pa.RecordBatch]:
    """Yield one piece's records, with the schema that `look` found. place: where to begin, and moved on."""
    if source.style == "cells":
        return records.csv_records(
            piece, source.names, letters, told=mapping.delimiter, place=place
        )
    return records.json_records(piece, letters, place=place)
