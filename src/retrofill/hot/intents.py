"""Changes of stored history that were begun and are not ended: enough of each to do it again after a crash.

A SQLite file of its own. An intent is on disk when `add` returns, before anything of it is done; `remove` comes when
everything of it is on disk. Numbers are never used a second time, so the lake can say by number what it holds of one.

How often an intent was tried is on disk before each try, and why the last one failed after it, so that one which can
never be done is not tried for ever, even if it takes the process with it.

A change takes amplitude_ids for people it may make. Blocks after that count on behind them, and fold to the same people
at a start only if it knows where: `reserve` is on disk before the next block.
"""

from __future__ import annotations

import sqlite3
import threading
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
        try:
            with self._lock:
                sql = "INSERT INTO intents (intent) VALUES (?)"
                number = self._db.execute(sql, (intent,)).lastrowid
        except sqlite3.Error as problem:
            raise store_error(problem, self._path) from problem
        assert number is not None
        return number

    def remove(self, number: int) -> None:
        """Note that all of an intent is done, or that nothing of it will be."""
        try:
            with self._lock:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.execute("DELETE FROM tried WHERE number = ?", (number,))
                self._db.execute("DELETE FROM intents WHERE number = ?", (number,))
                self._db.execute("COMMIT")
        except sqlite3.Error as problem:
            raise store_error(problem, self._path) from problem

    def begun(self, number: int) -> None:
        """Note that an intent is tried now."""
        try:
            with self._lock:
                self._db.execute(
                    "INSERT INTO tried VALUES (?, 1, '') ON CONFLICT DO UPDATE SET times = times + 1",
                    (number,),
                )
        except sqlite3.Error as problem:
            raise store_error(problem, self._path) from problem

    def put_off(self, number: int) -> None:
        """Note that the try that was begun last does not count: the server was asked to stop."""
        try:
            with self._lock:
                self._db.execute("UPDATE tried SET times = times - 1 WHERE number = ?", (number,))
        except sqlite3.Error as problem:
            raise store_error(problem, self._path) from problem

    def failed(self, number: int, reason: str) -> None:
        """Note why the try failed that was begun last."""
        try:
            with self._lock:
                self._db.execute("UPDATE tried SET reason = ? WHERE number = ?", (reason, number))
        except sqlite3.Error as problem:
            raise store_error(problem, self._path) from problem

    def tried(self) -> dict[int, Tried]:
        """Return how each intent that was tried fared, by number."""
        try:
            with self._lock:
                rows = self._db.execute("SELECT number, times, reason FROM tried").fetchall()
                return {number: Tried(*rest) for number, *rest in rows}
        except sqlite3.Error as problem:
            raise store_error(problem, self._path) from problem

    def reserve(self, block: int, fresh: int) -> None:
        """Note that the first block after `block` draws amplitude_ids from `fresh` on."""
        try:
            with self._lock:
                self._db.execute("INSERT INTO reserved VALUES (?, ?)", (block, fresh))
        except sqlite3.Error as problem:
            raise store_error(problem, self._path) from problem

    def reserved(self) -> list[tuple[int, int]]:
        """Return what was noted with `reserve`, in order."""
        try:
            with self._lock:
                return self._db.execute(
                    "SELECT block, fresh FROM reserved ORDER BY rowid"
                ).fetchall()
        except sqlite3.Error as problem:
            raise store_error(problem, self._path) from problem

    def checkpointed(self, block: int) -> None:
        """The checkpoint of this block is on disk: what was reserved before it needs no note."""
        try:
            with self._lock:
                self._db.execute("DELETE FROM reserved WHERE block < ?", (block,))
        except sqlite3.Error as problem:
            raise store_error(problem, self._path) from problem

    def all(self) -> list[tuple[int, bytes]]:
        """Return every intent with its number, oldest first."""
        try:
            with self._lock:
                return self._db.execute(
                    "SELECT number, intent FROM intents ORDER BY number"
                ).fetchall()
        except sqlite3.Error as problem:
            raise store_error(problem, self._path) from problem
