"""Folding a closure of the lake again: what becomes of its rows, keys and people under another rule than on arrival.

The closure's rows are folded again in order of position under a rule, and written as new lake files. Hidden rows stay
in the lake as Kind.UNDONE, so showing them again needs nothing else. A row left out because an import's row had come
before (Kind.DISPLACED) comes back when nothing that is seen now holds its key. Nothing here knows who the closure is:
rows come in from `engine.refolder`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
from retrofill.engine.duplicates import packed_of_rows
from retrofill.lake import Lake, arrow, parquet
from retrofill.lake.arrow import FILE, SCHEMA, MergeRow
from retrofill.lake.files import Files
from retrofill.limits import MS_PER_HOUR, REFOLD_FILE_ROWS, Limits

Bools = NDArray[np.bool_]
# What decides whether an event is a duplicate, with its place.
KEY_COLUMNS = (
    *("project", "block", "row", "kind", "user_id", "device_id", "event_type", "insert_id"),
    *("event_id", "client_event_time", "import_id"),
)
_BLOCK_MAX = 2**62
_NEVER_MS = 2**62
_SEEN = (int(Kind.EVENT), int(Kind.IDENTIFY), int(Kind.GROUP_IDENTIFY))


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
        imported = _is_imported(rows)
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


class Folding:
    """The rows of some people on their way through the fold. folder: where lake files are written.

    people: who they are, by amplitude_id, in rising order; whoever joins later is added. written, places: the files
    that hold the rows given to `keep`, and where these stood. gone, added: keys that rows held before, and hold now.
    stored: what differs for the daily quota.
    """

    def __init__(
        self,
        folder: Path,
        rule: Rule,
        refold: Refold,
        limits: Limits,
        *,
        quota_after_ms: int = _NEVER_MS,
    ) -> None:
        self._folder = folder
        self.stored = Stored(quota_after_ms if limits.daily_quota else _NEVER_MS)
        self._rule = rule
        self._limits = limits
        self.refold = refold
        self.people: NDArray[np.int64] = np.zeros(0, np.int64)
        self._contested: set[bytes] = set()
        self._inserts: set[str] = set()  # insert_ids of contested keys
        self._any_triple = False
        self._held: dict[bytes, int] = {}  # contested key → server time of the row that holds it
        self._judged: set[tuple[int, int]] | None = None  # (block, row) of repeats
        self._imported: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = []  # keys, times
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self.places: list[pa.Table] = []
        self.written: list[Path] = []
        self.gone, self.added = Keys([], [], [], []), Keys([], [], [], [])
        self.rows = 0

    def contest(self, displaced: pa.Table) -> None:
        """Hear of rows that were left out because an import's row had come before: their keys may be free now."""
        packed = packed_of_rows(displaced, self._limits)
        new = {packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES)}
        new -= self._contested | {NO_KEY}
        self._inserts.update(filter(None, displaced["insert_id"].to_pylist()))
        self._any_triple |= displaced["insert_id"].null_count > 0
        self._contested |= new
        # Rows folded before may hold them. Only an import's row can: a repeat of a live one is not kept.
        if new and self._imported:
            firsts = dedupe.table_of(b"".join(new))[:, 0]
            for keys, times in self._imported:
                for at in np.flatnonzero(np.isin(keys[:, 0], firsts)).tolist():
                    one = keys[at].tobytes()
                    if one in new:
                        self._held[one] = max(self._held.get(one, 0), int(times[at]))

    def know(self, rows: pa.Table) -> None:
        """Fold rows that stay as they are, for what they make of people; groups were changed by them already."""
        self._imports_of(rows, np.ones(rows.num_rows, bool))
        groups = pc.equal(rows["event_type"], "$groupidentify")
        for name in ("sent", "sent_groups"):
            kept = pc.if_else(groups, pa.scalar(None, pa.string()), rows[name])
            rows = with_column(rows, name, kept)
        decided(self.refold, rows, np.zeros(rows.num_rows, bool))

    @property
    def contested(self) -> list[str]:
        """The insert_ids of rows that were left out because an import's row had come before."""
        return sorted(self._inserts)

    def judge(self, rows: pa.Table) -> None:
        """Decide which of these, in order of position, repeat an earlier one: that goes by arrival in any fold."""
        good = self._not_repeated(rows, self._mine(rows)[1])
        repeated = rows.filter(pa.array(~good))
        places = zip(repeated["block"].to_pylist(), repeated["row"].to_pylist(), strict=True)
        self._judged = set(places)

    def _mine(self, rows: pa.Table) -> tuple[Bools, Bools]:
        """Say which rows are the change's own, and which may be seen after it."""
        block = rows["block"].to_numpy()
        name, after, until = self._rule.bounds
        own = pc.fill_null(pc.equal(rows["import_id"], name), fill_value=False)
        mine = own.to_numpy(zero_copy_only=False) & (block > after) & (block <= until)
        return mine, ~mine if self._rule.hide else np.ones(len(mine), bool)

    def fold(self, rows: pa.Table) -> tuple[pa.Table, Bools]:
        """Fold the next rows, blocks whole unless in event time; return them as they must be, and which of them are the closure's own.

        The others are group identifies of other people, read for their groups alone.
        """
        kinds = rows["kind"].to_numpy()
        mine, candidate = self._mine(rows)
        seen = candidate & self._not_repeated(rows, candidate)
        people = rows["amplitude_id"].to_numpy()
        group = (kinds == Kind.GROUP_IDENTIFY) | (
            mine & np.asarray(pc.equal(rows["event_type"], "$groupidentify"))
        )
        foreign = group & ~np.isin(people, self.people)
        new = rows
        if seen.any():
            new = self._folded(rows, seen, foreign)
        kind = new["kind"].to_numpy().copy()
        kind[~seen & ~mine] = Kind.DISPLACED
        if self._rule.hide:
            kind[mine] = Kind.UNDONE
        else:
            kind[mine & ~seen] = Kind.DISPLACED
        new = with_column(new, "kind", pa.array(kind, pa.uint8()))
        self._key_changes(rows, kinds, kind)
        # Somebody else's group identify is read for its group and stays where it is.
        return new, ~(foreign & (people != 0)) | mine

    def _key_changes(self, rows: pa.Table, were: NDArray[np.uint8], are: NDArray[np.uint8]) -> None:
        changed = np.flatnonzero(were != are)
        if not len(changed):
            return
        some = rows.take(pa.array(changed))
        self.stored.change(some, were[changed], are[changed])
        for keys, kinds in ((self.gone, were[changed]), (self.added, are[changed])):
            holds = kinds != Kind.UNDONE
            keys.of_rows(some.filter(pa.array(holds)), kinds[holds], self._limits)

    def _not_repeated(self, rows: pa.Table, candidate: Bools) -> Bools:
        """Say which rows repeat no earlier one; only keys that were contested need a look."""
        good = np.ones(rows.num_rows, bool)
        if self._judged is not None:
            places = zip(rows["block"].to_pylist(), rows["row"].to_pylist(), strict=True)
            return np.array([place not in self._judged for place in places], bool)
        if self._contested:
            looked = pc.is_in(rows["insert_id"], value_set=pa.array(self._inserts, pa.string()))
            if self._any_triple:
                looked = pc.or_(looked, pc.is_valid(rows["event_id"]))
            at = np.flatnonzero(np.asarray(looked) & candidate)
            if len(at):
                self._decide(rows.take(pa.array(at)), at, good)
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
        some = rows.filter(pa.array(_is_imported(rows) & seen))
        if some.num_rows:
            packed = dedupe.table_of(packed_of_rows(some, self._limits))
            self._imported.append((packed, some["server_upload_time"].to_numpy()))

    def _folded(self, rows: pa.Table, seen: Bools, foreign: Bools) -> pa.Table:
        some = rows if seen.all() else rows.filter(pa.array(seen))
        some = with_column(some, "flags", _earned(some))
        fresh = decided(self.refold, some, foreign[seen])
        places = np.flatnonzero(seen)
        if len(places) == rows.num_rows:
            for name, values in fresh.items():
                rows = with_column(rows, name, values)
            return rows
        # Each row not folded keeps what it has.
        take = np.arange(rows.num_rows)
        take[places] = rows.num_rows + np.arange(len(places))
        for name, values in fresh.items():
            both = pa.chunked_array([*rows[name].chunks, values], SCHEMA.field(name).type)
            rows = with_column(rows, name, both.take(pa.array(take)))
        return rows

    def keep(self, rows: pa.Table) -> None:
        """Take rows for the lake files, and their places."""
        if not rows.num_rows:
            return
        self._waiting.append(rows)
        self.places.append(rows.select(["block", "row"]))
        self._waiting_rows += rows.num_rows
        self.rows += rows.num_rows
        if self._waiting_rows >= REFOLD_FILE_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one file."""
        if self._waiting:
            rows = pa.concat_tables(self._waiting)
            self._waiting, self._waiting_rows = [], 0
            self.written.append(write(self._folder, rows))


def write(folder: Path, rows: pa.Table) -> Path:
    """Write rows as one lake file, in the order of lake files; it is on disk when this returns."""
    block = rows["block"].to_numpy()
    order = np.lexsort([rows["row"].to_numpy(), block, rows["amplitude_id"].to_numpy()])
    file = folder / parquet.file_name(int(block.min()), int(block.max()))
    parquet.write(file, _as_file(rows.take(pa.array(order))), Files())
    return file


def write_file(lake: Lake, rows: pa.Table) -> Path:
    """Write rows as one file that the lake does not name yet, in the order of lake files."""
    return write(lake.events, rows)


def merge_row(project: int, merge: Merged) -> MergeRow:
    """Return a merge as a row of the lake."""
    places = (0, merge.block, merge.row)
    times = (merge.event_time_ms, merge.server_upload_ms)
    return (project, merge.absorbed, merge.surviving, *places, *times)


def no_places() -> pa.Table:
    """Return (block, row) of no row."""
    return pa.table({"block": pa.array([], pa.int64()), "row": pa.array([], pa.int32())})


def _is_imported(rows: pa.Table) -> Bools:
    said = pc.fill_null(pc.not_equal(rows["import_id"], ""), fill_value=False)
    return np.asarray(said.to_numpy(zero_copy_only=False), bool)


def decided(refold: Refold, rows: pa.Table, foreign: np.ndarray[Any, Any]) -> dict[str, pa.Array]:
    """Fold rows of the lake, of all its columns, and return those that the fold decides, typed as in the lake."""
    outcome = refold.fold(rows_of(rows, foreign))
    created = np.array(outcome.created_ms, np.int64)
    return {
        "amplitude_id": pa.array(outcome.amplitude_id, pa.int64()),
        "created_time": pa.array(np.ma.masked_equal(created, -1), pa.int64()),
        "kind": pa.array(np.frombuffer(outcome.kind, np.uint8)),
        "flags": pa.array(np.frombuffer(outcome.flags, np.uint8)),
        **arrow.shown_again(outcome.tables, np.array(outcome.table, np.int64)),
    }


def rows_of(rows: pa.Table, foreign: np.ndarray[Any, Any]) -> Rows:
    """Return rows of the lake as the fold takes them."""
    return Rows(
        **{name: rows[name].to_pylist() for name in _FOLDED},
        foreign=foreign.tolist(),
        said_columns=[rows[name].to_pylist() for name in SAYABLE],
    )


_FOLDED = (
    *("block", "row", "amplitude_id", "flags", "user_id", "device_id", "event_type"),
    *("insert_id", "event_id", "event_time", "server_upload_time", "path"),
    *("sent", "sent_groups", "said", "updates_max", "merges_max"),
)


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


def _as_file(rows: pa.Table) -> Iterable[pa.Table]:
    columns = [
        rows[field.name].dictionary_encode()
        if pa.types.is_dictionary(field.type)
        else rows[field.name]
        for field in FILE
    ]
    yield pa.Table.from_arrays(columns, schema=FILE)
