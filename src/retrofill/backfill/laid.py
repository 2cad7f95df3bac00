"""Texts laid into memory in the order of sending, out of a source that is gone through once for each bucket.

Where the texts of a large history stay in the source, they need not be dealt out to buckets: writing them, and reading them
again, took longer than all of sorting. Instead a bucket is as large as memory allows, and the source is gone through for
each, as it lies in the system's memory, a window at a time: what a window holds of the bucket is copied to its place, and
the window is let go. That is worth it as long as the system can keep the source in memory, and does not cost more than
dealing out; else it is read from the disk, once for each bucket.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Final

import numpy as np
import pyarrow as pa
from msgspec import Struct
from numpy.typing import NDArray

from retrofill.backfill.native import native
from retrofill.backfill.people import Ints
from retrofill.backfill.spill import Mapped, Originals, Placed, strings, taken

Bytes = NDArray[np.uint8]

WINDOW_BYTES: Final = 16 * 1024 * 1024  # ours
_POPULATE_READ: Final = (
    22  # Linux's number: map all pages at once. Where it is not known, they come by and by
)


class Arena:
    """Memory that one bucket after another takes: fresh memory costs a quarter of a second for a gigabyte."""

    def __init__(self) -> None:
        self.copy = native("copy")
        self._data: Bytes = np.empty(0, np.uint8)

    def of(self, size: int) -> Bytes:
        """Return so many bytes, the same ones each time."""
        if len(self._data) < size:
            self._data = np.empty(0, np.uint8)
            self._data = np.empty(size + size // 4, np.uint8)  # the next one may be a little larger
        return self._data[:size]


def scattered(found: Placed, originals: Originals, arena: Arena, *, before: bytes) -> Scattered:
    """Return rows to be taken in one order. before: put before each text, in place of its brace."""
    begins, sizes = found.begins + 1, found.sizes - 2
    return Scattered(found.rows, begins, sizes, before, originals.files, arena, found.held)


class Scattered(Struct, frozen=True):
    """Rows of a bucket, each with the address and size of its text. lead: put before each. files: those that are mapped."""

    rows: pa.RecordBatch
    begins: Ints
    sizes: Ints
    lead: bytes
    files: Sequence[Mapped]
    arena: Arena
    held: Sequence[object]

    def text(self, row: int) -> bytes:
        """Return the text of one row, less what stands before it."""
        return bytes(pa.foreign_buffer(int(self.begins[row]), int(self.sizes[row])))

    def ordered(self, order: Ints) -> Callable[[int, int], pa.RecordBatch]:
        """Lay the texts in this order and return what gives rows start … end of it."""
        edges = np.zeros(len(order) + 1, np.int64)
        np.cumsum(self.sizes[order] + len(self.lead), out=edges[1:])
        places = np.empty(len(self.begins), np.int64)
        places.fill(-1)  # rows that are left out of the order
        places[order] = edges[:-1]
        room = self.arena.of(int(edges[-1]))
        self._lay(room, places)
        data = pa.py_buffer(room)

        def take(start: int, end: int) -> pa.RecordBatch:
            first, last = int(edges[start]), int(edges[end])
            text = strings(edges[start : end + 1] - first, data.slice(first, last - first))
            return taken(self.rows, order[start:end], text)

        return take

    def _lay(self, room: Bytes, places: Ints) -> None:
        by = np.argsort(self.begins, kind="stable")
        by = by[places[by] >= 0]
        begins = self.begins[by]
        lead = np.frombuffer(self.lead, np.uint8)
        done = np.zeros(len(by), np.bool_)

        def lay(at: slice) -> None:
            rows = by[at]
            low = int(begins[at][0])
            high = int((begins[at] + self.sizes[rows]).max())
            memory = np.frombuffer(pa.foreign_buffer(low, high - low), np.uint8)
            self.arena.copy(memory, begins[at] - low, self.sizes[rows], lead, room, places[rows])
            done[at] = True

        for file in self.files:
            for start in range(0, len(file.data), WINDOW_BYTES):
                size = min(WINDOW_BYTES, len(file.data) - start)
                low = file.address + start
                first, last = np.searchsorted(begins, (low, low + size)).tolist()
                if last > first:
                    with suppress(OSError):
                        file.data.madvise(_POPULATE_READ, start, size)
                    lay(slice(first, last))
                    file.data.madvise(mmap.MADV_DONTNEED, start, size)
        for first, last in _runs(~done):  # whose texts the bucket has itself
            lay(slice(first, last))


def _runs(wanted: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield first and last + 1 of each run of what is wanted."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], wanted.astype(np.int8), [0]))))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
