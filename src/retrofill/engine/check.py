"""Whether what is stored is what its history says: every file is read whole, then all of it is folded again.

First, with the directory locked and nothing opened: the structure of the SQLite files, the checksum of every block,
every page of every lake file, every key file. What is damaged there is told, and nothing is folded: damaged rows would
say nothing about the rest. Only a damaged key file does not stop it, for a start makes it again from the lake.

Then the engine opens the directory as a server would, so blocks are sealed and the checkpoint is written, and the
visible rows of each project are folded in order of position as at their first time, or in event time where its
properties go by that (`core.refold`). Every row must be
what the fold decides, each state what it ends in, each merge one that it made, each row's keys must be held, and each key must be a row's.
Quotas and the figures of imports are counted from rows at each start and are stored nowhere.

People who were deleted left no rows, so some things cannot be known: whose the keys are that no row holds; and in their
project properties of groups, which they may have changed, and who was held apart from one of them. Keys and such differences are then only counted, as `unknown`.
Which devices they had taken the lake says (`engine.freed`).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct

from retrofill.clock import Clock
from retrofill.config import Settings
from retrofill.core import order, person
from retrofill.core.block import COLUMNS, Flag, Kind
from retrofill.core.fold import Changes
from retrofill.core.person import FORGOTTEN, Person
from retrofill.core.refold import Refold
from retrofill.engine import surplus
from retrofill.engine.changed import write
from retrofill.engine.deletion import Deletions
from retrofill.engine.freed import Freeing
from retrofill.engine.ingest import Engine
from retrofill.engine.refold import KEY_COLUMNS, Decided, merge_row, same, with_column
from retrofill.engine.seal import Sealer
from retrofill.errors import CorruptError, InputError, StoreError
from retrofill.hot import sqlite
from retrofill.hot.checkpoint import Checkpoint
from retrofill.hot.directory import Directory
from retrofill.hot.keys import KeyFile
from retrofill.lake import Lake, parquet
from retrofill.lake.arrow import FREED, JSON_COLUMNS, SCHEMA, MergeRow
from retrofill.lake.freed import TOOK
from retrofill.limits import CHECK_SHOWN_MAX, CHECK_TEXT_CHARS, REFOLD_ROWS

_KINDS = f"{int(Kind.EVENT)}, {int(Kind.IDENTIFY)}, {int(Kind.GROUP_IDENTIFY)}"
_MERGED = ("absorbed", "surviving", "event_time", "server_upload_time")
_sorted_json = msgspec.json.Encoder(order="sorted").encode


class Difference(Struct, frozen=True):
    """One thing that is not what it must be. project: 0 for a file. stored, refolded: JSON, cut when it is long.

    where: a file, `person 100000000001`, `device ID`, `user ID`, `alias ID`, `group TYPE/VALUE` or the position
    `row BLOCK:ROW`. field: of that, for example `properties.plan` or `checksum`.
    """

    project: int
    where: str
    field: str
    stored: str
    refolded: str

    def line(self) -> str:
        """Return it as one line of text."""
        project = f"project {self.project} · " if self.project else ""
        return (
            f"{project}{self.where} · {self.field}: stored {self.stored}, refolded {self.refolded}"
        )


class Report(Struct):
    """What was looked at and found. differences: the first CHECK_SHOWN_MAX of `count`.

    refolded: false if files were too damaged for it. unknown: differences that deleted people may account for.
    sound: files can be opened. lost: one of them is damaged that nothing else could make again.
    """

    differences: list[Difference] = []
    count: int = 0
    unknown: int = 0
    refolded: bool = False
    blocks: int = 0
    lake_files: int = 0
    key_files: int = 0
    rows: int = 0
    people: int = 0
    merges: int = 0
    sound: bool = True
    lost: bool = False

    def differs(
        self, project: int, where: str, field: str, stored: object, refolded: object
    ) -> None:
        """Count a difference, and name it while there is room. The values are shown as JSON; None is nothing."""
        self.count += 1
        if len(self.differences) < CHECK_SHOWN_MAX:
            self.differences.append(
                Difference(project, where, field, _text(stored), _text(refolded))
            )

    def compares(
        self, project: int, where: str, stored: Mapping[str, Any], refolded: Mapping[str, Any]
    ) -> None:
        """Tell which of some fields differ; one whose values are objects, key by key."""
        for field in sorted({*stored, *refolded}):
            old, new = stored.get(field), refolded.get(field)
            if old == new and _sorted_json(old) == _sorted_json(new):
                continue
            if isinstance(old, dict) and isinstance(new, dict):
                self.compares(
                    project,
                    where,
                    {f"{field}.{key}": value for key, value in old.items()},
                    {f"{field}.{key}": value for key, value in new.items()},
                )
            elif _sorted_json(old) != _sorted_json(new):
                self.differs(project, where, field, old, new)


class Mends(Struct):
    """What would make a project equal to its rows: rows as the fold decides them, keys not held, merges, values.

    rows: in new files that the lake does not name yet, with their places. merges: all there must be, None if they are
    right; people: everyone whom a stored or a new one names. keys: rows whose keys no key file holds.
    """

    files: list[Path] = []
    places: list[pa.Table] = []
    keys: list[pa.Table] = []
    merges: list[MergeRow] | None = None
    people: set[int] = set()
    changes: Changes = msgspec.field(default_factory=lambda: Changes({}, {}, {}, {}, {}))


def check(data: Path, clock: Clock, *, sealer: Callable[[Path, Lake], Sealer] = Sealer) -> Report:
    """Compare what a data directory holds with what its rows say. Nobody else may use it meanwhile.

    The people, ids and groups of one project at a time are held in memory; rows go through it.
    Raises InputError if there is no such directory, BusyError if it is in use, StoreError if the disk fails.
    """
    need(data)
    report = Report()
    directory = Directory(data)
    try:
        files(directory, report)
    finally:
        directory.close()
    if report.sound:
        asyncio.run(_refold(Settings(data=data, limits="none"), clock, sealer, report))
    return report


def need(data: Path) -> None:
    """Raise InputError if there is no such data directory."""
    # Any of them: one that is gone from a directory is told as such.
    if not any((data / name).exists() for name in ("hot.sqlite", "checkpoint.sqlite", "lake")):
        raise InputError(
            "There is no data directory",
            where=str(data),
            mend="Give the one of `serve` with --data",
        )


# Files.


def files(directory: Directory, report: Report) -> None:
    """Read every file whole, and say of the report whether they are sound enough to be opened."""
    if directory.repairing.exists():
        report.differs(0, directory.repairing.name, "repair", "cut off", "ended")
    again = (directory.checkpoint, directory.imports)  # can be made again
    for path in (directory.blocks, *again, directory.intents, directory.deletions):
        if (
            not path.exists() and path != directory.deletions
        ):  # which a server makes, not the engine
            report.differs(0, path.name, "file", None, "there")
            report.lost |= path not in again
        for fault in sqlite.faults(path) if path.exists() else ():
            report.differs(0, path.name, "structure", fault, "ok")
            report.lost |= path not in again
    if not report.lost:
        _blocks(directory, report)
        _lake(directory, report)
    report.sound = not report.count
    for path in sorted(directory.keys.glob("keys-*.bin")):
        report.key_files += 1
        try:
            KeyFile(path)
        except CorruptError as problem:
            report.differs(0, f"key file {path.name}", "checksum", problem.what, "ok")


def _blocks(directory: Directory, report: Report) -> None:
    with closing(sqlite.Blocks(directory.blocks)) as blocks:
        for number, _ in blocks.numbers():
            report.blocks += 1
            try:
                for _ in blocks.read(number, number):
                    pass
            except CorruptError as problem:
                report.differs(0, f"block {number}", "checksum", problem.what, "ok")


def _lake(directory: Directory, report: Report) -> None:
    try:
        with closing(Lake.open(directory.lake)) as lake:
            listed = lake.named_files()
            sealed = lake.sealed()
    except StoreError as problem:
        report.differs(0, "lake catalog", "structure", problem.what, "ok")
        report.lost = True
        return
    held = _held(directory)
    if sealed + 1 < held:  # as opening says: to fold what is left would take the rest for surplus
        report.differs(0, "lake", "blocks", f"up to {sealed}", f"up to {held - 1}")
        report.lost = True
    report.lake_files = len(listed)
    for data, deleted, _ in listed:
        for path in filter(None, (data, deleted)):
            try:
                parquet.verify(path)
            except StoreError as problem:
                report.differs(0, f"lake file {path.name}", "bytes", problem.what, "ok")
                report.lost |= path is deleted


def _held(directory: Directory) -> int:
    """Return the first block that is not in the lake alone, as far as can be read."""
    with closing(sqlite.Blocks(directory.blocks)) as blocks:
        numbers = blocks.numbers()
    if numbers:
        return numbers[0][0]
    if not directory.checkpoint.exists() or sqlite.faults(directory.checkpoint):
        return 0
    with closing(Checkpoint(directory.checkpoint)) as checkpoint:
        return checkpoint.meta().block + 1


# History.


async def _refold(
    settings: Settings, clock: Clock, sealer: Callable[[Path, Lake], Sealer], report: Report
) -> None:
    try:
        engine = Engine.open(settings, clock=clock, sealer=sealer)
    except CorruptError as problem:
        report.differs(0, "blocks after the checkpoint", "state", problem.what, "ok")
        return
    await refold(engine, clock, report, None)


Mend = Callable[[Engine, int, Mends], None]


async def refold(engine: Engine, clock: Clock, report: Report, mend: Mend | None) -> None:
    """Compare each project of an engine just opened, and close it. mend: called after each, in a thread."""
    data = engine.lake.folder.parent
    deletions = Deletions(data / "deletions.sqlite", clock, days=lambda _: 0)
    checkpoint = None
    deleted = False
    try:
        await engine.start()
        await engine.rewriting.ended()  # what a crash cut off goes on beside
        await engine.seal()
        for project in engine.all_projects():
            await engine.event_time.settle(project.number)
        await engine.checkpoint()
        checkpoint = Checkpoint(data / "checkpoint.sqlite")
        for project in engine.all_projects():
            one = _Project(
                engine, checkpoint, project.number, clock, report, deletions.traces(project.number)
            )
            one.mending = mend is not None
            await asyncio.to_thread(one.run)
            deleted |= one.deleted
            if mend is not None:
                await asyncio.to_thread(mend, engine, project.number, one.mends)
                await engine.checkpoint()
        await asyncio.to_thread(_surplus, engine, report, unknown=deleted, mending=mend is not None)
        report.refolded = True
    finally:
        if checkpoint is not None:
            checkpoint.close()
        deletions.close()
        await engine.close()


def _surplus(engine: Engine, report: Report, *, unknown: bool, mending: bool) -> None:
    """Tell dedupe keys that belong to no row. unknown: they may be those of deleted people, and stay."""
    for (project, day), one in surplus.found(engine, drop=mending and not unknown):
        if unknown:
            report.unknown += one.count
            continue
        stored = {"keys": one.count, "such_as": one.examples}
        report.differs(project, f"dedupe keys of {day or 'a day unknown'}", "row", stored, None)
        report.count += one.count - 1


class _Project:
    """The comparison of one project. traces: see `Deletions.traces`."""

    def __init__(
        self,
        engine: Engine,
        checkpoint: Checkpoint,
        project: int,
        clock: Clock,
        report: Report,
        traces: tuple[bool, bool],
    ) -> None:
        self._engine = engine
        self._checkpoint = checkpoint
        self._number = project
        self._report = report
        self._limits = engine.limits(project)
        self._oldest_block = engine.state.oldest_block(
            clock.now_ms() - self._limits.dedupe_window_ms
        )
        self._people = self._stored_people()
        self._forgotten = {one for one, who in self._people.items() if who.merged_into == FORGOTTEN}
        erased, self._due = traces
        self.deleted = erased or self._due or self._is_pointed_at()
        # Ids for people whose own is taken by somebody else: a difference, and nobody will keep them.
        fresh = itertools.count(engine.state.fresh).__next__
        self._by_time = engine.settings(project).property_time == "event"
        self._refold = Refold(
            project,
            fresh,
            by_time=self._by_time,
            barred=engine.state.project(project).barred,
        )
        self.mends = Mends()
        self.mending = False

    def run(self) -> None:
        """Fold the project's rows and compare them, then the state that they end in."""
        columns = ", ".join(f'"{name}"' for name in SCHEMA.names)
        with self._engine.lake.snapshot() as snapshot:
            ask = snapshot.cursor.execute
            self._aliases(
                ask(
                    "SELECT user_id, sent FROM lake.events "
                    f'WHERE project = $1 AND kind = {int(Kind.ALIAS)} ORDER BY "block", "row"',
                    [self._number],
                ).to_arrow_reader(REFOLD_ROWS)
            )
            self._freed = Freeing(self._taken(ask), by_time=self._by_time)
            by = order.SQL if self._by_time else '"block", "row"'
            reader = ask(
                f"SELECT {columns} FROM lake.events "
                f"WHERE project = $1 AND kind IN ({_KINDS}) ORDER BY {by}",
                [self._number],
            ).to_arrow_reader(REFOLD_ROWS)
            for rows in map(_table, reader) if self._by_time else _whole_blocks(reader):
                self._rows(rows)
            for one in self._freed.rest():
                self._refold.free(one)
            merged = ", ".join(_MERGED)
            merges = snapshot.cursor.execute(
                f'SELECT "block", "row", {merged} FROM lake.merges WHERE project = $1',
                [self._number],
            ).fetchall()
        self._merges({(block, row): values for block, row, *values in merges})
        self._states(self._refold.changes(Changes({}, {}, {}, {}, {})))
        self._report.people += len(self._people)

    def _taken(self, ask: Callable[..., Any]) -> pa.Table:
        """Return where deleted people had taken a device, those too whose rows go with the next look of a server."""
        names = ", ".join(f'"{name}"' for name in FREED.names[:-1])
        rows = (
            f"SELECT {names}, false FROM lake.events WHERE project = $1 AND kind IN ({_KINDS}) "
            f"AND amplitude_id IN (SELECT unnest($2)) AND {TOOK}"
        )
        found = ask(
            f"SELECT * FROM lake.freed WHERE project = $1 AND NOT hidden UNION ALL {rows}",
            [self._number, list(self._forgotten) if self._due else []],
        )
        return found.to_arrow_table()

    def _stored_people(self) -> dict[int, Person]:
        found = {}
        for one, blob in self._checkpoint.every_person(self._number):
            try:
                found[one] = person.decode(blob)
            except (msgspec.MsgspecError, UnicodeDecodeError) as problem:
                self._differs(f"person {one}", "person", str(problem), None)
        return found

    def _is_pointed_at(self) -> bool:
        """Say whether an id names a forgotten person: those whom an undo left nothing of are named by none."""
        return any(
            one in self._forgotten
            for table in ("devices", "users")
            for _, one in self._checkpoint.every_id(table, self._number)
        )

    def _differs(self, where: str, field: str, stored: object, refolded: object) -> None:
        self._report.differs(self._number, where, field, stored, refolded)

    # Rows.

    def _rows(self, rows: pa.Table) -> None:
        if self._due:  # forgotten already, and their rows go with the next look of a server
            gone = pa.array(list(self._forgotten), pa.int64())
            rows = rows.filter(pc.invert(pc.is_in(rows["amplitude_id"], gone)))
        rows = rows.combine_chunks()
        if not rows.num_rows:
            return
        self._report.rows += rows.num_rows
        self._fold(rows)
        lost = set(
            self._engine.duplicates.unheld(rows, self._limits, oldest_block=self._oldest_block)
        )
        for block, row in sorted(lost):
            self._differs(f"row {block}:{row}", "dedupe key", None, "held")
        if lost and self.mending:
            places = zip(rows["block"].to_pylist(), rows["row"].to_pylist(), strict=True)
            unheld = pa.array([place in lost for place in places], pa.bool_())
            self.mends.keys.append(rows.select(KEY_COLUMNS).filter(unheld))

    def _fold(self, rows: pa.Table) -> None:
        decided = Decided(self._refold, rows, np.zeros(rows.num_rows, bool), self._freed)
        places = np.flatnonzero(decided.differs)
        if not len(places):
            return
        before = self._report.count
        rows, fresh = rows.take(pa.array(places)), decided.columns(places)
        wrong = np.zeros(rows.num_rows, bool)
        for name, new in fresh.items():
            old = rows[name].combine_chunks()
            for at in np.flatnonzero(~same(old, new)).tolist():
                count = self._report.count
                self._row(rows, at, name, old[at].as_py(), new[at].as_py())
                wrong[at] |= self._report.count > count
        if self.mending and self._report.count > before:
            right = rows
            for name, new in fresh.items():
                if not (name == "group_properties" and self.deleted):
                    right = with_column(right, name, new)
            right = right.filter(pa.array(wrong))
            self.mends.files.append(write(self._engine.lake.events, right))
            self.mends.places.append(right.select(["block", "row"]))

    def _row(self, rows: pa.Table, at: int, name: str, old: Any, new: Any) -> None:
        if self.deleted and (
            name == "group_properties" or (name == "flags" and old ^ new == Flag.HELD)
        ):
            self._report.unknown += 1
            return
        where = f"row {rows['block'][at]}:{rows['row'][at]}"
        if name in JSON_COLUMNS:
            old, new = _parsed(old), _parsed(new)
        self._report.compares(self._number, where, {name: old}, {name: new})

    def _aliases(self, reader: pa.RecordBatchReader) -> None:
        for user, sent in (pair.values() for rows in reader for pair in rows.to_pylist()):
            said = msgspec.json.decode(sent or "{}")
            if said.get("unmap"):
                self._refold.aliases.pop(user, None)
            else:
                self._refold.aliases[user] = said.get("global_user_id", "")

    # What the rows end in.

    def _merges(self, stored: dict[tuple[int, int], list[int]]) -> None:
        if self._due:
            stored = {
                at: merge for at, merge in stored.items() if self._forgotten.isdisjoint(merge[:2])
            }
        made = {
            (one.block, one.row): [
                one.absorbed,
                one.surviving,
                one.event_time_ms,
                one.server_upload_ms,
            ]
            for one in self._refold.merges
        }
        self._report.merges += len(made)
        for block, row in sorted({*stored, *made}):
            old, new = stored.get((block, row)), made.get((block, row))
            if old != new:
                self.mends.merges = self._all_merges()
                self.mends.people.update(*(one[:2] for one in (*stored.values(), *made.values())))
                self._differs(
                    f"row {block}:{row}",
                    "merge",
                    old and dict(zip(_MERGED, old, strict=True)),
                    new and dict(zip(_MERGED, new, strict=True)),
                )

    def _all_merges(self) -> list[MergeRow]:
        return [merge_row(self._number, one) for one in self._refold.merges]

    def _states(self, made: Changes) -> None:
        mend = self.mends.changes
        mend.last = made.last  # not compared: a checkpoint begun anew has none
        for table, ids in (("devices", made.devices), ("users", made.users)):
            self._ids(table, ids)
        for one in sorted({*self._people, *made.people}):
            old, new = self._people.get(one), made.people.get(one)
            if old is not None and old.merged_into == FORGOTTEN and new is None:
                continue
            count = self._report.count
            self._report.compares(self._number, f"person {one}", _fields(old), _fields(new))
            if self._report.count > count:
                mend.people[one] = new or Person(one, merged_into=FORGOTTEN)
        groups = {key: value for key, value in made.groups.items() if value}
        for key, text in self._checkpoint.every_group(self._number):
            self._group(key, _group_properties(text), groups.pop(key, None))
        for key, value in groups.items():
            self._group(key, None, value)
        stored, said = self._engine.aliases(self._number), self._refold.aliases
        for user in sorted({*stored, *said}):
            if stored.get(user) == said.get(user):
                continue
            if self.deleted and user not in said:
                self._report.unknown += 1
            else:
                mend.aliases[user] = said.get(user, "")
                self._differs(f"alias {user}", "global_user_id", stored.get(user), said.get(user))

    def _ids(self, table: str, made: dict[str, int]) -> None:
        mend: dict[str, int] = getattr(self.mends.changes, table)
        for one, old in self._checkpoint.every_id(table, self._number):
            new = made.pop(one, 0)
            if new != (0 if old in self._forgotten else old):
                mend[one] = new
                self._differs(f"{table[:-1]} {one}", "amplitude_id", old or None, new or None)
        for one, new in made.items():
            if new:
                mend[one] = new
                self._differs(f"{table[:-1]} {one}", "amplitude_id", None, new)

    def _group(self, key: tuple[str, str], old: object, new: dict[str, Any] | None) -> None:
        if self.deleted:
            self._report.unknown += _sorted_json(old) != _sorted_json(new)
            return
        count = self._report.count
        self._report.compares(
            self._number, "group " + "/".join(key), {"properties": old}, {"properties": new}
        )
        if self._report.count > count:
            self.mends.changes.groups[key] = new or {}


def _table(rows: pa.RecordBatch) -> pa.Table:
    return pa.Table.from_batches([rows])


def _whole_blocks(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """Yield rows some thousands at a time, those of one block together."""
    held: list[pa.Table] = []
    for batch in reader:
        rows = pa.Table.from_batches([batch])
        if not rows.num_rows:
            continue
        blocks = rows["block"].to_numpy()
        cut = int(np.searchsorted(blocks, blocks[-1]))
        if cut:
            yield pa.concat_tables([*held, rows.slice(0, cut)])
            held = []
        elif held and held[-1]["block"][-1].as_py() != blocks[0]:
            yield pa.concat_tables(held)
            held = []
        held.append(rows.slice(cut))
    if held:
        yield pa.concat_tables(held)


def _fields(one: Person | None) -> dict[str, Any]:
    if one is None:
        return {"person": None}
    return {
        "person": one.amplitude_id,
        "user_id": one.user_id,
        "properties": one.properties,
        "groups": one.groups,
        "first_seen": one.first_seen_ms,
        "updated": one.updated_ms,
        "updates": one.updates,
        "merged_into": one.merged_into,
        "joined": one.joined,
        **dict(zip(COLUMNS, one.columns, strict=True)),
    }


def _group_properties(text: bytes) -> object:
    """Return them, None if there are none; of damaged ones say so."""
    try:
        return _parsed(text) or None
    except (msgspec.MsgspecError, UnicodeDecodeError) as problem:
        return str(problem)


def _parsed(text: Any) -> Any:
    return None if text is None else msgspec.json.decode(text)


def _text(value: object) -> str:
    text = "nothing" if value is None else msgspec.json.encode(value).decode(errors="replace")
    return text if len(text) <= CHECK_TEXT_CHARS else text[: CHECK_TEXT_CHARS - 1] + "…"
