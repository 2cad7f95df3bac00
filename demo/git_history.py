"""Thirteen years of real history into a fresh server, and back out again, over the public HTTP API alone.

The history is every commit and changed file of a public repository, newest first in its file. It is sent in time order,
ties in the order of the file, a thousand events a request through `/batch`. Then everything is read back with the export
and compared with what was sent: each event once, in its place, with its content and the property that its person had then.
Every figure printed was read from the server. Exits 1 if anything differs.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import gzip
import http.client
import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

ROOT = Path(__file__).parents[1]
HISTORY = ROOT / "tests" / "data" / "git-history.ndjson.gz"
DATA = ROOT / "retrofill-demo"
API_KEY, SECRET_KEY = "demo-key", "demo-secret"
EVENTS_PER_REQUEST = 1000
READY_S = 60
OK = 200

Row = dict[str, Any]
console = Console(highlight=False)


# The history.


def event(row: Row) -> Row:
    """Map a row of the source to an event, as tests/data/git-history.map.yaml says."""
    names = ("repo", "path", "files", "insertions", "deletions", "merge")
    return {
        "user_id": row["user"],
        "device_id": row["device"],
        "event_type": row["event"],
        "time": row["at"] * 1000,
        "insert_id": row["id"],
        "event_properties": {name: row[name] for name in names if row.get(name) is not None},
        "user_properties": {"utc_offset": row["utc_offset"]},
    }


def history() -> list[Row]:
    """Return the events in time order; events of one second keep the order of the file."""
    with gzip.open(HISTORY, "rt", encoding="utf-8") as lines:
        return sorted((event(json.loads(line)) for line in lines), key=lambda one: one["time"])


# The server.


def empty_room(data: Path) -> None:
    """Remove what an earlier demo left, unless a server is still using it."""
    lock = data / "lock"
    if lock.exists():
        with lock.open() as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                sys.exit(f"A server is using {data}: stop it first")
    elif data.exists() and any(data.iterdir()):
        sys.exit(f"{data} is not empty and is no data directory: give another with --data")
    shutil.rmtree(data, ignore_errors=True)


class Api:
    """The server's public HTTP API."""

    def __init__(self, port: int) -> None:
        self.port = port
        token = base64.b64encode(f"{API_KEY}:{SECRET_KEY}".encode()).decode()
        self._headers = {"Authorization": f"Basic {token}"}
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def send(self, events: list[Row]) -> None:
        """Send one request; it is stored when this returns."""
        body = json.dumps({"api_key": API_KEY, "events": events})
        self._connection.request("POST", "/batch", body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        said = json.loads(answer.read())
        if (answer.status, said["code"], said["events_ingested"]) != (OK, OK, len(events)):
            sys.exit(f"The server answered {answer.status}: {said}")

    def get(self, path: str) -> bytes:
        """Return the body of an answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", headers=self._headers
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return bytes(answer.read())

    def json(self, path: str) -> Any:  # noqa: ANN401 - whatever JSON the answer holds
        """Return the answer as JSON."""
        return json.loads(self.get(path))

    def ready(self) -> bool:
        """Say whether the server serves."""
        try:
            return bool(self.get("/healthz"))
        except (urllib.error.URLError, ConnectionError):
            return False


@contextmanager
def served(data: Path) -> Iterator[Api]:
    """Run a server on a fresh directory and a free port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "retrofill"),
        *("serve", "--data", str(data), "--port", str(port), "--limits", "none"),
        *("--project", f"demo:{API_KEY}:{SECRET_KEY}"),
    ]
    log = Path(f"{data}.log")
    with log.open("wb") as written:
        server = subprocess.Popen(command, stdout=written, stderr=written)
    try:
        api = Api(port)
        end = time.monotonic() + READY_S
        while not api.ready():
            if server.poll() is not None or time.monotonic() > end:
                sys.exit(f"The server did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)
        yield api
    finally:
        server.terminate()
        if server.wait(timeout=120):
            sys.exit(f"The server ended badly:\n{log.read_text(errors='replace')[-2000:]}")
    log.unlink()


def send(api: Api, events: list[Row]) -> float:
    """Send everything in order; return the seconds it took."""
    started = time.perf_counter()
    bar = Progress(
        TextColumn("sending"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        sending = bar.add_task("sending", total=len(events))
        for first in range(0, len(events), EVENTS_PER_REQUEST):
            part = events[first : first + EVENTS_PER_REQUEST]
            api.send(part)
            bar.advance(sending, len(part))
    return time.perf_counter() - started


# Reading back.


def exported(api: Api, since: datetime) -> list[Row]:
    """Return every row of the export, in its order."""
    until = datetime.now(UTC)
    archive = api.get(f"/api/2/export?start={since:%Y%m%dT%H}&end={until:%Y%m%dT%H}")
    rows: list[Row] = []
    with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
        for member in zipped.namelist():
            rows += map(json.loads, gzip.decompress(zipped.read(member)).splitlines())
    return rows


@dataclass(frozen=True)
class Comparison:
    """What was sent against what was read back, in events."""

    sent: int
    read: int
    missing: int
    doubled: int
    out_of_order: int
    different: int

    @property
    def whole(self) -> bool:
        """Say whether everything came back as it went in."""
        wrong = self.missing + self.doubled + self.out_of_order + self.different
        return self.sent == self.read and not wrong

    def __str__(self) -> str:
        return (
            f"{self.sent:,} sent · {self.read:,} read back · {self.missing:,} missing · "
            f"{self.doubled:,} doubled · {self.out_of_order:,} out of order"
        )


def compare(events: list[Row], rows: list[Row]) -> Comparison:
    """Compare what was sent with what was read back."""
    place = {one["insert_id"]: number for number, one in enumerate(events)}
    seen = Counter(row["$insert_id"] for row in rows)
    order = [place[row["$insert_id"]] for row in rows if row["$insert_id"] in place]
    return Comparison(
        sent=len(events),
        read=len(rows),
        missing=len(place.keys() - seen.keys()),
        doubled=sum(count - 1 for count in seen.values()),
        out_of_order=sum(after < before for before, after in pairwise(order)),
        different=sum(
            row["$insert_id"] not in place or not _same(events[place[row["$insert_id"]]], row)
            for row in rows
        ),
    )


def _same(sent: Row, row: Row) -> bool:
    """Say whether a row is its event. Sent in time order, the snapshot of utc_offset is the event's own."""
    moment = datetime.fromtimestamp(sent["time"] / 1000, UTC)
    return (
        all(row[name] == sent[name] for name in ("user_id", "device_id", "event_type"))
        and row["event_properties"] == sent["event_properties"]
        and row["user_properties"] == sent["user_properties"]
        and row["event_time"] == f"{moment:%Y-%m-%d %H:%M:%S.%f}"
    )


def people(api: Api, rows: list[Row]) -> tuple[int, int]:
    """Return how many people there are after merges, and how many were merged away."""
    found = {row["amplitude_id"] for row in rows}
    absorbed: set[int] = set()
    for one in found:
        about = api.json(f"/api/2/useractivity?user={one}&limit=1")["userData"]
        absorbed.update(about["merged_amplitude_ids"])
    return len(found - absorbed), len(absorbed)


def new_by_year(api: Api, first: int, last: int) -> dict[int, int]:
    """Return the number of people first seen in each year, as the server counts them."""
    counted = {}
    for year in range(first, last + 1):
        # A range has at most 365 days: the last day of a leap year is asked for by itself.
        end = datetime(year, 1, 1, tzinfo=UTC) + timedelta(days=364)
        spans = [(f"{year}0101", f"{end:%Y%m%d}")]
        if f"{end:%m%d}" != "1231":
            spans.append((f"{year}1231", f"{year}1231"))
        counted[year] = sum(
            sum(series)
            for start, stop in spans
            for series in api.json(f"/api/2/users?m=new&i=1&start={start}&end={stop}")["data"][
                "series"
            ]
        )
    return counted


# Telling.


def tell_years(counted: dict[int, int]) -> None:
    """Print people first seen by year."""
    most = max(counted.values())
    table = Table(title="people first seen", box=None, title_justify="left", show_header=False)
    for year, count in counted.items():
        table.add_row(str(year), f"{count:>4,}", "█" * round(40 * count / most))
    console.print(table)


def tell_person(api: Api, rows: list[Row]) -> None:
    """Print the latest activity of the person with the most events."""
    user, _ = Counter(row["user_id"] for row in rows).most_common(1)[0]
    match = api.json(f"/api/2/usersearch?user={user}")["matches"][0]
    found = api.json(f"/api/2/useractivity?user={match['amplitude_id']}&limit=5")
    about = found["userData"]
    table = Table(
        title=f"{user}, amplitude_id {match['amplitude_id']}: {about['num_events']:,} events, "
        f"{len(about['device_ids'])} devices, {about['first_used']} to {about['last_used']}",
        box=None,
        title_justify="left",
    )
    for name in ("time", "event", "path", "lines", "utc_offset"):
        table.add_column(name)
    for row in found["events"]:
        properties = row["event_properties"]
        table.add_row(
            row["event_time"][:19],
            row["event_type"],
            properties.get("path", "–"),
            f"+{properties['insertions']} -{properties['deletions']}",
            row["user_properties"]["utc_offset"],
        )
    console.print(table)


def _shown(data: Path) -> str:
    return str(data.relative_to(ROOT) if data.is_relative_to(ROOT) else data)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Send a real history through a fresh server.")
    parser.add_argument("--data", type=Path, default=DATA, help="data directory, made anew")
    data = parser.parse_args().data
    started = time.perf_counter()
    empty_room(data)
    events = history()
    since = datetime.now(UTC)
    with served(data) as api:
        console.print(
            f"Serving {_shown(data)} on port {api.port}; {len(events):,} events of {HISTORY.name}"
        )
        seconds = send(api, events)
        rows = exported(api, since)
        result = compare(events, rows)
        alive, absorbed = people(api, rows)
        years = [datetime.fromtimestamp(events[at]["time"] / 1000, UTC).year for at in (0, -1)]
        counted = new_by_year(api, *years)
        console.print(
            f"\n{result.sent:,} events sent in {seconds:.1f} s ({result.sent / seconds:,.0f} a second, each synced "
            f"to disk before its answer)\n{result.read:,} stored · {alive:,} people · {absorbed:,} merges\n"
        )
        tell_years(counted)
        console.print()
        tell_person(api, rows)
    counts = sum(counted.values()) == alive
    console.print(f"\n[bold]{result}[/]")
    console.print(
        f"{result.different:,} different in content · people first seen add up: {'yes' if counts else 'no'} · "
        f"{time.perf_counter() - started:.1f} s in all"
    )
    console.print(
        f"\nKeep serving this data (API key {API_KEY}, secret key {SECRET_KEY}):\n"
        f"  .venv/bin/retrofill serve --data {_shown(data)}",
        soft_wrap=True,
    )
    if not (result.whole and counts):
        sys.exit(1)


if __name__ == "__main__":
    main()
