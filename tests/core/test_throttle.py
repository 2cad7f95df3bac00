"""Rates, quotas and the hourly property updates, beside models that remember everything."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrofill.core.throttle import (
    HOURS,
    ProjectRates,
    Quota,
    Rates,
    Tally,
    Throttled,
    UpdateWindow,
    silence,
    with_quota,
)
from retrofill.limits import MS_PER_HOUR

NOW = 1_700_000_000_000
WINDOW_S = 30
Ids = list[str | None]


def accepted(
    rates: Rates, devices: Ids, users: Ids | None = None, *, eps: int = 30, now_ms: int = NOW
) -> Throttled | None:
    users = users if users is not None else [None] * len(devices)
    found = rates.check(devices, users, eps=eps, window_s=WINDOW_S, now_ms=now_ms)
    if found is None:
        rates.count(devices, users, window_s=WINDOW_S, now_ms=now_ms)
    return found


def test_a_mean_of_exactly_the_threshold_passes_and_one_more_is_refused() -> None:
    rates = Rates()
    assert accepted(rates, ["d"] * 900) is None
    assert accepted(rates, ["e"] * 900) is None
    assert accepted(rates, ["d"]) == Throttled(30, {"d": 31}, {}, {}, {}, [0], 30)


def test_a_hundred_at_once_are_no_thirty_a_second() -> None:
    assert accepted(Rates(), ["d"] * 100) is None


def test_who_waits_thirty_seconds_passes() -> None:
    rates = Rates()
    accepted(rates, ["d"] * 900, now_ms=NOW + 999)
    assert accepted(rates, ["d"] * 900, now_ms=NOW + 29_999) is not None
    assert accepted(rates, ["d"] * 900, now_ms=NOW + 30_999) is None


def test_retry_after_says_when_the_window_lets_it_pass() -> None:
    rates = Rates()
    accepted(rates, ["d"] * 500)
    accepted(rates, ["d"] * 400, now_ms=NOW + 10_000)
    refused = accepted(rates, ["d"] * 450, now_ms=NOW + 12_000)
    assert refused is not None
    assert refused.retry_after_s == 18
    at = NOW + 12_000 + 18_000
    assert accepted(rates, ["d"] * 450, now_ms=at - 1000) is not None
    assert accepted(rates, ["d"] * 450, now_ms=at) is None


def test_what_was_refused_weighs_nothing() -> None:
    rates = Rates()
    for _ in range(5):
        assert accepted(rates, ["d"] * 901) is not None
    assert accepted(rates, ["d"] * 900) is None


def test_device_and_user_are_both_counted_and_every_index_of_either_is_listed() -> None:
    rates = Rates()
    accepted(rates, ["a"] * 600 + ["b"] * 600, ["u"] * 300 + [None] * 900)
    refused = accepted(rates, ["a"] * 301 + ["c"] * 301 + ["b"] * 300, [None] * 301 + ["u"] * 601)
    assert refused is not None
    assert (refused.devices, refused.users) == ({"a": 31}, {"u": 31})
    assert refused.events == list(range(902))


def test_events_of_others_are_not_listed() -> None:
    rates = Rates()
    accepted(rates, ["hot"] * 900)
    refused = accepted(rates, ["cold", "hot", None, "cold", "hot"])
    assert refused is not None
    assert refused.events == [1, 4]


def test_a_rate_of_0_is_off() -> None:
    assert accepted(Rates(), ["d"] * 100_000, eps=0) is None


def test_a_clock_set_back_by_an_hour_does_not_throttle_for_an_hour() -> None:
    rates = Rates()
    accepted(rates, ["d"] * 900)
    assert accepted(rates, ["d"] * 900, now_ms=NOW - 3_600_000) is None


def test_a_clock_set_back_by_a_second_stays_in_its_last_second() -> None:
    rates = Rates()
    accepted(rates, ["d"] * 900)
    assert accepted(rates, ["d"], now_ms=NOW - 1000) is not None
    assert accepted(rates, ["d"], now_ms=NOW + 30_000) is None


def test_ids_that_leave_the_window_leave_the_memory() -> None:
    rates = Rates()
    for step in range(100):
        accepted(rates, [f"{step} {one}" for one in range(200)], now_ms=NOW + step * 1000)
    assert len(rates._devices._slot_of) <= 31 * 200 + 1
    assert len(rates._devices._slot_of.id_of) <= 32 * 200


def test_at_the_bound_the_smallest_counts_are_forgotten_first() -> None:
    rates = Rates(ids_max=100)
    accepted(rates, ["hot"] * 900)
    for step in range(20):
        accepted(rates, [f"{step} {one}" for one in range(30)])
    assert len(rates._devices._slot_of) <= 101
    assert accepted(rates, ["hot"]) is not None


@pytest.mark.parametrize("seed", range(8))
def test_rates_agree_with_a_model_that_remembers_every_event(seed: int) -> None:
    chance = random.Random(seed)
    eps, now = 2, NOW
    rates = Rates()
    seen: list[tuple[int, str, str]] = []
    for _ in range(400):
        now += chance.choice((0, 1, 250, 1000, 7000, 31_000 if chance.random() < 0.05 else 500))
        size = chance.choice((1, 5, 20, 60, 100))
        devices = [chance.choice(("a", "b", "c", f"d{chance.randrange(500)}")) for _ in range(size)]
        users = [chance.choice((None, "a", f"u{chance.randrange(40)}")) for _ in range(size)]
        recent = [(kind, one) for at, kind, one in seen if at // 1000 > now // 1000 - WINDOW_S]
        counted = Counter(recent)
        over = []
        for kind, ids in (("device", devices), ("user", users)):
            more = {one: n + counted[kind, one] for one, n in Counter(ids).items() if one}
            over.append({one: -(-n // WINDOW_S) for one, n in more.items() if n > eps * WINDOW_S})
        found = accepted(rates, list(devices), list(users), eps=eps, now_ms=now)
        if not over[0] and not over[1]:
            assert found is None
            seen += [(now, "device", one) for one in devices]
            seen += [(now, "user", one) for one in users if one is not None]
        else:
            assert found is not None
            assert [found.devices, found.users] == over
            assert found.events == [
                index
                for index in range(size)
                if devices[index] in over[0] or users[index] in over[1]
            ]
            assert 1 <= found.retry_after_s <= WINDOW_S


def test_a_project_has_events_and_requests_a_second() -> None:
    rates = ProjectRates()
    limits = {"eps": 10, "requests_per_s": 1, "window_s": WINDOW_S}
    for step in range(30):
        assert rates.check(10, **limits, now_ms=NOW + step) is None
        rates.count(10, window_s=WINDOW_S, now_ms=NOW + step)
    refused = rates.check(2, **limits, now_ms=NOW + 1000)
    assert refused == Throttled(10, {}, {}, {}, {}, [0, 1], 29)
    off = {"eps": 0, "requests_per_s": 0, "window_s": WINDOW_S}
    assert rates.check(2, **off, now_ms=NOW) is None
    assert rates.check(2, **limits, now_ms=NOW + 30_000) is None


# 50 mappings a second over 30 s. Source: contract, ingest 3b.


def test_mappings_pass_until_the_window_is_full_and_again_when_it_falls_below() -> None:
    tally = Tally()
    tally.count(1499, window_s=30, now_ms=NOW)
    assert tally.wait_s(1, most=1500, window_s=30, now_ms=NOW) == 0
    tally.count(2000, window_s=30, now_ms=NOW + 5000)
    assert tally.wait_s(1, most=1500, window_s=30, now_ms=NOW + 6000) == 29
    assert tally.wait_s(1, most=1500, window_s=30, now_ms=NOW + 34_999) == 1
    assert tally.wait_s(1, most=1500, window_s=30, now_ms=NOW + 35_000) == 0


def test_a_tally_survives_a_clock_set_back() -> None:
    tally = Tally()
    tally.count(10, window_s=30, now_ms=NOW)
    assert tally.wait_s(1, most=10, window_s=30, now_ms=NOW - 1000) == 30
    assert tally.wait_s(1, most=10, window_s=30, now_ms=NOW - 3_600_000) == 0


# The daily quota: 24 steps of one hour. Source: contract, ingest 3b.

HOUR = NOW // MS_PER_HOUR * MS_PER_HOUR


def over(quota: Quota, devices: Ids, *, limit: int, now_ms: int) -> dict[str, int]:
    found, users = quota.over(devices, [None] * len(devices), limit=limit, now_ms=now_ms)
    assert users == {}
    return found


def test_stored_rows_of_a_day_count_and_an_hour_leaves_after_a_day() -> None:
    quota = Quota()
    quota.add(["d"] * 60, ["u"] * 60, now_ms=HOUR)
    quota.add(["d"] * 40, [None] * 40, now_ms=HOUR + MS_PER_HOUR)
    assert over(quota, ["d"], limit=101, now_ms=HOUR + MS_PER_HOUR) == {}
    assert over(quota, ["d", "d", "e"], limit=101, now_ms=HOUR + MS_PER_HOUR) == {"d": 100}
    last = HOUR + HOURS * MS_PER_HOUR - 1
    assert over(quota, ["d"], limit=100, now_ms=last) == {"d": 100}
    assert over(quota, ["d"], limit=100, now_ms=last + 1) == {}
    assert quota.over(["x"], ["u"], limit=1, now_ms=last + 1) == ({}, {})


def test_a_quota_of_0_is_off() -> None:
    assert Quota().over(["d"] * 9, ["u"] * 9, limit=0, now_ms=NOW) == ({}, {})


def test_a_quota_loaded_from_its_rows_says_the_same() -> None:
    chance = random.Random(1)
    quota, now = Quota(), HOUR
    for _ in range(60):
        devices = [f"d{chance.randrange(9)}" for _ in range(50)]
        quota.add(list(devices), [chance.choice((None, "u", "v")) for _ in range(50)], now_ms=now)
        now += chance.randrange(MS_PER_HOUR)
    again = Quota()
    again.load(*quota.rows())
    for later in range(0, 30 * MS_PER_HOUR, MS_PER_HOUR):
        names: Ids = [f"d{index}" for index in range(9)]
        users: Ids = ["u", "v", "w", *[None] * 6]
        asked = {"limit": 2, "now_ms": now + later}
        assert again.over(names, users, **asked) == quota.over(names, users, **asked)
        quota.add(["d0"], [None], now_ms=now + later)
        again.add(["d0"], [None], now_ms=now + later)


def test_a_loaded_hour_goes_on_whatever_the_order_of_its_ids() -> None:
    quota = Quota()
    hour = 472_222
    quota.load([(hour - 1, {"a": 1, "b": 1, "c": 1}), (hour, {"c": 5, "a": 2, "b": 3})], [])
    quota.add(["a"], [None], now_ms=hour * MS_PER_HOUR)
    quota.add(["b"], [None], now_ms=(hour + 1) * MS_PER_HOUR)
    over = quota.over(["a", "b", "c"], [None] * 3, limit=1, now_ms=(hour + 1) * MS_PER_HOUR)
    assert over == ({"a": 4, "b": 5, "c": 6}, {})


def test_rows_of_the_past_that_are_taken_back_or_come_again_count_as_if_they_had_been_so() -> None:
    chance = random.Random(3)
    for ids_max in (1000, 6):
        quota, control = Quota(ids_max), Quota()
        gone: dict[tuple[int, str], int] = {}
        back: dict[tuple[int, str], int] = {}
        for hour in range(30):
            now = HOUR + hour * MS_PER_HOUR
            for _ in range(20):
                one, fate = f"d{chance.randrange(9)}", chance.randrange(3)
                place = now // MS_PER_HOUR, one
                if fate != 1:
                    quota.add([one], [None], now_ms=now)
                if fate != 2:
                    control.add([one], [None], now_ms=now)
                if fate == 1:
                    back[place] = back.get(place, 0) + 1
                if fate == 2:
                    gone[place] = gone.get(place, 0) + 1
        changes = [(*place, back.get(place, 0) - gone.get(place, 0)) for place in back | gone]
        quota.change(changes, [], now_ms=now)
        names: Ids = [f"d{index}" for index in range(9)]
        for later in range(0, 30 * MS_PER_HOUR, MS_PER_HOUR):
            mine = over(quota, names, limit=1, now_ms=now + later)
            theirs = over(control, names, limit=1, now_ms=now + later)
            if ids_max > len(names):
                assert mine == theirs
            else:  # some were forgotten on the way: they count less
                assert all(0 < count <= theirs[one] for one, count in mine.items())


def test_many_rows_within_one_hour_are_counted_whole() -> None:
    quota = Quota()
    names: Ids = [f"d{index}" for index in range(1000)]
    for _ in range(300):
        quota.add(names, [None] * 1000, now_ms=HOUR)
    assert over(quota, ["d7"], limit=300, now_ms=HOUR) == {"d7": 300}
    assert len(quota._devices._open) < 1 << 18
    assert over(quota, ["d7"], limit=1, now_ms=HOUR + HOURS * MS_PER_HOUR) == {}


def test_a_refusal_joins_rates_and_quota_and_lists_the_events_of_both() -> None:
    devices: Ids = ["fast", "full", "fine", None]
    users: Ids = [None, None, None, "much"]
    throttled = Throttled(30, {"fast": 31}, {}, {}, {}, [0], 7)
    found = with_quota(
        throttled, devices, users, ({"full": 500_000}, {"much": 500_001}), eps=30, now_ms=HOUR + 1
    )
    assert found == Throttled(
        30, {"fast": 31}, {}, {"full": 500_000}, {"much": 500_001}, [0, 1, 3], 3600
    )
    assert with_quota(throttled, devices, users, ({}, {}), eps=30, now_ms=NOW) is throttled
    assert with_quota(None, devices, users, ({}, {}), eps=30, now_ms=NOW) is None


def test_silenced_devices_are_named_once_with_each_of_their_events() -> None:
    throttled = Throttled(100, {"d2": 101}, {}, {}, {}, [2], 7)
    found = silence(throttled, ["d1", "d3", "d2", "d1", None], {"d1", "d9"}, eps=100)
    assert found is not None
    assert (found.silenced_devices, found.silenced_events) == (["d1"], [0, 3])
    assert (found.devices, found.events, found.eps_threshold) == ({"d2": 101}, [2], 100)
    assert silence(throttled, ["d2", None], {"d1"}, eps=100) is None
    assert silence(throttled, ["d2"], frozenset(), eps=100) is None


# Property updates: 1,800 in a rolling hour. Source: contract, properties 3 and 7.


def test_the_update_after_the_last_allowed_is_refused_until_the_hour_has_passed() -> None:
    updates: list[int] = []
    for step in range(3):
        assert UpdateWindow.allowed(updates, NOW + step, 3)
        updates = UpdateWindow.added(updates, NOW + step)
    assert updates == [NOW, 1, NOW + 1, 1, NOW + 2, 1]
    assert not UpdateWindow.allowed(updates, NOW + MS_PER_HOUR - 1, 3)
    assert UpdateWindow.allowed(updates, NOW + MS_PER_HOUR, 3)
    assert UpdateWindow.added(updates, NOW + MS_PER_HOUR) == [
        NOW + 1, 1, NOW + 2, 1, NOW + MS_PER_HOUR, 1,
    ]  # fmt: skip


def test_a_limit_of_0_is_off() -> None:
    assert UpdateWindow.allowed([NOW, 10_000], NOW, 0)


@given(st.lists(st.integers(0, 2 * MS_PER_HOUR), max_size=40).map(sorted), st.integers(1, 10))
def test_updates_agree_with_a_model_that_remembers_every_one(times: list[int], limit: int) -> None:
    updates: list[int] = []
    model: list[int] = []
    for now in times:
        may = sum(now - MS_PER_HOUR < at for at in model) < limit
        assert UpdateWindow.allowed(updates, now, limit) == may
        if may:
            before = list(updates)
            after = UpdateWindow.added(updates, now)
            assert updates == before
            updates = after
            model.append(now)
        assert sum(updates[1::2]) <= limit
