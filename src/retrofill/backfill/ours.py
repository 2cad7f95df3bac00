"""Asking our own server what only Retrofill can be asked.

A server that its /healthz does not name as ours is never sent the keys.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from typing import TypeVar

import msgspec
from msgspec import Struct

from retrofill.backfill.keys import Keys
from retrofill.backfill.profile import Target, names_retrofill
from retrofill.errors import FinalError, InputError, RetryError

_SAID_BYTES = 2000

T = TypeVar("T")


def need(to: Target, what: str, *, mend: str = "") -> None:
    """Raise InputError unless the destination says that it is Retrofill. what: only that can do it."""
    if not (to.ours and names_retrofill(to.read)):
        raise InputError(
            f"{to.name} does not say that it is a Retrofill server: only that can {what}",
            where=f"{to.read}/healthz" if to.ours else "",
            mend=f"Check the address and that it is up{mend}",
        )


def ask(
    to: Target,
    keys: Keys,
    method: str,
    path: str,
    kind: type[T],
    *,
    seconds: float,
    body: bytes | None = None,
    may_miss: bool = True,
) -> T | None:
    """Return what our server answers, None if a GET finds nothing. Raises InputError for a 400, FinalError, RetryError.

    seconds: how long it may take. body: JSON. may_miss: false if a GET that finds nothing is an error.
    """
    url = f"{to.read}{path}"
    request = urllib.request.Request(  # noqa: S310 - http or https: `target` checked it
        url,
        body,
        {"Content-Type": "application/json"},
        method=method,
    )
    keys.sign(request)
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:  # noqa: S310 - the same
            return msgspec.json.decode(answer.read(), type=kind)
    except urllib.error.HTTPError as refused:
        with refused:
            said, mend = _said(refused.read(_SAID_BYTES))
        if refused.code == 404 and method == "GET" and may_miss:
            return None
        if refused.code in {401, 403}:
            raise FinalError(
                f"The destination does not accept the keys: {refused.code} {said}",
                where=url,
                mend="Check the keys; both are needed",
            ) from refused
        if refused.code in {400, 404, 405, 409, 413}:
            kind_of = InputError if refused.code == 400 else FinalError  # asked wrongly: exit 2
            raise kind_of(said or f"Refused with {refused.code}", where=url, mend=mend) from refused
        problem: object = f"{refused.code} {said}"
    except (OSError, http.client.HTTPException, ValueError) as failed:
        problem = failed
    raise RetryError(
        f"The destination did not answer: {problem}",
        where=url,
        mend="Run the same line again: what the server had begun it ends by itself",
    )


class _Metadata(Struct, frozen=True):
    details: str = ""


class _Message(Struct):
    message: str
    metadata: _Metadata = _Metadata()


class _Error(Struct):
    error: _Message


def _said(body: bytes) -> tuple[str, str]:
    """Return the sentence of an error and how to mend it, or the body as it is."""
    try:
        error = msgspec.json.decode(body, type=_Error).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body.decode("utf-8", "replace").strip(), ""
    return error.message, error.metadata.details
