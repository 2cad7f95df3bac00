"""Why a value is what it is: the rows that can have made it are gathered, and `core.why` folds them again.

Of a person: its rows and those of everyone merged into it; and the rows of others on its devices, since they say whose
a device was. Of a group's property: every call that changes the group, and of an event that shows it, its person's rows
too. Lake and unsealed rows alike, as of one view, streamed in order of position; at most WHY_ROWS_MAX.

Where rows of others do not fold to what they are (somebody was deleted since), the person's own are folded alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct
from msgspec.structs import replace

from retrofill.core import order
from retrofill.core import row as row_of
from retrofill.core import why as core
from retrofill.core.block import COLUMNS, Flag, Kind
from retrofill.core.fold import Group
from retrofill.core.person import FORGOTTEN
from retrofill.core.why import Asked, Fact, Trace
from retrofill.engine.query import Statement, View
from retrofill.engine.refold import FOLDED, rows_of
from retrofill.errors import CorruptError, InputError, MissingError, SizeError
from retrofill.lake.arrow import SCHEMA
from retrofill.limits import REFOLD_ROWS, WHY_FOLDED_ROWS_MAX, WHY_PEOPLE_MAX, WHY_ROWS_MAX

_KINDS = (Kind.EVENT, Kind.IDENTIFY, Kind.GROUP_IDENTIFY)
_DETAIL = (
    *("project", "partition", "block", "row", "amplitude_id", "event_type", "user_id"),
    *("device_id", "insert_id", "event_time", "import_id", "path", "server_upload_time"),
)
# Rows are wide: what nobody looks at is not read.
_NEEDED = tuple(name for name in SCHEMA.names if name in {*FOLDED, *_DETAIL, "kind"})
_ROWS = pa.schema([SCHEMA.field(name) for name in _NEEDED])
_CHOOSE = "Give property, column, first_seen or merge"


class Question(Struct, frozen=True):
    """What a reader asks. property, column, first_seen, merge, or property of a group: exactly one of them.

    Of a person (one of user_id, device_id, amplitude_id), or as an event showed it (uuid, or insert_id with
    device_id). merge: the amplitude_id that was absorbed.
    """

    property: str = ""
    column: str = ""
    first_seen: bool = False
    merge: int = 0
    group_type: str = ""
    group_value: str = ""
    user_id: str = ""
    device_id: str = ""
    amplitude_id: int = 0
    uuid: str = ""
    insert_id: str = ""


class Event(Struct, frozen=True):
    """The event of a cause."""

    uuid: str
    event_type: str
    amplitude_id: int
    user_id: str | None
    device_id: str | None
    insert_id: str | None
    event_time_ms: int


class Request(Struct, frozen=True):
    """How it came: block and row are its position."""

    path: str
    server_upload_time_ms: int
    block: int
    row: int


class Operation(Struct, frozen=True):
    """What an event said of the value."""

    operation: str
    value: Any


class Merge(Struct, frozen=True):
    """Two people shown to be one. value: the one that the absorbed person had."""

    absorbed: int
    surviving: int
    value: Any


class Cause(Struct, frozen=True):
    """One event on the way to the value. rule: of `core.why.RULES`, in words in `means`.

    needed: whether the value is another without it, None if that was not tried. imported_by: its import.
    """

    rule: str
    means: str
    before: Any
    after: Any
    operations: list[Operation]
    merge: Merge | None
    needed: bool | None
    event: Event
    imported_by: str | None
    request: Request


class Answer(Struct, frozen=True):
    """The value and what made it, in order of arrival. left_out: causes before those listed.

    rows: how many were looked at. tried: whether each of them was left out once, so that nothing else is needed.
    """

    value: Any
    amplitude_id: int | None
    user_id: str | None
    causes: list[Cause]
    left_out: int
    rows: int
    tried: bool


class _Whose(Struct, frozen=True):
    """The rows that are wanted: of these people, up to a position. group: calls that change it, too."""

    asked: Asked
    own: list[int]
    until: tuple[int, int] | None = None
    group: Group | None = None


def why(
    view: View,
    question: Question,
    *,
    by_time: bool = False,
    barred: frozenset[tuple[str, str]] = frozenset(),
) -> Answer:
    """Say what made a value. by_time, barred: how the project is folded, as `core.refold.Refold` takes it.

    Raises InputError for half a question, MissingError if nobody is meant, SizeError.
    """
    whose = _whose(view, question)
    whose = replace(whose, asked=replace(whose.asked, by_time=by_time, barred=barred))
    others, devices = _others(view, whose) if whose.own else ([], [])
    trace = _traced(view, whose, others, devices)
    if not trace.exact and others:
        trace = _traced(view, whose, [], [])
    if not trace.exact:
        raise CorruptError(
            "The history of this person does not fold to what is stored",
            where=f"amplitude_id {whose.own[0] if whose.own else 0}",
            mend="Stop the server and run `retrofill check` on its directory",
        )
    found = trace.end()
    one = whose.own[0] if whose.own else None
    person = view.reader.person(view.project, one) if one else None
    return Answer(
        found.value,
        one,
        person.user_id if person else None,
        [_cause(fact, trace.details) for fact in found.facts],
        found.left_out,
        found.rows,
        found.tried,
    )


# Who is meant.


def _whose(view: View, question: Question) -> _Whose:
    asked = _asked(question)
    people = [one for one in ("user_id", "device_id", "amplitude_id") if getattr(question, one)]
    if _of_event(question):
        if question.uuid and (question.insert_id or people):
            raise InputError("An event is given by uuid, or by insert_id with device_id")
        if people not in ([], ["device_id"]):
            raise InputError("An event is given by uuid, or by insert_id with device_id")
        one, block, row = _event(view, question)
        merges = view.merges()
        own = _everyone(merges, merges.get(one, one)) if one else []
        return _Whose(asked, own, (block, row), asked.group)
    if asked.what == "group":
        if people:
            raise InputError(
                "A group's property is nobody's: give no id, or an event that shows it"
            )
        return _Whose(asked, [], None, asked.group)
    if asked.what == "merge":
        if people:
            raise InputError("A merge is asked by the amplitude_id that was merged away, alone")
        merges = view.merges()
        if question.merge not in merges:
            raise _not_merged(view, question.merge)
        return _Whose(asked, _everyone(merges, merges[question.merge]))
    if len(people) != 1:
        raise InputError(
            f"{len(people)} ids are given",
            mend="Give one of user_id, device_id and amplitude_id, or an event",
        )
    return _Whose(asked, _person(view, question))


def _not_merged(view: View, one: int) -> MissingError:
    """Say that somebody was not merged, and who holds them apart, if somebody does."""
    mine = view.source(
        ("amplitude_id", "device_id"), where=f"amplitude_id = {int(one)}", kinds=_KINDS
    )
    apart = view.source(
        ("amplitude_id", "device_id", "flags", "user_id"),
        where=f"flags & {int(Flag.HELD)} <> 0 AND amplitude_id <> {int(one)}",
        kinds=_KINDS,
    )
    rows = view.ask(
        f"SELECT min(user_id) FROM {apart} WHERE device_id IN (SELECT device_id FROM {mine})"
    ).fetchall()
    (user,) = rows[0]
    if user is None:
        return MissingError(f"{one} was not merged into anybody")
    return MissingError(
        f"{one} was not merged into anybody: {user} joins more people than merges_per_user, and so is held apart",
        mend="Its next event with both ids merges them once `merge_always` of the project names that user; "
        "GET /api/1/merges/held lists such users",
    )


def _of_event(question: Question) -> bool:
    return bool(question.uuid or question.insert_id)


def _asked(question: Question) -> Asked:
    grouped = bool(question.group_type or question.group_value)
    given = [bool(question.property), bool(question.column), question.first_seen, question.merge]
    if sum(map(bool, given)) != 1:
        raise InputError("It must be one thing that is asked for", mend=_CHOOSE)
    if grouped and not (question.property and question.group_type and question.group_value):
        raise InputError("A group's property is asked by group_type, group_value and property")
    if _of_event(question) and not (question.property or question.column):
        raise InputError("An event shows properties and columns", mend="Give property or column")
    if question.column and question.column not in COLUMNS:
        raise InputError(
            f"There is no column {question.column[:40]!r}", mend=f"One of {', '.join(COLUMNS)}"
        )
    if question.merge:
        return Asked("merge", amplitude_id=question.merge)
    group = (question.group_type, question.group_value) if grouped else None
    what = "first_seen" if question.first_seen else "column" if question.column else "property"
    whose: dict[str, Any] = (
        {"event": True}
        if _of_event(question)
        else {
            "user": question.user_id or None,
            "device": question.device_id or None,
            "amplitude_id": question.amplitude_id,
        }
    )
    name = question.property or question.column
    return Asked("group" if grouped else what, name, group=group, **whose)


def _person(view: View, question: Question) -> list[int]:
    """Return the person meant, and everyone merged into it."""
    merges = view.merges()
    found = [question.amplitude_id]
    if question.user_id:
        found = [one for _, one in view.people_of([question.user_id])]
    elif question.device_id:
        found = _on_device(view, question.device_id)
    for one in reversed(found):
        canonical = merges.get(one, one)
        person = view.reader.person(view.project, canonical)
        if person is not None and person.merged_into != FORGOTTEN:
            return _everyone(merges, canonical)
    raise MissingError("There is no such person", mend="Check the id, and whose keys are given")


def _on_device(view: View, device: str) -> list[int]:
    """Return whose the last row on a device is, but for one that left the device to another, see `Flag.HELD`."""
    statement = Statement()
    source = view.source(
        ("device_id", "amplitude_id", "flags", "block", "row"),
        where=f"device_id = {statement.bind(device)} AND amplitude_id > 0 AND flags & {int(Flag.HELD)} = 0",
        kinds=_KINDS,
    )
    rows = view.ask(
        f'SELECT amplitude_id FROM {source} ORDER BY "block" DESC, "row" DESC LIMIT 1', statement
    ).fetchall()
    return [one for (one,) in rows]


def _everyone(merges: dict[int, int], canonical: int) -> list[int]:
    return [canonical, *sorted(was for was, now in merges.items() if now == canonical)]


def _event(view: View, question: Question) -> tuple[int, int, int]:
    """Return amplitude_id and position of the event meant; of several with one insert_id the last."""
    statement = Statement()
    if question.uuid:
        where = f"{row_of.UUID_SQL} = {statement.bind(question.uuid.lower())}"
    else:
        where = f"insert_id = {statement.bind(question.insert_id)}"
        if question.device_id:
            where += f" AND device_id = {statement.bind(question.device_id)}"
    names = ("project", "partition", "block", "row", "amplitude_id", "insert_id", "device_id")
    source = view.source(names, where=where, kinds=_KINDS)
    rows = view.ask(
        f'SELECT amplitude_id, "block", "row" FROM {source} ORDER BY "block" DESC, "row" DESC LIMIT 1',
        statement,
    ).fetchall()
    if not rows:
        raise MissingError("There is no such event", mend="Check the id, and whose keys are given")
    one, block, row = rows[0]
    return one, block, row


# Their rows.


def _ids(people: list[int]) -> str:
    return ", ".join(str(int(one)) for one in people)


def _others(view: View, whose: _Whose) -> tuple[list[int], list[str]]:
    """Return who else has rows on the person's devices, and those devices."""
    own = _ids(whose.own)
    names = ("amplitude_id", "device_id")
    source = view.source(
        names, where=f"amplitude_id IN ({own}) AND device_id IS NOT NULL", kinds=_KINDS
    )
    devices = [
        device
        for (device,) in view.ask(
            f"SELECT DISTINCT device_id FROM {source} LIMIT {WHY_PEOPLE_MAX}"
        ).fetchall()
    ]
    statement = Statement()
    some = f"device_id IN (SELECT unnest({statement.bind(devices)}::VARCHAR[]))"
    source = view.source(names, where=f"amplitude_id NOT IN (0, {own}) AND {some}", kinds=_KINDS)
    rows = view.ask(
        f"SELECT DISTINCT amplitude_id FROM {source} ORDER BY amplitude_id LIMIT {WHY_PEOPLE_MAX}",
        statement,
    ).fetchall()
    return [one for (one,) in rows], devices


class _Traced(Trace):
    """A trace with what must be told of its rows."""

    def __init__(self, whose: _Whose) -> None:
        super().__init__(whose.asked, whose.own)
        self.details: list[tuple[int, pa.Table]] = []

    def take(self, rows: pa.Table, whose: _Whose) -> None:
        """Fold rows; keep what is told of all of them while they are few, else of those shown."""
        first = self.rows
        own = np.isin(rows["amplitude_id"].to_numpy(), np.array(whose.own, np.int64))
        group = rows["kind"].to_numpy() == Kind.GROUP_IDENTIFY
        foreign = group & ~own if whose.group else np.zeros(len(own), bool)
        self.add(rows_of(rows, foreign))
        told = rows.select(_DETAIL)
        if self.rows <= WHY_FOLDED_ROWS_MAX:
            self.details.append((first, told))
            return
        for fact in self.shown():
            if fact.at >= first and fact.detail is None:
                fact.detail = told.slice(fact.at - first, 1).to_pylist()[0]
            elif fact.detail is None:
                fact.detail = _detail(fact.at, self.details)
        self.details = []


def _traced(view: View, whose: _Whose, others: list[int], devices: list[str]) -> _Traced:
    trace = _Traced(whose)
    for rows in _rows(view, whose, others, devices):
        trace.take(rows, whose)
        if trace.rows > WHY_ROWS_MAX:
            raise SizeError(
                f"Over {WHY_ROWS_MAX:,} rows may have made this value",
                mend="Ask about an event: then only the rows before it are looked at",
            )
    return trace


def _rows(view: View, whose: _Whose, others: list[int], devices: list[str]) -> Iterator[pa.Table]:
    """Yield the rows that can matter in order of position, at least one at a time."""
    statement = Statement()
    needed = SCHEMA.names if whose.asked.by_time else _NEEDED  # the order looks at what events say
    before = "true"
    if whose.until:
        block, row = whose.until
    if whose.until and not whose.asked.by_time:
        before = f'("block" < {block} OR ("block" = {block} AND "row" <= {row}))'
    sources = []
    if whose.own:
        where = f"amplitude_id IN ({_ids([*whose.own, *others])}) AND {before}"
        if others:
            some = f"device_id IN (SELECT unnest({statement.bind(devices)}::VARCHAR[]))"
            where += f" AND (amplitude_id IN ({_ids(whose.own)}) OR {some})"
        sources.append(view.source(needed, where=where, kinds=_KINDS))
    if whose.group:
        everyone = _ids([*whose.own, *others]) or "-1"
        where = f"sent_groups IS NOT NULL AND amplitude_id NOT IN ({everyone}) AND {before}"
        sources.append(view.source(needed, where=where, kinds=(Kind.GROUP_IDENTIFY,)))
    read, columns = (", ".join(f'"{name}"' for name in names) for names in (needed, _NEEDED))
    every = " UNION ALL ".join(f"SELECT {read} FROM {source}" for source in sources)
    by = order.SQL if whose.asked.by_time else '"block", "row"'
    reader = view.ask(f"SELECT {columns} FROM ({every}) ORDER BY {by}", statement).to_arrow_reader(
        REFOLD_ROWS
    )
    for batch in _until(whose, reader):
        rows = batch.cast(_ROWS)
        if whose.group:
            rows = rows.filter(_of_group(rows, whose))
        if rows.num_rows:
            yield rows


def _until(whose: _Whose, reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """Yield rows up to the event that is asked about, if one is."""
    for batch in reader:
        rows = pa.Table.from_batches([batch])
        if whose.until:
            block, row = whose.until
            here = pc.and_(pc.equal(rows["block"], block), pc.equal(rows["row"], row))
            places = np.flatnonzero(here.to_numpy(zero_copy_only=False))
            if len(places):
                yield rows.slice(0, int(places[0]) + 1)
                return
        yield rows


def _of_group(rows: pa.Table, whose: _Whose) -> pa.Array:
    """Say which rows are the person's, or change the group."""
    own = frozenset(whose.own)
    return pa.array(
        [
            kind != Kind.GROUP_IDENTIFY or one in own or whose.group in core.groups_in(groups)
            for kind, one, groups in zip(
                rows["kind"].to_pylist(),
                rows["amplitude_id"].to_pylist(),
                rows["sent_groups"].to_pylist(),
                strict=True,
            )
        ],
        pa.bool_(),
    )


# The answer.


def _detail(at: int, details: list[tuple[int, pa.Table]]) -> dict[str, Any]:
    first, rows = next((first, rows) for first, rows in reversed(details) if first <= at)
    found: dict[str, Any] = rows.slice(at - first, 1).to_pylist()[0]
    return found


def _cause(fact: Fact, details: list[tuple[int, pa.Table]]) -> Cause:
    told = fact.detail or _detail(fact.at, details)
    place = (told["project"], told["partition"], told["block"], told["row"])
    return Cause(
        fact.rule,
        core.RULES[fact.rule],
        fact.before,
        fact.after,
        [Operation(*one) for one in fact.operations],
        Merge(*fact.merge, fact.absorbed) if fact.merge else None,
        fact.needed,
        Event(
            row_of.uuid_of(*place),
            told["event_type"],
            told["amplitude_id"],
            told["user_id"],
            told["device_id"],
            told["insert_id"],
            told["event_time"],
        ),
        told["import_id"],
        Request(told["path"], told["server_upload_time"], told["block"], told["row"]),
    )
