"""A device whose owner was deleted is nobody's, also after an undo, a restore or an unmerge has folded what is left.

The import has devices of its own: whether one that it shared with somebody deleted was freed cannot be known later.
Nor do deletions leave what somebody did to groups.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tests.engine.test_check import _note
from tests.engine.test_undo import Server, _properties, same
from tests.stateful.test_engine import FakeClock, SealerInside

from retrofill.core.person import FORGOTTEN
from retrofill.engine.check import check

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


def _owner(server: Server, *, user: str = "", device: str = "") -> int:
    """Whoever has an id now, 0 if it is nobody's."""
    state = server.engine.state.project(1)
    one = (state.users.get(user) if user else state.devices.get(device)) or 0
    who = state.people.get(one) if one else None
    return 0 if who is None or who.merged_into == FORGOTTEN else who.merged_into or one


def _delete(server: Server, **ids: str) -> None:
    """Delete whoever has an id now, with everyone merged into them; nobody if it is nobody's."""
    one = _owner(server, **ids)
    if not one:
        return
    server.run(server.engine.seal())
    with server.engine.lake.snapshot() as snapshot:
        merges = snapshot.merges(1)
    gone = [one, *(was for was, survivor in merges.items() if survivor == one)]
    server.run(server.engine.forget(1, gone))
    _note(server, one, erased="2000-01-01")


def _undone_after(tmp_path: Path, clock: FakeClock, *, later: list[dict[str, Any]]) -> Server:
    """Ann and then bob use a kiosk, bob is deleted, more comes; an import of ann's is undone."""
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
    subject.run(subject.engine.undo(1, "old-shop"))
    same(subject, control)
    clock.ms += 1000
    for server in servers:
        server.send([_event(9, KIOSK)])
    same(subject, control)
    control.close()
    return subject


def test_a_freed_device_is_nobodys_after_an_undo(tmp_path: Path, clock: FakeClock) -> None:
    subject = _undone_after(tmp_path, clock, later=[])
    who = subject.seen()
    assert [row["amplitude_id"] for row in who["rows"]] == [1, 2]
    subject.close()


def test_whoever_is_new_on_a_freed_device_stays_somebody_else(
    tmp_path: Path, clock: FakeClock
) -> None:
    subject = _undone_after(tmp_path, clock, later=[_event(5, KIOSK), _event(6, KIOSK)])
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
    assert _owner(subject, device="phone-1") == _owner(subject, user="bob-222") != 0
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(3, 100))]
)
def test_lives_with_deletions_end_as_those_that_never_saw_the_import(
    seed: int, tmp_path: Path, clock: FakeClock
) -> None:
    seeded = random.Random(seed)
    subject, control = (Server(tmp_path / name, clock) for name in ("subject", "control"))
    for number in range(1, seeded.randint(15, 30)):
        clock.ms += seeded.choice([10, 1000, 3_600_000])
        name = seeded.choice(["", "", "old-shop"])
        wire = _request(seeded, number, name)
        for server in (subject,) if name else (subject, control):
            server.send(wire)
        chance = seeded.random()
        if chance < 0.15:
            gone: dict[str, Any] = seeded.choice(
                [*({"user": user} for user in USERS), {"device": seeded.choice(DEVICES)}]
            )
            for server in (subject, control):
                _delete(server, **gone)
        elif chance < 0.2:
            subject.crash()
        elif chance < 0.3:
            subject.run(subject.engine.undo(1, "old-shop"))
    subject.run(subject.engine.undo(1, "old-shop"))
    theirs = same(subject, control)
    subject.crash()
    same(subject, theirs)
    for number in range(5):  # and goes on as the other does
        clock.ms += 1000
        wire = [_event(1000 + number, KIOSK, seeded.choice([*USERS, None, None]))]
        subject.send(wire)
        control.send(wire)
    same(subject, control)
    for server in (subject, control):
        server.close()
    assert check(subject.folder, clock, sealer=SealerInside).differences == []


def _request(seeded: random.Random, number: int, name: str) -> list[dict[str, Any]]:
    wire = []
    for at in range(seeded.randint(1, 3)):
        user = seeded.choice(USERS) if name else seeded.choice([*USERS, None, None, None])
        device = seeded.choice(CRM if name else DEVICES)
        event = _event(10 * number + at, device, user, name)
        if seeded.random() < 0.5:
            event["user_properties"] = _properties(seeded)
        wire.append(event)
    return wire


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 100))]
)
def test_lives_with_deletions_end_as_those_that_never_took_the_import_back(
    seed: int, tmp_path: Path, clock: FakeClock
) -> None:
    """As above, and the import is restored, now and then and in the end. Nothing of it comes while it is undone.

    Apart from the devices of its own that a deletion freed: no row says so, and whoever had one before has it again.
    """
    seeded = random.Random(seed)
    subject, control = (Server(tmp_path / name, clock) for name in ("subject", "control"))
    undone = False
    for number in range(1, seeded.randint(15, 30)):
        clock.ms += seeded.choice([10, 1000, 3_600_000])
        name = "" if undone else seeded.choice(["", "", "old-shop"])
        wire = _request(seeded, number, name)
        for server in (subject, control):
            server.send(wire)
        chance = seeded.random()
        if chance < 0.15:
            gone: dict[str, Any] = seeded.choice(
                [*({"user": user} for user in USERS), {"device": seeded.choice(DEVICES)}]
            )
            if _owner(subject, **gone):  # whom only a hidden row names nobody can delete
                for server in (subject, control):
                    _delete(server, **gone)
        elif chance < 0.2:
            subject.crash()
        elif chance < 0.4 and subject.run(_is_there(subject)):
            change = subject.engine.restore if undone else subject.engine.undo
            subject.run(change(1, "old-shop"))
            undone = not undone
    if undone:
        subject.run(subject.engine.restore(1, "old-shop"))
    theirs = control.seen()
    assert _as_freed(subject.seen(), theirs) == theirs
    subject.crash()
    assert _as_freed(subject.seen(), theirs) == theirs
    for server in (subject, control):
        server.close()
    assert check(subject.folder, clock, sealer=SealerInside).differences == []


def _as_freed(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Take the owners off the import's own devices that are nobody's with them."""
    gone = [device for device in CRM if theirs["devices"].get(device, 0) is None]
    return {**mine, "devices": {**mine["devices"], **dict.fromkeys(gone)}}


async def _is_there(server: Server) -> bool:
    await server.engine.seal()
    known = server.engine.imports.get(1, "old-shop")
    return known is not None or server.engine.lake.holds_import(1, "old-shop", 0)
