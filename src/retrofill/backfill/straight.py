"""Rows that become events without SQL: where every field of a mapping is just a column, and the row has nothing odd.

A row is decoded into a struct with the fields of the mapping and encoded again under their targets' names; properties go
through as the source wrote them. That costs a fifth of what the mapping's query costs. The query stays what a mapping
means: a row passes here only where it would come out the same, all others are handed on to it. So what a row becomes
depends on the row alone, never on its neighbours. Handed on are rows that are no JSON, whose values have other types than
their fields, without a usable id, with a forbidden or short one, without a type or time, or with a number or an escape that
the query writes more simply; properties with white space between their parts are written without it, as the query does.

Hashes of ids are DuckDB's, as in the query: a second query streams over the ids while the events wait.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import md5
from itertools import starmap
from operator import attrgetter
from typing import Annotated, Any, Final

import duckdb
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Meta, Raw, Struct
from numpy.typing import NDArray

from retrofill.backfill import check, compiled
from retrofill.backfill.check import Checker
from retrofill.backfill.columns import Columns
from retrofill.backfill.compiled import Compiled
from retrofill.backfill.people import Ints
from retrofill.core import event, glance
from retrofill.core.mapping import Field
from retrofill.limits import STRING_CHARS_MAX, TIME_MS_MAX

_ROWS = 2048  # of the ids' query, at a time
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
_BACKSLASH, _NEWLINE, _RETURN, _SPACE, _ZERO, _MINUS = 92, 10, 13, 32, 48, 45
_OPEN, _CLOSE, _POINT, _EXPONENT = 0x7B, 0x7D, 0x2E, 0x65
_OPENING = np.zeros(256, np.bool_)
_OPENING[list(b"{[,:")] = (
    True  # white space behind these, or before those of _CLOSING, could be left out
)
_CLOSING = np.zeros(256, np.bool_)
_CLOSING[list(b"}],:")] = True
_BEFORE = np.zeros(256, np.bool_)
_BEFORE[list(b"[,: \t\r\n")] = True  # what may stand before a number
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
_IDS = pa.schema([(name, pa.string()) for name in ("device_id", "user_id", "insert_id_")])

_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
# Of so few digits, and without a nought at the end, each is the shortest of its number.
_plain = re.compile(rb"-?\d{1,9}\.(?:0|\d{0,3}[1-9])(?=[,}\]\s])").match
_DIGITS = 40  # as many before a point are looked back over

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
    tables: dict[str, list[Raw]]
    odd: NDArray[np.bool_]


class _Made(Struct):
    """Finished events of one batch that wait for the hashes of their ids. good: as the core takes them."""

    batch: pa.RecordBatch
    events: _Events
    body: pa.StringArray
    good: bool


def straight(
    found: Compiled,
    columns: Columns,
    checker: Checker,
    odd: Callable[[pa.RecordBatch], None],
) -> Straight | None:
    """Return the straight way of a compiled mapping, None if it has none. odd: takes the rows that are not for it."""
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
    return Straight(members, checker, odd)


class Straight:
    """The straight way of one mapping over one source."""

    def __init__(
        self,
        members: Sequence[_Member],
        checker: Checker,
        odd: Callable[[pa.RecordBatch], None],
    ) -> None:
        self._checker, self._odd = checker, odd
        ours = {one.field.name: one for one in members}
        self._own = {name: ours[name].name for name in (*_FIRST, _KEY) if name in ours}
        first = [ours[name] for name in _FIRST if name in ours]
        body = [*first, *(one for one in members if one.field.name not in self._own)]
        self._tables = {one.field.name: one.name for one in body if one.field.kind == "object"}
        every = {one.name: one for one in (*body, *members)}.values()
        self._read = msgspec.json.Decoder(_struct([(one, one.name, one.source) for one in every]))
        self._write: type[Struct] | None = None
        if any(one.source != one.field.name for one in members):
            named = [(one, f"g{at}", one.field.name) for at, one in enumerate(body)]
            self._write = _struct(named)
        self._parts = attrgetter(*(one.name for one in body))

    def events(self, records: Iterable[pa.RecordBatch]) -> Iterator[tuple[pa.RecordBatch, bool]]:
        """Yield finished events, less the columns for bad rows, and whether the core would take them as they are."""
        waiting: deque[_Made] = deque()
        failed: list[BaseException] = []

        def ids() -> Iterator[pa.RecordBatch]:
            try:
                for batch in records:
                    made = self._make(batch)
                    if made is not None:
                        waiting.append(made)
                        yield made.events.ids
            except (Exception, KeyboardInterrupt) as error:
                failed.append(error)
                raise

        try:
            yield from self._hashed(ids(), waiting)
        except (duckdb.Error, pa.ArrowException) as error:  # whose words about it are worth little
            raise failed[0] if failed else error from error

    def _hashed(
        self, ids: Iterator[pa.RecordBatch], waiting: deque[_Made]
    ) -> Iterator[tuple[pa.RecordBatch, bool]]:
        with duckdb.connect(config={"threads": "1"}) as connection:  # so that the order is kept
            connection.execute("SET enable_progress_bar = false")
            connection.execute("SET streaming_buffer_size = '64KB'")  # few events wait
            connection.register("ids", pa.RecordBatchReader.from_batches(_IDS, ids))
            hashes = np.zeros((3, 0), np.int64)
            for part in connection.execute(compiled.HASHES).to_arrow_reader(_ROWS):
                hashes = np.concatenate((hashes, [one.to_numpy() for one in part]), axis=1)
                while waiting and len(waiting[0].body) <= hashes.shape[1]:
                    made = waiting.popleft()
                    count = len(made.body)
                    yield _finished(made, hashes[:, :count]), made.good
                    hashes = hashes[:, count:]

    def _make(self, batch: pa.RecordBatch) -> _Made | None:
        texts = batch.column("text")
        events, at = self._decoded(texts)
        if not events:
            self._odd(batch)
            return None
        found = self._columns(events)
        good = False
        if not found.odd.any():
            lines, ends = self._lines(events)
            good = self._good(lines, ends, found)
        if not good:
            for raws in found.tables.values():
                found.odd |= _none(raws)
        if found.odd.any():
            kept = np.flatnonzero(~found.odd)
            if len(kept) == 0:
                self._odd(batch)
                return None
            events, at, found = [events[row] for row in kept.tolist()], at[kept], _some(found, kept)
            lines, ends = self._lines(events)
            good = self._good(lines, ends, found)
        if len(at) < len(texts):
            left = np.ones(len(texts), np.bool_)
            left[at] = False
            self._odd(batch.filter(pa.array(left)))
            batch = batch.take(pa.array(at))
        return _Made(batch, found, _bodies(lines, ends), good)

    def _decoded(self, texts: pa.StringArray) -> tuple[list[Any], Ints]:
        """Return the rows that can be decoded, and where they stand."""
        data, ends = _flat(texts)
        text = np.frombuffer(data, np.uint8)
        usable = np.ones(len(texts), np.bool_)
        if b"\\" in data:
            at = np.flatnonzero(text[:-1] == _BACKSLASH)
            usable[np.searchsorted(ends, at[~_SIMPLE[text[at + 1]]], "right")] = False
        usable[np.searchsorted(ends, _rewritten(data, text), "right")] = False
        events, at = self._decoded_lines(data, ends, usable)
        spaces = np.flatnonzero(text <= _SPACE)
        after = text[np.minimum(spaces + 1, len(text) - 1)]
        spare = spaces[_OPENING[text[spaces - 1]] | _CLOSING[after]]
        if len(spare):
            rows = np.unique(np.searchsorted(ends, spare, "right"))
            for place in np.flatnonzero(np.isin(at, rows)).tolist():
                self._compact(events[place])
        return events, at

    def _decoded_lines(
        self, data: bytes, ends: Ints, usable: NDArray[np.bool_]
    ) -> tuple[list[Any], Ints]:
        if usable.all() and data[int(ends[0]) - 1] == _NEWLINE and _each_one(data, ends):
            try:
                events = self._read.decode_lines(data)
            except (ValueError, RecursionError):
                pass
            else:
                if len(events) == len(ends):
                    return events, np.arange(len(ends))
        events, at, start = [], [], 0
        for row, (end, good) in enumerate(zip(ends.tolist(), usable.tolist(), strict=True)):
            if good:
                try:
                    events.append(self._read.decode(data[start:end]))
                    at.append(row)
                except (ValueError, RecursionError):
                    pass
            start = end
        return events, np.asarray(at, np.int64)

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
        tables = {name: _table(events, at) for name, at in self._tables.items()}
        return _Events(types, pa.RecordBatch.from_arrays(ids, schema=_IDS), time_ms, tables, odd)

    def _ids_surely_good(self, device: pa.StringArray, user: pa.StringArray) -> bool:
        """Say whether all ids are so long and begin so that they need no second look, and no row is without."""
        if np.any(~_there(device) & ~_there(user)):
            return False
        for column in (device, user):
            data, ends = _flat(column)
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

    def _lines(self, events: list[Any]) -> tuple[bytes, Ints]:
        """Return the events as JSON, a line each, and where the lines end."""
        if self._write is not None:
            events = list(starmap(self._write, map(self._parts, events)))
        elif _KEY in self._own:
            name = self._own[_KEY]
            for one in events:
                setattr(one, name, None)  # it stands elsewhere
        lines = _encoder.encode_lines(events)
        return lines, np.flatnonzero(np.frombuffer(lines, np.uint8) == _NEWLINE)

    def _good(self, lines: bytes, ends: Ints, found: _Events) -> bool:
        tables = {name: [raw for raw in raws if raw] for name, raws in found.tables.items()}
        events, groups = tables.pop("event_properties", []), tables.pop("groups", [])
        plans = tables.pop("plan", [])
        return _strings_good(lines, ends) and check.good(
            raws=events,
            tables=[raw for raws in tables.values() for raw in raws],
            groups=[msgspec.json.decode(raw) for raw in groups],
            plans=[msgspec.json.decode(raw) for raw in plans],
        )


def _each_one(data: bytes, ends: Ints) -> bool:
    """Say whether each row begins and ends as an object does: if there are as many values as rows, each is one."""
    text = np.frombuffer(data, np.uint8)
    starts = np.concatenate(([0], ends[:-1]))
    last = ends - 1
    for space in (_NEWLINE, _RETURN):
        last = last - (text[last] == space)
    return bool(
        (last > starts).all() and (text[starts] == _OPEN).all() and (text[last] == _CLOSE).all()
    )


def _rewritten(data: bytes, text: NDArray[np.uint8]) -> Ints:
    """Return where numbers stand that the query writes otherwise, and perhaps what looks so in a text."""
    digit = text - np.uint8(_ZERO) < np.uint8(10)
    after = text[1:]
    more = digit[:-1] & ((after == _POINT) | (after | 0x20 == _EXPONENT))
    minus = np.flatnonzero((text[:-1] == _MINUS) & (after == _ZERO)) + 1
    nothing = minus[~digit[np.minimum(minus + 1, len(text) - 1)]]
    first = np.concatenate((np.flatnonzero(more), nothing))
    going = np.flatnonzero(digit[first - 1])
    for _ in range(_DIGITS):
        if not len(going):
            break
        first[going] -= 1
        going = going[digit[first[going] - 1]]
    first -= text[first - 1] == _MINUS
    maybe = _BEFORE[text[first - 1]]
    maybe[going] = True
    first = first[maybe]
    return np.asarray(
        [at for at in first.tolist() if not (_plain(data, at) or _kept(data, at))], np.int64
    )


def _kept(data: bytes, at: int) -> bool:
    """Say whether the query writes the number that begins there as it is."""
    found = _NUMBER.match(data, at)
    if found is None or data[at - 1 : at].isdigit():  # longer than is looked back over
        return False
    number = found[0]
    if number == b"-0" or b"e" in number or b"E" in number:
        return False
    return b"." not in number or repr(float(number)).encode() == number


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
        {name: [raws[row] for row in at] for name, raws in found.tables.items()},
        found.odd[rows],
    )


def _strings_good(lines: bytes, ends: Ints) -> bool:
    """Say whether no string is too long: none in a line that is no longer than a string may be."""
    return int(np.diff(ends, prepend=-1).max()) <= STRING_CHARS_MAX or glance.strings(lines)


def _table(events: list[Any], name: str) -> list[Raw]:
    """Return one property object of each event, absent where it holds nothing."""
    raws: list[Raw] = list(map(attrgetter(name), events))
    sizes = np.fromiter(map(len, raws), np.int64, len(raws))
    for at in np.flatnonzero((sizes == 2) | (sizes == 4)).tolist():  # {} and null
        if bytes(raws[at]) in {b"{}", b"null"}:
            raws[at] = _ABSENT
            setattr(events[at], name, _ABSENT)
    return raws


def _none(raws: list[Raw]) -> NDArray[np.bool_]:
    """Say which property objects are something else."""
    sizes = np.fromiter(map(len, raws), np.int64, len(raws))
    odd = np.zeros(len(raws), np.bool_)
    there = np.flatnonzero(sizes)
    if len(there):
        text = np.frombuffer(b"".join(raws), np.uint8)
        odd[there] = text[(np.cumsum(sizes) - sizes)[there]] != _OPEN
    return odd


def _there(column: pa.StringArray) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = column.is_valid().to_numpy(zero_copy_only=False)
    return found


def _flat(texts: pa.StringArray) -> tuple[bytes, Ints]:
    """Return all texts in one, and where each ends in it."""
    _valid, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    whole = data.slice(int(ends[0]), int(ends[-1] - ends[0])).to_pybytes()
    return whole, ends[1:].astype(np.int64) - int(ends[0])


def _bodies(lines: bytes, ends: Ints) -> pa.StringArray:
    """Return each line less its opening brace: see `mapping.assemble`."""
    offsets = np.empty(2 * len(ends), np.int32)
    offsets[1::2] = ends
    offsets[0], offsets[2::2] = 1, ends[:-1] + 2
    both = pa.StringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(lines))
    return both.take(pa.array(np.arange(0, len(offsets), 2)))


def _finished(made: _Made, hashes: Ints) -> pa.RecordBatch:
    found, place = made.events, made.batch
    device_node, user_node, key = (pa.array(one) for one in hashes)
    columns = {
        "file": place.column("file"),
        "line": place.column("line"),
        "time_ms": pa.array(found.time_ms),
        "event_type": pa.array(found.event_type, pa.string()),
        "user_id": found.ids.column("user_id"),
        "device_id": found.ids.column("device_id"),
        "user_node": user_node,
        "device_node": device_node,
        "key": key,
        "insert_id": _insert_ids(found.ids.column("insert_id_"), made.body),
        "body": made.body,
    }
    return pa.RecordBatch.from_pydict(columns)


def _insert_ids(given: pa.StringArray, body: pa.StringArray) -> pa.StringArray:
    """Return each insert_id as JSON, or the hash of the body where none is given: as the query does."""
    if given.null_count == 0 and b'"' not in (text := _flat(given)[0]) and b"\\" not in text:
        return pc.binary_join_element_wise('"', given, '"', "")
    made = [
        md5(text.encode(), usedforsecurity=False).hexdigest()
        if one is None
        else _encoder.encode(one).decode()
        for one, text in zip(given.to_pylist(), body.to_pylist(), strict=True)
    ]
    return pa.array(made, pa.string())
