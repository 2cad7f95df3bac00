"""Rows of lake files in order of position: what history is folded from, out of files that are sorted by person.

Each file is read once, row group by row group, and of a group that has nothing wanted no more than the numbers that
say so. What is wanted is held until it takes REFOLD_SORT_BYTES; then it goes to disk as a run in order, and in the end
runs are merged as files are. As long as all of it fits, nothing goes to disk.

A statement that sorts the same rows takes somewhat more CPU, and 250 MB more for 400,000 of them: it carries every text
through the sort, and memory touched for the first time costs more than what is done in it. Here texts of few words stay
numbers until the rows are in order, and rows are put in order a few thousand at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct
from numpy.typing import NDArray

from retrofill.core.block import Kind
from retrofill.lake import parquet
from retrofill.lake.arrow import SCHEMA
from retrofill.lake.compact import LakeFile, merge
from retrofill.lake.person import Footer, Opened, footer_of, opened, ranges
from retrofill.limits import REFOLD_GROUP_ROWS, REFOLD_ROWS, REFOLD_SORT_BYTES

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
_NUMBERS = ("project", "block", "row", "kind", "amplitude_id")
_KEY = ("block", "row")
_SEEN = (int(Kind.EVENT), int(Kind.IDENTIFY))
_ROW_BITS = 20


class Wanted(Struct, frozen=True):
    """Rows of a project, of blocks after `after` up to `until`.

    Of those the visible ones of people, in rising order; every group identify; the displaced ones at `displaced`
    (`positions`, in rising order); and the hidden ones of an import's generation (`undone`: its name and blocks).
    """

    project: int
    after: int
    until: int
    people: Ints
    displaced: Ints
    undone: tuple[str, int, int]

    def groups(self, footer: Footer) -> list[int]:
        """Return the row groups of a file that may have any."""
        low, high = ranges(footer.metadata, "block")
        here: Bools = (high > self.after) & (low <= self.until)
        low, high = ranges(footer.metadata, "project")
        here &= (low <= self.project) & (high >= self.project)
        here &= footer.may_hold(self.people) | (ranges(footer.metadata, "kind")[1] > max(_SEEN))
        found: list[int] = np.flatnonzero(here).tolist()
        return found

    def among(self, numbers: pa.Table) -> Bools:
        """Say which of some rows are wanted, as far as numbers tell: of hidden ones more than that."""
        kind = numbers["kind"].to_numpy()
        block = numbers["block"].to_numpy()
        seen = (kind <= max(_SEEN)) & _inside(numbers["amplitude_id"].to_numpy(), self.people)
        chosen = seen | (kind == Kind.GROUP_IDENTIFY) | (kind == Kind.UNDONE)
        displaced = kind == Kind.DISPLACED
        if displaced.any():
            chosen |= displaced & _inside(positions(numbers), self.displaced)
        chosen &= (block > self.after) & (block <= self.until)
        return np.asarray(chosen & (numbers["project"].to_numpy() == self.project), bool)

    def without_others(self, rows: pa.Table) -> pa.Table:
        """Return rows of `among` without those that another import hides."""
        undone = rows["kind"].to_numpy() == Kind.UNDONE
        if not undone.any():
            return rows
        return rows.filter(pa.array(of_import(rows, *self.undone) | ~undone))


def of_import(rows: pa.Table, name: str, after: int, until: int) -> Bools:
    """Say which rows are of an import, in blocks after one up to another."""
    block = rows["block"].to_numpy()
    own = pc.fill_null(pc.equal(rows["import_id"], name), fill_value=False)
    return np.asarray(own.to_numpy(zero_copy_only=False) & (block > after) & (block <= until))


def positions(rows: pa.Table) -> Ints:
    """Return (block, row) of rows as one number each."""
    row = rows["row"].to_numpy()
    assert not len(row) or int(row.max()) < 1 << _ROW_BITS  # a block is some thousand events
    return np.asarray((rows["block"].to_numpy() << _ROW_BITS) | row)


def in_arrival(
    files: Sequence[LakeFile],
    wanted: Wanted,
    columns: Sequence[str],
    scratch: Path,
    *,
    of_hidden: Sequence[str] = (),
) -> Iterator[pa.Table]:
    """Yield wanted rows in order of position, some thousands at a time, with the place of the file and theirs in it.

    columns: of which `file` and `place` follow, import_id among them; of_hidden: further ones, null but on hidden rows.
    scratch: a folder for runs. Raises StoreError if a file cannot be read, or a run not be written.
    """
    runs: list[Iterator[pa.Table]] = []
    held: list[pa.Table] = []
    held_bytes = 0
    for some in _read(files, wanted, columns, of_hidden):
        held.append(some)
        held_bytes += some.nbytes
        if held_bytes >= REFOLD_SORT_BYTES:
            path = scratch / f"run-{len(runs)}.arrow"
            _lay(path, _sorted(held, REFOLD_GROUP_ROWS))
            runs.append(_laid(path))
            held_bytes = 0
    if held:
        runs.append(_sorted(held, REFOLD_GROUP_ROWS if runs else REFOLD_ROWS))
    yield from runs[0] if len(runs) == 1 else merge(runs, _KEY)


def _read(
    files: Sequence[LakeFile], wanted: Wanted, columns: Sequence[str], of_hidden: Sequence[str]
) -> Iterator[pa.Table]:
    for number, file in enumerate(files):
        with parquet.told(file.path):
            footer = footer_of(file.path)
            groups = wanted.groups(footer)
            gone = parquet.places_of(file.deleted) if groups else None
        if not groups:
            continue
        with opened(file, footer) as source:
            for group in groups:
                first = int(footer.first[group])
                numbers = source.file.read_row_group(group, _NUMBERS, use_threads=False)
                keep = wanted.among(numbers)
                if gone is not None:
                    keep[gone[(gone >= first) & (gone < first + len(keep))] - first] = False
                places = np.flatnonzero(keep)
                if len(places):
                    rows = _rows(source, group, places, columns, of_hidden)
                    at = pa.array(np.full(len(places), number, np.int32)), pa.array(places + first)
                    rows = rows.append_column("file", at[0]).append_column("place", at[1])
                    rows = wanted.without_others(rows)
                    if rows.num_rows:
                        yield rows


def _rows(
    source: Opened, group: int, places: Ints, columns: Sequence[str], of_hidden: Sequence[str]
) -> pa.Table:
    some = pa.array(places)
    rows = _columns(source, group, columns, some)
    hidden = pa.array(rows["kind"].to_numpy() > Kind.GROUP_IDENTIFY)
    if of_hidden and pc.any(hidden).as_py():
        said = _columns(source, group, of_hidden, some)
        for name in of_hidden:
            rows = rows.append_column(name, pc.if_else(hidden, _plain(said[name]), None))
    else:
        for name in of_hidden:
            rows = rows.append_column(name, pa.nulls(len(places), SCHEMA.field(name).type))
    return rows


def _columns(source: Opened, group: int, names: Sequence[str], places: pa.Array) -> pa.Table:
    there = [name for name in names if name not in source.footer.empty]
    read = source.file.read_row_group(group, there, use_threads=False).combine_chunks()
    arrays = {}
    for name in names:
        column = read[name].chunk(0) if name in there else None
        if column is None or column.null_count == len(column):
            arrays[name] = pa.nulls(len(places), SCHEMA.field(name).type)
        else:
            arrays[name] = _narrow(column.take(places))
    return pa.table(arrays)


def _narrow(array: pa.Array) -> pa.Array:
    """Return texts as numbers if there are few of them."""
    if not pa.types.is_string(array.type):
        return array
    coded = array.dictionary_encode()
    return coded if len(coded.dictionary) * 2 <= len(array) else array


def _plain(array: Any) -> Any:  # noqa: ANN401 - an array, or one in chunks
    return array.cast(pa.string()) if pa.types.is_dictionary(array.type) else array


def _inside(ids: NDArray[Any], ordered: Ints) -> Bools:
    """Say which ids are among some in rising order."""
    if not len(ordered):
        return np.zeros(len(ids), bool)
    at = np.minimum(np.searchsorted(ordered, ids), len(ordered) - 1)
    return np.asarray(ordered[at] == ids)


def _sorted(held: list[pa.Table], rows_max: int) -> Iterator[pa.Table]:
    """Yield rows in order of position, a few at a time, texts as texts. Empties the list."""
    names = held[0].column_names
    sides = list(zip(*(rows.columns for rows in held), strict=True))
    held.clear()
    whole: dict[str, pa.Array] = {}
    for name in names:  # each column in one piece, one after another, its parts let go
        whole[name] = _joined([chunk for column in sides.pop(0) for chunk in column.chunks])
    order = np.lexsort([whole["row"].to_numpy(), whole["block"].to_numpy()])
    for first in range(0, len(order), rows_max):
        some = pa.array(order[first : first + rows_max])
        yield pa.table({name: _taken(array, some) for name, array in whole.items()})


def _joined(chunks: list[pa.Array]) -> pa.Array:
    """Lay arrays of one column into one piece; texts become numbers if some are: written out they would take any room."""
    told = [chunk for chunk in chunks if chunk.null_count < len(chunk)]
    types = [chunk.type for chunk in told] or [chunks[0].type]
    kind = next(filter(pa.types.is_dictionary, types), types[0])
    same = []
    for chunk in chunks:
        if chunk.null_count == len(chunk):
            same.append(pa.nulls(len(chunk), kind))
        else:
            same.append(chunk if chunk.type == kind else chunk.dictionary_encode())
    return pa.chunked_array(same).unify_dictionaries().combine_chunks()


def _taken(array: pa.Array, places: pa.Array) -> pa.Array:
    text = pa.types.is_dictionary(array.type)
    if array.null_count == len(array):
        return pa.nulls(len(places), pa.string() if text else array.type)
    return array.dictionary.take(array.indices.take(places)) if text else array.take(places)


def _lay(path: Path, tables: Iterator[pa.Table]) -> None:
    first = next(tables)
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        parquet.told(path),
        pa.OSFile(str(path), "wb") as out,
        pa.ipc.new_stream(out, first.schema, options=options) as writer,
    ):
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def _laid(path: Path) -> Iterator[pa.Table]:
    with pa.OSFile(str(path)) as source, pa.ipc.open_stream(source) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch])
    path.unlink()
