"""Folding a closure of the lake again: what becomes of its rows, keys and people under another rule than on arrival.

The closure's rows are folded again in order of position under a rule; those that come out of it as they went in stay in
their files, the others are written anew (`engine.changed`). Hidden rows stay in the lake as Kind.UNDONE, so showing them again needs nothing else. A row left out because an import's row had come
before (Kind.DISPLACED) comes back when nothing that is seen now holds its key. Nothing here knows who the closure is:
rows come in from `engine.refolder`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct
from numpy.typing import NDArray

from retrofill.core import dedupe
from retrofill.core.block import SAYABLE, Flag, Kind
from retrofill.core.dedupe import KEY_BYTES, NO_KEY
from retrofill.core.fold import Group
from retrofill.core.refold import Merged, Refold, Rows
from retrofill.core.row import SHOWN, Vocabulary
from retrofill.engine.changed import ASIDE
from retrofill.engine.duplicates import imported_of, packed_of_rows
from retrofill.engine.freed import Freeing
from retrofill.lake import arrow
from retrofill.lake.arrival import of_import
from retrofill.lake.arrow import FREED, SCHEMA, MergeRow
from retrofill.limits import MS_PER_HOUR, Limits

Bools = NDArray[np.bool_]
# What decides whether an event is a duplicate, with its place.
KEY_COLUMNS = (
    *("project", "block", "row", "kind", "user_id", "device_id", "event_type", "insert_id"),
    *("event_id", "client_event_time", "import_id"),
)
_KEYED = [*KEY_COLUMNS, "server_upload_time"]
_BLOCK_MAX = 2**62
_NEVER_MS = 2**62


class Which(Struct, frozen=True):
    """The rows of one generation of an import: those of blocks after `after` up to `until`."""

    import_id: str
    after: int = 0
    until: int = _BLOCK_MAX


class Seed(Struct, frozen=True):
    """Where a closure starts: an import's rows, hidden ones too; people; who shows a group; or the whole project."""

    rows: Which | None = None
    people: list[int] = []
    groups: list[Group] = []
    whole: bool = False


class Rule(Struct, frozen=True):
    """What the fold does otherwise than on arrival. hide, show: rows that become hidden ones, or visible again.

    by_time: rows are folded in event time, see `core.order`. barred: (device, user) whose merge is taken back;
    lifted: of those the project bars, who may be merged again.
    """

    hide: Which | None = None
    show: Which | None = None
    by_time: bool = False
    barred: list[tuple[str, str]] = []
    lifted: list[tuple[str, str]] = []

    @property
    def bounds(self) -> tuple[str, int, int]:
        """Which import's rows change, after which block up to which."""
        which = self.hide or self.show
        return (which.import_id, which.after, which.until) if which else ("", 0, 0)


class Keys(Struct):
    """Dedupe keys with their blocks, packed, and two marks of each: as in a key file."""

    packed: list[bytes] = []
    blocks: list[NDArray[np.int64]] = []
    forever: list[Bools] = []
    imported: list[Bools] = []

    def add(
        self, packed: bytes, blocks: NDArray[np.int64], *, forever: bool, imported: Bools
    ) -> None:
        """Take keys; those of rows without one are left out."""
        some = dedupe.table_of(packed).any(axis=1)
        self.packed.append(dedupe.table_of(packed)[some].tobytes())
        self.blocks.append(blocks[some])
        self.forever.append(np.full(int(some.sum()), forever))
        self.imported.append(imported[some])

    def of_rows(self, rows: pa.Table, kinds: NDArray[np.uint8], limits: Limits) -> None:
        """Take the keys that rows of these kinds hold: a displaced one only that within its import."""
        if not rows.num_rows:
            return
        blocks = rows["block"].to_numpy()
        imported = imported_of(rows)
        ordinary = pa.array(kinds != Kind.DISPLACED)
        self.add(
            packed_of_rows(rows.filter(ordinary), limits),
            blocks[ordinary],
            forever=False,
            imported=imported[ordinary],
        )
        own = pa.array(imported)
        self.add(
            packed_of_rows(rows.filter(own), limits, own=True),
            blocks[imported],
            forever=True,
            imported=np.zeros(int(imported.sum()), bool),
        )


class Stored:
    """By how many rows the hours differ that count for the daily quota. after_ms: rows of before are not counted."""

    def __init__(self, after_ms: int) -> None:
        self._after_ms = after_ms
        self._ids: dict[str, Counter[tuple[int, str]]] = {
            name: Counter() for name in ("device_id", "user_id")
        }

    def change(self, rows: pa.Table, were: NDArray[np.uint8], are: NDArray[np.uint8]) -> None:
        """Hear of rows that were of other kinds."""
        times = rows["server_upload_time"].to_numpy()
        for kinds, by in ((were, -1), (are, 1)):
            some = np.flatnonzero((kinds == Kind.EVENT) & (times > self._after_ms))
            hours = (times[some] // MS_PER_HOUR).tolist()
            for name, counts in self._ids.items():
                ids = rows[name].take(pa.array(some)).to_pylist()
                for hour, one in zip(hours, ids, strict=True):
                    if one:
                        counts[hour, one] += by

    def told(self) -> list[list[tuple[int, str, int]]]:
        """Return what has changed since the last time: of devices and of users (hour, id, rows)."""
        found = []
        for name, counts in self._ids.items():
            found.append([(*place, rows) for place, rows in counts.items() if rows])
            self._ids[name] = Counter()
        return found


class Imported:
    """The keys of imports' rows that were folded, with their server times: 24 bytes each.

    Sorted by the first halves; those that came since lie beside them until there are many.
    """

    def __init__(self) -> None:
        self._sorted = _none_imported()
        self._since: list[_Dated] = []

    def add(self, keys: dedupe.Keys, times: NDArray[np.int64]) -> None:
        """Take the keys of some rows."""
        self._since.append((keys, times))

    def may_hold(self, firsts: NDArray[np.uint64]) -> Bools:
        """Say which of these first halves any of the keys has; 0 is nobody's."""
        found = np.zeros(len(firsts), bool)
        for keys, _ in self._parts():
            left, right = (np.searchsorted(keys[:, 0], firsts, side) for side in _SIDES)
            found |= left < right
        return np.asarray(found & (firsts != 0))

    def held(self, wanted: Collection[bytes]) -> Iterator[tuple[bytes, int]]:
        """Yield those of some keys that are there, with the time of each row."""
        if not wanted:
            return
        firsts = np.unique(dedupe.table_of(b"".join(wanted))[:, 0])
        for keys, times in self._parts():
            left, right = (np.searchsorted(keys[:, 0], firsts, side) for side in _SIDES)
            for first, last in zip(left.tolist(), right.tolist(), strict=True):
                for at in range(first, last):
                    if (one := keys[at].tobytes()) in wanted:
                        yield one, int(times[at])

    def _parts(self) -> list[_Dated]:
        """The keys in sorted pieces: most of them, and what came since."""
        if self._since:
            since = _in_order(self._since)
            self._since = [since]
            if 4 * len(since[1]) > len(self._sorted[1]):
                self._sorted, self._since = _in_order([self._sorted, since]), []
        return [self._sorted, *self._since]


_Dated = tuple[NDArray[np.uint64], NDArray[np.int64]]
_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


def _none_imported() -> _Dated:
    return np.zeros((0, 2), np.uint64), np.zeros(0, np.int64)


def _in_order(parts: Sequence[_Dated]) -> _Dated:
    keys = np.concatenate([some for some, _ in parts])
    order = np.argsort(keys[:, 0], kind="stable")
    return keys[order], np.concatenate([times for _, times in parts])[order]


class Folding:
    """The rows of some people on their way through the fold.

    people: who they are, by amplitude_id, in rising order; whoever joins later is added. freed: of their devices, where
    deleted rows took them. gone, added: keys that rows held before, and hold now. stored: what differs for the daily quota. rows: how many were theirs so far.
    """

    def __init__(
        self,
        rule: Rule,
        refold: Refold,
        limits: Limits,
        *,
        quota_after_ms: int = _NEVER_MS,
    ) -> None:
        self.freed = Freeing(FREED.empty_table(), by_time=rule.by_time)
        self.stored = Stored(quota_after_ms if limits.daily_quota else _NEVER_MS)
        self._rule = rule
        self._limits = limits
        self.refold = refold
        self.people: NDArray[np.int64] = np.zeros(0, np.int64)
        self._contested: set[bytes] = set()
        self._inserts: set[str] = set()  # insert_ids of contested keys
        self._wanted: pa.Array | None = None  # the same, made once for many rows
        self._triples: set[tuple[str, int]] = set()  # device_id and event_id of those without
        self._held: dict[bytes, int] = {}  # contested key → server time of the row that holds it
        self._judged: set[tuple[int, int]] | None = None  # (block, row) of repeats
        self._imported = Imported()
        self.gone, self.added = Keys([], [], [], []), Keys([], [], [], [])
        self.rows = 0

    def contest(self, displaced: pa.Table) -> None:
        """Hear of rows that were left out because an import's row had come before: their keys may be free now."""
        packed = packed_of_rows(displaced, self._limits)
        new = {packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES)}
        new -= self._contested | {NO_KEY}
        self._inserts.update(filter(None, displaced["insert_id"].to_pylist()))
        self._wanted = None
        sides = (displaced[name].to_pylist() for name in ("insert_id", "device_id", "event_id"))
        self._triples.update(
            (device, number)
            for insert, device, number in zip(*sides, strict=True)
            if not insert and device and number is not None
        )
        self._contested |= new
        # Rows folded before may hold them. Only an import's row can: a repeat of a live one is not kept.
        for one, time in self._imported.held(new):
            self._held[one] = max(self._held.get(one, 0), time)

    def repeats(self, rows: pa.Table) -> pa.Table:
        """Return those of some rows that come now which may repeat an import's row that was folded before."""
        keys = dedupe.table_of(packed_of_rows(rows, self._limits))
        return rows.filter(pa.array(self._imported.may_hold(keys[:, 0])))

    def know(self, rows: pa.Table, freed: Freeing) -> None:
        """Fold rows that stay as they are, for what they make of people; groups were changed by them already.

        All of some people's so far, in the order of the fold: nobody is late by them. freed: of their devices.
        """
        self._imports_of(rows, np.ones(rows.num_rows, bool))
        late, self.refold.late = self.refold.late, set()
        groups = pc.equal(rows["event_type"], "$groupidentify")
        for name in ("sent", "sent_groups"):
            kept = pc.if_else(groups, pa.scalar(None, pa.string()), rows[name])
            rows = with_column(rows, name, kept)
        nobody = np.zeros(rows.num_rows, bool)
        self.refold.fold(rows_of(rows, nobody), freed.among(rows))
        self.refold.late = late

    def _foreign(self, rows: pa.Table, mine: Bools) -> Bools:
        """Say which rows are group identifies of nobody who is folded: they are read for their groups."""
        group = rows["kind"].to_numpy() == Kind.GROUP_IDENTIFY
        group |= mine & np.asarray(pc.equal(rows["event_type"], "$groupidentify"))
        return np.asarray(group & ~np.isin(rows["amplitude_id"].to_numpy(), self.people))

    @property
    def contested(self) -> pa.Table:
        """What rows say whose keys were left out because an import's row had come before.

        insert_id; or none, and device_id and event_id.
        """
        inserts, triples = sorted(self._inserts), sorted(self._triples)
        return pa.table(
            {
                "insert_id": pa.array([*inserts, *[None] * len(triples)], pa.string()),
                "device_id": pa.array(
                    [*[None] * len(inserts), *(device for device, _ in triples)], pa.string()
                ),
                "event_id": pa.array(
                    [*[None] * len(inserts), *(number for _, number in triples)], pa.int64()
                ),
            }
        )

    def judge(self, rows: pa.Table) -> None:
        """Decide which of these, in order of position, repeat an earlier one: that goes by arrival in any fold.

        What is folded next comes in another order, until `judged`.
        """
        good = self._not_repeated(rows, self._mine(rows)[1])
        repeated = rows.select(["block", "row"]).filter(pa.array(~good))
        places = zip(repeated["block"].to_pylist(), repeated["row"].to_pylist(), strict=True)
        self._judged = set(places)

    def judged(self) -> None:
        """All of what was judged is folded."""
        self._judged = None

    def _mine(self, rows: pa.Table) -> tuple[Bools, Bools]:
        """Say which rows are the change's own, and which may be seen after it."""
        mine = of_import(rows, *self._rule.bounds)
        return mine, ~mine if self._rule.hide else np.ones(len(mine), bool)

    def fold(self, rows: pa.Table) -> Refolded:
        """Fold the next rows, blocks whole unless in event time."""
        kinds = rows["kind"].to_numpy()
        mine, candidate = self._mine(rows)
        seen = candidate & self._not_repeated(rows, candidate)
        foreign = self._foreign(rows, mine)
        # Somebody else's group identify stays where it is.
        own = ~(foreign & (rows["amplitude_id"].to_numpy() != 0)) | mine
        new = Refolded(rows, own, seen)
        if seen.any():
            some = rows if seen.all() else rows.filter(pa.array(seen))
            some = with_column(some, "flags", _earned(some))
            new.decide(Decided(self.refold, some, foreign[seen], self.freed))
        new.kind[~seen & ~mine] = Kind.DISPLACED
        if self._rule.hide:
            new.kind[mine] = Kind.UNDONE
        else:
            new.kind[mine & ~seen] = Kind.DISPLACED
        self._key_changes(rows, kinds, new.kind)
        self.rows += int(own.sum())
        return new

    def _key_changes(self, rows: pa.Table, were: NDArray[np.uint8], are: NDArray[np.uint8]) -> None:
        changed = np.flatnonzero(were != are)
        if not len(changed):
            return
        some = rows.select(_KEYED).take(pa.array(changed))
        self.stored.change(some, were[changed], are[changed])
        for keys, kinds in ((self.gone, were[changed]), (self.added, are[changed])):
            holds = kinds != Kind.UNDONE
            keys.of_rows(some.filter(pa.array(holds)), kinds[holds], self._limits)

    def _not_repeated(self, rows: pa.Table, candidate: Bools) -> Bools:
        """Say which rows repeat no earlier one; only keys that were contested need a look."""
        good = np.ones(rows.num_rows, bool)
        if self._judged is not None:
            places = zip(rows["block"].to_pylist(), rows["row"].to_pylist(), strict=True)
            good = np.array([place not in self._judged for place in places], bool)
        elif self._contested:
            if self._wanted is None:
                self._wanted = pa.array(self._inserts, pa.string())
            looked = pc.is_in(rows["insert_id"], value_set=self._wanted)
            if self._triples:
                looked = pc.or_(looked, pc.is_valid(rows["event_id"]))
            at = np.flatnonzero(np.asarray(looked) & candidate)
            if len(at):
                self._decide(rows.select(_KEYED).take(pa.array(at)), at, good)
        kinds = rows["kind"].to_numpy()
        # A displaced row with a key has a contested one: whether it is seen is in `_held`.
        self._imports_of(rows, candidate & (kinds != Kind.DISPLACED))
        return good

    def _decide(self, some: pa.Table, places: NDArray[np.int64], good: Bools) -> None:
        window_ms = self._limits.dedupe_window_ms
        packed = packed_of_rows(some, self._limits)
        imports, times = some["import_id"].to_pylist(), some["server_upload_time"].to_pylist()
        for number, (at, name, time) in enumerate(
            zip(places.tolist(), imports, times, strict=True)
        ):
            key = packed[KEY_BYTES * number : KEY_BYTES * (number + 1)]
            if key not in self._contested:
                continue
            held = self._held.get(key)
            own = key + name.encode() if name else b""
            if (held is not None and time - held < window_ms) or (own and own in self._held):
                good[at] = False
                continue
            self._held[key] = time
            if own:
                self._held[own] = time

    def _imports_of(self, rows: pa.Table, seen: Bools) -> None:
        """Remember the keys of imports' rows: what is displaced by them may come later."""
        some = rows.select(_KEYED).filter(pa.array(imported_of(rows) & seen))
        if some.num_rows:
            packed = dedupe.table_of(packed_of_rows(some, self._limits))
            self._imported.add(packed, some["server_upload_time"].to_numpy())


class Refolded:
    """Some rows and what a fold makes of them. own: which are the closure's; kind: what all of them are now.

    The others are group identifies of other people, read for their groups alone.
    """

    def __init__(self, rows: pa.Table, own: Bools, seen: Bools) -> None:
        self._rows = rows
        self._own = own
        self._seen = np.flatnonzero(seen)
        self._decided: Decided | None = None
        self.kind: NDArray[np.uint8] = rows["kind"].to_numpy().copy()

    def decide(self, decided: Decided) -> None:
        """Take what becomes of the rows that are seen."""
        self._decided = decided
        self.kind[self._seen] = decided.kind

    def changed(self) -> pa.Table:
        """Return the closure's rows that are not what they were, as they must be, in any order: the columns ASIDE."""
        differs = self.kind != self._rows["kind"].to_numpy()
        if self._decided is not None:
            differs[self._seen] |= self._decided.differs
        return self._new(differs & self._own, self._rows.select(ASIDE))

    def all(self) -> pa.Table:
        """Return every row as it must be, in any order."""
        others = self._rows.filter(pa.array(~self._own))
        return pa.concat_tables([self._new(self._own, self._rows), others])

    def _new(self, chosen: Bools, olds: pa.Table) -> pa.Table:
        folded = np.zeros(len(chosen), bool)
        folded[self._seen] = True
        parts = []
        for some, decided in ((chosen & ~folded, None), (chosen & folded, self._decided)):
            rows = olds.filter(pa.array(some))
            if decided is not None:
                for name, values in decided.columns(np.flatnonzero(some[self._seen])).items():
                    rows = with_column(rows, name, values)
            parts.append(with_column(rows, "kind", pa.array(self.kind[some], pa.uint8())))
        return pa.concat_tables(parts)


def merge_row(project: int, merge: Merged) -> MergeRow:
    """Return a merge as a row of the lake."""
    places = (0, merge.block, merge.row)
    times = (merge.event_time_ms, merge.server_upload_ms)
    return (project, merge.absorbed, merge.surviving, *places, *times)


def no_places() -> pa.Table:
    """Return (block, row) of no row."""
    return pa.table({"block": pa.array([], pa.int64()), "row": pa.array([], pa.int32())})


class Decided:
    """What the fold decides of rows of the lake. kind: of each; differs: which rows say something else so far."""

    def __init__(self, refold: Refold, rows: pa.Table, foreign: Bools, freed: Freeing) -> None:
        sets, which = sets_of(rows, SHOWN)
        said = [one[_SAID] for one in sets]
        outcome = refold.fold(_rows_of(rows, foreign, _spread(said, which)), freed.among(rows))
        self.kind = np.frombuffer(outcome.kind, np.uint8)
        self._flags = np.frombuffer(outcome.flags, np.uint8)
        self._people = np.array(outcome.amplitude_id, np.int64)
        self._created = np.array(outcome.created_ms, np.int64)
        vocabulary = Vocabulary()
        tables = np.array(vocabulary.places(outcome.tables), np.int32)
        self._tables = tables[np.array(outcome.table, np.int64)]
        self._snapshots = arrow.Snapshots(vocabulary)
        created = pc.fill_null(rows["created_time"], _NEVER).to_numpy()
        self.differs: Bools = (
            (self.kind != rows["kind"].to_numpy())
            | (self._flags != rows["flags"].to_numpy())
            | (self._people != rows["amplitude_id"].to_numpy())
            | (self._created != created)
            | ~same(rows["user_properties"], self._snapshots.user_properties(self._tables))
            | ~_same_sets(sets, which, vocabulary, self._tables)
        )

    def columns(self, at: NDArray[np.int64]) -> dict[str, pa.Array]:
        """Return all that is decided of some of the rows, typed as in the lake."""
        created = np.ma.masked_equal(self._created[at], _NEVER)
        shown = self._snapshots.columns(self._tables[at])
        return {
            "amplitude_id": pa.array(self._people[at], pa.int64()),
            "created_time": pa.array(created, pa.int64()),
            "kind": pa.array(self.kind[at]),
            "flags": pa.array(self._flags[at]),
            **{name: array.cast(SCHEMA.field(name).type) for name, array in shown.items()},
        }


_NEVER = -1
_SAID = slice(SHOWN.index(SAYABLE[0]), SHOWN.index(SAYABLE[0]) + len(SAYABLE))


def same(olds: pa.Array | pa.ChunkedArray, news: pa.Array) -> Bools:
    """Say which values are equal; none is none."""
    missing, lacking = pc.is_null(olds), pc.is_null(news)
    found = pc.if_else(pc.or_(missing, lacking), pc.and_(missing, lacking), pc.equal(olds, news))
    return np.asarray(found.to_numpy(zero_copy_only=False), bool)


def _same_sets(
    sets: list[tuple[str | None, ...]],
    which: NDArray[np.int64],
    vocabulary: Vocabulary,
    tables: NDArray[np.int32],
) -> Bools:
    """Say which rows show the set of SHOWN that they showed. vocabulary, tables: what they show now."""
    news = list(zip(*map(_as_texts, vocabulary.columns().values()), strict=True))
    pairs = which * len(news) + np.array(vocabulary.shown, np.int64)[tables]
    found, of_row = np.unique(pairs, return_inverse=True)
    same = [sets[pair // len(news)] == news[pair % len(news)] for pair in found.tolist()]
    return np.array(same, bool)[of_row]


def _as_texts(values: Sequence[Any]) -> list[str | None]:
    return [
        bytes(one).decode(errors="replace") if isinstance(one, msgspec.Raw) else one
        for one in values
    ]


def rows_of(rows: pa.Table, foreign: Bools) -> Rows:
    """Return rows of the lake as the fold takes them."""
    return _rows_of(rows, foreign, _spread(*sets_of(rows, SAYABLE)))


def _rows_of(rows: pa.Table, foreign: Bools, shown: list[tuple[str | None, ...]]) -> Rows:
    return Rows(
        **{name: _numbers(rows[name]) for name in _NUMBERS},
        **{name: _texts(rows[name]) for name in _TEXTS},
        insert_id=rows["insert_id"].to_pylist(),
        foreign=foreign.tolist(),
        shown=shown,
    )


_NUMBERS = (
    *("block", "row", "amplitude_id", "flags", "event_id", "event_time", "server_upload_time"),
    *("said", "updates_max", "merges_max"),
)
# Each text once, however many rows say it: whoever looks it up finds its hash made.
_TEXTS = ("user_id", "device_id", "event_type", "path", "sent", "sent_groups")
FOLDED = (*_NUMBERS, *_TEXTS, "insert_id", *SAYABLE)


def _numbers(column: pa.ChunkedArray) -> list[Any]:
    if column.null_count:
        return column.to_pylist() if column.null_count < len(column) else [None] * len(column)
    found: list[Any] = column.to_numpy().tolist()
    return found


def _texts(column: pa.ChunkedArray) -> list[Any]:
    if column.null_count == len(column):
        return [None] * len(column)
    words, which = _coded(column)
    return _spread(words.to_pylist(), which)


def _coded(column: pa.ChunkedArray) -> tuple[pa.Array, NDArray[np.int64]]:
    """Return the distinct texts of a column, none among them if a row has none, and which of them each row has."""
    coded = pc.dictionary_encode(column.combine_chunks(), null_encoding="encode")
    return coded.dictionary, coded.indices.to_numpy().astype(np.int64)


def _spread(values: list[Any], which: NDArray[np.int64]) -> list[Any]:
    found: list[Any] = np.fromiter(values, object, len(values))[which].tolist()
    return found


def sets_of(
    rows: pa.Table, names: Sequence[str]
) -> tuple[list[tuple[str | None, ...]], NDArray[np.int64]]:
    """Return the distinct sets of values that rows have in some columns of text, and which of them each row has."""
    which: NDArray[np.int64] = np.zeros(rows.num_rows, np.int64)
    count = 1
    for name in names:
        column = rows[name]
        if column.null_count == len(column):
            continue
        words, places = _coded(column)
        if count * len(words) > _CODES_MAX:
            found, which = np.unique(which, return_inverse=True)
            count = len(found)
        which = which * len(words) + places
        count *= len(words)
    _, firsts, which = np.unique(which, return_index=True, return_inverse=True)
    some = rows.select(list(names)).take(pa.array(firsts))
    return list(zip(*(some[name].to_pylist() for name in names), strict=True)), which


_CODES_MAX = 2**62


def _earned(rows: pa.Table) -> pa.Array:
    """The flags of rows; one that was never folded says by its properties whether it carries revenue."""
    flags = rows["flags"].to_numpy().copy()
    unfolded = np.isin(rows["kind"].to_numpy(), (Kind.DISPLACED, Kind.UNDONE))
    if unfolded.any():
        places = np.flatnonzero(unfolded)
        said = rows["event_properties"].take(pa.array(places))
        for name in ('"$revenue"', '"$price"'):
            carries = pc.match_substring(said, name).to_numpy(zero_copy_only=False)
            flags[places[carries]] |= np.uint8(Flag.REVENUE)
    return pa.array(flags, pa.uint8())


def with_column(rows: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Return rows with another column of a name."""
    return rows.set_column(rows.schema.get_field_index(name), SCHEMA.field(name), values)
