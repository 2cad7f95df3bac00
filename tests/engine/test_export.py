from __future__ import annotations

import gzip
import io
import itertools
import json
import threading
import time
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine.stored import FEW, HOUR_MS, PROJECT, Stored, block
from tests.lake.blocks import START_MS, World

from retrofill.core.block import Block, Flag, Kind
from retrofill.core.row import EXPORT_KEYS, event_id_of, uuid_of
from retrofill.engine import export as module
from retrofill.engine import lines, query
from retrofill.engine.export import Hours, export, hours_of
from retrofill.errors import InputError

ALL = hours_of("20260101T00", "20260131T23")
MB = 1_000_000


def archive(
    stored: Stored, hours: Hours = ALL, *, project: int = PROJECT
) -> zipfile.ZipFile | None:
    found = export(stored.reader, project, hours, bytes_max=0)
    if found is None:
        return None
    data = b"".join(found)
    found.close()
    assert stored.pins == []
    whole = zipfile.ZipFile(io.BytesIO(data))
    assert whole.testzip() is None
    return whole


def members(whole: zipfile.ZipFile) -> dict[str, bytes]:
    return {name: gzip.decompress(whole.read(name)) for name in whole.namelist()}


def rows(stored: Stored, hours: Hours = ALL) -> list[dict[str, Any]]:
    whole = archive(stored, hours)
    assert whole is not None
    texts = members(whole).values()
    assert all(text.endswith(b"\n") for text in texts)
    return [json.loads(line) for text in texts for line in text.split(b"\n")[:-1]]


def test_a_row_has_every_key_in_order_and_null_where_nothing_is_known(tmp_path: Path) -> None:
    for sealed in (0, 1):
        (row,) = rows(Stored(tmp_path / str(sealed), [block(1, [{}])], sealed=sealed))
        assert list(row) == sorted(EXPORT_KEYS)
        assert row["event_properties"] == row["user_properties"] == row["groups"] == {}
        assert row["group_properties"] == row["plan"] == {}
        assert {key for key, value in row.items() if value is not None} == {
            *(
                "amplitude_id",
                "app",
                "client_event_time",
                "client_upload_time",
                "data",
                "data_type",
            ),
            *("device_id", "event_id", "event_properties", "event_time", "event_type", "groups"),
            *("group_properties", "plan", "processed_time", "server_received_time"),
            *("server_upload_time", "session_id", "user_properties", "uuid"),
        }


def test_a_row_shows_what_was_sent_and_decided(tmp_path: Path) -> None:
    event = {
        "person": 2**60,
        "user_id": 'a "quoted"\\ user\n\t\x01 é 😀',
        "device_id": "d-1",
        "event_type": "Play",
        "time": START_MS + 1,
        "insert_id": "i1",
        "event_id": 42,
        "session_id": START_MS,
        "event_properties": {"n": 1.50, "big": 2**70, "a": ["x", {"y": None}], "u": "é\u2028"},
        "idfa": "advertising",
        "location_lat": 37.133,
        "location_lng": -122.0,
        "partner_id": "p",
        "plan": {"branch": "main"},
        "shown": {
            "user_properties": {"list": ["a"]},
            "groups": {"company": ["Acme", "B"]},
            "group_properties": {"company": {"Acme": {"plan": "pro"}}},
            "platform": "iOS",
            "carrier": "AT&T",
            "paying": "true",
            "version_name": "1.2",
            "city": 'Sankt "X"',
        },
    }
    stored = Stored(
        tmp_path, [block(1, [event], flags=[Flag.FIRST_EVENT], upload_ms=START_MS + 7)], sealed=1
    )
    (row,) = rows(stored)
    assert row["amplitude_id"] == 2**60
    assert (row["app"], row["event_id"], row["session_id"]) == (PROJECT, 42, START_MS)
    assert row["user_id"] == event["user_id"]
    assert row["event_properties"] == event["event_properties"]
    assert (row["user_properties"], row["plan"]) == ({"list": ["a"]}, {"branch": "main"})
    assert row["groups"] == {"company": ["Acme", "B"]}
    assert row["group_properties"] == {"company": {"Acme": {"plan": "pro"}}}
    assert (row["platform"], row["device_carrier"], row["version_name"]) == ("iOS", "AT&T", "1.2")
    assert (row["paying"], row["city"], row["partner_id"]) == (True, 'Sankt "X"', "p")
    assert (row["location_lat"], row["location_lng"]) == (37.133, -122.0)
    assert len(row["amplitude_attribution_ids"]) == 1
    assert row["client_event_time"] == row["event_time"] == "2026-01-01 00:00:00.001000"
    assert row["server_upload_time"] == row["processed_time"] == "2026-01-01 00:00:00.007000"
    assert (row["$insert_id"], row["data_type"], row["data"]["path"]) == ("i1", "event", "/batch")
    assert row["data"]["first_event"] is True
    assert row["data"]["user_properties_updated"] is True
    ((number, values),) = row["data"]["group_ids"].items()
    assert number.isdigit()
    assert len(set(values)) == 2


def test_an_event_that_skipped_the_table_does_not_say_it_was_updated(tmp_path: Path) -> None:
    (row,) = rows(Stored(tmp_path, [block(1, [{}], flags=[Flag.SKIP])]))
    assert "user_properties_updated" not in row["data"]
    assert "first_event" not in row["data"]


def test_uuid_and_event_id_are_those_of_the_position(tmp_path: Path) -> None:
    blocks = [block(number, [{"person": 3 - row} for row in range(3)]) for number in (1, 2)]
    for sealed in (0, 1, 2):
        found = rows(Stored(tmp_path / str(sealed), blocks, sealed=sealed))
        places = [(PROJECT, 0, number, row) for number in (1, 2) for row in range(3)]
        assert [row["uuid"] for row in found] == [uuid_of(*place) for place in places]
        assert [row["event_id"] for row in found] == [event_id_of(*place) for place in places]


def test_line_breaks_between_tokens_do_not_break_lines(tmp_path: Path) -> None:
    made = block(1, [{"event_properties": {"text": "two\nlines\r"}}])
    part = made.parts[0]
    body = part.body.replace(b'"event_properties":{', b'"event_properties":{\r\n  ')
    part = msgspec.structs.replace(part, body=body)
    made = msgspec.structs.replace(made, parts=[part])
    for sealed in (0, 1):
        (row,) = rows(Stored(tmp_path / str(sealed), [made], sealed=sealed))
        assert row["event_properties"] == {"text": "two\nlines\r"}


def test_only_events_of_the_project_are_rows(tmp_path: Path) -> None:
    kinds = [Kind.EVENT, Kind.IDENTIFY, Kind.GROUP_IDENTIFY, Kind.DISPLACED, Kind.DROPPED]
    blocks = [block(1, [{} for _ in kinds], kinds=kinds), block(2, [{}], project=8)]
    for sealed in (0, 2):
        assert len(rows(Stored(tmp_path / str(sealed), blocks, sealed=sealed))) == 1


def _hourly(count: int) -> list[Block]:
    return [
        block(number, [{"insert_id": f"{number}"}], upload_ms=START_MS + number * HOUR_MS)
        for number in range(1, count + 1)
    ]


def test_hours_are_those_of_server_upload_time_and_both_ends_count(tmp_path: Path) -> None:
    stored = Stored(tmp_path, _hourly(30), sealed=20)
    whole = archive(stored, hours_of("20260101T05", "20260102T01"))
    assert whole is not None
    expected = [(START_MS + hour * HOUR_MS, hour) for hour in range(5, 26)]
    moments = [datetime.fromtimestamp(ms / 1000, UTC) for ms, _ in expected]
    assert whole.namelist() == [f"7/7_{at:%Y-%m-%d}_{at.hour}#0.json.gz" for at in moments]
    assert [json.loads(text)["$insert_id"] for text in members(whole).values()] == [
        str(hour) for _, hour in expected
    ]


def test_an_end_in_the_future_is_fine_and_an_empty_range_is_none(tmp_path: Path) -> None:
    stored = Stored(tmp_path, _hourly(3), sealed=2)
    assert archive(stored, hours_of("20260101T00", "20261230T23")) is not None
    assert archive(stored, hours_of("20250101T00", "20250102T23")) is None
    assert archive(stored, project=8) is None
    assert stored.pins == []


@settings(
    max_examples=FEW,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    blocks=st.lists(
        st.tuples(st.integers(0, 9), st.lists(st.integers(1, 4), min_size=1, max_size=9)),
        min_size=1,
        max_size=12,
    ),
    sealed=st.integers(0, 12),
    slices=st.integers(1, 4),
    slice_bytes=st.sampled_from([1, 2000, 10_000]),
    chunk=st.integers(1, 7),
    member=st.integers(1, 9),
)
def test_rows_come_in_order_of_position_however_they_lie(  # noqa: PLR0917 # one for each way to cut
    tmp_path_factory: pytest.TempPathFactory,
    blocks: list[tuple[int, list[int]]],
    sealed: int,
    slices: int,
    slice_bytes: int,
    chunk: int,
    member: int,
) -> None:
    moments = itertools.accumulate(gap * HOUR_MS // 3 for gap, _ in blocks)
    made = [
        block(
            number,
            [{"person": one, "insert_id": f"{number}.{row}"} for row, one in enumerate(people)],
            upload_ms=START_MS + ms,
        )
        for number, (ms, (_, people)) in enumerate(zip(moments, blocks, strict=True), 1)
    ]
    stored = Stored(tmp_path_factory.mktemp("lake"), made, sealed=min(sealed // 2, len(made)))
    stored.seal(min(sealed, len(made)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "EXPORT_SLICES", slices)
        patch.setattr(module, "EXPORT_SLICE_BYTES", slice_bytes)
        patch.setattr(module, "EXPORT_CHUNK_ROWS", chunk)
        patch.setattr(lines, "EXPORT_CHUNK_ROWS", chunk)
        patch.setattr(module, "EXPORT_MEMBER_ROWS", member)
        patch.setattr(module, "_READ_ROWS", 3)
        whole = archive(stored)
    assert whole is not None
    found = members(whole)
    each = [json.loads(line) for text in found.values() for line in text.splitlines()]
    assert [row["$insert_id"] for row in each] == [
        f"{one.number}.{row}" for one in made for row in range(one.rows)
    ]
    for name, text in found.items():
        hours = {json.loads(line)["server_upload_time"][:13] for line in text.splitlines()}
        assert len(hours) == 1
        assert f"_{hours.pop()[:10]}_" in name


def test_an_export_reads_its_own_moment_while_others_seal_and_write(tmp_path: Path) -> None:
    world = World(50)
    stored = Stored(tmp_path, list(world.blocks(8, rows=50)), sealed=3)
    stored.last = 6
    found = export(stored.reader, PROJECT, ALL, bytes_max=0)
    assert found is not None
    stored.last = 8
    stored.seal(8)
    data = b"".join(found)
    found.close()
    texts = members(zipfile.ZipFile(io.BytesIO(data))).values()
    assert sum(text.count(b"\n") for text in texts) == 300


def test_an_export_that_is_left_lets_its_snapshot_go(tmp_path: Path) -> None:
    stored = Stored(tmp_path, list(World(50).blocks(4, rows=50)), sealed=2)
    for pieces in (0, 1):
        found = export(stored.reader, PROJECT, ALL, bytes_max=0)
        assert found is not None
        for _ in range(pieces):
            next(found)
        assert stored.pins == [2]
        found.close()
        assert stored.pins == []


@pytest.mark.parametrize("sealed", [12, 0])
def test_memory_is_bounded_however_large_rows_are_and_whoever_reads(
    sealed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100 MB of rows some are held at a time, by count of bytes: the next ones wait for whoever takes the archive."""
    large = {"event_properties": {"said": "x" * 20_000}}
    blocks = [
        block(number, [{"insert_id": f"{number}.{row}", **large} for row in range(400)])
        for number in range(1, 13)
    ]
    stored = Stored(tmp_path, blocks, sealed=sealed)
    monkeypatch.setattr(module, "EXPORT_SLICE_BYTES", 4 * MB)
    monkeypatch.setattr(module, "EXPORT_READ_BYTES", 4 * MB)
    monkeypatch.setattr(module, "EXPORT_MEMBER_BYTES", 2 * MB)
    monkeypatch.setattr(lines, "EXPORT_CHUNK_BYTES", MB)
    monkeypatch.setattr(query, "UNSEALED_CHUNK_BYTES", 4 * MB)
    counted = pa.proxy_memory_pool(pa.system_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(counted)
    try:
        found = export(stored.reader, PROJECT, ALL, bytes_max=0)
        assert found is not None
        pieces = [next(found)]
        # Nobody reads on: what is made ahead comes to an end, and waits.
        still = pa.total_allocated_bytes(), 0
        while still[1] < 5:
            time.sleep(0.02)
            now = pa.total_allocated_bytes()
            still = (now, still[1] + 1 if now == still[0] else 0)
        assert counted.bytes_allocated() < 40 * MB
        pieces += found
        found.close()
    finally:
        pa.set_memory_pool(before)
    assert counted.max_memory() < 60 * MB
    assert len(pieces) > 30
    texts = members(zipfile.ZipFile(io.BytesIO(b"".join(pieces)))).values()
    assert sum(text.count(b"\n") for text in texts) == 4800
    assert max(map(len, texts)) < 4 * MB


def test_an_answer_over_the_limit_is_refused_before_its_first_byte(tmp_path: Path) -> None:
    for sealed in (0, 4):
        stored = Stored(tmp_path / str(sealed), list(World(50).blocks(4, rows=100)), sealed=sealed)
        whole = export(stored.reader, PROJECT, ALL, bytes_max=0)
        assert whole is not None
        size = sum(map(len, whole))
        whole.close()
        with pytest.raises(InputError, match="at most"):
            export(stored.reader, PROJECT, ALL, bytes_max=size // 2)
        assert stored.pins == []
        within = export(stored.reader, PROJECT, ALL, bytes_max=2 * size)
        assert within is not None
        within.close()


@pytest.mark.parametrize(
    ("start", "end", "says"),
    [
        ("20260101", "20260101T00", "start must be an hour"),
        ("20260101T24", "20260102T00", "start must be an hour"),
        ("20260101T00", "20260230T00", "end must be an hour"),
        ("20260101T00", "2026010²T00", "end must be an hour"),
        ("20260102T00", "20260101T00", "before start"),
        ("20250101T00", "20260101T00", "8761 hours"),
    ],
)
def test_hours_that_cannot_be_are_refused(start: str, end: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        hours_of(start, end)


def test_a_year_is_365_days() -> None:
    hours = hours_of("20250101T00", "20251231T23")
    assert hours.last - hours.first + 1 == 365 * 24


@given(st.integers(0, 253_402_300_799_999))
def test_times_are_written_to_the_microsecond(ms: int) -> None:
    written = lines._time(module.pa.array([ms, None])).to_pylist()
    moment = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=ms)
    assert written == [
        f'"{moment:%Y-%m-%d %H:%M:%S.%f}"' if moment.year > 999 else written[0],
        "null",
    ]


@given(st.lists(st.none() | st.text(), max_size=5))
def test_texts_are_written_as_json(texts: list[str | None]) -> None:
    array = module.pa.array(texts, module.pa.string())
    assert [json.loads(one) for one in lines._quoted(array).to_pylist()] == texts
    words = lines._word(array, "city").dictionary_decode().to_pylist()
    assert [json.loads(one) for one in words] == texts


def test_an_export_given_up_leaves_no_thread_and_no_pin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EXPORT_SLICE_BYTES", 1)
    monkeypatch.setattr(module, "EXPORT_MEMBER_ROWS", 1)
    blocks = [block(number, [{"insert_id": f"{number}"}]) for number in range(1, 9)]
    stored = Stored(tmp_path, blocks, sealed=8)
    found = export(stored.reader, PROJECT, ALL, bytes_max=0)
    assert found is not None
    next(found)
    assert stored.pins == [8]
    found.close()
    found.close()
    assert stored.pins == []
    assert not [one for one in threading.enumerate() if one.name.startswith("export")]
