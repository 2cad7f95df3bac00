"""Fewer, larger lake files: which to merge, and merging them in bounded memory.

Every reader opens every file, so their number must stay small while history grows. Files stand next to each other by
their blocks. A file's tier is the logarithm of its rows; as soon as `COMPACT_FILES` neighbours of no more than one
tier stand together they become one file, so a row is written again only a few times in its life. How large a file must
be to be left alone grows with the history: of a short one the files that ten seals make are enough, and each row is
merged once; of a long one they would be too many for its readers, so they are merged once more. A large file with
deleted rows is written again when there is nothing to merge: what a user had deleted does not stay on disk.

Files are sorted, so merging reads each once, front to back, and holds a row group of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from msgspec import Struct

from retrofill.limits import (
    COMPACT_FILES,
    COMPACT_FILES_LASTING,
    COMPACT_FILES_MIN,
    COMPACT_ROWS_LASTING,
    COMPACT_ROWS_MAX,
)

KEY = ("amplitude_id", "block", "row")


class LakeFile(Struct, frozen=True):
    """One file of the lake table `events`. rows: those deleted by `deleted`, a file of places, included."""

    path: Path
    rows: int
    first: int
    last: int
    deleted: Path | None = None

    @property
    def tier(self) -> int:
        """The logarithm of the rows, in steps of one merge."""
        tier, rows = 0, self.rows
        while rows >= COMPACT_FILES:
            tier, rows = tier + 1, rows // COMPACT_FILES
        return tier


def lasting(rows: int) -> bool:
    """Say whether a file of so many rows is large enough to stay as it is, for long at least."""
    return rows > COMPACT_ROWS_LASTING


def choose(files: Iterable[LakeFile]) -> list[LakeFile]:
    """Return the neighbours to merge next, in order of their blocks; one file that must lose rows; or none."""
    ordered = sorted(files, key=lambda file: file.first)
    stays = sum(file.rows for file in ordered) // COMPACT_FILES_LASTING
    stays = min(max(stays, COMPACT_ROWS_LASTING), COMPACT_ROWS_MAX // 2)
    for tier in range(max((file.tier for file in ordered), default=0) + 1):
        for run in _runs(ordered, tier, stays):
            chosen = _fitting(run)
            if len(chosen) >= COMPACT_FILES or (
                len(chosen) >= COMPACT_FILES_MIN and len(chosen) < len(run)
            ):
                return chosen
    return next(([file] for file in ordered if file.deleted is not None), [])


def _runs(files: Sequence[LakeFile], tier: int, stays: int) -> Iterator[list[LakeFile]]:
    """Yield the groups of neighbours of at most this tier, those of more rows than `stays` left out."""
    run: list[LakeFile] = []
    for file in files:
        if file.tier <= tier and file.rows <= stays:
            run.append(file)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _fitting(run: Sequence[LakeFile]) -> list[LakeFile]:
    """Return the first of a run, as many as one merge may take; none if nearly all of it is one file's rows."""
    chosen: list[LakeFile] = []
    rows = 0
    for file in run:
        if len(chosen) == COMPACT_FILES or rows + file.rows > COMPACT_ROWS_MAX:
            break
        chosen.append(file)
        rows += file.rows
    largest = max((file.rows for file in chosen), default=0)
    return chosen if 2 * largest <= rows else []


def merge(sources: Sequence[Iterator[pa.Table]], names: Sequence[str] = KEY) -> Iterator[pa.Table]:
    """Yield the rows of sorted sources in one order, by columns of numbers: (amplitude_id, block, row) as in a lake file.

    Each round takes from every source the rows up to the smallest of the sources' last keys held: behind that key no
    source can have anything more, so what was taken only needs sorting.
    """
    held = [_Held(source, names) for source in sources]
    while held := [one for one in held if one.fill()]:
        cut = min(one.last() for one in held)
        yield _in_order(pa.concat_tables([one.take(cut) for one in held]), names)


class _Held:
    """The rows of one source that were read and not taken yet."""

    def __init__(self, source: Iterator[pa.Table], names: Sequence[str]) -> None:
        self._source = source
        self._names = names
        self._table: pa.Table | None = None
        self._keys: tuple[np.ndarray[Any, Any], ...] = ()
        self._at = 0

    def fill(self) -> bool:
        """Have at least one row, or say that the source has ended."""
        while self._table is None or self._at == self._table.num_rows:
            self._table = next(self._source, None)
            if self._table is None:
                return False
            self._keys = tuple(self._table[name].to_numpy() for name in self._names)
            self._at = 0
        return True

    def last(self) -> tuple[int, ...]:
        """Return the last key held."""
        return tuple(int(key[-1]) for key in self._keys)

    def take(self, cut: tuple[int, ...]) -> pa.Table:
        """Take the rows up to a key, that one included."""
        assert self._table is not None
        first, low, high = self._at, self._at, self._table.num_rows
        for key, value in zip(self._keys, cut, strict=True):
            # Among the rows equal so far: those below the value go, those equal to it are looked at further.
            low, high = (
                low + int(np.searchsorted(key[low:high], value, side)) for side in ("left", "right")
            )
        self._at = high
        return self._table.slice(first, high - first)


def _in_order(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """Return the same rows sorted. Columns that hold nothing, a third of them as a rule, need no sorting."""
    order, rows = pa.array(_order(table, names)), table.num_rows
    columns = [
        column if column.null_count == rows else column.take(order) for column in table.columns
    ]
    return pa.Table.from_arrays(columns, schema=table.schema)


def _order(table: pa.Table, names: Sequence[str]) -> np.ndarray[Any, Any]:
    """Return the places of the rows in the order of the key.

    Sources mostly come in the order of their blocks: then to sort by person is enough, if equal ones stay as they came.
    """
    first, *further = (table[name].to_numpy() for name in names)
    order = np.argsort(first, kind="stable")
    later = np.zeros(max(len(order) - 1, 0), bool)
    for key in reversed(further):
        ahead = np.diff(key[order])
        later = (ahead > 0) | ((ahead == 0) & later)
    same = np.diff(first[order]) == 0
    if later[same].all():
        return order
    return np.lexsort([*reversed(further), first])
