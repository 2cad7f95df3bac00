"""Rows that a fold has changed are put into new files with what of them stayed the same."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrofill.engine import changed
from retrofill.engine.changed import DECIDED, Changed
from retrofill.lake import parquet
from retrofill.lake.arrow import FILE, SCHEMA
from retrofill.lake.compact import LakeFile
from retrofill.lake.files import Files
from retrofill.lake.history import COLUMNS, History

ROWS = 100
OUT_ROWS = [70, 1000]
OUT_FILES = 2


def row(seeded: random.Random, block: int, place: int) -> dict[str, object]:
    """A row of the lake with something in each column."""
    one: dict[str, object] = {
        field.name: seeded.choice([f'{{"{field.name}":{seeded.randrange(5)}}}', None])
        if pa.types.is_string(field.type)
        else seeded.randrange(100)
        for field in SCHEMA
    }
    person = seeded.randrange(1, 20)
    return one | {
        "project": 1,
        "partition": 0,
        "block": block,
        "row": place,
        "amplitude_id": person,
    }


def lake_file(
    folder: Path,
    seeded: random.Random,
    number: int,
    *,
    without: str = "",
    **others: Callable[[], object],
) -> LakeFile:
    """A lake file of several row groups; some of its rows are deleted in every other one. others: makes columns."""
    rows = [
        row(seeded, number, place) | {name: made() for name, made in others.items()}
        for place in range(ROWS)
    ]
    rows.sort(key=lambda one: (one["amplitude_id"], one["row"]))
    table = pa.Table.from_pylist(rows, SCHEMA)
    columns = [
        table[field.name].dictionary_encode()
        if pa.types.is_dictionary(field.type)
        else table[field.name]
        for field in FILE
    ]
    path = folder / parquet.file_name(number, number)
    parquet.write(path, [pa.Table.from_arrays(columns, schema=FILE)], Files(), group_rows=30)
    if without:  # as an older version wrote it
        pq.write_table(pq.read_table(path).drop_columns([without]), path, row_group_size=30)
    deleted = None
    if number % 2:
        deleted = folder / f"deleted-{number}.parquet"
        gone = sorted(seeded.sample(range(ROWS), 20))
        pq.write_table(pa.table({"pos": pa.array(gone, pa.int64())}), deleted)
    return LakeFile(path, ROWS, number, number, deleted)


@pytest.mark.parametrize("seed", range(6))
def test_what_differs_is_written_and_nothing_else(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, bound in (
        ("REFOLD_FILE_ROWS", 37),
        ("REFOLD_ASIDE_ROWS", 23),
        ("REFOLD_ASIDE_BATCH_ROWS", 11),
        ("REFOLD_OUT_ROWS", OUT_ROWS[seed % 2]),
        ("REFOLD_OUT_FILES", OUT_FILES),
    ):
        monkeypatch.setattr(changed, name, bound)
    seeded = random.Random(seed)
    sources, out = tmp_path / "sources", tmp_path / "out"
    for folder in (sources, out):
        folder.mkdir()
    files = [
        lake_file(sources, seeded, number, without="plan" if number == 2 else "")
        for number in range(1, 5)
    ]
    history = History(tmp_path / "spill")
    used = history.use(files)
    found = history.ask(f"SELECT {COLUMNS}, file, place FROM events ORDER BY row, block")
    stored = found.to_arrow_table().to_pylist()
    history.close()
    assert len(stored) == 4 * ROWS - 2 * 20
    share = seeded.choice([0.01, 0.3, 1])
    subject, expected = Changed(tmp_path), []
    for first in range(0, len(stored), 25):
        some = [one for one in stored[first : first + 25] if seeded.random() < share]
        for one in some:
            other = row(seeded, 0, 0)
            one.update({name: other[name] for name in seeded.sample(DECIDED, 5)})
        expected += some
        if some:
            subject.add(pa.Table.from_pylist(some))
    written = subject.write(used, out)
    outgoing = [
        [(one["block"], one["row"]) for one in some.to_pylist()] for some in subject.outgoing()
    ]
    file_of = {(one["block"], one["row"]): one["file"] for one in expected}
    assert sorted(itertools.chain(*outgoing)) == sorted(file_of)
    files_of = [{file_of[place] for place in some} for some in outgoing]
    assert sum(map(len, files_of)) == len(set(file_of.values()))  # each file's at once
    for some, files_there in zip(outgoing, files_of, strict=True):
        assert len(some) <= OUT_ROWS[seed % 2] or len(files_there) == 1
        assert len(files_there) <= OUT_FILES
    assert sorted(out.iterdir()) == sorted(written)
    rows = []
    for path in written:
        whole = pq.read_table(path)
        assert whole.schema.equals(FILE)
        order = [(one["amplitude_id"], one["block"], one["row"]) for one in whole.to_pylist()]
        assert order == sorted(order)
        rows += whole.to_pylist()
    assert len(expected) < 40 or len(written) > 1
    by_place = {(one["block"], one["row"]): one for one in rows}
    assert len(by_place) == len(rows) == len(expected)
    for one in expected:
        place = one["block"], one["row"]
        del one["file"], one["place"]
        assert by_place[place] == one
    assert list(subject.outgoing()) == []  # each was told
    assert not list(tmp_path.glob("changed-*"))
