"""Sets on disk: the events of one sender in the order of sending, ready to go.

A set is groups of some thousand rows, each of three parts: what is known of the rows beside (a batch of Arrow), whose they are,
and their texts. Each event stands behind a comma, so that the texts of consecutive rows are, as they lie in the file, a part
of a request's list: sending them copies nothing and joins nothing. Of a group only the parts are read that are asked for.

Groups begin at whole blocks, each with a head that says how long it is, and go past the system's cache (`direct`). So a set that
was begun can be gone on with behind any of them. At the end stand all heads again, and how many. Where room on the disk is
short, parts are packed with LZ4, which costs about half a CPU second for a million events and saves four fifths of the room.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple, Self

import numpy as np
import pyarrow as pa

from retrofill.backfill.direct import BLOCK, File, Room, up
from retrofill.backfill.people import Ints
from retrofill.backfill.places import NAMES, PLACES, SIZES, spelled
from retrofill.backfill.spill import lz4
from retrofill.backfill.texts import less
from retrofill.errors import CorruptError

COMMA: Final = b","
JSON: Final = "json"  # the event alone, made of TEXT when it is asked for
TEXT: Final = "text"

SCHEMA: Final = pa.schema(
    [
        ("person", pa.int64()),
        ("seq", pa.int64()),  # place in the set, from 0; not stored
        ("time_ms", pa.int64()),
        ("device_id", pa.string()),
        ("user_id", pa.string()),
        ("insert_id", pa.string()),
        ("event_type", pa.string()),
        (TEXT, pa.string()),  # a comma and the finished event
        ("bytes", pa.int32()),  # of the event, UTF-8; not stored
        ("file", pa.int32()),
        ("line", pa.int64()),
    ]
)
# Ids and types that stand in the texts are not stored beside (see `places`).
_NARROW: Final = pa.schema(
    [
        *(field for field in SCHEMA if field.name not in {"person", "seq", TEXT, "bytes"}),
        (PLACES, pa.int64()),
        (SIZES, pa.int64()),
    ]
)
_OF_TEXT: Final = frozenset({TEXT, JSON, "bytes", *NAMES})

_PART: Final = 64  # each part begins at a multiple of it, as Arrow wants its memory
_MARK: Final = b"set3"
_END: Final = struct.Struct("<4sIQ")  # the mark, the number of groups and where their heads begin
_HEAD: Final = struct.Struct("<8Q")


class _Head(NamedTuple):
    """One group: where it begins, its rows, the stored size of each part, that of its texts not packed, and whether it is."""

    at: int
    rows: int
    narrow: int
    person: int
    edges: int
    text: int
    text_bytes: int
    packed: int

    @property
    def places(self) -> list[int]:
        """Where each part begins behind `at`, and where the last one ends."""
        found = [_HEAD.size]
        for size in (self.narrow, self.person, self.edges, self.text):
            found.append(found[-1] + -(-size // _PART) * _PART)
        return found

    @property
    def behind(self) -> int:
        """Where the next group begins."""
        return up(self.at + self.places[-1])


class SetWriter:
    """Writes one set, a group after another. packed: with LZ4."""

    def __init__(
        self,
        path: Path,
        *,
        packed: bool,
        room: Room | None = None,
        heads: Sequence[_Head] = (),
    ) -> None:
        """room: memory that is not in use. heads: of the groups that are there already and stay."""
        self._file = File(path, os.O_WRONLY | os.O_CREAT | (0 if heads else os.O_TRUNC))
        self._packed, self._heads = packed, [*heads]
        self._room = room or Room()

    def write(self, group: pa.RecordBatch) -> None:
        """Write rows that are read together: SCHEMA's columns that are stored, and perhaps places of ids in the texts."""
        text = group.column(TEXT)
        _valid, offsets, data = text.buffers()
        edges = np.frombuffer(offsets, np.int32)[text.offset : text.offset + len(text) + 1]
        first, last = int(edges[0]), int(edges[-1])
        none = pa.array(np.zeros(len(text), np.int64))
        narrow = pa.RecordBatch.from_arrays(
            [group.column(name) if name in group.schema.names else none for name in _NARROW.names],
            schema=_NARROW,
        )
        plain = [
            pa.py_buffer(np.ascontiguousarray(group.column("person").to_numpy())),
            pa.py_buffer(edges - edges[0]),
            data.slice(first, last - first) if data is not None else pa.py_buffer(b""),
        ]
        if self._packed:
            parts = [lz4(narrow), *(pa.compress(part, "lz4") for part in plain)]
        else:
            parts = [narrow.serialize(), *plain]
        beside, person, ends, body = (part.size for part in parts)
        whole, packed = last - first, int(self._packed)
        head = _Head(self.end, len(text), beside, person, ends, body, whole, packed)
        self._put(zip([0, *head.places], [_HEAD.pack(*head), *parts], strict=False), head.behind)
        self._heads.append(head)

    def close(self) -> None:
        """Finish the file."""
        heads = b"".join(_HEAD.pack(*head) for head in self._heads)
        behind = up(len(heads) + _END.size)
        end = _END.pack(_MARK, len(self._heads), self.end)
        self._put([(0, heads), (behind - _END.size, end)], self.end + behind)
        self._file.close()

    @property
    def end(self) -> int:
        """How many bytes its groups have."""
        return self._heads[-1].behind if self._heads else 0

    def _put(self, parts: Iterable[tuple[int, pa.Buffer | bytes]], behind: int) -> None:
        """Write parts, each at its place, and nothing between them, up to the next block."""
        size = behind - self.end
        memory = self._room.of(size)
        whole = memoryview(memory.bytes)
        at = 0
        for place, part in parts:
            whole[at:place] = bytes(place - at)
            at = place + len(part)
            whole[place:at] = memoryview(part).cast("B")
        whole[at:size] = bytes(size - at)
        self._file.write(whole[:size], self.end)
        self._room.back(memory)


def gone_on(path: Path, rows: int, *, packed: bool, room: Room) -> SetWriter:
    """Return a writer of a set that has so many rows in whole groups; what is behind these is cut off."""
    heads: list[_Head] = []
    with path.open("r+b") as file:
        left = rows
        while left > 0:
            file.seek(heads[-1].behind if heads else 0)
            heads.append(_Head(*_HEAD.unpack(file.read(_HEAD.size))))
            left -= heads[-1].rows
        assert left == 0, f"{path} has no group that ends at row {rows}"
        file.truncate(heads[-1].behind if heads else 0)
    return SetWriter(path, packed=packed, room=room, heads=heads)


class Set:
    """One set, opened for reading. starts: the first row of each group, and the end."""

    def __init__(self, path: Path, room: Room | None = None) -> None:
        """room: memory that is not in use, of all sets that are read together."""
        self.path = path
        self._room = room or Room()
        self._file = File(path, os.O_RDONLY)
        try:
            self._heads = self._read_heads()
        except CorruptError:
            self._file.close()
            raise
        self.groups = len(self._heads)
        counts = [head.rows for head in self._heads]
        self.starts: Ints = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @property
    def rows(self) -> int:
        """How many rows."""
        return int(self.starts[-1])

    def group_of(self, row: int) -> int:
        """The group that holds a row."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def read(self, group: int, columns: Sequence[str]) -> pa.RecordBatch:
        """Return some columns of a group, in the order in which they are asked for."""
        head, wanted = self._heads[group], {*columns}
        narrow, person, edges, text, end = head.places
        of_text = not wanted.isdisjoint(_OF_TEXT)
        begin = narrow if wanted & {*_NARROW.names} else person if "person" in wanted else edges
        data = self._bytes(head.at + begin, head.at + (end if of_text else edges))

        def part(place: int, size: int, plain: int) -> pa.Buffer:
            found = data.slice(place - begin, size)
            return pa.decompress(found, plain, "lz4") if head.packed else found

        rows = head.rows
        found: dict[str, pa.Array] = {}
        if begin == narrow:
            found |= _batch(data.slice(0, head.narrow))
        if begin <= person:
            buffers = [None, part(person, head.person, 8 * rows)]
            found["person"] = pa.Array.from_buffers(pa.int64(), rows, buffers)
        if of_text:
            ends = part(edges, head.edges, 4 * rows + 4)
            texts = pa.StringArray.from_buffers(rows, ends, part(text, head.text, head.text_bytes))
            found[TEXT] = texts
            for name in wanted.intersection(NAMES):
                where = (found[PLACES].to_numpy(), found[SIZES].to_numpy())
                found[name] = spelled(name, found[name], texts, *where)
            if JSON in wanted:
                found[JSON] = less(texts, front=len(COMMA), back=0)
            if "bytes" in wanted:
                found["bytes"] = pa.array(np.diff(np.frombuffer(ends, np.int32)) - len(COMMA))
        if "seq" in wanted:
            found["seq"] = pa.array(np.arange(self.starts[group], self.starts[group + 1]))
        return pa.RecordBatch.from_arrays([found[name] for name in columns], names=list(columns))

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield some columns of every group."""
        for group in range(self.groups):
            yield self.read(group, columns)

    def column(self, name: str) -> Ints:
        """Return one column of whole numbers."""
        parts = [group.column(0).to_numpy() for group in self.batches([name])]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def within(
        self, first: int, last: int, columns: Sequence[str]
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield rows first..last, a group at a time, each with the number of its first row."""
        for group, (start, stop) in enumerate(pairwise(self.starts.tolist())):
            low, high = max(first, start), min(last, stop)
            if low < high:
                yield low, self.read(group, columns).slice(low - start, high - low)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_heads(self) -> list[_Head]:
        size = self._file.size
        if size % BLOCK or not size:
            raise self._corrupt(f"it has {size:,} bytes, no whole blocks")
        last = bytes(memoryview(self._bytes(size - BLOCK, size)))
        mark, count, at = _END.unpack(last[-_END.size :])
        if mark != _MARK or not 0 <= at < size:
            raise self._corrupt("it has no end")
        heads = memoryview(self._bytes(at, size))[: count * _HEAD.size]
        found = [_Head(*one) for one in _HEAD.iter_unpack(heads[: len(heads) - len(heads) % _PART])]
        if len(found) != count or (found[-1].behind if found else 0) != at:
            raise self._corrupt("its end does not fit")
        return found

    def _corrupt(self, reason: str) -> CorruptError:
        return CorruptError(
            f"A set cannot be read: {reason}",
            where=str(self.path),
            mend="Remove the stage folder; it is made anew from the source",
        )

    def _bytes(self, begin: int, end: int) -> pa.Buffer:
        """Return bytes of the file, in memory that is used again when nobody looks at them any more."""
        low = begin - begin % BLOCK
        size = up(end) - low
        memory = self._room.of(size)
        there = self._file.read(memoryview(memory.bytes)[:size], low)
        if there < end - low:
            raise self._corrupt(f"it ends at byte {low + there:,}")
        return self._room.lent(memory, begin - low, end - begin)


def _batch(data: pa.Buffer) -> dict[str, pa.Array]:
    """Return the columns of a batch of Arrow."""
    for message in pa.ipc.MessageReader.open_stream(pa.BufferReader(data)):
        if message.type == "record batch":  # a packed one begins with its schema
            batch = pa.ipc.read_record_batch(message, _NARROW)
            return dict(zip(batch.schema.names, batch.columns, strict=True))
    raise AssertionError("a group has no batch")
