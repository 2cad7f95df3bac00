"""The bodies of ingest 4, key by key, and the plain texts of the form endpoints."""

from __future__ import annotations

import json
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrofill.core import reply
from retrofill.core.event import Fault, Refusal
from retrofill.core.reply import Reply
from retrofill.core.throttle import Accepted, Silenced, Throttled

KINDS = get_args(msgspec.structs.fields(Refusal)[0].type)
PATHS = ["/2/httpapi", "/batch", "/identify", "/groupidentify", "/usermap", "/httpapi", "/"]
FORM_PATHS = PATHS[2:]

THROTTLED = Throttled(
    eps_threshold=30,
    devices={"D-1": 31},
    users={"u@example.com": 32},
    quota_devices={"D-2": 500900},
    quota_users={"v@example.com": 500200},
    events=[3, 4, 7],
    retry_after_s=30,
)
SILENCED = Silenced(
    eps_threshold=100,
    silenced_devices=["d1"],
    silenced_events=[5, 6],
    devices={"d2": 0, "d3": 100},
    users={},
    quota_devices={},
    quota_users={},
    events=[3, 4],
)


def said(answer: Reply) -> dict[str, Any]:
    assert answer.content_type == "application/json"
    found: dict[str, Any] = json.loads(answer.body)
    assert found["code"] == answer.status
    return found


def test_a_stored_request_is_answered_with_its_numbers() -> None:
    found = said(reply.ingested(Accepted(50, 1396381378123), path="/batch", payload_bytes=77))
    assert found == {
        "code": 200,
        "events_ingested": 50,
        "payload_size_bytes": 77,
        "server_upload_time": 1396381378123,
    }


@pytest.mark.parametrize("path", FORM_PATHS)
def test_a_stored_form_is_answered_with_success(path: str) -> None:
    answer = reply.ingested(Accepted(1, 2), path=path, payload_bytes=3)
    assert (answer.status, answer.body) == (200, b"success")
    assert answer.content_type.startswith("text/plain")


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (Refusal("too_large"), {"code": 413, "error": "Payload too large"}),
        (Refusal("missing_body"), {"code": 400, "error": "Missing request body"}),
        (Refusal("invalid_json"), {"code": 400, "error": "Invalid JSON request body"}),
        (
            Refusal("missing_field", "api_key"),
            {"code": 400, "error": "Request missing required field", "missing_field": "api_key"},
        ),
        (
            Refusal("missing_field", "events"),
            {"code": 400, "error": "Request missing required field", "missing_field": "events"},
        ),
        (Refusal("unknown_key", key="abc"), {"code": 400, "error": "Invalid API key: abc"}),
    ],
)
def test_a_refused_request_is_told_why(refusal: Refusal, expected: dict[str, Any]) -> None:
    assert said(reply.refused(refusal, path="/batch")) == expected


def faulty(*faults: tuple[int, str, Any]) -> dict[str, Any]:
    found = tuple(Fault(index, field, kind, "why") for index, field, kind in faults)
    return said(reply.refused(Refusal("faults", faults=found), path="/2/httpapi"))


# Source: contract, events 12 (which kind names the error) and ingest 4 (its words).
MISSING, INVALID, SHORT = (
    (0, "event_type", "missing"),
    (1, "time", "invalid"),
    (2, "user_id", "id_length"),
)
NO_OBJECT = (3, "event", "not_object")


@pytest.mark.parametrize(
    ("faults", "error"),
    [
        ([MISSING], "Request missing required field"),
        ([INVALID], "Invalid field values on some events"),
        ([SHORT], "Invalid id length for user_id or device_id"),
        ([NO_OBJECT], "Invalid event JSON"),
        ([SHORT, INVALID, MISSING], "Request missing required field"),
        ([SHORT, INVALID], "Invalid field values on some events"),
        ([SHORT, NO_OBJECT], "Invalid event JSON"),
    ],
)
def test_the_first_kind_of_fault_names_the_error(faults: list[Any], error: str) -> None:
    assert faulty(*faults)["error"] == error


def test_every_faulty_event_is_listed() -> None:
    assert faulty(
        MISSING, INVALID, (4, "time", "invalid"), SHORT, (4, "device_id", "id_length")
    ) == {
        "code": 400,
        "error": "Request missing required field",
        "events_with_missing_fields": {"event_type": [0]},
        "events_with_invalid_fields": {"time": [1, 4], "user_id": [2], "device_id": [4]},
        "events_with_invalid_id_lengths": {"user_id": [2], "device_id": [4]},
    }


def test_a_throttled_request_is_told_of_every_id_and_event() -> None:
    answer = reply.throttled(THROTTLED, path="/2/httpapi")
    assert said(answer) == {
        "code": 429,
        "error": "Too many requests for some devices and users",
        "eps_threshold": 30,
        "throttled_devices": {"D-1": 31},
        "throttled_users": {"u@example.com": 32},
        "exceeded_daily_quota_devices": {"D-2": 500900},
        "exceeded_daily_quota_users": {"v@example.com": 500200},
        "throttled_events": [3, 4, 7],
    }
    assert answer.headers == (("retry-after", "30"),)


def test_a_throttled_request_has_all_maps_even_if_empty() -> None:
    found = said(reply.throttled(Throttled(1000, {}, {}, {}, {}, [], 1), path="/batch"))
    assert found == {
        "code": 429,
        "error": "Too many requests for some devices and users",
        "eps_threshold": 1000,
        "throttled_devices": {},
        "throttled_users": {},
        "exceeded_daily_quota_devices": {},
        "exceeded_daily_quota_users": {},
        "throttled_events": [],
    }


def test_a_silenced_device_is_named() -> None:
    assert said(reply.silenced(SILENCED, path="/batch")) == {
        "code": 400,
        "error": "Events silenced for device_id",
        "eps_threshold": 100,
        "exceeded_daily_quota_devices": {},
        "exceeded_daily_quota_users": {},
        "silenced_devices": ["d1"],
        "silenced_events": [5, 6],
        "throttled_devices": {"d2": 0, "d3": 100},
        "throttled_users": {},
        "throttled_events": [3, 4],
    }


@pytest.mark.parametrize(
    ("answer", "status", "error"),
    [
        (reply.unavailable(path="/batch"), 503, "Service unavailable"),
        (reply.broken(path="/batch"), 500, "Internal server error"),
        (reply.stalled(path="/batch"), 408, "Request timeout"),
        (reply.too_long(path="/batch"), 414, "Request URI too long"),
        (reply.forbidden(), 403, "Forbidden"),
        (reply.not_allowed("POST"), 405, "Method not allowed"),
        (reply.invalid_path(), 400, "Invalid request path"),
    ],
)
def test_what_is_not_the_batchs_fault_has_its_words_too(
    answer: Reply, status: int, error: str
) -> None:
    assert said(answer) == {"code": status, "error": error}


def test_headers_say_when_to_come_again_and_how() -> None:
    assert reply.unavailable(path="/batch", retry_after_s=4).headers == (("retry-after", "4"),)
    assert reply.unavailable(path="/").headers[0][0] == "retry-after"
    assert reply.not_allowed("GET, POST").headers == (("allow", "GET, POST"),)


def test_a_throttled_form_says_so_in_text() -> None:
    answer = reply.throttled(THROTTLED, path="/identify")
    assert (answer.status, answer.body) == (429, b"too_many_requests_for_device")
    assert answer.headers == (("retry-after", "30"),)
    nobody = reply.throttled(Throttled(10, {}, {}, {}, {}, [], 1), path="/")
    assert nobody.body == b"too_many_requests"


# Source: contract, ingest 8.
@pytest.mark.parametrize(
    ("refusal", "status", "text"),
    [
        (Refusal("unknown_key", key="abc"), 400, "invalid_api_key"),
        (Refusal("missing_field", "client"), 400, "invalid_api_key"),
        (Refusal("missing_event"), 400, "missing_event"),
        (Refusal("missing_field", "events"), 400, "missing_event"),
        (Refusal("missing_body"), 400, "missing_event"),
        (Refusal("invalid_json"), 400, "missing_event"),
        (Refusal("bad_checksum"), 400, "bad_checksum"),
        (Refusal("bad_mapping"), 400, "invalid_mapping"),
        (Refusal("too_large"), 413, "request_too_large"),
        (
            Refusal(
                "faults", faults=(Fault(0, "time", "invalid", ""), Fault(1, "time", "invalid", ""))
            ),
            400,
            "invalid_event_field: time",
        ),
    ],
)
@pytest.mark.parametrize("path", FORM_PATHS)
def test_a_refused_form_is_told_in_text(
    refusal: Refusal, status: int, text: str, path: str
) -> None:
    answer = reply.refused(refusal, path=path)
    assert (answer.status, answer.body.decode()) == (status, text)
    assert answer.content_type.startswith("text/plain")


def test_a_database_that_does_not_write_is_named_to_forms() -> None:
    assert reply.unavailable(path="/").body == b"request_db_write_failed"
    assert reply.broken(path="/").body == b"request_db_write_failed"
    assert reply.silenced(SILENCED, path="/").status == 400


def test_an_endless_key_is_not_repeated_whole() -> None:
    answer = reply.refused(Refusal("unknown_key", key="x" * 10_000), path="/batch")
    assert len(answer.body) < 300


@given(
    kind=st.sampled_from(sorted(KINDS)),
    path=st.sampled_from(PATHS),
    text=st.text(max_size=5),
    index=st.integers(0, 9),
)
def test_every_refusal_has_an_answer(kind: Any, path: str, text: str, index: int) -> None:
    fault = Fault(index, text, "invalid", "")
    answer = reply.refused(Refusal(kind, text, text, (fault,)), path=path)
    assert 400 <= answer.status < 500
    if path in reply.JSON_PATHS:
        assert isinstance(said(answer)["error"], str)
