"""Mappings as documents, and the SQL that they mean, run by DuckDB."""

from __future__ import annotations

from typing import Any

import duckdb
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrofill.core import mapping
from retrofill.core.mapping import Field
from retrofill.core.sql import literal
from retrofill.errors import InputError

GOOD: dict[str, Any] = {
    "source": {"format": "csv", "columns": {"a.b": "VARCHAR"}},
    "where": "a IS NOT NULL",
    "event": {
        "user_id": "u",
        "event_type": "'Sign Up'",
        "time": "at * 1000",
        "quantity": 1,
        "$skip_user_properties_sync": True,
        "event_properties": {"a": "a", "inner": {"b": "b"}},
    },
}


def test_nested_blocks_become_paths_in_the_order_written() -> None:
    found = mapping.parse(GOOD)
    assert found.fields == (
        Field(("user_id",), "u"),
        Field(("event_type",), "'Sign Up'"),
        Field(("time",), "at * 1000"),
        Field(("quantity",), "1"),
        Field(("$skip_user_properties_sync",), "true"),
        Field(("event_properties", "a"), "a"),
        Field(("event_properties", "inner", "b"), "b"),
    )
    assert (found.where, found.format, found.columns) == (
        "a IS NOT NULL",
        "csv",
        {"a.b": "VARCHAR"},
    )


def test_the_digest_changes_with_the_mapping_alone() -> None:
    assert mapping.parse(GOOD).digest == mapping.parse(dict(GOOD)).digest
    for other in ({"where": "a IS NULL"}, {"each": "[1, 2]"}):
        assert mapping.parse(GOOD).digest != mapping.parse({**GOOD, **other}).digest


def without(key: str) -> dict[str, Any]:
    return {**GOOD, "event": {name: one for name, one in GOOD["event"].items() if name != key}}


WRONG = [
    ("no block", "mapping is not a block"),
    ({**GOOD, "evnt": {}}, "no key 'evnt'"),
    ({**GOOD, "each": ["a", "b"]}, "each is not a text"),
    ({**GOOD, "source": {"format": "xml"}}, "'xml' is unknown"),
    ({**GOOD, "event": {**GOOD["event"], "evnt_type": "x"}}, "no field 'evnt_type'"),
    ({**GOOD, "event": {**GOOD["event"], "platform": {"a": "b"}}}, "platform takes one expression"),
    ({**GOOD, "event": {**GOOD["event"], "platform": None}}, "platform has no expression"),
    ({**GOOD, "event": {**GOOD["event"], "platform": ["a"]}}, "platform has no expression"),
    ({**GOOD, "event": {**GOOD["event"], "ingestion_metadata": "x"}}, "carries the import id"),
    (without("time"), "says nothing of time"),
    (without("event_type"), "says nothing of event_type"),
    (without("user_id"), "says nothing of user_id or device_id"),
]


@pytest.mark.parametrize(("document", "words"), WRONG)
def test_a_wrong_document_names_what_is_wrong(document: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        mapping.parse(document)


def test_a_field_misspelled_is_answered_with_the_one_meant() -> None:
    with pytest.raises(InputError, match=r"Did you mean device_id\?"):
        mapping.parse({"event": {"device": "d", "event_type": "e", "time": "t"}})


def value(sql: str, **parameters: Any) -> Any:
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        row = connection.execute(f"SELECT {sql}", list(parameters.values())).fetchone()
    assert row is not None
    return row[0]


# DuckDB type, SQL, milliseconds. 1700000000123 = 2023-11-14T22:13:20.123Z
TIMES = [
    ("BIGINT", "1700000000123", 1700000000123),
    ("DOUBLE", "1700000000123.9", 1700000000123),
    ("DECIMAL(18,3)", "1700000000123.999", 1700000000123),
    ("TIMESTAMP", "TIMESTAMP '2023-11-14 22:13:20.123999'", 1700000000123),
    ("TIMESTAMP WITH TIME ZONE", "TIMESTAMPTZ '2023-11-15 00:13:20.123+02'", 1700000000123),
    ("DATE", "DATE '2023-11-14'", 1699920000000),
    ("VARCHAR", "'1700000000123'", 1700000000123),
    ("VARCHAR", "'1700000000123.7'", 1700000000123),
    ("VARCHAR", "'2023-11-14T22:13:20.123Z'", 1700000000123),
    ("VARCHAR", "'2023-11-14 22:13:20.123456'", 1700000000123),
    ("VARCHAR", "'2023-11-15T00:13:20.123+02:00'", 1700000000123),
    ("JSON", "'\"2023-11-14T22:13:20.123Z\"'::JSON", 1700000000123),
    ("JSON", "'1700000000123'::JSON", 1700000000123),
]


@pytest.mark.parametrize(("kind", "sql", "expected"), TIMES)
def test_a_time_may_be_a_number_a_timestamp_or_iso_text(kind: str, sql: str, expected: int) -> None:
    assert value(mapping.millis(f"({sql})", type_name=kind)) == expected


# kind of field, DuckDB type, SQL, JSON that is sent
PIECES = [
    ("text", "BIGINT", "5", '"5"'),
    ("text", "VARCHAR", "'a\"b'", '"a\\"b"'),
    ("text", "JSON", "'\"x\"'::JSON", '"x"'),
    ("text", "JSON", "'null'::JSON", None),
    ("integer", "VARCHAR", "'7'", "7"),
    ("integer", "DOUBLE", "7.9", "7"),
    ("number", "VARCHAR", "'7.25'", "7.25"),
    ("flag", "BIGINT", "1", "true"),
    ("object", "JSON", "'{\"a\":1}'::JSON", '{"a":1}'),
    ("object", "VARCHAR", "'{\"a\": 1}'", '{"a": 1}'),
    ("object", "JSON", "'{}'::JSON", None),
    ("value", "VARCHAR", "'a'", '"a"'),
    ("value", "BIGINT[]", "[1, 2]", "[1,2]"),
    ("value", "JSON", "'[1]'::JSON", "[1]"),
    ("value", "VARCHAR", "NULL", None),
]


@pytest.mark.parametrize(("kind", "type_name", "sql", "expected"), PIECES)
def test_a_piece_is_the_json_that_the_wire_wants(
    kind: mapping.Kind, type_name: str, sql: str, expected: str | None
) -> None:
    assert value(mapping.piece(kind, f"({sql})", type_name=type_name)) == expected


MISFITS = [
    ("integer", "VARCHAR", "'seven'"),
    ("number", "VARCHAR", "'x'"),
    ("millis", "VARCHAR", "'yesterday'"),
    ("object", "JSON", "'[1]'::JSON"),
    ("object", "VARCHAR", "'text'"),
]


@pytest.mark.parametrize(("kind", "type_name", "sql"), MISFITS)
def test_what_does_not_fit_is_an_error_and_no_wrong_value(
    kind: mapping.Kind, type_name: str, sql: str
) -> None:
    with pytest.raises(duckdb.Error):
        value(mapping.piece(kind, f"(SELECT {sql})", type_name=type_name))


def test_nothing_is_sent_for_null_and_for_an_empty_object() -> None:
    pieces = [
        (("event_type",), "'\"a\"'"),
        (("event_properties", "x"), "NULL::VARCHAR"),
        (("user_properties", "deep", "y"), "'1'"),
        (("user_properties", "z"), "NULL::VARCHAR"),
        (("platform",), "NULL::VARCHAR"),
    ]
    found = "{" + value(mapping.assemble(pieces))
    assert msgspec.json.decode(found) == {"event_type": "a", "user_properties": {"deep": {"y": 1}}}


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_the_plain_text_of_a_json_string_is_that_string(text: str) -> None:
    json = msgspec.json.encode(text).decode()
    assert value(mapping.unquote(f"({literal(json)})")) == text
