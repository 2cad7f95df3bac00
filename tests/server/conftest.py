"""A live server on a free port, with an engine that does as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest
import uvloop
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from tests.faults.process import PATIENCE_S

from retrofill.clock import SystemClock
from retrofill.config import Project
from retrofill.core.event import Batch, Envelope
from retrofill.core.throttle import Accepted
from retrofill.errors import InputError
from retrofill.limits import Limits
from retrofill.server import log, run

KEY = "0123456789abcdef0123456789abcdef"
SECRET = "fedcba9876543210fedcba9876543210"
UPLOADED_MS = 1_700_000_000_123
WAIT_S = PATIENCE_S  # for what is to come; it comes at once unless the machine is busy


class Figures(msgspec.Struct):
    blocks: int = 3
    duplicates: int = 2
    unsealed_events: int = 7
    last_seal_ms: int = 1_700_000_000_000


class FakeEngine:
    """Keeps batches in a list. outcome: what `ingest` returns, or an exception it raises."""

    def __init__(self) -> None:
        self.stored: list[Batch] = []
        self.figures = Figures()
        self.outcome: Any = None
        self.reason: str | None = None
        self.calls: list[str] = []
        self.taken = threading.Event()
        self.gate: asyncio.Event | None = None
        self.projects = {KEY: Project(1, "shop", KEY, SECRET)}
        self.its_limits = Limits()

    def project(self, api_key: str) -> Project | None:
        return self.projects.get(api_key)

    def all_projects(self) -> list[Project]:
        return list(self.projects.values())

    def limits(self, number: int) -> Limits:
        assert number == 1
        return self.its_limits

    def problem(self) -> str | None:
        return self.reason

    def refused(self, project: int, opened: Envelope) -> None:
        assert project == 1
        self.calls.append(f"refused {len(opened.events or ())}")

    async def start(self) -> None:
        self.calls.append("start")

    async def ingest(self, batch: Batch) -> Any:
        self.taken.set()
        if self.gate is not None:
            await self.gate.wait()
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        if self.outcome is not None:
            return self.outcome
        self.stored.append(batch)
        return Accepted(len(batch.events), UPLOADED_MS)

    async def close(self) -> None:
        self.calls.append("close")


class Answer(msgspec.Struct):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Live:
    """A server in a thread."""

    def __init__(
        self,
        opening: Callable[[], None] = lambda: None,
        chores: Sequence[Callable[[], Awaitable[object]]] = (),
        port: int = 0,
    ) -> None:
        self.engine = FakeEngine()
        self.listening = run.listen("127.0.0.1", port)
        self.port = self.listening.getsockname()[1]
        self.loop: asyncio.AbstractEventLoop
        self.server: run.Server
        self._opening = opening
        self._chores = chores
        self.ready = threading.Event()
        self.listens = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self.listens.wait(WAIT_S)

    def _run(self) -> None:
        async def life() -> None:
            self.loop = asyncio.get_running_loop()
            self.server = run.Server(self.listening, clock=SystemClock())
            self.server._sweep = _asleep  # type: ignore[method-assign] # time goes on by `tick` alone
            self.listens.set()
            await self.server.run(self._open, lambda _: self.ready.set())

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(life())

    def _open(self) -> run.Opened:
        self._opening()
        routes = [Route("/api/2/echo", _echo), Route("/api/2/bad", _bad)]
        return run.Opened(self.engine, routes, self._chores)

    def call(self, function: Callable[[], Any]) -> Any:
        """Do something on the server's loop."""

        async def doing() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(doing(), self.loop).result(WAIT_S)

    def tick(self, seconds: int) -> None:
        """Let the connections' time go on."""

        def sweeping() -> None:
            for _ in range(seconds):
                self.server.shared.tick += 1
                for connection in list(self.server._connections()):
                    connection.sweep()

        self.call(sweeping)

    def close_gate(self) -> None:
        """Let the engine take requests and not answer them."""
        self.engine.gate = self.call(asyncio.Event)

    def open_gate(self) -> None:
        gate = self.engine.gate
        assert gate is not None
        self.engine.gate = None
        self.call(gate.set)

    def stop(self) -> None:
        """Stop, and wait for the end."""
        self.begin_stop()
        self.join()

    def begin_stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self.loop.call_soon_threadsafe(self.server.stop)

    def join(self) -> None:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), WAIT_S)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        try:
            connection.request(method, path, body, headers or {})
            return _answer(connection.getresponse())
        finally:
            connection.close()

    def send(self, events: list[Any], path: str = "/2/httpapi", **more: Any) -> Answer:
        return self.ask(
            "POST", path, json.dumps({"api_key": KEY, "events": events, **more}).encode()
        )


async def _asleep() -> None:
    await asyncio.Event().wait()


def _answer(response: http.client.HTTPResponse) -> Answer:
    fields = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, fields, response.read())


def read_answer(client: socket.socket) -> Answer:
    """Read one answer from a raw socket, and not a byte beyond it."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = client.recv(1)
        assert byte, f"ended within {head!r}"
        head += byte
    start, *lines = head.decode().split("\r\n")[:-2]
    fields = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    size = int(fields["content-length"])
    body = b""
    while len(body) < size:
        body += client.recv(size - len(body))
    return Answer(int(start.split()[1]), fields, body)


async def _echo(request: Request) -> JSONResponse:
    return JSONResponse({"project": request.state.project.name})


async def _bad(request: Request) -> JSONResponse:
    if "deep" in request.query_params:
        raise ZeroDivisionError
    raise InputError("start is after end", mend="Swap them")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    log.configure("warning")


@pytest.fixture
def live() -> Iterator[Live]:
    server = Live()
    try:
        assert server.ready.wait(WAIT_S)
        yield server
    finally:
        if server.engine.gate is not None:
            server.open_gate()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "_SETTLE_S", 0)  # nothing is on its way
            server.stop()


@pytest.fixture
def event() -> dict[str, Any]:
    return {
        "event_type": "click",
        "user_id": "user-1",
        "device_id": "device-1",
        "time": 1_600_000_000_000,
    }
