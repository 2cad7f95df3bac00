"""Rows on their way between two steps: batches in a file that is added to, and may be cut back to where it once ended.

A row's text may be left where the source has it: then the row says where that is. Most histories are files of events as
they shall be, and what is not written need not be read again either.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from msgspec import Struct

from retrofill.backfill.people import Ints
from retrofill.backfill.source import Piece
from retrofill.errors import InputError

TEXT: Final = "event"  # the large column: texts in braces with an end of line
AT, SIZE, FILE = "at", "size", "file"  # where the text stands in which file of the source, instead
_TEXT_BYTES_MAX = 2**31 - 1  # of a column of texts, by its offsets
ROOM_BYTES: Final = 4 * 1024**3  # ours: left for whatever else this machine does
_FILES_OPEN = 16  # ours: of the source, while stretches of it are read in order

Lying = Callable[[int, int, int], int]
"""Says at which address the first byte of a file would be if bytes begin … end are wanted of it: file, begin, end."""


def short(folder: Path, ahead: int) -> bool:
    """Say whether room on the disk is short. ahead: bytes that a step may write still.

    Then rows are packed: a quarter of the room, and 1 to 1.5 CPU s for a million events that have their texts.
    """
    return shutil.disk_usage(folder).free < ahead + ROOM_BYTES


class Spill:
    """Batches of one schema in a file. length: of what is there already, and counts."""

    def __init__(self, path: Path, schema: pa.Schema, *, length: int = 0) -> None:
        self.path, self.schema, self.bytes = path, schema, length

    def cut(self) -> None:
        """Cut off what does not count, or make the file. To be called before rows are added."""
        with self.path.open("ab") as file:
            file.truncate(self.bytes)

    def add(self, batch: pa.RecordBatch, *, packed: bool = False) -> None:
        """Add rows. packed: with LZ4."""
        data = lz4(batch) if packed else batch.serialize()
        with self.path.open("ab") as file:
            file.write(data)
        self.bytes += len(data)

    def batches(self, start: int = 0) -> Iterator[tuple[pa.RecordBatch, int]]:
        """Yield the batches from a byte on, each with the byte behind it."""
        with pa.OSFile(str(self.path)) as file:
            file.seek(start)
            for batch, end in _batches(file, self.schema):
                if end > self.bytes:
                    return
                yield batch, end

    def mapped(self) -> Iterator[pa.RecordBatch]:
        """Yield all batches from where the system keeps the file: nothing is copied."""
        if self.bytes:
            data = _mapped(self.path).slice(0, self.bytes)
            for batch, _end in _batches(pa.BufferReader(data), self.schema):
                yield batch

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def _batches(file: pa.NativeFile, schema: pa.Schema) -> Iterator[tuple[pa.RecordBatch, int]]:
    reader = pa.ipc.MessageReader.open_stream(file)
    for message in reader:
        if message.type == "record batch":
            yield pa.ipc.read_record_batch(message, schema), file.tell()


def lz4(batch: pa.RecordBatch) -> pa.Buffer:
    """Return the batch with LZ4. It begins with its schema, which reading passes over."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
    writer = pa.ipc.new_stream(sink, batch.schema, options=options)
    writer.write_batch(batch)
    return sink.getvalue()


def _mapped(path: Path) -> pa.Buffer:
    """Return a file as memory. All of it is mapped at once: by and by costs three times as much."""
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    with path.open("rb") as file:
        return pa.py_buffer(mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ))


class Mapped(Struct, frozen=True):
    """A file as memory, of which nothing is there until it is looked at. address: of its first byte."""

    data: mmap.mmap
    address: int


class Originals:
    """The files of a source in which texts were left. They must be as they were when these were read."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._maps: dict[int, pa.Buffer] = {}
        self._files: dict[int, Mapped] = {}
        self._open: dict[int, int] = {}

    def mapped(self, file: int, _begin: int, _end: int) -> int:
        """Map a file, for texts in any order. A file that is made shorter meanwhile ends the process (SIGBUS)."""
        if file not in self._maps:
            self._maps[file] = _mapped(Path(self._pieces[file].place))
        return int(self._maps[file].address)

    def addressed(self, file: int, _begin: int, _end: int) -> int:
        """Map a file of which nothing needs be in memory before it is looked at."""
        if file not in self._files:
            with Path(self._pieces[file].place).open("rb") as handle:
                data = mmap.mmap(handle.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            self._files[file] = Mapped(data, int(pa.py_buffer(data).address))
        return self._files[file].address

    @property
    def files(self) -> list[Mapped]:
        """Those that are mapped so, in the order of the source."""
        return [self._files[number] for number in sorted(self._files)]

    def reader(self) -> tuple[Lying, list[pa.Buffer]]:
        """Return what reads stretches, for texts in the order of the source, and the list that keeps them."""
        kept: list[pa.Buffer] = []

        def lying(file: int, begin: int, end: int) -> int:
            data = os.pread(self._opened(file), end - begin, begin)
            if len(data) < end - begin:
                raise changed(self._pieces[file].name)
            kept.append(pa.py_buffer(data))
            return int(kept[-1].address) - begin

        return lying, kept

    def _opened(self, file: int) -> int:
        if file not in self._open:
            if len(self._open) >= _FILES_OPEN:
                self.close()
            self._open[file] = os.open(self._pieces[file].place, os.O_RDONLY)
        return self._open[file]

    def close(self) -> None:
        """Close the files that are open."""
        for handle in self._open.values():
            os.close(handle)
        self._open = {}


def changed(name: str) -> InputError:
    """Return the error of a source that did not stay as it was."""
    return InputError(
        "The source was changed while it was staged",
        where=name,
        mend="Stage it again once nobody writes to it, or stage a copy",
    )


class Whole(Struct, frozen=True):
    """Rows with their texts wherever those lie. sizes: of each text. texts: a gap behind each; last what stands before them.

    held: the memory in which they lie.
    """

    rows: pa.RecordBatch
    sizes: Ints
    texts: pa.LargeStringArray
    held: Sequence[object]

    def take(self, rows: Ints, *, led: bool = True) -> pa.RecordBatch:
        """Return some rows, in this order, their text last. led: with the beginning that was asked for, else as it was.

        One gathering puts beginnings and texts side by side, hence makes the joined texts at no further cost.
        """
        if led:
            both = np.full(2 * len(rows), len(self.texts) - 2, np.int64)
            both[1::2] = 2 * rows
        else:
            both = 2 * rows
        pieces = self.texts.take(pa.array(both))
        _valid, offsets, data = pieces.buffers()
        ends = np.frombuffer(offsets, np.int64)[: len(both) + 1 : 2 if led else 1]
        return taken(self.rows, rows, strings(ends, data))

    def text(self, row: int) -> bytes:
        """Return the text of one row, less what stands before it."""
        return bytes(self.texts[2 * row].as_buffer())

    def ordered(self, order: Ints) -> Callable[[int, int], pa.RecordBatch]:
        """Return what gives rows start … end of this order."""
        return lambda start, end: self.take(order[start:end])


class Placed(Struct, frozen=True):
    """Rows of some batches, less their texts, of each of which the address and the size are known. held: where they lie."""

    rows: pa.RecordBatch
    begins: Ints
    sizes: Ints
    held: Sequence[object]


def placed(batches: Sequence[pa.RecordBatch], schema: pa.Schema, lying: Lying) -> Placed:
    """Return all rows of some batches with the places of their texts."""
    places = [_places(batch, lying) for batch in batches]
    begins, sizes = (
        np.concatenate([place[at] for place in places]) if places else np.zeros(0, np.int64)
        for at in (0, 1)
    )
    table = pa.Table.from_batches(batches, schema)
    table = table.drop_columns([name for name in (TEXT, AT, SIZE) if name in schema.names])
    empty = [name for name in table.column_names if table[name].null_count == len(table)]
    some = table.drop_columns(empty).combine_chunks()
    columns = {name: some[name] for name in some.column_names}
    columns |= {name: pa.nulls(len(table), schema.field(name).type) for name in empty}
    (rows,) = pa.table(columns, schema=table.schema).to_batches() or [
        pa.RecordBatch.from_pylist([], table.schema)
    ]
    return Placed(rows, begins, sizes, batches)


def whole(found: Placed, *, before: bytes | None) -> Whole:
    """Return the rows to be taken in any order. before: put before each text, in place of its brace; None: texts as they are."""
    begins, sizes = found.begins, found.sizes
    if before is not None:  # less the brace and the end of line
        begins, sizes = begins + 1, sizes - 2
    lead = pa.py_buffer(before or b"{")
    return Whole(found.rows, sizes, _spanned(begins, sizes, lead), (lead, found.held))


def some(rows: pa.RecordBatch, order: Ints) -> list[pa.Array]:
    """Return the columns of some rows, in this order. One column after the other: all at once took Arrow twice as long."""
    return [_some(column, order) for column in rows.columns]


def strings(edges: Ints, data: pa.Buffer) -> pa.StringArray:
    """Return texts that lie in memory one behind another. edges: where each begins, and where the last one ends."""
    assert edges[-1] <= _TEXT_BYTES_MAX, f"{len(edges) - 1} rows have {edges[-1]:,} bytes"
    return pa.StringArray.from_buffers(len(edges) - 1, pa.py_buffer(edges.astype(np.int32)), data)


def _some(column: pa.Array, order: Ints) -> pa.Array:
    if column.null_count == len(column):
        return pa.nulls(len(order), column.type)
    if pa.types.is_integer(column.type) and not column.null_count:
        return pa.array(column.to_numpy()[order])
    return column.take(pa.array(order))


def taken(rows: pa.RecordBatch, order: Ints, text: pa.StringArray) -> pa.RecordBatch:
    """Return some rows, in this order, with their texts, which come last."""
    names = [*rows.schema.names, TEXT]
    return pa.RecordBatch.from_arrays([*some(rows, order), text], names=names)


def _places(batch: pa.RecordBatch, lying: Lying) -> tuple[Ints, Ints]:
    """Return the address and the size of each row's text."""
    texts = batch.column(TEXT)
    _valid, offsets, own = texts.buffers()
    edges = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    begins = edges[:-1].astype(np.int64) + (own.address if own is not None else 0)
    sizes = np.diff(edges).astype(np.int64)
    if AT not in batch.schema.names:
        return begins, sizes
    at = batch.column(AT).to_numpy()
    left = at >= 0
    if left.any():
        file, long = batch.column(FILE).to_numpy(), batch.column(SIZE).to_numpy().astype(np.int64)
        for number in np.unique(file[left]).tolist():
            rows = np.flatnonzero(left & (file == number))
            low, high = int(at[rows].min()), int((at[rows] + long[rows]).max())
            begins[rows], sizes[rows] = lying(number, low, high) + at[rows], long[rows]
    return begins, sizes


def _spanned(begins: Ints, sizes: Ints, lead: pa.Buffer) -> pa.LargeStringArray:
    """Return texts at these addresses, the lead behind them, as if all memory between were one run of bytes.

    Nothing but the texts is ever looked at. The last entry stands for none: by the sum Arrow guesses how much room to take.
    """
    edges = np.empty(2 * len(begins) + 3, np.int64)
    edges[0:-3:2], edges[1:-3:2] = begins, begins + sizes
    edges[-3], edges[-2] = lead.address, lead.address + lead.size
    edges[-1] = edges[0] + int(sizes.sum()) + len(begins) * (lead.size + 1)
    low, high = int(edges.min()), int(edges.max())
    data = pa.foreign_buffer(low, high - low)
    return pa.LargeStringArray.from_buffers(len(edges) - 1, pa.py_buffer(edges - low), data)
