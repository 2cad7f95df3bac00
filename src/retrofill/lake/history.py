"""The lake's rows for a process that does not own its catalog: DuckDB over the Parquet files of a pinned snapshot.

Whoever owns the lake pins a snapshot and names its files; what they hold then never changes, whoever reads it.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrofill.core.sql import literal
from retrofill.errors import CorruptError, StoreError
from retrofill.lake.arrow import SCHEMA
from retrofill.lake.compact import LakeFile
from retrofill.lake.files import store_error
from retrofill.lake.parquet import places_of
from retrofill.limits import HISTORY_MEMORY_BYTES, LAKE_SPILL_BYTES, LAKE_THREADS

COLUMNS = ", ".join(f'"{name}"' for name in SCHEMA.names)


class History:
    """A DuckDB of its own with the view `events`, and others if wanted: the lake's columns, and where each row stands.

    That is `file`, the place of its file in what `use` returned, and `place`, its own in there, deleted rows counted too.
    """

    def __init__(self, spill: Path) -> None:
        self._db = duckdb.connect(
            config={
                "memory_limit": f"{HISTORY_MEMORY_BYTES}B",
                "threads": LAKE_THREADS,
                "temp_directory": str(spill),
                "max_temp_directory_size": f"{LAKE_SPILL_BYTES}B",
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "preserve_insertion_order": False,
                # Each file is read once or twice, and the next pass reads others.
                "enable_external_file_cache": False,
            }
        )
        self._db.execute("SET enable_progress_bar = false")
        # Read with every file, so that those that are older than a column have it too.
        self._columns = spill.with_name("columns.parquet")
        spill.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(SCHEMA.empty_table(), self._columns)
        self.use([])

    def close(self) -> None:
        """Close it."""
        self._db.close()

    def ask(self, sql: str, values: Sequence[Any] = ()) -> duckdb.DuckDBPyConnection:
        """Run a statement."""
        return self._db.execute(sql, list(values))

    def register(self, name: str, rows: pa.Table) -> None:
        """Name a table for statements, in place of one of that name."""
        self._db.register(name, rows)

    def use(self, files: Sequence[LakeFile], view: str = "events") -> list[LakeFile]:
        """Let a view be the rows of these files, without those that their delete files name; return them in its order."""
        whole = [file for file in files if file.deleted is None]
        deleted = [file for file in files if file.deleted is not None]
        parts = []
        if whole:
            parts.append(f"file_index - 1, file_row_number FROM {self._rows(whole)}")
        if deleted:
            # A bit for each row, in one join for all files: a join of places takes 4 MB at least, and all of those that a
            # statement has, one for each file, are held at once.
            gone = {"of_file": range(1, len(deleted) + 1), "gone": [_gone(one) for one in deleted]}
            self.register(f"{view}_gone", pa.table(gone))
            bits = f"(SELECT of_file, gone::BIT AS gone FROM {view}_gone)"  # noqa: S608 - a name of ours
            parts.append(
                f"file_index - 1 + {len(whole)}, file_row_number FROM {self._rows(deleted)} "
                f"JOIN {bits} ON file_index = of_file WHERE get_bit(gone, file_row_number::INTEGER) = 0"
            )
        if not parts:
            self.register("no_events", SCHEMA.empty_table())
            parts.append("0, 0 FROM no_events")
        self._db.execute(
            f"CREATE OR REPLACE TEMP VIEW {view}({COLUMNS}, file, place) AS "
            + " UNION ALL ".join(f"SELECT {COLUMNS}, {one}" for one in parts)
        )
        return [*whole, *deleted]

    def _rows(self, files: Sequence[LakeFile]) -> str:
        """Say where the rows of files stand; the first file there is the columns' own."""
        paths = [self._columns, *(file.path for file in files)]
        named = ", ".join(literal(str(path)) for path in paths)
        return f"read_parquet([{named}], union_by_name=true)"


@contextlib.contextmanager
def told(where: Path) -> Iterator[None]:
    """Say in our words what who reads history lacks of memory and disk, or cannot read. Errors of other kinds are mistakes, and go on."""
    try:
        yield
    except duckdb.OutOfMemoryException as problem:  # that it may spill no more is one of these
        raise StoreError(
            f"Reading history takes more than DuckDB may have, {HISTORY_MEMORY_BYTES:,} bytes of memory and "
            f"{LAKE_SPILL_BYTES:,} on disk: {_first_line(problem)}",
            where=str(where),
            mend="Nothing has changed. Raise HISTORY_MEMORY_BYTES or LAKE_SPILL_BYTES in limits.py, and ask again",
        ) from problem
    except duckdb.IOException as problem:
        if "No space left" in str(problem):
            raise store_error(OSError(errno.ENOSPC, str(problem)), where) from problem
        raise StoreError(
            f"Files of the lake cannot be read or written: {_first_line(problem)}",
            where=str(where),
            mend="Nothing has changed. Mend the disk, and ask again",
        ) from problem
    except OSError as problem:
        raise store_error(problem, where) from problem
    except (duckdb.Error, pa.ArrowInvalid) as problem:
        raise CorruptError(
            f"History cannot be read: {type(problem).__name__}: {_first_line(problem)}",
            where=str(where),
            mend="Nothing has changed. `retrofill check`, with the server stopped, names a file that is damaged, and how to mend it; if it finds none, this is a mistake in the program: report it",
        ) from problem


def _first_line(problem: Exception) -> str:
    return str(problem).split("\n", 1)[0]


def _gone(file: LakeFile) -> bytes:
    """Return a bit for each row of a file, set if it is deleted."""
    bits = np.zeros(file.rows, bool)
    places = places_of(file.deleted)
    assert places is not None
    bits[places] = True
    return np.packbits(bits).tobytes()
