"""Rows on their way between two steps: in memory while they are few, in a file when they are many."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

MEMORY_BYTES = 64 * 1024 * 1024  # of rows held; fresh memory costs more than a packed file does
_TOGETHER = 4  # batches of the file read as one


class Spill:
    """A list of batches with a bound. First all `add`s, then one reading."""

    def __init__(self, path: Path, schema: pa.Schema, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self.path, self.schema = path, schema
        self.bytes = 0
        self._memory_bytes = memory_bytes
        self._held: list[pa.RecordBatch] = []
        self._writer: pa.ipc.RecordBatchFileWriter | None = None

    @property
    def in_memory(self) -> bool:
        """Whether no file was needed."""
        return self._writer is None

    def add(self, batch: pa.RecordBatch) -> None:
        """Take rows. The batch is not to be changed any more."""
        self.bytes += batch.nbytes
        if self._writer is not None:
            self._writer.write_batch(batch)
            return
        self._held.append(batch)
        if self.bytes > self._memory_bytes:
            options = pa.ipc.IpcWriteOptions()
            self._writer = pa.ipc.new_file(self.path, self.schema, options=options)
            for one in self._held:
                self._writer.write_batch(one)
            self._held = []

    def whole(self) -> pa.Table:
        """Return all rows, each column in one piece, and forget them."""
        table = pa.Table.from_batches(self._taken(), self.schema)
        return table.combine_chunks()

    def parts(self) -> Iterator[pa.Table]:
        """Yield all rows, some thousands at a time, and forget them."""
        if self._writer is None:
            held, self._held = self._held, []
            while held:
                yield pa.Table.from_batches([held.pop()], self.schema)
            return
        self._writer.close()
        with pa.OSFile(str(self.path)) as file, pa.ipc.open_file(file) as reader:
            for start in range(0, reader.num_record_batches, _TOGETHER):
                end = min(start + _TOGETHER, reader.num_record_batches)
                batches = [reader.get_batch(at) for at in range(start, end)]
                yield pa.Table.from_batches(batches, self.schema).combine_chunks()
        self.path.unlink()

    def _taken(self) -> list[pa.RecordBatch]:
        if self._writer is None:
            held, self._held = self._held, []
            return held
        return [batch for part in self.parts() for batch in part.to_batches()]
