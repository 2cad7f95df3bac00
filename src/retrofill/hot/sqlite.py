"""Blocks and projects in SQLite.

A commit is one row: the block as one blob with its checksum, in WAL mode with `synchronous=FULL`, so that the row is
on disk when `append` returns. The blob is packed with LZ4: SQLite copies and sums up each byte several times on its way
(log, file, deletion), so a fifth of the bytes saves four times what packing costs. The writer has one connection and one thread at a time; each reader opens its own, so
that a reader neither waits for the writer nor makes it wait. Blocks at or before both the lake and the checkpoint are
deleted a few at a time: one large transaction would stall commits. So would writing the log back into the file: most of
it is done on a connection of its own while commits go on (`write_back`), and the rest between two of them.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import xxhash
from msgspec import Struct
from msgspec.structs import astuple

from retrofill.config import Project
from retrofill.core import block as block_module
from retrofill.core.block import Block
from retrofill.errors import CorruptError, FullError, InputError, StoreError
from retrofill.limits import LOG_PAGES, LOG_PAGES_MAX

_SCHEMA = """
CREATE TABLE IF NOT EXISTS blocks (
    number INTEGER PRIMARY KEY, rows INTEGER NOT NULL, checksum INTEGER NOT NULL, blob BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS projects (
    number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, api_key TEXT NOT NULL UNIQUE, secret_key TEXT NOT NULL,
    settings BLOB
);
CREATE TABLE IF NOT EXISTS barred (
    project INTEGER NOT NULL, block INTEGER NOT NULL, row INTEGER NOT NULL, absorbed INTEGER NOT NULL,
    surviving INTEGER NOT NULL, device_id TEXT NOT NULL, user_id TEXT NOT NULL, unmerged_ms INTEGER NOT NULL,
    PRIMARY KEY (project, block, row)
) WITHOUT ROWID;
"""

_PAGE_BYTES = 16_384
_PAGES_BESIDE = 3  # that a small transaction writes beside its block

# Before a packed block: a mark, and the size that it unpacks to. A block as it is begins otherwise: with an array's byte.
_PACKED = struct.Struct("<4sQ")
_MARK = b"lz4\n"
_RATIO_MAX = 255  # LZ4 cannot pack anything better. Source: LZ4 block format, a byte of length stands for 255 at most
# Below 0 a level packs faster: blocks are as small at -5 as at the usual 1, for three quarters of its time.
_lz4 = pa.Codec("lz4", compression_level=-5)


def store_error(problem: sqlite3.Error, where: Path) -> StoreError:
    """Say in our words what SQLite could not do."""
    text = str(problem)
    if "full" in text:
        return FullError(
            "No room is left on the device",
            where=str(where),
            mend="Free some space; nothing of the refused requests was stored",
        )
    return StoreError(
        f"SQLite failed: {text}",
        where=str(where),
        mend="Mend the disk and start the server again; it recovers by itself",
    )


def _checksum(blob: bytes) -> int:
    # SQLite integers are signed: keep 63 bits.
    return xxhash.xxh3_64_intdigest(blob) >> 1


class Blocks:
    """The unsealed blocks of one directory. One writer; readers may be in any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._in_log = 0
        try:
            self._writer = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._writer.execute(f"PRAGMA page_size={_PAGE_BYTES}")
            self._writer.execute("PRAGMA journal_mode=WAL")
            self._writer.execute("PRAGMA synchronous=FULL")
            self._writer.execute(f"PRAGMA wal_autocheckpoint={LOG_PAGES_MAX}")
            self._writer.executescript(_SCHEMA)
            self._beside = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        except sqlite3.Error as problem:
            raise store_error(problem, path) from problem

    def append(self, number: int, rows: int, blob: bytes) -> None:
        """Write one block; it is synced when this returns. Raises StoreError: then nothing is known of the disk."""
        blob = _PACKED.pack(_MARK, len(blob)) + _lz4.compress(blob, asbytes=True)
        try:
            self._writer.execute(
                "INSERT INTO blocks VALUES (?, ?, ?, ?)", (number, rows, _checksum(blob), blob)
            )
        except sqlite3.Error as problem:
            raise store_error(problem, self.path) from problem
        self._in_log += len(blob) // _PAGE_BYTES + _PAGES_BESIDE

    def numbers(self) -> list[tuple[int, int]]:
        """Return (number, rows) of every block held, in order."""
        return list(self._writer.execute("SELECT number, rows FROM blocks ORDER BY number"))

    def read(self, first: int, last: int) -> Iterator[Block]:
        """Yield blocks first … last in order, see `read_blocks`."""
        return read_blocks(self.path, first, last)

    def delete(self, first: int, last: int) -> None:
        """Delete blocks first..last in one small transaction, on disk with the next block: until then they may come back."""
        try:
            self._writer.execute("PRAGMA synchronous=NORMAL")
            try:
                self._writer.execute(
                    "DELETE FROM blocks WHERE number BETWEEN ? AND ?", (first, last)
                )
            finally:
                self._writer.execute("PRAGMA synchronous=FULL")
        except sqlite3.Error as problem:
            raise store_error(problem, self.path) from problem
        self._in_log += _PAGES_BESIDE

    @property
    def write_back_is_due(self) -> bool:
        """Whether so much stands in the log that it should be written back into the file."""
        return self._in_log >= LOG_PAGES

    def write_back(self) -> None:
        """Write the log back into the file while blocks are appended; in any thread, one at a time. Raises StoreError.

        What cannot be written stays in the log: nothing is lost by a failure.
        """
        self._in_log = 0
        _write_back(self._beside, self.path)

    def write_back_rest(self) -> None:
        """Write back what was appended meanwhile, so that the log begins anew; by who appends. Raises StoreError."""
        _write_back(self._writer, self.path)

    def blob(self, number: int) -> bytes:
        """Return a block as it is stored, damaged or not."""
        row = self._writer.execute("SELECT blob FROM blocks WHERE number = ?", (number,)).fetchone()
        return bytes(row[0])

    def replace(self, number: int, rows: int, blob: bytes) -> None:
        """Write another block in the place of one; it is synced when this returns. Raises StoreError."""
        try:
            self._writer.execute(
                "UPDATE blocks SET rows = ?, checksum = ?, blob = ? WHERE number = ?",
                (rows, _checksum(blob), blob, number),
            )
        except sqlite3.Error as problem:
            raise store_error(problem, self.path) from problem

    def shrink(self) -> None:
        """Give the room of deleted blocks back to the disk; nobody else may use the file. Raises StoreError."""
        try:
            self._writer.execute("VACUUM")
        except sqlite3.Error as problem:
            raise store_error(problem, self.path) from problem

    def projects(self) -> Projects:
        """The projects of this installation, stored beside the blocks."""
        return Projects(self._writer, self.path)

    def close(self) -> None:
        """Close the writer; the log is written back into the file."""
        self._beside.close()
        self._writer.close()


def _write_back(connection: sqlite3.Connection, path: Path) -> None:
    try:
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    except sqlite3.Error as problem:
        raise store_error(problem, path) from problem


def read_blocks(path: Path, first: int, last: int) -> Iterator[Block]:
    """Yield the blocks first … last (both included) that are held, in order, on a connection of their own.

    Raises CorruptError naming a damaged block, StoreError if the file cannot be read.
    """
    reader = None
    try:
        reader = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        for number in range(first, last + 1):
            row = reader.execute(
                "SELECT checksum, blob FROM blocks WHERE number = ?", (number,)
            ).fetchone()
            if row is not None:
                yield _open(row[0], row[1], number, path)
    except sqlite3.Error as problem:
        raise store_error(problem, path) from problem
    finally:
        if reader is not None:
            reader.close()


def faults(path: Path) -> list[str]:
    """Return what SQLite finds wrong with a file: its structure, and texts that are none. Nothing if it is whole."""
    connection = sqlite3.connect(path)
    try:
        found = [str(one) for (one,) in connection.execute("PRAGMA integrity_check")]
        if found == ["ok"]:  # it does not look into texts
            _read_texts(connection)
    except (sqlite3.Error, UnicodeDecodeError) as problem:
        return [str(problem)]
    finally:
        connection.close()
    return [] if found == ["ok"] else found


def _read_texts(connection: sqlite3.Connection) -> None:
    tables = connection.execute(
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite~_%' ESCAPE '~'"
    ).fetchall()
    for (table,) in tables:
        columns = [
            f'"{name}"'
            for _, name, kind, *_ in connection.execute(f'PRAGMA table_info("{table}")')
            if kind != "BLOB"
        ]
        for _ in connection.execute(f'SELECT {", ".join(columns)} FROM "{table}"'):  # noqa: S608 - names of the file
            pass


class Bar(Struct, frozen=True):
    """A merge that was taken back: by the event at (block, row) the user of a device had absorbed who was on it."""

    block: int
    row: int
    absorbed: int
    surviving: int
    device_id: str
    user_id: str
    unmerged_ms: int


class Projects:
    """The projects of one installation."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    def all(self) -> list[Project]:
        """Return every project by number."""
        rows = self._connection.execute(
            "SELECT number, name, api_key, secret_key FROM projects ORDER BY number"
        )
        return [Project(*row) for row in rows]

    def add(self, name: str, api_key: str, secret_key: str) -> Project:
        """Make a project, or return the one of the same name and keys.

        Raises InputError if the name or the API key belongs to another project.
        """
        for known in self.all():
            if known.name == name and known.api_key == api_key and known.secret_key == secret_key:
                return known
        try:
            number = self._connection.execute(
                "INSERT INTO projects (name, api_key, secret_key) VALUES (?, ?, ?) RETURNING number",
                (name, api_key, secret_key),
            ).fetchone()[0]
        except sqlite3.IntegrityError as problem:
            raise InputError(
                f"Project {name!r} cannot be made: its name or its API key is taken",
                where=str(self._path),
                mend="Give the keys with which the project was made, or another name and key",
            ) from problem
        except sqlite3.Error as problem:
            raise store_error(problem, self._path) from problem
        return Project(number, name, api_key, secret_key)

    def barred(self, number: int) -> list[Bar]:
        """Return the merges of a project that were taken back."""
        rows = self._connection.execute(
            "SELECT block, row, absorbed, surviving, device_id, user_id, unmerged_ms FROM barred "
            "WHERE project = ? ORDER BY block, row",
            (number,),
        )
        return [Bar(*row) for row in rows]

    def bar(self, number: int, one: Bar) -> None:
        """Keep a merge taken back, synced when this returns; again changes nothing. Raises StoreError."""
        try:
            self._connection.execute(
                "INSERT OR IGNORE INTO barred VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (number, *astuple(one)),
            )
        except sqlite3.Error as problem:
            raise store_error(problem, self._path) from problem

    def unbar(self, number: int, device_id: str, user_id: str) -> None:
        """Forget that merges of these ids were taken back, synced when this returns. Raises StoreError."""
        try:
            self._connection.execute(
                "DELETE FROM barred WHERE project = ? AND device_id = ? AND user_id = ?",
                (number, device_id, user_id),
            )
        except sqlite3.Error as problem:
            raise store_error(problem, self._path) from problem

    def settings(self, number: int) -> bytes | None:
        """Return what `set_settings` stored, or None."""
        row = self._connection.execute(
            "SELECT settings FROM projects WHERE number = ?", (number,)
        ).fetchone()
        return row[0] if row else None

    def set_settings(self, number: int, settings: bytes) -> None:
        """Store the settings of a project; they are synced when this returns. Raises StoreError."""
        try:
            self._connection.execute(
                "UPDATE projects SET settings = ? WHERE number = ?", (settings, number)
            )
        except sqlite3.Error as problem:
            raise store_error(problem, self._path) from problem


def _open(checksum: int, blob: bytes, number: int, path: Path) -> Block:
    found = _checksum(blob)
    if found != checksum:
        raise CorruptError(
            f"Block checksum is {found:016x}, expected {checksum:016x}",
            where=f"{path}, block {number:,}",
            mend="Restore the file from a copy, or run `retrofill check --repair` to set the block aside",
        )
    block = decoded(blob)
    assert block.number == number
    return block


def decoded(blob: bytes) -> Block:
    """Return a block as it is stored, its checksum not asked: of a damaged one whatever the codecs raise comes.

    Raises CorruptError if it cannot be as large as it says.
    """
    if blob.startswith(_MARK):
        _, size = _PACKED.unpack_from(blob)
        if size > len(blob) * _RATIO_MAX:
            raise CorruptError(
                f"A block of {len(blob):,} bytes says that it unpacks to {size:,}",
                where="a block of hot.sqlite",
                mend="Run `retrofill check --repair` to set the block aside",
            )
        blob = _lz4.decompress(memoryview(blob)[_PACKED.size :], size, asbytes=True)
    return block_module.decode(blob)
