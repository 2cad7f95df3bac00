"""Changes of history that meet much traffic, or fail, or are called off; and what is left of an undone import in the end."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest
from tests.engine.test_undo import Interrupted, Server, _CutError, _event, one_import, same
from tests.stateful.test_engine import FakeClock

from retrofill.core.throttle import Quota
from retrofill.engine import change, imports, refolder
from retrofill.engine.admission import ProjectSettings
from retrofill.engine.pace import Pace
from retrofill.engine.refolder import Done, Rekey, Tail, Task, ThreadRefolder
from retrofill.errors import ConflictError, StoreError
from retrofill.hot.intents import Intents, Tried
from retrofill.limits import (
    MS_PER_DAY,
    REFOLD_TRIES_MAX,
    SEAL_LAG_EVENTS_MAX,
    UNDO_RETENTION_DAYS,
)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def subject(tmp_path: Path, clock: FakeClock) -> Server:
    return Server(tmp_path / "subject", clock)


# Much traffic.


class Flooded(ThreadRefolder):
    """Folds history again, and while key files are written much else arrives."""

    def __init__(self, server: Server, wires: list[Any], tails: list[Tail]) -> None:
        super().__init__()
        self.server, self.wires, self.tails = server, wires, tails

    async def ask(self, task: Task) -> Done:
        if isinstance(task, Tail):
            self.tails.append(task)
        if isinstance(task, Rekey):
            for wire in self.wires:
                self.server.clock.ms += 1000
                await self.server.post(wire)
        return await super().ask(task)


@pytest.mark.parametrize("tail_bytes", [10**9, 0])
def test_what_comes_while_an_import_is_undone_is_folded_some_blocks_at_a_time(
    tail_bytes: int, tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change, "REFOLD_TAIL_ROWS", 2)
    monkeypatch.setattr(change, "REFOLD_TAIL_MAX", 5)
    monkeypatch.setattr(refolder, "REFOLD_TAIL_BYTES", tail_bytes)
    seeded = random.Random(11)
    subject, control = Server(tmp_path / "subject", clock), Server(tmp_path / "control", clock)
    first = [[_event(seeded, at, clock.ms)] for at in range(12)]
    old = [[_event(seeded, 100 + at, clock.ms, name="old-shop")] for at in range(4)]
    # By these an earlier stranger joins whom the import touched.
    wires = [[_event(seeded, 200 + 3 * at + n, clock.ms) for n in range(2)] for at in range(20)]
    for wire in first:
        clock.ms += 1000
        subject.send(wire)
        control.send(wire)
    for wire in old:
        subject.send(wire)
    start_ms = clock.ms
    tails: list[Tail] = []
    engine: Any = subject.engine
    engine.rewriting._refolder = lambda: Flooded(subject, wires, tails)
    subject.run(engine.undo(1, "old-shop"))
    clock.ms = start_ms
    for wire in wires:
        clock.ms += 1000
        control.send(wire)
    same(subject, control)
    asked = [tail.last - tail.first + 1 for tail in tails]
    assert max(asked) == 2  # of two rows each
    assert len(asked) == (10 if tail_bytes else 20)
    assert engine.pace.rows_per_s == 0
    subject.crash()
    same(subject, control)
    subject.close()
    control.close()


def test_of_what_comes_while_an_import_is_restored_only_repeats_are_remembered(
    subject: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change, "REFOLD_TAIL_ROWS", 2)
    monkeypatch.setattr(change, "REFOLD_TAIL_MAX", 5)
    one_import(subject)
    subject.run(subject.engine.undo(1, "old-shop"))
    seeded, device = random.Random(5), {"device_id": "phone-1"}
    wires = [[_event(seeded, 500 + at, subject.clock.ms) | device] for at in range(40)]
    flooded = Flooded(subject, wires, [])
    engine: Any = subject.engine
    engine.rewriting._refolder = lambda: flooded
    subject.run(engine.restore(1, "old-shop"))
    assert flooded.tails
    folding = flooded._session._folding
    assert folding.rows >= len(wires)
    assert not folding._contested
    assert not folding._held
    subject.close()


def test_a_merge_of_lake_files_and_idle_children_give_way_to_a_change_of_history(
    subject: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_import(subject)
    engine = subject.engine
    rests, gives_back = engine.compaction_rests, engine.children_rest
    asked: list[str] = []

    def resting(*, given_up: bool) -> Any:
        asked.append(f"given_up={given_up}")
        return rests(given_up=given_up)

    async def giving_back() -> None:
        asked.append("children while sealing rests" if engine.sealing.locked() else "children")
        await gives_back()

    monkeypatch.setattr(engine, "compaction_rests", resting)
    monkeypatch.setattr(engine, "children_rest", giving_back)
    subject.run(engine.undo(1, "old-shop"))
    subject.run(engine.restore(1, "old-shop"))
    assert asked == 2 * ["given_up=True", "children", "children while sealing rests"]
    subject.close()


class Waiting(Pace):
    """As long as somebody catches up, blocks wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.rooms: list[int] = []

    def wait_s(self, rows: int, *, now_s: float, took_s: float, room: int = 0) -> float:
        assert took_s > 0
        # Much room, little has come.
        assert super().wait_s(rows, now_s=now_s, took_s=0.0, room=room) == 0
        self.rooms.append(room)
        return 3600 * self.catching_up


class Busy(ThreadRefolder):
    """Folds history again; while sealing rests for it a request is answered, and another waits."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server
        self.waits: asyncio.Task[None] | None = None

    async def ask(self, task: Task) -> Done:
        if isinstance(task, Rekey):
            assert self.server.engine.sealing.locked()
            seeded, at_ms = random.Random(3), self.server.clock.ms
            wires = [[_event(seeded, 300 + 2 * at + n, at_ms) for n in range(2)] for at in range(2)]
            await self.server.post(wires[0])
            self.waits = asyncio.create_task(self.server.post(wires[1]))
        done = await super().ask(task)
        assert self.waits is None or not self.waits.done()
        return done


def test_blocks_that_are_put_off_know_what_room_is_left_and_go_on_when_the_change_has_ended(
    subject: Server,
) -> None:
    one_import(subject)
    engine: Any = subject.engine
    engine.pace = Waiting()
    busy = Busy(subject)
    engine.rewriting._refolder = lambda: busy
    subject.run(engine.undo(1, "old-shop"))
    assert busy.waits is not None
    subject.run(busy.waits)
    assert engine.pace.rooms == [SEAL_LAG_EVENTS_MAX - 2] * 2
    subject.close()


def quota_of(server: Server) -> Any:
    """Return what counts for the daily quota, and what the lake says that does."""
    engine: Any = server.engine
    server.run(engine.seal())
    again = Quota()
    again.load(*engine.lake.quota_rows(1, server.clock.ms))
    counted = engine._admissions[1]._quota
    for one in (counted, again):
        one.change([], [], now_ms=server.clock.ms)
    return counted.rows(), again.rows()


@pytest.mark.parametrize("seed", range(3))
def test_the_daily_quota_follows_an_undo_and_a_restore(
    seed: int, subject: Server, clock: FakeClock
) -> None:
    subject.engine.set_settings(1, ProjectSettings({"daily_quota": 1000}))
    seeded, number = random.Random(seed), 0

    async def more() -> None:
        nonlocal number
        number += 1
        clock.ms += 600_000
        name = seeded.choice(["", "old-shop"])
        # Every third repeats an insert_id: the import has displaced some of these.
        await subject.post([_event(seeded, number, clock.ms, name=name) for _ in range(3)])

    for _ in range(30):
        subject.run(more())
    subject.meddle = more
    seen = []
    for ask in (subject.engine.undo, subject.engine.restore, subject.engine.undo):
        counted, stored = quota_of(subject)
        assert counted == stored
        seen.append(counted)
        subject.run(ask(1, "old-shop"))
    assert seen[0] != seen[1]
    counted, stored = quota_of(subject)
    assert counted == stored
    subject.close()


# Failures.


async def _fails() -> None:
    raise StoreError("There is no memory")


def test_an_undo_that_never_succeeds_is_left_alone_until_it_is_called_off(
    subject: Server, clock: FakeClock
) -> None:
    one_import(subject)
    subject.send([_event(random.Random(3), 77, clock.ms, name="old-crm")])
    before = subject.seen()
    subject.meddle = _fails
    with pytest.raises(StoreError, match="no memory"):
        subject.run(subject.engine.undo(1, "old-shop"))
    for times in range(1, REFOLD_TRIES_MAX + 3):
        subject.run(subject.engine.rewriting.ended())
        tries = min(times, REFOLD_TRIES_MAX)
        assert subject.engine.tried(1) == {"old-shop": Tried(tries, "There is no memory")}
        assert subject.seen() == before
        subject.crash()
    one = subject.engine.imports.get(1, "old-shop")
    assert one is not None
    assert one.state == "undoing"
    subject.meddle = None
    with pytest.raises(ConflictError, match="undo of old-shop has failed 3 times: There is no mem"):
        subject.run(subject.engine.undo(1, "old-crm"))
    assert subject.run(subject.engine.cancel(1, "old-shop")).state == "open"
    assert subject.engine.tried(1) == {}
    assert subject.seen() == before
    with pytest.raises(ConflictError, match="neither being undone nor restored"):
        subject.run(subject.engine.cancel(1, "old-shop"))
    for name in ("old-crm", "old-shop"):
        assert subject.run(subject.engine.undo(1, name)).state == "undone"
    subject.close()


def test_an_undo_that_was_given_up_may_be_asked_for_once_more(subject: Server) -> None:
    one_import(subject)
    subject.meddle = _fails
    for _ in range(REFOLD_TRIES_MAX):
        with pytest.raises(StoreError, match="no memory"):
            subject.run(subject.engine.undo(1, "old-shop"))
    subject.meddle = None
    assert subject.run(subject.engine.undo(1, "old-shop")).state == "undone"
    assert subject.engine.tried(1) == {}
    subject.close()


def test_a_restore_that_was_given_up_may_be_asked_for_once_more(subject: Server) -> None:
    one_import(subject)
    before = subject.seen()
    subject.run(subject.engine.undo(1, "old-shop"))
    subject.meddle = _fails
    for _ in range(REFOLD_TRIES_MAX):
        with pytest.raises(StoreError, match="no memory"):
            subject.run(subject.engine.restore(1, "old-shop"))
    subject.crash()
    subject.run(subject.engine.rewriting.ended())
    subject.meddle = None
    with pytest.raises(ConflictError, match="restore of old-shop has failed 3 times"):
        subject.run(subject.engine.undo(1, "old-shop"))
    assert subject.run(subject.engine.restore(1, "old-shop")).state == "open"
    assert subject.engine.tried(1) == {}
    assert subject.seen() == before
    subject.close()


def test_a_switch_that_fails_is_forgotten_and_the_next_start_serves(
    subject: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_import(subject)
    engine: Any = subject.engine
    wanted = msgspec.structs.replace(engine.settings(1), property_time="event")
    with monkeypatch.context() as patched:
        patched.setattr(engine.rewriting, "_refolder", lambda: Interrupted(_fails))
        with pytest.raises(StoreError, match="no memory"):
            subject.run(engine.change_settings(1, wanted))
    assert engine._intents.all() == []
    assert engine.settings(1).property_time == "arrival"
    subject.crash()
    subject.run(subject.engine.change_settings(1, wanted))
    assert subject.engine.settings(1).property_time == "event"
    subject.close()


# Called off.


def test_an_undo_under_way_is_called_off_and_nothing_has_changed(subject: Server) -> None:
    one_import(subject)
    imports.closed(subject.engine.imports, 1, "old-shop")
    before = subject.seen()
    engine: Any = subject.engine
    asked: list[asyncio.Task[Any]] = []

    async def call_off() -> None:
        asked.append(asyncio.create_task(engine.cancel(1, "old-shop")))
        await asyncio.sleep(0)

    engine.rewriting._refolder = lambda: Interrupted(call_off)
    with pytest.raises(ConflictError, match="called off, nothing has changed"):
        subject.run(engine.undo(1, "old-shop"))
    assert subject.run(asked[0]).state == "closed"
    assert subject.seen() == before
    subject.crash()
    assert subject.seen() == before
    assert subject.run(subject.engine.undo(1, "old-shop")).state == "undone"
    subject.close()


def test_an_undo_that_is_in_the_lake_is_not_called_off(
    subject: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_import(subject)
    engine: Any = subject.engine
    sealed, checkpoint = engine.sealed, engine.checkpoint
    late: list[asyncio.Task[Any]] = []

    async def nearly(first: int, last: int) -> None:
        with pytest.raises(ConflictError, match="nearly done"):
            await engine.cancel(1, "old-shop")
        await sealed(first, last)

    async def later() -> None:
        late.append(asyncio.create_task(engine.cancel(1, "old-shop")))
        await asyncio.sleep(0)
        await checkpoint()

    subject.run(engine.seal())
    monkeypatch.setattr(engine, "sealed", nearly)
    monkeypatch.setattr(engine, "checkpoint", later)
    assert subject.run(engine.undo(1, "old-shop")).state == "undone"
    with pytest.raises(ConflictError, match="neither being undone"):
        subject.run(late[0])
    monkeypatch.undo()
    subject.close()


@pytest.mark.parametrize("after", [False, True])
def test_a_stop_while_an_undo_is_called_off_leaves_the_import_whole(
    after: bool,  # noqa: FBT001 - a parameter
    subject: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_import(subject)
    before = subject.seen()
    subject.meddle = _fails
    with pytest.raises(StoreError):
        subject.run(subject.engine.undo(1, "old-shop"))
    engine: Any = subject.engine
    remove = engine._intents.remove

    def cut(number: int) -> None:
        if after:
            remove(number)
        raise _CutError

    monkeypatch.setattr(engine._intents, "remove", cut)
    with pytest.raises(_CutError):
        subject.run(engine._undoing.cancel(1, "old-shop"))
    subject.crash()
    subject.run(subject.engine.rewriting.ended())
    one = subject.engine.imports.get(1, "old-shop")
    assert one is not None
    assert one.state == ("open" if after else "undoing")
    assert subject.seen() == before
    subject.meddle = None
    subject.close()


def test_a_stop_leaves_an_undo_under_way_to_the_next_start(subject: Server) -> None:
    one_import(subject)
    engine: Any = subject.engine
    asked: list[Any] = []

    async def begun_and_closed() -> None:
        asked.append(asyncio.create_task(engine.undo(1, "old-shop")))
        await closing.wait()
        await engine.close()

    closing = asyncio.Event()

    async def close() -> None:
        closing.set()
        while engine.rewriting._running._unwanted is None:  # noqa: ASYNC110 - a flag, no event
            await asyncio.sleep(0)

    engine.rewriting._refolder = lambda: Interrupted(close)
    subject.run(begun_and_closed())
    with pytest.raises(StoreError, match="The server is stopping"):
        subject.run(asked[0])
    with contextlib.closing(Intents(subject.folder / "intents.sqlite")) as intents:
        assert list(intents.tried().values()) == [Tried(0)]  # this one does not count
    subject.open()
    subject.run(subject.engine.rewriting.ended())
    one = subject.engine.imports.get(1, "old-shop")
    assert one is not None
    assert one.state == "undone"
    subject.close()


# What is left in the end.


def names_in_files(server: Server) -> set[str | None]:
    """Return the imports that any lake file names, deleted rows included; files of deletes name no import."""
    found = server.engine.lake.events.glob("*.parquet")
    return {
        name
        for path in found
        if "import_id" in pq.read_schema(path).names
        for name in pq.read_table(path, columns=["import_id"])["import_id"].to_pylist()
    }


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["", "purge", "compact", "purged"])
def test_rows_that_nobody_can_restore_any_more_are_gone_from_every_file(
    cut: str, subject: Server, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded = random.Random(9)
    old = [[_event(seeded, at, clock.ms, name="old-shop")] for at in range(5)]
    for at, wire in enumerate(old):
        subject.send(wire)
        subject.send([_event(seeded, 50 + at, clock.ms)])
    engine: Any = subject.engine
    subject.run(engine.undo(1, "old-shop"))
    clock.ms += UNDO_RETENTION_DAYS * MS_PER_DAY
    assert subject.run(engine.purge()) == 0
    assert subject.run(engine.restore(1, "old-shop")).state == "open"
    subject.run(engine.undo(1, "old-shop"))
    before = subject.seen()
    assert "old-shop" in names_in_files(subject)
    clock.ms += UNDO_RETENTION_DAYS * MS_PER_DAY + 1
    with pytest.raises(ConflictError, match="more than 30 days ago, its rows are gone"):
        subject.run(engine.restore(1, "old-shop"))
    if cut:
        owner = {"purge": engine.lake, "compact": engine, "purged": imports}[cut]

        def stop(*_: Any) -> None:
            raise _CutError

        monkeypatch.setattr(owner, cut, stop)
        with pytest.raises(_CutError):
            subject.run(engine._undoing.purge())
        monkeypatch.undo()
        subject.crash()
        engine = subject.engine
    gone = subject.run(engine.purge())
    assert gone == (len(old) if cut in ("", "purge") else 0)
    assert subject.run(engine.purge()) == 0
    assert "old-shop" not in names_in_files(subject)
    assert subject.seen() == before
    subject.crash()
    engine = subject.engine
    assert subject.seen() == before
    clock.ms = clock.ms - 2 * MS_PER_DAY  # a clock that was set back brings nothing back
    with pytest.raises(ConflictError, match="its rows are gone"):
        subject.run(engine.restore(1, "old-shop"))
    clock.ms += 3 * MS_PER_DAY
    for wire in old:  # none of their keys is left
        subject.send(wire)
    assert len(subject.seen()["rows"]) == len(before["rows"]) + len(old)
    subject.close()


@pytest.mark.slow
def test_hidden_rows_of_an_earlier_generation_are_deleted_and_the_last_one_stays(
    subject: Server, clock: FakeClock
) -> None:
    seeded, engine = random.Random(2), subject.engine
    for at in range(2):
        subject.send([_event(seeded, 10 * at + n, clock.ms, name="old-shop") for n in range(3)])
        subject.run(engine.undo(1, "old-shop"))
        clock.ms += 1000
    assert subject.run(engine.purge()) == 3
    assert subject.run(engine.purge()) == 0
    assert subject.run(engine.restore(1, "old-shop")).state == "open"
    assert len(subject.seen()["rows"]) == 3
    subject.close()
