"""A raw ASGI app that reads a body, answers as `/batch` does, and stores nothing: what HTTP alone costs here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]

_ANSWER = b'{"code":200,"events_ingested":0,"payload_size_bytes":0,"server_upload_time":0}'
_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_ANSWER))],
}


async def app(
    scope: Message,
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> None:
    """Answer one request."""
    if scope["type"] != "http":
        return
    chunks = []
    more = True
    while more:
        message = await receive()
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    b"".join(chunks)
    await send(_START)
    await send({"type": "http.response.body", "body": _ANSWER})


_counted = Counter[str]()


async def counting(
    scope: Message,
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> None:
    """The same, but count requests, and events of ours; a GET tells how many."""
    chunks: list[bytes] = []

    async def heard() -> Message:
        message = await receive()
        chunks.append(message.get("body", b""))
        return message

    if scope["type"] == "http" and scope["method"] == "GET":
        body = b'{"events":%d,"requests":%d}' % (_counted["events"], _counted["requests"])
        head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": body})
        return
    await app(scope, heard, send)
    _counted["requests"] += 1
    _counted["events"] += b"".join(chunks).count(b'"source_name":"retrofill"')
