"""What an operator sets for a project while it is served: its limits, silenced devices, and the time its properties go by.

GET /api/1/project shows them; PUT replaces them whole, and they hold from the next request on; another `property_time`
when the whole project has been folded so, which the answer waits for. Both need the keys of the project, as every read does. Not Amplitude's: there these are contracts and support requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from retrofill.engine.admission import ProjectSettings
from retrofill.limits import SETTINGS_BYTES_MAX
from retrofill.server import body as bodies

if TYPE_CHECKING:
    from retrofill.engine.ingest import Engine

_decode = msgspec.json.Decoder(ProjectSettings, strict=True).decode


def routes(engine: Engine) -> list[Route]:
    """Return the routes of this module."""

    def shown(number: int, name: str) -> Response:
        said = {
            "app": number,
            "name": name,
            "limits": engine.limits(number),
            "settings": engine.settings(number),
        }
        return Response(msgspec.json.encode(said), media_type="application/json")

    async def show(request: Request) -> Response:
        project = request.state.project
        return shown(project.number, project.name)

    async def change(request: Request) -> Response:
        project = request.state.project
        settings = bodies.read_json(
            await bodies.gather(request, most=SETTINGS_BYTES_MAX),
            _decode,
            wrong="The body is no settings of a project",
            mend='Give {"limits": {NAME: VALUE}, "silenced_devices": [ID], "property_time": TIME, "merge_always": [ID]}',
        )
        await engine.change_settings(project.number, settings)
        return shown(project.number, project.name)

    return [
        Route("/api/1/project", show, methods=["GET"]),
        Route("/api/1/project", change, methods=["PUT"]),
    ]
