"""The form endpoints: fields made into events."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrofill.core import event, form, reply
from retrofill.core.event import Batch, Refusal
from retrofill.limits import Limits

LIMITS = Limits()


def _parsed(
    opened: event.Envelope | Refusal, path: str, limits: Limits = LIMITS
) -> Batch | Refusal:
    if isinstance(opened, Refusal):
        return opened
    assert opened.api_key == "k"
    found = event.parse(
        opened,
        project=1,
        path=path,
        limits=limits,
        received_ms=5,
        remote=None,
        payload_bytes=9,
    )
    if isinstance(found, Batch):
        assert event.decode(found.body) == found.events
    return found


def read(path: str, said: Any, limits: Limits = LIMITS, **more: str) -> Batch | Refusal:
    """Read a request in all three ways in which it can come; they must agree."""
    asks = form.FORMS[path]
    text = said if isinstance(said, str) else json.dumps(said)
    fields = {asks.key: "k", asks.body: text} | more
    found = _parsed(form.open_form(path, fields), path, limits)
    assert _parsed(form.open_json(path, json.dumps(fields).encode()), path, limits) == found
    if not isinstance(said, str) and path != "/":
        sent = json.dumps(fields | {asks.body: said}).encode()
        assert _parsed(form.open_json(path, sent), path, limits) == found
    return found


def events(path: str, said: Any, **more: str) -> list[dict[str, Any]]:
    found = read(path, said, **more)
    assert isinstance(found, Batch), found
    return json.loads(found.body)["events"]  # type: ignore[no-any-return]


def text(path: str, said: Any, limits: Limits = LIMITS, **more: str) -> tuple[int, str]:
    found = read(path, said, limits, **more)
    assert isinstance(found, Refusal), found
    answer = reply.refused(found, path=path)
    assert answer.content_type == "text/plain; charset=utf-8"
    return answer.status, answer.body.decode()


PATHS = sorted(form.FORMS)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "said", ["", "nonsense", "[]", "{}x", "5", "null", '"text"', "[5]", "[{}, 5]", "NaN"]
)
def test_what_is_missing_or_malformed_is_a_missing_event(path: str, said: str) -> None:
    assert text(path, said) == (400, "missing_event")


@pytest.mark.parametrize("path", PATHS)
def test_a_missing_key_is_an_invalid_key(path: str) -> None:
    found = form.open_form(path, {"identification": "{}"})
    assert isinstance(found, Refusal)
    assert reply.refused(found, path=path).body == b"invalid_api_key"


@pytest.mark.parametrize("path", PATHS)
def test_a_null_key_is_no_key(path: str) -> None:
    key = form.FORMS[path].key
    assert form.open_json(path, json.dumps({key: None}).encode()) == Refusal("missing_field", key)


@pytest.mark.parametrize("path", PATHS)
def test_the_key_comes_before_what_is_wrong_with_the_rest(path: str) -> None:
    opened = form.open_form(path, {form.FORMS[path].key: "k"})
    assert isinstance(opened, event.Envelope)
    assert opened.api_key == "k"


@pytest.mark.parametrize("path", PATHS)
def test_a_json_body_must_be_an_object(path: str) -> None:
    assert form.open_json(path, b"") == Refusal("missing_body")
    assert form.open_json(path, b"[]") == Refusal("invalid_json")


def test_an_identify_is_an_event() -> None:
    said = {
        "user_id": "user-1",
        "device_id": "device-1",
        "user_properties": {"$set": {"a": 1}, "b": 2},
        "country": "DE",
        "paying": "true",
        "event_type": "not this",
    }
    expected = said | {"event_type": "$identify"}
    assert events("/identify", said) == [expected]
    assert events("/identify", [said, said]) == [expected, expected]


def test_an_identify_needs_an_id_and_known_operations() -> None:
    assert text("/identify", {"user_properties": {}}) == (
        400,
        "invalid_event_field: user_id, device_id",
    )
    said = {"user_id": "user-1", "user_properties": {"$sett": {"a": 1}}}
    assert text("/identify", said) == (400, "invalid_event_field: user_properties")
    assert text("/identify", {"user_id": "none"}) == (400, "invalid_event_field: user_id")


def test_an_identify_may_bring_its_own_shortest_id() -> None:
    assert text("/identify", {"user_id": "abc"}) == (400, "invalid_event_field: user_id")
    found = events("/identify", {"user_id": "abc"}, options='{"min_id_length": 1}')
    assert found == [{"event_type": "$identify", "user_id": "abc"}]


def test_a_group_identify_is_an_event_of_its_group() -> None:
    said = {
        "group_type": "org",
        "group_value": 15,
        "group_properties": {"$set": {"a": 1}},
        "library": "x/1",
        "user_id": "none",
    }
    expected = {
        "event_type": "$groupidentify",
        "groups": {"org": "15"},
        "group_properties": {"$set": {"a": 1}},
        "library": "x/1",
    }
    assert events("/groupidentify", [said]) == [expected]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"group_type": ""}, "group_type"),
        ({"group_value": None}, "group_value"),
        ({"group_value": {}}, "group_value"),
        ({"group_properties": []}, "group_properties"),
        ({"group_properties": {str(n): n for n in range(1025)}}, "group_properties"),
    ],
)
def test_a_group_identify_names_its_group(change: dict[str, Any], field: str) -> None:
    said = {"group_type": "org", "group_value": "a", "group_properties": {}} | change
    assert text("/groupidentify", said) == (400, f"invalid_event_field: {field}")


def test_a_mapping_is_an_event_of_its_user() -> None:
    said = [{"user_id": "a", "global_user_id": "b"}, {"user_id": 7, "unmap": True}]
    assert events("/usermap", said) == [
        {"event_type": "$usermap", "user_id": "a", "user_properties": {"global_user_id": "b"}},
        {"event_type": "$usermap", "user_id": "7", "user_properties": {"unmap": True}},
    ]
    assert events("/usermap", {"user_id": "a", "global_user_id": "b", "unmap": False})
    assert events("/usermap", {"user_id": "a", "global_user_id": None, "unmap": True})


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"user_id": "a"}, "global_user_id"),
        ({"user_id": "a", "unmap": False}, "global_user_id"),
        ({"user_id": "a", "global_user_id": "b", "unmap": True}, "global_user_id"),
        ({"user_id": "a", "global_user_id": ""}, "global_user_id"),
        ({"user_id": "a", "global_user_id": "null"}, "global_user_id"),
        ({"user_id": "a", "global_user_id": "x" * 1025}, "global_user_id"),
        ({"user_id": "x" * 1025, "unmap": True}, "user_id"),
        ({"global_user_id": "b"}, "user_id"),
        ({"user_id": "Undefined", "unmap": True}, "user_id"),
    ],
)
def test_a_mapping_has_two_users_or_takes_one_back(said: dict[str, Any], field: str) -> None:
    assert text("/usermap", said) == (400, f"invalid_event_field: {field}")


@pytest.mark.parametrize(
    ("path", "most", "said"),
    [
        ("/identify", 2000, {"user_id": "user-1"}),
        ("/groupidentify", 1024, {"group_type": "a", "group_value": "b"}),
        ("/usermap", 2000, {"user_id": "a", "unmap": True}),
        ("/httpapi", 2000, {"event_type": "a", "user_id": "user-1"}),
        ("/", 2000, {"event_type": "a", "user_id": "user-1"}),
    ],
)
def test_as_many_as_the_limit_pass_and_one_more_does_not(
    path: str, most: int, said: dict[str, Any]
) -> None:
    assert isinstance(read(path, [said] * most), Batch)
    assert text(path, [said] * (most + 1)) == (413, "request_too_large")
    assert text(path, said, Limits(identify_bytes=20, httpapi_bytes=20))[0] == 413


def test_the_old_endpoint_takes_todays_events() -> None:
    said = {"event_type": "a", "user_id": "user-1", "device_id": "abc", "time": 5}
    assert events("/httpapi", said) == [{"event_type": "a", "user_id": "user-1", "time": 5}]
    assert text("/httpapi", [said, said | {"time": "x"}]) == (400, "invalid_event_field: time")


# An event of the old browser SDK. Source: contract, events 11.
OLD = {
    "device_id": "device-1",
    "user_id": None,
    "timestamp": 1_700_000_000_000,
    "event_id": 3,
    "session_id": 1_699_999_999_000,
    "event_type": "Search",
    "version_name": "1.2",
    "platform": "Web",
    "os_name": "Chrome",
    "language": "en-US",
    "api_properties": {
        "ios_idfa": "I",
        "location": {"lat": 52.5, "lng": 13},
        "tracking_options": {},
    },
    "event_properties": {"q": "é"},
    "user_properties": {},
    "uuid": "u-1",
    "library": {"name": "amplitude-js", "version": "8.21.10"},
    "sequence_number": 7,
    "groups": {"org": ["a"]},
    "group_properties": {},
    "user_agent": "Mozilla/5.0",
    "partner_id": None,
}


def _signed(sent: str) -> dict[str, str]:
    digest = hashlib.md5(f"2k{sent}1700000000500".encode()).hexdigest()
    return {"v": "2", "upload_time": "1700000000500", "checksum": digest}


def test_an_event_of_the_old_sdks_gets_todays_names() -> None:
    sent = json.dumps([OLD], ensure_ascii=False)
    found = read("/", sent, **_signed(sent))
    assert isinstance(found, Batch)
    assert found.client_upload_ms == 1_700_000_000_500
    assert json.loads(found.body)["events"] == [
        {
            "event_type": "Search",
            "device_id": "device-1",
            "time": 1_700_000_000_000,
            "insert_id": "u-1",
            "event_properties": {"q": "é"},
            "user_properties": {},
            "groups": {"org": ["a"]},
            "group_properties": {},
            "session_id": 1_699_999_999_000,
            "event_id": 3,
            "platform": "Web",
            "os_name": "Chrome",
            "language": "en-US",
            "app_version": "1.2",
            "library": "amplitude-js/8.21.10",
            "user_agent": "Mozilla/5.0",
            "idfa": "I",
            "location_lat": 52.5,
            "location_lng": 13.0,
        }
    ]


def test_a_wrong_checksum_is_refused_and_none_is_not() -> None:
    sent = json.dumps([OLD])
    assert text("/", sent, **(_signed(sent) | {"upload_time": "1"})) == (400, "bad_checksum")
    assert isinstance(read("/", sent), Batch)


@pytest.mark.parametrize("path", PATHS)
@given(said=st.text(max_size=40), body=st.binary(max_size=60))
def test_any_text_and_any_bytes_give_a_batch_or_a_refusal(
    path: str, said: str, body: bytes
) -> None:
    asks = form.FORMS[path]
    found = _parsed(form.open_form(path, {asks.key: "k", asks.body: said, "options": said}), path)
    assert isinstance(found, Batch | Refusal)
    opened = form.open_json(
        path, b'{"%s":"k","%s":%s}' % (asks.key.encode(), asks.body.encode(), body)
    )
    if isinstance(opened, event.Envelope) and opened.api_key == "k":
        assert isinstance(_parsed(opened, path), Batch | Refusal)


@pytest.mark.parametrize("path", PATHS)
def test_what_no_decoder_follows_is_refused(path: str) -> None:
    deep = (
        '{"user_id":"user-1","event_type":"a","user_properties":'
        + '{"a":' * 5000
        + "1"
        + "}" * 5001
    )
    assert read(path, deep)
    assert isinstance(read(path, "[" * 1_000_000), Refusal)
