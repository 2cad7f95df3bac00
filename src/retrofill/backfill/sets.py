"""Sets on disk: the events of one sender in the order of sending, ready to go.

A set is an Arrow file. Each event stands behind a comma, so that the texts of consecutive rows are, as they lie in the
file, a part of a request's list: sending them copies nothing and joins nothing. Groups of some thousand rows are read at a
time, and of those only the columns that are asked for. Small stages are written as they are, and sent from where the
system keeps the file; large ones are packed with LZ4, which costs about half a CPU second for a million events and saves
four fifths of the room.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, Self

import numpy as np
import pyarrow as pa

from retrofill.backfill.people import Ints
from retrofill.backfill.texts import less
from retrofill.errors import CorruptError

COMMA: Final = b","
JSON: Final = "json"  # the event alone, made of TEXT when it is asked for
TEXT: Final = "text"

_MAGIC_BYTES = 8  # before what is otherwise a stream of Arrow

SCHEMA: Final = pa.schema(
    [
        ("person", pa.int64()),
        ("seq", pa.int64()),  # place in the set, from 0
        ("time_ms", pa.int64()),
        ("device_id", pa.string()),
        ("user_id", pa.string()),
        ("insert_id", pa.string()),
        ("event_type", pa.string()),
        (TEXT, pa.string()),  # a comma and the finished event
        ("bytes", pa.int32()),  # of the event, UTF-8
        ("file", pa.int32()),
        ("line", pa.int64()),
    ]
)


class SetWriter:
    """Writes one set, a group after another. packed: with LZ4."""

    def __init__(self, path: Path, *, packed: bool) -> None:
        options = pa.ipc.IpcWriteOptions(compression="lz4" if packed else None, use_threads=False)
        self._writer = pa.ipc.new_file(path, SCHEMA, options=options)

    def write(self, group: pa.RecordBatch) -> None:
        """Write rows that are read together."""
        self._writer.write_batch(group)

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()


def gone_on(path: Path, rows: int, *, packed: bool) -> SetWriter:
    """Return a writer of a set that has so many whole groups, which may be cut off behind them.

    A file of Arrow cannot be added to, so the groups are written again, beside, and take the place of the old ones.
    """
    fresh = path.with_suffix(".new")
    writer = SetWriter(fresh, packed=packed)
    with pa.OSFile(str(path)) as file:
        file.seek(_MAGIC_BYTES)
        reader = pa.ipc.open_stream(file)
        left = rows
        while left > 0:
            group = reader.read_next_batch()
            writer.write(group)
            left -= group.num_rows
    assert left == 0, f"{path} has no group that ends at row {rows}"
    fresh.replace(path)
    return writer


class Set:
    """One set, opened for reading. starts: the first row of each group, and the end."""

    def __init__(self, path: Path, *, mapped: bool = False) -> None:
        """mapped: rows are looked at where the file lies in the system's memory, not copied. For sets that are not packed."""
        self.path = path
        self._map = _mapped(path) if mapped else None
        self._file = (
            pa.OSFile(str(path)) if self._map is None else pa.BufferReader(pa.py_buffer(self._map))
        )
        self._readers: dict[tuple[str, ...], pa.ipc.RecordBatchFileReader] = {}
        try:
            self.groups = self._reader(("person",)).num_record_batches
            counts = [group.num_rows for group in self.batches(["person"])]
        except pa.ArrowInvalid as error:
            raise CorruptError(
                f"A set cannot be read: {error}",
                where=str(path),
                mend="Remove the stage folder; it is made anew from the source",
            ) from error
        self.starts: Ints = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @property
    def mapped(self) -> bool:
        """Whether rows are looked at where the file lies."""
        return self._map is not None

    @property
    def rows(self) -> int:
        """How many rows."""
        return int(self.starts[-1])

    def group_of(self, row: int) -> int:
        """The group that holds a row."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def read(self, group: int, columns: Sequence[str]) -> pa.RecordBatch:
        """Return some columns of a group, in the order in which they are asked for."""
        stored = [TEXT if name == JSON else name for name in columns]
        found = self._reader(tuple(sorted({*stored}))).get_batch(group)
        made = [
            less(found.column(TEXT), front=len(COMMA), back=0) if name == JSON else found.column(at)
            for name, at in zip(columns, stored, strict=True)
        ]
        return pa.RecordBatch.from_arrays(made, names=list(columns))

    def let_go(self) -> None:
        """Hold no memory for what was looked at of a mapped set; rows in use are found again by themselves."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

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
        self._readers.clear()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reader(self, columns: tuple[str, ...]) -> pa.ipc.RecordBatchFileReader:
        """Return a reader of these columns, at least."""
        if self._map is not None:
            # Nothing is read of what is not looked at. Where columns are chosen, Arrow clears memory for the whole group
            # and copies them there: a third of sending.
            columns = ()
        if columns not in self._readers:
            fields = [SCHEMA.get_field_index(name) for name in columns]
            options = pa.ipc.IpcReadOptions(included_fields=fields or None, use_threads=False)
            self._readers[columns] = pa.ipc.open_file(self._file, options=options)
        return self._readers[columns]


def _mapped(path: Path) -> mmap.mmap | None:
    """Return the file as memory; None where it is empty, or the system cannot let go of the pages."""
    with path.open("rb") as file:
        if path.stat().st_size == 0 or not hasattr(mmap, "MADV_DONTNEED"):
            return None
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
