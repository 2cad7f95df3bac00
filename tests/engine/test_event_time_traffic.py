"""Traffic goes on while the history of a project is changed that goes by event time, or is switched to it and back.

Requests are answered between any two steps of a change, late events among them, and the machine stops there now and
then. What is left in the end is what a server has that was sent the same and never changed anything.
"""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
from tests.core.permuted import BEGUN_MS, Sent, history
from tests.engine.test_event_time import IMPORT, alike, by_time, plans, send, settings, settled
from tests.engine.test_undo import Server, Wire, same, with_small_tails
from tests.stateful.test_engine import FakeClock

from retrofill.engine.refolder import Done, Rekey, Task, ThreadRefolder
from retrofill.errors import ConflictError, MissingError


class _CutError(BaseException):
    """The machine stops here."""


@pytest.fixture
def clock() -> FakeClock:
    clock = FakeClock()
    clock.ms = BEGUN_MS + 10**10
    return clock


class Life:
    """What happens to a server. told: what a control has to hear. during: requests answered inside a change."""

    def __init__(self, seed: int, subject: Server) -> None:
        self.seeded = random.Random(seed)
        self.subject = subject
        self.told: list[tuple[int, Wire, str]] = []
        self.during = 0
        crowd = seed % 3 * 3 + 1
        live = history(self.seeded, 50, crowd=crowd)
        live += [one for one in live if "insert_id" in one[1] and self.seeded.random() < 0.1]
        old = [(path, wire | IMPORT) for path, wire in history(self.seeded, 15, crowd=2)]
        # Some of it was imported too: an undo brings the live one back.
        old += [(path, wire | IMPORT) for path, wire in live if "insert_id" in wire][:5]
        self.left: list[Sent] = live + old
        if seed % 2:
            self.seeded.shuffle(self.left)
        else:  # most of it in order
            self.left.sort(
                key=lambda one: one[1]["time"] + self.seeded.choice([0] * 9 + [3_600_000])
            )
        self.kept = 20  # for the last change
        subject.meddle = self.meddle

    async def request(self) -> None:
        """Send the next events that came the same way."""
        if len(self.left) <= self.kept:
            return
        self.subject.clock.ms += self.seeded.choice([10, 1000, 3_600_000])
        path, first = self.left.pop(0)
        wire = [first]
        while self.left and self.left[0][0] == path and self.seeded.random() < 0.5:
            wire.append(self.left.pop(0)[1])
        kept = [one for one in wire if "ingestion_metadata" not in one]
        if kept:  # before it is awaited: others may be sent meanwhile
            self.told.append((self.subject.clock.ms, kept, path))
        await self.subject.post(wire, path)

    async def meddle(self) -> None:
        for _ in range(self.seeded.choice([0, 0, 1, 1, 2, 4]) if self.during else 1):
            self.during += bool(self.left)
            await self.request()
        if self.kept and self.seeded.random() < 0.04:
            raise _CutError

    def chapter(self) -> None:
        seeded, subject = self.seeded, self.subject
        # What a start takes up again has its own requests: two at a time would share a block and its time.
        subject.run(subject.engine.rewriting.ended())
        for _ in range(seeded.randint(1, 6)):
            subject.run(self.request())
            if seeded.random() < 0.2:
                subject.run(subject.engine.seal())
        self.change()
        if seeded.random() < 0.2:
            subject.run(subject.engine.rewriting.ended())  # else nobody knows what was answered
            subject.crash()

    def change(self) -> None:
        engine = self.subject.engine
        now = engine.settings(1).property_time
        to = settings("arrival" if now == "event" else "event")
        asked: Any = self.seeded.choice(
            [
                lambda: engine.undo(1, "old-shop"),
                lambda: engine.restore(1, "old-shop"),
                lambda: engine.change_settings(1, to),
                lambda: engine.event_time.settle(1),
                lambda: engine.event_time.settle_beside(1),
            ]
        )
        try:
            with contextlib.suppress(ConflictError, MissingError):
                self.subject.run(asked())
        except _CutError:
            self.subject.crash()

    def end(self) -> None:
        """Change history once more, in event time, while all that is left is sent in any order: nothing mends that later."""
        subject, engine = self.subject, self.subject.engine
        subject.run(engine.rewriting.ended())
        subject.meddle = None
        if self.seeded.random() < 0.5:
            subject.run(engine.change_settings(1, settings("arrival")))
        with contextlib.suppress(ConflictError, MissingError):
            subject.run(engine.restore(1, "old-shop"))
        self.kept, self.during = 0, 0
        self.seeded.shuffle(self.left)
        subject.meddle = self.meddle
        if engine.settings(1).property_time == "arrival":
            subject.run(engine.change_settings(1, settings("event")))
            subject.meddle = None
        subject.run(engine.undo(1, "old-shop"))
        subject.meddle = None
        assert self.during
        self.left = [one for one in self.left if "ingestion_metadata" not in one[1]]
        while self.left:
            subject.run(self.request())


def tell(control: Server, told: list[tuple[int, Wire, str]]) -> None:
    for ms, wire, path in told:
        control.clock.ms = ms
        control.send(wire, path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 200))]
)
def test_changes_beside_traffic_end_in_what_a_control_has(
    seed: int, tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_small_tails(monkeypatch, seed)
    if seed % 3 == 1:
        monkeypatch.setattr("retrofill.engine.state.LATE_MARKS_KEPT", 4)
    subject = by_time(tmp_path / "subject", clock, "event" if seed % 4 else "arrival")
    began_ms = clock.ms
    life = Life(2000 + seed, subject)
    for _ in range(life.seeded.randint(2, 5)):
        life.chapter()
    life.end()
    now_ms = clock.ms
    clock.ms = began_ms
    by_event = by_time(tmp_path / "event", clock)
    tell(by_event, life.told)
    clock.ms = began_ms
    by_arrival = by_time(tmp_path / "arrival", clock, "arrival")
    tell(by_arrival, life.told)
    clock.ms = now_ms
    alike(settled(subject), by_event)
    subject.crash()
    alike(subject, by_event)
    subject.run(subject.engine.change_settings(1, settings("arrival")))
    same(subject, by_arrival)
    subject.crash()
    same(subject, by_arrival)
    for server in (subject, by_event, by_arrival):
        server.close()


class Late(ThreadRefolder):
    """Folds history again; once the first pass is over it, events come that are late by what it folded."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server

    async def ask(self, task: Task) -> Done:
        if isinstance(task, Rekey):
            assert not self.server.engine.committing.locked()
            late = {"event_type": "open", "device_id": "phone-1", "time": BEGUN_MS + 2000}
            await self.server.post([late | {"user_properties": {"plan": "trial"}}])
        return await super().ask(task)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", ["switch", "undo"])
def test_what_comes_late_by_what_is_folded_already_is_folded_again(
    name: str,
    cut: bool,  # noqa: FBT001 - a parameter
    tmp_path: Path,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = by_time(tmp_path, clock, "arrival" if name == "switch" else "event")
    send(server, 1000, user_properties={"plan": "free"})
    send(server, 1500, user_properties={"plan": "old"}, **IMPORT)
    send(server, 3000)
    send(server, 5000, user_properties={"plan": "gold"})
    engine: Any = server.engine
    engine.rewriting._refolder = lambda: Late(server)
    asked = (
        engine.event_time._switch(1, "event")
        if name == "switch"
        else engine._undoing.undo(1, "old-shop")
    )
    if cut:

        async def stop() -> None:
            raise _CutError

        with monkeypatch.context() as patched:
            patched.setattr(engine, "checkpoint", stop)
            with pytest.raises(_CutError):
                server.run(asked)
        server.crash()
    else:
        server.run(asked)
    assert server.engine.state.project(1).by_time
    assert server.engine.event_time.late_since(1)
    old = ["old"] if name == "switch" else []
    assert plans(server) == ["free", *old, "trial", "trial", "gold"]
    server.close()
