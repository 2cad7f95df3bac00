"""JSON that is not quite as it should be: what may be mended is mended, what may not is said to be so.

Everything here works on bytes and on plain JSON values, knows no event, and is reached only by requests that the fast
way of `core.event` found odd. Work is bounded: the loops over tokens stop at SCAN_TOKENS_MAX, and nothing recurses
into values deeper than DEPTH_MAX.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any, TypeVar

import msgspec

from retrofill.limits import (
    BODY_CONTAINERS_MAX,
    BODY_VALUES_MAX,
    DEPTH_MAX,
    GROUP_TYPES_MAX,
    GROUP_VALUES_MAX,
    SCAN_TOKENS_MAX,
    STRING_CHARS_MAX,
    TIME_MS_MAX,
)

Json = Any  # a JSON value as decoded

_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1  # what every decoder of JSON and msgpack holds
_INT64_MAX = 2**63 - 1
_INT64_DIGITS = len(str(_INT64_MAX))  # int() itself refuses some thousand digits
_MIB = 1024 * 1024
_BOM = b"\xef\xbb\xbf"
# Where a body is cut that nests deeper than any decoder goes: still too deep for every property object in it.
_CUT_DEPTH = 64

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DIGITS = re.compile(r"-?\d{1,15}", re.ASCII)
_TEXT_OR_MISFIT = (b'"', b"[", b"{", b"n")  # text, null, and what cannot be text
_INTEGER = re.compile(rb"-?\d+")
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}"]', re.DOTALL)
_ESCAPE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a pair: a character
    rb"|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})"  # half of one
    rb"|\\.",
    re.DOTALL,
)

PLAN = frozenset({"branch", "source", "version", "versionId"})
_EXPOSED = {
    "flag_key": "[Experiment] Flag Key",
    "variant": "[Experiment] Variant",
    "experiment_key": "[Experiment] Experiment Key",
}

_CONTAINERS = {dict, list}
_T = TypeVar("_T")

_any = msgspec.json.Decoder().decode


def crowded(body: bytes) -> bool:
    """Say whether a large body holds more values than any honest one: decoding it would cost memory, not bytes."""
    return len(body) > _MIB and (
        body.count(b"{") + body.count(b"[") > BODY_CONTAINERS_MAX
        or body.count(b",") > BODY_VALUES_MAX
    )


def text(body: bytes) -> bytes | None:
    """Return the body as UTF-8 that a decoder takes: without byte order mark or half surrogates. None if it is not UTF-8."""
    body = body.removeprefix(_BOM)
    try:
        body.decode()
    except UnicodeDecodeError:
        return None
    if b"\\u" not in body:
        return body
    if body.count(b"\\") > SCAN_TOKENS_MAX:
        return None
    return _ESCAPE.sub(lambda found: rb"\ufffd" if found[1] else found[0], body)


def prune(body: bytes) -> bytes | None:
    """Replace what nests deeper than a decoder goes by `0`, so that the rest can be read. None if that cannot be done."""
    kept: list[bytes] = []
    depth = end = start = 0
    for count, token in enumerate(_TOKEN.finditer(body)):
        first = token[0]
        if count == SCAN_TOKENS_MAX or first == b'"':
            return None
        if first in b"[{":
            depth += 1
            if depth == _CUT_DEPTH:
                start = token.start()
        elif first in b"]}":
            if depth == _CUT_DEPTH:
                kept += (body[end:start], b"0")
                end = token.end()
            depth -= 1
    return b"".join((*kept, body[end:])) if depth == 0 else None


def optional(read: Callable[[msgspec.Raw], _T], raw: msgspec.Raw) -> _T | None:
    """Read a value whose absence and whose misfit mean the same."""
    try:
        return read(raw) if raw else None
    except (ValueError, RecursionError):
        return None


def value(raw: bytes | msgspec.Raw) -> Json:
    """Decode any value. Raises ValueError with the reason if it holds a number that nobody can."""
    try:
        return _any(raw)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def identifier(raw: bytes | msgspec.Raw) -> str | None:
    """Read an id: text, or a whole number as its digits, null as None. Raises ValueError for the rest."""
    data = bytes(raw)
    if data[:1] != b'"' and _INTEGER.fullmatch(data):
        return "0" if data == b"-0" else data.decode()
    found = value(data)
    if found is None or type(found) is str:
        return found
    raise ValueError("neither text nor a whole number")


def string(raw: bytes | msgspec.Raw) -> str | None:
    """Read an optional text: a number or a truth value as its own text, null as None. Raises ValueError for the rest."""
    data = bytes(raw)
    if data[:1] in _TEXT_OR_MISFIT or _INTEGER.fullmatch(data):
        return identifier(data)
    return data[:STRING_CHARS_MAX].decode()


def natural(text: str) -> int | None:
    """Read the digits of a whole number that a signed 64-bit column holds; None if they are none."""
    digits = text.lstrip("0") or text[:1]
    if not (text.isascii() and text.isdigit()) or len(digits) > _INT64_DIGITS:
        return None
    found = int(digits)
    return found if found <= _INT64_MAX else None


def integer(raw: bytes | msgspec.Raw, *, low: int, high: int) -> int | None:
    """Read a whole number within bounds, null as None. Raises ValueError for the rest."""
    found = value(raw)
    if type(found) is float and found.is_integer():
        found = int(found)
    if found is None or (type(found) is int and low <= found <= high):
        return found
    raise ValueError("no whole number within its bounds")


def number(raw: bytes | msgspec.Raw) -> float | None:
    """Read a number, null as None. Raises ValueError for the rest."""
    found = value(raw)
    if found is None:
        return None
    if type(found) is int or type(found) is float:
        return _float(found)
    raise ValueError("no number")


def truth(raw: bytes | msgspec.Raw) -> bool | None:
    """Read a truth value, also as 0, 1 or text, null as None. Raises ValueError for the rest."""
    words = {"true": True, "1": True, "false": False, "0": False, "": None}
    found = string(raw)
    if found is None:
        return None
    if found.lower() in words:
        return words[found.lower()]
    raise ValueError("no truth value")


def object_(raw: bytes | msgspec.Raw) -> dict[str, Json] | None:
    """Read an object that nests no deeper than DEPTH_MAX, null as None. Raises ValueError for the rest."""
    found = value(raw)
    if found is None:
        return None
    if type(found) is not dict:
        raise ValueError("no object")
    if too_deep(found):
        raise ValueError(f"more than {DEPTH_MAX} levels")
    return found


def too_deep(*found: Json) -> bool:
    """Say whether in one of the values more than DEPTH_MAX containers are inside one another."""
    level = [one for one in found if type(one) in _CONTAINERS]
    for _ in range(DEPTH_MAX):
        inside = chain.from_iterable(one.values() if type(one) is dict else one for one in level)
        level = [one for one in inside if type(one) in _CONTAINERS]
        if not level:
            return False
    return True


def cut(found: Json) -> Json:
    """Return a value that nests no deeper than DEPTH_MAX with its long strings cut; itself if it has none."""
    return _mapped(found, _short)


def held(found: Json) -> Json:
    """Return a value with whole numbers beyond 64 bits made floats; itself if it has none.

    Raises ValueError if one is too large for that.
    """
    return _mapped(found, _held)


def _short(leaf: Json) -> Json:
    return leaf[:STRING_CHARS_MAX] if type(leaf) is str and len(leaf) > STRING_CHARS_MAX else leaf


def _held(leaf: Json) -> Json:
    if type(leaf) is int and not _INT_MIN <= leaf <= _INT_MAX:
        return _float(leaf)
    return leaf


def _mapped(found: Json, mended: Callable[[Json], Json]) -> Json:
    if type(found) is dict:
        pairs = {name: _mapped(inner, mended) for name, inner in found.items()}
        return found if all(pairs[name] is inner for name, inner in found.items()) else pairs
    if type(found) is list:
        items = [_mapped(inner, mended) for inner in found]
        return found if all(map(operator.is_, items, found)) else items
    return mended(found)


def _float(whole: float) -> float:
    try:
        return float(whole)
    except OverflowError:
        raise ValueError("a number out of range") from None


def groups(found: Mapping[str, Json]) -> dict[str, Any]:
    """Return type → text or list of texts, within the numbers an event may have; the rest is not tracked.

    Raises ValueError for a value that cannot be one. Source: contract, events 2, `groups`.
    """
    kept: dict[str, Any] = {}
    room = GROUP_VALUES_MAX
    for group_type, said in found.items():
        several = isinstance(said, list)
        values = list(_names(said if several else [said]))[:room]
        if values and len(kept) < GROUP_TYPES_MAX:
            kept[group_type[:STRING_CHARS_MAX]] = values if several else values[0]
            room -= len(values)
    return kept


def plan(data: bytes) -> bytes:
    """Return a tracking plan with the texts that it may hold, the same bytes if that is all; nothing if it is no object.

    Source: contract, events 2, `plan`.
    """
    found = optional(_any, msgspec.Raw(data))
    if type(found) is not dict:
        return b""
    kept = {name: said for name, said in found.items() if name in PLAN and type(said) is str}
    return data if len(kept) == len(found) else msgspec.json.encode(kept)


def exposure(found: Json, sent: dict[str, Json]) -> tuple[dict[str, Json], dict[str, Json]]:
    """Return event and user properties of `[Experiment] Exposure`, from those of `$exposure`.

    Source: contract, events 3. Without a variant the user's property goes: a guess, the contract is silent.
    """
    props: dict[str, Json] = found if isinstance(found, dict) else {}
    flag, variant = props.get("flag_key"), props.get("variant")
    renamed = {_EXPOSED.get(name, name): said for name, said in props.items()}
    if type(flag) is not str or not flag:
        return renamed, sent
    operation, said = ("$unset", "-") if variant is None else ("$set", variant)
    others = sent.get(operation)
    mine = {**(others if type(others) is dict else {}), f"[Experiment] {flag}": said}
    return renamed, {**sent, operation: mine}


def _names(values: Iterable[Json]) -> Iterator[str]:
    for one in values:
        if isinstance(one, (dict, list)):
            raise ValueError("a group's value is no text")  # noqa: TRY004 - one error for all misfits
        name = one if isinstance(one, str) else msgspec.json.encode(one).decode()
        if one is not None and name:
            yield name[:STRING_CHARS_MAX]


def time_ms(said: Json) -> int | None:
    """Read a moment, ISO 8601 text or milliseconds as number or text; None if that is not possible."""
    if isinstance(said, str) and _DIGITS.fullmatch(said):
        said = int(said)
    if isinstance(said, str):
        try:
            moment = datetime.fromisoformat(said.strip())
            aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            said = (aware - _EPOCH) // timedelta(milliseconds=1)
        except (ValueError, OverflowError):
            return None
    if isinstance(said, float) and said.is_integer():
        said = int(said)
    return said if type(said) is int and 0 <= said <= TIME_MS_MAX else None
