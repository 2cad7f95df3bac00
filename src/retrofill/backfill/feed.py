"""From the staged sets to works at hand, in bounded memory, whatever the size of the history.

Most people have few rows. They stream by in the order in which they are stored, a row group at a time, and whole people
are bundled into works of about one request: a request is then one slice of a buffer, and nothing is done for each event.
A person can be bundled when no limit of their own can be reached by all of their rows at once; the others are works of
their own, with stretches that say whose limits count.

People with a long way to go cannot wait until the stream comes by: they are *lanes*, opened at once, the longest first,
and read a chunk at a time. The people who share a kiosk's device are one lane too: that device is what takes long.

A `Block` is the text of consecutive rows, each behind a comma: rows a..b are one slice of it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from retrofill.backfill import texts
from retrofill.backfill.direct import Room
from retrofill.backfill.journal import Rows, Span
from retrofill.backfill.manifest import Manifest
from retrofill.backfill.sets import COMMA, TEXT, Set
from retrofill.core.schedule import Rates, Stretch, Work
from retrofill.errors import CorruptError

LANE_ROWS = (
    2048  # ours: whoever has more rows is a lane, so that streamed people end within two row groups
)
LANE_SHARE = 0.005  # ours: and whoever would alone take this part of the whole time
LANES_OPEN = (12, 64)  # ours: lanes open at once, fewer when requests are large
LANE_BYTES = 24 * 1024 * 1024  # ours: of these, all together
KIOSK_ROWS = 1200  # ours: rows at hand of one kiosk
HISTORY_PER_S = (
    50_000  # ours: how fast a history goes where nothing limits it, for deciding who is long
)
CACHED_GROUPS = 2  # row groups kept as read, for lanes and for looking rows up

DETAILS = ["person", TEXT, "device_id", "user_id", "insert_id", "file", "line"]

Ints = NDArray[np.int64]


def updates(json: pa.Array) -> pa.BooleanArray:
    """Say which events are property updates: those with user properties, and hardly others.

    Beside the flag they are none all the same, unless they are identify calls, which set properties whatever it says.
    """
    identify = texts.telling(json, "event_type", '"$identify"')
    spared = pc.and_not(texts.telling(json, "$skip_user_properties_sync", "true"), identify)
    return pc.and_not(texts.telling(json, "user_properties", "{"), spared)


class Block:
    """The text of consecutive rows of one set. people: the person of each."""

    __slots__ = ("data", "first", "meter", "offsets", "people", "set", "size")

    def __init__(
        self, number: int, first: int, text: pa.Array, people: Ints, meter: list[int]
    ) -> None:
        _valid, ends, data = text.buffers()
        offsets = np.frombuffer(ends, np.int32)[text.offset : text.offset + len(text) + 1]
        self.set = number
        self.first = first
        self.data = memoryview(data) if data is not None else memoryview(b"")
        self.offsets = offsets
        self.people = people
        self.size = int(offsets[-1]) - int(offsets[0]) + 16 * len(people)
        self.meter = meter
        meter[0] += self.size

    def __del__(self) -> None:
        self.meter[0] -= self.size

    def text(self, start: int, stop: int) -> memoryview:
        """Rows start..stop of the block, joined by commas."""
        return self.data[int(self.offsets[start]) + len(COMMA) : int(self.offsets[stop])]


class Cut(NamedTuple):
    """Rows start..stop of a block."""

    block: Block
    start: int
    stop: int

    @property
    def count(self) -> int:  # type: ignore[override] # a tuple's own count is not wanted here
        """How many rows."""
        return self.stop - self.start

    @property
    def span(self) -> Span:
        """The same rows as the ledger names them."""
        return Span(self.block.set, self.block.first + self.start, self.stop - self.start)


class Row(NamedTuple):
    """What is known of one row beside its text."""

    person: int
    device: str | None
    user: str | None
    insert_id: str
    file: int
    line: int


class Lane:
    """One person with a long way to go, or everyone at a kiosk. left: rows that were not read yet."""

    __slots__ = ("at_hand", "entries", "left", "shared", "waits", "works")

    def __init__(self, entries: Iterable[tuple[int, int, int, int]], *, shared: bool) -> None:
        self.entries = deque(entries)  # (set, first, last, person)
        self.left = sum(last - first for _, first, last, _ in self.entries)
        self.at_hand = 0  # rows of works that are open
        self.works = 0  # how many are open
        self.shared = shared
        self.waits = False  # whether it stands in line to be opened


class Open(NamedTuple):
    """A lane's work. Rows at..last of the set were not read yet; `rows` were."""

    lane: Lane
    set: int
    at: int
    last: int
    person: int
    rows: int


class Feed:
    """What is still to be sent, as works. One thread at a time."""

    def __init__(
        self,
        stage: Path,
        manifest: Manifest,
        rates: Rates,
        done: Rows,
        *,
        round_trip_s: float = 0.05,
    ) -> None:
        self.rates = rates
        self.loaded = [0]  # bytes of all blocks alive
        self.cuts: dict[int, deque[Cut]] = {}  # the rows at hand of each work, by its key
        self._manifest = manifest
        self._room = Room()
        self._sets = [Set(stage / one.path, self._room) for one in manifest.sets]
        self._done = done
        self._keys = 0
        self._opened: dict[int, Open] = {}
        self._round_trip_s = round_trip_s
        self._kiosks = {
            kind: pa.array([k.id for k in manifest.kiosks if k.kind == kind], pa.string())
            for kind in ("device", "user")
        }
        self._cache: dict[tuple[int, int], pa.RecordBatch] = {}
        self.left = sum(one.rows for one in self._sets) - done.count
        self._people_left: list[Ints] = []  # rows of lanes, by set, as sorted firsts …
        self._lane_ends: list[Ints] = []  # … and lasts
        self._lanes: list[tuple[int, int, Lane]] = []
        self._shelf: list[tuple[float, int, Lane]] = []
        self._open_lanes = 0
        self._turn = 0
        fewest, most = LANES_OPEN
        self._lanes_open = min(most, max(fewest, 16_000 // rates.events_per_request))
        self._details: tuple[int, int, pa.RecordBatch] | None = None
        self._survey()
        self._stream = self._streamed()
        self.streaming = True

    # Who goes which way

    def _survey(self) -> None:
        """Find the people with a long way to go, and those at a kiosk."""
        floor = max(1, self.rates.events_per_request, self.left // 1_000_000)
        found: list[Ints] = []
        for number, one in enumerate(self._sets):
            people, firsts, counts = _people(one)
            keep = counts > floor
            columns = (np.full(int(keep.sum()), number), firsts[keep], counts[keep], people[keep])
            found.append(np.stack(columns, axis=1))
        every = np.concatenate(found) if found else np.zeros((0, 4), np.int64)
        long = every[every[:, 2] > self._long_from(every[:, 2])]
        entries = [(int(s), int(f), int(f + c), int(p)) for s, f, c, p in long.tolist()]
        kiosks = self._kiosk_lanes({(s, f) for s, f, _, _ in entries})
        taken = [*entries, *(entry for lane in kiosks for entry in lane.entries)]
        for number in range(len(self._sets)):
            mine = np.array(sorted((f, e) for s, f, e, _ in taken if s == number), np.int64)
            mine = mine.reshape(-1, 2)
            self._people_left.append(mine[:, 0])
            self._lane_ends.append(mine[:, 1])
        for lane in [*(Lane([entry], shared=False) for entry in entries), *kiosks]:
            self._line_up(lane)

    def _whole_s(self) -> float:
        rates = self.rates
        times = [self.left / HISTORY_PER_S]
        if rates.events_per_s:
            times.append(self.left / rates.events_per_s)
        if rates.requests_per_s:
            times.append(self.left / rates.events_per_request / rates.requests_per_s)
        return max(times)

    def _long_from(self, counts: Ints) -> int:
        """The number of rows above which a person is a lane."""
        rates = self.rates
        each = self._round_trip_s / rates.events_per_request
        if rates.device_per_s:
            each = max(each, 1 / rates.device_per_s)
        whole = self._whole_s()
        # A lane costs a row group's reading at least, some 10 ms: no more of them than that is nothing of the whole.
        many = int(np.clip(whole / 0.5, 32, 2000))
        rows = max(int(LANE_SHARE * whole / each), rates.events_per_request)
        if len(counts) > many:
            rows = max(rows, int(np.partition(counts, -many)[-many]))
        return min(rows, LANE_ROWS)

    def _kiosk_lanes(self, known: set[tuple[int, int]]) -> list[Lane]:
        """One lane for each shared id that takes long; its people in stored order."""
        limits = {"device": self.rates.device_per_s, "user": self.rates.user_per_s}
        whole = self._whole_s()
        hot = [
            kiosk
            for kiosk in self._manifest.kiosks
            if limits[kiosk.kind] and kiosk.events / limits[kiosk.kind] > LANE_SHARE * whole
        ]
        lanes: dict[tuple[str, str], list[tuple[int, int, int, int]]] = {
            (kiosk.kind, kiosk.id): [] for kiosk in hot
        }
        if not lanes:
            return []
        for number, one in enumerate(self._sets):
            for kind, name, entry in _at(one, number, list(lanes)):
                if (number, entry[1]) not in known:
                    known.add((number, entry[1]))
                    lanes[kind, name].append(entry)
        return [Lane(entries, shared=True) for entries in lanes.values() if entries]

    # Works at hand

    def bundle(self) -> list[Work]:
        """Read the next row group of the stream. Returns [] and clears `streaming` at its end."""
        works = next(self._stream, None)
        if works is None:
            self.streaming = False
            return []
        return works

    def _streamed(self) -> Iterator[list[Work]]:
        """Set after set, group after group. Whoever stands last in a group may go on in the next one."""
        for number, one in enumerate(self._sets):
            tail: list[Cut] = []
            for group in range(one.groups):
                works, tail = self._group(number, group, tail)
                if works:
                    yield works
            works = self._single(tail)
            if works:
                yield works

    def _group(self, number: int, group: int, tail: list[Cut]) -> tuple[list[Work], list[Cut]]:
        """The works of one row group and the rows of its last person, who may go on. tail: those of the group before."""
        one = self._sets[number]
        start, stop = int(one.starts[group]), int(one.starts[group + 1])
        left = np.zeros(stop - start, bool)
        for first, last in self._done.missing(number, start, stop):
            left[first - start : last - start] = True
        self._leave_out_lanes(number, start, stop, left)
        rows = np.flatnonzero(left)
        if len(rows) == 0:
            return self._single(tail), []
        table = self._sets[number].read(group, ["person", TEXT])
        people, text = table.column("person").to_numpy(), table.column(TEXT)
        runs = _runs(rows, people)
        works: list[Work] = []
        if tail and int(tail[-1].block.people[-1]) != int(people[runs[0][0]]):
            works += self._single(tail)
            tail = []
        ends = int(people[runs[-1][0]])
        if tail and int(people[runs[0][0]]) != ends:
            # The tail's person ends here, in the first runs.
            head = [run for run in runs if int(people[run[0]]) == int(people[runs[0][0]])]
            works += self._single([*tail, *self._copies(number, start, text, people, head)])
            runs, tail = runs[len(head) :], []
        last_runs = [run for run in runs if int(people[run[0]]) == ends]
        tail = [*tail, *self._copies(number, start, text, people, last_runs)]
        runs = runs[: len(runs) - len(last_runs)]
        if runs:
            works += self._bundles(Block(number, start, text, people, self.loaded), runs)
        return works, tail

    def _copies(
        self, number: int, start: int, text: pa.Array, people: Ints, runs: list[tuple[int, int]]
    ) -> list[Cut]:
        """Rows in blocks of their own, so that the row group need not be kept for them."""
        blocks = [
            Block(number, start + a, self._alone(text, a, b), people[a:b].copy(), self.loaded)
            for a, b in runs
        ]
        return [Cut(block, 0, len(block.people)) for block in blocks]

    def _alone(self, text: pa.StringArray, start: int, stop: int) -> pa.StringArray:
        """Return some of the texts without holding many others."""
        found = text.slice(start, stop - start)
        _valid, offsets, data = found.buffers()
        edges = np.frombuffer(offsets, np.int32)[found.offset : found.offset + len(found) + 1]
        first, last = int(edges[0]), int(edges[-1])
        if 2 * (last - first) >= data.size:
            return found
        ends = pa.py_buffer(edges - edges[0])
        copied = self._room.copied(data.slice(first, last - first))
        return pa.StringArray.from_buffers(len(found), ends, copied)

    def _leave_out_lanes(self, number: int, start: int, stop: int, left: NDArray[np.bool_]) -> None:
        firsts, lasts = self._people_left[number], self._lane_ends[number]
        at = int(np.searchsorted(lasts, start, side="right"))
        while at < len(firsts) and firsts[at] < stop:
            left[max(0, int(firsts[at]) - start) : int(lasts[at]) - start] = False
            at += 1

    def _bundles(self, block: Block, runs: list[tuple[int, int]]) -> list[Work]:
        """Whole people put together, about a request each; those who can reach a limit stay alone."""
        alone = self._needs_stretches(block, runs)
        full = self.rates.events_per_request
        works: list[Work] = []
        cuts: list[Cut] = []
        rows = 0
        before = None
        for index, (start, stop) in enumerate(runs):
            if index in alone:
                same = works and before == block.people[start] and works[-1].stretches is not None
                if same:
                    self._extend(works[-1], [Cut(block, start, stop)])
                else:
                    works += self._single([Cut(block, start, stop)])
                before = block.people[start]
                continue
            if cuts and rows + stop - start > full and before != block.people[start]:
                works.append(self._work(cuts))
                cuts, rows = [], 0
            before = block.people[start]
            if cuts and cuts[-1].stop == start:
                cuts[-1] = Cut(block, cuts[-1].start, stop)
            else:
                cuts.append(Cut(block, start, stop))
            rows += stop - start
        if cuts:
            works.append(self._work(cuts))
        return works

    def _needs_stretches(self, block: Block, runs: list[tuple[int, int]]) -> set[int]:
        """Which runs belong to people who could reach a limit of their own, or who share an id."""
        rates = self.rates
        if not (runs and rates.by_id):
            return set()
        people = [int(block.people[start]) for start, _ in runs]
        totals: dict[int, int] = {}
        for person, (start, stop) in zip(people, runs, strict=True):
            totals[person] = totals.get(person, 0) + stop - start
        marked = {person for person, rows in totals.items() if rows > rates.safe_rows}
        if any(len(ids) for ids in self._kiosks.values()):
            start, stop = runs[0][0], runs[-1][1]
            shared = self._shared(block.set, block.first + start, block.first + stop)
            marked |= set(block.people[start:stop][shared].tolist())
        return {index for index, person in enumerate(people) if person in marked}

    def _shared(self, number: int, first: int, last: int) -> NDArray[np.bool_]:
        found = np.zeros(last - first, bool)
        for kind, column in (("device", "device_id"), ("user", "user_id")):
            if len(self._kiosks[kind]):
                table = self._rows_of(number, first, last)
                mask = pc.is_in(table.column(column), value_set=self._kiosks[kind])
                found |= mask.to_numpy(zero_copy_only=False).astype(bool)
        return found

    def _single(self, cuts: list[Cut]) -> list[Work]:
        """One person's rows as a work of its own, with stretches where limits look at ids."""
        if not cuts:
            return []
        rows = sum(cut.count for cut in cuts)
        if not self.rates.by_id or (
            rows <= self.rates.safe_rows and not any(len(ids) for ids in self._kiosks.values())
        ):
            return [self._work(cuts)]
        return [self._tracked(cuts)]

    def _work(self, cuts: list[Cut]) -> Work:
        self._keys += 1
        self.cuts[self._keys] = deque(cuts)
        return Work(self._keys, sum(cut.count for cut in cuts))

    def _tracked(self, cuts: list[Cut]) -> Work:
        work = self._work(cuts)
        work.person = str(int(cuts[0].block.people[cuts[0].start]))
        work.stretches = deque(self.stretches(cuts))
        return work

    def _extend(self, work: Work, cuts: list[Cut]) -> None:
        self.cuts[work.key].extend(cuts)
        work.rows += sum(cut.count for cut in cuts)
        if work.stretches is not None:
            work.stretches.extend(self.stretches(cuts))

    # Lanes

    def _line_up(self, lane: Lane) -> None:
        lane.waits = True
        self._turn += 1
        heapq.heappush(self._lanes, (-lane.left, self._turn, lane))

    def lanes_wait(self, now: float) -> bool:
        """Whether another lane should be opened now."""
        while self._shelf and self._shelf[0][0] <= now:
            self._line_up(heapq.heappop(self._shelf)[2])
        return bool(self._lanes) and self._open_lanes < self._lanes_open

    @property
    def lanes_full(self) -> bool:
        """Whether lanes wait only because so many are open."""
        return bool(self._lanes) and self._open_lanes >= self._lanes_open

    @property
    def at_end(self) -> bool:
        """Whether nothing is left to be read."""
        return not (self.streaming or self._lanes or self._shelf)

    @property
    def shelf_s(self) -> float | None:
        """When the first lane comes back that was put aside."""
        return self._shelf[0][0] if self._shelf else None

    def open_lane(self) -> list[Work]:
        """Open the lane with the longest way. Returns works of it."""
        lane = heapq.heappop(self._lanes)[2]
        lane.waits = False
        works: list[Work] = []
        while lane.entries and (not works or (lane.shared and lane.at_hand < KIOSK_ROWS)):
            work = self._open(lane, *lane.entries.popleft())
            if work is not None:
                works.append(work)
        return works

    def _open(self, lane: Lane, number: int, first: int, last: int, person: int) -> Work | None:
        cuts, at = self._chunk(number, first, last)
        lane.left -= at - first
        if not cuts:
            return None
        work = self._work(cuts)
        work.person = str(person)
        if self.rates.by_id:
            work.stretches = deque(self.stretches(cuts))
        work.long = True
        work.beyond = lane.left
        self._open_lanes += lane.works == 0
        lane.works += 1
        lane.at_hand += work.rows
        self._opened[work.key] = Open(lane, number, at, last, person, work.rows)
        return work

    def wants_more(self, work: Work) -> bool:
        """Whether a lane's work is about to run out of rows and has more on disk."""
        opened = self._opened.get(work.key)
        low = 2 * self.rates.events_per_request
        return opened is not None and opened.at < opened.last and work.rows < low

    def extend(self, work: Work) -> int:
        """Read the next rows of a lane's work and put them behind its own. Returns how many."""
        opened = self._opened[work.key]
        cuts, at = self._chunk(opened.set, opened.at, opened.last)
        rows = sum(cut.count for cut in cuts)
        lane = opened.lane
        lane.left -= at - opened.at
        lane.at_hand += rows
        self._opened[work.key] = opened._replace(at=at, rows=opened.rows + rows)
        self._extend(work, cuts)
        work.beyond = lane.left
        return rows

    def finished(self, work: Work) -> None:
        """Forget a work of which nothing is left."""
        self.cuts.pop(work.key, None)
        opened = self._opened.pop(work.key, None)
        if opened is not None:
            self._close(opened)

    def _close(self, opened: Open) -> None:
        lane = opened.lane
        lane.works -= 1
        lane.at_hand -= opened.rows
        self._open_lanes -= lane.works == 0
        if lane.entries and not lane.waits and lane.at_hand < KIOSK_ROWS // 2:
            self._line_up(lane)

    def shelve(self, work: Work, until: float) -> bool:
        """Put a lane's work aside until a time, off memory, so that another lane can be opened. False if it is none."""
        opened = self._opened.get(work.key)
        if opened is None or opened.lane.shared:
            return False
        del self._opened[work.key]
        span = self.cuts.pop(work.key)[0].span
        self._close(opened)
        lane = Lane([(span.set, span.first, opened.last, opened.person)], shared=False)
        self._turn += 1
        heapq.heappush(self._shelf, (until, self._turn, lane))
        return True

    def _chunk(self, number: int, first: int, last: int) -> tuple[list[Cut], int]:
        """The next rows of first..last that are to be sent, within one row group. Returns them and where they end."""
        one = self._sets[number]
        while first < last:
            group = one.group_of(first)
            stop = min(last, int(one.starts[group + 1]), first + self._chunk_rows())
            open_ = self._done.missing(number, first, stop)
            if open_:
                table = self._rows_of(number, first, stop)
                # In memory of their own: a slice would keep the whole group for as long as the lane is under way.
                people = table.column("person").to_numpy().copy()
                text = self._alone(table.column(TEXT), 0, stop - first)
                block = Block(number, first, text, people, self.loaded)
                return [Cut(block, a - first, b - first) for a, b in open_], stop
            first = stop
        return [], last

    def _chunk_rows(self) -> int:
        mean = max(1, self._manifest.bytes // max(1, self._manifest.events))
        share = LANE_BYTES // max(8, min(self._lanes_open, self._open_lanes + len(self._lanes)))
        return max(2 * self.rates.events_per_request, share // mean)

    # Looking rows up

    def _rows_of(self, number: int, first: int, last: int) -> pa.RecordBatch:
        """Text and ids of rows first..last of a set, all within one row group."""
        one = self._sets[number]
        group = one.group_of(first)
        table = self._cache.pop((number, group), None)
        if table is None:
            while len(self._cache) >= CACHED_GROUPS:
                del self._cache[next(iter(self._cache))]
            table = self._sets[number].read(group, self._columns)
        self._cache[number, group] = table
        start = int(one.starts[group])
        return table.slice(first - start, last - first)

    @property
    def _columns(self) -> list[str]:
        return ["person", TEXT, "device_id", "user_id"] if self.rates.by_id else ["person", TEXT]

    def stretches(self, cuts: Iterable[Cut]) -> list[Stretch]:
        """Whose rows these are: consecutive rows of the same ids together."""
        found: list[Stretch] = []
        for cut in cuts:
            first = cut.block.first + cut.start
            for start, stop in self._by_group(cut.block.set, first, first + cut.count):
                found += self._stretches_of(cut.block.set, start, stop)
        return found

    def stretches_before(self, cut: Cut) -> list[Stretch]:
        """Whose rows stand before a cut and are of the same person, one who is safe: at most `safe_rows` of them."""
        person = int(cut.block.people[cut.start])
        last = cut.span.first
        found: list[Stretch] = []
        for start, stop in self._by_group(cut.block.set, max(0, last - self.rates.safe_rows), last):
            people = self._rows_of(cut.block.set, start, stop).column("person").to_numpy()
            mine = np.flatnonzero(people == person)
            if len(mine):
                found += self._stretches_of(cut.block.set, start + int(mine[0]), stop)
        return found

    def _by_group(self, number: int, first: int, last: int) -> Iterator[tuple[int, int]]:
        one = self._sets[number]
        while first < last:
            stop = min(last, int(one.starts[one.group_of(first) + 1]))
            yield first, stop
            first = stop

    def _stretches_of(self, number: int, first: int, last: int) -> list[Stretch]:
        table = self._ids_of(number, first, last)
        devices = table.column("device_id").dictionary_encode()
        users = table.column("user_id").dictionary_encode()
        updates = self._updates(table)
        codes = np.stack(
            [
                _codes(devices),
                _codes(users),
                updates.astype(np.int64),
            ]
        )
        cuts = np.flatnonzero((codes[:, 1:] != codes[:, :-1]).any(axis=0)) + 1
        edges: list[int] = [0, *cuts.tolist(), last - first]
        device_ids, user_ids = devices.dictionary.to_pylist(), users.dictionary.to_pylist()
        found = []
        for start, stop in pairwise(edges):
            device = device_ids[codes[0, start]] if codes[0, start] >= 0 else None
            user = user_ids[codes[1, start]] if codes[1, start] >= 0 else None
            # A device that was not sent is derived from the user: it has the same limits.
            found.append(Stretch(device or f"\0{user}", user, stop - start, bool(updates[start])))
        return found

    def _ids_of(self, number: int, first: int, last: int) -> pa.RecordBatch:
        """The same rows with ids, also where no limit looks at them."""
        table = self._rows_of(number, first, last)
        return table if "device_id" in table.schema.names else self._detail(number, first, last)

    def _detail(self, number: int, first: int, last: int) -> pa.RecordBatch:
        """Everything that is known of some rows. The last row group that was asked for is kept."""
        one = self._sets[number]
        group = one.group_of(first)
        if self._details is None or self._details[:2] != (number, group):
            table = self._sets[number].read(group, DETAILS)
            self._details = (number, group, table)
        return self._details[2].slice(first - int(one.starts[group]), last - first)

    def updates(self, requests: Iterable[tuple[int, list[Span]]]) -> Iterator[tuple[int, int, int]]:
        """Yield (at, person, property updates) of those in the requests who can reach the hourly limit.

        requests: of an earlier run, each with when it was answered.
        """
        limit = self.rates.updates_per_h
        busy: list[tuple[Ints, Ints, Ints]] = []
        for one in self._sets:
            people, firsts, counts = _people(one)
            keep = counts > limit
            busy.append((people[keep], firsts[keep], (firsts + counts)[keep]))
        for at, spans in requests:
            for span in spans:
                people, firsts, lasts = busy[span.set]
                end = span.first + span.count
                place = int(np.searchsorted(lasts, span.first, side="right"))
                while place < len(firsts) and firsts[place] < end:
                    first, last = max(span.first, int(firsts[place])), min(end, int(lasts[place]))
                    for start, stop in self._by_group(span.set, first, last):
                        mask = self._updates(self._rows_of(span.set, start, stop))
                        yield at, int(people[place]), int(mask.sum())
                    place += 1

    def _updates(self, table: pa.RecordBatch) -> NDArray[np.bool_]:
        if not self.rates.updates_per_h:
            return np.zeros(table.num_rows, bool)
        mask = updates(table.column(TEXT))
        found: NDArray[np.bool_] = mask.to_numpy(zero_copy_only=False).astype(bool)
        return found

    def row(self, number: int, row: int) -> Row:
        """What is known of one row."""
        found = self._detail(number, row, row + 1).to_pylist()[0]
        return Row(
            found["person"],
            found["device_id"],
            found["user_id"],
            found["insert_id"],
            found["file"],
            found["line"],
        )

    def letter(self, cut: Cut, reason: str) -> str:
        """The dead letter of the first row of a cut: one line of JSON without its end."""
        span = cut.span
        row = self.row(span.set, span.first)
        files = self._manifest.files
        name = files[row.file].name if 0 <= row.file < len(files) else ""
        text = bytes(cut.block.text(cut.start, cut.start + 1)).decode()
        letter = {"file": name, "line": row.line, "reason": reason, "row": text}
        return msgspec.json.encode(letter).decode()

    def by_person(self, cuts: Iterable[Cut]) -> list[Work]:
        """The same rows as one work a person, each with stretches."""
        people: dict[int, list[Cut]] = {}
        for cut in cuts:
            mine = cut.block.people[cut.start : cut.stop]
            edges = [0, *(np.flatnonzero(mine[1:] != mine[:-1]) + 1).tolist(), len(mine)]
            for start, stop in pairwise(edges):
                people.setdefault(int(mine[start]), []).append(
                    Cut(cut.block, cut.start + start, cut.start + stop)
                )
        return [self._tracked([self._small(cut) for cut in cuts]) for cuts in people.values()]

    def _small(self, cut: Cut) -> Cut:
        """The same rows in a block of their own, so that the large one can go."""
        table = self._rows_of(cut.block.set, cut.span.first, cut.span.first + cut.count)
        people = cut.block.people[cut.start : cut.stop].copy()
        text = self._alone(table.column(TEXT), 0, cut.count)
        block = Block(cut.block.set, cut.span.first, text, people, self.loaded)
        return Cut(block, 0, cut.count)


def _codes(encoded: Any) -> Ints:
    codes: Ints = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return codes


def _runs(rows: Ints, people: Ints) -> list[tuple[int, int]]:
    """Consecutive rows of one person, as (start, stop)."""
    mine = people[rows]
    edge = np.flatnonzero((rows[1:] != rows[:-1] + 1) | (mine[1:] != mine[:-1])) + 1
    starts = rows[np.concatenate([[0], edge])]
    stops = rows[np.concatenate([edge - 1, [len(rows) - 1]])] + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _people(one: Set) -> tuple[Ints, Ints, Ints]:
    """(person, first row, rows) of everyone in a set. Raises CorruptError if someone stands in two places."""
    people: list[Ints] = []
    firsts: list[Ints] = []
    at, last = 0, -1  # which is nobody
    for batch in one.batches(["person"]):
        column = batch.column(0).to_numpy()
        if len(column) == 0:
            continue
        edges = np.flatnonzero(np.diff(column, prepend=last))
        people.append(column[edges])
        firsts.append(edges + at)
        at += len(column)
        last = int(column[-1])
    if not people:
        empty = np.zeros(0, np.int64)
        return empty, empty, empty
    who, where = np.concatenate(people), np.concatenate(firsts).astype(np.int64)
    if np.any(who[1:] <= who[:-1]):
        raise CorruptError(
            "A person's rows do not stand together",
            where=str(one.path),
            mend="Remove the stage folder; it is made anew from the source",
        )
    return who, where, np.diff(np.append(where, at))


def _at(
    one: Set, number: int, ids: list[tuple[str, str]]
) -> Iterator[tuple[str, str, tuple[int, int, int, int]]]:
    """Everyone in a set who has one of these ids, with the id that is first in the list."""
    values = {
        kind: pa.array([name for k, name in ids if k == kind], pa.string())
        for kind in ("device", "user")
    }
    who, firsts, counts = _people(one)
    places: dict[int, tuple[str, str]] = {}
    columns = ["person", "device_id", "user_id"]
    for batch in one.batches(columns):
        for kind, column in (("device", 1), ("user", 2)):
            mask = pc.fill_null(
                pc.is_in(batch.column(column), value_set=values[kind]), fill_value=False
            )
            found = batch.filter(mask)
            pairs = zip(found.column(0).to_pylist(), found.column(column).to_pylist(), strict=True)
            for person, name in set(pairs):
                places.setdefault(person, (kind, name))
    for person, first, count in zip(who.tolist(), firsts.tolist(), counts.tolist(), strict=True):
        if person in places:
            yield *places[person], (number, first, first + count, person)
