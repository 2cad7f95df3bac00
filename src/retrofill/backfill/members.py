"""What the machine does itself with the members of rows: cut out what a query needs of each, and join events of what comes of it.

`cut` goes through each row once. It knows the names that a mapping asks for, object by object, by their hash, and says where their
values stand; of some objects it puts the members that a mapping keeps together anew. A row that holds anything which DuckDB would
write otherwise where it is passed on (a space, an escape, a number), a name twice, or what is no JSON, is left to DuckDB. `views`
writes what was found as a column of Arrow, without copying it. `join` writes events. See `narrow`, which knows what is asked, and
`bytewise` for how functions here are written.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrofill.backfill import wide
from retrofill.backfill.bytewise import (
    _BACKSLASH,
    _CLOSE,
    _CLOSE_ARRAY,
    _COLON,
    _COMMA,
    _MINUS,
    _N,
    _NEWLINE,
    _NINE,
    _OPEN,
    _OPEN_ARRAY,
    _POINT,
    _QUOTE,
    _SPACE,
    _WORD,
    _ZERO,
    Bools,
    Bytes,
    _blank,
    _hash,
    _part,
    _same,
    _stop,
    _string,
    _word,
)
from retrofill.backfill.layout import (
    AS_WRITTEN,
    CHILD,
    CLOSES,
    COLUMN,
    COUNTS,
    DECIMAL,
    DEPTH,
    FILLED,
    FULL,
    KEEP,
    KEY_BYTES_MAX,
    LEVELS_MAX,
    LONGEST,
    MEMBERS,
    MEMBERS_MAX,
    NODE,
    OPENS,
    PLAIN,
    ROW,
    SIZE,
    SPELLED,
    STANDS,
    TABLE,
    UNKNOWN,
    UNKNOWN_MAX,
    WHOLLY,
    WIDE,
)
from retrofill.backfill.people import Ints

Table = NDArray[np.int64]

_E_SMALL, _E_LARGE, _PLUS = b"eE+"
_SIGNIFICANT_MAX = 15  # digits of a number with a point that is the shortest of its value
_NOUGHTS_MAX = 3  # behind the point, before the first other digit: a smaller one has an exponent
_WHOLE_MAX = 18  # digits that surely fit into 64 bits
_LOOSE_MAX = 40
_INLINE = 12  # bytes of a text that a view holds itself


@_part
def _end_of_digits(data: Bytes, at: int) -> int:
    while _ZERO <= data[at] <= _NINE:
        at += 1
    return at


@_part
def _loose(data: Bytes, at: int) -> int:
    """Return the place behind any number that is not very long."""
    start = at
    at += data[at] == _MINUS
    first = at
    at = at + 1 if data[at] == _ZERO else _end_of_digits(data, at)
    if at == first:
        return -1
    if data[at] == _POINT:
        first = at + 1
        at = _end_of_digits(data, first)
        if at == first:
            return -1
    if data[at] == _E_SMALL or data[at] == _E_LARGE:
        at += 1
        at += data[at] == _MINUS or data[at] == _PLUS
        first = at
        at = _end_of_digits(data, at)
        if at == first or at - first > 2:
            return -1
    return at if at - start <= _LOOSE_MAX else -1


@_part
def _shortest(data: Bytes, at: int) -> int:
    """Return the place behind a number that is written as DuckDB writes its value."""
    minus = data[at] == _MINUS
    at += minus
    first = at
    nought = data[at] == _ZERO
    at = at + 1 if nought else _end_of_digits(data, at)
    whole = at - first
    if whole == 0 or whole > _WHOLE_MAX:
        return -1
    if data[at] != _POINT:
        return -1 if nought and minus else at
    first = at + 1
    at = _end_of_digits(data, first)
    behind = at - first
    if behind == 0 or (0 if nought else whole) + behind > _SIGNIFICANT_MAX:
        return -1
    if data[at - 1] == _ZERO and (behind > 1 or (nought and minus)):
        return -1
    if nought and behind > _NOUGHTS_MAX:
        place = first
        while data[place] == _ZERO:
            place += 1
        if place - first > _NOUGHTS_MAX:
            return -1
    return at


@_part
def _scalar(data: Bytes, at: int, size_max: int, tight: int) -> int:
    if data[at] == _QUOTE:
        return _string(data, at + 1, size_max)
    if data[at] == _MINUS or _ZERO <= data[at] <= _NINE:
        return _shortest(data, at) if tight else _loose(data, at)
    return _word(data, at)


@_part
def _value(data: Bytes, at: int, size_max: int, depth_max: int, tight: int) -> int:
    """Return the place behind a value. tight: it is written as DuckDB would write it, with short strings alone."""
    if data[at] != _OPEN and data[at] != _OPEN_ARRAY:
        return _scalar(data, at, size_max, tight)
    key, empty = data[at] == _OPEN, True
    inside = np.uint64(key)  # as in `bytewise._object`
    levels = 1
    at += 1
    while True:
        at = at if tight else _blank(data, at)
        if key and data[at] == _QUOTE:
            at = _string(data, at + 1, size_max)
            if at < 0:
                return -1
            at = at if tight else _blank(data, at)
            if data[at] != _COLON:
                return -1
            at = at + 1 if tight else _blank(data, at + 1)
            key = empty = False
        if key or (empty and data[at] == _CLOSE_ARRAY):
            if not empty:
                return -1
        elif data[at] == _OPEN or data[at] == _OPEN_ARRAY:
            levels += 1
            if levels > depth_max:
                return -1
            key, empty = data[at] == _OPEN, True
            inside = (inside << np.uint64(1)) | np.uint64(key)
            at += 1
            continue
        else:
            at = _scalar(data, at, size_max, tight)
            if at < 0:
                return -1
        at = at if tight else _blank(data, at)
        while data[at] == (_CLOSE if inside & np.uint64(1) else _CLOSE_ARRAY):
            levels -= 1
            at += 1
            if levels == 0:
                return at
            inside >>= np.uint64(1)
            key = False
            at = at if tight else _blank(data, at)
        if key or data[at] != _COMMA:
            return -1
        key, empty = bool(inside & np.uint64(1)), False
        at += 1


@_part
def _entry(
    data: Bytes, at: int, size: int, node: int, slots: Ints, entries: Table, names: Bytes
) -> int:
    """Return which of the known members of an object this is, -1 for none."""
    mask = len(slots) - 1
    slot = _hash(data, at, size, node + 1) & mask
    while slots[slot]:
        entry = slots[slot] - 1
        same = entries[NODE, entry] == node and entries[SIZE, entry] == size
        if same and _same(data, at, names, entries[STANDS, entry], size):
            return entry
        slot = (slot + 1) & mask
    return -1


@_part
def _is(
    data: Bytes, at: int, end: int, entry: int, node: int, entries: Table, names: Bytes
) -> bool:
    """Say whether a member that is known stands here. at: behind the opening quote of its name."""
    size = entries[SIZE, entry]
    if entries[NODE, entry] != node or size == 0 or at + size >= end or data[at + size] != _QUOTE:
        return False
    return _same(data, at, names, entries[STANDS, entry], size)


@_part
def _fits(data: Bytes, at: int, end: int, want: int) -> bool:
    """Say whether a value is what is wanted of it."""
    byte = data[at]
    number = byte == _MINUS or _ZERO <= byte <= _NINE
    if want & (1 << SPELLED) and (byte == _OPEN or byte == _OPEN_ARRAY):
        return False
    if want & (1 << DECIMAL) and not (number and end - at <= _SIGNIFICANT_MAX):
        return False
    if want & (1 << WHOLLY):
        place = at + (byte == _MINUS)
        if not number or _end_of_digits(data, place) != end:
            return False
    if want & (1 << MEMBERS) and byte != _OPEN:
        return False
    return not want & (1 << PLAIN) or byte != _QUOTE or _stop(data, at + 1) == end - 1


@_part
def _put(data: Bytes, start: int, size: int, to: Bytes, place: int) -> int:
    """Copy bytes, and no others, and return the place behind them. The last step may copy some a second time."""
    if size >= WIDE:
        for at in range(0, size - WIDE, WIDE):
            wide.move(data, start + at, to, place + at)
        wide.move(data, start + size - WIDE, to, place + size - WIDE)
    elif size >= _WORD:
        for at in range(0, size - _WORD, _WORD):
            wide.move_word(data, start + at, to, place + at)
        wide.move_word(data, start + size - _WORD, to, place + size - _WORD)
    else:
        for at in range(size):
            to[place + at] = data[start + at]
    return place + size


@_part
def _together(data: Bytes, kept: Ints, first: int, last: int, state: Ints, heap: Bytes) -> None:
    """Write members as one object."""
    at = state[FILLED]
    heap[at] = _OPEN
    at += 1
    for member in range(first, last):
        if member > first:
            heap[at] = _COMMA
            at += 1
        at = _put(data, kept[4 * member], kept[4 * member + 1], heap, at)
        heap[at] = _COLON
        at = _put(data, kept[4 * member + 2], kept[4 * member + 3], heap, at + 1)
    heap[at] = _CLOSE
    state[FILLED] = at + 1


@_part
def _row(
    data: Bytes,
    start: int,
    end: int,
    row: int,
    slots: Ints,
    entries: Table,
    stamps: Ints,
    usual: Ints,
    names: Bytes,
    wants: Ints,
    filters: Ints,
    rules: Ints,
    stack: Ints,
    kept: Ints,
    state: Ints,
    heap: Bytes,
    found: Table,
    unknown: Ints,
) -> bool:
    """Cut one row and say whether it could be. start: of its opening brace. end: of the row."""
    level, node, members, columns, count = 0, 0, 0, len(wants), 0
    state[ROW] += 1
    stack[0] = stack[1] = 0
    at = _blank(data, start + 1)
    closing = data[at] == _CLOSE
    while True:
        if not closing:
            if data[at] != _QUOTE:
                return False
            first = at + 1
            entry = usual[count]
            if not _is(data, first, end, entry, node, entries, names):
                at = _stop(data, first)
                if data[at] != _QUOTE:
                    return False
                entry = -1
                if 0 < at - first <= rules[KEY_BYTES_MAX]:
                    entry = _entry(data, first, at - first, node, slots, entries, names)
                    usual[count] = max(entry, 0)
                size = at - first
            else:
                size = entries[SIZE, entry]
            count = min(count + 1, len(usual) - 1)
            at = _blank(data, first + size + 1)
            if data[at] != _COLON:
                return False
            value = _blank(data, at + 1)
            column, child, keep = -1, -1, False
            if entry >= 0:
                if stamps[entry] == state[ROW]:
                    return False
                stamps[entry] = state[ROW]
                column, child = entries[COLUMN, entry], entries[CHILD, entry]
                keep = entries[KEEP, entry] != 0
            elif filters[node] >= 0:
                if rules[FULL] or not 0 < size <= rules[KEY_BYTES_MAX]:
                    return False
                if state[UNKNOWN] < UNKNOWN_MAX:
                    place = 3 * state[UNKNOWN]
                    unknown[place], unknown[place + 1], unknown[place + 2] = node, first, size
                state[UNKNOWN] += 1
            tight = column >= 0 or keep
            down = child >= 0 and data[value] == _OPEN
            null = data[value] == _N
            # A text may hold an object that a mapping reaches into.
            odd = child >= 0 and (data[value] == _QUOTE or (filters[child] >= 0 and not null))
            if odd and not down:
                return False
            if tight or not down:
                longest = rules[LONGEST] if tight else len(data)
                depth = rules[DEPTH] if tight else LEVELS_MAX
                at = _value(data, value, longest, depth, tight)
                if at < 0:
                    return False
                if column >= 0 and not null:
                    if not _fits(data, value, at, wants[column]):
                        return False
                    found[column, row], found[columns + column, row] = value, at - value
                if keep and not null:
                    if members == MEMBERS_MAX:
                        return False
                    kept[4 * members], kept[4 * members + 1] = first - 1, size + 2
                    kept[4 * members + 2], kept[4 * members + 3] = value, at - value
                    members += 1
            if down:
                level += 1
                node = child
                stack[2 * level], stack[2 * level + 1] = node, members
                at = _blank(data, value + 1)
                closing = data[at] == _CLOSE
                continue
            at = _blank(data, at)
            if data[at] == _COMMA:
                at = _blank(data, at + 1)
                continue
            if data[at] != _CLOSE:
                return False
        if filters[node] >= 0:
            column = filters[node]
            found[column, row] = state[FILLED]
            _together(data, kept, stack[2 * level + 1], members, state, heap)
            found[columns + column, row] = state[FILLED] - found[column, row]
            members = stack[2 * level + 1]
        at = _blank(data, at + 1)
        if level == 0:
            return at == end - 1 and data[at] == _NEWLINE
        level -= 1
        node = stack[2 * level]
        closing = data[at] == _CLOSE
        if not closing:
            if data[at] != _COMMA:
                return False
            at = _blank(data, at + 1)


def cut(
    data: Bytes,
    ends: Ints,
    slots: Ints,
    entries: Table,
    stamps: Ints,
    usual: Ints,
    names: Bytes,
    wants: Ints,
    filters: Ints,
    rules: Ints,
    stack: Ints,
    kept: Ints,
    state: Ints,
    heap: Bytes,
    good: Bools,
    found: Table,
    unknown: Ints,
) -> None:
    """Cut rows. ends: of each. good, found: get a row each: where the value of each column stands, then their sizes, -1 for none.

    slots, entries: the known members of objects, by hash. stamps: the row in which each stood last. usual: which stood where in the row
    before. wants: of each column.
    filters: of each object the column that gets its members, those that are kept, in `heap`. stack, kept: room. state: see `layout`.
    unknown: gets members of such objects that are not known.
    """
    end = 0
    for row in range(len(ends)):
        start, end = end, ends[row]
        if end - start < 3 or data[start] != _OPEN or data[end - 1] != _NEWLINE:
            continue
        good[row] = _row(
            data,
            start,
            end,
            row,
            slots,
            entries,
            stamps,
            usual,
            names,
            wants,
            filters,
            rules,
            stack,
            kept,
            state,
            heap,
            found,
            unknown,
        )


@_part
def _eight(data: Bytes, start: int, size: int) -> Any:
    """Return the first eight bytes of a text as a number, less if there are less."""
    if size <= 0:
        return np.uint64(0)
    if start + 8 <= len(data):
        word = wide.word(data, start)
        return word if size >= 8 else word & ((np.uint64(1) << np.uint64(8 * size)) - np.uint64(1))
    word = np.uint64(0)
    for place in range(min(size, 8)):
        word |= np.uint64(data[start + place]) << np.uint64(8 * place)
    return word


def views(data: Bytes, wanted: Ints, forms: Ints, found: Table, out: Table, valid: Bools) -> None:
    """Write columns of Arrow's views of texts in `data`. wanted: which columns of `found`; forms: AS_WRITTEN or PLAIN of each.

    out: two numbers for each row, valid: a flag, column after column.
    """
    rows = found.shape[1]
    columns = found.shape[0] // 2
    for at in range(len(wanted)):
        column = wanted[at]
        for row in range(rows):
            start, size = found[column, row], found[columns + column, row]
            if size < 0:
                continue
            valid[at * rows + row] = True
            if forms[at] != AS_WRITTEN and data[start] == _QUOTE:
                start, size = start + 1, size - 2
            first = _eight(data, start, size)
            low = np.uint64(0xFFFFFFFF)
            second = np.uint64(start) << np.uint64(32)
            if size <= _INLINE:
                rest = _eight(data, start + 8, size - 8)
                second = (first >> np.uint64(32)) | ((rest & low) << np.uint64(32))
            out[at, 2 * row] = np.int64(np.uint64(size) | ((first & low) << np.uint64(32)))
            out[at, 2 * row + 1] = np.int64(second)


@_part
def _has_point(data: Bytes, start: int, size: int) -> bool:
    for at in range(start, start + size):
        if data[at] == _POINT:
            return True
    return False


@_part
def _count(number: int, out: Bytes, at: int) -> int:
    """Write a number that is not negative and return the place behind it."""
    digits, rest = 1, number // 10
    while rest:
        digits, rest = digits + 1, rest // 10
    for place in range(at + digits - 1, at - 1, -1):
        out[place] = _ZERO + number % 10
        number //= 10
    return at + digits


def join(
    memory: Bytes,
    base: Ints,
    found: Table,
    places: Ints,
    starts: Table,
    sizes: Table,
    rows: Ints,
    program: Table,
    words: Bytes,
    stack: Ints,
    out: Bytes,
    ends: Ints,
) -> None:
    """Write events, a line each. found: where values of rows stand, as `cut` says it; places: the row of each event.

    starts, sizes: of the values that the answer has, of each event, -1 for none; rows: of which of them events are made.
    memory: holds all values. base: its address, and what is to be added to a place in found.
    program: steps, each with what is done, the place and size of a member's name in `words`, and the number of its value: of
    an answer's column, or, from -1 down, of a found one. ends: of each event in `out`.
    """
    at = 0
    columns = found.shape[0] // 2
    for event in range(len(rows)):
        row = rows[event]
        out[at] = _OPEN
        at += 1
        level, bare = 0, True  # whether what is open has no member yet
        for step in range(program.shape[1]):
            what, word, length = program[0, step], program[1, step], program[2, step]
            if what == CLOSES:
                level -= 1
                if bare:
                    at, bare = stack[2 * level], stack[2 * level + 1] != 0
                else:
                    out[at] = _CLOSE
                    at += 1
                continue
            start, size = 0, 0
            if what == OPENS:
                stack[2 * level], stack[2 * level + 1] = at, bare
                level += 1
            else:
                value = program[3, step]
                if value < 0:
                    start = found[-1 - value, places[row]] - base[0]
                    size = found[columns - 1 - value, places[row]]
                else:
                    start, size = starts[value, row], sizes[value, row]
                    start -= 0 if what == COUNTS else base[0]
                if size < 0 or (what == MEMBERS and size == 2):
                    continue
            if not bare:
                out[at] = _COMMA
                at += 1
            at = _put(words, word, length, out, at)
            bare = what == OPENS
            if what == OPENS:
                out[at] = _OPEN
                at += 1
                continue
            if what == COUNTS:
                at = _count(start, out, at)
                continue
            quoted = what == PLAIN or (what == SPELLED and memory[start] != _QUOTE)
            if quoted:
                out[at] = _QUOTE
                at += 1
            at = _put(memory, start, size, out, at)
            if quoted:
                out[at] = _QUOTE
                at += 1
            if what == DECIMAL and not _has_point(memory, start, size):
                out[at], out[at + 1] = _POINT, _ZERO
                at += 2
        out[at], out[at + 1] = _CLOSE, _NEWLINE
        at += 2
        ends[event] = at


@_part
def _unescaped(memory: Bytes, start: int, size: int) -> bool:
    for at in range(start, start + size):
        if memory[at] < _SPACE or memory[at] == _QUOTE or memory[at] == _BACKSLASH:
            return False
    return True


def vouch(memory: Bytes, starts: Ints, sizes: Ints, form: Ints, rules: Ints, good: Bools) -> None:
    """Say which values are JSON that the core surely takes as it is: with short strings and numbers, and not too deep.

    form: PLAIN where they are texts, of which it is said whether they are written in JSON as they stand.
    """
    for row in range(len(starts)):
        start, size = starts[row], sizes[row]
        if size <= 0 or not good[row]:
            continue
        byte = memory[start]
        if form[0] == PLAIN:
            good[row] = _unescaped(memory, start, size)
        elif byte == _OPEN or byte == _OPEN_ARRAY or byte == _QUOTE:
            good[row] = _value(memory, start, rules[LONGEST], rules[DEPTH], 1) == start + size
        else:
            good[row] = size <= _SIGNIFICANT_MAX


def hashed(memory: Bytes, starts: Ints, sizes: Ints, seed: Ints, out: Ints) -> None:
    """Hash texts as `hashes` does it, up to those of TOGETHER bytes; 0 for none."""
    for row in range(len(starts)):
        if sizes[row] > 0:
            out[row] = _hash(memory, starts[row], sizes[row], seed[0])


assert TABLE == 6  # rows of `entries`
