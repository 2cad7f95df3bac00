"""One person's state in one project: the current property table and what the fold must remember.

A Person is never changed once others can see it: the fold makes a new one. `shown`, `sent` and `told` are remembered
answers, functions of the rest, so that an unchanged person is not encoded or compared again; they are not saved.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
from msgspec import Struct

from retrofill.core import mend
from retrofill.core.block import COLUMNS

FORGOTTEN = -1  # merged_into of a deleted person: whoever uses its ids later is someone new
NO_COLUMNS: tuple[str | None, ...] = (None,) * len(COLUMNS)
# Of nearly everyone, and so one object each: every event of a person touches them.
NO_GROUPS: dict[str, list[str]] = {}
NO_UPDATES: list[int] = []


class Person(Struct, array_like=True, gc=False):
    """One person. user_id: its owner, None while anonymous.

    columns: the built-in columns in the order of `block.COLUMNS`. groups: those it stays in, type → values.
    first_seen_ms: the earliest event_time of its events, -1 if it has none yet.
    updated_ms: server time of the last change of the table, or event time where properties go by that. updates: rolling
    hour of the same time, see `throttle.UpdateWindow`.
    merged_into: the surviving amplitude_id if this person was absorbed, FORGOTTEN if deleted, else 0.
    joined: how many people it has absorbed while a limit of them was in force.
    shown: the snapshot. sent: what an event said of the columns that changes nothing, and which it said. told: the same of properties.
    """

    amplitude_id: int
    user_id: str | None = None
    properties: dict[str, Any] = {}
    columns: tuple[str | None, ...] = NO_COLUMNS
    groups: dict[str, list[str]] = {}
    first_seen_ms: int = -1
    updated_ms: int = 0
    updates: list[int] = []
    merged_into: int = 0
    joined: int = 0
    shown: bytes = b""
    sent: tuple[tuple[str | None, ...], int] | None = None
    told: dict[str, Any] | None = None


_encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Person).decode


def encode(person: Person) -> bytes:
    """Return the person as it is saved, without its remembered answers.

    Whole numbers beyond 64 bits are kept out where they come in. One that is there none the less, out of a history older
    than that, becomes a float, and its property goes if it is too large for that: one value must not stop the saving.
    """
    try:
        return _saved(person, person.properties)
    except OverflowError:
        held = {}
        for name, value in person.properties.items():
            with suppress(ValueError):
                held[name] = mend.held(value)
        return _saved(person, held)


def _saved(person: Person, properties: dict[str, Any]) -> bytes:
    return _encode(
        (
            person.amplitude_id,
            person.user_id,
            properties,
            person.columns,
            person.groups,
            person.first_seen_ms,
            person.updated_ms,
            person.updates,
            person.merged_into,
            person.joined,
        )
    )


def merged(survivor: Person, absorbed: Person) -> Person:
    """Join the state of an absorbed person into its survivor.

    Of two values of one property the one of the table changed later stays: "newer values overwrite". The earliest
    first_seen counts. Source: contract, identity 3, row "properties"; decision 0004.
    """
    older, newer = survivor, absorbed
    if survivor.updated_ms > absorbed.updated_ms:
        older, newer = absorbed, survivor
    seen = [p.first_seen_ms for p in (survivor, absorbed) if p.first_seen_ms >= 0]
    stamps = sorted(
        (ms, count)
        for person in (survivor, absorbed)
        for ms, count in zip(person.updates[::2], person.updates[1::2], strict=True)
    )
    return Person(
        survivor.amplitude_id,
        survivor.user_id,
        {**older.properties, **newer.properties},
        tuple(
            new if new is not None else old
            for old, new in zip(older.columns, newer.columns, strict=True)
        ),
        {**older.groups, **newer.groups},
        min(seen, default=-1),
        newer.updated_ms,
        [number for stamp in stamps for number in stamp],
        joined=survivor.joined,
    )
