"""Files that are written and read past the system's cache, through memory that is used again.

What a stage writes is read once, much later, and may be larger than memory. If the system keeps it meanwhile, each of its pages has
to be found, cleared and given back: 0.3 to 1.7 CPU s for the bytes of a million events, by the hour; handed to the disk from
where they lie, they take 0.02. Where a file system knows no such way, files are written and read as usual.

All is in blocks of BLOCK bytes: places, sizes and where memory begins.
"""

from __future__ import annotations

import bisect
import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pyarrow as pa

BLOCK: Final = 4096  # no disk asks for more
_DIRECT: Final = getattr(os, "O_DIRECT", 0)  # not every system has it

_FREE_MAX: Final = 16  # ours: pieces of memory kept while they are not in use
# Ours: times the size that is asked for; memory that is larger waits for who needs more.
_WASTE_MAX: Final = 4
# Ours: what is smaller is copied to the heap. Each Memory is a map of its own, and Linux gives a process 65,530 of them: a destination
# that refuses rows has each person's copied.
_MAPPED_MIN: Final = 64 * 1024
_Do = Callable[[memoryview, int], int]


def up(size: int) -> int:
    """Return the size of as many whole blocks as so many bytes need."""
    return -(-size // BLOCK) * BLOCK


class Memory:
    """Memory that begins at a block, all zeros."""

    __slots__ = ("address", "bytes")

    def __init__(self, size: int) -> None:
        self.bytes = mmap.mmap(-1, up(max(1, size)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = int(pa.py_buffer(self.bytes).address)

    def __len__(self) -> int:
        return len(self.bytes)


class Room:
    """Memory that is not in use: fresh memory costs a quarter of a second for a gigabyte, and more in some hours."""

    def __init__(self) -> None:
        self._free: list[Memory] = []  # the smallest first

    def of(self, size: int) -> Memory:
        """Return memory of at least so many bytes. What is in it is anything."""
        for at, memory in enumerate(self._free):
            if size <= len(memory) <= _WASTE_MAX * up(size):
                return self._free.pop(at)
        return Memory(1 << (size - 1).bit_length() if size > BLOCK else BLOCK)

    def lent(self, memory: Memory, start: int, size: int) -> pa.Buffer:
        """Return a part of memory that comes back when nobody looks at it any more."""
        return pa.foreign_buffer(memory.address + start, size, _Lent(memory, self))

    def copied(self, data: pa.Buffer) -> pa.Buffer:
        """Return the same bytes, in memory that comes back where they are many."""
        if data.size < _MAPPED_MIN:
            return pa.py_buffer(data.to_pybytes())
        memory = self.of(data.size)
        memoryview(memory.bytes)[: data.size] = memoryview(data).cast("B")
        return self.lent(memory, 0, data.size)

    def back(self, memory: Memory) -> None:
        """Take back memory; the smallest that is not in use is let go where it is much."""
        bisect.insort(self._free, memory, key=len)
        if len(self._free) > _FREE_MAX:
            del self._free[0]


class _Lent:
    """Memory in use; it goes back where it came from when nobody has this any more."""

    __slots__ = ("_memory", "_room")

    def __init__(self, memory: Memory, room: Room) -> None:
        self._memory, self._room = memory, room

    def __del__(self) -> None:
        self._room.back(self._memory)


class File:
    """A file of whole blocks."""

    def __init__(self, path: Path, flags: int) -> None:
        """flags: as `os.open` takes them."""
        try:
            self._handle = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL or not _DIRECT:
                raise
            self._handle = os.open(path, flags, 0o666)

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return os.fstat(self._handle).st_size

    def write(self, data: memoryview, at: int) -> None:
        """Write some blocks at a place. Raises OSError, for example when the disk is full."""
        while data:
            written = self._tried(
                lambda part, place: os.pwrite(self._handle, part, place), data, at
            )
            if written % BLOCK:  # what follows is in no whole blocks
                self._as_usual()
            data, at = data[written:], at + written

    def read(self, data: memoryview, at: int) -> int:
        """Fill some blocks from a place, and return how many bytes there were: fewer at the end of the file."""
        done, there = 0, BLOCK
        while done < len(data) and there and there % BLOCK == 0:
            there = self._tried(
                lambda part, place: os.preadv(self._handle, [part], place), data[done:], at + done
            )
            done += there
        return done

    def close(self) -> None:
        """Close it; twice does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _tried(self, do: _Do, data: memoryview, at: int) -> int:
        try:
            return do(data, at)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._as_usual():
                raise
            return do(data, at)  # some systems only say so now

    def _as_usual(self) -> bool:
        """Go through the system's cache from now on; False if it was so already."""
        flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
        fcntl.fcntl(self._handle, fcntl.F_SETFL, flags & ~_DIRECT)
        return bool(flags & _DIRECT)
