"""Identity: the scenarios of the help page "Track unique users", in order of receipt."""

from __future__ import annotations

import pytest
from tests.core.history import History, event

from retrofill.core.block import Flag
from retrofill.limits import Limits

# (device_id, user_id, person). Persons are numbered as they first appear.
SCENARIOS = {
    "never a user id": [
        ("A", None, 1), ("B", None, 2), ("B", None, 2), ("C", None, 3), ("A", None, 1), ("C", None, 3),
    ],
    "login after anonymous": [("G", None, 1), ("G", None, 1), ("G", "John", 1)],
    "one user, many devices": [("K", "Zack", 1), ("L", "Zack", 1)],
    "shared device": [
        ("R", "Jane", 1), ("R", None, 1), ("R", "Mary", 2), ("R", None, 2), ("R", None, 2),
    ],
    "second device with an anonymous part": [
        ("Y", "David", 1), ("Z", None, 2), ("Z", "David", 1), ("Z", None, 1),
    ],
    "logout by user id alone goes on with the last user": [("D", "Ann", 1), ("D", None, 1)],
    "two user ids never merge": [("D", "Ann", 1), ("D", "Bob", 2), ("D", "Ann", 1)],
    "a user without a device has a device of its own": [(None, "Ann", 1), (None, "Ann", 1), ("D", None, 2)],
}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_each_event_belongs_to_the_documented_person(name: str) -> None:
    history = History()
    people = [
        history.send(event(device_id=device, user_id=user))[0][1]
        for device, user, _ in SCENARIOS[name]
    ]
    assert people == [person for *_, person in SCENARIOS[name]]


@pytest.mark.parametrize("name", SCENARIOS)
def test_one_request_ends_in_the_same_people_as_many(name: str) -> None:
    many, one = History(), History()
    events = [event(device_id=device, user_id=user) for device, user, _ in SCENARIOS[name]]
    for single in events:
        many.send(single)
    assert [row[1] for row in one.send(*events)] == [person for *_, person in SCENARIOS[name]]
    assert (many.devices, many.users) == (one.devices, one.users)
    assert {k: p.merged_into for k, p in many.people.items()} == {
        k: p.merged_into for k, p in one.people.items()
    }


def test_a_merge_is_recorded_with_the_event_that_shows_it() -> None:
    history = History()
    history.send(event(device_id="Y", user_id="David"))
    history.send(event(device_id="Z"))
    history.send(event(device_id="Z"), event(device_id="Z", user_id="David", time=5))
    (merge,) = history.blocks[-1].merges
    assert (merge.row, merge.absorbed, merge.surviving, merge.event_time_ms) == (1, 2, 1, 5)


def test_the_newer_value_stays_after_a_merge_and_first_seen_is_the_earliest() -> None:
    history = History()
    history.send(event(device_id="Y", user_id="David", time=50, user_properties={"a": 1, "b": 1}))
    history.send(
        event(device_id="Z", time=20, user_properties={"b": 2, "c": 2}), now_ms=1_700_000_009_000
    )
    history.send(event(device_id="Z", user_id="David", time=60), now_ms=1_700_000_010_000)
    assert history.table("David") == {"a": 1, "b": 2, "c": 2}
    assert history.people[1].first_seen_ms == 20


def test_another_device_of_an_absorbed_person_leads_to_the_survivor() -> None:
    history = History()
    history.send(event(device_id="D1"))
    history.devices["D2"] = 1  # the same anonymous person on two devices
    history.send(event(device_id="Y", user_id="David"))
    history.send(event(device_id="D1", user_id="David"))
    assert history.send(event(device_id="D2"))[0][1] == 2


# A user who may absorb one person. (device_id, user_id, person, held).
HELD = {
    "the first is absorbed, the second stays apart with the device": [
        ("A", None, 1, False), ("B", None, 2, False), ("Y", "guest", 3, False),
        ("A", "guest", 3, False), ("A", None, 3, False),
        ("B", "guest", 3, True), ("B", None, 2, False), ("B", "guest", 3, True),
    ],
    "who was there first is adopted, which is no merge": [
        ("A", None, 1, False), ("A", "guest", 1, False), ("B", None, 2, False),
        ("B", "guest", 1, False), ("C", None, 3, False), ("C", "guest", 1, True),
    ],
    "a device that nobody had is the user's": [
        ("A", None, 1, False), ("Y", "guest", 2, False), ("A", "guest", 2, False),
        ("N", "guest", 2, False), ("N", None, 2, False),
    ],
    "somebody held logs in under an id of their own": [
        ("A", None, 1, False), ("B", None, 2, False), ("Y", "guest", 3, False),
        ("A", "guest", 3, False), ("B", "guest", 3, True), ("B", "Ann", 2, False),
        ("B", "guest", 3, False),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_a_user_absorbs_no_more_people_than_allowed(name: str) -> None:
    history = History(Limits(merges_per_user=1))
    found = []
    for device, user, _, _ in HELD[name]:
        _, person, _ = history.send(event(device_id=device, user_id=user))[0]
        found.append((person, bool(history.blocks[-1].flags[0] & Flag.HELD)))
    assert found == [tuple(step[2:]) for step in HELD[name]]
    assert sum(len(block.merges) for block in history.blocks) <= 1


@pytest.mark.parametrize("name", HELD)
def test_one_request_holds_the_same_people_as_many(name: str) -> None:
    history = History(Limits(merges_per_user=1))
    steps = HELD[name]
    rows = history.send(*(event(device_id=device, user_id=user) for device, user, *_ in steps))
    assert [row[1] for row in rows] == [step[2] for step in steps]
    flags = [bool(flag & Flag.HELD) for flag in history.blocks[-1].flags]
    assert flags == [step[3] for step in steps]


def test_another_limit_holds_from_then_on_and_joins_who_is_still_apart() -> None:
    history = History(Limits(merges_per_user=1))
    history.send(*(event(device_id=one) for one in "AB"), event(device_id="Y", user_id="guest"))
    history.send(*(event(device_id=one, user_id="guest") for one in "AB"))
    assert history.people[3].joined == 1
    history.limits = Limits(merges_per_user=2)
    assert history.send(event(device_id="B", user_id="guest"))[0][1] == 3
    assert history.blocks[-1].merges[0].absorbed == 2
    assert history.people[3].joined == 2


def test_without_a_limit_nobody_is_counted() -> None:
    history = History(Limits(merges_per_user=0))
    history.send(event(device_id="A"), event(device_id="Y", user_id="guest"))
    history.send(event(device_id="A", user_id="guest"))
    assert len(history.blocks[-1].merges) == 1
    assert history.people[2].joined == 0


def test_an_allowed_user_absorbs_anybody_and_is_not_counted() -> None:
    history = History(Limits(merges_per_user=1))
    history.send(*(event(device_id=one) for one in "ABC"), event(device_id="Y", user_id="guest"))
    history.send(*(event(device_id=one, user_id="guest") for one in "AB"))
    history.allowed = frozenset({"guest", "Ann"})
    history.send(event(device_id="B", user_id="guest"), event(device_id="C", user_id="guest"))
    assert [merge.absorbed for merge in history.blocks[-1].merges] == [2, 3]
    assert history.blocks[-1].parts[0].allowed == ["guest"]
    assert history.people[4].joined == 1
    history.allowed = frozenset()
    history.send(event(device_id="D"), event(device_id="D", user_id="guest"))
    assert history.blocks[-1].flags[1] & Flag.HELD
