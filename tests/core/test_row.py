"""Rows out of blocks: every column from where it belongs, revenue, kinds, and identifiers by position."""

from __future__ import annotations

import json
import re
from typing import Any

import duckdb
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.lake.blocks import START_MS, World, block_of

from retrofill.core import row
from retrofill.core.block import COLUMNS, Block, Kind
from retrofill.core.identity import derived_device
from retrofill.lake import arrow

PERSON = {"user_id": "user-1", "device_id": "device-1"}


def rows(*blocks: Block) -> list[dict[str, Any]]:
    """Return the rows of blocks with JSON read."""
    found = arrow.table(blocks).to_pylist()
    for one in found:
        for name in arrow.JSON_COLUMNS:
            one[name] = one[name] and json.loads(one[name])
    return found


def one(event: dict[str, Any], **block: Any) -> dict[str, Any]:
    (found,) = rows(block_of([{"event_type": "Play", **PERSON, **event}], **block))
    return found


def test_a_row_has_what_its_event_sent() -> None:
    event = {
        "time": START_MS - 1000,
        "insert_id": "i-1",
        "event_id": 5,
        "session_id": START_MS,
        "event_properties": {"a": [1, {"b": None}]},
        "user_properties": {"$set": {"plan": "pro"}},
        "location_lat": 52.5,
        "location_lng": 13,
        "partner_id": "p",
        "plan": {"branch": "main"},
    }
    found = one(event, people=[42], times=[START_MS - 900])
    expected = {
        "project": 7,
        "partition": 0,
        "block": 1,
        "row": 0,
        "amplitude_id": 42,
        "kind": Kind.EVENT,
        "flags": 0,
        "user_id": "user-1",
        "device_id": "device-1",
        "event_type": "Play",
        "client_event_time": START_MS - 1000,
        "client_upload_time": START_MS + 5,
        "event_time": START_MS - 900,
        "server_received_time": START_MS + 10,
        "server_upload_time": START_MS + 20,
        "created_time": None,
        "insert_id": "i-1",
        "import_id": None,
        "event_id": 5,
        "session_id": START_MS,
        "event_properties": {"a": [1, {"b": None}]},
        "user_properties": {},
        "sent": {"$set": {"plan": "pro"}},
        "groups": {},
        "group_properties": {},
        **dict.fromkeys(COLUMNS),
        "location_lat": 52.5,
        "location_lng": 13.0,
        "attribution_ids": None,
        "partner_id": "p",
        "plan": {"branch": "main"},
        "path": "/2/httpapi",
        "said": 0,
        "sent_groups": None,
        "updates_max": 0,
        "merges_max": 0,
    }
    assert found == expected
    assert list(found) == arrow.SCHEMA.names


def test_what_was_not_sent_is_null_or_the_contract_s_default() -> None:
    found = one({})
    assert found["client_event_time"] == START_MS + 5  # the request's upload time
    assert found["session_id"] == -1
    assert found["event_properties"] == {}
    assert [found[name] for name in ("insert_id", "event_id", "sent", "plan")] == [None] * 4


def test_null_on_the_wire_is_absent() -> None:
    found = one(dict.fromkeys(("time", "event_properties", "user_properties", "plan", "price")))
    assert found == one({})


def test_built_in_columns_and_user_properties_come_from_the_snapshot() -> None:
    table = {name: f"table {name}" for name in COLUMNS} | {
        "user_properties": {"city": "New York"},
        "groups": {"org": ["acme"]},
        "group_properties": {"org": {"acme": {"seats": 5}}},
    }
    found = one({"platform": "Web", "city": "Rome", "user_properties": {"a": 1}}, table=table)
    assert {name: found[name] for name in table} == table


@pytest.mark.parametrize("value", ['},"x",', "}", '"', "\\", '\\"},null,', "ü}\u2028", "]},["])
def test_a_snapshot_may_hold_any_text(value: str) -> None:
    table = {"platform": value, "device_type": value, "user_properties": {value: {value: value}}}
    found = one({}, table=table)
    assert {name: found[name] for name in table} == table


def test_a_device_that_was_not_sent_derives_from_the_user() -> None:
    found = one({"device_id": None})
    assert found["device_id"] == derived_device("user-1")


def test_a_group_identify_without_ids_has_none() -> None:
    event = {"event_type": "$groupidentify", "group_properties": {"$set": {"seats": 5}}}
    (found,) = rows(block_of([event], kinds=[Kind.GROUP_IDENTIFY]))
    assert (found["user_id"], found["device_id"]) == (None, None)
    assert found["sent"] == {"$set": {"seats": 5}}


def test_an_ordinary_event_s_group_properties_are_ignored() -> None:
    assert one({"group_properties": {"a": 1}})["sent"] is None


@pytest.mark.parametrize("sent", [{"global_user_id": "g"}, {"unmap": True}])
def test_a_mapping_is_a_row_of_its_user_alone(sent: dict[str, Any]) -> None:
    event = {"event_type": "x", "user_id": "user-1", "user_properties": sent}
    (found,) = rows(block_of([event], kinds=[Kind.ALIAS], path="/usermap"))
    assert (found["user_id"], found["device_id"], found["event_type"]) == (
        "user-1",
        None,
        "$usermap",
    )
    assert found["sent"] == sent


def test_dropped_events_leave_a_gap_in_the_row_numbers() -> None:
    events = [{"event_type": f"e{number}", **PERSON} for number in range(4)]
    kinds = [Kind.DROPPED, Kind.EVENT, Kind.DROPPED, Kind.DISPLACED]
    found = rows(block_of(events, kinds=kinds))
    assert [(one["row"], one["event_type"]) for one in found] == [(1, "e1"), (3, "e3")]


def test_a_block_of_dropped_events_has_no_rows() -> None:
    assert rows(block_of([{"event_type": "e", **PERSON}], kinds=[Kind.DROPPED])) == []


def test_only_our_own_imports_are_marked() -> None:
    ours = {"source_name": "retrofill", "source_version": "import-1"}
    assert one({"ingestion_metadata": ours})["import_id"] == "import-1"
    assert one({"ingestion_metadata": ours | {"source_name": "other"}})["import_id"] is None


def test_advertising_ids_are_not_kept_in_clear() -> None:
    kept = one({"idfa": "AEBE52E7-03EE-455A-B3C4-E57283966239", "adid": "x"})["attribution_ids"]
    assert "AEBE" not in kept
    assert len(json.loads(kept)) == 2


# As sent, as stored among the event properties. Source: contract, events 7.
REVENUE = [
    ({"price": 4.99}, {"$price": 4.99, "$revenue": 4.99}),
    ({"price": 5, "quantity": 3}, {"$price": 5, "$quantity": 3, "$revenue": 15}),
    ({"revenue": 7.5}, {"$revenue": 7.5}),
    (
        {"price": 2, "quantity": 2, "revenue": 100},
        {"$price": 2, "$quantity": 2, "$revenue": 4},
    ),
    ({"price": -3, "quantity": 2}, {"$price": -3, "$quantity": 2, "$revenue": -6}),
    (
        {"revenue": 1, "productId": "p", "revenueType": "refund", "currency": "EUR"},
        {"$revenue": 1, "$productId": "p", "$revenueType": "refund", "$currency": "EUR"},
    ),
    ({"revenue": 0}, {"$revenue": 0}),
]


@pytest.mark.parametrize(("sent", "stored"), REVENUE)
def test_revenue_goes_into_the_event_properties(
    sent: dict[str, Any], stored: dict[str, Any]
) -> None:
    assert one(sent)["event_properties"] == stored
    assert one(sent | {"event_properties": {"a": 1}})["event_properties"] == {"a": 1} | stored


def test_revenue_leaves_the_other_properties_byte_for_byte() -> None:
    body = b'{"events":[{"event_type":"e","user_id":"user-1","event_properties":{"big":123456789012345678901234567890,"f":1.10},"price":1}]}'
    block = block_of([{"event_type": "e"}])
    block.parts[0] = msgspec.structs.replace(block.parts[0], body=body)
    text = arrow.table([block])["event_properties"][0].as_py()
    assert text.startswith('{"big":123456789012345678901234567890,"f":1.10,')


def test_blocks_together_give_the_rows_of_each() -> None:
    blocks = list(World(people=50).blocks(5, rows=20))
    assert rows(*blocks) == [found for block in blocks for found in rows(block)]


def test_rows_of_a_real_block_say_what_was_decided() -> None:
    block = World().block(1, 100)
    found = rows(block)
    events = json.loads(block.parts[0].body)["events"]
    assert [one["insert_id"] for one in found] == [event["insert_id"] for event in events]
    assert [one["user_properties"]["visits"] for one in found] == [
        json.loads(table)[0]["visits"] for table in block.tables
    ]
    assert [one["created_time"] for one in found] == list(memoryview(block.created_ms).cast("q"))


@pytest.mark.parametrize("number", [2**63, -(2**70)])
def test_a_number_that_fits_no_column_does_not_stop_the_history(number: int) -> None:
    assert abs(one({"session_id": number})["session_id"]) >= 2**63 - 1


def test_bytes_that_are_no_text_do_not_stop_the_history() -> None:
    block = block_of([{"event_type": "e", **PERSON, "event_properties": {"a": "?!"}}])
    part = block.parts[0]
    body = part.body.replace(b"?!", b"\xff\xfe")
    block.parts[0] = msgspec.structs.replace(part, body=body)
    assert rows(block)[0]["event_properties"] == {"a": "\ufffd\ufffd"}


# Identifiers by position.

POSITION = st.tuples(
    *[st.integers(0, 2**31 - 1)] * 2, st.integers(0, 2**40), st.integers(0, 2**31 - 1)
)


@given(st.lists(POSITION, min_size=1, max_size=20))
def test_the_database_derives_the_same_identifiers(positions: list[tuple[int, ...]]) -> None:
    values = ", ".join(map(str, positions))
    found = duckdb.sql(
        f"SELECT {row.UUID_SQL}, {row.EVENT_ID_SQL} FROM (VALUES {values}) "
        't("project", "partition", "block", "row")'
    ).fetchall()
    assert found == [(row.uuid_of(*one), row.event_id_of(*one)) for one in positions]


@given(POSITION)
def test_identifiers_have_the_shape_that_readers_expect(position: tuple[int, ...]) -> None:
    shape = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    assert re.fullmatch(shape, row.uuid_of(*position))
    assert 1 <= row.event_id_of(*position) <= 2**28


def test_every_row_has_its_own_uuid() -> None:
    found = {row.uuid_of(7, 0, block, index) for block in range(100) for index in range(100)}
    assert len(found) == 10_000


def test_the_export_row_has_every_key_of_the_contract_in_order() -> None:
    assert list(row.EXPORT_KEYS) == sorted(row.EXPORT_KEYS)
    assert len(set(row.EXPORT_KEYS)) == 55
