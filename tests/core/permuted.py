"""Random histories of one project, as they are sent, without conflicting duplicates: for tests of event time."""

from __future__ import annotations

import random
from typing import Any

Sent = tuple[str, dict[str, Any]]
"""Path and event."""

BEGUN_MS = 1_600_000_000_000
_DEVICES = ["phone-1", "phone-2", "kiosk-9", "tablet-4", "desk-5", "desk-6", None]
_USERS = ["ann-111", "bob-222", "eve-333", "joe-444"]
_ORGS = ["acme", "zeta"]
_OPERATIONS = ("$set", "$setOnce", "$add", "$append", "$prepend", "$preInsert", "$postInsert")


def history(seeded: random.Random, count: int, *, crowd: int = 3) -> list[Sent]:
    """Make some events: people in `crowd` circles that share no ids, so that not everyone is one closure."""
    sent = []
    now_ms = BEGUN_MS
    for number in range(count):
        now_ms += seeded.choice([0, 1, 1000, 60_000, 600_000])
        circle = seeded.randrange(crowd)
        sent.append(_event(seeded, number, now_ms, f"{circle}"))
    return sent


def _event(seeded: random.Random, number: int, now_ms: int, circle: str) -> Sent:
    device = seeded.choice(_DEVICES)
    user = seeded.choice([*_USERS, None, None, None, None])
    if device is None and user is None:
        device = "phone-1"
    one: dict[str, Any] = {"event_type": seeded.choice(["open", "buy"]), "time": now_ms}
    if device:
        one["device_id"] = device + circle
    if user:
        one["user_id"] = user + circle
    _say(seeded, one, number)
    return _path(seeded, one), one


def _say(seeded: random.Random, one: dict[str, Any], number: int) -> None:
    if seeded.random() < 0.5:
        one["insert_id"] = f"i-{seeded.randrange(10**9)}-{number}"
    if seeded.random() < 0.3:
        one["event_id"] = number
    if seeded.random() < 0.7:
        one["user_properties"] = properties(seeded)
    for name, choices in (
        ("platform", ["iOS", "Android"]),
        ("device_model", ["iPhone 9", "Pixel"]),
        ("country", ["Chad", "Peru"]),
        ("language", ["de", "English"]),
        ("app_version", ["1.0", "2.0"]),
        ("ip", ["$remote", "1.2.3.4"]),
        ("revenue", [3.5]),
    ):
        if seeded.random() < 0.15:
            one[name] = seeded.choice(choices)
    if seeded.random() < 0.15:
        one["$skip_user_properties_sync"] = True
    if seeded.random() < 0.1:
        one["groups"] = {"org": seeded.choice(_ORGS)}


def _path(seeded: random.Random, one: dict[str, Any]) -> str:
    """Say which way an event goes, and make it an identify or a group identify now and then."""
    chance = seeded.random()
    if chance < 0.1:
        one["event_type"] = "$identify"
        one.setdefault("user_properties", {"$set": {"plan": "x"}})
        if seeded.random() < 0.6:
            one["groups"] = {"org": seeded.choice(_ORGS)}
        return "/identify"
    if chance < 0.2:
        one["event_type"] = "$groupidentify"
        one["groups"] = {"org": seeded.choice(_ORGS)}
        one["group_properties"] = {"$set": {"size": seeded.randint(1, 9)}, "$add": {"n": 1}}
        one.pop("user_properties", None)
        if seeded.random() < 0.5:
            one.pop("user_id", None)
            one.pop("device_id", None)
        return "/groupidentify"
    return seeded.choice(["/2/httpapi", "/batch"])


def properties(seeded: random.Random) -> dict[str, Any]:
    """What an event says of a user: each of the ten operations, plain values, or several at once."""
    name = seeded.choice(["color", "plan", "count"])
    value: Any = seeded.choice([1, 2, "a", "b"])
    number = seeded.randint(-3, 3)
    choices: list[dict[str, Any]] = [
        {name: value},
        *({operation: {name: value}} for operation in _OPERATIONS if operation != "$add"),
        {"$add": {name: number}},
        {"$remove": {name: value}},
        {"$unset": {name: "-"}},
        {"$clearAll": "-"},
        {"$set": {"plan": value}, "$add": {"count": number}},
    ]
    return seeded.choice(choices)
