"""The lake: rows come back as they went in, snapshots hold still, syncs come before commits, crashes leave nothing."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace
from tests.faults.process import PATIENCE_S
from tests.lake.blocks import FIRST_PERSON, World, block_of

from retrofill.core.block import Block, Kind, Merge
from retrofill.errors import FullError, StoreError
from retrofill.lake import Lake, arrow, compact, ducklake, parquet
from retrofill.lake.arrow import REPEATED
from retrofill.lake.catalog import CATALOG, put_in_place
from retrofill.lake.compact import LakeFile
from retrofill.lake.files import Files, store_error


@pytest.fixture
def lake(tmp_path: Path) -> Iterator[Lake]:
    opened = Lake.open(tmp_path / "lake")
    yield opened
    opened.close()


def write(lake: Lake, blocks: list[Block]) -> Path | None:
    file = lake.new_file(blocks[0].number, blocks[-1].number)
    return file if parquet.write(file, parquet.in_order(blocks), lake.files).rows else None


def seal(lake: Lake, blocks: list[Block]) -> None:
    lake.adopt(write(lake, blocks), block=blocks[-1].number, merges=arrow.merges(blocks))


def merge(lake: Lake, old: list[LakeFile]) -> Path | None:
    file = lake.new_file(old[0].first, old[-1].last)
    sources = [parquet.read(one.path, one.deleted) for one in old]
    return file if parquet.write(file, compact.merge(sources), lake.files).rows else None


def rows(lake: Lake) -> pa.Table:
    with lake.snapshot() as snapshot:
        return snapshot.cursor.execute(
            'SELECT * FROM lake.events ORDER BY "block", "row"'
        ).to_arrow_table()


def positions(lake: Lake) -> list[tuple[int, int]]:
    found = rows(lake)
    return list(zip(found["block"].to_pylist(), found["row"].to_pylist(), strict=True))


def test_rows_come_back_as_they_went_in(lake: Lake) -> None:
    blocks = list(World(people=300).blocks(6, rows=200))
    seal(lake, blocks[:4])
    seal(lake, blocks[4:])
    assert rows(lake).cast(arrow.SCHEMA).equals(arrow.table(blocks))
    assert lake.sealed() == 6


def test_a_file_is_sorted_by_person_and_position(lake: Lake) -> None:
    file = write(lake, list(World(people=30).blocks(3, rows=100)))
    keys = pq.read_table(file, columns=["amplitude_id", "block", "row"]).to_pylist()
    assert [tuple(key.values()) for key in keys] == sorted(tuple(key.values()) for key in keys)


def test_blocks_without_rows_are_sealed_too(lake: Lake) -> None:
    empty = World().block(1, 0)
    assert write(lake, [empty]) is None
    seal(lake, [empty])
    assert lake.sealed() == 1
    assert rows(lake).num_rows == 0
    assert lake.event_files() == []


def test_merges_are_adopted_with_their_rows(lake: Lake) -> None:
    event = {"event_type": "e", "user_id": "user-1"}
    seal(lake, [block_of([event], merges=[Merge(0, 7, 5, 6, 1000)])])
    with lake.snapshot() as snapshot:
        found = snapshot.cursor.execute("SELECT * FROM lake.merges").fetchall()
    assert [one[:7] for one in found] == [(7, 5, 6, 0, 1, 0, 1000)]


def test_a_vocabulary_too_large_to_repeat_comes_back_the_same(lake: Lake) -> None:
    event = {"event_type": "e", "user_id": "user-1"}
    blocks = [
        block_of([event], number=number, table={"ip_address": f"10.0.{number}"})
        for number in range(1, 1200)
    ]
    seal(lake, blocks)
    assert rows(lake).cast(arrow.SCHEMA).equals(arrow.table(blocks))


def test_a_lake_opens_again_where_it_was_moved(lake: Lake, tmp_path: Path) -> None:
    blocks = list(World(people=30).blocks(2, rows=50))
    seal(lake, blocks)
    lake.delete(7, [FIRST_PERSON])
    before = positions(lake)
    lake.close()
    shutil.move(tmp_path / "lake", tmp_path / "it's moved")
    again = Lake.open(tmp_path / "it's moved")
    assert positions(again) == before
    seal(again, [World().block(3, 10)])
    assert again.sealed() == 3
    again.close()


# Snapshots.


def test_a_snapshot_holds_still_while_files_come_and_are_swapped(lake: Lake) -> None:
    world = World(people=100)
    for number in range(1, 4):
        seal(lake, [world.block(number, 50)])
    with lake.snapshot() as old:
        before = old.cursor.execute("SELECT * FROM lake.events ORDER BY ALL").fetchall()
        files = lake.event_files()
        assert lake.swap(files, merge(lake, files))
        seal(lake, [world.block(4, 50)])
        lake.delete(7, [FIRST_PERSON + 1])
        # The old files are there as long as somebody may read them.
        assert all(file.path.exists() for file in files)
        assert old.cursor.execute("SELECT * FROM lake.events ORDER BY ALL").fetchall() == before
        assert old.sealed == 3
        with lake.snapshot() as new:
            assert new.sealed == 4
    seal(lake, [world.block(5, 1)])
    assert not any(file.path.exists() for file in files)


def test_every_snapshot_has_exactly_the_rows_up_to_its_sealed_block(lake: Lake) -> None:
    """Readers look without pause while blocks are adopted and files are swapped."""
    world = World(people=100)
    done = threading.Event()
    all_look = threading.Barrier(4, timeout=PATIENCE_S)
    wrong: list[object] = []

    def look() -> None:
        with lake.snapshot() as snapshot:
            found = snapshot.cursor.execute(
                'SELECT "block", count(*), count(DISTINCT "row") FROM lake.events GROUP BY ALL ORDER BY ALL'
            ).fetchall()
            if found != [(number, 20, 20) for number in range(1, snapshot.sealed + 1)]:
                wrong.append((snapshot.sealed, found))

    def read() -> None:
        look()
        all_look.wait()
        while not done.is_set():
            look()

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    all_look.wait()
    try:
        for number in range(1, 13):
            seal(lake, [world.block(number, 20)])
            if number % 4 == 0:
                files = lake.event_files()
                assert lake.swap(files, merge(lake, files))
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert not wrong


# Deletion and compaction.


def test_deleting_people_takes_their_rows_of_that_project_alone(lake: Lake) -> None:
    event = {"event_type": "e", "user_id": "user-1"}
    seal(lake, [block_of([event] * 3, people=[1, 2, 1], merges=[Merge(0, 7, 2, 1, 0)])])
    seal(lake, [block_of([event] * 2, people=[1, 3], project=8, number=2)])
    assert lake.delete(7, [1, 99]) == 2
    assert positions(lake) == [(1, 1), (2, 0), (2, 1)]
    assert lake.delete(7, [1]) == 0
    with lake.snapshot() as snapshot:
        assert snapshot.cursor.execute("SELECT count(*) FROM lake.merges").fetchall() == [(0,)]


def test_deleting_people_takes_what_is_hidden_of_them(lake: Lake) -> None:
    rows = [
        ({"user_id": "user-1", "device_id": "other"}, 0, Kind.DISPLACED),
        ({"device_id": "device-1"}, 0, Kind.DISPLACED),
        ({"user_id": "user-2", "device_id": "device-1"}, 0, Kind.DISPLACED),
        ({"device_id": "device-2"}, 0, Kind.DISPLACED),
        ({"user_id": "user-1", "device_id": "device-1"}, 1, Kind.EVENT),
        ({"user_id": "user-2", "device_id": "device-2"}, 2, Kind.EVENT),
        ({"device_id": "device-1"}, 0, Kind.GROUP_IDENTIFY),
        # Of the import that was undone she had another number, also where she was not named.
        ({"user_id": "user-1", "device_id": "device-3"}, 3, Kind.UNDONE),
        ({"device_id": "device-3"}, 3, Kind.UNDONE),
        ({"device_id": "device-1"}, 4, Kind.UNDONE),
        ({"device_id": "device-4"}, 1, Kind.UNDONE),
        ({"user_id": "user-2", "device_id": "device-1"}, 2, Kind.UNDONE),
        ({"device_id": "device-3"}, 3, Kind.EVENT),
        # Another user had her number before, and a third one the number that she had.
        ({"user_id": "user-3", "device_id": "device-5"}, 1, Kind.UNDONE),
        ({"user_id": "user-3", "device_id": "device-5"}, 0, Kind.DISPLACED),
        ({"device_id": "device-5"}, 0, Kind.DISPLACED),
        ({"user_id": "user-4", "device_id": "device-6"}, 3, Kind.UNDONE),
    ]
    events = [{"event_type": "e", **ids} for ids, _, _ in rows]
    people = [person for _, person, _ in rows]
    kinds = [kind for _, _, kind in rows]
    seal(lake, [block_of(events, people=people, kinds=kinds)])
    seal(lake, [block_of(events, people=people, kinds=kinds, project=8, number=2)])
    assert lake.delete(7, [1]) == 8
    left = [2, 3, 5, 6, 11, 12, 14, 15, 16]
    assert [row for block, row in positions(lake) if block == 1] == left
    assert [row for block, row in positions(lake) if block == 2] == list(range(17))
    assert lake.delete(7, [1]) == 0


def test_deleted_rows_leave_the_disk_with_the_next_compaction(lake: Lake) -> None:
    blocks = list(World(people=20).blocks(2, rows=100))
    seal(lake, blocks)
    lake.delete(7, [FIRST_PERSON, FIRST_PERSON + 1])
    before = positions(lake)
    chosen = compact.choose(lake.event_files())
    assert len(chosen) == 1
    assert lake.swap(chosen, merge(lake, chosen))
    assert positions(lake) == before
    (file,) = lake.event_files()
    assert file.deleted is None
    assert file.rows == len(before) < 200
    assert FIRST_PERSON not in pq.read_table(file.path)["amplitude_id"].to_pylist()
    assert compact.choose(lake.event_files()) == []


def test_a_compaction_is_given_up_if_rows_were_deleted_meanwhile(lake: Lake) -> None:
    for number in (1, 2):
        seal(lake, [World(people=10).block(number, 50)])
    files = lake.event_files()
    merged = merge(lake, files)
    lake.delete(7, [FIRST_PERSON])
    before = positions(lake)
    assert not lake.swap(files, merged)
    assert positions(lake) == before


def catalog_of(lake: Lake) -> dict[str, list[tuple[object, ...]]]:
    """What the catalog says of files, but for their names and sizes, which a name is in, and the time."""
    columns = {
        "snapshot": "snapshot_id, schema_version, next_catalog_id, next_file_id",
        "snapshot_changes": "*",
        "data_file": "* EXCLUDE (path)",
        "delete_file": "data_file_id, begin_snapshot, end_snapshot",
        "file_column_stats": "*",
        "table_stats": "*",
        "table_column_stats": "*",
    }
    return {
        table: lake._db.execute(
            f"SELECT {chosen} FROM {CATALOG}.ducklake_{table} ORDER BY ALL"
        ).fetchall()
        for table, chosen in columns.items()
    }


@pytest.mark.parametrize("deleted", [False, True])
def test_a_swap_leaves_the_catalog_as_ducklake_itself_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, deleted: bool
) -> None:
    found = []
    for way in ("ours", "theirs"):
        lake = Lake.open(tmp_path / way)
        world = World(people=20)
        for number in (1, 2, 3):
            seal(lake, [world.block(number, 100)])
        if deleted:
            lake.delete(7, [FIRST_PERSON])
        with lake.snapshot() as pinned, monkeypatch.context() as patch:
            if way == "theirs":
                patch.setattr(ducklake, "put_in_place", lambda *_: False)
            old = lake.event_files()[:2]
            before = positions(lake)
            assert lake.swap(old, merge(lake, old))
            assert positions(lake) == before
            assert len(pinned.cursor.execute("SELECT * FROM lake.events").fetchall()) == len(before)
            found.append(catalog_of(lake))
        seal(lake, [world.block(4, 100)])
        assert lake.delete(7, [FIRST_PERSON + 1])
        after = positions(lake)
        assert FIRST_PERSON + 1 not in rows(lake)["amplitude_id"].to_pylist()
        lake.close()
        lake = Lake.open(tmp_path / way)
        assert positions(lake) == after
        files = lake.event_files()
        named = {path for one in files for path in (one.path, one.deleted) if path}
        assert set(lake.files.list(lake.events)) == named
        assert len(files) == 3
        lake.close()
    assert found[0] == found[1]


def test_a_file_with_columns_that_the_catalog_never_met_is_ducklakes_to_take(lake: Lake) -> None:
    seal(lake, [World(people=10).block(1, 50)])
    (old,) = lake.event_files()
    other = lake.new_file(1, 1)
    pq.write_table(pq.read_table(old.path).drop_columns(["updates_max"]), other)
    before = catalog_of(lake)
    assert not put_in_place(lake._db, [old], other, pq.read_metadata(other))
    assert catalog_of(lake) == before


def test_a_file_of_which_every_row_was_deleted_goes(lake: Lake) -> None:
    seal(lake, [block_of([{"event_type": "e", "user_id": "user-1"}], people=[1])])
    assert lake.delete(7, [1]) == 1
    assert lake.event_files() == []
    assert lake.sealed() == 1


def test_a_file_that_lasts_is_packed_closer_and_reads_the_same(tmp_path: Path) -> None:
    blocks = list(World(people=30).blocks(3, rows=500))
    found = {}
    for lasting in (False, True):
        path = tmp_path / f"{lasting}.parquet"
        parquet.write(path, parquet.in_order(blocks), Files(), lasting=lasting)
        found[pq.read_metadata(path).row_group(0).column(0).compression] = path
    assert found["ZSTD"].stat().st_size < found["LZ4"].stat().st_size
    passing, lasts = (
        pa.concat_tables(parquet.read(found[codec], None)) for codec in ("LZ4", "ZSTD")
    )
    assert lasts.equals(passing)


def test_ids_are_words_where_people_have_many_rows_and_every_mix_merges_the_same(
    tmp_path: Path,
) -> None:
    """Of people with a row each they stand as text, as in files of before there were such words."""
    few, many = World(people=5), World(people=100_000)
    blocks = [world.block(number, 400) for number, world in enumerate((few, few, many), 1)]
    blocks[:2] = [replace(one, table=bytes(4 * 400), tables=one.tables[:1]) for one in blocks[:2]]
    paths = [tmp_path / f"{block.number}.parquet" for block in blocks]
    for path, block in zip(paths, blocks, strict=True):
        parquet.write(path, parquet.in_order([block]), Files())

    def coded(path: Path) -> list[bool]:
        schema = pq.read_schema(path)
        return [pa.types.is_dictionary(schema.field(name).type) for name in REPEATED]

    assert [all(coded(path)) for path in paths] == [True, True, False]
    assert not any(coded(paths[2]))
    expected = arrow.table(blocks).sort_by([(name, "ascending") for name in compact.KEY])
    for some, words in ((paths, True), ([paths[2], paths[0]], True), ([paths[2]], False)):
        schema = parquet.coding_of(some)
        sources = [parquet.read(path, None, schema) for path in some]
        merged = tmp_path / "merged.parquet"
        parquet.write(merged, compact.merge(sources), Files(), group_rows=150)
        assert coded(merged) == [words] * len(REPEATED)
        blocks_of = pa.array([int(path.stem) for path in some])
        rows = expected.filter(pc.is_in(expected["block"], blocks_of))
        assert pq.read_table(merged).cast(rows.schema).equals(rows)
        found = duckdb.sql(f"FROM '{merged}'").to_arrow_table()
        assert found.cast(rows.schema).equals(rows)


def test_a_large_file_is_synced_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left for the last sync is little, so no commit waits long for it."""
    sizes: list[int] = []

    class Weighing(Files):
        def sync_file(self, path: Path) -> None:
            sizes.append(path.stat().st_size)
            super().sync_file(path)

    monkeypatch.setattr(parquet, "LAKE_SYNC_BYTES", step := 20_000)
    path = tmp_path / "some.parquet"
    blocks = list(World(people=30).blocks(8, rows=500))
    parquet.write(path, parquet.in_order(blocks), Weighing(), group_rows=100)
    assert sizes == sorted(sizes)
    assert sizes[-1] == path.stat().st_size
    assert len(sizes) > sizes[-1] // (3 * step) > 3


# What a start reads.


def test_rows_for_duplicates_come_in_order_of_position(lake: Lake) -> None:
    blocks = list(World(people=30).blocks(4, rows=30))
    seal(lake, blocks[:2])
    seal(lake, blocks[2:])
    found = pa.Table.from_batches(lake.dedupe_rows(2, 3))
    expected = arrow.table(blocks[1:3]).select(found.schema.names)
    assert found.cast(expected.schema).equals(expected)


def test_the_quota_counts_the_last_day_by_hour(lake: Lake) -> None:
    events = [
        {"event_type": "e", "device_id": "device-1"},
        {"event_type": "e", "user_id": "user-1", "device_id": "device-1"},
    ]
    block = block_of(events)
    seal(lake, [block])
    hour = block.server_upload_ms // 3_600_000
    devices, users = lake.quota_rows(7, block.server_upload_ms)
    assert (devices, users) == ([(hour, {"device-1": 2})], [(hour, {"user-1": 1})])
    assert lake.quota_rows(7, block.server_upload_ms + 24 * 3_600_000) == ([], [])
    assert lake.quota_rows(8, block.server_upload_ms) == ([], [])


# Order of effects, and what failures leave.


class Recorded(Files):
    """Writes down what is asked of the file system; fails where a test says so."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.fails: str | None = None

    def _note(self, what: str, path: Path) -> None:
        self.calls.append((what, path.name))
        if self.fails == what:
            raise store_error(OSError(errno.EIO, os.strerror(errno.EIO)), path)

    def sync_file(self, path: Path) -> None:
        self._note("sync_file", path)
        super().sync_file(path)

    def sync_folder(self, path: Path) -> None:
        self._note("sync_folder", path)
        super().sync_folder(path)

    def committing(self, path: Path) -> None:
        self._note("commit", path)


@pytest.fixture
def recorded(tmp_path: Path) -> Iterator[tuple[Lake, Recorded]]:
    files = Recorded()
    lake = Lake.open(tmp_path / "lake", files)
    files.calls.clear()
    yield lake, files
    lake.close()


def test_a_file_and_its_name_are_on_disk_before_the_catalog_names_it(
    recorded: tuple[Lake, Recorded],
) -> None:
    lake, files = recorded
    seal(lake, [World().block(1, 10)])
    (file,) = lake.event_files()
    assert files.calls == [
        ("sync_file", file.path.name),
        ("sync_folder", "events"),
        ("commit", "lake"),
        ("sync_folder", "lake"),
    ]
    files.calls.clear()
    assert lake.swap([file], merge(lake, [file]))
    (file,) = lake.event_files()
    assert files.calls == [
        ("sync_file", file.path.name),
        ("sync_folder", "events"),
        ("commit", "lake"),
        ("sync_folder", "lake"),
    ]


def test_the_places_of_deleted_rows_are_on_disk_before_the_catalog_names_them(
    recorded: tuple[Lake, Recorded],
) -> None:
    lake, files = recorded
    seal(lake, [World(people=5).block(1, 50)])
    for person in (FIRST_PERSON, FIRST_PERSON + 1):
        files.calls.clear()
        lake.delete(7, [person])
        (file,) = lake.event_files()
        assert file.deleted is not None
        assert files.calls == [
            ("sync_file", file.deleted.name),
            ("sync_folder", "events"),
            ("commit", "lake"),
            ("sync_folder", "lake"),
        ]


@pytest.mark.parametrize("step", ["sync_file", "sync_folder", "commit"])
def test_a_failing_disk_changes_nothing(recorded: tuple[Lake, Recorded], step: str) -> None:
    lake, files = recorded
    blocks = list(World(people=5).blocks(2, rows=20))
    seal(lake, blocks[:1])
    before = positions(lake)
    files.fails = step
    with pytest.raises(StoreError, match="Input/output error"):
        seal(lake, blocks[1:])
    with pytest.raises(StoreError, match="Input/output error"):
        lake.delete(7, [FIRST_PERSON])
    files.fails = None
    assert positions(lake) == before
    assert lake.sealed() == 1
    seal(lake, blocks[1:])
    assert lake.sealed() == 2


def test_opening_removes_files_that_the_catalog_does_not_name(lake: Lake, tmp_path: Path) -> None:
    blocks = list(World(people=5).blocks(3, rows=20))
    seal(lake, blocks[:2])
    lake.delete(7, [FIRST_PERSON])
    before = positions(lake)
    named = set(lake.files.list(tmp_path / "lake" / "files"))
    left = write(lake, blocks[2:])
    assert left is not None
    torn = lake.new_file(3, 3)
    torn.write_bytes(b"PAR1 half a file")
    lake.close()
    again = Lake.open(tmp_path / "lake")
    assert set(lake.files.list(tmp_path / "lake" / "files")) == named
    assert positions(again) == before
    again.close()


def test_a_missing_file_is_told_as_a_failing_store(lake: Lake) -> None:
    with pytest.raises(StoreError, match=r"The file system failed: .*No such file"):
        lake.adopt(lake.new_file(1, 1), block=1, merges=[])


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    problem = store_error(OSError(errno.ENOSPC, "No space left on device"), tmp_path)
    assert isinstance(problem, FullError)
    with pytest.raises(FullError, match="No room is left"):
        parquet.write(Path("/dev/full"), parquet.in_order([World().block(1, 10)]), Files())


def test_a_damaged_file_is_named(lake: Lake) -> None:
    file = lake.new_file(1, 1)
    file.write_bytes(b"PAR1 nothing")
    with pytest.raises(StoreError, match=r"cannot be read.*parquet"):
        list(parquet.read(file, None))
