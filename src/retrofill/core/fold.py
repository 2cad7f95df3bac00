"""Events into state, one after another, in order of arrival.

`fold` takes the requests of one block and what is known of the people they touch, and returns the block to write and
the values that change. It is the whole meaning of an event: the server folds live requests with it, recovery folds the
same blocks again, and both must end in the same values, so nothing here depends on when or where it runs. `Known` is
only read; what changes is laid over it and handed back, for the caller to keep once the block is on disk.

Order of one event: identity (merge), property table, first-seen, row. The table is read and written as contract,
properties 2 says; with `$skip_user_properties_sync` it is neither. An identify always writes.

Where a project's properties go by event time (`Known.last` is there), events are folded in the order in which they come
all the same; `order.Walk` marks those for which that was not right.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import msgspec
from msgspec import Struct

from retrofill.core import identity, language, order, person, properties
from retrofill.core.alike import Same
from retrofill.core.block import COLUMNS, SAYABLE, Block, Flag, Kind, Merge, Part
from retrofill.core.event import Batch, Event
from retrofill.core.person import FORGOTTEN, NO_COLUMNS, NO_GROUPS, NO_UPDATES, Person
from retrofill.core.throttle import UpdateWindow
from retrofill.limits import (
    ALIKE_BYTES_MAX,
    ALIKE_MAX,
    ALIKE_TOTAL_BYTES,
    CLOCK_SKEW_MS,
    COLUMNS_ALIKE_MAX,
    GROUP_TYPES_MAX,
    TIME_MS_MAX,
)

Group = tuple[str, str]  # type, value

# What an event says of the built-in columns, in the order of `block.COLUMNS`; the two device names are derived.
_VERSION = COLUMNS.index("version_name")
_said = attrgetter(
    *COLUMNS[:_VERSION], "app_version", "version_name", "ip", "library", "start_version", "paying"
)
_MODEL = COLUMNS.index("device_model")
_LIBRARY = COLUMNS.index("library")
_START = COLUMNS.index("start_version")
_PAYING = COLUMNS.index("paying")
_FAMILIES = {"iPhone": "Apple iPhone", "iPad": "Apple iPad", "iPod": "Apple iPod"}

DEFAULT_LIBRARY = {
    "/2/httpapi": "http/2.0",
    "/batch": "batch/1.0",
    "/httpapi": "http/1.0",
    "/": "http/1.0",
    "/identify": "http/1.0",
    "/groupidentify": "http/1.0",
    "/usermap": "http/1.0",
}
# Plain numbers: reaching a member through its enum costs more than the rest of a step in the hot loop.
_EVENT, _IDENTIFY, _GROUP_IDENTIFY, _ALIAS, _DISPLACED = (
    int(kind)
    for kind in (Kind.EVENT, Kind.IDENTIFY, Kind.GROUP_IDENTIFY, Kind.ALIAS, Kind.DISPLACED)
)
_SKIP, _FIRST_EVENT, _UPDATE_DROPPED, _REVENUE, _HELD = (
    int(flag)
    for flag in (Flag.SKIP, Flag.FIRST_EVENT, Flag.UPDATE_DROPPED, Flag.REVENUE, Flag.HELD)
)
_TABLE_KINDS = frozenset({_EVENT, _IDENTIFY})
_kind_of = {"$identify": _IDENTIFY, "$groupidentify": _GROUP_IDENTIFY}.get
_AFTER_DOLLAR = "%"  # texts that begin with a dollar come before it, and few others

# Column values that were said before, each kept once, with which columns they are: whoever says the same again is recognised by identity, without
# touching the strings that were kept for the person. Emptied at its bound; only speed depends on it.
_said_before: dict[tuple[str | None, ...], tuple[tuple[str | None, ...], int]] = {}

_SAID_MAX = 65_536

# The columns and snapshots that many people have: each once, or else every person's own would be far from the processor.
_same_columns: Same[tuple[str | None, ...]] = Same(
    most=COLUMNS_ALIKE_MAX, longest=len(COLUMNS), total=COLUMNS_ALIKE_MAX * len(COLUMNS)
)
_same_shown: Same[bytes] = Same(most=ALIKE_MAX, longest=ALIKE_BYTES_MAX, total=ALIKE_TOTAL_BYTES)

_encode = msgspec.json.Encoder().encode
_NO_TABLE = -1
_NO_MAX: Mapping[int, int] = MappingProxyType({})
_NONE_ALLOWED: Mapping[int, frozenset[str]] = MappingProxyType({})


class Known(Struct):
    """What is known of one project before the block, complete for every id its events name.

    devices, users: id → amplitude_id, 0 if never seen. people: every amplitude_id named there and its survivor.
    groups: (type, value) → properties, for every group an event or a person names.
    last: the keys kept with these people and groups if properties go by event time, else None: see `core.order`.
    barred: (device, user) whose merge was taken back: whoever was anonymous on the device is not this user.
    """

    devices: Mapping[str, int]
    users: Mapping[str, int]
    people: Mapping[int, Person]
    groups: Mapping[Group, dict[str, Any]]
    last: Mapping[order.Place, order.Key] | None = None
    barred: frozenset[tuple[str, str]] = frozenset()


class Changes(Struct):
    """What the block changes in one project: new values by key. An alias of "" is taken back.

    last, late: keys in event time, and the people and groups that a late event touched; see `core.order`.
    """

    devices: dict[str, int]
    users: dict[str, int]
    people: dict[int, Person]
    groups: dict[Group, dict[str, Any]]
    aliases: dict[str, str]
    last: dict[order.Place, order.Key] = {}
    late: set[order.Place] = set()


def together(parts: Sequence[Changes]) -> Changes:
    """Return several changes, one after another, as one: what was told later holds."""
    whole = Changes({}, {}, {}, {}, {})
    for part in parts:
        whole.devices.update(part.devices)
        whole.users.update(part.users)
        whole.people.update(part.people)
        whole.groups.update(part.groups)
        whole.aliases.update(part.aliases)
        whole.last.update(part.last)
        whole.late.update(part.late)
    return whole


class Folded(Struct):
    """A block with what it changes, by project, and the next unused amplitude_id."""

    block: Block
    changes: dict[int, Changes]
    fresh: int


class _Columns(Struct):
    """The packed columns of the block under way."""

    amplitude_id: array[int]
    event_time_ms: array[int]
    created_ms: array[int]
    kind: bytearray
    flags: bytearray
    table: array[int]
    said: array[int]
    tables: dict[bytes, int]  # each with its place; the bytes of a person's remember their hash
    merges: list[Merge]


def fold(
    batches: Sequence[Batch],
    known: Mapping[int, Known],
    *,
    number: int,
    server_upload_ms: int,
    fresh: int,
    updates_max: Mapping[int, int],
    dropped: Sequence[int],
    keys: bytes,
    merges_max: Mapping[int, int] = _NO_MAX,
    allowed: Mapping[int, frozenset[str]] = _NONE_ALLOWED,
    forgotten: Sequence[tuple[int, int]] = (),
    partition: int = 0,
) -> Folded:
    """Fold the requests of one block.

    batches: in order of arrival, each event with its device_id filled in. dropped: one entry an event, for a duplicate
    the kind it becomes (DROPPED, or DISPLACED with a row that shows what the event alone said), 0 for others. keys: 16 bytes an event, kept in the block. fresh: the next unused amplitude_id.
    updates_max: the property updates of a person in an hour, by project, 0 = any number. merges_max: people whom one user
    may absorb, the same; allowed: users who may absorb any number of them, by project.
    forgotten: (project, amplitude_id) of people to delete before the first event.
    """
    columns = _Columns(
        array("q"),
        array("q"),
        array("q"),
        bytearray(),
        bytearray(),
        array("i"),
        array("i"),
        {},
        [],
    )
    changes: dict[int, Changes] = {}
    parts: list[Part] = []
    for owner, amplitude_id in forgotten:
        left = changes.setdefault(owner, Changes({}, {}, {}, {}, {}))
        left.people[amplitude_id] = Person(amplitude_id, merged_into=FORGOTTEN)
    walks: dict[int, order.Walk] = {}
    first = 0
    for batch in batches:
        project = batch.project
        change = changes.get(project)
        if change is None:
            change = changes[project] = Changes({}, {}, {}, {}, {})
        theirs = known[project]
        if theirs.last is not None and project not in walks:
            walks[project] = order.Walk(
                theirs.devices,
                change.devices,
                theirs.people,
                theirs.last,
                change.last,
                change.late,
            )
        client_upload_ms = batch.client_upload_ms
        if client_upload_ms is None:
            client_upload_ms = batch.received_ms
        rows = len(batch.events)
        free = allowed.get(project)
        named = (
            sorted({event.user_id for event in batch.events if event.user_id in free})
            if free
            else []
        )
        fresh = _fold_batch(
            batch,
            theirs,
            change,
            columns,
            client_upload_ms=client_upload_ms,
            server_upload_ms=server_upload_ms,
            fresh=fresh,
            updates_max=updates_max[project],
            merges_max=merges_max.get(project, 0),
            allowed=named,
            dropped=dropped[first : first + rows],
        )
        if walks and project in walks:
            walks[project].add(
                batch.events,
                columns.amplitude_id[first:],
                columns.event_time_ms[first:],
                columns.kind[first:],
                columns.flags[first:],
            )
        parts.append(
            Part(
                project,
                batch.path,
                batch.received_ms,
                client_upload_ms,
                batch.remote,
                rows,
                batch.body,
                updates_max[project],
                merges_max.get(project, 0),
                named,
            )
        )
        first += rows
    block = Block(
        partition,
        number,
        server_upload_ms,
        parts,
        columns.amplitude_id.tobytes(),
        columns.event_time_ms.tobytes(),
        columns.created_ms.tobytes(),
        bytes(columns.kind),
        bytes(columns.flags),
        columns.table.tobytes(),
        keys,
        columns.said.tobytes(),
        list(columns.tables),
        columns.merges,
        list(forgotten),
    )
    return Folded(block, changes, fresh)


def skew_ms(received_ms: int, client_upload_ms: int) -> int:
    """How far the client's clock is behind ours; under a minute counts as none. Source: contract, events 5."""
    skew = received_ms - client_upload_ms
    return skew if abs(skew) >= CLOCK_SKEW_MS else 0


def _fold_batch(  # noqa: C901, PLR0912, PLR0915 - the hot loop: one function, no calls that can be spared
    batch: Batch,
    known: Known,
    change: Changes,
    columns: _Columns,
    *,
    client_upload_ms: int,
    server_upload_ms: int,
    fresh: int,
    updates_max: int,
    merges_max: int,
    allowed: Sequence[str],
    dropped: Sequence[int],
) -> int:
    devices, users, people = known.devices, known.users, known.people
    new_devices, new_users, new_people = change.devices, change.users, change.people
    add_person = columns.amplitude_id.append
    add_time = columns.event_time_ms.append
    add_created = columns.created_ms.append
    kinds, all_flags = (
        columns.kind,
        columns.flags,
    )  # mostly 0, and so only written where they are not
    add_table = columns.table.append
    add_said = columns.said.append
    said_before = _said_before.get
    tables, place_of = columns.tables, columns.tables.setdefault
    skew = skew_ms(batch.received_ms, client_upload_ms)
    remote = batch.remote
    library = DEFAULT_LIBRARY.get(batch.path, "http/2.0")
    may_earn = b"$" in batch.body
    own_columns: dict[tuple[str | None, ...], tuple[str | None, ...]] = {}
    aliases = batch.path == "/usermap"
    by_time = known.last is not None
    now_ms = server_upload_ms
    row = len(kinds) - 1
    kinds += bytes(len(batch.events))
    all_flags += bytes(len(batch.events))
    if len(_said_before) > _SAID_MAX:
        _said_before.clear()

    for event, is_dropped in zip(batch.events, dropped, strict=True):
        row += 1
        time = event.time
        event_time = client_upload_ms if time is None else time
        if skew:
            event_time = min(max(event_time + skew, 0), TIME_MS_MAX)
        if by_time:
            now_ms = event_time
        if is_dropped:
            add_person(0)
            add_time(event_time)
            add_created(-1)
            kinds[row] = is_dropped
            if is_dropped == _DISPLACED:
                shown, which = _alone(event, remote, library)
                all_flags[row] = _SKIP if event.skip_user_properties_sync else 0
                add_table(place_of(shown, len(tables)))
                add_said(which)
            else:
                add_table(_NO_TABLE)
                add_said(0)
            continue
        user, device = event.user_id, event.device_id
        kind = _EVENT
        if aliases:
            kind = _ALIAS
        elif event.event_type < _AFTER_DOLLAR:
            kind = _kind_of(event.event_type, _EVENT)
        flags = 0

        if kind == _ALIAS:
            _alias(event, change)
            who = Person(users.get(user or "", 0) or new_users.get(user or "", 0))
            user = device = None
        elif user is None and not device:
            who = Person(0)  # a group identify without ids concerns nobody
        else:
            # Identity. Nearly every event is of a person known by both ids.
            amplitude_id = new_devices.get(device) or devices[device]  # type: ignore[arg-type,index]
            found = new_people.get(amplitude_id) or people.get(amplitude_id)
            if found is None or (user is not None and found.user_id != user) or found.merged_into:
                user_person = 0 if user is None else new_users.get(user) or users[user]
                most = 0 if user in allowed else merges_max
                full = False
                if found is not None and found.merged_into:
                    amplitude_id, found = _follow(found, people, new_people)
                if user is not None and user_person and user_person != amplitude_id:
                    owner = new_people.get(user_person) or people[user_person]
                    user_person = 0 if owner.merged_into == FORGOTTEN else user_person
                    full = 0 < most <= owner.joined
                if (
                    known.barred
                    and (device, user) in known.barred
                    and found is not None
                    and found.user_id is None
                ):
                    amplitude_id, found = 0, None
                resolution = identity.resolve(
                    device_person=amplitude_id,
                    device_owner=found.user_id if found else None,
                    user=user,
                    user_person=user_person,
                    fresh=fresh,
                    full=full,
                )
                amplitude_id = resolution.amplitude_id
                if resolution.held:
                    flags = _HELD
                else:
                    new_devices[device] = amplitude_id  # type: ignore[index]
                if user is not None and user_person != amplitude_id:
                    new_users[user] = amplitude_id
                if resolution.fresh:
                    fresh += 1
                    found = Person(amplitude_id, user)
                else:
                    found = new_people.get(amplitude_id) or people[amplitude_id]
                if resolution.adopts:
                    found = _replaced(found, user_id=user)
                if resolution.absorbed:
                    other = new_people.get(resolution.absorbed) or people[resolution.absorbed]
                    found = person.merged(found, other)
                    if most:
                        found = _replaced(found, joined=found.joined + 1)
                    new_people[resolution.absorbed] = _replaced(other, merged_into=amplitude_id)
                    columns.merges.append(
                        Merge(row, batch.project, resolution.absorbed, amplitude_id, event_time)
                    )
                new_people[amplitude_id] = found
            who = found

        if kind == _GROUP_IDENTIFY:
            _group_identify(event, known, change)

        # The property table.
        skip = event.skip_user_properties_sync and kind == _EVENT
        sent = event.user_properties
        ip = event.ip
        said: tuple[str | None, ...] = (  # as `_said`, in two thirds of its time
            event.platform,
            event.os_name,
            event.os_version,
            event.device_brand,
            event.device_manufacturer,
            event.device_model,
            event.carrier,
            event.country,
            event.region,
            event.city,
            event.dma,
            event.language,
            event.app_version,
            event.version_name,
            ip if ip is None or ip != "$remote" else remote,
            event.library,
            event.start_version,
            event.paying,
        )
        entry = who.sent
        # Compared with what the person said last, the fresh strings need not be hashed.
        if entry is None or entry[0] != said:
            entry = said_before(said)
            if entry is None:
                entry = _said_before[said] = said, _which(said)
        said, which = entry
        event_groups = event.groups
        shown = b""
        if skip:
            flags |= _SKIP
            table = properties.apply({}, sent) if sent else {}
            own = own_columns.get(said)
            if own is None:
                own = own_columns[said] = _columns(NO_COLUMNS, said, library)
            shown = _show(table, own, event_groups, {}, known, change)
        elif kind in _TABLE_KINDS:
            before = who
            table = who.properties
            if sent and sent is not table and sent is not who.told:
                table = properties.apply(table, sent)
                if table is who.properties:
                    who.told = sent
            built_in = who.columns
            if entry is not who.sent or (said[15] is None and built_in[_LIBRARY] != library):
                new = _started(_columns(built_in, said, library))
                if new is not built_in:  # else nothing changes, whoever has the same
                    built_in = _same_columns.one(new)
            if (
                event.price is not None
                or event.revenue is not None
                or (may_earn and _is_revenue(event))
            ):
                flags |= _REVENUE
                if built_in[_PAYING] is None and kind == _EVENT:
                    built_in = (*built_in[:_PAYING], "true", *built_in[_PAYING + 1 :])
            groups = who.groups
            if kind == _IDENTIFY and event_groups:
                groups = _join(groups, event_groups)
            updates = who.updates
            if sent and updates_max and not UpdateWindow.allowed(updates, now_ms, updates_max):
                flags |= _UPDATE_DROPPED
                shown = _show(table, built_in, event_groups, groups, known, change)
            else:
                if sent and updates_max:
                    updates = UpdateWindow.added(updates, now_ms)
                if (
                    table is not who.properties
                    or built_in is not who.columns
                    or groups is not who.groups
                ):
                    who = Person(
                        who.amplitude_id,
                        who.user_id,
                        table,
                        built_in,
                        groups or NO_GROUPS,
                        who.first_seen_ms,
                        now_ms,
                        updates or NO_UPDATES,
                        0,
                        who.joined,
                        b"",
                        entry,
                    )
                elif updates is not who.updates:
                    who = _replaced(who, updates=updates)
            if kind == _EVENT and not (0 <= who.first_seen_ms <= event_time):
                if who.first_seen_ms < 0:
                    flags |= _FIRST_EVENT
                who = _replaced(who, first_seen_ms=event_time)
            if not shown:
                if event_groups or groups:
                    shown = _show(who.properties, who.columns, event_groups, groups, known, change)
                else:
                    shown = who.shown
                    if not shown:
                        # Remembered on the person: a function of its other fields.
                        shown = who.shown = _same_shown.one(
                            _encode((who.properties, {}, {}, *who.columns))
                        )
            if who is not before:
                new_people[who.amplitude_id] = who
        else:
            shown = _show({}, _columns(NO_COLUMNS, said, library), event_groups, {}, known, change)

        if kind == _EVENT and skip and not (0 <= who.first_seen_ms <= event_time):
            if who.first_seen_ms < 0:
                flags |= _FIRST_EVENT
            who = _replaced(who, first_seen_ms=event_time)
            new_people[who.amplitude_id] = who

        add_person(who.amplitude_id)
        add_time(event_time)
        add_created(who.first_seen_ms)
        if kind:
            kinds[row] = kind
        if flags:
            all_flags[row] = flags
        add_said(which)
        add_table(place_of(shown, len(tables)))
    return fresh


def _alone(event: Event, remote: str | None, library: str) -> tuple[bytes, int]:
    """What an event says of itself, as a row's snapshot: nothing of its person or groups is looked up.

    With it which columns it said, as `_which` does.
    """
    said = _said(event)
    if said[14] == "$remote":
        said = (*said[:14], remote, *said[15:])
    groups = {group_type: _values(value) for group_type, value in (event.groups or {}).items()}
    return _encode(({}, groups, {}, *_columns(NO_COLUMNS, said, library))), _which(said)


def _follow(
    who: Person, people: Mapping[int, Person], new_people: Mapping[int, Person]
) -> tuple[int, Person | None]:
    """Follow a merge to the survivor; a forgotten person is nobody."""
    if who.merged_into == FORGOTTEN:
        return 0, None
    survivor = new_people.get(who.merged_into) or people[who.merged_into]
    return (0, None) if survivor.merged_into == FORGOTTEN else (who.merged_into, survivor)


def _replaced(who: Person, **fields: Any) -> Person:  # noqa: ANN401 - any field's value
    return msgspec.structs.replace(who, **fields)


def _is_revenue(event: Event) -> bool:
    raw = event.event_properties
    if not raw:
        return False
    text = bytes(raw)
    return b"$" in text and (b'"$revenue"' in text or b'"$price"' in text)


def _which(said: tuple[str | None, ...]) -> int:
    """Which columns of SAYABLE an event says, as bits."""
    tag_and_before, versions, after = said[:12], said[12:14], said[14:]
    columns = (*tag_and_before, next((one for one in versions if one is not None), None), *after)
    assert len(columns) == len(SAYABLE)
    return sum(1 << place for place, one in enumerate(columns) if one is not None)


def _columns(
    table: tuple[str | None, ...], said: tuple[str | None, ...], library: str
) -> tuple[str | None, ...]:
    """Apply what an event says of the built-in columns to a table of them."""
    tag, app_version, version_name = said[11:14]
    version = version_name if app_version is None else app_version
    model = said[_MODEL]
    family = next(
        (name for start, name in _FAMILIES.items() if model and model.startswith(start)), None
    )
    return properties.columns(
        table,
        (
            *said[:11],
            None if tag is None else language.name(tag),
            version,
            said[14],
            said[15] or library,
            said[16],
            said[17],
            family,
            model if family else None,
        ),
    )


def _started(columns: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The first version ever seen is the start_version, unless an identify said another."""
    if columns[_START] is None and columns[_VERSION] is not None:
        return (*columns[:_START], columns[_VERSION], *columns[_START + 1 :])
    return columns


def _join(stays: dict[str, list[str]], joins: dict[str, Any]) -> dict[str, list[str]]:
    """The groups a person stays in after `$identify` with `groups`; the same object if none is new."""
    joined = dict(stays)
    for group_type, value in joins.items():
        if group_type in joined or len(joined) < GROUP_TYPES_MAX:
            joined[group_type] = _values(value)
    return stays if joined == stays else joined


def _values(value: Any) -> list[str]:  # noqa: ANN401 - text or a list of texts, as parsed
    return list(value) if isinstance(value, list) else [value]


def _show(
    table: dict[str, Any],
    built_in: tuple[str | None, ...],
    event_groups: dict[str, Any] | None,
    stays: dict[str, list[str]],
    known: Known,
    change: Changes,
) -> bytes:
    """The snapshot of a row, as the JSON of a `block.Table`."""
    groups = dict(stays)
    if event_groups:
        for group_type, value in event_groups.items():
            groups[group_type] = _values(value)
    shown: dict[str, dict[str, Any]] = {}
    for group_type, values in groups.items():
        for value in values:
            found = _group((group_type, value), known, change)
            if found:
                shown.setdefault(group_type, {})[value] = found
    return _encode((table, groups, shown, *built_in))


def _group_identify(event: Event, known: Known, change: Changes) -> None:
    for group_type, value in (event.groups or {}).items():
        for one in _values(value):
            key = (group_type, one)
            before = _group(key, known, change)
            after = properties.apply(before, event.group_properties or {})
            if after is not before:
                change.groups[key] = after


def _group(key: Group, known: Known, change: Changes) -> dict[str, Any]:
    """Return the properties of a group as they stand now. What this block emptied is empty, whatever it held before."""
    found = change.groups.get(key)
    return known.groups.get(key, {}) if found is None else found


def _alias(event: Event, change: Changes) -> None:
    said = event.user_properties or {}
    change.aliases[event.user_id or ""] = "" if said.get("unmap") else said["global_user_id"]
