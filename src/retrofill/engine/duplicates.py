"""Which events were stored before: fingerprints in memory in front of key files in front of the lake.

Every event with an `insert_id` has a key of (project, device, insert_id); an import's event has a second one of its
own import, which never expires, so that an import run again a year later changes nothing. A fingerprint found is
confirmed by the whole key before an event is dropped. The keys of blocks that no key file holds yet are kept here;
`sealed` turns them into a file, after the lake has the blocks and before the hot store lets them go. A file that is
missing or damaged is made anew from the lake's rows.

A `$groupidentify` needs no id, so none counts in its key. Source: contract, events 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
from msgspec import Struct
from numpy.typing import NDArray

from retrofill.core import dedupe, identity
from retrofill.core.block import Kind
from retrofill.core.dedupe import NO_KEY, Fingerprints
from retrofill.core.event import Batch, Event
from retrofill.hot.keys import KeyFiles
from retrofill.limits import FINGERPRINTS_IN_MEMORY, Limits

Bools = NDArray[np.bool_]
IMPORT_SOURCE = "retrofill"


class Keyed(Struct, frozen=True):
    """The keys of some events, 16 bytes each in their order. imports: of their import, empty if none is of one."""

    packed: bytes
    imports: bytes = b""


def import_of(event: Event) -> str:
    """Return the import an event belongs to, "" if it is live."""
    said = event.ingestion_metadata
    if said is None or said.source_name != IMPORT_SOURCE:
        return ""
    return said.source_version or ""


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
                dedupe.key(batch.project, device, insert, import_id=name)
                if insert and (name := import_of(event))
                else NO_KEY
                for event, device, insert in zip(events, devices, inserts, strict=True)
            ]
        else:
            imports.append(NO_KEY * len(events))
    return Keyed(b"".join(packed), b"".join(imports) if any_import else b"")


def _or_triple(project: int, events: Sequence[Event], packed: bytes) -> Iterator[bytes]:
    """The key of (device, event_id, time) for an event without insert_id whose sender gave all three."""
    for row, event in enumerate(events):
        key = packed[16 * row : 16 * row + 16]
        if (
            key == NO_KEY
            and event.event_id is not None
            and event.time is not None
            and event.device_id
            and not (event.user_id and event.device_id == identity.derived_device(event.user_id))
        ):
            key = dedupe.triple(project, event.device_id, event.event_id, event.time)
        yield key


class Duplicates:
    """The keys of one data directory. Belongs to the loop, but for `sealed`, whose files are written by a thread."""

    def __init__(self, folder: Path) -> None:
        self._files = KeyFiles(folder)
        self._fingerprints = Fingerprints()
        self._recent: dict[
            int, tuple[bytes, int]
        ] = {}  # block → its keys, how many are an import's

    def open(
        self,
        *,
        sealed: int,
        oldest_block: int,
        rows: Callable[[int, int], Iterator[pa.RecordBatch]],
        limits: Callable[[int], Limits],
    ) -> None:
        """Read the key files of blocks up to `sealed`; what is missing is made from the lake's rows."""
        for first, last in self._files.missing(oldest_block, sealed):
            keys, blocks, forever = _keys_of_rows(rows(first, last), limits)
            self._files.write(first, last, keys, blocks, forever=forever)
        self._load(sealed=sealed, oldest_block=oldest_block)

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
        removed, _, _ = _keys_of_rows(gone, lambda _: limits)
        keys, blocks, forever = _keys_of_rows(added, lambda _: limits)
        self._files.change(
            removed.tobytes(), keys.tobytes(), blocks, forever=forever, oldest_block=oldest_block
        )
        self._fingerprints = Fingerprints()
        self._load(sealed=sealed, oldest_block=oldest_block)

    def _load(self, *, sealed: int, oldest_block: int) -> None:
        memory_from = self._files.memory_from(FINGERPRINTS_IN_MEMORY)
        runs = self._files.runs(max(memory_from, oldest_block))
        if runs:
            self._fingerprints = Fingerprints.bulk(runs, newest=sealed, memory_from=memory_from)
        self._fingerprints.filed = sealed

    def split(self, keyed: Keyed, oldest_block: NDArray[np.int64]) -> bytearray:
        """Return one byte an event: true for a duplicate of what is stored or of an earlier event among these.

        oldest_block: for each event the first block of its window.
        """
        packed = keyed.packed
        if not packed:
            return bytearray()
        dropped = ~dedupe.first_of_each(packed)
        dropped |= self._stored(packed, oldest_block)
        if keyed.imports:
            dropped |= ~dedupe.first_of_each(keyed.imports)
            dropped |= self._stored(keyed.imports, np.ones_like(oldest_block))
        return bytearray(dropped.tobytes())

    def _stored(self, packed: bytes, oldest_block: NDArray[np.int64]) -> Bools:
        found = self._fingerprints.split(packed, oldest_block=oldest_block)
        maybe = found > 0
        if self._fingerprints.memory_from > 1:
            maybe |= (
                oldest_block < self._fingerprints.memory_from
            )  # the files alone know older ones
        stored = np.zeros(len(found), bool)
        rows = np.flatnonzero(maybe)
        if not len(rows):
            return stored
        keys = dedupe.table_of(packed)
        stored[rows] = self._files.find(np.ascontiguousarray(keys[rows])) >= oldest_block[rows]
        for row in rows[~stored[rows] & (found[rows] > 0)].tolist():
            one = packed[16 * row : 16 * row + 16]
            stored[row] = self._is_recent(one, int(found[row])) or any(
                self._is_recent(one, block)
                for block in self._fingerprints.candidates(one, oldest_block=int(oldest_block[row]))
            )
        return stored

    def _is_recent(self, one: bytes, block: int) -> bool:
        keys, _ = self._recent.get(block, (b"", 0))
        at = keys.find(one)
        while at >= 0 and at % dedupe.KEY_BYTES:
            at = keys.find(one, at + 1)
        return at >= 0

    def add(self, keyed: Keyed, kind: bytes, block: int, *, oldest_block: int) -> None:
        """Take the keys of a block that is on disk; a dropped event's key is its first one's already."""
        packed = _kept(keyed.packed, kind)
        imports = _kept(keyed.imports, kind).replace(NO_KEY, b"") if keyed.imports else b""
        add = self._fingerprints.add
        add(packed, block, oldest_block=oldest_block)
        if imports:
            add(imports, block, oldest_block=oldest_block, forever=True)
        self._recent[block] = (packed + imports, len(imports) // dedupe.KEY_BYTES)

    def sealed(self, first: int, last: int, *, oldest_block: int) -> None:
        """Write the key file of blocks that the lake holds now. It is on disk when this returns."""
        held = [(number, *self._recent[number]) for number in range(first, last + 1)]
        counts = [len(packed) // dedupe.KEY_BYTES for _, packed, _ in held]
        blocks = np.repeat(np.arange(first, last + 1, dtype=np.int64), counts)
        forever = np.concatenate(
            [
                np.arange(count) >= count - imports
                for count, (_, _, imports) in zip(counts, held, strict=True)
            ]
        )
        keys = dedupe.table_of(b"".join(packed for _, packed, _ in held))
        self._files.write(first, last, keys, blocks, forever=forever)
        while self._files.merge(oldest_block):
            pass

    def filed(self, first: int, last: int, *, oldest_block: int) -> None:
        """The key file of these blocks is on disk: let go of what it holds, and of files that have expired."""
        for number in range(first, last + 1):
            self._recent.pop(number, None)
        self._fingerprints.filed = last
        self._files.expire(oldest_block)


def _kept(packed: bytes, kind: bytes) -> bytes:
    if Kind.DROPPED not in kind:
        return packed
    stays = np.frombuffer(kind, np.uint8) != Kind.DROPPED
    kept: bytes = dedupe.table_of(packed)[stays].tobytes()
    return kept


def _keys_of_rows(
    batches: Iterable[pa.RecordBatch | pa.Table], limits: Callable[[int], Limits]
) -> tuple[dedupe.Keys, NDArray[np.int64], Bools]:
    """Make the keys of lake rows as `keys_of` made them of events."""
    keys: list[bytes] = []
    blocks: list[int] = []
    forever: list[bool] = []
    rows = chain.from_iterable(batch.to_pylist() for batch in batches)
    for project, theirs in groupby(rows, key=itemgetter("project")):
        rules = limits(project)
        for row in theirs:
            for key, lasts in _keys_of_row(row, rules):
                keys.append(key)
                blocks.append(row["block"])
                forever.append(lasts)
    return dedupe.table_of(b"".join(keys)), np.array(blocks, np.int64), np.array(forever, bool)


def _keys_of_row(row: dict[str, object], rules: Limits) -> Iterator[tuple[bytes, bool]]:
    project, insert = row["project"], row["insert_id"]
    assert isinstance(project, int)
    device = str(row["device_id"] or "")
    if insert:
        whole = rules.dedupe_scope == "project" or row["kind"] == Kind.GROUP_IDENTIFY
        scope = "" if whole else device
        yield dedupe.key(project, scope, str(insert)), False
        if row["import_id"]:
            yield dedupe.key(project, scope, str(insert), import_id=str(row["import_id"])), True
    elif rules.dedupe_triple and row["event_id"] is not None and device:
        user, event_id, time = row["user_id"], row["event_id"], row["client_event_time"]
        assert isinstance(event_id, int)
        assert isinstance(time, int)
        if not (user and device == identity.derived_device(str(user))):
            yield dedupe.triple(project, device, event_id, time), False
