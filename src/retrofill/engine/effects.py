"""What an import did to others: what an undo of it will change, told before anybody says yes.

Counted from the rows as they are, lake and unsealed, of one view: nothing is folded again. So these are the people
whom the import's events concern by now; what those become is what the undo itself finds out.
"""

from __future__ import annotations

import pyarrow as pa
from msgspec import Struct

from retrofill.core.block import Flag, Kind
from retrofill.engine.query import Statement, View
from retrofill.limits import Limits

_KINDS = (Kind.EVENT, Kind.IDENTIFY, Kind.GROUP_IDENTIFY)
_IDLE = int(Flag.SKIP | Flag.UPDATE_DROPPED)


class Effects(Struct, frozen=True):
    """Of an import. only_here: people whom no other row shows. The others are counted among those whom another does.

    first_seen: people whose first event it has. properties: people whose properties its events set. merges: that its
    events caused. repeats: events left out because one of its own had come before.
    """

    only_here: int
    first_seen: int
    properties: int
    merges: int
    repeats: int


def effects(view: View, name: str, limits: Limits) -> Effects:
    """Return what an import did to others, nothing of one that has no rows. limits: of the project."""
    return Effects(*_people(view, name), _merges(view, name), _repeats(view, name, limits))


def _people(view: View, name: str) -> tuple[int, int, int]:
    statement = Statement()
    wanted, event, of_group = statement.bind(name), int(Kind.EVENT), int(Kind.GROUP_IDENTIFY)
    source = view.source(
        ("import_id", "amplitude_id", "event_time", "flags", "sent"),
        select=(
            f"import_id IS NOT DISTINCT FROM {wanted} AS mine",
            *("amplitude_id", "kind", "event_time"),
            f"sent IS NOT NULL AND flags & {_IDLE} = 0 AND kind <> {of_group} AS sets",
        ),
        where="amplitude_id > 0",
        kinds=_KINDS,
    )
    found: tuple[int, int, int] = view.ask(
        f"""
        SELECT count(*) FILTER (alone), count(*) FILTER (NOT alone AND first < others),
               count(*) FILTER (NOT alone AND sets)
        FROM (
            SELECT bool_and(mine) AS alone, bool_or(mine AND sets) AS sets,
                   min(event_time) FILTER (kind = {event}) AS first,
                   coalesce(min(event_time) FILTER (kind = {event} AND NOT mine), {2**62}) AS others
            FROM {source} LEFT JOIN {view.people()} ON was = amplitude_id
            GROUP BY coalesce(now, amplitude_id) HAVING bool_or(mine)
        )
        """,
        statement,
    ).fetchone()
    return found


def _merges(view: View, name: str) -> int:
    statement = Statement()
    rows = view.source(
        ("block", "row", "import_id"), where=f"import_id = {statement.bind(name)}", kinds=_KINDS
    )
    placed = view.placed_merges()
    fresh = view.lend(
        pa.table(
            {
                "block": pa.array([block for block, *_ in placed], pa.int64()),
                "row": pa.array([row for _, row, *_ in placed], pa.int64()),
            }
        )
    )
    (found,) = view.ask(
        f"""
        SELECT count(*) FROM (
            SELECT "block", "row" FROM lake.merges WHERE project = {int(view.project)} UNION ALL FROM {fresh}
        ) SEMI JOIN {rows} USING ("block", "row")
        """,
        statement,
    ).fetchone()
    return int(found)


def _repeats(view: View, name: str, limits: Limits) -> int:
    statement = Statement()
    wanted = statement.bind(name)
    names = ("device_id", "event_type", "insert_id", "event_id", "client_event_time", "import_id")
    whole = "true" if limits.dedupe_scope == "project" else "event_type = '$groupidentify'"
    key = (  # as `duplicates` has it
        f"CASE WHEN insert_id IS NOT NULL AND {whole} THEN '' ELSE device_id END AS device",
        "coalesce(insert_id || ' ', event_id || '/' || client_event_time) AS said",
    )
    displaced = view.source(
        names,
        select=key,
        where=f"import_id IS DISTINCT FROM {wanted}",
        kinds=(Kind.DISPLACED,),
    )
    rows = view.source(names, select=key, where=f"import_id = {wanted}", kinds=_KINDS)
    (found,) = view.ask(
        f"SELECT count(*) FROM {displaced} SEMI JOIN {rows} USING (device, said)", statement
    ).fetchone()
    return int(found)
