"""Killed while a merge is taken back under live load, a server ends as one that took it back in peace.

A real server takes live requests that build on one another, is told to take merges back one after another, and is killed
in each: at a step of the protocol, or at any moment. Started again it ends what it began. A control server was sent the
same requests and took the same merges back at the end. Both must hold the same rows with the same snapshots and people.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tests.faults.process import Process, Row
from tests.faults.test_undo import ANSWER_S, BESIDE, SETTINGS, Traffic, same, told

pytestmark = pytest.mark.slow

USER = "ann-111"
KIOSKS = 30
BESIDE_S = 600  # a start ends beside the traffic what was not in the lake yet
# Steps at which the server is killed: a method, and whether it was done by then.
STEPS = [
    "retrofill.lake.ducklake.Swap.commit after",
    "retrofill.hot.sqlite.Projects.bar before",
    "retrofill.hot.intents.Intents.remove before",
    "retrofill.hot.intents.Intents.add after",
    "retrofill.lake.ducklake.Swap.take_out after",
    "retrofill.lake.ducklake.Swap.put_in after",
    "retrofill.lake.ducklake.Swap.commit before",
    "retrofill.hot.sqlite.Projects.bar after",
]
_DYING = """
import importlib, os, signal
from pathlib import Path
armed = Path({armed!r})
def die(step):
    if armed.exists() and armed.read_text() == step:
        armed.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
def mortal(owner, name, path):
    real = getattr(owner, name)
    def dying(*values, **named):
        die(path + " before")
        made = real(*values, **named)
        die(path + " after")
        return made
    setattr(owner, name, dying)
for path in sorted(set(step.split()[0] for step in {steps!r})):
    module, kind, name = path.rsplit(".", 2)
    mortal(getattr(importlib.import_module(module), kind), name, path)
"""


class Visits(Traffic):
    """Traffic that goes on at the kiosks as well, with the user and without."""

    pause_s = 0.03  # the control is sent all of them again

    def request(self, name: str = "") -> list[Row]:
        made = super().request(name)
        for one in made[::3]:
            one["device_id"] = f"kiosk-{self._random.randrange(KIOSKS)}"
            one.pop("user_id", None)
            if self._random.random() < 0.5:
                one["user_id"] = USER
        return made


def merges(server: Process, state: str) -> dict[str, str]:
    """Return device → id of the user's merges; none while the server does not answer."""
    with suppress(OSError, http.client.HTTPException):
        path = f"/api/1/merges?state={state}&user_id={USER}&limit=1000"
        status, body = server.ask("GET", path)
        if status == 200:
            return {one["device_id"]: one["id"] for one in json.loads(body)["merges"]}
    return {}


def take_back(server: Process, one: str) -> threading.Thread:
    def ask() -> None:
        with suppress(OSError, http.client.HTTPException):
            server.ask("DELETE", f"/api/1/merges/{one}")

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    return asking


def wait_until_taken_back(server: Process, device: str) -> None:
    end = time.monotonic() + BESIDE_S
    while device not in merges(server, "unmerged"):
        assert time.monotonic() < end, server.said()
        time.sleep(0.05)


def again(server: Process) -> None:
    server.start()
    server.wait_until_ready()


@contextmanager
def both(folder: Path, armed: Path) -> Iterator[tuple[Process, Process, Traffic]]:
    first = _DYING.format(armed=str(armed), steps=STEPS)
    server = Process(folder / "data", settings=SETTINGS, first=first)
    control = Process(folder / "control", settings=SETTINGS)
    traffic = Visits(server, 11)
    try:
        again(server)
        kiosks = [f"kiosk-{number}" for number in range(KIOSKS)]
        started: list[Row] = [
            {"device_id": "phone-1", "user_id": USER},
            # What the user shows from the merge on, and no longer when it is taken back: so there are rows to change.
            *({"device_id": one, "user_properties": {f"at {one}": 1}} for one in kiosks),
            *({"device_id": one, "user_id": USER} for one in kiosks),
        ]
        traffic.send(
            [
                {**ids, "event_type": "step", "insert_id": f"s-{at}", "time": 1_700_000_000_000}
                for at, ids in enumerate(started)
            ]
        )
        for _ in range(20):
            traffic.send(traffic.request())
        assert merges(server, "merged").keys() == set(kiosks)
        yield server, control, traffic
    finally:
        traffic.give_up()
        server.end()
        control.end()


def the_same_in_the_end(server: Process, control: Process, traffic: Traffic) -> None:
    traffic.stop()
    taken = merges(server, "unmerged").keys()
    told(control, traffic)
    there = merges(control, "merged")
    for device in taken:
        assert control.ask("DELETE", f"/api/1/merges/{there[device]}")[0] == 200
    assert merges(control, "merged").keys() == merges(server, "merged").keys()
    same(server, control)
    server.kill()
    again(server)
    same(server, control)


def killed_at(steps: list[str], folder: Path) -> None:
    """Kill it once at each of these steps, each time taking another merge back."""
    armed = folder / "armed"
    with both(folder, armed) as (server, control, traffic):
        traffic.start()
        for number, step in enumerate(steps):
            device = f"kiosk-{number}"
            one = merges(server, "merged")[device]
            written = folder / "arming"
            written.write_text(step)
            written.rename(armed)
            traffic.go_on(BESIDE)
            take_back(server, one)
            assert server.running is not None
            server.running.wait(ANSWER_S)  # it died by itself
            server.running = None
            again(server)
            wait_until_taken_back(server, device)
        the_same_in_the_end(server, control, traffic)


def killed_anywhere(kills: int, folder: Path, seed: int) -> None:
    """Kill it at random moments; a merge that was not begun to be taken back is tried again."""
    rng = random.Random(seed)
    inside = number = 0
    with both(folder, folder / "never") as (server, control, traffic):
        traffic.start()
        for _ in range(kills):
            there = merges(server, "merged")
            device = f"kiosk-{number}"
            number += device not in there
            if device in there:
                traffic.go_on(BESIDE)
                asking = take_back(server, there[device])
                time.sleep(rng.random() ** 2)
                inside += asking.is_alive()
                server.kill()
                asking.join(ANSWER_S)
                again(server)
        last = merges(server, "merged").get(f"kiosk-{number}")
        if last is not None:  # it may be under way still
            path = f"/api/1/merges/{last}"
            assert server.ask("DELETE", path, timeout_s=BESIDE_S)[0] == 200
        the_same_in_the_end(server, control, traffic)
    assert inside >= kills // 4  # the change was under way


def test_killed_at_steps_of_an_unmerge_it_ends_as_one_that_took_it_back_in_peace(
    tmp_path: Path,
) -> None:
    killed_at(STEPS[:2], tmp_path)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_killed_at_every_step_of_an_unmerge(tmp_path: Path) -> None:
    killed_at(STEPS, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_killed_thirty_times_while_merges_are_taken_back(tmp_path: Path) -> None:
    killed_anywhere(30, tmp_path, seed=random.SystemRandom().randrange(1 << 30))
