"""Rows that become events without SQL: where every field of a mapping is just a column, and the row has nothing odd.

A row is decoded into a struct with the fields of the mapping and encoded again under their targets' names; properties go
through as the source wrote them. That costs a fifth of what the mapping's query costs. The query stays what a mapping
means: a row passes here only where it would come out the same, all others are handed on to it. So what a row becomes
depends on the row alone, never on its neighbours. Handed on are rows that are no JSON, whose values have other types than
their fields, without a usable id, with a forbidden or short one, without a type or time, or with a number or an escape that
the query writes more simply; properties with white space between their parts are written without it, as the query does.

Most large sources need not even that. Where fields and columns have the same names, a row of its own line that holds nothing
but what the mapping names, each key once, no null, an insert_id and nothing odd is an event as it stands: it is looked at (`scan`),
and its bytes go through. Its members keep the source's order, white space and way to write a number, which mean the same to whoever
reads them; only an insert_id that is made, the hash of the text, needs one way to write an event.

Nearly all batches hold nothing that the core would mend or refuse: their events are finished here, as lines of JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import md5
from itertools import starmap
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Meta, Raw, Struct
from numpy.typing import NDArray

from retrofill.backfill import check, memory, places
from retrofill.backfill import objects as objects_
from retrofill.backfill.check import Checker
from retrofill.backfill.columns import Columns
from retrofill.backfill.compiled import Compiled
from retrofill.backfill.objects import Objects
from retrofill.backfill.people import Ints
from retrofill.backfill.texts import flat, less
from retrofill.core import event, glance
from retrofill.core.mapping import Field
from retrofill.limits import STRING_CHARS_MAX, TIME_MS_MAX

if TYPE_CHECKING:
    from retrofill.backfill.scan import Found, Scanner

_CHARS_MAX = STRING_CHARS_MAX // 4  # characters that are surely no more bytes than an id may have
_SURE_BYTES = 12  # no forbidden id is as long but for one
_ZEROS: Final = glance.ZERO_DEVICE.encode()
_FIRST: Final = (
    "event_type",
    "user_id",
    "device_id",
    "time",
)  # of an event's members, in this order
_KEY: Final = "insert_id"
_ABSENT = Raw()
_BACKSLASH, _NEWLINE, _RETURN, _SPACE, _ZERO = 92, 10, 13, 32, 48
_OPEN, _CLOSE = 0x7B, 0x7D
_SIMPLE = np.zeros(256, np.bool_)
_SIMPLE[list(b'"\\bfnrt')] = True  # escapes that every writer of JSON writes so
_LONG = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None
# How each kind of field is decoded, and the column's types for which the query does the same.
_KINDS: Final[dict[str, tuple[Any, object, frozenset[str]]]] = {
    "text": (str | None, None, frozenset()),
    "millis": (_LONG, None, frozenset({"BIGINT"})),
    "integer": (_LONG, None, frozenset({"BIGINT"})),
    "object": (Raw, _ABSENT, frozenset({"JSON"})),
}
# Ours: of a source. Below that compiling what looks at rows takes longer than it saves; and where that is compiled already, loading it.
SCANNED_BYTES = 160 * 1024 * 1024
SCANNED_BYTES_MIN = 16 * 1024 * 1024
_STANDING = 0.4  # ours: of the sampled rows that pass as they stand; with fewer, looking costs more than it saves
_SAMPLE_ROWS = 1000
_NEEDED: Final = frozenset({"event_type", "time", _KEY})  # by a row that passes as it stands
_LOOKED_INTO: Final = frozenset({"groups", "plan"})  # whose values the core may mend
_IDS = pa.schema([(name, pa.string()) for name in ("device_id", "user_id", "insert_id_")])

_encoder = msgspec.json.Encoder()


class _Member(Struct, frozen=True):
    """One member of the events. source: the key in the row; name: of the struct's field."""

    field: Field
    source: str
    name: str


class _Events(Struct):
    """Events of one batch, column by column. odd: which of them are not for the straight way."""

    event_type: list[str]
    ids: pa.RecordBatch
    time_ms: Ints
    odd: NDArray[np.bool_]


def straight(
    found: Compiled,
    columns: Columns,
    checker: Checker,
    odd: Callable[[pa.RecordBatch], None],
    sample: Sequence[str | None] = (),
) -> Straight | None:
    """Return the straight way of a compiled mapping, None if it has none. odd: takes the rows that are not for it.

    sample: rows of a large source, which say whether it is worth looking for such that pass as they stand.
    """
    if columns.style != "json" or not found.plain:
        return None
    members = []
    for field, number in zip(found.fields, found.bare, strict=True):
        if number is None or len(field.path) > 1 or len(columns.used[number]) > 1:
            return None
        kinds = _KINDS[field.kind][2] if field.kind in _KINDS else frozenset({"none"})
        if kinds and columns.kind(number) not in kinds:
            return None
        source = columns.used[number][0]
        if _encoder.encode(source) != f'"{source}"'.encode():  # a struct's keys are plain
            return None
        members.append(_Member(field, source, f"f{number}"))
    kinds_by_source = {(one.source, one.field.kind) for one in members}
    if len(kinds_by_source) > len({one.source for one in members}):
        return None
    return Straight(members, checker, odd, [row.encode() for row in sample[:_SAMPLE_ROWS] if row])


class Straight:
    """The straight way of one mapping over one source."""

    def __init__(
        self,
        members: Sequence[_Member],
        checker: Checker,
        odd: Callable[[pa.RecordBatch], None],
        sample: Sequence[bytes],
    ) -> None:
        self._checker, self._odd = checker, odd
        ours = {one.field.name: one for one in members}
        self._own = {name: ours[name].name for name in (*_FIRST, _KEY) if name in ours}
        first = [ours[name] for name in (_KEY, *_FIRST) if name in ours]
        body = [*first, *(one for one in members if one.field.name not in self._own)]
        self._tables = {one.field.name: one.name for one in body if one.field.kind == "object"}
        every = {one.name: one for one in (*body, *members)}.values()
        self._read = msgspec.json.Decoder(_struct([(one, one.name, one.source) for one in every]))
        self._write: type[Struct] | None = None
        self._key = self._own.get(_KEY)  # of the struct that is written
        if any(one.source != one.field.name for one in members):
            named = [(one, f"g{at}", one.field.name) for at, one in enumerate(body)]
            self._write = _struct(named)
            self._key = "g0" if _KEY in self._own else None
        self._parts = attrgetter(*(one.name for one in body))
        self._scanner = _scanner(members, sample, checker) if self._write is None else None

    def events(self, records: Iterable[pa.RecordBatch]) -> Iterator[tuple[pa.RecordBatch, bool]]:
        """Yield events, and whether they are finished: the core would take them as they are.

        Finished ones have SPILLED's columns but for hashes, which some have, others those of the query's answer that an
        event has. Those that pass as they stand have `at`, if the source has their texts as they are: see `records`.
        """
        for batch in records:
            left: pa.RecordBatch | None = batch
            if self._scanner is not None:
                standing, left = _as_they_stand(batch, self._scanner)
                if standing is not None:
                    yield standing, True
            made = self._make(left) if left is not None else None
            if made is not None:
                yield made

    def _make(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, bool] | None:
        texts = batch.column("text")
        events, at = self._decoded(texts)
        if not events:
            self._odd(batch)
            return None
        found = self._columns(events)
        objects = self._objects(events)
        found.odd |= objects_.none(objects) | objects_.rewritten(objects)
        if found.odd.any():
            kept = np.flatnonzero(~found.odd)
            if len(kept) == 0:
                self._odd(batch)
                return None
            events, at, found = [events[row] for row in kept.tolist()], at[kept], _some(found, kept)
            objects = self._objects(events)
        if len(at) < len(texts):
            left = np.ones(len(texts), np.bool_)
            left[at] = False
            self._odd(batch.filter(pa.array(left)))
            batch = batch.take(pa.array(at))
        lines, ends = self._lines(events, found.ids.column("insert_id_"))
        if self._good(lines, ends, events, objects):
            return _finished(batch, found, _texts(lines, ends)), True
        lines, ends = self._lines(events, pa.nulls(len(events), pa.string()))
        return _unfinished(batch, found, less(_texts(lines, ends), front=1, back=1)), False

    def _decoded(self, texts: pa.StringArray) -> tuple[list[Any], Ints]:
        """Return the rows that can be decoded, and where they stand."""
        data, ends = flat(texts)
        return _decoded_lines(self._read, data, ends, _escapes_simple(data, ends))

    def _objects(self, events: list[Any]) -> Objects:
        """Return the property objects of the events: none that is empty, none with white space between its parts."""
        found = objects_.together(self._raws(events), len(events))
        spaced = np.flatnonzero(objects_.spaced(found)).tolist()
        for row in spaced:
            self._compact(events[row])
        if spaced:
            found = objects_.together(self._raws(events), len(events))
        empty = objects_.empty(found).tolist()
        names = list(self._tables.values())
        for at in empty:
            setattr(events[at % len(events)], names[at // len(events)], _ABSENT)
        return objects_.together(self._raws(events), len(events)) if empty else found

    def _raws(self, events: list[Any]) -> list[list[Raw]]:
        return [list(map(attrgetter(name), events)) for name in self._tables.values()]

    def _compact(self, found: Any) -> None:
        for name in self._tables.values():
            sent = getattr(found, name)
            if len(sent):
                setattr(found, name, Raw(msgspec.json.format(bytes(sent), indent=-1)))

    def _columns(self, events: list[Any]) -> _Events:
        own = {name: list(map(attrgetter(at), events)) for name, at in self._own.items()}
        none: list[Any] = [None] * len(events)
        user, device, key = (own.get(name, none) for name in ("user_id", "device_id", _KEY))
        if "" in key:
            key = [one or None for one in key]
        ids = [pa.array(column, pa.string()) for column in (device, user, key)]
        types, times = own["event_type"], own["time"]
        odd = np.zeros(len(events), np.bool_)
        if not (self._ids_surely_good(*ids[:2]) or self._ids_good(user, device)):
            odd |= [not self._ids_good([one], [two]) for one, two in zip(user, device, strict=True)]
        if not _texts_good(types):
            odd |= [not _texts_good([kind]) for kind in types]
        if None in times:
            odd |= [time is None for time in times]
            times = [time or 0 for time in times]
        time_ms = np.asarray(times, np.int64)
        odd |= (time_ms < 0) | (time_ms > TIME_MS_MAX)
        return _Events(types, pa.RecordBatch.from_arrays(ids, schema=_IDS), time_ms, odd)

    def _ids_surely_good(self, device: pa.StringArray, user: pa.StringArray) -> bool:
        """Say whether all ids are so long and begin so that they need no second look, and no row is without."""
        if np.any(~_there(device) & ~_there(user)):
            return False
        for column in (device, user):
            data, ends = flat(column)
            sizes = np.diff(ends, prepend=0)
            there = sizes > 0
            if there.sum() < len(column) - column.null_count:
                return False
            sizes, starts = sizes[there], (ends - sizes)[there]
            first = np.frombuffer(data, np.uint8)[starts]
            if len(sizes) and (
                sizes.min() < max(_SURE_BYTES, 4 * self._checker.id_length_min)
                or sizes.max() > _CHARS_MAX
                or first.min() <= _SPACE
            ):
                return False
            zeros = starts[(first == _ZERO) & (sizes == len(_ZEROS))].tolist()
            if any(data[start : start + len(_ZEROS)] == _ZEROS for start in zeros):
                return False
        return True

    def _ids_good(self, user: Sequence[str | None], device: Sequence[str | None]) -> bool:
        both = {*user, *device}
        known = {one for one in both if one is not None}
        if len(known) < len(both) and (None, None) in zip(user, device, strict=True):
            return False
        if not known:
            return True
        long = max(map(len, known)) > _CHARS_MAX
        return not long and glance.ids(known, length_min=self._checker.id_length_min)

    def _lines(self, events: list[Any], keys: pa.StringArray) -> tuple[bytes, Ints]:
        """Return the events as JSON, a line each, those without a key without insert_id, and where the lines end."""
        if self._write is not None:
            events = list(starmap(self._write, map(self._parts, events)))
        if self._key is not None and keys.null_count:
            for row in np.flatnonzero(~_there(keys)).tolist():
                setattr(events[row], self._key, None)
        lines = _encoder.encode_lines(events)
        return lines, np.flatnonzero(np.frombuffer(lines, np.uint8) == _NEWLINE)

    def _good(self, lines: bytes, ends: Ints, events: list[Any], objects: Objects) -> bool:
        if not _strings_good(lines, ends):
            return False
        groups, plans = (self._held(events, name) for name in ("groups", "plan"))
        if objects_.shallow(objects):
            return check.good(raws=[], tables=[], groups=groups, plans=plans)
        raws = [raw for table in self._raws(events) for raw in table if raw]
        return check.good(raws=raws, tables=[], groups=groups, plans=plans)

    def _held(self, events: list[Any], name: str) -> list[Any]:
        if name not in self._tables:
            return []
        raws = map(attrgetter(self._tables[name]), events)
        return [msgspec.json.decode(raw) for raw in raws if raw]


def _scanner(
    members: Sequence[_Member], sample: Sequence[bytes], checker: Checker
) -> Scanner | None:
    """Return what looks for rows that pass as they stand, None where few are of that kind."""
    kinds = {one.source: one.field.kind for one in members}
    if not sample or not kinds.keys() >= _NEEDED or not kinds.keys().isdisjoint(_LOOKED_INTO):
        return None
    from retrofill.backfill.scan import MEMBERS_MAX, Scanner  # noqa: PLC0415  # see SCANNED_BYTES

    if len(kinds) > MEMBERS_MAX:
        return None
    scanner = Scanner(kinds, needed=_NEEDED, id_length_min=checker.id_length_min)
    rows = [row.rstrip(b"\r\n") + b"\n" for row in sample]
    found = scanner.look(memoryview(b"".join(rows)), np.cumsum([len(row) for row in rows]))
    memory.loaded()  # Numba may be: looked through once more at the end, it took 0.2 CPU s
    return scanner if np.count_nonzero(found.good) >= _STANDING * len(rows) else None


def _as_they_stand(
    batch: pa.RecordBatch, scanner: Scanner
) -> tuple[pa.RecordBatch | None, pa.RecordBatch | None]:
    """Return finished events of the rows that are events as they stand, and the rows that are none."""
    found = scanner.look(*flat(batch.column("text")))
    if found.good.all():
        return _standing(batch, found), None
    good = pa.array(found.good)
    others = batch.filter(pc.invert(good))
    return (_standing(batch.filter(good), found) if found.good.any() else None), others


def _standing(rows: pa.RecordBatch, found: Found) -> pa.RecordBatch:
    at, none = rows.column("at"), pa.nulls(rows.num_rows, pa.string())
    return pa.RecordBatch.from_pydict(
        {
            "file": rows.column("file"),
            "line": rows.column("line"),
            "time_ms": pa.array(found.time_ms),
            **dict.fromkeys((*places.NAMES, "given"), none),
            places.PLACES: pa.array(found.places),
            places.SIZES: pa.array(found.sizes),
            "kind": pa.array(found.kind),
            "event": rows.column("text"),
            "device_node": pa.array(found.device),
            "user_node": pa.array(found.user),
            "insert_hash": pa.array(found.insert),
            **({"at": at} if at[0].as_py() >= 0 else {}),
        }
    )


def _decoded_lines(
    decoder: msgspec.json.Decoder[Any], data: memoryview, ends: Ints, usable: NDArray[np.bool_]
) -> tuple[list[Any], Ints]:
    """Return the usable rows that can be decoded, and where they stand."""
    if usable.all() and data[int(ends[0]) - 1] == _NEWLINE and _each_one(data, ends):
        try:
            events = decoder.decode_lines(data)
        except (ValueError, RecursionError):
            pass
        else:
            if len(events) == len(ends):
                return events, np.arange(len(ends))
    events, at, start = [], [], 0
    for row, (end, good) in enumerate(zip(ends.tolist(), usable.tolist(), strict=True)):
        if good:
            try:
                events.append(decoder.decode(data[start:end]))
                at.append(row)
            except (ValueError, RecursionError):
                pass
        start = end
    return events, np.asarray(at, np.int64)


def _escapes_simple(data: memoryview, ends: Ints) -> NDArray[np.bool_]:
    """Say which rows have no escape but those that every writer of JSON writes so."""
    usable = np.ones(len(ends), np.bool_)
    text = np.frombuffer(data, np.uint8)
    at = np.flatnonzero(text[:-1] == _BACKSLASH)
    if len(at):
        usable[np.searchsorted(ends, at[~_SIMPLE[text[at + 1]]], "right")] = False
    return usable


def _each_one(data: memoryview, ends: Ints) -> bool:
    """Say whether each row begins and ends as an object does: if there are as many values as rows, each is one."""
    text = np.frombuffer(data, np.uint8)
    starts = np.concatenate(([0], ends[:-1]))
    last = ends - 1
    for space in (_NEWLINE, _RETURN):
        last = last - (text[last] == space)
    return bool(
        (last > starts).all() and (text[starts] == _OPEN).all() and (text[last] == _CLOSE).all()
    )


def _struct(members: Sequence[tuple[_Member, str, str]]) -> type[Struct]:
    """Return a struct of these members, each with the name of its field, and the key that it has in JSON."""
    kinds = [(name, *_KINDS[one.field.kind][:2]) for one, name, _key in members]
    keys = {name: key for _one, name, key in members}
    return msgspec.defstruct("Row", kinds, gc=False, omit_defaults=True, rename=keys)


def _texts_good(types: Sequence[str | None]) -> bool:
    known = set(types)
    if event.EXPOSURE in known:  # which is stored as something else
        return False
    return None not in known and "" not in known and max(map(len, known), default=0) <= _CHARS_MAX  # type: ignore[arg-type]  # None is not in


def _some(found: _Events, rows: Ints) -> _Events:
    """Return some of the events."""
    at = rows.tolist()
    return _Events(
        [found.event_type[row] for row in at],
        found.ids.take(pa.array(rows)),
        found.time_ms[rows],
        found.odd[rows],
    )


def _strings_good(lines: bytes, ends: Ints) -> bool:
    """Say whether no string is too long: none in a line that is no longer than a string may be."""
    return int(np.diff(ends, prepend=-1).max()) <= STRING_CHARS_MAX or glance.strings(lines)


def _there(column: pa.StringArray) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = column.is_valid().to_numpy(zero_copy_only=False)
    return found


def _texts(lines: bytes, ends: Ints) -> pa.StringArray:
    """Return the lines, each with its end."""
    offsets = np.zeros(len(ends) + 1, np.int32)
    offsets[1:] = ends + 1
    return pa.StringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(lines))


def _finished(place: pa.RecordBatch, found: _Events, line: pa.StringArray) -> pa.RecordBatch:
    given = found.ids.column("insert_id_")
    return pa.RecordBatch.from_pydict(
        {
            **_columns(place, found),
            "given": given,
            "insert_id": insert_ids(given, line),
            "event": line,
        }
    )


def _unfinished(place: pa.RecordBatch, found: _Events, body: pa.StringArray) -> pa.RecordBatch:
    given = found.ids.column("insert_id_").to_pylist()
    keys = [
        made_id(text) if one is None else _encoder.encode(one).decode()
        for one, text in zip(given, body.to_pylist(), strict=True)
    ]
    return pa.RecordBatch.from_pydict(
        {**_columns(place, found), "insert_id": pa.array(keys, pa.string()), "body": body}
    )


def _columns(place: pa.RecordBatch, found: _Events) -> dict[str, Any]:
    return {
        "file": place.column("file"),
        "line": place.column("line"),
        "time_ms": pa.array(found.time_ms),
        "event_type": pa.array(found.event_type, pa.string()),
        "user_id": found.ids.column("user_id"),
        "device_id": found.ids.column("device_id"),
    }


def insert_ids(given: pa.StringArray, line: pa.StringArray) -> pa.StringArray:
    """Return each insert_id, the hash of the event where none is given: as the query makes it."""
    if given.null_count == 0:
        return given
    rows = np.flatnonzero(~_there(given))
    made = [made_id(text[1:-1]) for text in line.take(pa.array(rows)).to_pylist()]
    return pc.replace_with_mask(given, given.is_null(), pa.array(made, pa.string()))


def made_id(body: str) -> str:
    """Return the insert_id of an event that was given none."""
    return md5(body.encode(), usedforsecurity=False).hexdigest()
