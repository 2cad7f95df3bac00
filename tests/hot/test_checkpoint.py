"""The checkpoint finds what it is asked for by its keys, however many people it holds."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from retrofill.core.person import Person
from retrofill.hot.checkpoint import Changed, Checkpoint, Meta


def _filled(folder: Path) -> Checkpoint:
    checkpoint = Checkpoint(folder / "checkpoint.db")
    people = {number: Person(number) for number in range(1, 501)}
    ids = {f"id-{number}": number for number in people}
    new = Changed(ids, ids, people, {("org", name): {"size": 1} for name in ids}, {})
    checkpoint.save(Meta(block=1), {1: new}, block_times=[], times_after_ms=0)
    return checkpoint


_LOOKUPS: list[Callable[[Checkpoint], object]] = [
    lambda checkpoint: checkpoint.ids("devices", 1, ["id-7", "nobody"]),
    lambda checkpoint: checkpoint.ids("users", 1, ["id-7", "nobody"]),
    lambda checkpoint: checkpoint.people([7, 9_999]),
    lambda checkpoint: checkpoint.groups(1, [("org", "id-7"), ("org", "nobody")]),
]


@pytest.mark.parametrize("lookup", _LOOKUPS)
def test_a_lookup_searches_by_key(lookup: Callable[[Checkpoint], object], tmp_path: Path) -> None:
    checkpoint = _filled(tmp_path)
    asked: list[str] = []
    reader = checkpoint._reader  # to see what SQLite is asked
    reader.set_trace_callback(asked.append)
    found = lookup(checkpoint)
    reader.set_trace_callback(None)
    assert len(found) == 1  # type: ignore[arg-type] # each gives a dict
    with sqlite3.connect(checkpoint.path) as other:
        plans = [row[3] for one in asked for row in other.execute("EXPLAIN QUERY PLAN " + one)]
    tables = [plan for plan in plans if "VIRTUAL TABLE" not in plan]
    assert tables
    for plan in tables:
        assert plan.startswith("SEARCH")
        assert any(key in plan for key in ("id=?", "value=?", "rowid=?")), plan
    checkpoint.close()
