"""What the machine does itself: loops over bytes, compiled by Numba (see `native`).

`look` says of each row whether it is an event as it stands, and what is found on the way: see `scan`, which knows what is asked.
It reads JSON in its strict form, each byte once. A place is -1 where something is odd. Each row ends in a brace and a newline, and
whatever is read stops at a byte of another kind, so that nothing is read beyond its row. `copy` lays texts: see `laid`.

Functions here are made for Numba: numbers and arrays alone, no keywords, no exceptions. None makes or keeps an array. Numba would
count who holds those that are given, at each call, and with steps that no other processor may see half done: three quarters of the
time of a look. So it is told to do without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numba
import numpy as np
from numpy.typing import NDArray

from retrofill.backfill import wide
from retrofill.backfill.layout import (
    BITS,
    BYTES,
    DEEP_MAX,
    DEVICE,
    HASH,
    ID_BYTES_MAX,
    ID_LENGTH_MIN,
    INSERT,
    KNOWN,
    LATEST_MS,
    LEVELS_MAX,
    MOMENT,
    NEEDED,
    PLACE_MAX,
    PLACES,
    SIZES,
    START,
    STRING_BYTES_MAX,
    TEXT,
    TIME,
    TYPE,
    TYPE_BYTES_MAX,
    USER,
    WHOLE,
    WIDE,
)
from retrofill.backfill.people import Ints

Bytes = NDArray[np.uint8]
Bools = NDArray[np.bool_]

OPTIONS: Final[dict[str, Any]] = {"forceinline": True, "_nrt": False}
_WORD: Final = 8
_DIGITS_MAX: Final = 18  # of a number that surely fits into 64 bits
_QUOTE, _BACKSLASH, _COMMA, _COLON, _NEWLINE, _POINT, _MINUS = b'"\\,:\n.-'
_OPEN, _CLOSE, _OPEN_ARRAY, _CLOSE_ARRAY = b"{}[]"
_SPACE, _TAB, _RETURN, _ZERO, _NINE, _LARGE_A, _LARGE_Z = b" \t\r09AZ"
_A, _B, _E, _F, _L, _N, _R, _S, _T, _U, _LARGE_E = b"abeflnrstuE"
_TO_SMALL = 32  # from a large letter


def _part(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function a part of those that are called from outside."""
    made: Callable[..., Any] = numba.njit(**OPTIONS)(function)
    return made


@_part
def _blank(data: Bytes, at: int) -> int:
    """Return the place behind white space."""
    while data[at] <= _SPACE and (data[at] == _SPACE or data[at] == _TAB or data[at] == _RETURN):
        at += 1
    return at


@_part
def _simple(byte: int) -> bool:
    """Say whether a letter behind a backslash is one that every writer of JSON writes."""
    return byte == _N or byte == _T or byte == _R or byte == _B or byte == _F


@_part
def _stop(data: Bytes, at: int) -> int:
    """Return the place of the next quote, backslash or control character."""
    while at + WIDE <= len(data):
        mask = wide.ends_string(data, at)
        if mask:
            return at + wide.lowest(mask)
        at += WIDE
    while data[at] != _QUOTE and data[at] != _BACKSLASH and data[at] >= _SPACE:
        at += 1
    return at


@_part
def _string(data: Bytes, at: int, size_max: int) -> int:
    """Return the place behind a string that has only escapes which every writer of JSON writes so. at: behind its first quote."""
    start = at
    while True:
        at = _stop(data, at)
        byte = data[at]
        if byte == _QUOTE:
            return at + 1 if at - start <= size_max else -1
        if byte < _SPACE:
            return -1
        byte = data[at + 1]
        if not (byte == _QUOTE or byte == _BACKSLASH or _simple(byte)):
            return -1
        at += 2


@_part
def _plain(data: Bytes, at: int) -> int:
    """Return the place behind a string that has no escapes. at: behind its first quote."""
    at = _stop(data, at)
    return at + 1 if data[at] == _QUOTE else -1


@_part
def _digits(data: Bytes, at: int) -> int:
    """Return the place behind digits that surely fit into 64 bits."""
    first = at
    if at + WIDE <= len(data):
        mask = wide.ends_digits(data, at)
        at += wide.lowest(mask) if mask else WIDE
    else:
        while _ZERO <= data[at] <= _NINE:
            at += 1
    return at if 0 < at - first <= _DIGITS_MAX else -1


@_part
def _whole(data: Bytes, at: int) -> int:
    """Return the place behind a whole number, whatever follows."""
    if data[at] == _MINUS:
        at += 1
    if data[at] == _ZERO:
        return at + 1
    return _digits(data, at)


@_part
def _number(data: Bytes, at: int) -> int:
    """Return the place behind a number without an exponent."""
    at = _whole(data, at)
    if at > 0 and data[at] == _POINT:
        at = _digits(data, at + 1)
    return at


@_part
def _word(data: Bytes, at: int) -> int:
    """Return the place behind true, false or null."""
    if data[at] == _T and data[at + 1] == _R and data[at + 2] == _U and data[at + 3] == _E:
        return at + 4
    if data[at] == _N and data[at + 1] == _U and data[at + 2] == _L and data[at + 3] == _L:
        return at + 4
    if data[at] == _F and data[at + 1] == _A and data[at + 2] == _L and data[at + 3] == _S:
        return at + 5 if data[at + 4] == _E else -1
    return -1


@_part
def _object(data: Bytes, at: int, size_max: int, depth_max: int) -> int:
    """Return the place behind an object that holds something. at: of its opening brace."""
    if data[at + 1] == _CLOSE or data[at + 1] <= _SPACE:
        return -1
    inside = np.uint64(
        1
    )  # a bit for each level, set where it is an object; the lowest is the innermost
    levels, opened = 1, 1
    key, empty = True, False  # whether a key comes next, and whether it may close at once
    at += 1
    while True:
        at = _blank(data, at)
        if key and data[at] == _QUOTE:
            at = _string(data, at + 1, size_max)
            if at < 0:
                return -1
            at = _blank(data, at)
            if data[at] != _COLON:
                return -1
            at = _blank(data, at + 1)
            key = empty = False
        if key or (empty and data[at] == _CLOSE_ARRAY):
            if not empty:
                return -1
        elif data[at] == _OPEN or data[at] == _OPEN_ARRAY:
            levels += 1
            opened += 1
            if opened > depth_max or levels > LEVELS_MAX:
                return -1
            key, empty = data[at] == _OPEN, True
            inside = (inside << np.uint64(1)) | np.uint64(key)
            at += 1
            continue
        elif data[at] == _QUOTE:
            at = _string(data, at + 1, size_max)
        elif data[at] == _MINUS or _ZERO <= data[at] <= _NINE:
            at = _number(data, at)
        else:
            at = _word(data, at)
        if at < 0:
            return -1
        at = _blank(data, at)
        while data[at] == (_CLOSE if inside & np.uint64(1) else _CLOSE_ARRAY):
            levels -= 1
            if levels == 0:
                return at + 1
            inside >>= np.uint64(1)
            key = False
            at = _blank(data, at + 1)
        if key or data[at] != _COMMA:
            return -1
        key, empty = bool(inside & np.uint64(1)), False
        at += 1


@_part
def _same(data: Bytes, at: int, names: Bytes, start: int, size: int) -> bool:
    """Say whether so many bytes are the same at both places."""
    if size < WIDE and at + WIDE <= len(data):
        wanted = (np.uint32(1) << np.uint32(size)) - np.uint32(1)
        return wide.same(data, at, names, start) & wanted == wanted
    place = 0
    while place < size and data[at + place] == names[start + place]:
        place += 1
    return place == size


@_part
def _name(data: Bytes, at: int, end: int, names: Bytes, ends: Ints, likely: int) -> int:
    """Return which name a key has, -1 for none. at: behind its opening quote. end: of the row. likely: looked at first."""
    for look in range(-1, len(ends)):
        name = likely if look < 0 else look
        start = ends[name - 1] if name else 0
        size = ends[name] - start
        if at + size < end and data[at + size] == _QUOTE and _same(data, at, names, start, size):
            return name
    return -1


@_part
def _value(data: Bytes, at: int, end: int) -> int:
    """Return a whole number."""
    value = 0
    for place in range(at + (data[at] == _MINUS), end):
        value = value * 10 + data[place] - _ZERO
    return -value if data[at] == _MINUS else value


@_part
def _behind(data: Bytes, at: int, kind: int, rules: Ints) -> int:
    """Return the place behind a member's value."""
    if kind == TEXT:
        return _string(data, at + 1, rules[STRING_BYTES_MAX]) if data[at] == _QUOTE else -1
    if kind == WHOLE:
        return _whole(data, at)
    if data[at] != _OPEN:
        return -1
    return _object(data, at, rules[STRING_BYTES_MAX], rules[DEEP_MAX])


@_part
def _row(
    data: Bytes,
    at: int,
    end: int,
    names: Bytes,
    name_ends: Ints,
    kinds: Ints,
    roles: Ints,
    usual: Ints,
    rules: Ints,
    known: Ints,
) -> int:
    """Return the time of a row whose members are as they must be, else -1. at: of its opening brace. end: of the row.

    usual: see `_look`. known: gets what is known of its texts.
    """
    seen, count, time = 0, 0, -1
    while True:
        at = _blank(data, at + 1)
        if data[at] != _QUOTE:
            return -1
        name = _name(data, at + 1, end, names, name_ends, usual[count])
        if name < 0 or (seen >> name) & 1:
            return -1
        usual[count] = name
        count += 1
        seen |= 1 << name
        at = _blank(data, at + name_ends[name] - (name_ends[name - 1] if name else 0) + 2)
        if data[at] != _COLON:
            return -1
        first = _blank(data, at + 1)
        role = roles[name]
        if 0 <= role < MOMENT and data[first] == _QUOTE:
            at = _plain(data, first + 1)
            known[START + role] = first + 1
            known[BYTES + role] = at - first - 2
        else:
            at = _behind(data, first, kinds[name], rules)
        if at < 0:
            return -1
        if role == MOMENT:
            time = _value(data, first, at)
        at = _blank(data, at)
        if data[at] != _COMMA:
            return time if at == end - 2 and seen & rules[NEEDED] == rules[NEEDED] else -1


@_part
def _among(data: Bytes, at: int, size: int, words: Bytes, ends: Ints) -> bool:
    """Say whether a text is one of the words, which are in small letters, in whatever letters."""
    start = 0
    for end in ends:
        if end - start == size:
            place = 0
            while place < size:
                byte = data[at + place]
                if _LARGE_A <= byte <= _LARGE_Z:
                    byte += _TO_SMALL
                if byte != words[start + place]:
                    break
                place += 1
            if place == size:
                return True
        start = end
    return False


@_part
def _mixed(word: Any) -> Any:
    word = (word ^ (word >> np.uint64(32))) * np.uint64(0xFF51AFD7ED558CCD)
    word = (word ^ (word >> np.uint64(29))) * np.uint64(0xC4CEB9FE1A85EC53)
    return word ^ (word >> np.uint64(32))


@_part
def _hash(data: Bytes, start: int, size: int, seed: int) -> int:
    """Return the hash of an id, as `hashes` makes it."""
    found = np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed * 128 + size)
    for at in range(start, start + size, _WORD):
        left = start + size - at
        if at + _WORD <= len(data):
            word = wide.word(data, at)
            if left < _WORD:
                word &= (np.uint64(1) << np.uint64(8 * left)) - np.uint64(1)
        else:
            word = np.uint64(0)
            for place in range(left):
                word |= np.uint64(data[at + place]) << np.uint64(8 * place)
        found = _mixed(found ^ word)
    return max(np.int64(found >> np.uint64(1)), np.int64(found != np.uint64(0)))  # type: ignore[return-value]  # an int64


@_part
def _characters(data: Bytes, at: int, size: int) -> int:
    """Return how many characters a text has."""
    count = 0
    for place in range(at, at + size):
        count += (data[place] & 0xC0) != 0x80  # not a character's second byte
    return count


@_part
def _good(data: Bytes, role: int, at: int, size: int, rules: Ints) -> bool:
    """Say whether a text is good in its role, if it is none of the words."""
    if role == TYPE:
        return size > 0 and size <= rules[TYPE_BYTES_MAX]
    if size == 0 or size > rules[ID_BYTES_MAX]:
        return False
    if role == INSERT:
        return True
    long = size >= 4 * rules[ID_LENGTH_MIN] or _characters(data, at, size) >= rules[ID_LENGTH_MIN]
    return long and data[at] > _SPACE


def look(
    data: Bytes,
    ends: Ints,
    names: Bytes,
    name_ends: Ints,
    kinds: Ints,
    roles: Ints,
    words: Bytes,
    word_ends: Ints,
    rules: Ints,
    usual: Ints,
    known: Ints,
    good: Bools,
    found: Ints,
) -> None:
    """Look at rows. ends: of each. good, found: get a row each.

    usual: which member stood at each place in the row before. known: room for what is known of a row's texts.
    """
    end = 0
    for row in range(len(ends)):
        start, end = end, ends[row]
        if end - start < 3 or data[start] != _OPEN:
            continue
        if data[end - 2] != _CLOSE or data[end - 1] != _NEWLINE:
            continue
        for at in range(KNOWN):
            known[at] = 0
        time = _row(data, start, end, names, name_ends, kinds, roles, usual, rules, known)
        fine = 0 <= time <= rules[LATEST_MS]
        for role in range(MOMENT if fine else 0):
            at, size = known[START + role], known[BYTES + role]
            if not at:
                continue
            among = role != INSERT and _among(data, at, size, words, word_ends)
            if among or not _good(data, role, at, size, rules):
                fine = False
            else:
                found[HASH + role, row] = _hash(data, at, size, role + 1)
            fine &= at - start <= rules[PLACE_MAX]
            found[PLACES, row] |= (at - start) << (BITS * role)
            found[SIZES, row] |= size << (BITS * role)
        found[TIME, row] = time
        someone = found[HASH + DEVICE, row] | found[HASH + USER, row]
        good[row] = fine and someone != 0


def copy(memory: Bytes, begins: Ints, sizes: Ints, lead: Bytes, to: Bytes, places: Ints) -> None:
    """Copy texts to their places, each behind the lead. begins: in memory; places: in `to`."""
    # Numbers without a sign: else each index might count from the end, which is looked at for every byte, 7 times as slow.
    for row in range(len(begins)):
        place, begin = np.uint64(places[row]), np.uint64(begins[row])
        for at in range(np.uint64(len(lead))):
            to[place + at] = lead[at]
        place += np.uint64(len(lead))
        for at in range(np.uint64(sizes[row])):
            to[place + at] = memory[begin + at]
