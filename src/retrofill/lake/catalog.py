"""The tables of the lake's catalog, changed without DuckLake's statements where those would read every row.

To put one file in the place of others DuckLake deletes the rows of each, and remembers the place of every one of them
before it sees that the whole file goes: half a second and 60 MB for a million rows, on all threads that it has. The
catalog needs a few rows for it, those of a snapshot like any other. Source: DuckLake 1.0, specification, tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq

from retrofill.lake import parquet
from retrofill.lake.compact import LakeFile

CATALOG = "__ducklake_metadata_lake"
_EVENTS = f"SELECT table_id FROM {CATALOG}.ducklake_table WHERE table_name = 'events' AND end_snapshot IS NULL"  # noqa: S608 - a name of ours
_NAMES = f"""
SELECT mapping_id, list(source_name) FROM {CATALOG}.ducklake_name_mapping WHERE parent_column IS NULL GROUP BY mapping_id
"""  # noqa: S608
_COLUMNS = f"""
SELECT column_name, column_id FROM {CATALOG}.ducklake_column WHERE table_id = ? AND end_snapshot IS NULL
"""  # noqa: S608
_SNAPSHOT = f"""
INSERT INTO {CATALOG}.ducklake_snapshot
SELECT snapshot_id + 1, now(), schema_version, next_catalog_id, next_file_id + 1
FROM {CATALOG}.ducklake_snapshot ORDER BY snapshot_id DESC LIMIT 1
RETURNING snapshot_id, next_file_id - 1
"""  # noqa: S608
_CHANGES = (
    f"INSERT INTO {CATALOG}.ducklake_snapshot_changes (snapshot_id, changes_made) VALUES (?, ?)"  # noqa: S608
)
_END = f"""
UPDATE {CATALOG}.ducklake_data_file SET end_snapshot = ?
WHERE table_id = ? AND end_snapshot IS NULL AND path IN (SELECT unnest(?)) RETURNING data_file_id
"""  # noqa: S608
_ROW_IDS = f"""
UPDATE {CATALOG}.ducklake_table_stats SET record_count = record_count + $2, next_row_id = next_row_id + $2,
file_size_bytes = file_size_bytes + $3 WHERE table_id = $1 RETURNING next_row_id
"""  # noqa: S608
_FILE = f"""
INSERT INTO {CATALOG}.ducklake_data_file (data_file_id, table_id, begin_snapshot, path, path_is_relative, file_format,
record_count, file_size_bytes, footer_size, row_id_start, mapping_id) VALUES (?, ?, ?, ?, true, 'parquet', ?, ?, ?, ?, ?)
"""  # noqa: S608
_STATS = f"""
INSERT INTO {CATALOG}.ducklake_file_column_stats (data_file_id, table_id, column_id, column_size_bytes, value_count,
null_count, min_value, max_value)
SELECT $1, $2, unnest($3), unnest($4), unnest($5::BIGINT[]), unnest($6::BIGINT[]), unnest($7::VARCHAR[]), unnest($8::VARCHAR[])
"""


def put_in_place(
    cursor: duckdb.DuckDBPyConnection, old: Sequence[LakeFile], new: Path, metadata: pq.FileMetaData
) -> bool:
    """Put a file of `events`, on disk already, in the place of others. The cursor's transaction writes nothing else.

    False, and nothing is changed, if the catalog has never met a file with these columns: DuckLake has to take it.
    """
    names = set(parquet.names_of(metadata))
    known = (number for number, found in cursor.execute(_NAMES).fetchall() if set(found) == names)
    mapping = next(known, None)
    if mapping is None:
        return False
    table = cursor.execute(_EVENTS).fetchall()[0][0]
    snapshot, number = cursor.execute(_SNAPSHOT).fetchall()[0]
    changes = f"inserted_into_table:{table},deleted_from_table:{table}"
    cursor.execute(_CHANGES, [snapshot, changes])
    ended = cursor.execute(_END, [snapshot, table, [file.path.name for file in old]]).fetchall()
    assert len(ended) == len(old)
    rows, size = metadata.num_rows, new.stat().st_size
    first = cursor.execute(_ROW_IDS, [table, rows, size]).fetchall()[0][0] - rows
    footer = metadata.serialized_size
    cursor.execute(_FILE, [number, table, snapshot, new.name, rows, size, footer, first, mapping])
    columns = dict(cursor.execute(_COLUMNS, [table]).fetchall())
    stats = [(columns[name], *told) for name, *told in _stats(metadata)]
    cursor.execute(_STATS, [number, table, *map(list, zip(*stats, strict=True))])
    return True


def _stats(metadata: pq.FileMetaData) -> Iterator[list[Any]]:
    """Yield of each column: name, bytes, values, nulls, lowest and highest, as DuckLake reads them from a footer."""
    groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
    for place, name in enumerate(parquet.names_of(metadata)):
        chunks = [group.column(place) for group in groups]
        size = sum(chunk.total_compressed_size for chunk in chunks)
        told = [chunk.statistics for chunk in chunks]
        if any(one is None for one in told):
            yield [name, size, None, None, None, None]
            continue
        nulls = sum(one.null_count for one in told)
        ranges = [(one.min, one.max) for one in told if one.has_min_max]
        low = str(min(low for low, _ in ranges)) if ranges else None
        high = str(max(high for _, high in ranges)) if ranges else None
        yield [name, size, metadata.num_rows - nulls, nulls, low, high]
