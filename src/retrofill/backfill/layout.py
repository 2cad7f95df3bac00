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

# Known members of objects (`members`), what is told of each: the object it stands in, its name's place and size, the column that gets
# its value, the object that it is, whether it is kept.
NODE, STANDS, SIZE, COLUMN, CHILD, KEEP, TABLE = range(7)
# What is wanted of a value, a bit for each: any (one that is to be written), a text to be spelled as one, a whole number, one that is to
# be written with a point, an object, a string without escapes. And how it is joined to an event: PLAIN without quotes yet, COUNTS as a
# number that is given itself.
AS_WRITTEN, SPELLED, WHOLLY, DECIMAL, MEMBERS, PLAIN, OPENS, CLOSES, COUNTS = range(9)
LONGEST, DEPTH, KEY_BYTES_MAX, FULL, CUT_RULES = range(5)  # FULL: no more members are learned
ROW, FILLED, UNKNOWN, STATE = range(4)  # rows looked at so far, bytes of the heap, unknown members
MEMBERS_MAX: Final = 4096  # of one object that are kept
UNKNOWN_MAX: Final = 1024  # told at once
NESTED_MAX: Final = 16  # objects with known members, one inside the other
