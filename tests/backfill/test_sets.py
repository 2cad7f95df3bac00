"""A set gives back what was written, by any columns, packed or not."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from retrofill.backfill.direct import Room
from retrofill.backfill.feed import Block
from retrofill.backfill.sets import JSON, SCHEMA, TEXT, Set, SetWriter, gone_on
from retrofill.errors import CorruptError


def group(first: int, count: int) -> pa.RecordBatch:
    rows = range(first, first + count)
    columns = {
        "person": [row // 3 for row in rows],
        "seq": [*rows],
        "time_ms": [*rows],
        "device_id": [f"device-{row}" if row % 2 else None for row in rows],
        "user_id": ["zoë"] * count,
        "insert_id": [f"i-{row}" for row in rows],
        "event_type": ["Open"] * count,
        TEXT: [f',{{"n":{row},"é":"ü"}}' for row in rows],
        "bytes": [len(f'{{"n":{row},"é":"ü"}}'.encode()) for row in rows],
        "file": [0] * count,
        "line": [*rows],
    }
    (made,) = pa.table(columns, schema=SCHEMA).to_batches()
    return made


@pytest.fixture(params=[False, True], ids=["plain", "packed"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "set-0.rows"
    writer = SetWriter(path, packed=request.param)
    for first, count in ((0, 10), (10, 1), (11, 9)):
        writer.write(group(first, count))
    writer.close()
    return path


def test_a_set_gives_back_its_rows(path: Path) -> None:
    with Set(path) as one:
        assert (one.rows, one.groups, one.starts.tolist()) == (20, 3, [0, 10, 11, 20])
        assert [one.group_of(row) for row in (0, 9, 10, 11, 19)] == [0, 0, 1, 2, 2]
        assert one.column("seq").tolist() == list(range(20))
        found = pa.Table.from_batches([*one.batches([JSON, "line", "device_id", TEXT])])
        assert found[JSON].to_pylist() == [f'{{"n":{row},"é":"ü"}}' for row in range(20)]
        assert found[TEXT].to_pylist() == [f',{{"n":{row},"é":"ü"}}' for row in range(20)]
        assert found["device_id"].to_pylist()[:3] == [None, "device-1", None]
        parts = [(first, part["seq"].to_pylist()) for first, part in one.within(8, 13, ["seq"])]
        assert parts == [(8, [8, 9]), (10, [10]), (11, [11, 12])]


def test_each_choice_of_columns_gives_the_same_rows(path: Path) -> None:
    with Set(path) as one:
        whole = pa.Table.from_batches([*one.batches(SCHEMA.names)])
        assert whole == pa.Table.from_batches([group(0, 20)]).combine_chunks()
        for names in (
            ["person"],
            ["seq"],
            ["bytes"],
            ["line", "person"],
            ["user_id", TEXT],
            [TEXT],
        ):
            assert pa.Table.from_batches([*one.batches(names)]) == whole.select(names)


def test_rows_of_a_block_are_one_piece_of_what_was_read(path: Path) -> None:
    with Set(path) as one:
        rows = one.read(0, ["person", TEXT]).slice(2, 6)
        meter = [0]
        block = Block(0, 2, rows.column(TEXT), rows.column("person").to_numpy(), meter)
        assert bytes(block.text(1, 3)).decode() == '{"n":3,"é":"ü"},{"n":4,"é":"ü"}'
        assert meter[0] > 0
        del block
        assert meter == [0]


def test_a_set_that_is_cut_off_says_so(tmp_path: Path) -> None:
    path = tmp_path / "set-0.rows"
    writer = SetWriter(path, packed=False)
    writer.write(group(0, 5))
    writer.close()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        CorruptError, match=r"A set cannot be read: .*set-0\.rows.*Remove the stage"
    ):
        Set(path)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("rows", [0, 10, 11])
def test_a_set_that_was_begun_is_gone_on_with_behind_any_group(
    tmp_path: Path, rows: int, *, packed: bool
) -> None:
    groups = [group(0, 10), group(10, 1), group(11, 9)]
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    writer = SetWriter(whole, packed=packed)
    for one in groups:
        writer.write(one)
    writer.close()
    writer = SetWriter(begun, packed=packed)
    for one in groups[:2]:
        writer.write(one)
    with begun.open("ab") as file:
        file.write(b"half a group")  # of a process that was killed then
    writer = gone_on(begun, rows, packed=packed, room=Room())
    for one in groups:
        if one["seq"][0].as_py() >= rows:
            writer.write(one)
    writer.close()
    assert begun.read_bytes() == whole.read_bytes()
