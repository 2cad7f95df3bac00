"""From the spill to the senders' sets: sorted by person and time, numbered, finished.

An external sort in two steps. First every row goes to a bucket, by borders in (person, time) taken from a thin sample, so
that buckets are about equally large whoever the source is about, one hot person included. Then each bucket is sorted in
memory, and its rows written out. A person's number is spread evenly, and set k takes the k-th part of the numbers:
buckets one after another give set after set, each with one open file.

What needs neighbours is done there: made insert_ids get their place among equal events (those share person and time),
and rows whose insert_id an earlier row of the device has are left out.

Both steps can be left at any moment and gone on with. After every so many bytes of sets, what was counted since is added to a
log beside; a checkpoint says how long the log is, and up to which row of which bucket it goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from msgspec import Struct
from numpy.typing import NDArray

from retrofill.backfill import direct, texts
from retrofill.backfill import spill as spills
from retrofill.backfill.checkpoint import Dealing, Sorting
from retrofill.backfill.intake import SPILLED
from retrofill.backfill.manifest import HotPerson, Options, SetFile
from retrofill.backfill.people import Ints, People
from retrofill.backfill.places import PLACES, SIZES, moved, spelled
from retrofill.backfill.sets import COMMA, TEXT, SetWriter, gone_on
from retrofill.backfill.spill import AT, SIZE, Originals, Spill, Whole

if TYPE_CHECKING:
    from retrofill.backfill.laid import Arena, Scattered

BUCKET_BYTES = (
    64 * 1024 * 1024
)  # of JSON, sorted in memory at once; several times that is in use meanwhile
# The same where texts stay in the source, which is gone through for each bucket, ours: 1 GB is in use meanwhile.
LAID_BUCKET_BYTES = 384 * 1024 * 1024
LAID_SOURCE_BYTES_MAX = (
    24 * 1024**3
)  # ours: 64 times through so much take as long as dealing texts out
# Of texts that are dealt out at once, ours: they go to hundreds of buckets, and so few rows that each gets fifty took longer to
# write than anything else.
DEALT_BYTES = 48 * 1024 * 1024
STEP_BYTES = 32 * 1024 * 1024  # of sets from one checkpoint to the next, ours: 50,000 rows
GROUP_ROWS = 4096  # what a sender reads at once: 8192 took it from 260 to 310 MB
GROUP_BYTES = (
    4 * 1024 * 1024
)  # of texts in it, where rows are of like size: twice what 4096 usual ones have
_PART_ROWS = GROUP_ROWS  # taken, finished and written at once: what was gathered is still near
# Of their texts, ours: those of a part are one column, and Arrow counts its bytes with 32 bits.
PART_BYTES = 32 * 1024 * 1024
_KEY = "key"
_LIKELY = (1 << 16) - 1  # bits of a node
_STORED = (
    "time_ms",
    "device_id",
    "user_id",
    "insert_id",
    "event_type",
    "file",
    "line",
    PLACES,
    SIZES,
)
_HOT = 100  # people, devices and users listed
_DAY_MS = 86_400_000
_BITS = 63  # of a number that is sorted
_LENGTH_BYTES = 8  # before each entry of the log

Refused = Callable[[int, int, str, str, str], None]

DEALT = pa.schema([field for field in SPILLED if field.name not in {AT, SIZE}])


class Borders(Struct, frozen=True):
    """Bucket i holds the rows from (persons[i-1], times[i-1]) on, below (persons[i], times[i])."""

    persons: Ints
    times: Ints

    def bucket(self, person: Ints, time_ms: Ints) -> Ints:
        """Return each row's bucket."""
        low = np.searchsorted(self.persons, person, "left")
        high = np.searchsorted(self.persons, person, "right")
        bucket = low.copy()
        for at in np.unique(low[high > low]):  # persons so hot that a border goes through them
            rows = (low == at) & (high > low)
            until = int(np.searchsorted(self.persons, self.persons[at], "right"))
            bucket[rows] = at + np.searchsorted(self.times[at:until], time_ms[rows], "right")
        return bucket


def borders(person: Ints, time_ms: Ints, *, buckets: int) -> Borders:
    """Return borders that part the sampled rows evenly."""
    if buckets < 2 or len(person) == 0:  # one bucket has no border
        return Borders(np.zeros(0, np.int64), np.zeros(0, np.int64))
    order = np.lexsort((time_ms, person))
    at = order[np.linspace(0, len(order) - 1, buckets + 1).astype(np.int64)[1:-1]]
    return Borders(person[at], time_ms[at])


def set_of(person: Ints, sets: int) -> Ints:
    """Return each person's set: numbers are spread over 63 bits, sets are equal ranges of them."""
    return ((person >> 32) * sets) >> 31


def sampled(person: Ints, part: float) -> NDArray[np.bool_]:
    """Say which people belong to a sample of this part of all. Independent of their set."""
    mixed = (person.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)
    return np.asarray(mixed < np.uint64(int(part * (1 << 53))))


class Sorted(Struct, kw_only=True):
    """What the sorting has seen."""

    sets: list[SetFile] = []
    events: int = 0
    bytes: int = 0
    people: int = 0
    first_ms: int | None = None
    last_ms: int | None = None
    days: dict[tuple[int, str], int] = {}
    same: int = 0
    different: int = 0
    hot: list[HotPerson] = []
    names: dict[int, str] = {}  # of the nodes that were asked for
    left_out: int = 0  # rows outside of the sample


class _Step(Struct, kw_only=True):
    """What the sorting has seen, of days and doubles only what came since the step before."""

    found: Sorted
    set: int
    seq: int
    set_bytes: int
    set_people: int
    person: HotPerson | None
    slots: list[int]  # of doubles seen
    contents: list[int]


def _content(event: memoryview) -> int:
    """Return the hash of what an event says, in whatever order and with whatever white space."""
    said = msgspec.json.encode(msgspec.json.decode(event), order="sorted")
    return xxhash.xxh3_64_intdigest(said)


class Doubles:
    """The insert_ids that several rows of a device share: who came first, and with what content."""

    def __init__(self, keys: Ints) -> None:
        """keys: those that several rows have, ascending."""
        self.keys = keys
        self.seen = np.zeros(len(self.keys), np.bool_)
        self.content = np.zeros(len(self.keys), np.uint64)
        self.fresh: list[int] = []  # seen since the last step

    def later(self, key: Ints, event: pa.StringArray) -> tuple[Ints, list[int]]:
        """Return the rows that are not the first of their key, and which of them differ from it in content."""
        if len(self.keys) == 0:
            return np.zeros(0, np.int64), []
        at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        rows = np.flatnonzero((self.keys[at] == key) & (key != 0))
        later, different = [], []
        for row in rows.tolist():
            slot = at[row]
            content = _content(memoryview(event[row].as_buffer())[len(COMMA) :])
            if not self.seen[slot]:
                self.seen[slot], self.content[slot] = True, content
                self.fresh.append(int(slot))
                continue
            later.append(row)
            if self.content[slot] != content:
                different.append(row)
        return np.asarray(later, np.int64), different


def repeated(keys: Sequence[Ints]) -> Ints:
    """Return the keys that several rows have, ascending."""
    together = np.concatenate(keys) if keys else np.zeros(0, np.int64)
    together.sort()
    return np.unique(together[1:][together[1:] == together[:-1]])


def deal(
    spill: Spill,
    edges: Borders,
    people: People,
    originals: Originals,
    buckets: Sequence[Spill],
    *,
    dealing: Dealing,
    save: Callable[[], None],
) -> None:
    """Put each row into its bucket, in the order of the spill. dealing: where to begin, and moved on; `save` keeps it."""
    for bucket in buckets:
        bucket.cut()
    waiting: list[pa.RecordBatch] = []
    size = 0
    for batch, end in spill.batches(dealing.spill):
        waiting.append(batch)
        size += pc.sum(batch.column(SIZE)).as_py() or 0
        if size >= DEALT_BYTES or end == spill.bytes:
            _dealt(waiting, spill.schema, edges, people, originals, buckets)
            waiting, size = [], 0
            dealing.spill, dealing.buckets = end, [bucket.bytes for bucket in buckets]
            save()


def _dealt(  # one step's parts
    batches: Sequence[pa.RecordBatch],
    schema: pa.Schema,
    edges: Borders,
    people: People,
    originals: Originals,
    buckets: Sequence[Spill],
) -> None:
    lying, _kept = originals.reader()
    found = None
    if buckets[0].schema.names == schema.names:  # texts that lie in the source stay there
        (rows,) = pa.Table.from_batches(batches, schema).combine_chunks().to_batches()
    else:
        found = spills.whole(spills.placed(batches, schema, lying), before=None)
        rows = found.rows
    person = people.of(_ints(rows, "device_node"), _ints(rows, "user_node"))
    bucket = edges.bucket(person, _ints(rows, "time_ms"))
    if len(buckets) < np.iinfo(np.uint16).max:
        bucket = bucket.astype(np.uint16)  # of which a sort is a count
    order = np.argsort(bucket, kind="stable")
    packed = spills.short(buckets[0].path.parent, sum(bucket.bytes for bucket in buckets))
    if found is None:
        dealt = pa.RecordBatch.from_arrays(spills.some(rows, order), schema=schema)
    else:
        dealt = found.take(order, led=False).select(DEALT.names)
    at = np.searchsorted(bucket[order], np.arange(len(buckets) + 1))
    for number, (start, end) in enumerate(pairwise(at.tolist())):
        if end > start:
            buckets[number].add(dealt.slice(start, end - start), packed=packed)


class Sorter:
    """Makes the sets of one spill."""

    def __init__(  # what a sort works with
        self,
        folder: Path,
        people: People,
        options: Options,
        *,
        keys: Ints,
        wanted: Ints,
        refused: Refused,
        packed: bool,
        log: Path,
        sorting: Sorting,
        save: Callable[[], None],
    ) -> None:
        """sorting: where to begin, and moved on; `save` makes it the checkpoint. log: the file of what was counted."""
        self.folder, self.people, self.options = folder, people, options
        self.doubles = Doubles(keys)
        self._log, self._sorting, self._save = log, sorting, save
        self._days: dict[tuple[int, str], int] = {}  # since the last step
        self._step_bytes = 0
        self._unnamed = {*wanted.tolist()}
        self._likely = np.zeros(_LIKELY + 1, np.bool_)
        self._likely[wanted & _LIKELY] = True
        self._kinds: dict[int, str] = {}  # types by their hash
        self.refused = refused
        self.found = Sorted()
        self._set = -1
        self._seq = 0
        self._writer: SetWriter | None = None
        self._set_bytes = self._set_people = 0
        self._person: HotPerson | None = None  # whose rows are being written
        self._equal = _Equal()
        self._lead = _lead(options)
        self._packed = packed
        self._room = direct.Room()

    def run(self, buckets: Sequence[Spill], originals: Originals) -> Sorted:
        """Sort buckets, one after another, into set files, and remove each."""
        found = self._found(originals, alone=len(buckets) == 1)
        self._go_on()
        sorting = self._sorting
        while sorting.bucket < len(buckets):
            bucket = buckets[sorting.bucket]
            self._bucket(found(bucket))
            sorting.bucket, sorting.row = sorting.bucket + 1, 0
            self._checkpoint()
            bucket.remove()
        self._close_person()
        while self._set < self.options.sets - 1:
            self._next_set()
        self._close_set()
        self.found.hot.sort(key=lambda one: -one.events)
        self.found.hot = self.found.hot[:_HOT]
        return self.found

    def _found(self, originals: Originals, *, alone: bool) -> Callable[[Spill], Whole | Scattered]:
        """Return what finds the rows of a bucket. alone: there is but one; then all of the source is mapped for it."""
        lying = originals.mapped if alone else originals.addressed
        arenas: list[Arena] = []

        def found(bucket: Spill) -> Whole | Scattered:
            rows = spills.placed(list(bucket.mapped()), bucket.schema, lying)
            if alone or spills.AT not in bucket.schema.names:
                return spills.whole(rows, before=self._lead)
            from retrofill.backfill import laid  # noqa: PLC0415  # see `scan`

            arenas[:] = arenas or [laid.Arena()]
            return laid.scattered(rows, originals, arenas[0], before=self._lead)

        return found

    def _checkpoint(self) -> None:
        """Add to the log what was seen since the last time, and say how long it is."""
        found, doubles = self.found, self.doubles
        step = _Step(
            found=msgspec.structs.replace(found, days=self._days),
            set=self._set,
            seq=self._seq,
            set_bytes=self._set_bytes,
            set_people=self._set_people,
            person=self._person,
            slots=doubles.fresh,
            contents=doubles.content[doubles.fresh].tolist(),
        )
        data = msgspec.msgpack.encode(step)
        with self._log.open("ab") as file:
            file.write(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
        self._sorting.log += _LENGTH_BYTES + len(data)
        self._sorting.sets = self._set + 1
        self._sorting.end = 0 if self._writer is None else self._writer.end
        self._add_days()
        doubles.fresh, self._step_bytes = [], 0
        self._save()

    def _add_days(self) -> None:
        days = self.found.days
        for key, events in self._days.items():
            days[key] = days.get(key, 0) + events
        self._days = {}

    def _go_on(self) -> None:
        """Be where the checkpoint was."""
        with self._log.open("ab") as file:
            file.truncate(self._sorting.log)
        step = None
        for step in _steps(self._log):
            self.doubles.seen[step.slots] = True
            self.doubles.content[step.slots] = step.contents
            self._days = step.found.days
            self._add_days()
        if step is None:
            return
        self.found = msgspec.structs.replace(step.found, days=self.found.days)
        self._set, self._seq, self._person = step.set, step.seq, step.person
        self._set_bytes, self._set_people = step.set_bytes, step.set_people
        if self._set >= 0:
            path = self.folder / set_name(self._set)
            self._writer = gone_on(path, self._seq, packed=self._packed, room=self._room)

    def _bucket(self, whole: Whole | Scattered) -> None:
        rows = whole.rows
        person = self.people.of(_ints(rows, "device_node"), _ints(rows, "user_node"))
        time_ms = _ints(rows, "time_ms")
        place = (_ints(rows, "line"), _ints(rows, "file"))
        order = _order(person, time_ms) if _ascending(*place) else None
        if order is None:
            order = np.lexsort((*place, time_ms, person))
        if self.options.sample < 1:
            kept = sampled(person[order], self.options.sample)
            if not self._sorting.row:  # else they were counted
                self.found.left_out += int(np.count_nonzero(~kept))
            order = order[kept]
        person, time_ms = person[order], time_ms[order]
        self._name(whole, order)
        take = self._less(whole).ordered(order)
        for first, last in pairwise(_cuts(person, time_ms)):
            if last <= self._sorting.row:
                continue
            for start, end in bounded(whole.sizes[order[first:last]] + len(self._lead), first):
                self._part(take(start, end), person[start:end])
            if self._step_bytes >= STEP_BYTES:
                self._sorting.row = last
                self._checkpoint()

    def _part(self, batch: pa.RecordBatch, person: Ints) -> None:
        """Finish and write sorted rows."""
        if _KEY in batch.schema.names:
            batch, person = self._without_doubles(batch, person)
            batch = self._with_insert_ids(batch, person)
        parts = set_of(person, self.options.sets)
        at = np.flatnonzero(np.diff(parts, prepend=-1))
        for start, end in pairwise([*at.tolist(), len(parts)]):
            while self._set < parts[start]:
                self._next_set()
            self._write(batch.slice(start, end - start), person[start:end])

    def _without_doubles(self, batch: pa.RecordBatch, person: Ints) -> tuple[pa.RecordBatch, Ints]:
        event = batch.column("event")
        later, different = self.doubles.later(_ints(batch, "key"), event)
        if len(later) == 0:
            return batch, person
        self.found.same += len(later) - len(different)
        self.found.different += len(different)
        for row in different:
            file, line, text = (
                batch.column(name)[row].as_py() for name in ("file", "line", "event")
            )
            reason = "an earlier row of this device has it with other content"
            self.refused(file, line, "insert_id", reason, "{" + text[len(self._lead) :])
        kept = np.ones(len(person), np.bool_)
        kept[later] = False
        return batch.filter(pa.array(kept)), person[kept]

    def _with_insert_ids(self, batch: pa.RecordBatch, person: Ints) -> pa.RecordBatch:
        """Finish made insert_ids: the content's hash and, from the second equal event on, its place. Put them in."""
        made = _ints(batch, "key") == 0
        if not made.any():
            return batch
        column = batch.column("insert_id")
        rows = np.flatnonzero(made)
        content = column.take(pa.array(rows))
        place = self._equal.places(person[rows], _ints(batch, "time_ms")[rows], content)
        own = content.to_pylist()
        for at in np.flatnonzero(place).tolist():
            own[at] = f"{own[at]}-{place[at]}"
        mask = pa.array(made)
        column = pc.replace_with_mask(column, mask, pa.array(own, pa.string()))
        member = pc.if_else(
            mask, pc.binary_join_element_wise('"insert_id":"', column, '",', ""), ""
        )
        rest = texts.less(batch.column("event"), front=len(self._lead), back=0)
        event = pc.binary_join_element_wise(self._lead.decode(), member, rest, "")
        for name, values in (("insert_id", column), ("event", event)):
            batch = batch.set_column(batch.schema.get_field_index(name), name, values)
        return batch

    def _less(self, whole: Whole | Scattered) -> Whole | Scattered:
        """Return the rows less the columns that nobody asks for any more, with the places that texts will have in the events."""
        rows = whole.rows
        key = len(self.doubles.keys) > 0 or not _ints(rows, _KEY).all()
        columns = {name: rows.column(name) for name in (*_STORED, "kind", *([_KEY] if key else []))}
        where = (_ints(rows, PLACES), _ints(rows, SIZES))
        columns[PLACES] = pa.array(moved(*where, len(self._lead) - len(b"{")))
        made = pa.RecordBatch.from_pydict(columns)
        return msgspec.structs.replace(whole, rows=made)

    def _name(self, whole: Whole | Scattered, order: Ints) -> None:
        """Note how the wanted nodes are spelled. order: of the rows that stay."""
        rows = whole.rows
        stay = np.ones(rows.num_rows, np.bool_)
        if len(order) < len(stay):
            stay[:] = False
            stay[order] = True
        for node, name in (("device_node", "device_id"), ("user_node", "user_id")):
            nodes = _ints(rows, node)
            # Few are wanted: by some of their bits most rows are seen to be others.
            likely = np.flatnonzero(self._likely[nodes & _LIKELY] & stay)
            found, first = np.unique(nodes[likely], return_index=True)
            for number, row in zip(found.tolist(), likely[first].tolist(), strict=True):
                if number in self._unnamed:
                    self._unnamed.discard(number)
                    self.found.names[number] = _spelled(whole, row, name)

    def _write(self, batch: pa.RecordBatch, person: Ints) -> None:
        assert self._writer is not None
        text = batch.column("event")
        size = pc.subtract(pc.binary_length(text), len(COMMA))
        whole = batch.select([*_STORED]).add_column(0, "person", pa.array(person))
        whole = whole.append_column(TEXT, text)
        total = int(pc.sum(size).as_py())
        groups = max(1, round(len(person) / GROUP_ROWS), min(total // GROUP_BYTES, len(person)))
        step = -(-len(person) // groups)
        for start in range(0, len(person), step):
            self._writer.write(whole.slice(start, step))
        self._count(batch, total)
        self._runs(person)
        self._seq += len(person)

    def _count(self, batch: pa.RecordBatch, size: int) -> None:
        times = _ints(batch, "time_ms")
        found = self.found
        found.events += len(times)
        found.bytes += size
        self._set_bytes += size
        self._step_bytes += size
        low, high = int(times.min()), int(times.max())
        found.first_ms = low if found.first_ms is None else min(found.first_ms, low)
        found.last_ms = high if found.last_ms is None else max(found.last_ms, high)
        names, codes = self._kinds_of(batch)
        each, counts = np.unique(times // _DAY_MS * len(names) + codes, return_counts=True)
        for number, count in zip(each.tolist(), counts.tolist(), strict=True):
            key = (number // len(names), names[number % len(names)])
            self._days[key] = self._days.get(key, 0) + count

    def _kinds_of(self, batch: pa.RecordBatch) -> tuple[list[str], Ints]:
        """Return the event types of some rows, and the place among these of each row's."""
        own = batch.column("event_type")
        if own.null_count == len(own):
            kinds, first, codes = np.unique(
                _ints(batch, "kind"), return_index=True, return_inverse=True
            )
            for kind, row in zip(kinds.tolist(), first.tolist(), strict=True):
                if kind not in self._kinds:
                    self._kinds[kind] = self._types(batch.slice(row, 1))[0].as_py()
            return [self._kinds[kind] for kind in kinds.tolist()], codes
        types = self._types(batch).dictionary_encode()
        return types.dictionary.to_pylist(), types.indices.to_numpy().astype(np.int64)

    @staticmethod
    def _types(batch: pa.RecordBatch) -> pa.StringArray:
        where = (_ints(batch, PLACES), _ints(batch, SIZES))
        return spelled("event_type", batch.column("event_type"), batch.column("event"), *where)

    def _runs(self, person: Ints) -> None:
        """Follow people through the sorted rows, to count them and to find the largest."""
        at = np.flatnonzero(np.diff(person, prepend=person[0] - 1))
        counts = np.diff(at, append=len(person))
        if self._person is not None and self._person.person == person[0]:
            before = self._person
            self._person = HotPerson(
                before.person, before.set, before.seq, before.events + int(counts[0])
            )
            at, counts = at[1:], counts[1:]
        if len(at) == 0:
            return
        self._close_person()
        self._set_people += int(np.count_nonzero(person[at]))  # what is said of groups is nobody's
        for run in np.argsort(counts[:-1])[-_HOT:].tolist():
            self._hot(
                HotPerson(
                    int(person[at[run]]), self._set, self._seq + int(at[run]), int(counts[run])
                )
            )
        self._person = HotPerson(
            int(person[at[-1]]), self._set, self._seq + int(at[-1]), int(counts[-1])
        )

    def _hot(self, one: HotPerson) -> None:
        self.found.hot.append(one)
        if len(self.found.hot) > 20 * _HOT:
            self.found.hot.sort(key=lambda other: -other.events)
            del self.found.hot[_HOT:]

    def _close_person(self) -> None:
        if self._person is not None:
            self._hot(self._person)
            self._person = None

    def _next_set(self) -> None:
        self._close_person()
        self._close_set()
        self._set += 1
        path = self.folder / set_name(self._set)
        self._writer = SetWriter(path, packed=self._packed, room=self._room)

    def _close_set(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        self.found.sets.append(
            SetFile(set_name(self._set), self._seq, self._set_bytes, self._set_people)
        )
        self.found.people += self._set_people
        self._seq = self._set_bytes = self._set_people = 0


def _spelled(whole: Whole | Scattered, row: int, name: str) -> str:
    """Return an id of one row."""
    one = whole.rows.slice(row, 1)
    text = pa.array([b"{" + whole.text(row)], pa.binary()).cast(pa.string())
    where = (_ints(one, PLACES), _ints(one, SIZES))
    found: str = spelled(name, one.column(name), text, *where)[0].as_py()
    return found


def _steps(log: Path) -> Iterator[_Step]:
    """Yield what was logged, in order."""
    decoder = msgspec.msgpack.Decoder(_Step)
    with log.open("rb") as file:
        while size := file.read(_LENGTH_BYTES):
            yield decoder.decode(file.read(int.from_bytes(size, "little")))


def set_name(number: int) -> str:
    """Return the name of a set's file."""
    return f"set-{number}.rows"


def _lead(options: Options) -> bytes:
    """Return what stands before the own members of every event: see `sets`."""
    said: dict[str, Any] = {
        "ingestion_metadata": {"source_name": "retrofill", "source_version": options.import_id}
    }
    if options.skip_user_properties_sync:
        said["$skip_user_properties_sync"] = True
    return COMMA + msgspec.json.encode(said)[:-1] + b","


def _cuts(person: Ints, time_ms: Ints) -> list[int]:
    """Return where to cut sorted rows, both ends too: what shares person and time, and so may be equal, stays together."""
    apart = np.flatnonzero((person[1:] != person[:-1]) | (time_ms[1:] != time_ms[:-1])) + 1
    wanted = np.arange(_PART_ROWS, len(person), _PART_ROWS)
    if len(apart):
        apart = np.unique(apart[np.searchsorted(apart, wanted[wanted <= apart[-1]])])
    return [0, *apart.tolist(), len(person)] if len(person) else [0]


def bounded(sizes: Ints, first: int) -> Iterator[tuple[int, int]]:
    """Cut rows from `first` on into parts of at most PART_BYTES, or one row; yield where each begins and ends. sizes: of the texts."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + PART_BYTES, side="right")))
        yield first + start, first + end
        start = end


class _Equal:
    """Counts equal events of one person and time, across parts too. The rows come sorted by person and time."""

    def __init__(self) -> None:
        self._last = (-1, -1)  # person and time of the last row
        self._before: Counter[str] = Counter()  # of these two, by content

    def places(self, person: Ints, time_ms: Ints, content: pa.Array) -> Ints:
        """Return each row's place among those of its person, time and content."""
        place = _places(person, time_ms, content)
        last = (int(person[-1]), int(time_ms[-1]))
        for at, of in enumerate(zip(person.tolist(), time_ms.tolist(), strict=True)):
            if of != self._last:
                break
            place[at] += self._before[content[at].as_py()]
        if last != self._last:
            self._last, self._before = last, Counter()
        run = len(person) - int(np.searchsorted(person, last[0]))
        run = int(np.count_nonzero(time_ms[-run:] == last[1]))
        self._before.update(content.slice(len(person) - run).to_pylist())
        return place


def _places(person: Ints, time_ms: Ints, content: pa.Array) -> Ints:
    """Return each row's place among those of one person, time and content. The rows come sorted by person and time."""
    place = np.zeros(len(person), np.int64)
    same = (person[1:] == person[:-1]) & (time_ms[1:] == time_ms[:-1])
    beside = np.zeros(len(person), np.bool_)
    beside[1:] |= same
    beside[:-1] |= same
    rows = np.flatnonzero(beside)
    if len(rows) == 0:
        return place
    # Person and time are part of the content, so that equal content is all that has to be looked for.
    code = np.asarray(content.take(pa.array(rows)).dictionary_encode().indices)
    order = np.argsort(code, kind="stable")
    ordered = code[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    count = np.diff(first, append=len(ordered))
    within = np.arange(len(ordered)) - np.repeat(first, count)
    place[rows[order]] = within
    return place


def _order(person: Ints, time_ms: Ints) -> Ints | None:
    """Return the rows by person and time, as they stand where both are equal; None if they do not fit into one number.

    Numbers are sorted several times faster than pairs. Which person is the next one is all that counts, so people are
    numbered anew; the row's own number comes last.
    """
    if not len(person):
        return None
    people, code = np.unique(person, return_inverse=True)
    low = int(time_ms.min())
    sizes = (len(people), int(time_ms.max()) - low + 1, len(person))
    bits = [(size - 1).bit_length() for size in sizes]
    if sum(bits) > _BITS:
        return None
    number = (code << (bits[1] + bits[2])) | ((time_ms - low) << bits[2]) | np.arange(len(person))
    number.sort()
    found: Ints = number & ((1 << bits[2]) - 1)
    return found


def _ascending(line: Ints, file: Ints) -> bool:
    """Say whether rows stand in the order of the source, which a stable sort keeps."""
    same = file[1:] == file[:-1]
    return bool(np.all((file[1:] > file[:-1]) | (same & (line[1:] > line[:-1]))))


def _ints(table: pa.Table | pa.RecordBatch, name: str) -> Ints:
    column = table.column(name)
    found = (
        column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy()
    )
    return np.asarray(found, np.int64)
