"""Whatever is sent to an ingest path of a real server: a documented answer, never a 500, and what is taken stays whole.

Beside the answers this looks at what hostile events do later: they are folded, read before and after they are sealed,
and folded again by a start, and must come back the same from all of it.
"""

from __future__ import annotations

import gzip
import http.client
import json
import re
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.faults.process import API_KEY, PATIENCE_S, Process, Row

pytestmark = pytest.mark.slow

JSON_PATHS = ("/2/httpapi", "/batch")
FORM_PATHS = ("/identify", "/groupidentify", "/usermap", "/attribution", "/httpapi", "/")
PATHS = JSON_PATHS + FORM_PATHS
# What the form endpoints say. Source: contract, ingest 8.
TEXTS = re.compile(
    r"success|missing_event|invalid_api_key|invalid_mapping|bad_checksum|request_too_large|invalid_event_field: .+",
    re.DOTALL,
)
_BOUNDED = settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    # Slow and idle clients stay as long as the test is between two of its steps.
    patient = "BODY_IDLE_S=3600 BODY_S_MAX=3600 KEEP_ALIVE_S=3600"
    server = Process(tmp_path_factory.mktemp("hostile") / "data", settings=patient)
    server.start()
    try:
        server.wait_until_ready()
        yield server
        assert "Traceback" not in server.said(), server.said()
    finally:
        server.end()


class Client:
    """One kept connection."""

    def __init__(self, server: Process) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)

    def post(self, path: str, body: bytes, headers: Row | None = None) -> tuple[int, bytes]:
        self._connection.request("POST", path, body, headers or {})
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def client(server: Process) -> Iterator[Client]:
    client = Client(server)
    yield client
    client.close()


def documented(path: str, status: int, body: bytes) -> None:
    """Raise AssertionError if this is no answer that docs and SDKs know."""
    assert status in {200, 400, 413}, (status, body)
    if path in FORM_PATHS:
        assert TEXTS.fullmatch(body.decode()), body
        assert (body == b"success") == (status == 200)
        return
    said = json.loads(body)
    assert said["code"] == status
    if status == 200:
        assert said.keys() == {
            "code",
            "events_ingested",
            "payload_size_bytes",
            "server_upload_time",
        }
        return
    assert isinstance(said["error"], str)
    assert said.get("missing_field", "x")  # absent or a name, never ""
    named = any(said.get(f"events_with_{kind}") for kind in ("missing_fields", "invalid_fields"))
    about_events = said["error"].startswith("Invalid field") or "Invalid event" in said["error"]
    assert named or not about_events


# Any bytes.


@_BOUNDED
@given(
    path=st.sampled_from(PATHS),
    body=st.binary(max_size=300),
    encoding=st.sampled_from(["", "gzip", "deflate", "br", "identity", "x", "gzip, gzip"]),
    kind=st.sampled_from(
        [
            "application/json",
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "multipart/form-data",
            "text/plain; charset=utf-16",
            "",
        ]
    ),
)
def test_any_bytes_get_a_documented_answer(
    client: Client, path: str, body: bytes, encoding: str, kind: str
) -> None:
    headers = {"Content-Type": kind} | ({"Content-Encoding": encoding} if encoding else {})
    documented(path, *client.post(path, body, headers))


# Any JSON, well made or not.

TOKENS = [
    *(
        "null",
        "true",
        "false",
        "0",
        "-0",
        "-0.0",
        "1",
        "1.5",
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
    ),
    *("1e308", "5e-324", "9007199254740993", "9223372036854775807", "9223372036854775808", "1e18"),
    *("-9223372036854775808", "123456789012345678901234567890", "1" * 400, "01", "+1", ".5", "1."),
    *(
        '""',
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"\\u0000"',
        '"\\ud83d\\ude00"',
        '"\ufeff"',
        '"\u2028"',
        '"\\x"',
    ),
    *(
        '"1e999"',
        '"$set"',
        '"null"',
        '"{}"',
        '"0"',
        '"1700000000000"',
        '"2026-01-01"',
        '"' + "x" * 2000 + '"',
    ),
    *("[]", "{}", "[[]]", '{"a":1,"a":2}', '{"":{}}', "[,]", "{,}", "nul", "'a'", "\x01"),
]
NAMES = [
    *("event_type", "user_id", "device_id", "time", "insert_id", "event_id", "session_id", "ip"),
    *("event_properties", "user_properties", "groups", "group_properties", "plan", "price"),
    *(
        "quantity",
        "revenue",
        "productId",
        "revenueType",
        "location_lat",
        "location_lng",
        "language",
    ),
    *("$skip_user_properties_sync", "ingestion_metadata", "user_agent", "partner_id", "platform"),
    *("attribution_ids", "global_user_id", "unmap", "amplitude_id", "uuid", "library", "paying"),
    *("$set", "$setOnce", "$add", "$append", "$prepend", "$preInsert", "$postInsert", "$remove"),
    *("$unset", "$clearAll", "$identify", "", "a", "team", "\\ud800", "\\u0000", "a.b", "x" * 1100),
]
leaves = st.one_of(
    st.sampled_from(TOKENS),
    st.integers().map(str),
    st.floats().map(json.dumps),
    st.text(max_size=8).map(json.dumps),
)


def _object(pairs: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f'"{name}":{value}' for name, value in pairs) + "}"


values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: "[" + ",".join(items) + "]"),
        st.lists(st.tuples(st.sampled_from(NAMES), inner), max_size=4).map(_object),
    ),
    max_leaves=12,
)
events = st.lists(st.tuples(st.sampled_from(NAMES), values), max_size=4).map(
    lambda pairs: _object([("event_type", '"e"'), ("user_id", '"user-1"'), *pairs])
)


def upload(texts: list[str]) -> bytes:
    text = f'{{"api_key":"{API_KEY}","events":[{",".join(texts)}]}}'
    return text.encode("utf-8", "surrogatepass")


@_BOUNDED
@given(path=st.sampled_from(JSON_PATHS), body=st.lists(st.one_of(events, values), max_size=4))
def test_any_events_get_a_documented_answer(client: Client, path: str, body: list[str]) -> None:
    documented(path, *client.post(path, upload(body)))


@_BOUNDED
@given(
    path=st.sampled_from(FORM_PATHS),
    name=st.sampled_from(["identification", "event", "mapping", "e", "options"]),
    value=st.one_of(
        values, events, st.lists(events, max_size=3).map(lambda all_: f"[{','.join(all_)}]")
    ),
    as_json=st.booleans(),
)
def test_any_form_gets_a_documented_answer(
    client: Client, path: str, name: str, value: str, *, as_json: bool
) -> None:
    if as_json:
        body = f'{{"api_key":"{API_KEY}","client":"{API_KEY}","{name}":{value}}}'
        headers = {"Content-Type": "application/json"}
    else:
        body = f"api_key={API_KEY}&client={API_KEY}&v=2&{name}={value}"
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
    documented(path, *client.post(path, body.encode("utf-8", "surrogatepass"), headers))


def deep(levels: int) -> str:
    return '{"a":' * (levels - 1) + "{}" + "}" * (levels - 1)


GOOD = '"event_type":"e","user_id":"user-1"'
MEGABYTE = 1024 * 1024


@pytest.mark.parametrize("name", ["event_properties", "user_properties", "group_properties"])
def test_forty_levels_are_taken_and_forty_one_are_not(client: Client, name: str) -> None:
    for levels, expected in ((40, 200), (41, 400), (100_000, 400)):
        body = upload(["{" + GOOD + f',"{name}":{deep(levels)}' + "}"])
        status, said = client.post("/batch", body)
        documented("/batch", status, said)
        assert status == expected, (levels, said)


# Made by the test: all of them are a third of a gigabyte.
MEGABYTES: dict[str, Callable[[], bytes]] = {
    "open brackets": lambda: b"[" * 20 * MEGABYTE,
    "open objects": lambda: b'{"a":' * (4 * MEGABYTE),
    "closed brackets": lambda: b"[" * 10 * MEGABYTE + b"]" * 10 * MEGABYTE,
    "empty arrays": lambda: upload(["[]"])[:-2] + b",[]" * (6 * MEGABYTE) + b"]}",
    "empty events": lambda: upload(["{}"])[:-2] + b",{}" * (6 * MEGABYTE) + b"]}",
    "numbers": lambda: upload(["0"])[:-2] + b",0" * (9 * MEGABYTE) + b"]}",
    "brackets in a property": lambda: of_good(
        '"event_properties":{"a":' + "[" * 8 * MEGABYTE + "]" * 8 * MEGABYTE + "}"
    ),
    "numbers in a property": lambda: of_good(
        '"user_properties":{"a":[0' + ",0" * 8 * MEGABYTE + "]}"
    ),
    "escapes": lambda: of_good('"insert_id":"' + "\\u0041" * 3 * MEGABYTE + '"'),
    "quotes": lambda: b'"' * 20 * MEGABYTE,
    "spaces": lambda: b" " * 20 * MEGABYTE,
    "backslashes": lambda: b"\\" * 20 * MEGABYTE,
    "2,001 events": lambda: upload(["{" + GOOD + "}"] * 2001),
    "one number": lambda: b"9" * 20 * MEGABYTE,
}


def of_good(more: str) -> bytes:
    return upload(["{" + GOOD + "," + more + "}"])


@pytest.mark.parametrize("of", MEGABYTES)
def test_twenty_megabytes_of_anything_are_answered_soon(
    server: Process, client: Client, of: str
) -> None:
    body = MEGABYTES[of]()
    began = worked(server)
    for headers in ({}, {"Content-Encoding": "gzip"}):
        status, said = client.post("/batch", gzip.compress(body, 1) if headers else body, headers)
        documented("/batch", status, said)
    assert worked(server) - began < 60


def worked(server: Process) -> float:
    """CPU seconds so far: unlike those of the clock none of other processes."""
    assert server.running is not None
    times = psutil.Process(server.running.pid).cpu_times()
    return times.user + times.system


def test_a_bomb_within_a_bomb_is_refused(client: Client) -> None:
    bomb = gzip.compress(gzip.compress(bytes(200 * MEGABYTE), 9), 9)
    for path in PATHS:
        status, said = client.post(path, bomb, {"Content-Encoding": "gzip"})
        documented(path, status, said)
        assert status in {400, 413}


@pytest.mark.parametrize(
    ("said", "stored"),
    [("1234567", "1234567"), ("12345.5", None), ("true", None), ("[12345]", None), ("{}", None)],
)
def test_an_id_is_a_text_or_a_whole_number(server: Process, said: str, stored: str | None) -> None:
    user = json.loads(said)
    status, answer = server.send([{"event_type": "numbered", "user_id": user}])
    if stored is None:
        assert status == 400
        assert answer["events_with_invalid_fields"] == {"user_id": [0]}
    else:
        assert status == 200
        rows = [row for row in server.export() if row["event_type"] == "numbered"]
        assert [row["user_id"] for row in rows] == [stored]


# Questions.

DAYS = "start=20260101&end=20260102"
ENDLESS, DEEP, ZERO = "9" * 5000, "[" * 20_000, "a\0'b"
SEGMENTATION = f"/api/2/events/segmentation?{DAYS}&e="
DELETIONS = "/api/2/deletions/users"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", f"/api/2/usersearch?user={ENDLESS}", b""),
        ("GET", f"/api/2/useractivity?user={ENDLESS}", b""),
        ("GET", f"/api/2/usersearch?user={quote(ZERO)}", b""),
        ("GET", SEGMENTATION + DEEP, b""),
        ("GET", SEGMENTATION + quote('{"event_type":"a","filters":' + "[" * 5000), b""),
        ("GET", SEGMENTATION + quote('{"event_type":"a"}') + f"&s={DEEP}", b""),
        ("GET", SEGMENTATION + quote(json.dumps({"event_type": ZERO})), b""),
        ("GET", f"/api/2/usermap?user_ids={DEEP}", b""),
        ("POST", DELETIONS, b'{"x":' + DEEP.encode()),
        ("POST", DELETIONS, b'{"amplitude_ids":["%b"]}' % ENDLESS.encode()),
        ("POST", DELETIONS, b'{"user_ids":["\xff"]}'),
        ("DELETE", f"{DELETIONS}/{ENDLESS}/2026-01-20", b""),
        ("PUT", "/api/1/project", b'{"limits":' + b'{"a":' * 5000),
        ("PUT", "/api/1/project", b'{"limits":{"\xff":1}}'),
        ("POST", "/api/1/imports", b'{"name":"\xff"}'),
        ("GET", f"/api/1/imports/{quote(ZERO)}", b""),
        ("GET", f"/api/1/imports/{quote(ZERO)}/export", b""),
        ("POST", "/api/1/history", b'{"device_ids":["\xff"]}'),
    ],
)
def test_a_hostile_question_is_no_failure(
    server: Process, method: str, path: str, body: bytes
) -> None:
    status, said = server.ask_raw(method, path, body)
    assert status in {200, 400, 404, 413}, said
    assert status == 200 or json.loads(said)["error"]["http_code"] == status


# Slow and broken connections.


def request(body: bytes, *, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"POST /batch HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (size, body)


def test_slow_and_broken_connections_hold_back_no_other(server: Process, client: Client) -> None:
    whole = request(upload(["{" + GOOD + ',"event_type":"slow"}']))
    slow = [socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) for _ in range(100)]
    try:
        for number, one in enumerate(slow):
            one.sendall(whole[: 1 + number * (len(whole) - 2) // len(slow)])
        for number in range(50):
            with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as broken:
                # Closing with SO_LINGER of 0 s resets the connection.
                broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                broken.sendall(whole[: number * len(whole) // 50])
            assert client.post("/batch", upload(["{" + GOOD + "}"]))[0] == 200
        for number, one in enumerate(slow):
            one.sendall(whole[1 + number * (len(whole) - 2) // len(slow) :])
        for one in slow:
            assert one.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")
    finally:
        for one in slow:
            one.close()


# What is taken stays whole.


def test_hostile_events_read_the_same_unsealed_sealed_and_after_a_start(tmp_path: Path) -> None:
    server = Process(tmp_path / "data")
    server.start()
    client = Client(server)
    taken: list[str] = []

    def send(text: str, path: str, times: int = 1) -> None:
        named = [
            f'{text[:-1]},"insert_id":"hostile-{len(taken) + number}"}}' for number in range(times)
        ]
        status, said = client.post(path, upload(named))
        documented(path, status, said)
        if status == 200:
            taken.extend(named)

    @settings(
        max_examples=200,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(event=events, path=st.sampled_from(JSON_PATHS))
    def search(event: str, path: str) -> None:
        send(event, path)

    try:
        server.wait_until_ready()
        search()
        for token in TOKENS:
            send("{" + GOOD + f',"event_properties":{{"a":[{token}]}}' + "}", "/batch")
            for operation in ("$set", "$add", "$append", "$preInsert", "$remove"):
                text = f'"user_properties":{{"{operation}":{{"p":{token}}}}}'
                send("{" + GOOD + "," + text + "}", "/batch", times=2)  # 1e308 + 1e308 has no JSON
        unsealed = server.export()
        assert len(unsealed) == len(taken) > 300
        server.kill()
        server.start()
        server.wait_until_ready()
        assert server.export() == unsealed
        server.stop()
        server.start()
        server.wait_until_ready()
        assert server.export() == unsealed
        assert "Traceback" not in server.said()
        assert "engine_stopped" not in server.said()
    finally:
        client.close()
        server.end()
