"""Rows as the JSON lines of the Export API, a chunk at a time and without any Python for a row.

Arrow joins the texts of a row's keys, column by column. Each text is made where that is quickest: words of a column
that repeats itself once for each different one; times by looking up their parts in numpy; properties not at all, they
pass as the JSON text they were sent as. The lines of a chunk are one Arrow column, whose buffer is already the bytes
to compress. DuckDB can join texts too; it took three times the processor time and ten times the memory.
Source: contract, read 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrofill.core.block import Flag
from retrofill.core.row import EXPORT_KEYS
from retrofill.lake import arrow
from retrofill.limits import EXPORT_CHUNK_BYTES, EXPORT_CHUNK_ROWS, MS_PER_DAY, MS_PER_S

# What a line is made of. Left out: what was sent, and the kind (always an event's).
_LEFT_OUT = {"sent", "kind", "said", "sent_groups", "updates_max", "merges_max"}
COLUMNS = tuple(name for name in arrow.SCHEMA.names if name not in _LEFT_OUT)
# `core.row` makes a row's uuid and event_id of this text.
HASH_SQL = "md5(concat(project, '/', partition, '/', block, '/', row))"
_TIMES = (
    "client_event_time",
    "client_upload_time",
    "event_time",
    "server_received_time",
    "server_upload_time",
    "created_time",
)
_OBJECTS = ("event_properties", "user_properties", "groups", "group_properties", "plan")
_UNLIKE = ("user_id", "device_id", "insert_id")  # texts that seldom repeat themselves
_WORDS = tuple(
    name
    for name in COLUMNS
    if arrow.SCHEMA.field(name).type == pa.string()
    and name not in (*_OBJECTS, *_UNLIKE, "attribution_ids")
)
_DICTIONARY = pa.dictionary(pa.int32(), pa.string())
# Rows whose words are JSON already, with their hash.
WORDED = pa.schema(
    [
        *(
            pa.field(name, _DICTIONARY) if name in _WORDS else arrow.SCHEMA.field(name)
            for name in COLUMNS
        ),
        ("hash", pa.string()),
    ]
)
_NULL = pa.array(["null"])
_PLAIN = np.ones(256, bool)  # bytes that stand in a JSON string as they are
_PLAIN[:0x20] = _PLAIN[ord('"')] = _PLAIN[ord("\\")] = False

_encode = msgspec.json.Encoder().encode


def text_of(rows: pa.Table) -> bytes:
    """Return rows as lines, in the order given."""
    return b"".join(map(lines, chunks(worded(rows))))


def chunks(table: pa.Table) -> Iterator[pa.RecordBatch]:
    """Cut a worded table for `lines`."""
    for chunk in table.to_batches(max_chunksize=EXPORT_CHUNK_ROWS):
        rows = len(chunk)
        step = max(1, rows * EXPORT_CHUNK_BYTES // max(chunk.nbytes, EXPORT_CHUNK_BYTES))
        for at in range(0, rows, step):
            yield chunk.slice(at, step)


def lines(chunk: pa.RecordBatch) -> memoryview:
    """Return a chunk of worded rows as lines, in the order given, each ending with a newline."""
    return _bytes_of(_line(dict(zip(WORDED.names, chunk.columns, strict=True))))


def _bytes_of(column: pa.Array) -> memoryview:
    """Return all the text of a string column: one piece of its buffer."""
    _, offsets, data = column.buffers()
    if data is None:
        return memoryview(b"")
    ends = np.frombuffer(offsets, np.int32)
    return memoryview(data)[int(ends[column.offset]) : int(ends[column.offset + len(column)])]


# Texts made in Arrow and numpy.


def worded(table: pa.Table) -> pa.Table:
    """Return rows as `WORDED`: COLUMNS alone, each word as JSON, `hash` made if it is not there."""
    columns = [
        _word(table[name].combine_chunks(), name) if name in _WORDS else table[name]
        for name in COLUMNS
    ]
    known = "hash" in table.column_names
    return pa.Table.from_arrays(
        [*columns, table["hash"] if known else _hashes(table)], schema=WORDED
    )


def _hashes(table: pa.Table) -> pa.Array:
    """Return the text of HASH_SQL."""
    place = zip(
        *(table[name].to_pylist() for name in ("project", "partition", "block", "row")), strict=True
    )
    texts = (b"%d/%d/%d/%d" % one for one in place)
    return pa.array(
        [hashlib.md5(text, usedforsecurity=False).hexdigest() for text in texts], pa.string()
    )


def _word(texts: pa.Array, name: str) -> pa.Array:
    """Return words as JSON, each different one made once; null is one of them."""
    found = texts.dictionary_encode()
    words = _paying(found.dictionary) if name == "paying" else _quoted(found.dictionary)
    words = pa.concat_arrays([words, _NULL])
    return pa.DictionaryArray.from_arrays(found.indices.fill_null(len(words) - 1), words)


def _paying(texts: pa.Array) -> pa.Array:
    """Typed readers take `paying` as a boolean. Source: contract, read 2 and 8."""
    bools = {"true": "true", "false": "false"}
    known = [bools.get(one.lower(), _encode(one).decode()) for one in texts.to_pylist()]
    return pa.array(known, pa.string())


def _quoted(texts: pa.Array) -> pa.Array:
    """Return texts as JSON, null as null."""
    if _PLAIN[np.frombuffer(_bytes_of(texts), np.uint8)].all():
        quoted = pc.binary_join_element_wise('"', texts, '"', "")
    else:
        known = (None if one is None else _encode(one).decode() for one in texts.to_pylist())
        quoted = pa.array(known, pa.string())
    return quoted.fill_null("null") if quoted.null_count else quoted


_SECONDS = np.array(
    [b"%02d:%02d:%02d." % (at // 3600, at // 60 % 60, at % 60) for at in range(86_400)]
)
_FRACTIONS = np.array([b'%03d000"' % at for at in range(1000)])
_TIME = np.dtype([("day", "S12"), ("second", "S9"), ("fraction", "S7")])


def _time(times: pa.Array) -> pa.Array:
    """Return ms since the epoch as quoted `YYYY-MM-DD HH:MM:SS.ffffff`, null as null."""
    days, inside = np.divmod(times.fill_null(0).to_numpy(), MS_PER_DAY)
    known, at = np.unique(days, return_inverse=True)
    names = np.array([b'"%s ' % str(day).encode() for day in known.astype("datetime64[D]")], "S12")
    text = np.empty(len(times), _TIME)
    text["day"] = names[at]
    text["second"] = _SECONDS[inside // MS_PER_S]
    text["fraction"] = _FRACTIONS[inside % MS_PER_S]
    spoken = _fixed(text, _TIME.itemsize)
    return pc.if_else(times.is_valid(), spoken, "null") if times.null_count else spoken


# A row's own identifiers.

_HEX = np.zeros(256, np.int64)
_HEX[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_UUID = np.frombuffer(b'"........-....-4...-8...-............"', np.uint8)
# Where the digits of the hash stand in a uuid; those that are not used make way for version and variant.
_UUID_AT = [*range(1, 9), *range(10, 14), *range(16, 19), *range(21, 24), *range(25, 37)]
_UUID_OF = [*range(12), *range(13, 16), *range(17, 20), *range(20, 32)]
_EVENT_ID_DIGITS = 7


def _digits(hashes: pa.Array) -> Any:
    """Return the hashes as a table of bytes, a line each."""
    return np.frombuffer(_bytes_of(hashes), np.uint8).reshape(len(hashes), 32)


def _uuid(hashes: pa.Array) -> pa.Array:
    """As `core.row.uuid_of`."""
    text = np.tile(_UUID, (len(hashes), 1))
    text[:, _UUID_AT] = _digits(hashes)[:, _UUID_OF]
    return _fixed(text, len(_UUID))


def _event_id(sent: pa.Array, hashes: pa.Array) -> pa.Array:
    """As sent, or as `core.row.event_id_of`."""
    if sent.null_count:
        scale = 16 ** np.arange(_EVENT_ID_DIGITS - 1, -1, -1)
        made = _HEX[_digits(hashes)[:, :_EVENT_ID_DIGITS]] @ scale + 1
        sent = pc.coalesce(sent, pa.array(made))
    return sent.cast(pa.string())


def _fixed(text: np.ndarray[Any, Any], width: int) -> pa.Array:
    """Return texts of one width as an Arrow column."""
    ends = np.arange(len(text) + 1, dtype=np.int32) * width
    return pa.Array.from_buffers(
        pa.string(), len(text), [None, pa.py_buffer(ends), pa.py_buffer(text)]
    )


# What a key shows.

Columns = dict[str, pa.Array]


def _number(numbers: pa.Array) -> pa.Array | str:
    return (
        "null"
        if numbers.null_count == len(numbers)
        else numbers.cast(pa.string()).fill_null("null")
    )


def _object(texts: pa.Array) -> pa.Array:
    """JSON text may have been sent with line breaks, always between its tokens."""
    data = np.frombuffer(_bytes_of(texts), np.uint8)
    for code in b"\n\r":
        if (data == code).any():
            texts = pc.replace_substring(texts, chr(code), " ")
    return texts.fill_null("{}")


_VERDICTS = int(Flag.FIRST_EVENT | Flag.SKIP)


def _data(columns: Columns) -> pa.Array:
    """The key `data`: made once for each different one."""
    path, groups = columns["path"], columns["groups"].fill_null("{}").dictionary_encode()
    verdicts = columns["flags"].to_numpy() & _VERDICTS
    key = (
        groups.indices.to_numpy().astype(np.int64) * len(path.dictionary) + path.indices.to_numpy()
    )
    found, at = np.unique(key * (_VERDICTS + 1) + verdicts, return_inverse=True)
    project = columns["project"][0].as_py()
    texts = []
    for one in found.tolist():
        place, verdict = divmod(one, _VERDICTS + 1)
        group, word = divmod(place, len(path.dictionary))
        named = (groups.dictionary[group].as_py(), path.dictionary[word].as_py())
        texts.append(_one_data(project, *named, verdict))
    return pa.array(texts, pa.string()).take(pa.array(at))


def _one_data(project: int, groups: str, path: str, verdict: int) -> str:
    ids = {} if groups == "{}" else _group_ids(project, msgspec.json.decode(groups))
    first = '"first_event":true,' if verdict & Flag.FIRST_EVENT else ""
    updated = "" if verdict & Flag.SKIP else ',"user_properties_updated":true'
    shown = _encode(ids).decode()
    return f'{{{first}"group_first_event":{{}},"group_ids":{shown},"path":{path}{updated}}}'


def _group_ids(project: int, groups: dict[str, list[str]]) -> dict[str, list[int]]:
    """Types and values have no numbers of ours: they are made from their names, the same in each row of a project."""
    return {
        str(_number_of(6, project, name)): [
            _number_of(12, project, name, value) for value in values
        ]
        for name, values in groups.items()
    }


def _number_of(digits: int, *names: object) -> int:
    text = "/".join(map(str, names)).encode()
    return int(hashlib.md5(text, usedforsecurity=False).hexdigest()[:digits], 16)


def _of(show: Callable[[pa.Array], pa.Array], name: str) -> Callable[[Columns], pa.Array]:
    return lambda has: show(has[name])


# Keys whose value is not the text column of the same name.
_VALUES: dict[str, Callable[[Columns], pa.Array | str]] = {
    **dict.fromkeys(
        (
            "$insert_key",
            "$schema",
            "adid",
            "amplitude_event_type",
            "global_user_properties",
            "idfa",
            "is_attribution_event",
            "sample_rate",
            "source_id",
        ),
        lambda _: "null",
    ),
    "$insert_id": lambda has: _quoted(has["insert_id"]),
    "amplitude_attribution_ids": lambda has: has["attribution_ids"].fill_null("null"),
    "amplitude_id": lambda has: _number(has["amplitude_id"]),
    "app": lambda has: str(has["project"][0]),
    "data": _data,
    "data_type": lambda _: '"event"',
    "device_carrier": lambda has: has["carrier"],
    "device_id": lambda has: _quoted(has["device_id"]),
    "event_id": lambda has: _event_id(has["event_id"], has["hash"]),
    "location_lat": lambda has: _number(has["location_lat"]),
    "location_lng": lambda has: _number(has["location_lng"]),
    "session_id": lambda has: _number(has["session_id"]),
    "user_creation_time": lambda has: _time(has["created_time"]),
    "user_id": lambda has: _quoted(has["user_id"]),
    "uuid": lambda has: _uuid(has["hash"]),
    **{name: _of(_time, name) for name in _TIMES},
    **{name: _of(_object, name) for name in _OBJECTS},
}


def _line(columns: Columns) -> pa.Array:
    """Return the lines of a chunk: fixed text joined once, values between."""
    fixed, parts = "{", []
    made: dict[str, pa.Array | str] = {}
    for index, key in enumerate(sorted(EXPORT_KEYS)):
        fixed += f'{"," if index else ""}"{key}":'
        source = "server_upload_time" if key == "processed_time" else key
        if source not in made:
            made[source] = _VALUES[source](columns) if source in _VALUES else columns[source]
        value = made[source]
        if isinstance(value, str):
            fixed += value
        else:
            plain = value.dictionary_decode() if pa.types.is_dictionary(value.type) else value
            parts += [fixed, plain]
            fixed = ""
    marks = _marks(columns["import_id"])
    return pc.binary_join_element_wise(*parts, fixed, *marks, "}\n", "")


def _marks(imports: pa.DictionaryArray) -> list[pa.Array]:
    """Return what marks an import's rows, beyond the keys that Amplitude has: nothing where all rows are live."""
    words = imports.dictionary.to_pylist()
    if all(one == "null" for one in words):
        return []
    texts = [
        ""
        if one == "null"
        else f',"ingestion_metadata":{{"source_name":"retrofill","source_version":{one}}}'
        for one in words
    ]
    return [pa.DictionaryArray.from_arrays(imports.indices, texts).dictionary_decode()]
