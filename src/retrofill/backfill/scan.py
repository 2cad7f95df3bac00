"""Rows that are events as they stand, told by one look at each byte.

A row passes if it is one JSON object on a line of its own, whose members are all named, each once and of its kind, an
event type, a time and an `insert_id` among them, with good ids and nothing that the core would mend: no null for a member,
no long text, no number near the end of 64 bits, no rare escape. What is found on the way is kept: ids, type and time of
each row, and the hashes of its ids, the same that `hashes` makes. Whatever is doubtful does not pass; it has ways of its own.

The look is a loop over bytes (`bytewise`), compiled for this machine when it is first needed: some seconds once. So only sources
that are worth it are looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from retrofill.backfill import hashes, layout, places
from retrofill.backfill.native import native
from retrofill.backfill.people import Ints
from retrofill.core import event, glance
from retrofill.limits import DEPTH_MAX, STRING_CHARS_MAX, TIME_MS_MAX

Bytes = NDArray[np.uint8]
Bools = NDArray[np.bool_]

MEMBERS_MAX: Final = 62  # each has a bit
_KINDS: Final = {
    "text": layout.TEXT,
    "millis": layout.WHOLE,
    "integer": layout.WHOLE,
    "object": layout.OBJECT,
}


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
        self._rules = np.zeros(layout.RULES, np.int64)
        self._rules[layout.NEEDED] = sum(1 << at for at, name in enumerate(kinds) if name in needed)
        self._rules[layout.STRING_BYTES_MAX] = STRING_CHARS_MAX
        self._rules[layout.TYPE_BYTES_MAX] = STRING_CHARS_MAX // 4
        self._rules[layout.ID_BYTES_MAX] = hashes.TOGETHER  # longer ones are hashed in another way
        self._rules[layout.ID_LENGTH_MIN] = id_length_min
        self._rules[layout.DEEP_MAX] = min(DEPTH_MAX, layout.LEVELS_MAX)
        self._rules[layout.LATEST_MS] = TIME_MS_MAX
        self._rules[layout.PLACE_MAX] = places.PLACE_MAX
        self._own = np.zeros(len(kinds) + 1, np.int64), np.zeros(layout.KNOWN, np.int64)
        self._look = native("look")

    def look(self, data: memoryview, ends: Ints) -> Found:
        """Look at rows. data: UTF-8. ends: of each row."""
        good = np.zeros(len(ends), np.bool_)
        found = np.zeros((layout.COLUMNS, len(ends)), np.int64)
        members = (*self._names, self._kinds, self._roles)
        self._look(
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
    return np.frombuffer(b"".join((*encoded, bytes(layout.WIDE))), np.uint8), ends
