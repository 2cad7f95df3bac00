"""A server that stops answers everybody who has a connection: a reset loses events in real clients (clients 1.4)."""

from __future__ import annotations

import http.client
import json
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults.process import API_KEY, PATIENCE_S, Process

pytestmark = pytest.mark.slow

LONG_S = PATIENCE_S
QUIET_S = 1
CLIENTS = 16


@pytest.fixture
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Process]:
    settings = getattr(request, "param", f"STOP_FIRST_S={LONG_S}")
    made = Process(tmp_path / "data", settings=settings)
    made.start()
    made.wait_until_ready()
    yield made
    made.end()


def body(number: int) -> bytes:
    event = {"event_type": "click", "user_id": "user-1", "insert_id": f"click-{number}"}
    return json.dumps({"api_key": API_KEY, "events": [event]}).encode()


def connect(server: Process) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONG_S)
    connection.connect()
    return connection


def takes_connections(server: Process) -> bool:
    try:
        connect(server).close()
    except ConnectionRefusedError:
        return False
    return True


def test_who_connected_before_a_stop_and_asks_after_it_is_answered(server: Process) -> None:
    early = connect(server)
    assert server.running is not None
    server.running.terminate()
    end = time.monotonic() + LONG_S
    while takes_connections(server):
        assert time.monotonic() < end
    readable, _, _ = select.select([early.sock], [], [], QUIET_S)
    assert not readable, "ended before it asked"
    early.request("POST", "/2/httpapi", body(1), {"Content-Type": "application/json"})
    answer = early.getresponse()
    assert answer.status == 200
    early.close()
    assert server.running.wait(LONG_S) == 0
    server.running = None
    server.start()
    server.wait_until_ready()
    assert [row["$insert_id"] for row in server.export()] == ["click-1"]


def test_no_connection_ends_without_an_answer_while_a_server_stops(server: Process) -> None:
    """The kernel finishes handshakes by itself: whoever is let in must be answered."""
    over = threading.Event()
    ends: Counter[str] = Counter()
    lock = threading.Lock()

    def ask(number: int) -> str:
        try:
            connection = connect(server)
        except OSError:
            return "refused"
        try:
            connection.request("POST", "/2/httpapi", body(number), {"Connection": "close"})
            return str(connection.getresponse().status)
        except (OSError, http.client.HTTPException) as problem:
            return type(problem).__name__
        finally:
            connection.close()

    def go_on(first: int) -> None:
        number = first
        while not over.is_set():
            end = ask(number)
            with lock:
                ends[end] += 1
            number += CLIENTS

    clients = [threading.Thread(target=go_on, args=(first,)) for first in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        end = time.monotonic() + LONG_S
        while ends["200"] < 20 * CLIENTS:
            assert time.monotonic() < end, ends
            time.sleep(0.01)
        server.stop()
    finally:
        over.set()
        for client in clients:
            client.join(LONG_S)
    assert set(ends) <= {"200", "refused"}, ends
    server.start()
    server.wait_until_ready()
    assert len(server.export()) == ends["200"]


@pytest.mark.parametrize("server", ["STOP_FIRST_S=1"], indirect=True)
def test_a_connection_that_never_asks_does_not_keep_a_server(server: Process) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as quiet:
        server.stop()
        assert quiet.recv(1) == b""
