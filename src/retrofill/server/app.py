"""The whole of a server's HTTP as one ASGI application.

Ingest paths are looked up first (a `Connection` even does so by itself, without ASGI's messages between); all others
go through here to Starlette.
Until the engine is open every path is answered 503, so that a client which tries again during a restart loses nothing.
Reads under /api need both keys of a project; the route finds it as `request.state.project`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route

from retrofill.clock import Clock
from retrofill.config import Project
from retrofill.core import reply
from retrofill.core.reply import Reply
from retrofill.errors import Error
from retrofill.limits import RETRY_AFTER_S
from retrofill.server import admin, auth
from retrofill.server.answer import (
    FAILED,
    KEEP,
    NOT_FOUND,
    ORIGIN,
    PREFLIGHT,
    STARTING,
    STOPPING,
    CutError,
    failure,
    headers,
)
from retrofill.server.connection import CYCLE
from retrofill.server.ingest import Engine, Ingest
from retrofill.server.metrics import Metrics

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.get_logger()


class _GoneError(OSError):
    """The client has gone."""


class App:
    """The application. It answers 503 until `open` and after `close`."""

    def __init__(self, *, clock: Clock) -> None:
        self.metrics = Metrics()
        self.ingest = Ingest(clock=clock, metrics=self.metrics)
        self.engine: Engine | None = None
        self._closed = STARTING
        self._behind: ASGIApp = self._starlette([])

    def open(self, engine: Engine, routes: Sequence[BaseRoute]) -> None:
        """Answer with this engine from now on. routes: those of the read APIs."""
        self.engine = engine
        self.metrics.engine = lambda: admin.figures(engine)
        self._behind = self._starlette(routes)
        self.ingest.engine = engine

    def close(self) -> None:
        """Answer 503 from now on."""
        self._closed = STOPPING
        self.engine = self.ingest.engine = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        endpoint = self.ingest.endpoints.get(scope["path"])
        if endpoint is not None and scope["method"] in endpoint.methods:
            said = await self.ingest.answer(endpoint, scope, receive)
            if said is not None:
                await answer(send, said)
        elif scope["method"] == "OPTIONS":
            await send({"type": "http.response.start", "status": 204, "headers": PREFLIGHT})
            await send({"type": "http.response.body"})
        elif endpoint is not None:
            await answer(send, reply.not_allowed(", ".join((*endpoint.methods, "OPTIONS"))))
        elif self.engine is None and scope["path"] not in admin.ALWAYS:
            await answer(send, self._closed)
        else:
            await self._guard(scope, receive, send)

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call Starlette; every answer allows any origin, and what fails is logged once.

        Sending to a client that has gone raises, so that nothing long is made for nobody.
        """
        started = False
        cycle = scope.get("extensions", {}).get(CYCLE)

        async def sending(message: Message) -> None:
            nonlocal started
            if cycle is not None and (cycle.disconnected or cycle.transport.is_closing()):
                raise _GoneError
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [ORIGIN, KEEP, *message.get("headers", ())]
            await send(message)

        scope["app"] = self._application
        try:
            await self._behind(scope, receive, sending)
        except (_GoneError, ClientDisconnect):
            log.debug("client_gone", path=scope["path"])
        except Exception as problem:
            log.exception("request_failed", path=scope["path"], method=scope["method"])
            if started:  # half an answer must not look whole: the connection is cut
                raise CutError from problem
            await answer(send, FAILED)

    def _starlette(self, routes: Sequence[BaseRoute]) -> ASGIApp:
        for route in routes:
            if isinstance(route, Route) and route.path.startswith("/api/"):
                route.app = _Keys(route.app, self)
        self._application = application = Starlette(
            routes=[*admin.routes(lambda: self.engine, self.metrics), *routes],
            exception_handlers={HTTPException: _http_problem, Error: _problem},
        )
        application.router.redirect_slashes = False
        # Without its outermost layer, whose 500 is plain text: `_guard` answers instead.
        stack = application.build_middleware_stack()
        return stack.app  # type: ignore[attr-defined, no-any-return] # ServerErrorMiddleware's

    def projects(self) -> Iterable[Project]:
        """Return every project, none before the engine is open."""
        return self.engine.all_projects() if self.engine is not None else ()


class _Keys:
    """Lets requests to a route pass with the keys of a project alone. It is in `request.state.project` then."""

    def __init__(self, app: ASGIApp, of: App) -> None:
        self._app = app
        self._of = of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        project = auth.basic(given.decode("latin-1"), self._of.projects())
        if project is None:
            refused = api_problem(401, "unauthorized", "Invalid API key or secret key")
            refused.headers["www-authenticate"] = 'Basic realm="retrofill"'
            await refused(scope, receive, send)
            return
        scope.setdefault("state", {})["project"] = project
        await self._app(scope, receive, send)


async def answer(send: Send, said: Reply) -> None:
    """Send an answer whose words are known."""
    await send({"type": "http.response.start", "status": said.status, "headers": headers(said)})
    await send({"type": "http.response.body", "body": said.body})


def api_problem(status: int, kind: str, message: str, *, details: str = "") -> Response:
    """Make the error body of the read APIs. details: how to mend it. Source: contract, read 1."""
    metadata = {"details": details} if details else {}
    error = {"http_code": status, "type": kind, "message": message, "metadata": metadata}
    return Response(msgspec.json.encode({"error": error}), status, media_type=reply.JSON)


def _http_problem(request: Request, problem: Exception) -> Response:
    """What Starlette itself refuses (unknown paths, other methods), and readers in its words."""
    assert isinstance(problem, HTTPException)
    status = problem.status_code
    if status == HTTPStatus.NOT_FOUND and request.method == "POST":
        said = reply.invalid_path()
    elif status == HTTPStatus.METHOD_NOT_ALLOWED:
        said = reply.not_allowed(", ".join(sorted(_methods(request))))
    elif request.url.path.startswith("/api/"):
        return api_problem(status, "invalid", problem.detail)
    else:
        said = NOT_FOUND if status == HTTPStatus.NOT_FOUND else failure(status, problem.detail)
    return Response(said.body, said.status, dict(said.headers), media_type=said.content_type)


def _methods(request: Request) -> set[str]:
    """Return the methods of every route that this path has."""
    routes = (route for route in request.app.routes if isinstance(route, Route))
    known = (route for route in routes if route.matches(request.scope)[0] is not Match.NONE)
    return {method for route in known for method in route.methods or ()} | {"OPTIONS"}


def _problem(request: Request, problem: Exception) -> Response:
    """What a reader raises on purpose."""
    assert isinstance(problem, Error)
    log.info("read_refused", path=request.url.path, status=problem.status, reason=str(problem))
    kind = "invalid" if problem.status < HTTPStatus.INTERNAL_SERVER_ERROR else "unavailable"
    said = api_problem(problem.status, kind, problem.what, details=problem.mend)
    if problem.status == HTTPStatus.SERVICE_UNAVAILABLE:
        said.headers["retry-after"] = str(RETRY_AFTER_S)
    return said
