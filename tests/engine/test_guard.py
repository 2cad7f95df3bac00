"""An id that joins many people is held: live, in every fold after that, and over stops; old directories know no limit."""

from __future__ import annotations

import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from tests.engine.test_undo import Server, _request, same
from tests.engine.test_unmerge import merges
from tests.engine.test_why import ask, rules
from tests.stateful.test_engine import FakeClock, SealerInside

from retrofill.core.block import Flag
from retrofill.engine import ingest
from retrofill.engine.admission import ProjectSettings
from retrofill.engine.check import check
from retrofill.engine.guard import Held, listed
from retrofill.errors import MissingError

OLD = Path(__file__).parent.parent / "data" / "directory-1.tar.xz"
VIEW = {"event_type": "View"}
IMPORT = {"source_name": "retrofill", "source_version": "old-shop"}


def limit(server: Server, most: int) -> None:
    server.engine.set_settings(1, ProjectSettings(limits={"merges_per_user": most}))


def open_at(folder: Path, most: int) -> Server:
    server = Server(folder, FakeClock())
    limit(server, most)
    return server


def visit(server: Server, device: str, user: str = "", **more: Any) -> None:
    server.clock.ms += 1000
    one: dict[str, Any] = {**VIEW, "device_id": device, "time": server.clock.ms, **more}
    server.send([{**one, "user_id": user} if user else one])


def log_in(server: Server, number: int, **more: Any) -> None:
    visit(server, f"device-{number}", **more)
    visit(server, f"device-{number}", "guest-1", **more)


def held(server: Server) -> list[str]:
    return [row["device_id"] for row in server.seen()["rows"] if row["flags"] & Flag.HELD]


def joined(server: Server) -> int:
    state = server.engine.state.project(1)
    person = state.people.get(state.users.get("guest-1") or 0)
    assert person is not None
    return person.joined


def reviewed(server: Server, most: int = 10) -> list[Held]:
    with server.engine.reader().view(1) as view:
        return listed(view, server.engine.settings(1).merge_always, most)


def found_by_check(server: Server) -> list[Any]:
    server.run(server.engine.close())
    report = check(server.folder, server.clock, sealer=SealerInside)
    assert report.refolded
    server.open()
    return report.differences


def test_who_is_over_the_limit_stays_apart_over_stops_and_other_limits(tmp_path: Path) -> None:
    server = open_at(tmp_path / "data", 2)
    visit(server, "home-1", "guest-1")
    for number in range(4):
        log_in(server, number)
        if number % 2:
            server.crash()
    assert held(server) == ["device-2", "device-3"]
    assert joined(server) == len(merges(server)) == 2
    assert found_by_check(server) == []
    limit(server, 0)
    visit(server, "device-3", "guest-1")
    limit(server, 3)
    visit(server, "device-2", "guest-1")
    assert held(server) == ["device-2", "device-3"]
    assert (joined(server), len(merges(server))) == (3, 4)
    assert found_by_check(server) == []
    server.close()


def test_without_the_import_that_took_an_id_over_the_limit_nobody_is_held(tmp_path: Path) -> None:
    subject, control = (open_at(tmp_path / one, 2) for one in ("subject", "control"))
    for number in range(5):
        for server in (subject, control):
            if server is subject or number not in (1, 2):
                imported = {"ingestion_metadata": IMPORT} if number in (1, 2) else {}
                log_in(server, number, **imported)
            else:
                server.clock.ms += 2000
    assert held(subject) == ["device-3", "device-4"]
    subject.run(subject.engine.undo(1, "old-shop"))
    assert held(subject) == held(control) == []
    same(subject, control)
    subject.run(subject.engine.restore(1, "old-shop"))
    assert held(subject) == ["device-3", "device-4"]
    assert found_by_check(subject) == []
    subject.close()
    control.close()


def test_who_joins_too_many_is_told_once_listed_and_may_be_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = open_at(tmp_path / "data", 1)
    told: list[tuple[Any, Any]] = []

    class Log:
        def warning(self, event: str, **said: Any) -> None:
            assert event == "merges_held"
            told.append((said["project"], said["amplitude_id"]))

        def info(self, event: str, **said: Any) -> None:
            """Not looked at."""

    monkeypatch.setattr(ingest, "log", Log())
    visit(server, "home-1", "guest-1")
    log_in(server, 0)
    first_ms = server.clock.ms + 2000
    for number in (1, 2):
        log_in(server, number, user_properties={f"p{number}": 1})
    server.run(server.engine.seal())
    visit(server, "device-1", "guest-1")
    visit(server, "other-1")
    visit(server, "home-2", "ann-111")
    log_in(server, 3, user_properties={"p3": 1})
    guest = server.engine.state.project(1).users.get("guest-1")
    assert told == [(1, guest)]
    assert server.engine.figures.held == 4
    (one,) = reviewed(server)
    assert (one.user_id, one.amplitude_id, one.merged) == ("guest-1", guest, 1)
    assert (one.devices, one.events, one.allowed) == (3, 4, False)
    assert (one.first_event_time_ms, one.last_event_time_ms) == (first_ms, server.clock.ms)
    assert reviewed(server, 0) == []
    # What the device showed before is its own, and what its user says is the user's.
    assert rules(ask(server, property="p2", device_id="device-2")) == [("changed", True)]
    assert ask(server, property="p2", user_id="guest-1").value == 1
    people = server.engine.state.project(1).devices
    with pytest.raises(MissingError, match="anybody: guest-1 joins more people than") as apart:
        ask(server, merge=people.get("device-2"))
    assert "merge_always" in apart.value.mend
    with pytest.raises(MissingError, match=r"anybody$"):
        ask(server, merge=people.get("other-1"))
    settings = server.engine.settings(1)
    server.engine.set_settings(1, replace(settings, merge_always=["guest-1"]))
    visit(server, "device-2", "guest-1")
    assert (len(merges(server)), joined(server)) == (2, 1)
    assert [held.allowed for held in reviewed(server)] == [True]
    server.crash()
    visit(server, "device-3", "guest-1")
    assert (len(merges(server)), joined(server)) == (3, 1)
    assert found_by_check(server) == []
    server.close()


class Lives:
    """Two servers with a limit of one or two merges; one of them is sent an import as well, and stopped now and then."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seeded = random.Random(seed)
        self.number = 0
        self.subject = open_at(folder / "subject", 1 + seed // 2 % 2)
        self.control = open_at(folder / "control", 1 + seed // 2 % 2)
        for server in (self.subject, self.control) if seed % 2 else ():
            limits = server.engine.settings(1).limits
            event = ProjectSettings(limits, property_time="event")
            server.run(server.engine.change_settings(1, event))

    def request(self) -> None:
        seeded, subject = self.seeded, self.subject
        self.number += 5
        name = seeded.choice(["", "", "old-shop"])
        now_ms = subject.clock.ms + seeded.choice([10, 1000, 3_600_000])
        wire, path = _request(seeded, self.number, now_ms, name=name)
        for one in wire:  # devices enough to be joined, by one user more than by others
            if one.get("device_id"):
                one["device_id"] += f"-{seeded.randrange(9)}"
            if one.get("user_id") and seeded.random() < 0.6:
                one["user_id"] = "guest-1"
        if seeded.random() < 0.5:
            for user in ({}, {"user_id": "guest-1"}):
                one = {**VIEW, "time": now_ms, "device_id": f"booth-{self.number}", **user}
                imported = {"ingestion_metadata": IMPORT} if name else {}
                wire.append({**one, "insert_id": f"{self.number}-{len(user)}", **imported})
        for server in (subject, self.control):
            server.clock.ms = now_ms
            if server is subject or not name:
                server.send(wire, path)

    def decide(self) -> None:
        """Allow the id that joins most, or no longer."""
        for server in (self.subject, self.control):
            settings = server.engine.settings(1)
            users = [] if settings.merge_always else ["guest-1"]
            server.engine.set_settings(1, replace(settings, merge_always=users))

    def happening(self) -> None:
        subject, chance = self.subject, self.seeded.random()
        if chance < 0.1:
            subject.run(subject.engine.seal())
        elif chance < 0.2:
            subject.crash()
        elif chance < 0.25:
            subject.run(subject.engine.undo(1, "old-shop"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 40))]
)
def test_random_lives_with_a_limit_are_what_their_history_says(seed: int, tmp_path: Path) -> None:
    lives = Lives(tmp_path, seed)
    subject, control = lives.subject, lives.control
    for _ in range(24):
        lives.request()
        lives.happening()
        if lives.seeded.random() < 0.1:
            lives.decide()
    subject.run(subject.engine.undo(1, "old-shop"))
    for server in (subject, control):
        server.run(server.engine.event_time.settle(1))
    theirs = same(subject, control)
    subject.crash()
    same(subject, theirs)
    assert found_by_check(subject) == []
    assert held(control) or seed > 1
    subject.close()
    control.close()


def test_a_directory_of_before_opens_and_folds_as_before(tmp_path: Path) -> None:
    with tarfile.open(OLD) as packed:
        packed.extractall(tmp_path, filter="data")
    server = open_at(tmp_path / "data", 1)
    server.clock.ms += 3_600_000
    assert [row["merges_max"] for row in server.seen()["rows"]] == [*[None] * 11, *[0] * 3]
    assert len(merges(server)) == 5
    assert (held(server), joined(server)) == ([], 0)
    assert found_by_check(server) == []
    for number in (8, 9):  # those of before do not count
        log_in(server, number)
    assert (held(server), joined(server), len(merges(server))) == (["device-9"], 1, 6)
    server.run(server.engine.undo(1, "old-shop"))
    assert len(merges(server)) == 5
    server.run(server.engine.seal())
    server.run(server.engine.compact())
    server.crash()
    assert found_by_check(server) == []
    server.run(server.engine.restore(1, "old-shop"))
    assert len(merges(server)) == 6
    assert held(server) == ["device-9"]
    assert found_by_check(server) == []
    server.close()
