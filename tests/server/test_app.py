"""Paths, methods and the life of a server and its connections, over real sockets."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import structlog
from tests.faults.process import held_port

from retrofill.errors import BusyError, InputError
from retrofill.limits import BODY_IDLE_S, HEADERS_BYTES_MAX, KEEP_ALIVE_S, LINGER_S, READ_IDLE_S
from retrofill.server import log, run

from .conftest import KEY, SECRET, WAIT_S, Live, read_answer

pytestmark = pytest.mark.slow

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


def post(body: bytes) -> bytes:
    return b"POST /batch HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def upload(event: dict[str, Any]) -> bytes:
    return json.dumps({"api_key": KEY, "events": [event]}).encode()


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    log.configure("debug", stream)
    yield stream
    log.configure("info")


@pytest.mark.parametrize("path", ["/nothing", "/2/httpapi/", "/batch/x", "/api/2/nothing", "//"])
def test_an_unknown_path_is_400_for_post_and_404_else(live: Live, path: str) -> None:
    answer = live.ask("POST", path, b"{}")
    assert (answer.status, answer.json) == (400, {"code": 400, "error": "Invalid request path"})
    assert answer.headers["access-control-allow-origin"] == "*"
    for method in ("GET", "PUT", "DELETE"):
        assert live.ask(method, path).status == 404
    assert live.ask("OPTIONS", path).status == 204


@pytest.mark.parametrize("path", ["/healthz", "/metrics", "/openapi.json", "/api/2/echo"])
def test_a_known_path_has_its_methods(live: Live, path: str) -> None:
    for method in ("POST", "PUT", "DELETE"):
        answer = live.ask(method, path)
        assert (answer.status, answer.json["code"]) == (405, 405)
        assert "GET" in answer.headers["allow"]
        assert answer.headers["access-control-allow-origin"] == "*"


def test_an_encoded_path_is_the_path(live: Live, event: dict[str, Any]) -> None:
    assert live.ask("POST", "/%62atch", upload(event)).status == 200
    assert live.ask("POST", "/batch?x=1", upload(event)).status == 200


def test_a_reader_is_answered_in_its_own_words(live: Live, logged: io.StringIO) -> None:
    keys = {"Authorization": "Basic " + _basic(KEY, SECRET)}
    answer = live.ask("GET", "/api/2/bad", headers=keys)
    assert (answer.status, answer.json["error"]["http_code"]) == (400, 400)
    assert answer.json["error"]["message"] == "start is after end"
    answer = live.ask("GET", "/api/2/bad?deep", headers=keys)
    assert answer.json == {"code": 500, "error": "Internal server error"}
    assert answer.headers["access-control-allow-origin"] == "*"
    log.flush()
    assert logged.getvalue().count("request_failed") == 1
    assert "raise ZeroDivisionError" in logged.getvalue()
    assert KEY not in logged.getvalue()


def _basic(key: str, secret: str) -> str:
    return base64.b64encode(f"{key}:{secret}".encode()).decode()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"hello\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET x HTTP/9\r\n\r\n",
    ],
)
def test_bytes_that_are_no_http_are_answered(live: Live, garbage: bytes) -> None:
    with live.connect() as client:
        client.sendall(garbage)
        answer = read_answer(client)
        assert (answer.status, answer.json["code"]) == (400, 400)
        assert answer.headers["access-control-allow-origin"] == "*"
        assert client.recv(1) == b""


def test_garbage_after_a_request_leaves_its_answer_alone(live: Live, event: dict[str, Any]) -> None:
    live.close_gate()
    with live.connect() as client:
        client.sendall(post(upload(event)) + b"\x00garbage\r\n\r\n")
        assert live.engine.taken.wait(WAIT_S)
        live.open_gate()
        assert read_answer(client).status == 200
        assert read_answer(client).status == 400
        assert client.recv(1) == b""


def test_a_bad_chunk_ends_its_request(live: Live) -> None:
    with live.connect() as client:
        client.sendall(
            b"POST /batch HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
        )
        assert read_answer(client).status == 400
    assert live.engine.stored == []


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /api/2/usersearch?user=" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 400_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"X: x\r\n" * 40_000, 431),
        (
            b"POST /batch HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"x" * 400_000,
            431,
        ),
        (b"POST /batch HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"x" * 400_000, 431),
    ],
    ids=["address", "header", "endless header", "headers", "trailer", "chunk extension"],
)
def test_a_head_has_a_bound(live: Live, head: bytes, status: int) -> None:
    with live.connect() as client:
        client.sendall(head)
        answer = read_answer(client)
        assert (answer.status, answer.json["code"]) == (status, status)
        assert answer.headers["connection"] == "close"


def test_a_form_in_too_long_an_address_is_told_in_text(live: Live) -> None:
    with live.connect() as client:
        client.sendall(b"GET /identify?identification=" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n")
        answer = read_answer(client)
        assert (answer.status, answer.body) == (414, b"request_uri_too_long")


def test_a_large_head_within_the_bound_is_taken(live: Live) -> None:
    assert live.ask("GET", "/healthz", headers={"X": "x" * (HEADERS_BYTES_MAX - 200)}).status == 200


def test_a_refused_client_that_goes_on_sending_still_reads_its_answer(live: Live) -> None:
    with live.connect() as client:
        client.sendall(b"nonsense\r\n\r\n" + bytes(3_000_000))
        assert read_answer(client).status == 400
        live.tick(LINGER_S + 1)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            _send_for_ever(client)


def _send_for_ever(client: socket.socket) -> None:
    while True:
        client.sendall(bytes(100_000))


def test_connections_rest_as_long_as_announced(live: Live) -> None:
    with live.connect() as client:
        client.sendall(GET)
        assert read_answer(client).headers["keep-alive"] == f"timeout={KEEP_ALIVE_S}"
        live.tick(KEEP_ALIVE_S)
        client.sendall(GET)
        assert read_answer(client).status == 200
        live.tick(KEEP_ALIVE_S + 10)
        assert client.recv(1) == b""


def test_a_head_that_stalls_is_answered_408(live: Live) -> None:
    with live.connect() as client:
        client.sendall(b"POST /batch HTTP/1.1\r\nHost:")
        live.ask("GET", "/healthz")
        live.tick(BODY_IDLE_S + 1)
        assert read_answer(client).status == 408


def test_a_client_that_does_not_read_is_cut_off(live: Live, logged: io.StringIO) -> None:
    with live.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
        stuck: list[Any] = []
        while not stuck:
            live.ask("GET", "/healthz")
            stuck = [one for one in live.call(live.server._connections) if one.write_stuck >= 0]
        seconds = 0
        while stuck[0] in live.call(live.server._connections):
            live.tick(1)  # the kernel may take a little more meanwhile: then it begins anew
            seconds += 1
        assert seconds > READ_IDLE_S
    log.flush()
    assert "request_failed" not in logged.getvalue()


def test_one_connection_too_many_is_answered(live: Live) -> None:
    live.server.shared.most = 2
    with live.connect() as first, live.connect() as second:
        for client in (first, second):
            client.sendall(GET)
            assert read_answer(client).status == 200
        with live.connect() as third:
            answer = read_answer(third)
            assert (answer.status, answer.json["code"]) == (503, 503)
            assert int(answer.headers["retry-after"]) >= 1
            assert third.recv(1) == b""


def test_expectations_are_met(live: Live, event: dict[str, Any]) -> None:
    body = upload(event)
    head = b"POST /batch HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    with live.connect() as client:
        client.sendall(head % len(body))
        assert client.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert read_answer(client).status == 200
        client.sendall(head % 99_999_999)
        assert read_answer(client).status == 413


def test_http_1_0_is_answered_and_closed(live: Live, event: dict[str, Any]) -> None:
    body = upload(event)
    with live.connect() as client:
        client.sendall(b"POST /batch HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        assert read_answer(client).status == 200
        assert client.recv(1) == b""


def test_upgrades_are_not_made(live: Live) -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "x" * 22 + "==",
    }
    assert live.ask("GET", "/batch", headers=upgrade).status in {400, 405}
    assert live.ask("GET", "/healthz").status == 200


# Starting and stopping.


def test_a_server_answers_503_until_its_engine_is_open(event: dict[str, Any]) -> None:
    may_open = threading.Event()
    live = Live(opening=may_open.wait)  # type: ignore[arg-type] # its answer does not matter
    try:
        for answer in (
            live.send([event]),
            live.ask("GET", "/healthz"),
            live.ask("GET", "/api/2/echo"),
        ):
            assert answer.status == 503
            assert answer.headers["access-control-allow-origin"] == "*"
        assert live.send([event]).json["code"] == 503
        assert live.ask("OPTIONS", "/batch").status == 204
        assert live.ask("GET", "/openapi.json").status == 200
        may_open.set()
        assert live.ready.wait(WAIT_S)
        assert live.send([event]).status == 200
    finally:
        may_open.set()
        live.stop()
    assert live.engine.calls == ["start", "close"]


def test_a_stop_while_opening_closes_the_engine() -> None:
    may_open = threading.Event()
    live = Live(opening=may_open.wait)  # type: ignore[arg-type] # its answer does not matter
    live.begin_stop()
    may_open.set()
    live.join()
    assert live.engine.calls[-1] == "close"


def test_an_engine_that_does_not_open_ends_the_server() -> None:
    def opening() -> None:
        raise BusyError("Another process is using this data directory")

    with closing(held_port()) as held:
        listening = run.listen(*held.getsockname())
        with pytest.raises(BusyError, match="Another process"):
            run.serve(listening, opening, clock=None)  # type: ignore[arg-type] # neither is used
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(held.getsockname(), WAIT_S)


@pytest.fixture
def held() -> Iterator[int]:
    """A port that nobody else is given, also once the server has given it back."""
    with closing(held_port()) as socket_:
        yield socket_.getsockname()[1]


def test_a_stop_answers_what_was_read_and_closes_the_rest(event: dict[str, Any], held: int) -> None:
    live = Live(port=held)
    assert live.ready.wait(WAIT_S)
    body = upload(event)
    live.close_gate()
    with live.connect() as waiting, live.connect() as idle, live.connect() as sending:
        waiting.sendall(post(body))
        assert live.engine.taken.wait(WAIT_S)
        idle.sendall(GET)
        assert read_answer(idle).status == 200
        sending.sendall(post(body)[:-1])
        live.ask("GET", "/healthz")  # by now that has been read
        live.begin_stop()
        assert idle.recv(1) == b""
        sending.sendall(post(body)[-1:])
        live.open_gate()
        for client in (waiting, sending):
            answer = read_answer(client)
            assert answer.status == 200
            assert answer.headers["connection"] == "close"
            assert client.recv(1) == b""
        live.join()
    assert len(live.engine.stored) == 2
    assert live.engine.calls == ["start", "close"]
    with pytest.raises(ConnectionRefusedError):
        live.connect()


def test_a_request_on_a_kept_connection_is_answered_while_stopping(event: dict[str, Any]) -> None:
    live = Live()
    assert live.ready.wait(WAIT_S)
    with live.connect() as client:
        client.sendall(GET)
        assert read_answer(client).status == 200

        async def send_when_stopping() -> None:
            live.server.stop()
            while not live.server.shared.stopping:  # noqa: ASYNC110 # the flag tells no event
                await asyncio.sleep(0)
            client.sendall(post(upload(event)))

        # On its own loop: it waits a tenth of a second for what is on its way, and another thread may be late.
        asyncio.run_coroutine_threadsafe(send_when_stopping(), live.loop).result(WAIT_S)
        answer = read_answer(client)
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        live.join()


def test_a_second_signal_waits_for_no_client(event: dict[str, Any]) -> None:
    live = Live()
    assert live.ready.wait(WAIT_S)
    with live.connect() as client:
        client.sendall(post(upload(event))[:-1])
        live.ask("GET", "/healthz")
        live.begin_stop()
        live.begin_stop()
        answer = read_answer(client)
        assert (answer.status, answer.json["code"]) == (503, 503)
        live.join()
    assert live.engine.stored == []
    assert live.engine.calls == ["start", "close"]


def test_an_address_that_is_taken_is_told() -> None:
    with run.listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1 port {port}.*--port"):
            run.listen("127.0.0.1", port)
    with pytest.raises(InputError, match="Cannot listen"):
        run.listen("no.such.host.invalid", 0)


def test_addresses_are_urls() -> None:
    with run.listen("127.0.0.1", 0) as listening:
        assert run.address(listening) == f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_the_socket_of_systemd_is_taken() -> None:
    code = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid());"
        "from retrofill.server import run; print(run.address(run.listen('0.0.0.0', 1)))"
    )
    with socket.create_server(("127.0.0.1", 0)) as held:
        said = subprocess.run(
            [sys.executable, "-c", code, str(held.fileno())],
            pass_fds=[held.fileno()],
            env={**os.environ, "LISTEN_FDS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert said.stderr == ""
        assert said.stdout.strip() == f"http://127.0.0.1:{held.getsockname()[1]}"


def test_chores_are_done_and_a_failing_one_is_logged(logged: io.StringIO) -> None:
    done = threading.Event()

    async def fails() -> None:
        raise ZeroDivisionError

    async def works() -> None:
        done.set()

    live = Live(chores=(fails, works))
    assert done.wait(WAIT_S)
    live.stop()
    assert "chore_failed" in logged.getvalue()


def test_an_entry_of_the_log_is_one_line(logged: io.StringIO) -> None:
    structlog.get_logger().warning("odd", text="a\nb\u2028c=\x85 d", number=1.5, none=None)
    [line] = logged.getvalue().splitlines()
    assert line.endswith(r' warning odd text="a\nb\u2028c=\u0085 d" number=1.500 none=None')
    structlog.get_logger().info("later")
    assert "later" not in logged.getvalue()  # until it is flushed
    log.flush()
    assert "later" in logged.getvalue()
    log.configure("warning", logged)
    structlog.get_logger().info("never")
    log.batch(project="x", path="/batch", events=1, size=1, ms=1)
    log.flush()
    assert "never" not in logged.getvalue()
    assert "batch_accepted" not in logged.getvalue()


def test_a_batch_is_one_line_of_the_log(
    live: Live, event: dict[str, Any], logged: io.StringIO
) -> None:
    live.send([event, event])
    live.send([{"event_type": "x"}])
    live.ask("POST", "/batch", b'{"api_key":"secret-key-nobody-knows","events":[]}')
    log.flush()
    lines = logged.getvalue().splitlines()
    [accepted] = [line for line in lines if "batch_accepted" in line]
    assert "info batch_accepted project=shop path=/2/httpapi events=2 bytes=" in accepted
    assert len([line for line in lines if "batch_refused" in line]) == 2
    assert KEY not in logged.getvalue()
    assert "secret-key-nobody-knows" not in logged.getvalue()
