"""What a rehearsal is told of a project: a closure at one position, enough to fold it again to the same state."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from tests.engine.test_undo import Server, _event
from tests.stateful.test_engine import FakeClock

from retrofill.core import person as people_codec
from retrofill.core.block import Kind
from retrofill.core.fold import Changes
from retrofill.core.refold import Refold
from retrofill.engine import history
from retrofill.engine.history import Asked
from retrofill.engine.refold import rows_of
from retrofill.errors import InputError
from retrofill.lake.arrow import SCHEMA


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    one = Server(tmp_path / "data", FakeClock())
    yield one
    one.close()


class Told:
    """An answer, taken apart."""

    def __init__(self, server: Server, **asked: Any) -> None:
        engine = server.engine
        moment = server.run(engine.moment(1))
        reader = engine.reader()
        with contextlib.closing(moment), contextlib.closing(reader.at(1, moment.snapshot)) as view:
            text = b"".join(history.lines(moment, view, engine.duplicates, Asked(**asked)))
        self.lines: list[Any] = []
        self.rows: list[dict[str, Any]] = []
        for line in text.splitlines():
            if line.startswith(b'{"kind":"'):
                self.lines.append(history.decode_line(line))
            else:
                self.rows.append(msgspec.json.decode(line))
        assert isinstance(self.lines[0], history.Position)
        assert self.lines[-1] == history.End(len(self.rows))

    def of(self, kind: type[Any]) -> list[Any]:
        return [one for one in self.lines if isinstance(one, kind)]

    @property
    def people(self) -> dict[int, history.Someone]:
        return {one.amplitude_id: one for one in self.of(history.Someone)}


EVERYTHING = {
    "device_ids": ["phone-1", "phone-2", "kiosk-9", "tablet-4"],
    "user_ids": ["ann-111", "bob-222", "eve-333"],
}


def refolded(told: Told) -> Refold:
    """Fold the rows again."""
    rows = [
        one for one in told.rows if one["kind"] in (Kind.EVENT, Kind.IDENTIFY, Kind.GROUP_IDENTIFY)
    ]
    table = pa.Table.from_pylist(
        [{"project": 1, "event_properties": "{}", **one} for one in rows], SCHEMA
    )
    numbers = iter(range(10**15, 2 * 10**15))
    refold = Refold(1, lambda: next(numbers))
    known = set(told.people)
    foreign = np.array(
        [one["kind"] == Kind.GROUP_IDENTIFY and one["amplitude_id"] not in known for one in rows],
        bool,
    )
    refold.fold(rows_of(table, foreign))
    return refold


@pytest.mark.parametrize("seed", range(6))
def test_the_rows_fold_to_the_state_that_comes_with_them(server: Server, seed: int) -> None:
    seeded = random.Random(seed)
    for number in range(40):
        server.clock.ms += seeded.randrange(10_000)
        server.send([_event(seeded, number * 5 + at, server.clock.ms) for at in range(5)])
        if seeded.random() < 0.1:
            server.crash()
        if seeded.random() < 0.2:
            server.run(server.engine.checkpoint())
    told = Told(server, **EVERYTHING)
    refold = refolded(told)
    empty = Changes({}, {}, {}, {}, {})
    found = refold.changes(empty)
    assert {one.id: one.amplitude_id for one in told.of(history.Device)} == found.devices
    assert {one.id: one.amplitude_id for one in told.of(history.User)} == found.users
    mine = {number: people_codec.encode(one.person()) for number, one in told.people.items()}
    assert mine == {number: people_codec.encode(one) for number, one in found.people.items()}
    groups = {(one.type, one.value): one.properties for one in told.of(history.GroupOf)}
    assert groups == found.groups
    merges = [(one.absorbed, one.surviving, one.block, one.row) for one in told.of(history.Merged)]
    assert merges == [(one.absorbed, one.surviving, one.block, one.row) for one in refold.merges]


def event(device: str | None, user: str | None, number: int, **more: Any) -> dict[str, Any]:
    said = {"device_id": device, "user_id": user, "event_type": "e", "insert_id": f"i-{number}"}
    return {**said, "time": 1_700_000_000_000 + number, **more}


def test_only_the_closure_is_told(server: Server) -> None:
    server.send(
        [
            event("phone-1", "ann-111", 1),
            event("phone-2", "ann-111", 2),
            event("phone-2", "bob-222", 3),
            event("tablet-4", "eve-333", 4),
        ]
    )
    told = Told(server, device_ids=["phone-1", "never-seen"])
    assert {one.user_id for one in told.people.values()} == {"ann-111", "bob-222"}
    assert {row["insert_id"] for row in told.rows} == {"i-1", "i-2", "i-3"}
    assert told.of(history.Days) == [history.Days({"2023-11-14": 3}, {"2023-11-14": 3})]
    assert Told(server, user_ids=["eve-333"]).rows[0]["device_id"] == "tablet-4"
    assert Told(server, user_ids=["nobody-9"]).people == {}
    brief = Told(server, user_ids=["eve-333"], rows="brief").rows
    assert set(brief[0]) == set(history.BRIEF)
    assert Told(server, user_ids=["eve-333"], rows="none").rows == []


def test_whoever_is_counted_with_one_by_an_alias_is_told(server: Server) -> None:
    server.send([event("phone-1", "ann-111", 1), event("tablet-4", "eve-333", 2)])
    server.engine.state.project(1).aliases["ann-111"] = "eve-333"
    told = Told(server, user_ids=["ann-111"])
    assert {one.user_id for one in told.people.values()} == {"ann-111", "eve-333"}
    assert told.of(history.Alias) == [history.Alias("ann-111", "eve-333")]
    assert told.of(history.Days)[0].active == {"2023-11-14": 1}


def test_asked_keys_that_are_stored_are_named_with_their_block(server: Server) -> None:
    server.send([event("phone-1", None, 1)])
    server.send([event("phone-2", None, 2)])
    keys = [("phone-1", "i-1"), ("phone-1", "i-2"), ("phone-2", "i-2"), ("", "i-1")]
    found = Told(server, insert_keys=keys).of(history.Known)
    assert found == [history.Known(0, 1), history.Known(2, 2)]


def test_likely_the_same_people_under_other_ids_are_named(server: Server) -> None:
    server.send(
        [
            event("phone-1", "Ann-111@Shop", 1),
            event("phone-2", "user:ab-12345", 2),
            event("phone-3", "zoe-999", 3, user_properties={"E-Mail": "Zoe@Example.org"}),
            event("phone-4", "id:short", 4),
        ]
    )
    asked = ["ann-111@shop", "ab-12345", "short", "zoe-1000"]
    told = Told(server, user_ids=asked, contacts=["zoe@example.org"])
    found = {(one.user_id, one.by, one.value) for one in told.of(history.Alike)}
    assert found == {
        ("Ann-111@Shop", "case or space", "ann-111@shop"),
        ("user:ab-12345", "prefix", "ab-12345"),
        ("zoe-999", "E-Mail", "zoe@example.org"),
    }


def test_a_moment_stays_what_it_is_while_events_arrive(server: Server) -> None:
    server.send([event("phone-1", "ann-111", 1, user_properties={"a": 1})])
    engine = server.engine
    with contextlib.closing(server.run(engine.moment(1))) as moment:
        server.send([event("phone-1", "ann-111", 2, user_properties={"a": 2})])
        server.run(engine.seal())
        server.run(engine.checkpoint())
        number = moment.users(["ann-111"])["ann-111"]
        assert moment.people([number])[number].properties == {"a": 1}
        assert [one.properties for one in moment.every_person()] == [{"a": 1}]
        ask = moment.snapshot.cursor.execute
        assert ask("SELECT count(*) FROM lake.events").fetchall() == [(1,)]
    assert engine.person(1, number).properties == {"a": 2}


def test_too_many_ids_are_refused() -> None:
    with pytest.raises(
        InputError, match="500,001 device_ids, user_ids and contacts, at most 500,000"
    ):
        Asked(device_ids=["d"] * 500_000, contacts=["c"]).check()
    with pytest.raises(InputError, match="insert_keys"):
        Asked(insert_keys=[("d", "i")] * 200_001).check()
