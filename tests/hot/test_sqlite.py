"""Blocks in SQLite: what is read is what was written, and bytes of before there was packing still open."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import xxhash
from tests.lake.blocks import World

from retrofill.core import block as block_codec
from retrofill.core.block import Block
from retrofill.errors import CorruptError
from retrofill.hot.sqlite import Blocks, read_blocks


@pytest.fixture
def written() -> list[Block]:
    """Two blocks of some hundred events."""
    world = World(seed=1)
    return [world.block(number, 300) for number in (1, 2)]


def _stored(path: Path, number: int) -> bytes:
    with closing(sqlite3.connect(path)) as db:
        ((blob,),) = db.execute("SELECT blob FROM blocks WHERE number = ?", (number,)).fetchall()
    return bytes(blob)


def test_a_block_is_packed_and_read_back_as_it_was(tmp_path: Path, written: list[Block]) -> None:
    path = tmp_path / "hot.sqlite"
    with closing(Blocks(path)) as blocks:
        for one in written:
            blocks.append(one.number, one.rows, block_codec.encode(one))
        assert list(blocks.read(1, 2)) == written
    assert 2 * len(_stored(path, 1)) < len(block_codec.encode(written[0]))


def test_a_block_that_was_stored_unpacked_is_read(tmp_path: Path, written: list[Block]) -> None:
    path = tmp_path / "hot.sqlite"
    Blocks(path).close()
    plain = block_codec.encode(written[0])
    with closing(sqlite3.connect(path)) as db, db:
        checksum = xxhash.xxh3_64_intdigest(plain) >> 1
        db.execute("INSERT INTO blocks VALUES (1, 300, ?, ?)", (checksum, plain))
    assert list(read_blocks(path, 1, 1)) == written[:1]


def test_a_flipped_bit_is_named_before_anything_is_unpacked(
    tmp_path: Path, written: list[Block]
) -> None:
    path = tmp_path / "hot.sqlite"
    with closing(Blocks(path)) as blocks:
        blocks.append(1, 300, block_codec.encode(written[0]))
    packed = _stored(path, 1)
    for place in (0, 5, len(packed) // 2, len(packed) - 1):
        flipped = bytearray(packed)
        flipped[place] ^= 1
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE blocks SET blob = ?", (bytes(flipped),))
        with pytest.raises(CorruptError, match=r"Block checksum is .* expected .* block 1"):
            list(read_blocks(path, 1, 1))


def _copied(path: Path, to: Path, *, log_bytes: int) -> Path:
    """The files of a store as a stop would leave them that keeps so much of the log."""
    to.mkdir()
    (to / path.name).write_bytes(path.read_bytes())
    log = path.with_name(f"{path.name}-wal")
    (to / log.name).write_bytes(log.read_bytes()[:log_bytes])
    return to / path.name


def test_a_log_that_was_written_back_is_not_needed_any_more_and_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "hot.sqlite"
    world = World(seed=1)
    log = tmp_path / "hot.sqlite-wal"
    with closing(Blocks(path)) as blocks:
        number = 0
        sizes = []
        for turn in range(4):
            while not blocks.write_back_is_due:
                number += 1
                one = world.block(number, 50)
                blocks.append(one.number, one.rows, block_codec.encode(one))
            blocks.write_back()
            assert not blocks.write_back_is_due
            number += 1
            one = world.block(number, 50)
            blocks.append(one.number, one.rows, block_codec.encode(one))
            blocks.write_back_rest()
            sizes.append(log.stat().st_size)
            alone = _copied(path, tmp_path / f"alone-{turn}", log_bytes=0)
            assert [one.number for one in read_blocks(alone, 1, number)] == [*range(1, number + 1)]
        assert max(sizes[1:]) <= sizes[0] * 1.1


def test_blocks_are_written_back_beside_a_reader_and_a_writer(
    tmp_path: Path, written: list[Block]
) -> None:
    path = tmp_path / "hot.sqlite"
    with closing(Blocks(path)) as blocks:
        blocks.append(1, 300, block_codec.encode(written[0]))
        reader = blocks.read(1, 2)
        assert next(reader) == written[0]
        blocks._writer.execute("BEGIN IMMEDIATE")
        blocks.write_back()
        blocks._writer.execute("COMMIT")
        blocks.append(2, 300, block_codec.encode(written[1]))
        blocks.write_back()
        blocks.write_back_rest()
        assert list(reader) == written[1:]
        assert list(blocks.read(1, 2)) == written


def test_a_deletion_that_a_stop_takes_back_leaves_the_blocks_that_were_there(
    tmp_path: Path, written: list[Block]
) -> None:
    """It is not synced: what it would cost is a sync for every few blocks, between the commits."""
    path = tmp_path / "hot.sqlite"
    log = tmp_path / "hot.sqlite-wal"
    with closing(Blocks(path)) as blocks:
        blocks.append(1, 300, block_codec.encode(written[0]))
        synced = log.stat().st_size
        blocks.delete(1, 1)
        before = _copied(path, tmp_path / "before", log_bytes=synced)
        assert blocks._writer.execute("PRAGMA synchronous").fetchall() == [(2,)]  # FULL again
        blocks.append(2, 300, block_codec.encode(written[1]))
        after = _copied(path, tmp_path / "after", log_bytes=log.stat().st_size)
    assert list(read_blocks(before, 1, 2)) == written[:1]
    assert list(read_blocks(after, 1, 2)) == written[1:]


def test_the_room_of_deleted_blocks_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "hot.sqlite"
    world = World(seed=1)
    with closing(Blocks(path)) as blocks:
        for one in world.blocks(20, rows=300):
            blocks.append(one.number, one.rows, block_codec.encode(one))
        blocks.write_back()
        blocks.delete(1, 19)
        large = path.stat().st_size
        blocks.shrink()
        assert [number for number, _ in blocks.numbers()] == [20]
    assert path.stat().st_size < large // 5
    with closing(Blocks(path)) as blocks:
        assert [number for number, _ in blocks.numbers()] == [20]
