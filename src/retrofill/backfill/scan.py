"""Rows that are events as they stand, told by one look at each byte.

A row passes if it is one JSON object on a line of its own, whose members are all named, each once and of its kind, an
event type, a time and an `insert_id` among them, with good ids and nothing that the core would mend: no null for a member,
no long text, no number near the end of 64 bits, no rare escape. What is found on the way is kept: ids, type and time of
each row, and the hashes of its ids, the same that `hashes` makes. Whatever is doubtful does not pass; it has ways of its own.

The look is a loop over bytes, which Numba compiles for this machine when it is first needed and then keeps beside this file
or in the user's cache: some seconds once, 0.4 CPU s of each start. So only sources that are worth it are looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import numba
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from retrofill.backfill import hashes, places, wide
from retrofill.backfill.people import Ints
from retrofill.backfill.wide import WIDE, WORD
from retrofill.core import event, glance
from retrofill.limits import DEPTH_MAX, STRING_CHARS_MAX, TIME_MS_MAX

Bytes = NDArray[np.uint8]
Bools = NDArray[np.bool_]

MEMBERS_MAX: Final = 62  # each has a bit
_KINDS: Final = {"text": 0, "millis": 1, "integer": 1, "object": 2}
_DEVICE, _USER, _INSERT, _TYPE, _MOMENT = range(
    5
)  # roles: of the texts in `places`, and that of the time
# What is found of a row: where its texts stand and how long they are (see `places`), the time, the hashes of its texts.
_PLACES, _SIZES, _TIME, _HASH, _COLUMNS = 0, 1, 2, 3, 7
# What is known of its texts meanwhile, one after the other: where they start and how many bytes they have.
_START, _BYTES, _KNOWN = 0, 4, 8
_DIGITS_MAX: Final = 18  # of a number that surely fits into 64 bits
_RULES: Final = 8
(
    _NEEDED,  # a bit for each member that every row has
    _STRING_BYTES_MAX,
    _TYPE_BYTES_MAX,
    _ID_BYTES_MAX,
    _ID_LENGTH_MIN,
    _DEPTH_MAX,
    _TIME_MS_MAX,
    _PLACE_MAX,
) = range(_RULES)
_BITS: Final = places.BITS
_LEVELS_MAX: Final = 62  # objects and arrays, one inside the other: each has a bit


class Found(Struct, frozen=True):
    """What a look has found. good: the rows that pass; the columns are theirs alone."""

    good: Bools
    places: Ints  # of the texts within the row, and their sizes: see `places`
    sizes: Ints
    time_ms: Ints
    device: Ints  # hashes of ids, 0 where there is none
    user: Ints
    insert: Ints
    kind: Ints  # of the event type


class Scanner:
    """Looks at rows of one mapping whose fields have the names of their columns."""

    def __init__(
        self, kinds: Mapping[str, str], *, needed: Collection[str], id_length_min: int
    ) -> None:
        """kinds: of each member, by name, MEMBERS_MAX at most. needed: which of them each row must have."""
        assert len(kinds) <= MEMBERS_MAX
        roles = {name: role for role, name in enumerate((*places.NAMES, "time"))}
        self._names = _joined(list(kinds))
        self._kinds = np.array([_KINDS[kind] for kind in kinds.values()], np.int64)
        self._roles = np.array([roles.get(name, -1) for name in kinds], np.int64)
        # Ids that are the mark of a mistake, and the event type that is stored as something else: neither may be the other.
        self._words = _joined([*{word.lower() for word in glance.FORBIDDEN_IDS}, event.EXPOSURE])
        self._rules = np.zeros(_RULES, np.int64)
        # Told each time: compiled code would keep the constants of other files as they were when it was compiled.
        self._rules[_NEEDED] = sum(1 << at for at, name in enumerate(kinds) if name in needed)
        self._rules[_STRING_BYTES_MAX] = STRING_CHARS_MAX
        self._rules[_TYPE_BYTES_MAX] = STRING_CHARS_MAX // 4
        self._rules[_ID_BYTES_MAX] = hashes.TOGETHER  # longer ones are hashed in another way
        self._rules[_ID_LENGTH_MIN] = id_length_min
        self._rules[_DEPTH_MAX] = min(DEPTH_MAX, _LEVELS_MAX)
        self._rules[_TIME_MS_MAX] = TIME_MS_MAX
        self._rules[_PLACE_MAX] = places.PLACE_MAX
        self._own = np.zeros(len(kinds) + 1, np.int64), np.zeros(_KNOWN, np.int64)
        loaded(_look, lambda: self.look(memoryview(b"\n"), np.zeros(0, np.int64)))

    def look(self, data: memoryview, ends: Ints) -> Found:
        """Look at rows. data: UTF-8. ends: of each row."""
        good = np.zeros(len(ends), np.bool_)
        found = np.zeros((_COLUMNS, len(ends)), np.int64)
        members = (*self._names, self._kinds, self._roles)
        _look(
            np.frombuffer(data, np.uint8),
            ends,
            *members,
            *self._words,
            self._rules,
            *self._own,
            good,
            found,
        )
        return Found(good, *(found if good.all() else found[:, good]))


def _joined(words: Sequence[str]) -> tuple[Bytes, Ints]:
    """Return the bytes of some words, and where each ends. Behind them are some more."""
    encoded = [word.encode() for word in words]
    ends = np.cumsum([len(word) for word in encoded], dtype=np.int64)
    return np.frombuffer(b"".join((*encoded, bytes(WIDE))), np.uint8), ends


# Compiled. A place is -1 where something is odd. Each row ends in a brace and a newline, and whatever is read stops at a byte
# of another kind, so that nothing is read beyond its row.

_TEXT, _WHOLE = range(2)  # kinds, less objects
_QUOTE, _BACKSLASH, _COMMA, _COLON, _NEWLINE, _POINT, _MINUS = b'"\\,:\n.-'
_OPEN, _CLOSE, _OPEN_ARRAY, _CLOSE_ARRAY = b"{}[]"
_SPACE, _TAB, _RETURN, _ZERO, _NINE, _LARGE_A, _LARGE_Z = b" \t\r09AZ"
_A, _B, _E, _F, _L, _N, _R, _S, _T, _U, _LARGE_E = b"abeflnrstuE"
_TO_SMALL = 32  # from a large letter

_Function = Callable[..., Any]


# None makes or keeps an array. Numba would count who holds those that are given, at each call, and with steps that no other
# processor may see half done: three quarters of the time of a look.
_OPTIONS: Final[dict[str, Any]] = {"forceinline": True, "_nrt": False}


def _compiled(function: _Function) -> _Function:
    """Compile a function when it is first called. Those before `_look` become parts of it."""
    made: _Function = numba.njit(**_OPTIONS)(function)
    return made


def kept(function: _Function) -> _Function:
    """Compile a function when it is first called, and keep it where there is room to keep anything."""
    try:
        made: _Function = numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no folder can be written to
        made = _compiled(function)
    return made


def loaded(function: Any, call: Callable[[], object]) -> None:
    """Call a kept function for the first time. If what was kept is damaged, or no room is left, do without in this process."""
    try:
        call()
    except Exception:  # noqa: BLE001  # whatever comes of damaged bytes
        cache = function._cache  # noqa: SLF001  # Numba's `recompile` would fail on a full disk
        with contextlib.suppress(OSError):
            cache.flush()  # the next process keeps it anew
        cache.disable()


@_compiled
def _blank(data: Bytes, at: int) -> int:
    """Return the place behind white space."""
    while data[at] <= _SPACE and (data[at] == _SPACE or data[at] == _TAB or data[at] == _RETURN):
        at += 1
    return at


@_compiled
def _simple(byte: int) -> bool:
    """Say whether a letter behind a backslash is one that every writer of JSON writes."""
    return byte == _N or byte == _T or byte == _R or byte == _B or byte == _F


@_compiled
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


@_compiled
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


@_compiled
def _plain(data: Bytes, at: int) -> int:
    """Return the place behind a string that has no escapes. at: behind its first quote."""
    at = _stop(data, at)
    return at + 1 if data[at] == _QUOTE else -1


@_compiled
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


@_compiled
def _whole(data: Bytes, at: int) -> int:
    """Return the place behind a whole number, whatever follows."""
    if data[at] == _MINUS:
        at += 1
    if data[at] == _ZERO:
        return at + 1
    return _digits(data, at)


@_compiled
def _number(data: Bytes, at: int) -> int:
    """Return the place behind a number without an exponent."""
    at = _whole(data, at)
    if at > 0 and data[at] == _POINT:
        at = _digits(data, at + 1)
    return at


@_compiled
def _word(data: Bytes, at: int) -> int:
    """Return the place behind true, false or null."""
    if data[at] == _T and data[at + 1] == _R and data[at + 2] == _U and data[at + 3] == _E:
        return at + 4
    if data[at] == _N and data[at + 1] == _U and data[at + 2] == _L and data[at + 3] == _L:
        return at + 4
    if data[at] == _F and data[at + 1] == _A and data[at + 2] == _L and data[at + 3] == _S:
        return at + 5 if data[at + 4] == _E else -1
    return -1


@_compiled
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
            if opened > depth_max or levels > _LEVELS_MAX:
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


@_compiled
def _same(data: Bytes, at: int, names: Bytes, start: int, size: int) -> bool:
    """Say whether so many bytes are the same at both places."""
    if size < WIDE and at + WIDE <= len(data):
        wanted = (np.uint32(1) << np.uint32(size)) - np.uint32(1)
        return wide.same(data, at, names, start) & wanted == wanted
    place = 0
    while place < size and data[at + place] == names[start + place]:
        place += 1
    return place == size


@_compiled
def _name(data: Bytes, at: int, end: int, names: Bytes, ends: Ints, likely: int) -> int:
    """Return which name a key has, -1 for none. at: behind its opening quote. end: of the row. likely: looked at first."""
    for look in range(-1, len(ends)):
        name = likely if look < 0 else look
        start = ends[name - 1] if name else 0
        size = ends[name] - start
        if at + size < end and data[at + size] == _QUOTE and _same(data, at, names, start, size):
            return name
    return -1


@_compiled
def _value(data: Bytes, at: int, end: int) -> int:
    """Return a whole number."""
    value = 0
    for place in range(at + (data[at] == _MINUS), end):
        value = value * 10 + data[place] - _ZERO
    return -value if data[at] == _MINUS else value


@_compiled
def _behind(data: Bytes, at: int, kind: int, rules: Ints) -> int:
    """Return the place behind a member's value."""
    if kind == _TEXT:
        return _string(data, at + 1, rules[_STRING_BYTES_MAX]) if data[at] == _QUOTE else -1
    if kind == _WHOLE:
        return _whole(data, at)
    if data[at] != _OPEN:
        return -1
    return _object(data, at, rules[_STRING_BYTES_MAX], rules[_DEPTH_MAX])


@_compiled
def _row(  # noqa: PLR0917  # Numba takes no keywords
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
        if 0 <= role < _MOMENT and data[first] == _QUOTE:
            at = _plain(data, first + 1)
            known[_START + role] = first + 1
            known[_BYTES + role] = at - first - 2
        else:
            at = _behind(data, first, kinds[name], rules)
        if at < 0:
            return -1
        if role == _MOMENT:
            time = _value(data, first, at)
        at = _blank(data, at)
        if data[at] != _COMMA:
            return time if at == end - 2 and seen & rules[_NEEDED] == rules[_NEEDED] else -1


@_compiled
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


@_compiled
def _mixed(word: Any) -> Any:
    word = (word ^ (word >> np.uint64(32))) * np.uint64(0xFF51AFD7ED558CCD)
    word = (word ^ (word >> np.uint64(29))) * np.uint64(0xC4CEB9FE1A85EC53)
    return word ^ (word >> np.uint64(32))


@_compiled
def _hash(data: Bytes, start: int, size: int, seed: int) -> int:
    """Return the hash of an id, as `hashes` makes it."""
    found = np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed * 128 + size)
    for at in range(start, start + size, WORD):
        left = start + size - at
        if at + WORD <= len(data):
            word = wide.word(data, at)
            if left < WORD:
                word &= (np.uint64(1) << np.uint64(8 * left)) - np.uint64(1)
        else:
            word = np.uint64(0)
            for place in range(left):
                word |= np.uint64(data[at + place]) << np.uint64(8 * place)
        found = _mixed(found ^ word)
    return max(np.int64(found >> np.uint64(1)), np.int64(found != np.uint64(0)))  # type: ignore[return-value]  # an int64


@_compiled
def _characters(data: Bytes, at: int, size: int) -> int:
    """Return how many characters a text has."""
    count = 0
    for place in range(at, at + size):
        count += (data[place] & 0xC0) != 0x80  # not a character's second byte
    return count


@_compiled
def _good(data: Bytes, role: int, at: int, size: int, rules: Ints) -> bool:
    """Say whether a text is good in its role, if it is none of the words."""
    if role == _TYPE:
        return size > 0 and size <= rules[_TYPE_BYTES_MAX]
    if size == 0 or size > rules[_ID_BYTES_MAX]:
        return False
    if role == _INSERT:
        return True
    long = size >= 4 * rules[_ID_LENGTH_MIN] or _characters(data, at, size) >= rules[_ID_LENGTH_MIN]
    return long and data[at] > _SPACE


@kept
def _look(  # noqa: PLR0913, PLR0917  # Numba takes no keywords
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
        for at in range(_KNOWN):
            known[at] = 0
        time = _row(data, start, end, names, name_ends, kinds, roles, usual, rules, known)
        fine = 0 <= time <= rules[_TIME_MS_MAX]
        for role in range(_MOMENT if fine else 0):
            at, size = known[_START + role], known[_BYTES + role]
            if not at:
                continue
            among = role != _INSERT and _among(data, at, size, words, word_ends)
            if among or not _good(data, role, at, size, rules):
                fine = False
            else:
                found[_HASH + role, row] = _hash(data, at, size, role + 1)
            fine &= at - start <= rules[_PLACE_MAX]
            found[_PLACES, row] |= (at - start) << (_BITS * role)
            found[_SIZES, row] |= size << (_BITS * role)
        found[_TIME, row] = time
        someone = found[_HASH + _DEVICE, row] | found[_HASH + _USER, row]
        good[row] = fine and someone != 0
