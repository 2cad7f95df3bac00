"""Columns of texts as Arrow holds them: one run of bytes, and where each text ends in it."""

from __future__ import annotations

import re

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrofill.backfill.people import Ints


def flat(texts: pa.StringArray) -> tuple[memoryview, Ints]:
    """Return all texts in one, as they lie there, and where each ends in it."""
    _valid, offsets, data = texts.buffers()
    if data is None:
        return memoryview(b""), np.zeros(len(texts), np.int64)
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    whole = memoryview(data)[int(ends[0]) : int(ends[-1])].cast("B")
    return whole, ends[1:].astype(np.int64) - int(ends[0])


def less(texts: pa.StringArray, *, front: int, back: int) -> pa.StringArray:
    """Return the texts without so many of their first and last bytes, which are no part of a character."""
    _valid, offsets, data = texts.buffers()
    edges = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    cut = np.zeros(2 * len(texts) + 1, np.int32)
    cut[:-1:2], cut[1::2] = edges[:-1] + front, edges[1:] - back
    cut[-1] = edges[-1]
    both = pa.StringArray.from_buffers(len(cut) - 1, pa.py_buffer(cut), data)
    return both.take(pa.array(np.arange(0, len(cut) - 1, 2)))


def pieces(data: memoryview, starts: Ints, sizes: Ints) -> pa.StringArray:
    """Return pieces of some bytes, null where the size is 0."""
    edges = np.empty(2 * len(starts) + 1, np.int32)
    edges[:-1:2], edges[1::2] = starts, starts + sizes
    edges[-1] = len(data)
    every = pa.StringArray.from_buffers(len(edges) - 1, pa.py_buffer(edges), pa.py_buffer(data))
    return every.take(pa.array(np.arange(0, len(edges) - 1, 2), mask=sizes == 0))


def telling(json: pa.StringArray, name: str, begin: str = "") -> pa.BooleanArray:
    """Say which texts have a member of this name whose value begins so, in whatever object inside.

    White space may be between: events that stand as they are have that of their writer.
    """
    return pc.match_substring_regex(json, rf'"{re.escape(name)}"\s*:\s*{re.escape(begin)}')


def spoken(json: pa.StringArray) -> pa.StringArray:
    """Return the texts that strings of JSON stand for; of what is none, anything."""
    if pc.any(pc.match_substring(json, "\\")).as_py():
        found = [
            msgspec.json.decode(one) if one.startswith('"') else "" for one in json.to_pylist()
        ]
        return pa.array(found, pa.string())
    return pc.utf8_slice_codeunits(json, 1, -1)
