"""Lake files: Parquet, sorted by (amplitude_id, block, row), on disk before anybody names them.

Encodings were chosen by measurement on realistic events: sorting brings a person's rows
together, so ids and snapshots shrink to almost nothing: where each stands on a few rows they are dictionaries like
small vocabularies, in memory too, so that a merge moves numbers and no texts; else they are differences from the row
before. An `insert_id` is random and stays what it is. Row groups are small, so that one person's rows are found
by their statistics and little else is read.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct

from retrofill.core.block import Block
from retrofill.core.row import Vocabulary
from retrofill.errors import StoreError
from retrofill.lake import arrow
from retrofill.lake.arrow import FILE, SCHEMA
from retrofill.lake.files import Files, store_error
from retrofill.limits import (
    LAKE_GROUP_ROWS,
    LAKE_LARGE_GROUP_ROWS,
    LAKE_SMALL_FILE_ROWS,
    LAKE_SYNC_BYTES,
)

_INTEGERS = tuple(field.name for field in SCHEMA if pa.types.is_integer(field.type))
# Texts on few rows, of which many may be the same.
_SELDOM = ("attribution_ids", "partner_id", "plan", "sent_groups")
# At a time, from each of the files that are merged: in smaller steps the calls cost more than the rows.
_READ_ROWS = LAKE_GROUP_ROWS
_READ_BYTES = 256 * 1024  # of one column
_WORDS_MAX = 1000  # of a dictionary that is written as it is
_EMPTY = "retrofill.empty"  # under which a file names the columns that have no value in it
_OPTIONS: dict[str, Any] = {
    "write_page_checksum": True,
    # The order of the rows makes ranges of numbers useful; ranges of texts only make footers long.
    "write_statistics": list(_INTEGERS),
}
# Rows for each different text from which on it is cheaper to move numbers than texts.
_ROWS_A_WORD = 2


# A file that will be merged soon is written and read in half the time; one that stays takes two thirds of the room.
_PASSING: dict[str, Any] = {"compression": "lz4"}
_LASTING: dict[str, Any] = {"compression": "zstd", "compression_level": 1}


class Written(Struct, frozen=True):
    """A lake file on disk."""

    rows: int
    file_bytes: int


def write(
    path: Path,
    tables: Iterable[pa.Table],
    files: Files,
    *,
    group_rows: int = LAKE_GROUP_ROWS,
    lasting: bool = False,
) -> Written:
    """Write a lake file from tables already in order; it and its name are on disk when this returns.

    group_rows: of a row group; small ones suit a small file, of a large one they make too long a footer.
    lasting: it will not be merged again. With no rows no file is left.
    Raises StoreError; then the file, if there, is nobody's and may be removed.
    """
    rows = synced = 0
    empty = set(FILE.names)
    try:
        packing = _LASTING if lasting else _PASSING
        groups = _groups(tables, group_rows)
        first = next(groups, None)
        if first is None:
            return Written(0, 0)
        with pq.ParquetWriter(
            path, first.schema, **packing, **_OPTIONS, **_encodings(first.schema)
        ) as writer:
            for group in itertools.chain([first], groups):
                writer.write_table(group, row_group_size=group_rows)
                rows += group.num_rows
                empty = {name for name in empty if group[name].null_count == group.num_rows}
                # All at once at the end would keep every other sync of this disk waiting, those of commits too.
                written = path.stat().st_size
                if written - synced >= LAKE_SYNC_BYTES:
                    files.sync_file(path)
                    synced = written
            writer.add_key_value_metadata({_EMPTY: " ".join(sorted(empty))})
    except OSError as problem:
        raise store_error(problem, path) from problem
    files.sync_file(path)
    files.sync_folder(path.parent)
    return Written(rows, path.stat().st_size)


def _encodings(schema: pa.Schema) -> dict[str, Any]:
    words = [field.name for field in schema if pa.types.is_dictionary(field.type)]
    like_before = [name for name in arrow.REPEATED if name not in words]
    return {
        "use_dictionary": [*words, *_SELDOM],
        "column_encoding": {
            **dict.fromkeys(_INTEGERS, "DELTA_BINARY_PACKED"),
            **dict.fromkeys(like_before, "DELTA_BYTE_ARRAY"),
        },
    }


def empty_of(metadata: pq.FileMetaData) -> frozenset[str]:
    """Return the columns that have no value in a whole file: those that it names, if it does, or is older than."""
    told = (metadata.metadata or {}).get(_EMPTY.encode(), b"")
    return frozenset((*told.decode().split(), *(set(FILE.names) - set(names_of(metadata)))))


def names_of(metadata: pq.FileMetaData) -> list[str]:
    """Return the names of a file's columns, none of a file without rows.

    Not from `metadata.schema`: footer and schema hold each other from then on. Where nobody looks for such circles, as
    in our child processes, every footer ever read would stay: 1.2 MB for 100,000 rows in groups of 4,000.
    """
    if not metadata.num_row_groups:
        return []
    group = metadata.row_group(0)
    return [group.column(place).path_in_schema for place in range(metadata.num_columns)]


def file_name(first: int, last: int) -> str:
    """Return a name that nobody else uses for a file with rows of blocks first … last."""
    return f"{first:012}-{last:012}-{secrets.token_hex(4)}.parquet"


def group_rows_of(rows: int) -> int:
    """Return how many rows a row group should have in a file of so many."""
    return LAKE_GROUP_ROWS if rows <= LAKE_SMALL_FILE_ROWS else LAKE_LARGE_GROUP_ROWS


def _groups(tables: Iterable[pa.Table], group_rows: int) -> Iterator[pa.Table]:
    """Yield the same rows cut into row groups of one size: each group costs every reader of the file."""
    held: list[pa.Table] = []
    rows = 0
    for table in tables:
        held.append(table)
        rows += table.num_rows
        while rows >= group_rows:
            whole = pa.concat_tables(held)
            yield _small(whole.slice(0, group_rows))
            held = [whole.slice(group_rows)]
            rows -= group_rows
    if rows:
        yield _small(pa.concat_tables(held))


def in_order(blocks: Iterable[Block]) -> Iterator[pa.Table]:
    """Yield the rows of blocks sorted by (amplitude_id, block, row), as they go into a file, one row group at a time."""
    vocabulary = Vocabulary()
    table = _whole(arrow.narrow(blocks, vocabulary))
    # The rows stand in order of position already.
    people = table["amplitude_id"].to_numpy()
    order = np.argsort(people, kind="stable")
    different = int(np.count_nonzero(np.diff(people[order]))) + 1
    snapshots_of_users = len(vocabulary.user_properties)
    words = {"user_id": different, "device_id": different, "user_properties": snapshots_of_users}
    schema = arrow.coding(
        [name for name, count in words.items() if count * _ROWS_A_WORD <= len(order)]
    )
    snapshots = arrow.Snapshots(vocabulary, schema)
    for first in range(0, len(order), LAKE_GROUP_ROWS):
        some = table.take(pa.array(order[first : first + LAKE_GROUP_ROWS]))
        yield arrow.widen(some, snapshots, schema)


def _whole(table: pa.Table) -> pa.Table:
    """Lay each column into one piece, one after another: `take` would do so again for every row group."""
    schema, columns = table.schema, table.columns
    del table
    for index, column in enumerate(columns):
        columns[index] = column.combine_chunks()
    return pa.Table.from_arrays(columns, schema=schema)


def _small(table: pa.Table) -> pa.Table:
    """Return rows whose columns are of one piece, with dictionaries that hold little more than is in the rows."""
    table = table.unify_dictionaries().combine_chunks()
    for index, field in enumerate(table.schema):
        column = table.column(index).chunk(0)
        if pa.types.is_dictionary(field.type) and len(column.dictionary) > _WORDS_MAX:
            used = column.indices.dictionary_encode()
            if len(used.dictionary) < len(column.dictionary):
                words = column.dictionary.take(used.dictionary)
                again = pa.DictionaryArray.from_arrays(used.indices, words)
                table = table.set_column(index, field, again)
    return table


def coding_of(paths: Iterable[Path]) -> pa.Schema:
    """Return how the rows of some files should stand in one: coded is what is so for at least half of them.

    Raises StoreError if a file cannot be read.
    """
    rows = dict.fromkeys(arrow.REPEATED, 0)
    for path in paths:
        with told(path), pq.ParquetFile(path) as opened:
            for name in rows:
                is_coded = pa.types.is_dictionary(opened.schema_arrow.field(name).type)
                rows[name] += opened.metadata.num_rows * (1 if is_coded else -1)
    return arrow.coding([name for name, more in rows.items() if more >= 0])


def read(path: Path, deleted: Path | None, schema: pa.Schema = FILE) -> Iterator[pa.Table]:
    """Yield a lake file's rows in order, some thousands at a time, without those that its delete file names.

    schema: one of `arrow.coding`. Raises StoreError if a file cannot be read.
    """
    with told(path):
        gone = places_of(deleted)
        first = 0
        # Buffers of a set size: otherwise a whole file is read ahead, of each file that is merged.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES) as opened:
            for batch in opened.iter_batches(_READ_ROWS, use_threads=False):
                table = whole(pa.Table.from_batches([batch]), schema)
                yield table if gone is None else without(table, gone, first)
                first += len(batch)


def whole(table: pa.Table, schema: pa.Schema = FILE) -> pa.Table:
    """Return rows of a lake file with every column that there is now: null where the file is older than the column."""
    columns = [
        arrow.coded(table[field.name], field)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def verify(path: Path) -> None:
    """Read all of a lake file or delete file, page checksums included.

    Raises StoreError if anything cannot be read. Files of before there were page checksums are read without.
    """
    with (
        told(path),
        pq.ParquetFile(
            path, pre_buffer=False, buffer_size=_READ_BYTES, page_checksum_verification=True
        ) as opened,
    ):
        for _ in opened.iter_batches(LAKE_GROUP_ROWS):
            pass


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Say in our words that a lake file cannot be read: raises StoreError."""
    try:
        yield
    except OSError as problem:
        raise store_error(problem, path) from problem
    except pa.ArrowException as problem:
        raise StoreError(
            f"A lake file cannot be read: {problem}",
            where=str(path),
            mend="Restore the file from a copy, or run `retrofill check --repair` on the directory",
        ) from problem


def places_of(deleted: Path | None) -> np.ndarray[Any, Any] | None:
    """Return the places of the rows that a delete file names, None without one."""
    if deleted is None:
        return None
    places = pq.read_table(deleted, columns=["pos"])["pos"].to_numpy()
    return np.asarray(places)


def without(table: pa.Table, gone: np.ndarray[Any, Any], first: int) -> pa.Table:
    """Return the rows of a table whose first one has the place `first`, but for those whose places are gone."""
    keep = np.ones(table.num_rows, bool)
    here = gone[(gone >= first) & (gone < first + table.num_rows)]
    keep[here - first] = False
    return table.filter(pa.array(keep))
