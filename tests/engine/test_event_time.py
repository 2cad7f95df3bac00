"""Projects whose properties go by event time: whatever order events come in, readers see one and the same history."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.core.permuted import BEGUN_MS, Sent, history
from tests.engine.test_undo import SEEN, Server, Wire
from tests.faults.process import PATIENCE_S
from tests.stateful.test_engine import FakeClock, SealerInside

from retrofill.core import order
from retrofill.core import person as people
from retrofill.core.event import Batch, Event
from retrofill.core.fold import Changes
from retrofill.core.order import EVERYBODY
from retrofill.core.throttle import Accepted
from retrofill.engine.admission import ProjectSettings, PropertyTime
from retrofill.engine.check import check
from retrofill.errors import StoreError
from retrofill.lake import Swap
from retrofill.limits import PERSON_LOOKS

# What depends on when and in which request an event arrived.
_ARRIVAL = ("block", "row", "client_upload_time", "server_received_time", "server_upload_time")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def server(tmp_path: Path, clock: FakeClock) -> Iterator[Server]:
    server = by_time(tmp_path, clock)
    yield server
    server.close()


def by_time(folder: Path, clock: FakeClock, to: PropertyTime = "event") -> Server:
    server = Server(folder, clock, "amplitude")
    server.run(server.engine.change_settings(1, settings(to)))
    return server


def settings(to: PropertyTime) -> ProjectSettings:
    limits = {"property_updates_per_h": 8, "httpapi_eps": 0, "batch_eps": 0, "identify_eps": 0}
    return ProjectSettings(limits, property_time=to)


def settled(server: Server) -> Server:
    server.run(server.engine.event_time.settle(1))
    return server


def truth(server: Server) -> dict[str, Any]:
    """Everything that does not depend on arrival, people numbered in order of appearance in event time."""
    server.run(server.engine.seal())
    settled(server)
    with server.engine.lake.snapshot() as snapshot:
        rows = (
            snapshot.cursor.execute(
                f"SELECT * FROM lake.events WHERE kind IN {SEEN} ORDER BY {order.SQL}"
            )
            .to_arrow_table()
            .to_pylist()
        )
        merges = snapshot.cursor.execute(
            "SELECT event_time, absorbed, surviving FROM lake.merges"
        ).fetchall()
    number: dict[int, int] = {0: 0, -1: -1}
    for row in rows:
        for name in _ARRIVAL:
            del row[name]
        row["amplitude_id"] = number.setdefault(row["amplitude_id"], len(number))
    state = server.engine.state.project(1)
    assert state.late == {}
    persons = {}
    for one, place in list(number.items()):
        found = state.people.get(one)
        if found is not None:
            into = number.setdefault(found.merged_into, found.merged_into)
            renamed = msgspec.structs.replace(found, amplitude_id=place, merged_into=into)
            persons[place] = people.encode(renamed)
    devices = {row["device_id"] for row in rows} - {None, ""}
    users = {row["user_id"] for row in rows} - {None}
    return {
        "rows": rows,
        "merges": sorted((time, number[a], number[b]) for time, a, b in merges),
        "people": persons,
        "devices": {one: number[state.devices.get(one) or 0] for one in devices},
        "users": {one: number[state.users.get(one) or 0] for one in users},
        "groups": {one: state.groups.get(("org", one)) or None for one in ("acme", "zeta")},
        "aliases": state.aliases,
    }


def alike(one: Server, other: Server) -> None:
    mine, theirs = truth(one), truth(other)
    for row, their_row in zip(mine["rows"], theirs["rows"], strict=True):
        assert row == their_row
    assert mine == theirs


def alias(server: Server, user: str, to: str) -> None:
    event = Event("$usermap", user_id=user, user_properties={"global_user_id": to})
    body = msgspec.json.encode({"events": [event]})
    batch = Batch(1, "/usermap", body, [event], len(body), server.clock.ms, BEGUN_MS, "10.0.0.1")
    assert isinstance(server.run(server.engine.ingest(batch)), Accepted)


def arrive(server: Server, sent: list[Sent], seeded: random.Random, *, rough: bool = False) -> None:
    """Send events in this order, several a request; now and then seal, save, settle or crash between."""
    waiting: Wire = []
    for at, (path, wire) in enumerate(sent):
        waiting.append(wire)
        next_path = sent[at + 1][0] if at + 1 < len(sent) else ""
        if path == next_path and seeded.random() < 0.6:
            continue
        server.clock.ms += 10
        if path == "/usermap":
            for one in waiting:
                alias(server, one["user_id"], one["to"])
        else:
            server.send(waiting, path)
        waiting = []
        chance = seeded.random()
        if rough and chance < 0.15:
            server.run(
                [
                    server.engine.seal,
                    server.engine.checkpoint,
                    lambda: server.engine.event_time.settle(1),
                ][int(chance * 20)]()
            )
        elif rough and chance < 0.2:
            server.crash()


def story(seed: int) -> list[Sent]:
    """A history with some events sent twice, and two aliases."""
    seeded = random.Random(seed)
    sent = history(seeded, 50, crowd=seed % 5 * 3 + 1)
    sent += [(path, wire) for path, wire in sent if "insert_id" in wire and seeded.random() < 0.2]
    sent += [
        ("/usermap", {"user_id": "ann-1110", "to": "bob-2220"}),
        ("/usermap", {"user_id": "eve-3330", "to": "joe-4440"}),
    ]
    return sent


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(3, 200))]
)
def test_any_order_of_arrival_ends_in_the_same(seed: int, tmp_path: Path, clock: FakeClock) -> None:
    clock.ms = BEGUN_MS + 10**10
    sent = story(seed % 5)
    control = by_time(tmp_path / "control", clock)
    arrive(control, sent, random.Random(0))
    mixed = sent.copy()
    seeded = random.Random(seed)
    if seed % 2:
        seeded.shuffle(mixed)
    else:
        mixed.sort(key=lambda one: one[1].get("time", 0) + seeded.choice([0] * 9 + [3_600_000]))
    subject = by_time(tmp_path / "subject", clock)
    arrive(subject, mixed, seeded, rough=True)
    alike(subject, control)
    subject.crash()
    alike(subject, control)
    subject.close()
    control.close()


def send(server: Server, time_ms: int, **fields: Any) -> None:
    server.clock.ms += 1000
    event = {"event_type": "open", "device_id": "phone-1", "time": BEGUN_MS + time_ms, **fields}
    server.send([event])


def plans(server: Server) -> list[str | None]:
    """The plan on each row, in event time."""
    found = [msgspec.json.decode(row["user_properties"]) for row in truth(server)["rows"]]
    return [properties.get("plan") for properties in found]


def plan_now(server: Server) -> Any:
    """As a reader finds it."""

    def ask() -> Any:
        with server.engine.reader().view(1) as view:
            one = view.ask(
                f"SELECT amplitude_id FROM {view.source(['amplitude_id'])} LIMIT 1"
            ).fetchall()[0][0]
        who = server.engine.reader().person(1, one)
        assert who is not None
        return who.properties.get("plan")

    return server.run(asyncio.to_thread(ask))


def test_a_late_event_shows_its_own_time_and_repairs_what_came_after(server: Server) -> None:
    send(server, 1000, user_properties={"plan": "free"})
    send(server, 3000)
    send(server, 5000, user_properties={"plan": "gold"})
    send(server, 7000)
    send(server, 2000, user_properties={"plan": "trial"})
    assert server.engine.state.project(1).late
    assert plan_now(server) == "gold"
    assert plans(server) == ["free", "trial", "trial", "gold", "gold"]
    send(server, 8000)
    assert not server.engine.state.project(1).late
    assert plans(server) == ["free", "trial", "trial", "gold", "gold", "gold"]


def test_readers_of_every_moment_see_what_they_were_told_is_stored(server: Server) -> None:
    seeded = random.Random(3)
    times = [seeded.randrange(10_000) for _ in range(7)]
    for at, time in enumerate(times):
        send(server, time, user_properties={"plan": str(time)})
        assert plan_now(server) == str(max(times[: at + 1]))


def test_a_person_is_read_also_while_late_events_go_on_coming(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for time in (9, 1):
        send(server, time, user_properties={"plan": str(time)})
    one = server.engine.state.project(1).devices.get("phone-1")
    assert one
    run, folds = server.engine.rewriting.run, []

    async def more_comes(*asked: Any, held: bool = False, beside: bool = False) -> None:
        assert not beside
        await run(*asked, held=held)
        folds.append(held)
        assert len(folds) < 9, "it never ends"
        if not held:  # while commits wait nothing comes
            late = {"event_type": "open", "device_id": "phone-1", "time": BEGUN_MS + 2}
            await server.post([late | {"user_properties": {"plan": "late"}}])

    monkeypatch.setattr(server.engine.rewriting, "run", more_comes)
    ask = server.engine.reader().person
    found = server.run(asyncio.wait_for(asyncio.to_thread(ask, 1, one), PATIENCE_S))
    assert folds == [False] * PERSON_LOOKS + [True]
    assert not server.engine.event_time.late_since(1)
    assert found.properties["plan"] == "9"


def test_a_first_event_and_the_hourly_limit_go_by_event_time(server: Server) -> None:
    for minute in range(9, 0, -1):
        send(server, minute * 60_000, user_properties={"plan": str(minute)})
    assert plans(server) == [str(minute) for minute in range(1, 10)]
    # The ninth update of the hour is over the limit of eight: its own row shows it, the table does not take it.
    assert plan_now(server) == "8"
    rows = truth(server)["rows"]
    assert [bool(row["flags"] & 2) for row in rows] == [True] + [False] * 8
    assert {row["created_time"] for row in rows} == {BEGUN_MS + 60_000}


def test_a_login_that_arrives_late_takes_what_followed_it(server: Server) -> None:
    send(server, 1000, user_properties={"plan": "free"})
    send(server, 3000)  # anonymous on arrival, of Ann's in event time
    send(server, 2000, user_id="ann-111")
    send(server, 2500, device_id="desk-5", user_id="ann-111")
    found = truth(server)
    assert len({row["amplitude_id"] for row in found["rows"]}) == 1
    assert found["merges"] == []


def test_live_traffic_in_order_folds_nothing_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(server.engine.rewriting, "run", never)
    seeded = random.Random(7)
    for at, (path, wire) in enumerate(history(seeded, 120)):
        server.clock.ms += 10
        server.send([wire | {"time": BEGUN_MS + at * 1000}], path)
        if at % 40 == 39:
            server.run(server.engine.seal())
            assert server.run(asyncio.to_thread(lambda: _rows(server))) > 0
    assert server.engine.state.project(1).late == {}


def _rows(server: Server) -> int:
    with server.engine.reader().view(1) as view:
        return int(view.ask(f"SELECT count(*) FROM {view.source(['event_type'])}").fetchall()[0][0])


def test_many_marks_are_folded_again_without_a_reader(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrofill.engine.ingest.LATE_MARKS_MAX", 2)
    for time in (9, 1):
        send(server, time)
        send(server, time, device_id="phone-2")
    folded = asyncio.Event()
    ended = server.engine.rewriting.kinds["late"]

    async def tell(*told: Any) -> None:
        await ended(*told)
        folded.set()

    server.engine.rewriting.kinds["late"] = tell
    server.run(asyncio.wait_for(folded.wait(), PATIENCE_S))
    assert server.engine.event_time.late_since(1) == 0


def test_requests_are_answered_while_late_events_are_folded_again_without_a_reader(
    server: Server,
) -> None:
    for time in (9, 1):
        send(server, time, user_properties={"plan": str(time)})
    answered = []

    async def meddle() -> None:  # only where commits do not wait
        device = f"phone-{len(answered) % 2 + 1}"  # of somebody who is folded again, or not
        event = {"event_type": "open", "device_id": device, "time": BEGUN_MS + 20 + len(answered)}
        await server.post([event])
        answered.append(event)

    server.meddle = meddle
    server.run(server.engine._settle(1))
    server.meddle = None
    assert len(answered) > 3
    assert not server.engine.event_time.late_since(1)
    assert plans(server)[:2] == ["1", "9"]
    assert _rows(server) == 2 + len(answered)
    assert plan_now(server) == "9"


def test_commits_wait_for_no_child_and_little_sealing_when_late_events_are_folded_for_a_reader(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = server.engine
    seal, rests, gives_back = engine.seal, engine.compaction_rests, engine.children_rest
    seals: list[tuple[bool, bool]] = []
    asked: list[str] = []

    async def sealing() -> None:
        seals.append((engine.committing.locked(), bool(engine.unsealed)))
        await seal()

    def resting(*, given_up: bool) -> Any:
        asked.append(f"given_up={given_up}")
        return rests(given_up=given_up)

    async def giving_back() -> None:
        asked.append("children")
        await gives_back()

    monkeypatch.setattr(engine, "seal", sealing)
    monkeypatch.setattr(engine, "compaction_rests", resting)
    monkeypatch.setattr(engine, "children_rest", giving_back)
    for time in (9, 1):
        send(server, time)
    server.run(engine.event_time.settle(1))
    assert seals == [(False, True), (True, False)]  # as little as came in between
    for time in (9, 1):
        send(server, time)
    server.run(engine.event_time.settle_beside(1))
    assert seals[2:] == [(False, True)]
    # After every seal: a merge would never come to its end.
    assert asked == ["given_up=False", "given_up=False", "children"]


def test_of_too_many_marks_the_whole_project_is_folded_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrofill.engine.state.LATE_MARKS_KEPT", 3)
    state = server.engine.state.project(1)
    for time in (9, 1, 5):
        for number in range(6):
            device = f"phone-{number}"
            send(server, time, device_id=device, user_properties={"plan": f"{number} at {time}"})
            assert len(state.late) <= 3
    assert list(state.late) == [EVERYBODY]
    first = state.late_since
    server.crash()
    state = server.engine.state.project(1)
    assert (list(state.late), state.late_since) == ([EVERYBODY], first)
    settled(server)
    assert not state.late
    with server.engine.reader().view(1) as view:
        shown = view.ask(
            "SELECT device_id, list(user_properties ORDER BY event_time) "
            f"FROM {view.source(['device_id', 'user_properties', 'event_time'])} GROUP BY ALL"
        ).fetchall()
    assert dict(shown) == {
        f"phone-{number}": [f'{{"plan":"{number} at {time}"}}' for time in (1, 5, 9)]
        for number in range(6)
    }


def test_marks_of_events_during_a_change_stay_also_when_everybody_is_marked(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrofill.engine.state.LATE_MARKS_KEPT", 3)
    state = server.engine.state.project(1)
    state.apply(late(1, 2), block=5)
    state.apply(late(2, 3), block=6)
    assert (state.late, state.late_since, state.marked) == ({1: 5, 2: 5, 3: 6}, 5, 3)
    state.apply(late(4), block=7)
    assert (state.late, state.late_since, state.marked) == ({EVERYBODY: 7}, 5, 3)
    state.apply(late(5), block=8)
    assert state.late == {EVERYBODY: 7}
    # A change that began before everybody was marked: who was marked after it began may still be wrong.
    state.settle(5, [6], block=9)
    assert (state.late, state.late_since) == ({EVERYBODY: 7, 6: 9}, 6)
    # One that began later has everybody folded again, and tells whom later events marked.
    state.settle(9, [6], block=12)
    assert (state.late, state.late_since) == ({6: 12}, 12)
    state.settle(12, range(1, 9), block=20)
    assert (state.late, state.late_since) == ({EVERYBODY: 20}, 20)
    state.settle(20, [], block=21)
    assert (state.late, state.late_since) == ({}, 0)


def late(*people: int) -> Changes:
    return Changes({}, {}, {}, {}, {}, {}, set(people))


def test_readers_who_ask_together_have_late_events_folded_again_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for time in (9, 1):
        send(server, time)
    run, runs = server.engine.rewriting.run, 0

    async def more_comes(*asked: Any, **how: Any) -> None:
        nonlocal runs
        runs += 1
        await run(*asked, **how)
        # Late again, before the next of those who wait has its turn.
        late = {"event_type": "open", "device_id": "phone-1", "time": BEGUN_MS, "insert_id": "late"}
        await server.post([late])

    async def together() -> None:
        await asyncio.gather(*(server.engine.event_time.settle(1) for _ in range(3)))

    with monkeypatch.context() as patched:
        patched.setattr(server.engine.rewriting, "run", more_comes)
        server.run(together())
    assert runs == 1
    assert server.engine.event_time.late_since(1)
    settled(server)
    assert not server.engine.event_time.late_since(1)


def test_a_moment_is_pinned_though_late_events_go_on_coming(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for time in (9, 1):
        send(server, time)
    settle = server.engine.event_time.settle

    async def more_comes(project: int) -> None:
        await settle(project)
        late = {"event_type": "open", "device_id": "phone-1", "time": BEGUN_MS}
        await server.post([late])

    with monkeypatch.context() as patched:
        patched.setattr(server.engine.event_time, "settle", more_comes)
        moment = server.run(asyncio.wait_for(server.engine.moment(1), 120))
    assert moment.snapshot.sealed == server.engine.state.block
    assert not server.engine.event_time.late_since(1)
    moment.close()


def test_what_cannot_be_folded_again_now_stops_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for time in (9, 1):
        send(server, time)

    async def die(*_: Any, **__: Any) -> None:
        raise StoreError("No memory is left")

    with monkeypatch.context() as patched:
        patched.setattr(server.engine.rewriting, "run", die)
        server.run(server.engine._settle(1))
    assert server.engine.problem() is None
    assert server.engine.event_time.late_since(1)
    server.run(server.engine._settle(1))
    assert not server.engine.event_time.late_since(1)


def test_what_a_seal_would_have_folded_again_is_when_a_change_of_history_has_ended(
    server: Server,
) -> None:
    engine = server.engine
    for time in (9, 1):
        send(server, time)

    async def change() -> None:
        async with engine.rewriting.alone():
            await engine._settle(1)  # as after a seal
            assert engine.event_time.late_since(1)
        while engine.event_time.late_since(1):  # noqa: ASYNC110 - a mark, no event
            await asyncio.sleep(0.01)

    server.run(asyncio.wait_for(change(), PATIENCE_S))


class _CutError(BaseException):
    """The machine stops here."""


def _in_arrival(folder: Path, clock: FakeClock) -> tuple[Server, list[Sent]]:
    """Return a server that goes by arrival, and what it was sent out of order."""
    clock.ms = BEGUN_MS + 10**10
    server = by_time(folder, clock, "arrival")
    sent = story(2)
    random.Random(2).shuffle(sent)
    arrive(server, sent, random.Random(2))
    return server, sent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nothing", "commit", "adopt", "checkpoint", "set_settings"])
def test_a_switch_there_and_back_ends_where_it_began(
    name: str, tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, sent = _in_arrival(tmp_path, clock)
    before = server.seen()
    control = by_time(tmp_path / "control", clock)
    arrive(control, sent, random.Random(5))
    ways: tuple[PropertyTime, PropertyTime] = ("event", "arrival")
    for to in ways:
        if name != "nothing":
            engine: Any = server.engine
            owners = {"commit": Swap, "adopt": engine.duplicates}
            owner = owners.get(name, engine)
            real = getattr(owner, name)

            def cut(*_: Any, **__: Any) -> None:
                raise _CutError

            with monkeypatch.context() as patched:
                after = name == "commit"
                cutting = lambda *a, **k: (after and real(*a, **k), cut())  # noqa: E731, B023
                patched.setattr(owner, name, cutting)
                with pytest.raises(_CutError):
                    server.run(engine.event_time._switch(1, to))
            server.crash()
        else:
            server.run(server.engine.change_settings(1, settings(to)))
        assert server.engine.settings(1).property_time == to
        if to == "event" and name == "nothing":
            alike(server, control)
    assert server.seen() == before
    server.crash()
    assert server.seen() == before
    server.close()
    control.close()


def test_of_two_switches_that_wait_the_one_asked_last_holds(
    tmp_path: Path, clock: FakeClock
) -> None:
    """The second one asks for what is set still, since the first waits for another change of history to end."""
    server = by_time(tmp_path, clock, "arrival")
    change = server.engine.change_settings

    async def ask() -> bool:
        async with server.engine.rewriting.alone():  # as an undo holds it
            first = asyncio.create_task(change(1, settings("event")))
            await asyncio.sleep(0)  # it has begun, and waits
            second = asyncio.create_task(change(1, settings("arrival")))
            await asyncio.wait(
                [second], timeout=0.2
            )  # it used to be answered after one look at a file
            answered = second.done()
        await asyncio.gather(first, second)
        return answered

    assert not server.run(ask())
    assert server.engine.settings(1).property_time == "arrival"
    assert not server.engine.event_time.asked(1)
    server.crash()
    assert server.engine.settings(1).property_time == "arrival"
    server.close()


@pytest.mark.slow
def test_a_switch_that_broke_off_is_not_what_was_asked_last(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start ends it; whoever asks for the other time meanwhile is not told that it is there already."""
    server, _sent = _in_arrival(tmp_path, clock)
    before = server.seen()

    def cut(*_: Any, **__: Any) -> None:
        raise _CutError

    with monkeypatch.context() as patched:
        patched.setattr(Swap, "commit", cut)
        with pytest.raises(_CutError):
            server.run(server.engine.change_settings(1, settings("event")))
    server.crash()
    assert server.engine.event_time.switching(1)
    server.run(server.engine.change_settings(1, settings("arrival")))
    assert not server.engine.event_time.switching(1)
    assert server.engine.settings(1).property_time == "arrival"
    assert server.seen() == before
    server.crash()
    assert server.seen() == before
    server.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 60))]
)
def test_an_undo_leaves_what_event_time_makes_of_the_rest(
    seed: int, tmp_path: Path, clock: FakeClock
) -> None:
    clock.ms = BEGUN_MS + 10**10
    seeded = random.Random(seed)
    sent = history(seeded, 40, crowd=seed % 3 * 3 + 1)
    old = [(path, wire | IMPORT) for path, wire in history(seeded, 15, crowd=2)]
    control = by_time(tmp_path / "control", clock)
    arrive(control, sent, seeded)
    both = sent + old
    seeded.shuffle(both)
    subject = by_time(tmp_path / "subject", clock)
    arrive(subject, both, seeded, rough=True)
    subject.run(subject.engine.undo(1, "old-shop"))
    alike(subject, control)
    subject.run(subject.engine.restore(1, "old-shop"))
    whole = by_time(tmp_path / "whole", clock)
    arrive(whole, both, seeded)
    alike(subject, whole)
    for server in (subject, control, whole):
        server.close()


def test_what_repeats_a_restored_import_is_left_out_again_by_either_key(
    tmp_path: Path, clock: FakeClock
) -> None:
    """Events with an insert_id and without: both kinds of keys go by arrival."""
    subject, control = (by_time(tmp_path / name, clock) for name in ("subject", "control"))
    ids = {"event_type": "open", "device_id": "phone-1", "user_id": "ann-111"}
    live: list[dict[str, Any]] = [
        ids | {key: said, "time": clock.ms - 10_000 * number, "user_properties": {"n": number}}
        for number in range(2)
        for key, said in (("insert_id", f"i-{number}"), ("event_id", number))
    ]
    both = (subject, control)
    for one in [*(one | IMPORT for one in live), *live[:2]]:
        clock.ms += 1000
        for server in both:
            server.send([one])
    subject.run(subject.engine.undo(1, "old-shop"))
    for one in live[2:]:
        clock.ms += 1000
        for server in both:
            server.send([one])
    assert len(subject.seen()["rows"]) == len(live)
    subject.run(subject.engine.restore(1, "old-shop"))
    alike(subject, control)
    assert len(subject.seen()["rows"]) == len(live)
    for server in both:
        server.close()


IMPORT = {"ingestion_metadata": {"source_name": "retrofill", "source_version": "old-shop"}}


def test_a_check_folds_in_event_time(server: Server) -> None:
    arrive(server, story(4)[::-1], random.Random(1))
    server.run(server.engine.close())
    report = check(server.folder, server.clock, sealer=SealerInside)
    assert [one.line() for one in report.differences] == []
    assert report.rows > 40
    server.open()
