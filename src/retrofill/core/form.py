"""The form endpoints: two or three named texts, one of them JSON, made into the same events that `/batch` takes.

`/identify` becomes `$identify` events, `/groupidentify` `$groupidentify` events, `/usermap` one event a mapping (see
`event.Batch`), the old SDKs' `POST /` their events under today's names. From there on `event.parse` knows no
difference. Fields may come in a form, a query or a JSON body, there also as JSON instead of as text of it.

Beyond the contract, as decided here: a mapping's ids may be of any length; a missing checksum is not held against the
old SDKs, a wrong one is.

Source: contract, ingest 8 and events 11.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
from msgspec import Raw, Struct

from retrofill.core import event, mend
from retrofill.core.event import Envelope, Fault, Refusal
from retrofill.core.glance import FORBIDDEN_IDS
from retrofill.limits import GROUP_PROPERTIES_MAX, STRING_CHARS_MAX

_Item = dict[str, Raw]

_encode = msgspec.json.Encoder().encode
_decode_items = msgspec.json.Decoder(list[dict[str, Raw]]).decode
_decode_keys = msgspec.json.Decoder(dict[str, Raw]).decode


class _Misfit(Exception):  # noqa: N818 - never leaves this module
    """An item that cannot be made an event: which field, what kind of fault, why."""


class Form(Struct, frozen=True):
    """What a form endpoint asks for. body: the field with the JSON; key: the field with the API key."""

    body: str
    key: str
    mapped: Callable[[_Item], dict[str, Any]]


def open_form(
    path: str, fields: Mapping[str, str], *, size_max: int | None = None
) -> Envelope | Refusal:
    """Find the key of a request to a form endpoint, and make events of it.

    path: one of FORMS. fields: decoded form or query fields, the last of equal names. size_max: as in `open_envelope`.
    """
    form = FORMS[path]
    size = sum(len(name) + len(text) for name, text in fields.items())
    if size_max is not None and size > size_max:
        return Refusal("too_large")
    api_key = fields.get(form.key, "")
    if not api_key:
        return Refusal("missing_field", form.key)
    envelope = Envelope(api_key, size, min_id_length=_id_length_min(path, fields.get("options")))
    said = fields.get(form.body, "")
    if path == "/":
        if not _checksum_fits(fields):
            return _refusing(envelope, Refusal("bad_checksum"))
        envelope.client_upload_ms = mend.time_ms(fields.get("upload_time"))
    return _filled(envelope, form, said.encode(errors="replace"))


def open_json(path: str, body: bytes, *, size_max: int | None = None) -> Envelope | Refusal:
    """Do as `open_form` with the same fields as a JSON object; a field may be text or the JSON itself."""
    if (size_max is not None and len(body) > size_max) or mend.crowded(body):
        return Refusal("too_large")
    if not body or body.isspace():
        return Refusal("missing_body")
    keys = event.read_odd(body, _decode_keys)
    if keys is None:
        return Refusal("invalid_json")
    fields: dict[str, str] = {}
    for name, raw in keys.items():
        said = mend.optional(mend.string, raw)
        fields[name] = _json_text(raw) if said is None else said
    return open_form(path, fields)


def _json_text(raw: Raw) -> str:
    text = bytes(raw).decode()
    return "" if text == "null" else text


def _refusing(envelope: Envelope, refusal: Refusal) -> Envelope:
    envelope.refusal = refusal
    return envelope


def _id_length_min(path: str, options: str | None) -> int | None:
    if path == "/usermap":
        return 0
    return event.id_length_min(
        mend.optional(mend.value, Raw((options or "null").encode(errors="replace")))
    )


def _checksum_fits(fields: Mapping[str, str]) -> bool:
    given = fields.get("checksum")
    if not given:
        return True
    signed = "".join(fields.get(name, "") for name in ("v", "client", "e", "upload_time"))
    digest = hashlib.md5(signed.encode(errors="replace"), usedforsecurity=False).hexdigest()
    return digest == given.lower()


def _filled(envelope: Envelope, form: Form, said: bytes) -> Envelope:
    """Put the events into an envelope, or what is wrong with them."""
    if mend.crowded(said):
        return _refusing(envelope, Refusal("too_large"))
    said = said.strip()
    if said[:1] == b"{":
        said = b"[" + said + b"]"
    items = event.read_odd(said, _decode_items)
    if not items:
        return _refusing(envelope, Refusal("missing_event"))
    faults: list[Fault] = []
    events = list(_mapped(items, form.mapped, faults))
    if faults:
        return _refusing(envelope, Refusal("faults", faults=tuple(faults)))
    envelope.raw = _encode(events)
    return envelope


def _mapped(
    items: Iterable[_Item], mapped: Callable[[_Item], dict[str, Any]], faults: list[Fault]
) -> Iterable[dict[str, Any]]:
    for index, item in enumerate(items):
        try:
            yield mapped(item)
        except _Misfit as misfit:
            kind, field, reason = misfit.args
            faults.append(Fault(index, field, kind, reason))


def _identify(item: _Item) -> dict[str, Any]:
    return {**item, "event_type": "$identify"}


def _group_identify(item: _Item) -> dict[str, Any]:
    group_type, value = (_text(item, field) for field in ("group_type", "group_value"))
    said = item.get("group_properties", Raw(b"null"))
    if len(mend.optional(mend.value, said) or ()) > GROUP_PROPERTIES_MAX:
        raise _Misfit("invalid", "group_properties", f"more than {GROUP_PROPERTIES_MAX} properties")
    kept: dict[str, Any] = {
        key: item[key] for key in ("library", "insert_id", "time") if key in item
    }
    return {
        **kept,
        "event_type": "$groupidentify",
        "groups": {group_type: value},
        "group_properties": said,
    }


def _alias(item: _Item) -> dict[str, Any]:
    user_id = _text(item, "user_id")
    unmap = mend.optional(mend.truth, item.get("unmap", Raw()))
    given = bool(_json_text(item.get("global_user_id", Raw())))
    if bool(unmap) == given:
        raise _Misfit("invalid", "global_user_id", "either a global_user_id or unmap is needed")
    said = {"unmap": True} if unmap else {"global_user_id": _text(item, "global_user_id")}
    return {"event_type": "$usermap", "user_id": user_id, "user_properties": said}


def _text(item: _Item, field: str) -> str:
    said = mend.optional(mend.identifier, item.get(field, Raw()))
    said = (said or "").lstrip(" ")
    if not said:
        raise _Misfit("missing", field, "absent, empty or no text")
    if len(said) > STRING_CHARS_MAX:
        raise _Misfit("invalid", field, f"longer than {STRING_CHARS_MAX:,} characters")
    if field.endswith("user_id") and said in FORBIDDEN_IDS:
        raise _Misfit("invalid", field, "stands for no id")
    return said


# Today's name of each key of the old SDKs that has another one.
_RENAMED = {"timestamp": "time", "uuid": "insert_id", "version_name": "app_version"}
_API_PROPERTIES = {"ios_idfa": "idfa", "androidADID": "adid"}


def _old_event(item: _Item) -> dict[str, Any]:
    event: dict[str, Any] = {_RENAMED.get(key, key): said for key, said in item.items()}
    event["library"] = _old_library(item.get("library", Raw(b"null")))
    said = mend.optional(mend.value, item.get("api_properties", Raw()))
    if isinstance(said, dict):
        event.update({new: said[old] for old, new in _API_PROPERTIES.items() if said.get(old)})
        place = said.get("location")
        if isinstance(place, dict):
            event.update(location_lat=place.get("lat"), location_lng=place.get("lng"))
    return event


def _old_library(raw: Raw) -> Any:  # noqa: ANN401 - JSON
    said = mend.optional(mend.value, raw)
    if not isinstance(said, dict):
        return said
    parts = (said.get("name"), said.get("version"))
    return "/".join(part for part in parts if isinstance(part, str)) or None


FORMS = {
    "/identify": Form("identification", "api_key", _identify),
    "/groupidentify": Form("identification", "api_key", _group_identify),
    "/usermap": Form("mapping", "api_key", _alias),
    "/httpapi": Form("event", "api_key", dict),
    "/": Form("e", "client", _old_event),
}
