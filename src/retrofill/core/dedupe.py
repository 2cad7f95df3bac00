"""Was this event seen before? Keys of events, and a table of fingerprints that answers for millions of them.

A key is 16 bytes: a hash of what makes an event the same event (`key`, `triple`), zeros for an event that has nothing
of the kind. Its first half is its fingerprint. `Fingerprints` holds fingerprint → number of the block with the event,
12 bytes a slot, in two arrays with open addressing. The slot is the fingerprint scaled to the size of the table, so
that fingerprints in rising order go to rising slots: a sorted run is read and placed from one end to the other, at a
fifth of the price of random order, and so is a table that moves to a larger one. It moves a piece with each `add`,
so that no request waits for all of it. A piece ends at an empty slot: whatever has its home before it has moved, is
looked for in the new table and goes there; all else is in the old one still. So of both together there is no more in
memory than of the larger one. Slots are never emptied: what is older than the window is passed over, and left behind
at the next move.

A fingerprint found is not yet a duplicate: the caller confirms the full key in that block. If it is not there
(2^-64 for each pair of keys), `candidates` names all blocks that may hold it, so that not even then an event is lost.

Blocks are kept as 30 bits; the newest block added makes them whole again. For a key that never expires and is older
than 2^30 blocks that number is wrong: confirm it by key. Of the other two bits one marks keys that never expire (an
import's own), the other the ordinary keys of an import's rows: `decide` keeps what such a row displaces, so that an
undo of the import can bring it back.

Beyond `most` keys in memory the oldest blocks that key files hold (`filed`) are left out: `memory_from` says from
which block on memory answers, and the key files answer for those before. Nothing is forgotten.

Source: contract, events 6; decisions 0005, 0011.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from retrofill.core.block import Kind
from retrofill.limits import FINGERPRINTS_IN_MEMORY

KEY_BYTES = 16
NO_KEY = bytes(KEY_BYTES)

Keys = NDArray[np.uint64]  # shape (n, 2): fingerprint and second half of each key
U64s = NDArray[np.uint64]
U32s = NDArray[np.uint32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Verdicts = NDArray[
    np.uint8
]  # what becomes of each event: 0 it is kept, Kind.DROPPED, Kind.DISPLACED
Run = tuple[U64s, U32s]  # fingerprints in rising order, and what `slot_value` makes of their blocks

_FOREVER = 1 << 31
_IMPORTED = 1 << 30
_LOW = _IMPORTED - 1
_DROPPED, _DISPLACED = int(Kind.DROPPED), int(Kind.DISPLACED)


def key(project: int, device_id: str, insert_id: str, *, import_id: str = "") -> bytes:
    """Return the key of one event. device_id: "" for `$groupidentify` and for the scope of a whole project.

    import_id: for the key that counts within one import for ever. No two different arguments are hashed as one text.
    """
    scope = f"{project}:{len(import_id)}:{import_id}"
    return xxh3_128_digest(f"{scope}{len(device_id)}:{device_id}{insert_id}".encode())


def keys(
    project: int,
    device_ids: Sequence[str],
    insert_ids: Sequence[str | None],
    *,
    import_id: str = "",
) -> bytes:
    """Return the keys of many events of one project, as `key` makes each; NO_KEY where there is no insert_id."""
    scope = f"{project}:{len(import_id)}:{import_id}"
    digest = xxh3_128_digest
    return b"".join(
        [
            digest(f"{scope}{len(device)}:{device}{insert}".encode()) if insert else NO_KEY
            for device, insert in zip(device_ids, insert_ids, strict=True)
        ]
    )


def triple(
    project: int, device_id: str, event_id: int, time_ms: int, *, import_id: str = ""
) -> bytes:
    """Return the key of an event without insert_id whose sender gave a counter, a time and a device."""
    scope = f"i{project}:{len(import_id)}:{import_id}" if import_id else f"t{project}:"
    text = f"{scope}{len(device_id)}:{device_id}{event_id}:{time_ms}"
    return xxh3_128_digest(text.encode())


def table_of(packed: bytes | Keys) -> Keys:
    """Return packed keys as an array of shape (n, 2)."""
    if isinstance(packed, bytes):
        return np.frombuffer(packed, "<u8").reshape(-1, 2)
    return packed.reshape(-1, 2)


def decide(packed: bytes, imports: bytes, held: Verdicts, own_held: Bools | None) -> bytearray:
    """Say of each event whether it is kept (0) or a duplicate: Kind.DROPPED, or Kind.DISPLACED by an import's row.

    packed: the keys of events in order of arrival. imports: their keys within their imports, empty if none is of one.
    held: what a stored row makes of an event with that key: DISPLACED if it is a row of any import, DROPPED if it is
    live, 0 if there is none. own_held: whether the key within the import is stored.

    An event of the import whose row holds its key is DROPPED: a row that holds a key of an import has left the key
    within that import too, for ever. So an event whose own key is not there is of another import than that row.
    """
    if own_held is not None:
        held = np.where(own_held, _DROPPED, held).astype(np.uint8)
    verdicts = bytearray(held.tobytes())
    if _repeats(packed):
        _decide_in_order(packed, imports, verdicts)
    return verdicts


def _repeats(packed: bytes) -> bool:
    """Say whether a fingerprint stands there twice. An import's key does so only where the ordinary one does."""
    fingerprints = table_of(packed)[:, 0]
    fingerprints = np.sort(fingerprints[fingerprints != 0])
    return bool((fingerprints[1:] == fingerprints[:-1]).any())


def _decide_in_order(packed: bytes, imports: bytes, verdicts: bytearray) -> None:
    """Judge events also by those before them, as if each had come alone."""
    holders: dict[bytes, int] = {}  # key → what its row makes of the events after it
    seen: set[bytes] = set()
    for index, verdict in enumerate(verdicts):
        place = slice(index * KEY_BYTES, (index + 1) * KEY_BYTES)
        one, own = packed[place], imports[place] or NO_KEY
        if one == NO_KEY:
            continue
        if own in seen:
            verdicts[index] = _DROPPED
        elif not verdict:
            verdicts[index] = holders.get(one, 0)
            holders.setdefault(one, _DROPPED if own == NO_KEY else _DISPLACED)
        if own != NO_KEY and verdicts[index] != _DROPPED:
            seen.add(own)


def sorted_index(high: U64s, low: U64s, wanted: Keys) -> Ints:
    """Return for each key its index in halves sorted by `high`, the last one if it stands there twice, -1 if nowhere."""
    at = np.searchsorted(high, wanted[:, 0], side="right") - 1
    found = np.full(len(wanted), -1, np.int64)
    open_ = np.arange(len(wanted))
    while True:
        open_ = open_[at[open_] >= 0]
        open_ = open_[high[at[open_]] == wanted[open_, 0]]
        if not len(open_):
            return found
        same = low[at[open_]] == wanted[open_, 1]
        found[open_[same]] = at[open_[same]]
        open_ = open_[~same]
        at[open_] -= 1


def held(block_keys: bytes | Keys, wanted: bytes | Keys) -> Bools:
    """Say of each wanted key whether it stands among the keys of a block: the confirmation of a fingerprint."""
    block = table_of(block_keys)
    block = block[np.argsort(block[:, 0], kind="stable")]
    return sorted_index(block[:, 0], block[:, 1], table_of(wanted)) >= 0


def slot_value(blocks: Ints, *, forever: Bools | bool, imported: Bools | bool = False) -> U32s:
    """Return what a slot holds for blocks, whether their keys never expire, and whether they are of imports' rows."""
    marks = np.where(forever, _FOREVER, 0) | np.where(imported, _IMPORTED, 0)
    return ((blocks & _LOW) | marks).astype(np.uint32)


_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
# One window of slots is looked at together: at two thirds full, it nearly always has the answer.
_WIDTH = 8
_OFFSETS = np.arange(_WIDTH)
_LOAD_MAX = 0.7
_LOAD_OLD = 0.85  # of one that moves to a larger one: hardly any key comes there any more
_LOAD_MOVE = 0.65
_LOAD_BULK = 0.55
_LOAD_NEW = 0.45
_SLOTS_MIN = 1 << 12
_SAMPLE = 1 << 13  # slots looked at to estimate how many of all are still wanted
# Places of a bulk build are sorted as 16-bit numbers, which numpy does by radix, this many slots at a time.
_PIECE_SLOTS = 60_000
# Slots moved with each key added: a move ends long before the new table is full.
_MOVED_PER_KEY = 16
_MOVED_MIN = 512
_GIVEN_BACK = (
    1 << 16
)  # slots of which the memory is given back at once, whole pages of either array


class _Table:
    """Fingerprints and their values. After the last home there is room for what probing pushes on."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0
        # Pages of its own, so that those of a table that has moved can be given back one after another.
        self._maps = [mmap.mmap(-1, (size + 1024) * width, flags=_PRIVATE) for width in (8, 4)]
        self.fingerprints: U64s = np.frombuffer(self._maps[0], np.uint64)
        self.values: U32s = np.frombuffer(self._maps[1], np.uint32)
        self.given_back = 0  # slots, from the first on

    @property
    def load(self) -> float:
        return self.used / self.size

    @property
    def memory_bytes(self) -> int:
        return (len(self.values) - self.given_back) * 12

    def give_back(self, last: int) -> None:
        """Let go of the memory of slots before one, which nobody looks at any more."""
        last -= last % _GIVEN_BACK
        if last > self.given_back:
            for one, width in zip(self._maps, (8, 4), strict=False):
                first = self.given_back * width
                one.madvise(mmap.MADV_DONTNEED, first, last * width - first)
            self.given_back = last

    def empty_from(self, slot: int) -> int:
        """Return the first empty slot from one on, or the end."""
        while slot < len(self.fingerprints):
            empty = self.fingerprints[slot : slot + _WIDTH * _WIDTH] == 0
            if empty.any():
                return slot + int(empty.argmax())
            slot += len(empty)
        return slot

    def home(self, fingerprints: U64s) -> Ints:
        scaled = (fingerprints >> np.uint64(32)) * np.uint64(self.size)
        return (scaled >> np.uint64(32)).astype(np.int64)

    def find(self, wanted: U64s, valid: _Valid, found: Ints) -> None:
        """Write the block of each fingerprint that has a valid one into `found`. 0 finds nothing."""
        pos = self.home(wanted)
        here = self.fingerprints[pos]
        open_ = np.flatnonzero((here != 0) & (wanted != 0))
        hit = open_[here[open_] == wanted[open_]]
        if len(hit):
            self._take(hit, pos[hit], valid, found)
        # Two passes: most are settled by their home slot, the others by the window after it.
        rows = open_[found[open_] == 0]
        at = pos[rows] + 1
        while len(rows):
            windows = at[:, None] + _OFFSETS
            here = self.fingerprints[windows]
            done = (here == 0).any(1)
            hits = np.flatnonzero(here == wanted[rows, None])
            if len(hits):
                self._take(rows[hits // _WIDTH], windows.ravel()[hits], valid, found)
                done |= found[rows] != 0
            go_on = ~done
            rows, at = rows[go_on], at[go_on] + _WIDTH

    def _take(self, rows: Ints, slots: Ints, valid: _Valid, found: Ints) -> None:
        blocks, good = valid.blocks(self.values[slots], rows)
        found[rows[good]] = blocks[good]

    def all_of(self, fingerprint: int) -> U32s:
        """Return every value of one fingerprint."""
        wanted = np.uint64(fingerprint)
        at = int(self.home(np.array([wanted]))[0])
        values = []
        while self.fingerprints[at]:
            if self.fingerprints[at] == wanted:
                values.append(self.values[at])
            at += 1
        return np.array(values, np.uint32)

    def place(self, runs: Sequence[Run]) -> None:
        """Fill the empty table with sorted runs, from its first slot to its last."""
        self.used = sum(len(run[0]) for run in runs)
        pieces = self.size // _PIECE_SLOTS + 1
        bounds = np.array([piece * 2**64 // pieces for piece in range(1, pieces)], np.uint64)
        cuts = [[0, *np.searchsorted(run[0], bounds).tolist(), len(run[0])] for run in runs]
        free = 0  # every slot before it may be taken
        for piece in range(pieces):
            parts = [slice(cut[piece], cut[piece + 1]) for cut in cuts]
            fingerprints = np.concatenate(
                [run[0][part] for run, part in zip(runs, parts, strict=True)]
            )
            if not len(fingerprints):
                continue
            values = np.concatenate([run[1][part] for run, part in zip(runs, parts, strict=True)])
            at = self.home(fingerprints)
            order = (at - at.min()).astype(np.uint16).argsort(kind="stable")
            # In rising order each key goes to its home or to the slot after the one before it.
            rank = np.arange(len(at))
            at = at[order] - rank
            at[0] = max(int(at[0]), free)
            at = np.maximum.accumulate(at) + rank
            free = int(at[-1]) + 1
            self._reach(free)
            self.fingerprints[at] = fingerprints[order]
            self.values[at] = values[order]

    def insert(self, fingerprints: U64s, values: U32s) -> None:
        """Put fingerprints, none of them 0, into empty slots; one that is there already is there twice then."""
        self.used += len(fingerprints)
        at = self.home(fingerprints)
        rest = self._put(at, self.fingerprints[at] == 0, fingerprints, values)
        fingerprints, values, at = fingerprints[rest], values[rest], at[rest]
        while len(at):
            self._reach(int(at.max()))
            empty = self.fingerprints[at[:, None] + _OFFSETS] == 0
            first = empty.argmax(1)
            has = empty[np.arange(len(at)), first]
            at = np.where(has, at + first, at + _WIDTH)
            rest = self._put(at, has, fingerprints, values)
            fingerprints, values, at = fingerprints[rest], values[rest], at[rest]

    def _put(self, at: Ints, may: Bools, fingerprints: U64s, values: U32s) -> Ints:
        """Write where it may be written; return the indexes of those left, also because another took the slot."""
        tried = np.flatnonzero(may)
        slots, wanted = at[tried], fingerprints[tried]
        self.fingerprints[slots] = wanted
        won = self.fingerprints[slots] == wanted
        self.values[slots[won]] = values[tried[won]]
        left = np.ones(len(at), bool)
        left[tried[won]] = False
        return np.flatnonzero(left)

    def _reach(self, slot: int) -> None:
        """See to it that windows after this slot end inside the arrays, on an empty slot."""
        if slot >= len(self.fingerprints) - 4 * _WIDTH:
            more = slot - self.size + 4096
            self.fingerprints = np.concatenate((self.fingerprints, np.zeros(more, np.uint64)))
            self.values = np.concatenate((self.values, np.zeros(more, np.uint32)))
            self._maps = []


class _Valid:
    """Which values count: those that never expire, and those of `oldest` or a later block."""

    def __init__(self, newest: int, oldest: int | Ints) -> None:
        self._newest = newest
        self._oldest = oldest

    def blocks(self, values: U32s, rows: Ints | slice = slice(None)) -> tuple[Ints, Bools]:
        """Return the block numbers of slot values, and whether each counts for its row."""
        whole = values.astype(np.int64)
        blocks = self._newest - ((self._newest - whole) & _LOW)
        oldest = self._oldest if isinstance(self._oldest, int) else self._oldest[rows]
        return blocks, (blocks >= oldest) | (whole >= _FOREVER)


class Fingerprints:
    """Fingerprint → block of every key of the window. Not for use by two threads at once.

    most: keys held in memory. filed: the last block whose keys are in key files, set by the caller.
    memory_from: keys of earlier blocks are in key files only.
    """

    def __init__(self, *, most: int = FINGERPRINTS_IN_MEMORY, memory_from: int = 1) -> None:
        self.filed = 0
        self.memory_from = memory_from
        self._most = most
        self._newest = 0
        self._oldest = 0
        self._table = _Table(_SLOTS_MIN)
        self._old: _Table | None = None
        self._moved = (
            0  # slots of the old table that have been moved; that one is empty, or the end
        )

    @classmethod
    def bulk(
        cls,
        runs: Sequence[Run],
        *,
        newest: int,
        most: int = FINGERPRINTS_IN_MEMORY,
        memory_from: int = 1,
    ) -> Fingerprints:
        """Build the table of a start from sorted runs, as key files hold them. newest: the last block of all."""
        made = cls(most=most, memory_from=memory_from)
        made._newest = newest
        made._table = _Table(max(int(sum(len(run[0]) for run in runs) / _LOAD_BULK), _SLOTS_MIN))
        made._table.place(runs)
        return made

    def __len__(self) -> int:
        """About how many keys are held: while the table moves, what is left of the old one is estimated."""
        if self._old is None:
            return self._table.used
        left = 1 - self._moved / len(self._old.fingerprints)
        return self._table.used + int(self._old.used * left)

    @property
    def memory_bytes(self) -> int:
        """What the tables take. Of one that another moves to nothing has been touched behind where that one stands."""
        if self._old is None:
            return self._table.memory_bytes
        share = self._moved / len(self._old.values)
        return self._old.memory_bytes + int(self._table.memory_bytes * share)

    def split(self, packed: bytes | Keys, *, oldest_block: int | Ints) -> Ints:
        """Return for each key the block that may hold it, 0 for a key not seen in `oldest_block` or later.

        oldest_block: one for all keys, or one each. A key that never expires is found whatever its block.
        """
        wanted = np.ascontiguousarray(table_of(packed)[:, 0])
        found = np.zeros(len(wanted), np.int64)
        valid = _Valid(self._newest, oldest_block)
        if self._old is None:
            self._table.find(wanted, valid, found)
            return found
        moved = self._has_moved(wanted)
        for table, rows in (
            (self._table, np.flatnonzero(moved)),
            (self._old, np.flatnonzero(~moved)),
        ):
            if not isinstance(oldest_block, int):
                valid = _Valid(self._newest, oldest_block[rows])
            some = np.zeros(len(rows), np.int64)
            table.find(wanted[rows], valid, some)
            found[rows] = some
        return found

    def _has_moved(self, fingerprints: U64s) -> Bools:
        """Say which belong into the new table already, of some that have a home in the old one."""
        assert self._old is not None
        return np.asarray(self._old.home(fingerprints) < self._moved)

    def candidates(self, one: bytes, *, oldest_block: int) -> list[int]:
        """Return every block that may hold this key, newest first: for a key that is not where `split` said."""
        fingerprints = table_of(one)[:, 0]
        table = self._table
        if self._old is not None and not self._has_moved(fingerprints)[0]:
            table = self._old
        values = table.all_of(int(fingerprints[0]))
        blocks, good = _Valid(self._newest, oldest_block).blocks(values)
        return sorted({int(block) for block in blocks[good]}, reverse=True)

    def add(
        self,
        packed: bytes | Keys,
        block: int,
        *,
        oldest_block: int = 0,
        forever: Bools | bool = False,
    ) -> None:
        """Add the keys of a block that is on disk; those without a key are passed over.

        oldest_block: what is older is left behind when the table next moves. forever: keys that never expire.
        """
        assert block > 0
        fingerprints = table_of(packed)[:, 0]
        some = np.flatnonzero(fingerprints)
        kept = forever if isinstance(forever, bool) else forever[some]
        values = slot_value(np.full(len(some), block, np.int64), forever=kept)
        self._newest = max(self._newest, block)
        self._oldest = max(self._oldest, oldest_block)
        if self._old is not None and self._old.used + len(some) > _LOAD_OLD * self._old.size:
            self._end_move()
        if self._table.used + len(some) > _LOAD_MAX * self._table.size:
            self._rebuild(len(some))
        self._insert(fingerprints[some], values)
        if self._old is not None:
            self._move(max(len(some) * _MOVED_PER_KEY, _MOVED_MIN))
        elif self._table.load > _LOAD_MOVE:
            self._begin_move()

    def _insert(self, fingerprints: U64s, values: U32s) -> None:
        if self._old is not None:
            moved = self._has_moved(fingerprints)
            self._old.insert(fingerprints[~moved], values[~moved])
            fingerprints, values = fingerprints[moved], values[moved]
        self._table.insert(fingerprints, values)

    def _begin_move(self) -> None:
        """Begin to move to another table, in step with the keys that come."""
        table = self._table
        live = self._live_share(table) * table.used
        if live > self._most:
            self._leave_to_files(table, live)
            live = self._live_share(table) * table.used
        self._old, self._moved = table, 0
        self._table = _Table(max(int(live / _LOAD_NEW), _SLOTS_MIN))

    def _move(self, slots: int) -> None:
        old = self._old
        assert old is not None
        first = self._moved
        last = old.empty_from(first + slots)
        some = first + np.flatnonzero(old.fingerprints[first:last])
        values = old.values[some]
        live = self._live(values)
        self._table.insert(old.fingerprints[some[live]], values[live])
        self._moved = last
        old.give_back(last)
        if last >= len(old.fingerprints):
            self._old = None

    def _rebuild(self, added: int) -> None:
        """Move at once: one call adds more than the table has room for, or more was live than the sample said."""
        self._end_move()
        old = self._table
        live = self._live_share(old) * old.used
        self._old, self._moved = old, 0
        self._table = _Table(max(int((live + added) / _LOAD_NEW), _SLOTS_MIN))
        self._end_move()

    def _end_move(self) -> None:
        while self._old is not None:
            self._move(_PIECE_SLOTS)

    def _live(self, values: U32s) -> Bools:
        blocks, good = _Valid(self._newest, self._oldest).blocks(values)
        good &= blocks >= self.memory_from
        return good

    def _sample(self, table: _Table) -> U32s:
        """Return the values of about _SAMPLE slots from all over the table."""
        step = max(len(table.values) // _SAMPLE, 1)
        values: U32s = table.values[::step][table.fingerprints[::step] != 0]
        return values

    def _live_share(self, table: _Table) -> float:
        values = self._sample(table)
        return float(np.mean(self._live(values))) if len(values) else 0.0

    def _leave_to_files(self, table: _Table, live: float) -> None:
        """Raise `memory_from` so that three quarters of what is allowed stay, as far as key files reach."""
        values = self._sample(table)
        values = values[self._live(values)]
        blocks, _ = _Valid(self._newest, 0).blocks(values)
        gone = 1 - 0.75 * self._most / live
        cut = int(np.quantile(blocks, gone)) if len(blocks) else 1
        self.memory_from = max(self.memory_from, min(cut, self.filed + 1))
