"""The checkpoint: state exactly as of one block, in a SQLite file of its own.

`save` writes what changed since the last one in a single transaction, so the file always holds the state after one
block, the `block` of its meta row. Whoever reads it adds the blocks after that by folding them again. It has its own
file so that this long transaction never holds the lock of the block writer.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from retrofill.core import person
from retrofill.core.order import Key, Place
from retrofill.core.person import Person
from retrofill.hot.sqlite import store_error

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (
    only INTEGER PRIMARY KEY CHECK (only = 1), block INTEGER NOT NULL, server_upload_ms INTEGER NOT NULL, fresh INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS devices (project INTEGER, id TEXT, amplitude_id INTEGER, PRIMARY KEY (project, id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS users (project INTEGER, id TEXT, amplitude_id INTEGER, PRIMARY KEY (project, id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS people (amplitude_id INTEGER PRIMARY KEY, project INTEGER NOT NULL, person BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS groups (project INTEGER, type TEXT, value TEXT, properties BLOB, PRIMARY KEY (project, type, value)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS aliases (project INTEGER, user_id TEXT, global_user_id TEXT, PRIMARY KEY (project, user_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS last (project INTEGER, place, event_time INTEGER, event_id INTEGER, insert_id TEXT, PRIMARY KEY (project, place)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS late (project INTEGER, place, block INTEGER, PRIMARY KEY (project, place)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS block_times (block INTEGER PRIMARY KEY, server_upload_ms INTEGER NOT NULL);
"""

# Before the first person. Real amplitude_ids have twelve digits or more. Source: contract, identity 2.
FIRST_AMPLITUDE_ID = 100_000_000_001


class Meta(Struct, frozen=True):
    """What the checkpoint stands for: the state after `block`, its time, and the next unused amplitude_id."""

    block: int = 0
    server_upload_ms: int = 0
    fresh: int = FIRST_AMPLITUDE_ID


class Changed(Struct):
    """New values of one project since the last checkpoint, by key. An alias of "" is taken back.

    last: keys in event time. late: everything that a late event has marked, with the block, None if that is as it was.
    """

    devices: dict[str, int]
    users: dict[str, int]
    people: dict[int, Person]
    groups: dict[tuple[str, str], dict[str, Any]]
    aliases: dict[str, str]
    last: dict[Place, Key] = {}
    late: dict[Place, int] | None = None


_group_place = msgspec.json.Decoder(tuple[str, str, str]).decode


def _stored(place: Place) -> int | str:
    """A place as it stands in a column: an amplitude_id as it is, a group as JSON."""
    return place if isinstance(place, int) else msgspec.json.encode(place).decode()


def _place(stored: int | str) -> Place:
    return stored if isinstance(stored, int) else _group_place(stored)


class Checkpoint:
    """The checkpoint file. `save` may run in another thread while the loads go on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = self._connect()
            self._reader.execute("PRAGMA journal_mode=WAL")
            self._reader.executescript(_SCHEMA)
            self._writer = self._connect()
        except sqlite3.Error as problem:
            raise store_error(problem, path) from problem

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    def pinned(self) -> Checkpoint:
        """Return the file as it is now, whatever is saved later, on connections of its own. For one reader; close it."""
        try:
            twin = Checkpoint(self.path)
            twin._reader.execute("BEGIN")
            twin.meta()  # the first read pins
        except sqlite3.Error as problem:
            raise store_error(problem, self.path) from problem
        return twin

    def meta(self) -> Meta:
        """Return what the file stands for; an empty one stands for the state before block 1."""
        row = self._reader.execute("SELECT block, server_upload_ms, fresh FROM meta").fetchone()
        return Meta(*row) if row else Meta()

    def ids(self, table: str, project: int, ids: Iterable[str]) -> dict[str, int]:
        """Return id → amplitude_id of the ids known. table: `devices` or `users`."""
        assert table in ("devices", "users")
        return dict(
            self._reader.execute(
                f"SELECT {table}.id, amplitude_id FROM json_each(?) CROSS JOIN {table} ON project = ? AND {table}.id = value",  # noqa: S608 - one of two words
                (json.dumps(list(ids)), project),
            )
        )

    def people(self, amplitude_ids: Iterable[int]) -> dict[int, Person]:
        """Return the people known among these."""
        return {
            amplitude_id: person.decode(blob)
            for amplitude_id, blob in self._reader.execute(
                "SELECT amplitude_id, person FROM json_each(?) CROSS JOIN people ON amplitude_id = value",
                (json.dumps(list(amplitude_ids)),),
            )
        }

    def groups(
        self, project: int, keys: Iterable[tuple[str, str]]
    ) -> dict[tuple[str, str], dict[str, Any]]:
        """Return the properties of the groups known among these (type, value)."""
        found = {}
        for group_type, value in keys:
            row = self._reader.execute(
                "SELECT properties FROM groups WHERE project = ? AND type = ? AND value = ?",
                (project, group_type, value),
            ).fetchone()
            if row:
                found[group_type, value] = msgspec.json.decode(row[0])
        return found

    def aliases(self, project: int) -> dict[str, str]:
        """Return user_id → global_user_id of a project."""
        return dict(
            self._reader.execute(
                "SELECT user_id, global_user_id FROM aliases WHERE project = ?", (project,)
            )
        )

    def last(self, project: int, places: Iterable[Place]) -> dict[Place, Key]:
        """Return the keys kept with these people and groups."""
        return {
            _place(place): tuple(key)
            for place, *key in self._reader.execute(
                "SELECT place, event_time, event_id, insert_id FROM json_each(?) "
                "CROSS JOIN last ON project = ? AND place = value",
                (json.dumps([_stored(place) for place in places]), project),
            )
        }

    def late(self, project: int) -> dict[Place, int]:
        """Return the people and groups that a late event has marked, each with the block that did."""
        return {
            _place(place): block
            for place, block in self._reader.execute(
                "SELECT place, block FROM late WHERE project = ?", (project,)
            )
        }

    def every_id(self, table: str, project: int) -> Iterator[tuple[str, int]]:
        """Yield every (id, amplitude_id) of a project. table: `devices` or `users`."""
        assert table in ("devices", "users")
        yield from self._reader.execute(
            f"SELECT id, amplitude_id FROM {table} WHERE project = ?",  # noqa: S608 - one of two words
            (project,),
        )

    def every_person(self, project: int) -> Iterator[tuple[int, bytes]]:
        """Yield every person of a project as saved: (amplitude_id, see `person.decode`)."""
        yield from self._reader.execute(
            "SELECT amplitude_id, person FROM people WHERE project = ? ORDER BY amplitude_id",
            (project,),
        )

    def every_group(self, project: int) -> Iterator[tuple[tuple[str, str], bytes]]:
        """Yield every group of a project: ((type, value), JSON of its properties)."""
        for group_type, value, text in self._reader.execute(
            "SELECT type, value, properties FROM groups WHERE project = ? ORDER BY type, value",
            (project,),
        ):
            yield (group_type, value), text

    def block_times(self) -> list[tuple[int, int]]:
        """Return (block, server_upload_ms) in order, at most one a second."""
        return list(
            self._reader.execute("SELECT block, server_upload_ms FROM block_times ORDER BY block")
        )

    def save(
        self,
        meta: Meta,
        changed: dict[int, Changed],
        *,
        block_times: Iterable[tuple[int, int]],
        times_after_ms: int,
    ) -> None:
        """Bring the file to `meta`, whole or not at all. Block times before `times_after_ms` go. Raises StoreError."""
        write = self._writer
        try:
            write.execute("BEGIN IMMEDIATE")
            for project, new in changed.items():
                for table, ids in (("devices", new.devices), ("users", new.users)):
                    write.executemany(
                        f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)",  # noqa: S608 - one of two words
                        ((project, key, value) for key, value in sorted(ids.items())),
                    )
                write.executemany(
                    "INSERT OR REPLACE INTO people VALUES (?, ?, ?)",
                    (
                        (amplitude_id, project, person.encode(new.people[amplitude_id]))
                        for amplitude_id in sorted(new.people)
                    ),
                )
                write.executemany(
                    "INSERT OR REPLACE INTO groups VALUES (?, ?, ?, ?)",
                    (
                        (project, *key, msgspec.json.encode(value))
                        for key, value in new.groups.items()
                    ),
                )
                write.executemany(
                    "INSERT OR REPLACE INTO aliases VALUES (?, ?, ?)",
                    ((project, user, to) for user, to in new.aliases.items() if to),
                )
                write.executemany(
                    "DELETE FROM aliases WHERE project = ? AND user_id = ?",
                    ((project, user) for user, to in new.aliases.items() if not to),
                )
                write.executemany(
                    "INSERT OR REPLACE INTO last VALUES (?, ?, ?, ?, ?)",
                    ((project, _stored(place), *key) for place, key in new.last.items()),
                )
                if new.late is not None:
                    write.execute("DELETE FROM late WHERE project = ?", (project,))
                    write.executemany(
                        "INSERT INTO late VALUES (?, ?, ?)",
                        ((project, _stored(place), block) for place, block in new.late.items()),
                    )
            write.executemany("INSERT OR REPLACE INTO block_times VALUES (?, ?)", block_times)
            write.execute("DELETE FROM block_times WHERE server_upload_ms < ?", (times_after_ms,))
            write.execute(
                "INSERT OR REPLACE INTO meta VALUES (1, ?, ?, ?)",
                (meta.block, meta.server_upload_ms, meta.fresh),
            )
            write.execute("COMMIT")
        except sqlite3.Error as problem:
            raise store_error(problem, self.path) from problem

    def close(self) -> None:
        """Close the file."""
        self._reader.close()
        self._writer.close()
