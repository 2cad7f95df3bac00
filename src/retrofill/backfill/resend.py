"""Sending again what the destination lost after it had said 200 or refused, and the recipe for taking an import back.

Windows are read from the ledger: which rows went in which request, and which `server_upload_time` its answer named.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retrofill.backfill.drive import staged
from retrofill.backfill.journal import Journal, Ledger
from retrofill.errors import InputError

HOUR_MS = 3_600_000


def parse_time(text: str) -> int:
    """Read a moment, ISO 8601 or a day, UTC unless it says otherwise, as ms since the epoch. Raises InputError."""
    try:
        found = datetime.fromisoformat(text.strip())
    except ValueError as problem:
        raise InputError(
            f"{text!r} is no time", mend="Give one such as 2026-03-01 or 2026-03-01T14:30:00Z"
        ) from problem
    if found.tzinfo is None:
        found = found.replace(tzinfo=UTC)
    return round(found.timestamp() * 1000)


def lose(work: Path, *, from_ms: int, to_ms: int, now_ms: int) -> int:
    """Mark what was acknowledged with an upload time of from..to as not stored. Returns how many events.

    Raises InputError for an empty window, BusyError while a run works here.
    """
    if to_ms < from_ms:
        raise InputError("The window ends before it begins", mend="Give --from before --to")
    with _journal(work) as journal:
        return journal.lose(from_ms, to_ms, now_ms)


def revive(work: Path) -> int:
    """Take the dead letters of sending out of the journal. Returns how many events. Raises BusyError while a run works here."""
    with _journal(work) as journal:
        return journal.revive()


@contextlib.contextmanager
def _journal(work: Path) -> Iterator[Journal]:
    staged(work)
    Ledger(work).close()  # says so if there is no journal
    journal = Journal(work)
    try:
        yield journal
    finally:
        journal.close()


def recipe(work: Path) -> dict[str, Any]:
    """Return what a deletion request needs: event types, windows of upload time (whole hours) and of event time."""
    found = staged(work)
    ledger = Ledger(work)
    try:
        windows = ledger.uploads()
        totals = ledger.totals()
        destination = ledger.meta().get("destination", "")
    finally:
        ledger.close()
    return {
        "import": found.import_id,
        "destination": destination,
        "events": totals.taken,
        "event_types": dict(sorted(found.types.items())),
        "upload_windows": [
            {"from": _hour(first), "to": _hour(last + HOUR_MS)} for first, last in windows
        ],
        "event_time": {"from": _day(found.first_ms), "to": _day(found.last_ms)},
        "marks": {"source_name": "retrofill", "source_version": found.import_id},
    }


def _hour(ms: int) -> str:
    return datetime.fromtimestamp(ms // HOUR_MS * 3600, UTC).strftime("%Y-%m-%dT%H:00Z")


def _day(ms: int | None) -> str | None:
    return None if ms is None else datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d")
