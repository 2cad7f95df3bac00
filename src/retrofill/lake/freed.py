"""What a deletion takes out of the lake, and what it leaves there: table `freed`.

An event with a user takes its device: what comes on it without a user is that one's. The rows that are left of a device
do not say that somebody else had it for a time, so a fold of them would give it back to whoever had it before. Of each
deleted row that took a device which others have rows on, table `freed` keeps the place, the device and the time, nothing
else: from there on the device is nobody's until another's event takes it. On a device of theirs alone nothing is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import duckdb
import pyarrow as pa

from retrofill.core.block import Flag, Kind

_SEEN = f"kind <= {int(Kind.GROUP_IDENTIFY)}"
_HIDDEN = f"kind BETWEEN {int(Kind.DISPLACED)} AND {int(Kind.UNDONE)}"
# A displaced row is of nobody yet, and one that was undone is of whom it would be if it were there. Whose number it has
# may be another user by now: so it says nothing of who they are.
HIDDEN_OF = f"""
WITH hidden AS (
    SELECT "partition", "block", "row", kind, amplitude_id, user_id, device_id FROM lake.events
    WHERE project = $1 AND {_HIDDEN} AND amplitude_id NOT IN (SELECT unnest($2))
), own AS (
    SELECT DISTINCT user_id, device_id, kind = {int(Kind.UNDONE)} AS undone FROM lake.events
    WHERE project = $1 AND amplitude_id IN (SELECT unnest($2))
), users AS (SELECT user_id FROM own WHERE user_id IS NOT NULL AND NOT undone),
devices AS (SELECT device_id FROM own WHERE device_id IS NOT NULL AND (user_id IS NULL OR user_id IN (FROM users)))
SELECT "partition", "block", "row", device_id FROM hidden
WHERE user_id IN (FROM users) OR (user_id IS NULL AND (
    device_id IN (FROM devices)
    OR (kind = {int(Kind.UNDONE)} AND amplitude_id IN (
        SELECT amplitude_id FROM hidden WHERE kind = {int(Kind.UNDONE)} AND amplitude_id > 0 AND user_id IN (FROM users)
    ))
))
"""  # noqa: S608 - numbers of ours
# The rows that a deletion takes: those of people, and hidden ones at some places.
_THEIRS = "amplitude_id IN (SELECT unnest($2))"
GONE = f"""
({_THEIRS} OR ({_HIDDEN} AND ("partition", "block", "row") IN (SELECT unnest($3), unnest($4), unnest($5))))
"""
# An event that was held apart from who has its device did not take it. A displaced one is not there: whether it would be,
# without the import whose row it repeats, can be said no longer.
TOOK = f"user_id IS NOT NULL AND kind <> {int(Kind.DISPLACED)} AND flags & {int(Flag.HELD)} = 0"
_PLACE = f'device_id, "partition", "block", "row", event_time, import_id, kind = {int(Kind.UNDONE)}'
_BLOCK_ROWS = 2**20  # more than a block has
# Every row on a device that one of them is on: the device ids of a project are read once.
_BESIDE = f"""
CREATE OR REPLACE TEMP TABLE beside AS
SELECT project, {_PLACE} AS hidden, {GONE} AS gone, {TOOK} AS took, "block" * {_BLOCK_ROWS} + "row" AS place,
    CASE WHEN {_THEIRS} THEN amplitude_id ELSE $2[1] END AS owner,
    user_id IS NULL AND {_SEEN} AS anonymous, flags & {int(Flag.HELD)} <> 0 AS held
FROM lake.events WHERE project = $1 AND device_id IN (FROM theirs)
"""  # noqa: S608 - names and numbers of ours
_SHARED = (
    "CREATE OR REPLACE TEMP VIEW shared AS SELECT DISTINCT device_id FROM beside WHERE NOT gone"
)
_FREED = 'device_id, "partition", "block", "row", event_time, import_id, hidden'
# Who was held apart from somebody without a user did not take the device, and does not where that one is deleted.
_FREE = f"""
INSERT INTO lake.freed
SELECT project, owner, {_FREED} FROM beside WHERE gone AND took AND device_id IN (FROM shared)
UNION ALL
SELECT project, owner, one.{_FREED} FROM (FROM beside WHERE held AND NOT gone) one
ASOF JOIN (SELECT device_id, place, gone FROM beside WHERE anonymous) other
ON one.device_id = other.device_id AND one.place > other.place
WHERE other.gone
"""  # noqa: S608 - names of ours

# Where somebody begins without a user on a device that others had used, it was nobody's before that block.
_BEGUN = f"""
WITH seen AS (
    SELECT "block" * {_BLOCK_ROWS} + "row" AS place, "block", amplitude_id, user_id, device_id, event_time
    FROM lake.events WHERE project = $1 AND {_SEEN} AND amplitude_id > 0 AND device_id <> ''
), people AS (SELECT min(place) AS place FROM seen GROUP BY amplitude_id),
devices AS (SELECT device_id, min(place) AS first FROM seen GROUP BY device_id)
INSERT INTO lake.freed
SELECT $1, 0, device_id, 0, "block" - 1, {_BLOCK_ROWS - 1}, event_time - 1, NULL, false
FROM seen JOIN people USING (place) JOIN devices USING (device_id) WHERE user_id IS NULL AND first < place
"""  # noqa: S608 - numbers of ours
_NOW = f"""
INSERT INTO lake.freed
SELECT $1, owner, device_id, 0, $2, {_BLOCK_ROWS - 1}, max(event_time), NULL, false
FROM lake.events JOIN now_free USING (device_id) WHERE project = $1 AND {_SEEN} GROUP BY ALL
"""  # noqa: S608


def begin(
    cursor: duckdb.DuckDBPyConnection, block: int, free: Mapping[int, Mapping[str, int]]
) -> None:
    """Fill the table of a lake of before there was one, as far as its rows and the state say.

    free: of each project in which somebody is forgotten, the devices that are nobody's after `block`, with the owner.
    """
    for project, devices in free.items():
        sides = {
            "device_id": pa.array(list(devices), pa.string()),
            "owner": pa.array(list(devices.values()), pa.int64()),
        }
        cursor.register("now_free", pa.table(sides))
        cursor.execute(_NOW, [project, block])
        cursor.execute(_BEGUN, [project])


def delete(cursor: duckdb.DuckDBPyConnection, project: int, people: Sequence[int]) -> int:
    """Delete every row of some people, and what is hidden of them; return how many there were."""
    ids = [project, list(people)]
    hidden = cursor.execute(HIDDEN_OF, ids).fetchall()
    *places, devices = [list(side) for side in zip(*hidden, strict=True)] or [[], [], [], []]
    _free(cursor, [*ids, *places], devices)
    if hidden:
        cursor.execute(
            f'DELETE FROM lake.events WHERE {_HIDDEN} AND ("partition", "block", "row") '  # noqa: S608 - numbers of ours
            "IN (SELECT unnest(?), unnest(?), unnest(?))",
            places,
        )
    gone = cursor.execute(
        f"DELETE FROM lake.events WHERE project = $1 AND {_THEIRS}",  # noqa: S608
        ids,
    ).fetchall()[0][0]
    cursor.execute(
        "DELETE FROM lake.merges WHERE project = $1 "
        "AND (absorbed IN (SELECT unnest($2)) OR surviving IN (SELECT unnest($2)))",
        ids,
    )
    return len(hidden) + int(gone)


def _free(
    cursor: duckdb.DuckDBPyConnection, gone: Sequence[Any], of_hidden: Sequence[str | None]
) -> None:
    """Keep which devices these rows took. gone: the values of `GONE`, after the project; of_hidden: devices of hidden ones."""
    seen = cursor.execute(
        f"SELECT DISTINCT device_id FROM lake.events WHERE project = $1 AND {_THEIRS}",  # noqa: S608
        gone[:2],
    ).fetchall()
    theirs = sorted(filter(None, {one for (one,) in seen}.union(of_hidden)))
    cursor.register("theirs", pa.table({"device_id": pa.array(theirs, pa.string())}))
    cursor.execute(_BESIDE, gone)
    cursor.execute(_SHARED)
    cursor.execute(_FREE)
    cursor.execute(
        "DELETE FROM lake.freed WHERE project = ? "
        "AND device_id IN (FROM theirs) AND device_id NOT IN (FROM shared)",
        gone[:1],
    )
    cursor.execute("DROP VIEW shared")
    cursor.execute("DROP TABLE beside")
