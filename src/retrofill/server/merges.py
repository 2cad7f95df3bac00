"""Merges over HTTP: listed, those held for review too, and taken back. Ours, not Amplitude's; both keys, as every read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from retrofill.engine import guard, unmerge
from retrofill.engine.query import Reader, View
from retrofill.errors import InputError, MissingError
from retrofill.limits import MERGES_LISTED_MAX, READS_PER_PROJECT
from retrofill.server.read import Given, Reads

if TYPE_CHECKING:
    from retrofill.engine.ingest import Engine

_INT_MAX = 2**63 - 1
_DIGITS_MAX = 18


def routes(engine: Engine, reader: Reader, reads: Reads) -> list[Route]:
    """Return the routes of this module."""

    async def answer(request: Request, ask: Callable[[View, list[Any]], Any]) -> Response:
        number = request.state.project.number
        barred = engine.projects_store.barred(number)

        def asked() -> object:
            with reader.view(number) as view:
                return ask(view, barred)

        return await reads.answer(request, "reads", READS_PER_PROJECT, asked)

    async def listing(request: Request) -> Response:
        given = Given(request, "state", "amplitude_id", "user_id", "before", "limit")
        user, before = given.get("user_id"), given.get("before")
        person = given.number("amplitude_id", 0, least=0, most=_INT_MAX)
        if user and person:
            raise InputError("user_id and amplitude_id are given: give one")
        asked = unmerge.Asked(
            given.one_of("state", unmerge.STATES),
            person,
            _place(before) if before else None,
            given.number("limit", 100, least=1, most=MERGES_LISTED_MAX),
        )

        return await answer(
            request, lambda view, barred: {"merges": _listed(view, barred, asked, user)}
        )

    async def holding(request: Request) -> Response:
        most = Given(request, "limit").number("limit", 100, least=1, most=MERGES_LISTED_MAX)
        allowed = engine.settings(request.state.project.number).merge_always
        return await answer(request, lambda view, _: {"held": guard.listed(view, allowed, most)})

    async def take_back(request: Request) -> Response:
        Given(request)
        place = _place(request.path_params["id"])
        bar = await engine.unmerge(request.state.project.number, *place)
        asked = unmerge.Asked("unmerged", bar.absorbed, (bar.block, bar.row + 1), 1)
        return await answer(request, lambda view, barred: unmerge.listed(view, barred, asked)[0])

    async def restore(request: Request) -> Response:
        Given(request)
        place = _place(request.path_params["id"])
        bar = await engine.restore_merge(request.state.project.number, *place)
        asked = unmerge.Asked(before=(bar.block, bar.row + 1), limit=1)

        def ask(view: View, barred: list[Any]) -> object:
            found = unmerge.listed(view, barred, asked)
            return {"merges": [one for one in found if one.id == request.path_params["id"]]}

        return await answer(request, ask)

    return [
        Route("/api/1/merges", listing, methods=["GET"]),
        Route("/api/1/merges/held", holding, methods=["GET"]),
        Route("/api/1/merges/{id}", take_back, methods=["DELETE"]),
        Route("/api/1/merges/{id}/restore", restore, methods=["POST"]),
    ]


def _listed(
    view: View, barred: list[Any], asked: unmerge.Asked, user: str | None
) -> list[unmerge.Listed]:
    if not user:
        return unmerge.listed(view, barred, asked)
    found = [
        one
        for _, owner in view.people_of([user])
        for one in unmerge.listed(view, barred, unmerge.of(asked, owner))
    ]
    return found[: asked.limit]


def _place(text: str) -> tuple[int, int]:
    """Read the id of a merge: BLOCK-ROW."""
    parts = text.split("-")
    good = len(parts) == 2 and all(  # noqa: PLR2004 # block and row
        part.isascii() and part.isdigit() and len(part) <= _DIGITS_MAX for part in parts
    )
    if not good:
        raise MissingError("There is no such merge: an id is BLOCK-ROW", where=text[:64])
    return int(parts[0]), int(parts[1])
