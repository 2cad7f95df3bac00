"""What compiled code (`bytewise`) and those who call it both know: numbers for kinds, for rules, and for where each finding goes."""

from __future__ import annotations

from typing import Final

WIDE: Final = 32  # bytes that are looked at in one step; names and words have as many behind them
BITS: Final = 16  # of a place in a row, and of a size: see `places`
LEVELS_MAX: Final = 62  # objects and arrays, one inside the other: each has a bit

TEXT, WHOLE, OBJECT = range(3)  # kinds of members
DEVICE, USER, INSERT, TYPE, MOMENT = range(
    5
)  # roles: of the texts in `places`, and that of the time
# What is found of a row: where its texts stand and how long they are, the time, the hashes of its texts.
PLACES, SIZES, TIME, HASH, COLUMNS = 0, 1, 2, 3, 7
# What is known of its texts meanwhile, one after the other: where they start and how many bytes they have.
START, BYTES, KNOWN = 0, 4, 8
RULES: Final = 8
(
    NEEDED,  # a bit for each member that every row has
    STRING_BYTES_MAX,
    TYPE_BYTES_MAX,
    ID_BYTES_MAX,
    ID_LENGTH_MIN,
    DEEP_MAX,
    LATEST_MS,
    PLACE_MAX,
) = range(RULES)
