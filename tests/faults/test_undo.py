"""Killed inside an undo or a restore under live load, a server ends as one that never saw the import, or has it whole.

A real server takes live requests and an import, is told to undo it (or to restore it), and is killed: at a step of the
protocol, or at any moment. Started again it ends what it began. A control server was sent the same requests without the
import. Both must hold the same rows with the same snapshots, people and first events, up to numbers, times and uuids.
"""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.faults.process import Process, Row

pytestmark = pytest.mark.slow

IMPORT = "old-shop"
ANSWER_S = 600
# Requests beside each change at most: what a change takes grows with the history, which must not grow with the time that
# the changes before it took, or on a busy machine a hundred of them would never end.
BESIDE = 60
# So few rows may be left for the pause that on a busy machine more come each time around: ten times, not 200.
SETTINGS = (
    "SEAL_EVENTS=400 CHECKPOINT_EVENTS=300 REFOLD_ROWS=200 REFOLD_PASS_ROWS=20 "
    "REFOLD_TAIL_ROWS=20 REFOLD_TAIL_MAX=50 REFOLD_TAILS_MAX=10 REFOLD_PACE_ROWS=50"
)

# Steps at which the server is killed: a method, and whether it was done by then. Once in the life of a directory.
STEPS = [
    "retrofill.hot.intents.Intents.add after",
    "retrofill.hot.intents.Intents.reserve after",
    "retrofill.engine.refolder.ChildRefolder.ask before",
    "retrofill.lake.ducklake.Swap.take_out after",
    "retrofill.lake.ducklake.Swap.put_in after",
    "retrofill.lake.ducklake.Swap.commit before",
    "retrofill.lake.ducklake.Swap.commit after",
    "retrofill.engine.duplicates.Duplicates.adopt before",
    "retrofill.engine.duplicates.Duplicates.mend before",
    "retrofill.engine.duplicates.Duplicates.sealed before",
    "retrofill.hot.imports.Imports.put_counts_aside before",
    "retrofill.hot.intents.Intents.remove before",
]
# What ordinary seals do too, the one at the beginning of an undo among them, counts from this step on: before it nobody
# was told that there is an undo, and nothing of one is stored.
SINCE = {
    "retrofill.engine.duplicates.Duplicates.sealed before": "retrofill.lake.ducklake.Swap.commit"
}
_DYING = """
import asyncio, importlib, os, signal, functools
from pathlib import Path
armed = Path({armed!r})
def found(path):
    module, kind, name = path.rsplit(".", 2)
    owner = getattr(importlib.import_module(module), kind)
    return owner, name, getattr(owner, name)
due = not {since!r}
if not due:
    earlier, called, done = found({since!r})
    def noted(*values, **named):
        global due
        made = done(*values, **named)
        due = True
        return made
    setattr(earlier, called, noted)
owner, name, real = found({step!r}.split()[0])
def die():
    if due and armed.exists():
        armed.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
before = {step!r}.endswith("before")
if asyncio.iscoroutinefunction(real):
    async def dying(*values, **named):
        if before:
            die()
        made = await real(*values, **named)
        die()
        return made
else:
    def dying(*values, **named):
        if before:
            die()
        made = real(*values, **named)
        die()
        return made
setattr(owner, name, dying)
"""


def dying(step: str, armed: Path) -> str:
    """Return what a server does first that is to be killed at a step, once the file `armed` is there."""
    return _DYING.format(armed=str(armed), step=step, since=SINCE.get(step, ""))


class Traffic(threading.Thread):
    """Sends requests one after another, each until it is answered 200, and keeps them in their order."""

    pause_s = 0.02  # between two: what is undone beside full load is measured by bench/imports.py

    def __init__(self, server: Process, seed: int) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._random = random.Random(seed)
        self._number = 0
        self._stop_asked = threading.Event()
        self._left: int | None = None
        self.sent: list[list[Row]] = []
        self.wrong: str | None = None
        self.over = False  # nobody will answer any more

    def run(self) -> None:
        pause_s = self.pause_s
        while not self._stop_asked.wait(pause_s) and self.wrong is None:
            if self._left == 0:
                continue
            if self._left is not None:
                self._left -= 1
            begun = time.monotonic()
            self.send(self.request())
            # A busy machine is made no busier, or the test would take the more work the longer it takes.
            took_s = time.monotonic() - begun
            pause_s = min(max(self.pause_s, 2 * took_s), 10 * self.pause_s)

    def go_on(self, requests: int) -> None:
        """Send so many more at most from now on."""
        self._left = requests

    def stop(self) -> None:
        self._stop_asked.set()
        self.join(ANSWER_S)
        assert not self.is_alive()
        assert self.wrong is None, self.wrong

    def give_up(self) -> None:
        """Stop whether what is under way is answered or not."""
        self.over = True
        self._stop_asked.set()

    def request(self, name: str = "") -> list[Row]:
        """Make a request: of people who share devices, with properties that build on one another."""
        rnd, made = self._random, []
        for _ in range(rnd.randint(1, 12)):
            self._number += 1
            person = rnd.randrange(30)
            event: Row = {
                "event_type": rnd.choice(["step", "buy"]),
                "insert_id": f"{name}-{self._number}",
                "device_id": f"device-{person // 2}",
                "time": 1_700_000_000_000 + rnd.randrange(10**9),
                "user_properties": {
                    "$add": {"count": 1},
                    "$set": {f"p{rnd.randrange(4)}": self._number},
                },
            }
            if rnd.random() < 0.5:
                event["user_id"] = f"user-{person:03}"
            if rnd.random() < 0.05:
                event["groups"] = {"org": "acme"}
            if name:
                event["ingestion_metadata"] = {"source_name": "retrofill", "source_version": name}
            made.append(event)
        return made

    def send(self, events: list[Row]) -> None:
        end = time.monotonic() + ANSWER_S
        while True:
            try:
                status, answer = self._server.send(events)
            except (OSError, http.client.HTTPException, ValueError):
                status, answer = 503, {}
            if status == 200:
                break
            if status != 503 or self.over or time.monotonic() > end:
                self.wrong = f"{status} {answer}"
                return
            time.sleep(0.02)
        if "ingestion_metadata" not in events[0]:
            self.sent.append(events)


def rows_of(server: Process) -> list[Row]:
    """Return what a server shows, without what may differ, people numbered in order of appearance."""
    found = server.export()
    order = {row["$insert_id"]: place for place, row in enumerate(found)}
    assert len(order) == len(found)  # each once
    seen: dict[int, int] = {}
    kept = []
    for row in sorted(found, key=lambda row: order[row["$insert_id"]]):
        row["amplitude_id"] = seen.setdefault(row["amplitude_id"], len(seen))
        for name in list(row):
            if (
                name in ("uuid", "event_id", "processed_time")
                or name.startswith("server_")
                or name == "client_upload_time"
            ):
                del row[name]
        kept.append(row)
    return kept


def same(server: Process, control: Process) -> None:
    mine, theirs = rows_of(server), rows_of(control)
    by_id = {row["$insert_id"]: row for row in theirs}
    assert {row["$insert_id"] for row in mine} == by_id.keys()
    for row in mine:
        assert row == by_id[row["$insert_id"]]
    assert mine == theirs


def state_of(server: Process) -> str | None:
    with suppress(OSError, http.client.HTTPException):
        status, body = server.ask("GET", f"/api/1/imports/{IMPORT}")
        if status == 200:
            return str(_json(body)["state"])
    return None


def _json(body: bytes) -> Any:
    import json  # noqa: PLC0415 - only here

    return json.loads(body)


def wait_for(server: Process, *states: str) -> None:
    end = time.monotonic() + ANSWER_S
    begun = time.monotonic()
    while state_of(server) not in states:
        assert time.monotonic() < end, (state_of(server), server.said())
        # Not so often that the server does little else: an answer counts the import's rows.
        time.sleep(max(0.05, 4 * (time.monotonic() - begun)))
        begun = time.monotonic()


@contextmanager
def both(folder: Path, first: str = "") -> Iterator[tuple[Process, Process, Traffic]]:
    server = Process(folder / "data", settings=SETTINGS, first=first)
    control = Process(folder / "control", settings=SETTINGS)
    traffic = Traffic(server, 7)
    try:
        server.start()
        server.wait_until_ready()
        yield server, control, traffic
    finally:
        traffic.give_up()
        server.end()
        control.end()


def change(server: Process, method: str) -> threading.Thread:
    path = f"/api/1/imports/{IMPORT}" + ("/restore" if method == "POST" else "")

    def ask() -> None:
        with suppress(OSError, http.client.HTTPException):
            server.ask(method, path)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    return asking


def fill(traffic: Traffic, requests: int) -> None:
    for number in range(requests):
        traffic.send(traffic.request(IMPORT if number % 3 == 1 else ""))


def told(control: Process, traffic: Traffic) -> None:
    """Send the control what the server was sent."""
    control.start()
    control.wait_until_ready()
    for events in traffic.sent:
        assert control.send(events)[0] == 200


def killed_at(step: str, folder: Path) -> None:
    """Kill it at a step of an undo, and see it ended by the next start."""
    armed = folder / "armed"
    folder.mkdir(parents=True, exist_ok=True)
    with both(folder, dying(step, armed)) as (server, control, traffic):
        fill(traffic, 60)
        traffic.start()
        armed.touch()
        change(server, "DELETE")
        assert server.running is not None
        server.running.wait(ANSWER_S)  # it died by itself
        server.running = None
        server.start()
        server.wait_until_ready()
        wait_for(server, "undone")
        traffic.stop()
        told(control, traffic)
        same(server, control)
        server.kill()
        server.start()
        server.wait_until_ready()
        same(server, control)


def killed_anywhere(kills: int, folder: Path, seed: int) -> None:
    """Kill it at random moments of undo and restore, many times in the life of one directory."""
    rng = random.Random(seed)
    inside, within_s = 0, 4.0
    with both(folder) as (server, control, traffic):
        fill(traffic, 60)
        traffic.start()
        wanted = "undone"
        for _ in range(kills):
            traffic.go_on(BESIDE)
            asking = change(server, "DELETE" if wanted == "undone" else "POST")
            time.sleep(rng.random() ** 2 * within_s)
            if asking.is_alive():
                inside += 1
            else:  # the machine is quicker
                within_s /= 2
            server.kill()
            asking.join(ANSWER_S)
            server.start()
            server.wait_until_ready()
            wait_for(server, "undone", "open")
            if state_of(server) == wanted:
                wanted = "open" if wanted == "undone" else "undone"
        status, answer = server.ask("DELETE", f"/api/1/imports/{IMPORT}")
        assert status == 200, answer
        traffic.stop()
        told(control, traffic)
        same(server, control)
        server.stop()
        server.start()
        server.wait_until_ready()
        same(server, control)
    assert inside >= kills // 2  # the change was under way


@pytest.mark.parametrize(
    "step",
    [
        STEPS[6],
        *(pytest.param(one, marks=pytest.mark.long) for one in STEPS[:6] + STEPS[7:]),
    ],
)
def test_killed_at_a_step_of_an_undo_nothing_of_the_import_remains(
    step: str, tmp_path: Path
) -> None:
    killed_at(step, tmp_path / "at")


def test_killed_five_times_inside_undo_and_restore_it_ends_as_one_that_never_saw_the_import(
    tmp_path: Path,
) -> None:
    killed_anywhere(5, tmp_path, seed=1)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_killed_a_hundred_times_inside_undo_and_restore(tmp_path: Path) -> None:
    killed_anywhere(100, tmp_path, seed=random.SystemRandom().randrange(1 << 30))
