"""Imports over HTTP: opened, listed, shown, closed, exported. Ours, not Amplitude's.

Who may read a project may do all of this: both keys, as every read. An import is scoped to its project; its rows need
nothing of this, they name their import themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import unquote

import msgspec
from msgspec import Struct
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from retrofill.clock import Clock
from retrofill.engine import imports
from retrofill.engine.effects import Effects, effects
from retrofill.engine.export import hours_of_import
from retrofill.engine.imports import Figures
from retrofill.engine.query import Reader
from retrofill.errors import InputError, MissingError
from retrofill.hot.imports import NAME
from retrofill.limits import IMPORT_BYTES_MAX, READS_PER_PROJECT
from retrofill.server import body as bodies
from retrofill.server.read import Given, Reads

if TYPE_CHECKING:
    from retrofill.engine.ingest import Engine


class _Named(Struct, frozen=True, forbid_unknown_fields=True):
    """The body that opens an import."""

    name: str


_decode = msgspec.json.Decoder(_Named).decode


class _Sent(Route):
    """A route that looks at the path as it was sent, in which a slash that belongs to the id is `%2F`."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return whether the route is meant, and with which id."""
        match, found = super().matches({**scope, "path": scope["raw_path"].decode("latin-1")})
        for name, value in found.get("path_params", {}).items():
            found["path_params"][name] = unquote(value)
        return match, found


class ImportRoutes:
    """The endpoints of imports of one server."""

    def __init__(self, engine: Engine, reader: Reader, reads: Reads, clock: Clock) -> None:
        self._engine = engine
        self._reader = reader
        self._reads = reads
        self._clock = clock

    def routes(self) -> list[Route]:
        """Return every route. The name that events carry may hold a slash, whatever those have that are opened."""
        one = "/api/1/imports/{id}"
        return [
            Route("/api/1/imports", self.list, methods=["GET"]),
            Route("/api/1/imports", self.open, methods=["POST"]),
            _Sent(f"{one}/effects", self.effects, methods=["GET"]),
            _Sent(f"{one}/restore", self.restore, methods=["POST"]),
            _Sent(f"{one}/cancel", self.cancel, methods=["POST"]),
            _Sent(f"{one}/close", self.close, methods=["POST"]),
            _Sent(f"{one}/export", self.export, methods=["GET"]),
            _Sent(one, self.show, methods=["GET"]),
            _Sent(one, self.undo, methods=["DELETE"]),
        ]

    async def list(self, request: Request) -> Response:
        """GET /api/1/imports."""
        Given(request)
        number = request.state.project.number
        return await self._answer(request, lambda: {"imports": self._figures(number)})

    async def open(self, request: Request) -> Response:
        """POST /api/1/imports: who resumes may ask again."""
        Given(request)
        number, name = request.state.project.number, await _name(request)

        def ask() -> Figures:
            imports.opened(self._engine.imports, number, name, now_ms=self._clock.now_ms())
            return self._one(number, name)

        return await self._answer(request, ask)

    async def show(self, request: Request) -> Response:
        """GET /api/1/imports/{id}."""
        number, name = _asked(request)
        return await self._answer(request, lambda: self._one(number, name))

    async def effects(self, request: Request) -> Response:
        """GET /api/1/imports/{id}/effects: what an undo will change."""
        number, name = _asked(request)

        def ask() -> Effects:
            self._one(number, name)  # 404 if there is none
            with self._reader.view(number) as view:
                return effects(view, name, self._engine.limits(number))

        return await self._answer(request, ask)

    async def close(self, request: Request) -> Response:
        """POST /api/1/imports/{id}/close."""
        number, name = _asked(request)

        def ask() -> Figures:
            one = self._one(number, name)  # nothing is closed that is not there
            imports.closed(
                self._engine.imports, number, name, rows=one.first_arrival_ms is not None
            )
            return self._one(number, name)

        return await self._answer(request, ask)

    async def undo(self, request: Request) -> Response:
        """DELETE /api/1/imports/{id}: answers when all of it is undone; again it answers the same."""
        number, name = _asked(request)
        await self._answer(request, lambda: self._one(number, name))  # 404 if there is none
        await self._engine.undo(number, name)
        return await self._answer(request, lambda: self._one(number, name))

    async def restore(self, request: Request) -> Response:
        """POST /api/1/imports/{id}/restore."""
        number, name = _asked(request)
        await self._answer(request, lambda: self._one(number, name))
        await self._engine.restore(number, name)
        return await self._answer(request, lambda: self._one(number, name))

    async def cancel(self, request: Request) -> Response:
        """POST /api/1/imports/{id}/cancel: an undo or restore that has changed nothing yet is called off."""
        number, name = _asked(request)
        # To look for its rows may be to wait for the very change, where events came late.
        if name not in await self._reads.run(lambda: self._engine.tried(number)):
            await self._answer(request, lambda: self._one(number, name))
        await self._engine.cancel(number, name)
        return await self._answer(request, lambda: self._one(number, name))

    async def export(self, request: Request) -> Response:
        """GET /api/1/imports/{id}/export."""
        (_, name), empty = _asked(request), "No events of such an import"
        if not _can_be(name):
            raise HTTPException(404, empty)
        return await self._reads.archive(request, hours_of_import(name), bytes_max=0, empty=empty)

    def _figures(self, project: int, name: str | None = None) -> Sequence[Figures]:
        known, counted = self._engine.imports, self._engine.counting.of(project)
        tried = self._engine.tried(project)
        return imports.figures(self._reader, known, counted, project, name=name, tried=tried)

    def _one(self, project: int, name: str) -> Figures:
        found = self._figures(project, name) if _can_be(name) else ()
        if not found:
            raise MissingError(
                "There is no such import",
                where=name[:64],
                mend="GET /api/1/imports lists those of the project whose keys are given",
            )
        return found[0]

    async def _answer(self, request: Request, ask: Callable[[], object]) -> Response:
        return await self._reads.answer(request, "reads", READS_PER_PROJECT, ask)


def _asked(request: Request) -> tuple[int, str]:
    """Return the project and the import. There are no parameters: one that is misunderstood must not end in an undo."""
    Given(request)
    return request.state.project.number, request.path_params["id"]


def _can_be(name: str) -> bool:
    """Say whether rows can be looked up by this name: DuckLake cuts its own statement off at a zero in a text."""
    return "\0" not in name


async def _name(request: Request) -> str:
    """Read the body that opens an import. Raises InputError, SizeError."""
    name = bodies.read_json(
        await bodies.gather(request, most=IMPORT_BYTES_MAX),
        _decode,
        wrong="The body names no import",
        mend='Give {"name": "NAME"}',
    ).name
    if not NAME.fullmatch(name):
        raise InputError(
            "name must be 1 to 64 letters, digits, dots, dashes and underscores",
            mend="Give another name",
        )
    return name
