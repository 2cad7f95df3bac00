"""A mapping: how the rows of a source become events, as a value, and the SQL that it means.

A mapping names for each field of an event an expression in DuckDB's SQL over the source's columns. Here the YAML
document becomes a checked `Mapping`, and later, once somebody has found out what type each expression has, the text of
the SQL that turns it into the piece of JSON the wire wants. Nothing here runs SQL or reads a file.

A piece of JSON that is NULL is left out of its object, an object without pieces is left out of the event. So absent and
null mean the same, as the contract says. What does not fit its field raises an error inside the SQL, never a wrong value.
Source of the fields: contract, "Event keys"; of the form: docs/mapping.md.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from typing import Final, Literal, TypeAlias

import msgspec
from msgspec import Struct

from retrofill.core.sql import literal
from retrofill.errors import InputError

Kind: TypeAlias = Literal["text", "integer", "number", "millis", "object", "flag", "value"]

_TEXTS = """event_type user_id device_id insert_id platform os_name os_version device_brand device_manufacturer
device_model carrier country region city dma language app_version version_name ip library start_version paying user_agent
productId revenueType currency idfa adid idfv android_id android_app_set_id partner_id receipt receiptSig"""

# What each field of an event holds. A path below one of the objects is a `value`: any JSON.
TARGETS: Final[dict[str, Kind]] = {
    **dict.fromkeys(_TEXTS.split(), "text"),
    "time": "millis",
    "session_id": "millis",
    "event_id": "integer",
    "quantity": "integer",
    **dict.fromkeys(("price", "revenue", "location_lat", "location_lng"), "number"),
    **dict.fromkeys(
        ("event_properties", "user_properties", "groups", "group_properties", "plan"), "object"
    ),
    "$skip_user_properties_sync": "flag",
}
FORMATS: Final = ("ndjson", "json", "csv", "tsv", "parquet", "amplitude-export")
REQUIRED: Final = ("event_type", "time")
DEPTH_MAX: Final = 8  # nested blocks of a mapping; deeper objects come whole from a column


class Field(Struct, frozen=True):
    """One line of a mapping. path: where the value goes, outermost first. expression: DuckDB SQL."""

    path: tuple[str, ...]
    expression: str

    @property
    def name(self) -> str:
        """The field as a person writes it: `event_properties.path`."""
        return ".".join(self.path)

    @property
    def kind(self) -> Kind:
        """What the wire wants here."""
        return TARGETS[self.path[0]] if len(self.path) == 1 else "value"


class Mapping(Struct, frozen=True):
    """How rows become events.

    fields: in the order written. where: rows for which it is not true are no history. each: the list whose elements become
    an event each, where a row is more than one.
    columns: columns that a source may have or lack, by dotted name, each with its DuckDB type.
    format, delimiter: of the source, where its name does not say it.
    """

    fields: tuple[Field, ...]
    where: str | None = None
    each: str | None = None
    format: str | None = None
    delimiter: str | None = None
    columns: dict[str, str] = {}

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that change when the mapping does."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:32]


def parse(document: object) -> Mapping:
    """Check a mapping's document, as YAML or JSON gives it.

    Raises InputError naming the field: unknown, without an expression, missing, or of the wrong shape.
    """
    top = _table(document, "the mapping")
    _known(top, {"source", "where", "each", "event"}, "the mapping")
    source = _table(top.get("source") or {}, "source")
    _known(source, {"format", "delimiter", "columns"}, "source")
    chosen = _text_or_none(source.get("format"), "source.format")
    if chosen is not None and chosen not in FORMATS:
        raise InputError(
            f"The source format {chosen!r} is unknown", mend=f"Take one of {', '.join(FORMATS)}"
        )
    fields = tuple(_fields(_table(top.get("event"), "event"), ()))
    missing = [name for name in REQUIRED if not any(field.path == (name,) for field in fields)]
    if not any(field.path[0] in {"user_id", "device_id"} for field in fields):
        missing.append("user_id or device_id")
    if missing:
        raise InputError(
            f"The mapping says nothing of {', '.join(missing)}",
            mend="Each event needs a type, a time, and a user_id or a device_id",
        )
    delimiter = _text_or_none(source.get("delimiter"), "source.delimiter", blank=True)
    if delimiter is not None and len(delimiter) != 1:
        raise InputError("source.delimiter is not one character")
    columns = _table(source.get("columns") or {}, "source.columns")
    return Mapping(
        fields=fields,
        where=_text_or_none(top.get("where"), "where"),
        each=_text_or_none(top.get("each"), "each"),
        format=chosen,
        delimiter=delimiter,
        columns={name: str(kind) for name, kind in columns.items()},
    )


def _fields(block: dict[str, object], above: tuple[str, ...]) -> Iterator[Field]:
    for key, value in block.items():
        path = (*above, key)
        if not above:
            _target(key)
        if isinstance(value, dict):
            if TARGETS[path[0]] != "object" or len(path) > DEPTH_MAX:
                raise InputError(f"The field {'.'.join(path)} takes one expression, not a block")
            yield from _fields(_table(value, ".".join(path)), path)
        else:
            yield Field(path, _expression(value, ".".join(path)))


def _target(key: str) -> None:
    if key == "ingestion_metadata":
        raise InputError(
            "The field ingestion_metadata carries the import id and cannot be mapped",
            mend="Keep the source's value in an event property",
        )
    if key not in TARGETS:
        near = difflib.get_close_matches(key, TARGETS, n=1)
        raise InputError(
            f"An event has no field {key!r}",
            mend=f"Did you mean {near[0]}?" if near else "Other values go below event_properties",
        )


def _expression(value: object, name: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, int | float):
        return repr(value)
    raise InputError(
        f"The field {name} has no expression", mend="Give it one in SQL, or take the line out"
    )


def _table(value: object, name: str) -> dict[str, object]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{name[0].upper()}{name[1:]} is not a block of names with values")
    return value


def _known(block: dict[str, object], names: set[str], where: str) -> None:
    unknown = sorted(block.keys() - names)
    if unknown:
        raise InputError(
            f"{where[0].upper()}{where[1:]} has no key {unknown[0]!r}",
            mend=f"Known here: {', '.join(sorted(names))}",
        )


def _text_or_none(value: object, name: str, *, blank: bool = False) -> str | None:
    if value is None or (isinstance(value, str) and (blank or value.strip())):
        return value
    raise InputError(f"{name} is not a text")


def unquote(json: str) -> str:
    """Return SQL for the plain text of a JSON value: a string's characters, anything else as written."""
    return (
        f"CASE WHEN starts_with({json}, '\"') THEN CASE WHEN contains({json}, '\\') "
        f"THEN json_extract_string({json}, '$') ELSE {json}[2:-2] END ELSE {json} END"
    )


def piece(  # noqa: PLR0911  # one for each kind of field
    kind: Kind, value: str, *, type_name: str
) -> str:
    """Return SQL for the JSON text that a field sends, NULL where nothing is sent.

    value: SQL of the expression. type_name: its DuckDB type. The SQL raises where the value does not fit.
    """
    if kind == "millis":
        return f"CAST({millis(value, type_name=type_name)} AS VARCHAR)"
    if type_name == "JSON" and kind not in {"object", "value"}:
        value, type_name = unquote(f"nullif(CAST({value} AS VARCHAR), 'null')"), "VARCHAR"
    if kind == "text":
        return f"CAST(to_json(CAST({value} AS VARCHAR)) AS VARCHAR)"
    if kind == "integer":
        return f"CAST(CAST({_floored(value, type_name)} AS BIGINT) AS VARCHAR)"
    if kind == "number":
        return _finite(f"CAST({value} AS DOUBLE)")
    if kind == "flag":
        return f"CAST(CAST({value} AS BOOLEAN) AS VARCHAR)"
    if kind == "object":
        return json_object(_json(value, type_name))
    if type_name in {"DOUBLE", "FLOAT"}:
        return _finite(value)
    return f"nullif({_json(value, type_name)}, 'null')"


def _finite(number: str) -> str:
    """Return SQL for the JSON of a number, which raises for those that JSON has not, as a division by 0 gives them."""
    json = f"CAST(to_json({number}) AS VARCHAR)"
    return f"CASE WHEN isfinite({number}) THEN {json} ELSE CAST(CAST(CAST({number} AS VARCHAR) AS BIGINT) AS VARCHAR) END"


def json_object(json: str) -> str:
    """Return SQL that passes the text of a JSON object and raises for other JSON."""
    # error() would say it better, but is volatile, and such cannot be tried.
    return (
        f"CASE WHEN {json} IS NULL OR {json} IN ('null', '{{}}') THEN NULL WHEN starts_with({json}, '{{') "
        f"THEN {json} ELSE CAST(CAST({json} || ' is no object' AS BIGINT) AS VARCHAR) END"
    )


def _json(value: str, type_name: str) -> str:
    if type_name == "JSON":
        return f"CAST({value} AS VARCHAR)"
    if type_name == "VARCHAR":  # a column of CSV or SQL may hold an object as text
        parsed = f"CAST(CAST({value} AS JSON) AS VARCHAR)"
        return f"CASE WHEN starts_with({value}, '{{') AND json_valid({value}) THEN {parsed} ELSE CAST(to_json({value}) AS VARCHAR) END"
    return f"CAST(to_json({value}) AS VARCHAR)"


def _floored(value: str, type_name: str) -> str:
    return f"floor({value})" if _fractional(type_name) else value


def _fractional(type_name: str) -> bool:
    return type_name.startswith(("DECIMAL", "FLOAT", "DOUBLE", "REAL"))


def millis(value: str, *, type_name: str) -> str:
    """Return SQL for milliseconds since the epoch as BIGINT.

    A number is milliseconds already, its fraction is cut down. A TIMESTAMP without zone is UTC. A text is a number or
    ISO 8601, in UTC unless it names its offset.
    """
    if type_name.startswith(("TIMESTAMP", "DATE")):
        return f"epoch_ms({value})"
    if type_name in {"VARCHAR", "JSON"}:
        text = (
            value
            if type_name == "VARCHAR"
            else unquote(f"nullif(CAST({value} AS VARCHAR), 'null')")
        )
        return (
            f"CASE WHEN regexp_full_match({text}, '-?[0-9]+') THEN CAST({text} AS BIGINT) "
            f"WHEN regexp_full_match({text}, '-?[0-9]+[.eE][0-9.eE+-]+') "
            f"THEN CAST(floor(CAST({text} AS DOUBLE)) AS BIGINT) "
            f"ELSE epoch_ms(CAST({text} AS TIMESTAMPTZ)) END"
        )
    return f"CAST({_floored(value, type_name)} AS BIGINT)"


class Pieces(Struct, frozen=True):
    """Pieces of JSON by name, to be joined to one object: SQL of a value, or more Pieces."""

    members: dict[str, str | Pieces]

    def sql(self) -> str:
        """Return SQL for the object's text, NULL if it has no member."""
        joined = ", ".join(
            f"{_key(name, ',')} || {_piece(sql)}" for name, sql in self.members.items()
        )
        there = ", ".join(self.values())
        return f"CASE WHEN coalesce({there}) IS NOT NULL THEN '{{' || substr(concat({joined}), 2) || '}}' END"

    def values(self) -> Iterator[str]:
        """Yield the SQL of all values inside."""
        for member in self.members.values():
            if isinstance(member, Pieces):
                yield from member.values()
            else:
                yield member


def _key(name: str, before: str) -> str:
    return literal(before + msgspec.json.encode(name).decode() + ":")


def _piece(value: str | Pieces) -> str:
    return value.sql() if isinstance(value, Pieces) else value


def assemble(pieces: list[tuple[tuple[str, ...], str]]) -> str:
    """Return SQL for the event's JSON, less its opening brace, from each field's path and the SQL of its piece.

    The first piece is never NULL. Without the brace, other members can be put before it.
    """
    first, *others = nested(pieces).members.items()
    joined = ", ".join(f"{_key(name, ',')} || {_piece(sql)}" for name, sql in others)
    return f"concat({_key(first[0], '')}, {_piece(first[1])}, {joined}, '}}')"


def nested(pieces: list[tuple[tuple[str, ...], str]], depth: int = 0) -> Pieces:
    """Return pieces as the objects in which their paths put them. depth: of each path, so much is known already."""
    groups: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for path, sql in pieces:
        groups.setdefault(path[depth], []).append((path, sql))
    return Pieces(
        {
            name: nested(group, depth + 1) if len(group[0][0]) > depth + 1 else group[0][1]
            for name, group in groups.items()
        }
    )
