"""Folding a closure of the lake again, into new files: what of it changes, for `rewriting` to put in place.

What a change touches is a closure: everyone who shares a device or user id with one of the people it starts from,
whoever shows a group that it changes, and so on. The closure's rows are folded again in order of position under the
change's rule and written as new lake files, with whatever else must follow: merges, dedupe keys, values of state.

Hidden rows stay in the lake as Kind.UNDONE, so showing them again needs nothing else. All of it reads nothing but the
lake, writes nothing that anybody knows yet, and doing it again after it was put in place changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct

from retrofill.core import order
from retrofill.core.block import SAYABLE, Flag, Kind
from retrofill.core.fold import Changes, Group
from retrofill.core.person import Person
from retrofill.core.refold import Merged, Refold, Rows
from retrofill.lake import Lake, arrow, parquet
from retrofill.lake.arrow import FILE, SCHEMA, MergeRow
from retrofill.lake.files import Files
from retrofill.limits import REFOLD_FILE_ROWS, REFOLD_ROWS, Limits

_SEEN = f"{int(Kind.EVENT)}, {int(Kind.IDENTIFY)}, {int(Kind.GROUP_IDENTIFY)}"
KEY_COLUMNS = (
    *("project", "block", "row", "kind", "user_id", "device_id", "event_type", "insert_id"),
    *("event_id", "client_event_time", "import_id"),
)


_BLOCK_MAX = 2**62


class Which(Struct, frozen=True):
    """The rows of one generation of an import: those of blocks after `after` up to `until`."""

    import_id: str
    after: int = 0
    until: int = _BLOCK_MAX


class Seed(Struct, frozen=True):
    """Where a closure starts: an import's rows, hidden ones too; people; who shows a group; or the whole project."""

    rows: Which | None = None
    people: list[int] = []
    groups: list[Group] = []
    whole: bool = False


class Rule(Struct, frozen=True):
    """What the fold does otherwise than on arrival. hide, show: rows that become hidden ones, or visible again.

    by_time: rows are folded in event time, see `core.order`. barred: (device, user) whose merge is taken back.
    """

    hide: Which | None = None
    show: Which | None = None
    by_time: bool = False
    barred: list[tuple[str, str]] = []


class Closure(Struct):
    """Everyone whose history must be folded again, by all their ids, and the groups of the project."""

    people: set[int] = msgspec.field(default_factory=set)
    devices: set[str] = msgspec.field(default_factory=set)
    users: set[str] = msgspec.field(default_factory=set)
    groups: set[Group] = msgspec.field(default_factory=set)


class Refolded(Struct):
    """New files with the closure's rows as they must be, nothing of it in the lake yet.

    gone, added: rows that are no longer seen, and rows that are seen again, with what makes their dedupe keys; the
    import's own always, whatever the lake says of them already.
    """

    closure: Closure
    files: list[Path]
    places: pa.Table
    people: list[int]
    merges: list[MergeRow]
    changes: Changes
    gone: list[pa.Table]
    added: list[pa.Table]
    rows: int = 0
    hidden: int = 0


def refold(
    lake: Lake,
    project: int,
    seed: Seed,
    rule: Rule,
    *,
    limits: Limits,
    new_id: Callable[[], int],
    again: bool = False,
) -> Refolded | None:
    """Fold the closure of some rows again under a rule. None if there is nothing to fold.

    Every block must be in the lake. new_id: draws an amplitude_id that nobody ever had. again: a crash cut off the same
    before.
    """
    with lake.snapshot() as snapshot:
        ask = snapshot.cursor.execute
        closure = closure_of(ask, project, seed, rule)
        if closure is None:
            return None
        fold = _Fold(lake, project, closure, rule, limits=limits, new_id=new_id, again=again)
        fold.contested = _contested(ask, project, closure)
        ids = pa.table({"id": pa.array(sorted(closure.people), pa.int64())})
        devices = pa.table({"id": pa.array(sorted(closure.devices), pa.string())})
        users = pa.table({"id": pa.array(sorted(closure.users), pa.string())})
        for name, rows in (("ids", ids), ("devices", devices), ("users", users)):
            snapshot.cursor.register(f"closure_{name}", rows)
        columns = ", ".join(f'"{name}"' for name in SCHEMA.names)
        chosen = (
            "FROM lake.events WHERE project = $1 AND ("
            f"(kind IN ({_SEEN}) AND amplitude_id IN (SELECT id FROM closure_ids)) "
            f"OR kind = {int(Kind.GROUP_IDENTIFY)} "
            f"OR (kind = {int(Kind.DISPLACED)} AND (device_id IN (SELECT id FROM closure_devices) "
            "OR user_id IN (SELECT id FROM closure_users))) "
            f"OR (kind = {int(Kind.UNDONE)} AND {_MINE})) "
        )
        values = [project, *_bounds(rule.hide or rule.show)]
        if rule.by_time and fold.contested:
            contested = pa.table({"id": pa.array(sorted({one for _, one in fold.contested}))})
            snapshot.cursor.register("contested", contested)
            fold.judge(
                ask(
                    f"SELECT {columns} {chosen} AND insert_id IN (SELECT id FROM contested) "
                    'ORDER BY "block", "row"',
                    values,
                ).to_arrow_table()
            )
        by = order.SQL if rule.by_time else '"block", "row"'
        reader = ask(f"SELECT {columns} {chosen} ORDER BY {by}", values).to_arrow_reader(
            REFOLD_ROWS
        )
        for batch in reader:
            fold.add(pa.Table.from_batches([batch]))
        return fold.end()


_MINE = 'import_id = $2 AND "block" > $3 AND "block" <= $4'


def _bounds(which: Which | None) -> tuple[str, int, int]:
    return (which.import_id, which.after, which.until) if which else ("", 0, 0)


def closure_of(ask: Callable[..., Any], project: int, seed: Seed, rule: Rule) -> Closure | None:
    """Return everyone whom a change touches; None if nobody. ask: of a snapshot that every block is in."""
    waiting: list[tuple[str, Any]] = [("person", one) for one in seed.people]
    closure = Closure(groups=set(seed.groups))
    if seed.rows:
        rows = ask(
            "SELECT DISTINCT amplitude_id, device_id, user_id, kind, "
            f"CASE kind WHEN {int(Kind.GROUP_IDENTIFY)} THEN sent_groups WHEN {int(Kind.UNDONE)} THEN sent_groups END "
            f"FROM lake.events WHERE project = $1 AND {_MINE}",
            [project, *_bounds(seed.rows)],
        ).fetchall()
        closure.groups |= {group for *_, sent in rows if sent for group in _groups(sent)}
        waiting += [node for row in rows for node in _nodes(*row[:3])]
    waiting += [("person", one) for one in _showing(ask, project, closure.groups)]
    links = ask(
        "SELECT DISTINCT amplitude_id, device_id, user_id FROM lake.events "
        f"WHERE project = $1 AND (kind IN ({_SEEN}) OR (kind = {int(Kind.UNDONE)} AND {_MINE}))",
        [project, *_bounds(rule.hide or rule.show)],
    ).fetchall()
    if seed.whole:
        waiting += [node for row in links for node in _nodes(*row)]
    if not waiting and not closure.groups:
        return None
    near = _near(ask, project, links)
    found = set(waiting)
    while waiting:
        for node in near[waiting.pop()]:
            if node not in found:
                found.add(node)
                waiting.append(node)
    sets: dict[str, set[Any]] = {
        "person": closure.people,
        "device": closure.devices,
        "user": closure.users,
    }
    for kind, one in found:
        sets[kind].add(one)
    return closure


def _near(
    ask: Callable[..., Any], project: int, links: list[Any]
) -> defaultdict[tuple[str, Any], list[tuple[str, Any]]]:
    """Return which people and ids stand in a row together, or are one by a merge."""
    near: defaultdict[tuple[str, Any], list[tuple[str, Any]]] = defaultdict(list)
    for amplitude_id, device, user in links:
        nodes = _nodes(amplitude_id, device, user)
        for one in nodes[1:]:
            near[nodes[0]].append(one)
            near[one].append(nodes[0])
    for absorbed, surviving in ask(
        "SELECT absorbed, surviving FROM lake.merges WHERE project = $1", [project]
    ).fetchall():
        near["person", absorbed].append(("person", surviving))
        near["person", surviving].append(("person", absorbed))
    return near


def _nodes(amplitude_id: int, device: str | None, user: str | None) -> list[tuple[str, Any]]:
    nodes: list[tuple[str, Any]] = []
    if amplitude_id > 0:
        nodes.append(("person", amplitude_id))
    if device:
        nodes.append(("device", device))
    if user is not None:
        nodes.append(("user", user))
    return nodes


def _groups(text: str) -> Iterator[Group]:
    for group_type, value in msgspec.json.decode(text).items():
        for one in value if isinstance(value, list) else [value]:
            yield group_type, one


def _showing(ask: Callable[..., Any], project: int, groups: set[Group]) -> list[int]:
    """Return the people with a row that shows one of these groups."""
    if not groups:
        return []
    texts = ask(
        "SELECT DISTINCT groups FROM lake.events WHERE project = $1 AND groups IS NOT NULL",
        [project],
    ).fetchall()
    wanted = [text for (text,) in texts if not groups.isdisjoint(_groups(text))]
    rows = ask(
        "SELECT DISTINCT amplitude_id FROM lake.events WHERE project = $1 AND amplitude_id > 0 "
        "AND groups IN (SELECT unnest($2))",
        [project, wanted],
    ).fetchall()
    return [one for (one,) in rows]


def _contested(
    ask: Callable[..., Any], project: int, closure: Closure
) -> set[tuple[str | None, str]]:
    """Return the (device_id, insert_id) of rows that were left out because an import's row had come before."""
    rows = ask(
        "SELECT DISTINCT device_id, insert_id FROM lake.events "
        f"WHERE project = $1 AND kind = {int(Kind.DISPLACED)} AND insert_id IS NOT NULL",
        [project],
    ).fetchall()
    return {(device, insert) for device, insert in rows if device in closure.devices or not device}


class _Fold:
    """The closure's rows on their way through the fold into files."""

    def __init__(
        self,
        lake: Lake,
        project: int,
        closure: Closure,
        rule: Rule,
        *,
        limits: Limits,
        new_id: Callable[[], int],
        again: bool,
    ) -> None:
        self._lake = lake
        self._project = project
        self._closure = closure
        self._rule = rule
        self._limits = limits
        self._again = again
        self._refold = Refold(project, new_id, by_time=rule.by_time, barred=frozenset(rule.barred))
        self.contested: set[tuple[str | None, str]] = set()
        self._held: dict[tuple[Any, ...], int] = {}  # key → server time of the row that holds it
        self._judged: set[tuple[int, int]] | None = (
            None  # (block, row) of repeats, if decided before
        )
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._made = Refolded(closure, [], no_places(), [], [], Changes({}, {}, {}, {}, {}), [], [])
        self._places: list[pa.Table] = []

    def judge(self, rows: pa.Table) -> None:
        """Decide which of these, in order of position, repeat an earlier one: that goes by arrival in any fold."""
        good = self._not_repeated(rows, self._mine(rows)[1])
        repeated = rows.filter(pa.array(~good))
        places = zip(repeated["block"].to_pylist(), repeated["row"].to_pylist(), strict=True)
        self._judged = set(places)

    def _mine(self, rows: pa.Table) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Say which rows are the change's own, and which may be seen after it."""
        block = rows["block"].to_numpy()
        name, after, until = _bounds(self._rule.hide or self._rule.show)
        own = pc.fill_null(pc.equal(rows["import_id"], name), fill_value=False)
        mine = own.to_numpy(zero_copy_only=False) & (block > after) & (block <= until)
        return mine, ~mine if self._rule.hide else np.ones(len(mine), bool)

    def add(self, rows: pa.Table) -> None:
        """Fold the next rows."""
        kinds = rows["kind"].to_numpy()
        mine, candidate = self._mine(rows)
        seen = candidate & self._not_repeated(rows, candidate)
        people = rows["amplitude_id"].to_numpy()
        group = (kinds == Kind.GROUP_IDENTIFY) | (
            mine & np.asarray(pc.equal(rows["event_type"], "$groupidentify"))
        )
        known = np.isin(people, np.fromiter(self._closure.people, np.int64))
        foreign = group & ~known
        new = rows
        if seen.any():
            new = self._folded(rows, seen, foreign)
        kind = new["kind"].to_numpy().copy()
        kind[~seen & ~mine] = Kind.DISPLACED
        if self._rule.hide:
            kind[mine] = Kind.UNDONE
        else:
            kind[mine & ~seen] = Kind.DISPLACED
        new = with_column(new, "kind", pa.array(kind, pa.uint8()))
        visible = np.isin(kinds, (Kind.EVENT, Kind.IDENTIFY, Kind.GROUP_IDENTIFY))
        now = np.isin(kind, (Kind.EVENT, Kind.IDENTIFY, Kind.GROUP_IDENTIFY))
        # A displaced row has the key within its import, a visible one both. Done again after a crash, any row may
        # have been changed in the lake already and not in the key files.
        other = np.ones(len(kind), bool) if self._again else (kind != kinds) | mine
        holds, held = now | (kind == Kind.DISPLACED), visible | (kinds == Kind.DISPLACED) | mine
        keys = rows.select(KEY_COLUMNS)
        self._made.gone.append(keys.filter(pa.array(held & other)))
        self._made.added.append(
            with_column(keys, "kind", pa.array(kind, pa.uint8())).filter(pa.array(holds & other))
        )
        self._made.hidden += int((visible & ~now).sum())
        # Somebody else's group identify is read for its group and stays where it is.
        self._keep(new.filter(pa.array(~(foreign & (people != 0)) | mine)))

    def _not_repeated(self, rows: pa.Table, candidate: np.ndarray[Any, Any]) -> Any:
        """Say which rows repeat no earlier one; only keys that were contested need a look."""
        good = np.ones(rows.num_rows, bool)
        if not self.contested:
            return good
        if self._judged is not None:
            places = zip(rows["block"].to_pylist(), rows["row"].to_pylist(), strict=True)
            return np.array([place not in self._judged for place in places], bool)
        window_ms = self._limits.dedupe_window_ms
        devices, inserts = rows["device_id"].to_pylist(), rows["insert_id"].to_pylist()
        imports, times = rows["import_id"].to_pylist(), rows["server_upload_time"].to_pylist()
        for at in np.flatnonzero(candidate).tolist():
            if inserts[at] is None or (devices[at], inserts[at]) not in self.contested:
                continue
            key = (devices[at], inserts[at])
            own = (*key, imports[at])
            held = self._held.get(key)
            if (held is not None and times[at] - held < window_ms) or (
                imports[at] and own in self._held
            ):
                good[at] = False
                continue
            self._held[key] = times[at]
            if imports[at]:
                self._held[own] = times[at]
        return good

    def _folded(self, rows: pa.Table, seen: Any, foreign: Any) -> pa.Table:
        some = rows.filter(pa.array(seen))
        some = with_column(some, "flags", _earned(some))
        fresh = decided(self._refold, some, foreign[seen])
        places = np.flatnonzero(seen)
        if len(places) == rows.num_rows:
            for name, values in fresh.items():
                rows = with_column(rows, name, values)
            return rows
        # Each row not folded keeps what it has.
        take = np.arange(rows.num_rows)
        take[places] = rows.num_rows + np.arange(len(places))
        for name, values in fresh.items():
            both = pa.chunked_array([*rows[name].chunks, values], SCHEMA.field(name).type)
            rows = with_column(rows, name, both.take(pa.array(take)))
        return rows

    def _keep(self, rows: pa.Table) -> None:
        if not rows.num_rows:
            return
        self._waiting.append(rows)
        self._places.append(rows.select(["block", "row"]))
        self._waiting_rows += rows.num_rows
        self._made.rows += rows.num_rows
        if self._waiting_rows >= REFOLD_FILE_ROWS:
            self._write()

    def _write(self) -> None:
        rows = pa.concat_tables(self._waiting)
        self._waiting, self._waiting_rows = [], 0
        self._made.files.append(write_file(self._lake, rows))

    def end(self) -> Refolded:
        """Write the rest and say what has changed."""
        if self._waiting:
            self._write()
        made, closure, refold = self._made, self._closure, self._refold
        made.places = pa.concat_tables(self._places) if self._places else no_places()
        was = Changes(
            dict.fromkeys(closure.devices, 0),
            dict.fromkeys(closure.users, 0),
            {one: Person(one) for one in closure.people},
            {group: {} for group in closure.groups},
            {},
        )
        made.changes = refold.changes(was)
        made.people = sorted(made.changes.people)
        made.merges = [merge_row(self._project, merge) for merge in refold.merges]
        return made


def merge_row(project: int, merge: Merged) -> MergeRow:
    """Return a merge as a row of the lake."""
    places = (0, merge.block, merge.row)
    times = (merge.event_time_ms, merge.server_upload_ms)
    return (project, merge.absorbed, merge.surviving, *places, *times)


def write_file(lake: Lake, rows: pa.Table) -> Path:
    """Write rows as one file that the lake does not name yet, in the order of lake files."""
    block = rows["block"].to_numpy()
    places = np.lexsort([rows["row"].to_numpy(), block, rows["amplitude_id"].to_numpy()])
    file = lake.new_file(int(block.min()), int(block.max()))
    parquet.write(file, _as_file(rows.take(pa.array(places))), Files())
    return file


def decided(refold: Refold, rows: pa.Table, foreign: np.ndarray[Any, Any]) -> dict[str, pa.Array]:
    """Fold rows of the lake, of all its columns, and return those that the fold decides, typed as in the lake."""
    outcome = refold.fold(rows_of(rows, foreign))
    created = np.array(outcome.created_ms, np.int64)
    return {
        "amplitude_id": pa.array(outcome.amplitude_id, pa.int64()),
        "created_time": pa.array(np.ma.masked_equal(created, -1), pa.int64()),
        "kind": pa.array(np.frombuffer(outcome.kind, np.uint8)),
        "flags": pa.array(np.frombuffer(outcome.flags, np.uint8)),
        **arrow.shown_again(outcome.tables, np.array(outcome.table, np.int64)),
    }


def rows_of(rows: pa.Table, foreign: np.ndarray[Any, Any]) -> Rows:
    """Return rows of the lake as the fold takes them."""
    return Rows(
        **{name: rows[name].to_pylist() for name in _FOLDED},
        foreign=foreign.tolist(),
        said_columns=[rows[name].to_pylist() for name in SAYABLE],
    )


_FOLDED = (
    *("block", "row", "amplitude_id", "flags", "user_id", "device_id", "event_type"),
    *("insert_id", "event_id", "event_time", "server_upload_time", "path"),
    *("sent", "sent_groups", "said", "updates_max"),
)


def _earned(rows: pa.Table) -> pa.Array:
    """The flags of rows; one that was never folded says by its properties whether it carries revenue."""
    flags = rows["flags"].to_numpy().copy()
    unfolded = np.isin(rows["kind"].to_numpy(), (Kind.DISPLACED, Kind.UNDONE))
    if unfolded.any():
        places = np.flatnonzero(unfolded)
        said = rows["event_properties"].take(pa.array(places))
        for name in ('"$revenue"', '"$price"'):
            carries = pc.match_substring(said, name).to_numpy(zero_copy_only=False)
            flags[places[carries]] |= np.uint8(Flag.REVENUE)
    return pa.array(flags, pa.uint8())


def with_column(rows: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Return rows with another column of a name."""
    return rows.set_column(rows.schema.get_field_index(name), SCHEMA.field(name), values)


def _as_file(rows: pa.Table) -> Iterable[pa.Table]:
    columns = [
        rows[field.name].dictionary_encode()
        if pa.types.is_dictionary(field.type)
        else rows[field.name]
        for field in FILE
    ]
    yield pa.Table.from_arrays(columns, schema=FILE)


def no_places() -> pa.Table:
    """Return (block, row) of no row."""
    return pa.table({"block": pa.array([], pa.int64()), "row": pa.array([], pa.int32())})
