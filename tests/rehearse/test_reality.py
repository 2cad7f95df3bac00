"""A rehearsal equals reality: the difference it prints is the one measured before and after the real import.

Measured independently of it: the export of everything, read over HTTP before and after, and the user look-up.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.faults.process import API_KEY, SECRET_KEY, Process
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

    def __init__(self, server: Process) -> None:
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
    stays = [
        one for one, now in before.now.items() if one == now and after.now.get(one, one) == one
    ]
    moved = [one for one in stays if after.first[one] != before.first[one]]
    assert made["first_seen"]["moved"] == len(moved)
    if moved:
        far = max(abs(after.first[one] - before.first[one]) for one in moved) / DAY_MS
        assert made["first_seen"]["days_max"] == pytest.approx(far, abs=0.001)
    merged = sum(one != now for one, now in after.now.items())
    assert made["merged"] == merged - sum(one != now for one, now in before.now.items())
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


def rehearsed(server: Process, work: Path, given: list[str], *options: str) -> Json:
    line = ["rehearse", *given, "--against", server.url, *KEYS, "--work", str(work), "--json"]
    made: Json = json.loads(call(*line, *options).stdout)
    return made


def ran(server: Process, work: Path, given: list[str], *options: str) -> None:
    call("run", *given, "--to", server.url, *KEYS, "--work", str(work), "--yes", *options)


def halves(data: Path, folder: Path, name: str) -> tuple[list[str], list[str]]:
    """Cut a real history into overlapping parts: what is live already, and what an import brings."""
    packed = gzip.decompress((data / name).read_bytes()).decode()
    lines = packed.splitlines(keepends=True)
    head, lines = ([lines[0]], lines[1:]) if ".csv" in name else ([], lines)
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
    ("name", "skip"),
    [
        (SHOP, SYNCED),
        pytest.param(GIT, SYNCED, marks=pytest.mark.long),
        pytest.param(SHOP, SKIPPED, marks=pytest.mark.long),
        pytest.param(GIT, SKIPPED, marks=pytest.mark.long),
    ],
)
def test_of_a_real_history_whose_other_part_is_there(
    tmp_path: Path, data: Path, server: Process, name: str, skip: str
) -> None:
    live, given = halves(data, tmp_path, name)
    ran(server, tmp_path / "live", live, "--import", "live", "--no-skip-user-properties-sync")
    before = Measured(server)
    made = rehearsed(server, tmp_path / "work", given, "--import", "new", skip)
    assert len(server.export()) == len(before.rows)
    ran(server, tmp_path / "work", given, "--import", "new", skip)
    compare(made, before, Measured(server))
    told = call("verify", "--work", str(tmp_path / "work"), *KEYS).stdout
    assert "rehearsal: 12 of 12 figures came as predicted" in told, told
