"""Changes of stored history that were begun and are not ended: enough of each to do it again after a crash.

A SQLite file of its own. An intent is on disk when `add` returns, before anything of it is done; `remove` comes when
everything of it is on disk. Numbers are never used a second time, so the lake can say by number what it holds of one.

How often an intent was tried is on disk before each try, and why the last one failed after it, so that one which can
never be done is not tried for ever, even if it takes the process with it.

A change takes amplitude_ids for people it may make. Blocks after that count on behind them, and fold to the same people
at a start only if it knows where: `reserve` is on disk before the next block.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from retrofill.hot.sqlite import store_error

_SCHEMA = """
CREATE TABLE IF NOT EXISTS intents (number INTEGER PRIMARY KEY AUTOINCREMENT, intent BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS reserved (block INTEGER NOT NULL, fresh INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS tried (number INTEGER PRIMARY KEY, times INTEGER NOT NULL, reason TEXT NOT NULL);
"""


class Tried(Struct, frozen=True):
    """How often an intent was tried, and why the last try that ended failed; empty if none did."""

    times: int = 0
    reason: str = ""

    @property
    def why(self) -> str:
        """Say why no try came to its end."""
        return self.reason or "the server stopped each time"


class Intents:
    """The file of intents of one data directory. Any thread. Every method raises StoreError if the disk fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as problem:
            raise store_error(problem, path) from problem

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def add(self, intent: bytes) -> int:
        """Store an intent; return its number."""
        with self._file() as db:
            number = db.execute("INSERT INTO intents (intent) VALUES (?)", (intent,)).lastrowid
        assert number is not None
        return number

    def remove(self, number: int) -> None:
        """Note that all of an intent is done, or that nothing of it will be."""
        with self._file() as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("DELETE FROM tried WHERE number = ?", (number,))
            db.execute("DELETE FROM intents WHERE number = ?", (number,))
            db.execute("COMMIT")

    def begun(self, number: int) -> None:
        """Note that an intent is tried now."""
        with self._file() as db:
            db.execute(
                "INSERT INTO tried VALUES (?, 1, '') ON CONFLICT DO UPDATE SET times = times + 1",
                (number,),
            )

    def put_off(self, number: int) -> None:
        """Note that the try that was begun last does not count: the server was asked to stop."""
        with self._file() as db:
            db.execute("UPDATE tried SET times = times - 1 WHERE number = ?", (number,))

    def failed(self, number: int, reason: str) -> None:
        """Note why the try failed that was begun last."""
        with self._file() as db:
            db.execute("UPDATE tried SET reason = ? WHERE number = ?", (reason, number))

    def tried(self) -> dict[int, Tried]:
        """Return how each intent that was tried fared, by number."""
        with self._file() as db:
            rows = db.execute("SELECT number, times, reason FROM tried").fetchall()
        return {number: Tried(*rest) for number, *rest in rows}

    def reserve(self, block: int, fresh: int) -> None:
        """Note that the first block after `block` draws amplitude_ids from `fresh` on."""
        with self._file() as db:
            db.execute("INSERT INTO reserved VALUES (?, ?)", (block, fresh))

    def reserved(self) -> list[tuple[int, int]]:
        """Return what was noted with `reserve`, in order."""
        with self._file() as db:
            return db.execute("SELECT block, fresh FROM reserved ORDER BY rowid").fetchall()

    def checkpointed(self, block: int) -> None:
        """The checkpoint of this block is on disk: what was reserved before it needs no note."""
        with self._file() as db:
            db.execute("DELETE FROM reserved WHERE block < ?", (block,))

    def all(self) -> list[tuple[int, bytes]]:
        """Return every intent with its number, oldest first."""
        with self._file() as db:
            return db.execute("SELECT number, intent FROM intents ORDER BY number").fetchall()

    @contextlib.contextmanager
    def _file(self) -> Iterator[sqlite3.Connection]:
        """Give the file to one thread. Of a transaction that fails nothing stays: what follows would not be on disk."""
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as problem:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise store_error(problem, self._path) from problem
