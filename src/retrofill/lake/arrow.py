"""Blocks as Arrow tables: the one shape of a row for the sealer that writes it and the reader that cannot wait for it.

The schema is the lake table `events`, column by column. What a block cannot mean is not judged here: whatever was
committed must become a row, or sealing would stop for ever at that block. So a number that does not fit its column is
brought to the nearest that does, and bytes that are no UTF-8 inside JSON text are replaced.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from msgspec import Raw

from retrofill.core.block import COLUMNS, Block
from retrofill.core.row import SHOWN, Column, Repeated, Vocabulary, columns

# An array costs some microseconds before its first value: small blocks are put together.
_BATCH_ROWS = 5000
_INT64 = (-(2**63), 2**63 - 1)

SCHEMA = pa.schema(
    [
        ("project", pa.int32()),
        ("partition", pa.int32()),
        ("block", pa.int64()),
        ("row", pa.int32()),
        ("amplitude_id", pa.int64()),
        ("kind", pa.uint8()),
        ("flags", pa.uint8()),
        ("user_id", pa.string()),
        ("device_id", pa.string()),
        ("event_type", pa.string()),
        ("client_event_time", pa.int64()),
        ("client_upload_time", pa.int64()),
        ("event_time", pa.int64()),
        ("server_received_time", pa.int64()),
        ("server_upload_time", pa.int64()),
        ("created_time", pa.int64()),
        ("insert_id", pa.string()),
        ("import_id", pa.string()),
        ("event_id", pa.int64()),
        ("session_id", pa.int64()),
        ("event_properties", pa.string()),
        ("user_properties", pa.string()),
        ("sent", pa.string()),
        ("groups", pa.string()),
        ("group_properties", pa.string()),
        *((name, pa.string()) for name in COLUMNS),
        ("location_lat", pa.float64()),
        ("location_lng", pa.float64()),
        ("attribution_ids", pa.string()),
        ("partner_id", pa.string()),
        ("plan", pa.string()),
        ("path", pa.string()),
        # What only a second fold needs beside `sent`: see core.refold.
        ("said", pa.int32()),
        ("sent_groups", pa.string()),
        ("updates_max", pa.int32()),
        ("merges_max", pa.int32()),  # null on rows of before there was one: no limit
    ]
)
JSON_COLUMNS = frozenset(
    {
        "event_properties",
        "user_properties",
        "sent",
        "groups",
        "group_properties",
        "plan",
        "sent_groups",
    }
)
# Table `merges`: at (partition, block, row) two people were shown to be one. A row has the fields in this order.
MERGES = pa.schema(
    [
        ("project", pa.int32()),
        ("absorbed", pa.int64()),
        ("surviving", pa.int64()),
        ("partition", pa.int32()),
        ("block", pa.int64()),
        ("row", pa.int32()),
        ("event_time", pa.int64()),
        ("server_upload_time", pa.int64()),
    ]
)
# Table `freed`: there somebody who was deleted since had taken a device, which is nobody's from then on until another's
# event takes it. hidden: the event is of an import that is undone.
FREED = pa.schema(
    [
        ("project", pa.int32()),
        ("amplitude_id", pa.int64()),
        ("device_id", pa.string()),
        ("partition", pa.int32()),
        ("block", pa.int64()),
        ("row", pa.int32()),
        ("event_time", pa.int64()),
        ("import_id", pa.string()),
        ("hidden", pa.bool_()),
    ]
)
_CODED_TYPE = pa.dictionary(pa.int32(), pa.string())
# What `narrow` gives, and what stands in a lake file.
NARROW = pa.schema(
    [
        *(field for field in SCHEMA if field.name not in (*SHOWN, "user_properties")),
        pa.field("table", pa.int32()),
    ]
)
_CODED = (*SHOWN, "event_type", "import_id", "path")
# Coded too in a file in which each stands on some rows: see `coding`.
REPEATED = ("user_id", "device_id", "user_properties")
FILE = pa.schema(
    [field.with_type(_CODED_TYPE) if field.name in _CODED else field for field in SCHEMA]
)
MergeRow = tuple[int, int, int, int, int, int, int, int]


def table(blocks: Iterable[Block]) -> pa.Table:
    """Return the rows of blocks as one table of `SCHEMA`, in order of position."""
    return pa.Table.from_batches(batches(blocks), SCHEMA)


def batches(blocks: Iterable[Block]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of blocks in order, some thousands at a time."""
    for some in _grouped(blocks):
        yield _wide(some)


def batch(block: Block) -> pa.RecordBatch:
    """Return the rows of one block, in order."""
    return _wide([block])


class Snapshots:
    """The snapshots of a vocabulary as arrays, to be taken for rows by their place. schema: of those rows."""

    def __init__(self, vocabulary: Vocabulary, schema: pa.Schema = SCHEMA) -> None:
        self._users = coded(_json(vocabulary.user_properties), schema.field("user_properties"))
        self._shown = np.array(vocabulary.shown, np.int32)
        self._sets = {
            name: _array(values, SCHEMA.field(name)).dictionary_encode()
            for name, values in vocabulary.columns().items()
        }

    def columns(self, table: np.ndarray[Any, Any]) -> dict[str, pa.Array]:
        """Return the snapshot's columns for rows that show these tables."""
        places = pa.array(self._shown[table])
        return {"user_properties": self.user_properties(table)} | {
            name: values.take(places) for name, values in self._sets.items()
        }

    def user_properties(self, table: np.ndarray[Any, Any]) -> pa.Array:
        """Return that one column."""
        return self._users.take(pa.array(table))


def narrow(blocks: Iterable[Block], vocabulary: Vocabulary) -> pa.Table:
    """Return the rows of blocks in order, with places in the vocabulary as `table` for the snapshot's columns.

    A third of the bytes, and a third of the work to sort them; `widen` gives the rest back.
    """
    found = [
        pa.RecordBatch.from_arrays(_arrays(columns(some, vocabulary), NARROW), schema=NARROW)
        for some in _grouped(blocks)
    ]
    return pa.Table.from_batches(found, NARROW)


def widen(rows: pa.Table, snapshots: Snapshots, schema: pa.Schema) -> pa.Table:
    """Return rows of `narrow` with the snapshot's columns in place of `table`: the schema is one of `coding`."""
    shown = snapshots.columns(rows["table"].to_numpy())
    arrays = [
        coded(shown[field.name] if field.name in shown else rows[field.name], field)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def coding(repeated: Collection[str]) -> pa.Schema:
    """Return `FILE` with these columns of REPEATED as numbers of words."""
    fields = (field.with_type(_CODED_TYPE) if field.name in repeated else field for field in FILE)
    return pa.schema(fields)


def coded(column: Any, field: pa.Field) -> Any:  # noqa: ANN401 - an array, or one in chunks
    """Return texts as numbers of words, or as they are, as the field says."""
    wanted, there = (pa.types.is_dictionary(kind) for kind in (field.type, column.type))
    if wanted == there:
        return column
    return column.dictionary_encode() if wanted else column.cast(field.type)


def _grouped(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    waiting: list[Block] = []
    rows = 0
    for block in blocks:
        waiting.append(block)
        rows += block.rows
        if rows >= _BATCH_ROWS:
            yield waiting
            waiting, rows = [], 0
    if waiting:
        yield waiting


def _wide(blocks: Sequence[Block]) -> pa.RecordBatch:
    vocabulary = Vocabulary()
    found = columns(blocks, vocabulary)
    table = found.pop("table")
    assert isinstance(table, np.ndarray)
    shown = {
        name: array.cast(SCHEMA.field(name).type)
        for name, array in Snapshots(vocabulary).columns(table).items()
    }
    return pa.RecordBatch.from_arrays(_arrays(found | shown, SCHEMA), schema=SCHEMA)


def _arrays(found: Mapping[str, Column | pa.Array], schema: pa.Schema) -> list[pa.Array]:
    rows = len(found["user_id"])  # type: ignore[arg-type]
    arrays = []
    for field in schema:
        values = found[field.name]
        if values is None:
            arrays.append(pa.nulls(rows, field.type))
        else:
            arrays.append(values if isinstance(values, pa.Array) else _array(values, field))
    return arrays


def merges(blocks: Iterable[Block]) -> list[MergeRow]:
    """Return what blocks say of people shown to be one, as rows of the lake table `merges`."""
    return [
        (
            merge.project,
            merge.absorbed,
            merge.surviving,
            block.partition,
            block.number,
            merge.row,
            merge.event_time_ms,
            block.server_upload_ms,
        )
        for block in blocks
        for merge in block.merges
    ]


def _array(values: Sequence[Any] | np.ndarray[Any, Any] | Repeated, field: pa.Field) -> pa.Array:
    if isinstance(values, Repeated):
        return _array(values.values, field).take(pa.array(values.index))
    if field.name in JSON_COLUMNS:
        return _json(list(values))
    try:
        return pa.array(values, field.type)
    except OverflowError:
        low, high = _INT64
        return pa.array([one and min(max(one, low), high) for one in values], field.type)


def _json(values: Sequence[Raw | bytes]) -> pa.Array:
    """Lay JSON texts into one buffer without making a string of each; an empty one is null."""
    sizes = np.fromiter(map(len, values), np.int64, len(values))
    ends = np.zeros(len(values) + 1, np.int32)
    np.cumsum(sizes, out=ends[1:])
    there = np.packbits(sizes > 0, bitorder="little")
    data = b"".join(values)
    buffers = [pa.py_buffer(there), pa.py_buffer(ends), pa.py_buffer(data)]
    array = pa.Array.from_buffers(pa.string(), len(values), buffers)
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        texts = [bytes(one).decode(errors="replace") if one else None for one in values]
        return pa.array(texts, pa.string())
    return array
