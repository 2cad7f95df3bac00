"""Rows of the lake that a fold has changed: set aside, and written as new lake files when all are known.

The fold goes by position and reads some of the columns; the rows of a lake file stand by person. Most rows come out of
it as they went in, and stay where they are. One that differs is set aside, on disk, with its place in its file and the
columns that the fold decides. Then the files are read once, row group by row group and only those that hold such rows,
the other columns are taken as they are, and the files' rows are merged into new ones as compaction does it. Held are
some rows of each file; and whole rows of people with another number now, for they stand elsewhere among the others.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrofill.core.row import SHOWN
from retrofill.lake import arrow, parquet
from retrofill.lake.arrow import FILE, SCHEMA
from retrofill.lake.compact import LakeFile, merge
from retrofill.lake.files import Files
from retrofill.limits import (
    REFOLD_ASIDE_BATCH_ROWS,
    REFOLD_ASIDE_ROWS,
    REFOLD_FILE_ROWS,
    REFOLD_OUT_FILES,
    REFOLD_OUT_ROWS,
)

DECIDED = ("amplitude_id", "created_time", "kind", "flags", "user_properties", *SHOWN)
ASIDE = ["file", "place", "block", "row", *DECIDED]  # what is to be known of a changed row
# `at`: the place of the file among the sources, and of the row in it.
_SET_ASIDE = pa.schema(
    [("at", pa.int64()), *(SCHEMA.field(name) for name in ("block", "row", *DECIDED))]
)
_FILE_BITS = 40
_READ_BYTES = 256 * 1024  # of one column


class Changed:
    """The rows of one pass. scratch: a folder for what is set aside, gone at the end."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._waiting: list[pa.Table] = []
        self._rows = 0
        self._pieces: list[tuple[Path, dict[int, range]]] = []  # with the batches of each file
        self._places: list[pa.Table] = []  # of a piece, with the place of the file

    def add(self, rows: pa.Table) -> None:
        """Set rows aside: the columns ASIDE, as they must be and where they stand (`History`). Raises StoreError."""
        if not rows.num_rows:
            return
        file = rows["file"].to_numpy().astype(np.int64)
        at = pa.array((file << _FILE_BITS) | rows["place"].to_numpy())
        names = _SET_ASIDE.names[1:]
        arrays = [at, *(rows[name] for name in names)]
        self._waiting.append(pa.Table.from_arrays(arrays, schema=_SET_ASIDE))
        self._rows += rows.num_rows
        if self._rows >= REFOLD_ASIDE_ROWS:
            self._lay()

    def _lay(self) -> None:
        rows = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting, self._rows = [], 0
        rows = rows.take(pa.array(np.argsort(rows["at"].to_numpy())))
        files = (rows["at"].to_numpy() >> _FILE_BITS).astype(np.int32)
        self._places.append(rows.select(["block", "row"]).append_column("file", pa.array(files)))
        path = self._scratch / f"changed-{len(self._pieces)}.arrow"
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        files, firsts = np.unique(files, return_index=True)
        ends = [*firsts[1:].tolist(), rows.num_rows]
        batches, count = {}, 0
        with (
            parquet.told(path),
            pa.OSFile(str(path), "wb") as out,
            pa.ipc.new_file(out, _SET_ASIDE, options=options) as writer,
        ):
            for file, first, end in zip(files.tolist(), firsts.tolist(), ends, strict=True):
                some = rows.slice(first, end - first).to_batches(
                    max_chunksize=REFOLD_ASIDE_BATCH_ROWS
                )
                for batch in some:
                    writer.write_batch(batch)
                batches[file] = range(count, count + len(some))
                count += len(some)
        self._pieces.append((path, batches))

    def outgoing(self) -> Iterator[pa.Table]:
        """Yield the (block, row) of all of them, those of one file together, some files at a time.

        DuckLake remembers each row that it deletes, until a statement has ended: 55 bytes of memory. And of a file of
        which it has deleted some already it remembers those as well. A file takes 256 KB at least.
        """
        if not self._places:
            return
        rows = pa.concat_tables(self._places).combine_chunks()
        self._places = []
        order = np.argsort(rows["file"].to_numpy(), kind="stable")
        files = rows["file"].to_numpy()[order]
        ends = [*(np.flatnonzero(np.diff(files)) + 1).tolist(), len(files)]
        first = count = 0
        for end, further in itertools.pairwise([*ends, 0]):
            count += 1
            if not further or further - first > REFOLD_OUT_ROWS or count == REFOLD_OUT_FILES:
                yield rows.select(["block", "row"]).take(pa.array(order[first:end]))
                first, count = end, 0

    def write(self, sources: Sequence[LakeFile], folder: Path) -> list[Path]:
        """Write all of them as new lake files. sources: the files where they stand. Raises StoreError."""
        if self._waiting:
            self._lay()
        if not self._pieces:
            return []
        bounds = [pc.min_max(some["block"]).as_py() for some in self._places]
        first, last = min(one["min"] for one in bounds), max(one["max"] for one in bounds)
        moved = _Moved(folder)
        written: list[Path] = []
        with contextlib.ExitStack() as stack:
            asides: dict[int, list[_Aside]] = {}
            for path, batches in self._pieces:
                reader = pa.ipc.open_file(stack.enter_context(pa.OSFile(str(path))))
                for file, some in batches.items():
                    asides.setdefault(file, []).append(_Aside(reader, some))
            rows = merge(
                [_whole(sources[file], file, asides[file], moved, stack) for file in sorted(asides)]
            )
            for head in rows:
                path = folder / parquet.file_name(first, last)
                parquet.write(path, _some(head, rows, REFOLD_FILE_ROWS), Files())
                written.append(path)
        moved.write()
        for path, _ in self._pieces:
            path.unlink()
        self._pieces = []
        return written + moved.written


class _Moved:
    """Rows that stand elsewhere among the others now: files of their own, each sorted in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: list[pa.Table] = []
        self._rows = 0
        self.written: list[Path] = []

    def add(self, rows: pa.Table) -> None:
        """Take rows."""
        self._held.append(rows)
        self._rows += rows.num_rows
        if self._rows >= REFOLD_FILE_ROWS:
            self.write()

    def write(self) -> None:
        """Write what is held."""
        if self._held:
            self.written.append(write(self._folder, pa.concat_tables(self._held)))
            self._held, self._rows = [], 0


def _some(head: pa.Table, further: Iterator[pa.Table], rows_max: int) -> Iterator[pa.Table]:
    """Yield a table and those after it until they have so many rows."""
    rows = 0
    for table in itertools.chain([head], further):
        yield table
        rows += table.num_rows
        if rows >= rows_max:
            return


def _whole(
    source: LakeFile,
    number: int,
    asides: Sequence[_Aside],
    moved: _Moved,
    stack: contextlib.ExitStack,
) -> Iterator[pa.Table]:
    """Yield the changed rows of a file, whole, in its order; those of people with another number now are moved."""
    with parquet.told(source.path):
        opened = stack.enter_context(
            pq.ParquetFile(source.path, pre_buffer=False, buffer_size=_READ_BYTES)
        )
        gone = parquet.empty_of(opened.metadata).union(DECIDED) - {"amplitude_id"}
        there = [name for name in FILE.names if name not in gone]
        first = 0
        for group in range(opened.num_row_groups):
            last = first + opened.metadata.row_group(group).num_rows
            end = (number << _FILE_BITS) | last
            if taken := [some for aside in asides for some in aside.take(end)]:
                rows, stays = _copied(opened, group, there, first, pa.concat_tables(taken))
                if not stays.all():
                    moved.add(rows.filter(pa.array(~stays)))
                    rows = rows.filter(pa.array(stays))
                yield rows
            first = last


class _Aside:
    """Rows of one file that were set aside in one piece, in order of `at`, read a few at a time."""

    def __init__(self, reader: pa.ipc.RecordBatchFileReader, batches: range) -> None:
        self._reader = reader
        self._batches = iter(batches)
        self._taken = 0
        self._rows = _SET_ASIDE.empty_table()

    def take(self, end: int) -> Iterator[pa.Table]:
        """Yield the next rows, those before `end`."""
        while True:
            if self._taken == self._rows.num_rows:
                batch = next(self._batches, None)
                if batch is None:
                    return
                self._rows = pa.Table.from_batches([self._reader.get_batch(batch)])
                self._taken = 0
            cut = int(np.searchsorted(self._rows["at"].to_numpy(), end))
            if cut == self._taken:
                return
            yield self._rows.slice(self._taken, cut - self._taken)
            self._taken = cut
            if cut < self._rows.num_rows:
                return


def _copied(
    opened: pq.ParquetFile, group: int, stays: list[str], first: int, decided: pa.Table
) -> tuple[pa.Table, np.ndarray[Any, Any]]:
    """Return rows of a row group as in a lake file: what was decided, and what of the rest is there (stays) as it stands.

    And whose amplitude_id is what it was.
    """
    at = decided["at"].to_numpy()
    order = np.argsort(at)
    places = pa.array((at[order] & ((1 << _FILE_BITS) - 1)) - first)
    decided = decided.combine_chunks().take(pa.array(order))
    rest = opened.read_row_group(group, stays, use_threads=False)
    ids = rest["amplitude_id"].take(places)
    columns = []
    for field in FILE:
        if field.name in DECIDED:
            columns.append(_typed(decided[field.name], field))
        elif field.name not in rest.column_names or (rest[field.name].null_count == rest.num_rows):
            columns.append(pa.nulls(len(at), field.type))
        else:
            columns.append(arrow.coded(rest[field.name].take(places), field))
    rows = pa.Table.from_arrays(columns, schema=FILE)
    return rows, np.asarray(rows["amplitude_id"].to_numpy() == ids.to_numpy())


def write(folder: Path, rows: pa.Table) -> Path:
    """Write rows as one lake file, in the order of lake files; it is on disk when this returns."""
    block = rows["block"].to_numpy()
    people = rows["amplitude_id"].to_numpy()
    order = np.lexsort([rows["row"].to_numpy(), block, people])
    if (np.diff(order) != 1).any():
        rows = rows.unify_dictionaries().combine_chunks().take(pa.array(order))
    file = folder / parquet.file_name(int(block.min()), int(block.max()))
    columns = [_typed(rows[field.name], field) for field in FILE]
    parquet.write(file, [pa.Table.from_arrays(columns, schema=FILE)], Files())
    return file


def _typed(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column), field.type)])
    return arrow.coded(column, field)
