"""POST /api/1/history: what a rehearsal needs of a project, as lines of JSON. Ours, not Amplitude's; nothing is changed.

One such request of a project at a time, its body included. Each piece is made in a reader's thread when the one before it was taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Generator
from typing import TYPE_CHECKING

from isal import isal_zlib
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from retrofill.engine import history
from retrofill.engine.history import Asked
from retrofill.engine.moment import Moment
from retrofill.engine.query import Reader
from retrofill.limits import HISTORY_BYTES_MAX
from retrofill.server import body as bodies
from retrofill.server.read import Reads

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from retrofill.engine.ingest import Engine

_AT_ONCE = 1  # of a project
_GZIP = 31  # what zlib calls wbits


class HistoryRoutes:
    """The endpoint of one server."""

    def __init__(self, engine: Engine, reader: Reader, reads: Reads) -> None:
        self._engine = engine
        self._reader = reader
        self._reads = reads

    def routes(self) -> list[Route]:
        """Return every route."""
        return [Route("/api/1/history", self.history, methods=["POST"])]

    async def history(self, request: Request) -> Response:
        """POST /api/1/history."""
        project = request.state.project.number
        packed = "gzip" in request.headers.get("accept-encoding", "")
        with contextlib.ExitStack() as held:
            held.enter_context(self._reads.place(project, "history", _AT_ONCE))
            body = await bodies.gather(
                request, most=HISTORY_BYTES_MAX, mend="Ask for fewer ids at a time"
            )
            asked = await self._reads.run(lambda: _asked(body))
            moment = await self._engine.moment(project)
            pieces = self._lines(moment, asked)
            return _Lines(pieces, moment, self._reads, held.pop_all(), packed=packed)

    def _lines(self, moment: Moment, asked: Asked) -> Generator[bytes, None, None]:
        with contextlib.closing(self._reader.at(moment.project, moment.snapshot)) as view:
            yield from history.lines(moment, view, self._engine.duplicates, asked)


class _Lines(Response):
    """An answer on its way."""

    def __init__(
        self,
        pieces: Generator[bytes, None, None],
        moment: Moment,
        reads: Reads,
        held: contextlib.ExitStack,
        *,
        packed: bool,
    ) -> None:
        self._pieces = pieces
        self._moment = moment
        self._one = threading.Lock()  # one thread at a time may use the moment
        self._reads = reads
        self._held = held
        self._packed = packed
        self.background = None
        self.status_code = 200
        fields = {"content-type": "application/x-ndjson"}
        self.init_headers({**fields, "content-encoding": "gzip"} if packed else fields)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - as ASGI wants
        """Send it; whatever happens, the moment is let go."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for piece in self._sent():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._held.close()
            await asyncio.shield(self._reads.run(self._end))

    def _end(self) -> None:
        with self._one:  # once a piece that is being made has ended
            try:
                self._pieces.close()
            finally:
                self._moment.close()

    async def _sent(self) -> AsyncIterator[bytes]:
        coder = isal_zlib.compressobj(1, isal_zlib.DEFLATED, _GZIP) if self._packed else None

        def make() -> bytes:
            """Return the next piece; nothing but at the end."""
            with self._one:
                for piece in self._pieces:
                    made: bytes = piece if coder is None else coder.compress(piece)
                    if made:
                        return made
            return b""

        while piece := await self._reads.run(make):
            yield piece
        if coder is not None:
            yield coder.flush()


def _asked(body: bytes) -> Asked:
    asked = bodies.read_json(
        body,
        history.decode_asked,
        wrong="The body asks for no history",
        mend='Give {"device_ids": [ID], "user_ids": [ID]}',
    )
    asked.check()
    return asked
