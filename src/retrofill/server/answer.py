"""Answers as bytes: the headers that every answer carries, and the answers for which no request was read.

Every answer, also 4xx and 5xx, allows any origin: without it a browser's SDK cannot read `code` and tries again what
can never pass. Headers are prebuilt pairs; only the length differs from answer to answer. The words are
`core.reply`'s; those that only a server has (starting, stopping, a head too large) stand here.
"""

from __future__ import annotations

from http import HTTPStatus

import msgspec

from retrofill.core import reply
from retrofill.core.reply import Reply
from retrofill.limits import KEEP_ALIVE_S, RETRY_AFTER_S

Header = tuple[bytes, bytes]

ORIGIN: Header = (b"access-control-allow-origin", b"*")
KEEP: Header = (b"keep-alive", b"timeout=%d" % KEEP_ALIVE_S)
CONTENT_TYPES: dict[str, Header] = {
    kind: (b"content-type", kind.encode()) for kind in (reply.JSON, reply.TEXT)
}

# What a preflight may ask. amplitude-js sends `cross-origin-resource-policy`. Contract, clients 1.12.
PREFLIGHT: list[Header] = [
    ORIGIN,
    KEEP,
    (b"access-control-allow-methods", b"GET, POST, PUT, DELETE, OPTIONS"),
    (
        b"access-control-allow-headers",
        b"Content-Type, Content-Encoding, Cross-Origin-Resource-Policy, Authorization, Accept",
    ),
    (b"access-control-max-age", b"86400"),
]

_LENGTHS = [(b"content-length", b"%d" % size) for size in range(1024)]


class CutError(Exception):
    """Raised to cut a connection whose answer has begun and cannot be ended. Why is in the log already."""


def headers(said: Reply) -> list[Header]:
    """Return the headers of an answer, for ASGI."""
    size = len(said.body)
    fields = [
        ORIGIN,
        KEEP,
        CONTENT_TYPES[said.content_type],
        _LENGTHS[size] if size < len(_LENGTHS) else (b"content-length", b"%d" % size),
    ]
    if said.headers:
        fields += [(name.encode(), value.encode()) for name, value in said.headers]
    return fields


def packed(said: Reply, *, keeps: bool) -> bytes:
    """Return an answer as all of its bytes. keeps: whether the connection goes on after it."""
    head = _heads.get((said.status, said.content_type, keeps))
    if head is None:
        head = _heads[said.status, said.content_type, keeps] = _head(said, keeps=keeps)
    body = said.body
    if said.headers:
        more = b"".join(
            b"%b: %b\r\n" % (name.encode(), text.encode()) for name, text in said.headers
        )
        return b"%b%d\r\n%b\r\n%b" % (head, len(body), more, body)
    return b"%b%d\r\n\r\n%b" % (head, len(body), body)


_heads: dict[tuple[int, str, bool], bytes] = {}


def _head(said: Reply, *, keeps: bool) -> bytes:
    """Make everything before the length: the same for all answers of a status and a kind."""
    fields = (
        ORIGIN,
        KEEP if keeps else (b"connection", b"close"),
        CONTENT_TYPES[said.content_type],
    )
    lines = b"".join(b"%b: %b\r\n" % field for field in fields)
    phrase = HTTPStatus(said.status).phrase.encode()
    return b"HTTP/1.1 %d %b\r\n%bcontent-length: " % (said.status, phrase, lines)


def failure(status: int, error: str) -> Reply:
    """Make an answer with `code` and `error`, as SDKs want it. A 503 says when to come again."""
    again = (
        (("retry-after", str(RETRY_AFTER_S)),) if status == HTTPStatus.SERVICE_UNAVAILABLE else ()
    )
    body = msgspec.json.encode({"code": status, "error": error})
    return Reply(status, body, reply.JSON, again)


BAD_REQUEST = failure(400, "Invalid request")
NOT_FOUND = failure(404, "Not found")
HEAD_TOO_LARGE = failure(431, "Request header fields too large")
FAILED = reply.broken(path="/batch")
CROWDED = failure(503, "Too many connections")
STARTING = failure(503, "The server is starting")
STOPPING = failure(503, "The server is stopping")
