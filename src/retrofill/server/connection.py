"""One HTTP connection: uvicorn's protocol, with bounds where it has none, and never an end without an answer.

What uvicorn leaves open and this closes: a head of any size, a client that sends nothing, a body that stalls, a reader
that stops reading, a half-closed client, words of its own in plain text. Time is a tick of a second that one sweep
moves for all connections: no timer is made for a request. A request to an ingest path goes to `Ingest` by the shortest
way, without ASGI's messages, and its answer leaves in one piece; that halves what a request costs.

A connection that is refused before its request was read whole is closed in two steps (answer and end of writing
first, the rest when the client has ended or `LINGER_S` later): a close with bytes unread would reset the connection,
and the client would never see the answer.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from retrofill.core import reply
from retrofill.core.reply import Reply
from retrofill.limits import (
    BODY_IDLE_S,
    BODY_S_MAX,
    HEADERS_BYTES_MAX,
    KEEP_ALIVE_S,
    LINGER_S,
    QUERY_BYTES_MAX,
    READ_IDLE_S,
)
from retrofill.server.answer import (
    BAD_REQUEST,
    CROWDED,
    HEAD_TOO_LARGE,
    STOPPING,
    packed,
)
from retrofill.server.ingest import Endpoint, Ingest

if TYPE_CHECKING:
    from uvicorn.config import Config
    from uvicorn.server import ServerState

# A client closes first: what we announce ends a little before what we do.
_KEEP_ALIVE_SLACK_S = 5


class Shared:
    """What all connections of one server share. tick: seconds since its start. most: connections at once."""

    def __init__(self, most: int) -> None:
        self.tick = 0
        self.most = most
        self.stopping = False


# The ASGI extension under which a request finds its own cycle.
CYCLE = "retrofill.cycle"


class Cycle(RequestResponseCycle):
    """One request to an ingest path and its answer."""

    endpoint: Endpoint

    async def run_asgi(self, app: Any) -> None:  # noqa: ANN401 - uvicorn's name and type; here `app` is an Ingest
        """Answer, in one write."""
        said = await app.answer(self.endpoint, self.scope, self.receive)
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if said is None or self.disconnected or self.transport.is_closing():
            return
        self.response_started = self.response_complete = True
        keeps = self.keep_alive
        self.transport.write(packed(said, keeps=keeps))
        if not keeps:
            self.transport.close()
        self.on_response()


class Connection(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        shared: Shared,
        ingest: Ingest,
        _loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(config, server_state, {}, _loop)
        self.shared = shared
        self.ingest = ingest
        self.heard = shared.tick  # the tick of the last bytes
        self.began = shared.tick  # the tick at which the request under way began
        self.head_open = False  # a request has begun and its head is not complete
        self.body_open = False  # its head is complete and its body is not
        self.half_closed = False
        self.lingers = False
        self.write_stuck = -1  # the tick since which the client does not read, -1 if it does
        self._head_bytes = 0
        self._active: RequestResponseCycle | None = None  # the request that is being answered
        self._gave = False  # the parser gave something out
        self._held_bytes = 0  # what it was fed since it last did
        self._refusal: Reply | None = None
        self._after: Reply | None = None  # said once the requests before are answered

    # From the transport.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn declares it
        """Take a new connection; answer 503 to one too many."""
        super().connection_made(transport)
        if len(self.connections) > self.shared.most:
            self.refuse(CROWDED)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell every request under way; uvicorn tells the newest alone."""
        active = self._active
        if active is not None and not active.response_complete:
            active.disconnected = True
            active.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, and watch what it holds back: a header is given out only when it is complete."""
        if self.lingers or self._after is not None:
            return
        self.heard = self.shared.tick
        self._gave = False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.refuse(BAD_REQUEST)
        except httptools.HttpParserError:
            self.refuse(self._refusal or BAD_REQUEST)
        else:
            self._held_bytes = 0 if self._gave else self._held_bytes + len(data)
            if self._held_bytes > HEADERS_BYTES_MAX:
                self.refuse(HEAD_TOO_LARGE)

    def eof_received(self) -> bool:  # type: ignore[override] # uvicorn's returns None
        """Keep writing to a client that has sent all it will and waits for its answer."""
        cycle = self.cycle
        if self.lingers or cycle is None or cycle.response_complete or cycle.more_body:
            return False
        self.half_closed = True
        return True

    def pause_writing(self) -> None:
        """The client reads slower than we write."""
        super().pause_writing()
        self.write_stuck = self.shared.tick

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self.write_stuck = -1

    # From the parser.

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._gave = self.head_open = True
        self._head_bytes = 0
        self.began = self.shared.tick

    def on_url(self, url: bytes) -> None:
        """Take a piece of the address. Raises ValueError if it is too long."""
        self._gave = True
        self.url += url
        if len(self.url) > QUERY_BYTES_MAX:
            path, _, _ = self.url.partition(b"?")
            endpoint = self.ingest.posted.get(path)
            self._refusal = reply.too_long(path="/batch" if endpoint is None else endpoint.path)
            raise ValueError("address too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header. Raises ValueError if the head is too large."""
        self._gave = True
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > HEADERS_BYTES_MAX:
            self._refusal = HEAD_TOO_LARGE
            raise ValueError("head too large")
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Start answering."""
        self.head_open = False
        self.body_open = True
        endpoint = self.ingest.posted.get(self.url)
        if endpoint is None or self.parser.get_method() != b"POST":
            super().on_headers_complete()
            self.scope["extensions"] = {CYCLE: self.cycle}  # type: ignore[dict-item] # not JSON, ours
        else:
            self._post(endpoint)
        if self.shared.stopping:
            self.cycle.keep_alive = False

    def _post(self, endpoint: Endpoint) -> None:
        """Start answering a POST to an ingest path. What uvicorn does for any request, where it matters here."""
        scope = self.scope
        scope["method"] = "POST"
        scope["path"] = endpoint.path
        scope["query_string"] = b""
        parser = self.parser
        before = self.cycle
        self.cycle = cycle = Cycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=[],
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=parser.get_http_version() == "1.1" and parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        cycle.endpoint = endpoint
        if before is None or before.response_complete:
            self._start_asgi_task(cycle, self.ingest)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.ingest))  # type: ignore[arg-type] # the same

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._gave = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is read whole."""
        self.body_open = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with the next request, or rest; the sweep ends a connection that rests too long."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.heard = self.shared.tick
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        elif self._after is not None:
            self.refuse(self._after)
        elif self.half_closed:
            self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:  # noqa: ANN401 - ASGI, or an Ingest
        self._active = cycle
        super()._start_asgi_task(cycle, app)

    # From the server.

    @property
    def idle(self) -> bool:
        """No request is under way."""
        return not (self.head_open or self.body_open or self.waits)

    @property
    def fresh(self) -> bool:
        """No request has begun yet."""
        return not (self.head_open or self.lingers) and self.cycle is None

    @property
    def path(self) -> str:
        """The path of the request that is being read; `/batch` stands for one that is not known yet."""
        return "/batch" if self.head_open else self.scope["path"]

    @property
    def waits(self) -> bool:
        """A request has no answer yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def refuse(self, answer: Reply) -> None:
        """Answer by ourselves and end the connection; requests read before are answered first, in their order."""
        if self.lingers or self.transport.is_closing():
            return
        cycle = self.cycle
        broken = self.waits and cycle.more_body
        if self._after is None and (self.pipeline or (self.waits and not broken)):
            if broken:
                self.pipeline.popleft()
            self._after = answer
            return
        if self.waits:
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.close()
                return
        self.lingers = True
        self.began = self.shared.tick
        self.transport.write(packed(answer, keeps=False))
        self.flow.resume_reading()
        self.transport.write_eof()

    def sweep(self) -> None:  # noqa: C901 - a table of states: one line each
        """Once a second: end what has stalled."""
        tick = self.shared.tick
        quiet, age = tick - self.heard, tick - self.began
        if self.lingers:
            if age > LINGER_S:
                self.transport.abort()
        elif self.write_stuck >= 0:
            if tick - self.write_stuck > READ_IDLE_S:
                self.transport.abort()
        elif self.head_open:
            if age > BODY_IDLE_S and not self.waits:
                self.refuse(reply.stalled(path=self.path))
        elif self.body_open:
            if not self.waits:  # answered already; what still comes is thrown away
                if age > BODY_S_MAX or quiet > BODY_IDLE_S:
                    self.transport.abort()
            elif not self.pipeline and (quiet > BODY_IDLE_S or age > BODY_S_MAX):
                self.refuse(reply.stalled(path=self.path))
        elif not self.waits and quiet > KEEP_ALIVE_S + _KEEP_ALIVE_SLACK_S:
            self.transport.close()

    def wind_down(self) -> None:
        """The server stops: end now if nothing is under way, else with the next answer."""
        if self.idle:
            self.transport.close()
        elif self.waits:
            self.cycle.keep_alive = False

    def end(self) -> None:
        """The server has stopped and its patience is over: answer what is open and go."""
        if self.idle:
            self.transport.close()
        else:
            self._after = STOPPING
            self.refuse(STOPPING)

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP. msg: uvicorn's words, left out: ours are the contract's."""
        del msg
        self.refuse(BAD_REQUEST)

    def _should_upgrade(self) -> Any:  # noqa: ANN401 - bool, as in uvicorn
        return False
