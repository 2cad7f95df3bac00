"""The client and our own server: what one project exports, another takes in and exports again."""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
import re
import urllib.parse
import urllib.request
import zipfile
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.faults.process import PATIENCE_S
from tests.manners.house import document
from tests.server.live import Live
from typer.testing import CliRunner

from retrofill.backfill.profile import adjust, choose, holds_nothing_live, target
from retrofill.cli.main import app

pytestmark = pytest.mark.slow

Json = dict[str, Any]
START_MS = 1_700_000_000_000
OLD, NEW = ("KEY", "SECRET"), ("KEY2", "SECRET2")


def history(count: int) -> list[Json]:
    """Return events in time order that use every field a row can bring back, of people with several devices."""
    chance = random.Random(7)
    events = []
    for number in range(count):
        who = chance.randrange(12)
        event: Json = {
            "event_type": chance.choice(["View", "Buy", "Sign Up"]),
            "device_id": f"device-{who}-{chance.randrange(2)}",
            "time": START_MS + 1000 * number,
            "insert_id": f"insert-{number}",
            "event_id": number,
            "session_id": chance.choice([-1, START_MS + 1000 * (number // 10)]),
            "event_properties": {
                "n": number,
                "tags": ["a", {"b": None}],
                "half": 0.5,
                "long": "é" * 40,
            },
            "user_properties": {"plan": chance.choice(["free", "paid"]), f"p{number % 3}": number},
            "language": chance.choice(["English", "en", "pt-BR"]),
            "ip": f"203.0.113.{who}",
        }
        if chance.random() < 0.8:
            event["user_id"] = f"user-{who}"
        for name in (
            *("platform", "os_name", "os_version", "device_brand", "device_manufacturer"),
            *("device_model", "carrier", "app_version", "library", "partner_id", "idfa", "adid"),
        ):
            if chance.random() < 0.7:
                event[name] = f"{name} {chance.randrange(3)}"
        if chance.random() < 0.7:
            event |= {"country": "Brazil", "region": "Bahia", "city": "Salvador", "dma": "none so"}
        if chance.random() < 0.3:
            event |= {"location_lat": -12.97, "location_lng": -38.5}
        if chance.random() < 0.3:
            event |= {
                "revenue": 9.5,
                "price": 9.5,
                "quantity": 1,
                "productId": "shoe",
                "revenueType": "x",
            }
        if chance.random() < 0.3:
            event["groups"] = {"org": chance.choice(["acme", ["acme", "umbra"]])}
        if chance.random() < 0.2:
            event["plan"] = {"branch": "main", "version": "3"}
        events.append(event)
    return events


def call(live: Live, keys: tuple[str, str], path: str, body: bytes | None = None) -> bytes:
    token = base64.b64encode(":".join(keys).encode()).decode()
    headers = {"Authorization": f"Basic {token}"} if body is None else {}
    request = urllib.request.Request(live.address + path, body, headers)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return bytes(answer.read())


def put(live: Live, keys: tuple[str, str], path: str, body: bytes) -> None:
    token = base64.b64encode(":".join(keys).encode()).decode()
    headers = {"Authorization": f"Basic {token}"}
    request = urllib.request.Request(live.address + path, body, headers, method="PUT")
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        assert answer.status == 200


def send(live: Live, keys: tuple[str, str], events: list[Json]) -> None:
    for at in range(0, len(events), 25):
        body = json.dumps({"api_key": keys[0], "events": events[at : at + 25]})
        assert json.loads(call(live, keys, "/batch", body.encode()))["code"] == 200


def export(live: Live, keys: tuple[str, str], since: datetime) -> bytes:
    until = datetime.now(UTC)
    return call(live, keys, f"/api/2/export?start={since:%Y%m%dT%H}&end={until:%Y%m%dT%H}")


def rows(archive: bytes) -> list[Json]:
    with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
        packed = [gzip.decompress(zipped.read(name)) for name in zipped.namelist()]
    return [json.loads(line) for part in packed for line in part.splitlines()]


def excepted() -> set[str]:
    """Return the columns that docs/mapping.md says are not brought back."""
    text = document("docs/mapping.md")
    told = re.search(r"Not brought back: (.*?)\n\n", text, re.DOTALL)
    assert told is not None
    return set(re.findall(r"`(\w+)`", told[1]))


def test_an_export_taken_in_exports_the_same(tmp_path: Path) -> None:
    since = datetime.now(UTC)
    with Live(tmp_path, "--limits", "none", "--project", f"two:{':'.join(NEW)}") as live:
        send(live, OLD, history(400))
        archive = export(live, OLD, since)
        (tmp_path / "export.zip").write_bytes(archive)
        keys = ["--api-key", NEW[0], "--secret-key", NEW[1]]
        line = ["run", str(tmp_path / "export.zip"), "--map", "amplitude-export", "--yes"]
        work = ["--work", str(tmp_path / "work"), *keys]
        found = CliRunner().invoke(app, [*line, "--to", live.address, *work])
        assert found.exit_code == 0, found.output
        assert "user properties are synced" in found.output
        again = rows(export(live, NEW, since))
        read = CliRunner().invoke(app, ["verify", *work])
        assert read.exit_code == 0, read.output
    before = {row["$insert_id"]: row for row in rows(archive)}
    assert len(before) == len(again) == 400
    left_out = excepted()
    differing: Json = {}
    for row in again:
        old = before[row["$insert_id"]]
        assert row.keys() - left_out == old.keys() - left_out
        for name in row.keys() - left_out:
            if row[name] != old[name]:
                differing.setdefault(name, (old[name], row[name]))
    assert differing == {}
    people: dict[int, list[str]] = {}
    for row in again:
        people.setdefault(row["amplitude_id"], []).append(row["event_time"])
    assert all(first <= second for times in people.values() for first, second in pairwise(times))


def test_properties_are_synced_only_where_nothing_is_live(tmp_path: Path) -> None:
    with Live(tmp_path, "--project", f"two:{':'.join(NEW)}") as live:
        where = target(live.address)
        assert holds_nothing_live(where, *OLD)
        assert not holds_nothing_live(where, OLD[0], "")
        assert not holds_nothing_live(where, OLD[0], "wrong")
        imported = {"source_name": "retrofill", "source_version": "old"}
        send(live, OLD, [{**history(1)[0], "ingestion_metadata": imported}])
        assert holds_nothing_live(where, *OLD)
        # No list of event types and no export shows an identify call.
        who = json.dumps([{"user_id": "user-1", "user_properties": {"plan": "paid"}}])
        form = urllib.parse.urlencode({"api_key": OLD[0], "identification": who})
        call(live, OLD, "/identify", form.encode())
        assert not holds_nothing_live(where, *OLD)
        assert holds_nothing_live(where, *NEW)
    assert not holds_nothing_live(where, *NEW)
    assert not holds_nothing_live(target("amplitude"), *NEW)


def test_our_server_says_how_many_property_updates_it_takes(tmp_path: Path) -> None:
    """It answers 200 beyond them and leaves the table as it is, so that only asking before can help."""
    rows_ = [
        {"user": "user-1", "event": "Open", "at": START_MS + 1000 * n, "p": {"n": n}}
        for n in range(2500)
    ]
    (tmp_path / "s.ndjson").write_text("\n".join(map(json.dumps, rows_)))
    (tmp_path / "m.yaml").write_text(
        "event: {user_id: user, event_type: event, time: at, user_properties: p}"
    )
    source = [str(tmp_path / "s.ndjson"), "--map", str(tmp_path / "m.yaml")]
    keys = ["--api-key", OLD[0], "--secret-key", OLD[1], "--work", str(tmp_path / "work")]
    with Live(tmp_path) as live:
        rates = adjust(choose(target(live.address), None, *OLD), updates=True).rates
        assert (rates.updates_per_h, rates.quota_per_day) == (1800, 500_000)
        assert (rates.device_per_s, rates.user_per_s, rates.events_per_s) == (1000, 1000, 0)
        short = choose(target(f"{live.address}/2/httpapi"), None, *OLD).rates
        assert (short.device_per_s, short.user_per_s) == (30, 30)
        unknown = adjust(choose(target(live.address), None, OLD[0]), updates=True).rates
        assert (unknown.updates_per_h, unknown.quota_per_day) == (0, 0)
        blind = ["plan", *source, "--to", live.address, "--work", str(tmp_path / "blind")]
        synced = [*blind, "--no-skip-user-properties-sync"]
        assert "beyond 1,800 an hour" in CliRunner().invoke(app, synced).output
        assert (
            "beyond 1,800 an hour"
            not in CliRunner().invoke(app, [*blind[:-1], str(tmp_path / "other")]).output
        )
        planned = CliRunner().invoke(app, ["plan", *source, "--to", live.address, *keys, "--json"])
        told = json.loads(planned.stdout)
        assert (told["updates"], told["least_s"]) == (2500, 3600)
        assert any("2,500 property updates" in warning for warning in told["warnings"])
        limits = {"property_updates_per_h": 0, "daily_quota": 9000, "batch_eps": 5000}
        limits |= {"project_eps": 500, "project_requests_per_s": 7}
        put(live, OLD, "/api/1/project", json.dumps({"limits": limits}).encode())
        rates = adjust(choose(target(live.address), None, *OLD), updates=True).rates
        assert (rates.updates_per_h, rates.quota_per_day) == (0, 9000)
        assert (rates.device_per_s, rates.events_per_s, rates.requests_per_s) == (5000, 500, 7)
        planned = CliRunner().invoke(app, ["plan", *source, "--to", live.address, *keys, "--json"])
        told = json.loads(planned.stdout)
        assert (told["least_s"], told["least_because"]) == (5, "events in all")
        limits |= {"project_eps": 0, "project_requests_per_s": 0}
        put(live, OLD, "/api/1/project", json.dumps({"limits": limits}).encode())
        line = ["run", *source, "--to", live.address, *keys, "--yes"]
        found = CliRunner().invoke(app, line)
        assert found.exit_code == 0, found.output
        matches = json.loads(call(live, OLD, "/api/2/usersearch?user=user-1"))["matches"]
        who = matches[0]["amplitude_id"]
        activity = json.loads(call(live, OLD, f"/api/2/useractivity?user={who}&limit=1"))
        assert activity["userData"]["properties"] == {"n": 2499}


def test_a_project_that_goes_by_event_time_takes_old_values_as_old_ones(tmp_path: Path) -> None:
    rows_ = [{"user": "user-1", "at": START_MS + 1000 * n, "p": {"plan": f"{n}"}} for n in range(3)]
    (tmp_path / "s.ndjson").write_text("\n".join(map(json.dumps, rows_)))
    (tmp_path / "m.yaml").write_text(
        "event: {user_id: user, event_type: \"'Open'\", time: at, user_properties: p}"
    )
    line = ["run", str(tmp_path / "s.ndjson"), "--map", str(tmp_path / "m.yaml"), "--yes"]
    keys = ["--api-key", OLD[0], "--secret-key", OLD[1], "--work", str(tmp_path / "work")]
    since = datetime.now(UTC)
    with Live(tmp_path) as live:
        put(live, OLD, "/api/1/project", b'{"property_time": "event"}')
        assert choose(target(live.address), None, *OLD).by_event_time
        live_event = history(1)[0] | {"user_id": "user-1", "user_properties": {"plan": "gold"}}
        send(live, OLD, [live_event | {"time": START_MS + 10**9}])
        found = CliRunner().invoke(app, [*line, "--to", live.address, *keys])
        assert found.exit_code == 0, found.output
        assert "by event time: no newer value changes" in found.output
        read = CliRunner().invoke(app, ["verify", *keys])
        assert read.exit_code == 0, read.output
        shown = {
            row["client_event_time"]: row["user_properties"]["plan"]
            for row in rows(export(live, OLD, since))
        }
        assert [shown[time] for time in sorted(shown)] == ["0", "1", "2", "gold"]
        matches = json.loads(call(live, OLD, "/api/2/usersearch?user=user-1"))["matches"]
        who = matches[0]["amplitude_id"]
        activity = json.loads(call(live, OLD, f"/api/2/useractivity?user={who}&limit=1"))
        assert activity["userData"]["properties"] == {"plan": "gold"}


T = "2024-06-14T10:00:0{}Z"
ANONYMOUS = "0190163d-8694-739b-aea5-966c26f8ad90"
TOLD: dict[str, list[Json]] = {
    "segment": [
        {"type": "page", "messageId": "s-1", "anonymousId": "device-s", "timestamp": T.format(1)},
        {"type": "alias", "messageId": "s-2", "userId": "user-s", "previousId": "device-s",
         "timestamp": T.format(2)},
        {"type": "group", "messageId": "s-3", "userId": "user-s", "groupId": "acme",
         "traits": {"seats": 5}, "timestamp": T.format(3)},
        {"type": "group", "messageId": "s-4", "userId": "user-t", "groupId": "acme",
         "traits": {"seats": 6}, "timestamp": T.format(4)},
    ],
    "posthog": [
        {"uuid": "p-1", "event": "Look", "distinct_id": ANONYMOUS, "properties": {},
         "timestamp": T.format(1)},
        {"uuid": "p-2", "event": "$create_alias", "distinct_id": ANONYMOUS,
         "properties": {"alias": "user-p"}, "timestamp": T.format(2)},
        {"uuid": "p-3", "event": "$groupidentify", "distinct_id": "user-p",
         "properties": {"$group_type": "org", "$group_key": "umbra", "$group_set": {"seats": 7}},
         "timestamp": T.format(3)},
    ],
    "mixpanel": [
        {"event": "Look", "properties": {"distinct_id": "$device:device-m", "time": 1718359201}},
        {"event": "$identify", "properties": {"$identified_id": "user-m", "$anon_id": "device-m",
                                              "time": 1718359202}},
    ],
}  # fmt: skip


def test_what_a_source_says_of_ids_and_groups_counts_at_the_destination(tmp_path: Path) -> None:
    since = datetime.now(UTC)
    keys = ["--api-key", OLD[0], "--secret-key", OLD[1]]
    with Live(tmp_path) as live:
        for preset, told in TOLD.items():
            source = tmp_path / f"{preset}.ndjson"
            source.write_text("\n".join(map(json.dumps, told)))
            work = ["--work", str(tmp_path / preset), "--import", preset, *keys]
            line = ["run", str(source), "--map", preset, "--yes", "--to", live.address, *work]
            found = CliRunner().invoke(app, line)
            assert found.exit_code == 0, found.output
            read = CliRunner().invoke(app, ["verify", *work[:2], *keys])
            assert read.exit_code == 0, read.output
        live_events = [
            {"event_type": "Now", "user_id": f"user-{who}", "device_id": f"now-{who}"}
            for who in "spm"
        ]
        org = {"groups": {"org": "umbra"}}
        send(live, OLD, [live_events[0], live_events[1] | org, live_events[2]])
        found_rows = rows(export(live, OLD, since))
    of = {
        (row["event_type"], row["device_id"]): row for row in found_rows
    }  # before and after the login
    for first, later in [
        (("Viewed Page", "device-s"), ("Now", "now-s")),
        (("Look", ANONYMOUS), ("Now", "now-p")),
        (("Look", "device-m"), ("Now", "now-m")),
    ]:
        assert of[first]["user_id"] is None
        assert of[first]["amplitude_id"] == of[later]["amplitude_id"]
    member = of["Now", "now-s"]
    assert member["user_properties"]["[Segment] Group"] == "acme"
    assert member["groups"] == {"[Segment] Group": ["acme"]}
    assert member["group_properties"] == {"[Segment] Group": {"acme": {"seats": 6}}}
    assert of["Now", "now-p"]["group_properties"] == {"org": {"umbra": {"seats": 7}}}
