"""The fold: snapshots, skip, identifies, groups, times. Vectors of the contract and of its two seed documents."""

from __future__ import annotations

from array import array

import msgspec
import pytest
from msgspec.structs import replace
from tests.core.history import DAY_ONE_MS, History, event, shown

from retrofill.core.block import Block, Flag, Kind, same
from retrofill.limits import Limits

USER = "b4ee5d78-e1b6-11ec-8fea-0242ac120002"


def new_yorker() -> History:
    history = History()
    history.send(event("$identify", user_id=USER, user_properties={"city": "New York"}))
    return history


def test_seed_example_one_updates_the_table_and_shows_all_of_it() -> None:
    history = new_yorker()
    row = history.send(event(user_id=USER, user_properties={"subscriptionStatus": "active"}))[0]
    assert shown(row) == {"city": "New York", "subscriptionStatus": "active"}
    assert history.table(USER) == {"city": "New York", "subscriptionStatus": "active"}


def test_seed_example_two_with_the_skip_flag_shows_only_its_own() -> None:
    history = new_yorker()
    row = history.send(
        event(user_id=USER, user_properties={"subscriptionStatus": "active"}, skip=True)
    )[0]
    assert shown(row) == {"subscriptionStatus": "active"}
    assert history.table(USER) == {"city": "New York"}


def test_seed_example_three_does_not_move_the_live_city() -> None:
    history = new_yorker()
    row = history.send(event(user_id=USER, user_properties={"city": "San Francisco"}, skip=True))[0]
    assert shown(row) == {"city": "San Francisco"}
    assert shown(history.send(event(user_id=USER))[0]) == {"city": "New York"}


@pytest.mark.parametrize(
    ("order", "colours"),
    [("A identify B", ["red", "blue"]), ("A B identify", ["red", "red"])],
)
def test_an_identify_holds_for_later_events_only(order: str, colours: list[str]) -> None:
    history = History()
    history.send(
        event("$identify", user_id="Datamonster", user_properties={"$set": {"color": "red"}})
    )
    seen = []
    for step in order.split():
        if step == "identify":
            blue = event("$identify", user_id="Datamonster", user_properties={"color": "blue"})
            assert history.send(blue)[0][0] is Kind.IDENTIFY
        else:
            row = history.send(event(f"View Page {step}", user_id="Datamonster"))[0]
            seen.append(shown(row)["color"])
    assert seen == colours


def test_an_identify_makes_no_one_new() -> None:
    history = History()
    history.send(event("$identify", user_id="Ann", user_properties={"a": 1}))
    assert history.people[1].first_seen_ms == -1
    history.send(event(user_id="Ann", time=7))
    assert history.people[1].first_seen_ms == 7
    assert history.blocks[-1].flags[0] & Flag.FIRST_EVENT


def test_an_old_event_moves_first_seen_back_and_a_later_one_does_not() -> None:
    history = History()
    for time, first in (
        (1_622_505_600_000,) * 2,
        (1_612_137_600_000,) * 2,
        (1_622_505_600_000, 1_612_137_600_000),
    ):
        history.send(event(user_id="Ann", time=time, skip=True))
        assert history.people[1].first_seen_ms == first


def test_built_in_columns_are_inherited_and_coupled() -> None:
    history = History()
    history.send(
        event(
            user_id="Ann",
            platform="iOS",
            os_name="ios",
            carrier="AT&T",
            country="US",
            city="NY",
            app_version="1.0",
            language="en-US",
        )
    )
    table = history.send(event(user_id="Ann"))[0][2]
    assert table is not None
    assert (table.platform, table.city, table.version_name, table.start_version) == (
        "iOS",
        "NY",
        "1.0",
        "1.0",
    )
    assert table.language == "English"
    table = history.send(event(user_id="Ann", os_name="android", country="DE", app_version="2.0"))[
        0
    ][2]
    assert table is not None
    assert (table.platform, table.os_name, table.carrier) == (None, "android", None)
    assert (table.country, table.city) == ("DE", None)
    assert (table.version_name, table.start_version) == ("2.0", "1.0")


def test_the_skip_flag_inherits_no_column() -> None:
    history = History()
    history.send(event(user_id="Ann", platform="iOS", app_version="1.0"))
    table = history.send(event(user_id="Ann", skip=True))[0][2]
    assert table is not None
    assert (table.platform, table.version_name, table.library) == (None, None, "http/2.0")


def test_the_library_of_a_raw_upload_is_its_endpoint() -> None:
    history = History()
    assert [
        history.send(event(user_id="Ann"), path=path)[0][2].library  # type: ignore[union-attr]
        for path in ("/2/httpapi", "/batch", "/httpapi", "/2/httpapi")
    ] == ["http/2.0", "batch/1.0", "http/1.0", "http/2.0"]


def test_remote_stands_for_the_peers_address() -> None:
    table = History().send(event(user_id="Ann", ip="$remote"))[0][2]
    assert table is not None
    assert table.ip_address == "203.0.113.9"


@pytest.mark.parametrize(
    ("client_upload_ms", "event_time"),
    [(DAY_ONE_MS, 1000), (DAY_ONE_MS - 59_999, 1000), (DAY_ONE_MS - 60_000, 61_000), (DAY_ONE_MS + 90_000, 0), (None, 1000)],
)  # fmt: skip
def test_a_clock_off_by_a_minute_or_more_moves_the_event_time(
    client_upload_ms: int | None, event_time: int
) -> None:
    history = History()
    history.send(event(user_id="Ann", time=1000), client_upload_ms=client_upload_ms)
    assert memoryview(history.blocks[0].event_time_ms).cast("q")[0] == event_time


def test_revenue_makes_a_payer_for_good() -> None:
    history = History()
    history.send(event(user_id="Ann", price=2.0))
    table = history.send(event(user_id="Ann"))[0][2]
    assert table is not None
    assert table.paying == "true"
    sdk = event("revenue_amount", user_id="Bob", event_properties={"$revenue": 1})
    table = history.send(sdk, body=b'{"events":[{"event_properties":{"$revenue":1}}]}')[0][2]
    assert table is not None
    assert table.paying == "true"


def test_groups_stay_after_an_identify_and_show_their_properties() -> None:
    history = History()
    history.send(
        event("$groupidentify", groups={"org": "Acme"}, group_properties={"$set": {"seats": 5}})
    )
    history.send(
        event(
            "$identify",
            user_id="Ann",
            groups={"org": "Acme"},
            user_properties={"$set": {"org": "Acme"}},
        )
    )
    table = history.send(event(user_id="Ann"))[0][2]
    assert table is not None
    assert msgspec.json.decode(table.groups) == {"org": ["Acme"]}
    assert msgspec.json.decode(table.group_properties) == {"org": {"Acme": {"seats": 5}}}
    table = history.send(event(user_id="Bob", groups={"org": ["Acme", "Other"]}))[0][2]
    assert table is not None
    assert msgspec.json.decode(table.groups) == {"org": ["Acme", "Other"]}
    table = history.send(event(user_id="Bob"))[0][2]
    assert table is not None
    assert msgspec.json.decode(table.groups) == {}


def test_a_group_that_is_cleared_is_empty_within_the_same_request() -> None:
    history = History()
    org = {"org": "Acme"}
    history.send(event("$groupidentify", groups=org, group_properties={"seats": 5}))
    rows = history.send(
        event("$groupidentify", groups=org, group_properties={"$clearAll": "-"}),
        event(user_id="Ann", groups=org),
        event("$groupidentify", groups=org, group_properties={"plan": "free"}),
        event(user_id="Ann", groups=org),
    )
    shown = [table.group_properties for _, _, table in rows if table is not None]
    assert [msgspec.json.decode(shown[row]) for row in (1, 3)] == [
        {},
        {"org": {"Acme": {"plan": "free"}}},
    ]
    assert history.groups["org", "Acme"] == {"plan": "free"}


# user_properties, skip → what the row shows, the table after. Table and columns are of today, the event is old.
# Source: contract, properties 6.
@pytest.mark.parametrize(
    ("sent", "skip", "seen", "after"),
    [
        ({"plan": "old"}, False, {"plan": "old", "seats": 5}, {"plan": "old", "seats": 5}),
        (None, False, {"plan": "new", "seats": 5}, {"plan": "new", "seats": 5}),
        ({"plan": "old"}, True, {"plan": "old"}, {"plan": "new", "seats": 5}),
        (None, True, {}, {"plan": "new", "seats": 5}),
    ],
)
def test_an_old_event_after_live_ones(
    sent: dict[str, str] | None, *, skip: bool, seen: dict[str, object], after: dict[str, object]
) -> None:
    history = History()
    history.send(event(user_id="Ann", user_properties={"plan": "new", "seats": 5}, city="Rome"))
    row = history.send(event(user_id="Ann", time=1000, user_properties=sent, skip=skip))[0]
    assert shown(row) == seen
    assert row[2] is not None
    assert row[2].city == (None if skip else "Rome")
    assert shown(history.send(event(user_id="Ann"))[0]) == after


def test_a_history_in_time_order_before_live_traffic_has_true_snapshots() -> None:
    history = History()
    plans = ["free", "pro", "free"]
    rows = [
        history.send(event(user_id="Ann", time=day, user_properties={"plan": plan}))[0]
        for day, plan in enumerate(plans)
    ]
    assert [shown(row)["plan"] for row in rows] == plans


def test_an_identify_writes_also_with_the_skip_flag() -> None:
    history = History()
    history.send(event("$identify", user_id="Ann", user_properties={"a": 1}, skip=True))
    assert history.table("Ann") == {"a": 1}


def test_a_skipped_event_is_no_property_update() -> None:
    history = History(Limits(property_updates_per_h=1))
    for _ in range(3):
        history.send(event(user_id="Ann", user_properties={"a": 0}, skip=True))
        history.send(event(user_id="Ann"))
    history.send(event("$identify", user_id="Ann", user_properties={"a": 1}))
    history.send(event("$identify", user_id="Ann", user_properties={"a": 2}))
    assert history.table("Ann") == {"a": 1}


def test_beyond_the_hourly_updates_the_table_stays_and_the_row_shows_its_own() -> None:
    history = History(Limits(property_updates_per_h=2))
    for n in range(3):
        row = history.send(
            event(user_id="Ann", user_properties={"n": n, "a": n}), now_ms=DAY_ONE_MS + n
        )[0]
        assert shown(row) == {"n": n, "a": n}
    assert history.table("Ann") == {"n": 1, "a": 1}
    assert history.blocks[-1].flags[0] & Flag.UPDATE_DROPPED
    history.send(event(user_id="Ann", user_properties={"n": 9}), now_ms=DAY_ONE_MS + 3_600_001)
    assert history.table("Ann") == {"n": 9, "a": 1}


def test_a_forgotten_person_comes_back_as_someone_new() -> None:
    history = History()
    history.send(event(user_id="Ann", device_id="phone", user_properties={"a": 1}))
    history.people[1].merged_into = -1
    assert history.send(event(user_id="Ann", device_id="phone"))[0][1] == 2
    assert history.table("Ann") == {}
    assert history.send(event(device_id="phone"))[0][1] == 2


def test_a_block_holds_each_snapshot_once_and_one_that_repeats_it_says_the_same() -> None:
    history = History()
    history.send(*(event(user_id=user, city=user) for user in ("Ann-1", "Bob-2")))
    history.send(*(event(user_id=user) for user in ("Ann-1", "Bob-2", "Ann-1", "Bob-2", "Ann-1")))
    block = history.blocks[-1]
    assert list(memoryview(block.table).cast("i")) == [0, 1, 0, 1, 0]
    assert len(block.tables) == 2

    def kept(*places: int) -> Block:
        """The block with its tables as an older server wrote them, one for each row."""
        tables = [block.tables[place] for place in places]
        return replace(block, table=array("i", range(5)).tobytes(), tables=tables)

    assert same(block, block)
    assert same(kept(0, 1, 0, 1, 0), block)
    assert not same(kept(0, 1, 0, 1, 1), block)
    assert not same(replace(kept(0, 1, 0, 1, 0), number=7), block)
    assert block.wide_bytes == kept(0, 1, 0, 1, 0).payload_bytes > block.payload_bytes
    assert replace(block, table=array("i", [-1] * 5).tobytes()).wide_bytes == len(
        block.parts[0].body
    )


def test_blocks_without_rows_that_show_anything_can_be_compared() -> None:
    history = History()
    history.send(event(user_id="Ann-1"))
    block = history.blocks[-1]
    empty = replace(block, parts=[], kind=b"", flags=b"", table=b"", tables=[])
    assert same(empty, empty)
    assert empty.wide_bytes == 0
    assert not same(empty, replace(empty, number=9))


def test_people_who_show_the_same_share_one_snapshot_and_one_set_of_columns() -> None:
    history = History()
    for user in ("Ann", "Bea", "Cleo", "Dora"):
        city = "Rom" if user == "Dora" else "Oslo"
        history.send(event(user_id=user, time=5, city=city, library="shared/1.0"))
    ann, bea, cleo, dora = (history.people[number] for number in (1, 2, 3, 4))
    assert ann.columns == bea.columns == cleo.columns != dora.columns
    assert ann.shown == bea.shown == cleo.shown != dora.shown
    assert cleo.columns is bea.columns
    assert cleo.shown is bea.shown


def test_who_shows_the_same_as_others_is_changed_by_what_is_new_alone() -> None:
    history = History()
    for user in ("Eve", "Fay", "Gil"):
        history.send(event(user_id=user, time=5, city="Bergen", library="shared/2.0"))
    eve = history.people[1]
    later = event(user_id="Eve", time=6, library="shared/2.0")  # her city stays
    history.send(later, now_ms=DAY_ONE_MS + 1000)
    assert history.people[1].updated_ms == eve.updated_ms
    assert history.people[1].columns == eve.columns
