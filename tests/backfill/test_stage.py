"""Stages: order, people, insert_ids, duplicates, bounds, and what is left when the machine stops."""

from __future__ import annotations

import mmap
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.backfill import killing
from tests.backfill.staging import COLUMNS, events, letters, ndjson, rows, run
from tests.backfill.staging import table as whole

from retrofill.backfill import intake, manifest, order, people, records, spill, stage
from retrofill.backfill.sets import TEXT, Set
from retrofill.errors import CorruptError, InputError

MAPPING = {
    "event": {
        "user_id": "user",
        "device_id": "device",
        "event_type": "event",
        "time": "at",
        "insert_id": "id",
        "event_properties": {"n": "n"},
    },
    "source": {"columns": {"user": "VARCHAR", "device": "VARCHAR", "id": "VARCHAR"}},
}


def row(
    n: int, *, user: str | None = None, device: str | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "user": user,
        "device": device,
        "event": "Open",
        "at": 1700000000000 + n,
        "n": n,
        **more,
    }


def test_git_history_is_staged_whole(tmp_path: Path, data: Path) -> None:
    found = run(
        tmp_path / "work",
        data / "git-history.ndjson.gz",
        str(data / "git-history.map.yaml"),
        sets=4,
    )
    assert (found.rows, found.events, found.people, found.devices) == (60_966, 60_966, 404, 423)
    assert found.types == {"File Changed": 43_133, "Commit": 17_833}
    assert sum(found.days.values()) == 60_966
    assert found.refused == {}
    assert found.duplicates == manifest.Duplicates()
    assert found.hot_people[0].events == 25_814
    check_order(tmp_path / "work")
    assert len({one["insert_id"] for one in rows(tmp_path / "work")}) == 60_966


def test_shop_clickstream_is_staged_whole_with_made_insert_ids(tmp_path: Path, data: Path) -> None:
    found = run(
        tmp_path / "work",
        data / "shop-clickstream.csv.gz",
        str(data / "shop-clickstream.map.yaml"),
        sets=4,
    )
    assert (found.rows, found.events, found.people, found.devices) == (31_106, 31_106, 600, 0)
    check_order(tmp_path / "work")
    first = rows(tmp_path / "work")
    assert len({one["insert_id"] for one in first}) == 31_106
    run(
        tmp_path / "again",
        data / "shop-clickstream.csv.gz",
        str(data / "shop-clickstream.map.yaml"),
        sets=4,
    )
    assert rows(tmp_path / "again") == first
    sessions = {event["user_id"]: event["session_id"] for event in events(tmp_path / "work")}
    assert all(isinstance(session, int) for session in sessions.values())


def check_order(work: Path) -> None:
    """Rows of a set stand by person, time, file and line; a person is in one set; what a row says is true."""
    people_seen: dict[int, int] = {}
    found = manifest.read(work / "stage")
    assert found is not None
    for number, one in enumerate(found.sets):
        table = whole(work / "stage" / one.path)
        assert table.schema.names == COLUMNS
        assert table.num_rows == one.events
        assert sum(table["bytes"].to_pylist()) == one.bytes
        assert table["seq"].to_pylist() == list(range(one.events))
        keys = [
            tuple(key.values())
            for key in table.select(["person", "time_ms", "file", "line"]).to_pylist()
        ]
        assert keys == sorted(keys)
        assert one.people == len(set(table["person"].to_pylist()))
        for person in set(table["person"].to_pylist()):
            assert people_seen.setdefault(person, number) == number
        for staged in table.slice(0, 50).to_pylist():
            event = msgspec.json.decode(staged["json"])
            assert len(staged["json"].encode()) == staged["bytes"]
            assert event["insert_id"] == staged["insert_id"]
            assert event["time"] == staged["time_ms"]
            assert event["event_type"] == staged["event_type"]
            assert event.get("user_id") == staged["user_id"]
            assert event.get("device_id") == staged["device_id"]


def test_a_person_is_whoever_shares_a_device_or_a_user(tmp_path: Path) -> None:
    source = [
        row(0, device="device-a"),  # before the login
        row(1, device="device-a", user="user-1"),
        row(2, device="device-b", user="user-1"),
        row(3, device="device-b"),
        row(4, user="user-1"),
        row(5, device="device-c"),
        row(6, user="user-2"),
    ]
    random.Random(1).shuffle(source)
    found = run(tmp_path / "work", ndjson(tmp_path / "s.ndjson", source), MAPPING)
    assert found.people == 3
    persons: dict[int, list[int]] = {}
    for one in rows(tmp_path / "work"):
        persons.setdefault(one["person"], []).append(one["time_ms"] - 1700000000000)
    assert sorted(persons.values()) == [[0, 1, 2, 3, 4], [5], [6]]


def test_equal_times_keep_the_order_of_the_source(tmp_path: Path) -> None:
    source = [{**row(0, user="user-1"), "n": n} for n in range(500)]
    run(tmp_path / "work", ndjson(tmp_path / "s.ndjson", source), MAPPING)
    told = [
        msgspec.json.decode(one["json"])["event_properties"]["n"] for one in rows(tmp_path / "work")
    ]
    assert told == list(range(500))


def test_a_device_of_too_many_users_joins_nobody(tmp_path: Path) -> None:
    source = [row(n, device="kiosk-1", user=f"user-{n:02}") for n in range(11)]
    source += [row(50, device="kiosk-1")]
    source += [row(60 + n, device=f"own-{n:02}", user=f"user-{n:02}") for n in range(11)]
    found = run(tmp_path / "work", ndjson(tmp_path / "s.ndjson", source), MAPPING)
    assert found.people == 12
    assert [(one.kind, one.id, one.events) for one in found.kiosks] == [("device", "kiosk-1", 12)]
    joined = run(tmp_path / "joined", tmp_path / "s.ndjson", MAPPING, kiosk_limit=11)
    assert (joined.people, joined.kiosks) == (1, [])


def test_a_user_who_meets_too_many_others_joins_nobody(tmp_path: Path) -> None:
    source = [row(n, device=f"device-{n:02}", user="guest") for n in range(12)]
    source += [row(50 + n, device=f"device-{n:02}", user=f"user-{n:02}") for n in range(12)]
    source += [row(80 + n, device=f"device-{n:02}") for n in range(12)]
    found = run(tmp_path / "work", ndjson(tmp_path / "s.ndjson", source), MAPPING)
    assert [(one.kind, one.id) for one in found.kiosks] == [("user", "guest")]
    assert found.people == 13
    by_person = Counter(one["person"] for one in rows(tmp_path / "work"))
    assert sorted(by_person.values()) == [2] * 12 + [12]


def test_one_person_on_many_devices_is_one(tmp_path: Path) -> None:
    source = [row(n, device=f"device-{n:03}", user="user-1" if n % 2 else None) for n in range(200)]
    source += [row(500 + n, device=f"device-{n:03}", user="user-1") for n in range(200)]
    found = run(tmp_path / "work", ndjson(tmp_path / "s.ndjson", source), MAPPING)
    assert (found.people, found.kiosks) == (1, [])


def test_rows_with_one_insert_id_on_one_device_are_staged_once(tmp_path: Path) -> None:
    source = [
        row(5, user="user-1", device="device-1", id="a"),
        row(5, user="user-1", device="device-1", id="a"),  # the same again
        row(
            3, user="user-1", device="device-1", id="a"
        ),  # earlier, hence first: the other two differ from it
        row(5, user="user-1", device="device-2", id="a"),  # another device's
        row(7, user="user-2", id="b"),
        row(7, user="user-2", id="b"),
        row(9, user="user-3", id="b"),
        *[row(100 + n, user="user-9", id=f"x{n}") for n in range(60)],
    ]
    found = run(tmp_path / "work", ndjson(tmp_path / "s.ndjson", source), MAPPING)
    assert found.duplicates == manifest.Duplicates(same=1, different=2)
    assert found.events == 64
    told = letters(tmp_path / "work")
    assert {letter["line"] for letter in told} == {1, 2}
    assert [msgspec.json.decode(letter["row"])["id"] for letter in told] == ["a", "a"]
    assert all("insert_id: an earlier row" in letter["reason"] for letter in told)
    staged = Counter((one["device_id"], one["insert_id"]) for one in rows(tmp_path / "work"))
    assert staged["device-1", "a"] == staged["device-2", "a"] == 1


def test_equal_events_without_insert_id_are_all_staged_and_told_apart(tmp_path: Path) -> None:
    source = [row(n % 3, user="user-1") | {"n": 1} for n in range(9)]
    run(tmp_path / "work", ndjson(tmp_path / "s.ndjson", source), MAPPING)
    ids = [one["insert_id"] for one in rows(tmp_path / "work")]
    assert len(set(ids)) == 9
    hashes = {one.split("-")[0] for one in ids}
    assert sorted(ids) == sorted(f"{one}{end}" for one in hashes for end in ("", "-1", "-2"))
    run(tmp_path / "other", tmp_path / "s.ndjson", MAPPING, import_id="autumn", sets=7)
    assert sorted(one["insert_id"] for one in rows(tmp_path / "other")) == sorted(ids)


def test_bounds_of_time_leave_rows_out_and_count_them(tmp_path: Path) -> None:
    source = [
        row(n, user="user-1", event="A" if n % 2 else "B") | {"event": "A" if n % 2 else "B"}
        for n in range(10)
    ]
    found = run(
        tmp_path / "work",
        ndjson(tmp_path / "s.ndjson", source),
        MAPPING,
        since_ms=1700000000002,
        until_ms=1700000000008,
        until_types={"A": 1700000000005},
    )
    assert found.left_out == {"since": 2, "until": 4}
    assert [event["event_properties"]["n"] for event in events(tmp_path / "work")] == [2, 3, 4, 6]


def test_a_sample_takes_whole_people(tmp_path: Path) -> None:
    source = [row(n, user=f"user-{n % 400:03}") for n in range(1200)]
    found = run(tmp_path / "work", ndjson(tmp_path / "s.ndjson", source), MAPPING, sample=0.25)
    assert 60 < found.people < 140
    assert found.events == 3 * found.people
    assert found.left_out == {"sample": 1200 - found.events}


def test_lost_ids_are_counted_by_reason(tmp_path: Path) -> None:
    source = [
        row(0, user="usr", device="device-1"),
        row(1, user="NULL", device="device-1"),
        row(2, user="user-1", device="-1"),
        row(3, user="anonymous", device="device-1"),
        row(4, user="12", device="n/a"),
        row(5, user="13", device=None),
        row(6, user=None, device=None),
        row(7, user="ü" * 1025, device="device-1"),
        row(8, user="ü" * 1024, device="x" * 1025),
        row(9, user="x" * 1025, device=None),
    ]
    source_file = ndjson(tmp_path / "s.ndjson", source)
    found = run(tmp_path / "work", source_file, MAPPING, bad_rows=0.5)
    assert found.ids == {
        "user_id too short": 1,
        "user_id null-like": 1,
        "device_id forbidden": 1,
        "user_id forbidden": 1,
        "user_id too long": 1,
        "device_id too long": 1,
        "user_id too long, no other": 1,
        "user_id too short, no other": 2,
        "device_id null-like, no other": 1,
    }
    assert found.events == 6
    assert found.refused == {"no usable id": 4}
    told = (tmp_path / "work" / "dead-letters.ndjson").read_text().splitlines()
    assert [msgspec.json.decode(line)["reason"] for line in told] == [
        "no usable id: user_id too short and device_id null-like, and there is no other",
        "no usable id: user_id too short, and there is no other",
        "no usable id: user_id and device_id are empty",
        "no usable id: user_id too long, and there is no other",
    ]


def test_the_import_travels_in_every_event_and_sync_is_as_told(tmp_path: Path) -> None:
    source = ndjson(tmp_path / "s.ndjson", [row(0, user="user-1")])
    run(tmp_path / "skip", source, MAPPING)
    run(tmp_path / "sync", source, MAPPING, skip_user_properties_sync=False)
    assert events(tmp_path / "skip")[0]["$skip_user_properties_sync"] is True
    assert "$skip_user_properties_sync" not in events(tmp_path / "sync")[0]


def test_a_stage_asked_for_again_is_simply_there(tmp_path: Path) -> None:
    source = ndjson(tmp_path / "s.ndjson", [row(n, user="user-1") for n in range(5)])
    first = run(tmp_path / "work", source, MAPPING)
    made = (tmp_path / "work" / "stage" / "manifest.json").stat().st_mtime_ns
    assert run(tmp_path / "work", source, MAPPING) == first
    assert (tmp_path / "work" / "stage" / "manifest.json").stat().st_mtime_ns == made
    ndjson(source, [row(n, user="user-1") for n in range(6)])
    assert run(tmp_path / "work", source, MAPPING).events == 6
    assert run(tmp_path / "work", source, MAPPING, import_id="other").import_id == "other"


def test_a_crash_while_staging_leaves_no_stage_and_the_next_run_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ndjson(tmp_path / "s.ndjson", [row(n, user="user-1") for n in range(5)])

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "publish", crash)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "work", source, MAPPING)
    assert manifest.read(tmp_path / "work" / "stage") is None
    # What a killed process leaves behind is in nobody's way.
    (tmp_path / "work" / "stage.new" / "set-0.rows").write_bytes(b"half")
    (tmp_path / "work" / "scratch" / "checkpoint.json").write_bytes(b"half")
    (tmp_path / "work" / "scratch" / "spill.arrow").write_bytes(b"half")
    assert run(tmp_path / "work", source, MAPPING).events == 5
    assert sorted(one.name for one in (tmp_path / "work").iterdir()) == [
        "dead-letters.ndjson",
        "lock",
        "stage",
    ]


def test_a_broken_manifest_is_told(tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "manifest.json").write_text("{")
    with pytest.raises(CorruptError, match="cannot be read"):
        manifest.read(tmp_path / "stage")
    source = ndjson(tmp_path / "s.ndjson", [row(0, user="user-1")])
    found = run(tmp_path / "work", source, MAPPING)
    path = tmp_path / "work" / "stage" / "manifest.json"
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(found, version=99)))
    with pytest.raises(InputError, match=r"has version 99.*no journal\.db") as other:
        run(tmp_path / "work", source, MAPPING)
    assert other.value.where == str(path)
    shutil.rmtree(path.parent)  # as it says
    assert run(tmp_path / "work", source, MAPPING).events == 1


def test_an_empty_source_makes_an_empty_stage(tmp_path: Path) -> None:
    declared = {
        **MAPPING,
        "source": {
            "columns": dict.fromkeys(("user", "device", "id", "event", "n"), "VARCHAR")
            | {"at": "BIGINT"}
        },
    }
    found = run(tmp_path / "work", ndjson(tmp_path / "s.ndjson", []), declared)
    assert (found.events, found.first_ms, [one.events for one in found.sets]) == (0, None, [0, 0])


def test_a_group_of_large_rows_is_bounded_by_bytes(tmp_path: Path) -> None:
    """What a sender reads at once: 4,096 rows of 40 KB would be 160 MB."""
    large = {"n": {f"key-{n}": "x" * 1000 for n in range(40)}}
    made = [row(n, user=f"user-{n % 50:02}") | large for n in range(600)]
    run(tmp_path, ndjson(tmp_path / "s.ndjson", made), MAPPING)
    for path in (tmp_path / "stage").glob("set-*.rows"):
        with Set(path) as one:
            assert one.groups >= 2
            assert all(group.nbytes < 1.5 * order.GROUP_BYTES for group in one.batches([TEXT]))
    assert len(rows(tmp_path)) == 600


def test_parts_are_bounded_by_bytes() -> None:
    """Arrow counts the bytes of a part's texts with 32 bits: 4,096 rows of 525 KB do not fit."""
    most = order.PART_BYTES
    sizes = np.array([525 * 1024] * 4096 + [most, 1, most - 1, 1, 3 * most, 2], np.int64)
    found = [*order.bounded(sizes, 7)]
    assert found[-5:] == [
        (4103, 4104), (4104, 4106), (4106, 4107), (4107, 4108), (4108, 4109),
    ]  # fmt: skip
    assert [7, *(end for _, end in found)] == [*(start for start, _ in found), 7 + len(sizes)]
    for start, end in found:
        assert end - start == 1 or sizes[start - 7 : end - 7].sum() <= most
    assert most + records.RECORD_BYTES_MAX < 2**31


def test_more_bytes_than_arrow_counts_are_not_made_texts() -> None:
    most = 2**31 - 1
    room = pa.py_buffer(mmap.mmap(-1, most + 1))  # of which no page is ever touched
    edges = np.array([0, 5, most], np.int64)
    found = spill.strings(edges, room)
    assert pc.binary_length(found).to_pylist() == [5, most - 5]
    edges[-1] += 1
    with pytest.raises(AssertionError, match="2 rows have 2,147,483,648 bytes"):
        spill.strings(edges, room)


@pytest.mark.parametrize("how", ["in one", "laid"])
def test_equal_events_are_told_apart_across_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """All events of a person may have one time: a history by day has. They are as many parts as their bytes take."""
    draw = random.Random(3)
    equal = {"event": {**killing.PLAIN, "event_properties": "event_properties"}}
    source: list[Any] = []
    for _ in range(1200):
        own = {"insert_id": f"id-{draw.randrange(200)}"} if draw.random() < 0.6 else {}
        ids = {"user_id": f"user-{draw.randrange(3)}", "device_id": f"device-{draw.randrange(2)}"}
        at = {"event_type": "Open", "time": 1_700_000_000_000 + draw.randrange(2)}
        source.append({**ids, **at, **own, "event_properties": {"n": draw.randrange(4)}})
    ndjson(tmp_path / "s.ndjson", source)
    monkeypatch.setattr(intake, "SCANNED_BYTES", 0)
    one = run(tmp_path / "one", tmp_path / "s.ndjson", equal, bad_rows=0.5)
    made: list[int] = []
    part = order.Sorter._part

    def noted(self: order.Sorter, batch: pa.RecordBatch, person: Any) -> None:
        made.append(batch.num_rows)
        part(self, batch, person)

    monkeypatch.setattr(order.Sorter, "_part", noted)
    monkeypatch.setattr(order, "PART_BYTES", 2000)
    if how == "laid":
        monkeypatch.setattr(stage, "PLAIN_BYTES", 0)
        monkeypatch.setattr(order, "LAID_BUCKET_BYTES", 60_000)
    many = run(tmp_path / "many", tmp_path / "s.ndjson", equal, bad_rows=0.5)
    assert len(made) > 40
    assert max(made) < 20
    assert rows(tmp_path / "many") == rows(tmp_path / "one")
    assert msgspec.structs.replace(many, hot_people=[]) == msgspec.structs.replace(
        one, hot_people=[]
    )


def test_many_small_buckets_give_the_same_stage_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(7)
    source = [
        row(
            draw.randrange(3000),
            user="hot-user" if draw.random() < 0.6 else f"user-{draw.randrange(80):03}",
            device=f"device-{draw.randrange(300):03}",
        )
        for _ in range(4000)
    ]
    ndjson(tmp_path / "s.ndjson", source)
    run(tmp_path / "one", tmp_path / "s.ndjson", MAPPING, sets=5)
    monkeypatch.setattr(order, "BUCKET_BYTES", 20_000)
    monkeypatch.setattr(stage, "PLAIN_BYTES", 0)
    run(tmp_path / "many", tmp_path / "s.ndjson", MAPPING, sets=5)
    check_order(tmp_path / "many")
    assert rows(tmp_path / "many") == rows(tmp_path / "one")


# Pairs of (device, user), 0 for none.
PAIRS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 8)), max_size=40)


@settings(max_examples=200)
@given(PAIRS, st.integers(1, 6))
def test_people_are_the_components_that_a_walk_finds(
    pairs: list[tuple[int, int]], limit: int
) -> None:
    device = np.array([one for one, _ in pairs], np.int64)
    user = np.array([1000 + one if one else 0 for _, one in pairs], np.int64)
    gathered = people.Pairs()
    gathered.add(device, user)
    devices, users, counts = gathered.compact()
    assert counts.sum() == len(pairs)
    found = people.join(devices, users, kiosk_limit=limit)
    assert found.of(device, user).tolist() == walked(device.tolist(), user.tolist(), limit)


def walked(device: list[int], user: list[int], limit: int) -> list[int]:
    """The same by the book: drop kiosks, walk the graph, name each component by its smallest user, or its device."""
    edges = {(d, u) for d, u in zip(device, user, strict=True) if d and u}
    crowded = {d for d, _ in edges if len({u for e, u in edges if e == d}) > limit}
    calm = {(d, u) for d, u in edges if d not in crowded}
    mixed = {
        u
        for _, u in edges
        if len({v for d, w in calm if w == u for e, v in calm if e == d and v != u}) > limit
    }
    calm = {(d, u) for d, u in calm if u not in mixed}

    def component(node: int) -> int:
        seen, todo = {node}, [node]
        while todo:
            at = todo.pop()
            near = {b for a, b in calm if a == at} | {a for a, b in calm if b == at}
            todo += near - seen
            seen |= near
        users = [one for one in seen if one >= 1000]
        return min(users) if users else node

    return [component(u or d) for d, u in zip(device, user, strict=True)]
