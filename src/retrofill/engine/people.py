"""One person looked up: by an id or its beginning, and with their history.

A person is shown under the survivor of its merges. Its stream holds the rows of everyone merged into it, and, if other
users are mapped to its user_id, theirs too; a mapped user's own stream is its own alone.
Source: contract, read 3 and 4; identity 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Raw, Struct

from retrofill.core.block import COLUMNS, Flag, Kind
from retrofill.core.mend import natural
from retrofill.core.person import FORGOTTEN, Person
from retrofill.engine import lines
from retrofill.engine.query import More, Reader, Statement, View
from retrofill.lake import arrow
from retrofill.limits import EARNED_BYTES, MATCHES_MAX, MS_PER_DAY

T = TypeVar("T")


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
    number = natural(text)
    if number is not None:
        found = _match(view, number, view.merges())
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
    totals = _Totals(view)
    for more, rows in view.events_of(ids, _COUNTED):
        page.offer(rows, more)
        totals.add(rows, more)
    data = {
        "user_id": person.user_id if person else None,
        "canonical_amplitude_id": canonical,
        "merged_amplitude_ids": absorbed,
        **totals.shown(),
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


class _Totals:
    """What is counted over the events of one person, taken some at a time and in any order.

    Held of them: a line for each session and each device, and for a while the properties of those that earned.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._events = self._purchases = 0
        # By the keys of the first and the last event: of all, and of each session and device.
        self._all: _Span | None = None
        self._sessions: dict[int, _Span] = {}
        self._devices: dict[str, _Span] = {}
        self._place: tuple[_Key, float, float] | None = None
        self._earned: list[pa.ChunkedArray] = []
        self._revenue = 0.0

    def add(self, rows: pa.Table, more: More) -> None:
        """Take some rows, at least one, with the columns of _COUNTED; `more` reads the others."""
        self._events += len(rows)
        self._earn(rows, more)
        keys = np.stack([rows[name].to_numpy() for name in _KEYS])
        order = np.lexsort(keys[::-1])
        keys, rows = keys[:, order], rows.take(pa.array(order)).combine_chunks()
        self._all = _wider(self._all, (_key(keys, 0), _key(keys, -1)))
        sessions, index = np.unique(
            rows["session_id"].fill_null(-1).to_numpy(), return_inverse=True
        )
        _widen(self._sessions, sessions.tolist(), index, keys)
        devices = rows["device_id"].chunk(0).dictionary_encode()
        index = devices.indices.fill_null(-1).to_numpy()
        _widen(self._devices, devices.dictionary.to_pylist(), index, keys)
        lat, lng = rows["location_lat"], rows["location_lng"]
        placed = np.flatnonzero(pc.and_(lat.is_valid(), lng.is_valid()).to_numpy())
        if len(placed):
            at = int(placed[-1])
            place = (_key(keys, at), lat[at].as_py(), lng[at].as_py())
            self._place = max(self._place or place, place)

    def shown(self) -> dict[str, Any]:
        """Return what `userData` tells of it. usage_time in ms."""
        self._add_up()
        first, last = self._all or (None, None)
        sessions = [span for session, span in self._sessions.items() if session >= 0]
        devices = self._devices
        return {
            "num_events": self._events,
            "num_sessions": len(sessions),
            "usage_time": sum(min(last[0] - first[0], MS_PER_DAY) for first, last in sessions),
            "first_used": first and _day(first[0]),
            "last_used": last and _day(last[0]),
            "purchases": self._purchases,
            "revenue": self._revenue,
            "device_ids": sorted(devices, key=lambda one: (devices[one][0][0], one)),
            "last_device_id": max(devices, key=lambda one: devices[one][1], default=None),
            "last_location": self._place
            and dict(zip(("lat", "lng"), self._place[1:], strict=True)),
        }

    def _earn(self, rows: pa.Table, more: More) -> None:
        earned = np.flatnonzero((rows["flags"].to_numpy() & int(Flag.REVENUE)) != 0)
        if len(earned):
            self._purchases += len(earned)
            self._earned.append(more((_PROPERTIES,), earned)[_PROPERTIES])
            if sum(texts.nbytes for texts in self._earned) > EARNED_BYTES:
                self._add_up()

    def _add_up(self) -> None:
        if not self._earned:
            return
        texts = [chunk for column in self._earned for chunk in column.chunks]
        name = self._view.lend(pa.table({_PROPERTIES: pa.chunked_array(texts)}))
        for (revenue,) in self._view.ask(f"SELECT {_REVENUE_SQL} FROM {name}").fetchall():
            self._revenue += revenue or 0
        self._view.take_back(name)
        self._earned = []


_Key = tuple[int, ...]
_Span = tuple[_Key, _Key]


def _widen(
    spans: dict[T, _Span], names: Sequence[T], at: np.ndarray[Any, Any], keys: np.ndarray[Any, Any]
) -> None:
    """Let spans reach over events whose keys rise. at: the index of each one's name; negative is nobody's."""
    found, first = np.unique(at, return_index=True)
    _, last = np.unique(at[::-1], return_index=True)
    ends = zip(found.tolist(), first.tolist(), (len(at) - 1 - last).tolist(), strict=True)
    for one, begin, end in ends:
        if one >= 0:
            span = _key(keys, begin), _key(keys, end)
            spans[names[one]] = _wider(spans.get(names[one]), span)


def _wider(known: _Span | None, span: _Span) -> _Span:
    return span if known is None else (min(known[0], span[0]), max(known[1], span[1]))


def _key(keys: np.ndarray[Any, Any], at: int) -> _Key:
    return tuple(keys[:, at].tolist())


def _day(time_ms: int) -> str:
    return str(np.datetime64(time_ms, "ms"))[:10]


class _Page:
    """Some events out of all that are offered: those at offset … offset + limit in an order."""

    def __init__(self, offset: int, limit: int, *, latest: bool) -> None:
        self._offset = offset
        self._count = offset + limit
        self._sign = -1 if latest else 1
        self._sources: list[More] = []
        # With the columns offered, and for the others the source and the index in it.
        self._best = pa.table({})

    def offer(self, rows: pa.Table, more: More) -> None:
        """Take rows, each time with the same columns, those of _KEYS among them; `more` reads the others."""
        source = np.full(len(rows), len(self._sources))
        self._sources.append(more)
        rows = rows.append_column(_SOURCE, pa.array(source))
        rows = rows.append_column(_INDEX, pa.array(np.arange(len(rows))))
        rows = pa.concat_tables([self._best, rows]) if self._best.num_columns else rows
        keys = np.stack([rows[name].to_numpy() for name in reversed(_KEYS)])
        order = np.lexsort(keys * self._sign)[: self._count]
        self._best = rows.take(pa.array(order))

    def rows(self, columns: Sequence[str]) -> pa.Table:
        """Return the events of the page, in order."""
        best = self._best.slice(self._offset)
        if not len(best):
            return pa.schema([arrow.SCHEMA.field(name) for name in columns]).empty_table()
        source, index = (best[name].to_numpy() for name in (_SOURCE, _INDEX))
        others = [name for name in columns if name not in best.column_names]
        tables, places = [], []
        for one in np.unique(source).tolist():
            at = np.flatnonzero(source == one)
            tables.append(self._sources[one](others, index[at]))
            places.append(at)
        rest = pa.concat_tables(tables).take(pa.array(np.argsort(np.concatenate(places))))
        whole = [rest[name] if name in others else best[name] for name in columns]
        return pa.Table.from_arrays(whole, list(columns))


_KEYS = ("event_time", "block", "row")
_COUNTED = (*_KEYS, "session_id", "device_id", "flags", "location_lat", "location_lng")
_PROPERTIES = "event_properties"
_SOURCE, _INDEX = "source", "index"
# Source: contract, events 7: `$revenue`, or else price × quantity.
_REVENUE_SQL = """coalesce(
    TRY_CAST(json_extract_string(event_properties, '/$revenue') AS DOUBLE),
    TRY_CAST(json_extract_string(event_properties, '/$price') AS DOUBLE)
        * coalesce(TRY_CAST(json_extract_string(event_properties, '/$quantity') AS DOUBLE), 1)
)"""
