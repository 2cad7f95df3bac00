"""Sums over whole columns that say whether anything in a batch may be odd: quick and sound, but not exact.

Each may doubt what is good, since a doubt costs only time; none may pass what is not. They look at columns and bytes,
not at one event after another: that is what lets a batch of a thousand good events through in a microsecond each.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain, product
from typing import Any

import numpy as np
from msgspec import Raw

from retrofill.core import mend
from retrofill.limits import DEPTH_MAX, GROUP_TYPES_MAX, STRING_CHARS_MAX

# Ids that are the mark of a mistake. Source: contract, events 4, "forbidden values".
_FORBIDDEN = (
    *("anonymous", "nil", "none", "null", "n/a", "na", "undefined", "unknown"),
    *("00000000-0000-0000-0000-000000000000", "{}", "lmy47d", "0", "-1"),
)
ZERO_DEVICE = "00000000-0000-0000-0000-000000000000"
# They in upper, lower and mixed case, some 1,800: so a whole batch is compared at once, without lowering each.
FORBIDDEN_IDS = frozenset(
    "".join(letters)
    for word in _FORBIDDEN
    for letters in product(*({letter, letter.upper()} for letter in word))
)

_FEW = 24  # as many property objects are decoded sooner than summed up
_LONG = 16 * 1024  # from here on a body is faster looked at whole than in steps
_BLOCK = STRING_CHARS_MAX // 2
_QUOTE = 0x22
_ESCAPED_QUOTES_MAX = 64  # passed over before a string is taken for a long one
_OPEN = 0x7B  # { and, its bit 0x20 set, [
_BACKSLASH = 0x5C
_E = 0x65
_ZERO, _TEN = np.uint8(0x30), 10


def ids(known: Collection[str], *, length_min: int) -> bool:
    """Say whether all ids are good as they stand."""
    return (
        min(known) >= "!"  # none is empty or begins with a space
        and min(map(len, known)) >= length_min
        and FORBIDDEN_IDS.isdisjoint(known)
    )


def strings(body: bytes) -> bool:
    """Say whether every string in a body is within STRING_CHARS_MAX bytes.

    Goes from quote to quote in the longest steps that a short string allows. A quote after a backslash may be inside a
    string and does not count.
    """
    if len(body) > _LONG and _strings_shorter(body):
        return True
    step = STRING_CHARS_MAX + 2
    last = len(body) - step
    at = body.find(b'"')
    while at < last:
        end = at + step
        for _ in range(_ESCAPED_QUOTES_MAX):
            end = body.rfind(b'"', at + 1, end)
            if end < 0 or body[end - 1] != _BACKSLASH:
                break
        else:
            return False
        if end < 0:
            return False
        at = end
    return True


def _strings_shorter(body: bytes) -> bool:
    """Say whether there is a quote outside of strings in every block of half of STRING_CHARS_MAX bytes."""
    text = np.frombuffer(body, np.uint8)
    quotes = text == _QUOTE
    if b"\\" in body:
        quotes[1:] &= text[:-1] != _BACKSLASH
    blocks = quotes[: len(text) // _BLOCK * _BLOCK].view(np.uint64).reshape(-1, _BLOCK // 8)
    return bool((np.bitwise_or.reduce(blocks, axis=1) != 0).all())


def groups(sent: Sequence[dict[str, Any]]) -> bool:
    """Say whether all `groups` are as they are kept."""
    if not sent:
        return True
    values = list(chain.from_iterable(map(dict.values, sent)))
    if set(map(type, values)) <= {str} and max(map(len, sent)) <= GROUP_TYPES_MAX:
        return "" not in values
    try:
        return all(mend.groups(found) == found for found in sent)
    except ValueError:
        return False


def openings(body: bytes) -> int:
    """Count the brackets that open an object or array, those in strings too."""
    return int(np.count_nonzero(np.frombuffer(body, np.uint8) | 0x20 == _OPEN))


def raws(sent: Sequence[Raw], *, spare: int | None = None) -> bool:
    """Say whether event properties, as text, are objects neither too deep nor with a number that no decoder holds.

    spare: how many objects and arrays the body holds beyond those every event must have; if not known, they are counted.
    """
    if len(sent) <= _FEW:
        read = mend.object_ if spare is None or spare >= DEPTH_MAX else mend.value
        return all(type(mend.optional(read, raw)) is dict for raw in sent)
    text = np.frombuffer(b"".join(sent), np.uint8)
    sizes = np.fromiter(map(len, sent), np.int64, len(sent))
    ends = np.cumsum(sizes)
    if (text[ends - sizes] != _OPEN).any():
        return False
    low = text | 0x20
    if spare is None:
        spare = int(np.count_nonzero(low == _OPEN)) - len(sent)
    if spare >= DEPTH_MAX:
        openings = np.add.reduceat(low == _OPEN, ends - sizes, dtype=np.int32)
        deep = np.flatnonzero(openings > DEPTH_MAX).tolist()
        if any(mend.optional(mend.object_, sent[index]) is None for index in deep):
            return False
    # A number out of range has an exponent of three digits, or 200 digits in a row, six of them at every 32nd place.
    digit = text - _ZERO < _TEN  # unsigned: what is below 0 is far above 9
    exponent = (low[1:-3] == _E) & digit[:-4] & digit[3:-1] & digit[4:]
    some = digit[::32]
    run = some[5:] & some[4:-1] & some[3:-2] & some[2:-3] & some[1:-4] & some[:-5]
    places = np.concatenate((np.flatnonzero(exponent), np.flatnonzero(run) * 32))
    doubts = set(np.searchsorted(ends, places, side="right").tolist())
    return all(mend.optional(mend.value, sent[index]) is not None for index in doubts)
