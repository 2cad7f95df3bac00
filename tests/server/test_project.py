"""GET and PUT /api/1/project on a live server: what the operator sets holds from the next request on, and stays."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tests.faults.process import PATIENCE_S
from tests.server.live import Live

pytestmark = pytest.mark.slow

# Each would stop the commit loop, and with it every project, or let one request fill the memory of all.
CANNOT_BE: dict[str, int] = {
    "window_s": 0,
    "httpapi_eps": -1,
    "daily_quota": 2**63,
    "property_updates_per_h": -1,
    "batch_bytes": 2**40,
    "httpapi_bytes": 0,
    "batch_events": 1_000_000,
    "group_identifies": 0,
    "id_length_min": -1,
    "dedupe_window_ms": 2**62,
    "export_bytes": -1,
    "deletion_days": 31,
}


def call(live: Live, method: str, path: str, body: object = None) -> tuple[int, Any]:
    token = base64.b64encode(b"KEY:SECRET").decode()
    request = urllib.request.Request(
        live.address + path,
        None if body is None else json.dumps(body).encode(),
        {"Authorization": f"Basic {token}"} if path.startswith("/api") else {},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as problem:
        with problem:
            return problem.code, json.loads(problem.read())


def send(live: Live, count: int, device: str = "device-1") -> tuple[int, Any]:
    events = [{"device_id": device, "event_type": "View"}] * count
    return call(live, "POST", "/batch", {"api_key": "KEY", "events": events})


def test_limits_and_silenced_devices_hold_at_once_and_after_a_restart(tmp_path: Path) -> None:
    with Live(tmp_path) as live:
        assert send(live, 4)[0] == 200
        settings = {"limits": {"batch_eps": 1, "window_s": 2}, "silenced_devices": ["device-2"]}
        status, said = call(live, "PUT", "/api/1/project", settings)
        shown = settings | {"property_time": "arrival", "merge_always": []}
        assert (status, said["limits"]["batch_eps"], said["settings"]) == (200, 1, shown)
        status, said = send(live, 3)
        assert (status, said["eps_threshold"], said["throttled_events"]) == (429, 1, [0, 1, 2])
        status, said = send(live, 1, "device-2")
        assert (status, said["error"]) == (400, "Events silenced for device_id")
        assert said["silenced_devices"] == ["device-2"]
    with Live(tmp_path) as live:
        assert call(live, "GET", "/api/1/project")[1]["settings"] == shown
        assert send(live, 3)[0] == 429
        assert call(live, "PUT", "/api/1/project", {})[0] == 200
        assert send(live, 3, "device-2")[0] == 200


def test_rows_of_every_kind_count_as_live_unless_an_import_brought_them(tmp_path: Path) -> None:
    def rows() -> Any:
        return call(live, "GET", "/api/1/project/rows")[1]

    with Live(tmp_path) as live:
        assert rows() == {"rows": 0, "live": 0}
        old = {"source_name": "retrofill", "source_version": "old"}
        event = {"device_id": "device-1", "event_type": "View", "ingestion_metadata": old}
        assert call(live, "POST", "/batch", {"api_key": "KEY", "events": [event] * 2})[0] == 200
        assert rows() == {"rows": 2, "live": 0}
        # No chart and no export shows an identify call, and yet it sets a person's properties.
        who = [{"device_id": "device-1", "user_properties": {"plan": "paid"}}]
        form = urllib.parse.urlencode({"api_key": "KEY", "identification": json.dumps(who)})
        with urllib.request.urlopen(f"{live.address}/identify", form.encode(), timeout=PATIENCE_S):
            pass
        assert rows() == {"rows": 3, "live": 1}
    with Live(tmp_path) as live:
        assert rows() == {"rows": 3, "live": 1}
        assert call(live, "DELETE", "/api/1/imports/old")[0] == 200
        assert rows() == {"rows": 1, "live": 1}


def test_a_limit_that_cannot_be_is_named(tmp_path: Path) -> None:
    with Live(tmp_path) as live:
        for settings, word in (
            ({"limits": {"batch_ep": 1}}, "batch_ep"),
            ({"limits": {"batch_eps": "many"}}, "batch_eps"),
            *(({"limits": {name: value}}, name) for name, value in CANNOT_BE.items()),
            ({"silenced": []}, "silenced"),
        ):
            status, said = call(live, "PUT", "/api/1/project", settings)
            assert status == 400
            assert word in json.dumps(said)
        assert send(live, 1)[0] == 200


def test_a_daily_quota_counts_stored_rows_and_names_the_id(tmp_path: Path) -> None:
    with Live(tmp_path) as live:
        assert call(live, "PUT", "/api/1/project", {"limits": {"daily_quota": 5}})[0] == 200
        events = [
            {"device_id": "device-1", "event_type": "View", "insert_id": str(n)} for n in range(4)
        ]
        identify = {
            "device_id": "device-1",
            "event_type": "$identify",
            "user_properties": {"plan": "a"},
        }
        for sent in (events, events, events, [identify] * 3):  # repeats and identifies are no rows
            status, _said = call(live, "POST", "/batch", {"api_key": "KEY", "events": sent})
            assert status == 200
        status, said = send(live, 2)
        assert status == 429
        assert said["exceeded_daily_quota_devices"] == {"device-1": 4}
        assert said["throttled_events"] == [0, 1]
        assert send(live, 1)[0] == 200
    with Live(tmp_path) as live:
        assert send(live, 1)[0] == 429
