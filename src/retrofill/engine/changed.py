"""Rows of the lake that a fold has changed: set aside, and written as new lake files when all are known.

The fold goes by position and reads some of the columns; the rows of a lake file stand by person. Most rows come out of
it as they went in, and stay where they are. One that differs is set aside, on disk, with its place in its file and the
columns that the fold decides. Then the files are read once, row group by row group and only those that hold such rows:
the other columns are taken as they are, in an order that is nearly that of the new files. Whole rows are never sorted,
nor held but for those of one new file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrofill.core.row import SHOWN
from retrofill.lake import parquet
from retrofill.lake.arrow import FILE, SCHEMA
from retrofill.lake.compact import LakeFile
from retrofill.lake.files import Files
from retrofill.limits import REFOLD_FILE_ROWS, REFOLD_GROUP_ROWS

DECIDED = ("amplitude_id", "created_time", "kind", "flags", "user_properties", *SHOWN)
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
        self._pieces: list[Path] = []
        self._files: set[int] = set()
        self.places: list[pa.Table] = []

    def add(self, rows: pa.Table) -> None:
        """Set rows aside: as they must be, of the columns DECIDED, block, row, and where they stand (`History`)."""
        if not rows.num_rows:
            return
        file = rows["file"].to_numpy().astype(np.int64)
        self._files.update(np.unique(file).tolist())
        at = pa.array((file << _FILE_BITS) | rows["place"].to_numpy())
        names = _SET_ASIDE.names[1:]
        arrays = [at, *(rows[name] for name in names)]
        self._waiting.append(pa.Table.from_arrays(arrays, schema=_SET_ASIDE))
        self._rows += rows.num_rows
        if self._rows >= REFOLD_FILE_ROWS:
            self._lay()

    def _lay(self) -> None:
        rows = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting, self._rows = [], 0
        rows = rows.take(pa.array(np.argsort(rows["at"].to_numpy())))
        self.places.append(rows.select(["block", "row"]))
        path = self._scratch / f"changed-{len(self._pieces)}.arrow"
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with (
            pa.OSFile(str(path), "wb") as out,
            pa.ipc.new_file(out, _SET_ASIDE, options=options) as writer,
        ):
            writer.write_table(rows, max_chunksize=REFOLD_GROUP_ROWS)
        self._pieces.append(path)

    def write(self, sources: Sequence[LakeFile], folder: Path) -> list[Path]:
        """Write all of them as new lake files. sources: the files where they stand. Raises StoreError."""
        if self._waiting:
            self._lay()
        written: list[Path] = []
        held: list[pa.Table] = []
        rows = 0
        for some in self._whole(sources):
            held.append(some)
            rows += some.num_rows
            if rows >= REFOLD_FILE_ROWS:
                written.append(write(folder, pa.concat_tables(held)))
                held, rows = [], 0
        if held:
            written.append(write(folder, pa.concat_tables(held)))
        for path in self._pieces:
            path.unlink()
        self._pieces = []
        return written

    def _whole(self, sources: Sequence[LakeFile]) -> Iterator[pa.Table]:
        pieces = [_Piece(path) for path in self._pieces]
        for number in sorted(self._files):
            path = sources[number].path
            with (
                parquet.told(path),
                pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES) as opened,
            ):
                first = 0
                for group in range(opened.num_row_groups):
                    last = first + opened.metadata.row_group(group).num_rows
                    end = (number << _FILE_BITS) | last
                    if taken := [some for piece in pieces for some in piece.take(end)]:
                        yield _copied(opened, group, first, pa.concat_tables(taken))
                    first = last
        for piece in pieces:
            piece.close()


class _Piece:
    """Rows that were set aside, in order of `at`, read a few at a time."""

    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path))
        self._reader = pa.ipc.open_file(self._file)
        self._read = self._taken = 0
        self._rows = _SET_ASIDE.empty_table()

    def take(self, end: int) -> Iterator[pa.Table]:
        """Yield the next rows, those before `end`."""
        while True:
            if self._taken == self._rows.num_rows:
                if self._read == self._reader.num_record_batches:
                    return
                self._rows = pa.Table.from_batches([self._reader.get_batch(self._read)])
                self._read, self._taken = self._read + 1, 0
            cut = int(np.searchsorted(self._rows["at"].to_numpy(), end))
            if cut == self._taken:
                return
            yield self._rows.slice(self._taken, cut - self._taken)
            self._taken = cut
            if cut < self._rows.num_rows:
                return

    def close(self) -> None:
        self._file.close()


def _copied(opened: pq.ParquetFile, group: int, first: int, decided: pa.Table) -> pa.Table:
    """Return rows of a row group as in a lake file: what was decided, and the rest as it stands there."""
    at = decided["at"].to_numpy()
    order = np.argsort(at)
    decided = decided.combine_chunks().take(pa.array(order))
    stays = set(opened.schema_arrow.names).difference(DECIDED)
    rest = opened.read_row_group(group, columns=[name for name in FILE.names if name in stays])
    places = (at[order] & ((1 << _FILE_BITS) - 1)) - first
    if len(places) < rest.num_rows:
        rest = rest.take(pa.array(places))
    columns = [
        _typed(decided[field.name], field)
        if field.name in DECIDED
        else rest[field.name].cast(field.type)
        if field.name in stays
        else pa.nulls(len(at), field.type)
        for field in FILE
    ]
    return pa.Table.from_arrays(columns, schema=FILE)


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
    wanted = pa.types.is_dictionary(field.type) and not pa.types.is_dictionary(column.type)
    return column.dictionary_encode() if wanted else column
