"""Lake rows out of a block: what the events sent, what the fold decided, and the snapshot it showed.

`columns` is a pure function of the block, column by column and never event by event where it can be helped, since
every event of the history passes through it once. The built-in columns and the user's properties come from the row's
snapshot (`block.Table`), never from the event; the event gives its ids, times and event properties. An event whose
kind is DROPPED has no row: row numbers keep the gap. One that is DISPLACED has, with what it alone said as its snapshot.

Nothing random is stored. The Export row's `uuid`, and an `event_id` that was not sent, are hashes of the row's
position, the same whoever reads them and whenever; the SQL beside each function says the same to DuckDB.
Source: contract, read 2 (Export row), events 2 and 7.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain, islice, repeat
from typing import Any

import msgspec
import numpy as np
from msgspec import Raw, Struct

from retrofill.core.block import COLUMNS, Block, Kind, Part
from retrofill.core.event import import_name
from retrofill.core.identity import derived_device

Numbers = np.ndarray[Any, Any]


class Repeated(Struct, frozen=True, gc=False):
    """A column of few distinct values: row i holds values[index[i]]."""

    values: Sequence[Any]
    index: Numbers


# A column: one entry a row. JSON text stands as bytes or Raw, and empty means none.
Column = Sequence[Any] | Numbers | Repeated | None

# Which keys an Export row has: all of them, always. Source: contract, read 2, "Row keys".
EXPORT_KEYS = (
    "$insert_id",
    "$insert_key",
    "$schema",
    "adid",
    "amplitude_attribution_ids",
    "amplitude_event_type",
    "amplitude_id",
    "app",
    "city",
    "client_event_time",
    "client_upload_time",
    "country",
    "data",
    "data_type",
    "device_brand",
    "device_carrier",
    "device_family",
    "device_id",
    "device_manufacturer",
    "device_model",
    "device_type",
    "dma",
    "event_id",
    "event_properties",
    "event_time",
    "event_type",
    "global_user_properties",
    "group_properties",
    "groups",
    "idfa",
    "ip_address",
    "is_attribution_event",
    "language",
    "library",
    "location_lat",
    "location_lng",
    "os_name",
    "os_version",
    "partner_id",
    "paying",
    "plan",
    "platform",
    "processed_time",
    "region",
    "sample_rate",
    "server_received_time",
    "server_upload_time",
    "session_id",
    "source_id",
    "start_version",
    "user_creation_time",
    "user_id",
    "user_properties",
    "uuid",
    "version_name",
)


class _Origin(Struct, gc=False):
    source_name: str | None = None
    source_version: str | None = None


class _Event(Struct, gc=False):
    """What a row takes from an event; JSON that nobody looks inside stays as it came."""

    event_type: str
    user_id: str | None = None
    device_id: str | None = None
    time: int | None = None
    insert_id: str | None = None
    event_properties: Raw = Raw()
    user_properties: Raw = Raw()
    group_properties: Raw = Raw()
    session_id: int | None = None
    event_id: int | None = None
    price: int | float | None = None
    quantity: int | None = None
    revenue: int | float | None = None
    product_id: str | None = msgspec.field(default=None, name="productId")
    revenue_type: str | None = msgspec.field(default=None, name="revenueType")
    currency: str | None = None
    location_lat: float | None = None
    location_lng: float | None = None
    idfa: str | None = None
    adid: str | None = None
    partner_id: str | None = None
    plan: Raw = Raw()
    groups: Raw = Raw()
    ingestion_metadata: _Origin | None = None


class _Body(Struct, gc=False):
    events: list[_Event]


class _Head(Struct, array_like=True, gc=False):
    """The first field of a `Table`; what follows is passed over."""

    user_properties: Raw


class Vocabulary:
    """The distinct snapshots of some blocks, each with its user properties and its place among the distinct sets of SHOWN.

    All by the JSON text in which a `Table` carries them: a person shows the same one on many rows.
    """

    def __init__(self) -> None:
        self._tables: dict[bytes, int] = {}
        self._sets: dict[bytes, int] = {}
        self.user_properties: list[Raw] = []
        self.shown: list[int] = []

    def places(self, tables: Sequence[bytes]) -> list[int]:
        """Return the place of each table, a new one at the end.

        Tables are JSON as the fold writes it, without blanks: what follows the user's properties begins with a comma.
        """
        known = self._tables
        before = len(known)
        places = [known.setdefault(table, len(known)) for table in tables]
        new = list(islice(reversed(known), len(known) - before))[::-1]
        heads = _decode_heads(b"[" + b",".join(new) + b"]")
        users = [head.user_properties for head in heads]
        tails = [table[len(user) + 1 :] for table, user in zip(new, users, strict=True)]
        assert all(tail[0] == _COMMA for tail in tails)
        sets = self._sets
        self.user_properties += users
        self.shown += [sets.setdefault(tail, len(sets)) for tail in tails]
        return places

    def columns(self) -> dict[str, Sequence[Any]]:
        """Return the columns SHOWN with one entry for each set."""
        rows = [_decode_shown(b"[" + text[1:]) for text in self._sets]
        sides = zip(*rows, strict=True) if rows else repeat(())
        return dict(zip(SHOWN, sides, strict=False))


_decode_body = msgspec.json.Decoder(_Body).decode
_decode_heads = msgspec.json.Decoder(list[_Head]).decode
_decode_shown = msgspec.json.Decoder(tuple[(Raw, Raw, *repeat(str | None, len(COLUMNS)))]).decode  # type: ignore[misc]
_decode_properties = msgspec.json.Decoder(dict[str, Raw]).decode
_encode = msgspec.json.Encoder().encode
_RARE_COLUMNS = (
    "attribution_ids",
    "partner_id",
    "location_lat",
    "location_lng",
    "import_id",
    "event_id",
    "plan",
    "sent_groups",
)
# What is shown of a person beside the properties, and of the groups: few distinct sets stand behind many rows.
SHOWN = ("groups", "group_properties", *COLUMNS)
_IMPORTER = "retrofill"
_COMMA = ord(",")
_NO_OBJECT = 4  # `null` is this long; an object that says something is longer


def columns(blocks: Sequence[Block], vocabulary: Vocabulary) -> dict[str, Column]:
    """Return the columns of the lake table `events` for some blocks, each with one entry a row, in order of position.

    In place of the snapshot's columns stands one, `table`: places in the vocabulary, which learns what is new.
    A column that is None is null on every row.

    Times are ms since the epoch. Empty JSON text means none; `event_properties` are never
    empty. Raises msgspec.DecodeError if a body or snapshot is not what was committed.
    """
    parts = [part for block in blocks for part in block.parts]
    events = list(chain.from_iterable(_decode_body(part.body).events for part in parts))
    kinds = _packed([block.kind for block in blocks], np.uint8)
    assert len(events) == len(kinds)
    kept = np.flatnonzero(kinds != Kind.DROPPED)
    if len(kept) < len(events):
        events = [events[index] for index in kept.tolist()]
    kinds = kinds[kept]
    in_blocks = _Spread(np.array([block.rows for block in blocks], np.int64), kept)
    in_parts = _Spread(np.array([part.rows for part in parts], np.int64), kept)
    created = _packed([block.created_ms for block in blocks], np.int64)[kept]
    client_upload = in_parts.numbers([part.client_upload_ms for part in parts])
    json = _json(events, kinds)
    return {
        "project": in_parts.numbers([part.project for part in parts]),
        "partition": in_blocks.numbers([block.partition for block in blocks]),
        "block": in_blocks.numbers([block.number for block in blocks]),
        "row": in_blocks.places(),
        "amplitude_id": _packed([block.amplitude_id for block in blocks], np.int64)[kept],
        "kind": kinds,
        "flags": _packed([block.flags for block in blocks], np.uint8)[kept],
        **_ids(events, kinds),
        "client_event_time": _client_event_times(events, client_upload),
        "client_upload_time": client_upload,
        "event_time": _packed([block.event_time_ms for block in blocks], np.int64)[kept],
        "server_received_time": in_parts.numbers([part.received_ms for part in parts]),
        "server_upload_time": in_blocks.numbers([block.server_upload_ms for block in blocks]),
        "created_time": np.ma.masked_equal(created, -1),
        "session_id": [-1 if event.session_id is None else event.session_id for event in events],
        **json,
        **_rest(events, json),
        "table": _tables(blocks, in_blocks, vocabulary),
        "said": _packed([block.said for block in blocks], np.int32)[kept],
        "updates_max": in_parts.numbers([part.updates_max for part in parts]),
        "merges_max": _merges_max(events, parts, in_parts),
        "path": Repeated([part.path for part in parts], in_parts.index()),
    }


def _merges_max(events: list[_Event], parts: Sequence[Part], in_parts: _Spread) -> Numbers:
    """Return how many people the user of each row may absorb: 0, any number, also for those who are allowed to."""
    most = in_parts.numbers([part.merges_max for part in parts])
    if any(part.allowed for part in parts):
        for at, (event, part) in enumerate(zip(events, in_parts.index().tolist(), strict=True)):
            if event.user_id in parts[part].allowed:
                most[at] = 0
    return most


class _Spread:
    """What blocks (or requests) say once, on each of their rows. sizes: rows of each, dropped ones included."""

    def __init__(self, sizes: Numbers, kept: Numbers) -> None:
        self._sizes = sizes
        self.kept = kept

    def numbers(self, values: Sequence[int]) -> Numbers:
        """Return each one's number on each of its rows."""
        spread: Numbers = np.repeat(np.array(values, np.int64), self._sizes)
        return spread[self.kept]

    def index(self) -> Numbers:
        """Return for each row which one it is of."""
        return self.numbers(range(len(self._sizes)))

    def places(self) -> Numbers:
        """Return for each row its place in its own one."""
        starts: Numbers = np.cumsum(self._sizes) - self._sizes
        places: Numbers = self.kept - np.repeat(starts, self._sizes)[self.kept]
        return places


def _packed(parts: Sequence[bytes], kind: type[np.generic]) -> Numbers:
    return np.frombuffer(b"".join(parts), kind)


def _ids(events: list[_Event], kinds: Numbers) -> dict[str, Column]:
    users = [event.user_id for event in events]
    devices = [event.device_id for event in events]
    types = [event.event_type for event in events]
    if None in devices:
        devices = [
            derived_device(user) if device is None and user is not None else device
            for device, user in zip(devices, users, strict=True)
        ]
    for index in np.flatnonzero(kinds == Kind.ALIAS).tolist():
        devices[index], types[index] = None, "$usermap"
    return {
        "user_id": users,
        "device_id": devices,
        "event_type": types,
        "insert_id": [event.insert_id for event in events],
    }


def _client_event_times(events: list[_Event], client_upload: Numbers) -> Column:
    """An event without a time happened when it was sent. Source: contract, events 2, `time`."""
    times = [event.time for event in events]
    if None not in times:
        return times
    uploads = client_upload.tolist()
    return [upload if time is None else time for time, upload in zip(times, uploads, strict=True)]


def _tables(blocks: Sequence[Block], in_blocks: _Spread, vocabulary: Vocabulary) -> Numbers:
    """Return for each row the place of its snapshot in the vocabulary."""
    places = vocabulary.places([table for block in blocks for table in block.tables])
    counts = np.array([len(block.tables) for block in blocks], np.int64)
    first = in_blocks.numbers((np.cumsum(counts) - counts).tolist())
    index = _packed([block.table for block in blocks], np.int32)[in_blocks.kept] + first
    found: Numbers = np.array(places, np.int32)[index]
    return found


def _json(events: list[_Event], kinds: Numbers) -> dict[str, Column]:
    """What most events say as JSON."""
    said = [event.event_properties for event in events]
    sent = [
        raw if len(raw) > _NO_OBJECT else _object(raw)
        for raw in [event.user_properties for event in events]
    ]
    groups = (kinds == Kind.GROUP_IDENTIFY) | (kinds == Kind.DISPLACED)
    for index in np.flatnonzero(groups).tolist():
        if events[index].event_type == "$groupidentify":
            sent[index] = _object(events[index].group_properties)
    return {
        "sent": sent,
        "event_properties": [
            raw if len(raw) > _NO_OBJECT else _object(raw) or b"{}" for raw in said
        ],
    }


def _object(raw: Raw) -> Raw | bytes:
    return raw if len(raw) > _NO_OBJECT or bytes(raw) not in (b"", b"null") else b""


def _rest(events: list[_Event], json: dict[str, Column]) -> dict[str, Column]:
    """What few events say; of that, revenue goes into the event properties."""
    # Written out: reading 15 fields by their names takes three times as long.
    special = [
        row
        for row, event in enumerate(events)
        if event.price is not None
        or event.revenue is not None
        or event.quantity is not None
        or event.product_id is not None
        or event.revenue_type is not None
        or event.currency is not None
        or event.idfa is not None
        or event.adid is not None
        or event.partner_id is not None
        or event.location_lat is not None
        or event.location_lng is not None
        or event.ingestion_metadata is not None
        or event.event_id is not None
        or event.plan
        or event.groups
    ]
    if not special:
        return dict.fromkeys(_RARE_COLUMNS)
    rest: dict[str, Any] = {name: [None] * len(events) for name in _RARE_COLUMNS}
    rest["plan"] = [b""] * len(events)
    rest["sent_groups"] = [b""] * len(events)
    event_properties: Any = json["event_properties"]
    for row in special:
        event = events[row]
        origin = event.ingestion_metadata
        rest["attribution_ids"][row] = _hashed(event.idfa, event.adid)
        rest["partner_id"][row] = event.partner_id
        rest["location_lat"][row] = event.location_lat
        rest["location_lng"][row] = event.location_lng
        rest["event_id"][row] = event.event_id
        rest["plan"][row] = _object(event.plan)
        rest["sent_groups"][row] = _object(event.groups)
        if origin is not None and origin.source_name == _IMPORTER:
            version = origin.source_version
            rest["import_id"][row] = version and import_name(version)
        event_properties[row] = _with_revenue(event, event_properties[row])
    return rest


def _hashed(*ids: str | None) -> str | None:
    """Advertising ids are not kept in clear: a JSON array of their hashes. Source: contract, events 2, `idfa`."""
    hashes = [hashlib.sha256(one.encode()).hexdigest() for one in ids if one]
    return _encode(hashes).decode() if hashes else None


def _with_revenue(event: _Event, properties: Raw | bytes) -> Raw | bytes:
    """Add what an event says of revenue outside its properties to them. Source: contract, events 7."""
    price, quantity, revenue = event.price, event.quantity, event.revenue
    if price is not None:
        revenue = price * (1 if quantity is None else quantity)
    earned = {
        "$revenue": revenue,
        "$price": price,
        "$quantity": quantity,
        "$productId": event.product_id,
        "$revenueType": event.revenue_type,
        "$currency": event.currency,
    }
    added = {key: value for key, value in earned.items() if value is not None}
    return _encode(_decode_properties(properties) | added) if added else properties


# Identifiers by position, and the same in SQL over the columns project, partition, block, row.

_HASH_SQL = """md5(concat_ws('/', "project", "partition", "block", "row"))"""
UUID_SQL = (
    f"regexp_replace({_HASH_SQL}, "
    r"'^(.{8})(.{4}).(.{3}).(.{3})(.{12})$', '\1-\2-4\3-8\4-\5')"
)
EVENT_ID_SQL = f"(cast('0x' || substr({_HASH_SQL}, 1, 7) as bigint) + 1)"


def uuid_of(project: int, partition: int, block: int, row: int) -> str:
    """Return a row's uuid, version 4 in shape."""
    text = _hash(project, partition, block, row)
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-8{text[17:20]}-{text[20:32]}"


def event_id_of(project: int, partition: int, block: int, row: int) -> int:
    """Return the event_id of a row that was sent without one, 1 … 2^28."""
    return int(_hash(project, partition, block, row)[:7], 16) + 1


def _hash(project: int, partition: int, block: int, row: int) -> str:
    text = f"{project}/{partition}/{block}/{row}"
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
