"""A device whose owner was deleted is nobody's, also after an undo, a restore or an unmerge has folded what is left.

Two servers are compared in which a deletion takes the same rows. Deletions do not leave what somebody did to groups.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tests.engine.test_check import _note
from tests.engine.test_event_time import by_time
from tests.engine.test_undo import Server, _properties, same
from tests.stateful.test_engine import FakeClock, SealerInside

from retrofill.engine.admission import ProjectSettings
from retrofill.engine.check import check
from retrofill.lake import freed

KIOSK = "kiosk-9"
DEVICES = [KIOSK, "phone-1", "tablet-4"]
CRM = ["crm-1", "crm-2"]  # the import's own
USERS = ["ann-111", "bob-222", "eve-333"]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def _event(number: int, device: str, user: str | None = None, name: str = "") -> dict[str, Any]:
    event: dict[str, Any] = {
        "event_type": "open",
        "device_id": device,
        "time": 1_700_000_000_000 + number,
        "insert_id": f"i-{number}",
    }
    if user:
        event["user_id"] = user
    if name:
        event["ingestion_metadata"] = {"source_name": "retrofill", "source_version": name}
    return event


def _delete(server: Server, **ids: str) -> None:
    """Delete whoever has an id now, with everyone merged into them; nobody if it is nobody's."""
    gone = _people(server, **ids)
    if gone:
        server.run(server.engine.forget(1, gone))
        _note(server, gone[0], erased="2000-01-01")


def _people(server: Server, **ids: str) -> list[int]:
    """Whoever has an id now, with everyone merged into them."""
    server.run(server.engine.seal())
    one = server.owner(**ids)
    with server.engine.lake.snapshot() as snapshot:
        merges = snapshot.merges(1)
    one = merges.get(one, one)
    return [one, *(was for was, survivor in merges.items() if survivor == one)] if one else []


def _undone_after(
    tmp_path: Path, clock: FakeClock, *, later: list[dict[str, Any]], before: bool = False
) -> Server:
    """Ann and then bob use a kiosk, bob is deleted, more comes; an import of ann's is undone.

    before: the deletion was one of before there was a table `freed`.
    """
    servers = [Server(tmp_path / name, clock) for name in ("subject", "control")]
    subject, control = servers
    for server in servers:
        server.send([_event(1, KIOSK, "ann-111"), _event(2, KIOSK, "bob-222")])
        server.send([_event(3, KIOSK)])
    subject.send([_event(4, "crm-1", "ann-111", "old-shop")])
    for server in servers:
        _delete(server, user="bob-222")
        if later:
            server.send(later)
    if before:
        subject.run(subject.engine.seal())
        subject.engine.lake._db.execute("DROP TABLE lake.freed")
        subject.crash()
    subject.run(subject.engine.undo(1, "old-shop"))
    same(subject, control)
    clock.ms += 1000
    for server in servers:
        server.send([_event(9, KIOSK)])
    same(subject, control)
    control.close()
    return subject


@pytest.mark.parametrize("before", [False, True])
def test_a_freed_device_is_nobodys_after_an_undo(
    tmp_path: Path, clock: FakeClock, *, before: bool
) -> None:
    subject = _undone_after(tmp_path, clock, later=[], before=before)
    who = subject.seen()
    assert [row["amplitude_id"] for row in who["rows"]] == [1, 2]
    subject.close()


@pytest.mark.parametrize("before", [False, True])
def test_whoever_is_new_on_a_freed_device_stays_somebody_else(
    tmp_path: Path, clock: FakeClock, *, before: bool
) -> None:
    later = [_event(5, KIOSK), _event(6, KIOSK)]
    subject = _undone_after(tmp_path, clock, later=later, before=before)
    who = subject.seen()
    assert [row["amplitude_id"] for row in who["rows"]] == [1, 2, 2, 2]
    subject.crash()
    assert subject.seen() == who
    subject.close()
    assert check(subject.folder, clock, sealer=SealerInside).differences == []


def test_who_is_hidden_as_the_first_on_a_freed_device_frees_it(
    tmp_path: Path, clock: FakeClock
) -> None:
    servers = [Server(tmp_path / name, clock) for name in ("subject", "control")]
    subject, control = servers
    for server in servers:
        server.send([_event(1, KIOSK, "ann-111"), _event(2, KIOSK, "bob-222")])
        _delete(server, user="bob-222")
    subject.send([_event(4, KIOSK, name="old-shop")])
    for server in servers:
        server.send([_event(5, KIOSK)])
    subject.run(subject.engine.undo(1, "old-shop"))
    same(subject, control)
    assert [row["amplitude_id"] for row in subject.seen()["rows"]] == [1, 2]
    for server in servers:
        server.close()


def test_a_group_identify_of_somebody_else_frees_no_device(
    tmp_path: Path, clock: FakeClock
) -> None:
    """A fold reads them of all people. Bob's first one has no user on a device that he took: he was not new there."""
    servers = [Server(tmp_path / name, clock) for name in ("subject", "control")]
    subject, control = servers
    of_group = {
        "event_type": "$groupidentify",
        "groups": {"org": "acme"},
        "group_properties": {"$set": {"size": 1}},
    }
    for server in servers:
        server.send([_event(1, "tablet-4", "bob-222")])
        server.send([_event(2, "phone-1") | of_group])
        server.send([_event(3, "phone-1", "bob-222")])
        server.send([_event(4, "phone-1") | of_group])
    subject.send([_event(5, "crm-1", "ann-111", "old-shop")])
    subject.run(subject.engine.undo(1, "old-shop"))
    same(subject, control)
    assert subject.owner(device="phone-1") == subject.owner(user="bob-222") != 0
    for server in servers:
        server.close()


def test_who_was_deleted_does_not_come_back_with_an_import(
    tmp_path: Path, clock: FakeClock
) -> None:
    """While the import is undone its rows are hidden, and those of whoever it had made known are nobody's."""
    server = Server(tmp_path / "data", clock)
    server.send([_event(1, "crm-1", "eve-333", "old-shop"), _event(2, "crm-1", name="old-shop")])
    server.send([_event(3, "crm-2", "ann-111", "old-shop")])
    server.run(server.engine.undo(1, "old-shop"))
    server.send([_event(4, "phone-1", "bob-222"), _event(5, "tablet-4", "eve-333")])
    _delete(server, user="eve-333")
    server.run(server.engine.restore(1, "old-shop"))
    rows = server.seen()["rows"]
    assert {row["user_id"] for row in rows} == {"ann-111", "bob-222"}
    server.crash()
    assert server.seen()["rows"] == rows
    server.close()
    assert check(server.folder, clock, sealer=SealerInside).differences == []


def test_who_was_held_apart_from_somebody_deleted_does_not_take_the_device(
    tmp_path: Path, clock: FakeClock
) -> None:
    servers = [Server(tmp_path / name, clock) for name in ("subject", "control")]
    for server in servers:
        limits: dict[str, Any] = {"merges_per_user": 1}
        server.run(server.engine.change_settings(1, ProjectSettings(limits)))
        server.send([_event(1, "tablet-4", "ann-111"), _event(2, "phone-1")])
        server.send([_event(3, "phone-1", "ann-111"), _event(4, KIOSK)])
        server.send([_event(5, KIOSK, "ann-111")])  # one merge is all that there may be
    servers[0].send([_event(6, "crm-1", "ann-111", "old-shop")])
    for server in servers:
        _delete(server, device=KIOSK)
    servers[0].run(servers[0].engine.undo(1, "old-shop"))
    for server in servers:
        assert server.owner(device=KIOSK) == 0
        server.send([_event(7, KIOSK)])
        assert [row["amplitude_id"] for row in server.seen()["rows"]] == [1, 2, 1, 1, 3]
    for server in servers:
        server.close()
        assert check(server.folder, clock, sealer=SealerInside).differences == []


def test_a_device_that_deleted_rows_of_an_import_had_taken_is_free_while_it_is_shown(
    tmp_path: Path, clock: FakeClock
) -> None:
    """Nothing else is left of the import."""
    server = Server(tmp_path / "data", clock)
    server.send([_event(1, KIOSK, "ann-111")])
    server.send([_event(2, KIOSK, "eve-333", "old-shop")])
    server.run(server.engine.undo(1, "old-shop"))
    server.send([_event(3, "phone-1", "eve-333")])
    _delete(server, user="eve-333")
    ann = server.owner(user="ann-111")
    assert server.owner(device=KIOSK) == ann
    for change, owner in (("restore", 0), ("undo", ann), ("restore", 0)):
        server.run(getattr(server.engine, change)(1, "old-shop"))
        assert server.owner(device=KIOSK) == owner
    server.crash()
    assert server.owner(device=KIOSK) == 0
    server.send([_event(4, KIOSK)])
    assert [row["amplitude_id"] for row in server.seen()["rows"]] == [1, 2]
    server.close()
    assert check(server.folder, clock, sealer=SealerInside).differences == []


def test_a_deletion_leaves_no_trace_on_devices_of_theirs_alone(
    tmp_path: Path, clock: FakeClock
) -> None:
    server = Server(tmp_path / "data", clock)
    server.send([_event(1, KIOSK, "ann-111"), _event(2, KIOSK, "bob-222")])
    server.send([_event(3, "phone-1", "bob-222"), _event(4, KIOSK)])
    _delete(server, user="bob-222")
    assert _traces(server) == [(KIOSK, 1, 1)]
    _delete(server, user="ann-111")
    assert _traces(server) == []
    server.close()


def _traces(server: Server) -> list[tuple[str, int, int]]:
    with server.engine.lake.snapshot() as snapshot:
        ask = snapshot.cursor.execute
        return ask('SELECT device_id, "block", "row" FROM lake.freed ORDER BY ALL').fetchall()


class Lives:
    """The same history in two servers, but for what happens to the import.

    kind: "apart", an import with devices of its own and users that are known; "shared", one that uses the devices of all, without
    a user too; "by time", as apart, in a project that goes by event time.
    """

    def __init__(self, kind: str, seed: int, folder: Path, clock: FakeClock) -> None:
        self.kind, self.seeded, self.clock = kind, random.Random(seed), clock
        make = by_time if kind == "by time" else Server
        self.subject, self.control = (make(folder / name, clock) for name in ("subject", "control"))

    def request(self, number: int, name: str) -> list[dict[str, Any]]:
        seeded, wire = self.seeded, []
        apart = name and self.kind != "shared"
        for at in range(seeded.randint(1, 3)):
            user = seeded.choice(USERS if apart else [*USERS, None, None, None])
            event = _event(10 * number + at, seeded.choice(CRM if apart else DEVICES), user, name)
            if self.kind == "by time":
                event["time"] += seeded.randrange(-300, 300) * 1000
            if seeded.random() < 0.5:
                event["user_properties"] = _properties(seeded)
            wire.append(event)
        return wire

    def delete(self, *, name: str = "") -> None:
        """Delete somebody in both, if that takes the same rows in both, but for an import's."""
        ids = self.seeded.choice(
            [*({"user": user} for user in USERS), {"device": self.seeded.choice(DEVICES)}]
        )
        taken = []
        for server in (self.subject, self.control):
            self.settle(server)
            taken.append(_taken(server, _people(server, **ids), name))
        if taken[0] == taken[1] and taken[0]:
            for server in (self.subject, self.control):
                _delete(server, **ids)

    def settle(self, server: Server) -> None:
        server.run(server.engine.event_time.settle(1))

    def same(self, theirs: dict[str, Any] | None = None) -> dict[str, Any]:
        self.settle(self.subject)
        self.settle(self.control)
        return same(self.subject, self.control if theirs is None else theirs)

    def end(self) -> None:
        """They go on alike, and what is stored is what its rows say."""
        for number in range(5):
            self.clock.ms += 1000
            wire = [_event(1000 + number, KIOSK, self.seeded.choice([*USERS, None, None]))]
            self.subject.send(wire)
            self.control.send(wire)
        self.same()
        self.subject.close()
        self.control.close()
        found = check(self.subject.folder, self.clock, sealer=SealerInside)
        assert found.differences == []


def _taken(server: Server, people: list[int], name: str) -> set[str]:
    """What a deletion of these people takes, hidden rows too, without the rows of an import."""
    with server.engine.lake.snapshot() as snapshot:
        ask = snapshot.cursor.execute
        hidden = ask(freed.HIDDEN_OF, [1, people]).fetchall()
        places = [list(side) for side in zip(*hidden, strict=True)][:3] or [[], [], []]
        return {
            insert
            for (insert,) in ask(
                f"SELECT insert_id FROM lake.events WHERE project = $1 AND {freed.GONE} "
                "AND coalesce(import_id, '-') <> $6",
                [1, people, *places, name],
            ).fetchall()
        }


def _seeds(*usual: str) -> list[Any]:
    """A hundred lives of each kind; one of each of the usual ones is no long test."""
    return [
        pytest.param(kind, seed, marks=[] if kind in usual and not seed else pytest.mark.long)
        for kind in ("apart", "shared", "by time")
        for seed in range(100)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed"), _seeds("shared"))
def test_lives_with_deletions_end_as_those_that_never_saw_the_import(
    kind: str, seed: int, tmp_path: Path, clock: FakeClock
) -> None:
    lives = Lives(kind, seed, tmp_path, clock)
    seeded, subject, control = lives.seeded, lives.subject, lives.control
    for number in range(1, seeded.randint(15, 30)):
        clock.ms += seeded.choice([10, 1000, 3_600_000])
        name = seeded.choice(["", "", "old-shop"])
        wire = lives.request(number, name)
        for server in (subject,) if name else (subject, control):
            server.send(wire)
        chance = seeded.random()
        if chance < 0.15:
            lives.delete(name="old-shop")
        elif chance < 0.2:
            lives.subject.crash()
        elif chance < 0.3:
            subject.run(subject.engine.undo(1, "old-shop"))
    subject.run(subject.engine.undo(1, "old-shop"))
    theirs = lives.same()
    subject.crash()
    lives.same(theirs)
    lives.end()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed"), _seeds("shared", "by time"))
def test_lives_with_deletions_end_as_those_that_never_took_the_import_back(
    kind: str, seed: int, tmp_path: Path, clock: FakeClock
) -> None:
    """As above, and the import is restored, now and then and in the end. Nothing of it comes while it is undone."""
    lives = Lives(kind, seed, tmp_path, clock)
    seeded, subject, control = lives.seeded, lives.subject, lives.control
    undone = False
    for number in range(1, seeded.randint(15, 30)):
        clock.ms += seeded.choice([10, 1000, 3_600_000])
        name = "" if undone else seeded.choice(["", "", "old-shop"])
        wire = lives.request(number, name)
        for server in (subject, control):
            server.send(wire)
        chance = seeded.random()
        if chance < 0.15:
            lives.delete()
        elif chance < 0.2:
            subject.crash()
        elif chance < 0.4 and subject.run(_is_there(subject)):
            change = subject.engine.restore if undone else subject.engine.undo
            subject.run(change(1, "old-shop"))
            undone = not undone
    if undone:
        subject.run(subject.engine.restore(1, "old-shop"))
    theirs = lives.same()
    subject.crash()
    lives.same(theirs)
    lives.end()


async def _is_there(server: Server) -> bool:
    await server.engine.seal()
    known = server.engine.imports.get(1, "old-shop")
    return known is not None or server.engine.lake.holds_import(1, "old-shop", 0)
