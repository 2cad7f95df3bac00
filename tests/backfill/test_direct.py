"""What is written past the system's cache is read back, also where there is no way past it, and memory is used again."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pyarrow as pa
import pytest

from retrofill.backfill import direct
from retrofill.backfill.direct import BLOCK, File, Memory, Room, up


def refused(*_: object) -> int:
    raise OSError(errno.EINVAL, "Invalid argument")


@pytest.fixture(params=["direct", "not opened", "not written"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for a file, on a system that goes past its cache, says when opening that it does not, or when writing."""
    opened, wrote, read = os.open, os.pwrite, os.preadv
    flag = direct._DIRECT

    def open_(path: Path, flags: int, mode: int) -> int:
        return refused() if flags & flag else opened(path, flags, mode)

    def as_usual(handle: int) -> bool:
        return not fcntl.fcntl(handle, fcntl.F_GETFL) & flag

    if request.param == "not opened":
        monkeypatch.setattr(os, "open", open_)
    if request.param == "not written":
        for name, do in (("pwrite", wrote), ("preadv", read)):
            monkeypatch.setattr(
                os,
                name,
                lambda handle, *rest, do=do: (do if as_usual(handle) else refused)(handle, *rest),
            )
    return tmp_path / "file"


def test_blocks_are_read_back(path: Path) -> None:
    file, memory = File(path, os.O_RDWR | os.O_CREAT), Memory(3 * BLOCK)
    memory.bytes[:] = b"abc" * BLOCK
    file.write(memoryview(memory.bytes), 0)
    file.write(memoryview(memory.bytes)[:BLOCK], 3 * BLOCK)
    assert file.size == 4 * BLOCK
    found = Memory(4 * BLOCK)
    assert file.read(memoryview(found.bytes), BLOCK) == 3 * BLOCK  # the file ends there
    assert found.bytes[: 3 * BLOCK] == memory.bytes[BLOCK:] + memory.bytes[:BLOCK]
    file.close()
    file.close()


def test_a_write_that_the_disk_cuts_off_is_ended_or_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrote, sizes = os.pwrite, [100, BLOCK, 50]

    def short(handle: int, data: memoryview, at: int) -> int:
        if not sizes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return wrote(handle, data[: sizes.pop(0)], at)

    file, memory = File(tmp_path / "file", os.O_RDWR | os.O_CREAT), Memory(2 * BLOCK)
    monkeypatch.setattr(direct, "_DIRECT", 0)  # parts of blocks cannot be written so
    file._as_usual()
    monkeypatch.setattr(os, "pwrite", short)
    with pytest.raises(OSError, match="No space left"):
        file.write(memoryview(memory.bytes), 0)
    assert file.size == BLOCK + 150
    file.close()


def test_memory_is_used_again_when_nobody_looks_at_it() -> None:
    room = Room()
    first = room.of(3 * BLOCK)
    assert len(first) == 4 * BLOCK
    lent = room.lent(first, 5, 10)
    part = pa.Array.from_buffers(pa.uint8(), 4, [None, lent.slice(1)])
    del lent
    assert room.of(3 * BLOCK) is not first
    assert len(part) == 4  # which holds it
    del part
    assert room.of(3 * BLOCK) is first


def test_little_memory_is_kept_and_the_largest_of_it() -> None:
    room = Room()
    taken = [room.of(size * BLOCK) for size in (8, 1, 2) for _ in range(direct._FREE_MAX)]
    for memory in taken:
        room.back(memory)
    assert [len(one) for one in room._free] == [8 * BLOCK] * direct._FREE_MAX


def test_many_bytes_are_copied_to_memory_that_fits_and_few_to_the_heap() -> None:
    room = Room()
    large, fitting = room.of(64 * direct._MAPPED_MIN), room.of(2 * direct._MAPPED_MIN)
    room.back(large)
    room.back(fitting)
    few = room.copied(pa.py_buffer(b"some bytes"))  # a piece each, and a process may have no more
    assert few.to_pybytes() == b"some bytes"
    assert room._free == [fitting, large]
    text = b"some bytes" * direct._MAPPED_MIN
    many = room.copied(pa.py_buffer(text[: direct._MAPPED_MIN]))
    assert many.address == fitting.address
    another = room.copied(pa.py_buffer(text[: direct._MAPPED_MIN]))
    assert another.to_pybytes() == many.to_pybytes() == text[: direct._MAPPED_MIN]
    assert room._free == [large]  # which is much too large
    del many, another
    assert room._free[0] is not large
    assert len(room._free) == 3


def test_a_size_is_rounded_to_blocks() -> None:
    assert [up(size) for size in (0, 1, BLOCK, BLOCK + 1)] == [0, BLOCK, BLOCK, 2 * BLOCK]
