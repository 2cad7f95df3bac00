"""A rehearsal equals reality: the difference it prints is the one measured before and after the real import.

Measured independently of it: the export of everything, read over HTTP before and after, and the user look-up.
"""

from __future__ import annotations

import base64
import gzip
import http.client
import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.engine.test_undo import _event as drawn
from tests.faults.process import API_KEY, PATIENCE_S, SECRET_KEY, Process
from tests.server.live import Live
from typer.testing import CliRunner, Result

from retrofill.backfill.verify import parse_ms
from retrofill.cli import rehearse, report, run, verify

pytestmark = pytest.mark.slow

Json = dict[str, Any]
KEYS = ["--api-key", API_KEY, "--secret-key", SECRET_KEY]
DAY_MS = 86_400_000

app = typer.Typer()
for name, module in (("rehearse", rehearse), ("run", run), ("verify", verify), ("report", report)):
    app.command(name)(module.command)


def call(*words: str) -> Result:
    found = CliRunner().invoke(app, list(words))
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    one = Process(tmp_path / "data", limits="none")
    one.start()
    try:
        one.wait_until_ready()
        yield one
    finally:
        one.end()


class Measured:
    """A project as its readers see it."""

    def __init__(self, server: Process | Project) -> None:
        self.rows = server.export()
        first: dict[int, int] = {}
        active: dict[str, set[int]] = {}
        last: dict[int, Json] = {}
        self.user: dict[int, str] = {}
        people = {row["amplitude_id"] for row in self.rows}
        self.now: dict[int, int] = {}
        self.state: dict[int, Json] = {}
        for one in people:
            status, body = server.ask("GET", f"/api/2/useractivity?user={one}&limit=0")
            assert status == 200
            data = json.loads(body)["userData"]
            self.now[one] = data["canonical_amplitude_id"]
            self.state[data["canonical_amplitude_id"]] = data
        for row in self.rows:
            who = self.now[row["amplitude_id"]]
            ms = parse_ms(row["event_time"])
            assert ms is not None
            first[who] = min(first.get(who, ms), ms)
            active.setdefault(day(ms), set()).add(who)
            last[who] = row
        self.first = first
        self.absorbed = {one for one, now in self.now.items() if one != now}
        self.active = {one: len(who) for one, who in active.items()}
        new: dict[str, int] = {}
        for ms in first.values():
            new[day(ms)] = new.get(day(ms), 0) + 1
        self.new = new


def day(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d}"


def compare(made: Json, before: Measured, after: Measured) -> None:
    """The figures of a rehearsal against what was measured."""
    assert made["exact"]
    assert made["warnings"] == []
    assert made["new_users"] == {"before": before.new, "after": after.new}
    assert made["active_users"] == {"before": before.active, "after": after.active}
    stored = len(after.rows) - len(before.rows)
    assert made["volume"]["stored"] == stored
    # Whoever was a person of their own before and still is one.
    stays = [one for one, now in before.now.items() if one == now == after.now.get(one)]
    moved = [one for one in stays if after.first[one] != before.first[one]]
    assert made["first_seen"]["moved"] == len(moved)
    if moved:
        far = max(abs(after.first[one] - before.first[one]) for one in moved) / DAY_MS
        assert made["first_seen"]["days_max"] == pytest.approx(far, abs=0.001)
    assert made["merged"] == len(after.absorbed - before.absorbed)
    side = made["skipped" if made["skip_user_properties_sync"] else "synced"]
    names: dict[str, int] = {}
    pairs: dict[tuple[str, str | None, str | None], int] = {}
    changed = set()
    for one in stays:
        was, now = before.state[one]["properties"], after.state[one]["properties"]
        for name in was.keys() | now.keys():
            if was.get(name) != now.get(name):
                changed.add(one)
                names[name] = names.get(name, 0) + 1
                pair = (name, text(was.get(name)), text(now.get(name)))
                pairs[pair] = pairs.get(pair, 0) + 1
    told = {name: side["names"].get(name, 0) for name in names}
    assert told == names
    if len(side["listed"]) < 100:
        listed = {
            (one["name"], one["old"], one["new"]): one["people"]
            for one in side["listed"]
            if not one["built_in"]
        }
        assert listed == pairs
    assert side["people"] >= len(changed)


def text(value: object) -> str | None:
    return (
        None
        if value is None
        else json.dumps(value, separators=(",", ":"), ensure_ascii=False)[:200]
    )


def rehearsed(server: Process | Project, work: Path, given: list[str], *options: str) -> Json:
    keys = server.keys if isinstance(server, Project) else KEYS
    line = ["rehearse", *given, "--against", server.url, *keys, "--work", str(work), "--json"]
    made: Json = json.loads(call(*line, *options).stdout)
    return made


def ran(server: Process | Project, work: Path, given: list[str], *options: str) -> None:
    keys = server.keys if isinstance(server, Project) else KEYS
    call("run", *given, "--to", server.url, *keys, "--work", str(work), "--yes", *options)


def verified(work: Path, keys: list[str]) -> str:
    """Return what `verify` says. It ends with 1 where a live event had the key: that row is missing in the import."""
    return CliRunner().invoke(app, ["verify", "--work", str(work), *keys]).stdout


def halves(data: Path, folder: Path, name: str, of: str) -> tuple[list[str], list[str]]:
    """Cut a real history by time into overlapping parts: the later one is live already, an import brings the earlier.

    of: of users whose name begins so alone.
    """
    packed = gzip.decompress((data / name).read_bytes()).decode()
    lines = packed.splitlines(keepends=True)
    head: list[str] = []
    if name == SHOP:
        head, lines = lines[:1], [one for one in lines[1:] if one.startswith(of)]
        lines.sort(key=lambda line: line.split(",")[3], reverse=True)
    mapping = ["--map", str(data / f"{name.split('.', maxsplit=1)[0]}.map.yaml")]
    found = []
    cuts = (lines[: len(lines) * 3 // 5], lines[len(lines) // 2 :])
    for at, part in enumerate(cuts):
        path = folder / f"{at}-{name.removesuffix('.gz')}"
        path.write_text("".join([*head, *part]))
        found.append([str(path), *mapping])
    return found[0], found[1]


SYNCED, SKIPPED = "--no-skip-user-properties-sync", "--skip-user-properties-sync"
SHOP, GIT = "shop-clickstream.csv.gz", "git-history.ndjson.gz"


@pytest.mark.parametrize(
    ("name", "of", "skip"),
    [
        (SHOP, "user_00", SYNCED),
        pytest.param(SHOP, "user_", SYNCED, marks=pytest.mark.long),
        pytest.param(SHOP, "user_", SKIPPED, marks=pytest.mark.long),
        pytest.param(GIT, "", SYNCED, marks=pytest.mark.long),
        pytest.param(GIT, "", SKIPPED, marks=pytest.mark.long),
    ],
)
def test_of_a_real_history_whose_other_part_is_there(
    tmp_path: Path, data: Path, server: Process, name: str, of: str, skip: str
) -> None:
    live, given = halves(data, tmp_path, name, of)
    ran(server, tmp_path / "live", live, "--import", "live", "--no-skip-user-properties-sync")
    before = Measured(server)
    made = rehearsed(server, tmp_path / "work", given, "--import", "new", skip)
    assert len(server.export()) == len(before.rows)
    ran(server, tmp_path / "work", given, "--import", "new", skip)
    compare(made, before, Measured(server))
    told = verified(tmp_path / "work", KEYS)
    assert "rehearsal: 12 of 12 figures came as predicted" in told, told


FIELDS = (
    *("user_id", "device_id", "event_type", "time", "insert_id", "user_properties", "groups"),
    *("platform", "country", "language", "app_version"),
)
TEXTS = ", ".join(f"{name}: VARCHAR" for name in FIELDS if name != "time")
MAP = f"""
source: {{format: ndjson, columns: {{{TEXTS.replace("properties: VARCHAR", "properties: JSON").replace("groups: VARCHAR", "groups: JSON")}, time: BIGINT}}}}
event: {{{", ".join(f"{name}: {name}" for name in FIELDS)}}}
"""
START_MS = 1_700_000_000_000
EXAMPLES = 40


class Project:
    """One empty project of a server that has many."""

    def __init__(self, live: Live, number: int, folder: Path) -> None:
        self.url = live.address
        self.folder = folder
        self.keys = ["--api-key", f"KEY{number}", "--secret-key", f"SECRET{number}"]
        folder.mkdir()

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        token = base64.b64encode(f"{self.keys[1]}:{self.keys[3]}".encode()).decode()
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=PATIENCE_S)
        sent = None if body is None else json.dumps(body)
        connection.request(method, path, sent, {"Authorization": f"Basic {token}"})
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def send(self, events: list[Json]) -> None:
        status, said = self.ask("POST", "/batch", {"api_key": self.keys[1], "events": events})
        assert status == 200, said

    def export(self) -> list[Json]:
        now = datetime.now(UTC)
        hours = f"start={now - timedelta(1):%Y%m%dT%H}&end={now + timedelta(1):%Y%m%dT%H}"
        status, archive = self.ask("GET", f"/api/2/export?{hours}")
        if status == 404:
            return []
        with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
            packed = [gzip.decompress(zipped.read(name)) for name in zipped.namelist()]
        return [json.loads(line) for part in packed for line in part.splitlines()]


class Many:
    """A server with many projects, handed out one after the other."""

    def __init__(self, live: Live, folder: Path) -> None:
        self._live = live
        self._folder = folder
        self._given = 0

    def next(self) -> Project:
        self._given += 1
        return Project(self._live, self._given, self._folder / str(self._given))


@pytest.fixture
def many(tmp_path: Path) -> Iterator[Many]:
    projects = [
        word
        for number in range(1, EXAMPLES + 1)
        for word in ("--project", f"p{number}:KEY{number}:SECRET{number}")
    ]
    with Live(tmp_path, "--limits", "none", *projects) as live:
        yield Many(live, tmp_path)


def events(seeded: random.Random, count: int, start_ms: int, *, once: bool) -> list[Json]:
    """Draw events of a few people, on shared devices too. once: no insert_id comes twice."""
    made = []
    for number in range(count):
        event = drawn(seeded, number, start_ms + number * 60_000)
        if once:
            event["insert_id"] = f"i-{number}"
        # What a mapping does not say here.
        made.append({name: event[name] for name in event if name in FIELDS})
    return made


def searched(
    examples: int, *, always_the_same: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Draw so many histories."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        drawn_by = given(
            seed=st.integers(0, 2**32),
            skip=st.sampled_from([SYNCED, SKIPPED]),
            time=st.sampled_from(["arrival", "event"]),
        )
        return settings(
            max_examples=examples,
            derandomize=always_the_same,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
        )(drawn_by(test))

    return decorate


@searched(3, always_the_same=True)
def test_of_random_histories(many: Many, seed: int, skip: str, time: str) -> None:
    check(many, seed, skip, time)


@pytest.mark.long
@searched(EXAMPLES)
def test_of_many_random_histories(many: Many, seed: int, skip: str, time: str) -> None:
    check(many, seed, skip, time)


def check(many: Many, seed: int, skip: str, time: str) -> None:
    seeded = random.Random(seed)
    one = many.next()
    assert one.ask("PUT", "/api/1/project", {"property_time": time})[0] == 200
    live = events(seeded, seeded.randrange(1, 60), START_MS, once=False)
    for at in range(0, len(live), 7):
        one.send(live[at : at + 7])
    rows = events(seeded, seeded.randrange(1, 60), START_MS - 40 * DAY_MS, once=True)
    source = [str(one.folder / "history.ndjson"), "--map", str(one.folder / "map.yaml")]
    (one.folder / "history.ndjson").write_text("\n".join(map(json.dumps, rows)))
    (one.folder / "map.yaml").write_text(MAP)
    before = Measured(one)
    made = rehearsed(one, one.folder / "work", source, "--import", "new", skip)
    ran(one, one.folder / "work", source, "--import", "new", skip)
    compare(made, before, Measured(one))
    told = verified(one.folder / "work", one.keys)
    assert "rehearsal: 12 of 12 figures came as predicted" in told, told
