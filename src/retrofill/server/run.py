"""The life of a server process: listen, open, serve, stop.

The socket listens before the engine opens and until all is answered: a refused or reset connection loses events in real
clients, a 503 does not (contract, clients 1.4 and 1.6). Under systemd's socket activation the socket even survives
the restart. SIGTERM or SIGINT: take no new connection, answer what has been read, then close the engine (which commits
and seals). A second signal ends the patience with clients, never the commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import resource
import signal
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence

import structlog
import uvloop
from msgspec import Struct
from starlette.routing import BaseRoute
from uvicorn.config import Config
from uvicorn.server import ServerState

from retrofill.clock import Clock
from retrofill.errors import InputError
from retrofill.limits import CHORES_S, CONNECTIONS_MAX, STOP_FIRST_S, STOP_S_MAX
from retrofill.server import log
from retrofill.server.app import App
from retrofill.server.connection import Connection, Shared
from retrofill.server.ingest import Engine

_logger = structlog.get_logger()

_BACKLOG = 2048  # connections that the kernel keeps until we take them
_FILES_SPARE = 256  # descriptors for the engine's own files
_SETTLE_S = 0.1  # after SIGTERM: time for what is already on its way
_STEP_S = 0.02  # how often a stop looks whether connections have ended
_STEPS_MAX = 50  # looks for connections that wait to be taken
_FAREWELL_S = 1.0  # time to send the last answers
_GC_THRESHOLDS = (10_000, 20, 50)
_SYSTEMD_FIRST = 3  # the first descriptor that systemd passes

# A filter in the kernel that drops every segment of TCP which asks for a connection: code, steps on if so, steps on if
# not, operand. Sources: linux/filter.h, socket(7).
_ATTACH_FILTER = 26
_NO_MORE = (
    (0x30, 0, 0, 13),  # load the byte of flags
    (0x54, 0, 0, 0x12),  # keep SYN and ACK
    (0x15, 1, 0, 0x02),  # SYN alone?
    (0x06, 0, 0, 0xFFFFFFFF),  # no: let it in
    (0x06, 0, 0, 0),  # yes: drop it
)
# Where TCP_INFO tells of a listening socket how many wait in its queue.
_UNTAKEN = struct.Struct("24xI")


class Opened(Struct, frozen=True):
    """An open engine and what stands around it.

    routes: those that read from it. chores: done one after another every CHORES_S. close: called, in a thread, once no
    request is under way and before the engine closes.
    """

    engine: Engine
    routes: Sequence[BaseRoute]
    chores: Sequence[Callable[[], Awaitable[object]]] = ()
    close: Callable[[], None] = lambda: None


def listen(host: str, port: int) -> socket.socket:
    """Bind and listen, or take the socket that systemd holds for us. port: 0 takes a free one.

    Raises InputError if the address is taken or none of ours.
    """
    if _systemd_listens():
        held = socket.socket(fileno=_SYSTEMD_FIRST)
        held.settimeout(0)
        return held
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as problem:
        raise _unbound(host, port, problem) from problem
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as problem:
        listening.close()
        raise _unbound(host, port, problem) from problem
    listening.settimeout(0)
    return listening


def _systemd_listens() -> bool:
    """Say whether systemd has bound the socket for us. Source: sd_listen_fds(3)."""
    ours = os.environ.get("LISTEN_PID") == str(os.getpid())
    return ours and os.environ.get("LISTEN_FDS") == "1"


def _unbound(host: str, port: int, problem: OSError) -> InputError:
    return InputError(
        f"Cannot listen: {problem.strerror}",
        where=f"{host} port {port}",
        mend="Give another address with --host and --port (0 takes a free port)",
    )


def _rest(listening: socket.socket) -> None:
    """Let the kernel take no more connections: who tries now tries again by itself, a second later.

    Those that wait to be taken stay. Where there is no such filter (it is Linux's), at most one more gets in.
    """
    program = b"".join(struct.pack("HBBI", *step) for step in _NO_MORE)
    held = ctypes.create_string_buffer(program, len(program))
    given = struct.pack("HP", len(_NO_MORE), ctypes.addressof(held))
    try:
        listening.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, given)
    except OSError:
        with contextlib.suppress(OSError):
            listening.listen(0)


def _waits(listening: socket.socket) -> bool:
    """Say whether connections wait to be taken, as far as the kernel tells. Source: tcp(7), TCP_INFO."""
    try:
        told = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _UNTAKEN.size)
        return bool(_UNTAKEN.unpack(told)[0])
    except (OSError, struct.error):
        return False


def address(listening: socket.socket) -> str:
    """Return the address as a URL."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    listening: socket.socket,
    open_engine: Callable[[], Opened],
    *,
    clock: Clock,
    ready: Callable[[Engine], None] = lambda _: None,
) -> None:
    """Serve until SIGTERM or SIGINT.

    open_engine: called in a thread; it may take seconds. ready: called once requests are taken.
    Raises what open_engine raises, after the socket is closed.
    """

    async def life() -> None:
        server = Server(listening, clock=clock)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop)
        await server.run(open_engine, ready)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(life())


class Server:
    """One listening socket and the connections taken from it."""

    def __init__(self, listening: socket.socket, *, clock: Clock) -> None:
        self._socket = listening
        self.app = App(clock=clock)
        self.shared = Shared(most=_connections_max())
        self._state = ServerState()
        self._config = Config(
            self.app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
        )
        self._config.load()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self.app.metrics.connections = lambda: len(self._state.connections)

    async def run(self, open_engine: Callable[[], Opened], ready: Callable[[Engine], None]) -> None:
        """Listen, open, serve, stop."""
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(
            lambda: Connection(self._config, self._state, self.shared, self.app.ingest, loop),
            sock=self._socket,
            backlog=_BACKLOG,
        )
        sweeping = asyncio.create_task(self._sweep())
        try:
            opened = await asyncio.to_thread(open_engine)
            try:
                await self._serve(opened, listener, ready)
            finally:
                self.app.close()
                await asyncio.to_thread(opened.close)
                await opened.engine.close()
            _logger.info("stopped")
        finally:
            listener.close()
            for connection in self._connections():
                connection.end()
            await self._gone(_FAREWELL_S, hurry=False)
            for connection in self._connections():
                connection.transport.abort()
            await _cancelled(sweeping)
            log.flush()

    async def _serve(
        self, opened: Opened, listener: asyncio.Server, ready: Callable[[Engine], None]
    ) -> None:
        """Serve until asked to stop, then answer what is read."""
        await opened.engine.start()
        # What stands now stands to the end, and the values that events become hold no circles: looking for garbage
        # seldom, and never among the former, saves a request the pauses and the server a thirtieth of its work.
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        self.app.open(opened.engine, opened.routes)
        chores = asyncio.create_task(_do(opened.chores))
        try:
            ready(opened.engine)
            await self._stop.wait()
            _logger.info("stopping", connections=len(self._state.connections))
            await self._drain(listener)
        finally:
            await _cancelled(chores)

    def stop(self) -> None:
        """Begin to stop; called again, wait for clients no longer."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _drain(self, listener: asyncio.Server) -> None:
        """Take no new connection and answer what is read. What has waited in the kernel until now is taken too."""
        self.shared.stopping = True
        if not _systemd_listens():  # what systemd holds goes on waiting for our successor
            _rest(self._socket)
            await asyncio.sleep(_SETTLE_S)
            for _ in range(_STEPS_MAX):
                if not _waits(self._socket):
                    break
                await asyncio.sleep(_STEP_S)
        listener.close()
        # Who has connected and sent nothing yet is about to: ended here, its first request would find a closed door.
        for connection in self._connections():
            if not connection.fresh:
                connection.wind_down()
        await self._gone(STOP_FIRST_S, hurry=True)
        for connection in self._connections():
            connection.wind_down()
        await self._gone(STOP_S_MAX, hurry=True)

    async def _gone(self, patience_s: float, *, hurry: bool) -> None:
        """Wait until every connection has ended, for a while. hurry: a second signal ends the wait."""
        for _ in range(int(patience_s / _STEP_S)):
            if not self._state.connections or (hurry and self._hurry.is_set()):
                return
            await asyncio.sleep(_STEP_S)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(1)
            self.shared.tick += 1
            for connection in self._connections():
                connection.sweep()
            log.flush()

    def _connections(self) -> list[Connection]:
        return [one for one in self._state.connections if isinstance(one, Connection)]


async def _do(chores: Sequence[Callable[[], Awaitable[object]]]) -> None:
    """Do the chores again and again; one that fails is logged and tried again."""
    while True:
        for chore in chores:
            try:
                await chore()
            except Exception:
                _logger.exception("chore_failed")
        await asyncio.sleep(CHORES_S)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _connections_max() -> int:
    """Return how many connections there may be at once: each needs a file descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS_MAX + _FILES_SPARE
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
            soft = min(wanted, hard)
    return max(1, min(CONNECTIONS_MAX, soft - _FILES_SPARE))
