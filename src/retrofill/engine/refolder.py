"""A change of stored history in a child process: from the closure to files, keys and values, pass by pass.

The server owns the lake's catalog, the hot store and memory; it pins a snapshot and names its files, and the child
reads those. One child does one change, in this order:

- `Begin`: find the closure in a pinned snapshot, everybody's ids up to its last block.
- `Pass`, the first over everything, then over what was sealed since: fold the closure's rows of those blocks, write
  those that come out otherwise as new lake files. Who joined the closure by a row since is taken in: until then the change did not touch them,
  so their earlier rows stay as they are and are folded only for the state they end in.
- `Rekey`: write the key files anew, beside the old ones. Keys that change later are of blocks that no key file holds.
- `Export`: what the fold has changed since the last export, as files for the server to read.
- `Tail`: fold blocks that are in the hot store only, as many as fit, and write one lake file of all their rows,
  everybody's. What a seal would write of these blocks is wrong already when it is made; so the two are one.

In event time the first pass is in order. A row of a later pass or a tail may belong before some that were folded: it
marks whom it touches, as on arrival, and the export tells the marks.

Of a pass it holds some thousand rows at a time, and of tails one, whatever has come since the snapshot.

Everything it writes is a file that nobody names yet. A child that dies leaves nothing to mend: another begins anew.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from msgspec import Struct

from retrofill import glibc
from retrofill.core import dedupe, order, person
from retrofill.core.block import Block, Kind
from retrofill.core.fold import Changes, Group
from retrofill.core.person import FORGOTTEN, Person
from retrofill.core.refold import Refold
from retrofill.engine.changed import DECIDED, Changed, write
from retrofill.engine.child import Child, serve
from retrofill.engine.closure import Closure, Members
from retrofill.engine.freed import Freeing, seen_under
from retrofill.engine.refold import FOLDED, KEY_COLUMNS, Folding, Keys, Rule, Seed, merge_row
from retrofill.errors import CorruptError, FullError, StoreError
from retrofill.hot import keys as key_files
from retrofill.hot.keys import KeyFile
from retrofill.hot.sqlite import read_blocks
from retrofill.lake import arrow
from retrofill.lake.arrival import Wanted, in_arrival, of_import, positions
from retrofill.lake.arrow import FREED, MERGES, SCHEMA
from retrofill.lake.compact import LakeFile
from retrofill.lake.files import Files
from retrofill.lake.history import COLUMNS, History, told
from retrofill.limits import REFOLD_ROWS, REFOLD_TAIL_BYTES, Limits

_NICE = (
    0  # traffic rests for it, and at 5 what that leaves went to others where the machine is full
)
_CHILD = "from retrofill.engine import refolder; refolder.main()"
_SEEN = f"{int(Kind.EVENT)}, {int(Kind.IDENTIFY)}, {int(Kind.GROUP_IDENTIFY)}"
_HIDDEN = f"{int(Kind.DISPLACED)}, {int(Kind.UNDONE)}"
# What the fold looks at, and what it decides. Event properties say whether there is revenue
# in a row that was never folded, and are read for those alone.
_FOLDED = [name for name in SCHEMA.names if name in {"project", *KEY_COLUMNS, *DECIDED, *FOLDED}]
_DISPLACED = (
    f"kind = {int(Kind.DISPLACED)} AND (device_id IN (SELECT id FROM closure_devices) "
    "OR user_id IN (SELECT id FROM closure_users))"
)
_CONTESTED = (
    "(insert_id IN (SELECT insert_id FROM contested WHERE insert_id IS NOT NULL) OR (insert_id IS NULL "
    "AND (device_id, event_id) IN (SELECT device_id, event_id FROM contested WHERE event_id IS NOT NULL)))"
)
# Of what makes two rows the same event, its device left out where it has an insert_id.
_HASH = (
    "CASE WHEN insert_id IS NOT NULL THEN hash(insert_id) "
    "WHEN event_id IS NOT NULL AND device_id IS NOT NULL THEN hash(device_id, event_id) END"
)
_ARRIVAL = '"block", "row"'
_MINE = 'import_id = $2 AND "block" > $3 AND "block" <= $4'
EVERY_BLOCK = 2**62
_ERRORS = {kind.__name__: kind for kind in (StoreError, FullError, CorruptError)}


class Sources(Struct, frozen=True):
    """A pinned snapshot: the files of `events`, and a Parquet file of the project's merges (absorbed, surviving).

    freed: of the first one, a Parquet file of the project's rows of table `freed`, if there are any.
    """

    files: list[LakeFile]
    merges: Path
    freed: Path | None = None


class Begin(Struct, frozen=True, tag="begin"):
    """Find the closure. events: the folder for lake files. scratch: a folder for all else, gone at the end.

    quota_after_ms: rows stored after this time are counted by the hour, where what becomes of them differs.
    settled: see `Laid`.
    """

    project: int
    seed: Seed
    rule: Rule
    limits: Limits
    sources: Sources
    events: Path
    scratch: Path
    quota_after_ms: int
    settled: int


class Pass(Struct, frozen=True, tag="pass"):
    """Fold the closure's rows of blocks after `after` up to `until`. ids: amplitude_ids that nobody has, first and last."""

    sources: Sources
    after: int
    until: int
    ids: tuple[int, int]


class Tail(Struct, frozen=True, tag="tail"):
    """Fold blocks first … last of a hot store, which are not in the lake, and write all their rows.

    Large ones only up to REFOLD_TAIL_BYTES. ids: as of a `Pass`.
    """

    blocks: Path
    first: int
    last: int
    ids: tuple[int, int]


class Export(Struct, frozen=True, tag="export"):
    """Write what has changed since the last export."""


class Rekey(Struct, frozen=True, tag="rekey"):
    """Write key files anew, each beside the old one with another ending."""

    folder: Path
    files: list[Path]
    ending: str


class Done(Struct, frozen=True, tag="done"):
    """What a task did. nodes: people and ids of the closure, no more than so many people can come of it.

    files: lake files. places: of a pass, Parquet files of the (block, row) of their rows, see `Changed.outgoing`. changes, people, merges: what `Export` wrote; a tail gives the merges of everyone else. keys, returned:
    the files of `Rekey`, and a Parquet file of the keys that came back. rows: of the closure, folded. last, seen: the
    last block of a tail, and how many rows there are in its blocks, everybody's.
    """

    nodes: int = 0
    last: int = 0
    seen: int = 0
    ids_left: int = 0
    rows: int = 0
    files: list[Path] = []
    places: list[Path] = []
    changes: Path | None = None
    people: Path | None = None
    merges: Path | None = None
    keys: list[Path] = []
    returned: Path | None = None


class Failed(Struct, frozen=True, tag="failed"):
    """The task could not be done."""

    error: str
    what: str
    where: str = ""
    mend: str = ""


Counts = list[tuple[int, str, int]]
"""(hour since the epoch, id, rows)."""


class Laid(Struct):
    """What memory must take, as it lies in a file. people: encoded. gone, added: of blocks in no key file.

    stored_devices, stored_users: by how much the events differ that count for the daily quota.
    settled: marks of late events that blocks up to this one made are done with; late: marks that the fold made.
    """

    devices: dict[str, int]
    users: dict[str, int]
    people: list[bytes]
    groups: list[tuple[str, str, dict[str, Any]]]
    last: list[tuple[order.Place, order.Key]]
    gone: list[tuple[int, bytes]]
    added: list[tuple[int, bytes, bytes]]
    stored_devices: Counts = []
    stored_users: Counts = []
    settled: int = EVERY_BLOCK
    late: list[order.Place] = []


def _path(kind: type, value: object) -> Any:
    return kind(value)


Task = Begin | Pass | Tail | Export | Rekey
_task = msgspec.json.Decoder(Task, dec_hook=_path).decode
_answer = msgspec.json.Decoder(Done | Failed, dec_hook=_path).decode
_encode = msgspec.json.Encoder(enc_hook=str).encode
_lay = msgspec.msgpack.Encoder().encode
_laid = msgspec.msgpack.Decoder(Laid).decode


def read_changes(path: Path) -> tuple[Changes, Laid]:
    """Read what an export wrote: values of state, and the rest, which keeps no people."""
    laid = _laid(path.read_bytes())
    people = {one.amplitude_id: one for one in map(person.decode, laid.people)}
    laid.people.clear()
    groups = {(kind, value): properties for kind, value, properties in laid.groups}
    last, late = dict(laid.last), set(laid.late)
    return Changes(laid.devices, laid.users, people, groups, {}, last, late), laid


class Refolder(Protocol):
    """Does the tasks of one change."""

    async def ask(self, task: Task) -> Done:
        """Do a task. Raises StoreError, FullError, CorruptError."""

    async def interrupt(self) -> None:
        """Have the task under way fail soon, if that can be."""

    async def stop(self) -> None:
        """Let go of everything."""


class ChildRefolder:
    """In a child process."""

    def __init__(self) -> None:
        self._child = Child(_CHILD, _NICE, {})

    async def ask(self, task: Task) -> Done:
        """Do a task. Raises StoreError, FullError, CorruptError."""
        line = await self._child.exchange(_encode(task))
        if not line:
            raise StoreError(
                "The process that folds history again died",
                mend="See whether the machine has memory left; the next start of the server ends it",
            )
        answer: Done | Failed = _answer(line)
        if isinstance(answer, Failed):
            raise _ERRORS[answer.error](answer.what, where=answer.where, mend=answer.mend)
        return answer

    async def interrupt(self) -> None:
        """End the child: whoever waits for it is told that it died."""
        await self._child.stop()

    async def stop(self) -> None:
        """End the child."""
        await self._child.stop()


class ThreadRefolder:
    """In a thread of this process: for a change that commits wait for, it begins sooner than a child."""

    def __init__(self) -> None:
        self._session = Session()

    async def ask(self, task: Task) -> Done:
        """Do a task. Raises StoreError, FullError, CorruptError."""
        return await asyncio.to_thread(self._session.do, task)

    async def interrupt(self) -> None:
        """Let the task end: a thread cannot be stopped."""

    async def stop(self) -> None:
        """Close what was opened."""
        await asyncio.to_thread(self._session.close)


# In the child.


def main() -> None:
    """Do the tasks of one change until standard input ends."""
    session = Session()

    def answer(line: bytes) -> bytes:
        task = _task(line)
        done = _tried(session, task)
        if not isinstance(task, Tail):  # of these the next one wants as much at once
            pa.default_memory_pool().release_unused()
            glibc.trim()
        return _encode(done)

    serve(answer)


def _tried(session: Session, task: Task) -> Done | Failed:
    try:
        return session.do(task)
    except StoreError as problem:
        return Failed(type(problem).__name__, problem.what, problem.where, problem.mend)
    except Exception as problem:  # noqa: BLE001 - whatever it is, the server must hear of it
        return Failed(
            CorruptError.__name__,
            f"Folding history again failed: {type(problem).__name__}: {problem}",
            "",
            "This is a mistake in the program: keep the data directory and report it",
        )


class _Ids:
    """Amplitude_ids that nobody ever had, as the server set them aside."""

    def __init__(self) -> None:
        self._ranges: deque[tuple[int, int]] = deque()

    def add(self, first: int, last: int) -> None:
        if first <= last:
            self._ranges.append((first, last))

    def draw(self) -> int:
        if not self._ranges:
            raise StoreError("More people come of a change of history than were foreseen")
        first, last = self._ranges.popleft()
        if first < last:
            self._ranges.appendleft((first + 1, last))
        return first

    @property
    def left(self) -> int:
        return sum(last - first + 1 for first, last in self._ranges)


class Session:
    """One change of history, from `Begin` to its last `Tail`."""

    def __init__(self) -> None:
        self._ids = _Ids()
        self._opened: History | None = None
        self._count = 0
        self._told = False
        self._until = 0
        self._groups: set[Group] = set()  # whose properties the change touches
        self._tails: list[LakeFile] = []
        self._shown: pa.Table | None = None  # hashes of the rows that are shown again

    def do(self, task: Task) -> Done:
        """Do a task. Raises StoreError, FullError, CorruptError, and what is a mistake in it."""
        if isinstance(task, Begin):
            self._begun = task
        with told(self._begun.scratch):
            match task:
                case Begin():
                    return self._begin(task)
                case Pass():
                    return self._pass(task)
                case Tail():
                    return self._tail(task)
                case Rekey():
                    return self._rekey(task)
                case Export():
                    return self._export()

    def close(self) -> None:
        """Close what was opened."""
        if self._opened is not None:
            self._opened.close()

    # The closure.

    def _begin(self, task: Begin) -> Done:
        self._project = task.project
        self._mine = [task.project, *task.rule.bounds]
        self._history = self._opened = History(task.scratch / "spill")
        self._use(task.sources)
        ask = self._history.ask
        links = ask(
            "SELECT DISTINCT amplitude_id, device_id, user_id FROM events WHERE project = $1 AND "
            f"(kind IN ({_SEEN}, {int(Kind.DISPLACED)}) OR (kind = {int(Kind.UNDONE)} AND {_MINE}))",
            self._mine,
        ).to_arrow_table()
        merges = ask("SELECT absorbed, surviving FROM read_parquet($1)", [str(task.sources.merges)])
        closure = self._closure = Closure(links, merges.to_arrow_table())
        # No more come: nobody is deleted while history changes.
        kept = task.sources.freed
        freed = pq.read_table(kept) if kept is not None else FREED.empty_table()
        self._freed = seen_under(freed, task.rule.bounds, shown=task.rule.show is not None)
        seeds, people = links.slice(0, 0), np.array(sorted(task.seed.people), np.int64)
        if task.seed.rows is not None:
            seeds = self._seeds(freed)
        self._groups.update((kind, value) for kind, value in task.seed.groups)
        if self._groups:
            people = np.union1d(people, self._showing())
        self._taking = self._insert_ids()
        if len(self._taking):
            seeds = pa.concat_tables([seeds, self._repeating()])
        self._members = closure.begin(seeds, people, whole=task.seed.whole)
        refold = Refold(
            task.project,
            self._ids.draw,
            by_time=task.rule.by_time,
            barred=frozenset(task.rule.barred),
        )
        self._folding = Folding(
            task.rule,
            refold,
            task.limits,
            quota_after_ms=task.quota_after_ms,
        )
        self._named = self._members
        return Done(nodes=self._members.count)

    def _use(self, sources: Sources) -> None:
        self._sources = self._history.use(sources.files)

    def _seeds(self, freed: pa.Table) -> pa.Table:
        """Return the ids of the change's own rows, of deleted ones the device; hear of the groups that they change."""
        ask, where = self._history.ask, f"project = $1 AND {_MINE}"
        ids = ask(
            f"SELECT DISTINCT amplitude_id, device_id, user_id FROM events WHERE {where}",
            self._mine,
        ).to_arrow_table()
        changed = ask(
            f"SELECT DISTINCT sent_groups FROM events WHERE {where} AND event_type = '$groupidentify'",
            self._mine,
        ).fetchall()
        self._groups = {group for (sent,) in changed if sent for group in _groups(sent)}
        mine = freed.filter(pa.array(of_import(freed, *self._begun.rule.bounds)))
        nobody = {
            "amplitude_id": np.zeros(mine.num_rows, np.int64),
            "user_id": pa.nulls(mine.num_rows),
        }
        taken = pa.table({**nobody, "device_id": mine["device_id"]}).select(ids.column_names)
        return pa.concat_tables([ids, taken.cast(ids.schema)])

    def _showing(self) -> np.ndarray[Any, Any]:
        """Return the people with a row that shows a group whose properties change."""
        ask = self._history.ask
        texts = ask(
            "SELECT DISTINCT groups FROM events WHERE project = $1 AND groups IS NOT NULL",
            [self._project],
        ).fetchall()
        wanted = self._shown_in(texts)
        found = ask(
            "SELECT DISTINCT amplitude_id FROM events WHERE project = $1 AND amplitude_id > 0 "
            "AND groups IN (SELECT unnest($2))",
            [self._project, wanted],
        ).to_arrow_table()
        return np.asarray(found["amplitude_id"].to_numpy())

    def _shown_in(self, texts: list[Any]) -> list[str]:
        """Return those of a column of group texts that name a group whose properties change."""
        return [text for (text,) in texts if not self._groups.isdisjoint(_groups(text))]

    def _insert_ids(self) -> pa.Array:
        """Return the insert_ids of the change's rows whose keys count on other devices too."""
        name, after, until = self._begun.rule.bounds
        every = self._begun.limits.dedupe_scope == "project"
        found = self._history.ask(
            f"SELECT DISTINCT insert_id FROM events WHERE project = $1 AND {_MINE} AND insert_id <> '' "
            "AND ($5 OR event_type = '$groupidentify')",
            [self._project, name, after, until, every],
        ).to_arrow_table()
        return found["insert_id"].combine_chunks()

    def _repeating(self) -> pa.Table:
        """Return the ids of rows that repeat one of the change's on another device, or are repeated by it."""
        self._history.register("taking", pa.table({"id": self._taking}))
        return self._history.ask(
            "SELECT DISTINCT amplitude_id, device_id, user_id FROM events "
            f"WHERE project = $1 AND kind IN ({_SEEN}, {int(Kind.DISPLACED)}) "
            "AND insert_id IN (SELECT id FROM taking)",
            [self._project],
        ).to_arrow_table()

    def _join(self, source: str, values: list[Any]) -> None:
        """Hear of rows that came since; take in whoever joins the closure by them, with their history.

        source: these rows, as what stands after FROM, with a WHERE and the values of that.
        """
        ask, at = self._history.ask, len(values)
        mine = f'coalesce(import_id = ${at + 1} AND "block" > ${at + 2} AND "block" <= ${at + 3}, false)'
        bounded = [*values, *self._begun.rule.bounds]
        changed = f"SELECT DISTINCT sent_groups FROM {source} AND event_type = '$groupidentify'"
        for (sent,) in ask(f"{changed} AND {mine} AND sent_groups IS NOT NULL", bounded).fetchall():
            self._groups.update(_groups(sent))
        seeds = [mine]
        if self._groups:
            texts = f"SELECT DISTINCT groups FROM {source} AND groups IS NOT NULL"
            showing = self._shown_in(ask(texts, values).fetchall())
            self._history.register("showing", pa.table({"id": pa.array(showing, pa.string())}))
            seeds.append("coalesce(groups IN (SELECT id FROM showing), false)")
        if len(self._taking):
            seeds.append("coalesce(insert_id IN (SELECT id FROM taking), false)")
        if self._begun.seed.whole:
            seeds.append("true")
        links = ask(
            f"SELECT amplitude_id, device_id, user_id, bool_or({' OR '.join(seeds)}) AS seed "
            f"FROM {source} GROUP BY ALL",
            bounded,
        ).to_arrow_table()
        known, new = self._closure.join(links, links["seed"].to_numpy(zero_copy_only=False))
        if known.count:
            self._take_in(known)
        self._members = self._members + known + new
        self._named = self._named + known + new

    def _take_in(self, known: Members) -> None:
        """Fold the rows so far of people whom the change did not touch until now."""
        self._register(known)
        self._folding.people = np.union1d(self._folding.people, known.people)
        if self._tails:  # seldom: DuckDB opens each of these files to name them
            self._history.use(self._tails, "tails")
        by_time = self._begun.rule.by_time
        theirs = " UNION ALL ".join(
            f'SELECT {COLUMNS} FROM {source} WHERE project = $1 AND "block" <= $2 AND kind IN ({_SEEN}) '
            "AND amplitude_id IN (SELECT id FROM closure_ids)"
            for source in (("events", "tails") if self._tails else ("events",))
        )
        found = self._history.ask(
            f"SELECT * FROM ({theirs}) ORDER BY {order.SQL if by_time else _ARRIVAL}",
            [self._project, self._until],
        ).to_arrow_reader(REFOLD_ROWS)
        freed = Freeing(self._freed, known.devices, by_time=by_time)
        for rows in _tables(found) if by_time else _whole_blocks(_tables(found)):
            self._folding.know(rows, freed)
        self._free(freed)

    def _free(self, freed: Freeing) -> None:
        for one in freed.rest():
            self._folding.refold.free(one)

    def _register(self, members: Members) -> None:
        for name, ids in (
            ("ids", pa.array(members.people, pa.int64())),
            ("devices", members.devices),
            ("users", members.users),
        ):
            self._history.register(f"closure_{name}", pa.table({"id": ids}))

    # Passes.

    def _pass(self, task: Pass) -> Done:
        self._ids.add(*task.ids)
        self._use(task.sources)
        ask = self._history.ask
        between = [self._project, task.after, task.until]
        if task.after:
            self._join(
                'events WHERE project = $1 AND "block" > $2 AND "block" <= $3 '
                f"AND kind IN ({_SEEN}, {int(Kind.DISPLACED)})",
                between,
            )
        folding = self._folding
        folding.people = np.sort(self._members.people)
        self._register(self._members)
        where = 'project = $1 AND "block" > $2 AND "block" <= $3'
        keys = ", ".join(f'"{name}"' for name in KEY_COLUMNS)
        contested = ask(
            f"SELECT {keys} FROM events WHERE {where} AND {_DISPLACED}", between
        ).to_arrow_table()
        folding.contest(contested)
        if self._begun.rule.show is not None:
            folding.contest(self._taken(keys, between))
        if self._begun.rule.by_time:
            read = self._in_time(between)
        else:
            wanted = Wanted(
                self._project,
                task.after,
                task.until,
                folding.people,
                np.sort(positions(contested)),
                self._begun.rule.bounds,
            )
            read = _whole_blocks(
                in_arrival(
                    *(self._sources, wanted, _FOLDED, self._begun.scratch),
                    of_hidden=["event_properties"],
                )
            )
        before = folding.rows
        changed = Changed(self._begun.scratch)
        if not task.after:  # what was deleted lies before whatever comes from now on
            folding.freed = Freeing(
                self._freed, self._members.devices, by_time=self._begun.rule.by_time
            )
        for rows in read:
            changed.add(folding.fold(rows).changed())
        self._free(folding.freed)
        folding.judged()
        if not task.after:
            # In order: only events with one key were in doubt, and their hash has decided.
            folding.refold.late.clear()
        files = changed.write(self._sources, self._begun.events)
        self._until = task.until
        return Done(
            nodes=self._members.count,
            ids_left=self._ids.left,
            rows=folding.rows - before,
            files=files,
            places=[self._written("places", some) for some in changed.outgoing()],
        )

    def _in_time(self, between: list[int]) -> Iterator[pa.Table]:
        """Yield the same rows in event time."""
        where = 'project = $1 AND "block" > $2 AND "block" <= $3'
        chosen = (
            f"FROM events WHERE {where} AND ("
            f"(kind IN ({_SEEN}) AND amplitude_id IN (SELECT id FROM closure_ids)) "
            f"OR kind = {int(Kind.GROUP_IDENTIFY)} OR ({_DISPLACED}) "
            f'OR (kind = {int(Kind.UNDONE)} AND import_id = $4 AND "block" > $5 AND "block" <= $6)) '
        )
        ask, folding = self._history.ask, self._folding
        values = [*between, *self._begun.rule.bounds]
        contested = folding.contested
        if contested.num_rows:
            self._history.register("contested", contested)
            judged = f"{chosen} AND {_CONTESTED} ORDER BY {_ARRIVAL}"
            folding.judge(ask(f"SELECT {COLUMNS} {judged}", values).to_arrow_table())
        names = ", ".join(f'"{name}"' for name in _FOLDED)
        unfolded = self._begun.rule.show is not None or contested.num_rows
        said = f"CASE WHEN kind IN ({_HIDDEN}) THEN event_properties END" if unfolded else "NULL"
        found = f"{names}, file, place, {said}::VARCHAR AS event_properties"
        reader = ask(f"SELECT {found} {chosen} ORDER BY {order.SQL}", values)
        yield from _tables(reader.to_arrow_reader(REFOLD_ROWS))

    def _taken(self, keys: str, between: list[Any]) -> pa.Table:
        """Return the rows that may have taken the key of one that is shown again, while it was hidden.

        A hash table of a million texts takes 180 MB. So they are looked for by hashes, and few or none are left to look at.
        """
        ask = self._history.ask
        mine = 'import_id = $2 AND "block" > $3 AND "block" <= $4'
        shown = f"FROM events WHERE project = $1 AND kind = {int(Kind.UNDONE)} AND {mine}"
        if self._shown is None:
            self._shown = ask(f"SELECT {_HASH} AS hash {shown}", self._mine).to_arrow_table()
        self._history.register("shown", self._shown)
        likely = ask(
            f'SELECT {keys} FROM (SELECT {keys}, {_HASH} AS hash FROM events WHERE project = $1 AND "block" > $2 '
            f'AND "block" <= $3 AND kind IN ({_SEEN})) SEMI JOIN shown USING (hash)',
            between,
        ).to_arrow_table()
        if not likely.num_rows:  # as good as always
            return likely
        self._history.register("likely", likely)
        return ask(
            f"SELECT {keys} FROM likely WHERE insert_id IN (SELECT insert_id {shown} "
            "AND insert_id IN (SELECT insert_id FROM likely)) OR (insert_id IS NULL AND (device_id, event_id) IN "
            f"(SELECT (device_id, event_id) {shown} AND insert_id IS NULL AND (device_id, event_id) IN "
            "(SELECT (device_id, event_id) FROM likely WHERE insert_id IS NULL)))",
            self._mine,
        ).to_arrow_table()

    def _tail(self, task: Tail) -> Done:
        self._ids.add(*task.ids)
        blocks = _fitting(task)
        last = blocks[-1].number
        every = arrow.table(blocks)
        here = pc.equal(every["project"], self._project)
        rows = every.filter(here)
        folding = self._folding
        self._history.register("coming", rows)
        self._join("coming WHERE kind <> $1", [int(Kind.ALIAS)])
        folding.people = np.sort(self._members.people)
        chosen = self._chosen(rows)
        some = rows.filter(pa.array(chosen))
        displaced = pc.equal(some["kind"], int(Kind.DISPLACED))
        contested = some.filter(displaced)
        if self._begun.rule.show:  # others may have taken the key of a row that is shown again
            seen = some.filter(pc.invert(displaced))
            contested = pa.concat_tables([contested, folding.repeats(seen)])
        folding.contest(contested)
        kept = [every.filter(pc.invert(here)), rows.filter(pa.array(~chosen))]
        kept += [folding.fold(piece).all() for piece in _pieces(some)]
        self._until = last
        written = pa.concat_tables(kept)
        files = [write(self._begun.events, written)] if written.num_rows else []
        self._tails += [LakeFile(path, written.num_rows, task.first, last) for path in files]
        people = set(self._members.people.tolist())
        merges = [
            row
            for row in arrow.merges(blocks)
            if row[0] != self._project or (row[1] not in people and row[2] not in people)
        ]
        return Done(
            nodes=self._members.count,
            ids_left=self._ids.left,
            last=last,
            seen=sum(block.rows for block in blocks),
            rows=some.num_rows,
            files=files,
            merges=self._written("merges", _merge_table(merges)) if merges else None,
        )

    def _chosen(self, rows: pa.Table) -> np.ndarray[Any, Any]:
        members = self._members
        inside = pc.or_(
            pc.is_in(rows["amplitude_id"], value_set=pa.array(members.people, pa.int64())),
            pc.or_(
                pc.is_in(rows["device_id"], value_set=members.devices, skip_nulls=True),
                pc.is_in(rows["user_id"], value_set=members.users, skip_nulls=True),
            ),
        )
        chosen = pc.or_(inside, pc.equal(rows["kind"], int(Kind.GROUP_IDENTIFY)))
        alias = pc.equal(rows["kind"], int(Kind.ALIAS))
        return np.asarray(pc.and_not(chosen, alias))

    # What comes of it.

    def _export(self) -> Done:
        named, folding = self._named, self._folding
        self._named = Members(named.people[:0], named.devices.slice(0, 0), named.users.slice(0, 0))
        changes = folding.refold.changes(
            Changes(
                dict.fromkeys(named.devices.to_pylist(), 0),
                dict.fromkeys(named.users.to_pylist(), 0),
                {one: Person(one) for one in named.people.tolist()},
                {group: {} for group in self._groups},
                {},
            )
        )
        for device, one in folding.refold.freed.items():
            if one.owner and changes.devices.get(device) == 0:  # as the deletion left it
                changes.devices[device] = one.owner
                changes.people[one.owner] = Person(one.owner, merged_into=FORGOTTEN)
                if self._begun.rule.by_time:
                    key = (one.event_time_ms, order.LAST_ID, "")
                    changes.last[one.owner] = max(key, changes.last.get(one.owner, key))
        devices, users = folding.stored.told()
        laid = Laid(
            changes.devices,
            changes.users,
            [person.encode(one) for one in changes.people.values()],
            [(kind, value, held) for (kind, value), held in changes.groups.items()],
            list(changes.last.items()),
            *self._recent_keys(),
            stored_devices=devices,
            stored_users=users,
            settled=self._begun.settled,
            late=list(changes.late),
        )
        self._count += 1
        path = self._begun.scratch / f"changes-{self._count}.msgpack"
        path.write_bytes(_lay(laid))
        files = Files()
        files.sync_file(path)
        files.sync_folder(path.parent)
        # Their merges are told anew. Of whom was told before, only what came since is told.
        theirs = named.people.tolist()
        theirs += [] if self._told else changes.people
        self._told = True
        people = pa.table({"id": pa.array(sorted(set(theirs)), pa.int64())})
        merged = folding.refold.merges
        merges = [merge_row(self._project, one) for one in merged]
        merged.clear()
        return Done(
            changes=path,
            people=self._written("people", people),
            merges=self._written("merges", _merge_table(merges)) if merges else None,
            rows=folding.rows,
        )

    def _recent_keys(self) -> tuple[list[tuple[int, bytes]], list[tuple[int, bytes, bytes]]]:
        """Return the keys that changed since the last time, by block, once no key file can hold them."""
        folding = self._folding
        gone, added = folding.gone, folding.added
        folding.gone, folding.added = Keys([], [], [], []), Keys([], [], [], [])
        blocks = _joined(gone.blocks)
        packed = _packed(gone)
        lost = [(int(blocks[at]), packed[16 * at : 16 * at + 16]) for at in range(len(blocks))]
        blocks, packed = _joined(added.blocks), _packed(added)
        marks = 2 * _joined(added.forever) + _joined(added.imported)
        won = [
            (int(blocks[at]), packed[16 * at : 16 * at + 16], bytes([int(marks[at])]))
            for at in range(len(blocks))
        ]
        return lost, won

    def _rekey(self, task: Rekey) -> Done:
        """Write key files without the keys that are gone, and with those that came back."""
        folding = self._folding
        gone, added = folding.gone, folding.added
        folding.gone, folding.added = Keys([], [], [], []), Keys([], [], [], [])
        files = (
            task.files if gone.blocks or added.blocks else []
        )  # each is read whole to see that it is sound
        written = key_files.rewritten(
            task.folder,
            [KeyFile(path) for path in files],
            _packed(gone),
            _joined(gone.blocks),
            _packed(added),
            _joined(added.blocks),
            forever=_joined(added.forever).astype(bool),
            imported=_joined(added.imported).astype(bool),
            ending=task.ending,
        )
        keys = dedupe.table_of(_packed(added))
        returned = pa.table(
            {
                "high": keys[:, 0],
                "low": keys[:, 1],
                "block": _joined(added.blocks),
                "forever": _joined(added.forever).astype(bool),
            }
        )
        return Done(keys=written, returned=self._written("returned", returned))

    def _written(self, name: str, rows: pa.Table) -> Path:
        self._count += 1
        path = self._begun.scratch / f"{name}-{self._count}.parquet"
        pq.write_table(rows, path)
        return path


def _fitting(task: Tail) -> list[Block]:
    """Read the blocks of a tail, the first ones if all together are too large. Raises CorruptError, StoreError."""
    blocks: list[Block] = []
    left_bytes = REFOLD_TAIL_BYTES
    for block in read_blocks(task.blocks, task.first, task.last):
        if block.number != task.first + len(blocks):
            break
        blocks.append(block)
        left_bytes -= block.wide_bytes
        if left_bytes < 0:
            return blocks
    if len(blocks) != task.last - task.first + 1:
        raise CorruptError(
            f"Blocks {task.first:,} to {task.last:,} are not whole", where=str(task.blocks)
        )
    return blocks


def _packed(keys: Keys) -> bytes:
    return b"".join(keys.packed)


def _joined(parts: list[Any]) -> np.ndarray[Any, Any]:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _merge_table(rows: list[Any]) -> pa.Table:
    sides = zip(*rows, strict=True)
    arrays = [pa.array(side, field.type) for side, field in zip(sides, MERGES, strict=True)]
    return pa.Table.from_arrays(arrays, schema=MERGES)


def _groups(text: str) -> Iterator[Group]:
    for group_type, value in msgspec.json.decode(text).items():
        for one in value if isinstance(value, list) else [value]:
            yield group_type, one


def _pieces(rows: pa.Table) -> Iterator[pa.Table]:
    """Yield a table some thousand rows at a time, blocks whole."""
    yield from _whole_blocks(_tables(rows.to_batches(max_chunksize=REFOLD_ROWS)))


def _tables(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    for batch in batches:
        yield pa.Table.from_batches([batch])


def _whole_blocks(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield rows so that no block is cut; a block is at most some thousand rows."""
    left: pa.Table | None = None
    for part in parts:
        rows = part
        if left is not None:
            rows = pa.concat_tables([left, rows])
        if not rows.num_rows:
            continue
        block = rows["block"].to_numpy()
        cut = int(np.searchsorted(block, block[-1]))
        left = rows.slice(cut)
        if cut:
            yield rows.slice(0, cut)
    if left is not None and left.num_rows:
        yield left
