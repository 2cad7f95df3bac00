"""How fast is the backfill client, and how much does it need? Prints one table; keeps nothing (bench/RESULTS.md is kept by hand).

The real commands run in processes of their own and are charged what the kernel says, loading included; the sink answers
200 and stores nothing. Beside them, in the same run, stand what people send a history with today, charged only from the
first event on, and what the machine can do at all. A row that was not run says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import msgspec

import server as servers
from events import MARKER, lines
from run import ROOM, Goal, Report, _Body, console
from server import API_KEY, Server

HERE = Path(__file__).parent
WORK = ROOM / "backfill"
MAP = """
source: {format: ndjson}
event:
  user_id: user_id
  device_id: device_id
  event_type: event_type
  time: time
  insert_id: insert_id
  platform: platform
  os_name: os_name
  os_version: os_version
  app_version: app_version
  country: country
  region: region
  city: city
  event_properties: event_properties
  user_properties: user_properties
"""
# A verb as the command line runs it, without asking which verbs are listed.
_VERB = "import sys, typer; from retrofill.cli import {0}; typer.run({0}.command)"


@dataclass(frozen=True)
class Size:
    """How many events a row has."""

    large: int  # staged, and sent at 1000 a request
    small: int  # sent at 10 a request
    naive: int
    mixpanel: int
    sdk: int


QUICK = Size(large=200_000, small=40_000, naive=40_000, mixpanel=10_000, sdk=5_000)
USUAL = Size(large=1_500_000, small=200_000, naive=1_000_000, mixpanel=150_000, sdk=150_000)
LONG = Size(large=20_000_000, small=1_000_000, naive=1_000_000, mixpanel=100_000, sdk=50_000)

STAGE = Goal("stage: CPU for a million events, NDJSON to ready sets", 8, 4, "s")
STAGE_MEMORY = Goal("stage: memory for 20 M events", 2500, 1500, "MB")
SEND = Goal("send to a null sink, 1000 a request: client CPU for a million", 3, 1, "s")
SEND_SMALL = Goal("send, 10 a request", 15, 40, "k/s", least=True)
NAIVE = Goal("stage and send, events per CPU s, against a `requests` loop", 2, 4, "×", least=True)
MIXPANEL = Goal("the same against npm mixpanel-import", 5, 12, "×", least=True)
SDK = Goal("the same against the official Python SDK", 12, 30, "×", least=True)
MEMORY = Goal("memory while sending", 300, 150, "MB")
SHAPES = Goal("duration in virtual time against the lower bound, worst shape", 1.05, 1.01, "×")
TWICE = Goal("source of 20 M resumed after SIGKILL: events sent twice", 1, 0.1, "%")
GOALS = [STAGE, STAGE_MEMORY, SEND, SEND_SMALL, NAIVE, MIXPANEL, SDK, MEMORY, SHAPES, TWICE]


@dataclass(frozen=True)
class Used:
    """What a process took."""

    cpu_s: float
    seconds: float
    rss: int
    said: str


def measured(command: list[str]) -> Used:
    """Run a command to its end and return what the kernel counted. Raises RuntimeError if it fails."""
    WORK.mkdir(parents=True, exist_ok=True)
    said = WORK / "said"
    # Compiled modules are kept, as on anybody's machine; wherever that is turned off, loading takes twice as long.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    with said.open("wb") as out, (WORK / "log").open("wb") as log:
        child = subprocess.Popen(command, stdout=out, stderr=log, env=kept)
        rss, pid = 0, 0
        while not pid:
            rss = max(rss, _resident(child.pid))
            time.sleep(0.02)
            pid, status, used = os.wait4(child.pid, os.WNOHANG)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{command[1:4]} failed:\n{(WORK / 'log').read_text()[-2000:]}")
    return Used(used.ru_utime + used.ru_stime, seconds, rss, said.read_text())


def _resident(pid: int) -> int:
    """Return the most that was resident so far, in bytes. What wait4 says of it counts the parent's memory too."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def history(count: int) -> Path:
    """Return a file of so many events, each with an insert_id of its own."""
    path = WORK / f"history-{count}.ndjson"
    made = lines(ROOM)
    with path.open("wb") as file:
        for number, left in enumerate(range(count, 0, -len(made))):
            text = b"\n".join(islice(made, left)) + b"\n"
            file.write(text.replace(MARKER, b"%024d" % number))
    return path


def _verb(name: str, *options: str) -> list[str]:
    return [sys.executable, "-c", _VERB.format(name), *options]


def staged(source: Path, work: Path, sink: Server) -> Used:
    """Stage with `plan`."""
    shutil.rmtree(work, ignore_errors=True)
    (WORK / "map.yaml").write_text(MAP)
    options = ("--map", str(WORK / "map.yaml"), "--work", str(work), "--to", sink.address)
    return measured(_verb("plan", str(source), *options, "--json"))


def _run(source: Path, work: Path, sink: Server, events_per_request: int) -> list[str]:
    options = ("--map", str(WORK / "map.yaml"), "--work", str(work), "--to", sink.address)
    limits = ("--profile", "retrofill", "--events-per-request", str(events_per_request))
    return _verb("run", str(source), *options, *limits, "--api-key", API_KEY, "--yes", "--json")


def sent(source: Path, work: Path, sink: Server, events_per_request: int, events: int) -> Used:
    """Send what is staged with `run`; every event must be acknowledged."""
    used = measured(_run(source, work, sink, events_per_request))
    end = json.loads(used.said.splitlines()[-1])
    assert end["complete"], end
    assert end["acknowledged"] == events, end
    return used


@contextlib.contextmanager
def sink(app: str = "app") -> Iterator[Server]:
    """Serve the app that stores nothing."""
    found = servers.null(WORK, app=app)
    try:
        yield found
    finally:
        found.kill()


def limits(report: Report, size: Size) -> float:
    """Measure what this machine can do at all. Returns the CPU seconds that a command takes for ten events."""
    decode = msgspec.json.Decoder(_Body).decode
    made = lines(ROOM)[: size.naive]
    body = b'{"api_key":"a","events":[' + b",".join(made) + b"]}"
    started = time.process_time()
    decode(body)
    seconds = (time.process_time() - started) * 1e6 / len(made)
    report.limit(
        "decode only, typed",
        f"{seconds:.2f} CPU s for a million events (0.8 where the musts were set)",
    )
    path = WORK / "copied"
    started = time.process_time()
    with path.open("wb") as file:
        file.write(body)
    copied = (time.process_time() - started) * 1e6 / len(made)
    path.unlink()
    report.limit("write the same bytes to a file, once", f"{copied:.2f} CPU s for a million events")
    with sink() as null:
        few = history(10)
        for _ in range(2):  # the first one compiles what it loads
            used = staged(few, WORK / "few", null)
            send = sent(few, WORK / "few", null, 1000, 10)
    loading = f"{used.cpu_s:.2f} and {send.cpu_s:.2f} CPU s, {used.rss / 1e6:.0f} and {send.rss / 1e6:.0f} MB"
    report.limit("stage and send ten events, loading: part of what follows", loading)
    return used.cpu_s


def client(report: Report, size: Size, loading_s: float) -> float:
    """Stage, send, and do both in one; return CPU seconds for a million events of the last.

    loading_s: what a command takes for next to nothing, CPU: counted once for a million events, whatever the size.
    """

    def million(used: Used, events: int) -> float:
        each = 1e6 / events
        return (used.cpu_s - loading_s) * each + loading_s * min(1, each)

    source = history(size.large)
    with sink() as null:
        stage = staged(source, WORK / "large", null)
        millions = f"{size.large / 1e6:g} M events"
        rate = f"{size.large / stage.seconds / 1e3:.0f} k/s, {stage.rss / 1e6:.0f} MB"
        report.add(STAGE, million(stage, size.large), f"{millions}, {rate}")
        if size.large >= 20_000_000:
            report.add(STAGE_MEMORY, stage.rss / 1e6, f"{millions}, the most that was resident")
        send = sent(source, WORK / "large", null, 1000, size.large)
        rate = f"{size.large / send.seconds / 1e3:.0f} k/s"
        report.add(SEND, million(send, size.large), f"{millions}, {rate}")
        report.add(
            MEMORY, send.rss / 1e6, f"{millions}, 1000 a request, the most that was resident"
        )
        few = history(size.small)
        staged(few, WORK / "small", null)
        used = sent(few, WORK / "small", null, 10, size.small)
        said = f"{size.small / 1e6:g} M events, client {million(used, size.small):.1f} CPU s for a million"
        report.add(SEND_SMALL, size.small / (used.seconds - loading_s) / 1e3, said)
        whole = sent(source, WORK / "whole", null, 1000, size.large)  # nothing is staged yet
        shutil.rmtree(WORK / "whole")
    return million(whole, size.large)


def rivals(report: Report, size: Size, ours: float) -> None:
    """Send the same events as people do without us."""
    source = WORK / f"history-{size.large}.ndjson"
    with sink("counting") as null:
        for goal, name, count in ((NAIVE, "naive", size.naive), (SDK, "sdk", size.sdk)):
            command = [sys.executable, str(HERE / "rivals.py"), name, str(source), str(count)]
            used = measured([*command, null.address])
            _against(report, goal, float(used.said) * 1e6 / count, ours, count)
        if not (HERE / "node_modules" / "mixpanel-import").exists():
            console.print(
                "  mixpanel-import is not installed: (cd bench && npm ci); its row is not run"
            )
            return
        some = WORK / "some.ndjson"
        with source.open("rb") as whole:
            some.write_bytes(b"".join(islice(whole, size.mixpanel)))
        before = json.loads(null.get("/")[1])["requests"]
        used = measured(["node", str(HERE / "mixpanel.js"), str(some), null.address])
        found = json.loads(used.said.splitlines()[-1])
        requests = json.loads(null.get("/")[1])["requests"] - before
        assert found["total"] == size.mixpanel, found
        assert requests >= size.mixpanel / 1000, (requests, found)
        _against(report, MIXPANEL, found["cpu_s"] * 1e6 / size.mixpanel, ours, size.mixpanel)


def _against(report: Report, goal: Goal, theirs: float, ours: float, count: int) -> None:
    said = f"theirs {theirs:.0f} CPU s for a million ({count:,} events), ours {ours:.1f}, one run, stage and order included"
    report.add(goal, theirs / ours, said)


def shapes(report: Report) -> None:
    """Play every shape of history in virtual time, with the schedule that sends."""
    sys.path.insert(0, str(HERE.parent))
    from tests.core import test_schedule as schedules  # noqa: PLC0415 - the shapes are the tests'

    worst = ("", 0.0)
    for name, make in schedules.SHAPES.items():
        people, rates = make()
        random.Random(1).shuffle(people)
        *_, last = schedules.play(people, rates)
        ratio = (last.at - schedules.START) / schedules.bound(people, rates)
        worst = max(worst, (name, ratio), key=lambda one: one[1])
    said = f"{len(schedules.SHAPES)} shapes, the worst: {worst[0]}"
    report.add(SHAPES, worst[1], said)


def killed(report: Report, size: Size) -> None:
    """Kill a run while it sends, run it again, and count what came."""
    source = WORK / f"history-{size.large}.ndjson"
    with sink("counting") as null:
        for journal in (WORK / "large").glob("journal.db*"):
            journal.unlink()  # sent already: once more from the start
        command = _run(source, WORK / "large", null, 1000)
        with (WORK / "log").open("wb") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log)
            while (before := _count(null)) < size.large / 2:
                assert child.poll() is None, (WORK / "log").read_text()[-2000:]
                time.sleep(0.01)
            child.send_signal(signal.SIGKILL)
            child.wait()
        measured(command)
        twice = _count(null) - size.large
    said = (
        f"{twice:,} again, as many as were under way, of {size.large / 1e6:g} M, killed after {before:,};"
        " as part of 20 M. A kill while staging stages anew"
    )
    report.add(TWICE, 100 * twice / 20_000_000, said)


def _count(null: Server) -> int:
    return int(json.loads(null.get("/")[1])["events"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument(
        "--long", action="store_true", help="20 M events, some 10 minutes on a quiet machine"
    )
    chosen = parser.parse_args()
    size = QUICK if chosen.quick else LONG if chosen.long else USUAL
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    console.print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}"
    )
    report = Report(GOALS)
    started = time.perf_counter()
    try:
        loading_s = limits(report, size)
        rivals(report, size, client(report, size, loading_s))
        shapes(report)
        killed(report, size)
    finally:
        for table in report.table():
            console.print(table)
        console.print(f"took {time.perf_counter() - started:.0f} s")
        shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    main()
