"""The schedule in virtual time: limits kept, nobody held back by others, and little more time than must be."""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrofill.core.schedule import (
    Rates,
    Schedule,
    Stretch,
    Work,
    lower_bound,
)

AMPLITUDE = Rates(
    events_per_s=1000,
    requests_per_s=100,
    device_per_s=300,
    user_per_s=1000,
    events_per_request=10,
    quota_per_day=500_000,
)
LARGE = Rates(
    events_per_s=1000,
    requests_per_s=100,
    device_per_s=300,
    user_per_s=1000,
    events_per_request=1000,
    quota_per_day=500_000,
)
OPEN = Rates(events_per_request=100)
START = 1_700_000_000.0
SLACK = 1e-6


class Person(NamedTuple):
    """One person's rows: (device, user, how many) in order."""

    name: str
    stretches: list[Stretch]

    @property
    def rows(self) -> int:
        return sum(stretch.count for stretch in self.stretches)


class Sent(NamedTuple):
    """A request that arrived."""

    at: float
    events: int
    devices: dict[str, int]
    users: dict[str, int]
    people: list[tuple[str, int]]


def person(name: str, rows: int, *, devices: int = 1, turn: int = 50) -> Person:
    """A person whose rows change the device every `turn` rows."""
    stretches: list[Stretch] = []
    while rows:
        count = min(rows, turn if devices > 1 else rows)
        stretches.append(Stretch(f"{name}-{len(stretches) % devices}", name, count))
        rows -= count
    return Person(name, stretches)


def play(
    people: Iterable[Person],
    rates: Rates,
    *,
    round_trip: float = 0.05,
    connections: int = 64,
    tracked: bool = False,
) -> Iterator[Sent]:
    """Send everything to a destination that says 200 to all after one round trip; yield what arrives."""
    schedule = Schedule(rates)
    people = list(people)
    rows, owners = totals(people)
    schedule.left = sum(one.rows for one in people)
    schedule.round_trip_s = round_trip
    for key, one in enumerate(people):
        shared = max(rows[str(s.device)] * (len(owners[str(s.device)]) > 1) for s in one.stretches)
        safe = not rates.by_id or (not shared and one.rows <= rates.safe_rows)
        safe = safe and not tracked
        way = max(shared, one.rows)
        schedule.offer(
            Work(
                key,
                one.rows,
                person=one.name,
                stretches=None if safe else one.stretches,
                beyond=way - one.rows,
                long=way > 100,
            )
        )
    now = START
    flying: list[tuple[float, int, list[Work]]] = []
    number = 0
    while True:
        while flying and flying[0][0] <= now + SLACK:
            for work in heapq.heappop(flying)[2]:
                schedule.offer(work)
        request = schedule.take(now) if len(flying) < connections else None
        if request is not None:
            number += 1
            devices: defaultdict[str, int] = defaultdict(int)
            users: defaultdict[str, int] = defaultdict(int)
            for piece in request.pieces:
                for stretch in piece.stretches:
                    devices[str(stretch.device)] += stretch.count
                    users[str(stretch.user)] += stretch.count
            works = [piece.work for piece in request.pieces]
            assert len({work.key for work in works}) == len(works)
            yield Sent(
                now,
                request.events,
                devices,
                users,
                [(str(piece.work.key), piece.count) for piece in request.pieces],
            )
            heapq.heappush(flying, (now + round_trip, number, works))
            continue
        times = [flying[0][0]] if flying else []
        if schedule.wake is not None and len(flying) < connections:
            times.append(schedule.wake)
        if not times:
            return
        assert min(times) > now - SLACK, "time must go on"
        now = max(now, min(times))


def totals(people: list[Person]) -> tuple[dict[str, int], dict[str, set[str]]]:
    """How many rows each device has, and whose they are."""
    rows: defaultdict[str, int] = defaultdict(int)
    owners: defaultdict[str, set[str]] = defaultdict(set)
    for one in people:
        for stretch in one.stretches:
            rows[str(stretch.device)] += stretch.count
            owners[str(stretch.device)].add(one.name)
    return rows, owners


def bound(people: list[Person], rates: Rates, *, round_trip: float = 0.05) -> float:
    devices: defaultdict[str, int] = defaultdict(int)
    users: defaultdict[str, int] = defaultdict(int)
    for one in people:
        for stretch in one.stretches:
            devices[str(stretch.device)] += stretch.count
            users[str(stretch.user)] += stretch.count
    return lower_bound(
        rates,
        events=sum(one.rows for one in people),
        hottest_device=max(devices.values()),
        hottest_user=max(users.values()),
        longest_person=max(one.rows for one in people),
        round_trip_s=round_trip,
        start_s=START,
    ).seconds


def zipf(people: int, events: int) -> list[Person]:
    weights = [1 / (n + 1) for n in range(people)]
    scale = events / sum(weights)
    return [person(f"z{n}", max(1, int(weight * scale))) for n, weight in enumerate(weights)]


def kiosk(people: int, rows: int) -> list[Person]:
    return [Person(f"k{n}", [Stretch("kiosk", f"k{n}", rows)]) for n in range(people)]


SHAPES: dict[str, Callable[[], tuple[list[Person], Rates]]] = {
    "even": lambda: ([person(f"p{n}", 50) for n in range(2400)], AMPLITUDE),
    "even, large requests": lambda: ([person(f"p{n}", 50) for n in range(6000)], LARGE),
    "one hot device": lambda: (
        [person(f"p{n}", 20) for n in range(1500)] + [person("hot", 36_000)],
        LARGE,
    ),
    "many hot devices": lambda: (
        [person(f"p{n}", 20) for n in range(500)]
        + [person(f"hot{n}", 9000 + 700 * n) for n in range(15)],
        LARGE,
    ),
    "three hot devices of ten events a request": lambda: (
        [person(f"p{n}", 13) for n in range(4000)] + [person(f"h{n}", 9000) for n in range(3)],
        AMPLITUDE,
    ),
    "quota days": lambda: (
        [person(f"p{n}", 30) for n in range(1000)] + [person("hot", 30_000)],
        Rates(
            events_per_s=1000,
            requests_per_s=100,
            device_per_s=300,
            user_per_s=300,
            events_per_request=100,
            quota_per_day=7000,
        ),
    ),
    "all one person": lambda: ([person("only", 12_000)], AMPLITUDE),
    "one person on many devices": lambda: (
        [person("only", 60_000, devices=20)] + [person(f"p{n}", 25) for n in range(400)],
        LARGE,
    ),
    "a few people make most of it": lambda: (zipf(3000, 150_000), AMPLITUDE),
    "one long person beside many": lambda: (
        [person(f"p{n}", 25) for n in range(2500)] + [person("long", 16_000)],
        AMPLITUDE,
    ),
    "a kiosk": lambda: (
        [*kiosk(3000, 12), *(person(f"p{n}", 40) for n in range(1000))],
        LARGE,
    ),
    "one event each": lambda: ([person(f"p{n}", 1) for n in range(60_000)], AMPLITUDE),
    "no limits but the round trip": lambda: (
        [person(f"p{n}", 40) for n in range(2000)] + [person("long", 20_000)],
        OPEN,
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_history_takes_little_longer_than_it_must(shape: str) -> None:
    people, rates = SHAPES[shape]()
    random.Random(1).shuffle(people)
    sent = list(play(people, rates))
    assert sum(one.events for one in sent) == sum(one.rows for one in people)
    took = sent[-1].at - START
    assert took <= 1.01 * bound(people, rates)


def check(sent: list[Sent], rates: Rates) -> None:
    """No second and no half minute holds more than a limit; no request more than a second's allowance."""
    _check([(one.at, one.events) for one in sent], rates.events_per_s)
    _check([(one.at, 1) for one in sent], rates.requests_per_s)
    for kind, limit in (("devices", rates.device_per_s), ("users", rates.user_per_s)):
        by_id: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
        for one in sent:
            for name, count in getattr(one, kind).items():
                assert not limit or count <= limit
                by_id[name].append((one.at, count))
        for times in by_id.values():
            _check(times, limit)


def _check(times: list[tuple[float, int]], limit: int) -> None:
    for seconds in (1, 30):
        first = total = 0
        for at, count in times:
            total += count
            while times[first][0] <= at - seconds:
                total -= times[first][1]
                first += 1
            assert not limit or total <= limit * seconds


RATES = st.builds(
    Rates,
    events_per_s=st.sampled_from([0, 7, 50, 100, 333]),
    requests_per_s=st.sampled_from([0, 3, 10, 40]),
    device_per_s=st.sampled_from([0, 1, 5, 30]),
    user_per_s=st.sampled_from([0, 2, 40]),
    events_per_request=st.integers(1, 60),
)


@given(
    RATES,
    st.lists(st.tuples(st.integers(1, 120), st.integers(1, 3)), min_size=1, max_size=25),
    st.floats(0.001, 2.0),
)
def test_no_window_ever_holds_more_than_a_limit(
    rates: Rates, lengths: list[tuple[int, int]], round_trip: float
) -> None:
    people = [person(f"p{n}", rows, devices=d, turn=7) for n, (rows, d) in enumerate(lengths)]
    people += kiosk(4, 3)
    sent = list(play(people, rates, round_trip=round_trip, tracked=True))
    assert sum(one.events for one in sent) == sum(one.rows for one in people)
    assert all(one.events <= rates.events_per_request for one in sent)
    check(sent, rates)


def test_one_hot_device_holds_nobody_back() -> None:
    others = [person(f"p{n}", 20) for n in range(1000)]
    hot = Person("hot", [Stretch("hot-0", "hot", 30_000)])
    alone = list(play(others, LARGE))[-1].at
    beside = list(play([hot, *others], LARGE))
    last = max(one.at for one in beside if any(key != "0" for key, _ in one.people))
    # The hot device takes its 300 of the 1000 events a second; the others have the rest.
    assert last - START <= (alone - START) * 1000 / 700 * 1.05


def test_a_held_id_waits_and_nobody_else() -> None:
    schedule = Schedule(OPEN)
    for key, name in enumerate(("calm", "held")):
        schedule.offer(Work(key, 10, person=name, stretches=[Stretch(name, name, 10)]))
    schedule.hold("device", "held", START + 30)
    request = schedule.take(START)
    assert request is not None
    assert [piece.work.key for piece in request.pieces] == [0]
    assert schedule.take(START + 29.9) is None
    assert schedule.wake == START + 30
    assert schedule.held(START + 29.9) == 1
    assert schedule.held_until(START + 29.9) == START + 30
    assert schedule.held_until(START + 31) == START + 31
    later = schedule.take(START + 30)
    assert later is not None
    assert [piece.work.key for piece in later.pieces] == [1]


def test_a_request_counts_from_when_it_left_not_from_when_it_was_taken() -> None:
    """Between the two it is written to the journal, which takes now longer, now shorter."""
    rates = Rates(events_per_s=20, requests_per_s=4, device_per_s=10, events_per_request=5)
    schedule = Schedule(rates)
    for key in range(40):
        name = f"device-{key % 2}"
        schedule.offer(Work(key, 5, person=f"p-{key}", stretches=[Stretch(name, None, 5)]))
    chance, now, left = random.Random(7), START, []
    while (request := schedule.take(now)) is not None or schedule.wake is not None:
        if request is None:
            now = max(now + 0.001, schedule.wake or 0.0)
            continue
        now += chance.choice((0.0, 0.004, 0.15))
        schedule.leaves(request, now)
        (piece,) = request.pieces
        left.append((now, piece.count, piece.stretches[0].device))
    assert sum(count for _, count, _ in left) == 200
    for at, _, device in left:
        within = [one for one in left if at <= one[0] < at + 1.0]
        assert len(within) <= 4
        assert sum(count for _, count, _ in within) <= 20
        assert sum(count for _, count, name in within if name == device) <= 10
    # It costs no more than what lies between: 200 events, 20 a second.
    assert left[-1][0] - START <= 10.0 * (1.005 + 0.15)


def test_what_left_long_after_it_was_taken_counts_once() -> None:
    schedule = Schedule(Rates(events_per_s=10, events_per_request=10))
    schedule.offer(Work(0, 20, person="p"))
    first = schedule.take(START)
    assert first is not None
    later = START + 3.0
    schedule.leaves(first, later)
    schedule.leaves(first, later)
    assert schedule.again(first, later) == pytest.approx(later + 1.005)
    assert schedule.again(first, later + 1.005) == 0.0


def test_a_daily_quota_is_kept_over_24_hours_of_the_clock() -> None:
    rates = Rates(device_per_s=100, quota_per_day=1000, events_per_request=100)
    people = [Person("p", [Stretch("d", "u", 3500)])]
    sent = list(play(people, rates))
    for one in sent:
        hour = one.at // 3600
        day = [s.events for s in sent if hour - 24 < s.at // 3600 <= hour]
        assert sum(day) <= 1000
    least = lower_bound(rates, events=3500, hottest_device=3500, start_s=START)
    assert least.reason == "daily quota"
    assert sent[-1].at - START <= 1.001 * least.seconds


def test_property_updates_are_paced_by_the_hour_and_other_rows_are_not() -> None:
    rates = Rates(updates_per_h=100, events_per_request=50)
    updating = Person("p", [Stretch("d", "u", 250, updates=True)])
    plain = Person("q", [Stretch("e", "v", 5000)])
    sent = list(play([updating, plain], rates))
    at = [one.at - START for one in sent if any(key == "0" for key, _ in one.people)]
    assert 7200 <= at[-1] <= 7300
    assert max(o.at for o in sent if any(k == "1" for k, _ in o.people)) - START < 60


def test_a_lower_limit_is_learned_once() -> None:
    schedule = Schedule(AMPLITUDE)
    assert not schedule.learn(1000)
    assert not schedule.learn(0)
    assert schedule.learn(30)
    assert not schedule.learn(30)
    assert (schedule.rates.device_per_s, schedule.rates.user_per_s) == (30, 30)


def test_a_refused_piece_goes_back_to_the_front_in_order() -> None:
    schedule = Schedule(Rates(device_per_s=100, events_per_request=7))
    stretches = [Stretch("a", "u", 5), Stretch("b", "u", 5)]
    work = Work(1, 10, person="p", stretches=stretches)
    schedule.offer(work)
    request = schedule.take(START)
    assert request is not None
    assert request.pieces[0].stretches == [Stretch("a", "u", 5), Stretch("b", "u", 2)]
    schedule.put_back(request.pieces[0])
    assert work.stretches is not None
    assert [(s.device, s.count) for s in work.stretches] == [("a", 5), ("b", 2), ("b", 3)]
    assert work.rows == 10


def test_the_same_request_again_counts_again_and_waits_for_room() -> None:
    schedule = Schedule(Rates(events_per_s=20, device_per_s=10, events_per_request=10))
    schedule.offer(Work(1, 10, person="p", stretches=[Stretch("a", "u", 10)]))
    request = schedule.take(START)
    assert request is not None
    later = schedule.again(request, START + 0.5)
    assert START + 1 < later < START + 1.01
    assert schedule.again(request, later) == 0.0
    assert schedule.again(request, later + 0.5) > later + 0.5


@pytest.mark.parametrize(
    ("numbers", "reason", "seconds"),
    [
        ({"events": 10_000}, "events in all", 10),
        ({"events": 10_000, "hottest_device": 6000}, "hottest device", 20),
        ({"events": 1000, "hottest_user": 9000}, "hottest user", 9),
        ({"events": 1000, "longest_person": 3000}, "longest person", 30),
    ],
)
def test_the_bound_names_what_it_takes_longest_for(
    numbers: dict[str, int], reason: str, seconds: float
) -> None:
    found = lower_bound(AMPLITUDE, round_trip_s=0.1, **numbers)
    assert found.reason == reason
    assert found.seconds == pytest.approx(seconds)
