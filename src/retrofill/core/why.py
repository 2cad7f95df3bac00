"""Which events made a value: the history of one person folded again, watched, and folded without single rows.

`Trace` is given the rows that can matter, in order of position: those of a person and of everyone merged into it, those
of others on its devices (they decide whose a device is), and for a group's property the calls that change the group.
It folds them as they were folded the first time and notes each row that says something of the value asked for: what
stood before, what after, and by which rule. The snapshot on each row tells that, so nothing is folded one by one.

Then it proves what it says. A row is `needed` if the value is another when all rows but this one are folded. While
rows × rows stay under WHY_FOLDED_ROWS_MAX every row is tried, so what is not shown as needed is not: also rows that say
nothing of the value and yet decide it, by saying whose another row is, by using up the hour's property updates, or by
making one of two tables the newer one at a merge. In a longer history the rows shown are tried, newest first, as far as
that number goes; for those not tried `needed` is None.

A person is found by the id that was asked for, also among the rows that are left: by its user_id, if that was given.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from retrofill.core import properties
from retrofill.core.block import COLUMNS, SAYABLE, Flag, Kind, Table
from retrofill.core.fold import Group
from retrofill.core.person import Person
from retrofill.core.refold import Merged, Outcome, Refold, Rows
from retrofill.limits import WHY_CAUSES_MAX, WHY_FOLDED_ROWS_MAX, WHY_IDLE_MAX, WHY_TEXTS_KEPT_MAX

Json = Any
_table = msgspec.json.Decoder(Table).decode
_SKIP, _UPDATE_DROPPED, _REVENUE = map(int, (Flag.SKIP, Flag.UPDATE_DROPPED, Flag.REVENUE))

RULES = {
    "changed": "it made the value what it was from then on",
    "repeated": "it said what stood there already",
    "ignored": "its operation does nothing to a value that stands there",
    "dropped": "over the hourly property updates: the table was not changed",
    "skipped": "$skip_user_properties_sync: the table was neither read nor written",
    "coupled": "it said others of the columns that are set together, which takes away this one",
    "default": "nobody said it: derived from what the event says else",
    "merged": "two people were shown to be one: of two values that of the table changed last stays, of two dates the earlier",
    "identity": "it says whose a device or a user is: without it other rows would be this person's, or these not",
    "limit": "it used up the hourly property updates, so that a later one was dropped",
    "newer": "it changed its table, and of two tables that are joined the one changed last counts",
}


class Asked(Struct, frozen=True):
    """What is asked. what: `property`, `column`, `group` (its property `name`), `first_seen` or `merge`.

    Of whom: one of user, device and amplitude_id; of a merge the amplitude_id that was absorbed.
    event: as the last row shows it, not as it stands in the end.
    by_time, barred: how the project is folded, as `Refold` takes it.
    """

    what: str
    name: str = ""
    group: Group | None = None
    user: str | None = None
    device: str | None = None
    amplitude_id: int = 0
    event: bool = False
    by_time: bool = False
    barred: frozenset[tuple[str, str]] = frozenset()


class Fact(Struct):
    """One row that says or decides something. at: its place among all rows. before, after: None is no value.

    operations: what it said, in the order applied. absorbed: of a merge, the value of the other person, and who it was.
    detail: for the caller.
    """

    at: int
    block: int
    row: int
    rule: str
    before: Json = None
    after: Json = None
    operations: list[tuple[str, Json]] = []
    absorbed: Json = None
    merge: tuple[int, int] | None = None
    needed: bool | None = None
    detail: Any = None


class Explanation(Struct):
    """facts: in order of arrival. left_out: facts before those shown. rows: looked at. tried: every one of them."""

    value: Json
    facts: list[Fact]
    left_out: int
    rows: int
    tried: bool


def _same(one: Json, other: Json) -> bool:
    if one is other or (isinstance(one, str) and isinstance(other, str)):
        return bool(one == other)
    return msgspec.json.encode(one) == msgspec.json.encode(other)


class Trace:
    """The rows on their way. own: every amplitude_id that is the person now.

    exact: false as soon as a row is not decided to be whose it was: then the rows given were not enough.
    """

    def __init__(self, asked: Asked, own: Iterable[int]) -> None:
        self.exact = True
        self.rows = 0
        self._asked = asked
        self._own = frozenset(own)
        self._refold = _new_refold(asked)
        self._says = _says(asked)
        self._values: dict[int, Json] = {}
        self._changed: deque[Fact] = deque(maxlen=WHY_CAUSES_MAX)
        self._idle: deque[Fact] = deque(maxlen=WHY_IDLE_MAX)
        self._facts = 0
        self._held: list[Rows] | None = []
        self._last_user: dict[str, str | None] = {}
        self._ties: deque[int] = deque(maxlen=WHY_CAUSES_MAX)
        self._last: Outcome | None = None

    def add(self, rows: Rows) -> None:
        """Take the next rows, at least one; those of one block together."""
        first = 0
        for end in self._cuts(rows):
            part = rows if end - first == len(rows.block) else _cut(rows, first, end)
            merges = len(self._refold.merges)
            outcome = self._refold.fold(part)
            self._look(part, outcome, self._refold.merges[merges:], self.rows + first)
            self._last = outcome
            first = end
        self.rows += first
        if self._held is not None:
            self._held.append(rows)
            if self.rows > WHY_FOLDED_ROWS_MAX:
                self._held = None

    def shown(self) -> list[Fact]:
        """Return what would be shown if this were all, in order."""
        return sorted([*self._changed, *self._idle], key=lambda one: one.at)

    def end(self) -> Explanation:
        """Say what was found, and try it."""
        value = self._read(self._refold, self._last)
        asked = self._asked
        if asked.event and self._last is not None and self._last.flags[-1] & _SKIP:
            self._only_the_last()
        facts = self.shown()
        for one in facts if asked.event else ():
            if (
                one.at == self.rows - 1
            ):  # its snapshot shows what it said also where the table did not take it
                one.after = value
        tried = self._try(facts, value)
        facts.sort(key=lambda one: (one.at, one.rule != "merged"))
        return Explanation(
            value, facts, self._facts - len(self._changed) - len(self._idle), self.rows, tried
        )

    # Watching.

    def _cuts(self, rows: Rows) -> Iterator[int]:
        """Yield where to stop: after each row that may say whose a device or a user is."""
        last_user = self._last_user
        for at, (user, device, foreign) in enumerate(
            zip(rows.user_id, rows.device_id, rows.foreign, strict=True)
        ):
            if foreign or not device:
                continue
            if device in last_user and user in (None, last_user[device]):
                continue
            last_user[device] = user
            self._ties.append(self.rows + at)
            if at + 1 < len(rows.block):
                yield at + 1
        yield len(rows.block)

    def _look(self, rows: Rows, outcome: Outcome, merges: list[Merged], first: int) -> None:
        asked, own = self._asked, self._own
        merged = {(one.block, one.row): one for one in merges}
        for at, one in enumerate(outcome.amplitude_id):
            mine = one in own
            if mine and one != rows.amplitude_id[at] and not rows.foreign[at]:
                self.exact = False
            if rows.amplitude_id[at] in own and not mine:
                self.exact = False
            merge = merged.get((rows.block[at], rows.row[at])) if merged else None
            if merge is not None and (mine or merge.absorbed in own):
                self._merge(rows, outcome, merge, at, first + at)
                continue
            if asked.what == "merge" or not (mine or asked.what == "group"):
                continue
            said = self._says(rows, outcome, at)
            if said is not None:
                self._fact(rows, outcome, at, first + at, said)

    def _fact(
        self, rows: Rows, outcome: Outcome, at: int, place: int, said: list[tuple[str, Json]]
    ) -> None:
        key = 0 if self._asked.what == "group" else outcome.amplitude_id[at]
        before = self._values.get(key)
        flags = outcome.flags[at]
        fact = Fact(place, rows.block[at], rows.row[at], "ignored", before, before, said)
        if flags & _SKIP and self._asked.what in ("property", "column"):
            fact.rule = "skipped"
        elif flags & _UPDATE_DROPPED and self._asked.what in ("property", "column"):
            fact.rule = "dropped"
        else:
            fact.after = after = self._shown(rows, outcome, at, before)
            self._values[key] = after
            if not _same(before, after):
                fact.rule = "changed" if said else _unsaid(self._asked.name)
            elif any(op == "$set" and _same(value, before) for op, value in said):
                fact.rule = "repeated"
            elif not said or self._asked.what == "first_seen":
                return
        self._note(fact)

    def _note(self, fact: Fact) -> None:
        self._facts += 1
        (self._idle if _same(fact.before, fact.after) else self._changed).append(fact)

    def _merge(self, rows: Rows, outcome: Outcome, merge: Merged, at: int, place: int) -> None:
        """A merge stands at the end of its slice, so the state is what it left."""
        asked, values = self._asked, self._values
        if asked.what == "group":
            return
        before, absorbed = values.get(merge.surviving), values.get(merge.absorbed)
        after = self._of(self._refold.person(merge.surviving))
        values[merge.surviving] = after
        if asked.what == "merge" and merge.absorbed != asked.amplitude_id:
            return
        said = [] if asked.what == "merge" else self._says(rows, outcome, at) or []
        if asked.what == "merge":
            after = merge.surviving
        elif before is None and absorbed is None and after is None and not said:
            return  # neither had a value
        both = (merge.absorbed, merge.surviving)
        fact = Fact(place, rows.block[at], rows.row[at], "merged", before, after, said)
        self._note(replace(fact, absorbed=absorbed, merge=both))

    def _shown(self, rows: Rows, outcome: Outcome, at: int, before: Json) -> Json:
        """Return the value after a row, as its snapshot shows it."""
        if self._asked.what == "first_seen":
            ms = rows.event_time[at]
            return ms if before is None else min(ms, before)
        return self._in(outcome.tables[outcome.table[at]])

    def _in(self, text: bytes) -> Json:
        asked = self._asked
        table = _table(text)
        if asked.what == "column":
            return getattr(table, asked.name)
        if asked.what == "group":
            assert asked.group is not None
            group_type, value = asked.group
            groups = msgspec.json.decode(table.group_properties)
            return groups.get(group_type, {}).get(value, {}).get(asked.name)
        return msgspec.json.decode(table.user_properties).get(asked.name)

    def _only_the_last(self) -> None:
        """A row with the skip flag shows what it says itself: nothing else has to do with it."""
        mine = [one for one in self.shown() if one.at == self.rows - 1]
        self._changed.clear()
        self._idle.clear()
        self._facts = len(mine)
        self._changed.extend(mine)

    # What stands in the end.

    def _read(self, refold: Refold, last: Outcome | None) -> Json:
        asked = self._asked
        if asked.event:
            return None if last is None else self._in(last.tables[last.table[-1]])
        if asked.what == "group":
            assert asked.group is not None
            return refold.groups.get(asked.group, {}).get(asked.name)
        if asked.what == "merge":
            return next(
                (one.surviving for one in refold.merges if one.absorbed == asked.amplitude_id), None
            )
        return self._of(_found(refold, asked))

    def _of(self, who: Person | None) -> Json:
        asked = self._asked
        if who is None:
            return None
        if asked.what == "column":
            return who.columns[COLUMNS.index(asked.name)]
        if asked.what == "first_seen":
            return None if who.first_seen_ms < 0 else who.first_seen_ms
        return who.properties.get(asked.name)

    # Trying.

    def _try(self, facts: list[Fact], value: Json) -> bool:
        """Fold without single rows; add those that turn out to be needed. Returns whether every row was tried."""
        if self._held is None or not self.rows:
            return not self.rows
        rows = _joined(self._held)
        most = WHY_FOLDED_ROWS_MAX // self.rows
        at_once = self.rows <= most
        by_place = {one.at: one for one in facts}
        places = (
            range(self.rows)
            if at_once
            else [*sorted(by_place, reverse=True), *reversed(self._ties)][:most]
        )
        needed = {place: not _same(value, self._without(rows, place)) for place in places}
        for one in facts:
            one.needed = needed.get(one.at)
        dropped = any(one.rule == "dropped" for one in facts)
        ties = frozenset(self._ties)
        for place, is_needed in needed.items():
            if is_needed and place not in by_place:
                spent = dropped and rows.sent[place] is not None
                rule = "limit" if spent else "identity" if place in ties else "newer"
                facts.append(Fact(place, rows.block[place], rows.row[place], rule, needed=True))
        return at_once

    def _without(self, rows: Rows, place: int) -> Json:
        last = self._asked.event and place == self.rows - 1
        if last:  # the event that is asked about stays, and says nothing
            left = replace(
                rows,
                sent=[*rows.sent[:place], None],
                said=[*rows.said[:place], 0],
                sent_groups=[*rows.sent_groups[:place], None],
            )
        else:
            left = _cut(rows, 0, place, place + 1)
        refold = _new_refold(self._asked)
        return self._read(refold, refold.fold(left) if left.block else None)


def _new_refold(asked: Asked) -> Refold:
    # Ids for those whose own is taken: nobody keeps them.
    new_id = itertools.count(1 << 61).__next__
    return Refold(0, new_id, by_time=asked.by_time, barred=asked.barred)


def _found(refold: Refold, asked: Asked) -> Person | None:
    """Return the person asked for, merges followed."""
    if asked.user is not None:
        who = refold.people.get(refold.users[asked.user])
    elif asked.device is not None:
        who = refold.people.get(refold.devices[asked.device])
    else:
        who = refold.person(asked.amplitude_id)
    return refold.people.get(who.merged_into) if who is not None and who.merged_into else who


# What a row says of the value: (operation, value) in the order applied; None: nothing that could touch it.


Says = Callable[[Rows, Outcome, int], list[tuple[str, Json]] | None]


def _says(asked: Asked) -> Says:
    if asked.what == "property":
        return _Property(asked.name)
    if asked.what == "column":
        return _Column(asked.name)
    if asked.what == "group":
        return _Group(asked)
    return _says_time if asked.what == "first_seen" else lambda *_: None


def _says_time(rows: Rows, outcome: Outcome, at: int) -> list[tuple[str, Json]] | None:
    return [("time", rows.event_time[at])] if outcome.kind[at] == Kind.EVENT else None


class _Property:
    def __init__(self, name: str) -> None:
        self._name = name
        self._plain = name.isascii() and name.isprintable() and not set(name) & {'"', "\\", "/"}
        self._kept: dict[str, list[tuple[str, Json]] | None] = {}  # many rows say the same

    def __call__(self, rows: Rows, outcome: Outcome, at: int) -> list[tuple[str, Json]] | None:
        if outcome.kind[at] == Kind.GROUP_IDENTIFY:
            return None
        return self.of(rows.sent[at])

    def of(self, sent: str | None) -> list[tuple[str, Json]] | None:
        if not sent or (
            self._plain and self._name not in sent and "$clearAll" not in sent and "\\" not in sent
        ):
            return None
        kept = self._kept
        if sent not in kept:
            if len(kept) >= WHY_TEXTS_KEPT_MAX:
                kept.clear()
            kept[sent] = self._read(sent)
        return kept[sent]

    def _read(self, sent: str) -> list[tuple[str, Json]] | None:
        said: list[tuple[str, Json]] = []
        for operation, operand in properties.in_order(msgspec.json.decode(sent)):
            if operation == "$clearAll":
                said.append((operation, None))
            elif self._name in operand:
                said.append((operation, operand[self._name]))
        return said or None


class _Group:
    def __init__(self, asked: Asked) -> None:
        self._property = _Property(asked.name)
        self._group = asked.group

    def __call__(self, rows: Rows, outcome: Outcome, at: int) -> list[tuple[str, Json]] | None:
        if outcome.kind[at] != Kind.GROUP_IDENTIFY:
            return None
        names = groups_in(rows.sent_groups[at])
        return self._property.of(rows.sent[at]) if self._group in names else None


def groups_in(text: str | None) -> list[Group]:
    """Return the (type, value) of each group that a row names."""
    return [
        (group_type, one)
        for group_type, value in msgspec.json.decode(text or "{}").items()
        for one in (value if isinstance(value, list) else [value])
    ]


def _bits(first: str, last: str) -> int:
    names = SAYABLE[SAYABLE.index(first) : SAYABLE.index(last) + 1]
    return sum(1 << SAYABLE.index(name) for name in names)


_DEVICE, _PLACE = _bits("platform", "carrier"), _bits("country", "dma")
_DERIVED = ("device_family", "device_type")
_VERSION = _bits("version_name", "version_name")


def _unsaid(column: str) -> str:
    """Name the rule by which a column changes that the event does not say."""
    if column in ("library", "start_version", "paying", *_DERIVED):
        return "default"
    return "coupled"


class _Column:
    def __init__(self, name: str) -> None:
        self._name = name
        self._place = SAYABLE.index(name) if name in SAYABLE else -1
        own = 1 << self._place if name in SAYABLE else 0
        self._mask = own | sum(mask for mask in (_DEVICE, _PLACE) if mask & own)
        if name in _DERIVED:
            self._mask = _DEVICE
        if name == "start_version":
            self._mask |= _VERSION

    def __call__(self, rows: Rows, outcome: Outcome, at: int) -> list[tuple[str, Json]] | None:
        if outcome.kind[at] == Kind.GROUP_IDENTIFY:
            return None
        said = rows.said[at]
        if self._place >= 0 and said >> self._place & 1:
            return [("$set", rows.shown[at][self._place])]
        earned = self._name == "paying" and outcome.flags[at] & _REVENUE
        touched = said & self._mask or self._name == "library" or earned
        return [] if touched and not outcome.flags[at] & _SKIP else None


# Rows.


def _cut(rows: Rows, first: int, end: int, again: int | None = None) -> Rows:
    """Return rows first … end, and those from `again` on."""

    def some(column: list[Any]) -> list[Any]:
        return column[first:end] if again is None else column[first:end] + column[again:]

    return Rows(*(some(getattr(rows, name)) for name in rows.__struct_fields__))


def _joined(chunks: list[Rows]) -> Rows:
    if len(chunks) == 1:
        return chunks[0]
    return Rows(
        *(
            [one for chunk in chunks for one in getattr(chunk, name)]
            for name in Rows.__struct_fields__
        )
    )
