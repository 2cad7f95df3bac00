"""Blocks for tests: realistic requests of about 530 bytes an event, with decisions as a fold would make them.

Not folded: a person is a number, the snapshot counts that person's events. So a test can say which rows it expects
without the code under test.
"""

from __future__ import annotations

import random
import uuid
from array import array
from collections.abc import Iterator
from typing import Any

import msgspec

from retrofill.core.block import COLUMNS, Block, Flag, Kind, Merge, Part

START_MS = 1_767_225_600_000  # 2026-01-01
FIRST_PERSON = 100_000_000_001
PLATFORMS = (
    ("Web", "Chrome", "126.0.0.0", "Apple", None, None, None),
    ("iOS", "ios", "17.5.1", "Apple", "Apple", "iPhone15,3", "Verizon"),
    ("Android", "android", "14", "google", "Google", "Pixel 8", "AT&T"),
    ("Web", "Firefox", "127.0", None, None, None, None),
)
PLACES = (
    ("United States", "California", "San Francisco", "San Francisco-Oakland-San Jose, CA"),
    ("Germany", "Berlin", "Berlin", None),
    ("Japan", "Tokyo", "Shibuya", None),
    ("Brazil", "São Paulo", "São Paulo", None),
)
TYPES = ("Page Viewed", "Button Clicked", "Song Played", "Search", "Video Started", "Signed Up")
PAGES = ("/home", "/pricing", "/docs/start", "/blog/launch", "/account", "/search", "/cart")

encode = msgspec.json.Encoder().encode


class World:
    """People whose events fill blocks. seed: the same seed makes the same blocks."""

    def __init__(self, people: int = 20_000, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.people = people
        self.counts = [0] * people
        self.ids = [
            (str(self._uuid()), str(self._uuid()), self.random.randrange(START_MS))
            for _ in range(people)
        ]

    def _uuid(self) -> uuid.UUID:
        return uuid.UUID(int=self.random.getrandbits(128), version=4)

    def blocks(self, count: int, *, rows: int = 1000, first: int = 1) -> Iterator[Block]:
        """Yield blocks first … first + count - 1, each one request of `rows` events."""
        for number in range(first, first + count):
            yield self.block(number, rows)

    def block(self, number: int, rows: int = 1000) -> Block:
        """Make one block: a request to /batch with `rows` ordinary events."""
        now = START_MS + number * 1000
        events, people, times, created, tables = [], array("q"), array("q"), array("q"), []
        for _ in range(rows):
            who = int(self.people * self.random.random() ** 1.3)
            event, table = self._event(who, now)
            events.append(event)
            people.append(FIRST_PERSON + who)
            times.append(event["time"])
            created.append(START_MS - who)
            tables.append(table)
        part = Part(7, "/batch", now, now - 5, "127.0.0.1", rows, encode({"events": events}))
        return Block(
            0,
            number,
            now + 3,
            [part],
            people.tobytes(),
            times.tobytes(),
            created.tobytes(),
            bytes([Kind.EVENT]) * rows,
            bytes(rows),
            array("i", range(rows)).tobytes(),
            self.random.randbytes(16 * rows),
            bytes(4 * rows),
            tables,
            [],
        )

    def _event(self, who: int, now: int) -> tuple[dict[str, Any], bytes]:
        choose = self.random
        self.counts[who] += 1
        user, device, born = self.ids[who]
        platform, system, version, brand, maker, model, carrier = PLATFORMS[who % 4]
        country, region, city, dma = PLACES[born % 4]
        app = f"3.{who % 7}.0"
        event = {
            "user_id": user,
            "device_id": device,
            "event_type": choose.choice(TYPES),
            "time": now - choose.randrange(900),
            "insert_id": str(self._uuid()),
            "session_id": now - now % 1_800_000 + who % 60_000,
            "event_properties": {
                "page": choose.choice(PAGES),
                "referrer": "https://www.example.com" + choose.choice(PAGES),
                "position": choose.randrange(40),
                "duration_ms": choose.randrange(60_000),
            },
            "user_properties": {"plan": ("free", "pro")[who % 2], "visits": self.counts[who]},
            "platform": platform,
            "os_name": system,
            "os_version": version,
            "country": country,
            "city": city,
            "app_version": app,
            "library": "amplitude-ts/2.11.1",
        }
        built_in = dict.fromkeys(COLUMNS)
        built_in |= {
            "platform": platform,
            "os_name": system,
            "os_version": version,
            "device_brand": brand,
            "device_manufacturer": maker,
            "device_model": model,
            "carrier": carrier,
            "country": country,
            "region": region,
            "city": city,
            "dma": dma,
            "language": "English",
            "version_name": app,
            "library": "amplitude-ts/2.11.1",
            "start_version": "3.0.0",
        }
        shown = {
            "plan": ("free", "pro")[who % 2],
            "visits": self.counts[who],
            "signed_up": f"2025-{born % 12 + 1:02}-{born % 28 + 1:02}",
            "referrer": "newsletter",
            "seats": born % 50,
        }
        return event, encode([shown, {}, {}, *built_in.values()])


def block_of(
    events: list[dict[str, Any]],
    *,
    number: int = 1,
    path: str = "/2/httpapi",
    project: int = 7,
    people: list[int] | None = None,
    kinds: list[Kind] | None = None,
    flags: list[Flag] | None = None,
    table: dict[str, Any] | None = None,
    merges: list[Merge] | None = None,
    times: list[int] | None = None,
) -> Block:
    """Make a block of one request from events as sent; what is not given is plain."""
    rows = len(events)
    kinds = kinds or [Kind.EVENT] * rows
    shown = {"user_properties": {}, "groups": {}, "group_properties": {}} | dict.fromkeys(COLUMNS)
    shown |= table or {}
    part = Part(
        project,
        path,
        START_MS + 10,
        START_MS + 5,
        None,
        rows,
        encode({"api_key": "k", "events": events}),
    )
    return Block(
        0,
        number,
        START_MS + 20,
        [part],
        array("q", people or [FIRST_PERSON] * rows).tobytes(),
        array("q", times or [START_MS] * rows).tobytes(),
        array("q", [-1] * rows).tobytes(),
        bytes(kinds),
        bytes(flags or [Flag(0)] * rows),
        array("i", [-1 if kind is Kind.DROPPED else 0 for kind in kinds]).tobytes(),
        bytes(16 * rows),
        bytes(4 * rows),
        [encode(list(shown.values()))],
        merges or [],
    )
