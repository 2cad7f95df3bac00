"""Two real histories into a fresh server with `retrofill run`, and back out again, each in a project of its own.

git-history is every commit and changed file of a public repository over thirteen years, newest first in its file;
shop-clickstream is half a year of clicks in a shop. `retrofill run` maps, sorts and sends them as a user would, and
`retrofill verify` reads them back. Then the proof, by other code than the client's: this file maps each source by itself,
says in which order a person's events must have arrived and which properties the person had at each, and compares that
with the server's export. At the end the second history is undone with `retrofill undo`, shown to be gone with nothing else
touched, and restored, so that both are there to be served. Every figure printed was read from the server. Exits 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import base64
import csv
import fcntl
import gzip
import io
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "tests" / "data"
DATA = ROOT / "retrofill-demo"
RETROFILL = Path(sys.executable).parent / "retrofill"
PATIENCE_S = 300  # for what takes seconds unless the machine is busy
NOT_FOUND = 404
LOOKED_UP = 50  # people of an undone import that are searched for one by one

Row = dict[str, Any]
console = Console(highlight=False)


# The histories.


@dataclass(frozen=True, eq=False)
class History:
    """One source and its project. read: its rows as events, in the order of the file. shown: columns of an activity."""

    name: str
    file: str
    read: Callable[[Path], Iterator[Row]]
    shown: dict[str, Callable[[Row], str]]

    @property
    def source(self) -> Path:
        """The file of rows."""
        return SOURCES / self.file

    @property
    def mapping(self) -> Path:
        """The mapping that `retrofill run` takes."""
        return SOURCES / f"{self.name}.map.yaml"

    @property
    def keys(self) -> tuple[str, str]:
        """API key and secret key of its project."""
        return f"{self.name}-key", f"{self.name}-secret"

    def events(self) -> list[Row]:
        """Return the events as they must arrive: in time order, events of one moment as in the file.

        `user_properties` is what the person has then: the newest value of each so far.
        """
        found = sorted(self.read(self.source), key=lambda one: one["time"])
        tables: defaultdict[str, Row] = defaultdict(dict)
        for one in found:
            table = tables[one["user_id"]] | one["user_properties"]
            tables[one["user_id"]] = one["user_properties"] = table
        return found


def commits(path: Path) -> Iterator[Row]:
    """Yield the events of git-history, as tests/data/git-history.map.yaml says."""
    names = ("repo", "path", "files", "insertions", "deletions", "merge")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in map(msgspec.json.decode, lines):
            yield {
                "user_id": row["user"],
                "device_id": row["device"],
                "event_type": row["event"],
                "time": row["at"] * 1000,
                "insert_id": row["id"],
                "event_properties": {n: row[n] for n in names if row.get(n) is not None},
                "user_properties": {"utc_offset": row["utc_offset"]},
            }


def clicks(path: Path) -> Iterator[Row]:
    """Yield the events of shop-clickstream, as tests/data/shop-clickstream.map.yaml says."""
    names = ("acquisition_channel", "user_cohort", "user_lifecycle")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    begun: dict[str, int] = {}
    for row in rows:
        moment = datetime.fromisoformat(row["timestamp"]).replace(tzinfo=UTC)
        at = row["time"] = round(moment.timestamp() * 1000)
        session = row["session_id"]
        begun[session] = min(at, begun.get(session, at))
    for row in rows:
        yield {
            "user_id": row["user_id"],
            "event_type": row["event"],
            "time": row["time"],
            "platform": row["platform"],
            "session_id": begun[row["session_id"]],
            "user_properties": {name: row[name] for name in names if row[name]},
        }


HISTORIES = (
    History(
        "git-history",
        "git-history.ndjson.gz",
        commits,
        {
            "path": lambda row: row["event_properties"].get("path", "–"),
            "lines": lambda row: "+{insertions} -{deletions}".format(**row["event_properties"]),
            "utc_offset": lambda row: row["user_properties"]["utc_offset"],
        },
    ),
    History(
        "shop-clickstream",
        "shop-clickstream.csv.gz",
        clicks,
        {
            "platform": lambda row: row["platform"],
            "user_lifecycle": lambda row: row["user_properties"]["user_lifecycle"],
        },
    ),
)


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
    """The server's public HTTP API, with the keys of one project."""

    def __init__(self, address: str, keys: tuple[str, str]) -> None:
        self.address = address
        token = base64.b64encode(":".join(keys).encode()).decode()
        self._headers = {"Authorization": f"Basic {token}"}

    def get(self, path: str) -> bytes:
        """Return the body of an answer."""
        request = urllib.request.Request(self.address + path, headers=self._headers)
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return bytes(answer.read())

    def holds(self, path: str) -> bool:
        """Say whether there is something: False for 404."""
        try:
            self.get(path)
        except urllib.error.HTTPError as refused:
            with refused:
                if refused.code == NOT_FOUND:
                    return False
            raise
        return True

    def json(self, path: str) -> Any:  # noqa: ANN401 - whatever JSON the answer holds
        """Return the answer as JSON."""
        return msgspec.json.decode(self.get(path))


def _address(log: Path) -> str:
    """Return where the server says that it listens, once it does, else nothing."""
    said = log.read_text(errors="replace").partition("Retrofill listens on ")[2]
    return said.partition("\n")[0] if "\n" in said else ""


@contextmanager
def served(data: Path) -> Iterator[str]:
    """Run a server on a fresh directory and a free port; give its address."""
    command = [str(RETROFILL), "serve", "--data", str(data), "--port", "0"]
    command += ["--limits", "none", "--log-level", "warning"]
    for history in HISTORIES:
        command += ["--project", ":".join((history.name, *history.keys))]
    log = Path(f"{data}.log")
    with log.open("wb") as written:
        server = subprocess.Popen(command, stdout=written, stderr=written)
    try:
        end = time.monotonic() + PATIENCE_S
        while not (address := _address(log)):
            if server.poll() is not None or time.monotonic() > end:
                sys.exit(f"The server did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)
        yield address
    finally:
        server.terminate()
        if server.wait(PATIENCE_S):
            sys.exit(f"The server ended badly:\n{log.read_text(errors='replace')[-2000:]}")
    log.unlink()


def retrofill(history: History, *words: str | Path) -> float:
    """Run a verb of the client with a history's keys, show its line and its words; return the seconds it took."""
    line = [_shown(word) if isinstance(word, Path) else word for word in words]
    console.print(f"$ retrofill {shlex.join(line)}", style="bold", soft_wrap=True)
    started = time.perf_counter()
    api_key, secret_key = history.keys
    keys = {"RETROFILL_API_KEY": api_key, "RETROFILL_SECRET_KEY": secret_key}
    done = subprocess.run(
        [str(RETROFILL), *map(str, words)], env={**os.environ, **keys}, check=False
    )
    if done.returncode:
        sys.exit(f"retrofill {words[0]} ended with {done.returncode}")
    return time.perf_counter() - started


# Reading back.


def exported(api: Api, since: datetime) -> list[Row]:
    """Return every row of the export, in its order; none if the server has none."""
    until = datetime.now(UTC)
    try:
        archive = api.get(f"/api/2/export?start={since:%Y%m%dT%H}&end={until:%Y%m%dT%H}")
    except urllib.error.HTTPError as refused:
        with refused:
            if refused.code == NOT_FOUND:
                return []
        raise
    rows: list[Row] = []
    with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
        for member in zipped.namelist():
            rows += map(msgspec.json.decode, gzip.decompress(zipped.read(member)).splitlines())
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


def compare(events: Sequence[Row], rows: Sequence[Row]) -> Comparison:
    """Compare what was to be sent, in the order of arrival, with what was read back.

    An event is known by its insert_id; where the source has none, by its content, and equal ones by their number.
    """
    named = "insert_id" in events[0]
    places: defaultdict[str, list[int]] = defaultdict(list)
    for place, one in enumerate(events):
        places[one["insert_id"] if named else _content(one)].append(place)
    found: Counter[str] = Counter()
    arrived: defaultdict[str, list[int]] = defaultdict(list)
    different = 0
    for row in rows:
        content = _content(_as_event(row, events[0]))
        key = row["$insert_id"] if named else content
        known = places.get(key, [])
        if not known or content != _content(events[known[0]]):
            different += 1
        if found[key] < len(known):
            arrived[row["user_id"]].append(known[found[key]])
        found[key] += 1
    return Comparison(
        sent=len(events),
        read=len(rows),
        missing=sum(max(0, len(known) - found[key]) for key, known in places.items()),
        doubled=sum(max(0, found[key] - len(known)) for key, known in places.items()),
        out_of_order=sum(
            after < before for one in arrived.values() for before, after in pairwise(one)
        ),
        different=different,
    )


def _content(event: Row) -> str:
    return msgspec.json.encode(event, order="deterministic").decode()


def _as_event(row: Row, like: Row) -> Row:
    """Return an export's row as the event it was. like: an event with the same fields."""
    event = {name: row[name] for name in like if name not in {"insert_id", "time"}}
    if "insert_id" in like:
        event["insert_id"] = row["$insert_id"]
    moment = datetime.fromisoformat(row["event_time"]).replace(tzinfo=UTC)
    return {**event, "time": round(moment.timestamp() * 1000)}


def first_seen(api: Api, first: date, last: date) -> dict[str, int]:
    """Return the number of people first seen in each year, or in each month of a single year, as the server counts them."""
    counted: Counter[str] = Counter()
    start = first
    while start <= last:
        # A range has at most 365 days.
        end = min(last, start + timedelta(days=364))
        data = api.json(f"/api/2/users?m=new&i=1&start={start:%Y%m%d}&end={end:%Y%m%d}")["data"]
        for series in data["series"]:
            for day, count in zip(data["xValues"], series, strict=True):
                counted[day[:4] if first.year < last.year else day[:7]] += count
        start = end + timedelta(days=1)
    return dict(counted)


# Telling.


def tell_first_seen(counted: dict[str, int]) -> None:
    """Print people first seen by year or month."""
    most = max(counted.values())
    table = Table(title="people first seen", box=None, title_justify="left", show_header=False)
    for when, count in counted.items():
        table.add_row(when, f"{count:>4,}", "█" * round(40 * count / most))
    console.print(table)


def tell_person(api: Api, rows: Sequence[Row], shown: dict[str, Callable[[Row], str]]) -> None:
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
    for name in ("time", "event", *shown):
        table.add_column(name)
    for row in found["events"]:
        cells = (read(row) for read in shown.values())
        table.add_row(row["event_time"][:19], row["event_type"], *cells)
    console.print(table)


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def show(history: History, address: str, work: Path) -> bool:
    """Send one history, read it back, tell what the server says of it; return whether all is as it must be."""
    since = datetime.now(UTC)
    console.print(f"[bold]{history.name}[/]\n")
    line = (history.source, "--map", history.mapping, "--work", work, "--import", history.name)
    retrofill(history, "rehearse", *line, "--against", address)
    nothing = not Api(address, history.keys).holds(f"/api/1/imports/{history.name}/export")
    console.print(
        f"\nrehearsed: the server {'still has nothing of it' if nothing else 'HAS ROWS OF IT'}\n"
    )
    seconds = retrofill(history, "run", *line, "--to", address, "--yes")
    retrofill(history, "verify", "--work", work)
    api = Api(address, history.keys)
    events = history.events()
    rows = exported(api, since)
    result = compare(events, rows)
    days = [datetime.fromtimestamp(events[at]["time"] / 1000, UTC).date() for at in (0, -1)]
    counted = first_seen(api, *days)
    people = sum(counted.values())
    # Rows keep the amplitude_id of their arrival; first-seen counts those who were merged once.
    merges = len({row["amplitude_id"] for row in rows}) - people
    console.print(
        f"\n{result.sent:,} events mapped, sorted and sent in {seconds:.1f} s, each synced to disk before its "
        f"answer\n{result.read:,} stored · {people:,} people · {merges:,} merges\n",
        soft_wrap=True,
    )
    tell_first_seen(counted)
    console.print()
    tell_person(api, rows, history.shown)
    console.print(f"\n[bold]{result}[/]")
    console.print(f"{result.different:,} different in content or properties\n")
    return nothing and result.whole and people == len({one["user_id"] for one in events})


def take_back(history: History, other: History, address: str, since: datetime) -> bool:
    """Undo the import of a history, look for what remains, restore it; return whether all is as it must be."""
    console.print(f"[bold]{history.name}, taken back[/]\n")
    api, untouched = Api(address, history.keys), Api(address, other.keys)
    events = history.events()
    before = exported(untouched, since)
    undo = ("undo", history.name, "--to", address, "--yes")
    seconds = retrofill(history, *undo)
    users = [user for user, _ in Counter(one["user_id"] for one in events).most_common(LOOKED_UP)]
    found = sum(bool(api.json(f"/api/2/usersearch?user={user}")["matches"]) for user in users)
    days = [datetime.fromtimestamp(events[at]["time"] / 1000, UTC).date() for at in (0, -1)]
    people = sum(first_seen(api, *days).values())
    gone = not api.holds(f"/api/1/imports/{history.name}/export")
    left = len(exported(api, since))
    same = exported(untouched, since) == before
    console.print(
        f"\n{seconds:.1f} s for the whole command: the export of the import is {'404' if gone else 'there'} · {left:,} events left in "
        f"the project · {people:,} people first seen · {found:,} of the {len(users):,} most active found by search\n"
        f"{other.name}: its {len(before):,} rows are {'the same as before' if same else 'NOT the same'}\n",
        soft_wrap=True,
    )
    seconds = retrofill(history, *undo, "--restore")
    result = compare(events, exported(api, since))
    console.print(f"\n{seconds:.1f} s for the whole command\n[bold]{result}[/]")
    console.print(f"{result.different:,} different in content or properties\n")
    return gone and not (left or people or found) and same and result.whole


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Send real histories through a fresh server.")
    parser.add_argument("--data", type=Path, default=DATA, help="data directory, made anew")
    data = parser.parse_args().data
    started = time.perf_counter()
    empty_room(data)
    works = Path(f"{data}-work")
    for history in HISTORIES:
        shutil.rmtree(works / history.name, ignore_errors=True)
    with served(data) as address:
        since = datetime.now(UTC)
        whole = [show(history, address, works / history.name) for history in HISTORIES]
        whole.append(take_back(HISTORIES[1], HISTORIES[0], address, since))
    console.print(f"{time.perf_counter() - started:.1f} s in all")
    keys = "".join(f"  {one.name}: {' '.join(one.keys)}\n" for one in HISTORIES)
    console.print(
        f"Keep serving this data (project: API key, secret key):\n{keys}"
        f"  .venv/bin/retrofill serve --data {_shown(data)}",
        soft_wrap=True,
    )
    if not all(whole):
        sys.exit(1)


if __name__ == "__main__":
    main()
