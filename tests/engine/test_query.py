from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine.stored import FEW, PROJECT, Stored, block

from retrofill.core.block import Block, Kind
from retrofill.core.person import Person
from retrofill.engine import query
from retrofill.engine.query import Reader, Snapshot, View


def _history(blocks: int = 6, rows: int = 3) -> list[Block]:
    return [
        block(number, [{"person": 1 + row, "insert_id": f"{number}.{row}"} for row in range(rows)])
        for number in range(1, blocks + 1)
    ]


def _positions(view: View) -> list[tuple[int, int]]:
    return sorted(view.ask(f"SELECT block, row FROM {view.source(('block', 'row'))}").fetchall())


EVERY = [(number, row) for number in range(1, 7) for row in range(3)]


@pytest.mark.parametrize("sealed", [0, 1, 5, 6])
def test_a_view_has_each_row_once_wherever_it_lies(tmp_path: Path, sealed: int) -> None:
    assert Stored(tmp_path, _history(), sealed=sealed).ask(_positions) == EVERY


def test_a_view_keeps_what_it_saw_while_blocks_are_sealed(tmp_path: Path) -> None:
    stored = Stored(tmp_path, _history(), sealed=2)
    with stored.reader.view(PROJECT) as view:
        stored.seal(6)
        assert _positions(view) == EVERY
    assert stored.ask(_positions) == EVERY


def test_what_was_read_while_late_events_were_folded_again_is_read_anew(tmp_path: Path) -> None:
    stored = Stored(tmp_path, _history(), sealed=6)
    settles = [0]
    found: list[Any] = []

    class Lake:
        @contextlib.contextmanager
        def snapshot(self) -> Iterator[Snapshot]:
            with stored.lake.snapshot() as pinned:
                found.append(pinned)
                settles[0] += len(found) == 1  # after the pin, and nothing is late any more
                yield pinned

    def person(_: int, amplitude_id: int) -> Person:
        one = Person(amplitude_id)
        found.append(one)
        settles[0] += len(found) == 1
        return one

    reader = Reader(
        Lake(),
        stored,
        last_block=lambda: 6,
        person=person,
        aliases=lambda _: {},
        pin=stored.pin,
        settles=lambda _: settles[0],
    )
    with reader.view(PROJECT) as view:
        assert _positions(view) == EVERY
        assert len(found) == 2
    found.clear()
    assert reader.person(PROJECT, 1) is found[1]


def test_a_view_has_nothing_that_came_later(tmp_path: Path) -> None:
    stored = Stored(tmp_path, _history(), sealed=2)
    stored.last = 4
    with stored.reader.view(PROJECT) as view:
        stored.last = 6
        assert _positions(view) == EVERY[:12]
    assert stored.ask(_positions) == EVERY


def test_a_second_view_takes_what_the_first_one_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Stored(tmp_path, _history(), sealed=1)
    stored.last = 4
    assert stored.ask(_positions) == EVERY[:12]
    stored.last = 6
    built: list[int] = []
    make = query.arrow.batch
    monkeypatch.setattr(query.arrow, "batch", lambda one: built.append(one.number) or make(one))
    assert stored.ask(_positions) == EVERY
    assert built == [5, 6]


def test_what_was_built_of_sealed_blocks_is_let_go_though_nobody_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Stored(tmp_path, _history(), sealed=1)
    built: list[int] = []
    make = query.arrow.batch
    monkeypatch.setattr(query.arrow, "batch", lambda one: built.append(one.number) or make(one))
    with stored.reader.view(PROJECT) as early:
        assert _positions(early) == _positions(early) == EVERY
        assert built == [2, 3, 4, 5, 6]
        stored.seal(6)
        stored.reader.sealed(6)
        assert _positions(early) == EVERY  # whoever reads still builds them again
    assert built == [2, 3, 4, 5, 6] * 2


def test_views_of_different_moments_share_what_is_built(tmp_path: Path) -> None:
    stored = Stored(tmp_path, _history(), sealed=1)
    stored.last = 4
    with stored.reader.view(PROJECT) as early:
        stored.seal(2)
        stored.last = 6
        assert stored.ask(_positions) == EVERY
        assert _positions(early) == EVERY[:12]


def test_what_does_not_fit_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "UNSEALED_KEPT_BYTES", 0)
    monkeypatch.setattr(query, "UNSEALED_CHUNK_ROWS", 4)
    stored = Stored(tmp_path, _history(), sealed=1)
    assert stored.ask(_positions) == stored.ask(_positions) == EVERY


def test_blocks_are_pinned_before_the_snapshot_and_let_go_after(tmp_path: Path) -> None:
    stored = Stored(tmp_path, _history(), sealed=3)
    with stored.reader.view(PROJECT):
        assert stored.pins == [3]
    assert stored.pins == []


def test_another_project_and_hidden_kinds_are_not_seen(tmp_path: Path) -> None:
    kinds = [
        Kind.EVENT,
        Kind.IDENTIFY,
        Kind.DISPLACED,
        Kind.DROPPED,
        Kind.ALIAS,
        Kind.GROUP_IDENTIFY,
    ]
    events = [{"user_id": "a user"} for _ in kinds]
    blocks = [block(1, events, kinds=kinds), block(2, events, project=8)]
    for sealed in (0, 2):
        stored = Stored(tmp_path / str(sealed), blocks, sealed=sealed)
        assert stored.ask(_positions) == [(1, 0)]


def test_a_missing_block_is_told_not_skipped(tmp_path: Path) -> None:
    stored = Stored(tmp_path, _history(), sealed=2)
    stored.blocks[4] = stored.blocks[5]
    with pytest.raises(Exception, match="block 4 is missing"):
        stored.ask(_positions)


@settings(
    max_examples=FEW,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    people=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=6), min_size=1, max_size=6),
    wanted=st.sets(st.integers(1, 5), min_size=1, max_size=2),
    dropped=st.integers(0, 40),
    warm=st.booleans(),
)
def test_the_rows_of_some_people_are_those_of_all_filtered(
    tmp_path_factory: pytest.TempPathFactory,
    people: list[list[int]],
    wanted: set[int],
    dropped: int,
    warm: bool,  # noqa: FBT001 - drawn by hypothesis, given by name
) -> None:
    blocks = []
    for number, some in enumerate(people, 1):
        kinds = [
            Kind.DROPPED if (number + row) % 7 == dropped % 7 else Kind.EVENT
            for row in range(len(some))
        ]
        events = [
            {"person": one, "insert_id": f"{number}.{row}", "shown": {"city": f"c{one}"}}
            for row, one in enumerate(some)
        ]
        blocks.append(block(number, events, kinds=kinds))
    stored = Stored(tmp_path_factory.mktemp("lake"), blocks)
    with stored.reader.view(PROJECT) as view:
        every = [row for table in view.tables() for row in table.to_pylist()] if warm else []
        found = view.rows_of(sorted(wanted)).to_pylist()
        every = every or [row for table in view.tables() for row in table.to_pylist()]
    assert found == [row for row in every if row["amplitude_id"] in wanted]
