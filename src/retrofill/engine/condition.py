"""Filters, segments and group-bys of a chart query as SQL.

A property of a row is a list of texts: one for a scalar, its elements for an array, none if it is absent, which is
written `(none)`. So an array matches by its elements and groups by each of them. User properties are those of the
row's snapshot. Whatever is not understood is refused by name, never ignored.
Source: contract, read 1 (event object, segment, operators, built-in names), properties 7 (filter values).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from retrofill.core import mend
from retrofill.engine.query import Statement
from retrofill.errors import InputError
from retrofill.limits import CHART_CONDITIONS_MAX

NONE = "(none)"
Value = str | int | float | bool

# Built-in names of the dashboard → the columns they read, the SQL over them.
_BUILT_IN: dict[str, tuple[tuple[str, ...], str]] = {
    "version": (("version_name",), "version_name"),
    "country": (("country",), "country"),
    "city": (("city",), "city"),
    "region": (("region",), "region"),
    "DMA": (("dma",), "dma"),
    "language": (("language",), "language"),
    "platform": (("platform",), "platform"),
    "os": (("os_name", "os_version"), "nullif(concat_ws(' ', os_name, os_version), '')"),
    "device": (("device_family", "device_model"), "coalesce(device_family, device_model)"),
    "device_type": (("device_type", "device_model"), "coalesce(device_type, device_model)"),
    "start_version": (("start_version",), "start_version"),
    "paying": (("paying",), "paying"),
    "carrier": (("carrier",), "carrier"),
    "library": (("library",), "library"),
    "user_id": (("user_id",), "user_id"),
    "device_id": (("device_id",), "device_id"),
}
_CUSTOM = "gp:"


class Filter(Struct, frozen=True):
    """One filter of an event object."""

    subprop_type: str
    subprop_key: str
    subprop_op: str
    subprop_value: list[Value]


class Group(Struct, frozen=True):
    """One group-by of an event object."""

    type: str
    value: str


class Wanted(Struct, frozen=True):
    """An event object: `e` of a segmentation."""

    event_type: str
    filters: list[Filter] = []
    group_by: list[Group] = []


class Segment(Struct, frozen=True):
    """One condition of a segment: a user property."""

    prop: str
    op: str
    values: list[Value]


class Sql(Struct, frozen=True):
    """An expression and the columns of table `events` that it reads."""

    text: str
    needs: frozenset[str]


def event_of(text: str) -> Wanted:
    """Read an event object. Raises InputError if it is none, or holds a key that we do not know."""
    return _strictly(text, Wanted, "e")


def segments_of(texts: list[str]) -> list[list[Segment]]:
    """Read segments: each text is one, a JSON array of conditions, or a JSON array of such arrays.

    None at all is one segment without conditions: all users. Raises InputError.
    """
    found: list[list[Segment]] = []
    for text in texts:
        value = _json(text, "s")
        lists = (
            value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
        )
        found += [_convert(one, list[Segment], "s") for one in lists]
    if sum(map(len, found), len(found)) > CHART_CONDITIONS_MAX:
        raise InputError(f"s has more than {CHART_CONDITIONS_MAX} segments and conditions")
    return found or [[]]


def _json(text: str, name: str) -> Any:
    try:
        return mend.value(text.encode())
    except ValueError as problem:
        raise InputError(f"{name} is no JSON: {problem}") from problem


def _strictly(text: str, kind: type[Wanted], name: str) -> Wanted:
    value = _json(text, name)
    if not isinstance(value, dict):
        raise InputError(f"{name} must be a JSON object with event_type")
    _known_keys(value, kind, name)
    found: Wanted = _convert(value, kind, name)
    for each in value.get("filters", ()):
        _known_keys(each, Filter, f"{name}.filters")
    for each in value.get("group_by", ()):
        _known_keys(each, Group, f"{name}.group_by")
    if len(found.filters) > CHART_CONDITIONS_MAX:
        raise InputError(f"{name} has more than {CHART_CONDITIONS_MAX} filters")
    return found


def _convert(value: Any, kind: Any, name: str) -> Any:
    if kind == list[Segment] and isinstance(value, list):
        for each in value:
            _known_keys(each, Segment, name)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as problem:
        raise InputError(f"{name} is not understood: {problem}") from problem


def _known_keys(value: Any, kind: Any, name: str) -> None:
    if isinstance(value, dict):
        unknown = value.keys() - set(kind.__struct_fields__)
        if unknown:
            raise InputError(
                f"{name} has keys that are not supported: {', '.join(sorted(unknown))}"
            )


def filters(wanted: list[Filter], statement: Statement) -> Sql:
    """Return the condition that all filters hold."""
    return _all(
        [
            _compare(
                property_(one.subprop_type, one.subprop_key, statement),
                one.subprop_op,
                one.subprop_value,
                statement,
            )
            for one in wanted
        ]
    )


def segment(conditions: list[Segment], statement: Statement) -> Sql:
    """Return the condition that a row's user is in the segment, by the row's snapshot."""
    return _all(
        [
            _compare(property_("user", one.prop, statement), one.op, one.values, statement)
            for one in conditions
        ]
    )


def both(*conditions: Sql) -> Sql:
    """Return the condition that all of these hold."""
    return _all(list(conditions))


def _all(conditions: list[Sql]) -> Sql:
    text = " AND ".join(f"({one.text})" for one in conditions) or "true"
    return Sql(text, frozenset().union(*(one.needs for one in conditions)))


def property_(kind: str, key: str, statement: Statement) -> Sql:
    """Return a property's values on a row, VARCHAR[], empty if absent. Raises InputError if it is not known."""
    if kind == "event":
        return _of_json("event_properties", key, statement)
    if kind != "user":
        raise InputError(f"Property type {kind!r} is not supported: give 'event' or 'user'")
    if key.startswith(_CUSTOM):
        return _of_json("user_properties", key.removeprefix(_CUSTOM), statement)
    if key not in _BUILT_IN:
        names = ", ".join(_BUILT_IN)
        raise InputError(
            f"User property {key!r} is not known: custom ones are written gp:<name>, built in are {names}"
        )
    needs, column = _BUILT_IN[key]
    return Sql(
        f"CASE WHEN {column} IS NULL THEN []::VARCHAR[] ELSE [{column}] END", frozenset(needs)
    )


def _of_json(column: str, key: str, statement: Statement) -> Sql:
    # A JSON pointer has two characters to escape; a path would have more, and wildcards.
    at = statement.bind("/" + key.replace("~", "~0").replace("/", "~1"))
    texts = (
        f"CASE json_type({column}, {at}) WHEN 'ARRAY' "
        f"THEN json_extract_string(json_extract({column}, {at}), '$[*]') "
        f"ELSE [json_extract_string({column}, {at})] END"
    )
    return Sql(f"list_filter({texts}, lambda one: one IS NOT NULL)", frozenset({column}))


def group(values: Sql) -> Sql:
    """Return the distinct values to group by, `(none)` if there are none."""
    return Sql(
        f"CASE WHEN len({values.text}) = 0 THEN ['{NONE}'] ELSE list_distinct({values.text}) END",
        values.needs,
    )


def number(values: Sql) -> Sql:
    """Return a property's first value as a number, NULL if it is none."""
    return Sql(f"TRY_CAST(({values.text})[1] AS DOUBLE)", values.needs)


def _compare(found: Sql, operator: str, values: list[Value], statement: Statement) -> Sql:
    if operator not in _OPERATORS:
        names = ", ".join(_OPERATORS)
        raise InputError(f"Operator {operator!r} is not supported: give one of {names}")
    if not values or len(values) > CHART_CONDITIONS_MAX:
        raise InputError(
            f"{operator!r} needs 1 to {CHART_CONDITIONS_MAX} values, found {len(values)}"
        )
    return Sql(
        _OPERATORS[operator](found.text, [_text(one) for one in values], statement), found.needs
    )


def _text(value: Value) -> str:
    """Write a value as DuckDB extracts it from JSON."""
    if isinstance(value, str):
        return value
    return msgspec.json.encode(value).decode()


def _is(found: str, values: list[str], statement: Statement) -> str:
    present = [one for one in values if one != NONE]
    text = f"list_has_any({found}, {statement.bind(present)}::VARCHAR[])"
    return text if len(present) == len(values) else f"({text} OR len({found}) = 0)"


def _contains(found: str, values: list[str], statement: Statement) -> str:
    some = (
        f"len(list_filter({found}, lambda one: contains(one, {statement.bind(value)}))) > 0"
        for value in values
    )
    return f"({' OR '.join(some)})"


def _set_is(found: str, values: list[str], statement: Statement) -> str:
    wanted = sorted(set(values) - {NONE})
    return f"list_sort(list_distinct({found})) = {statement.bind(wanted)}::VARCHAR[]"


def _ordered(sign: str) -> Callable[[str, list[str], Statement], str]:
    def compare(found: str, values: list[str], statement: Statement) -> str:
        """Numbers compare as numbers; anything else, such as a date, as text. Source: contract, events 4."""
        some = []
        for value in values:
            as_number = _number(value)
            if as_number is None:
                one = f"one {sign} {statement.bind(value)}"
            else:
                one = f"TRY_CAST(one AS DOUBLE) {sign} {statement.bind(as_number)}"
            some.append(f"len(list_filter({found}, lambda one: {one})) > 0")
        return f"({' OR '.join(some)})"

    return compare


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _not(
    compare: Callable[[str, list[str], Statement], str],
) -> Callable[[str, list[str], Statement], str]:
    return lambda found, values, statement: f"NOT {compare(found, values, statement)}"


_OPERATORS: dict[str, Callable[[str, list[str], Statement], str]] = {
    "is": _is,
    "is not": _not(_is),
    "contains": _contains,
    "does not contain": _not(_contains),
    "less": _ordered("<"),
    "less or equal": _ordered("<="),
    "greater": _ordered(">"),
    "greater or equal": _ordered(">="),
    "set is": _set_is,
    "set is not": _not(_set_is),
}
