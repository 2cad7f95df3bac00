"""What is said again and again, kept once.

Senders repeat what they know of a user on event after event. Whoever says the same text gets the very same object, so
that the fold sees by identity that nothing new is said, and little memory is touched. Nobody may change such an object.

Kept are texts that came twice: one that comes once only leaves a mark, or else a stream of texts that are all different
would go through the memory of the whole table. What is kept changes nothing but speed.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from retrofill.core import mend
from retrofill.limits import ALIKE_BYTES_MAX, ALIKE_MAX, ALIKE_TOTAL_BYTES, DEPTH_MAX

Object = dict[str, Any]
T = TypeVar("T", bytes, tuple[str | None, ...])

_MARKS = 65_536
_decode = msgspec.json.Decoder(list[Object | None]).decode
_pack = msgspec.msgpack.Encoder().encode


class Alike:
    """The texts that came twice. Emptied at its bounds."""

    def __init__(self) -> None:
        self._kept: dict[bytes, Object | None] = {}
        self._bytes = 0
        self._marks = bytearray(_MARKS)

    def read(self, texts: list[bytes]) -> list[Object | None]:
        """Return the objects that these texts say, None for null. Raises what `read` does."""
        found = list(map(self._kept.get, texts))
        new = [index for index, one in enumerate(found) if one is None]
        if new:
            kept, marks = self._kept, self._marks
            for index, one in zip(new, read([texts[index] for index in new]), strict=True):
                found[index] = one
                text = texts[index]
                mark = hash(text)
                place, tag = mark % _MARKS, mark >> 32 & 0xFF
                if marks[place] != tag:
                    marks[place] = tag
                elif len(text) <= ALIKE_BYTES_MAX and text not in kept:
                    kept[text] = one
                    self._bytes += len(text)
            if len(kept) > ALIKE_MAX or self._bytes > ALIKE_TOTAL_BYTES:
                kept.clear()
                self._bytes = 0
        return found


class Same(Generic[T]):
    """Values that came twice, each as one object: whom it is of shares the memory, so that much of it stays near.

    longest, total: of their sizes, as `len` says; what is longer is not kept. Emptied at its bounds.
    """

    def __init__(self, *, most: int, longest: int, total: int) -> None:
        self._most, self._longest, self._total = most, longest, total
        self._kept: dict[T, T] = {}
        self._size = 0
        self._marks = bytearray(_MARKS)

    def one(self, value: T) -> T:
        """Return the object that was the same before, or this one."""
        kept = self._kept
        found = kept.get(value)
        if found is not None:
            return found
        mark = hash(value)
        place, tag = mark % _MARKS, mark >> 32 & 0xFF
        if self._marks[place] != tag:
            self._marks[place] = tag
        elif len(value) <= self._longest:
            self._size += len(value)
            if len(kept) >= self._most or self._size > self._total:
                kept.clear()
                self._size = len(value)
            kept[value] = value
        return value


def read(texts: list[bytes]) -> list[Object | None]:
    """Read objects or nulls.

    Raises ValueError, RecursionError or OverflowError if one is something else, too deep, or holds a number that not
    every decoder does.
    """
    body = b"[" + b",".join(texts) + b"]"
    found = _decode(body)
    _pack(found)  # refuses whole numbers beyond 64 bits
    spare = body.count(b"{") + body.count(b"[") - 1 - (len(found) - found.count(None))
    if spare >= DEPTH_MAX and mend.too_deep(*found):
        raise ValueError(f"more than {DEPTH_MAX} levels")
    return found
