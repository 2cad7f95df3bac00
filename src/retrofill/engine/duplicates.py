"""Which events were stored before: fingerprints in memory in front of key files in front of the lake.

Every event with an `insert_id` has a key of (project, device, insert_id); an import's event has a second one of its
own import, which never expires, so that an import run again a year later changes nothing. A fingerprint found is
confirmed by the whole key before an event is dropped. An ordinary key says whether the row that holds it is an
import's: what such a row displaces is kept as a hidden row (decision 0011). A displaced event leaves no ordinary key,
since the row that displaced it holds that, but the one of its own import: it was seen there. The keys of blocks that no key file holds yet are kept here;
`sealed` turns them into a file, after the lake has the blocks and before the hot store lets them go. A file that is
missing or damaged is made anew from the lake's rows.

A `$groupidentify` needs no id, so none counts in its key. Source: contract, events 6.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from retrofill.core import dedupe, identity
from retrofill.core.block import Kind
from retrofill.core.dedupe import NO_KEY, Fingerprints, Verdicts
from retrofill.core.event import Batch, Event, import_name
from retrofill.hot.keys import KeyFile, KeyFiles
from retrofill.limits import FINGERPRINTS_IN_MEMORY, Limits

Bools = NDArray[np.bool_]
IMPORT_SOURCE = "retrofill"
_KEY_COLUMNS = [
    *("project", "block", "row", "user_id", "device_id", "event_type", "insert_id", "event_id"),
    *("client_event_time", "import_id"),
]


class Keyed(Struct, frozen=True):
    """The keys of some events, 16 bytes each in their order. imports: of their import, empty if none is of one."""

    packed: bytes
    imports: bytes = b""


def import_of(event: Event) -> str:
    """Return the import an event belongs to, "" if it is live."""
    said = event.ingestion_metadata
    if said is None or said.source_name != IMPORT_SOURCE:
        return ""
    return import_name(said.source_version or "")


def keys_of(batches: Sequence[Batch], limits: Sequence[Limits]) -> Keyed:
    """Return the keys of these events; device_ids are filled in already."""
    packed, imports, any_import = [], [], False
    for batch, rules in zip(batches, limits, strict=True):
        events = batch.events
        whole = rules.dedupe_scope == "project"
        devices = [
            "" if whole or event.event_type == "$groupidentify" else event.device_id or ""
            for event in events
        ]
        inserts = [event.insert_id for event in events]
        ordinary = dedupe.keys(batch.project, devices, inserts)
        if rules.dedupe_triple and not all(inserts):
            ordinary = b"".join(_or_triple(batch.project, events, ordinary))
        packed.append(ordinary)
        if any([event.ingestion_metadata for event in events]):  # noqa: C419 - a list is faster here
            any_import = True
            imports += [
                _own_key(batch.project, event, device, name, rules)
                if (name := import_of(event))
                else NO_KEY
                for event, device in zip(events, devices, strict=True)
            ]
        else:
            imports.append(NO_KEY * len(events))
    return Keyed(b"".join(packed), b"".join(imports) if any_import else b"")


def _or_triple(project: int, events: Sequence[Event], packed: bytes) -> Iterator[bytes]:
    """The key of (device, event_id, time) for an event without insert_id whose sender gave all three."""
    for row, event in enumerate(events):
        key = packed[16 * row : 16 * row + 16]
        yield _triple(project, event) if key == NO_KEY else key


def _triple(project: int, event: Event, import_id: str = "") -> bytes:
    device, user = event.device_id, event.user_id
    if event.event_id is None or event.time is None or not device:
        return NO_KEY
    if user and device == identity.derived_device(user):
        return NO_KEY
    return dedupe.triple(project, device, event.event_id, event.time, import_id=import_id)


def _own_key(project: int, event: Event, device: str, import_id: str, rules: Limits) -> bytes:
    """The key of an event within its import: one wherever it has an ordinary key."""
    if event.insert_id:
        return dedupe.key(project, device, event.insert_id, import_id=import_id)
    return _triple(project, event, import_id) if rules.dedupe_triple else NO_KEY


class _Recent(Struct, frozen=True):
    """The keys of a block that are in no file yet: ordinary ones first, then those within imports.

    imported: one byte a key, true for the ordinary key of an import's row. forever: how many are within imports.
    """

    keys: bytes
    imported: bytes
    forever: int


class Duplicates:
    """The keys of one data directory. Belongs to the loop, but for `sealed`, whose files are written by a thread."""

    def __init__(self, folder: Path, adopted: Collection[str] = ()) -> None:
        self._files = KeyFiles(folder, adopted)
        self._fingerprints = Fingerprints()
        self._recent: dict[int, _Recent] = {}

    def open(
        self,
        *,
        sealed: int,
        oldest_block: int,
        held: int,
        rows: Callable[[int, int], Iterator[pa.RecordBatch]],
        limits: Callable[[int], Limits],
    ) -> int:
        """Read the key files of blocks up to `sealed`; what is missing is made from the lake's rows.

        held: the first block that the hot store still has. Where the last file was about to be written from its blocks,
        that is left to the caller, who adds their keys sooner than rows are read. Returns the last block whose keys are known.
        """
        filed = sealed
        for first, last in self._files.missing(oldest_block, sealed):
            # A damaged file's rows may have been undone since, and their keys with them: the lake alone knows.
            if last == sealed and first >= held and not self._files.damaged:
                filed = first - 1
                break
            keys, blocks, forever, imported = _keys_of_rows(rows(first, last), limits)
            self._files.write(first, last, keys, blocks, forever=forever, imported=imported)
        self._load(sealed=filed, oldest_block=oldest_block)
        return filed

    @property
    def folder(self) -> Path:
        """The folder of key files."""
        return self._files.folder

    def files(self) -> list[Path]:
        """Return the key files, which hold the keys of blocks that the lake has."""
        return [file.path for file in self._files.files]

    def adopt(self, written: Sequence[Path]) -> None:
        """Use key files written anew in place of the old ones.

        Fingerprints of keys that are gone stay: a hit is looked up in the files, and not found there.
        """
        self._files.adopt(written)

    def expect(self, packed: bytes | dedupe.Keys, block: int, *, forever: Bools | bool) -> None:
        """Have the fingerprints of keys that key files will hold again; before they do, it only costs a look."""
        self._fingerprints.add(packed, block, forever=forever)

    def mend(
        self, gone: Iterable[tuple[int, bytes]], added: Iterable[tuple[int, bytes, bytes]]
    ) -> None:
        """Take keys out of blocks that are in no key file yet, and put others in. added: with marks, as in a key file.

        marks: 1 for the ordinary key of an import's row, 2 for one that never expires.
        """
        lost: dict[int, set[bytes]] = {}
        won: dict[int, list[tuple[bytes, int]]] = {}
        for block, key in gone:
            lost.setdefault(block, set()).add(key)
        for block, key, mark in added:
            won.setdefault(block, []).append((key, mark[0]))
        for block in lost.keys() | won.keys():
            recent = self._recent[block]
            last = len(recent.imported) - recent.forever
            ordinary: list[tuple[bytes, bool]] = []
            own: list[bytes] = []
            for at, imported in enumerate(recent.imported):
                key = recent.keys[dedupe.KEY_BYTES * at : dedupe.KEY_BYTES * (at + 1)]
                if key in lost.get(block, ()):
                    continue
                if at < last:
                    ordinary.append((key, bool(imported)))
                else:
                    own.append(key)
            for key, marks in won.get(block, ()):
                if marks & 2:
                    own.append(key)
                else:
                    ordinary.append((key, bool(marks & 1)))
                self.expect(key, block, forever=bool(marks & 2))
            self._recent[block] = _Recent(
                b"".join([key for key, _ in ordinary] + own),
                bytes([marked for _, marked in ordinary]) + bytes(len(own)),
                len(own),
            )

    def change(
        self,
        gone: Iterable[pa.Table],
        added: Iterable[pa.Table],
        limits: Limits,
        *,
        sealed: int,
        oldest_block: int,
    ) -> None:
        """Rows of the lake are no longer stored, and others are: know it. Every block must be in the lake."""
        removed, *_ = _keys_of_rows(gone, lambda _: limits)
        keys, blocks, forever, imported = _keys_of_rows(added, lambda _: limits)
        self._files.change(
            removed.tobytes() + keys.tobytes(),
            keys.tobytes(),
            blocks,
            forever=forever,
            imported=imported,
            oldest_block=oldest_block,
        )
        self._fingerprints = Fingerprints()
        self._load(sealed=sealed, oldest_block=oldest_block)

    def unheld(self, rows: pa.Table, limits: Limits, *, oldest_block: int) -> list[tuple[int, int]]:
        """Return the (block, row) of rows of one project that have a key which no key file holds.

        rows: visible ones, in the lake. Keys of an import count for ever, others from `oldest_block` on. A row that was
        stored while the limits named the other scope is held by the key of that scope.
        """
        both: tuple[Literal["project+device", "project"], ...] = ("project+device", "project")
        waiting = rows.select(_KEY_COLUMNS)
        for scope in sorted(both, key=lambda one: one != limits.dedupe_scope):
            rules = replace(limits, dedupe_scope=scope)
            lost: Bools = np.zeros(waiting.num_rows, bool)
            for own in (False, True):
                some = np.flatnonzero(imported_of(waiting)) if own else np.arange(len(lost))
                theirs = waiting.take(pa.array(some))
                keys = dedupe.table_of(packed_of_rows(theirs, rules, own=own))
                blocks = theirs["block"].to_numpy()
                counts = keys.any(axis=1) & (own | (blocks >= oldest_block))
                lost[some] |= counts & (self._files.find(keys) < blocks)
            waiting = waiting.filter(pa.array(lost))
        return list(zip(waiting["block"].to_pylist(), waiting["row"].to_pylist(), strict=True))

    def unowned(
        self,
        rows: Callable[[int, int], Iterator[pa.RecordBatch]],
        limits: Callable[[int], Limits],
    ) -> Iterator[tuple[KeyFile, NDArray[np.int64]]]:
        """Yield key files with the places of keys that no row of their blocks holds. Every block must be in the lake.

        rows: of some blocks, as for `open`. A row that was stored while the limits named the other scope, or counted
        events without `insert_id` otherwise, holds the key that it had then.
        """
        for file in self._files.files:
            owned = np.zeros(file.count, bool)
            for other in (False, True):  # nearly always the first finds all
                if owned.all():
                    break
                for batch in rows(file.first, file.last):
                    for packed, blocks in _held_by(
                        pa.Table.from_batches([batch]), limits, other=other
                    ):
                        owned[file.places(dedupe.table_of(packed), blocks)] = True
            if not owned.all():
                yield file, np.flatnonzero(~owned)

    def drop(self, file: KeyFile, places: NDArray[np.int64]) -> None:
        """Let go of the keys at these places of a key file."""
        self._files.drop(file, places)

    def holders(self, packed: bytes) -> list[int]:
        """Return for each key the last block in the key files that holds it, 0 if none does. Any thread."""
        blocks: list[int] = self._files.holders(packed)[0].tolist()
        return blocks

    def _load(self, *, sealed: int, oldest_block: int) -> None:
        memory_from = self._files.memory_from(FINGERPRINTS_IN_MEMORY)
        runs = self._files.runs(max(memory_from, oldest_block))
        if runs:
            self._fingerprints = Fingerprints.bulk(runs, newest=sealed, memory_from=memory_from)
            self._files.rest()
        self._fingerprints.filed = sealed

    def split(self, keyed: Keyed, oldest_block: NDArray[np.int64]) -> bytearray:
        """Return one byte an event: 0, or Kind.DROPPED or Kind.DISPLACED for a duplicate, as `dedupe.decide` says.

        oldest_block: for each event the first block of its window.
        """
        packed = keyed.packed
        if not packed:
            return bytearray()
        held, own_held = self._held(packed, oldest_block), None
        if keyed.imports:
            own_held = self._held(keyed.imports, np.ones_like(oldest_block)) != 0
        return dedupe.decide(packed, keyed.imports, held, own_held)

    def _held(self, packed: bytes, oldest_block: NDArray[np.int64]) -> Verdicts:
        """Return what stored rows make of events with these keys: 0, Kind.DROPPED or Kind.DISPLACED."""
        found = self._fingerprints.split(packed, oldest_block=oldest_block)
        maybe = found > 0
        if self._fingerprints.memory_from > 1:
            maybe |= (
                oldest_block < self._fingerprints.memory_from
            )  # the files alone know older ones
        held = np.zeros(len(found), np.uint8)
        rows = np.flatnonzero(maybe)
        if not len(rows):
            return held
        keys = dedupe.table_of(packed)
        blocks, imported = self._files.holders(np.ascontiguousarray(keys[rows]))
        filed = blocks >= oldest_block[rows]
        held[rows[filed]] = np.where(imported[filed], Kind.DISPLACED, Kind.DROPPED)
        for row in rows[~filed & (found[rows] > 0)].tolist():
            one = packed[16 * row : 16 * row + 16]
            held[row] = self._recently(one, int(found[row])) or self._elsewhere(
                one, int(oldest_block[row])
            )
        return held

    def _elsewhere(self, one: bytes, oldest_block: int) -> int:
        blocks = self._fingerprints.candidates(one, oldest_block=oldest_block)
        return next(filter(None, (self._recently(one, block) for block in blocks)), 0)

    def _recently(self, one: bytes, block: int) -> int:
        """Return what a key makes of events like it if this block, in no file yet, has it; 0 if not."""
        recent = self._recent.get(block)
        if recent is None:
            return 0
        at = recent.keys.find(one)
        while at >= 0 and at % dedupe.KEY_BYTES:
            at = recent.keys.find(one, at + 1)
        if at < 0:
            return 0
        return Kind.DISPLACED if recent.imported[at // dedupe.KEY_BYTES] else Kind.DROPPED

    def add(self, keyed: Keyed, kind: bytes, block: int, *, oldest_block: int) -> None:
        """Take the keys of a block that is on disk; a dropped event's key is its first one's already."""
        kinds = np.frombuffer(kind, np.uint8)
        packed, own, imported = keyed.packed, b"", bytes(len(kind))
        if keyed.imports:
            of_imports = dedupe.table_of(keyed.imports)
            some = of_imports.any(axis=1)
            own = of_imports[some & (kinds != Kind.DROPPED)].tobytes()
            imported = some.tobytes()
        if Kind.DROPPED in kind or Kind.DISPLACED in kind:
            stays = (kinds != Kind.DROPPED) & (kinds != Kind.DISPLACED)
            packed = dedupe.table_of(packed)[stays].tobytes()
            imported = np.frombuffer(imported, bool)[stays].tobytes()
        self._fingerprints.add(packed, block, oldest_block=oldest_block)
        if own:
            self._fingerprints.add(own, block, oldest_block=oldest_block, forever=True)
        forever = len(own) // dedupe.KEY_BYTES
        self._recent[block] = _Recent(packed + own, imported + bytes(forever), forever)

    def sealed(self, first: int, last: int, *, oldest_block: int) -> None:
        """Write the key file of blocks that the lake holds now. It is on disk when this returns."""
        held = [self._recent[number] for number in range(first, last + 1)]
        counts = [len(one.imported) for one in held]
        blocks = np.repeat(np.arange(first, last + 1, dtype=np.int64), counts)
        forever = np.concatenate(
            [
                np.arange(count) >= count - one.forever
                for count, one in zip(counts, held, strict=True)
            ]
        )
        imported = np.frombuffer(b"".join(one.imported for one in held), bool)
        keys = dedupe.table_of(b"".join(one.keys for one in held))
        self._files.write(first, last, keys, blocks, forever=forever, imported=imported)
        while self._files.merge(oldest_block):
            pass

    def filed(self, first: int, last: int, *, oldest_block: int) -> None:
        """The key file of these blocks is on disk: let go of what it holds, and of files that have expired."""
        for number in range(first, last + 1):
            self._recent.pop(number, None)
        self._fingerprints.filed = last
        self._files.expire(oldest_block)


def file_keys(
    folder: Path,
    last: int,
    rows: Iterable[pa.Table],
    limits: Limits,
    *,
    more: Sequence[tuple[bytes, int]],
) -> None:
    """Write the one key file of blocks 1 … last, for lake rows. more: ordinary keys beside theirs, with their blocks."""
    keys, blocks, forever, imported = _keys_of_rows(rows, lambda _: limits)
    packed = keys.tobytes() + b"".join(key for key, _ in more)
    beside = [block for _, block in more]
    unmarked = np.zeros(len(more), bool)
    KeyFiles(folder).write(
        1,
        last,
        packed,
        np.concatenate([blocks, np.array(beside, np.int64)]),
        forever=np.concatenate([forever, unmarked]),
        imported=np.concatenate([imported, unmarked]),
    )


def _keys_of_rows(
    batches: Iterable[pa.RecordBatch | pa.Table], limits: Callable[[int], Limits]
) -> tuple[dedupe.Keys, NDArray[np.int64], Bools, Bools]:
    """Make the keys of lake rows as `keys_of` and `add` made them of events: with the block of each, and its marks."""
    keys: list[bytes] = []
    blocks: list[int] = []
    forever: list[bool] = []
    imported: list[bool] = []
    rows = chain.from_iterable(batch.to_pylist() for batch in batches)
    for project, theirs in groupby(rows, key=itemgetter("project")):
        rules = limits(project)
        for row in theirs:
            import_id = str(row["import_id"] or "")
            if row["kind"] != Kind.DISPLACED:
                keys.append(_key_of_row(row, rules))
                forever.append(False)
                imported.append(bool(import_id))
                blocks.append(row["block"])
            if import_id:
                keys.append(_key_of_row(row, rules, import_id))
                forever.append(True)
                imported.append(False)
                blocks.append(row["block"])
    return (
        dedupe.table_of(b"".join(keys)),
        np.array(blocks, np.int64),
        np.array(forever, bool),
        np.array(imported, bool),
    )


def _held_by(
    rows: pa.Table, limits: Callable[[int], Limits], *, other: bool
) -> Iterator[tuple[bytes, NDArray[np.int64]]]:
    """Yield keys of lake rows, NO_KEY where one has none, with their blocks. other: by the scope that does not hold now."""
    for project in pc.unique(rows["project"]).to_pylist():
        theirs = rows.filter(pc.equal(rows["project"], project))
        rules = replace(limits(project), dedupe_triple=True)
        if other:
            wide = rules.dedupe_scope == "project"
            rules = replace(rules, dedupe_scope="project+device" if wide else "project")
        seen = theirs.filter(pc.not_equal(theirs["kind"], int(Kind.DISPLACED)))
        imported = theirs.filter(pa.array(imported_of(theirs)))
        for some, own in ((seen, False), (imported, True)):
            yield packed_of_rows(some, rules, own=own), some["block"].to_numpy()


def imported_of(rows: pa.Table) -> Bools:
    """Say which lake rows are of an import."""
    said = pc.fill_null(pc.not_equal(rows["import_id"], ""), fill_value=False)
    return np.asarray(said.to_numpy(zero_copy_only=False), bool)


def packed_of_rows(rows: pa.Table, limits: Limits, *, own: bool = False) -> bytes:
    """Return the key of each lake row of one project, NO_KEY where it has none. own: those within their imports."""
    if not rows.num_rows:
        return b""
    project = rows["project"][0].as_py()
    whole = limits.dedupe_scope == "project"
    devices = [
        "" if whole or event_type == "$groupidentify" else device or ""
        for device, event_type in zip(
            rows["device_id"].to_pylist(), rows["event_type"].to_pylist(), strict=True
        )
    ]
    inserts = rows["insert_id"].to_pylist()
    names = set(rows["import_id"].to_pylist()) if own else {""}
    if len(names) == 1:
        packed = dedupe.keys(project, devices, inserts, import_id=names.pop() or "")
    else:
        sides = zip(devices, inserts, rows["import_id"].to_pylist(), strict=True)
        packed = b"".join(
            dedupe.key(project, device, insert, import_id=name) if insert else NO_KEY
            for device, insert, name in sides
        )
    if all(inserts) or not limits.dedupe_triple:
        return packed
    numbers = rows["event_id"].to_pylist()
    without = [at for at, insert in enumerate(inserts) if not insert and numbers[at] is not None]
    if not without:
        return packed
    keys = dedupe.table_of(packed).copy()
    for at, row in zip(without, rows.take(pa.array(without)).to_pylist(), strict=True):
        name = str(row["import_id"] or "") if own else ""
        keys[at] = dedupe.table_of(_key_of_row(row, limits, name))[0]
    return keys.tobytes()


def _key_of_row(row: dict[str, object], rules: Limits, import_id: str = "") -> bytes:
    project, insert = row["project"], row["insert_id"]
    assert isinstance(project, int)
    device = str(row["device_id"] or "")
    if insert:
        whole = rules.dedupe_scope == "project" or row["event_type"] == "$groupidentify"
        scope = "" if whole else device
        return dedupe.key(project, scope, str(insert), import_id=import_id)
    user, event_id, time = row["user_id"], row["event_id"], row["client_event_time"]
    if not rules.dedupe_triple or event_id is None or not device:
        return NO_KEY
    assert isinstance(event_id, int)
    assert isinstance(time, int)
    if user and device == identity.derived_device(str(user)):
        return NO_KEY
    return dedupe.triple(project, device, event_id, time, import_id=import_id)
