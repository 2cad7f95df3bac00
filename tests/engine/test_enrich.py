"""What the server finds out by itself: the device from a user agent, the place from an address and a database."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from retrofill.core import event as events
from retrofill.core.event import Batch, Event
from retrofill.engine.enrich import Enricher
from retrofill.errors import InputError

IPHONE = (
    "Mozilla/5.0 (iPhone; CPU iPhone OS 16_6 like Mac OS X) AppleWebKit/605.1.15 "
    "(KHTML, like Gecko) Version/16.6 Mobile/15E148 Safari/604.1"
)
LYON = {
    "country": {"names": {"en": "France", "fr": "France"}},
    "subdivisions": [{"names": {"en": "Auvergne-Rhône-Alpes"}}],
    "city": {"names": {"en": "Lyon"}},
}


class Wide(msgspec.Struct):
    """A whole number of 32 bits; a plain one has 16."""

    number: int


class Long(msgspec.Struct):
    """One of 64 bits."""

    number: int


def packed(value: Any) -> bytes:
    """One value as a MaxMind database holds it. Source: MaxMind DB file format specification."""
    if isinstance(value, str):
        text = value.encode()
        size = len(text)
        return (
            bytes([2 << 5 | size]) + text if size < 29 else bytes([2 << 5 | 29, size - 29]) + text
        )
    if isinstance(value, Wide):
        return bytes([6 << 5 | 4]) + struct.pack(">I", value.number)
    if isinstance(value, Long):
        return bytes([8, 9 - 7]) + struct.pack(">Q", value.number)
    if isinstance(value, int):
        return bytes([5 << 5 | 2]) + struct.pack(">H", value)
    if isinstance(value, dict):
        inner = b"".join(packed(key) + packed(one) for key, one in value.items())
        return bytes([7 << 5 | len(value)]) + inner
    return bytes([len(value), 11 - 7]) + b"".join(map(packed, value))


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database that knows one place, for every address from 128.0.0.0 on."""
    tree = (1).to_bytes(3, "big") + (1 + 16).to_bytes(3, "big")  # left: nothing; right: the place
    about = {
        "node_count": Wide(1),
        "record_size": 24,
        "ip_version": 4,
        "database_type": "Test-City",
        "languages": ["en"],
        "binary_format_major_version": 2,
        "binary_format_minor_version": 0,
        "build_epoch": Long(1),
        "description": {"en": "test"},
    }
    path = tmp_path / "city.mmdb"
    path.write_bytes(tree + bytes(16) + packed(LYON) + b"\xab\xcd\xefMaxMind.com" + packed(about))
    return path


def enriched(enricher: Enricher, *, remote: str | None = "203.0.113.9", **said: Any) -> Event:
    wire = msgspec.json.encode({"event_type": "View", "user_id": "user-1", **said})
    found = [events.decode_one(wire)]
    body = events.encode(found)
    batch = Batch(1, "/batch", body, found, len(body), 0, remote=remote)
    enricher.enrich(batch)
    assert events.decode(batch.body) == batch.events  # what is stored is what was found
    return batch.events[0]


def place(event: Event) -> tuple[str | None, ...]:
    return event.country, event.region, event.city, event.dma


@pytest.mark.parametrize("ip", ["203.0.113.9", "$remote"])
def test_an_address_is_looked_up(database: Path, ip: str) -> None:
    found = enriched(Enricher(database), ip=ip)
    assert place(found) == ("France", "Auvergne-Rhône-Alpes", "Lyon", None)


@pytest.mark.parametrize("said", [{"country": "Italy"}, {"city": "Rome"}, {"dma": "x"}])
def test_any_part_of_a_place_that_is_sent_keeps_the_rest_from_being_looked_up(
    database: Path, said: dict[str, str]
) -> None:
    found = enriched(Enricher(database), ip="203.0.113.9", **said)
    assert [one for one in place(found) if one is not None] == list(said.values())


@pytest.mark.parametrize("ip", [None, "10.0.0.1", "2001:db8::1", "nowhere", ""])
def test_an_address_that_nobody_knows_has_no_place(database: Path, ip: str | None) -> None:
    assert place(enriched(Enricher(database), ip=ip)) == (None,) * 4


def test_a_peer_without_an_address_has_no_place(database: Path) -> None:
    assert place(enriched(Enricher(database), ip="$remote", remote=None)) == (None,) * 4


def test_without_a_database_nothing_is_looked_up() -> None:
    assert place(enriched(Enricher(None), ip="203.0.113.9")) == (None,) * 4


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.mmdb").write_bytes(b"no database")
    with pytest.raises(InputError, match="cannot be read"):
        Enricher(tmp_path / "x.mmdb")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, ("Mobile Safari", "16.6", "iPhone")),
        ({"device_model": "Own"}, ("Mobile Safari", "16.6", "Own")),
        ({"os_name": "Own"}, ("Own", None, "iPhone")),
        ({"os_version": "9"}, (None, "9", "iPhone")),
    ],
)
def test_a_user_agent_is_read_and_what_is_sent_wins(
    said: dict[str, str], expected: tuple[str | None, ...]
) -> None:
    found = enriched(Enricher(None), user_agent=IPHONE, **said)
    assert (found.os_name, found.os_version, found.device_model) == expected


def test_a_user_agent_that_nobody_knows_changes_nothing() -> None:
    found = enriched(Enricher(None), user_agent="Ünknown/\x00" + "x" * 100_000)
    assert (found.os_name, found.os_version, found.device_model) == (None, None, None)
