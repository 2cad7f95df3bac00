"""Rows of which only what a mapping's expressions need goes through its query: the rest goes from the row to the event at once.

A row is cut by compiled code (`members`): its values of the columns that are asked about become columns of Arrow, as views of its
text, and DuckDB parses no JSON any more. What a mapping passes on as it is (most of a preset's fields, and objects less the members
that a pattern names) does not pass the query at all. Events are joined of the pieces that come from both. What of an answer the core
would surely take as it is need not be looked at again.

The query over whole rows stays what a mapping means. A row is handed on to it if it holds anything that DuckDB would write
otherwise, and if it gives no good event: the letters tell of the row as it was. So what a row becomes depends on the row alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct
from numpy.typing import NDArray

from retrofill.backfill import hashes, layout
from retrofill.backfill import native as native_
from retrofill.backfill.columns import Columns
from retrofill.backfill.compiled import Filter, Narrowed, Piece
from retrofill.backfill.native import Native, native
from retrofill.backfill.people import Ints
from retrofill.backfill.straight import insert_ids, made_id
from retrofill.backfill.texts import flat, less
from retrofill.core import event, mapping
from retrofill.core.mapping import Kind, Pieces
from retrofill.limits import DEPTH_MAX, STRING_CHARS_MAX

if TYPE_CHECKING:
    import duckdb

Path = tuple[str, ...]
Bytes = NDArray[np.uint8]
Bools = NDArray[np.bool_]

# Asks a query of such rows.
Answers = Callable[[str, pa.Schema, Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]

NEEDED: Final = ("cut", "views", "join", "vouch", "hashed")  # compiled functions
_KNOWN_MAX = 2048  # ours: names of members of filtered objects that are remembered; a row with another one is handed on
_USUAL = 256  # members of a row of which it is remembered what stood there
_STANDING = (
    0.4  # ours: of the sampled rows that can be cut; with fewer, cutting costs more than it saves
)
_LOOKED_INTO: Final = frozenset({"groups", "plan"})  # whose values the core may mend
_WANTS: Final[dict[Kind, int]] = {
    "text": layout.SPELLED,
    "integer": layout.WHOLLY,
    "millis": layout.WHOLLY,
    "number": layout.DECIMAL,
    "object": layout.MEMBERS,
    "value": layout.AS_WRITTEN,
}
_JSON: Final = pa.json_(pa.string_view())


def there() -> bool:
    """Say whether what is compiled for it need not be compiled first."""
    return all(map(native_.there, NEEDED))


def narrow(
    plan: Narrowed,
    columns: Columns,
    connection: duckdb.DuckDBPyConnection,
    answers: Answers,
    odd: Callable[[pa.RecordBatch], None],
) -> Narrow | None:
    """Return the way of a mapping's rows through its narrow query, None if columns have names that cannot be cut out.

    answers: asks the connection. odd: takes rows that are for the query over whole rows.
    """
    numbers = {int(name[1:]) for name in plan.forms if name[0] != "f"}
    numbers |= {piece.bare for piece in plan.pieces if piece.bare is not None}
    paths = [columns.used[number] for number in numbers] + [one.path for one in plan.filters]
    return Narrow(plan, columns, connection, answers, odd) if Cutter.can(paths) else None


class _Cut(Struct):
    """Rows that were cut. begin: the number of the first one. found: the address of each column's value, then their sizes.

    sizes: of all that goes on as it is, of each row. low, high: addresses between which all values lie. held: what lies there.
    """

    rows: pa.RecordBatch
    begin: int
    found: NDArray[np.int64]
    sizes: Ints
    columns: dict[str, Any]
    low: int
    high: int
    held: object


class _Form(Struct, frozen=True):
    """A column of the query's rows: its name there, the column that was cut out, in which form, as which type."""

    name: str
    column: int
    form: int
    type: pa.DataType

    @property
    def filtered(self) -> bool:
        return self.name.startswith("f")


class Cutter:
    """Cuts rows into the values of some columns."""

    def __init__(
        self,
        paths: Sequence[Path],
        wants: Sequence[int],
        filters: Sequence[Filter],
        keeps: Callable[[Filter, Sequence[str]], list[bool]],
    ) -> None:
        """wants: of each path, see `layout`. keeps: says of names which stay in a filtered object."""
        self._cut = native("cut")
        self._filters, self._keeps = filters, keeps
        self.columns = len(paths) + len(filters)
        self._wants = np.zeros(self.columns, np.int64)
        self._wants[: len(paths)] = wants
        self._nodes: dict[Path, int] = {(): 0}
        self._known: dict[tuple[int, str], list[int]] = {}  # column, child, kept
        for number, path in enumerate(paths):
            self._add(path)[0] = number
        for one in filters:
            self._node(one.path)
        self._columns_of = np.full(len(self._nodes), -1, np.int64)
        self._filter_of: dict[int, Filter] = {}
        for number, one in enumerate(filters):
            node = self._node(one.path)
            self._columns_of[node], self._filter_of[node] = len(paths) + number, one
        for node in self._filter_of:
            self._learn(node, [name for at, name in self._known if at == node])
        self.rules = np.zeros(layout.CUT_RULES, np.int64)
        self.rules[layout.LONGEST] = STRING_CHARS_MAX
        # An object may stand some blocks deep in its event.
        self.rules[layout.DEPTH] = min(DEPTH_MAX - mapping.DEPTH_MAX, layout.LEVELS_MAX)
        self.rules[layout.KEY_BYTES_MAX] = hashes.TOGETHER
        self._stack = np.zeros(2 * layout.NESTED_MAX, np.int64)
        self._kept = np.zeros(4 * layout.MEMBERS_MAX, np.int64)
        self._unknown = np.zeros(3 * layout.UNKNOWN_MAX, np.int64)
        self._row = 0
        self._index()

    @staticmethod
    def can(paths: Sequence[Path]) -> bool:
        """Say whether such columns can be cut out: a number may count in a list, and names must be short."""
        return all(
            0 < len(part.encode()) <= hashes.TOGETHER
            and not part.isdigit()
            and msgspec.json.encode(part) == f'"{part}"'.encode()
            and len(path) < layout.NESTED_MAX
            for path in paths
            for part in path
        )

    def _node(self, path: Path) -> int:
        if path not in self._nodes:
            self._nodes[path] = len(self._nodes)
            self._add(path)[1] = self._nodes[path]
        return self._nodes[path]

    def _add(self, path: Path) -> list[int]:
        return self._known.setdefault((self._node(path[:-1]), path[-1]), [-1, -1, 0])

    def _learn(self, node: int, names: Sequence[str]) -> None:
        kept_ = self._keeps(self._filter_of[node], names) if names else []
        for name, kept in zip(names, kept_, strict=True):
            self._known.setdefault((node, name), [-1, -1, 0])[2] = int(kept)

    def _index(self) -> None:
        """Lay out what is known by its hash."""
        names = [name.encode() for _node, name in self._known]
        sizes = np.array([len(name) for name in names] or [0], np.int64)
        self._entries = np.zeros((layout.TABLE, len(sizes)), np.int64)
        slots = np.zeros(1 << (2 * len(sizes)).bit_length(), np.int64)
        self._entries[layout.SIZE], self._entries[layout.STANDS] = sizes, np.cumsum(sizes) - sizes
        rows = [layout.NODE, layout.COLUMN, layout.CHILD, layout.KEEP]
        for at, ((node, _name), told) in enumerate(self._known.items()):
            self._entries[rows, at] = (node, *told)
        hashed = np.zeros(len(sizes), np.int64)
        for node in self._nodes.values():
            own = np.flatnonzero(self._entries[layout.NODE, : len(names)] == node)
            hashed[own] = hashes.of(pa.array([names[at] for at in own], pa.binary()), seed=node + 1)
        for at in range(len(names)):
            slot = int(hashed[at]) & (len(slots) - 1)
            while slots[slot]:
                slot = (slot + 1) & (len(slots) - 1)
            slots[slot] = at + 1
        self._slots, self._stamps = slots, np.zeros(len(sizes), np.int64)
        self._usual = np.zeros(_USUAL, np.int64)
        self._names = np.frombuffer(b"".join((*names, bytes(layout.WIDE))), np.uint8)

    def cut(self, data: memoryview, ends: Ints) -> tuple[Bools, NDArray[np.int64], Bytes]:
        """Say which rows could be cut, where their values stand and what their sizes are, and give the filtered objects."""
        text = np.frombuffer(data, np.uint8)
        heap = np.empty(len(self._filters) * (len(data) + 2 * len(ends)), np.uint8)
        while True:
            good = np.zeros(len(ends), np.bool_)
            found = np.full((2 * self.columns, len(ends)), -1, np.int64)
            state = np.array([self._row, 0, 0], np.int64)
            self._cut(
                text,
                ends,
                self._slots,
                self._entries,
                self._stamps,
                self._usual,
                self._names,
                self._wants,
                self._columns_of,
                self.rules,
                self._stack,
                self._kept,
                state,
                heap,
                good,
                found,
                self._unknown,
            )
            self._row = int(state[layout.ROW])
            if not self._learned(data, int(state[layout.UNKNOWN])):
                return good, found, heap[: int(state[layout.FILLED])]

    def _learned(self, data: memoryview, unknown: int) -> bool:
        """Remember the members that were not known, and say whether there were any."""
        told = self._unknown[: 3 * min(unknown, layout.UNKNOWN_MAX)].reshape(-1, 3).tolist()
        fresh: dict[int, dict[str, None]] = {}
        for node, start, size in told:
            fresh.setdefault(node, {})[str(data[start : start + size], "utf-8")] = None
        if not told:
            return False
        for node, names in fresh.items():
            self._learn(node, list(names))
        self.rules[layout.FULL] = len(self._known) > _KNOWN_MAX
        self._index()
        return True


class Narrow:
    """The way of one mapping's rows through its narrow query."""

    def __init__(
        self,
        plan: Narrowed,
        columns: Columns,
        connection: duckdb.DuckDBPyConnection,
        answers: Answers,
        odd: Callable[[pa.RecordBatch], None],
    ) -> None:
        self._plan = plan
        # Names are asked about while the query waits for rows, when its own connection would wait for itself.
        self._beside = connection.cursor()
        self._answers, self._odd = answers, odd
        forms = [(name[0], int(name[1:])) for name in plan.forms]
        bare = [piece.bare for piece in plan.pieces if piece.bare is not None]
        used = sorted({number for kind, number in forms if kind != "f"} | set(bare))
        at = {number: place for place, number in enumerate(used)}
        wants = [0] * len(used)
        for kind, number in forms:
            wants[at[number]] |= (1 << layout.PLAIN) * (kind == "u") if kind != "f" else 0
        for piece in plan.pieces:
            if piece.bare is not None:
                wants[at[piece.bare]] |= 1 << _WANTS[piece.kind]
        paths = [columns.used[number] for number in used]
        self.cutter = Cutter(paths, wants, plan.filters, self._keeps)
        self._forms = [
            _Form(
                name,
                len(used) + int(name[1:]) if name[0] == "f" else at[int(name[1:])],
                layout.PLAIN if name[0] == "u" else layout.AS_WRITTEN,
                _JSON if name[0] in "of" else pa.string_view(),
            )
            for name in plan.forms
        ]
        self._direct = [(piece, at[piece.bare]) for piece in plan.pieces if piece.bare is not None]
        self._asked = [place for place, piece in enumerate(plan.pieces) if piece.bare is None]
        values = {place: number for number, place in enumerate(self._asked)}
        values |= {
            place: -1 - at[piece.bare]
            for place, piece in enumerate(plan.pieces)
            if piece.bare is not None
        }
        self._program, self._words, self._word_bytes = _program(plan, values)
        self._keyless = np.ascontiguousarray(self._program[:, 1:])  # insert_id comes first
        self._views, self._join, self._vouch, self._hashed = (native(name) for name in NEEDED[1:])
        self._heap = len(used)  # columns from here on stand there

    def _keeps(self, one: Filter, names: Sequence[str]) -> list[bool]:
        """Say which members stay in a filtered object."""
        asked = "SELECT list_transform(?, lambda k: regexp_full_match(k, ?))"
        row = self._beside.execute(asked, [list(names), one.pattern]).fetchone()
        assert row is not None
        return [bool(found) == one.matching for found in row[0]]

    def standing(self, sample: Sequence[str | None]) -> bool:
        """Say whether enough of some rows can be cut."""
        rows = [row.encode() for row in sample if row]
        if not rows:
            return False
        good, _found, _heap = self.cutter.cut(
            memoryview(b"".join(rows)), np.cumsum([len(row) for row in rows])
        )
        return bool(np.count_nonzero(good) >= _STANDING * len(rows))

    def events(self, batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[pa.RecordBatch, bool]]:
        """Yield the events of some rows, in their order, and whether they are finished: the core would surely take them as they are.

        Finished ones have SPILLED's columns but for hashes, others those of the query's answer that an event has.
        """
        cuts: deque[_Cut] = deque()
        schema = pa.schema([("place", pa.int64()), *((one.name, one.type) for one in self._forms)])
        for answer in _by_row(self._answers(self._plan.sql, schema, self._cuts(batches, cuts))):
            place, good = (
                answer.column(name).to_numpy(zero_copy_only=False) for name in ("place", "good")
            )
            sizes = _Sizes(answer, self._plan, self._asked)
            good = good & sizes.plain(self._vouch, self.cutter.rules)
            bad = np.unique(place[~good])  # all of such a row is handed on
            if len(bad):
                good &= ~np.isin(place, bad)
            for cut in list(cuts):
                end = cut.begin + len(cut.rows)
                first, last = np.searchsorted(place, (cut.begin, end)).tolist()
                wrong = bad[(bad >= cut.begin) & (bad < end)] - cut.begin
                if len(wrong):
                    self._odd(cut.rows.take(pa.array(wrong)))
                rows = first + np.flatnonzero(good[first:last])
                if len(rows):
                    yield from self._joined(answer, sizes, cut, place - cut.begin, rows)
                if len(place) and place[-1] >= end:
                    cuts.popleft()

    def _cuts(
        self, batches: Iterable[pa.RecordBatch], cuts: deque[_Cut]
    ) -> Iterator[pa.RecordBatch]:
        """Yield rows as the query wants them, and keep what events are joined of."""
        begin = 0
        for batch in batches:
            cut = self._cut(batch, begin)
            if cut is None:
                continue
            cuts.append(cut)
            begin += len(cut.rows)
            places = pa.array(np.arange(cut.begin, begin, dtype=np.int64))
            yield pa.RecordBatch.from_pydict({"place": places, **cut.columns})

    def _cut(self, batch: pa.RecordBatch, begin: int) -> _Cut | None:
        data, ends = flat(batch.column("text"))
        good, found, heap = self.cutter.cut(data, ends)
        if not good.all():
            self._odd(batch.filter(pa.array(~good)))
            if not good.any():
                return None
            batch, found = batch.filter(pa.array(good)), np.ascontiguousarray(found[:, good])
        text = np.frombuffer(data, np.uint8)
        columns: dict[str, Any] = {}
        for held, own in ((text, False), (heap, True)):
            forms = [one for one in self._forms if one.filtered == own]
            columns |= self._viewed(held, forms, found, len(batch))
        columns = {one.name: columns[one.name] for one in self._forms}
        low = min(text.ctypes.data, heap.ctypes.data)
        high = max(text.ctypes.data + len(text), heap.ctypes.data + len(heap))
        found[: self._heap] += text.ctypes.data
        found[self._heap : self.cutter.columns] += heap.ctypes.data
        direct = [self.cutter.columns + column for _piece, column in self._direct]
        sizes = np.maximum(found[direct], 0).sum(axis=0, dtype=np.int64)
        return _Cut(batch, begin, found, sizes, columns, low, high, (data, heap))

    def _viewed(
        self, data: Bytes, forms: Sequence[_Form], found: NDArray[np.int64], rows: int
    ) -> dict[str, Any]:
        out = np.zeros((len(forms), 2 * rows), np.int64)
        valid = np.zeros(len(forms) * rows, np.bool_)
        wanted = np.array([one.column for one in forms], np.int64)
        kinds = np.array([one.form for one in forms], np.int64)
        self._views(data, wanted, kinds, found, out, valid)
        bits = np.packbits(valid.reshape(len(forms), rows), axis=1, bitorder="little")
        buffer = pa.py_buffer(data)
        columns = {}
        for at, one in enumerate(forms):
            parts = [pa.py_buffer(bits[at]), pa.py_buffer(out[at]), buffer]
            views = pa.Array.from_buffers(pa.string_view(), rows, parts)
            json = one.type == _JSON
            columns[one.name] = pa.ExtensionArray.from_storage(_JSON, views) if json else views
        return columns

    def _joined(
        self, answer: pa.RecordBatch, sizes: _Sizes, cut: _Cut, places: Ints, rows: Ints
    ) -> Iterator[tuple[pa.RecordBatch, bool]]:
        """Yield some events of an answer. places: of all of them, in the cut. rows: which of them."""
        sure = sizes.sure[rows] & self._nothing_mended(cut, places[rows])
        for some, good in ((rows[sure], True), (rows[~sure], False)):
            if len(some) == 0:
                continue
            there = cut.rows.select(["file", "line"]).take(pa.array(places[some]))
            own = answer.select(_OWN)
            own = own.slice(int(some[0]), len(some)) if _run(some) else own.take(pa.array(some))
            columns = dict(
                zip((*there.schema.names, *_OWN), (*there.columns, *own.columns), strict=True)
            )
            lines = self._lines(sizes, cut, places, some, self._program if good else self._keyless)
            if good:
                columns |= sizes.hashes(self._hashed, some)
                columns |= {"insert_id": insert_ids(columns["given"], lines), "event": lines}
            else:
                body = less(lines, front=1, back=1)
                keys = zip(columns["given"].to_pylist(), body.to_pylist(), strict=True)
                made = [made_id(text) if key is None else f'"{key}"' for key, text in keys]
                columns |= {"insert_id": pa.array(made, pa.string()), "body": body}
            yield pa.RecordBatch.from_pydict(columns), good

    def _nothing_mended(self, cut: _Cut, places: Ints) -> Bools:
        """Say which rows have nothing that goes on as it is and that the core may mend."""
        good = np.ones(len(places), np.bool_)
        for piece, column in self._direct:
            if piece.path[0] in _LOOKED_INTO:
                good &= cut.found[self.cutter.columns + column][places] < len("{} ")
        return good

    def _lines(
        self, sizes: _Sizes, cut: _Cut, places: Ints, rows: Ints, program: NDArray[np.int64]
    ) -> pa.StringArray:
        """Return some events as lines of JSON."""
        low, high = min(cut.low, sizes.low), max(cut.high, sizes.high)
        memory = np.frombuffer(pa.foreign_buffer(low, high - low), np.uint8)
        # What is found for a row, once for each of its events, and what the answer says.
        size = int(cut.sizes[places[rows]].sum())
        size += int(np.maximum(sizes.sizes[:, rows], 0).sum()) + len(rows) * self._word_bytes
        out = np.empty(size, np.uint8)
        ends = np.zeros(len(rows), np.int64)
        stack = np.zeros(2 * layout.NESTED_MAX, np.int64)
        base = np.array([low], np.int64)
        texts = (sizes.starts, sizes.sizes, rows)
        self._join(memory, base, cut.found, places, *texts, program, self._words, stack, out, ends)
        edges = np.zeros(len(rows) + 1, np.int32)
        edges[1:] = ends
        data = pa.py_buffer(out[: int(ends[-1])])
        return pa.StringArray.from_buffers(len(rows), pa.py_buffer(edges), data)


_OWN: Final = ["time_ms", "event_type", "user_id", "device_id", "given", "trouble"]


_HASHED: Final = (
    ("device_node", "device_id", hashes.DEVICE),
    ("user_node", "user_id", hashes.USER),
    ("insert_hash", "given", hashes.INSERT),
)


class _Sizes:
    """Where the pieces of an answer lie, and their sizes. sure: which events the core surely takes, as far as the answer goes."""

    def __init__(self, answer: pa.RecordBatch, plan: Narrowed, asked: Sequence[int]) -> None:
        self._pieces = [plan.pieces[at] for at in asked]
        self.starts = np.zeros((len(asked), answer.num_rows), np.int64)
        self.sizes = np.zeros_like(self.starts)
        self._edges = [(0, 0)] * len(asked)
        for at, piece in enumerate(self._pieces):
            column = answer.column(piece.column)
            if piece.column == "time_ms":
                self.starts[at] = column.fill_null(0).to_numpy()
                continue
            _valid, offsets, data = column.buffers()
            edges = np.frombuffer(offsets, np.int32)[column.offset :][: len(column) + 1]
            np.subtract(edges[1:], edges[:-1], out=self.sizes[at])
            if column.null_count:
                self.sizes[at][column.is_null().to_numpy(zero_copy_only=False)] = -1
            if data is not None and edges[-1] > edges[0]:
                np.add(edges[:-1], np.int64(data.address), out=self.starts[at])
                self._edges[at] = (data.address + int(edges[0]), data.address + int(edges[-1]))
        self.low = min((low for low, high in self._edges if high), default=2**63 - 1)
        self.high = max(high for _low, high in self._edges)
        usual = pc.not_equal(answer.column("event_type"), event.EXPOSURE)
        self.sure: Bools = (
            pc.equal(usual, pa.scalar(value=True)).to_numpy(zero_copy_only=False) == 1
        )

    def hashes(self, hashed: Native, rows: Ints) -> dict[str, pa.Array]:
        """Return the hashes of some events' ids, unless one is so long that it is hashed in another way."""
        found = {}
        for name, column, seed in _HASHED:
            at = next(at for at, piece in enumerate(self._pieces) if piece.column == column)
            memory, low = self._memory(at)
            starts, sizes = self.starts[at][rows] - low, self.sizes[at][rows]
            if sizes.max(initial=0) > hashes.TOGETHER:
                return {}
            out = np.zeros(len(rows), np.int64)
            hashed(memory, starts, sizes, np.array([seed]), out)
            found[name] = pa.array(out)
        return found

    def _memory(self, at: int) -> tuple[Bytes, int]:
        """Return where one column lies, no byte more, and its address."""
        low, high = self._edges[at]
        if low == high:
            return np.zeros(1, np.uint8), low
        return np.frombuffer(pa.foreign_buffer(low, high - low), np.uint8), low

    def plain(self, vouch: Native, rules: Ints) -> Bools:
        """Say which events have only texts that are written in JSON as they stand; and find out which are sure."""
        good = np.ones(self.sizes.shape[1], np.bool_)
        forms = {True: np.array([layout.PLAIN]), False: np.array([layout.AS_WRITTEN])}
        for at, piece in enumerate(self._pieces):
            if self._edges[at][1] == 0:
                continue
            memory, low = self._memory(at)
            starts = self.starts[at] - low
            if piece.path[0] in _LOOKED_INTO:
                self.sure &= self.sizes[at] < 0
            elif piece.kind == "text":
                vouch(memory, starts, self.sizes[at], forms[True], rules, good)
                self.sure &= self.sizes[at] <= STRING_CHARS_MAX
            elif piece.kind in {"object", "value"}:
                vouch(memory, starts, self.sizes[at], forms[False], rules, self.sure)
        return good


def _by_row(answers: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield an answer so that no row's events stand in two batches."""
    waiting: list[pa.RecordBatch] = []
    for batch in answers:
        if batch.num_rows == 0:
            continue
        if waiting and waiting[-1].column("place")[-1] != batch.column("place")[0]:
            yield waiting[0] if len(waiting) == 1 else pa.concat_batches(waiting)
            waiting = []
        waiting.append(batch)
    if waiting:
        yield waiting[0] if len(waiting) == 1 else pa.concat_batches(waiting)


def _run(rows: Ints) -> bool:
    """Say whether rows follow each other."""
    return int(rows[-1] - rows[0]) == len(rows) - 1


def _joining(piece: Piece) -> int:
    if piece.bare is not None:
        return _WANTS[piece.kind]
    if piece.column == "time_ms":
        return layout.COUNTS
    return layout.PLAIN if piece.kind == "text" else layout.AS_WRITTEN


def _program(plan: Narrowed, values: Mapping[int, int]) -> tuple[NDArray[np.int64], Bytes, int]:
    """Return how an event is joined of its pieces: steps, the names of its members, and how many bytes these take at most."""
    steps: list[tuple[int, int, int, int]] = []
    words = bytearray()

    def add(what: int, name: str, value: int) -> None:
        word = msgspec.json.encode(name) + b":"
        steps.append((what, len(words), len(word), value))
        words.extend(word)

    def walk(pieces: Pieces) -> None:
        for name, member in pieces.members.items():
            if isinstance(member, Pieces):
                add(layout.OPENS, name, 0)
                walk(member)
                steps.append((layout.CLOSES, 0, 0, 0))
            else:
                piece = plan.pieces[int(member)]
                add(_joining(piece), name, values[int(member)])

    walk(mapping.nested([(piece.path, str(at)) for at, piece in enumerate(plan.pieces)]))
    # A comma and two braces or quotes for each step, a point and a nought; a time's digits, and what stands around all.
    most = len(words) + 6 * len(steps) + 32
    return (
        np.ascontiguousarray(np.array(steps, np.int64).T),
        np.frombuffer(bytes(words), np.uint8),
        most,
    )
