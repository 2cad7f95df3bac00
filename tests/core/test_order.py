"""Event time: any order of arrival ends in the same rows and values, once those that a late event marks are folded again."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from tests.core.history import DAY_ONE_MS, event
from tests.core.permuted import Sent, history

from retrofill.core import order, row
from retrofill.core.block import SAYABLE, Block, Flag
from retrofill.core.event import Batch, Event, decode, encode
from retrofill.core.fold import Changes, Known, fold
from retrofill.core.identity import derived_device
from retrofill.core.person import Person
from retrofill.core.refold import Outcome, Refold, Rows

UPDATES_MAX = 8
HOUR_MS = 3_600_000


class _Absent(dict[str, int]):
    def __missing__(self, key: str) -> int:
        return 0


class Project:
    """One project in event time, in plain dicts, folded as events come."""

    def __init__(self, merges_max: int = 0) -> None:
        self.merges_max = merges_max
        self.devices: dict[str, int] = _Absent()
        self.users: dict[str, int] = _Absent()
        self.people: dict[int, Person] = {}
        self.groups: dict[tuple[str, str], dict[str, Any]] = {}
        self.last: dict[order.Place, order.Key] = {}
        self.late: set[order.Place] = set()
        self.blocks: list[Block] = []
        self.fresh = 1

    def send(self, *requests: tuple[str, list[Event]]) -> None:
        """Fold one block of requests: path and events of each."""
        known = Known(self.devices, self.users, self.people, self.groups, self.last)
        batches = []
        for path, events in requests:
            body = encode(events)
            # As after reading: each event its own.
            own = decode(body)
            for one in own:
                if one.device_id is None:
                    one.device_id = derived_device(one.user_id) if one.user_id else ""
            batches.append(Batch(1, path, body, own, 0, DAY_ONE_MS, None, "203.0.113.9"))
        count = sum(len(batch.events) for batch in batches)
        folded = fold(
            batches,
            {1: known},
            number=len(self.blocks) + 1,
            server_upload_ms=DAY_ONE_MS + len(self.blocks),
            fresh=self.fresh,
            updates_max={1: UPDATES_MAX},
            merges_max={1: self.merges_max},
            dropped=[0] * count,
            keys=bytes(16 * count),
        )
        change = folded.changes[1]
        self.devices.update(change.devices)
        self.users.update(change.users)
        self.people.update(change.people)
        self.groups.update(change.groups)
        self.last.update(change.last)
        self.late |= change.late
        self.fresh = folded.fresh
        self.blocks.append(folded.block)

    def rows(self) -> list[dict[str, Any]]:
        """Every row, in order of arrival, with what the fold decided of it on arrival."""
        vocabulary = row.Vocabulary()
        columns = row.columns(self.blocks, vocabulary)
        shown = vocabulary.columns()
        count = sum(block.rows for block in self.blocks)
        lists = {name: _listed(column, count) for name, column in columns.items()}
        created = [one for block in self.blocks for one in memoryview(block.created_ms).cast("q")]
        tables = [
            block.tables[at] for block in self.blocks for at in memoryview(block.table).cast("i")
        ]
        rows = []
        for at in range(count):
            one = {name: values[at] for name, values in lists.items()}
            one |= {name: shown[name][vocabulary.shown[one["table"]]] for name in SAYABLE}
            one |= {name: _text(one[name]) for name in ("sent", "sent_groups", "event_properties")}
            one |= {"created": created[at], "table": tables[at]}
            rows.append(one)
        return rows


def _listed(column: Any, count: int) -> list[Any]:
    if column is None:
        return [None] * count
    if isinstance(column, row.Repeated):
        return [column.values[at] for at in column.index.tolist()]
    return column.tolist() if hasattr(column, "tolist") else list(column)


def _text(value: Any) -> str | None:
    return bytes(value).decode() or None if value is not None else None


def key(one: dict[str, Any]) -> tuple[Any, ...]:
    """The order that `order.SQL` says to the lake."""
    content = [
        *("event_type", "user_id", "device_id", "path", "session_id", "sent", "sent_groups"),
        *("event_properties", "said"),
    ]
    said = [name for bit, name in enumerate(SAYABLE) if one["said"] >> bit & 1]
    text = repr([one[name] for name in (*content, *said)]) + str(one["flags"] & Flag.SKIP)
    number = one["event_id"]
    return (
        one["event_time"],
        -1 if number is None else number,
        one["insert_id"] or "",
        hashlib.md5(text.encode(), usedforsecurity=False).digest(),
    )


def again(rows: list[dict[str, Any]], people: set[int] | None = None) -> Refold:
    """Fold rows in event time and write into them what it decides; of others than `people` only what groups became."""
    refold = Refold(1, iter(range(10**9, 2 * 10**9)).__next__, by_time=True)
    chosen = [
        one
        for one in sorted(rows, key=key)
        if people is None
        or one["amplitude_id"] in people
        or (one["event_type"] == "$groupidentify")
    ]
    foreign = [people is not None and one["amplitude_id"] not in people for one in chosen]
    for first in range(0, len(chosen), 7):
        part, theirs = chosen[first : first + 7], foreign[first : first + 7]
        taken = {
            name: [one[name] for one in part]
            for name in Rows.__struct_fields__
            if name not in ("foreign", "shown")
        }
        shown = [tuple(one[name] for name in SAYABLE) for one in part]
        outcome = refold.fold(Rows(**taken, foreign=theirs, shown=shown))
        _write(part, theirs, outcome)
    return refold


def _write(part: list[dict[str, Any]], foreign: list[bool], outcome: Outcome) -> None:
    for at, one in enumerate(part):
        if not foreign[at] or one["amplitude_id"] == 0:
            one["amplitude_id"] = outcome.amplitude_id[at]
            one["created"] = outcome.created_ms[at]
            one["kind"], one["flags"] = outcome.kind[at], outcome.flags[at]
            one["table"] = outcome.tables[outcome.table[at]]


def closure(rows: list[dict[str, Any]], late: set[order.Place]) -> set[int]:
    """Everyone who shares ids with a marked person or with someone who shows a marked group."""
    near: dict[Any, set[Any]] = defaultdict(set)
    found: set[Any] = {one for one in late if isinstance(one, int)}
    groups = {place[1:] for place in late if not isinstance(place, int)}
    for one in rows:
        person = one["amplitude_id"]
        for other in (("d", one["device_id"]), ("u", one["user_id"])):
            if person and other[1]:
                near[person].add(other)
                near[other].add(person)
        if person and not groups.isdisjoint(order.named(msgspec.json.decode(one["table"])[1])):
            found.add(person)
    waiting = list(found)
    while waiting:
        for other in near[waiting.pop()] - found:
            found.add(other)
            waiting.append(other)
    return {one for one in found if isinstance(one, int)}


def seen(rows: Iterable[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Rows in event time without what depends on arrival, people numbered in order of appearance."""
    number: dict[int, int] = {0: 0}
    return [
        (
            *key(one),
            number.setdefault(one["amplitude_id"], len(number)),
            *(one[name] for name in ("created", "kind", "flags")),
            msgspec.json.decode(one["table"]),
        )
        for one in sorted(rows, key=key)
    ]


def arrive(sent: list[Sent], seeded: random.Random, merges_max: int = 0) -> Project:
    """Let events come in this order, cut into requests and blocks anyhow."""
    project = Project(merges_max)
    waiting: list[tuple[str, list[Event]]] = []
    for path, wire in sent:
        one = event(**wire)
        if waiting and waiting[-1][0] == path and seeded.random() < 0.6:
            waiting[-1][1].append(one)
        else:
            waiting.append((path, [one]))
        if seeded.random() < 0.2:
            project.send(*waiting)
            waiting = []
    if waiting:
        project.send(*waiting)
    return project


def values(refold: Refold, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a fold of everything ends in, by people's numbers in order of appearance."""
    changes = refold.changes(Changes({}, {}, {}, {}, {}))
    number: dict[int, int] = {0: 0}
    for one in sorted(rows, key=key):
        number.setdefault(one["amplitude_id"], len(number))
    return {
        "devices": {device: number[one] for device, one in changes.devices.items()},
        "users": {user: number[one] for user, one in changes.users.items()},
        "people": {
            number[one]: msgspec.structs.replace(
                who,
                amplitude_id=number[one],
                merged_into=number[who.merged_into],
                shown=b"",
                sent=None,
            )
            for one, who in changes.people.items()
        },
        "groups": changes.groups,
        "last": {number[at] if isinstance(at, int) else at: k for at, k in changes.last.items()},
    }


@pytest.mark.parametrize("seed", range(200))
def test_any_order_of_arrival_ends_in_the_same(seed: int) -> None:
    seeded = random.Random(seed % 10)
    in_any_order(seed, history(seeded, 60, crowd=seed % 5 * 5 + 1), seeded)


@pytest.mark.parametrize("seed", range(60))
def test_any_order_of_arrival_holds_the_same_people(seed: int) -> None:
    """A guest on many devices, and whose they are, with no more than a few merges for a user."""
    seeded = random.Random(seed % 10)
    sent = history(seeded, 60, crowd=1)
    for _, wire in sent:
        if wire.get("device_id"):
            wire["device_id"] += f"-{seeded.randrange(3)}"
        if wire.get("user_id"):
            wire["user_id"] = seeded.choice(["guest-1", f"someone-{seeded.randrange(9)}"])
    rows = in_any_order(seed, sent, seeded, merges_max=1)
    assert seed or any(one["flags"] & Flag.HELD for one in rows)


@pytest.mark.parametrize("seed", range(30))
def test_whose_a_device_is_when_somebody_is_held_is_looked_at_again(seed: int) -> None:
    """Many guests of whom each may absorb one person and has, so that phone-2 stays whose it is; all else is in order.

    Among few people, or with much that is late, somebody else's mark would lead to those whom this one concerns.
    """
    seeded = random.Random(seed)
    sent = []
    for circle in range(24):
        users = [None, "guest", seeded.choice([None, "guest", *["someone"] * 4])]
        seeded.shuffle(users)
        joined = [("phone-1", None), ("desk-5", "guest"), ("phone-1", "guest")]
        for at, (device, user) in enumerate([*joined, *(("phone-2", user) for user in users)]):
            ids = {"user_id": f"{user}-{circle}"} if user else {}
            sent.append(_open(f"{device}-{circle}", at * 1000 + circle, **ids))
    sent.sort(key=lambda one: one[1]["time"])
    late = [HOUR_MS * ("phone-2" in one["device_id"] and seeded.random() < 0.25) for _, one in sent]
    mixed = [
        one
        for _, one in sorted(
            zip(late, sent, strict=True), key=lambda both: both[0] + both[1][1]["time"]
        )
    ]
    rows = ends_alike(sent, mixed, seeded, merges_max=1)
    assert any(one["flags"] & Flag.HELD for one in rows)


def in_any_order(
    seed: int, sent: list[Sent], seeded: random.Random, merges_max: int = 0
) -> list[dict[str, Any]]:
    mixed = sent.copy()
    other = random.Random(seed)
    if seed % 2:
        other.shuffle(mixed)
    else:  # nearly in order, as live traffic with a few late ones
        mixed.sort(key=lambda one: one[1]["time"] + other.choice([0] * 9 + [HOUR_MS]))
    return ends_alike(sent, mixed, seeded, merges_max)


def ends_alike(
    sent: list[Sent], mixed: list[Sent], seeded: random.Random, merges_max: int
) -> list[dict[str, Any]]:
    truth = arrive(sent, seeded, merges_max).rows()
    whole = values(again(truth), truth)
    project = arrive(mixed, seeded, merges_max)
    rows = project.rows()
    # Those whom no late event concerns are right as they came; the rest is right after a second fold of it alone.
    again(rows, closure(rows, project.late))
    assert seen(rows) == seen(truth)
    assert values(again(rows), rows) == whole
    return rows


def test_events_in_order_mark_nobody() -> None:
    seeded = random.Random(1)
    project = Project()
    for at, (path, wire) in enumerate(history(seeded, 300)):
        project.send((path, [event(**wire | {"time": DAY_ONE_MS + at})]))
    assert project.late == set()


def _join(device: str, time: int, **fields: Any) -> Sent:
    groups = {"org": "acme"}
    return "/identify", event_of("$identify", device, time, groups=groups, **fields)


def _grow(time: int) -> Sent:
    groups = {"org": "acme"}
    return "/groupidentify", {
        "event_type": "$groupidentify",
        "time": DAY_ONE_MS + time,
        "groups": groups,
        "group_properties": {"$set": {"size": time}},
    }


def event_of(event_type: str, device: str, time: int, **fields: Any) -> dict[str, Any]:
    return {
        "event_type": event_type,
        "device_id": device,
        "time": DAY_ONE_MS + time,
        "user_properties": {},
        **fields,
    }


def _open(device: str, time: int, **fields: Any) -> Sent:
    return "/2/httpapi", event_of("open", device, time, **fields)


GROUP = (order.CHANGED, "org", "acme")
# A guest who may absorb one person has, so that phone-2 stays whose it is.
_HELD = [
    _open("phone-1", 1),
    _open("desk-5", 2, user_id="guest-1"),
    _open("phone-1", 3, user_id="guest-1"),
    _open("phone-2", 4),
    _open("phone-2", 9, user_id="guest-1"),
]


@pytest.mark.parametrize("together", [False, True], ids=["blocks", "one block"])
@pytest.mark.parametrize(
    ("sent", "marked"),
    [
        # The person's own last event is later.
        ([_open("phone-1", 2), _open("phone-1", 1)], {1}),
        # The one who has the device now was there later.
        ([_open("phone-1", 2, user_id="ann-111"), _open("phone-1", 1, user_id="bob-222")], {2}),
        # A group changed after what the row shows of it: named by the event, or one its person stays in.
        ([_grow(2), _open("phone-1", 1, groups={"org": "acme"})], {1}),
        ([_join("phone-1", 0), _grow(2), _open("phone-1", 1)], {1}),
        # A group that was shown later than it changes.
        ([_open("phone-1", 2, groups={"org": "acme"}), _grow(1)], {GROUP}),
        ([_join("phone-1", 0), _open("phone-1", 2), _grow(1)], {GROUP}),
        ([_grow(2), _grow(1)], {GROUP}),
        # What an anonymous person stays in goes to the one who absorbs it.
        (
            [
                _join("phone-1", 0),
                _open("desk-5", 1, user_id="ann-111"),
                _open("phone-1", 2, user_id="ann-111"),
                _grow(4),
                _open("desk-5", 3, user_id="ann-111"),
            ],
            {2},
        ),
        # The same moment: by event_id, then by insert_id, and what those leave open is late.
        ([_open("phone-1", 1, event_id=1), _open("phone-1", 1, event_id=2)], set()),
        ([_open("phone-1", 1, event_id=2), _open("phone-1", 1, event_id=1)], {1}),
        ([_open("phone-1", 1, insert_id="a"), _open("phone-1", 1, insert_id="b")], set()),
        ([_open("phone-1", 1, insert_id="b"), _open("phone-1", 1, insert_id="a")], {1}),
        ([_open("phone-1", 1), _open("phone-1", 1)], {1}),
        # People who share nothing do not wait for each other.
        ([_open("phone-1", 2), _open("phone-2", 1)], set()),
        ([_grow(2), _open("phone-1", 1)], set()),
        # Whose a device is decided that somebody is held, and that came later.
        ([*_HELD, _open("phone-2", 6, user_id="ann-111")], {3}),
        ([*_HELD, _open("phone-2", 10, user_id="ann-111")], set()),
        ([*_HELD, _open("phone-2", 11), _open("phone-2", 10, user_id="guest-1")], {2}),
    ],
)
def test_who_is_marked(sent: list[Sent], marked: set[order.Place], *, together: bool) -> None:
    project = Project(merges_max=1)
    requests = [(path, [event(**wire)]) for path, wire in sent]
    for some in [requests] if together else [[one] for one in requests]:
        project.send(*some)
    assert project.late == marked


def test_updates_are_counted_in_the_hour_of_their_events() -> None:
    project = Project()
    sets = [
        ("/2/httpapi", [event(**event_of("open", "a", at, user_properties={"n": at}))])
        for at in range(UPDATES_MAX + 1)
    ]
    later = event_of("open", "a", HOUR_MS + UPDATES_MAX, user_properties={"n": -1})
    project.send(*sets, ("/2/httpapi", [event(**later)]))
    dropped = [bool(flag & Flag.UPDATE_DROPPED) for flag in project.blocks[0].flags]
    assert dropped == [False] * UPDATES_MAX + [True, False]
    assert project.people[1].properties == {"n": -1}
    assert project.people[1].updated_ms == later["time"]
