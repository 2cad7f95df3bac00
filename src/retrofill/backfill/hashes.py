"""Hashes of whole columns of ids: 63 bits, the same for the same text wherever it stands, 0 for none.

Ids of one length are hashed together, eight bytes a step, so that a column costs a few operations on arrays and not a call
for each row. They are made for telling ids apart, and keep nobody from making two that are equal on purpose.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
import xxhash
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from retrofill.backfill.people import Ints
from retrofill.backfill.texts import flat

DEVICE: Final = 1  # seeds, so that a device and a user of the same name differ
USER: Final = 2
INSERT: Final = 3

_WORD = 8
TOGETHER = 64  # bytes up to which ids of one length are hashed together
_FIRST = 0x9E3779B97F4A7C15
_TIMES = np.uint64(0xFF51AFD7ED558CCD)
_AGAIN = np.uint64(0xC4CEB9FE1A85EC53)
_HALF = np.uint64(32)
_TOP = np.uint64(29)

_Words = NDArray[np.uint64]


def of(texts: pa.StringArray, *, seed: int) -> Ints:
    """Return the hash of each text, 0 for one that is empty or not there."""
    data, ends = flat(texts)
    sizes = np.diff(ends, prepend=0)
    if texts.null_count:  # what is not there may still have a size
        sizes[texts.is_null().to_numpy(zero_copy_only=False)] = 0
    found = np.zeros(len(sizes), np.uint64)
    for size in _distinct(sizes):
        if size == 0:
            continue
        rows = np.flatnonzero(sizes == size)
        starts = ends[rows] - size
        if size > TOGETHER:
            parts = (data[start : start + size] for start in starts.tolist())
            longer = (xxhash.xxh3_64_intdigest(part, seed) for part in parts)
            found[rows] = np.fromiter(longer, np.uint64, len(rows))
        else:
            found[rows] = _together(data, starts, size, seed)
    return _positive(found)


def both(first: Ints, second: Ints) -> Ints:
    """Return a hash of two hashes, 0 where the second is."""
    mixed = _mixed(_mixed(first.astype(np.uint64)) ^ second.astype(np.uint64))
    return np.where(second == 0, 0, _positive(mixed))


def _distinct(sizes: Ints) -> list[int]:
    if len(sizes) == 0:
        return []
    low, high = int(sizes.min()), int(sizes.max())
    return [low] if low == high else np.unique(sizes).tolist()


def _together(data: memoryview, starts: Ints, size: int, seed: int) -> _Words:
    """Hash ids of one length. Each step mixes in a word, so that no two differences cancel out by being at the same place."""
    text = np.frombuffer(data, np.uint8)
    padded = np.zeros((len(starts), -(-size // _WORD) * _WORD), np.uint8)
    if len(starts) * size == len(text):  # nothing else is there
        padded[:, :size] = text.reshape(-1, size)
    else:
        padded[:, :size] = sliding_window_view(text, size)[starts]
    words = padded.view("<u8")
    start = (_FIRST * (seed * 128 + size)) & (2**64 - 1)
    found = np.full(len(starts), start, np.uint64)
    for at in range(words.shape[1]):
        found = _mixed(found ^ words[:, at])
    return found


def _mixed(words: _Words) -> _Words:
    """Spread each bit over all others: the finishing of MurmurHash3, with its two constants."""
    words = (words ^ (words >> _HALF)) * _TIMES
    words = (words ^ (words >> _TOP)) * _AGAIN
    return words ^ (words >> _HALF)


def _positive(words: _Words) -> Ints:
    """Return 63 bits, where only what was 0 is."""
    return np.where(words == 0, 0, np.maximum(words >> np.uint64(1), 1)).astype(np.int64)
