"""What is folded again comes out of lake files in order of position, whatever files, row groups and runs it stands in."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tests.engine.test_changed import lake_file

from retrofill.core.block import Kind
from retrofill.errors import StoreError
from retrofill.lake import arrival
from retrofill.lake.arrival import Wanted, in_arrival, positions
from retrofill.lake.arrow import SCHEMA
from retrofill.lake.compact import LakeFile
from retrofill.lake.history import COLUMNS, History

NAMES = [name for name in SCHEMA.names if name != "event_properties"]


def stored(files: list[LakeFile], folder: Path) -> list[dict[str, object]]:
    history = History(folder / "spill")
    used = history.use(files)
    found = history.ask(f'SELECT {COLUMNS}, file, place FROM events ORDER BY "block", "row"')
    rows = found.to_arrow_table().to_pylist()
    history.close()
    for one in rows:  # `use` numbers files in an order of its own
        one["file"] = files.index(used[int(one["file"])])
    return rows


KINDS = [Kind.EVENT] * 6 + [Kind.IDENTIFY, Kind.GROUP_IDENTIFY, Kind.DISPLACED, Kind.UNDONE]


def files_of(seeded: random.Random, folder: Path) -> list[LakeFile]:
    return [
        lake_file(
            folder,
            seeded,
            number,
            without="plan" if number == 2 else "",
            # One without hidden rows and group identifies.
            kind=partial(seeded.choice, KINDS[:7] if number == 3 else KINDS),
            project=partial(seeded.choice, [1, 1, 1, 2]),
        )
        for number in range(1, 6)
    ]


def is_wanted(one: dict[str, object], wanted: Wanted, displaced: list[dict[str, object]]) -> bool:
    block, kind = one["block"], one["kind"]
    assert isinstance(block, int)
    name, first, last = wanted.undone
    return (
        one["project"] == wanted.project
        and wanted.after < block <= wanted.until
        and (
            kind == Kind.GROUP_IDENTIFY
            or (kind == Kind.DISPLACED and one in displaced)
            or (kind == Kind.UNDONE and one["import_id"] == name and first < block <= last)
            or (kind in (Kind.EVENT, Kind.IDENTIFY) and one["amplitude_id"] in wanted.people)
        )
    )


@pytest.mark.parametrize("seed", range(8))
def test_what_is_wanted_comes_in_order_and_nothing_else(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded = random.Random(seed)
    monkeypatch.setattr(arrival, "REFOLD_SORT_BYTES", seeded.choice([2_000, 20_000, 10**9]))
    for name in ("REFOLD_ROWS", "REFOLD_GROUP_ROWS"):
        monkeypatch.setattr(arrival, name, 7)
    files = files_of(seeded, tmp_path)
    every = stored(files, tmp_path)
    theirs = [one for one in every if (one["kind"], one["project"]) == (Kind.DISPLACED, 1)]
    displaced = seeded.sample(theirs, len(theirs) // 2)
    types = pa.schema([("block", pa.int64()), ("row", pa.int32())])
    wanted = Wanted(
        1,
        *seeded.choice([(0, 9), (1, 4), (3, 3), (4, 5)]),
        people=np.array(sorted(seeded.sample(range(1, 20), seeded.choice([0, 1, 19]))), np.int64),
        displaced=np.sort(positions(pa.Table.from_pylist(displaced, types))),
        undone=(seeded.choice(sorted({str(one["import_id"]) for one in every})), 1, 4),
    )
    parts = list(in_arrival(files, wanted, NAMES, tmp_path, of_hidden=["event_properties"]))
    here = {"file": pa.int32(), "place": pa.int64()}
    for part in parts:
        for field in part.schema:
            assert field.type == (here.get(field.name) or SCHEMA.field(field.name).type)
    expected = [one for one in every if is_wanted(one, wanted, displaced)]
    for one in expected:
        if one["kind"] not in (Kind.DISPLACED, Kind.UNDONE):
            one["event_properties"] = None
    assert [one for part in parts for one in part.to_pylist()] == expected
    assert not list(tmp_path.glob("run-*"))


def test_a_long_text_that_many_say_is_held_once_beside_others_that_differ(tmp_path: Path) -> None:
    """Written out for every row it would be a hundred times as large as what is counted."""
    seeded, chars = random.Random(1), 500_000
    others = {"kind": lambda: Kind.EVENT, "project": lambda: 1}
    files = [
        lake_file(tmp_path, seeded, 1, sent=lambda: "x" * chars, **others),
        lake_file(tmp_path, seeded, 2, sent=lambda: str(seeded.random()), **others),
    ]
    people = np.arange(1, 20)
    wanted = Wanted(1, 0, 9, people, displaced=np.zeros(0, np.int64), undone=("", 0, 0))
    before = pa.total_allocated_bytes()
    rows = in_arrival(files, wanted, NAMES, tmp_path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(arrival, "REFOLD_ROWS", 5)
        long = sum(len(text) == chars for text in next(rows)["sent"].to_pylist())
        assert pa.total_allocated_bytes() - before < 25 * chars
        for part in rows:
            long += sum(len(text) == chars for text in part["sent"].to_pylist())
    assert long > 50


def test_a_run_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when no room is left: the change is not to blame."""
    monkeypatch.setattr(arrival, "REFOLD_SORT_BYTES", 1)
    files = files_of(random.Random(1), tmp_path)
    wanted = Wanted(1, 0, 9, np.arange(20), np.zeros(0, np.int64), undone=("", 0, 0))
    with pytest.raises(StoreError, match="file system"):
        next(in_arrival(files, wanted, NAMES, tmp_path / "gone"))
