"""What was sent and what was acknowledged, on disk before it counts.

One SQLite file in the work directory. `requests` is a ledger: before a request leaves, its row says which rows of which
sets it carries; its answer is added to the same row. Both are written in groups: everything noted since the last
commit goes into the next one, with one sync, in a thread of its own. So three things are known after any crash:

- rows of a request with status 200 are taken: never sent again;
- rows of a request without an answer, or with an uncertain try behind it, may have been stored: *unsure*. A destination
  that remembers insert_ids may be sent them again for as long as it remembers; after that only reading back tells;
- all others were never stored.

Row ranges are packed 14 bytes each: set, first row, count. Nothing is ever deleted: `resend` marks requests as lost,
and when the destination has undone the import, the journal is set aside whole and the next generation has one of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from retrofill.errors import BusyError, InputError, StoreError

COMMIT_GAP_S = (
    0.004  # ours: commits under load are at least this far apart, so that they are worth a sync
)
RANGE = np.dtype([("set", "<u2"), ("first", "<u8"), ("count", "<u4")])
TAKEN = 200
GENERATION = "generation"  # of the import at its destination, a fact in `meta`
UNSURE = -1  # status: not sent again, because the destination may have it and no longer remembers

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE requests (
    id INTEGER PRIMARY KEY, ranges BLOB NOT NULL, events INTEGER NOT NULL, bytes INTEGER NOT NULL,
    sent_ms INTEGER NOT NULL, tries INTEGER, status INTEGER, server_upload_ms INTEGER,
    answered_ms INTEGER, uncertain_ms INTEGER, lost_ms INTEGER
);
CREATE TABLE dead (
    set_number INTEGER, row INTEGER, reason TEXT NOT NULL, line TEXT NOT NULL,
    PRIMARY KEY (set_number, row)
);
CREATE TABLE arrivals (
    kind TEXT, name TEXT, hour INTEGER, count INTEGER, PRIMARY KEY (kind, name, hour)
) WITHOUT ROWID;
CREATE TABLE progress (
    at_ms INTEGER PRIMARY KEY, taken INTEGER, dead INTEGER, held INTEGER, flying INTEGER
);
"""


class Span(NamedTuple):
    """Consecutive rows of one set."""

    set: int
    first: int
    count: int  # type: ignore[assignment] # a tuple's own count is not wanted here


class Final(NamedTuple):
    """How a request ended. status: the HTTP status that decided, or UNSURE."""

    id: int
    tries: int
    status: int
    server_upload_ms: int
    answered_ms: int
    uncertain_ms: int | None


class Totals(Struct, frozen=True):
    """What a journal holds. Events, but for `requests` and `tries`."""

    requests: int
    taken: int
    dead: int
    unsure: int
    tries: int
    first_ms: int | None
    last_ms: int | None


class Dead(NamedTuple):
    """A row that the destination will never take. line: the finished dead letter, one line of JSON."""

    set: int
    row: int
    reason: str
    line: str


class Merged:
    """Rows of one set as sorted ranges that neither touch nor overlap."""

    def __init__(self, firsts: NDArray[np.int64], lasts: NDArray[np.int64]) -> None:
        order = np.argsort(firsts, kind="stable")
        firsts, lasts = firsts[order], np.maximum.accumulate(lasts[order])
        new = np.ones(len(firsts), dtype=bool)
        new[1:] = firsts[1:] > lasts[:-1]
        self.firsts = firsts[new]
        self.lasts = lasts[np.flatnonzero(np.append(new[1:], True))] if len(firsts) else lasts
        self.count = int((self.lasts - self.firsts).sum())

    def missing(self, first: int, last: int) -> list[tuple[int, int]]:
        """Ranges of [first, last) that are not in here, as (first, last)."""
        found = []
        at = int(np.searchsorted(self.lasts, first, side="right"))
        while first < last:
            start = int(self.firsts[at]) if at < len(self.firsts) else last
            if start > first:
                found.append((first, min(start, last)))
            if at >= len(self.lasts):
                break
            first = max(first, int(self.lasts[at]))
            at += 1
        return found


class Rows:
    """Rows of any sets."""

    def __init__(self, blobs: Iterable[bytes], singles: Sequence[tuple[int, int]] = ()) -> None:
        packed = np.frombuffer(b"".join(blobs), dtype=RANGE)
        alone = np.array([(s, row, 1) for s, row in singles], dtype=RANGE)
        every = np.concatenate([packed, alone])
        self._sets: dict[int, Merged] = {}
        for number in np.unique(every["set"]):
            mine = every[every["set"] == number]
            firsts = mine["first"].astype(np.int64)
            self._sets[int(number)] = Merged(firsts, firsts + mine["count"].astype(np.int64))

    @property
    def count(self) -> int:
        """How many rows."""
        return sum(merged.count for merged in self._sets.values())

    def missing(self, number: int, first: int, last: int) -> list[tuple[int, int]]:
        """Ranges of rows first..last of a set that are not in here, as (first, last), last excluded."""
        merged = self._sets.get(number)
        return [(first, last)] if merged is None else merged.missing(first, last)

    def spans(self) -> Iterator[Span]:
        """Every range, by set and row."""
        for number, merged in sorted(self._sets.items()):
            for first, last in zip(merged.firsts.tolist(), merged.lasts.tolist(), strict=True):
                yield Span(number, first, last - first)


def pack(spans: Iterable[Span]) -> bytes:
    """Pack ranges as the ledger holds them."""
    return np.array(list(spans), dtype=RANGE).tobytes()


def unpack(blob: bytes) -> list[Span]:
    """Unpack what `pack` packed."""
    return [Span(*row) for row in np.frombuffer(blob, dtype=RANGE).tolist()]


class Journal:
    """The journal of one work directory: read by anybody, written by one run at a time."""

    def __init__(self, work: Path, *, threaded: bool = True) -> None:
        """Open for writing. Raises BusyError while another run holds the directory."""
        self._work = work
        self._lock = locked(work)
        path = work / "journal.db"
        try:
            if not path.exists():
                _make(path)
            self._db = connect(path)
        except BaseException:
            self._lock.close()
            raise
        self._thread = ThreadPoolExecutor(1, "journal") if threaded else None
        self._sent: list[tuple[Any, ...]] = []
        self._finals: list[Final] = []
        self._dead: list[Dead] = []
        self._rows: list[tuple[str, tuple[Any, ...]]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._busy = False
        self._last = 0.0
        self._failed: BaseException | None = None
        self.on_taken: Callable[[Final], None] = lambda _: None
        self.next_id = self._one("SELECT coalesce(max(id), 0) + 1 FROM requests")
        self._letters = work / "dead-letters-send.ndjson"
        self._mend_letters()

    def _one(self, query: str) -> int:
        return int(self._db.execute(query).fetchone()[0])

    # Meta

    def settle(self, facts: dict[str, str]) -> None:
        """Write facts about this import, or check that they are the same as before. Raises InputError."""
        known = dict(self._db.execute("SELECT key, value FROM meta"))
        for key, value in facts.items():
            if known.setdefault(key, value) != value:
                raise InputError(
                    f"This work directory was begun with {key} {known[key]!r}, now it is {value!r}",
                    where=str(self._work),
                    mend="Give the same line as before, or another --work directory",
                )
        self.note(facts)

    def note(self, facts: dict[str, str]) -> None:
        """Write or replace facts."""
        with self._db:
            self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(facts.items()))

    # What a resumed run must know

    def unsure_before(self, before_ms: int, now_ms: int) -> int:
        """Set aside what may have been stored before a time and was never acknowledged. Returns how many rows."""
        done = self.done()
        rows = self._db.execute(
            "SELECT id, ranges, coalesce(uncertain_ms, sent_ms) FROM requests WHERE lost_ms IS NULL"
            " AND (status IS NULL OR (uncertain_ms IS NOT NULL AND status NOT IN (200, -1)))"
        ).fetchall()
        count = 0
        for number, blob, since in rows:
            if since >= before_ms:
                continue
            left = [
                Span(span.set, first, last - first)
                for span in unpack(blob)
                for first, last in done.missing(span.set, span.first, span.first + span.count)
            ]
            if left:
                count += sum(span.count for span in left)
                self._db.execute(
                    "UPDATE requests SET status = -1, ranges = ?, answered_ms = ? WHERE id = ?",
                    (pack(left), now_ms, number),
                )
        self._db.commit()
        return count

    def done(self) -> Rows:
        """Every row that is not to be sent: taken, dead or unsure."""
        blobs = self._db.execute(
            "SELECT ranges FROM requests WHERE status IN (200, -1) AND lost_ms IS NULL"
        )
        dead = self._db.execute("SELECT set_number, row FROM dead").fetchall()
        return Rows((row[0] for row in blobs), dead)

    def unsure(self) -> Rows:
        """Rows that are not sent again because the destination may have them."""
        return Rows(
            row[0]
            for row in self._db.execute(
                "SELECT ranges FROM requests WHERE status = -1 AND lost_ms IS NULL"
            )
        )

    def trust_unsure(self) -> None:
        """Take every unsure row as taken: reading back has shown that it is there."""
        with self._db:
            self._db.execute("UPDATE requests SET status = 200 WHERE status = -1")

    def dead_rows(self) -> int:
        """How many rows are dead letters."""
        return self._one("SELECT count(*) FROM dead")

    def arrivals(self, since_hour: int) -> list[tuple[str, str, int, int]]:
        """(kind, name, hour, count) of what counted against daily quotas since an hour of the epoch."""
        return self._db.execute(
            "SELECT * FROM arrivals WHERE hour >= ? ORDER BY hour", (since_hour,)
        ).fetchall()

    def answered_since(self, since_ms: int) -> list[tuple[int, list[Span]]]:
        """(at_ms, rows) of each request whose answer came since then; without an answer it counts when it left."""
        found = self._db.execute(
            "SELECT coalesce(answered_ms, sent_ms) AS at, ranges FROM requests WHERE at >= ? ORDER BY at",
            (since_ms,),
        )
        return [(at_ms, unpack(ranges)) for at_ms, ranges in found]

    # What a run says

    def sent(self, number: int, spans: list[Span], *, events: int, size: int, now_ms: int) -> None:
        """Note that a request is about to leave. Await `flushed` before it does."""
        self._sent.append((number, pack(spans), events, size, now_ms))

    def answered(self, final: Final) -> None:
        """Note how a request ended."""
        self._finals.append(final)

    def died(self, dead: Dead) -> None:
        """Note a row that will never be taken."""
        self._dead.append(dead)

    def arrived(self, kind: str, name: str, hour: int, count: int) -> None:
        """Note events that count against a daily quota."""
        self._rows.append(
            (
                (
                    "INSERT INTO arrivals VALUES (?, ?, ?, ?)"
                    " ON CONFLICT DO UPDATE SET count = count + excluded.count"
                ),
                (kind, name, hour, count),
            )
        )

    def progressed(self, at_ms: int, *, taken: int, dead: int, held: int, flying: int) -> None:
        """Note how far the run is, for the report."""
        self._rows.append(
            (
                "INSERT OR REPLACE INTO progress VALUES (?, ?, ?, ?, ?)",
                (at_ms, taken, dead, held, flying),
            )
        )

    async def flushed(self) -> None:
        """Wait until everything noted so far is on disk. Raises StoreError: then nothing is known of the disk."""
        if self._failed is not None:
            raise StoreError(
                f"The journal cannot be written: {self._failed}",
                where=str(self._work / "journal.db"),
                mend="Free some space or mend the disk, then run the same line again",
            ) from self._failed
        if self._thread is None:
            self.kick()
            return
        if self._waiter is None:
            self._waiter = asyncio.get_running_loop().create_future()
        waiter = self._waiter
        self.kick()
        await asyncio.shield(waiter)

    def kick(self) -> None:
        """Begin a commit soon, if there is anything to commit."""
        if self._busy or not (
            self._sent or self._finals or self._dead or self._rows or self._waiter
        ):
            return
        if self._thread is None:
            self._committed(self._commit(*self._noted()))
            return
        self._busy = True
        gap = self._last + COMMIT_GAP_S - time.monotonic()
        if gap > 0:
            asyncio.get_running_loop().call_later(gap, self._start)
        else:
            self._start()

    def _start(self) -> None:
        self._last = time.monotonic()
        waiter, self._waiter = self._waiter, None
        assert self._thread is not None
        work = asyncio.get_running_loop().run_in_executor(
            self._thread, self._commit, *self._noted()
        )
        work.add_done_callback(lambda done: self._ended(done, waiter))

    def _ended(
        self, work: asyncio.Future[list[Final]], waiter: asyncio.Future[None] | None
    ) -> None:
        self._busy = False
        problem = work.exception()
        if problem is not None:
            self._failed = problem
            for one in (waiter, self._waiter):
                if one is not None and not one.done():
                    one.set_exception(StoreError(f"The journal cannot be written: {problem}"))
            return
        self._committed(work.result())
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        if self._waiter is not None or self._finals:
            self.kick()

    def _committed(self, finals: list[Final]) -> None:
        for final in finals:
            self.on_taken(final)

    def _noted(self) -> tuple[list[Any], list[Final], list[Dead], list[Any]]:
        noted = (self._sent, self._finals, self._dead, self._rows)
        self._sent, self._finals, self._dead, self._rows = [], [], [], []
        return noted

    def _commit(
        self, sent: list[Any], finals: list[Final], dead: list[Dead], rows: list[Any]
    ) -> list[Final]:
        db = self._db
        db.execute("BEGIN")
        if sent:
            db.executemany(
                "INSERT INTO requests (id, ranges, events, bytes, sent_ms) VALUES (?, ?, ?, ?, ?)",
                sent,
            )
        if finals:
            db.executemany(
                "UPDATE requests SET tries = ?2, status = ?3, server_upload_ms = ?4,"
                " answered_ms = ?5, uncertain_ms = ?6 WHERE id = ?1",
                finals,
            )
        if dead:
            db.executemany("INSERT OR IGNORE INTO dead VALUES (?, ?, ?, ?)", dead)
        for query, values in rows:
            db.execute(query, values)
        db.execute("COMMIT")
        if dead:
            with self._letters.open("a", encoding="utf-8") as file:
                file.writelines(f"{one.line}\n" for one in dead)
        return finals

    def _mend_letters(self) -> None:
        """Make the dead letter file say what the table says: a crash can come between the two."""
        lines = [row[0] for row in self._db.execute("SELECT line FROM dead ORDER BY rowid")]
        text = "".join(f"{line}\n" for line in lines)
        if self._letters.exists() and self._letters.read_text(encoding="utf-8") == text:
            return
        if text or self._letters.exists():
            fresh = self._letters.with_suffix(".new")
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(self._letters)

    def letters(self) -> list[tuple[tuple[int, int], str]]:
        """Every dead letter, by its set and row."""
        found = self._db.execute("SELECT set_number, row, line FROM dead ORDER BY rowid")
        return [((number, row), line) for number, row, line in found]

    def reword(self, lines: dict[tuple[int, int], str]) -> None:
        """Put other lines in the place of some dead letters."""
        with self._db:
            self._db.executemany(
                "UPDATE dead SET line = ? WHERE set_number = ? AND row = ?",
                [(line, *key) for key, line in lines.items()],
            )
        self._mend_letters()

    def revive(self) -> int:
        """Let what the destination has refused be sent again. Returns how many events."""
        with self._db:
            found = self._db.execute("DELETE FROM dead").rowcount
        self._mend_letters()
        return found

    def lose(self, from_ms: int, to_ms: int, now_ms: int) -> int:
        """Mark what was acknowledged with an upload time from..to (both included) as lost. Returns how many events."""
        with self._db:
            found = self._db.execute(
                "SELECT coalesce(sum(events), 0) FROM requests WHERE status = 200 AND lost_ms IS NULL"
                " AND coalesce(nullif(server_upload_ms, 0), answered_ms) BETWEEN ? AND ?",
                (from_ms, to_ms),
            ).fetchone()[0]
            self._db.execute(
                "UPDATE requests SET lost_ms = ? WHERE status = 200 AND lost_ms IS NULL"
                " AND coalesce(nullif(server_upload_ms, 0), answered_ms) BETWEEN ? AND ?",
                (now_ms, from_ms, to_ms),
            )
        return int(found)

    def lose_rows(self, rows: Rows, now_ms: int) -> int:
        """Mark rows as not stored after all, whatever the ledger says of them. Returns how many requests held some."""
        marked: list[tuple[int, int]] = []
        fresh: list[tuple[bytes, int, int, int]] = []
        query = (
            "SELECT id, ranges, status, server_upload_ms, answered_ms FROM requests"
            " WHERE status IN (200, -1) AND lost_ms IS NULL"
        )
        for number, blob, status, upload, answered in self._db.execute(query):
            kept = [
                Span(span.set, first, last - first)
                for span in unpack(blob)
                for first, last in rows.missing(span.set, span.first, span.first + span.count)
            ]
            if sum(span.count for span in kept) == sum(span.count for span in unpack(blob)):
                continue
            marked.append((now_ms, number))
            if kept:
                fresh.append((pack(kept), status, upload, answered))
        with self._db:
            self._db.executemany("UPDATE requests SET lost_ms = ? WHERE id = ?", marked)
            self._db.executemany(
                "INSERT INTO requests (ranges, events, bytes, sent_ms, tries, status,"
                " server_upload_ms, answered_ms) VALUES (?, ?, 0, ?, 0, ?, ?, ?)",
                [
                    (blob, sum(s.count for s in unpack(blob)), answered, status, upload, answered)
                    for blob, status, upload, answered in fresh
                ],
            )
        self.next_id = self._one("SELECT coalesce(max(id), 0) + 1 FROM requests")
        return len(marked)

    def close(self) -> None:
        """Commit what is noted and let go of the directory."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        if self._failed is None:
            self._commit(*self._noted())
        self._db.close()
        self._lock.close()


class Ledger:
    """A journal opened for reading, while a run may go on writing it."""

    def __init__(self, work: Path) -> None:
        """Raises InputError if nothing was ever sent from this directory."""
        path = work / "journal.db"
        if not path.exists():
            raise InputError(
                f"No journal in {work}",
                mend="Name the --work directory of a run; `retrofill run` makes one",
            )
        self._db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)

    def meta(self) -> dict[str, str]:
        """The facts of this import."""
        return dict(self._db.execute("SELECT key, value FROM meta"))

    def totals(self) -> Totals:
        """What was done so far."""
        row = self._db.execute(
            "SELECT count(*), coalesce(sum(events) FILTER (WHERE status = 200 AND lost_ms IS NULL), 0),"
            " coalesce(sum(tries), 0), min(sent_ms), max(answered_ms) FROM requests"
        ).fetchone()
        dead = self._db.execute("SELECT count(*) FROM dead").fetchone()[0]
        return Totals(row[0], row[1], dead, self.unsure().count, row[2], row[3], row[4])

    def unsure(self) -> Rows:
        """Rows that are not sent again because the destination may have them."""
        rows = self._db.execute("SELECT ranges FROM requests WHERE status = -1 AND lost_ms IS NULL")
        return Rows(row[0] for row in rows)

    def taken(self) -> Rows:
        """Rows that were acknowledged."""
        rows = self._db.execute(
            "SELECT ranges FROM requests WHERE status = 200 AND lost_ms IS NULL"
        )
        return Rows(row[0] for row in rows)

    def requests(self) -> Iterator[dict[str, Any]]:
        """Every request of the ledger, by number."""
        cursor = self._db.execute("SELECT * FROM requests ORDER BY id")
        names = [column[0] for column in cursor.description]
        for row in cursor:
            one = dict(zip(names, row, strict=True))
            one["ranges"] = unpack(one["ranges"])
            yield one

    def uploads(self) -> list[tuple[int, int]]:
        """The (first, last) server upload time of each run of acknowledged requests, in ms, an hour's gap apart."""
        windows: list[tuple[int, int]] = []
        query = (
            "SELECT coalesce(nullif(server_upload_ms, 0), answered_ms) AS at FROM requests"
            " WHERE status = 200 ORDER BY at"
        )
        for (at,) in self._db.execute(query):
            if windows and at - windows[-1][1] <= 3_600_000:
                windows[-1] = (windows[-1][0], at)
            else:
                windows.append((at, at))
        return windows

    def stored_between(self) -> list[tuple[int, int]]:
        """(first, last) ms of server upload time in which each hour's requests may have been stored."""
        query = (
            "SELECT min(least), max(most) FROM (SELECT sent_ms / 3600000 AS hour,"
            " min(sent_ms, coalesce(nullif(server_upload_ms, 0), sent_ms)) AS least,"
            " max(sent_ms, coalesce(answered_ms, sent_ms), coalesce(server_upload_ms, 0)) AS most"
            " FROM requests) GROUP BY hour"
        )
        return self._db.execute(query).fetchall()

    def dead_rows(self) -> list[tuple[int, int]]:
        """(set, row) of every dead letter."""
        return self._db.execute("SELECT set_number, row FROM dead").fetchall()

    def progress(self) -> list[tuple[int, int, int, int, int]]:
        """(at_ms, taken, dead, held, flying), by time."""
        return self._db.execute("SELECT * FROM progress ORDER BY at_ms").fetchall()

    def statuses(self) -> list[tuple[int | None, int, int]]:
        """(status, requests, events) of every kind of answer."""
        return self._db.execute(
            "SELECT status, count(*), sum(events) FROM requests GROUP BY 1 ORDER BY 1"
        ).fetchall()

    def dead(self) -> list[tuple[str, int]]:
        """(reason, rows), the most frequent first."""
        return self._db.execute(
            "SELECT reason, count(*) FROM dead GROUP BY 1 ORDER BY 2 DESC, 1"
        ).fetchall()

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()


def set_aside(work: Path, generation: int) -> Path:
    """Give a journal another name, so that the next run begins a fresh one. Returns where it is now.

    generation: of the import whose rows it speaks of, at its destination. Raises BusyError while anybody uses it.
    """
    path = work / "journal.db"
    with locked(work):
        db = connect(path)
        try:
            db.execute("PRAGMA busy_timeout=1000")
            # Succeeds only when nobody else has it open, and leaves one file behind.
            db.execute("PRAGMA journal_mode=DELETE")
        except sqlite3.OperationalError as problem:
            raise BusyError(
                f"Something reads the journal: {problem}",
                where=str(path),
                mend="Wait for `retrofill status`, `report` or `verify` to end, then run the same line again",
            ) from problem
        finally:
            db.close()
        names = [
            f"journal-{generation}.db",
            *(f"journal-{generation}-{n}.db" for n in range(2, 1000)),
        ]
        to = next(work / name for name in names if not (work / name).exists())
        path.rename(to)
    return to


def connect(path: Path) -> sqlite3.Connection:
    """Open a journal for writing: synced at every commit, usable from the thread that commits."""
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("PRAGMA busy_timeout=10000")
    return db


def _make(path: Path) -> None:
    """Make an empty journal, whole or not at all: whoever finds the file finds its tables, wherever a run stopped."""
    fresh = path.with_name("journal.new")
    for name in (fresh, path.with_name("journal.new-journal")):
        name.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(fresh)) as db:
        db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
    fresh.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # its commits are synced, and its name shall be there then
    finally:
        os.close(folder)


def locked(work: Path) -> IO[str]:
    """Lock a work directory until the file is closed, or the process ends. Raises BusyError."""
    work.mkdir(parents=True, exist_ok=True)
    file = (work / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        file.close()
        raise BusyError(
            f"Another run works in {work}",
            mend="Wait for it or stop it; `retrofill status` shows how far it is",
        ) from problem
    return file
