"""Folding history again from its rows: the one operation behind undo, restore, unmerge, check and why.

A row of the lake keeps what its event sent (`sent`, `sent_groups`, `said`, the skip flag), so the events of some
people can be made again and given to the fold that made them the first time. `Refold` does that in order of position,
or in event time (`order.SQL`), with nothing known at first: what it ends with is the state that a server would have
that never saw the rows left out. In event time, rows that come later may belong before some that were folded. They are
folded as on arrival, and `late` is whom they mark: the closure of those has to be folded again.

The rows given must be whole: everyone who shares a device or user id with one of them, and every change of a group
that they show. Group identifies of other people are `foreign`: they change their groups and no person here.

Rows of people who were deleted are not there. Where one of them took a device is told instead (`Freed`).

A person who is made again keeps the amplitude_id of its first row if no other person here has it already.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from itertools import accumulate, groupby
from types import MappingProxyType
from typing import Any

import msgspec
from msgspec import Struct

from retrofill.core import fold, order
from retrofill.core.block import SAYABLE, Flag, Merge
from retrofill.core.event import Batch, Event
from retrofill.core.fold import Changes, Group, Known
from retrofill.core.person import Person

# Amplitude_ids of people made again, until it is known who they are.
_PROVISIONAL = 1 << 62
_decode = msgspec.json.decode
_SKIP, _REVENUE = int(Flag.SKIP), int(Flag.REVENUE)
# What an event says under its own name; the version is said as `version_name`, the address as `ip`.
_FIELDS = tuple({"ip_address": "ip"}.get(name, name) for name in SAYABLE)


class Rows(Struct):
    """Visible rows of one project in the order of their fold, column by column, named as in the lake.

    foreign: true for a group identify of somebody else. shown: the values of the columns SAYABLE; rows that show the
    same should share one tuple.
    """

    block: list[int]
    row: list[int]
    amplitude_id: list[int]
    flags: list[int]
    user_id: list[str | None]
    device_id: list[str | None]
    event_type: list[str]
    insert_id: list[str | None]
    event_id: list[int | None]
    event_time: list[int]
    server_upload_time: list[int]
    path: list[str]
    sent: list[str | None]
    sent_groups: list[str | None]
    said: list[int]
    updates_max: list[int]
    merges_max: list[int | None]
    foreign: list[bool]
    shown: list[tuple[str | None, ...]]


class Freed(Struct, frozen=True):
    """A device that is nobody's, since its owner, who took it by an event of this time, has been deleted."""

    device: str
    owner: int
    event_time_ms: int


_NONE: Mapping[int, Sequence[Freed]] = MappingProxyType({})


class Outcome(Struct):
    """What the fold decides about rows, one entry each, as in a Block. table: place in `tables`."""

    amplitude_id: list[int]
    created_ms: list[int]
    kind: bytes
    flags: bytes
    table: list[int]
    tables: list[bytes]


class Merged(Struct, frozen=True):
    """A merge, with the position of the row that caused it."""

    block: int
    row: int
    absorbed: int
    surviving: int
    event_time_ms: int
    server_upload_ms: int


class _Ids(dict[str, int]):
    """Ids of people; 0 for one that was not seen."""

    def __missing__(self, one: str) -> int:
        return 0


class Refold:
    """The state of some people of one project after the rows given so far.

    new_id: draws an amplitude_id that nobody ever had. by_time: whether rows come, and properties go, in event time.
    barred: see `fold.Known`.
    """

    def __init__(
        self,
        project: int,
        new_id: Callable[[], int],
        *,
        by_time: bool = False,
        barred: frozenset[tuple[str, str]] = frozenset(),
    ) -> None:
        self._project = project
        self._new_id = new_id
        self._next = _PROVISIONAL
        self._final: dict[int, int] = {0: 0}  # provisional → final amplitude_id
        self._taken: dict[int, int] = {}  # and back
        self.devices: dict[str, int] = _Ids()
        self.users: dict[str, int] = _Ids()
        self.people: dict[int, Person] = {}
        self.groups: dict[Group, dict[str, Any]] = {}
        self.freed: dict[str, Freed] = {}  # the last of each device
        self.merges: list[Merged] = []
        self.aliases: dict[str, str] = {}
        self.last: dict[order.Place, order.Key] = {}
        self.late: set[order.Place] = set()
        self._touched = Changes({}, {}, {}, {}, {}, {})  # since `changes` was last asked
        self._by_time = by_time
        self._known = Known(
            self.devices,
            self.users,
            self.people,
            self.groups,
            self.last if by_time else None,
            barred,
        )

    def fold(self, rows: Rows, freed: Mapping[int, Sequence[Freed]] = _NONE) -> Outcome:
        """Fold the next rows. freed: what is nobody's from before the row at a place on."""
        amplitude_ids, created = array("q"), array("q")
        kinds, flags = bytearray(), bytearray()
        tables: list[bytes] = []
        places = array("q")
        events = _events(rows)
        first = 0
        for last in self._ends(rows, freed):
            for one in freed.get(first, ()):
                self.free(one)
            folded = fold.fold(
                self._batches(rows, events, first, last),
                {self._project: self._known},
                number=0,
                server_upload_ms=rows.server_upload_time[first],
                fresh=self._next,
                updates_max={self._project: rows.updates_max[first]},
                merges_max={self._project: rows.merges_max[first] or 0},
                dropped=bytes(last - first),
                keys=b"",
            )
            block = folded.block
            decided = array("q", block.amplitude_id)
            self._settle(folded.fresh, decided, rows.amplitude_id[first:last])
            self._apply(folded.changes[self._project])
            self._merge(block.merges, rows, first)
            amplitude_ids += decided
            created.frombytes(block.created_ms)
            kinds += block.kind
            flags += block.flags
            at = len(tables)
            places.extend(place + at for place in array("i", block.table))
            tables += block.tables
            first = last
        final = self._final
        return Outcome(
            [final.get(one, one) for one in amplitude_ids],
            created.tolist(),
            bytes(kinds),
            bytes(flags),
            places.tolist(),
            tables,
        )

    def _ends(self, rows: Rows, cuts: Collection[int]) -> list[int]:
        """Return where each run of rows ends that are folded as one block."""
        # One block has one server time. In event time only the limits that held are the same for several rows.
        same = rows.updates_max if self._by_time else rows.block
        runs = groupby(zip(same, rows.merges_max, strict=True))
        ends = list(accumulate(sum(1 for _ in run) for _, run in runs))
        return sorted({*ends, *cuts} - {0}) if cuts else ends

    def free(self, one: Freed) -> None:
        """Let a device be nobody's from here on."""
        self.freed[one.device] = one
        self.devices[one.device] = self._touched.devices[one.device] = 0

    def changes(self, was: Changes) -> Changes:
        """Return what must be laid over the state `was`, which names people as they were, to end in this one.

        A second time: what has changed since, and those that `was` names.
        """
        final, touched = self._final, self._touched
        people = {
            final[number]: msgspec.structs.replace(
                one,
                amplitude_id=final[number],
                merged_into=final.get(one.merged_into, one.merged_into),
                shown=b"",
            )
            for number, one in touched.people.items()
        }
        gone = [one for one in was.people if one not in self._taken]
        people |= {one: Person(one, merged_into=-1) for one in gone}
        late, self.late = self.late, set()
        self._touched = Changes({}, {}, {}, {}, {}, {})
        return Changes(
            {**_absent(was.devices, self.devices), **_renamed(touched.devices, final)},
            {**_absent(was.users, self.users), **_renamed(touched.users, final)},
            people,
            {**{key: {} for key in was.groups if key not in self.groups}, **touched.groups},
            {},
            {
                final[place] if isinstance(place, int) else place: key
                for place, key in touched.last.items()
            },
            {final[place] if isinstance(place, int) else place for place in late},
        )

    def person(self, amplitude_id: int) -> Person | None:
        """Return the person with this amplitude_id as it stands now, None if nobody here has it."""
        return self.people.get(self._taken.get(amplitude_id, 0))

    def _batches(self, rows: Rows, events: list[Event], first: int, last: int) -> list[Batch]:
        """The requests of one block: rows next to each other that came the same way."""
        batches = []
        at = first
        for path, run in groupby(rows.path[first:last]):
            after = at + sum(1 for _ in run)
            # Times are mended already.
            batches.append(Batch(self._project, path, b"", events[at:after], 0, 0, 0))
            at = after
        return batches

    def _settle(self, fresh: int, decided: Sequence[int], were: Sequence[int]) -> None:
        """Say who the people are that a block made."""
        if fresh == self._next:
            return
        for one, was in zip(decided, were, strict=True):
            if one >= self._next and one not in self._final:
                self._settle_one(one, was)
        for one in range(self._next, fresh):  # nobody's row shows it any more
            if one not in self._final:
                self._settle_one(one, 0)
        self._next = fresh

    def _settle_one(self, provisional: int, was: int) -> None:
        number = was if was > 0 and was not in self._taken else self._new_id()
        self._final[provisional] = number
        self._taken[number] = provisional

    def _apply(self, changes: Changes) -> None:
        touched = self._touched
        for mine, since, new in (
            (self.devices, touched.devices, changes.devices),
            (self.users, touched.users, changes.users),
            (self.people, touched.people, changes.people),
            (self.groups, touched.groups, changes.groups),
            (self.last, touched.last, changes.last),
        ):
            mine.update(new)  # type: ignore[arg-type] # of the same side of both
            since.update(new)  # type: ignore[arg-type]
        self.late |= changes.late

    def _merge(self, merges: list[Merge], rows: Rows, first: int) -> None:
        final = self._final
        for merge in merges:
            at = first + merge.row
            self.merges.append(
                Merged(
                    rows.block[at],
                    rows.row[at],
                    final[merge.absorbed],
                    final[merge.surviving],
                    merge.event_time_ms,
                    rows.server_upload_time[at],
                )
            )


def _absent(were: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    """The ids that nobody has any more."""
    return {one: 0 for one in were if one not in now}


def _renamed(ids: dict[str, int], final: dict[int, int]) -> dict[str, int]:
    return {one: final[number] for one, number in ids.items()}


def _events(rows: Rows) -> list[Event]:
    """Make the events again as far as the fold looks at them: each a copy of one that says the same of its columns."""
    said_alike: dict[tuple[int, int, int], Event] = {}
    sent_before: dict[str, dict[str, Any]] = {}
    events = []
    sides = zip(
        *(rows.user_id, rows.device_id, rows.event_type, rows.event_time, rows.insert_id),
        *(rows.event_id, rows.sent, rows.sent_groups, rows.said, rows.flags, rows.foreign),
        rows.shown,
        strict=True,
    )
    for side in sides:
        (
            user,
            device,
            event_type,
            time,
            insert,
            number,
            sent,
            groups,
            said,
            flags,
            foreign,
            shown,
        ) = side
        flags &= _SKIP | _REVENUE
        alike = (id(shown), said, flags)
        pattern = said_alike.get(alike)
        if pattern is None:
            pattern = said_alike[alike] = _pattern(shown, said, flags)
        event = copy(pattern)
        event.event_type = event_type
        if foreign:
            event.device_id = ""
        else:
            event.user_id = user
            event.device_id = device or ""
        event.time = time
        event.insert_id = insert
        event.event_id = number
        if sent:
            properties = sent_before.get(sent)
            if properties is None:
                properties = sent_before[sent] = _decode(sent)
            if event_type == "$groupidentify":
                event.group_properties = properties
            else:
                event.user_properties = properties
        if groups:
            event.groups = _decode(groups)
        events.append(event)
    return events


def _pattern(shown: tuple[str | None, ...], said: int, flags: int) -> Event:
    fields = {
        name: value
        for place, (name, value) in enumerate(zip(_FIELDS, shown, strict=True))
        if said >> place & 1
    }
    event = Event("", **fields)  # type: ignore[arg-type] # texts, every one
    if flags & _SKIP:
        event.skip_user_properties_sync = True
    if flags & _REVENUE:
        event.revenue = 0.0
    return event
