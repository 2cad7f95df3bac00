"""Every answer to a write, word for word as Amplitude says it.

SDKs act on these bodies: they decide by `code`, compare the start of `error`, drop exactly the listed indexes and send
the rest again. So `code` always equals the status, every index is listed, and `missing_field` is there only if the
request itself lacks something. The form endpoints answer in plain text.

A changed word or index is a bug. Source: contract, ingest 4 and 8, clients 1 and 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct

from retrofill.core.event import Fault, Refusal
from retrofill.core.throttle import Accepted, Silenced, Throttled
from retrofill.limits import KEY_CHARS_MAX, RETRY_AFTER_S

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
# All other ingest paths are form endpoints and answer in text.
JSON_PATHS = frozenset({"/2/httpapi", "/batch"})


class Reply(Struct, frozen=True):
    """One answer. headers: those beyond the content type and length, names in lower case."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


_encode = msgspec.json.Encoder().encode

_SUCCESS = Reply(200, b"success", TEXT)

# kind of refusal → status, `error`, text. `faults`, `missing_field` and `unknown_key` say more.
_REFUSALS = {
    "too_large": (413, "Payload too large", "request_too_large"),
    "missing_body": (400, "Missing request body", "missing_event"),
    "invalid_json": (400, "Invalid JSON request body", "missing_event"),
    "missing_field": (400, "Request missing required field", "missing_event"),
    "unknown_key": (400, "Invalid API key", "invalid_api_key"),
    "missing_event": (400, "Request missing required field", "missing_event"),
    "bad_checksum": (400, "Invalid field values on some events", "bad_checksum"),
    "bad_mapping": (400, "Invalid field values on some events", "invalid_mapping"),
}
_KEY_FIELDS = frozenset({"api_key", "client"})

# kind of fault → `error`; the first kind present gives it.
_FAULTS = {
    "not_object": "Invalid event JSON",
    "missing": "Request missing required field",
    "invalid": "Invalid field values on some events",
    "id_length": "Invalid id length for user_id or device_id",
}


def ingested(accepted: Accepted, *, path: str, payload_bytes: int) -> Reply:
    """Answer a request that is stored. payload_bytes: its size, unpacked."""
    if path not in JSON_PATHS:
        return _SUCCESS
    return Reply(
        200,
        b'{"code":200,"events_ingested":%d,"payload_size_bytes":%d,"server_upload_time":%d}'
        % (accepted.events, payload_bytes, accepted.server_upload_ms),
    )


def refused(refusal: Refusal, *, path: str) -> Reply:
    """Answer a request that cannot be stored, whoever sends it how often."""
    if refusal.kind == "faults":
        return _faulty(refusal.faults, path=path)
    status, error, text = _REFUSALS[refusal.kind]
    if path not in JSON_PATHS:
        lacks_key = refusal.kind == "missing_field" and refusal.field in _KEY_FIELDS
        return _text(status, "invalid_api_key" if lacks_key else text)
    if refusal.kind == "unknown_key":
        return _json(status, f"{error}: {refusal.key[:KEY_CHARS_MAX]}")
    if refusal.kind == "missing_field":
        return _json(status, error, missing_field=refusal.field)
    return _json(status, error)


def throttled(found: Throttled, *, path: str) -> Reply:
    """Answer a request over a rate or quota: nothing of it is stored, all of it may come again."""
    after = (("retry-after", str(found.retry_after_s)),)
    if path not in JSON_PATHS:
        ids = found.devices or found.users or found.quota_devices or found.quota_users
        text = "too_many_requests_for_device" if ids else "too_many_requests"
        return _text(429, text, after)
    return _json(
        429,
        "Too many requests for some devices and users",
        after,
        eps_threshold=found.eps_threshold,
        throttled_devices=found.devices,
        throttled_users=found.users,
        exceeded_daily_quota_devices=found.quota_devices,
        exceeded_daily_quota_users=found.quota_users,
        throttled_events=found.events,
    )


def silenced(found: Silenced, *, path: str) -> Reply:
    """Answer a request with events of silenced devices."""
    if path not in JSON_PATHS:
        return _text(400, "silenced_device")
    return _json(
        400,
        "Events silenced for device_id",
        eps_threshold=found.eps_threshold,
        silenced_devices=found.silenced_devices,
        silenced_events=found.silenced_events,
        throttled_devices=found.devices,
        throttled_users=found.users,
        exceeded_daily_quota_devices=found.quota_devices,
        exceeded_daily_quota_users=found.quota_users,
        throttled_events=found.events,
    )


def unavailable(*, path: str, retry_after_s: int = RETRY_AFTER_S) -> Reply:
    """Answer a request of which certainly nothing is stored, for a reason that will pass."""
    after = (("retry-after", str(retry_after_s)),)
    if path not in JSON_PATHS:
        return _text(503, "request_db_write_failed", after)
    return _json(503, "Service unavailable", after)


def broken(*, path: str) -> Reply:
    """Answer a request of which nobody knows whether it is stored."""
    if path not in JSON_PATHS:
        return _text(500, "request_db_write_failed")
    return _json(500, "Internal server error")


def stalled(*, path: str) -> Reply:
    """Answer a request whose body does not arrive."""
    return _json(408, "Request timeout") if path in JSON_PATHS else _text(408, "request_timeout")


def too_long(*, path: str) -> Reply:
    """Answer a GET whose address is too long."""
    error = "Request URI too long"
    return _json(414, error) if path in JSON_PATHS else _text(414, "request_uri_too_long")


def forbidden() -> Reply:
    """Answer whom a firewall keeps out."""
    return _json(403, "Forbidden")


def not_allowed(allow: str) -> Reply:
    """Answer a known path asked with another method. allow: the methods it has, `GET, POST`."""
    return _json(405, "Method not allowed", (("allow", allow),))


def invalid_path() -> Reply:
    """Answer a POST to a path that does not exist."""
    return _json(400, "Invalid request path")


def _faulty(faults: Iterable[Fault], *, path: str) -> Reply:
    kinds = {fault.kind for fault in faults}
    if path not in JSON_PATHS:
        fields = dict.fromkeys(fault.field for fault in faults)
        return _text(400, "invalid_event_field: " + ", ".join(fields))
    missing: dict[str, list[int]] = {}
    invalid: dict[str, list[int]] = {}
    lengths: dict[str, list[int]] = {}
    for fault in faults:
        # An older SDK reads only the first two lists, so a short id stands in both. Contract, clients 1.3.
        lists = {"missing": (missing,), "id_length": (lengths, invalid)}.get(fault.kind, (invalid,))
        for one in lists:
            one.setdefault(fault.field, []).append(fault.index)
    return _json(
        400,
        next(error for kind, error in _FAULTS.items() if kind in kinds),
        events_with_invalid_fields=invalid,
        events_with_missing_fields=missing,
        events_with_invalid_id_lengths=lengths,
    )


def _json(status: int, error: str, headers: tuple[tuple[str, str], ...] = (), **more: Any) -> Reply:  # noqa: ANN401
    return Reply(status, _encode({"code": status, "error": error, **more}), JSON, headers)


def _text(status: int, text: str, headers: tuple[tuple[str, str], ...] = ()) -> Reply:
    return Reply(status, text.encode(), TEXT, headers)
