"""How far a work directory is: read from its stage and its journal, also while a run goes on."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retrofill.backfill.drive import staged
from retrofill.backfill.journal import Ledger
from retrofill.backfill.send import Progress


def status(work: Path) -> dict[str, Any]:
    """Return the state of a work directory. Raises InputError if nothing is staged there.

    state: `staged` before a first request, `unfinished`, `unsure` when only rows are left that may have been stored, or
    `complete`. Counts are events, but for `requests` and `tries`.
    """
    found = staged(work)
    known: dict[str, Any] = {
        "work": str(work),
        "import": found.import_id,
        "events": found.events,
        "people": found.people,
        "refused": sum(found.refused.values()),
    }
    if not (work / "journal.db").exists():
        return {**known, "state": "staged", "taken": 0, "left": found.events}
    ledger = Ledger(work)
    try:
        totals = ledger.totals()
        facts = ledger.meta()
        statuses = ledger.statuses()
        dead = ledger.dead()
    finally:
        ledger.close()
    left = found.events - totals.taken - totals.dead - totals.unsure
    state = "unfinished" if left else "unsure" if totals.unsure else "complete"
    return {
        **known,
        "state": state,
        "destination": facts.get("destination", ""),
        "taken": totals.taken,
        "left": left,
        "dead": totals.dead,
        "unsure": totals.unsure,
        "requests": totals.requests,
        "tries": totals.tries,
        "first_sent": moment(totals.first_ms),
        "last_answer": moment(totals.last_ms),
        "answers": {
            "none" if code is None else str(code): {"requests": requests, "events": events}
            for code, requests, events in statuses
        },
        "dead_reasons": dict(dead),
    }


def moment(ms: int | None) -> str | None:
    """A time as text, UTC."""
    if ms is None:
        return None
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def line(one: Progress) -> str:
    """How far a run is, in one line."""
    done = one.before + one.taken
    parts = [f"{done:,} of {one.total:,} acknowledged", f"{one.rate:,.0f} events/s"]
    parts += [f"{one.left:,} waiting"]
    if one.held:
        parts.append(f"{one.held:,} throttled ids")
    if one.dead:
        parts.append(f"{one.dead:,} dead letters")
    if one.unsure:
        parts.append(f"{one.unsure:,} unsure")
    left_s = _left_s(one)
    if left_s is not None:
        parts.append(f"{duration(left_s)} left")
    if one.problem:
        again = f", {one.retrying} requests wait to be sent again" if one.retrying else ""
        parts.append(f"{one.problem}{again}")
    return " · ".join(parts)


def _left_s(one: Progress) -> float | None:
    """Return about how long a run still takes: what is left at this rate, and not before the last held id may go on."""
    if not one.left or not (one.rate or one.rest_s):
        return None
    return max(one.left / one.rate if one.rate else 0.0, one.rest_s)


def facts(one: Progress) -> dict[str, Any]:
    """How far a run is, as JSON."""
    left_s = _left_s(one)
    return {
        "acknowledged": one.before + one.taken,
        "of": one.total,
        "waiting": one.left,
        "dead": one.dead,
        "unsure": one.unsure,
        "throttled_ids": one.held,
        "requests": one.requests,
        "under_way": one.flying,
        "events_per_s": round(one.rate, 1),
        "seconds_left": None if left_s is None else round(left_s),
        "bytes": one.bytes,
        "problem": one.problem,
    }


def duration(seconds: float) -> str:
    """A time span as a person says it: its two largest units."""
    whole = round(seconds)
    units = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    for (size, name), (small, small_name) in itertools.pairwise(units):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {name}" + (f" {rest} {small_name}" if rest else "")
    return f"{whole} s"
