"""What is known of imports beside their rows: that one was opened, its state and generation, and what was not stored.

A SQLite file of its own, so that no write of it holds the lock of the block writer; each call is one transaction,
synced when it returns. An import needs no entry here: one whose rows arrived without it is open, in generation 1.

Duplicates leave no row, so they are counted: from the blocks, exactly. `block` says up to which block that is done;
blocks after it are counted again at the next start, and none of them is deleted before (`engine.imports`).
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from retrofill.hot.sqlite import store_error

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")  # of an import that can be opened

State = Literal["open", "closed", "undoing", "undone", "restoring"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS imports (
    project INTEGER, name TEXT, state TEXT NOT NULL, opened_ms INTEGER, generation INTEGER NOT NULL,
    after INTEGER NOT NULL, until INTEGER NOT NULL, undone_ms INTEGER NOT NULL,
    former TEXT NOT NULL DEFAULT '', purged INTEGER NOT NULL DEFAULT 0, closed INTEGER NOT NULL DEFAULT 0,
    again TEXT NOT NULL DEFAULT '', again_ms INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (project, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counted (
    project INTEGER, name TEXT, duplicates INTEGER NOT NULL, refusals INTEGER NOT NULL, PRIMARY KEY (project, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS aside (
    project INTEGER, name TEXT, generation INTEGER NOT NULL, duplicates INTEGER NOT NULL, refusals INTEGER NOT NULL,
    PRIMARY KEY (project, name, generation)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counted_to (only INTEGER PRIMARY KEY CHECK (only = 1), block INTEGER NOT NULL);
"""

_FIELDS = "name, state, opened_ms, generation, after, until, undone_ms, former, purged, closed, again, again_ms"
# What a file of an earlier version lacks.
_LATER = (
    "former TEXT NOT NULL DEFAULT ''",
    "purged INTEGER NOT NULL DEFAULT 0",
    "closed INTEGER NOT NULL DEFAULT 0",
    "again TEXT NOT NULL DEFAULT ''",
    "again_ms INTEGER NOT NULL DEFAULT 0",
)
_ADD = """
INSERT INTO counted VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET
    duplicates = duplicates + excluded.duplicates, refusals = refusals + excluded.refusals
"""
_FORGET = "DELETE FROM counted WHERE project = ? AND name = ?"


class Import(Struct, frozen=True):
    """One import. opened_ms: None if it never was. generation: counts from 1, one more each time it begins anew.

    after, until: the rows of the generation that is undone (or being undone, or restored) are those of blocks after
    `after` up to `until`; without one both are the last block of the generation before, 0 for the first. former: its
    state before it was being undone or restored. purged: hidden rows up to this block are deleted. closed: not 0
    if it was closed when it was undone, and so will be when it is restored. again: the state of the next generation of
    an undone one, opened at again_ms, while it has no rows: until then what was undone can be restored. Else empty and 0.
    """

    name: str
    state: State = "open"
    opened_ms: int | None = None
    generation: int = 1
    after: int = 0
    until: int = 0
    undone_ms: int = 0
    former: State | Literal[""] = ""
    purged: int = 0
    closed: int = 0
    again: Literal["open", "closed", ""] = ""
    again_ms: int = 0


class Counted(Struct, frozen=True):
    """What an import sent and was not stored. duplicates: events. refusals: requests."""

    duplicates: int = 0
    refusals: int = 0


Counts = dict[tuple[int, str], Counted]
"""By project and name."""


class Imports:
    """The file of imports of one data directory. Any thread. Every method raises StoreError if the disk fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
            known = {name for _, name, *_ in self._db.execute("PRAGMA table_info(imports)")}
            for column in _LATER:
                if column.split()[0] not in known:
                    self._db.execute(f"ALTER TABLE imports ADD COLUMN {column}")
        except sqlite3.Error as problem:
            raise store_error(problem, path) from problem

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def get(self, project: int, name: str) -> Import | None:
        """Return what is known of an import, None for nothing."""
        with self._lock:
            return self._get(project, name)

    def all(self, project: int) -> list[Import]:
        """Return every import of a project that is known here, by name."""
        rows = self._read(
            f"SELECT {_FIELDS} FROM imports WHERE project = ? ORDER BY name",  # noqa: S608 - names of ours
            (project,),
        )
        return [Import(*row) for row in rows]

    def everywhere(self) -> list[tuple[int, Import]]:
        """Return every import that is known here, with its project."""
        rows = self._read(f"SELECT project, {_FIELDS} FROM imports ORDER BY project, name")  # noqa: S608 - names of ours
        return [(project, Import(*row)) for project, *row in rows]

    def put(self, project: int, made: Import) -> None:
        """Store what is known of an import, in place of what was."""
        self.change(project, made.name, lambda _: made)

    def change(
        self, project: int, name: str, make: Callable[[Import | None], Import | None]
    ) -> Import | None:
        """Store what `make` makes of what is known, in one step; return it. None leaves all as it is.

        Raises what `make` raises; nothing is changed then.
        """
        with self._lock:
            made = make(self._get(project, name))
            if made is not None:
                assert made.name == name
                row = (project, *msgspec.structs.astuple(made))
                self._write(
                    [
                        (
                            f"INSERT OR REPLACE INTO imports (project, {_FIELDS}) VALUES ({', '.join('?' * len(row))})",  # noqa: S608 - names of ours
                            [row],
                        )
                    ]
                )
            return made

    def counts(self) -> tuple[int, Counts]:
        """Return the last block whose duplicates are counted, and all counts."""
        found = self._read("SELECT block FROM counted_to")
        rows = self._read("SELECT project, name, duplicates, refusals FROM counted")
        counts = {(project, name): Counted(*both) for project, name, *both in rows}
        return (found[0][0] if found else 0), counts

    def count(self, block: int, more: Mapping[tuple[int, str], Counted]) -> None:
        """Add to the counts; blocks up to `block` are counted then."""
        rows = [(*key, one.duplicates, one.refusals) for key, one in more.items()]
        with self._lock:
            self._write(
                [
                    (_ADD, rows),
                    ("INSERT OR REPLACE INTO counted_to VALUES (1, ?)", [(block,)]),
                ]
            )

    def put_counts_aside(self, project: int, name: str, generation: int, was: Counted) -> None:
        """Count from 0 again for an import whose generation is undone; what it had counted is kept. Said again it is the same."""
        one = (project, name)
        with self._lock:
            self._write(
                [
                    (
                        "INSERT OR IGNORE INTO aside VALUES (?, ?, ?, ?, ?)",
                        [(*one, generation, was.duplicates, was.refusals)],
                    ),
                    (
                        "DELETE FROM aside WHERE project = ? AND name = ? AND generation < ?",
                        [(*one, generation)],
                    ),
                    (_FORGET, [one]),
                ]
            )

    def bring_counts_back(self, project: int, name: str, generation: int) -> None:
        """Let the counts of an import be again what they were when this generation was undone, if that is not done yet."""
        place = (project, name, generation)
        kept = "FROM aside WHERE project = ? AND name = ? AND generation = ?"
        found = self._read(f"SELECT duplicates, refusals {kept}", place)
        if found:
            with self._lock:
                self._write(
                    [
                        (_FORGET, [(project, name)]),
                        (_ADD, [(project, name, *found[0])]),
                        (f"DELETE {kept}", [place]),
                    ]
                )

    def _get(self, project: int, name: str) -> Import | None:
        try:
            row = self._db.execute(
                f"SELECT {_FIELDS} FROM imports WHERE project = ? AND name = ?",  # noqa: S608 - names of ours
                (project, name),
            ).fetchone()
        except sqlite3.Error as problem:
            raise store_error(problem, self._path) from problem
        return Import(*row) if row else None

    def _read(self, sql: str, values: tuple[Any, ...] = ()) -> list[Any]:
        with self._lock:
            try:
                return self._db.execute(sql, values).fetchall()
            except sqlite3.Error as problem:
                raise store_error(problem, self._path) from problem

    def _write(self, steps: Iterable[tuple[str, list[tuple[Any, ...]]]]) -> None:
        """Do some statements in one transaction; the lock is held."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for sql, rows in steps:
                self._db.executemany(sql, rows)
            self._db.execute("COMMIT")
        except sqlite3.Error as problem:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise store_error(problem, self._path) from problem
