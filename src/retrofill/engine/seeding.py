"""A data directory that begins in the middle: with state, rows and dedupe keys that another server had after a block.

What is written is what a crash could have left there, so an engine opens it in the ordinary way and goes on as that
server would have: the next block has the next number, the next person the next amplitude_id. Rows need no more columns
than they will be asked for. There is one project, PROJECT, whatever its number was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct

from retrofill.config import Project
from retrofill.core import dedupe
from retrofill.engine.admission import ProjectSettings
from retrofill.engine.duplicates import file_keys
from retrofill.hot.checkpoint import Changed, Checkpoint, Meta
from retrofill.hot.directory import Directory
from retrofill.hot.sqlite import Bar, Blocks
from retrofill.lake import Lake, arrow, parquet
from retrofill.lake.arrow import FILE, SCHEMA, MergeRow
from retrofill.lake.files import Files
from retrofill.limits import Limits

PROJECT = 1
_CONSTANT = {"project": PROJECT, "partition": 0, "user_properties": "{}"}
_ORDER = [(name, "ascending") for name in ("amplitude_id", "block", "row")]


class Start(Struct, frozen=True):
    """Where the directory begins.

    meta: the block that was the last, its time, and the next amplitude_id. window_from: the first block whose keys
    make a live event a duplicate at now_ms. settings: of the project, every limit named. barred: (device, user) of merges
    that were taken back.
    """

    meta: Meta
    now_ms: int
    window_from: int
    settings: ProjectSettings
    limits: Limits
    state: Changed
    merges: list[MergeRow]
    barred: list[tuple[str, str]] = []


def seed(
    root: Path,
    project: Project,
    start: Start,
    rows: Iterable[pa.Table],
    *,
    contested: pa.Array | None = None,
    more: Callable[[], list[tuple[bytes, int]]] = list,
) -> None:
    """Make a directory. rows: of blocks up to the last, in any order, some columns of the lake's at least.

    contested: the insert_ids that anybody will send; other rows leave no dedupe key. None: every row does.
    more: called when the rows are read: ordinary keys that are stored beside theirs, with their blocks.
    Raises StoreError, BusyError, InputError as opening does.
    """
    directory = Directory(root)
    try:
        blocks = Blocks(directory.blocks)
        made = blocks.projects().add(project.name, project.api_key, project.secret_key)
        assert made.number == PROJECT
        blocks.projects().set_settings(PROJECT, msgspec.json.encode(start.settings))
        for place, pair in enumerate(start.barred):
            blocks.projects().bar(PROJECT, Bar(0, place, 0, 0, *pair, start.now_ms))
        blocks.close()
        checkpoint = Checkpoint(directory.checkpoint)
        # One time is enough: whatever is older than now is either in the window or before it.
        times = [(start.window_from, start.now_ms)] if start.meta.block else []
        checkpoint.save(start.meta, {PROJECT: start.state}, block_times=times, times_after_ms=0)
        checkpoint.close()
        _fill(directory, start, rows, contested, more)
    finally:
        directory.close()


def _fill(
    directory: Directory,
    start: Start,
    rows: Iterable[pa.Table],
    contested: pa.Array | None,
    more: Callable[[], list[tuple[bytes, int]]],
) -> None:
    last = start.meta.block
    lake = Lake.open(directory.lake)
    kept: list[pa.Table] = []
    try:
        for table in rows:
            if table.num_rows:
                _adopt(lake, table, last)
                kept.append(_with_keys(table, contested))
        if last:
            lake.adopt(None, block=last, merges=start.merges)
    finally:
        lake.close()
    if last:
        file_keys(directory.keys, last, kept, start.limits, more=more())


def _adopt(lake: Lake, table: pa.Table, last: int) -> None:
    rows = complete(table).sort_by(_ORDER)
    block = rows["block"].to_numpy()
    file = lake.new_file(int(block.min()), int(block.max()))
    columns = [arrow.coded(rows[field.name], field) for field in FILE]
    parquet.write(file, [pa.Table.from_arrays(columns, schema=FILE)], Files())
    lake.adopt(file, block=last, merges=[])


def complete(table: pa.Table) -> pa.Table:
    """Return rows with every column of the lake; what they lack is null, or says nothing."""
    count = table.num_rows
    columns = []
    for field in SCHEMA:
        if field.name in _CONSTANT:
            columns.append(pa.repeat(pa.scalar(_CONSTANT[field.name], field.type), count))
        elif field.name in table.column_names:
            columns.append(table[field.name])
        elif field.name == "event_properties":
            columns.append(pa.repeat(pa.scalar("{}"), count))
        elif field.name in ("flags", "said", "updates_max", "merges_max"):
            columns.append(pa.array(np.zeros(count, np.int32)).cast(field.type))
        else:
            columns.append(pa.nulls(count, field.type))
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _with_keys(table: pa.Table, contested: pa.Array | None) -> pa.Table:
    """Return what makes the dedupe keys of those rows that leave one."""
    if contested is not None:
        table = table.filter(pc.is_in(table["insert_id"], value_set=contested))
    return complete(table).select(
        [
            *("project", "block", "row", "kind", "user_id", "device_id", "event_type"),
            *("insert_id", "event_id", "client_event_time", "import_id"),
        ]
    )


def known_key(start_limits: Limits, device_id: str, insert_id: str) -> bytes:
    """Return the ordinary key of an event here, for `more`."""
    scope = "" if start_limits.dedupe_scope == "project" else device_id
    return dedupe.key(PROJECT, scope, insert_id)
