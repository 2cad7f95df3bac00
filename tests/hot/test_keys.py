"""Key files: what was written is found, what is damaged is said, what has expired goes."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest

from retrofill.core.dedupe import KEY_BYTES, NO_KEY, Fingerprints
from retrofill.errors import CorruptError, FullError, StoreError
from retrofill.hot import keys as keys_module
from retrofill.hot.keys import KeyFile, KeyFiles, write
from retrofill.limits import KEY_FILES_MERGED


def random_keys(count: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(count * KEY_BYTES)


def fill(files: KeyFiles, ranges: int, *, width: int = 10, count: int = 200) -> dict[int, bytes]:
    """Write files of `width` blocks each; returns the keys by the block that all of them have."""
    written = {}
    for index in range(ranges):
        first = index * width + 1
        packed = random_keys(count, index)
        files.write(first, first + width - 1, packed, np.full(count, first + 3))
        written[first + 3] = packed
    return written


def test_every_key_is_found_in_its_block_and_no_other_is(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path / "keys")
    packed = random_keys(5000, 1)
    blocks = np.sort(np.random.default_rng(2).integers(11, 21, 5000))
    files.write(11, 20, packed, blocks)
    again = KeyFiles(tmp_path / "keys")
    for one in (files, again):
        assert (one.find(packed) == blocks).all()
        assert not one.find(random_keys(1000, 3)).any()
        assert one.find(NO_KEY + packed[:KEY_BYTES]).tolist() == [0, blocks[0]]
        assert (one.count, one.last, one.damaged) == (5000, 20, [])


def test_a_key_is_found_only_by_both_of_its_halves(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path)
    high = b"\1" * 8
    held = [high + bytes([low]) * 8 for low in (9, 3, 7, 3)]
    files.write(1, 4, b"".join(held), np.array([1, 2, 3, 4]))
    wanted = [high + bytes([low]) * 8 for low in (3, 7, 9, 5)]
    assert files.find(b"".join(wanted)).tolist() == [4, 3, 1, 0]


def test_the_newest_file_that_has_a_key_answers(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path)
    one = b"\5" * KEY_BYTES
    files.write(1, 10, one, np.array([4]))
    files.write(11, 20, one, np.array([14]))
    assert files.find(one).tolist() == [14]
    assert files.find(one, last=10).tolist() == [4]
    assert files.find(one, first=11).tolist() == [14]
    assert files.find(one, first=21).tolist() == [0]


def test_keys_without_a_value_are_left_out_and_an_empty_range_has_its_file(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path)
    files.write(1, 10, NO_KEY * 3, np.array([1, 2, 3]))
    files.write(11, 20, b"", np.array([], np.int64))
    assert files.count == 0
    assert KeyFiles(tmp_path).missing(1, 20) == []


@pytest.mark.parametrize("bits", [30, 31, 32])
def test_block_numbers_beyond_30_bits_come_back_whole(tmp_path: Path, bits: int) -> None:
    files = KeyFiles(tmp_path)
    packed = random_keys(3, 1)
    blocks = np.array([2**bits - 1, 2**bits, 2**bits + 1])
    forever, imported = np.array([True, False, False]), np.array([False, False, True])
    files.write(2**bits - 1, 2**bits + 5, packed, blocks, forever=forever, imported=imported)
    for one in (files, KeyFiles(tmp_path)):
        found, of_imports = one.holders(packed)
        assert found.tolist() == blocks.tolist()
        assert of_imports.tolist() == imported.tolist()


def test_a_file_says_which_keys_are_of_imports_rows(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path)
    packed = random_keys(KEY_FILES_MERGED * 2, 4)
    for index in range(KEY_FILES_MERGED):
        two = packed[index * 2 * KEY_BYTES :][: 2 * KEY_BYTES]
        blocks = np.full(2, index + 1)
        files.write(index + 1, index + 1, two, blocks, imported=np.array([False, True]))
    assert files.merge(KEY_FILES_MERGED - 1)
    found, imported = files.holders(packed)
    assert not found[
        : 2 * KEY_FILES_MERGED - 4
    ].any()  # the ordinary key of an import's row expires too
    assert imported.tolist() == [False] * (2 * KEY_FILES_MERGED - 4) + [False, True, False, True]
    table = Fingerprints.bulk(files.runs(), newest=KEY_FILES_MERGED)
    assert (table.split(packed, oldest_block=1) == found).all()


def test_a_file_of_an_earlier_version_is_made_again(tmp_path: Path) -> None:
    fill(KeyFiles(tmp_path), 1)
    path = next(tmp_path.glob("*.bin"))
    data = bytearray(path.read_bytes())
    data[8] = 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="no key file of this version"):
        KeyFile(path)
    assert KeyFiles(tmp_path).missing(1, 10) == [(1, 10)]


def test_missing_ranges_are_named(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path)
    assert files.missing(1, 5) == [(1, 5)]
    assert files.missing(1, 0) == []
    for first, last in ((11, 20), (31, 40)):
        files.write(first, last, b"", np.array([], np.int64))
    assert files.missing(1, 50) == [(1, 10), (21, 30), (41, 50)]
    assert files.missing(12, 35) == [(21, 30)]
    assert files.missing(21, 30) == [(21, 30)]


# Where one flipped bit is: magic, version, first block, count, checksum, a key, a block, the last byte.
@pytest.mark.parametrize("at", [0, 8, 16, 32, 48, 64, 64 + 16 * 200, -1])
def test_a_flipped_bit_is_found_and_its_range_reported_as_missing(tmp_path: Path, at: int) -> None:
    written = fill(KeyFiles(tmp_path), 3)
    path = tmp_path / "keys-000000000011-000000000020.bin"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="damaged"):
        KeyFile(path)
    files = KeyFiles(tmp_path)
    assert len(files.damaged) == 1
    assert not path.exists()
    assert files.missing(1, 30) == [(11, 20)]
    assert (files.find(written[4]) == 4).all()
    assert not files.find(written[14]).any()
    files.write(11, 20, written[14], np.full(200, 14))
    again = KeyFiles(tmp_path)
    assert (again.missing(1, 30), again.damaged) == ([], [])
    assert (again.find(written[14]) == 14).all()


@pytest.mark.parametrize("size", [0, 10, 63, 64, 1000])
def test_a_file_cut_short_is_found(tmp_path: Path, size: int) -> None:
    fill(KeyFiles(tmp_path), 1)
    path = next(tmp_path.glob("*.bin"))
    path.write_bytes(path.read_bytes()[:size])
    assert KeyFiles(tmp_path).missing(1, 10) == [(1, 10)]


def test_a_damaged_file_older_than_what_is_asked_for_is_named_until_it_is_written(
    tmp_path: Path,
) -> None:
    written = fill(KeyFiles(tmp_path), 3)
    path = tmp_path / "keys-000000000011-000000000020.bin"
    path.write_bytes(b"damaged")
    for _ in range(2):  # a start that is cut off before it has written the file
        files = KeyFiles(tmp_path)
        assert files.missing(25, 35) == [(11, 20), (31, 35)]
        assert files.missing(15, 30) == [(11, 20)]
    files.write(11, 20, written[14], np.full(200, 14))
    assert (files.damaged, files.missing(25, 30)) == ([], [])
    assert {one.suffix for one in tmp_path.iterdir()} == {".bin"}
    assert KeyFiles(tmp_path).missing(25, 30) == []


def test_a_file_half_written_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "keys-000000000001-000000000010.new"
    left.write_bytes(b"half")
    assert KeyFiles(tmp_path).missing(1, 10) == [(1, 10)]
    assert not left.exists()


def test_expired_files_go_but_never_those_of_an_import(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path)
    written = fill(files, 3)
    imported = random_keys(50, 9)
    files.write(31, 40, imported, np.full(50, 31), forever=np.arange(50) == 7)
    files.write(41, 50, b"", np.array([], np.int64))
    assert files.expire(20) == 1
    assert files.expire(1000) == 3
    again = KeyFiles(tmp_path)
    assert [(file.first, file.last) for file in again.files] == [(31, 40)]
    assert (again.find(imported) == 31).all()
    assert not again.find(written[24]).any()


def test_small_neighbours_become_one_file_with_the_same_answers(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path)
    written = fill(files, KEY_FILES_MERGED + 2)
    assert files.merge()
    assert not files.merge()
    for one in (files, KeyFiles(tmp_path)):
        assert len(one.files) == 3
        assert one.missing(1, 120) == []
        assert one.files[0].last == KEY_FILES_MERGED * 10
        for block, packed in written.items():
            assert (one.find(packed) == block).all()


def test_a_merge_leaves_out_what_expired_but_not_an_import(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path)
    imported = random_keys(5, 99)
    files.write(1, 1, imported, np.full(5, 1), forever=True)
    for block in range(2, KEY_FILES_MERGED + 1):
        files.write(block, block, random_keys(10, block), np.full(10, block))
    assert files.merge(oldest_block=KEY_FILES_MERGED)
    assert files.count == 15
    assert (files.find(imported) == 1).all()


def test_files_with_a_gap_between_them_are_not_merged(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path)
    for index in range(2 * KEY_FILES_MERGED):
        if index != KEY_FILES_MERGED - 1:
            files.write(index + 1, index + 1, b"", np.array([], np.int64))
    assert files.merge()
    assert files.missing(1, 2 * KEY_FILES_MERGED) == [(KEY_FILES_MERGED, KEY_FILES_MERGED)]


def test_a_merge_cut_off_before_it_removed_the_small_files_is_finished(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path)
    written = fill(files, KEY_FILES_MERGED)
    small = {path: path.read_bytes() for path in tmp_path.glob("*.bin")}
    files.merge()
    for path, data in small.items():
        path.write_bytes(data)
    again = KeyFiles(tmp_path)
    assert len(again.files) == len(list(tmp_path.glob("*.bin"))) == 1
    for block, packed in written.items():
        assert (again.find(packed) == block).all()


def test_a_start_builds_its_table_from_the_runs_of_the_files(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path)
    written = fill(files, 5)
    imported = random_keys(50, 77)
    files.write(51, 60, imported, np.full(50, 55), forever=True)
    table = Fingerprints.bulk(files.runs(), newest=60)
    for block, packed in written.items():
        assert (table.split(packed, oldest_block=1) == block).all()
        assert not table.split(packed, oldest_block=60).any()
    assert (table.split(imported, oldest_block=60) == 55).all()
    assert len(files.runs(from_block=60)) == 1


def test_memory_begins_with_the_file_from_which_on_all_keys_fit(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path)
    fill(files, 5, count=200)
    assert files.memory_from(1000) == 1
    assert files.memory_from(999) == 11
    assert files.memory_from(250) == 41
    assert files.memory_from(0) == 51


def test_a_file_and_then_its_folder_are_synced_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    sync, replace = os.fsync, Path.replace

    def noted_sync(handle: int) -> None:
        seen.append("sync " + Path(f"/proc/self/fd/{handle}").readlink().name)
        sync(handle)

    def noted_replace(path: Path, target: Path) -> Path:
        seen.append(f"rename {path.name} {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write(tmp_path, 1, 2, b"", np.array([], np.int64))
    name = "keys-000000000001-000000000002"
    assert seen == [f"sync {name}.new", f"rename {name}.new {name}.bin", f"sync {tmp_path.name}"]


@pytest.mark.parametrize(("number", "error"), [(errno.EIO, StoreError), (errno.ENOSPC, FullError)])
def test_a_disk_that_fails_is_told_and_no_file_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[StoreError]
) -> None:
    files = KeyFiles(tmp_path)

    def fail(_handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(keys_module.os, "fsync", fail)
    with pytest.raises(error):
        files.write(1, 2, random_keys(3, 1), np.array([1, 1, 2]))
    assert files.files == ()
    assert not list(tmp_path.glob("*.bin"))


def test_one_thread_may_search_what_another_merges(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path)
    written = fill(files, KEY_FILES_MERGED)
    before = files.files
    files.merge()
    chance = random.Random(1)
    block, packed = chance.choice(list(written.items()))
    # The old files are unlinked, but whoever still holds the old tuple reads on.
    wanted = np.frombuffer(packed, "<u8").reshape(-1, 2)
    assert any((file.find(wanted)[0] == block).all() for file in before)


def test_a_large_file_is_synced_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left for the last sync is little, so no commit waits long for it."""
    sizes: list[int] = []
    sync = os.fsync

    def weighing(file: int) -> None:
        sizes.append(os.fstat(file).st_size)
        sync(file)

    monkeypatch.setattr(keys_module, "LAKE_SYNC_BYTES", 20_000)
    monkeypatch.setattr(keys_module, "_STEP_BYTES", 7_000)
    monkeypatch.setattr(os, "fsync", weighing)
    path = write(tmp_path, 1, 9, packed := random_keys(10_000, 1), np.full(10_000, 5))
    of_file, folder = sizes[:-1], sizes[-1]
    assert np.diff([0, *of_file]).max() < 2 * 20_000
    assert of_file[-1] == path.stat().st_size != folder
    assert (KeyFile(path).find(np.frombuffer(packed, "<u8").reshape(-1, 2))[0] == 5).all()
