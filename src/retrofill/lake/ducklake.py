"""The lake: tables `events`, `merges`, `freed`, `sealed` and `rewritten` of a DuckLake, its catalog a DuckDB file, its rows Parquet files.

One process owns the folder. Whoever writes takes one lock; readers never wait. A file of `events` is adopted together
with the number of its last block (`sealed`) in one transaction, and its bytes and name are on disk before that
transaction commits: a catalog that names a file is enough to read it. The other tables are small and stay inside
the catalog, whose commit DuckDB syncs, so no small file is ever written without our sync. A deletion does write small
files (places of deleted rows): they are synced between the statement and its commit.

Readers pin a snapshot. Snapshots older than the oldest pin are forgotten after each commit, and with them the files
that only they need. A file in the folder that the catalog does not name is what a crash left; opening removes it.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct

from retrofill.core.block import Kind
from retrofill.core.sql import literal
from retrofill.errors import CorruptError, FullError, StoreError
from retrofill.lake import freed
from retrofill.lake.arrow import FREED, MERGES, SCHEMA, MergeRow
from retrofill.lake.catalog import CATALOG, put_in_place
from retrofill.lake.compact import LakeFile
from retrofill.lake.files import Files
from retrofill.lake.parquet import file_name
from retrofill.lake.person import Footers, Part, parts
from retrofill.limits import (
    LAKE_FOOTER_BYTES,
    LAKE_MEMORY_BYTES,
    LAKE_MERGES_INLINE,
    LAKE_MERGES_KEPT,
    LAKE_SPILL_BYTES,
    LAKE_THREADS,
    MS_PER_DAY,
    MS_PER_HOUR,
    MS_PER_S,
)

_TYPES = {
    pa.uint8(): "UTINYINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float64(): "DOUBLE",
    pa.string(): "VARCHAR",
    pa.bool_(): "BOOLEAN",
}
_SEALED = pa.schema([("partition", pa.int32()), ("block", pa.int64())])
# A change of stored history, by the number of its intent, and the last block whose rows it changed.
_REWRITTEN = pa.schema([("intent", pa.int64()), ("block", pa.int64())])
_TABLES = {
    "events": SCHEMA,
    "merges": MERGES,
    "freed": FREED,
    "sealed": _SEALED,
    "rewritten": _REWRITTEN,
}
_LATER = {"freed"}  # made by `keep_freed` where the others are there
# The tables there are, each with how many rows it keeps in the catalog, as text.
_FOUND = f"""
SELECT table_name, value FROM {CATALOG}.ducklake_table LEFT JOIN {CATALOG}.ducklake_metadata
ON scope = 'table' AND scope_id = table_id AND key = 'data_inlining_row_limit'
WHERE end_snapshot IS NULL
"""  # noqa: S608 - a name of ours
_COLUMNS = f"""
SELECT column_name FROM {CATALOG}.ducklake_column JOIN {CATALOG}.ducklake_table USING (table_id)
WHERE table_name = 'events' AND ducklake_table.end_snapshot IS NULL AND ducklake_column.end_snapshot IS NULL
"""  # noqa: S608 - a name of ours
# The first question of a transaction: it reads this snapshot from then on.
_PIN = "SELECT id FROM ducklake_current_snapshot('lake')"
_FETCH_ROWS = 20_000
# What decides whether an event is a duplicate, with its place.
_DEDUPE_COLUMNS = (
    "project",
    "block",
    "row",
    "kind",
    "path",
    "user_id",
    "device_id",
    "event_type",
    "insert_id",
    "event_id",
    "client_event_time",
    "import_id",
)

Steps = list[tuple[int, dict[str, int]]]  # (hour since the epoch, id → rows), oldest first


class _Known(Struct):
    """What was read of a snapshot. It never changes, so who comes next need not ask again."""

    number: int
    sealed: int | None = None
    files: list[LakeFile] | None = None
    merges: dict[int, dict[int, int]] = {}


class Snapshot(Struct, frozen=True):
    """The lake at one moment. cursor: a DuckDB connection inside its transaction, tables `lake.events`, `lake.merges`.

    sealed: the last block that is in this snapshot; everything up to it is.
    """

    cursor: duckdb.DuckDBPyConnection
    sealed: int
    footers: Footers
    known: _Known

    def merges(self, project: int) -> dict[int, int]:
        """Return absorbed → surviving amplitude_id of a project; not to be changed."""
        kept = self.known.merges
        found = kept.get(project)
        if found is None:
            rows = self.cursor.execute(
                "SELECT absorbed, surviving FROM lake.merges WHERE project = ?", [project]
            ).fetchall()
            found = dict(rows)
            if sum(map(len, list(kept.values()))) + len(found) <= LAKE_MERGES_KEPT:
                kept[project] = found
        return found

    def freed(self, project: int) -> pa.Table:
        """Return the rows of table `freed` of a project."""
        found = self.cursor.execute("SELECT * FROM lake.freed WHERE project = ?", [project])
        return found.to_arrow_table()

    def files(self) -> list[LakeFile]:
        """Return the files of table `events`, in order of their blocks."""
        if self.known.files is None:
            self.known.files = _event_files(self.cursor, self.footers)
        return self.known.files

    def parts(
        self, project: int, people: Sequence[int], kinds: Sequence[int], columns: Sequence[str]
    ) -> Iterator[tuple[Part, pa.Table]]:
        """Yield where the rows of these amplitude_ids stand, with some of their columns.

        Raises StoreError if a file cannot be read.
        """
        return parts(self.files(), self.footers, project, people, kinds, columns)


class Lake:
    """One lake folder. Every method may be called from any thread; every one raises StoreError if the disk fails."""

    def __init__(self, folder: Path, files: Files, db: duckdb.DuckDBPyConnection) -> None:
        self.folder = folder
        self.files = files
        self._db = db
        self._writing = threading.RLock()
        self._pinning = threading.RLock()
        self._pins: Counter[int] = Counter()
        self._synced: set[Path] = set()
        self._footers = Footers(LAKE_FOOTER_BYTES)
        self._known = _Known(-1)
        self._freed_in: set[int] | None = None  # projects; None: not known

    @classmethod
    def open(cls, folder: Path, files: Files | None = None) -> Lake:
        """Open the lake in a folder, made if missing; what a crash left there is removed.

        Raises CorruptError for files without a catalog: a new one would name none of them, and all would be removed.
        """
        files = files or Files()
        files.make_folder(folder / "files" / "main" / "events")
        catalog = folder / "catalog.duckdb"
        if not (catalog.exists() and catalog.stat().st_size) and files.list(folder / "files"):
            raise CorruptError(
                "The lake has files, and no catalog that names them",
                where=str(catalog),
                mend="Restore the data directory from a copy: nothing else holds what the catalog says. Its files are left as they are",
            )
        with _told(folder):
            lake = cls(folder, files, _connect(folder))
            lake._make_tables()
            lake._tidy()
            lake._remove_unnamed()
        for made in (folder / "files" / "main", folder / "files", folder, folder.parent):
            files.sync_folder(made)
        return lake

    def close(self) -> None:
        """Close the catalog. No reader may be left."""
        self._db.close()

    # Reading.

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Pin the lake as it is now, for one reader in one thread."""
        cursor = self._db.cursor()
        try:
            with _told(self.folder), self._pinning:
                cursor.execute("BEGIN TRANSACTION READ ONLY")
                number = _one(cursor, _PIN)
                if self._known.number < number:
                    self._known = _Known(number)
                known = self._known if self._known.number == number else _Known(number)
                if known.sealed is None:
                    known.sealed = _one(cursor, 'SELECT max("block") FROM lake.sealed') or 0
                self._pins[number] += 1
            try:
                yield Snapshot(cursor, known.sealed, self._footers, known)
            finally:
                with self._pinning:
                    self._pins[number] -= 1
                    if not self._pins[number]:
                        del self._pins[number]
        finally:
            with contextlib.suppress(duckdb.Error):
                cursor.rollback()
            cursor.close()

    def sealed(self) -> int:
        """Return the number of the last block in the lake, 0 if there is none."""
        with self.snapshot() as snapshot:
            return snapshot.sealed

    def event_files(self) -> list[LakeFile]:
        """Return the files of table `events`, in order of their blocks."""
        with self.snapshot() as snapshot, _told(self.folder):
            return snapshot.files()

    def dedupe_rows(self, first: int, last: int) -> Iterator[pa.RecordBatch]:
        """Yield what decides about duplicates of the events in blocks first … last, in order of position.

        Columns: project, block, row, kind, path, user_id, device_id, event_type, insert_id, event_id,
        client_event_time, import_id.
        """
        columns = ", ".join(f'"{name}"' for name in _DEDUPE_COLUMNS)
        with self.snapshot() as snapshot, _told(self.folder):
            yield from snapshot.cursor.execute(
                f'SELECT {columns} FROM lake.events WHERE "block" BETWEEN ? AND ? '  # noqa: S608 - column names of ours
                f'AND kind <> {int(Kind.UNDONE)} ORDER BY "block", "row"',
                [first, last],
            ).to_arrow_reader(_FETCH_ROWS)

    def blocks(self) -> pa.Table:
        """Return every block with rows in order: `block`, the least and greatest project, `server_upload_time`."""
        with self.snapshot() as snapshot, _told(self.folder):
            return snapshot.cursor.execute(
                'SELECT "block", min(project) AS first, max(project) AS last, '
                "max(server_upload_time) AS server_upload_time "
                'FROM lake.events GROUP BY "block" ORDER BY "block"'
            ).to_arrow_table()

    def quota_rows(self, project: int, now_ms: int) -> tuple[Steps, Steps]:
        """Return the events stored in the last day by hour of server time, of each device and of each user."""
        with self.snapshot() as snapshot, _told(self.folder):
            devices, users = (
                _steps(snapshot.cursor, name, project, now_ms) for name in ("device_id", "user_id")
            )
        return devices, users

    # Writing.

    def new_file(self, first: int, last: int) -> Path:
        """Return the path for a new file of `events` that will hold rows of blocks first … last."""
        return self.events / file_name(first, last)

    @property
    def events(self) -> Path:
        """The folder of the files of `events`."""
        return self.folder / "files" / "main" / "events"

    def adopt(self, file: Path | None, *, block: int, merges: Sequence[MergeRow]) -> None:
        """Take blocks up to `block` into the lake: a file made at `new_file`, on disk already, None if it has no rows."""
        sides = zip(*merges, strict=True) if merges else ()
        rows = [pa.array(side, field.type) for side, field in zip(sides, MERGES, strict=False)]

        def change(cursor: duckdb.DuckDBPyConnection) -> None:
            if file is not None:
                cursor.execute("CALL ducklake_add_data_files('lake', 'events', ?)", [str(file)])
            if rows:
                cursor.register("new_merges", pa.Table.from_arrays(rows, schema=MERGES))
                cursor.execute("INSERT INTO lake.merges SELECT * FROM new_merges")
            cursor.execute("INSERT INTO lake.sealed VALUES (0, ?)", [block])

        if file is not None:
            self._footers.of(file)  # the next reader should not wait for it
        self._commit(change)

    def swap(self, old: Sequence[LakeFile], new: Path | None) -> bool:
        """Put one file, on disk already, in the place of others. False if they changed since they were listed."""
        swapped = False
        footer = self._footers.of(new) if new is not None else None

        def change(cursor: duckdb.DuckDBPyConnection) -> None:
            nonlocal swapped
            now = _event_files(cursor, self._footers)
            swapped = all(file in now for file in old)
            if not swapped:
                return
            if new and footer and put_in_place(cursor, old, new, footer.metadata):
                return
            # Every row of each file goes, so DuckLake drops the files themselves and writes nothing.
            names = [str(file.path) for file in old]
            cursor.execute("DELETE FROM lake.events WHERE filename IN (SELECT unnest(?))", [names])
            if new is not None:
                cursor.execute("CALL ducklake_add_data_files('lake', 'events', ?)", [str(new)])

        self._commit(change)
        return swapped

    def delete(self, project: int, amplitude_ids: Sequence[int]) -> int:
        """Delete every row of some people in one transaction, and what is hidden of them: displaced, or undone.

        Returns how many there were. Hidden rows are found by the ids on the people's rows. What they leave: see `lake.freed`.
        """
        gone = 0

        def change(cursor: duckdb.DuckDBPyConnection) -> None:
            nonlocal gone
            gone = freed.delete(cursor, project, amplitude_ids)

        self._commit(change)
        self._freed_in = None
        return gone

    def freed_in(self, project: int) -> bool:
        """Say whether table `freed` has rows of a project. Whoever asks lets nobody be deleted meanwhile."""
        if self._freed_in is None:
            with self.snapshot() as snapshot, _told(self.folder):
                rows = snapshot.cursor.execute("SELECT DISTINCT project FROM lake.freed").fetchall()
            self._freed_in = {one for (one,) in rows}
        return project in self._freed_in

    def purge(self, project: int, name: str, last: int) -> int:
        """Delete the hidden rows of an import in blocks up to one; return how many there were."""
        gone = 0

        def change(cursor: duckdb.DuckDBPyConnection) -> None:
            nonlocal gone
            gone = cursor.execute(
                'DELETE FROM lake.events WHERE project = ? AND import_id = ? AND "block" <= ? '  # noqa: S608 - a number of ours
                f"AND kind = {int(Kind.UNDONE)}",
                [project, name, last],
            ).fetchall()[0][0]
            cursor.execute(
                'DELETE FROM lake.freed WHERE project = ? AND import_id = ? AND "block" <= ? AND hidden',
                [project, name, last],
            )

        self._commit(change)
        return gone

    def holds_import(self, project: int, name: str, after: int) -> bool:
        """Say whether there are rows of an import in blocks after one that were not undone."""
        with self.snapshot() as snapshot, _told(self.folder):
            return bool(
                snapshot.cursor.execute(
                    'SELECT 1 FROM lake.events WHERE project = ? AND import_id = ? AND "block" > ? '  # noqa: S608 - a number of ours
                    f"AND kind <> {int(Kind.UNDONE)} LIMIT 1",
                    [project, name, after],
                ).fetchall()
            )

    def rewritten(self, intent: int) -> int | None:
        """Return the last block of a change of history that was put in place, None if it was not."""
        with self.snapshot() as snapshot, _told(self.folder):
            found = snapshot.cursor.execute(
                'SELECT "block" FROM lake.rewritten WHERE intent = ?', [intent]
            ).fetchall()
        return found[0][0] if found else None

    def swap_history(self) -> Swap:
        """Begin to put other rows in the place of some."""
        return Swap(self)

    # Mending.

    def rewrite(
        self,
        project: int,
        files: Sequence[Path],
        *,
        places: pa.Table,
        people: Sequence[int],
        merges: Sequence[MergeRow],
    ) -> None:
        """Put files, on disk already, in the place of rows, and merges in that of those of some people, in one transaction.

        places: (block, row) of every row of the files, each of which is one of the project's.
        """
        sides = zip(*merges, strict=True) if merges else ()
        rows = [pa.array(side, field.type) for side, field in zip(sides, MERGES, strict=False)]

        def change(cursor: duckdb.DuckDBPyConnection) -> None:
            cursor.register("places", places)
            cursor.execute(
                'DELETE FROM lake.events WHERE project = ? AND ("block", "row") IN (SELECT ("block", "row") FROM places)',
                [project],
            )
            for file in files:
                cursor.execute("CALL ducklake_add_data_files('lake', 'events', ?)", [str(file)])
            cursor.execute(
                "DELETE FROM lake.merges WHERE project = $1 "
                "AND (absorbed IN (SELECT unnest($2)) OR surviving IN (SELECT unnest($2)))",
                [project, list(people)],
            )
            if rows:
                cursor.register("new_merges", pa.Table.from_arrays(rows, schema=MERGES))
                cursor.execute("INSERT INTO lake.merges SELECT * FROM new_merges")

        self._commit(change)

    def named_files(self) -> list[tuple[Path, Path | None, int]]:
        """Return each file of table `events` as the catalog names it, whole or not: path, delete file, rows.

        Raises StoreError.
        """
        with _told(self.folder):
            rows = self._db.execute(
                f"SELECT path, record_count FROM {CATALOG}.ducklake_data_file WHERE end_snapshot IS NULL"  # noqa: S608 - a name of ours
            ).fetchall()
            listed = self._db.execute(
                "SELECT data_file, delete_file FROM ducklake_list_files('lake', 'events')"
            ).fetchall()
        counts = {Path(path).name: count for path, count in rows}
        return sorted(
            (Path(data), Path(deleted) if deleted else None, counts.get(Path(data).name, 0))
            for data, deleted in listed
        )

    def replaced(self, path: Path, new: Path) -> None:
        """Put a file, on disk already, in the place of a damaged one of table `events`, delete file and all.

        It gets a name of its own, and the catalog changes in one transaction. After a stop before that, the damaged file
        stands where it was; the one that is not named is removed when the lake is opened.
        """
        metadata = pq.read_metadata(new)
        size = new.stat().st_size
        with new.open("rb") as file:
            file.seek(-8, 2)
            footer = int.from_bytes(file.read(4), "little")
        to = path.with_name(f"{path.stem.rpartition('-')[0]}-{secrets.token_hex(4)}.parquet")
        new.rename(to)
        self.files.sync_folder(path.parent)

        def change(cursor: duckdb.DuckDBPyConnection) -> None:
            found = cursor.execute(
                f"SELECT data_file_id, path FROM {CATALOG}.ducklake_data_file WHERE path = $1 OR ends_with(path, '/' || $1)",  # noqa: S608 - a name of ours
                [path.name],
            ).fetchall()
            for number, named in found:
                cursor.execute(
                    f"UPDATE {CATALOG}.ducklake_data_file SET path = ?, record_count = ?, file_size_bytes = ?, "  # noqa: S608 - a name of ours
                    "footer_size = ? WHERE data_file_id = ?",
                    [
                        f"{named.removesuffix(path.name)}{to.name}",
                        metadata.num_rows,
                        size,
                        footer,
                        number,
                    ],
                )
                cursor.execute(
                    f"DELETE FROM {CATALOG}.ducklake_delete_file WHERE data_file_id = ?",  # noqa: S608 - a name of ours
                    [number],
                )

        self._commit(change)

    def history(self, after_ms: int) -> tuple[int, int, list[tuple[int, int]]]:
        """Return the highest amplitude_id, the last server time, and (block, its time) of those after one, in order.

        Of blocks within one second of each other the first: as the checkpoint keeps them.
        """
        with self.snapshot() as snapshot, _told(self.folder):
            highest, last = snapshot.cursor.execute(
                "SELECT coalesce(max(amplitude_id), 0), coalesce(max(server_upload_time), 0) FROM lake.events"
            ).fetchall()[0]
            rows = snapshot.cursor.execute(
                'SELECT "block", max(server_upload_time) AS ms FROM lake.events WHERE server_upload_time > ? '
                'GROUP BY "block" ORDER BY "block"',
                [after_ms],
            ).fetchall()
        times: list[tuple[int, int]] = []
        for block, ms in rows:
            if not times or ms >= times[-1][1] + MS_PER_S:
                times.append((block, ms))
        return highest, last, times

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let no reader begin meanwhile, for a change of the lake that memory must follow at once."""
        # In the order of `_commit`, which tidies under the lock of writers.
        with self._writing, self._pinning:
            yield

    def _commit(self, change: Callable[[duckdb.DuckDBPyConnection], None]) -> None:
        with self._writing, _told(self.folder), contextlib.closing(self._db.cursor()) as cursor:
            cursor.execute("BEGIN TRANSACTION")
            try:
                change(cursor)
                self._sync_written()
                self._end(cursor)
            except BaseException:
                with contextlib.suppress(duckdb.Error):
                    cursor.execute("ROLLBACK")
                raise
            self._tidy()

    def _end(self, cursor: duckdb.DuckDBPyConnection) -> None:
        self.files.committing(self.folder)
        cursor.execute("COMMIT")
        # DuckDB synced its log; the log's name may be new.
        self.files.sync_folder(self.folder)

    def _sync_written(self) -> None:
        """Sync what DuckLake itself wrote for the transaction under way: the places of deleted rows."""
        listed = self.files.list(self._data)
        written = {path for path in listed if path.name.startswith("ducklake-")} - self._synced
        for path in sorted(written):
            self.files.sync_file(path)
        for folder in {path.parent for path in written}:
            self.files.sync_folder(folder)
        self._synced = written | self._synced.intersection(listed)

    def _tidy(self) -> None:
        """Forget snapshots that no reader holds, and remove the files that only they needed."""
        with self._pinning:
            current = _one(self._db, _PIN)
            oldest = min(self._pins, default=current)
        old = self._db.execute(
            "SELECT snapshot_id FROM ducklake_snapshots('lake') WHERE snapshot_id < ?", [oldest]
        ).fetchall()
        if old:
            versions = [number for (number,) in old]
            _one(
                self._db,
                "SELECT count(*) FROM ducklake_expire_snapshots('lake', versions => ?)",
                [versions],
            )
            _one(
                self._db,
                "SELECT count(*) FROM ducklake_cleanup_old_files('lake', cleanup_all => true)",
            )

    # Opening.

    @property
    def _data(self) -> Path:
        return self.folder / "files"

    def _make_tables(self) -> None:
        """Make what is missing of the tables and of their columns, then what is missing of their options."""
        found = dict(self._db.execute(_FOUND).fetchall())
        if found.keys() != _TABLES.keys():
            self._db.execute("BEGIN TRANSACTION")
            for name in _TABLES.keys() - (_LATER if found else ()):
                self._db.execute(_made(name))
            self._db.execute("COMMIT")
        there = {name for (name,) in self._db.execute(_COLUMNS).fetchall()}
        for field in SCHEMA:
            if field.name not in there:  # null in the files of before
                self._db.execute(
                    f'ALTER TABLE lake.events ADD COLUMN "{field.name}" {_TYPES[field.type]}'
                )
        for name, inline in self._db.execute(_FOUND).fetchall():
            if name != "events" and inline != str(LAKE_MERGES_INLINE):
                self._db.execute(_inlined(name))

    @property
    def keeps_freed(self) -> bool:
        """Whether there is a table `freed`: a lake of before has none."""
        return any(name == "freed" for name, _ in self._db.execute(_FOUND).fetchall())

    def keep_freed(self, block: int, free: Mapping[int, Mapping[str, int]]) -> None:
        """Make and fill the table `freed` of a lake that has none. See `lake.freed`."""

        def change(cursor: duckdb.DuckDBPyConnection) -> None:
            cursor.execute(_made("freed"))
            freed.begin(cursor, block, free)

        self._commit(change)
        self._db.execute(_inlined("freed"))  # if a stop comes before, the next opening does it

    def _remove_unnamed(self) -> None:
        """Remove files that the catalog does not name: what a crash left between writing and adopting."""
        named = {
            Path(path).name
            for table in ("data_file", "delete_file", "files_scheduled_for_deletion")
            for (path,) in self._db.execute(
                f"SELECT path FROM {CATALOG}.ducklake_{table}"  # noqa: S608 - table names of ours
            ).fetchall()
        }
        for path in self.files.list(self._data):
            if path.name in named:
                self._synced.add(path)
            else:
                self.files.remove(path)


class Swap:
    """One lake transaction that puts new files in the place of rows, done in steps while readers go on.

    Every method is called by one and the same thread, `close` last; nobody else writes to the lake meanwhile. Raises
    StoreError if the disk fails.
    """

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        lake._writing.acquire()  # noqa: SLF001 - one thing in two parts
        try:
            self._cursor = lake._db.cursor()  # noqa: SLF001
            self._cursor.execute("BEGIN TRANSACTION")
        except BaseException:
            lake._writing.release()  # noqa: SLF001
            raise

    def take_out(self, project: int, places: Path) -> None:
        """Take rows of a project out: those at the (block, row) of a Parquet file, which has some."""
        with _told(self._lake.folder):
            first, last = self._cursor.execute(
                'SELECT min("block"), max("block") FROM read_parquet(?)', [str(places)]
            ).fetchall()[0]
            # The blocks say which files need no look.
            self._cursor.execute(
                'DELETE FROM lake.events WHERE project = ? AND "block" BETWEEN ? AND ? AND ("block", "row") IN '
                '(SELECT ("block", "row") FROM read_parquet(?))',
                [project, first, last, str(places)],
            )

    def put_in(self, files: Sequence[Path]) -> None:
        """Put files in, on disk already."""
        with _told(self._lake.folder):
            for file in files:
                self._lake._footers.of(file)  # noqa: SLF001 - the next reader should not wait for it
                self._cursor.execute(
                    "CALL ducklake_add_data_files('lake', 'events', ?)", [str(file)]
                )

    def merge(self, project: int, *, without: Path | None = None, add: Path | None = None) -> None:
        """Put merges in, rows of a Parquet file, and take those of some people out before, `id` of another."""
        with _told(self._lake.folder):
            if without is not None:
                self._cursor.execute(
                    "DELETE FROM lake.merges WHERE project = $1 AND ("
                    "absorbed IN (SELECT id FROM read_parquet($2)) OR surviving IN (SELECT id FROM read_parquet($2)))",
                    [project, str(without)],
                )
            if add is not None:
                self._cursor.execute(
                    "INSERT INTO lake.merges SELECT * FROM read_parquet(?)", [str(add)]
                )

    def hide(self, project: int, bounds: tuple[str, int, int], *, hidden: bool) -> None:
        """Let what deleted rows of an import took be hidden with its rows, or seen. bounds: as of `Rule`."""
        with _told(self._lake.folder):
            self._cursor.execute(
                "UPDATE lake.freed SET hidden = ? "
                'WHERE project = ? AND import_id = ? AND "block" > ? AND "block" <= ?',
                [hidden, project, *bounds],
            )

    def sync(self) -> None:
        """See that what DuckLake wrote for this until now is on disk."""
        with _told(self._lake.folder):
            self._lake._sync_written()  # noqa: SLF001

    def commit(self, intent: int, *, block: int, then: Callable[[], None]) -> None:
        """End it: blocks up to `block` are in the lake, as this intent has them. then: follows before any reader begins."""
        lake = self._lake
        with _told(lake.folder):
            self._cursor.execute("INSERT INTO lake.rewritten VALUES (?, ?)", [intent, block])
            self._cursor.execute("INSERT INTO lake.sealed VALUES (0, ?)", [block])
            lake._sync_written()  # noqa: SLF001
            with lake._pinning:  # noqa: SLF001
                lake._end(self._cursor)  # noqa: SLF001
                then()

    def close(self) -> None:
        """Let go; what was not committed is undone."""
        lake = self._lake
        try:
            with contextlib.suppress(duckdb.Error):
                self._cursor.execute("ROLLBACK")
            self._cursor.close()
            with _told(lake.folder):
                lake._tidy()  # noqa: SLF001
        finally:
            lake._writing.release()  # noqa: SLF001


def _made(table: str) -> str:
    fields = ", ".join(f'"{field.name}" {_TYPES[field.type]}' for field in _TABLES[table])
    return f"CREATE TABLE IF NOT EXISTS lake.{table} ({fields})"


def _inlined(table: str) -> str:
    return f"CALL lake.set_option('data_inlining_row_limit', {LAKE_MERGES_INLINE}, table_name => '{table}')"


def _connect(folder: Path) -> duckdb.DuckDBPyConnection:
    """Open DuckDB within its bounds, with the extension from our own packages, and attach the catalog."""
    db = duckdb.connect(
        config={
            "memory_limit": f"{LAKE_MEMORY_BYTES}B",
            "threads": LAKE_THREADS,
            "temp_directory": str(folder / "spill"),
            "max_temp_directory_size": f"{LAKE_SPILL_BYTES}B",
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_community_extensions": False,
            "allow_unsigned_extensions": True,
        }
    )
    extension = resources("duckdb_extension_ducklake").joinpath(
        "extensions", f"v{duckdb.__version__}", "ducklake.duckdb_extension"
    )
    # Its 36 MB came with our packages, whose hashes were checked when they were installed. To check DuckDB's signature of
    # them as well takes a tenth of a second of both cores at each start; after it nothing else without one is loaded.
    db.execute(f"LOAD {literal(str(extension))}")
    db.execute("SET allow_unsigned_extensions = false")
    # Paths in the catalog are relative: a folder that was moved or restored elsewhere opens as it is.
    db.execute(
        f"ATTACH {literal(f'ducklake:{folder}/catalog.duckdb')} AS lake "
        f"(DATA_PATH {literal(f'{folder}/files')}, OVERRIDE_DATA_PATH true, DATA_INLINING_ROW_LIMIT 0)"
    )
    return db


def _event_files(cursor: duckdb.DuckDBPyConnection, footers: Footers) -> list[LakeFile]:
    """Return the files of table `events` as the cursor's transaction sees them, in order of their blocks."""
    rows = cursor.execute(
        "SELECT data_file, delete_file FROM ducklake_list_files('lake', 'events')"
    ).fetchall()
    return sorted(
        (_lake_file(Path(data), deleted and Path(deleted), footers) for data, deleted in rows),
        key=lambda file: file.first,
    )


def _lake_file(path: Path, deleted: Path | None, footers: Footers) -> LakeFile:
    first, last, _ = path.stem.split("-")
    return LakeFile(path, footers.of(path).metadata.num_rows, int(first), int(last), deleted)


def _steps(
    cursor: duckdb.DuckDBPyConnection, name: str, project: int, now_ms: int
) -> list[tuple[int, dict[str, int]]]:
    steps: dict[int, dict[str, int]] = {}
    cursor.execute(
        f"SELECT server_upload_time // {MS_PER_HOUR} AS hour, {name}, count(*) FROM lake.events "  # noqa: S608 - names of ours
        f"WHERE project = ? AND kind = {int(Kind.EVENT)} AND server_upload_time > ? AND {name} <> '' "
        "GROUP BY ALL ORDER BY hour",
        [project, now_ms - MS_PER_DAY],
    )
    while rows := cursor.fetchmany(_FETCH_ROWS):
        for hour, one, count in rows:
            steps.setdefault(hour, {})[one] = count
    return list(steps.items())


def _one(cursor: duckdb.DuckDBPyConnection, statement: str, values: Sequence[Any] = ()) -> Any:  # noqa: ANN401 - whatever the statement gives
    # All of it: a statement whose rows are not fetched to the end has not committed.
    return cursor.execute(statement, list(values)).fetchall()[0][0]


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Say in our words what DuckDB could not do."""
    try:
        yield
    except duckdb.Error as problem:
        text = str(problem)
        if "No space left" in text:
            raise FullError(
                "No room is left on the device",
                where=str(folder),
                mend="Free some space; nothing that was acknowledged is lost",
            ) from problem
        raise StoreError(
            f"The lake failed: {text}",
            where=str(folder),
            mend="Mend the disk and start the server again; it recovers by itself",
        ) from problem
