"""What a rehearsal costs above staging: an import against stored history, client and server together.

The stored history is seeded as lake rows and state, as a server holds it: 100,000 people with the same number of rows
each. The import is of a fifth of them, so with 10 M stored and 1 M sent it touches 20,000 people with 2 M further rows.
CPU is of the command after its stage was made, less what starting Python and its modules takes, and of the server
while it answers. Memory is the command's peak.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import server as servers
from retrofill.config import Project
from retrofill.core.block import COLUMNS
from retrofill.core.person import Person
from retrofill.engine.admission import ProjectSettings
from retrofill.engine.seeding import PROJECT, Start, seed
from retrofill.hot.checkpoint import FIRST_AMPLITUDE_ID, Changed, Meta
from retrofill.limits import PROFILES

PEOPLE = 100_000
PART = 5  # one of so many is touched
ROWS_A_BLOCK = 2000
ROWS_A_FILE = 500_000
START_MS = 1_700_000_000_000
STEP_MS = 1000
PLANS = ["free", "pro", "team", "old", "new"]
MAP = """
source: {format: ndjson, columns: {props: JSON}}
event: {user_id: user, device_id: device, event_type: event, time: at, insert_id: id, user_properties: props}
"""


def main() -> None:
    """Print the row: stored and sent events from the command line, 1 M and 100,000 if left out."""
    stored, sent = (int(word) for word in (sys.argv[1:] or ["1000000", "100000"]))
    with tempfile.TemporaryDirectory(prefix="rehearse-") as folder:
        for name, value in measure(Path(folder), stored, sent).items():
            print(f"{name:<28}{value:>14,.2f}")


def measure(folder: Path, stored: int, sent: int) -> dict[str, float]:
    """Rehearse an import of `sent` events against `stored` ones. CPU in seconds, memory in MB."""
    store(folder / "data", stored)
    given = source(folder, sent)
    one = servers.retrofill(folder / "data")
    try:
        keys = ["--api-key", servers.API_KEY, "--secret-key", servers.SECRET_KEY]
        line = [*given, *keys, "--work", str(folder / "work"), "--skip-user-properties-sync"]
        _run(["plan", *line, "--to", one.address, "--json"])
        idle, _, _ = _run(["rehearse", "--help"])
        one.settle()
        before = one.cpu_s()
        began = time.perf_counter()
        cpu_s, peak, said = _run(["rehearse", *line, "--against", one.address, "--json"])
        took = time.perf_counter() - began
        server_s = one.cpu_s() - before
    finally:
        one.stop()
    made = msgspec.json.decode(said)
    assert made["exact"]
    assert made["volume"]["stored"] == sent - made["duplicates"]
    assert made["first_seen"]["moved"] > 0
    return {
        "client_cpu_s": cpu_s - idle,
        "server_cpu_s": server_s,
        "cpu_s": cpu_s - idle + server_s,
        "seconds": took,
        "peak_mb": peak / 1e6,
    }


def _run(words: list[str]) -> tuple[float, int, bytes]:
    """Run a command of retrofill; return CPU seconds, peak bytes and what it printed."""
    command = [str(Path(sys.executable).parent / "retrofill"), *words]
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, env=os.environ)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        said = out.read()
    if process.returncode:
        raise RuntimeError(f"{words[0]} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, said


def source(folder: Path, events: int) -> list[str]:
    """Write a history of a part of the people, a year before what is stored."""
    people = PEOPLE // PART
    at_ms = START_MS - 365 * 86_400_000
    with (folder / "history.ndjson").open("w") as file:
        for number in range(events):
            who = number % people * PART
            row = {
                "user": f"user-{who:06}",
                "device": f"device-{who:06}",
                "event": "Page Viewed",
                "at": at_ms + number,
                "id": f"old-{number}",
                "props": {"plan": PLANS[number % 5], "visits": number % 50, "city": "Bahia"},
            }
            file.write(json.dumps(row) + "\n")
    (folder / "history.map.yaml").write_text(MAP)
    return [str(folder / "history.ndjson"), "--map", str(folder / "history.map.yaml")]


def store(root: Path, events: int) -> None:
    """Make a data directory that holds so many rows."""
    shutil.rmtree(root, ignore_errors=True)
    blocks = -(-events // ROWS_A_BLOCK)
    last_ms = START_MS + events * STEP_MS // 100
    people = {FIRST_AMPLITUDE_ID + number: _person(number, last_ms) for number in range(PEOPLE)}
    ids = {
        kind: {f"{kind}-{number:06}": FIRST_AMPLITUDE_ID + number for number in range(PEOPLE)}
        for kind in ("device", "user")
    }
    limits = PROFILES["none"]
    start = Start(
        Meta(blocks, last_ms, FIRST_AMPLITUDE_ID + PEOPLE),
        last_ms,
        1,
        ProjectSettings(limits=msgspec.to_builtins(limits)),
        limits,
        Changed(ids["device"], ids["user"], people, {}, {}),
        [],
    )
    project = Project(PROJECT, "bench", servers.API_KEY, servers.SECRET_KEY)
    seed(root, project, start, rows(events), contested=pa.array(["none"]))


def _person(number: int, last_ms: int) -> Person:
    columns = tuple("iOS" if name == "platform" else None for name in COLUMNS)
    properties: dict[str, Any] = {"plan": PLANS[number % 5], "visits": number % 50, "city": "Rome"}
    return Person(
        FIRST_AMPLITUDE_ID + number,
        f"user-{number:06}",
        properties,
        columns,
        {},
        START_MS + number * STEP_MS // 100,
        last_ms,
    )


def rows(events: int) -> Iterator[pa.Table]:
    """Yield the stored rows: person after person in turn, each block of 2,000 rows."""
    users = pa.array([f"user-{number:06}" for number in range(PEOPLE)])
    devices = pa.array([f"device-{number:06}" for number in range(PEOPLE)])
    types = pa.array(["Page Viewed", "Button Clicked", "Item Added", "Order Placed", "Search Done"])
    texts = pa.array([json.dumps({"plan": one, "visits": 7}) for one in PLANS])
    for first in range(0, events, ROWS_A_FILE):
        number = np.arange(first, min(first + ROWS_A_FILE, events))
        who = number % PEOPLE
        at = START_MS + number * STEP_MS // 100
        yield pa.table(
            {
                "block": pa.array(number // ROWS_A_BLOCK + 1),
                "row": pa.array((number % ROWS_A_BLOCK).astype(np.int32)),
                "amplitude_id": pa.array(FIRST_AMPLITUDE_ID + who),
                "kind": pa.array(np.zeros(len(number), np.uint8)),
                "user_id": users.take(pa.array(who)),
                "device_id": devices.take(pa.array(who)),
                "event_type": types.take(pa.array(number % 5)),
                "event_time": pa.array(at),
                "client_event_time": pa.array(at),
                "client_upload_time": pa.array(at),
                "server_received_time": pa.array(at),
                "server_upload_time": pa.array(at),
                "insert_id": pc.binary_join_element_wise(
                    "live", pa.array(number).cast(pa.string()), "-"
                ),
                "sent": texts.take(pa.array(number % 5)),
                "path": pa.array(["/batch"] * len(number)),
            }
        )


if __name__ == "__main__":
    main()
