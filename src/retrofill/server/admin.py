"""What operators ask: is it well (/healthz), what has it done (/metrics), what does it answer (/openapi.json)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
from prometheus_client.exposition import choose_encoder
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from retrofill import __version__
from retrofill.server.ingest import Engine
from retrofill.server.metrics import Metrics
from retrofill.server.openapi import description

# Answered by themselves also while the engine is not open.
ALWAYS = frozenset({"/healthz", "/metrics", "/openapi.json"})


def routes(engine_of: Callable[[], Engine | None], shown: Metrics) -> list[Route]:
    """Return the routes of this module. engine_of: returns None while the engine is not open."""
    openapi = msgspec.json.encode(description())

    async def healthz(_: Request) -> Response:
        engine = engine_of()
        reason = "starting or stopping" if engine is None else engine.problem()
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
        body = await run_in_threadpool(encode, shown.registry)
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
