"""One person's rows straight out of the lake files.

A statement over the lake plans, opens every file and decodes what it does not need; for a few hundred rows out of ten
millions that is most of its time. But files are sorted by person, so the smallest and largest amplitude_id of each
row group, which the footer tells, leave one or two groups of a file to be read. Footers are kept, up to a bound in
bytes: a file never changes. A caller reads the few columns that choose its rows first, and of those chosen the rest.
Reading ends with the last row wanted, and leaves out columns that have no value in the whole file.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct

from retrofill.lake import parquet
from retrofill.lake.arrow import SCHEMA
from retrofill.lake.compact import LakeFile

_INT64 = np.iinfo(np.int64)


class Footer(Struct, frozen=True):
    """What a file says of itself. low, high: of amplitude_id in each row group. first: place of its first row.

    empty: columns without a value in the whole file, as far as it says so.
    """

    metadata: pq.FileMetaData
    low: np.ndarray[Any, Any]
    high: np.ndarray[Any, Any]
    first: np.ndarray[Any, Any]
    empty: frozenset[str]

    def may_hold(self, people: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Say of each row group whether its range has any of some amplitude_ids, in rising order."""
        # Somebody is in a range if more are up to its end than before its beginning.
        up_to = np.searchsorted(people, self.high, "right")
        return np.asarray(up_to > np.searchsorted(people, self.low))


class Footers:
    """Footers of lake files, those used last kept up to a bound in bytes as they stand on disk. Any thread."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._kept: OrderedDict[Path, Footer] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, path: Path) -> Footer:
        """Return a file's footer. Raises StoreError if it cannot be read."""
        with self._lock:
            found = self._kept.get(path)
            if found is not None:
                self._kept.move_to_end(path)
                return found
        footer = footer_of(path)
        with self._lock:
            if path not in self._kept:
                self._kept[path] = footer
                self._bytes += footer.metadata.serialized_size
            while self._bytes > self._bytes_max:
                _, gone = self._kept.popitem(last=False)
                self._bytes -= gone.metadata.serialized_size
        return footer


def footer_of(path: Path) -> Footer:
    """Read a file's footer. Raises StoreError if it cannot be read."""
    with parquet.told(path):
        metadata = pq.read_metadata(path)
    low, high = ranges(metadata, "amplitude_id")
    counts = [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)]
    first = np.cumsum(np.array([0, *counts], np.int64))[:-1]
    return Footer(metadata, low, high, first, parquet.empty_of(metadata))


def ranges(metadata: pq.FileMetaData, name: str) -> tuple[np.ndarray[Any, Any], ...]:
    """Return the least and the largest number of a column in each row group, as far as the file says so."""
    groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
    place = parquet.names_of(metadata).index(name) if groups else 0
    told = [group.column(place).statistics for group in groups]
    found = [
        (one.min, one.max) if one is not None and one.has_min_max else (_INT64.min, _INT64.max)
        for one in told
    ]
    return tuple(np.array(found, np.int64).reshape(-1, 2).T)


class Part(Struct, frozen=True):
    """Rows of some people in one row group of a file, by their places in the group."""

    file: LakeFile
    footers: Footers
    group: int
    places: np.ndarray[Any, Any]

    def read(self, columns: Sequence[str], some: np.ndarray[Any, Any] | None = None) -> pa.Table:
        """Return columns of these rows, or of some of them by their indexes. Raises StoreError."""
        places = self.places if some is None else self.places[some]
        with opened(self.file, self.footers.of(self.file.path)) as source:
            return source.rows(self.group, columns, places)


def parts(
    files: Iterable[LakeFile],
    footers: Footers,
    project: int,
    people: Sequence[int],
    kinds: Sequence[int],
    columns: Sequence[str],
) -> Iterator[tuple[Part, pa.Table]]:
    """Yield where the rows of these amplitude_ids stand, a row group at a time, with some of their columns.

    Only rows of one project and of these kinds, in each part in order of amplitude_id and position.

    Raises StoreError if a file cannot be read.
    """
    wanted = np.array(sorted(set(people)), np.int64)
    for file in files:
        footer = footers.of(file.path)
        groups = np.flatnonzero(footer.may_hold(wanted)).tolist()
        if not groups:
            continue
        with parquet.told(file.path):
            gone = parquet.places_of(file.deleted)
        with opened(file, footer) as source:
            for group in groups:
                places, rows = _found(source, group, project, wanted, kinds, columns)
                if gone is not None:
                    there = ~np.isin(places + footer.first[group], gone)
                    places, rows = places[there], rows.filter(pa.array(there))
                if len(places):
                    yield Part(file, footers, group, places), rows


def _found(
    source: Opened,
    group: int,
    project: int,
    wanted: np.ndarray[Any, Any],
    kinds: Sequence[int],
    columns: Sequence[str],
) -> tuple[np.ndarray[Any, Any], pa.Table]:
    """Return where in a row group the rows of these people are, with columns of them."""
    ids = source.ids(group)
    # Rows are sorted by it: what lies between the first and the last one wanted is all there is to look at.
    low = int(np.searchsorted(ids, wanted[0], "left"))
    high = int(np.searchsorted(ids, wanted[-1], "right"))
    places = np.flatnonzero(np.isin(ids[low:high], wanted)) + low
    rows = source.rows(group, ("project", "kind", *columns), places)
    keep = rows["project"].to_numpy() == project
    keep &= np.isin(rows["kind"].to_numpy(), np.array(kinds, np.uint8))
    return places[keep], rows.select(list(columns)).filter(pa.array(keep))


class Opened(Struct, frozen=True):
    """A file that is being read."""

    file: pq.ParquetFile
    footer: Footer

    def ids(self, group: int) -> np.ndarray[Any, Any]:
        """Return the amplitude_id of every row of a row group."""
        found = self.file.read_row_group(group, ["amplitude_id"], use_threads=False)
        return np.asarray(found["amplitude_id"])

    def rows(
        self,
        group: int,
        columns: Sequence[str],
        places: np.ndarray[Any, Any],
        schema: pa.Schema = SCHEMA,
    ) -> pa.Table:
        """Return some rows of a row group, with the types of the lake table or of its files."""
        fields = [schema.field(name) for name in columns]
        there = [name for name in columns if name not in self.footer.empty]
        if not there or not len(places):
            nulls = [pa.nulls(len(places), field.type) for field in fields]
            return pa.Table.from_arrays(nulls, schema=pa.schema(fields))
        end = int(places.max()) + 1
        # In batches that end with the last of them: what comes after it in the row group is not decoded.
        found, rows = [], 0
        for batch in self.file.iter_batches(end, [group], there, use_threads=False):
            found.append(batch)
            rows += len(batch)
            if rows >= end:
                break
        table = pa.Table.from_batches(found).take(pa.array(places))
        whole = [
            table[field.name].cast(field.type)
            if field.name not in self.footer.empty
            else pa.nulls(len(places), field.type)
            for field in fields
        ]
        return pa.Table.from_arrays(whole, schema=pa.schema(fields))


@contextlib.contextmanager
def opened(file: LakeFile, footer: Footer) -> Iterator[Opened]:
    """Open a file for reading. Raises StoreError if it cannot be read."""
    with (
        parquet.told(file.path),
        pa.OSFile(str(file.path)) as source,
        pq.ParquetFile(source, metadata=footer.metadata, pre_buffer=False) as one,
    ):
        yield Opened(one, footer)
