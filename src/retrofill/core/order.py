"""The order of events in event time, and which events came too late to be folded on arrival.

A project whose `property_time` is `event` shows what a fold in event time ends in. An event's place in it is its key:
(event_time, event_id, insert_id), and then a hash of what it says; `SQL` orders lake rows so. An event that comes after
everything it shares something with finds the right values on arrival, and folding it costs no more than ever.
Any other is late: it is folded as it comes, and `Walk` marks whom it touches, for the engine to fold them again.

What two events share is what one of them writes and the other reads or writes: a person, the owner of a device, the
properties of a group. So with each person the key of its last event is kept, and with each group those of its last
change and of the last row that shows it. An event's device and user lead to the people concerned: its own, and the
one whose device it takes over. Whoever is wrong because of a late event shares ids with a marked person, or shows a
marked group, so the closure of the marks is all that has to be folded again.

A row shows the groups its event names and those its person stays in. Which those are within a block is taken widely,
so a mark may be needless; none is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from retrofill.core.block import SAYABLE, Flag, Kind
from retrofill.core.event import Event
from retrofill.core.person import Person

Key = tuple[int, int, str]
"""event_time_ms, event_id (-1 if it has none), insert_id ("" if it has none)."""

Place = int | tuple[str, str, str]
"""What a key is kept with: an amplitude_id, or (SHOWN or CHANGED, group type, value)."""

FIRST: Key = (-1, -1, "")  # before every event
LAST_ID = 2**63 - 1  # an event_id after every other
EVERYBODY: Place = (
    0  # a mark of all people and groups of a project: more are marked than are kept apart
)
SHOWN, CHANGED = "shown", "changed"

_IDENTIFY, _GROUP_IDENTIFY = int(Kind.IDENTIFY), int(Kind.GROUP_IDENTIFY)
_HELD = int(Flag.HELD)

# What an event says, as far as a fold looks at it or a row shows it: nothing here depends on another event.
_CONTENT = (
    *("event_type", "user_id", "device_id", "path", "session_id", "sent", "sent_groups"),
    *("event_properties", "said", f"flags & {int(Flag.SKIP)}"),
    *(f"CASE WHEN said & {1 << bit} <> 0 THEN {name} END" for bit, name in enumerate(SAYABLE)),
)
_TEXTS = ", ".join(f"coalesce(cast({one} AS varchar), '')" for one in _CONTENT)
# The last two only tell apart rows that say the same: either order ends in the same rows.
SQL = (
    "event_time, coalesce(event_id, -1), coalesce(insert_id, ''), "
    f'md5(concat_ws(chr(31), {_TEXTS})), "block", "row"'
)


class Walk:
    """Looks at the events of one project in one block, after the fold, in order of arrival.

    devices, people, last: what was known before the block, as in `fold.Known`: every person there has a key. moved: devices that
    the block has given to somebody so far. new, late: keys and marks, added to.
    """

    def __init__(
        self,
        devices: Mapping[str, int],
        moved: Mapping[str, int],
        people: Mapping[int, Person],
        last: Mapping[Place, Key],
        new: dict[Place, Key],
        late: set[Place],
    ) -> None:
        self._devices, self._moved, self._people, self._last = devices, moved, people, last
        self._new, self._late = new, late
        self._owners: dict[str, int] = {}  # of devices, as the block has changed them so far
        self._groups: dict[int, set[tuple[str, str]]] = {}  # that a person may show

    def add(  # noqa: C901 - every event comes by here: no calls that can be spared
        self,
        events: Sequence[Event],
        people: Sequence[int],
        times: Sequence[int],
        kinds: Sequence[int],
        flags: Sequence[int],
    ) -> None:
        """Look at the next events. people, times, kinds, flags: what the fold decided of each."""
        last, new, late = self._last, self._new, self._late
        devices, moved, owners = self._devices, self._moved, self._owners
        groups, known = self._groups, self._people
        now: Key
        for event, one, time, kind, flag in zip(events, people, times, kinds, flags, strict=True):
            if kind > _GROUP_IDENTIFY:
                continue
            number = event.event_id
            now = (time, -1 if number is None else number, event.insert_id or "")
            if one:
                before = new.get(one)
                if before is None:
                    who = known.get(one)
                    before = FIRST if who is None else last[one]
                    if who is not None and who.groups and one not in groups:
                        groups[one] = set(named(who.groups))
                if now <= before:
                    late.add(one)
                else:
                    new[one] = now
                device = event.device_id or ""
                if flag & _HELD:
                    self._hold(one, owners.get(device) or devices[device], now)
                elif moved and device in moved:  # the others stay with the person whom they lead to
                    owner = owners.get(device) or devices[device]
                    if owner != one:
                        owners[device] = one
                        if owner:
                            self._take_over(one, owner, now)
            if event.groups or (groups and one in groups):
                self._show(event, one, kind, now)

    def _take_over(self, one: int, owner: int, now: Key) -> None:
        """A device is another person's from now on, who may be the same person's survivor."""
        groups, who = self._groups, self._people.get(owner)
        before = self._new.get(owner) or (FIRST if who is None else self._last[owner])
        if now <= before:
            self._late.add(one)
        theirs = groups.get(owner, set()) | set(named(who.groups if who is not None else {}))
        if theirs:
            groups[one] = groups.get(one, set()) | theirs

    def _hold(self, one: int, other: int, now: Key) -> None:
        """That a device stays another person's was decided by whose it was."""
        who = self._people.get(other)
        before = self._new.get(other) or (FIRST if who is None else self._last[other])
        if now <= before:
            self._late.add(one)
        else:
            self._new[other] = now

    def _show(self, event: Event, one: int, kind: int, now: Key) -> None:
        last, new, late = self._last, self._new, self._late
        own = set(named(event.groups or {}))
        theirs = self._groups.get(one, set())
        if kind == _IDENTIFY and not own <= theirs:
            theirs = self._groups[one] = theirs | own
        for group in theirs | own:
            shown, changed = (SHOWN, *group), (CHANGED, *group)
            was_shown = new.get(shown) or last.get(shown, FIRST)
            was_changed = new.get(changed) or last.get(changed, FIRST)
            if kind == _GROUP_IDENTIFY and group in own:
                if now <= was_shown:  # its own row shows what it changes
                    late.add(changed)
                new[changed] = max(now, was_changed)
            elif now <= was_changed:
                late.add(one)
            new[shown] = max(now, was_shown)


def named(groups: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each (type, value) of groups as they are sent or kept."""
    for group_type, values in groups.items():
        for value in values if isinstance(values, list) else [values]:
            yield group_type, value
