"""Whoever is deleted takes nobody else's history along: what is left folds to what it was, with their devices set free."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
from tests.core.history import event
from tests.core.test_order import HOUR_MS, Project, key

from retrofill.core import person
from retrofill.core.block import SAYABLE, Flag
from retrofill.core.fold import Changes
from retrofill.core.person import Person
from retrofill.core.refold import Freed, Outcome, Refold, Rows

DEVICES = ["kiosk-9", "phone-1", "tablet-4"]
USERS = ["ann-111", "bob-222", "eve-333", None, None, None]
_NAMES = [name for name in Rows.__struct_fields__ if name not in ("foreign", "shown")]


def _project(seeded: random.Random, merges_max: int) -> Project:
    project = Project(merges_max)
    for number in range(seeded.randint(5, 15)):
        made = [
            event(
                device_id=seeded.choice(DEVICES),
                user_id=seeded.choice(USERS),
                time=seeded.randrange(HOUR_MS),
                insert_id=f"i-{number}-{at}",
                user_properties={seeded.choice("abc"): number},
            )
            for at in range(seeded.randint(1, 4))
        ]
        project.send(("/2/httpapi", made))
    return project


class Folded:
    """Rows folded in their order, and what the fold decides of each."""

    def __init__(
        self,
        rows: list[dict[str, Any]],
        freed: Mapping[int, list[Freed]] | None = None,
        *,
        by_time: bool,
        piece: int = 1000,
    ) -> None:
        freed = freed or {}
        self.refold = Refold(1, iter(range(10**9, 2 * 10**9)).__next__, by_time=by_time)
        self.decided: list[dict[str, Any]] = []
        for first in range(0, len(rows), piece):
            part = rows[first : first + piece]
            outcome = self.refold.fold(
                _rows(part),
                {at - first: one for at, one in freed.items() if first <= at < first + piece},
            )
            self.decided += [_decided(one, outcome, at) for at, one in enumerate(part)]
        for one in freed.get(len(rows), ()):
            self.refold.free(one)
        self.state = self.refold.changes(Changes({}, {}, {}, {}, {}))


def _rows(part: list[dict[str, Any]]) -> Rows:
    shown = [tuple(one[name] for name in SAYABLE) for one in part]
    taken = {name: [one[name] for one in part] for name in _NAMES}
    return Rows(**taken, foreign=[False] * len(part), shown=shown)


def _decided(row: dict[str, Any], outcome: Outcome, at: int) -> dict[str, Any]:
    return row | {
        "amplitude_id": outcome.amplitude_id[at],
        "created": outcome.created_ms[at],
        "kind": outcome.kind[at],
        "flags": outcome.flags[at],
        "table": outcome.tables[outcome.table[at]],
    }


def _encoded(people: dict[int, Person]) -> dict[int, bytes]:
    return {number: person.encode(one) for number, one in people.items()}


@pytest.mark.parametrize("by_time", [False, True])
@pytest.mark.parametrize("merges_max", [0, 1])
def test_what_is_left_of_a_history_folds_to_what_it_was(merges_max: int, *, by_time: bool) -> None:
    freed_some = 0
    for seed in range(150):
        seeded = random.Random(seed)
        rows = _project(seeded, merges_max).rows()
        if by_time:
            rows.sort(key=key)
        whole = Folded(rows, by_time=by_time)
        people = whole.state.people
        now = {number: one.merged_into or number for number, one in people.items()}
        gone = seeded.choice(sorted(set(now.values())))
        left: list[dict[str, Any]] = []
        freed: dict[int, list[Freed]] = {}
        anonymous: dict[str, int] = {}  # who was last on a device without a user
        for one in whole.decided:
            if one["user_id"] is None:
                anonymous[one["device_id"]] = now[one["amplitude_id"]]
            if now[one["amplitude_id"]] != gone:
                left.append(one)
                if one["flags"] & Flag.HELD and anonymous[one["device_id"]] == gone:
                    freed.setdefault(len(left), []).append(
                        Freed(one["device_id"], gone, one["event_time"])
                    )
                    left[-1] = one | {"flags": one["flags"] - Flag.HELD}  # there is nobody any more
            elif one["user_id"] and not one["flags"] & Flag.HELD:
                freed.setdefault(len(left), []).append(
                    Freed(one["device_id"], gone, one["event_time"])
                )
        freed_some += bool(freed and left)
        piece = seeded.choice([1, 2, 1000])
        again = Folded(left, freed, by_time=by_time, piece=piece)
        for mine, was in zip(again.decided, left, strict=True):
            assert mine == was, seed
        survivors = {number: one for number, one in people.items() if now[number] != gone}
        assert _encoded(again.state.people) == _encoded(survivors), seed
        for mine, was in (
            (again.state.devices, whole.state.devices),
            (again.state.users, whole.state.users),
        ):
            assert {one: who for one, who in mine.items() if who} == {
                one: who for one, who in was.items() if now[who] != gone
            }, seed
    assert freed_some > 50
