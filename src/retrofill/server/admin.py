"""What operators ask: is it well (/healthz), what has it done (/metrics), what does it answer (/openapi.json)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec
from prometheus_client.exposition import choose_encoder
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from retrofill import __version__
from retrofill.server.openapi import description

if TYPE_CHECKING:
    from retrofill.server.app import App
    from retrofill.server.ingest import Engine

# Answered by themselves also while the engine is not open.
ALWAYS = frozenset({"/healthz", "/metrics", "/openapi.json"})


def routes(app: App) -> list[Route]:
    """Return the routes of this module. app: whose health and figures."""
    openapi = msgspec.json.encode(description())

    async def healthz(_: Request) -> Response:
        reason = "starting or stopping" if app.engine is None else app.engine.problem()
        said = {"status": "ok" if reason is None else "unavailable", "service": "retrofill"}
        said["version"] = __version__
        if reason is not None:
            said["reason"] = reason
        return Response(
            msgspec.json.encode(said),
            200 if reason is None else 503,
            {"cache-control": "no-store"},
            media_type="application/json",
        )

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        body = await run_in_threadpool(encode, app.metrics.registry)
        return Response(body, headers={"content-type": content_type})

    async def openapi_json(_: Request) -> Response:
        return Response(openapi, media_type="application/json")

    return [
        Route("/healthz", healthz),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi_json),
    ]


def figures(engine: Engine) -> Mapping[str, float]:
    """Return what the engine counts, by name."""
    counted = msgspec.to_builtins(engine.figures)
    return {name: value for name, value in counted.items() if isinstance(value, int | float)}
