"""The difference between a project before an import and after it, out of its people, merges and counts alone.

A rehearsal and the verification of one both come here, each with what it has: predicted and found are the same figures
of the same kind. Everything that is listed is bounded; what is counted is exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from statistics import median

import msgspec
from msgspec import Struct

from retrofill.core import likeness
from retrofill.core.block import COLUMNS
from retrofill.core.person import Person
from retrofill.engine.history import Alike, Days
from retrofill.limits import MS_PER_DAY
from retrofill.rehearse.outcome import ByDay, Change, Double, FirstSeen, Merge, Moved, Properties

LISTED = 100  # ours: of anything that is listed
VALUES_MAX = (
    1000  # ours: pairs of values counted apart for each property; the others are counted in its sum
)
TEXT_CHARS = 200  # ours: of a value
_SPREAD = (("a day", 1), ("a week", 7), ("30 days", 30), ("a year", 365))
_BEYOND = "more than a year"


class Side(Struct, frozen=True):
    """A project as far as it is known: people by amplitude_id, absorbed ones too; counts by day of everybody."""

    people: dict[int, Person]
    days: Days


def by_day(whole: Days, before: Days, after: Days) -> tuple[ByDay, ByDay]:
    """Return new and active people of the whole project. before, after: of those people alone who were looked at."""
    return (
        _by_day(whole.new, before.new, after.new),
        _by_day(whole.active, before.active, after.active),
    )


def _by_day(whole: dict[str, int], before: dict[str, int], after: dict[str, int]) -> ByDay:
    days = sorted({*whole, *before, *after})
    then = {day: whole.get(day, 0) - before.get(day, 0) + after.get(day, 0) for day in days}
    return ByDay(
        {day: whole[day] for day in days if whole.get(day)},
        {day: count for day, count in then.items() if count},
    )


def stays(
    before: Mapping[int, Person], after: Mapping[int, Person]
) -> Iterable[tuple[Person, Person]]:
    """Yield everyone who is a person of their own before and after."""
    for number, was in before.items():
        now = after.get(number)
        if now is not None and not was.merged_into and not now.merged_into:
            yield was, now


def first_seen(before: Mapping[int, Person], after: Mapping[int, Person]) -> FirstSeen:
    """Say whose first event is another one."""
    moved = [
        Moved(was.user_id, was.first_seen_ms, now.first_seen_ms)
        for was, now in stays(before, after)
        if was.first_seen_ms >= 0 and was.first_seen_ms != now.first_seen_ms
    ]
    if not moved:
        return FirstSeen()
    far = [abs(one.before_ms - one.after_ms) / MS_PER_DAY for one in moved]
    spread = Counter(_distance(days) for days in far)
    names = [*(f"up to {name}" for name, _ in _SPREAD), _BEYOND]
    moved.sort(key=lambda one: (-abs(one.before_ms - one.after_ms), one.user_id or ""))
    return FirstSeen(
        len(moved),
        round(median(far), 3),
        round(max(far), 3),
        {name: spread[name] for name in names if spread[name]},
        moved[:LISTED],
    )


def _distance(days: float) -> str:
    return next((f"up to {name}" for name, most in _SPREAD if days <= most), _BEYOND)


def properties(before: Mapping[int, Person], after: Mapping[int, Person]) -> Properties:
    """Say which properties of live people change, from what to what, and of how many."""
    names: Counter[str] = Counter()
    pairs: dict[tuple[str, bool], Counter[tuple[str | None, str | None]]] = {}
    people = 0
    for was, now in stays(before, after):
        changed = False
        if was.properties is not now.properties:
            for name in was.properties.keys() | now.properties.keys():
                old, new = was.properties.get(name), now.properties.get(name)
                if old != new or type(old) is not type(new):
                    changed = True
                    _count(names, pairs, name, old, new, built_in=False)
        if was.columns != now.columns:
            for name, old, new in zip(COLUMNS, was.columns, now.columns, strict=True):
                if old != new:
                    changed = True
                    _count(names, pairs, name, old, new, built_in=True)
        people += changed
    changes = [
        Change(name, built_in, old, new, count)
        for (name, built_in), values in pairs.items()
        for (old, new), count in values.items()
    ]
    changes.sort(key=lambda one: (-one.people, one.name, one.old or "", one.new or ""))
    return Properties(people, dict(_ordered(names)), changes[:LISTED])


def _ordered(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _count(
    names: Counter[str],
    pairs: dict[tuple[str, bool], Counter[tuple[str | None, str | None]]],
    name: str,
    old: object,
    new: object,
    *,
    built_in: bool,
) -> None:
    names[name] += 1
    values = pairs.setdefault((name, built_in), Counter())
    pair = _text(old), _text(new)
    if pair in values or len(values) < VALUES_MAX:
        values[pair] += 1


def _text(value: object) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()[:TEXT_CHARS]


def merges(before: Mapping[int, Person], after: Mapping[int, Person]) -> list[Merge]:
    """Return everyone who is absorbed into a user afterwards and was not before."""
    found = []
    for number, now in after.items():
        if now.merged_into > 0:
            was = before.get(number)
            if was is None or was.merged_into <= 0:
                survivor = after.get(now.merged_into)
                found.append(Merge(survivor.user_id if survivor else None, was is not None))
    found.sort(key=lambda one: (not one.was_live, one.user_id or ""))
    return found


def new_people(before: Mapping[int, Person], after: Mapping[int, Person]) -> int:
    """Count the people who are persons of their own afterwards and were not there before."""
    return sum(1 for number, now in after.items() if number not in before and not now.merged_into)


def doubles(
    before: Mapping[int, Person],
    after: Mapping[int, Person],
    users: set[str],
    alike: Iterable[Alike],
    devices: Iterable[tuple[str, list[str], int]],
) -> list[Double]:
    """Return who is probably counted twice afterwards, with the evidence; at least one of them is of the import.

    users: of the import. alike: whom the server named beside. devices: (device_id, its users, of them live before).
    """
    there = [one for one in after.values() if not one.merged_into]
    found = [
        *_by_user_id(there, before, users),
        *_by_contact(there, before, users),
        *(Double(one.by, one.value, _ids([one.user_id, one.value]), live=True) for one in alike),
        *(Double("device", device, _ids(ids), live=live > 0) for device, ids, live in devices),
    ]
    once = {(one.evidence, one.value, tuple(one.ids)): one for one in found}
    return sorted(once.values(), key=lambda one: (not one.live, one.evidence, one.value, one.ids))


def _ids(users: Iterable[str | None]) -> list[str]:
    return sorted({user or "" for user in users})


def _by_user_id(
    there: Iterable[Person], before: Mapping[int, Person], users: set[str]
) -> Iterator[Double]:
    forms: dict[str, dict[str, bool]] = {}
    for one in there:
        if one.user_id is not None:
            for form in likeness.forms(one.user_id):
                forms.setdefault(form, {})[one.user_id] = one.amplitude_id in before
    for form, ids in forms.items():
        for first, other in combinations(sorted(ids), 2):
            by = likeness.alike(first, other)
            if by is not None and (first in users or other in users):
                yield Double(by, form, [first, other], live=ids[first] or ids[other])


def _by_contact(
    there: Iterable[Person], before: Mapping[int, Person], users: set[str]
) -> Iterator[Double]:
    holders: dict[tuple[str, str], list[Person]] = {}
    for one in there:
        for name, address in likeness.contacts(one.properties):
            holders.setdefault((name, address), []).append(one)
    for (name, address), people in holders.items():
        if len(people) > 1 and any(_of_import(one, before, users) for one in people):
            live = any(one.amplitude_id in before for one in people)
            yield Double(name, address, _ids(one.user_id for one in people), live=live)


def _of_import(one: Person, before: Mapping[int, Person], users: set[str]) -> bool:
    return one.user_id in users or one.amplitude_id not in before


def evidence(found: Iterable[Double]) -> dict[str, int]:
    """Count by evidence."""
    counts: Counter[str] = Counter(one.evidence for one in found)
    return dict(_ordered(counts))
