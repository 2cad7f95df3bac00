"""Killed while a project is switched to event time and back: the start ends it, and no event is lost or doubled.

With requests answered meanwhile, late ones among them, it ends as a server that was sent the same and switched once.
"""

from __future__ import annotations

import http.client
import random
import sqlite3
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
from tests.faults.process import PATIENCE_S, Process, Row
from tests.faults.test_undo import Traffic, both, dying, same, told

pytestmark = pytest.mark.slow

EVENTS = 600
BEGUN_MS = 1_600_000_000_000


def events(seeded: random.Random) -> list[Row]:
    """Each person's plan is the number of the event, by event time; they arrive in any order."""
    made: list[Row] = [
        {
            "event_type": "open",
            "device_id": f"phone-{number % 20:03}",
            "time": BEGUN_MS + number * 1000,
            "insert_id": f"i-{number}",
            "user_properties": {"plan": number},
        }
        for number in range(EVENTS)
    ]
    seeded.shuffle(made)
    return made


def plans(server: Process) -> dict[str, list[tuple[str, int]]]:
    """What each device's rows show, in event time."""
    found: dict[str, list[tuple[str, int]]] = {}
    for row in server.export():
        shown = (row["$insert_id"], row["user_properties"].get("plan", -1))
        found.setdefault(row["device_id"], []).append((row["event_time"], *shown))  # type: ignore[arg-type]
    return {device: [one[1:] for one in sorted(rows)] for device, rows in found.items()}  # type: ignore[misc]


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 20))]
)
def test_a_killed_switch_is_ended_by_the_next_start(seed: int, tmp_path: Path) -> None:
    seeded = random.Random(seed)
    server = Process(tmp_path / "data", settings="SEAL_EVENTS=200")
    sent = events(seeded)
    try:
        server.start()
        server.wait_until_ready()
        for first in range(0, EVENTS, 100):
            assert server.send(sent[first : first + 100])[0] == 200
        arrived = plans(server)
        for to in ("event", "arrival"):
            switch = threading.Thread(target=_switch, args=(server, to))
            switch.start()
            _wait_until_begun(server, switch)
            time.sleep(seeded.choice([0, seeded.random() / 2]))
            server.kill()
            switch.join()
            server.start()
            server.wait_until_ready()
            _switch(server, to)  # one that was never begun begins now, and one that was is done
            shown = plans(server)
            assert sum(map(len, shown.values())) == EVENTS
            if to == "event":
                for device, rows in shown.items():
                    numbers = sorted(
                        one["user_properties"]["plan"] for one in sent if one["device_id"] == device
                    )
                    assert [plan for _, plan in rows] == numbers
            else:
                assert shown == arrived
        server.stop()
    finally:
        server.end()


# Steps at which the server is killed while requests are answered, as in `test_undo`.
STEPS = [
    "retrofill.lake.ducklake.Swap.commit after",
    "retrofill.hot.intents.Intents.reserve after",
    "retrofill.lake.ducklake.Swap.put_in after",
    "retrofill.lake.ducklake.Swap.commit before",
    "retrofill.engine.duplicates.Duplicates.mend before",
    "retrofill.engine.event_time.EventTime._switched before",
    "retrofill.hot.intents.Intents.remove before",
]


@pytest.mark.parametrize(
    "step", [STEPS[0], *(pytest.param(one, marks=pytest.mark.long) for one in STEPS[1:])]
)
def test_killed_at_a_step_of_a_switch_under_traffic(step: str, tmp_path: Path) -> None:
    armed = tmp_path / "armed"
    with both(tmp_path, dying(step, armed)) as (server, control, traffic):
        _begin(traffic)
        for to in ("event", "arrival"):
            armed.touch()
            switch = threading.Thread(target=_switch, args=(server, to), daemon=True)
            switch.start()
            assert server.running is not None
            server.running.wait(PATIENCE_S)  # it died by itself
            server.running = None
            switch.join(PATIENCE_S)
            server.start()
            server.wait_until_ready()
            _switch(server, to)
        _ends_alike(server, control, traffic)


@pytest.mark.long
@pytest.mark.parametrize("kills", [5, 60])
@pytest.mark.timeout(3600)
def test_killed_anywhere_in_switches_under_traffic(kills: int, tmp_path: Path) -> None:
    seeded = random.Random(kills)
    with both(tmp_path) as (server, control, traffic):
        _begin(traffic)
        to = "event"
        for number in range(kills):
            switch = threading.Thread(target=_switch, args=(server, to), daemon=True)
            switch.start()
            _wait_until_begun(server, switch)
            time.sleep(seeded.random() ** 2 * 3)
            server.kill()
            switch.join(PATIENCE_S)
            server.start()
            server.wait_until_ready()
            if number % 3:  # else the next switch is asked for before the start has ended this one
                _switch(server, to)
            to = "arrival" if to == "event" else "event"
        _ends_alike(server, control, traffic)


def _begin(traffic: Traffic) -> None:
    for _ in range(40):
        traffic.send(traffic.request())
    traffic.start()


def _ends_alike(server: Process, control: Process, traffic: Traffic) -> None:
    """Both hold the same, in either order; the control was never switched before."""
    _switch(server, "event")
    traffic.stop()
    told(control, traffic)
    _switch(control, "event")
    same(server, control)
    for one in (server, control):
        _switch(one, "arrival")
    same(server, control)
    server.kill()
    server.start()
    server.wait_until_ready()
    same(server, control)


def _wait_until_begun(server: Process, switch: threading.Thread) -> None:
    """Wait until the intent is on disk, which is before anything of it is done, or all of it is done already."""
    while switch.is_alive():
        with closing(sqlite3.connect(server.data / "intents.sqlite", timeout=PATIENCE_S)) as read:
            if read.execute("SELECT count(*) FROM intents").fetchone()[0]:
                return
        time.sleep(0.002)


def _switch(server: Process, to: str) -> None:
    with suppress(OSError, http.client.HTTPException):  # killed meanwhile
        status, said = server.ask("PUT", "/api/1/project", {"property_time": to})
        assert status == 200, said
