"""Reading everything that was acknowledged, as of one moment: the lake and the blocks that are not in it yet.

A `View` pins one snapshot of the lake, reads that snapshot's own `sealed` number S, and takes from the hot store the
blocks after S up to the last one acknowledged when the view was opened: nothing twice, nothing missing. Blocks are
pinned before the snapshot is opened, so that none can go in between.

Rows of unsealed blocks become Arrow tables with the schema of the lake table, a few thousand at a time, streamed into
DuckDB beside the lake's rows. What was built is kept up to a bound in bytes, since readers come back sooner than
blocks go. One person's rows are found in the blocks' packed ids first, and only those are built.

Everything here blocks: it runs in the readers' threads, never on the loop. Statements take values as parameters;
text in them is made of our own column names and of integers alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Raw, Struct

from retrofill.core.block import Block, Kind
from retrofill.core.person import Person
from retrofill.lake import arrow
from retrofill.lake.person import Part
from retrofill.limits import (
    PERSON_LOOKS,
    STREAM_BYTES,
    UNSEALED_CHUNK_BYTES,
    UNSEALED_CHUNK_ROWS,
    UNSEALED_KEPT_BYTES,
)

_EVENT_KINDS = (Kind.EVENT,)

More = Callable[[Sequence[str], np.ndarray[Any, Any]], pa.Table]
"""Reads some columns of rows given by their indexes."""


class Snapshot(Protocol):
    """One pinned read transaction of the lake."""

    @property
    def cursor(self) -> Any:
        """A DuckDB cursor inside the transaction."""

    @property
    def sealed(self) -> int:
        """The last block that is in this snapshot."""
        raise NotImplementedError

    def merges(self, project: int) -> dict[int, int]:
        """Return absorbed → surviving amplitude_id of a project; not to be changed."""

    def parts(
        self, project: int, people: Sequence[int], kinds: Sequence[int], columns: Sequence[str]
    ) -> Iterator[tuple[Part, pa.Table]]:
        """Yield where the rows of these amplitude_ids stand, with some of their columns."""


class Lake(Protocol):
    """What a reader needs of the lake."""

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """Pin the lake as it is now."""


class Blocks(Protocol):
    """What a reader needs of the hot store."""

    def read(self, first: int, last: int) -> Iterator[Block]:
        """Yield blocks first … last in order."""


class Statement:
    """Values on their way into one SQL statement."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def bind(self, value: Any) -> str:
        """Take a value; return the name that stands for it in the statement."""
        name = f"p{len(self.values)}"
        self.values[name] = value
        return f"${name}"


def equal(column: str, text: str, statement: Statement) -> str:
    """Return the condition that a column is a text.

    DuckLake looks for files by a text that is compared, in a statement of its own that a zero in the text cuts off:
    such a text is looked for in a way that it does not see.
    """
    name = statement.bind(text)
    return f"list_contains([{name}::VARCHAR], {column})" if "\0" in text else f"{column} = {name}"


class Reader:
    """Opens views. One for a data directory; any number of threads.

    last_block: number of the last acknowledged block. person: a person's state, None if unknown.
    aliases: user_id → global_user_id of a project. pin: keeps every block after a number while it is open.
    late_since: the first block of a project with late events that were not folded in event time yet, 0 if there is
    none. settle: folds them, and waits. settles: how often they were folded; what was read while that changes may be of
    before, though nothing is late any more. settled_person: as `person`, while commits wait and nothing is late.
    """

    def __init__(
        self,
        lake: Lake,
        blocks: Blocks,
        *,
        last_block: Callable[[], int],
        person: Callable[[int, int], Person | None],
        aliases: Callable[[int], dict[str, str]],
        pin: Callable[[int], AbstractContextManager[None]],
        late_since: Callable[[int], int] = lambda _: 0,
        settle: Callable[[int], None] = lambda _: None,
        settles: Callable[[int], int] = lambda _: 0,
        settled_person: Callable[[int, int], Person | None] | None = None,
    ) -> None:
        # Arrow's own pool keeps what was freed: an export would leave the process 100 MB larger.
        pa.set_memory_pool(pa.system_memory_pool())
        self._lake = lake
        self._unsealed = Unsealed(blocks)
        self._last_block = last_block
        self._pin = pin
        self._pin_lock = threading.Lock()
        self._person, self._settled_person = person, settled_person or person
        self._late_since, self._settle, self._settles = late_since, settle, settles
        self.aliases = aliases

    @contextlib.contextmanager
    def view(self, project: int) -> Iterator[View]:
        """Pin what is there now. Everything acknowledged before the call is in the view."""
        last = self._last_block()
        while True:
            before = self._settles(project)
            with ExitStack() as stack:
                early = stack.enter_context(contextlib.ExitStack())
                early.enter_context(self._pinned(0))
                snapshot = stack.enter_context(self._lake.snapshot())
                stack.enter_context(self._pinned(snapshot.sealed))
                early.close()
                late = self._is_late(project, max(last, snapshot.sealed))
                if not late and self._settles(project) == before:
                    self._unsealed.forget(snapshot.sealed)
                    view = View(self, project, snapshot, last, self._unsealed)
                    stack.callback(view.close)
                    yield view
                    return
            if late:
                self._settle(project)

    def person(self, project: int, amplitude_id: int) -> Person | None:
        """Return a person's state as of the last acknowledged block, None if unknown."""
        for _ in range(PERSON_LOOKS):
            before = self._settles(project)
            found = self._person(project, amplitude_id)
            if self._late_since(project):
                self._settle(project)
            elif self._settles(project) == before:
                return found
        return self._settled_person(project, amplitude_id)

    def sealed(self, block: int) -> None:
        """Let go of rows that were built of blocks up to one: new views find them in the lake. Any thread."""
        self._unsealed.forget(block)

    def _is_late(self, project: int, last: int) -> bool:
        """Say whether blocks up to one hold late events that would show."""
        return 0 < self._late_since(project) <= last

    def at(self, project: int, snapshot: Snapshot) -> View:
        """Return a view of what one snapshot holds, which somebody else has pinned. Close it."""
        return View(self, project, snapshot, snapshot.sealed, self._unsealed)

    @contextlib.contextmanager
    def _pinned(self, sealed: int) -> Iterator[None]:
        # Pins are counted in plain dicts of the engine: one thread at a time.
        pin = self._pin(sealed)
        with self._pin_lock:
            pin.__enter__()
        try:
            yield
        finally:
            with self._pin_lock:
                pin.__exit__(None, None, None)


class View:
    """One project at one moment. Used by one thread at a time.

    A statement may not read while another one's rows are still streaming: take those whole first.
    """

    def __init__(
        self, reader: Reader, project: int, snapshot: Snapshot, last: int, unsealed: Unsealed
    ) -> None:
        self.project = project
        self.reader = reader
        self.first_unsealed = snapshot.sealed + 1
        self.last = max(last, snapshot.sealed)
        self._snapshot = snapshot
        self._cursor = snapshot.cursor
        # Rows wait in DuckDB for whoever reads them: its own measure of them is a tenth of the truth for long texts.
        self._cursor.execute(f"SET streaming_buffer_size = '{STREAM_BYTES}B'")
        self._unsealed = unsealed
        self._names: set[str] = set()
        self._lent = 0
        self._people: str | None = None

    def close(self) -> None:
        """Take back what was registered."""
        for name in list(self._names):
            self.take_back(name)

    def ask(self, sql: str, statement: Statement | None = None) -> Any:
        """Run a statement; its rows are read from what this returns."""
        return self._cursor.execute(sql, statement.values if statement else {})

    def lend(self, rows: pa.Table | pa.RecordBatchReader) -> str:
        """Make rows readable in statements; return their name. A RecordBatchReader can be read once."""
        name = f"lent_{self._lent}"
        self._lent += 1
        self._cursor.register(name, rows)
        self._names.add(name)
        return name

    def take_back(self, name: str) -> None:
        """Let go of rows lent before."""
        self._names.discard(name)
        self._cursor.unregister(name)

    def source(
        self,
        needs: Iterable[str],
        *,
        select: Sequence[str] = (),
        where: str = "true",
        kinds: Sequence[int] = _EVENT_KINDS,
        fresh: pa.Table | None = None,
    ) -> str:
        """Return a subquery over the project's rows, lake and unsealed, to be read once.

        needs: the columns of table `events` that `select` and `where` name. select: SQL expressions, the columns
        themselves if none are given. fresh: unsealed rows to take instead of all of them.
        """
        columns = sorted({*needs, "project", "kind"})
        chosen = ", ".join(select or columns)
        numbers = ", ".join(str(int(kind)) for kind in kinds)
        rest = f"project = {int(self.project)} AND kind IN ({numbers}) AND ({where})"
        if fresh is None:
            name = self.lend(self._stream(columns))
        else:
            name = self.lend(fresh.select(columns))
        return (
            f"(SELECT {chosen} FROM lake.events WHERE {rest} "
            f"UNION ALL SELECT {chosen} FROM {name} WHERE {rest})"
        )

    def _stream(self, columns: list[str]) -> pa.RecordBatchReader:
        schema = pa.schema([arrow.SCHEMA.field(name) for name in columns])
        batches = (
            batch
            for table in self.tables()
            for batch in table.select(columns).to_batches(max_chunksize=UNSEALED_CHUNK_ROWS)
        )
        return pa.RecordBatchReader.from_batches(schema, batches)

    def tables(
        self, first: int = 0, last: int | None = None, *, keep: bool = True
    ) -> Iterator[pa.Table]:
        """Yield the unsealed rows of blocks first … last, all projects and kinds, in order of position.

        keep: for the next reader; else no more of them is held than what was yielded last.
        """
        start = max(first, self.first_unsealed)
        end = self.last if last is None else min(last, self.last)
        return self._unsealed.tables(start, end, keep=keep)

    def rows_of(self, people: Sequence[int]) -> pa.Table:
        """Return the unsealed rows of these amplitude_ids, all kinds, in order of position."""
        return self._unsealed.rows_of(people, self.first_unsealed, self.last)

    def events_of(
        self, people: Sequence[int], columns: Sequence[str]
    ) -> Iterator[tuple[More, pa.Table]]:
        """Yield the events of these amplitude_ids, lake and unsealed, some at a time and in no order.

        Each time: these columns of some rows, and what reads others of them.
        """
        for part, rows in self._snapshot.parts(self.project, people, _EVENT_KINDS, columns):
            yield part.read, rows
        yield from self._fresh(people, columns)

    def _fresh(
        self, people: Sequence[int], columns: Sequence[str]
    ) -> Iterator[tuple[More, pa.Table]]:
        fresh = self.rows_of(people)
        ours = pc.and_(
            pc.equal(fresh["project"], self.project), pc.equal(fresh["kind"], int(Kind.EVENT))
        )
        fresh = fresh.filter(ours)
        if fresh.num_rows:
            yield lambda more, some: fresh.select(more).take(pa.array(some)), fresh.select(columns)

    def people(self) -> str:
        """Return the name of a table (was, now): under which amplitude_id another one is counted.

        Absorbed people count as their survivor, and mapped users as their global user. Not listed: as themselves.
        Source: contract, identity 3 and 4, "counted once in aggregates".
        """
        if self._people is None:
            self._people = self.lend(self._counted_as())
        return self._people

    def merges(self) -> dict[int, int]:
        """Return absorbed → surviving amplitude_id of the project."""
        fresh = self._unsealed.merges(self.first_unsealed, self.last)
        return self._snapshot.merges(self.project) | {
            one.absorbed: one.surviving for one in fresh if one.project == self.project
        }

    def placed_merges(self) -> list[tuple[int, int, int, int]]:
        """Return (block, row, absorbed, surviving) of each unsealed merge of the project, in order of position."""
        fresh = self._unsealed.placed_merges(self.first_unsealed, self.last)
        return [
            (block, one.row, one.absorbed, one.surviving)
            for block, one in fresh
            if one.project == self.project
        ]

    def _counted_as(self) -> pa.Table:
        now = self.merges()
        same = self._same_users(now)
        counted = {was: same.get(survivor, survivor) for was, survivor in now.items()} | same
        sides = (list(counted.keys()), list(counted.values()))
        return pa.table(
            {"was": pa.array(sides[0], pa.int64()), "now": pa.array(sides[1], pa.int64())}
        )

    def _same_users(self, merges: dict[int, int]) -> dict[int, int]:
        """Return amplitude_id → the one that stands for its global user, for every user mapped by an alias."""
        root = dict(self.reader.aliases(self.project))
        if not root:
            return {}
        root |= {one: one for one in root.values()}
        found: dict[str, set[int]] = {}
        for user, person in self.people_of(list(root)):
            found.setdefault(root[user], set()).add(merges.get(person, person))
        return {one: min(people) for people in found.values() for one in people}

    def people_of(self, users: Sequence[str]) -> list[tuple[str, int]]:
        """Return each (user_id, amplitude_id) that stands on a row of these users."""
        statement = Statement()
        some = f"{statement.bind(list(users))}::VARCHAR[]"
        # DuckLake looks for files by a text that is compared, in a statement of its own that a zero in the text cuts off.
        cut = any("\0" in one for one in users)
        source = self.source(
            ("user_id", "amplitude_id"),
            where=f"list_contains({some}, user_id)"
            if cut
            else f"user_id IN (SELECT unnest({some}))",
            kinds=(Kind.EVENT, Kind.IDENTIFY),
        )
        rows: list[tuple[str, int]] = self.ask(
            f"SELECT DISTINCT user_id, amplitude_id FROM {source} ORDER BY ALL", statement
        ).fetchall()
        return rows


def _of(value: Any) -> Statement:
    statement = Statement()
    statement.bind(value)
    return statement


class _Segment(NamedTuple):
    """The rows of blocks first … last."""

    first: int
    last: int
    table: pa.Table


class _Seen(NamedTuple):
    """What a reader looks at in a block before its rows are built."""

    amplitude_id: bytes
    merges: list[Any]


class Unsealed:
    """Rows of blocks that are not in the lake, built when read and kept up to UNSEALED_KEPT_BYTES."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._lock = threading.Lock()
        self._segments: list[_Segment] = []
        self._seen: dict[int, _Seen] = {}

    def forget(self, sealed: int) -> None:
        """Let go of what new views will find in the lake."""
        with self._lock:
            self._segments = [one for one in self._segments if one.last > sealed]
            for number in [number for number in self._seen if number <= sealed]:
                del self._seen[number]

    def tables(self, first: int, last: int, *, keep: bool = True) -> Iterator[pa.Table]:
        """Yield the rows of blocks first … last in order of position."""
        number = first
        while number <= last:
            table, number = self._next(number, last, keep=keep)
            yield table

    def _next(self, first: int, last: int, *, keep: bool) -> tuple[pa.Table, int]:
        """Return rows from block `first` on, and the block that comes after them."""
        with self._lock:
            for one in self._segments:
                if one.first <= first <= one.last:
                    return _within(one, first, last), min(one.last, last) + 1
            following = min(
                (one.first for one in self._segments if one.first > first), default=last + 1
            )
            built = self._build(first, min(last, following - 1))
            if keep:
                self._keep(built)
            return built.table, built.last + 1

    def _build(self, first: int, last: int) -> _Segment:
        batches, rows, size, number = [], 0, 0, first
        with contextlib.closing(self._blocks.read(first, last)) as blocks:  # type: ignore[type-var]
            for number, block in enumerate(blocks, first):
                assert block.number == number, f"block {number} is missing, found {block.number}"
                batches.append(arrow.batch(block))
                self._see(block)
                rows += block.rows
                size += sum(len(part.body) for part in block.parts)
                if rows >= UNSEALED_CHUNK_ROWS or size >= UNSEALED_CHUNK_BYTES:
                    break
        assert batches, f"block {first} is missing"
        return _Segment(first, number, pa.Table.from_batches(batches, arrow.SCHEMA))

    def _keep(self, built: _Segment) -> None:
        kept = sum(one.table.nbytes for one in self._segments)
        if kept + built.table.nbytes > UNSEALED_KEPT_BYTES:
            return
        before = next((one for one in self._segments if one.last == built.first - 1), None)
        if (
            before is not None
            and before.table.num_rows + built.table.num_rows < UNSEALED_CHUNK_ROWS
        ):
            self._segments.remove(before)
            table = pa.concat_tables([before.table, built.table]).combine_chunks()
            built = _Segment(before.first, built.last, table)
        self._segments.append(built)
        self._segments.sort()

    def _see(self, block: Block) -> None:
        self._seen[block.number] = _Seen(block.amplitude_id, block.merges)

    def _look(self, first: int, last: int) -> list[tuple[int, _Seen]]:
        """Return what blocks first … last show, reading those not seen yet."""
        with self._lock:
            unseen = [number for number in range(first, last + 1) if number not in self._seen]
            for run in _runs(unseen):
                for block in self._blocks.read(*run):
                    self._see(block)
            return [(number, self._seen[number]) for number in range(first, last + 1)]

    def merges(self, first: int, last: int) -> list[Any]:
        """Return every merge of blocks first … last."""
        return [merge for _, seen in self._look(first, last) for merge in seen.merges]

    def placed_merges(self, first: int, last: int) -> list[tuple[int, Any]]:
        """Return (block, merge) of every merge of blocks first … last."""
        return [(number, one) for number, seen in self._look(first, last) for one in seen.merges]

    def rows_of(self, people: Sequence[int], first: int, last: int) -> pa.Table:
        """Return the rows of these amplitude_ids in blocks first … last, in order of position."""
        wanted = np.array(people, np.int64)
        places = {}
        for number, seen in self._look(first, last):
            at = np.flatnonzero(np.isin(np.frombuffer(seen.amplitude_id, np.int64), wanted))
            if len(at):
                places[number] = at
        with self._lock:
            segments = list(self._segments)
        tables = []
        for one in segments:
            if any(one.first <= number <= one.last for number in places):
                ids = pa.array(wanted)
                mask = pc.is_in(one.table["amplitude_id"], value_set=ids)
                tables.append(_within(one, first, last, one.table.filter(mask)))
                places = {
                    at: rows for at, rows in places.items() if not one.first <= at <= one.last
                }
        for run in _runs(sorted(places)):
            tables += [_cut(block, places[block.number]) for block in self._blocks.read(*run)]
        return pa.concat_tables(tables) if tables else arrow.SCHEMA.empty_table()


def _within(segment: _Segment, first: int, last: int, table: pa.Table | None = None) -> pa.Table:
    rows = segment.table if table is None else table
    if segment.first >= first and segment.last <= last:
        return rows
    number = rows["block"]
    return rows.filter(pc.and_(pc.greater_equal(number, first), pc.less_equal(number, last)))


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of each run of following numbers."""
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        yield run[0], run[-1]


class _Events(Struct, gc=False):
    events: list[Raw]


_events = msgspec.json.Decoder(_Events).decode


def _cut(block: Block, rows: np.ndarray[Any, Any]) -> pa.Table:
    """Build some rows of a block: a block of those events alone, whose rows then get back their own numbers."""
    kind = np.frombuffer(block.kind, np.uint8)
    rows = rows[kind[rows] != Kind.DROPPED]
    parts, start = [], 0
    for part in block.parts:
        inside = rows[(rows >= start) & (rows < start + part.rows)] - start
        start += part.rows
        if len(inside):
            events = _events(part.body).events
            body = b'{"events":[' + b",".join(events[at] for at in inside.tolist()) + b"]}"
            parts.append(msgspec.structs.replace(part, rows=len(inside), body=body))
    table, index = np.unique(np.frombuffer(block.table, np.int32)[rows], return_inverse=True)
    small = msgspec.structs.replace(
        block,
        parts=parts,
        amplitude_id=_take(block.amplitude_id, np.int64, rows),
        event_time_ms=_take(block.event_time_ms, np.int64, rows),
        created_ms=_take(block.created_ms, np.int64, rows),
        kind=_take(block.kind, np.uint8, rows),
        flags=_take(block.flags, np.uint8, rows),
        keys=b"",
        table=_own(index, table).astype(np.int32).tobytes(),
        tables=[block.tables[at] for at in table.tolist() if at >= 0],
        merges=[],
    )
    built = pa.Table.from_batches([arrow.batch(small)], arrow.SCHEMA)
    numbers = pa.array(rows[built["row"].to_numpy()], pa.int32())
    return built.set_column(arrow.SCHEMA.get_field_index("row"), arrow.SCHEMA.field("row"), numbers)


def _own(index: np.ndarray[Any, Any], table: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Number the kept snapshots from 0; none stays -1."""
    return index - 1 if len(table) and table[0] < 0 else index


def _take(packed: bytes, kind: Any, rows: np.ndarray[Any, Any]) -> bytes:
    taken: bytes = np.frombuffer(packed, kind)[rows].tobytes()
    return taken
