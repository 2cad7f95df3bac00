"""One person's rows, read without a statement, are those of the whole lake filtered."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from tests.lake.blocks import FIRST_PERSON, World
from tests.lake.test_ducklake import merge, rows, seal, write

from retrofill.core.block import Kind
from retrofill.errors import StoreError
from retrofill.lake import Lake, Snapshot, arrow, parquet
from retrofill.lake.person import Footers, footer_of

PROJECT = 7
KINDS = (Kind.EVENT, Kind.IDENTIFY)


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lake]:
    """Three files of many row groups, rows of two projects, some of them deleted."""
    monkeypatch.setitem(parquet.write.__kwdefaults__, "group_rows", 70)
    opened = Lake.open(tmp_path / "lake")
    blocks = list(World(people=40).blocks(9, rows=100))
    for first in (0, 3, 6):
        seal(opened, blocks[first : first + 3])
    opened.delete(PROJECT, [FIRST_PERSON + 3])
    yield opened
    opened.close()


def found(snapshot: Snapshot, people: list[int], kinds: tuple[int, ...] = KINDS) -> list[Any]:
    tables = []
    for part, some in snapshot.parts(PROJECT, people, kinds, ("block", "row")):
        every = part.read(arrow.SCHEMA.names)
        assert every.schema == arrow.SCHEMA
        assert every.select(["block", "row"]) == some
        last = np.array([len(some) - 1, 0])
        assert part.read(["row"], last) == some.select(["row"]).take(pa.array(last))
        tables.append(every)
    whole = pa.concat_tables(tables) if tables else arrow.SCHEMA.empty_table()
    return in_order(whole)


def in_order(table: pa.Table) -> list[Any]:
    return table.sort_by([("block", "ascending"), ("row", "ascending")]).to_pylist()


def test_the_rows_of_some_people_are_those_of_the_lake_filtered(lake: Lake) -> None:
    every = rows(lake)
    ids = sorted(set(every["amplitude_id"].to_pylist()))
    assert len(ids) > 20
    asked = [[one] for one in ids] + [ids[:2], [ids[-1], ids[0], ids[-1]], ids, [FIRST_PERSON + 3]]
    with lake.snapshot() as snapshot:
        for kinds in ((Kind.EVENT,), KINDS):
            ours = every.filter(
                pc.and_(
                    pc.equal(every["project"], PROJECT),
                    pc.is_in(every["kind"], pa.array(kinds, pa.uint8())),
                )
            )
            for people in asked:
                right = pc.is_in(ours["amplitude_id"], pa.array(people, pa.int64()))
                assert found(snapshot, people, kinds) == in_order(ours.filter(right))


def test_columns_without_a_value_are_known_and_not_read(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = parquet.pq.ParquetFile.iter_batches

    def watched(file: Any, size: int, groups: list[int], columns: list[str], **rest: Any) -> Any:
        asked.extend(columns)
        return real(file, size, groups, columns, **rest)

    monkeypatch.setattr(parquet.pq.ParquetFile, "iter_batches", watched)
    for file in lake.event_files():
        whole = parquet.pq.read_table(file.path)
        empty = {name for name in whole.column_names if whole[name].null_count == len(whole)}
        assert {"import_id", "partner_id"} <= empty < set(whole.column_names)
        assert parquet.empty_of(parquet.pq.read_metadata(file.path)) == empty
        asked.clear()
        with lake.snapshot() as snapshot:
            ids = whole["amplitude_id"].unique().to_pylist()
            parts = [one for one in snapshot.parts(PROJECT, ids, KINDS, ()) if one[0].file == file]
            for part, _ in parts:
                assert part.read(["plan"])["plan"].to_pylist() == [None] * len(part.places)
                part.read(arrow.SCHEMA.names)
        assert parts
        assert asked
        assert empty.isdisjoint(asked)


def test_nobody_and_the_unknown_have_no_rows(lake: Lake) -> None:
    with lake.snapshot() as snapshot:
        for people in ([], [1], [2**62]):
            assert found(snapshot, people) == []
        assert list(snapshot.parts(PROJECT + 1000, [FIRST_PERSON], KINDS, ("row",))) == []


def test_a_snapshot_reads_the_files_that_it_saw(lake: Lake) -> None:
    person = rows(lake)["amplitude_id"][0].as_py()
    with lake.snapshot() as early:
        before = found(early, [person])
        old = lake.event_files()
        assert lake.swap(old, merge(lake, old))
        assert found(early, [person]) == before
    with lake.snapshot() as late:
        assert found(late, [person]) == before
    lake.delete(PROJECT, [person])
    with lake.snapshot() as late:
        assert found(late, [person]) == []


def test_footers_are_kept_up_to_a_bound(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [file.path for file in lake.event_files()]
    sizes = [parquet.pq.read_metadata(path).serialized_size for path in paths]
    read: list[Path] = []
    real = parquet.pq.read_metadata
    monkeypatch.setattr(parquet.pq, "read_metadata", lambda path: read.append(path) or real(path))
    footers = Footers(sizes[0] + sizes[1] + sizes[2] - 1)
    for path in (paths[0], paths[1], paths[0], paths[2], paths[0], paths[1]):
        footers.of(path)
    assert read == [paths[0], paths[1], paths[2], paths[1]]


def test_a_damaged_file_is_told_as_a_failing_store(lake: Lake) -> None:
    blocks = list(World(people=5).blocks(12, rows=20))[9:]
    file = write(lake, blocks)
    assert file is not None
    file.write_bytes(b"nothing like it")
    with pytest.raises(StoreError, match="cannot be read"):
        Footers(1000).of(file)


def test_a_footer_is_let_go_where_nobody_looks_for_circles(lake: Lake) -> None:
    def kept() -> int:
        return sum(type(one) is parquet.pq.FileMetaData for one in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = kept()
        for file in lake.event_files():
            footer = footer_of(file.path)
            assert kept() == before + 1
            del footer
            assert kept() == before
    finally:
        gc.enable()
