"""One HTTP connection: uvicorn's protocol, with bounds where it has none, and never an end without an answer.

What uvicorn leaves open and this closes: a head of any size, a client that sends nothing, a body that stalls, a reader
that stops reading, a half-closed client, words of its own in plain text. Time is a tick of a second that one sweep
moves for all connections: no timer is made for a request.

A connection that is refused before its request was read whole is closed in two steps (answer and end of writing
first, the rest when the client has ended or `LINGER_S` later): a close with bytes unread would reset the connection,
and the client would never see the answer.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

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
    URL_TOO_LONG,
    whole,
)

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


class Connection(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        shared: Shared,
        _loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(config, server_state, {}, _loop)
        self.shared = shared
        self.heard = shared.tick  # the tick of the last bytes
        self.began = shared.tick  # the tick at which the request under way began
        self.head_open = False  # a request has begun and its head is not complete
        self.body_open = False  # its head is complete and its body is not
        self.half_closed = False
        self.lingers = False
        self.write_stuck = 0  # the tick since which the client does not read, 0 if it does
        self._head_bytes = 0
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
        self.write_stuck = 0

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
            self._refusal = URL_TOO_LONG
            raise ValueError("address too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header. Raises ValueError if the head is too large."""
        self._gave = True
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > HEADERS_BYTES_MAX:
            self._refusal = HEAD_TOO_LARGE
            raise ValueError("head too large")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start answering."""
        self.head_open = False
        self.body_open = True
        super().on_headers_complete()
        if self.shared.stopping:
            self.cycle.keep_alive = False

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

    # From the server.

    @property
    def idle(self) -> bool:
        """No request is under way."""
        return not (self.head_open or self.body_open or self.waits)

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
        self.transport.write(whole(answer))
        self.flow.resume_reading()
        self.transport.write_eof()

    def sweep(self) -> None:  # noqa: C901 - a table of states: one line each
        """Once a second: end what has stalled."""
        tick = self.shared.tick
        quiet, age = tick - self.heard, tick - self.began
        if self.lingers:
            if age > LINGER_S:
                self.transport.abort()
        elif self.write_stuck:
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
