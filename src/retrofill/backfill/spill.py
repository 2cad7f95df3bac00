"""Rows on their way between two steps: in memory while they are few, in a file when they are many."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from msgspec import Struct
from numpy.typing import NDArray

from retrofill.backfill.texts import flat

MEMORY_BYTES = 64 * 1024 * 1024  # of rows held; fresh memory costs more than a file does
# Written as it is. Packing takes about 1 CPU s for a million events each time; beyond this the room on disk is dearer.
PLAIN_BYTES = 1024 * 1024 * 1024
_PAGE = 4096
_TEXT_BYTES_MAX = 2**31 - 1  # of a column of texts, by its offsets
# ours: of the file read as one. Sorting deals them out to hundreds of buckets: of 4 MB each got some fifty rows at a time,
# and packing so few took longer than anything else.
TOGETHER_BYTES = 24 * 1024 * 1024  # less than malloc keeps in one piece: see `memory`


class Whole(Struct, frozen=True):
    """All rows of a spill. texts: of the large column, a gap behind each, and last what stands before every one of them."""

    rows: pa.RecordBatch
    name: str
    texts: pa.LargeStringArray

    def take(self, rows: NDArray[np.int64]) -> pa.RecordBatch:
        """Return some rows, in this order, the large column last and with the beginning that was asked for.

        One gathering puts beginnings and texts side by side, hence makes the joined texts at no further cost. One column
        is gathered after the other: all at once took Arrow almost twice as long.
        """
        both = np.full(2 * len(rows), len(self.texts) - 1, np.int64)
        both[1::2] = 2 * rows
        pieces = self.texts.take(pa.array(both))
        _valid, offsets, data = pieces.buffers()
        ends = np.frombuffer(offsets, np.int64)[: len(both) + 1 : 2]
        assert ends[-1] <= _TEXT_BYTES_MAX, f"{len(rows)} rows have {ends[-1]:,} bytes"
        joined = pa.StringArray.from_buffers(len(rows), pa.py_buffer(ends.astype(np.int32)), data)
        made = [_gathered(column, rows) for column in self.rows.columns]
        names = [*self.rows.schema.names, self.name]
        return pa.RecordBatch.from_arrays([*made, joined], names=names)


class Spill:
    """A list of batches with a bound. First all `add`s, then one reading.

    large: the column with most of the bytes, texts in braces with an end of line, which stays in the file where it can.
    memory_bytes: held in memory at most. plain_bytes: of a file before the rest is packed.
    """

    def __init__(
        self,
        path: Path,
        schema: pa.Schema,
        *,
        large: str,
        memory_bytes: int = MEMORY_BYTES,
        plain_bytes: int = PLAIN_BYTES,
    ) -> None:
        self.path, self.schema = path, schema
        self._large = large
        self.bytes = 0
        self._memory_bytes, self._plain_bytes = memory_bytes, plain_bytes
        self._held: list[pa.RecordBatch] = []
        self._files: list[Path] = []
        self._packed = False  # the file being written is
        self._writer: pa.ipc.RecordBatchFileWriter | None = None

    @property
    def in_memory(self) -> bool:
        """Whether no file was needed."""
        return not self._files

    @property
    def plain(self) -> bool:
        """Whether all rows can be taken from where they are, in any order."""
        return self.in_memory or not self._packed

    def add(self, batch: pa.RecordBatch) -> None:
        """Take rows. The batch is not to be changed any more."""
        self.bytes += batch.nbytes
        if self.in_memory:
            self._held.append(batch)
            if self.bytes > self._memory_bytes:
                self._open()
                for one in self._taken_held():
                    self._write(one)
            return
        if not self._packed and self.bytes > self._plain_bytes:
            self._open()
        self._write(batch)

    def whole(self, before: bytes) -> Whole:
        """Return all rows, and forget them. before: put before each text of the large column, in place of its brace."""
        if self._files and self.plain:
            return self._mapped(before)
        batches = self._taken()
        parts, edges, size = [], [], 0
        for batch in batches:
            text, ends = flat(batch.column(self._large))
            parts.append(text)
            edges.append(_edges(ends, size))
            size += len(text)
        edges.append(np.array([size, size + len(before)]))
        return self._whole(batches, np.concatenate(edges), pa.py_buffer(b"".join((*parts, before))))

    def _mapped(self, before: bytes) -> Whole:
        """Return the rows with the large column left in its file, mapped into memory."""
        assert self._writer is not None
        self._writer.close()
        (path,) = self._files
        size = path.stat().st_size
        with path.open("ab") as file:
            file.write(before)
        with pa.memory_map(str(path)) as mapped:
            data = mapped.read_buffer(mapped.size())
        path.unlink()
        # Mapped in order: a third of what it costs by and by.
        np.frombuffer(data, np.uint8)[::_PAGE].max()
        reader = pa.ipc.open_file(pa.BufferReader(data.slice(0, size)))
        batches = [reader.get_batch(at) for at in range(reader.num_record_batches)]
        edges = []
        for batch in batches:
            texts = batch.column(self._large)
            _valid, offsets, own = texts.buffers()
            ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
            edges.append(_edges(ends[1:].astype(np.int64), own.address - data.address))
        edges.append(np.array([size, size + len(before)]))
        return self._whole(batches, np.concatenate(edges), data)

    def _whole(
        self, batches: list[pa.RecordBatch], edges: NDArray[np.int64], data: pa.Buffer
    ) -> Whole:
        texts = pa.LargeStringArray.from_buffers(len(edges) - 1, pa.py_buffer(edges), data)
        table = pa.Table.from_batches(batches, self.schema).drop_columns([self._large])
        (rows,) = table.combine_chunks().to_batches() or [_none(table.schema)]
        return Whole(rows, self._large, texts)

    def parts(self) -> Iterator[pa.Table]:
        """Yield all rows, some ten thousands at a time, and forget them."""
        held = self._taken_held()
        while held:
            yield pa.Table.from_batches([held.pop()], self.schema)
        if self._writer is not None:
            self._writer.close()
        for path in self._files:
            with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
                batches: list[pa.RecordBatch] = []
                for at in range(reader.num_record_batches):
                    batches.append(reader.get_batch(at))
                    if sum(one.nbytes for one in batches) >= TOGETHER_BYTES:
                        yield pa.Table.from_batches(batches, self.schema).combine_chunks()
                        batches = []
                if batches:
                    yield pa.Table.from_batches(batches, self.schema).combine_chunks()
            path.unlink()

    def _open(self) -> None:
        """Begin a file, the next one where there is one already."""
        if self._writer is not None:
            self._writer.close()
        self._packed = self.bytes > self._plain_bytes
        path = self.path.with_name(f"{self.path.name}.{len(self._files)}")
        options = pa.ipc.IpcWriteOptions(compression="lz4" if self._packed else None)
        self._writer = pa.ipc.new_file(path, self.schema, options=options)
        self._files.append(path)

    def _write(self, batch: pa.RecordBatch) -> None:
        assert self._writer is not None
        self._writer.write_batch(batch)

    def _taken_held(self) -> list[pa.RecordBatch]:
        held, self._held = self._held, []
        return held

    def _taken(self) -> list[pa.RecordBatch]:
        if self.in_memory:
            return self._taken_held()
        return [batch for part in self.parts() for batch in part.to_batches()]


def _none(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema)


def _gathered(column: pa.Array, rows: NDArray[np.int64]) -> pa.Array:
    if pa.types.is_integer(column.type) and not column.null_count:
        return pa.array(column.to_numpy()[rows])
    return column.take(pa.array(rows))


def _edges(ends: NDArray[np.int64], start: int) -> NDArray[np.int64]:
    """Return where each text begins and ends, less its opening brace and its end of line."""
    edges = np.empty(2 * len(ends), np.int64)
    edges[1::2] = ends - 1
    edges[2::2] = ends[:-1] + 1
    edges[:1] = 1
    return edges + start
