"""Every status, method, encoding and body of the ingest paths, over real sockets."""

from __future__ import annotations

import gzip
import json
import socket
import time
import zlib
from typing import Any
from urllib.parse import urlencode

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from retrofill.core.throttle import Silenced, Throttled
from retrofill.errors import BusyError, StoreError
from retrofill.limits import BODY_IDLE_S, BODY_S_MAX, Limits

from .conftest import KEY, UPLOADED_MS, WAIT_S, Live, read_answer

pytestmark = pytest.mark.slow

Event = dict[str, Any]
PATHS = [
    "/2/httpapi",
    "/batch",
    "/identify",
    "/groupidentify",
    "/usermap",
    "/attribution",
    "/httpapi",
    "/",
]


def upload(event: Event, **more: Any) -> bytes:
    return json.dumps({"api_key": KEY, "events": [event], **more}).encode()


@pytest.mark.parametrize("path", ["/2/httpapi", "/batch"])
@pytest.mark.parametrize(
    "content_type", [None, "application/json", "application/json; charset=UTF-8", "text/plain", "x"]
)
def test_json_is_taken_with_any_content_type(
    live: Live, event: Event, path: str, content_type: str | None
) -> None:
    body = upload(event)
    headers = {"Content-Type": content_type} if content_type else {}
    answer = live.ask("POST", path, body, headers)
    assert answer.json == {
        "code": 200,
        "events_ingested": 1,
        "payload_size_bytes": len(body),
        "server_upload_time": UPLOADED_MS,
    }
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["keep-alive"] == "timeout=75"
    [batch] = live.engine.stored
    assert (batch.project, batch.path, batch.remote) == (1, path, "127.0.0.1")
    assert [one.user_id for one in batch.events] == ["user-1"]


FORMS = {
    "/identify": {"identification": {"user_id": "user-1", "user_properties": {"a": 1}}},
    "/groupidentify": {
        "identification": {"group_type": "org", "group_value": "x", "group_properties": {"a": 1}}
    },
    "/usermap": {"mapping": {"user_id": "user-1", "global_user_id": "user-2"}},
    "/httpapi": {"event": {"event_type": "click", "user_id": "user-1"}},
}


def multipart(fields: dict[str, str]) -> tuple[bytes, str]:
    parts = "".join(
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'
        for name, text in fields.items()
    )
    return (parts + "--b--\r\n").encode(), "multipart/form-data; boundary=b"


@pytest.mark.parametrize("path", FORMS)
@pytest.mark.parametrize("how", ["form", "multipart", "json", "json text", "query", "get"])
def test_forms_are_taken_however_they_come(live: Live, path: str, how: str) -> None:
    [(name, value)] = FORMS[path].items()
    fields = {"api_key": KEY, name: json.dumps(value)}
    encoded = urlencode(fields)
    form_type = {"Content-Type": "application/x-www-form-urlencoded"}
    if how == "form":
        answer = live.ask("POST", path, encoded.encode(), form_type)
    elif how == "multipart":
        body, kind = multipart(fields)
        answer = live.ask("POST", path, body, {"Content-Type": kind})
    elif how == "json":
        answer = live.ask("POST", path, json.dumps({"api_key": KEY, name: value}).encode())
    elif how == "json text":
        answer = live.ask("POST", path, json.dumps(fields).encode())
    elif how == "query":
        answer = live.ask("POST", f"{path}?{encoded}")
    elif path == "/httpapi":
        assert live.ask("GET", f"{path}?{encoded}").status == 405
        return
    else:
        answer = live.ask("GET", f"{path}?{encoded}")
    assert (answer.status, answer.body) == (200, b"success")
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.headers["access-control-allow-origin"] == "*"
    assert [batch.path for batch in live.engine.stored] == [path]


def test_old_sdks_are_answered(live: Live) -> None:
    fields = {
        "client": KEY,
        "e": json.dumps([{"event_type": "x", "device_id": "device-1"}]),
        "v": "2",
    }
    assert live.ask("POST", "/", urlencode(fields).encode()).body == b"success"
    fields["checksum"] = "0" * 32
    answer = live.ask("POST", "/", urlencode(fields).encode())
    assert (answer.status, answer.body) == (400, b"bad_checksum")


def test_attributions_are_taken_and_not_stored(live: Live) -> None:
    event = json.dumps({"event_type": "[Co] Install", "idfa": "x", "platform": "ios"})
    answer = live.ask("POST", "/attribution?" + urlencode({"api_key": KEY, "event": event}))
    assert (answer.status, answer.body) == (200, b"success")
    assert live.ask("POST", "/attribution", b"api_key=wrong&event={}").body == b"invalid_api_key"
    assert live.ask("POST", "/attribution", f"api_key={KEY}".encode()).body == b"missing_event"
    assert live.engine.stored == []


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", gzip.compress),
        ("GZIP", gzip.compress),
        ("gzip", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])),
        ("deflate", zlib.compress),
        (
            "deflate",
            lambda data: zlib.compressobj(wbits=-15).compress(data) or zlib.compress(data)[2:-4],
        ),
        ("identity", bytes),
    ],
)
def test_packed_bodies_are_unpacked(live: Live, event: Event, encoding: str, pack: Any) -> None:
    body = upload(event)
    answer = live.ask("POST", "/batch", pack(body), {"Content-Encoding": encoding})
    assert answer.json["events_ingested"] == 1
    # The size counts after unpacking. Source: contract, ingest 2.
    assert answer.json["payload_size_bytes"] == len(body)


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("br", b"{}"),
        ("gzip", b"{}"),
        # The same bytes each time: a test is known by them, and two workers must know the same tests.
        ("gzip", gzip.compress(b"{}" * 100, mtime=0)[:-12]),
        ("deflate", b"\xff\xff\xff\xff"),
    ],
)
def test_what_cannot_be_unpacked_is_no_json(live: Live, encoding: str, body: bytes) -> None:
    answer = live.ask("POST", "/batch", body, {"Content-Encoding": encoding})
    assert answer.json == {"code": 400, "error": "Invalid JSON request body"}


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_bomb_is_refused_at_the_limit(live: Live, encoding: str) -> None:
    pack = zlib.compressobj(9, wbits=31 if encoding == "gzip" else 15)
    bomb = b"".join(pack.compress(bytes(1 << 20)) for _ in range(64)) + pack.flush()
    answer = live.ask("POST", "/2/httpapi", bomb, {"Content-Encoding": encoding})
    assert answer.json == {"code": 413, "error": "Payload too large"}
    assert live.server.app.ingest._held_bytes == 0


def test_a_request_that_says_it_is_too_large_is_refused_before_it_is_sent(live: Live) -> None:
    with live.connect() as client:
        client.sendall(b"POST /batch HTTP/1.1\r\nHost: x\r\nContent-Length: 20971521\r\n\r\n")
        assert read_answer(client).json == {"code": 413, "error": "Payload too large"}
        # What is sent all the same is thrown away, and the connection goes on.
        client.sendall(bytes(20_971_521))
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(client).status == 200


def test_a_request_larger_than_all_that_may_be_held_is_too_large_and_not_only_now(
    live: Live,
) -> None:
    with live.connect() as client:
        client.sendall(b"POST /batch HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % 10**12)
        assert read_answer(client).json == {"code": 413, "error": "Payload too large"}


def test_chunks_are_counted_while_they_come(live: Live) -> None:
    with live.connect() as client:
        client.sendall(b"POST /2/httpapi HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
        for _ in range(17):
            client.sendall(chunk)
        assert read_answer(client).status == 413
    assert live.server.app.ingest._held_bytes == 0


def test_the_largest_body_is_taken(live: Live, event: Event) -> None:
    size = live.engine.its_limits.httpapi_bytes
    body = upload(event, padding="")
    body = body[:-2] + b" " * (size - len(body)) + body[-2:]
    assert len(body) == size
    assert live.ask("POST", "/2/httpapi", body).status == 200
    assert live.ask("POST", "/2/httpapi", body + b" ").status == 413


def test_a_limit_of_one_project_may_be_larger(live: Live, event: Event) -> None:
    live.engine.its_limits = Limits(httpapi_bytes=2 * 1024 * 1024)
    assert live.ask("POST", "/2/httpapi", upload(event) + b" " * 1_500_000).status == 200


def test_too_many_events_are_too_large(live: Live, event: Event) -> None:
    assert live.send([event] * 2000).status == 200
    assert live.send([event] * 2001).json == {"code": 413, "error": "Payload too large"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", {"error": "Missing request body"}),
        (b" \n", {"error": "Missing request body"}),
        (b"{", {"error": "Invalid JSON request body"}),
        (b"\xff\xfe", {"error": "Invalid JSON request body"}),
        (b"[" * 100_000, {"error": "Invalid JSON request body"}),
        (b"{}", {"error": "Request missing required field", "missing_field": "api_key"}),
        (b'{"api_key":"k","events":[]}', {"error": "Invalid API key: k"}),
        (
            json.dumps({"api_key": KEY}).encode(),
            {"error": "Request missing required field", "missing_field": "events"},
        ),
    ],
)
def test_bad_requests_are_told_what_is_bad(live: Live, body: bytes, expected: Event) -> None:
    assert live.ask("POST", "/batch", body).json == {"code": 400, **expected}


def test_bad_events_are_all_named(live: Live, event: Event) -> None:
    answer = live.send([event, {"user_id": "user-1"}, {**event, "time": "yesterday"}])
    assert answer.status == 400
    assert answer.json["events_with_missing_fields"] == {"event_type": [1]}
    assert answer.json["events_with_invalid_fields"] == {"time": [2]}
    assert "missing_field" not in answer.json
    assert live.engine.stored == []


def test_a_throttled_request_names_its_events(live: Live, event: Event) -> None:
    live.engine.outcome = Throttled(30, {"device-1": 31}, {}, {}, {"u": 500_001}, [0], 7)
    answer = live.send([event])
    assert answer.status == answer.json["code"] == 429
    assert answer.json["throttled_events"] == [0]
    assert answer.json["throttled_devices"] == {"device-1": 31}
    assert answer.json["exceeded_daily_quota_users"] == {"u": 500_001}
    assert answer.headers["retry-after"] == "7"
    assert answer.headers["access-control-allow-origin"] == "*"


def test_a_silenced_request_names_its_events(live: Live, event: Event) -> None:
    live.engine.outcome = Silenced(100, ["device-1"], [0], {}, {}, {}, {}, [])
    answer = live.send([event])
    assert answer.json["error"] == "Events silenced for device_id"
    assert answer.json["silenced_events"] == [0]


class Refused(msgspec.Struct):
    reason: str


def test_an_alias_in_a_circle_is_a_bad_mapping(live: Live) -> None:
    live.engine.outcome = Refused("a circle")
    fields = {"api_key": KEY, "mapping": json.dumps(FORMS["/usermap"]["mapping"])}
    answer = live.ask("POST", "/usermap", urlencode(fields).encode())
    assert (answer.status, answer.body) == (400, b"invalid_mapping")


@pytest.mark.parametrize(
    "problem", [BusyError("Too much is waiting"), StoreError("The disk is gone")]
)
def test_what_is_certainly_not_stored_is_503(live: Live, event: Event, problem: Exception) -> None:
    live.engine.outcome = problem
    answer = live.send([event])
    assert answer.status == answer.json["code"] == 503
    assert int(answer.headers["retry-after"]) >= 1


def test_what_nobody_knows_is_500_and_logged_with_its_trace(
    live: Live, event: Event, capfd: pytest.CaptureFixture[str]
) -> None:
    live.engine.outcome = ZeroDivisionError("unforeseen")
    answer = live.send([event])
    assert answer.json == {"code": 500, "error": "Internal server error"}
    assert answer.headers["access-control-allow-origin"] == "*"
    live.engine.outcome = None
    assert live.send([event]).status == 200
    del capfd


@pytest.mark.parametrize("path", PATHS)
def test_a_preflight_is_allowed(live: Live, path: str) -> None:
    asked = {
        "Origin": "https://example.org",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,content-encoding,cross-origin-resource-policy",
    }
    answer = live.ask("OPTIONS", path, headers=asked)
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "POST" in answer.headers["access-control-allow-methods"]
    allowed = answer.headers["access-control-allow-headers"].lower().split(", ")
    assert {"content-type", "content-encoding", "cross-origin-resource-policy"} <= set(allowed)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "HEAD", "GET", "TRACE"])
def test_another_method_is_not_allowed(live: Live, path: str, method: str) -> None:
    if method == "GET" and path in {"/identify", "/groupidentify", "/usermap"}:
        return
    answer = live.ask(method, path)
    assert answer.status == 405
    assert "POST" in answer.headers["allow"]
    assert answer.headers["access-control-allow-origin"] == "*"


def test_two_requests_on_one_connection_are_answered_in_order(live: Live, event: Event) -> None:
    body = upload(event)
    request = b"POST /batch HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with live.connect() as client:
        client.sendall(
            request + b"POST /batch HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}" + request
        )
        assert [read_answer(client).status for _ in range(3)] == [200, 400, 200]


def test_a_client_that_ends_its_side_is_answered(live: Live, event: Event) -> None:
    body = upload(event)
    with live.connect() as client:
        client.sendall(
            b"POST /batch HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        client.shutdown(socket.SHUT_WR)
        assert read_answer(client).status == 200
        assert client.recv(1) == b""


def test_a_client_that_breaks_off_leaves_nothing(live: Live, event: Event) -> None:
    body = upload(event)
    head = b"POST /batch HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with live.connect() as client:
        client.sendall(head + body[:-1])
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert live.engine.stored == []
    end = time.monotonic() + WAIT_S
    while live.server.app.ingest._held_bytes and time.monotonic() < end:
        time.sleep(0.005)  # the server's own thread hears of the end after we do
    assert live.server.app.ingest._held_bytes == 0


def test_a_client_that_goes_while_it_waits_is_stored(live: Live, event: Event) -> None:
    live.close_gate()
    body = upload(event)
    with live.connect() as client:
        client.sendall(
            b"POST /batch HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        assert live.engine.taken.wait(WAIT_S)
    live.open_gate()
    assert live.send([event]).status == 200
    assert len(live.engine.stored) == 2


def test_a_body_that_stalls_is_answered_408(live: Live) -> None:
    with live.connect() as client:
        client.sendall(b"POST /batch HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        live.ask("GET", "/healthz")  # by now the request has been read
        live.tick(BODY_IDLE_S)
        client.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(WAIT_S)
        live.tick(1)
        answer = read_answer(client)
        assert answer.json == {"code": 408, "error": "Request timeout"}
        assert answer.headers["connection"] == "close"
        assert answer.headers["access-control-allow-origin"] == "*"
        assert client.recv(1) == b""
    assert live.engine.stored == []


def test_a_body_that_drips_for_ever_is_answered_408(live: Live) -> None:
    with live.connect() as client:
        client.sendall(b"POST /identify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        for _ in range(BODY_S_MAX // 20 + 1):
            client.sendall(b" ")
            live.ask("GET", "/healthz")
            live.tick(20)
        answer = read_answer(client)
        assert (answer.status, answer.body) == (408, b"request_timeout")


def test_bodies_at_their_bound_are_refused(
    live: Live, event: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrofill.server.ingest.QUEUE_BYTES_MAX", 1000)
    live.close_gate()
    body = upload(event, padding="x" * 600)
    with live.connect() as client:
        client.sendall(
            b"POST /batch HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        assert live.engine.taken.wait(WAIT_S)
        for headers in ({}, {"Content-Encoding": "gzip"}):
            packed = gzip.compress(body) if headers else body
            answer = live.ask("POST", "/batch", packed, headers)
            assert answer.status == answer.json["code"] == 503
            assert int(answer.headers["retry-after"]) >= 1
        live.open_gate()
        assert read_answer(client).status == 200
    assert live.server.app.ingest._held_bytes == 0
    assert live.ask("POST", "/batch", body).status == 200


# Bytes that are nearly good find more than bytes at random.
NEARLY = st.one_of(
    st.binary(max_size=200),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "api_key",
                        "events",
                        "user_id",
                        "event_type",
                        "time",
                        "identification",
                        "mapping",
                        "e",
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ).map(
        lambda value: json.dumps(value).replace('"api_key": null', f'"api_key": "{KEY}"').encode()
    ),
)
KINDS = [
    "",
    "application/json",
    "text/plain",
    "multipart/form-data; boundary=b",
    "multipart/form-data",
    "\xff",
]


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    path=st.sampled_from(PATHS),
    body=NEARLY,
    kind=st.sampled_from(KINDS),
    encoding=st.sampled_from(["", "", "gzip", "deflate", "identity", "gzip, gzip"]),
    query=st.sampled_from(["", "?", f"?api_key={KEY}&identification=[]", "?%ff=%00", "?a&b=&=c"]),
)
@example("/batch", b'{"api_key":"' + KEY.encode() + b'","events":[1e999]}', "", "", "")
@example("/", b"--b\r\n\r\n--b", "multipart/form-data; boundary=b", "", "")
@example("/identify", b"", "", "gzip", "")
def test_any_bytes_at_all_give_a_documented_answer(
    live: Live, path: str, body: bytes, kind: str, encoding: str, query: str
) -> None:
    headers = {"Content-Type": kind, "Content-Encoding": encoding}
    answer = live.ask(
        "POST", path + query, body, {name: text for name, text in headers.items() if text}
    )
    assert answer.status in {200, 400, 413}
    assert answer.headers["access-control-allow-origin"] == "*"
    if path in {"/2/httpapi", "/batch"}:
        assert answer.json["code"] == answer.status
    else:
        assert answer.headers["content-type"].startswith("text/plain")
        assert answer.body
