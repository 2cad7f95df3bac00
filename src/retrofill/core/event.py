"""One event as a typed value, and the batch of one request.

Unknown bytes become an `Event` once, here; behind this border nobody checks again. The invariant that the rest
stands on: decoding `Batch.body` gives exactly `Batch.events`. A request that needs any mending (an id to trim, a
number where a string is wanted, a value to cut) is mended and written anew, so that the bytes kept are the bytes
meant.

A request is read in two steps, because its limits are those of its project: `open_envelope` (or `form.open_form`) finds
the key, `parse` does the rest. Each goes the fast way first: one typed decode of everything, then a few sums over
whole columns that are sound but not exact. Whatever they cannot call good at once is looked at event by event, with
the same outcome for events that turn out to be good after all.

Beyond the contract, as decided here: a wrong type in telemetry (`session_id`, `location_lat`, `plan`, …) is ignored,
an object where text is wanted is a fault; a number where text is wanted is that text; a time may be written as 1.0 but
not as text; ids are never cut, since two cut alike would be taken for one person or event: a `user_id` or `device_id`
over the limit is one of an invalid length, as one under it is; a number that no decoder holds (1e999) makes its
properties invalid. `paying` and `start_version` are an identify's to say, and ignored on any other event.

Source of every rule: contract "Event JSON"; the order of checks is its section 12.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import msgspec
from msgspec import Meta, Raw, Struct

from retrofill.core import glance, mend, properties
from retrofill.core.alike import Alike
from retrofill.limits import DEPTH_MAX, STRING_CHARS_MAX, TIME_MS_MAX, Limits

ABSENT = Raw()  # this very object, or else it would be written out, as nothing
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1

_T = TypeVar("_T")
_Kind = Literal["not_object", "missing", "invalid", "id_length"]
_Int64 = Annotated[int, Meta(ge=_INT64_MIN, le=_INT64_MAX)]
_Time = Annotated[int, Meta(ge=0, le=TIME_MS_MAX)]
_Text = Annotated[str, Meta(min_length=1)]
if TYPE_CHECKING:
    _Shared = dict[str, Any] | None
else:
    _Shared = Raw  # as the decoder leaves it, for a moment: see `_share`


class IngestionMetadata(Struct, gc=False, frozen=True, omit_defaults=True):
    """Where an event came from, as its sender says. `retrofill` with an import id marks a backfill."""

    source_name: str | None = None
    source_version: str | None = None


def import_name(source_version: str) -> str:
    """Return the import that a version names: without zeros, at which DuckLake cuts its own statements off."""
    return source_version.replace("\0", "")


class Event(Struct, gc=False, omit_defaults=True):
    """One event as sent, keys as on the wire. None (and an empty Raw) means absent or null."""

    event_type: _Text
    user_id: str | None = None
    device_id: str | None = None
    time: _Time | None = None
    insert_id: _Text | None = None
    event_properties: Raw = ABSENT
    user_properties: _Shared = None  # nobody changes it: other events may say the very same
    groups: dict[str, Any] | None = None
    group_properties: dict[str, Any] | None = None
    skip_user_properties_sync: bool | None = msgspec.field(
        default=None, name="$skip_user_properties_sync"
    )
    session_id: _Int64 | None = None
    event_id: _Int64 | None = None
    platform: str | None = None
    os_name: str | None = None
    os_version: str | None = None
    device_brand: str | None = None
    device_manufacturer: str | None = None
    device_model: str | None = None
    carrier: str | None = None
    country: str | None = None
    region: str | None = None
    city: str | None = None
    dma: str | None = None
    language: str | None = None
    app_version: str | None = None
    version_name: str | None = None
    ip: str | None = None
    library: str | None = None
    start_version: str | None = None
    paying: str | None = None
    user_agent: str | None = None
    price: float | None = None
    quantity: _Int64 | None = None
    revenue: float | None = None
    product_id: str | None = msgspec.field(default=None, name="productId")
    revenue_type: str | None = msgspec.field(default=None, name="revenueType")
    currency: str | None = None
    location_lat: float | None = None
    location_lng: float | None = None
    idfa: str | None = None
    adid: str | None = None
    partner_id: str | None = None
    plan: Raw = ABSENT
    ingestion_metadata: IngestionMetadata | None = None


class Batch(Struct, gc=False):
    """The events of one request, good as they stand.

    body: JSON, an object whose key `events` holds the array; decoding it gives `events`.
    path: the request's path as the Export row's `data.path` shows it. It decides what the events are:
        `/identify`, `/groupidentify`: event_type is `$identify` or `$groupidentify`;
        `/usermap`: `user_id` and either `user_properties = {"global_user_id": text}` or `{"unmap": true}`.
    payload_bytes: size of the request's body, unpacked. remote: the peer's address, for `ip: "$remote"`.
    client_upload_ms: as the request says, or None.
    """

    project: int
    path: str
    body: bytes
    events: list[Event]
    payload_bytes: int
    received_ms: int
    client_upload_ms: int | None = None
    remote: str | None = None


class Fault(Struct, frozen=True):
    """What is wrong with one event. field: the wire key. reason: ours, for the log."""

    index: int
    field: str
    kind: _Kind
    reason: str


class Refusal(Struct, frozen=True):
    """A request of which nothing is stored; `reply.refused` has the words.

    field: with `missing_field`, the key the request lacks. key: with `unknown_key`, the key it gave.
    faults: with `faults`, all of them, in order of events. `missing_event`, `bad_checksum` and `bad_mapping` are for
    the form endpoints.
    """

    kind: Literal[
        "too_large",
        "missing_body",
        "invalid_json",
        "missing_field",
        "unknown_key",
        "faults",
        "missing_event",
        "bad_checksum",
        "bad_mapping",
    ]
    field: str = ""
    key: str = ""
    faults: tuple[Fault, ...] = ()


class Envelope(Struct):
    """A request whose key is known but whose project is not.

    size: bytes after decompression. events: decoded, if the fast way took them; otherwise raw is the JSON array.
    refusal: what `parse` will answer: the key has to be known before anything else is said.
    """

    api_key: str
    size: int
    body: bytes = b""
    events: list[Event] | None = None
    raw: bytes = b""
    min_id_length: int | None = None
    client_upload_ms: int | None = None
    refusal: Refusal | None = None


class _Options(Struct, gc=False):
    min_id_length: Annotated[int, Meta(ge=0)] | None = None


class _Body(Struct, gc=False):
    api_key: str
    events: list[Event]
    options: _Options | None = None
    client_upload_time: str | int | None = None


class _LooseBody(Struct, gc=False):
    api_key: Raw = Raw()
    events: Raw = Raw()
    options: Raw = Raw()
    client_upload_time: Raw = Raw()


class _Stored(Struct, gc=False):
    events: list[Event]


class _Rules(Struct, frozen=True):
    """What the request and its project ask of an event's ids and type."""

    id_length_min: int
    drops_short: bool
    strict: bool
    operations_only: bool  # on /identify a key that starts with $ must be an operation


_alike = Alike()
_decode_body = msgspec.json.Decoder(_Body).decode
_decode_loose = msgspec.json.Decoder(_LooseBody).decode
_decode_stored = msgspec.json.Decoder(_Stored).decode
_decode_event = msgspec.json.Decoder(Event).decode
_decode_keys = msgspec.json.Decoder(dict[str, Raw]).decode
_split = msgspec.json.Decoder(list[Raw]).decode
_encode = msgspec.json.Encoder().encode
_pack = msgspec.msgpack.Encoder().encode
_ODD = (ValueError, RecursionError, OverflowError)  # of a value that is not quite as it should be
_BETWEEN = b"\0"  # what a decoder of JSON lets pass nowhere

IDENTIFY = "$identify"
EXPOSURE, EXPOSED = "$exposure", "[Experiment] Exposure"  # as sent; as stored
RESERVED = frozenset(
    {
        "[Amplitude] Start Session",
        "[Amplitude] End Session",
        "[Amplitude] Revenue",
        "[Amplitude] Revenue (Verified)",
        "[Amplitude] Revenue (Unverified)",
        "[Amplitude] Merged User",
    }
)


def decode(body: bytes) -> list[Event]:
    """Return the events of a `Batch.body`, which was good when it was stored, whatever is asked by now."""
    events = _decode_stored(body).events
    try:
        _share(events)
    except _ODD:
        for event in events:
            if event.user_properties:
                event.user_properties = mend.value(cast("Raw", event.user_properties))
    return events


def decode_one(text: bytes | Raw) -> Event:
    """Return one event. Raises ValueError, RecursionError or OverflowError if it is not good in every type."""
    event = _decode_event(text)
    _share([event])
    return event


def encode(events: Sequence[Event]) -> bytes:
    """Return a `Batch.body` of these events."""
    return _encode({"events": events})


def _share(events: Sequence[Event]) -> None:
    """Put an object in the place of the text of each event's `user_properties`, good as it stands: see `core.alike`.

    Raises ValueError, RecursionError or OverflowError if one is not.
    """
    some = [event for event in events if event.user_properties]
    if some:
        said = cast("list[Raw]", [event.user_properties for event in some])
        texts = _BETWEEN.join(said).split(_BETWEEN)  # a tenth of what `bytes(raw)` costs
        for event, meant in zip(some, _alike.read(texts), strict=True):
            event.user_properties = meant


def bytes_max(path: str, limits: Limits) -> int:
    """Return how large a request to an ingest path may be, after decompression."""
    if path == "/batch":
        return limits.batch_bytes
    if path in {"/identify", "/groupidentify", "/usermap"}:
        return limits.identify_bytes
    return limits.httpapi_bytes


def open_envelope(body: bytes, *, size_max: int | None = None) -> Envelope | Refusal:
    """Find the key of a `/2/httpapi` or `/batch` request, and decode as much as that takes.

    body: after decompression. size_max: the largest that any project takes; its own limit is checked by `parse`.
    """
    if (size_max is not None and len(body) > size_max) or mend.crowded(body):
        return Refusal("too_large")
    if not body or body.isspace():
        return Refusal("missing_body")
    try:
        found = _decode_body(body)
        if not body.isascii():
            body.decode()  # what the decoder skips it does not check
        _share(found.events)
    except _ODD:
        return _open_odd(body)
    if not found.api_key:
        return Refusal("missing_field", "api_key")
    return Envelope(
        found.api_key,
        len(body),
        body,
        found.events,
        min_id_length=found.options.min_id_length if found.options else None,
        client_upload_ms=mend.time_ms(found.client_upload_time),
    )


def _open_odd(body: bytes) -> Envelope | Refusal:
    size = len(body)
    loose = read_odd(body, _decode_loose)
    if loose is None:
        return Refusal("invalid_json")
    api_key = mend.optional(mend.string, loose.api_key)
    if not api_key:
        return Refusal("missing_field", "api_key")
    options = mend.optional(mend.value, loose.options)
    return Envelope(
        api_key,
        size,
        raw=bytes(loose.events),
        min_id_length=id_length_min(options),
        client_upload_ms=mend.time_ms(mend.optional(mend.value, loose.client_upload_time)),
    )


def read_odd(body: bytes, decoder: Callable[[bytes], _T]) -> _T | None:
    """Decode what an ordinary decoder may stumble over, or return None if it is not JSON of that form."""
    good = mend.text(body)
    if good is None:
        return None
    try:
        return decoder(good)
    except RecursionError:
        shallow = mend.prune(good)
    except ValueError:
        return None
    if shallow is None:
        return None
    try:
        return decoder(shallow)
    except (ValueError, RecursionError):
        return None


def id_length_min(options: Any) -> int | None:  # noqa: ANN401 - JSON
    """Return `min_id_length` of a request's options, None if it says nothing of use."""
    said = options.get("min_id_length") if isinstance(options, dict) else None
    return said if type(said) is int and said >= 0 else None


def parse(
    envelope: Envelope,
    *,
    project: int,
    path: str,
    limits: Limits,
    received_ms: int,
    remote: str | None,
    payload_bytes: int,
) -> Batch | Refusal:
    """Check and mend the events of a request of a known project.

    path: one of the ingest paths; it decides which limits hold. payload_bytes: of the body, unpacked, for the answer.
    """
    if envelope.size > bytes_max(path, limits):
        return Refusal("too_large")
    if envelope.refusal:
        return envelope.refusal
    rules = _rules(envelope, path, limits)
    notes = _Notes()
    events: Sequence[Event | None] | None = envelope.events
    if events is None:
        raws = mend.optional(_split, Raw(envelope.raw)) or read_odd(envelope.raw, _split) or []
        count = len(raws)
    else:
        count = len(events)
    if not count:
        return Refusal("missing_field", "events")
    if count > events_max(path, limits):
        return Refusal("too_large")
    if events is None:
        events = [_read(raw, index, notes) for index, raw in enumerate(raws)]
    body = _mended(envelope, events, rules, notes)
    if notes.faults:
        return Refusal("faults", faults=notes.all())
    return Batch(
        project,
        path,
        body,
        cast("list[Event]", events),  # one that is no object is a fault
        payload_bytes,
        received_ms,
        envelope.client_upload_ms,
        remote,
    )


def _mended(
    envelope: Envelope, events: Sequence[Event | None], rules: _Rules, notes: _Notes
) -> bytes:
    """Mend events in place, as far as a glance does not find all of them good, and return the body that they are."""
    doubts = _Doubts()
    if not notes.faults:  # otherwise nothing is stored, but everything that is wrong is said
        good = cast("list[Event]", events)
        text = envelope.body or envelope.raw
        doubts = _Doubts(
            ids=not _good_ids(good, rules),
            # What was read with care may hold any number.
            objects=rules.operations_only
            or envelope.events is None
            or not _good_objects(text, good),
            strings=not glance.strings(text),
            exposures=EXPOSURE in [one.event_type for one in good],
            claims=False in [one.paying is one.start_version is None for one in good],
        )
    if envelope.events is not None and not any(msgspec.structs.astuple(doubts)):
        return envelope.body
    for index, event in enumerate(events):
        if event is not None:
            notes.index = index
            _mend(event, doubts, rules, notes)
    return b"" if notes.faults else encode(cast("list[Event]", events))


def events_max(path: str, limits: Limits) -> int:
    """Return how many events, identifies or mappings a request to an ingest path may hold."""
    if path == "/groupidentify":
        return limits.group_identifies
    return limits.usermap_mappings if path == "/usermap" else limits.batch_events


def _rules(envelope: Envelope, path: str, limits: Limits) -> _Rules:
    said = envelope.min_id_length
    drops = path != "/2/httpapi" if limits.ids_short == "contract" else limits.ids_short == "drop"
    return _Rules(
        limits.id_length_min if said is None else said,
        drops,
        limits.strict_event_types,
        path == "/identify",
    )


# The fast way: see `core.glance`.


def _good_ids(events: list[Event], rules: _Rules) -> bool:
    """Say whether every event has an id, and no id or event type needs mending."""
    if rules.strict and not RESERVED.isdisjoint([event.event_type for event in events]):
        return False
    users = [event.user_id for event in events]
    devices = [event.device_id for event in events]
    if None in users and None in devices:
        return False
    known = [one for one in chain(users, devices) if one is not None]
    return glance.ids(known, length_min=rules.id_length_min)


def _good_objects(body: bytes, events: list[Event]) -> bool:
    """Say whether no object is too deep or holds a number out of range, and groups and plans are in order.

    The user properties are good already: see `_share`.
    """
    sent = [1 for event in events if event.user_properties]
    raws = [event.event_properties for event in events if event.event_properties]
    plans = [event.plan for event in events if event.plan]
    groups = [event.groups for event in events if event.groups]
    grouped = [event.group_properties for event in events if event.group_properties]
    sources = [1 for event in events if event.ingestion_metadata]
    try:
        _pack(grouped)  # refuses whole numbers beyond 64 bits
    except (OverflowError, RecursionError):
        return False
    objects: tuple[Sized, ...] = (events, sent, raws, plans, groups, grouped, sources)
    spare = glance.openings(body) - 1 - sum(map(len, objects))
    return (
        all(mend.plan(plan) == plan for plan in set(map(bytes, plans)))
        and glance.groups(groups)
        and not (spare >= DEPTH_MAX and mend.too_deep(*grouped))
        and (not raws or glance.raws(raws, spare=spare))
    )


# The careful way: one event at a time, every fault noted.


class _Doubts(Struct, frozen=True):
    """What a glance does not find good in every event."""

    ids: bool = True
    objects: bool = True
    strings: bool = True
    exposures: bool = True
    claims: bool = True


class _Notes:
    """Collects the faults of a batch. index: of the event that is looked at."""

    def __init__(self) -> None:
        self.faults: dict[int, list[Fault]] = {}
        self.index = 0

    def add(self, kind: _Kind, field: str, reason: str) -> None:
        self.faults.setdefault(self.index, []).append(Fault(self.index, field, kind, reason))

    def name(self, *fields: str) -> bool:
        """Say whether one of the fields of this event has a fault."""
        return any(fault.field in fields for fault in self.faults.get(self.index, ()))

    def all(self) -> tuple[Fault, ...]:
        """Return all faults in order of events."""
        return tuple(chain.from_iterable(self.faults[index] for index in sorted(self.faults)))


def _mend(event: Event, doubts: _Doubts, rules: _Rules, notes: _Notes) -> None:
    _mend_type(event, rules, notes)
    if doubts.ids or doubts.strings:
        _mend_ids(event, rules, notes)
    if doubts.objects:
        _mend_objects(event, rules, notes)
    if doubts.exposures and event.event_type == EXPOSURE and not notes.faults:
        _expose(event, notes)
    if doubts.strings:
        _cut_strings(event)
    if doubts.claims and event.event_type != IDENTIFY:
        event.paying = event.start_version = None


def _read(raw: Raw, index: int, notes: _Notes) -> Event | None:
    """Read an event of which some value may not be of its type."""
    try:
        return decode_one(raw)
    except _ODD:
        keys = mend.optional(_decode_keys, raw)
    notes.index = index
    if keys is None:
        notes.add("not_object", "event", "the event is no object")
        return None
    event = Event("")
    for key, said in keys.items():
        if key not in _READERS:
            continue
        attribute, read, needed = _READERS[key]
        try:
            setattr(event, attribute, read(said))
        except (ValueError, RecursionError) as problem:
            if needed:
                notes.add("invalid", key, str(problem))
    return event


def _read_type(raw: Raw) -> str:
    found = mend.value(raw)
    if found is None or type(found) is str:
        return found or ""
    raise ValueError("no text")


def _read_insert_id(raw: Raw) -> str | None:
    return mend.string(raw) or None


def _read_time(raw: Raw) -> int | None:
    return mend.integer(raw, low=0, high=TIME_MS_MAX)


def _read_int64(raw: Raw) -> int | None:
    return mend.integer(raw, low=_INT64_MIN, high=_INT64_MAX)


def _read_metadata(raw: Raw) -> IngestionMetadata | None:
    found = _decode_keys(raw)
    said = {name: mend.optional(mend.string, found.get(name, Raw())) for name in _METADATA}
    return IngestionMetadata(**said)


_METADATA = ("source_name", "source_version")
# Kept to STRING_CHARS_MAX, like the property values that most of them become.
_CUT = (
    *("event_type", "platform", "os_name", "os_version"),
    *("device_brand", "device_manufacturer", "device_model"),
    *("carrier", "country", "region", "city", "dma", "language", "app_version", "version_name"),
    *("ip", "library", "start_version", "paying", "product_id", "revenue_type", "currency"),
    *("idfa", "adid", "partner_id"),
)
# How each key is read when it is not of its type, and whether a misfit is a fault. The rest is text.
_READERS_OF: dict[str, tuple[Callable[[Raw], Any], bool]] = {
    "event_type": (_read_type, True),
    "user_id": (mend.identifier, True),
    "device_id": (mend.identifier, True),
    "time": (_read_time, True),
    "insert_id": (_read_insert_id, True),
    "event_properties": (Raw, True),
    "user_properties": (mend.object_, True),
    "groups": (mend.object_, True),
    "group_properties": (mend.object_, True),
    "skip_user_properties_sync": (mend.truth, True),
    "session_id": (_read_int64, False),
    "event_id": (_read_int64, False),
    "price": (mend.number, True),
    "quantity": (_read_int64, True),
    "revenue": (mend.number, True),
    "location_lat": (mend.number, False),
    "location_lng": (mend.number, False),
    "plan": (Raw, False),
    "ingestion_metadata": (_read_metadata, False),
}
_READERS = {
    field.encode_name: (field.name, *_READERS_OF.get(field.name, (mend.string, True)))
    for field in msgspec.structs.fields(Event)
}


def _mend_type(event: Event, rules: _Rules, notes: _Notes) -> None:
    if not event.event_type:
        if not notes.name("event_type"):
            notes.add("missing", "event_type", "absent or empty")
    elif rules.strict and event.event_type in RESERVED:
        notes.add("invalid", "event_type", "reserved")


def _mend_ids(event: Event, rules: _Rules, notes: _Notes) -> None:
    """Trim, drop and judge the two ids. Source: contract, events 4 and ingest 6."""
    usable: dict[str, str] = {}
    unfit: dict[str, str] = {}
    zero = False
    for field in ("user_id", "device_id"):
        said: str | None = getattr(event, field)
        said = (said or "").lstrip(" ")
        if field == "device_id" and said == glance.ZERO_DEVICE:
            zero = True
        elif said in glance.FORBIDDEN_IDS:
            notes.add("invalid", field, "stands for no id")
        elif said and (reason := _unfit(said, rules)):
            unfit[field] = reason
        elif said:
            usable[field] = said
    event.user_id = usable.get("user_id")
    event.device_id = usable.get("device_id")
    needless = bool(usable) or event.event_type == "$groupidentify"
    if not (rules.drops_short and needless):
        for field, reason in unfit.items():
            notes.add("id_length", field, reason)
    if zero and not needless:
        notes.add("invalid", "device_id", "all zeros")
    if not needless and not notes.name("user_id", "device_id"):
        notes.add("missing", "user_id", "the event has neither id")
        notes.add("missing", "device_id", "the event has neither id")


def _unfit(said: str, rules: _Rules) -> str:
    """Say why an id is not of a valid length, nothing if it is."""
    if len(said) < rules.id_length_min:
        return f"shorter than {rules.id_length_min} characters"
    return f"longer than {STRING_CHARS_MAX:,} characters" if len(said) > STRING_CHARS_MAX else ""


def _mend_objects(event: Event, rules: _Rules, notes: _Notes) -> None:
    for field, mended, absent in _OBJECTS:
        said = getattr(event, field)
        if said:
            try:
                setattr(event, field, mended(said))
            except ValueError as problem:
                setattr(event, field, absent)
                notes.add("invalid", field, str(problem))
    plan = mend.plan(bytes(event.plan)) if event.plan else b""
    event.plan = Raw(plan) if plan else ABSENT
    sent = event.user_properties
    if rules.operations_only and sent and properties.unknown(sent):
        notes.add("invalid", "user_properties", "an operation that does not exist")


def _expose(event: Event, notes: _Notes) -> None:
    """Turn `$exposure` into the event that it stands for."""
    found = mend.value(event.event_properties) if event.event_properties else None
    properties_, sent = mend.exposure(found, event.user_properties or {})
    try:
        sent = _check_properties(sent)  # a variant may be anything, and is a property now
    except ValueError as problem:
        notes.add("invalid", "event_properties", str(problem))
        return
    event.event_type = EXPOSED
    event.event_properties = Raw(_encode(properties_))
    event.user_properties = sent or None


def _check_raw(raw: Raw) -> Raw:
    return ABSENT if mend.object_(raw) is None else raw


def _check_properties(found: dict[str, Any]) -> dict[str, Any]:
    if mend.too_deep(found):
        raise ValueError(f"more than {DEPTH_MAX} levels")
    return mend.held(found)  # type: ignore[no-any-return]  # an object stays one


_OBJECTS: tuple[tuple[str, Callable[[Any], Any], Raw | None], ...] = (
    ("event_properties", _check_raw, ABSENT),
    ("user_properties", _check_properties, None),
    ("groups", mend.groups, None),
    ("group_properties", _check_properties, None),
)


def _cut_strings(event: Event) -> None:
    """Cut what is too long. All objects have passed `_mend_objects` or a glance."""
    raw = event.event_properties
    if len(raw) > STRING_CHARS_MAX:
        found = mend.value(raw)
        short = mend.cut(found)
        if short is not found:
            event.event_properties = Raw(_encode(short))
    for name in ("user_properties", "groups", "group_properties"):
        said = getattr(event, name)
        if said:
            setattr(event, name, mend.cut(said))
    for name in _CUT:
        said = getattr(event, name)
        if said is not None and len(said) > STRING_CHARS_MAX:
            setattr(event, name, said[:STRING_CHARS_MAX])
