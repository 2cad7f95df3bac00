"""The twelve ways in which servers make real clients lose events, each tried on the real server over HTTP.

Numbered as in the contract, clients 1. What takes a clock, a stalling peer or a stopping server to see is tried in
`test_app` (4, 5, 6) and in `tests/sdks`, with the clients themselves.
"""

from __future__ import annotations

import gzip
import http.client
import io
import json
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from tests.faults.process import API_KEY, PATIENCE_S, Process, Row

pytestmark = pytest.mark.slow

# One that stands still: what is sent within a window of the limits stays within it, however long that takes.
STILL = """
import time
from retrofill.clock import SystemClock
now_ms = time.time_ns() // 1_000_000
SystemClock.now_ms = lambda self: now_ms
"""
# One that goes back by two seconds with each request.
BACKWARDS = """
import itertools, time
from retrofill.clock import SystemClock
steps = itertools.count()
now_ms = SystemClock.now_ms
SystemClock.now_ms = lambda self: now_ms(self) - 2000 * next(steps)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    server = Process(tmp_path_factory.mktemp("clients") / "data", first=STILL, limits="amplitude")
    server.start()
    try:
        server.wait_until_ready()
        yield server
        server.stop()
    finally:
        server.end()


def event(who: str, **more: Any) -> Row:
    return {"event_type": "View", "user_id": who, "device_id": f"{who}-phone", **more}


class Answer:
    """Status, headers with names in lower case, body."""

    def __init__(
        self, server: Process, method: str, path: str, body: bytes, **headers: str
    ) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        connection.request(method, path, body, named)
        found = connection.getresponse()
        self.status = found.status
        self.headers = {name.lower(): text for name, text in found.getheaders()}
        self.body = found.read()
        connection.close()


def stored(server: Process, who: str) -> list[Row]:
    return [row for row in server.export() if row["user_id"] == who]


@pytest.mark.parametrize("path", ["/2/httpapi", "/batch"])
def test_01_every_200_says_so_in_its_body(server: Process, path: str) -> None:
    status, said = server.send([event("ways-1")], path=path)
    assert (status, said["code"], said["events_ingested"]) == (200, 200, 1)
    assert all(type(number) is int for number in said.values())


def test_02_a_429_names_every_event_in_whole_numbers_and_stores_none(server: Process) -> None:
    hot, cold = event("ways-2"), event("ways-2-cold")
    burst = [hot] * 100  # at once, and still a mean of 30 a second
    assert server.send(burst, path="/2/httpapi")[0] == 200
    status, said = server.send([cold, *[hot] * 850], path="/2/httpapi")
    assert (status, said["code"], said["eps_threshold"]) == (429, 429, 30)
    assert said["throttled_events"] == list(range(1, 851))
    assert said["throttled_devices"] == {"ways-2-phone": 32}
    assert said["throttled_users"] == {"ways-2": 32}
    assert (said["exceeded_daily_quota_devices"], said["exceeded_daily_quota_users"]) == ({}, {})
    assert len(stored(server, "ways-2")) == 100
    assert stored(server, "ways-2-cold") == []
    assert server.send([cold], path="/2/httpapi")[0] == 200  # what was refused weighs nothing


def test_03_a_400_names_the_bad_events_and_stores_none(server: Process) -> None:
    good = event("ways-3")
    status, said = server.send(
        [good, {"user_id": "ways-3"}, {**good, "time": "now"}, {**good, "user_id": "abc"}],
        path="/2/httpapi",
    )
    assert (status, said["code"], said["error"]) == (400, 400, "Request missing required field")
    assert said["events_with_missing_fields"] == {"event_type": [1]}
    # The older SDK does not read the list of lengths.
    assert said["events_with_invalid_fields"] == {"time": [2], "user_id": [3]}
    assert said["events_with_invalid_id_lengths"] == {"user_id": [3]}
    assert said.get("missing_field") is None
    assert stored(server, "ways-3") == []


def test_07_what_is_sent_again_is_stored_once(server: Process) -> None:
    wire = [event("ways-7", insert_id=str(number)) for number in range(3)]
    for path in ("/2/httpapi", "/batch", "/2/httpapi"):
        assert server.send(wire, path=path)[0] == 200
    assert [row["$insert_id"] for row in stored(server, "ways-7")] == ["0", "1", "2"]


@pytest.mark.parametrize("path", ["/2/httpapi", "/batch"])
def test_08_an_unknown_key_is_repeated(server: Process, path: str) -> None:
    body = json.dumps({"api_key": "nobody", "events": [event("ways-8")]}).encode()
    said = Answer(server, "POST", path, body)
    expected = {"code": 400, "error": "Invalid API key: nobody"}
    assert (said.status, json.loads(said.body)) == (400, expected)


def test_09_a_row_never_appears_before_what_was_read_already(tmp_path: Path) -> None:
    server = Process(tmp_path / "data", first=BACKWARDS)
    server.start()
    try:
        server.wait_until_ready()
        last: tuple[str, int] = ("", 0)
        for number in range(5):
            said = server.send([event("ways-9", insert_id=str(number))])[1]
            row = server.export()[-1]  # read between any two requests, as a connector would
            assert row["$insert_id"] == str(number)
            now = (row["server_upload_time"], said["server_upload_time"])
            assert now >= last
            assert datetime.strptime(now[0], "%Y-%m-%d %H:%M:%S.%f").replace(
                tzinfo=UTC
            ).timestamp() * 1000 == pytest.approx(now[1])
            last = now
    finally:
        server.end()


def test_10_every_member_ends_its_last_line_and_nothing_is_404(server: Process) -> None:
    assert server.send([event("ways-10")])[0] == 200
    now = datetime.now(UTC)
    ahead = f"start={now - timedelta(1):%Y%m%dT%H}&end={now + timedelta(days=30):%Y%m%dT%H}"
    status, archive = server.ask("GET", f"/api/2/export?{ahead}")
    assert status == 200
    with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
        members = [gzip.decompress(zipped.read(name)) for name in zipped.namelist()]
    assert members
    assert all(member.endswith(b"}\n") for member in members)
    assert server.ask("GET", "/api/2/export?start=20200101T00&end=20200101T23")[0] == 404


JSON = {"Content_Type": "application/json"}
UPLOAD = {"api_key": API_KEY, "events": [event("ways-11")]}
FORM = urlencode(
    {"api_key": API_KEY, "identification": '{"user_id":"ways-11","user_properties":{"a":1}}'}
).encode()


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/2/httpapi", json.dumps(UPLOAD).encode(), {}),
        ("/2/httpapi", json.dumps(UPLOAD).encode(), {"Content_Type": "text/plain;charset=UTF-8"}),
        ("/2/httpapi", gzip.compress(json.dumps(UPLOAD).encode()), {**JSON, "Content_Encoding": "gzip"}),
        ("/2/httpapi", json.dumps({**UPLOAD, "options": {}}).encode(), JSON),
        (
            "/2/httpapi",
            json.dumps(
                {
                    "api_key": API_KEY,
                    "events": [{"event_type": "View", "user_id": "w", "insert_id": None, "ip": "$remote"}],
                    "options": {"min_id_length": 0},
                    "client_upload_time": "2026-01-02T03:04:05.678Z",
                    "request_metadata": {"sdk": {"metrics": {}}},
                }
            ).encode(),
            JSON,
        ),
        ("/identify", FORM, {"Content_Type": "application/x-www-form-urlencoded"}),
    ],
    ids=["no type", "beacon", "gzip", "no options", "odd keys", "form"],
)  # fmt: skip
def test_11_every_form_that_a_client_sends_is_taken(
    server: Process, path: str, body: bytes, headers: dict[str, str]
) -> None:
    said = Answer(server, "POST", path, body, **headers)
    assert said.status == 200, said.body


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("OPTIONS", "/2/httpapi", b"", 204),
        ("POST", "/2/httpapi", json.dumps(UPLOAD).encode(), 200),
        ("POST", "/2/httpapi", b"{", 400),
        ("POST", "/nowhere", b"", 400),
        ("GET", "/2/httpapi", b"", 405),
        ("POST", "/2/httpapi", b" " * 1_100_000, 413),
        ("POST", "/2/httpapi", json.dumps({**UPLOAD, "events": [event("ways-12")] * 901}).encode(), 429),
    ],
)  # fmt: skip
def test_12_a_browser_may_read_every_answer(
    server: Process, method: str, path: str, body: bytes, status: int
) -> None:
    said = Answer(server, method, path, body, Origin="https://example.org")
    assert (said.status, said.headers["access-control-allow-origin"]) == (status, "*")
    assert said.headers["keep-alive"] == "timeout=75"  # way 5
    if method == "OPTIONS":
        allowed = said.headers["access-control-allow-headers"].lower()
        for name in ("content-type", "content-encoding", "cross-origin-resource-policy"):
            assert name in allowed


# Contract, clients 2, "needs in the answer": what readers take out of an answer without asking whether it is there.


def test_readers_find_what_they_take_for_granted(server: Process) -> None:
    assert server.send([event("ways-r", insert_id="r", time=1_700_000_000_000)])[0] == 200
    (row,) = stored(server, "ways-r")
    assert type(row["uuid"]) is type(row["server_upload_time"]) is str
    assert all(type(row[name]) is int for name in ("amplitude_id", "app", "event_id", "session_id"))
    objects = ("event_properties", "user_properties", "groups", "group_properties", "data")
    assert all(type(row[name]) is dict for name in objects)
    found = json.loads(server.ask("GET", "/api/2/usersearch?user=ways-r")[1])
    assert found["matches"] == [{"user_id": "ways-r", "amplitude_id": row["amplitude_id"]}]
    shown = json.loads(server.ask("GET", f"/api/2/useractivity?user={row['amplitude_id']}")[1])
    assert [one["uuid"] for one in shown["events"]] == [row["uuid"]]
    days = "start=20231114&end=20231115"
    for path in (
        f"/api/2/users?{days}",
        f"/api/2/users?{days}&m=new",
        f"/api/2/events/segmentation?{days}&" + urlencode({"e": '{"event_type":"View"}'}),
    ):
        data = json.loads(server.ask("GET", path)[1])["data"]
        assert (data["series"], data["xValues"]) == ([[1, 0]], ["2023-11-14", "2023-11-15"])
        assert len(data["seriesLabels"]) == 1
    sessions = json.loads(server.ask("GET", f"/api/2/sessions/average?{days}")[1])["data"]
    assert sessions.keys() >= {"series", "seriesMeta", "xValues"}
    listed = json.loads(server.ask("GET", "/api/2/events/list")[1])["data"]
    assert [type(one["id"]) for one in listed if one["name"] == "View"] == [int]
    for path, empty in (
        ("/api/2/annotations", {"data": []}),
        ("/api/3/annotations", {"data": []}),
        ("/api/3/cohorts", {"cohorts": []}),
    ):
        assert json.loads(server.ask("GET", path)[1]) == empty


@pytest.mark.parametrize("path", ["/api/2/funnels", "/api/2/retention", "/api/2/users?start=x"])
def test_a_reader_is_told_in_json_what_is_not_answered(server: Process, path: str) -> None:
    status, body = server.ask("GET", path)
    assert status in {400, 404}
    assert json.loads(body)["error"]["http_code"] == status
