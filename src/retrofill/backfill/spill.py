"""Rows on their way between two steps: in memory while they are few, in a file when they are many."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from msgspec import Struct
from numpy.typing import NDArray

MEMORY_BYTES = 64 * 1024 * 1024  # of rows held; fresh memory costs more than a file does
# Written as it is. Packing takes about 1 CPU s for a million events each time; beyond this the room on disk is dearer.
PLAIN_BYTES = 1024 * 1024 * 1024
_PAGE = 4096
_TOGETHER = 4  # batches of the file read as one


class Whole(Struct, frozen=True):
    """All rows of a spill. apart: the texts of one more column, where they lie in the file: every second one is a row's."""

    table: pa.Table
    name: str = ""
    apart: pa.LargeStringArray | None = None

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """Return some rows, in this order."""
        found = self.table.take(pa.array(rows))
        if self.apart is None:
            return found
        return found.append_column(self.name, self.apart.take(pa.array(2 * rows)).cast(pa.string()))


class Spill:
    """A list of batches with a bound. First all `add`s, then one reading.

    memory_bytes: held in memory at most. plain_bytes: of a file before the rest is packed. large: a column of texts
    that stays in the file where it can.
    """

    def __init__(
        self,
        path: Path,
        schema: pa.Schema,
        *,
        memory_bytes: int = MEMORY_BYTES,
        plain_bytes: int = PLAIN_BYTES,
        large: str = "",
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

    def whole(self) -> Whole:
        """Return all rows, each column in one piece, and forget them."""
        if self._large and self._files and self.plain:
            return self._mapped()
        return Whole(pa.Table.from_batches(self._taken(), self.schema).combine_chunks())

    def _mapped(self) -> Whole:
        """Return the rows with the large column left in its file, mapped into memory."""
        assert self._writer is not None
        self._writer.close()
        (path,) = self._files
        with pa.memory_map(str(path)) as file:
            data = file.read_buffer(file.size())
            np.frombuffer(data, np.uint8)[
                ::_PAGE
            ].max()  # mapped in order: a third of what it costs by and by
            reader = pa.ipc.open_file(file)
            batches = [reader.get_batch(at) for at in range(reader.num_record_batches)]
        path.unlink()
        table = pa.Table.from_batches(batches, self.schema)
        edges = np.concatenate([_edges(one, data.address) for one in table[self._large].chunks])
        apart = pa.LargeStringArray.from_buffers(len(edges) - 1, pa.py_buffer(edges), data)
        return Whole(table.drop_columns([self._large]).combine_chunks(), self._large, apart)

    def parts(self) -> Iterator[pa.Table]:
        """Yield all rows, some thousands at a time, and forget them."""
        held = self._taken_held()
        while held:
            yield pa.Table.from_batches([held.pop()], self.schema)
        if self._writer is not None:
            self._writer.close()
        for path in self._files:
            with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
                for start in range(0, reader.num_record_batches, _TOGETHER):
                    end = min(start + _TOGETHER, reader.num_record_batches)
                    batches = [reader.get_batch(at) for at in range(start, end)]
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


def _edges(texts: pa.StringArray, start: int) -> NDArray[np.int64]:
    """Return where each text begins and ends, counted from an address."""
    _valid, offsets, data = texts.buffers()
    own = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    edges = np.empty(2 * len(texts), np.int64)
    edges[::2], edges[1::2] = own[:-1], own[1:]
    edges += data.address - start
    return edges
