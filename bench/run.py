"""How fast is the server, and how much does it need? Prints one table; keeps nothing (bench/RESULTS.md is kept by hand).

Every row is measured from outside on the real command, with the load generator on the same cores, and beside the rows
stand the physical limits of the same run: decoding alone, HTTP alone, syncing alone. A row that was not run says so.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

import server as servers
from events import PEOPLE, bodies, lines, templates
from load import Order, Result
from retrofill.core.event import Event
from retrofill.hot.checkpoint import FIRST_AMPLITUDE_ID
from server import API_KEY, SECRET_KEY, Server

HERE = Path(__file__).parent
ROOM = (
    HERE.parent / ".bench"
)  # on the disk of the checkout: a folder in memory would sync for nothing
HALF_S = 180  # at half rate, at most
HOUR_KEY, HOUR_SECRET = "hour-key", "hour-secret"
HOUR_PROJECT = ("--project", f"hour:{HOUR_KEY}:{HOUR_SECRET}")
MB = 1e6

sent: Counter[str] = Counter()  # events acknowledged, by the address that took them
console = Console(width=None if sys.stdout.isatty() else 150)


@dataclass(frozen=True)
class Size:
    """How much a run does, in events; `lookups` in requests."""

    large: int  # at 1000 a request
    small: int  # at 10 a request
    hour: int  # in the exported hour
    lookups: int
    seals: int  # to be seen at half rate
    limits: int  # for the physical limits


QUICK = Size(large=250_000, small=100_000, hour=100_000, lookups=60, seals=2, limits=50_000)
USUAL = Size(large=2_000_000, small=500_000, hour=500_000, lookups=300, seals=2, limits=200_000)
LONG = Size(large=10_000_000, small=300_000, hour=500_000, lookups=500, seals=2, limits=200_000)


@dataclass(frozen=True)
class Goal:
    """What a figure must reach and should reach; `least` where more is better."""

    figure: str
    must: float
    aim: float
    unit: str
    least: bool = False

    def verdict(self, value: float) -> str:
        """Say how a value stands to this goal."""
        better = (lambda a, b: a >= b) if self.least else (lambda a, b: a <= b)
        if better(value, self.aim):
            return "[green]aim reached[/]"
        return "[green]ok[/]" if better(value, self.must) else "[red]missed[/]"


CPU = Goal("server CPU for a million durable events, 1000 a request, all counted", 20, 12, "s")
RATE_LARGE = Goal(
    "acknowledged, 1000 a request, 4 connections, sealing keeps up", 45, 80, "k/s", least=True
)
RATE_SMALL = Goal("acknowledged, 10 a request, 16 connections", 18, 30, "k/s", least=True)
P99 = Goal("p99 at half of that rate, over two seals", 25, 8, "ms")
MAX = Goal("max at half of that rate, over two seals", 250, 50, "ms")
SAME = Goal("the same rate with 10 M events stored, against 1 M", 0.9, 1.0, "×", least=True)
DISK = Goal("disk per event after sealing and compaction", 150, 80, "B")
MEMORY = Goal("server memory after 10 M events", 1500, 800, "MB")
LATEST = Goal("latest 100 events of any person at 10 M events, p99", 150, 40, "ms")
EXPORT = Goal("export of one hour: rate", 60, 150, "k/s", least=True)
EXPORT_MEMORY = Goal("export of one hour: memory above idle", 300, 300, "MB")
READY = Goal("ready again after SIGKILL with 10 M events stored", 5, 2, "s")
GOALS = [
    *(CPU, RATE_LARGE, RATE_SMALL, P99, MAX, SAME, DISK, MEMORY, LATEST, EXPORT, EXPORT_MEMORY),
    READY,
]


class Report:
    """The figures of one run."""

    def __init__(self, goals: list[Goal]) -> None:
        self._goals = goals
        self._found: dict[str, tuple[float, str]] = {}
        self.limits: list[tuple[str, str]] = []

    def add(self, goal: Goal, value: float, said: str) -> None:
        """Take a figure and how it came about; tell it at once on a terminal."""
        self._found[goal.figure] = (value, said)
        console.print(f"  {goal.figure}: [bold]{value:,.3g} {goal.unit}[/] ({said})")

    def limit(self, what: str, figure: str) -> None:
        """Take a physical limit."""
        self.limits.append((what, figure))
        console.print(f"  limit: {what}: [bold]{figure}[/]")

    def table(self) -> Iterator[Table]:
        """Lay both tables out."""
        table = Table(title="figures")
        for name in ("figure", "must", "aim", "here", "", "how"):
            table.add_column(name, overflow="fold")
        for goal in self._goals:
            sign = "≥" if goal.least else "≤"
            must, aim = (f"{sign} {number:,g} {goal.unit}" for number in (goal.must, goal.aim))
            if goal.figure in self._found:
                value, said = self._found[goal.figure]
                row = (f"{value:,.3g} {goal.unit}", goal.verdict(value), said)
            else:
                row = ("–", "not run", "make bench-long" if "0 M" in goal.figure else "")
            table.add_row(goal.figure, must, aim, *row)
        yield table
        table = Table(title="physical limits here, in the same run")
        table.add_column("what")
        table.add_column("figure")
        for limit in self.limits:
            table.add_row(*limit)
        yield table


def load(server: Server, **order: object) -> Result:
    """Send what is ordered from a process of its own."""
    made = Order(port=server.port, cache=str(ROOM), **order)  # type: ignore[arg-type] # as Order says
    done = subprocess.run(
        [sys.executable, str(HERE / "load.py"), json.dumps(asdict(made))],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"The load generator failed:\n{done.stderr[-2000:]}")
    result = Result(**json.loads(done.stdout))
    sent[server.address] += result.events
    return result


def large(server: Server, events: int, api_key: str = API_KEY) -> Result:
    """Send at 1000 a request over 4 connections."""
    return load(server, requests=events // 1000, events_per_request=1000, api_key=api_key)


def small(server: Server, events: int, rate: float = 0, stop: str = "") -> Result:
    """Send at 10 a request over 16 connections, `rate` in requests a second, until a file `stop` is there."""
    order = {"connections": 16, "rate": rate, "stop": stop}
    return load(server, requests=events // 10, events_per_request=10, **order)


# The physical limits.


class _Body(msgspec.Struct, gc=False):
    api_key: str
    events: list[Event]


def limit_decode(report: Report, size: Size) -> None:
    """Decode the same bodies, typed, and do nothing with them."""
    decode = msgspec.json.Decoder(_Body).decode
    made = templates(lines(ROOM), events=1000, api_key=API_KEY)
    requests = size.limits // 1000
    started = time.process_time()
    payload = sum(map(len, bodies(made, requests)))
    generator_s = (time.process_time() - started) * 1e6 / size.limits
    sent = list(bodies(made, requests))
    started = time.process_time()
    for body in sent:
        decode(body)
    seconds = (time.process_time() - started) * 1e6 / size.limits
    report.limit(
        "decode only, typed", f"{seconds:.2f} CPU s for a million, {1e3 / seconds:,.0f} k/s"
    )
    report.limit(
        "the generator alone",
        f"{generator_s:.2f} CPU s for a million, {payload / size.limits:.0f} B an event",
    )


def limit_http(report: Report, size: Size, folder: Path) -> None:
    """Send to an app that stores nothing."""
    for events, send in ((1000, large), (10, small)):
        null = servers.null(folder)
        try:
            before = null.cpu_s()
            result = send(null, size.limits if events == 10 else 4 * size.limits)
            cpu_s = (null.cpu_s() - before) * 1e6 / result.events
        finally:
            null.kill()
        report.limit(
            f"an app that stores nothing, {events} a request",
            f"{result.events / result.seconds / 1e3:,.0f} k/s, {cpu_s:.2f} CPU s for a million "
            f"(generator {result.client_cpu_s * 1e6 / result.events:.2f})",
        )


def limit_sync(report: Report, folder: Path) -> None:
    """Append 500 KB and sync, again and again for a second."""
    chunk = os.urandom(500_000)
    times = []
    end = time.perf_counter() + 1
    with (folder / "sync").open("wb", buffering=0) as file:
        while time.perf_counter() < end:
            started = time.perf_counter()
            file.write(chunk)
            os.fsync(file.fileno())
            times.append(time.perf_counter() - started)
    (folder / "sync").unlink()
    times.sort()
    report.limit(
        "append 500 KB and sync",
        f"{len(times) / sum(times):,.0f} a second, p50 {times[len(times) // 2] * 1e3:.2f} ms, "
        f"max {times[-1] * 1e3:.1f} ms",
    )


# The rows.


@dataclass
class Spent:
    """CPU seconds of the server and its children for so many events, of all loads at 1000 a request."""

    cpu_s: float = 0.0
    events: int = 0


def row_large(report: Report, server: Server, events: int, spent: Spent) -> Server:
    """Send much at 1000 a request, then stop in good order, so that every event is sealed; start again."""
    idle_cpu_s = server.cpu_s()
    seals, sealed = (
        server.metric(f"retrofill_{name}_total") for name in ("seals", "sealed_events")
    )
    result = large(server, events)
    waiting = events - server.metric("retrofill_sealed_events_total") + sealed
    seals = server.metric("retrofill_seals_total") - seals
    cpu_s = server.cpu_s() + server.stop() - idle_cpu_s
    spent.cpu_s += cpu_s
    spent.events += events
    said = (
        f"{spent.events / 1e6:g} M events, generator {result.client_cpu_s * 1e6 / events:.1f} s beside it, "
        f"the last {events / 1e6:g} M {cpu_s * 1e6 / events:.1f} s"
    )
    report.add(CPU, spent.cpu_s * 1e6 / spent.events, said)
    rate = result.events / result.seconds / 1e3
    slow = min(result.by_second[1:-1], default=0) / 1e3
    report.add(
        RATE_LARGE,
        rate,
        f"{result.seconds:.0f} s, {seals:.0f} seals, {waiting:,.0f} unsealed at the end, "
        f"slowest second {slow:.0f} k, max {result.max_ms:.0f} ms",
    )
    return start()


def start() -> Server:
    """Start the server on the bench's directory."""
    return servers.retrofill(ROOM / "data", extra=HOUR_PROJECT)


def row_small(report: Report, server: Server, size: Size) -> float:
    """Send at 10 a request; return the requests a second."""
    result = small(server, size.small)
    report.add(
        RATE_SMALL,
        result.events / result.seconds / 1e3,
        f"{result.events / 1e6:g} M events, p50 {result.p50_ms:.1f}, p99 {result.p99_ms:.1f}, max {result.max_ms:.0f} ms",
    )
    return result.events / 10 / result.seconds


def row_half(report: Report, server: Server, rate: float, seals: int) -> None:
    """Send at a fixed rate until so many seals have happened."""
    before = server.metric("retrofill_seals_total")
    stop = ROOM / "stop"
    stop.unlink(missing_ok=True)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(small, server, int(rate * HALF_S) * 10, rate, str(stop))
        while not sending.done() and server.metric("retrofill_seals_total") - before < seals:
            time.sleep(0.5)
        stop.touch()
        result = sending.result()
    stop.unlink()
    seen = server.metric("retrofill_seals_total") - before
    said = f"{rate * 10 / 1e3:.1f} k/s for {result.seconds:.0f} s, {seen:.0f} seals"
    report.add(P99, result.p99_ms, said)
    report.add(MAX, result.max_ms, said)


def _read(server: Server, path: str, keys: str) -> urllib.request.Request:
    token = base64.b64encode(keys.encode()).decode()
    return urllib.request.Request(
        server.address + path, headers={"Authorization": f"Basic {token}"}
    )


def row_latest(report: Report, server: Server, lookups: int, stored: int) -> None:
    """Ask for the latest 100 events of people drawn evenly."""
    keys = f"{API_KEY}:{SECRET_KEY}"
    times = []
    events = 0
    for one in random.Random(7).sample(range(PEOPLE), lookups):
        path = f"/api/2/useractivity?user={FIRST_AMPLITUDE_ID + one}&limit=100"
        started = time.perf_counter()
        with urllib.request.urlopen(_read(server, path, keys)) as answer:
            found = len(json.load(answer)["events"])
        if found:  # for one or the other person no event was drawn
            times.append((time.perf_counter() - started) * 1e3)
            events += found
    times.sort()
    report.add(
        LATEST,
        times[len(times) * 99 // 100],
        f"{stored / 1e6:.1f} M stored, {len(times)} people, {events / len(times):.0f} events each, "
        f"p50 {times[len(times) // 2]:.0f} ms, max {times[-1]:.0f} ms",
    )


def row_export(report: Report, server: Server, events: int) -> None:
    """Fill the hour of a project of its own and export it, once nothing else goes on: a seal has memory of its own."""
    hours = datetime.now(UTC)
    large(server, events, HOUR_KEY)
    until = datetime.now(UTC)
    server.settle()
    path = f"/api/2/export?start={hours:%Y%m%dT%H}&end={until:%Y%m%dT%H}"
    request = _read(server, path, f"{HOUR_KEY}:{HOUR_SECRET}")
    idle = server.memory().total
    with tempfile.TemporaryFile(dir=ROOM) as file, servers.peak_memory(server) as peak:
        started = time.perf_counter()
        with urllib.request.urlopen(request) as answer:
            shutil.copyfileobj(answer, file, 1 << 20)
        seconds = time.perf_counter() - started
        size = file.tell()
        rows = sum(_rows(file))
    assert rows == events, f"{rows:,} rows exported, {events:,} sent"
    said = f"{rows:,} events in {seconds:.1f} s, {size / MB:.0f} MB"
    report.add(EXPORT, rows / seconds / 1e3, said)
    report.add(EXPORT_MEMORY, max(0, peak[0].total - idle) / MB, said)


def _rows(file: object) -> Iterator[int]:
    with zipfile.ZipFile(file) as archive:  # type: ignore[call-overload] # a file opened for reading
        for member in archive.infolist():
            with archive.open(member) as packed, gzip.open(packed) as plain:
                yield sum(chunk.count(b"\n") for chunk in iter(lambda: plain.read(1 << 20), b""))


def row_ready(report: Report, server: Server, stored: int) -> Server:
    """Kill it under load and see how long it takes to serve again."""
    large(server, 100_000)
    server.kill()
    again = start()
    report.add(
        READY,
        again.ready_s,
        f"{stored / 1e6:.1f} M stored, from starting the command to /healthz 200",
    )
    return again


def row_disk(report: Report, stored: int) -> None:
    """Weigh the directory of a server that has stopped."""
    data = ROOM / "data"
    weighed = {
        path.name: sum(
            one.stat().st_blocks * 512 for one in [path, *path.rglob("*")] if one.is_file()
        )
        for path in data.iterdir()
    }
    parts = ", ".join(
        f"{name} {size / stored:.0f}"
        for name, size in sorted(weighed.items())
        if size / stored >= 0.5
    )
    report.add(
        DISK, sum(weighed.values()) / stored, f"{stored / 1e6:.1f} M events, all files: {parts}"
    )


# The runs.


def limits(report: Report, size: Size) -> None:
    """Measure what this machine can do at all."""
    limit_decode(report, size)
    limit_http(report, size, ROOM)
    limit_sync(report, ROOM)
    sent.clear()


def usual(report: Report, size: Size) -> None:
    """Every row at the size at hand."""
    limits(report, size)
    server = row_large(report, start(), size.large, Spent())
    rate = row_small(report, server, size)
    row_half(report, server, rate / 2, size.seals)
    row_export(report, server, size.hour)
    finish(report, server, size)


def finish(report: Report, server: Server, size: Size) -> None:
    """The rows that only look."""
    stored = sum(sent.values())
    row_latest(report, server, size.lookups, stored)
    server = row_ready(report, server, stored)
    server.settle()
    server.stop()
    # What a stop has cut off (a compaction that its last seal began) is removed by the next start.
    server = start()
    server.stop()
    row_disk(report, sum(sent.values()))


def long(report: Report, size: Size) -> None:
    """Fill ten million events once and measure what names them."""
    limits(report, size)
    spent = Spent()
    server = row_large(report, start(), 1_000_000, spent)
    before = _probe(server, size)
    stored = 1_000_000 + 2 * size.small
    server = row_large(report, server, size.large - stored, spent)
    after = _probe(server, size)
    said = ", ".join(
        f"{name} {first / 1e3:.0f} → {last / 1e3:.0f} k/s"
        for name, first, last in zip(("1000 a request", "10 a request"), before, after, strict=True)
    )
    report.add(SAME, min(last / first for first, last in zip(before, after, strict=True)), said)
    report.add(MEMORY, server.memory().total / MB, "resident, server and children, after the load")
    rate = row_small(report, server, size)
    row_half(report, server, rate / 2, size.seals)
    row_export(report, server, size.hour)
    finish(report, server, size)


def _probe(server: Server, size: Size) -> tuple[float, float]:
    results = (large(server, size.small), small(server, size.small))
    first, second = (result.events / result.seconds for result in results)
    return first, second


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="every row at under 1 M events, about a minute"
    )
    parser.add_argument(
        "--long", action="store_true", help="with 10 M events stored, ninety minutes at most"
    )
    chosen = parser.parse_args()
    size = QUICK if chosen.quick else LONG if chosen.long else USUAL
    shutil.rmtree(ROOM / "data", ignore_errors=True)
    ROOM.mkdir(exist_ok=True)
    console.print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}"
    )
    report = Report(GOALS)
    started = time.perf_counter()
    try:
        (long if chosen.long else usual)(report, size)
    finally:
        for table in report.table():
            console.print(table)
        console.print(f"took {time.perf_counter() - started:.0f} s")
        shutil.rmtree(ROOM / "data", ignore_errors=True)


if __name__ == "__main__":
    main()
