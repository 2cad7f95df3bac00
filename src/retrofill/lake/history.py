"""The lake's rows for a process that does not own its catalog: DuckDB over the Parquet files of a pinned snapshot.

Whoever owns the lake pins a snapshot and names its files; what they hold then never changes, whoever reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from retrofill.core.sql import literal
from retrofill.lake.arrow import SCHEMA
from retrofill.lake.compact import LakeFile
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
            names = self._named([str(file.path) for file in whole])
            # The first one is the columns' own.
            parts.append(
                f"file_index - 1, file_row_number FROM read_parquet({names}, union_by_name=true)"
            )
        for number, file in enumerate(deleted, len(whole)):
            assert file.deleted is not None
            gone = f"{view}_gone_{number}"
            self.register(gone, pq.read_table(file.deleted, columns=["pos"]))
            names = self._named([str(file.path)])
            rows = f"{number}, file_row_number FROM read_parquet({names}, union_by_name=true)"
            parts.append(rows + f" ANTI JOIN {gone} ON file_row_number = pos")
        if not parts:
            self.register("no_events", SCHEMA.empty_table())
            parts.append("0, 0 FROM no_events")
        self._db.execute(
            f"CREATE OR REPLACE TEMP VIEW {view}({COLUMNS}, file, place) AS "
            + " UNION ALL ".join(f"SELECT {COLUMNS}, {one}" for one in parts)
        )
        return [*whole, *deleted]

    def _named(self, paths: Sequence[str]) -> str:
        return f"[{', '.join(map(literal, (str(self._columns), *paths)))}]"
