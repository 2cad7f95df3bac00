"""GET /api/1/why: the events, imports, requests and rules that made a value. Ours, not Amplitude's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from retrofill.engine.query import Reader
from retrofill.engine.why import Answer, Question, why
from retrofill.limits import PERSON_READS_PER_PROJECT
from retrofill.server.read import Given, Reads

if TYPE_CHECKING:
    from retrofill.engine.ingest import Engine

_INT_MAX = 2**63 - 1
_NUMBERS = ("merge", "amplitude_id")


def routes(engine: Engine, reader: Reader, reads: Reads) -> list[Route]:
    """Return the routes of this module."""

    async def ask(request: Request) -> Response:
        question = _question(request)
        number = request.state.project.number

        def answer() -> Answer:
            with reader.view(number) as view:  # a change of both may have ended while it was opened
                by_time = engine.settings(number).property_time == "event"
                barred = engine.state.project(number).barred
                return why(view, question, by_time=by_time, barred=barred)

        return await reads.answer(request, "people", PERSON_READS_PER_PROJECT, answer)

    return [Route("/api/1/why", ask)]


def _question(request: Request) -> Question:
    names = Question.__struct_fields__
    given = Given(request, *names)
    said: dict[str, Any] = {name: given.get(name) or "" for name in names}
    for name in _NUMBERS:
        said[name] = given.number(name, 0, least=0, most=_INT_MAX)
    said["first_seen"] = given.one_of("first_seen", ("false", "true")) == "true"
    return msgspec.convert(said, Question)
