"""Killed while a project is switched to event time and back: the start ends it, and no event is lost or doubled."""

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
