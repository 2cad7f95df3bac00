"""What a rehearsal needs of a project: everyone whom some ids touch, with their rows and state, as of one block.

The people are a closure: whoever the ids name, everyone who shares a device or user id with one of them, whoever is
counted with one of them by an alias, and so on. Their rows come with what a second fold needs, and the state that the
first one made of them, so that an engine seeded with both goes on exactly as this one would. Beside them: how many
people are new and active on each day in the whole project, which keys of the import are stored already, and who may be
one of the import's people under another id.

It is answered as lines of JSON, each a value of one of the structs below, but for the rows: these stand between the
lines `rows` and `end`, plain objects named as in the lake. Nothing is held but the closure's ids and one piece of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct

from retrofill.core import dedupe, likeness
from retrofill.core.block import COLUMNS, Kind
from retrofill.core.person import Person
from retrofill.engine import closure as closures
from retrofill.engine.duplicates import Duplicates
from retrofill.engine.moment import Moment
from retrofill.engine.query import View
from retrofill.errors import InputError
from retrofill.lake.arrow import SCHEMA
from retrofill.limits import (
    HISTORY_ALIKE_MAX,
    HISTORY_IDS_MAX,
    HISTORY_KEYS_MAX,
    HISTORY_ROWS,
    MS_PER_DAY,
)

# What counts, duplicates and quotas are made of.
BRIEF = (
    *("block", "row", "amplitude_id", "kind", "user_id", "device_id", "event_type"),
    *("event_time", "server_upload_time", "insert_id", "import_id"),
)
# And what a second fold looks at; of the snapshot only what events say themselves.
WHOLE = (
    *BRIEF,
    *("flags", "client_event_time", "client_upload_time", "server_received_time", "event_id"),
    *("session_id", "event_properties", "sent", "sent_groups", "path", "said", "updates_max"),
    "merges_max",
    *COLUMNS,
)


class Asked(Struct, forbid_unknown_fields=True):
    """The ids of an import.

    insert_keys: (device_id, insert_id) of its events, "" for the device of a group identify. contacts: mail addresses and
    telephone numbers in its properties, see `likeness.contacts`. rows: how much of each row is wanted.
    """

    device_ids: list[str] = []
    user_ids: list[str] = []
    insert_keys: list[tuple[str, str]] = []
    contacts: list[str] = []
    rows: Literal["none", "brief", "whole"] = "whole"

    def check(self) -> None:
        """Raise InputError if there are too many."""
        ids = len(self.device_ids) + len(self.user_ids) + len(self.contacts)
        for count, most, name in (
            (ids, HISTORY_IDS_MAX, "device_ids, user_ids and contacts"),
            (len(self.insert_keys), HISTORY_KEYS_MAX, "insert_keys"),
        ):
            if count > most:
                raise InputError(
                    f"{count:,} {name}, at most {most:,} in one request",
                    mend="Ask for fewer: a sample of the people, or keys in several requests",
                )


class Position(Struct, frozen=True, tag_field="kind", tag="position"):
    """The first line. block: everything up to it is in the answer, nothing later. fresh: the next amplitude_id.

    looks_up: whether the server looks places up by address.
    """

    app: int
    block: int
    server_upload_ms: int
    now_ms: int
    fresh: int
    window_from: int
    limits: dict[str, Any]
    settings: dict[str, Any]
    looks_up: bool = False


class Days(Struct, frozen=True, tag_field="kind", tag="days"):
    """People of the whole project by UTC day: whose first event it was, and who had an event."""

    new: dict[str, int]
    active: dict[str, int]


class Device(Struct, frozen=True, tag_field="kind", tag="device"):
    """Whom a device belongs to."""

    id: str
    amplitude_id: int


class User(Struct, frozen=True, tag_field="kind", tag="user"):
    """Whom a user_id belongs to."""

    id: str
    amplitude_id: int


class Someone(Struct, frozen=True, tag_field="kind", tag="person"):
    """One person's state, see `core.person.Person`. columns: the built-in ones, by name."""

    amplitude_id: int
    user_id: str | None = None
    properties: dict[str, Any] = {}
    columns: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    first_seen_ms: int = -1
    updated_ms: int = 0
    updates: list[int] = []
    merged_into: int = 0
    joined: int = 0

    @classmethod
    def of(cls, one: Person) -> Someone:
        """Return a person as it is told."""
        said = zip(COLUMNS, one.columns, strict=True)
        return cls(
            one.amplitude_id,
            one.user_id,
            one.properties,
            {name: value for name, value in said if value is not None},
            one.groups,
            one.first_seen_ms,
            one.updated_ms,
            one.updates,
            one.merged_into,
            one.joined,
        )

    def person(self) -> Person:
        """Return the person."""
        return Person(
            self.amplitude_id,
            self.user_id,
            self.properties,
            tuple(self.columns.get(name) for name in COLUMNS),
            self.groups,
            self.first_seen_ms,
            self.updated_ms,
            self.updates,
            self.merged_into,
            self.joined,
        )


class GroupOf(Struct, frozen=True, tag_field="kind", tag="group"):
    """A group's properties."""

    type: str
    value: str
    properties: dict[str, Any]


class Alias(Struct, frozen=True, tag_field="kind", tag="alias"):
    """A user mapped to a global one."""

    user_id: str
    global_user_id: str


class Merged(Struct, frozen=True, tag_field="kind", tag="merge"):
    """Two people shown to be one by the event at (block, row)."""

    absorbed: int
    surviving: int
    block: int
    row: int
    event_time: int
    server_upload_time: int


class Barred(Struct, frozen=True, tag_field="kind", tag="barred"):
    """A merge that was taken back: whoever was anonymous on the device is not this user."""

    device_id: str
    user_id: str


class Known(Struct, frozen=True, tag_field="kind", tag="known"):
    """An asked key that is stored. index: its place in `insert_keys`. block: with the last event that has it."""

    index: int
    block: int


class Alike(Struct, frozen=True, tag_field="kind", tag="alike"):
    """Somebody outside the closure who may be one of the import's people. by: the evidence. value: of the import's."""

    amplitude_id: int
    user_id: str | None
    by: str
    value: str


class RowsBegin(Struct, frozen=True, tag_field="kind", tag="rows"):
    """Each line after this is a row, until `end`."""


class End(Struct, frozen=True, tag_field="kind", tag="end"):
    """The last line: without it the answer was cut off."""

    rows: int


Line = (
    Position
    | Days
    | Device
    | User
    | Someone
    | GroupOf
    | Alias
    | Merged
    | Barred
    | Known
    | Alike
    | RowsBegin
    | End
)
_encode = msgspec.json.Encoder().encode_lines
decode_asked = msgspec.json.Decoder(Asked).decode
decode_line = msgspec.json.Decoder(Line).decode


def lines(moment: Moment, view: View, duplicates: Duplicates, asked: Asked) -> Iterator[bytes]:
    """Yield the answer, some lines at a time. view: of the moment. For threads, one at a time. Raises StoreError."""
    yield _encode([position(moment), days(view)])
    yield _encode(_known(moment, duplicates, asked.insert_keys))
    closure = touched(moment, asked)
    for some in _pieces(_tables(moment, closure, asked)):
        yield _encode(some)
    yield _encode(list(_alike(moment, closure, asked)))
    yield _encode([RowsBegin()])
    counted = 0
    if asked.rows != "none":
        names = BRIEF if asked.rows == "brief" else WHOLE
        for text, count in _rows(moment, closure, names, ordered=asked.rows == "whole"):
            yield text
            counted += count
    yield _encode([End(counted)])


def position(moment: Moment) -> Position:
    """Return where a moment stands and by what rules it goes on."""
    meta = moment.meta
    return Position(
        moment.project,
        meta.block,
        meta.server_upload_ms,
        moment.now_ms,
        meta.fresh,
        moment.window_from,
        msgspec.to_builtins(moment.limits),
        msgspec.to_builtins(moment.settings),
        moment.looks_up,
    )


def days(view: View) -> Days:
    """Count the people of a view by UTC day, as `/api/2/users` does: a merged person once, an aliased one once."""
    people = view.people()
    source = view.source(("amplitude_id", "event_time"))
    rows = view.ask(
        f"""
        WITH seen AS (
            SELECT DISTINCT coalesce(p.now, r.amplitude_id) AS person, r.event_time // {MS_PER_DAY} AS day
            FROM {source} r LEFT JOIN {people} p ON p.was = r.amplitude_id
        ), firsts AS (SELECT min(day) AS day FROM seen GROUP BY person)
        SELECT strftime(make_timestamp(day * {MS_PER_DAY * 1000}), '%Y-%m-%d'), false, count(*)
        FROM seen GROUP BY day
        UNION ALL
        SELECT strftime(make_timestamp(day * {MS_PER_DAY * 1000}), '%Y-%m-%d'), true, count(*)
        FROM firsts GROUP BY day
        ORDER BY ALL
        """
    ).fetchall()
    return Days(
        {day: count for day, is_new, count in rows if is_new},
        {day: count for day, is_new, count in rows if not is_new},
    )


class Closure(Struct, frozen=True):
    """Everyone whom some ids touch, by all their ids."""

    people: set[int] = set()
    devices: set[str] = set()
    users: set[str] = set()


def touched(moment: Moment, asked: Asked) -> Closure:
    """Return everyone whom the asked ids touch."""
    every = closures.of_lake(moment.snapshot.cursor, moment.project)
    seeds = {*moment.devices(asked.device_ids).values(), *moment.users(asked.user_ids).values()}
    closure = Closure()
    while seeds:
        found = every.begin(every.nobody, np.array(sorted(seeds), np.int64))
        closure = Closure(
            set(found.people.tolist()), set(found.devices.to_pylist()), set(found.users.to_pylist())
        )
        counted_with = _mapped(moment, closure.users | set(asked.user_ids))
        seeds = set(moment.users(counted_with).values()) - closure.people
        if seeds:
            seeds |= closure.people
    return closure


def _mapped(moment: Moment, users: set[str]) -> set[str]:
    """Return every user who is counted with one of these."""
    aliases = moment.aliases
    roots = {aliases.get(user, user) for user in users if aliases}
    return {*roots, *(user for user, to in aliases.items() if to in roots)} if aliases else set()


def _tables(moment: Moment, closure: Closure, asked: Asked) -> Iterator[Any]:
    devices, users = closure.devices.union(asked.device_ids), closure.users.union(asked.user_ids)
    yield from (Device(*one) for one in moment.devices(devices).items())
    yield from (User(*one) for one in moment.users(users).items())
    yield from (Someone.of(one) for one in moment.people(closure.people).values())
    yield from (GroupOf(*key, value) for key, value in moment.every_group())
    yield from (Alias(*one) for one in moment.aliases.items())
    yield from _merges(moment, closure.people)
    yield from (Barred(*pair) for pair in sorted(moment.barred))


def _merges(moment: Moment, people: set[int]) -> Iterator[Merged]:
    rows = moment.snapshot.cursor.execute(
        'SELECT absorbed, surviving, "block", "row", event_time, server_upload_time FROM lake.merges '
        'WHERE project = $1 ORDER BY "block", "row"',
        [moment.project],
    ).fetchall()
    yield from (Merged(*row) for row in rows if row[0] in people or row[1] in people)


def _known(moment: Moment, duplicates: Duplicates, asked: Sequence[tuple[str, str]]) -> list[Known]:
    whole = moment.limits.dedupe_scope == "project"
    packed = dedupe.keys(
        moment.project, ["" if whole else device for device, _ in asked], [one for _, one in asked]
    )
    blocks = duplicates.holders(packed) if packed else []
    return [Known(at, block) for at, block in enumerate(blocks) if 0 < block <= moment.meta.block]


def _alike(moment: Moment, closure: Closure, asked: Asked) -> Iterator[Alike]:
    """Look for the import's people among those that its ids do not touch, HISTORY_ALIKE_MAX at most."""
    left = HISTORY_ALIKE_MAX
    sought = {form: user for user in asked.user_ids for form in likeness.forms(user)}
    if sought:
        for user, number in moment.every_user():
            if number in closure.people:
                continue
            other = next((sought[form] for form in likeness.forms(user) if form in sought), None)
            by = likeness.alike(user, other) if other is not None else None
            if by is not None and other is not None and left:
                left -= 1
                yield Alike(number, user, by, other)
    addresses = set(asked.contacts)
    if addresses:
        for one in moment.every_person():
            if one.merged_into or one.amplitude_id in closure.people:
                continue
            for name, address in likeness.contacts(one.properties):
                if address in addresses and left:
                    left -= 1
                    yield Alike(one.amplitude_id, one.user_id, name, address)


def _rows(
    moment: Moment, closure: Closure, names: Sequence[str], *, ordered: bool
) -> Iterator[tuple[bytes, int]]:
    """Yield the rows of a closure as lines, with how many they are."""
    cursor = moment.snapshot.cursor
    sides: tuple[tuple[str, set[Any], pa.DataType], ...] = (
        ("people", closure.people, pa.int64()),
        ("devices", closure.devices, pa.string()),
        ("users", closure.users, pa.string()),
    )
    for name, ids, kind in sides:
        cursor.register(f"history_{name}", pa.table({"id": pa.array(sorted(ids), kind)}))
    fields = ", ".join(f'"{name}" := "{name}"' for name in names)
    seen = ", ".join(str(int(kind)) for kind in (Kind.EVENT, Kind.IDENTIFY))
    order = 'ORDER BY "block", "row"' if ordered else ""
    reader = cursor.execute(
        f"SELECT to_json(struct_pack({fields}))::VARCHAR FROM lake.events WHERE project = $1 AND ("
        f"(kind IN ({seen}) AND amplitude_id IN (SELECT id FROM history_people)) "
        f"OR kind = {int(Kind.GROUP_IDENTIFY)} "
        f"OR (kind = {int(Kind.DISPLACED)} AND (device_id IN (SELECT id FROM history_devices) "
        f"OR user_id IN (SELECT id FROM history_users)))) {order}",
        [moment.project],
    ).to_arrow_reader(HISTORY_ROWS)
    for batch in reader:
        texts = batch.column(0)
        whole = pa.ListArray.from_arrays(pa.array([0, len(texts)], pa.int32()), texts)
        if len(texts):
            yield pc.binary_join(whole, "\n")[0].as_buffer().to_pybytes() + b"\n", len(texts)


def _pieces(found: Iterator[Any]) -> Iterator[list[Any]]:
    some: list[Any] = []
    for one in found:
        some.append(one)
        if len(some) >= HISTORY_ROWS:
            yield some
            some = []
    yield some


def types(names: Sequence[str]) -> pa.Schema:
    """Return the schema of rows with these columns."""
    return pa.schema([SCHEMA.field(name) for name in names])
