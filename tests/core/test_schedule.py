"""The schedule in virtual time: limits kept, nobody held back by others, and little more time than must be."""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import pytest

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
    stretches = []
    while rows:
        count = min(rows, turn if devices > 1 else rows)
        stretches.append(Stretch(f"{name}-{len(stretches) % devices}", name, count))
        rows -= count
    return Person(name, stretches)


def play(
    people: Iterable[Person], rates: Rates, *, round_trip: float = 0.05, connections: int = 64
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
