"""How fast is the backfill client, and how much does it need? Prints each row when it is done, then one table; keeps nothing.

The real commands run in processes of their own, ours and those people send a history with today, and each is charged all
that the kernel says of it and its children. Loading is counted once for a million events, for everybody: a command is also
run with ten events, and what that takes is not counted again and again where few events stand for a million. Ours and a
rival's run in turn over events of the same kind; the row is the middle one of the pairs. The sink answers 200 and stores nothing.
A row that was not run says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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

    large: int  # staged, sent at 1000 a request, killed in both
    small: int  # sent at 10 a request
    loop: int  # ours in each pair, and the loop's
    sdk: int  # the SDK's
    mixpanel: int
    pairs: int


QUICK = Size(large=200_000, small=40_000, loop=200_000, sdk=20_000, mixpanel=20_000, pairs=1)
USUAL = Size(large=1_000_000, small=200_000, loop=1_000_000, sdk=150_000, mixpanel=30_000, pairs=3)
LONG = Size(
    large=20_000_000, small=1_000_000, loop=1_000_000, sdk=200_000, mixpanel=100_000, pairs=5
)
LOOKED_AT = (
    4 * 1024 * 1024
)  # of a source before it is read, and how much more one row may be long than another
PRESET_EVENTS = 200_000  # 127 MB
HISTORY = 20_000_000  # what the longest rows are about

STAGE = Goal("stage: CPU for a million events, NDJSON to ready sets", 8, 4, "s")
PRESET = Goal("stage through a preset (mixpanel): CPU for a million events", 8, 4, "s")
STAGE_MEMORY = Goal("stage: memory for 20 M events", 2500, 1500, "MB")
SEND = Goal("send to a null sink, 1000 a request: client CPU for a million", 3, 1, "s")
SEND_SMALL = Goal("send, 10 a request", 15, 40, "k/s", least=True)
LOOP = Goal("stage and send, events per CPU s, against a `requests` loop", 2, 4, "×", least=True)
LOOP_LONG = Goal("the same with 20 M events, the loop before and after", 2, 4, "×", least=True)
MIXPANEL = Goal("the same against npm mixpanel-import", 5, 12, "×", least=True)
SDK = Goal("the same against the official Python SDK", 12, 30, "×", least=True)
MEMORY = Goal("memory while sending", 300, 150, "MB")
SHAPES = Goal("duration in virtual time against the lower bound, worst shape", 1.05, 1.01, "×")
SENT_TWICE = Goal("killed while it sends, gone on: events sent twice, of 20 M", 1, 0.1, "%")
STAGED_TWICE = Goal("killed half way through staging, gone on: rows staged twice", 1, 0.1, "%")
GOALS = [
    *(
        STAGE,
        PRESET,
        STAGE_MEMORY,
        SEND,
        SEND_SMALL,
        LOOP,
        LOOP_LONG,
        MIXPANEL,
        SDK,
        MEMORY,
        SHAPES,
    ),
    *(SENT_TWICE, STAGED_TWICE),
]


@dataclass(frozen=True)
class Used:
    """What a process took."""

    cpu_s: float
    seconds: float
    rss: int
    said: str


def measured(command: list[str], watch: Callable[[int], None] = lambda _: None) -> Used:
    """Run a command to its end and return what the kernel counted of it and its children.

    watch: called with its process id again and again. Raises RuntimeError if it fails.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    said = WORK / "said"
    started = time.perf_counter()
    with said.open("wb") as out, (WORK / "log").open("wb") as log:
        child = subprocess.Popen(command, stdout=out, stderr=log, env=_environment())
        rss, pid = 0, 0
        while not pid:
            rss = max(rss, _resident(child.pid))
            watch(child.pid)
            time.sleep(0.02)
            pid, status, used = os.wait4(child.pid, os.WNOHANG)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{command[1:4]} failed:\n{(WORK / 'log').read_text()[-2000:]}")
    return Used(used.ru_utime + used.ru_stime, seconds, rss, said.read_text())


def _environment() -> dict[str, str]:
    """Compiled modules are kept, as on anybody's machine; wherever that is turned off, loading takes twice as long."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


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
    if path.exists():
        return path
    made = lines(ROOM)
    with path.open("wb") as file:
        for number, left in enumerate(range(count, 0, -len(made))):
            text = b"\n".join(islice(made, left)) + b"\n"
            file.write(text.replace(MARKER, b"%024d" % number))
    return path


def mixpanel_export(count: int) -> Path:
    """Return a file of so many rows as Mixpanel exports them, some 20 properties each."""
    path, draw = WORK / "mixpanel.ndjson", random.Random(1)
    encode = msgspec.json.Encoder().encode
    with path.open("wb") as file:
        for at in range(count):
            user, time_ms = draw.randrange(20_000), 1_700_000_000_000 + at * 137
            properties = {
                "time": time_ms // 1000,
                "distinct_id": f"user-{user}@example.com",
                "$browser": "Chrome",
                "$browser_version": 120,
                "$city": "Zürich",
                "$os": "Linux",
                "$current_url": f"https://example.com/{at % 977}",
                "$device_id": f"device-{user:032}",
                "$initial_referrer": "$direct",
                "$insert_id": f"{draw.getrandbits(64):016x}",
                "$lib_version": "2.47.0",
                "$user_id": f"user-{user}@example.com",
                "mp_api_timestamp_ms": time_ms,
                "mp_country_code": "CH",
                "mp_lib": "web",
                "mp_processing_time_ms": time_ms,
                "utm_source": "news",
                "page": f"Page {at % 31}",
                "price": draw.randrange(10_000) / 100,
                "quantity": at % 9,
                "plan": "pro",
                "in_stock": at % 2 == 0,
                "tags": ["a", "b"],
                "variant": None,
                "score": at % 1009,
            }
            file.write(encode({"event": f"Event {at % 17}", "properties": properties}) + b"\n")
    return path


def _verb(name: str, *options: str) -> list[str]:
    return [sys.executable, "-c", _VERB.format(name), *options]


def _plan(source: Path, work: Path, sink: Server, told: str = "") -> list[str]:
    options = ("--map", told or str(WORK / "map.yaml"), "--work", str(work), "--to", sink.address)
    return _verb("plan", str(source), *options, "--json")


def _run(source: Path, work: Path, sink: Server, events_per_request: int = 1000) -> list[str]:
    options = ("--map", str(WORK / "map.yaml"), "--work", str(work), "--to", sink.address)
    limits = ("--profile", "retrofill", "--events-per-request", str(events_per_request))
    return _verb("run", str(source), *options, *limits, "--api-key", API_KEY, "--yes", "--json")


def staged(source: Path, work: Path, sink: Server, events: int) -> Used:
    """Stage with `plan`; every event must be there."""
    shutil.rmtree(work, ignore_errors=True)
    return _all_staged(_plan(source, work, sink), events)


def _all_staged(
    command: list[str], events: int, watch: Callable[[int], None] = lambda _: None
) -> Used:
    used = measured(command, watch)
    assert json.loads(used.said)["events"] == events, used.said
    return used


def sent(source: Path, work: Path, sink: Server, events: int, events_per_request: int) -> Used:
    """Send what is staged with `run`, or stage it before; every event must be acknowledged."""
    used = measured(_run(source, work, sink, events_per_request))
    end = json.loads(used.said.splitlines()[-1])
    assert end["complete"], end
    assert end["acknowledged"] == events, end
    return used


@contextlib.contextmanager
def sink() -> Iterator[Server]:
    """Serve the app that counts and stores nothing."""
    found = servers.null(WORK, app="counting")
    try:
        yield found
    finally:
        found.kill()


def _counted(null: Server, what: str) -> int:
    return int(json.loads(null.get("/")[1])[what])


@dataclass(frozen=True)
class Loading:
    """CPU seconds that a command takes for ten events."""

    plan_s: float
    run_s: float  # of what is staged
    whole_s: float  # of what is not


def million(cpu_s: float, events: int, loading_s: float) -> float:
    """Return CPU seconds for a million events, loading counted once for a million, whatever the size."""
    each = 1e6 / events
    return (cpu_s - loading_s) * each + loading_s * min(1, each)


def limits(report: Report, null: Server) -> Loading:
    """Measure what this machine can do at all, and what loading is."""
    decode = msgspec.json.Decoder(_Body).decode
    made = lines(ROOM)[:40_000]
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
    few, work = history(10), WORK / "few"
    found = []
    for _ in range(4):  # the first one compiles what it loads
        plan, run = staged(few, work, null, 10), sent(few, work, null, 10, 1000)
        shutil.rmtree(work)
        found.append((plan.cpu_s, run.cpu_s, sent(few, work, null, 10, 1000).cpu_s))
    loading = Loading(*map(statistics.median, zip(*found[1:], strict=True)))
    said = f"{loading.plan_s:.2f}, {loading.run_s:.2f} and {loading.whole_s:.2f} CPU s"
    memory = f"{plan.rss / 1e6:.0f} and {run.rss / 1e6:.0f} MB"
    report.limit("`plan` of ten events, `run` of these, `run` of ten: loading", f"{said}, {memory}")
    return loading


def preset(report: Report, null: Server) -> None:
    """Stage what a preset maps. What is compiled for it is there already, as from a machine's first large source on."""
    warm = "from retrofill.backfill import narrow, native; [*map(native.native, narrow.NEEDED)]"
    measured([sys.executable, "-c", warm])
    work, found = WORK / "preset", []
    for events in (10, PRESET_EVENTS):  # the first one loads, and compiles the mapping
        source = mixpanel_export(events)
        found.append(_all_staged(_plan(source, work, null, "mixpanel"), events).cpu_s)
        shutil.rmtree(work)
    cpu_s = million(found[1], PRESET_EVENTS, found[0])
    row_bytes = source.stat().st_size // PRESET_EVENTS
    report.add(PRESET, cpu_s, f"{PRESET_EVENTS:,} rows of {row_bytes} bytes")
    source.unlink()


def small(report: Report, size: Size, null: Server, loading: Loading) -> None:
    """Send at 10 a request."""
    events, work = size.small, WORK / "small"
    staged(history(events), work, null, events)
    used = sent(history(events), work, null, events, 10)
    shutil.rmtree(work)
    each = million(used.cpu_s, events, loading.run_s)
    said = f"{events / 1e6:g} M events, client {each:.1f} CPU s for a million, loading left out of the time"
    report.add(SEND_SMALL, events / (used.seconds - loading.run_s) / 1e3, said)


# Ours and others in turn

Way = Callable[[Path, int], float]  # sends a history of so many events, returns CPU seconds


def _ours(null: Server) -> Way:
    def way(source: Path, events: int) -> float:
        shutil.rmtree(WORK / "whole", ignore_errors=True)
        return sent(source, WORK / "whole", null, events, 1000).cpu_s

    return way


def _python(name: str, null: Server) -> Way:
    command = [sys.executable, str(HERE / "rivals.py"), name]

    def way(source: Path, events: int) -> float:
        before = _counted(null, "requests")
        used = measured([*command, str(source), null.address])
        requests = _counted(null, "requests") - before
        assert requests >= events / 1000, (requests, used.said)
        return used.cpu_s

    return way


def _mixpanel(null: Server) -> Way:
    def way(source: Path, events: int) -> float:
        before = _counted(null, "requests")
        used = measured(["node", str(HERE / "mixpanel.js"), str(source), null.address])
        found = json.loads(used.said.splitlines()[-1])
        requests = _counted(null, "requests") - before
        assert found["total"] == events, found
        assert requests >= events / 1000, (requests, found)
        return used.cpu_s

    return way


def against(  # what is compared takes this many words
    report: Report, goal: Goal, ours: Way, theirs: Way, *, events: int, others: int, pairs: int
) -> None:
    """Send by both ways in turn, some times. others: the events that a rival sends, fewer where it takes minutes."""
    source, other, few = history(events), history(others), history(10)
    loading = [statistics.median(way(few, 10) for _ in range(3)) for way in (ours, theirs)]
    found = []
    for _ in range(pairs):
        used = (ours(source, events), events), (theirs(other, others), others)
        found.append([million(cpu_s, n, s) for (cpu_s, n), s in zip(used, loading, strict=True)])
    ratios = [b / a for a, b in found]
    mine, their = (statistics.median(each) for each in zip(*found, strict=True))
    every = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    said = (
        f"{events:,} events, theirs {others:,}, in turn: {every} ×; theirs {their:.1f} CPU s for a million,"
        f" ours {mine:.1f}, loading of ten events {loading[1]:.2f} and {loading[0]:.2f}"
    )
    report.add(goal, statistics.median(ratios), said)


def rivals(report: Report, size: Size, null: Server) -> None:
    """Send the same events as people do without us."""
    ours, pairs = _ours(null), size.pairs
    events, loop, sdk = size.loop, _python("loop", null), _python("sdk", null)
    ours(
        history(events), events
    )  # the first large source of a machine has code compiled that is kept
    against(report, LOOP, ours, loop, events=events, others=events, pairs=pairs)
    against(report, SDK, ours, sdk, events=events, others=size.sdk, pairs=min(3, pairs))
    if (HERE / "node_modules" / "mixpanel-import").exists():
        mixpanel = _mixpanel(null)
        against(
            report,
            MIXPANEL,
            ours,
            mixpanel,
            events=events,
            others=size.mixpanel,
            pairs=min(2, pairs),
        )
    else:
        console.print("  no mixpanel-import: (cd bench && npm ci); its row is not run")
    shutil.rmtree(WORK / "whole")


def large(report: Report, size: Size, null: Server, loading: Loading) -> None:
    """Stage and send the largest history, each killed on its way first."""
    events, work = size.large, WORK / "large"
    source = history(events)
    theirs = _python("loop", null)
    before_s = theirs(history(size.loop), size.loop) if events >= HISTORY else 0.0
    twice = _killed_staging(source, work, null, events)
    stage = staged(source, work, null, events)
    millions = f"{events / 1e6:g} M events"
    rate = f"{events / stage.seconds / 1e3:.0f} k/s, {stage.rss / 1e6:.0f} MB"
    report.add(STAGE, million(stage.cpu_s, events, loading.plan_s), f"{millions}, {rate}")
    if events >= HISTORY:
        report.add(STAGE_MEMORY, stage.rss / 1e6, f"{millions}, the most that was resident")
    report.add(STAGED_TWICE, 100 * twice / events, f"{twice:,.0f} of {events:,} rows")
    send = sent(source, work, null, events, 1000)
    rate = f"{events / send.seconds / 1e3:.0f} k/s"
    report.add(SEND, million(send.cpu_s, events, loading.run_s), f"{millions}, {rate}")
    report.add(MEMORY, send.rss / 1e6, f"{millions}, 1000 a request, the most that was resident")
    if events >= HISTORY:
        after_s = theirs(history(size.loop), size.loop)
        loop = (before_s + after_s) / 2 * 1e6 / size.loop
        ours = (stage.cpu_s + send.cpu_s) * 1e6 / events
        said = f"theirs {loop:.1f} CPU s for a million ({size.loop:,} events), ours {ours:.1f}, all of it"
        report.add(LOOP_LONG, loop / ours, said)
    _killed_sending(report, source, work, null, events)


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


def _killed(command: list[str], there: Callable[[int], bool]) -> None:
    """Start a command and kill it when it is there, which is asked with its process id."""
    with (WORK / "log").open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=_environment())
        while not there(child.pid):
            assert child.poll() is None, (WORK / "log").read_text()[-2000:]
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()


def _at(pid: int, source: Path) -> int:
    """Return how far a process has read a file, in bytes; 0 if it has not opened it."""
    with contextlib.suppress(OSError):  # it may close it, or end, meanwhile
        for one in Path(f"/proc/{pid}/fd").iterdir():
            if one.readlink() == source.resolve():
                told = Path(f"/proc/{pid}/fdinfo/{one.name}").read_text()
                return int(told.split()[1])
    return 0


def _killed_staging(source: Path, work: Path, null: Server, events: int) -> float:
    """Kill staging when half of the source is read, then go on; return how many rows were read twice.

    Where it goes on is what it says; nowhere between what it looks at first and there may it be seen reading.
    """
    whole, places = source.stat().st_size, [0]

    def half(pid: int) -> bool:
        places[0] = max(places[0], _at(pid, source))
        return places[0] >= whole / 2

    shutil.rmtree(work, ignore_errors=True)
    command = _plan(source, work, null)
    _killed(command, half)
    assert not (work / "stage").exists(), "it had ended before it was killed"
    seen: set[int] = set()
    _all_staged(command, events, watch=lambda pid: seen.add(_at(pid, source)))
    found = re.search(r"going on .*: ([\d,]+) rows are read", (WORK / "log").read_text())
    read = int(found[1].replace(",", "")) if found else 0
    begun = read / events * whole
    assert all(at <= LOOKED_AT or at >= begun - LOOKED_AT for at in seen), (read, sorted(seen))
    return max(0.0, places[0] / whole * events - read)


def _killed_sending(report: Report, source: Path, work: Path, null: Server, events: int) -> None:
    """Kill a run while it sends, run it again, and count what came."""
    for journal in work.glob("journal.db*"):
        journal.unlink()  # sent already: once more from the start
    command, start, came = _run(source, work, null), _counted(null, "events"), [0]

    def half(_pid: int) -> bool:
        came[0] = _counted(null, "events") - start
        return came[0] >= events / 2

    _killed(command, half)
    sent(source, work, null, events, 1000)
    twice = _counted(null, "events") - start - events
    said = f"{twice:,} again, of {events / 1e6:g} M, killed after {came[0]:,}"
    if events < HISTORY:
        said += "; as many as were under way, so as part of 20 M"
    report.add(SENT_TWICE, 100 * twice / HISTORY, said)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument(
        "--long", action="store_true", help="20 M events, 20 GB of disk, up to 20 minutes"
    )
    chosen = parser.parse_args()
    size = QUICK if chosen.quick else LONG if chosen.long else USUAL
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    (WORK / "map.yaml").write_text(MAP)
    console.print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}"
    )
    report = Report(GOALS)
    started = time.perf_counter()
    try:
        with sink() as null:
            loading = limits(report, null)
            shapes(report)
            preset(report, null)
            small(report, size, null, loading)
            rivals(report, size, null)
            large(report, size, null, loading)
    finally:
        for table in report.table():
            console.print(table)
        console.print(f"took {time.perf_counter() - started:.0f} s")
        shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    main()
