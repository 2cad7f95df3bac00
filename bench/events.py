"""Events to measure with: about 530 bytes of JSON each, 20,000 people, mild skew, every one with its own insert_id.

Bodies are made before anything is timed. A body is a template whose insert_ids share a marker of 24 bytes; each use
replaces the marker, so that a template can be sent any number of times at the price of one `bytes.replace`.
Everything is drawn from a seeded generator: two runs send the same events, up to the markers.
"""

from __future__ import annotations

import json
import os
import random
import uuid
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

DISTINCT = 200_000  # events made; beyond that they come again under new insert_ids
PEOPLE = 20_000
SKEW = 0.7  # person k has weight 1 / k ** SKEW
ANONYMOUS = 0.15  # share of people without a user_id
MARKER = b"--insert-id-of-request--"  # as long as the first four fields of a UUID with their dashes
START_MS = 1_790_000_000_000

_PLACES = [
    ("United States", "California", "San Francisco"),
    ("Germany", "Berlin", "Berlin"),
    ("Japan", "Tokyo", "Tokyo"),
    ("Brazil", "São Paulo", "Campinas"),
    ("India", "Karnataka", "Bengaluru"),
]
_SYSTEMS = [("iOS", "ios", "18.1"), ("Android", "android", "15"), ("Web", "Chrome", "131")]
_TYPES = ["Page Viewed", "Button Clicked", "Item Added", "Search Done", "Order Placed"]
_PLANS = ["free", "pro", "team"]


class People:
    """The people events are about, the first ones most active."""

    def __init__(self, seed: int = 1) -> None:
        self._random = random.Random(seed)
        self._weights = list(accumulate(1 / rank**SKEW for rank in range(1, PEOPLE + 1)))
        self.ids = [
            str(uuid.UUID(int=self._random.getrandbits(128), version=4)) for _ in range(PEOPLE)
        ]

    def user(self, person: int) -> str | None:
        """Return the user_id of a person, None for an anonymous one."""
        return None if person % 100 < ANONYMOUS * 100 else f"user-{person:06d}@example.com"

    def choose(self, count: int) -> list[int]:
        """Draw people by their weight."""
        return self._random.choices(range(PEOPLE), cum_weights=self._weights, k=count)

    def event(self, person: int, number: int) -> dict[str, Any]:
        """Make one event; its insert_id holds the marker."""
        rnd = self._random
        platform, os_name, os_version = _SYSTEMS[person % 3]
        country, region, city = _PLACES[person % 5]
        event: dict[str, Any] = {
            "device_id": self.ids[person],
            "event_type": _TYPES[rnd.randrange(5)],
            "time": START_MS + number * 7,
            "insert_id": f"{MARKER.decode()}{number:012x}",
            "event_properties": {
                "path": f"/catalogue/section-{rnd.randrange(40)}/item-{rnd.randrange(4000)}",
                "referrer": "search",
                "items": rnd.randrange(9),
                "price": rnd.randrange(20_000) / 100,
                "in_stock": rnd.random() < 0.8,
            },
            "user_properties": {
                "plan": _PLANS[person % 3],
                "cohort": f"2026-{person % 12 + 1:02d}",
                "theme": "dark" if person % 2 else "light",
                "last_section": rnd.randrange(5) if rnd.random() < 0.1 else 0,
            },
            "platform": platform,
            "os_name": os_name,
            "os_version": os_version,
            "app_version": f"4.{person % 20}.1",
            "country": country,
            "region": region,
            "city": city,
        }
        user = self.user(person)
        if user is not None:
            event["user_id"] = user
        return event


def lines(cache: Path, count: int = DISTINCT) -> list[bytes]:
    """Return `count` events as JSON, made at first and kept in the folder `cache`."""
    kept = cache / f"events-{count}.ndjson"
    if not kept.exists():
        people = People()
        made = [
            json.dumps(people.event(person, number), separators=(",", ":"), ensure_ascii=False)
            for number, person in enumerate(people.choose(count))
        ]
        cache.mkdir(parents=True, exist_ok=True)
        kept.write_text("\n".join(made), encoding="utf-8")
    return kept.read_bytes().split(b"\n")


def templates(made: list[bytes], *, events: int, api_key: str) -> list[bytes]:
    """Put events into bodies of `events` each."""
    head = f'{{"api_key":"{api_key}","events":['.encode()
    return [
        head + b",".join(made[first : first + events]) + b"]}"
        for first in range(0, len(made) - events + 1, events)
    ]


def bodies(made: list[bytes], count: int) -> Iterator[bytes]:
    """Yield `count` bodies from the templates, no insert_id twice."""
    for number in range(count):
        marker = os.urandom(12).hex().encode()  # 24 bytes, as MARKER
        yield made[number % len(made)].replace(MARKER, marker)
