"""A process that does not own the lake reads its files, many with delete files too, within its memory."""

from __future__ import annotations

import fcntl
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.engine.test_changed import lake_file

from retrofill.errors import FullError, StoreError
from retrofill.lake import history
from retrofill.lake.compact import LakeFile
from retrofill.lake.history import History


def left(file: LakeFile) -> list[tuple[int, int]]:
    """Return (block, row) of what a file holds, without DuckDB."""
    rows = pq.read_table(file.path, columns=["block", "row"]).to_pylist()
    gone = set()
    if file.deleted is not None:
        gone = set(pq.read_table(file.deleted)["pos"].to_pylist())
    return [(one["block"], one["row"]) for at, one in enumerate(rows) if at not in gone]


def test_files_with_deleted_rows_take_no_more_memory_however_many_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many stops in changes of history leave hundreds, which the next change must be able to read."""
    monkeypatch.setattr(history, "HISTORY_MEMORY_BYTES", 40 * 1024 * 1024)
    files = [lake_file(tmp_path, random.Random(one), one) for one in range(60)]
    assert sum(file.deleted is not None for file in files) == 30
    reader = History(tmp_path / "spill")
    used = reader.use(files)
    rows = reader.ask('SELECT "block", "row", file, place FROM events').fetchall()
    people = reader.ask("SELECT DISTINCT amplitude_id, device_id, user_id FROM events").fetchall()
    reader.close()
    assert sorted(one[:2] for one in rows) == sorted(one for file in files for one in left(file))
    for block, row, file, place in rows[::97]:
        stands = pq.read_table(used[file].path, columns=["block", "row"]).slice(place, 1)
        assert stands.to_pylist() == [{"block": block, "row": row}]
    assert people


def test_a_view_of_no_files_is_empty_and_one_of_others_takes_its_place(tmp_path: Path) -> None:
    reader = History(tmp_path / "spill")
    assert reader.ask("SELECT * FROM events").fetchall() == []
    for number in (1, 2, 3):
        file = lake_file(tmp_path, random.Random(number), number)
        assert reader.use([file]) == [file]
        found = reader.ask('SELECT "block", "row" FROM events').fetchall()
        assert sorted(found) == sorted(left(file))
    tails = [lake_file(tmp_path, random.Random(number), number) for number in (5, 7)]
    reader.use(tails, "tails")
    both = "SELECT block FROM events UNION ALL SELECT block FROM tails"
    blocks = pa.chunked_array([[block for (block,) in reader.ask(both).fetchall()]])
    assert blocks.unique().to_pylist() == [3, 5, 7]
    reader.close()


SORTED = "SELECT md5(range::VARCHAR) AS m FROM range(500000) ORDER BY m"
# What DuckDB and the file system really say, and what becomes of it.
WRONG: list[tuple[str, type[StoreError], str]] = [
    (SORTED, StoreError, "more than DuckDB may have, 8,000,000 bytes of memory and 1,000,000"),
    (f"COPY ({SORTED}) TO '/dev/full' (FORMAT csv, USE_TMP_FILE false)", FullError, "No room"),
    ("SELECT * FROM read_parquet('/gone.parquet')", StoreError, "cannot be read or written"),
]


@pytest.mark.parametrize(("statement", "kind", "words"), WRONG)
@pytest.mark.parametrize("lazily", [False, True])
def test_what_memory_and_disk_do_not_give_is_told_with_how_to_mend_it(
    statement: str,
    kind: type[StoreError],
    words: str,
    lazily: bool,  # noqa: FBT001 - a parameter of the test
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        history, "HISTORY_MEMORY_BYTES", 8_000_000 if statement == SORTED else 10**9
    )
    monkeypatch.setattr(history, "LAKE_SPILL_BYTES", 1_000_000)
    reader = History(tmp_path / "spill")

    def read() -> list[pa.RecordBatch]:
        found = reader.ask(statement)
        return list(found.to_arrow_reader(1000)) if lazily else [found.to_arrow_table()]

    with Path("/dev/full").open("wb") as disk:
        # DuckDB locks what it writes, and this disk is everybody's.
        fcntl.flock(disk, fcntl.LOCK_EX)
        with pytest.raises(StoreError) as problem, history.told(tmp_path):
            read()
        reader.close()
    assert type(problem.value) is kind
    assert words in problem.value.what
    assert "\n" not in problem.value.what
    assert problem.value.where == str(tmp_path)
    assert problem.value.mend


def test_a_full_disk_is_told_whoever_meets_it(tmp_path: Path) -> None:
    with pytest.raises(FullError), history.told(tmp_path):
        Path("/dev/full").write_bytes(b"x")
