"""One person looked up: by an id or its beginning, and with their history.

A person is shown under the survivor of its merges. Its stream holds the rows of everyone merged into it, and, if other
users are mapped to its user_id, theirs too; a mapped user's own stream is its own alone.
Source: contract, read 3 and 4; identity 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from msgspec import Raw, Struct

from retrofill.core.block import COLUMNS, Flag, Kind
from retrofill.core.person import FORGOTTEN, Person
from retrofill.engine import lines
from retrofill.engine.query import More, Reader, Statement, View
from retrofill.lake import arrow
from retrofill.limits import MATCHES_MAX

_INT64_MAX = 2**63 - 1


class Match(Struct, frozen=True):
    """One person found."""

    user_id: str | None
    amplitude_id: int


class Matches(Struct, frozen=True):
    """The answer of a user search."""

    matches: list[Match]
    type: str


def search(view: View, text: str) -> Matches:
    """Find people by exact user or device id, else by amplitude_id, else by the beginning of their user id."""
    statement = Statement()
    wanted = statement.bind(text)
    exact = _people(view, f"user_id = {wanted} OR device_id = {wanted}", statement)
    if exact:
        return Matches(exact, "match_user_or_device_id")
    if text.isascii() and text.isdigit() and int(text) <= _INT64_MAX:
        found = _match(view, int(text), view.merges())
        if found is not None:
            return Matches([found], "match_amplitude_id")
    statement = Statement()
    begun = (
        _people(view, f"starts_with(user_id, {statement.bind(text)})", statement) if text else []
    )
    return Matches(begun, "match_user_prefix" if begun else "nomatch")


def _people(view: View, where: str, statement: Statement) -> list[Match]:
    source = view.source(
        ("amplitude_id", "user_id", "device_id"), where=where, kinds=(Kind.EVENT, Kind.IDENTIFY)
    )
    rows = view.ask(
        f"SELECT DISTINCT amplitude_id FROM {source} ORDER BY amplitude_id LIMIT {MATCHES_MAX}",
        statement,
    ).fetchall()
    merges = view.merges() if rows else {}
    found = (_match(view, one, merges) for (one,) in rows)
    return list({match.amplitude_id: match for match in found if match is not None}.values())


def _match(view: View, amplitude_id: int, merges: dict[int, int]) -> Match | None:
    person = _person(view, merges.get(amplitude_id, amplitude_id))
    return None if person is None else Match(person.user_id, person.amplitude_id)


def _person(view: View, amplitude_id: int) -> Person | None:
    person = view.reader.person(view.project, amplitude_id)
    return None if person is None or person.merged_into == FORGOTTEN else person


def activity(
    view: View, amplitude_id: int, *, offset: int, limit: int, latest: bool
) -> dict[str, Any]:
    """Return `userData` and `events` of one person; zeros and empty lists if it is not known.

    offset, limit: of the events, newest event time first (oldest if not `latest`), ties by position.
    """
    merges = view.merges()
    canonical = merges.get(amplitude_id, amplitude_id)
    absorbed = sorted(was for was, survivor in merges.items() if survivor == canonical)
    person = _person(view, canonical)
    ids = [canonical, *absorbed, *_mapped(view, person, merges)]
    page = _Page(offset, limit, latest=latest)
    totals = _Stream(view, ids, page).totals()
    data = {
        "user_id": person.user_id if person else None,
        "canonical_amplitude_id": canonical,
        "merged_amplitude_ids": absorbed,
        **totals,
        **_built_in(person),
        "properties": person.properties if person else {},
    }
    text = lines.text_of(page.rows(lines.COLUMNS))
    return {"userData": data, "events": [Raw(line) for line in text.split(b"\n")[:-1]]}


def _mapped(view: View, person: Person | None, merges: dict[int, int]) -> list[int]:
    """Return everyone whose user is mapped to this person's."""
    if person is None or person.user_id is None:
        return []
    users = [user for user, to in view.reader.aliases(view.project).items() if to == person.user_id]
    if not users:
        return []
    found = {merges.get(one, one) for _, one in view.people_of(users)} - {person.amplitude_id}
    return sorted({*found, *(was for was, survivor in merges.items() if survivor in found)})


def _built_in(person: Person | None) -> dict[str, Any]:
    columns: Iterable[str | None] = person.columns if person else [None] * len(COLUMNS)
    has = dict(zip(COLUMNS, columns, strict=True))
    system = " ".join(one for one in (has["os_name"], has["os_version"]) if one)
    return {
        "platform": has["platform"],
        "os": system or None,
        "version": has["version_name"],
        "device": has["device_family"] or has["device_model"],
        "device_type": has["device_type"] or has["device_model"],
        "carrier": has["carrier"],
        "country": has["country"],
        "region": has["region"],
        "city": has["city"],
        "dma": has["dma"],
        "language": has["language"],
        "start_version": has["start_version"],
        "paying": has["paying"],
    }


def mapped(reader: Reader, project: int, users: list[str]) -> dict[str, dict[str, Any]]:
    """Return for each user its own amplitude_id and whom it is mapped to and from; nothing for an unknown one.

    Source: contract, ingest 8, "/usermap", row "read".
    """
    with reader.view(project) as view:
        to = dict(reader.aliases(project))
        sources: dict[str, list[str]] = {}
        for user, target in to.items():
            sources.setdefault(target, []).append(user)
        named = {*users, *(to[user] for user in users if user in to)}
        named.update(one for user in users for one in sources.get(user, ()))
        merges = view.merges()
        ids = {user: merges.get(one, one) for user, one in view.people_of(sorted(named))}

    def shown(user: str) -> dict[str, Any]:
        return {"amplitude_id": ids.get(user), "user_id": user}

    return {
        user: {
            "amplitude_id": ids.get(user),
            "mapped_from": [shown(one) for one in sorted(sources.get(user, ()))],
            "mapped_to": [shown(to[user])] if user in to else [],
        }
        if user in ids or user in to or user in sources
        else {}
        for user in users
    }


class _Stream:
    """The events of some amplitude_ids, read once: counted, and the first ones in an order picked out.

    For both a few columns are enough. The others are read of the rows of the page alone.
    """

    def __init__(self, view: View, ids: list[int], page: _Page) -> None:
        self._view = view
        self._ids = ids
        self._page = page

    def _batches(self, found: Iterator[tuple[More, pa.Table]]) -> Iterator[pa.RecordBatch]:
        for more, rows in found:
            self._page.offer(rows, more)
            yield from rows.append_column(_PROPERTIES, _earning(rows, more)).to_batches()

    def totals(self) -> dict[str, Any]:
        """Count over the whole stream. usage_time in ms."""
        found = self._view.events_of(self._ids, _COUNTED)
        name = self._view.lend(pa.RecordBatchReader.from_batches(_STREAM, self._batches(found)))
        source = f"""(
            SELECT *, CASE WHEN earned THEN {_REVENUE_SQL} END AS revenue
            FROM (SELECT *, (flags & {int(Flag.REVENUE)}) != 0 AS earned FROM {name})
        )"""
        row = self._view.ask(f"""
            WITH stream AS MATERIALIZED (SELECT * FROM {source}),
            sessions AS (
                SELECT least(max(event_time) - min(event_time), 86400000) AS ms
                FROM stream WHERE session_id >= 0 GROUP BY session_id
            ),
            devices AS (
                SELECT device_id, min(event_time) AS first, max((event_time, block, row)) AS last
                FROM stream WHERE device_id IS NOT NULL GROUP BY device_id
            )
            SELECT count(*), strftime(make_timestamp(min(event_time) * 1000), '%Y-%m-%d'),
                   strftime(make_timestamp(max(event_time) * 1000), '%Y-%m-%d'),
                   count(*) FILTER (earned), coalesce(sum(revenue), 0),
                   (SELECT count(*) FROM sessions), (SELECT coalesce(sum(ms), 0)::BIGINT FROM sessions),
                   (SELECT coalesce(list(device_id ORDER BY first, device_id), []) FROM devices),
                   (SELECT arg_max(device_id, last) FROM devices),
                   arg_max({{'lat': location_lat, 'lng': location_lng}}, (event_time, block, row))
                       FILTER (location_lat IS NOT NULL AND location_lng IS NOT NULL)
            FROM stream
        """).fetchone()
        return {
            "num_events": row[0],
            "num_sessions": row[5],
            "usage_time": row[6],
            "first_used": row[1],
            "last_used": row[2],
            "purchases": row[3],
            "revenue": row[4],
            "device_ids": row[7],
            "last_device_id": row[8],
            "last_location": row[9],
        }


def _earning(rows: pa.Table, more: More) -> pa.Array:
    """Return the event properties of rows that earned something, null for all others."""
    earned = (rows["flags"].to_numpy() & int(Flag.REVENUE)) != 0
    if not earned.any():
        return pa.nulls(len(rows), pa.string())
    texts = more((_PROPERTIES.name,), np.flatnonzero(earned))[_PROPERTIES.name]
    return texts.combine_chunks().take(pa.array(np.cumsum(earned) - 1, mask=~earned))


class _Page:
    """Some events out of all that are offered: those at offset … offset + limit in an order."""

    def __init__(self, offset: int, limit: int, *, latest: bool) -> None:
        self._offset = offset
        self._count = offset + limit
        self._sign = -1 if latest else 1
        self._sources: list[More] = []
        # The keys in the order of importance, then the source and the index in it: a column a row.
        self._best = np.empty((5, 0), np.int64)

    def offer(self, rows: pa.Table, more: More) -> None:
        """Take rows with the columns of _KEYS; `more` reads the others."""
        count = len(rows)
        source = np.full(count, len(self._sources))
        keys = (rows[name].to_numpy() for name in _KEYS)
        self._sources.append(more)
        offered = np.stack([*keys, source, np.arange(count)])
        best = np.concatenate([self._best, offered], axis=1)
        order = np.lexsort(best[2::-1] * self._sign)
        self._best = best[:, order[: self._count]]

    def rows(self, columns: Sequence[str]) -> pa.Table:
        """Return the events of the page, in order."""
        source, index = self._best[3:, self._offset :]
        tables, places = [], []
        for one in np.unique(source).tolist():
            at = np.flatnonzero(source == one)
            tables.append(self._sources[one](columns, index[at]))
            places.append(at)
        if not tables:
            return pa.schema([arrow.SCHEMA.field(name) for name in columns]).empty_table()
        return pa.concat_tables(tables).take(pa.array(np.argsort(np.concatenate(places))))


_KEYS = ("event_time", "block", "row")
_COUNTED = (*_KEYS, "session_id", "device_id", "flags", "location_lat", "location_lng")
_PROPERTIES = arrow.SCHEMA.field("event_properties")
_STREAM = pa.schema([*map(arrow.SCHEMA.field, _COUNTED), _PROPERTIES])
# Source: contract, events 7: `$revenue`, or else price × quantity.
_REVENUE_SQL = """coalesce(
    TRY_CAST(json_extract_string(event_properties, '/$revenue') AS DOUBLE),
    TRY_CAST(json_extract_string(event_properties, '/$price') AS DOUBLE)
        * coalesce(TRY_CAST(json_extract_string(event_properties, '/$quantity') AS DOUBLE), 1)
)"""
