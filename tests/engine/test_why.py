"""Why, asked of a real engine: what the answer says stands in the state and on the rows, whoever is asked about."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.engine.test_undo import Server, _request
from tests.stateful.test_engine import FakeClock

from retrofill.core import why as core
from retrofill.core.block import COLUMNS
from retrofill.core.person import FORGOTTEN
from retrofill.core.row import uuid_of
from retrofill.engine import why as engine_why
from retrofill.engine.admission import ProjectSettings
from retrofill.engine.why import Answer, Question, why
from retrofill.errors import CorruptError, InputError, MissingError, SizeError

VIEW = {"event_type": "View"}
ANN = {"device_id": "phone-1", "user_id": "ann-111"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "data", FakeClock(), "amplitude")
    yield made
    made.close()


def ask(server: Server, **question: Any) -> Answer:
    engine = server.engine
    with engine.reader().view(1) as view:
        return why(
            view,
            Question(**question),
            by_time=engine.settings(1).property_time == "event",
            barred=engine.state.project(1).barred,
        )


def rules(answer: Answer) -> list[tuple[str, bool | None]]:
    return [(one.rule, one.needed) for one in answer.causes]


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 20))]
)
def test_every_value_that_is_stored_is_explained(
    seed: int, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "WHY_FOLDED_ROWS_MAX", 1000)  # of what is tried tests/core has more
    seeded = random.Random(seed)
    clock = server.clock
    for number in range(0, 150, 5):
        clock.ms += seeded.choice([10, 1000, 3_600_000])
        name = seeded.choice(["", "", "old-shop", "old-crm"])
        server.send(*_request(seeded, number, clock.ms, name=name))
        if seeded.random() < 0.1:
            server.run(server.engine.seal())
        if number == 75:
            server.run(server.engine.undo(1, "old-crm"))
    people = server.engine.state.project(1)
    for user in ("ann-111", "bob-222", "eve-333"):
        person = people.people.get(people.users.get(user) or 0)
        if person is None or person.merged_into:
            continue
        for name in ("color", "plan", "count"):
            answer = ask(server, property=name, user_id=user)
            assert answer.value == person.properties.get(name)
            assert answer.user_id == user
        for column in seeded.sample(COLUMNS, 5):
            answer = ask(server, column=column, amplitude_id=person.amplitude_id)
            assert answer.value == person.columns[COLUMNS.index(column)]
        answer = ask(server, first_seen=True, user_id=user)
        assert answer.value == (None if person.first_seen_ms < 0 else person.first_seen_ms)
    seen = server.seen()["rows"]  # seals everything
    with server.engine.lake.snapshot() as snapshot:
        rows = (
            snapshot.cursor.execute(
                "SELECT * FROM lake.events WHERE kind IN (0, 1) AND amplitude_id > 0"
            )
            .to_arrow_table()
            .to_pylist()
        )
        merges = snapshot.cursor.execute("SELECT absorbed, surviving FROM lake.merges").fetchall()
    assert len(rows) <= len(seen)
    for row in seeded.sample(rows, 8):
        uuid = uuid_of(1, 0, row["block"], row["row"])
        shown = msgspec.json.decode(row["user_properties"])
        answer = ask(server, property="plan", uuid=uuid)
        assert answer.value == shown.get("plan")
        assert ask(server, column="platform", uuid=uuid).value == row["platform"]
        groups = msgspec.json.decode(row["group_properties"] or "{}")
        value = groups.get("org", {}).get("acme", {}).get("size")
        found = ask(server, property="size", group_type="org", group_value="acme", uuid=uuid)
        assert found.value == value
    for absorbed, surviving in merges:
        answer = ask(server, merge=absorbed)
        assert answer.value == surviving
        assert ("merged", True) in rules(answer) or ("merged", False) in rules(answer)


def test_a_cause_names_its_event_import_request_and_rule(server: Server) -> None:
    origin = {"source_name": "retrofill", "source_version": "old-shop"}
    server.send([{**VIEW, **ANN, "insert_id": "a", "user_properties": {"plan": "free"}}])
    server.run(server.engine.seal())
    server.clock.ms += 1000
    server.send(
        [
            {**VIEW, "device_id": "other", "insert_id": "o"},
            {
                **VIEW,
                **ANN,
                "insert_id": "b",
                "time": 1_600_000_000_000,
                "user_properties": {"$set": {"plan": "pro"}},
                "ingestion_metadata": origin,
            },
        ],
        "/batch",
    )
    server.send([{**VIEW, **ANN, "insert_id": "c", "user_properties": {"$setOnce": {"plan": "x"}}}])
    answer = ask(server, property="plan", user_id="ann-111")
    assert (answer.value, rules(answer)) == (
        "pro",
        [("changed", False), ("changed", True), ("ignored", False)],
    )
    cause = answer.causes[1]
    assert (cause.before, cause.after, cause.imported_by) == ("free", "pro", "old-shop")
    assert msgspec.to_builtins(cause.operations) == [{"operation": "$set", "value": "pro"}]
    assert (cause.request.path, cause.request.block, cause.request.row) == ("/batch", 2, 1)
    assert cause.request.server_upload_time_ms == server.clock.ms
    assert cause.event.uuid == uuid_of(1, 0, 2, 1)
    assert (cause.event.insert_id, cause.event.device_id) == ("b", "phone-1")
    assert cause.event.event_time_ms == 1_600_000_000_000
    for question in ({"insert_id": "a", "device_id": "phone-1"}, {"uuid": uuid_of(1, 0, 1, 0)}):
        first = ask(server, property="plan", **question)
        assert (first.value, rules(first), first.rows) == ("free", [("changed", True)], 1)
    assert rules(ask(server, first_seen=True, device_id="phone-1")) == [
        ("changed", False),
        ("changed", True),
    ]


def test_what_cannot_be_asked_is_refused(server: Server) -> None:
    server.send([{**VIEW, **ANN}])
    for question, error in (
        ({}, InputError),
        ({"user_id": "ann-111"}, InputError),
        ({"property": "plan"}, InputError),
        ({"property": "plan", "column": "platform", "user_id": "ann-111"}, InputError),
        ({"property": "plan", "user_id": "ann-111", "device_id": "phone-1"}, InputError),
        ({"property": "plan", "uuid": "x", "user_id": "ann-111"}, InputError),
        ({"property": "plan", "uuid": "x", "insert_id": "y"}, InputError),
        ({"first_seen": True, "uuid": "x"}, InputError),
        ({"merge": 100_000_000_001, "user_id": "ann-111"}, InputError),
        ({"column": "plan", "user_id": "ann-111"}, InputError),
        ({"property": "size", "group_type": "org"}, InputError),
        (
            {"property": "s", "group_type": "o", "group_value": "a", "user_id": "ann-111"},
            InputError,
        ),
        ({"property": "plan", "user_id": "nobody"}, MissingError),
        ({"property": "plan", "device_id": "nothing"}, MissingError),
        ({"property": "plan", "amplitude_id": 5}, MissingError),
        ({"property": "plan", "uuid": uuid_of(1, 0, 9, 9)}, MissingError),
        ({"merge": 5}, MissingError),
    ):
        with pytest.raises(error):
            ask(server, **question)


def test_a_long_history_is_refused_and_a_damaged_one_told(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.send([{**VIEW, **ANN, "insert_id": str(at)} for at in range(5)])
    server.send([{**VIEW, "device_id": "phone-1"}])
    monkeypatch.setattr(engine_why, "WHY_ROWS_MAX", 5)
    with pytest.raises(SizeError, match="Over 5 rows"):
        ask(server, property="plan", user_id="ann-111")
    assert ask(server, property="plan", uuid=uuid_of(1, 0, 1, 2)).rows == 3
    monkeypatch.undo()
    server.run(server.engine.seal())
    one = server.engine.state.project(1).users.get("ann-111")
    with server.engine.lake._db.cursor() as cursor:
        cursor.execute(
            f'UPDATE lake.events SET user_id = \'bob-222\' WHERE "block" = 1 AND "row" = 2 AND {one} > 0'
        )
    with pytest.raises(CorruptError, match="does not fold"):
        ask(server, property="plan", amplitude_id=one)


def test_a_person_who_came_back_after_deletion_is_somebody_new(server: Server) -> None:
    server.send([{**VIEW, **ANN, "user_properties": {"plan": "free"}}])
    gone = server.engine.state.project(1).users.get("ann-111") or 0
    server.send([{**VIEW, "device_id": "phone-1", "user_id": "bob-222"}])
    server.run(server.engine.forget(1, [gone]))
    with pytest.raises(MissingError):
        ask(server, property="plan", user_id="ann-111")
    bob = server.engine.state.project(1).users.get("bob-222") or 0
    server.run(server.engine.forget(1, [bob]))
    server.send([{**VIEW, "device_id": "phone-1", "user_properties": {"plan": "pro"}}])
    answer = ask(server, property="plan", device_id="phone-1")
    assert (answer.value, rules(answer)) == ("pro", [("changed", True)])
    person = server.engine.person(1, gone)
    assert person is not None
    assert person.merged_into == FORGOTTEN


def test_where_properties_go_by_event_time_causes_come_in_that_order(server: Server) -> None:
    settings = ProjectSettings(property_time="event")
    server.run(server.engine.change_settings(1, settings))
    for at, (ms, plan) in enumerate([(2000, "pro"), (1000, "free"), (3000, "gold")]):
        server.clock.ms += 10
        event = {**VIEW, **ANN, "insert_id": str(at), "time": 1_600_000_000_000 + ms}
        server.send([{**event, "user_properties": {"plan": plan}}])
    server.run(server.engine.event_time.settle(1))
    answer = ask(server, property="plan", user_id="ann-111")
    assert answer.value == "gold"
    assert [one.after for one in answer.causes] == ["free", "pro", "gold"]
    assert rules(answer)[-1] == ("changed", True)
    shown = ask(server, property="plan", insert_id="0")
    assert (shown.value, shown.rows) == ("pro", 2)
