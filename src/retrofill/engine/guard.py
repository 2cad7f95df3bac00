"""Ids that join many people: told once in the log, and listed for review with what they hold apart.

That somebody is held is a verdict of the fold on a row (`Flag.HELD`, decision 0017), so the list is a question to the
rows, and it follows whatever changes them. Whoever was merged since, by a limit raised or an id allowed, is in it still:
rows say what was decided when they were folded.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from msgspec import Struct

from retrofill.core.block import Block, Flag, Kind
from retrofill.engine.query import Statement, View
from retrofill.limits import HELD_TOLD_MAX

_HELD = int(Flag.HELD)
_IS_HELD = bytes(flag >> (_HELD.bit_length() - 1) & 1 for flag in range(256))
_KINDS = (Kind.EVENT, Kind.IDENTIFY, Kind.GROUP_IDENTIFY)
_NAMES = (
    "server_upload_time",
    "user_id",
    "device_id",
    "amplitude_id",
    "flags",
    "event_time",
    "import_id",
)


def held_in(block: Block) -> int:
    """Return of how many events of a block somebody was held apart."""
    return block.flags.translate(_IS_HELD).count(1)


class Told:
    """Whom the log has named since the start: each once, and a bounded number of them."""

    def __init__(self) -> None:
        self._told: set[int] = set()

    def new(self, block: Block) -> Iterator[tuple[int, int]]:
        """Yield (project, amplitude_id) of users in a block who hold people apart and were not named before."""
        flags = np.frombuffer(block.flags, np.uint8)
        people = np.frombuffer(block.amplitude_id, np.int64)
        projects = np.repeat(
            [part.project for part in block.parts], [part.rows for part in block.parts]
        )
        for at in np.flatnonzero(flags & _HELD).tolist():
            one = int(people[at])
            if one not in self._told and len(self._told) < HELD_TOLD_MAX:
                self._told.add(one)
                yield int(projects[at]), one


class Held(Struct, frozen=True):
    """A user_id that holds people apart. merged: whom it has absorbed, as far as they are counted.

    devices: of people who were held apart; events: that would have merged them. Times in ms, of the first and last such event.
    allowed: the project lets it absorb any number by now.
    """

    user_id: str
    amplitude_id: int
    merged: int
    devices: int
    events: int
    first_event_time_ms: int
    last_event_time_ms: int
    last_server_upload_time_ms: int
    allowed: bool


def listed(
    view: View, allowed: list[str], limit: int, *, import_id: str | None = None
) -> list[Held]:
    """Return the users who hold people apart, those with most devices first. import_id: by its events alone."""
    statement = Statement()
    where = f"(flags & {_HELD}) <> 0"
    if import_id is not None:
        where += f" AND import_id = {statement.bind(import_id)}"
    source = view.source(_NAMES, where=where, kinds=_KINDS)
    rows = view.ask(
        "SELECT user_id, max(amplitude_id), count(DISTINCT device_id) AS devices, count(*), min(event_time), "
        f"max(event_time), max(server_upload_time) FROM {source} GROUP BY user_id "
        f"ORDER BY devices DESC, user_id LIMIT {int(limit)}",
        statement,
    ).fetchall()
    free = frozenset(allowed)
    found = []
    for user, one, devices, events, first_ms, last_ms, upload_ms in rows:
        person = view.reader.person(view.project, one)
        merged = person.joined if person is not None else 0
        found.append(
            Held(user, one, merged, devices, events, first_ms, last_ms, upload_ms, user in free)
        )
    return found
