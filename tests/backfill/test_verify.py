"""Verification finds exactly what is wrong with what the destination holds."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.backfill import staged
from tests.backfill.exporting import Exporting, row, serving

from retrofill.backfill.journal import Dead, Final, Journal, Ledger, Rows, Span
from retrofill.backfill.keys import Keys
from retrofill.backfill.profile import target
from retrofill.backfill.verify import Finding, Result, differences, parse_ms, repair, verify
from retrofill.errors import FinalError

pytestmark = pytest.mark.slow

HOUR = 3_600_000
NOW = 1_700_000_000_000
KEYS = Keys("key", "secret")


@pytest.fixture
def data() -> Iterator[Exporting]:
    with serving(Exporting()) as found:
        yield found


Reply = tuple[int, bytes, dict[str, str]]


@contextmanager
def answering(reply: Callable[[str | None], Reply]) -> Iterator[str]:
    """Serve one reply to every GET, made of the keys it carries. Yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body, fields = reply(self.headers.get("Authorization"))
            self.send_response(status)
            for name, value in {**fields, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def sent_and_stored(work: Path, data: Exporting, *, hours: int = 3) -> list[staged.Made]:
    """Stage a small history, pretend to send it over some hours, and store all of it."""
    made = staged.history({1: 40, 2: 3, 3: 25}, devices=2)
    manifest = staged.write(work, made)
    journal = Journal(work, threaded=False)
    number = 0
    for place, one in enumerate(manifest.sets):
        for first in range(0, one.events, 10):
            number += 1
            at = NOW + (number % hours) * HOUR
            count = min(10, one.events - first)
            journal.sent(number, [Span(place, first, count)], events=count, size=1, now_ms=at)
            journal.answered(Final(number, 1, 200, at, at, None))
    journal.close()
    for index, event in enumerate(made):
        at = NOW + (index % hours) * HOUR
        data.rows.append((at, row(json.loads(event.text), at)))
    return made


def check(work: Path, data: Exporting) -> tuple[Result, list[Finding], Rows]:
    findings: list[Finding] = []
    result, missing = verify(work, target(data.url), KEYS, found=findings.append)
    return result, findings, missing


def test_what_is_all_there_is_clean(tmp_path: Path, data: Exporting) -> None:
    made = sent_and_stored(tmp_path, data)
    data.rows.append((NOW, {"$insert_id": "someone else's", "event_type": "live"}))
    data.rows.append((NOW, {"$insert_id": None, "event_type": "live"}))
    result, findings, missing = check(tmp_path, data)
    assert result.clean
    assert findings == []
    assert missing.count == 0
    assert result.sent == result.read_back == len(made)
    assert "68 sent · 68 read back · 0 missing · 0 doubled · 0 different · 0 extra" in result.line()


def change(data: Exporting, insert_id: str, edit: Callable[[dict[str, Any]], None]) -> None:
    edit(next(one for _, one in data.rows if one["$insert_id"] == insert_id))


def test_each_kind_of_fault_is_found_and_named(tmp_path: Path, data: Exporting) -> None:
    sent_and_stored(tmp_path, data)
    data.rows = [(at, one) for at, one in data.rows if one["$insert_id"] != "i-1-7"]
    twice = next((at, one) for at, one in data.rows if one["$insert_id"] == "i-2-0")
    data.rows.append(twice)
    change(data, "i-3-4", lambda one: one["event_properties"].update(index=5))
    change(data, "i-3-5", lambda one: one.update(client_event_time="x", event_time="x"))
    other = {**twice[1], "$insert_id": "i-1-9", "device_id": "another"}
    data.rows.append((NOW, other))
    result, findings, missing = check(tmp_path, data)
    assert set(findings) == {
        Finding("missing", "i-1-7", "", None, None),
        Finding("doubled", "i-2-0", "", 1, 2),
        Finding("different", "i-3-4", "event_properties.index", 4, 5),
        Finding("different", "i-3-5", "time", staged.START_MS + 5000, "x"),
        Finding("extra", "i-1-9", "device_id", "device-1-1", "another"),
    }
    assert (result.missing, result.doubled, result.different, result.extra) == (1, 1, 2, 1)
    assert missing.count == 1


def test_missing_rows_are_marked_to_be_sent_again(tmp_path: Path, data: Exporting) -> None:
    sent_and_stored(tmp_path, data)
    data.rows = [(at, one) for at, one in data.rows if not one["$insert_id"].startswith("i-2-")]
    result, _, missing = check(tmp_path, data)
    assert result.missing == 3
    repair(tmp_path, missing, NOW)
    journal = Journal(tmp_path)
    assert sum(b - a for n in (0, 1) for a, b in journal.done().missing(n, 0, 65 if n else 3)) == 3
    journal.close()


def test_dead_letters_are_not_missing(tmp_path: Path, data: Exporting) -> None:
    sent_and_stored(tmp_path, data)
    data.rows = [(at, one) for at, one in data.rows if one["$insert_id"] != "i-2-0"]
    journal = Journal(tmp_path, threaded=False)
    journal.died(Dead(0, 0, "bad", "{}"))
    journal.close()
    result, _, _ = check(tmp_path, data)
    assert result.clean
    assert result.sent == 67


def test_a_destination_that_answers_late_is_read_in_the_end(
    tmp_path: Path, data: Exporting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrofill.backfill.readback.time.sleep", lambda _: None)
    sent_and_stored(tmp_path, data)
    data.broken = [503, 429, 504, 500]
    told: list[str] = []
    result, _ = verify(tmp_path, target(data.url), KEYS, found=lambda _: None, step=told.append)
    assert result.clean
    waits = [one for one in told if one.startswith("the destination cannot be read (")]
    assert len(waits) == 4
    assert waits[0].endswith("again in 2 s")


def test_wrong_keys_are_told_and_never_shown(tmp_path: Path, data: Exporting) -> None:
    sent_and_stored(tmp_path, data)
    with pytest.raises(FinalError, match="does not let us read: 401") as problem:
        verify(tmp_path, target(data.url), Keys("key", "wrong-secret"), found=lambda _: None)
    assert "wrong-secret" not in str(problem.value)


@pytest.mark.parametrize(
    "said",
    [b"<html>", b"\x1f\x8b\x08cut", b"PK\x03\x04cut", b"[1]\n", b'{"$insert_id":"a","x":"\xff"}\n'],
)
def test_what_is_no_export_is_told(tmp_path: Path, data: Exporting, said: bytes) -> None:
    sent_and_stored(tmp_path, data)
    with (
        answering(lambda _: (200, said, {})) as url,
        pytest.raises(FinalError, match="What the des"),
    ):
        verify(tmp_path, target(url), KEYS, found=lambda _: None)


def test_keys_do_not_follow_a_redirection(tmp_path: Path, data: Exporting) -> None:
    sent_and_stored(tmp_path, data)
    heard: list[str | None] = []

    def stranger(keys: str | None) -> Reply:
        heard.append(keys)
        return 404, b"", {}

    with (
        answering(stranger) as away,
        answering(lambda _: (302, b"", {"Location": f"{away}/else"})) as url,
    ):
        verify(tmp_path, target(url), KEYS, found=lambda _: None)
    assert heard
    assert set(heard) == {None}


def test_order_is_checked_where_the_export_keeps_it(tmp_path: Path) -> None:
    with serving(Exporting(), health=b'{"service":"retrofill"}') as data:
        sent_and_stored(tmp_path, data, hours=1)
        result, _, _ = check(tmp_path, data)
        assert result.out_of_order == 0
        assert any("/api/1/imports/imp/export" in path for path in data.asked)
        data.rows.reverse()
        result, _, _ = check(tmp_path, data)
        assert result.clean
        assert result.out_of_order == 39 + 2 + 24


def test_a_repair_takes_unsure_rows_that_were_found(tmp_path: Path, data: Exporting) -> None:
    sent_and_stored(tmp_path, data)
    journal = Journal(tmp_path)
    journal._db.execute("UPDATE requests SET status = -1 WHERE id <= 2")
    journal.close()
    result, _, missing = check(tmp_path, data)
    assert result.clean
    repair(tmp_path, missing, NOW)
    ledger = Ledger(tmp_path)
    assert ledger.unsure().count == 0
    assert ledger.totals().taken == 68
    ledger.close()


@pytest.mark.parametrize(
    ("sent", "found", "field"),
    [
        ({"platform": "iOS"}, {"platform": "Android"}, "platform"),
        ({"app_version": "1"}, {"version_name": "2"}, "app_version"),
        ({"carrier": "c"}, {"device_carrier": "c"}, None),
        ({"groups": {"team": "a"}}, {"groups": {"team": ["a"]}}, None),
        ({"groups": {"team": "a"}}, {"groups": {"team": ["b"]}}, "groups.team"),
        ({"user_properties": {"a": 1}}, {"user_properties": {"a": 2}}, None),
        (
            {"user_properties": {"a": 1}, "$skip_user_properties_sync": True},
            {"user_properties": {"a": 2}},
            "user_properties.a",
        ),
        (
            {"user_properties": {"$set": {"a": 1}, "$x": 1}, "$skip_user_properties_sync": True},
            {"user_properties": {"a": 1}},
            "user_properties.$x",
        ),
        (
            {
                "user_properties": {"$append": {"a": [1]}, "$clearAll": "-", "a": 2, "b": 3},
                "$skip_user_properties_sync": True,
            },
            {"user_properties": {"a": [2, 1], "b": 4}},
            "user_properties.b",
        ),
        ({"event_properties": {"a": 1}}, {"event_properties": {"a": 1.0, "$revenue": 3}}, None),
        ({"event_properties": {"a": None}}, {"event_properties": {}}, None),
        ({"event_properties": {"a": True}}, {"event_properties": {"a": 1}}, "event_properties.a"),
        ({"event_properties": {"a": "x" * 2000}}, {"event_properties": {"a": "x" * 1024}}, None),
        (
            {"event_properties": {"a": [1, {"b": 2}]}},
            {"event_properties": {"a": [1, {"b": 2}]}},
            None,
        ),
        ({"time": 1234}, {"event_time": "1970-01-01 00:00:01.234000"}, None),
        ({"language": "en-US"}, {"language": "English"}, None),
    ],
)
def test_only_what_was_sent_and_is_not_rewritten_is_compared(
    sent: dict[str, Any], found: dict[str, Any], field: str | None
) -> None:
    assert [one[0] for one in differences(sent, found)] == ([] if field is None else [field])


def test_export_times_are_read_to_the_millisecond() -> None:
    assert parse_ms("2020-09-13 12:26:40.001000") == 1_600_000_000_001
    assert parse_ms("yesterday") is None
