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
