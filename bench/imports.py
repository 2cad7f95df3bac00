"""What an import costs to take back: how long, how much CPU and memory, and what live traffic notices of it.

Stored are 1 M events of 10 k people, a tenth of them of an import that touched a fifth of the people and a third of all
other events (`--long`: ten times that; `--quick`: a tenth). Then the import is undone and restored alone, undone under requests
at a set pace, and restored, which is the same work, under as many as the server takes. Rows are added by a function in ROWS, with its goals in GOALS.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import event_time
import events
import rehearse
import run
import server as servers
from load import Order, Result
from run import HERE, MB, ROOM, Goal, Report, console
from server import API_KEY, SECRET_KEY, Server, peak_memory

IMPORT = "old-shop"
LOG = ROOM / "server.log"
PACED = 200  # requests a second, of 10 events, while it is measured what they notice
ALONE_S = {"quick": 2, "usual": 6, "long": 20}  # of full load, to compare with

REFOLD_CPU = Goal("refold: CPU for a million rows, undo alone, all processes", 20, 10, "s")
UNDO = Goal("undo of a tenth of all events, a third further ones folded again", 120, 30, "s")
RESTORE = Goal("restore of it", 120, 30, "s")
RATIO = Goal("ingest rate while a restore runs, against without", 0.5, 0.8, "×", least=True)
P99 = Goal(f"p99 of live requests while an undo runs, {PACED} a second", 200, 50, "ms")
MEMORY = Goal(
    "memory at most, server and children, while a restore runs under full load", 2500, 1500, "MB"
)
REHEARSAL = Goal("rehearsal of 1 M events against the stored ones, CPU above staging", 60, 25, "s")
EVENT_TIME = Goal(
    "event mode against arrival mode, ingest CPU, live traffic in order", 1.2, 1.05, "×"
)
GOALS = [REFOLD_CPU, UNDO, RESTORE, RATIO, P99, MEMORY, REHEARSAL, EVENT_TIME]


@dataclass
class Stored:
    """A server with a history in it."""

    server: Server
    count: int
    size: str


# The history.


def _lines(name: str, people: int, person: Callable[[random.Random], int]) -> Path:
    """Make a folder with as many events as `events.lines` looks for; return it."""
    folder = ROOM / f"{name}-{people}"
    kept = folder / f"events-{events.DISTINCT}.ndjson"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rnd, made = random.Random(name), _of(people)
        origin = {"source_name": "retrofill", "source_version": IMPORT}
        with kept.open("w", encoding="utf-8") as file:
            for number in range(events.DISTINCT):
                event = made.event(person(rnd), number)
                if name == "old":
                    event["ingestion_metadata"] = origin
                line = json.dumps(event, separators=(",", ":"), ensure_ascii=False)
                file.write(line + "\n" * (number < events.DISTINCT - 1))
    return folder


def _of(people: int) -> events.People:
    events.PEOPLE = people
    return events.People(7)


def _touched(people: int) -> Callable[[random.Random], int]:
    return lambda rnd: 5 * rnd.randrange(people // 5)


def _anybody(people: int) -> Callable[[random.Random], int]:
    """A third of all events are of the fifth that the import touches."""
    others = _touched(people)
    return lambda rnd: others(rnd) + (rnd.random() > 1 / 3) * rnd.randrange(1, 5)


class Sending:
    """A load in a process of its own. stop: a file; once it is there nothing more is sent."""

    def __init__(self, server: Server, cache: Path, **order: object) -> None:
        self.stop = ROOM / "stop"
        self.stop.unlink(missing_ok=True)
        made = Order(port=server.port, cache=str(cache), stop=str(self.stop), **order)  # type: ignore[arg-type] # as Order says
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "load.py"), json.dumps(asdict(made))],
            stdout=subprocess.PIPE,
            text=True,
        )

    def end(self, *, wait: bool = False) -> Result:
        """Return what came of it, once all is sent (wait) or what is under way is answered."""
        if not wait:
            self.stop.touch()
        said = self._process.communicate()[0]
        if self._process.returncode:
            raise RuntimeError("The load generator failed")
        return Result(**json.loads(said))


def _store(count: int, size: str) -> Stored:
    people = count // 100
    live = _lines("live", people, _anybody(people))
    old = _lines("old", people, _touched(people))
    shutil.rmtree(ROOM / "data", ignore_errors=True)
    LOG.unlink(missing_ok=True)
    server = servers.retrofill(ROOM / "data")
    # The import in the middle, so that there are rows before and after it.
    for cache, share in ((live, 0.45), (old, 0.1), (live, 0.45)):
        Sending(server, cache, requests=int(share * count) // 1000).end(wait=True)
    _settled(server)
    return Stored(server, count, size)


def _settled(server: Server) -> None:
    """Wait until nothing goes on in the background: two seconds without CPU to speak of."""
    before = server.cpu_s()
    while True:
        time.sleep(2)
        now = server.cpu_s()
        if now - before < 0.2:
            return
        before = now


def _ask(server: Server, method: str, path: str) -> float:
    token = base64.b64encode(f"{API_KEY}:{SECRET_KEY}".encode()).decode()
    request = urllib.request.Request(
        server.address + path, method=method, headers={"Authorization": f"Basic {token}"}
    )
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=1800) as answer:
        answer.read()
    return time.perf_counter() - started


def undo(server: Server) -> float:
    """Undo the import; return the seconds."""
    return _ask(server, "DELETE", f"/api/1/imports/{IMPORT}")


def restore(server: Server) -> float:
    """Restore it; return the seconds."""
    return _ask(server, "POST", f"/api/1/imports/{IMPORT}/restore")


# The rows.


def row_alone(report: Report, stored: Stored) -> None:
    """Undo and restore with nothing else to do."""
    server = stored.server
    cpu_s = server.cpu_s()
    with peak_memory(server) as peak:
        seconds = undo(server)
    cpu_s = server.cpu_s() - cpu_s
    rows = _rows()
    said = (
        f"{stored.count / 1e6:g} M stored, {rows:,} rows folded again, {peak[0].total / MB:,.0f} MB"
    )
    report.add(UNDO, seconds, said)
    report.add(REFOLD_CPU, cpu_s / rows * 1e6, f"{cpu_s:.1f} s for {rows:,} rows")
    report.add(RESTORE, restore(server), said)


def _rows() -> int:
    """Return how many rows the server says it has folded again; its log comes a moment later."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        said = re.findall(r"history_changed.*rows=(\d+)", LOG.read_text(errors="replace"))
        if said:
            return int(said[-1])
        time.sleep(0.1)
    raise RuntimeError("The server does not say how many rows it has folded")


def row_paced(report: Report, stored: Stored) -> None:
    """What requests at a set pace notice."""
    server, people = stored.server, stored.count // 100
    cache = _lines("live", people, _anybody(people))
    paced = Sending(
        server, cache, events_per_request=10, requests=10**6, connections=16, rate=PACED
    )
    seconds = undo(server)
    result = paced.end()
    said = f"p50 {result.p50_ms:.1f} ms, max {result.max_ms:.0f} ms, undo took {seconds:.1f} s"
    report.add(P99, result.p99_ms, said)


def row_full(report: Report, stored: Stored) -> None:
    """What is left of the rate, and what memory it takes, with the import undone."""
    undo(stored.server)  # nothing happens if it is
    _settled(stored.server)
    server, people = stored.server, stored.count // 100
    cache = _lines("live", people, _anybody(people))
    alone = Sending(server, cache, requests=10**6)
    threading.Event().wait(ALONE_S[stored.size])
    without = alone.end()
    beside = Sending(server, cache, requests=10**6)
    with peak_memory(server) as peak:
        seconds = restore(server)
    within = beside.end()
    rates = [one.events / one.seconds for one in (within, without)]
    said = (
        f"{rates[0] / 1e3:.0f} against {rates[1] / 1e3:.0f} k/s, 1000 a request, "
        f"restore took {seconds:.1f} s, longest wait {within.max_ms:.0f} ms"
    )
    report.add(RATIO, rates[0] / rates[1], said)
    report.add(MEMORY, peak[0].total / MB, str(peak[0]))


def row_rehearsal(report: Report, stored: Stored) -> None:
    """What is to be known before anything is sent: of as many events as are stored, 1 M at most."""
    sent = min(stored.count, 1_000_000)
    folder = ROOM / "rehearsal"
    folder.mkdir()
    try:
        found = rehearse.measure(folder, stored.count, sent)
    finally:
        shutil.rmtree(folder)
    report.add(
        REHEARSAL,
        found["cpu_s"],
        f"{sent / 1e6:g} M against {stored.count / 1e6:g} M stored: client {found['client_cpu_s']:.1f} s, "
        f"server {found['server_cpu_s']:.1f} s, {found['seconds']:.0f} s long, {found['peak_mb']:,.0f} MB",
    )


def row_event_time(report: Report, stored: Stored) -> None:
    """What live traffic in order costs more where properties go by event time: in this process, nothing else stored."""
    count = min(event_time.EVENTS, stored.count)
    arrival, event, more = event_time.ratio(count, 1000)
    said = f"{event:.1f} against {arrival:.1f} s/M, 1000 a request, turn by turn, without HTTP and sealing"
    report.add(EVENT_TIME, more, said)


ROWS: list[Callable[[Report, Stored], None]] = [
    row_alone,
    row_paced,
    row_full,
    row_rehearsal,
    row_event_time,
]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="with 100 k events stored")
    parser.add_argument("--long", action="store_true", help="with 10 M events stored")
    rows = {row.__name__.removeprefix("row_"): row for row in ROWS}
    parser.add_argument("--only", choices=rows, help="one row alone")
    chosen = parser.parse_args()
    size = "quick" if chosen.quick else "long" if chosen.long else "usual"
    count = {"quick": 100_000, "usual": 1_000_000, "long": 10_000_000}[size]
    ROOM.mkdir(exist_ok=True)
    report = Report(GOALS)
    started = time.perf_counter()
    stored = None
    try:
        stored = _store(count, size)
        for row in [rows[chosen.only]] if chosen.only else ROWS:
            row(report, stored)
        stored.server.stop()
    finally:
        if stored is not None and stored.server.process.poll() is None:
            stored.server.kill()
        console.print(next(run.Report.table(report)))
        console.print(f"took {time.perf_counter() - started:.0f} s")
        shutil.rmtree(ROOM / "data", ignore_errors=True)


if __name__ == "__main__":
    main()
