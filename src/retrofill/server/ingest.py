"""The ingest paths: from the bytes of a request to its answer.

This is the hot way, so it does little and makes little: one look-up by path, one pass over the headers, one parse, one
hand-over to the engine. What is decided (is it good, what are the words) is
decided in `core.event` and `core.reply`.

A request leaves nothing behind unless the engine said that it is stored. Before the hand-over every failure is a 503
(certainly not stored), after it an unforeseen one is a 500 (nobody knows). A client that goes away while it sends is
forgotten; one that goes away while it waits is stored all the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol

import structlog
from msgspec import Struct

from retrofill.clock import Clock
from retrofill.config import Project
from retrofill.core import event, form, reply
from retrofill.core.event import Batch, Refusal
from retrofill.core.reply import Reply
from retrofill.core.throttle import Accepted, Silenced, Throttled
from retrofill.errors import BusyError, Error, InputError, SizeError
from retrofill.limits import MS_PER_S, QUEUE_BYTES_MAX, Limits
from retrofill.server import body as bodies
from retrofill.server import log
from retrofill.server.answer import Header
from retrofill.server.metrics import Metrics, PathFigures

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope

_logger = structlog.get_logger()


class Engine(Protocol):
    """What the server needs of an engine."""

    @property
    def figures(self) -> Any:  # noqa: ANN401 - a Struct of counters, shown by name in /metrics
        """What it has done."""

    def project(self, api_key: str) -> Project | None:
        """Return the project of an API key."""

    def all_projects(self) -> Iterable[Project]:
        """Return every project."""

    def limits(self, number: int) -> Limits:
        """Return the limits of a project."""

    def problem(self) -> str | None:
        """Say why reads and writes do not work, or None."""

    def refused(self, project: int, opened: event.Envelope) -> None:
        """Note that a request was refused before it was handed over."""

    async def start(self) -> None:
        """Begin to work."""

    async def ingest(self, batch: Batch) -> Any:  # noqa: ANN401 - Accepted, Throttled, Silenced or Refused
        """Take one request; return once it is stored, or say why not."""

    async def close(self) -> None:
        """Answer what waits, commit and seal."""


class Endpoint(Struct, frozen=True):
    """One ingest path. is_form: it takes fields instead of a JSON body."""

    path: str
    methods: tuple[str, ...]
    is_form: bool
    figures: PathFigures


# Path → the methods it has. Source: contract, ingest 1.
METHODS: dict[str, tuple[str, ...]] = {
    "/2/httpapi": ("POST",),
    "/batch": ("POST",),
    "/identify": ("POST", "GET"),
    "/groupidentify": ("POST", "GET"),
    "/usermap": ("POST", "GET"),
    "/attribution": ("POST",),
    "/httpapi": ("POST",),
    "/": ("POST",),
}

# A request that says it has no more bytes than this is within every limit: no look at the limits is needed.
_SURELY_GOOD_BYTES = 64 * 1024


class _Gone(Exception):  # noqa: N818 - no error of ours, but what a client did
    """The client went away before its request was whole."""


class Ingest:
    """The ingest paths of one server. engine: None until it is open and after it is closed."""

    def __init__(self, *, clock: Clock, metrics: Metrics) -> None:
        self.engine: Engine | None = None
        self._clock = clock
        self._metrics = metrics
        self._names: dict[int, str] = {}
        self._held_bytes = 0
        metrics.held_bytes = lambda: self._held_bytes
        self.endpoints = {
            path: Endpoint(path, methods, path not in reply.JSON_PATHS, metrics.path(path))
            for path, methods in METHODS.items()
        }
        # By the bytes of the address, for the shortest way: a POST without a query.
        self.posted = {path.encode(): endpoint for path, endpoint in self.endpoints.items()}

    async def answer(self, endpoint: Endpoint, scope: Scope, receive: Receive) -> Reply | None:
        """Say what is to be answered to one request; None if the client has gone. Raises nothing.

        scope: of ASGI, its method one of the endpoint's.
        """
        engine = self.engine
        if engine is None:
            said = reply.unavailable(path=endpoint.path)
        else:
            try:
                said = await self._take(engine, endpoint, scope, receive)
            except _Gone:
                return None
        endpoint.figures.statuses[said.status] += 1
        return said

    async def _take(
        self, engine: Engine, endpoint: Endpoint, scope: Scope, receive: Receive
    ) -> Reply:
        """Read a request, hand it over and say what became of it. Raises _Gone and nothing else."""
        held_bytes = 0
        handed_over = False
        try:
            body = await self._read(engine, endpoint.path, scope["headers"], receive)
            held_bytes = len(body)
            self._held_bytes += held_bytes
            began = time.perf_counter()
            parsed = self._parse(engine, endpoint, scope, body)
            if type(parsed) is not Batch:
                return self._refused(endpoint.path, parsed)  # type: ignore[arg-type] # no Batch
            handed_over = True
            outcome = await engine.ingest(parsed)
            return self._outcome(endpoint, parsed, outcome, time.perf_counter() - began)
        except _Gone:
            raise
        except Exception as problem:  # noqa: BLE001 - whatever it is, the client gets an answer
            return self._failed(endpoint.path, problem, handed_over=handed_over)
        finally:
            self._held_bytes -= held_bytes

    # From bytes to a batch.

    async def _read(
        self, engine: Engine, path: str, fields: list[Header], receive: Receive
    ) -> bytes:
        """Return the body, unpacked. Raises SizeError, InputError, BusyError, and _Gone."""
        declared, encoding = 0, b""
        for name, value in fields:
            if name == b"content-length":
                declared = int(value)
            elif name == b"content-encoding":
                encoding = value
        # First: what is too large will be so again, and whoever is told to wait would never halve it.
        if declared > _SURELY_GOOD_BYTES and declared > _bytes_max(engine, path):
            raise SizeError(f"The request says that it has {declared:,} bytes")
        if self._held_bytes + declared > QUEUE_BYTES_MAX:
            raise BusyError("The bodies held now are at their bound")
        message = await receive()
        if message["type"] != "http.request":
            raise _Gone
        if not message["more_body"] and not encoding:
            return message["body"]  # type: ignore[no-any-return] # bytes, says ASGI
        most = _bytes_max(engine, path)
        return await self._gather(message, receive, bodies.unpacker(encoding, most=most))

    async def _gather(self, message: Message, receive: Receive, unpacker: bodies.Plain) -> bytes:
        """Return a body that comes in pieces or is packed; while it comes, its bytes are counted as held."""
        counted = 0
        try:
            while True:
                unpacker.feed(message["body"])
                self._held_bytes += unpacker.size - counted
                counted = unpacker.size
                if self._held_bytes > QUEUE_BYTES_MAX:
                    raise BusyError("The bodies held now are at their bound")
                if not message["more_body"]:
                    return unpacker.finish()
                message = await receive()
                if message["type"] != "http.request":
                    raise _Gone
        finally:
            self._held_bytes -= counted

    def _parse(
        self, engine: Engine, endpoint: Endpoint, scope: Scope, body: bytes
    ) -> Batch | Refusal | Reply:
        """Read a request into a batch, or say why it is none."""
        path = endpoint.path
        opened = _open_form(path, scope, body) if endpoint.is_form else event.open_envelope(body)
        if isinstance(opened, Refusal):
            return opened
        project = engine.project(opened.api_key)
        if project is None:
            return Refusal("unknown_key", key=opened.api_key)
        if path == "/attribution":  # taken and not stored: docs/api.md lists it as such
            return opened.refusal or reply.ingested(Accepted(0, 0), path=path, payload_bytes=0)
        self._names[project.number] = project.name
        client = scope["client"]
        parsed = event.parse(
            opened,
            project=project.number,
            path=path,
            limits=engine.limits(project.number),
            received_ms=self._clock.now_ms(),
            remote=client[0] if client else None,
            payload_bytes=len(body),
        )
        if type(parsed) is Refusal:
            engine.refused(project.number, opened)
        return parsed

    # From an outcome to an answer.

    def _outcome(self, endpoint: Endpoint, batch: Batch, outcome: object, took_s: float) -> Reply:
        """Say what the engine said, and count it."""
        path = endpoint.path
        self._metrics.committed(took_s)
        if type(outcome) is Accepted:
            figures = endpoint.figures
            figures.events += outcome.events
            figures.payload_bytes += batch.payload_bytes
            log.batch(
                project=self._names[batch.project],
                path=path,
                events=outcome.events,
                size=batch.payload_bytes,
                ms=took_s * MS_PER_S,
            )
            return reply.ingested(outcome, path=path, payload_bytes=batch.payload_bytes)
        kind, said = _turned_away(outcome, path)
        self._note(path, kind, project=self._names[batch.project], events=len(batch.events))
        return said

    def _refused(self, path: str, refusal: Refusal | Reply) -> Reply:
        if isinstance(refusal, Reply):
            return refusal
        first = refusal.faults[0].reason if refusal.faults else refusal.field
        self._note(path, refusal.kind, reason=first)
        return reply.refused(refusal, path=path)

    def _note(self, path: str, kind: str, **more: object) -> None:
        self._metrics.refused[kind] += 1
        _logger.info("batch_refused", path=path, kind=kind, **more)

    def _failed(self, path: str, problem: Exception, *, handed_over: bool) -> Reply:
        """Answer what went wrong: in the request, in the engine, or where nobody thought of."""
        if isinstance(problem, SizeError):
            return self._refused(path, Refusal("too_large"))
        if isinstance(problem, InputError):
            return self._refused(path, Refusal("invalid_json", field=problem.what))
        if isinstance(problem, Error) and problem.status == HTTPStatus.SERVICE_UNAVAILABLE:
            self._metrics.refused["unavailable"] += 1
            _logger.info("batch_refused", path=path, kind="unavailable", reason=problem.what)
            return reply.unavailable(path=path)
        self._metrics.refused["failed"] += 1
        _logger.error("batch_failed", path=path, handed_over=handed_over, exc_info=problem)
        return reply.broken(path=path) if handed_over else reply.unavailable(path=path)


def _bytes_max(engine: Engine, path: str) -> int:
    """Return the largest body that any project takes on this path; its own limit is checked once it is known."""
    projects = engine.all_projects()
    limits = [engine.limits(project.number) for project in projects] or [Limits()]
    return max(event.bytes_max(path, one) for one in limits)


def _open_form(path: str, scope: Scope, body: bytes) -> event.Envelope | Refusal:
    """Find the fields of a form, wherever they are. A JSON body holds them all; else a form's win over the query's."""
    path = "/httpapi" if path == "/attribution" else path  # the same two fields
    if body.lstrip()[:1] == b"{":
        return form.open_json(path, body)
    fields = bodies.query(scope["query_string"])
    if body:
        kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
        fields.update(bodies.form(body, kind))
    return form.open_form(path, fields)


def _turned_away(outcome: object, path: str) -> tuple[str, Reply]:
    if type(outcome) is Throttled:
        quota = outcome.quota_devices or outcome.quota_users
        return "quota" if quota else "throttled", reply.throttled(outcome, path=path)
    if type(outcome) is Silenced:
        return "silenced", reply.silenced(outcome, path=path)
    # What is well formed and cannot be: an alias in a circle.
    return "bad_mapping", reply.refused(Refusal("bad_mapping"), path=path)
