"""What may be odd in property objects, told from their bytes: all objects of a batch at once, a few operations on arrays.

The query (`compiled`) writes objects without white space between their parts, and some numbers otherwise than the source
does. Whoever passes an object on as it stands must find those first. A text may look like a number and be doubted; what
the query would write otherwise is always found.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Final

import numpy as np
from msgspec import Raw, Struct
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from retrofill.backfill.people import Ints
from retrofill.limits import DEPTH_MAX

_SPACE, _ZERO, _MINUS, _POINT, _EXPONENT, _OPEN, _CLOSE = 32, 48, 45, 0x2E, 0x65, 0x7B, 0x7D


def _among(characters: bytes) -> NDArray[np.bool_]:
    found = np.zeros(256, np.bool_)
    found[list(characters)] = True
    return found


_OPENING: Final = _among(b"{[,:")  # white space behind these, or before those of _CLOSING, is spare
_CLOSING: Final = _among(b"}],:")
_BEFORE: Final = _among(b"[,: \t\r\n")  # what may stand before a number
_BEHIND: Final = _among(b"]}, \t\r\n")
_NOTHING: Final = (b"{}", b"null")
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_LOOKED_BACK = 40  # digits before a point, an exponent or the middle of a long number
_LONG = 19  # so many digits may be beyond 64 bits
_STEP = 6  # at every sixth place of them stands a digit, three times in a row
# A number of so many digits before and behind the point, without a nought at the end, is the shortest of its value.
_BEFORE_MAX, _BEHIND_MAX, _SMALL_MAX = 9, 6, 4

Bools = NDArray[np.bool_]


class Objects(Struct, frozen=True):
    """Objects of some rows, table after table. ends: of each in the text, those of size 0 are not there."""

    data: bytes
    ends: Ints
    sizes: Ints
    rows: int

    @property
    def text(self) -> NDArray[np.uint8]:
        """All bytes."""
        return np.frombuffer(self.data, np.uint8)

    def marked(self, places: Ints) -> Bools:
        """Say which rows hold these bytes."""
        found = np.zeros(self.rows, np.bool_)
        if len(places):
            found[np.searchsorted(self.ends, places, "right") % self.rows] = True
        return found


def together(tables: Sequence[Sequence[Raw]], rows: int) -> Objects:
    """Join the objects of all tables, each of which has one for every row."""
    every = list(chain.from_iterable(tables))
    sizes = np.fromiter(map(len, every), np.int64, len(every))
    return Objects(b"".join(every), np.cumsum(sizes), sizes, rows)


def empty(found: Objects) -> Ints:
    """Return the numbers, table after table, of those that hold nothing: {} and null."""
    small = np.flatnonzero((found.sizes == 2) | (found.sizes == 4))
    ends = found.ends[small].tolist()
    texts = (
        found.data[end - size : end]
        for end, size in zip(ends, found.sizes[small].tolist(), strict=True)
    )
    return small[np.fromiter((text in _NOTHING for text in texts), np.bool_, len(small))]


def none(found: Objects) -> Bools:
    """Say which rows have something that is no object."""
    there = np.flatnonzero(found.sizes)
    starts = (found.ends - found.sizes)[there]
    return found.marked(starts[found.text[starts] != _OPEN])


def spaced(found: Objects) -> Bools:
    """Say which rows have white space that could be left out, or perhaps a text that looks so."""
    text = found.text
    at = np.flatnonzero(text <= _SPACE)
    if len(at) == 0:
        return np.zeros(found.rows, np.bool_)
    after = text[np.minimum(at + 1, len(text) - 1)]
    return found.marked(at[_OPENING[text[at - 1]] | _CLOSING[after]])


def rewritten(found: Objects) -> Bools:
    """Say which rows have a number that the query writes otherwise, or one that may be beyond 64 bits."""
    data, text, digit = _digits(found)
    places = (
        *(_at_points(data, text, digit), _at_exponents(text, digit)),
        *(_at_minus(text, digit), _at_long(text, digit)),
    )
    return found.marked(np.concatenate(places))


def _digits(found: Objects) -> tuple[bytes, NDArray[np.uint8], Bools]:
    data = found.data.ljust(_LONG)
    text = np.frombuffer(data, np.uint8)
    return data, text, text - np.uint8(_ZERO) < np.uint8(10)


def shallow(found: Objects) -> bool:
    """Say whether surely none is nested too deeply."""
    opening = found.text | 0x20 == _OPEN  # { and [
    there = found.sizes > 0
    if int(np.count_nonzero(opening)) - int(np.count_nonzero(there)) < DEPTH_MAX:
        return True
    starts = (found.ends - found.sizes)[there]
    return bool(np.add.reduceat(opening, starts, dtype=np.int32).max() <= DEPTH_MAX)


def _at_points(data: bytes, text: NDArray[np.uint8], digit: Bools) -> Ints:
    at = np.flatnonzero(text == _POINT)
    at = at[digit[at - 1]]
    first, number = _begins(text, digit, at - 1)
    at, first = at[number], first[number]
    behind = text[np.minimum(at[:, None] + np.arange(1, _BEHIND_MAX + 3), len(text) - 1)]
    digits = behind - np.uint8(_ZERO) < np.uint8(10)
    count = np.argmin(digits, axis=1)  # 0 where all of them are, too
    each = np.arange(len(at))
    plain = (
        (count > 0)
        & (count <= _BEHIND_MAX)
        & (at - first <= _BEFORE_MAX)
        & _BEHIND[behind[each, count]]
        & ((behind[each, count - 1] != _ZERO) | (count == 1))
        & ((count <= _SMALL_MAX) | (text[first] != _ZERO))
    )
    doubtful = first[~plain]
    return np.asarray([one for one in doubtful.tolist() if not _kept(data, one)], np.int64)


def _at_exponents(text: NDArray[np.uint8], digit: Bools) -> Ints:
    at = np.flatnonzero(((text[1:] | np.uint8(0x20)) == _EXPONENT) & digit[:-1])
    first, number = _begins(text, digit, at)
    return first[number]


def _at_minus(text: NDArray[np.uint8], digit: Bools) -> Ints:
    at = np.flatnonzero((text[:-1] == _MINUS) & (text[1:] == _ZERO))
    at = at[~digit[np.minimum(at + 2, len(text) - 1)]]
    found: Ints = at[_BEFORE[text[at - 1]]]
    return found


def _at_long(text: NDArray[np.uint8], digit: Bools) -> Ints:
    some = digit[::_STEP]
    at = np.flatnonzero(some[2:] & some[1:-1] & some[:-2]) * _STEP
    first, number = _begins(text, digit, at)
    first = first[number]
    windows = sliding_window_view(digit, _LONG)
    return first[windows[np.minimum(first, len(windows) - 1)].all(axis=1)]


def _begins(text: NDArray[np.uint8], digit: Bools, at: Ints) -> tuple[Ints, Bools]:
    """Return where the digits begin that go up to some, and whether what begins there may be a number."""
    first = at.copy()
    going = np.flatnonzero(digit[first - 1])
    for _ in range(_LOOKED_BACK):
        if len(going) == 0:
            break
        first[going] -= 1
        going = going[digit[first[going] - 1]]
    before = text[first - 1]
    number = _BEFORE[before] | ((before == _MINUS) & _BEFORE[text[first - 2]])
    number[going] = True  # longer than is looked back over
    return first, number


def _kept(data: bytes, at: int) -> bool:
    """Say whether the query writes the number as it is whose digits begin there."""
    found = _NUMBER.match(data, at)
    if found is None or data[at - 1 : at].isdigit():
        return False
    number = found[0]
    if b"e" in number or b"E" in number:
        return False
    return b"." not in number or repr(float(number)).encode() == number
