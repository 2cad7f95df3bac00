"""A merge taken back: two people as if the event had not joined them, now, after any refold, and after a crash."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.engine.test_check import SealerInside
from tests.engine.test_freed import _delete
from tests.engine.test_undo import Server, _CutError, _request, same
from tests.engine.test_why import ask, rules
from tests.stateful.test_engine import FakeClock

from retrofill.core.person import Person
from retrofill.engine.check import check
from retrofill.engine.unmerge import Asked, Listed, listed
from retrofill.errors import MissingError
from retrofill.lake import Swap

VIEW = {"event_type": "View"}
KIOSK = {**VIEW, "device_id": "kiosk-9"}
ANN = {**VIEW, "device_id": "phone-1", "user_id": "ann-111"}
BOTH = {**VIEW, "device_id": "kiosk-9", "user_id": "ann-111"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "data", FakeClock())
    for at, wire in enumerate(
        [
            {**KIOSK, "user_properties": {"plan": "free", "a": 1}},
            {**ANN, "user_properties": {"b": 2}},
            {**BOTH, "user_properties": {"c": 3}},
            {**KIOSK, "user_properties": {"d": 4}},
        ]
    ):
        made.clock.ms += 1000
        made.send([{**wire, "insert_id": f"i-{at}", "time": made.clock.ms}])
    yield made
    made.close()


def merges(server: Server, **asked: Any) -> list[Listed]:
    with server.engine.reader().view(1) as view:
        return listed(view, server.engine.projects_store.barred(1), Asked(**asked))


def person(server: Server, user: str) -> Person:
    state = server.engine.state.project(1)
    found = state.people.get(state.users.get(user) or 0)
    assert found is not None
    return found


def unmerge(server: Server, one: Listed) -> Any:
    block, row = map(int, one.id.split("-"))
    return server.run(server.engine.unmerge(1, block, row))


def test_both_are_as_if_they_had_not_been_joined(server: Server) -> None:
    (merge,) = merges(server)
    assert (merge.id, merge.state, merge.insert_id) == ("3-0", "merged", "i-2")
    assert (merge.user_id, merge.device_id) == ("ann-111", "kiosk-9")
    assert person(server, "ann-111").properties == {"plan": "free", "a": 1, "b": 2, "c": 3, "d": 4}
    done = unmerge(server, merge)
    # What came on the device after she had logged in is hers all the same.
    assert person(server, "ann-111").properties == {"b": 2, "c": 3, "d": 4}
    other = server.engine.person(1, merge.absorbed)
    assert other is not None
    assert (other.properties, other.user_id, other.merged_into) == (
        {"plan": "free", "a": 1},
        None,
        0,
    )
    assert merges(server) == []
    (taken,) = merges(server, state="unmerged")
    assert (taken.id, taken.absorbed, taken.unmerged_ms) == ("3-0", merge.absorbed, server.clock.ms)
    server.clock.ms += 1000
    assert unmerge(server, merge) == done
    rows = server.seen()["rows"]
    assert [row["amplitude_id"] for row in rows] == [1, 2, 2, 2]
    assert '"plan"' not in rows[2]["user_properties"]
    with pytest.raises(MissingError):
        server.run(server.engine.unmerge(1, 2, 0))


def test_the_same_ids_do_not_join_them_again(server: Server) -> None:
    origin = {"source_name": "retrofill", "source_version": "old-shop"}
    server.send([{**VIEW, "device_id": "tablet-4", "insert_id": "t", "user_properties": {"x": 1}}])
    tablet = {**VIEW, "device_id": "tablet-4", "user_id": "ann-111"}
    server.send([{**tablet, "insert_id": "u", "ingestion_metadata": origin}])
    newest, first = merges(server)
    assert (newest.imported_by, first.imported_by) == ("old-shop", None)
    unmerge(server, newest)
    assert merges(server) == [first]
    # Without the event that had joined them the tablet is nobody's again; and the next one with both ids joins nobody.
    server.run(server.engine.undo(1, "old-shop"))
    server.send([{**tablet, "insert_id": "v"}])
    assert merges(server) == [first]
    assert "x" not in person(server, "ann-111").properties
    server.run(server.engine.restore(1, "old-shop"))
    assert merges(server) == [first]
    server.crash()
    server.send([{**tablet, "insert_id": "w"}])
    assert merges(server) == [first]
    # Another user of the tablet's first person is new evidence of somebody else; she stays joined with the kiosk.
    unmerge(server, first)
    assert merges(server) == []
    assert len(merges(server, state="unmerged")) == 2
    server.send([{**VIEW, "device_id": "other-7", "insert_id": "x"}])
    server.send([{**VIEW, "device_id": "other-7", "user_id": "ann-111", "insert_id": "y"}])
    (new,) = merges(server)
    assert new.device_id == "other-7"
    assert merges(server, person=new.absorbed) == merges(server, person=new.surviving) == [new]
    assert merges(server, before=(1, 0)) == []


def test_nobody_else_owns_the_device_that_a_barred_user_was_first_seen_on(server: Server) -> None:
    """If what had made her known is undone, she is somebody new and adopts nobody."""
    (merge,) = merges(server)
    unmerge(server, merge)
    one = server.engine.person(1, merge.absorbed)
    origin = {"source_name": "retrofill", "source_version": "crm"}
    server.send([{**VIEW, "device_id": "bob-phone", "insert_id": "1"}])
    server.send(
        [{**VIEW, "device_id": "phone-2", "user_id": "bob-222", "ingestion_metadata": origin}]
    )
    server.send([{**VIEW, "device_id": "bob-phone", "user_id": "bob-222", "insert_id": "2"}])
    unmerge(server, merges(server)[0])
    server.run(server.engine.undo(1, "crm"))
    bob = person(server, "bob-222")
    state = server.engine.state.project(1)
    assert state.devices.get("bob-phone") == bob.amplitude_id
    assert {
        row["amplitude_id"] for row in server.seen()["rows"] if row["device_id"] == "bob-phone"
    } == {3, 4}
    assert server.engine.person(1, merge.absorbed) == one


def restore(server: Server, one: Listed) -> Any:
    block, row = map(int, one.id.split("-"))
    return server.run(server.engine.restore_merge(1, block, row))


def test_a_merge_restored_is_as_if_it_had_not_been_taken_back(
    server: Server, tmp_path: Path
) -> None:
    control = Server(tmp_path / "control", FakeClock())
    (merge,) = merges(server)
    before = server.seen()
    unmerge(server, merge)
    assert server.seen() != before
    restore(server, merge)
    assert server.seen() == before
    assert (merges(server), merges(server, state="unmerged")) == ([merge], [])
    restore(server, merge)
    with pytest.raises(MissingError):
        server.run(server.engine.restore_merge(1, 2, 0))
    # What came while it was barred is folded as well, and a stop changes nothing.
    unmerge(server, merge)
    later = [
        {"device_id": "kiosk-9", "user_id": "bob-222"},
        {"device_id": "phone-1"},
        {"device_id": "kiosk-9", "user_id": "ann-111", "user_properties": {"e": 5}},
    ]
    for at, ids in enumerate(later):
        server.clock.ms += 1000
        server.send([{**VIEW, **ids, "insert_id": f"l-{at}", "time": server.clock.ms}])
    restore(server, merge)
    server.crash()
    assert merges(server) == [merge]
    for at, wire in enumerate([KIOSK, ANN, BOTH, KIOSK, *({**VIEW, **ids} for ids in later)]):
        control.clock.ms += 1000
        said = [{"plan": "free", "a": 1}, {"b": 2}, {"c": 3}, {"d": 4}]
        one = {"user_properties": said[at]} if at < len(said) else {}
        name = f"i-{at}" if at < len(said) else f"l-{at - len(said)}"
        control.send([{**one, **wire, "insert_id": name, "time": control.clock.ms}])
    same(server, control)
    control.close()
    unmerge(server, merge)
    assert merges(server) == []


@pytest.mark.parametrize("name", ["commit", "checkpoint", "unbar", "read_changes"])
def test_a_restore_cut_off_is_ended_by_the_next_start(
    name: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrofill.engine import change  # noqa: PLC0415 # to cut it off there

    (merge,) = merges(server)
    before = server.seen()
    unmerge(server, merge)
    owner: Any = {
        "commit": Swap,
        "checkpoint": server.engine,
        "unbar": server.engine.projects_store,
        "read_changes": change,
    }[name]
    real = getattr(owner, name)

    def cut(*args: Any, **kwargs: Any) -> None:
        if name in {"commit", "unbar"}:
            real(*args, **kwargs)
        raise _CutError

    monkeypatch.setattr(owner, name, cut)
    with pytest.raises(_CutError):
        server.run(server.engine._unmerging.restore(1, 3, 0))
    monkeypatch.undo()
    server.crash()
    server.run(server.engine.rewriting.ended())
    assert server.seen() == before
    assert (merges(server), merges(server, state="unmerged")) == ([merge], [])


@pytest.mark.parametrize("name", ["commit", "checkpoint", "bar", "read_changes"])
def test_an_unmerge_cut_off_is_ended_by_the_next_start(
    name: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrofill.engine import change  # noqa: PLC0415 # to cut it off there

    (merge,) = merges(server)
    owner: Any = {
        "commit": Swap,
        "checkpoint": server.engine,
        "bar": server.engine.projects_store,
        "read_changes": change,
    }[name]
    real = getattr(owner, name)

    def cut(*args: Any, **kwargs: Any) -> None:
        if name in {"commit", "bar"}:
            real(*args, **kwargs)
        raise _CutError

    monkeypatch.setattr(owner, name, cut)
    with pytest.raises(_CutError):
        server.run(server.engine._unmerging.unmerge(1, 3, 0))
    monkeypatch.undo()
    server.crash()
    server.run(server.engine.rewriting.ended())
    assert merges(server) == []
    assert [one.id for one in merges(server, state="unmerged")] == [merge.id]
    assert person(server, "ann-111").properties == {"b": 2, "c": 3, "d": 4}
    server.send([{**BOTH, "insert_id": "again"}])
    assert merges(server) == []


def test_check_and_why_know_what_was_taken_back(server: Server, tmp_path: Path) -> None:
    unmerge(server, merges(server)[0])
    assert rules(ask(server, property="b", user_id="ann-111")) == [("changed", True)]
    assert ask(server, property="plan", device_id="kiosk-9").value is None
    server.run(server.engine.close())
    report = check(tmp_path / "data", server.clock, sealer=SealerInside)
    assert report.differences == []
    assert report.refolded
    server.open()


def take_back(server: Server, seeded: random.Random, found: list[Listed]) -> None:
    """Take one of these back, and let one that was stand again now and then."""
    one = seeded.choice(found)
    unmerge(server, one)
    assert one.id not in {other.id for other in merges(server)}
    if seeded.random() < 0.3:
        restore(server, seeded.choice(merges(server, state="unmerged")))


def lose(server: Server, seeded: random.Random, *, the_import: bool) -> None:
    """Undo the import, or delete somebody."""
    if the_import:
        server.run(server.engine.undo(1, "old-shop"))
    else:
        _delete(server, user=seeded.choice(["ann-111", "bob-222", "eve-333"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 20))]
)
def test_random_lives_with_merges_taken_back_are_what_their_history_says(
    seed: int, tmp_path: Path
) -> None:
    seeded = random.Random(seed)
    server = Server(tmp_path / "data", FakeClock(), seeded.choice(["none", "amplitude"]))
    taken = number = 0

    async def more() -> None:
        nonlocal number
        number += 5
        server.clock.ms += 1000
        wire, path = _request(seeded, number, server.clock.ms, name=seeded.choice(["", "old-shop"]))
        for one in wire:  # devices enough to be joined
            if one.get("device_id"):
                one["device_id"] += f"-{seeded.randrange(9)}"
        await server.post(wire, path)

    async def meddle() -> None:  # while a merge is taken back
        if seeded.random() < 0.4:
            await more()

    server.meddle = meddle
    for _ in range(40):
        server.run(server.engine.rewriting.ended())
        server.run(more())
        chance = seeded.random()
        found = merges(server) if chance < 0.3 else []
        if found:
            take_back(server, seeded, found)
            taken += 1
        elif chance > 0.9:
            server.crash()
        elif chance > 0.8:
            lose(server, seeded, the_import=chance > 0.85)
    barred = {(one.device_id, one.user_id) for one in merges(server, state="unmerged", limit=1000)}
    assert taken
    assert all((one.device_id, one.user_id) not in barred for one in merges(server, limit=1000))
    server.close()
    report = check(server.folder, server.clock, sealer=SealerInside)
    assert report.differences == []
    assert report.refolded
