"""Where the ids and the type of an event stand in its text, so that they need not be kept beside it.

Four texts of a row (NAMES) are known by a place in it and a size, 16 bits each: two whole numbers a row. Rows whose texts are written
with escapes, or stand far behind, have them in columns of their own; there the size of each is 0.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from retrofill.backfill.layout import BITS
from retrofill.backfill.people import Ints
from retrofill.backfill.texts import pieces

NAMES: Final = ("device_id", "user_id", "insert_id", "event_type")
PLACE_MAX: Final = (1 << BITS) - 4096  # leaves room for what is put before a text
PLACES, SIZES = "places", "sizes"  # columns


def parted(numbers: Ints) -> NDArray[np.uint16]:
    """Return what four numbers stand in each, a row each."""
    return (
        np.ascontiguousarray(numbers).astype("<i8", copy=False).view("<u2").reshape(-1, len(NAMES))
    )


def moved(places: Ints, sizes: Ints, by: int) -> Ints:
    """Return places in texts that have become longer in front by so many bytes."""
    found = parted(places) + np.where(parted(sizes) > 0, np.uint16(by), np.uint16(0))
    return np.asarray(found.astype("<u2").reshape(-1).view("<i8"), np.int64)


def spelled(
    name: str, own: pa.StringArray, texts: pa.StringArray, places: Ints, sizes: Ints
) -> pa.StringArray:
    """Return one of the texts of each row, null where it has none. own: of the rows that have it in a column."""
    role = NAMES.index(name)
    size = parted(sizes)[:, role].astype(np.int64)
    if not size.any():
        return own
    _valid, offsets, data = texts.buffers()
    edges = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts)]
    starts = edges.astype(np.int64) + parted(places)[:, role]
    found = pieces(memoryview(data).cast("B"), starts, size)
    return found if own.null_count == len(own) else pc.coalesce(own, found)
