"""Requests to delete people: kept in days, run when their day has come.

Everything asked for on one day becomes part of one job of the project, `deletion_days` later (a limit of the project;
0 is at the next look). A job is `staging` and may lose people again until DELETION_FREEZE_DAYS before its day, then
`submitted`, then `done` once each of its people is. What a job holds is written in a SQLite file of its own, synced
before the request is answered; whoever is asked for while the job runs is left to the next look.

A crash can fall between the deletion itself and the note that it is done. The job then runs again at the next look:
`erase` deletes amplitude_ids, and those are never used a second time, so again is the same as once, also for someone
who has come back since as a new person. A deleted user's later events make a new person. Source: contract, read 7.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from msgspec import Struct

from retrofill.clock import Clock
from retrofill.core.person import FORGOTTEN
from retrofill.engine.query import Reader, View
from retrofill.errors import InputError, StoreError
from retrofill.limits import (
    DELETION_FREEZE_DAYS,
    DELETION_IDS_MAX,
    DELETION_RANGE_DAYS_MAX,
    MS_PER_S,
)

Erase = Callable[[int, list[int]], Awaitable[None]]
"""Deletes a project's amplitude_ids, state and rows, whole when it returns; again changes nothing."""

# erased: the day on which it was done, empty until then.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    project INTEGER NOT NULL, day TEXT NOT NULL, amplitude_id INTEGER NOT NULL, requested_on_day TEXT NOT NULL,
    requester TEXT NOT NULL, user_id TEXT, org INTEGER NOT NULL, erased TEXT NOT NULL,
    PRIMARY KEY (project, day, amplitude_id)
) WITHOUT ROWID;
"""


class Request(Struct, frozen=True):
    """Who is to be deleted, as asked. ignore: leave unknown ids out instead of refusing the request."""

    amplitude_ids: list[int] = []
    user_ids: list[str] = []
    requester: str = ""
    ignore: bool = False
    org: bool = False
    with_user_ids: bool = False


class Entry(Struct, frozen=True):
    """One person of a job. user_id: None if anonymous."""

    amplitude_id: int
    requested_on_day: str
    requester: str
    user_id: str | None = None


class Job(Struct, frozen=True):
    """The people of one project that are deleted on one day."""

    day: str
    status: str
    entries: list[Entry]
    org: bool
    done_on: str | None


class _Person(Struct, frozen=True):
    """A person to delete. everyone: its amplitude_id and those merged into it."""

    amplitude_id: int
    user_id: str | None


class Deletions:
    """The deletion jobs of one data directory. Any thread; each call is one transaction.

    days: project → how long after the request its people are deleted, 0 for at the next look.
    """

    def __init__(self, path: Path, clock: Clock, *, days: Callable[[int], int]) -> None:
        self._clock = clock
        self._days = days
        self._path = path
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as problem:
            raise self._error(problem) from problem

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def add(self, reader: Reader, project: int, asked: Request) -> tuple[Job, list[int | str]]:
        """Queue people; return their job, with the entries of this request alone, and the ids that nobody has.

        Raises InputError if an id is unknown and not to be ignored: then nothing is queued.
        """
        count = len(asked.amplitude_ids) + len(asked.user_ids)
        if not 0 < count <= DELETION_IDS_MAX:
            raise InputError(f"{count} ids to delete, give 1 to {DELETION_IDS_MAX}")
        with reader.view(project) as view:
            people, invalid = _find(view, asked)
        if invalid and not (asked.ignore or asked.org):
            listed = ", ".join(map(str, invalid))
            raise InputError(
                f"Unknown ids: {listed}",
                mend="Leave them out or set ignore_invalid_id; nothing was queued",
            )
        today = self._today()
        day = (today + timedelta(self._days(project))).isoformat()
        rows = [
            (
                project,
                day,
                one.amplitude_id,
                today.isoformat(),
                asked.requester,
                one.user_id,
                asked.org,
                "",
            )
            for one in people
        ]
        self._write("INSERT OR IGNORE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
        entries = [
            Entry(one.amplitude_id, today.isoformat(), asked.requester, one.user_id)
            for one in people
        ]
        return Job(day, self._status(day, None), entries, asked.org, None), invalid

    def jobs(self, project: int, first: date, last: date) -> list[Job]:
        """Return the jobs of days first … last, in order. Raises InputError for more than six months."""
        if last < first:
            raise InputError(f"end_day {last} is before start_day {first}")
        if (last - first).days > DELETION_RANGE_DAYS_MAX:
            raise InputError(
                f"{(last - first).days} days, at most {DELETION_RANGE_DAYS_MAX} (six months)"
            )
        between = (project, first.isoformat(), last.isoformat())
        rows = self._read(
            "SELECT day, amplitude_id, requested_on_day, requester, user_id, org, erased FROM entries "
            "WHERE project = ? AND day BETWEEN ? AND ? ORDER BY day, amplitude_id",
            between,
        )
        days: dict[str, list[Any]] = {}
        for row in rows:
            days.setdefault(row[0], []).append(row)
        return [self._job(day, found) for day, found in days.items()]

    def _job(self, day: str, rows: list[Any]) -> Job:
        erased = [row[6] for row in rows]
        done_on = max(erased) if all(erased) else None
        entries = [Entry(*row[1:5]) for row in rows]
        return Job(day, self._status(day, done_on), entries, any(row[5] for row in rows), done_on)

    def take_back(self, project: int, amplitude_id: int, day: date) -> Entry:
        """Take one person out of a job. Raises InputError if it is not there, or the job can no longer be edited."""
        place = (project, day.isoformat(), amplitude_id)
        with self._lock:
            row = self._db.execute(
                "SELECT amplitude_id, requested_on_day, requester, user_id FROM entries "
                "WHERE project = ? AND day = ? AND amplitude_id = ?",
                place,
            ).fetchone()
            if row is None:
                raise InputError(f"No deletion of {amplitude_id} is planned on {day}")
            if self._status(place[1], None) != "staging":
                raise InputError(
                    f"The deletion of {day} can no longer be edited: it is within {DELETION_FREEZE_DAYS} days"
                )
            self._change(
                "DELETE FROM entries WHERE project = ? AND day = ? AND amplitude_id = ?", [place]
            )
        return Entry(*row)

    async def run_due(self, reader: Reader, erase: Erase) -> int:
        """Run every job whose day has come. Returns how many people were deleted."""
        gone = 0
        for project, day in await asyncio.to_thread(self._due):
            people, everyone = await asyncio.to_thread(self._people, reader, project, day)
            await erase(project, everyone)
            today = self._today().isoformat()
            await asyncio.to_thread(
                self._write,
                "UPDATE entries SET erased = ? WHERE project = ? AND day = ? AND amplitude_id = ?",
                [(today, project, day, one) for one in people],
            )
            gone += len(people)
        return gone

    def _due(self) -> list[tuple[int, str]]:
        return self._read(
            "SELECT DISTINCT project, day FROM entries WHERE erased = '' AND day <= ? "
            "ORDER BY day, project",
            (self._today().isoformat(),),
        )

    def _people(self, reader: Reader, project: int, day: str) -> tuple[list[int], list[int]]:
        """Return the people whom a job has still to delete, and every amplitude_id that is one of them."""
        rows = self._read(
            "SELECT amplitude_id FROM entries WHERE project = ? AND day = ? AND erased = ''",
            (project, day),
        )
        people = [one for (one,) in rows]
        with reader.view(project) as view:
            return people, _with_merged(view, people)

    def traces(self, project: int) -> tuple[bool, bool]:
        """Say whether people of a project were deleted, and whether some are due whose deletion is not noted as done."""
        erased, due = self._read(
            "SELECT count(*) FILTER (WHERE erased <> ''), count(*) FILTER (WHERE erased = '' AND day <= ?) "
            "FROM entries WHERE project = ?",
            (self._today().isoformat(), project),
        )[0]
        return bool(erased), bool(due)

    def _today(self) -> date:
        return datetime.fromtimestamp(self._clock.now_ms() / MS_PER_S, UTC).date()

    def _status(self, day: str, done_on: str | None) -> str:
        if done_on is not None:
            return "done"
        left = (date.fromisoformat(day) - self._today()).days
        return "staging" if left > DELETION_FREEZE_DAYS else "submitted"

    def _read(self, sql: str, values: tuple[Any, ...]) -> list[Any]:
        with self._lock:
            try:
                return self._db.execute(sql, values).fetchall()
            except sqlite3.Error as problem:
                raise self._error(problem) from problem

    def _write(self, sql: str, rows: list[tuple[Any, ...]]) -> None:
        with self._lock:
            self._change(sql, rows)

    def _change(self, sql: str, rows: list[tuple[Any, ...]]) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(sql, rows)
            self._db.execute("COMMIT")
        except sqlite3.Error as problem:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise self._error(problem) from problem

    def _error(self, problem: sqlite3.Error) -> StoreError:
        return StoreError(
            f"SQLite failed: {problem}", where=str(self._path), mend="Mend the disk and ask again"
        )


def _find(view: View, asked: Request) -> tuple[list[_Person], list[int | str]]:
    """Return the people asked for, each once, and the ids that nobody has."""
    merges = view.merges()
    found: dict[int, _Person] = {}
    invalid: list[int | str] = []
    users: dict[str, list[int]] = {}
    if asked.user_ids:
        for user, amplitude_id in view.people_of(asked.user_ids):
            users.setdefault(user, []).append(amplitude_id)
    wanted: list[tuple[int | str, Iterable[int]]] = [(one, [one]) for one in asked.amplitude_ids]
    wanted += [(user, users.get(user, ())) for user in asked.user_ids]
    for asked_id, candidates in wanted:
        people = [_known(view, merges.get(one, one)) for one in candidates]
        some = {one.amplitude_id: one for one in people if one is not None}
        found |= some
        if not some:
            invalid.append(asked_id)
    return list(found.values()), invalid


def _known(view: View, amplitude_id: int) -> _Person | None:
    person = view.reader.person(view.project, amplitude_id)
    if person is None or person.merged_into == FORGOTTEN:
        return None
    return _Person(person.amplitude_id, person.user_id)


def _with_merged(view: View, people: list[int]) -> list[int]:
    """Return the people, whom they were merged into since, and everyone merged into those."""
    merges = view.merges()
    survivors = {merges.get(one, one) for one in people}
    return sorted(survivors | {was for was, survivor in merges.items() if survivor in survivors})
