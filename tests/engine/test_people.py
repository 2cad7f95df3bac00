from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.engine.stored import DAY_MS, Stored, block
from tests.lake.blocks import START_MS

from retrofill.core.block import COLUMNS, Flag, Kind, Merge
from retrofill.core.person import FORGOTTEN, Person
from retrofill.engine import people
from retrofill.engine.people import Match, Matches, activity, search

SEALED = pytest.mark.parametrize("sealed", [0, 1])


def _known(stored: Stored, *known: Person) -> Stored:
    stored.people = {one.amplitude_id: one for one in known}
    return stored


def _activity(
    stored: Stored, one: int, *, offset: int = 0, limit: int = 1000, latest: bool = True
) -> Any:
    found = stored.ask(lambda view: activity(view, one, offset=offset, limit=limit, latest=latest))
    return msgspec.json.decode(msgspec.json.encode(found))


@SEALED
def test_people_are_found_by_each_of_their_ids(tmp_path: Path, sealed: int) -> None:
    events = [
        {"person": 11, "user_id": "ada@x.org", "device_id": "phone"},
        {"person": 12, "device_id": "tablet"},
    ]
    stored = _known(
        Stored(tmp_path, [block(1, events)], sealed=sealed), Person(11, "ada@x.org"), Person(12)
    )
    ada, nobody = Match("ada@x.org", 11), Match(None, 12)
    for text, expected in {
        "ada@x.org": Matches([ada], "match_user_or_device_id"),
        "phone": Matches([ada], "match_user_or_device_id"),
        "tablet": Matches([nobody], "match_user_or_device_id"),
        "12": Matches([nobody], "match_amplitude_id"),
        "ada": Matches([ada], "match_user_prefix"),
        "ADA": Matches([], "nomatch"),
        "13": Matches([], "nomatch"),
        "9" * 30: Matches([], "nomatch"),
        "' OR 1=1 --": Matches([], "nomatch"),
        "%": Matches([], "nomatch"),
    }.items():
        assert stored.ask(lambda view, text=text: search(view, text)) == expected


@SEALED
def test_whoever_was_merged_is_found_as_the_survivor(tmp_path: Path, sealed: int) -> None:
    merge = Merge(0, 7, 2, 1, START_MS)
    made = block(
        1, [{"person": 1, "user_id": "david"}, {"person": 2, "device_id": "old"}], merges=[merge]
    )
    stored = _known(
        Stored(tmp_path, [made], sealed=sealed), Person(1, "david"), Person(2, merged_into=1)
    )
    for text in ("old", "2", "1", "david"):
        found = stored.ask(lambda view, text=text: search(view, text))
        assert found.matches == [Match("david", 1)]


def test_someone_only_identified_is_found_and_someone_deleted_is_not(tmp_path: Path) -> None:
    events = [{"person": 1, "user_id": "quiet"}, {"person": 2, "user_id": "gone-"}]
    stored = Stored(tmp_path, [block(1, events, kinds=[Kind.IDENTIFY, Kind.EVENT])])
    _known(stored, Person(1, "quiet"), Person(2, merged_into=FORGOTTEN))
    assert stored.ask(lambda view: search(view, "quiet")).matches == [Match("quiet", 1)]
    for text in ("gone-", "2", "gone"):
        assert stored.ask(lambda view, text=text: search(view, text)).type == "nomatch"


@SEALED
def test_activity_is_newest_first_by_event_time_and_ties_by_position(
    tmp_path: Path, sealed: int
) -> None:
    times = [5, 1, 5, 3]
    first = block(
        1, [{"insert_id": f"{at}", "time": START_MS + time} for at, time in enumerate(times)]
    )
    second = block(
        2, [{"insert_id": "9", "time": START_MS + 5}, {"person": 2, "insert_id": "other"}]
    )
    stored = _known(Stored(tmp_path, [first, second], sealed=sealed), Person(1))
    latest = ["9", "2", "0", "3", "1"]

    def names(**page: Any) -> list[str]:
        return [row["$insert_id"] for row in _activity(stored, 1, **page)["events"]]

    assert names() == latest
    assert names(latest=False) == latest[::-1]
    assert names(offset=1, limit=2) == latest[1:3]
    assert names(offset=4) == latest[4:]
    assert names(limit=0) == names(offset=5) == []


@SEALED
def test_user_data_tells_what_the_rows_and_the_table_say(tmp_path: Path, sealed: int) -> None:
    events = [
        {
            "time": START_MS,
            "session_id": 1,
            "device_id": "first",
            "location_lat": 1.5,
            "location_lng": -2.0,
        },
        {"time": START_MS + 5000, "session_id": 1, "device_id": "second"},
        {"time": START_MS + DAY_MS, "session_id": 2, "revenue": 9.5, "device_id": "first"},
        {"time": START_MS + 1, "price": 2, "quantity": 3, "device_id": "first"},
    ]
    flags = [Flag(0), Flag(0), Flag.REVENUE, Flag.REVENUE]
    columns = {
        "platform": "iOS",
        "os_name": "ios",
        "os_version": "8.2",
        "version_name": "3.4",
        "device_model": "iPhone 6",
        "carrier": "AT&T",
        "country": "Germany",
        "start_version": "1.0",
    }
    person = Person(1, "ada", {"gender": "f"}, tuple(columns.get(name) for name in COLUMNS))
    stored = _known(Stored(tmp_path, [block(1, events, flags=flags)], sealed=sealed), person)
    assert _activity(stored, 1, limit=0)["userData"] == {
        "user_id": "ada",
        "canonical_amplitude_id": 1,
        "merged_amplitude_ids": [],
        "num_events": 4,
        "num_sessions": 2,
        "usage_time": 5000,
        "first_used": "2026-01-01",
        "last_used": "2026-01-02",
        "purchases": 2,
        "revenue": 15.5,
        "platform": "iOS",
        "os": "ios 8.2",
        "version": "3.4",
        "device": "iPhone 6",
        "device_type": "iPhone 6",
        "carrier": "AT&T",
        "country": "Germany",
        "region": None,
        "city": None,
        "dma": None,
        "language": None,
        "start_version": "1.0",
        "paying": None,
        "device_ids": ["first", "second"],
        "last_device_id": "first",
        "last_location": {"lat": 1.5, "lng": -2.0},
        "properties": {"gender": "f"},
    }


def test_what_is_counted_does_not_depend_on_where_the_events_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions and devices over many blocks, against one pass in plain Python."""
    seeded = random.Random(2)
    events, flags = [], []
    for _ in range(120):
        # A sixth of a day apart, so that some sessions are longer than a day.
        event: dict[str, Any] = {"time": START_MS + seeded.randrange(20) * DAY_MS // 6}
        event["device_id"] = f"device-{seeded.randrange(5)}"
        if seeded.random() < 0.7:
            event["session_id"] = seeded.randrange(-1, 6)
        if seeded.random() < 0.3:
            event |= {"location_lat": seeded.randrange(90), "location_lng": seeded.randrange(90)}
        flags.append(seeded.choice([Flag(0), Flag.REVENUE]))
        if flags[-1]:
            event["revenue"] = seeded.randrange(1, 100) / 4
        events.append(event)
    blocks = [
        block(number, events[at : at + 10], flags=flags[at : at + 10])
        for number, at in enumerate(range(0, len(events), 10), 1)
    ]
    sessions: dict[int, list[int]] = {}
    devices: dict[str, int] = {}
    for event in events:
        if event.get("session_id", -1) >= 0:
            sessions.setdefault(event["session_id"], []).append(event["time"])
        device = event["device_id"]
        devices[device] = min(devices.get(device, event["time"]), event["time"])
    last_first = sorted(enumerate(events), key=lambda one: (one[1]["time"], one[0]), reverse=True)
    placed = next(event for _, event in last_first if "location_lat" in event)
    expected = {
        "num_events": len(events),
        "num_sessions": len(sessions),
        "usage_time": sum(min(max(one) - min(one), DAY_MS) for one in sessions.values()),
        "purchases": sum(map(bool, flags)),
        "revenue": sum(event.get("revenue", 0) for event in events),
        "device_ids": sorted(devices, key=lambda one: (devices[one], one)),
        "last_device_id": last_first[0][1]["device_id"],
        "last_location": {"lat": placed["location_lat"], "lng": placed["location_lng"]},
    }
    monkeypatch.setattr(people, "EARNED_BYTES", 500)
    stored = _known(Stored(tmp_path, blocks), Person(1))
    for sealed in (0, 2, 6, 11, 12):
        stored.seal(sealed)
        found = _activity(stored, 1, limit=7)
        assert {name: found["userData"][name] for name in expected} == expected
        times = [row["event_time"] for row in found["events"]]
        assert times == sorted(times, reverse=True)
        assert len(times) == 7


def test_an_unknown_id_has_zeros_and_empty_lists(tmp_path: Path) -> None:
    found = _activity(Stored(tmp_path, [block(1, [{}])]), 99)
    data = found["userData"]
    assert (found["events"], data["merged_amplitude_ids"], data["device_ids"]) == ([], [], [])
    assert (
        data["num_events"],
        data["num_sessions"],
        data["usage_time"],
        data["purchases"],
        data["revenue"],
    ) == (0,) * 5
    assert (data["user_id"], data["canonical_amplitude_id"], data["first_used"]) == (None, 99, None)
    assert data["properties"] == {}


@SEALED
def test_the_stream_of_a_survivor_holds_those_merged_into_it(tmp_path: Path, sealed: int) -> None:
    merge = Merge(2, 7, 9, 8, START_MS)
    events = [
        {"person": 8, "insert_id": "a"},
        {"person": 9, "insert_id": "b"},
        {"person": 8, "insert_id": "c"},
    ]
    stored = _known(
        Stored(tmp_path, [block(1, events, merges=[merge])], sealed=sealed), Person(8, "david")
    )
    for asked in (8, 9):
        found = _activity(stored, asked)
        assert found["userData"]["canonical_amplitude_id"] == 8
        assert found["userData"]["merged_amplitude_ids"] == [9]
        assert [row["$insert_id"] for row in found["events"]] == ["c", "b", "a"]
        assert [row["amplitude_id"] for row in found["events"]] == [
            8,
            9,
            8,
        ]  # as stored: never rewritten


def test_the_stream_of_a_global_user_holds_those_mapped_to_it(tmp_path: Path) -> None:
    events = [{"person": at, "user_id": f"user-{at}"} for at in (1, 2)]
    stored = _known(Stored(tmp_path, [block(1, events)]), Person(1, "user-1"), Person(2, "user-2"))
    stored.aliases = {"user-2": "user-1"}
    assert _activity(stored, 1)["userData"]["num_events"] == 2
    assert _activity(stored, 2)["userData"]["num_events"] == 1


def test_mappings_are_told_from_both_ends(tmp_path: Path) -> None:
    stored = Stored(
        tmp_path, [block(1, [{"person": 1, "user_id": "a"}, {"person": 2, "user_id": "b"}])]
    )
    stored.aliases = {"a": "global", "b": "global"}
    found = people.mapped(stored.reader, 7, ["a", "global", "unknown"])
    assert found["a"]["mapped_to"] == [{"amplitude_id": None, "user_id": "global"}]
    assert [one["user_id"] for one in found["global"]["mapped_from"]] == ["a", "b"]
    assert found["unknown"] == {}
