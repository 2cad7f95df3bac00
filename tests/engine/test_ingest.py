"""The engine between a request and a restart: what was decided stays decided, whatever is set or cancelled since."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.faults.process import PATIENCE_S

from retrofill.clock import SystemClock
from retrofill.config import Settings
from retrofill.core import event as events
from retrofill.core.event import Batch, Refusal
from retrofill.core.throttle import Accepted, Throttled
from retrofill.engine import ingest
from retrofill.engine.admission import ProjectSettings
from retrofill.engine.ingest import Engine
from retrofill.errors import BusyError, FullError, StoreError
from retrofill.limits import MS_PER_DAY

pytestmark = pytest.mark.slow


def opened(data: Path, limits: str = "amplitude") -> Engine:
    engine = Engine.open(Settings(data=data, limits=limits), clock=SystemClock())
    engine.add_project(engine.projects_store.add("one", "key", "secret"))
    return engine


def batch(*wire: dict[str, Any], path: str = "/batch") -> Batch:
    found = [events.decode_one(msgspec.json.encode(one)) for one in wire]
    body = events.encode(found)
    return Batch(1, path, body, found, len(body), SystemClock().now_ms())


def update(value: int) -> Batch:
    return batch({"event_type": "View", "user_id": "ann-111", "user_properties": {"n": value}})


def n_of_ann(engine: Engine) -> Any:
    person = engine.person(1, engine.state.project(1).users.get("ann-111") or 0)
    assert person is not None
    return person.properties["n"]


@pytest.mark.parametrize("limits", ["amplitude", "none"])
def test_a_limit_changed_after_a_commit_changes_nothing_that_was_decided(
    tmp_path: Path, limits: str
) -> None:
    async def first() -> None:
        engine = opened(tmp_path)
        await engine.start()
        engine.set_settings(1, ProjectSettings({"property_updates_per_h": 1}))
        for value in (1, 2):
            assert isinstance(await engine.ingest(update(value)), Accepted)
        engine.set_settings(1, ProjectSettings())
        assert n_of_ann(engine) == 1
        await engine.abandon()

    asyncio.run(first())
    again = opened(tmp_path, limits)
    assert n_of_ann(again) == 1
    asyncio.run(again.close())


def test_a_cancelled_deletion_stops_neither_the_engine_nor_its_closing(tmp_path: Path) -> None:
    async def run() -> None:
        engine = opened(tmp_path)
        await engine.start()
        assert isinstance(await engine.ingest(update(1)), Accepted)
        forgetting = asyncio.create_task(engine.forget(1, [100_000_000_001]))
        await asyncio.sleep(0)
        forgetting.cancel()
        assert isinstance(await engine.ingest(update(2)), Accepted)
        assert engine.problem() is None
        await engine.close()

    asyncio.run(run())
    asyncio.run(opened(tmp_path).close())


def test_two_mappings_that_make_a_circle_are_not_both_taken_in_one_block(tmp_path: Path) -> None:
    async def run() -> None:
        engine = opened(tmp_path)
        await engine.start()
        there, back = (
            batch(
                {
                    "event_type": "$usermap",
                    "user_id": one,
                    "user_properties": {"global_user_id": other},
                },
                path="/usermap",
            )
            for one, other in (("ann-111", "bob-222"), ("bob-222", "ann-111"))
        )
        outcomes = await asyncio.gather(engine.ingest(there), engine.ingest(back))
        assert [type(one) for one in outcomes] == [Accepted, Refusal]
        assert engine.aliases(1) == {"ann-111": "bob-222"}
        await engine.close()

    asyncio.run(run())


def test_settings_that_cannot_be_stored_do_not_hold(tmp_path: Path) -> None:
    engine = opened(tmp_path)

    def full(_number: int, _settings: bytes) -> None:
        raise FullError("No room is left on the device")

    engine.projects_store.set_settings = full  # type: ignore[method-assign] # the fault
    with pytest.raises(FullError):
        engine.set_settings(1, ProjectSettings({"batch_eps": 1}))
    assert engine.limits(1).batch_eps == 1000
    asyncio.run(engine.close())


def test_blocks_that_the_lake_has_are_sealed_no_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(_: int) -> None:
        raise FullError("The disk is full")

    async def run() -> None:
        engine = opened(tmp_path)
        await engine.start()
        assert isinstance(await engine.ingest(update(1)), Accepted)
        with monkeypatch.context() as patched:
            patched.setattr(engine.counting, "save", full)
            with pytest.raises(FullError):
                await engine.seal()
        assert engine.problem() == "The disk is full"
        with pytest.raises(StoreError, match="has failed"):
            await engine.seal()
        await engine.close()
        assert rows(opened(tmp_path)) == 1

    asyncio.run(run())


@pytest.mark.parametrize(("adopted", "by"), [(0, "undo"), (1, "reader"), (2, "reader")])
def test_a_seal_that_fails_is_told_to_its_asker_and_the_next_takes_what_is_left(
    adopted: int, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        engine = opened(tmp_path)
        await engine.start()
        for value in range(2):
            assert isinstance(await engine.ingest(update(value)), Accepted)
        real = engine._sealer.seal

        async def full(first: int, _: int) -> None:
            if adopted:
                await real(first, first + adopted - 1)
            raise FullError("The disk is full")

        with monkeypatch.context() as patched:
            patched.setattr(engine._sealer, "seal", full)
            with pytest.raises(FullError):
                await (engine.undo(1, "old-shop") if by == "undo" else engine.seal())
        assert engine.problem() is None
        assert engine.figures.seal_failures == 1
        assert [one.number for one in engine.unsealed] == [1, 2][adopted:]
        assert isinstance(await engine.ingest(update(2)), Accepted)
        await engine.seal()
        assert not engine.unsealed
        await engine.close()
        assert rows(opened(tmp_path)) == 3

    asyncio.run(run())


class FailingOnce:
    """A sealer's `seal` that fails the first time. done: it has sealed."""

    def __init__(self, engine: Engine) -> None:
        self.real = engine._sealer.seal
        self.calls = 0
        self.done = asyncio.Event()

    async def __call__(self, first: int, last: int) -> Any:
        self.calls += 1
        if self.calls == 1:
            raise FullError("The disk is full")
        done = await self.real(first, last)
        self.done.set()
        return done


def test_a_seal_that_failed_in_the_background_is_tried_again_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        for name, value in {"SEAL_EVENTS": 1, "SEAL_RETRY_MS": 10, "BACKGROUND_S": 0.01}.items():
            monkeypatch.setattr(ingest, name, value)
        engine = opened(tmp_path)
        failing = FailingOnce(engine)
        monkeypatch.setattr(engine._sealer, "seal", failing)
        await engine.start()
        assert isinstance(await engine.ingest(update(1)), Accepted)
        async with asyncio.timeout(PATIENCE_S):
            await failing.done.wait()
        async with engine.sealing:
            assert not engine.unsealed
        assert (engine.figures.seal_failures, engine.problem()) == (1, None)
        await engine.close()
        assert rows(opened(tmp_path)) == 1

    asyncio.run(run())


def test_a_deletion_whose_seal_fails_is_told_and_done_when_it_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        engine = opened(tmp_path)
        await engine.start()
        assert isinstance(await engine.ingest(update(1)), Accepted)
        ann = engine.state.project(1).users.get("ann-111") or 0
        monkeypatch.setattr(engine._sealer, "seal", FailingOnce(engine))
        with pytest.raises(FullError):
            await engine.forget(1, [ann])
        assert engine.problem() is None
        await engine.forget(1, [ann])
        await engine.close()
        assert rows(opened(tmp_path)) == 0

    asyncio.run(run())


def test_while_too_much_waits_to_be_sealed_nothing_is_taken_and_health_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        monkeypatch.setattr(ingest, "SEAL_LAG_EVENTS_MAX", 2)
        engine = opened(tmp_path)
        await engine.start()
        for value in range(3):
            assert isinstance(await engine.ingest(update(value)), Accepted)
        with pytest.raises(BusyError, match="Sealing has to catch up"):
            await engine.ingest(update(3))
        assert "3 events wait to be sealed" in str(engine.problem())
        await engine.seal()
        assert engine.problem() is None
        assert isinstance(await engine.ingest(update(4)), Accepted)
        await engine.close()
        assert rows(opened(tmp_path)) == 4

    asyncio.run(run())


def test_a_seal_after_which_nobody_knows_what_the_lake_has_stops_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(_first: int, _last: int) -> None:
        raise FullError("The disk is full")

    def unread() -> int:
        raise StoreError("The lake failed")

    async def run() -> None:
        engine = opened(tmp_path)
        await engine.start()
        assert isinstance(await engine.ingest(update(1)), Accepted)
        with monkeypatch.context() as patched:
            patched.setattr(engine._sealer, "seal", full)
            patched.setattr(engine.lake, "sealed", unread)
            with pytest.raises(StoreError, match="The lake failed"):
                await engine.seal()
        assert engine.problem() == "The lake failed"
        await engine.close()
        again = opened(tmp_path)
        assert n_of_ann(again) == 1
        await again.close()

    asyncio.run(run())


def test_a_seal_whose_asker_is_cancelled_goes_on(tmp_path: Path) -> None:
    async def run() -> None:
        engine = opened(tmp_path)
        await engine.start()
        assert isinstance(await engine.ingest(update(1)), Accepted)
        adopt, adopting, go = engine.lake.adopt, asyncio.Event(), threading.Event()

        def held(*told: Any, **named: Any) -> None:
            loop.call_soon_threadsafe(adopting.set)
            assert go.wait(PATIENCE_S)
            adopt(*told, **named)

        loop = asyncio.get_running_loop()
        engine.lake.adopt = held  # type: ignore[method-assign] # it only waits
        asked = asyncio.create_task(engine.seal())
        await adopting.wait()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        go.set()
        await engine.close()
        assert rows(opened(tmp_path)) == 1

    asyncio.run(run())


def rows(engine: Engine) -> int:
    """Count what the lake holds, and close the engine."""
    with engine.lake.snapshot() as snapshot:
        found = snapshot.cursor.execute("SELECT count(*) FROM lake.events").fetchone()
    engine._let_go()
    return int(found[0])


def test_blocks_that_come_back_after_a_stop_are_deleted_again(tmp_path: Path) -> None:
    """A deletion is on disk with the next block only."""
    data, store = tmp_path / "data", tmp_path / "data" / "hot.sqlite"
    kept = tmp_path / "kept.sqlite"

    async def run(value: int) -> None:
        engine = opened(data)
        await engine.start()
        assert isinstance(await engine.ingest(update(value)), Accepted)
        with engine.pin(0):  # they are not deleted meanwhile
            await engine.seal()
            await engine.checkpoint()
            await engine.counting.save(engine.state.block)
            if not kept.exists():
                with closing(sqlite3.connect(store)) as db, closing(sqlite3.connect(kept)) as copy:
                    db.backup(copy)
        await engine.close()

    asyncio.run(run(1))
    shutil.copy(kept, store)
    again = opened(data)
    assert [number for number, _ in again.blocks.numbers()] == [1]
    assert (n_of_ann(again), list(again.unsealed)) == (1, [])
    asyncio.run(again.close())
    asyncio.run(run(2))
    last = opened(data)
    assert (n_of_ann(last), last.blocks.numbers(), last.lake.sealed()) == (2, [], 2)
    with closing(sqlite3.connect(store)) as db:
        assert db.execute("PRAGMA freelist_count").fetchall() == [
            (0,)
        ]  # closing leaves no room unused
    asyncio.run(last.close())


def test_blocks_stay_until_their_key_file_is_written(tmp_path: Path) -> None:
    async def run() -> None:
        engine = opened(tmp_path)
        await engine.start()
        assert isinstance(await engine.ingest(update(1)), Accepted)
        await engine.checkpoint()
        write, seen = engine.duplicates.sealed, []

        def watched(first: int, last: int, *, oldest_block: int) -> None:
            asyncio.run_coroutine_threadsafe(engine._delete_blocks(), loop).result(PATIENCE_S)
            seen.append([number for number, _ in engine.blocks.numbers()])
            write(first, last, oldest_block=oldest_block)

        loop = asyncio.get_running_loop()
        engine.duplicates.sealed = watched  # type: ignore[method-assign] # it only looks on
        await engine.seal()
        assert seen == [[1]]
        await engine.close()
        assert (tmp_path / "keys").is_dir()

    asyncio.run(run())


def test_a_repeat_after_the_window_is_stored_also_when_its_times_were_let_go(
    tmp_path: Path,
) -> None:
    class Moved(SystemClock):
        by_ms = 0

        def now_ms(self) -> int:
            return super().now_ms() + self.by_ms

    clock = Moved()

    async def run() -> int:
        engine = Engine.open(Settings(data=tmp_path), clock=clock)
        engine.add_project(engine.projects_store.add("one", "key", "secret"))
        await engine.start()
        once = {"event_type": "View", "user_id": "ann-111", "insert_id": "one"}
        for by_ms in (0, 0, 8 * MS_PER_DAY, 0):
            clock.by_ms += by_ms
            await engine.ingest(batch({"event_type": "Other", "user_id": "bob-222"}))
            await engine.checkpoint()
            await engine.ingest(batch(once))
        duplicates = engine.figures.duplicates
        await engine.close()
        return duplicates

    assert asyncio.run(run()) == 2


def test_events_are_let_go_once_they_are_folded_and_count_all_the_same(tmp_path: Path) -> None:
    async def run() -> None:
        engine = opened(tmp_path)
        await engine.start()
        engine.set_settings(1, ProjectSettings({"daily_quota": 2}))
        whole = batch(
            {"event_type": "View", "user_id": "ann-111", "insert_id": "a"},
            {"event_type": "View", "user_id": "ann-111", "insert_id": "b"},
            {"event_type": "View", "user_id": "ann-111", "insert_id": "a"},
            {"event_type": "$identify", "user_id": "ann-111"},
        )
        outcome = await engine.ingest(whole)
        assert isinstance(outcome, Accepted)
        assert outcome.events == 4
        assert whole.events == []
        assert (engine.figures.events, engine.figures.duplicates) == (4, 1)
        # Neither the duplicate nor the identify counts.
        full = await engine.ingest(update(1))
        assert isinstance(full, Throttled)
        assert full.quota_users == {"ann-111": 2}
        await engine.close()

    asyncio.run(run())
