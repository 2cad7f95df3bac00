"""SIGKILL at any moment, then the same line again: nothing lost, nothing doubled, little done twice."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.backfill import staged
from tests.backfill.destination import Misbehaving, Reply, serve
from tests.backfill.test_send import check_whole
from tests.faults.process import PATIENCE_S

from retrofill.backfill.status import status

pytestmark = pytest.mark.slow

SCRIPT = """
import sys, pathlib
from retrofill.backfill import profile
from retrofill.backfill.drive import Drive, drive
made = profile.adjust(profile.PROFILES["retrofill"], events_per_request=7)
outcome = drive(Drive(work=pathlib.Path(sys.argv[1]), to=profile.target(sys.argv[2]), profile=made, api_key="key"))
sys.exit(0 if outcome.complete else 1)
"""


@contextmanager
def listening(to: Misbehaving, port: int = 0) -> Iterator[str]:
    """Serve from a thread of its own; yields the address."""
    loop = asyncio.new_event_loop()
    found: list[int] = []
    ready = threading.Event()

    async def whole() -> None:
        server = await serve(to, port, now=time.time)
        found.append(server.sockets[0].getsockname()[1])
        ready.set()
        async with server:
            await server.serve_forever()

    def run() -> None:
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            left = asyncio.all_tasks(loop)
            for one in left:
                one.cancel()
            if left:
                loop.run_until_complete(asyncio.wait(left))
            loop.close()

    task = loop.create_task(whole())
    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(PATIENCE_S)
    try:
        yield f"http://127.0.0.1:{found[0]}"
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


def begin(work: Path, url: str) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(path for path in sys.path if path)
    line = [sys.executable, "-c", SCRIPT, str(work), url]
    return subprocess.Popen(line, env={**os.environ, "PYTHONPATH": paths})


def killed_and_resumed(work: Path, *, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    made = staged.random_history(chance, 4000 + 1000 * kills)
    staged.write(work, made, group=512)
    faults = {"500 after storing": 0.01, "reset after": 0.01, "cut": 0.01}
    to = Misbehaving(seed, faults=faults)
    with listening(to) as url:
        before = 0
        for _ in range(kills):
            target = before + chance.randrange(1, 1 + 6000 // 7 // 4)
            running = begin(work, url)
            while len(to.arrivals) < target and running.poll() is None:
                time.sleep(0.002)
            running.send_signal(signal.SIGKILL)
            running.wait()
            before = len(to.arrivals)
        running = begin(work, url)
        assert running.wait(PATIENCE_S) == 0
    check_whole(work, made, to)
    assert status(work)["state"] == "complete"
    asked_again = sum(count for fault, count in to.statuses.items() if fault != "none")
    assert to.repeats <= (asked_again + 64 * kills) * 7


def test_killed_at_random_moments_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, kills=5, seed=1)


@pytest.mark.long
def test_killed_a_hundred_times_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    for seed in range(10):
        killed_and_resumed(tmp_path / str(seed), kills=10, seed=seed)


def test_ctrl_c_ends_when_what_is_under_way_is_answered_and_the_same_line_goes_on(
    tmp_path: Path,
) -> None:
    made = staged.history(dict.fromkeys(range(800), 20))
    staged.write(tmp_path, made)
    to = Misbehaving()
    honest, interrupt = to.handle, threading.Event()

    def handle(body: bytes, at: float) -> Reply:
        if len(to.arrivals) == 300:  # the destination waits with it, or all would be sent before
            interrupt.set()
            assert interrupted.wait(PATIENCE_S)
        return honest(body, at)

    to.handle = handle  # type: ignore[method-assign]  # the script of this test
    interrupted = threading.Event()
    with listening(to) as url:
        running = begin(tmp_path, url)
        assert interrupt.wait(PATIENCE_S)
        running.send_signal(signal.SIGINT)
        interrupted.set()
        assert running.wait(PATIENCE_S) == 1
        found = status(tmp_path)
        assert found["taken"] == len(to.stored)
        assert 0 < found["left"] < len(made)
        assert begin(tmp_path, url).wait(PATIENCE_S) == 0
    assert to.repeats == 0
    check_whole(tmp_path, made, to)
